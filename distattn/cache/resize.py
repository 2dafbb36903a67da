"""Another number of slots, on the same devices or on others.

The order of slots never matters, so the slots are sharded anew along S wherever they are: tags go with
their keys. A cache of S slots on D devices becomes one of S' on D' in up to three steps; a step that would
change nothing is left out:

1. on the old devices, min(S, S') slots, rounded up so that D and D' divide them;
2. to the new devices, in order;
3. on the new devices, S' slots.

Growing adds free slots to each device. Shrinking drops free slots: on every device by itself if its tokens
fit in its remaining slots; else the surplus goes to the devices with the fewest tokens, a window at a time.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from distattn.cache.layout import FREE, Arrays, Layout, letters_in
from distattn.cache.slots import as_integers, choose_owners, occupied, write

WINDOWS = 8  # at most 1/8 of the new slots are between devices at any time


def check_fit(counts: np.ndarray, slots: int) -> None:
    """Raise ValueError if a sequence has more tokens, int[B, D], than slots."""
    held = counts.sum(axis=1)
    if held.max() <= slots:
        return
    sequence = int(held.argmax())
    raise ValueError(
        f"sequence {sequence} holds {held[sequence]} tokens, {counts[sequence].tolist()} on the devices, "
        f"and capacity={slots} has no room for them (sequences with too many: "
        f"{np.flatnonzero(held > slots).tolist()}); nothing was changed: evict, rewind or reset the "
        f"sequence first, or pass a capacity of at least {held.max()}"
    )


def resized(arrays: Arrays, old: Layout, new: Layout, slots: int) -> Arrays:
    """Return the arrays of a cache in another layout, with another number of slots that fit the tokens."""
    if new != old:
        both = math.lcm(old.devices, new.devices)
        common = math.ceil(min(arrays["positions"].shape[1], slots) / both) * both
        with old.context():
            arrays = with_slots(old, arrays, common)
        with new.context():
            arrays = counted(new, _moved(new, arrays))
    with new.context():
        return with_slots(new, arrays, slots)


def _moved(layout: Layout, arrays: Arrays) -> Arrays:
    """Reshard all arrays but the counts over the devices of a layout, in order."""
    return {
        name: jax.device_put(arrays[name], layout.target(letters))
        for name, letters in letters_in(arrays).items()
        if name != "counts"
    }


def counted(layout: Layout, arrays: Arrays) -> Arrays:
    """Return the arrays with the counts of their tags."""
    (counts,) = layout.run(_count, ("BS",), ("Bd",), arrays["positions"])
    return arrays | _as_created(layout, {"counts": "Bd"}, {"counts": counts})


def with_slots(layout: Layout, arrays: Arrays, slots: int) -> Arrays:
    """Return the arrays with S' slots.

    Args:
      layout: of the cache; its devices divide the slots.
      arrays: of the cache; no sequence has more than S' tokens.
      slots: S'.
    """
    before = arrays["positions"].shape[1]
    if slots > before:
        return grown(layout, arrays, slots)
    if slots < before:
        over = np.maximum(layout.fetch(arrays["counts"]) - slots // layout.devices, 0)
        return shrunk(layout, arrays, slots, int(over.sum(axis=1).max()))
    return arrays


def grown(layout: Layout, arrays: Arrays, slots: int) -> Arrays:
    """Return the arrays with more slots, at the end of each device's own. Nothing is sent."""
    letters = _slotted(arrays)
    fills = tuple(FREE if name == "positions" else 0 for name in letters)
    static = ((*letters.values(),), fills, slots // layout.devices)
    return arrays | _as_created(
        layout, letters, layout.update(_grow, arrays, letters, static=static)
    )


def shrunk(layout: Layout, arrays: Arrays, slots: int, surplus: int) -> Arrays:
    """Return the arrays with fewer slots.

    Args:
      layout: of the cache.
      arrays: with S slots.
      slots: S'.
      surplus: tokens of a sequence that devices hold beyond S' / D, for the sequence with the most; 0:
        nothing is sent.
    """
    letters = {"counts": "Bd"} | _slotted(arrays)
    slots_per_device = slots // layout.devices
    window = math.ceil(slots_per_device / WINDOWS)
    changed = layout.update(
        _shrink,
        arrays,
        letters,
        jnp.asarray(math.ceil(surplus / window), jnp.int32) if surplus else None,
        arrays["positions"],
        argument_letters=("" if surplus else None, "BS"),
        static=((*letters.values(),)[1:], slots_per_device, window),
    )
    return arrays | _as_created(layout, letters, changed)


def _slotted(arrays: Arrays) -> dict[str, str]:
    """Return the letters, by name, of the arrays with a dimension S."""
    return {name: letters for name, letters in letters_in(arrays).items() if "S" in letters}


def _as_created(layout: Layout, letters: dict[str, str], arrays: Arrays) -> Arrays:
    """Give arrays exactly the shardings that `create` gives, so that no step is compiled anew."""
    if layout.mesh is None:
        return arrays
    return {name: jax.device_put(x, layout.sharding(letters[name])) for name, x in arrays.items()}


# Bodies for `Layout.run`.


def _count(layout: Layout, tags: jax.Array) -> tuple[jax.Array]:
    return (occupied(layout, tags),)


def _grow(
    layout: Layout, letters: tuple[str, ...], fills: tuple[int, ...], slots: int, *arrays: jax.Array
) -> tuple[jax.Array, ...]:
    """Pad each array at its end to the new number of slots of a device."""
    grown: list[jax.Array] = []
    for dims, fill, x in zip(letters, fills, arrays, strict=True):
        more = slots - x.shape[dims.index("S")]
        edges = [(0, more if letter == "S" else 0, 0) for letter in dims]
        grown.append(lax.pad(x, jnp.asarray(fill, x.dtype), edges))
    return tuple(grown)


def _shrink(
    layout: Layout,
    letters: tuple[str, ...],
    slots: int,
    window: int,
    rounds: jax.Array | None,
    tags: jax.Array,
    counts: jax.Array,
    *arrays: jax.Array,
) -> tuple[Any, ...]:
    """Return counts, and each array with fewer slots, the occupied ones first.

    The surplus of a sequence, its tokens beyond `slots` on any device, is numbered from device to device.
    Round r moves the numbers from r * window on: the device that holds them adds them to the zeros of all
    others, so that they reach every device, and the device with the fewest tokens by then keeps them.

    Args:
      layout: of the cache.
      letters: of each array's dimensions.
      slots: of a sequence on a device, fewer than before.
      window: W, how many tokens of a sequence move between devices at once.
      rounds: int32[], enough for the surplus of any sequence; None: nothing is sent.
      tags: int32[B, S], of this device's slots.
      counts: int32[B, D].
      *arrays: with S, the tags among them.
    """
    # All as [L, B, S, ...], and as integers: nothing is rounded, nor widened, nor loses the sign of a zero.
    stacked = ["L" in dims for dims in letters]
    bits = [
        x if lead else x[None] for x, lead in zip(map(as_integers, arrays), stacked, strict=True)
    ]
    rows = jnp.arange(counts.shape[0], dtype=jnp.int32)[:, None]
    order = jnp.argsort(tags < 0, axis=1, stable=True).astype(jnp.int32)  # the occupied ones first
    kept = jnp.minimum(counts, slots)
    new = [x[:, rows, order[:, :slots]] for x in bits]
    if rounds is not None:
        surplus = counts - kept
        total = surplus.sum(axis=1, keepdims=True, dtype=jnp.int32)
        before = jnp.cumsum(surplus, axis=1, dtype=jnp.int32) - surplus
        first, count = (x[:, layout.rank()][:, None] for x in (before, surplus))

        def move(turn: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            counts, *new = carry
            number = turn * window + jnp.arange(window, dtype=jnp.int32)[None]
            wanted = number < total
            sent = (number >= first) & (number < first + count)
            last = tags.shape[1] - 1
            index = jnp.take_along_axis(order, jnp.clip(slots + number - first, 0, last), axis=1)
            owner = choose_owners("least_loaded", counts, counts[:, 0], wanted, slots)
            mine = wanted & (owner == layout.rank())
            # A device's occupied slots are its first ones by now, so the next one is free.
            free = counts[:, layout.rank()][:, None] - 1 + jnp.cumsum(mine, axis=1, dtype=jnp.int32)
            free = jnp.where(mine, free, slots)
            for i, x in enumerate(bits):
                parcel = x[:, rows, index]
                from_here = sent.reshape((1, *sent.shape, *(1 for _ in parcel.shape[3:])))
                parcel = jnp.where(from_here, parcel, jnp.zeros_like(parcel))
                new[i] = write(new[i], lax.psum(parcel, layout.slots), free, 0)
            counts = counts.at[rows, owner].add(wanted.astype(jnp.int32), mode="drop")
            return counts, *new

        kept, *new = lax.fori_loop(0, rounds, move, (kept, *new))
    restored = (
        lax.bitcast_convert_type(x if lead else x[0], like.dtype)
        for x, lead, like in zip(new, stacked, arrays, strict=True)
    )
    return kept, *restored
