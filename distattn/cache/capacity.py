"""More or fewer slots on the same devices.

Growing adds free slots to each device. Shrinking drops free slots: on every device by itself, where its
occupied slots fit in what is left to it; else the surplus goes to the devices that hold the fewest, a
window of the slots at a time.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from distattn.cache import storage
from distattn.cache.layout import Layout, letters_of
from distattn.cache.slots import FREE, choose_owners, occupied

if TYPE_CHECKING:
    from distattn.cache.kv_cache import KVCache

WINDOWS = 8  # what is on its way between devices at any time is this part of the new cache


def counted(cache: "KVCache") -> "KVCache":
    """The cache with counts that say what its tags say."""
    counts = cache.layout.run(_count, ("BS",), ("B.",), cache.positions)[0]
    return dataclasses.replace(cache, counts=_laid_out(cache.layout, "B.", counts))


def with_slots(cache: "KVCache", slots: int) -> "KVCache":
    """The cache with so many slots.

    Args:
      cache: whose devices divide them, and of whose rows none holds more tokens.
      slots: S'.

    Returns:
      The cache; the same one if it has so many.
    """
    if slots > cache.capacity:
        return grown(cache, slots)
    if slots < cache.capacity:
        over = np.maximum(cache.layout.numbers(cache.counts) - slots // cache.layout.devices, 0)
        return shrunk(cache, slots, int(over.sum(axis=1).max()))
    return cache


def grown(cache: "KVCache", slots: int) -> "KVCache":
    """The cache with more slots, at the end of each device's own. Nothing is sent."""
    letters, arrays = _slotted(cache)
    own, layout = tuple(letters.values()), cache.layout
    fills = tuple(FREE if name == "positions" else 0 for name in letters)
    static = (own, fills, slots // layout.devices)
    changed = layout.run(_grow, own, own, *arrays, static=static)
    return _with(cache, letters, changed)


def shrunk(cache: "KVCache", slots: int, surplus: int) -> "KVCache":
    """The cache with fewer slots.

    Args:
      cache: with S slots.
      slots: S'.
      surplus: the tokens of a row that its devices hold beyond S' / D, of the row where they are most; 0:
        nothing is sent.

    Returns:
      The cache.
    """
    letters, arrays = _slotted(cache)
    own, layout = tuple(letters.values()), cache.layout
    each = slots // layout.devices
    window = math.ceil(each / WINDOWS)
    rounds = jnp.asarray(math.ceil(surplus / window), jnp.int32) if surplus else None
    counts, *changed = layout.run(
        _shrink,
        (None if rounds is None else "", "B.", "BS", *own),
        ("B.", *own),
        *(rounds, cache.counts, cache.positions, *arrays),
        static=(own, each, window),
    )
    cache = dataclasses.replace(cache, counts=_laid_out(layout, "B.", counts))
    return _with(cache, letters, changed)


def _slotted(cache: "KVCache") -> tuple[dict[str, str], list[jax.Array]]:
    """The letters, by name, of the arrays that have a dimension S; and these."""
    letters = {name: x for name, x in letters_of(cache).items() if "S" in x}
    return letters, [getattr(cache, name) for name in letters]


def _with(cache: "KVCache", letters: dict[str, str], arrays: Sequence[jax.Array]) -> "KVCache":
    named = zip(letters.items(), arrays, strict=True)
    laid = {name: _laid_out(cache.layout, own, x) for (name, own), x in named}
    return dataclasses.replace(cache, **laid)


def _laid_out(layout: Layout, letters: str, x: jax.Array) -> jax.Array:
    """The same array with the very sharding that `create` gives, so that no step compiles anew."""
    return x if layout.mesh is None else jax.device_put(x, layout.sharding(letters))


# What one device does, in `Layout.run`.


def _count(layout: Layout, tags: jax.Array) -> tuple[Any, ...]:
    return (occupied(layout, tags),)


def _grow(
    layout: Layout, letters: tuple[str, ...], fills: tuple[int, ...], each: int, *arrays: jax.Array
) -> tuple[Any, ...]:
    """Each array with `each` slots, the new ones at the end."""
    grown = []
    for own, fill, x in zip(letters, fills, arrays, strict=True):
        more = each - x.shape[own.index("S")]
        edges = [(0, more if letter == "S" else 0, 0) for letter in own]
        grown.append(lax.pad(x, jnp.asarray(fill, x.dtype), edges))
    return tuple(grown)


def _shrink(
    layout: Layout,
    letters: tuple[str, ...],
    each: int,
    window: int,
    rounds: jax.Array | None,
    counts: jax.Array,
    tags: jax.Array,
    *arrays: jax.Array,
) -> tuple[Any, ...]:
    """Each array with `each` slots, the occupied ones first, and the counts before them.

    The surplus of a row, what its devices hold beyond `each`, is numbered from device to device. Round r
    takes the numbers from r * window on: whoever holds them adds them to zeros of all others, so that they
    reach every device, and the one with the fewest tokens by then keeps them.

    Args:
      layout: of the cache.
      letters: of each array's dimensions.
      each: slots of a row on a device, fewer than there are.
      window: W, how many tokens of a row move between devices at once.
      rounds: int32[], as many as hold the surplus of any row; None: there is none, and nothing is sent.
      counts: int32[B, D].
      tags: int32[B, S], of this device's slots.
      *arrays: that have S, the tags among them.

    Returns:
      counts and arrays.
    """
    # All as [L, B, S, ...], and as integers: nothing is rounded, nor widened, nor loses the sign of a zero.
    stacked = ["L" in own for own in letters]
    bits = [
        x if lead else x[None]
        for x, lead in zip(map(storage.as_integers, arrays), stacked, strict=True)
    ]
    rows = jnp.arange(counts.shape[0], dtype=jnp.int32)[:, None]
    order = jnp.argsort(tags < 0, axis=1, stable=True).astype(jnp.int32)  # the occupied ones first
    kept = jnp.minimum(counts, each)
    new = [x[:, rows, order[:, :each]] for x in bits]
    if rounds is not None:
        surplus = counts - kept
        total = surplus.sum(axis=1, keepdims=True, dtype=jnp.int32)
        before = jnp.cumsum(surplus, axis=1, dtype=jnp.int32) - surplus
        own_before, own_surplus = (x[:, layout.rank()][:, None] for x in (before, surplus))

        def move(turn: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            counts, *new = carry
            number = turn * window + jnp.arange(window, dtype=jnp.int32)[None]
            wanted = number < total
            own = number - own_before
            sent = (own >= 0) & (own < own_surplus)
            index = jnp.take_along_axis(order, jnp.clip(each + own, 0, tags.shape[1] - 1), axis=1)
            owner = choose_owners("least_loaded", counts, counts[:, 0], wanted, each)
            mine = wanted & (owner == layout.rank())
            # A device's occupied slots are its first ones by now, so the next one is free.
            free = counts[:, layout.rank()][:, None] - 1 + jnp.cumsum(mine, axis=1, dtype=jnp.int32)
            free = jnp.where(mine, free, each)
            for i, x in enumerate(bits):
                parcel = x[:, rows, index]
                parcel = jnp.where(_over(sent, parcel), parcel, jnp.zeros_like(parcel))
                parcel = lax.psum(parcel, layout.slots)
                new[i] = storage.write(new[i], parcel, free, 0)
            counts = counts.at[rows, owner].add(wanted.astype(jnp.int32), mode="drop")
            return counts, *new

        kept, *new = lax.fori_loop(0, rounds, move, (kept, *new))
    new = [
        lax.bitcast_convert_type(x if lead else x[0], like.dtype)
        for x, lead, like in zip(new, stacked, arrays, strict=True)
    ]
    return kept, *new


def _over(rows: jax.Array, x: jax.Array) -> jax.Array:
    """[1, B, W, 1, ...] from [B, W], for x [L, B, W, ...]."""
    return rows.reshape((1, *rows.shape, *(1 for _ in x.shape[3:])))
