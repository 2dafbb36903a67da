"""Which device and which slot a new token goes to.

Every device comes to the same answer by itself, from the counts of occupied slots that all of them hold:
nothing is sent. Which of its own free slots a device then takes is nobody else's business.
"""

import dataclasses

import jax
import jax.numpy as jnp

from distattn.cache.layout import Layout

FREE = -1  # the tag of a slot that holds no token
PLACEMENTS = ("least_loaded", "round_robin", "block")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """Slots that are reserved for new tokens, tagged already; the keys and values of a layer go there.

    `index` is that of the slot on the device to which the token goes; on all others, and for tokens that
    go nowhere, it is past the end. With `local` a device knows only of its own part of the T tokens.
    """

    index: jax.Array  # int32[D, B, T], with `local` int32[D, B, T / D]
    positions: jax.Array  # int32[B, T], -1 for tokens that go nowhere
    overflow: jax.Array  # bool[B], rows that were refused as a whole
    replica_index: jax.Array | None = None  # as index, in the copies of a cache that has them
    local: bool = dataclasses.field(default=False, metadata={"static": True})


def occupied(layout: Layout, tags: jax.Array) -> jax.Array:
    """int32[B, D], how many slots of each device hold a token; to be called in the body of `Layout.run`."""
    return layout.gather((tags >= 0).sum(axis=1, dtype=jnp.int32))


def choose_owners(
    placement: str, counts: jax.Array, turn: jax.Array, wanted: jax.Array, slots: int
) -> jax.Array:
    """The device of each new token, by the placement.

    Args:
      placement: 'least_loaded', 'round_robin' or 'block'.
      counts: int32[B, D], occupied slots.
      turn: int32[B], tokens ever placed.
      wanted: bool[B, T], which tokens need a slot.
      slots: of a row on one device.

    Returns:
      int32[B, T]; D, or a device that is full, where there is no place.
    """
    devices = counts.shape[1]
    ordinal = jnp.cumsum(wanted, axis=1, dtype=jnp.int32) - 1  # of the token among those of its row
    if placement == "round_robin":
        return (turn[:, None] + ordinal) % devices
    if placement == "block":
        return jax.vmap(lambda free, j: _count_below(jnp.cumsum(free, dtype=jnp.int32), j))(
            slots - counts, ordinal
        )
    return jax.vmap(_fill_evenly)(counts, ordinal)


def _fill_evenly(counts: jax.Array, ordinal: jax.Array) -> jax.Array:
    """Each token to the device that has the fewest then: water that fills a vessel of steps.

    With c_0 <= c_1 <= ... the counts in order, sum_{k < i} (c_i - c_k) tokens fit below the level c_i; the
    tokens after them take turns among the devices 0 .. i, until the level is c_(i+1).
    """
    order = jnp.argsort(counts).astype(jnp.int32)
    level = counts[order]
    index = jnp.arange(counts.shape[0], dtype=jnp.int32)
    below = index * level - (jnp.cumsum(level, dtype=jnp.int32) - level)
    step = _count_below(below, ordinal) - 1
    step = jnp.maximum(step, 0)  # tokens that need no slot may come before the first
    return order[(ordinal - below[step]) % (step + 1)]


def _count_below(ascending: jax.Array, x: jax.Array) -> jax.Array:
    """How many of the sorted numbers are at most x, for each x."""
    return jnp.searchsorted(ascending, x, side="right").astype(jnp.int32)


def take_slots(
    layout: Layout,
    placement: str,
    local: bool,
    tags: jax.Array,
    counts: jax.Array,
    turn: jax.Array,
    new: jax.Array,
    owner: jax.Array | None,
) -> tuple[jax.Array, ...]:
    """Slots for new tokens, tagged; or a whole row is refused and left as it was.

    What one device does, in the body of `Layout.run`.

    Args:
      layout: of the cache.
      placement: as in `choose_owners`, unless `owner` is given or `local` is set.
      local: whether a token goes to the device that holds it already, T being cut evenly.
      tags: int32[B, S], of this device's slots.
      counts: int32[B, D].
      turn: int32[B].
      new: int32[B, T], positions of the new tokens; negative: no token.
      owner: int32[B, T] or None.

    Returns:
      tags and counts as they are then, and for `Slots` index int32[1, B, T], positions int32[B, T],
      overflow bool[B].
    """
    batch, slots = tags.shape
    devices, tokens = layout.devices, new.shape[1]
    wanted = new >= 0
    if local:
        owner = jnp.arange(tokens, dtype=jnp.int32)[None] // (tokens // devices)
        owner = jnp.broadcast_to(owner, new.shape)
    elif owner is None:
        owner = choose_owners(placement, counts, turn, wanted, slots)
    rows = jnp.arange(batch, dtype=jnp.int32)[:, None]
    outside = wanted & ((owner < 0) | (owner >= devices))
    added = jnp.zeros_like(counts).at[rows, owner].add(wanted.astype(jnp.int32), mode="drop")
    overflow = outside.any(axis=1) | (counts + added > slots).any(axis=1)
    taken = wanted & ~overflow[:, None]
    mine = taken & (owner == layout.rank())
    positions = own = jnp.where(taken, new, -1)
    if local:
        part = tokens // devices
        mine, own = (
            jax.lax.dynamic_slice_in_dim(x, layout.rank() * part, part, 1) for x in (mine, own)
        )
    index = jnp.where(mine, _free_slots(tags, mine), slots)
    tags = tags.at[rows, index].set(own, mode="drop")
    counts = jnp.where(overflow[:, None], counts, counts + added)
    return tags, counts, index[None], positions, overflow


def _free_slots(tags: jax.Array, mine: jax.Array) -> jax.Array:
    """int32[B, T]: the n-th free slot for the n-th token of a row that is mine."""
    free = tags < 0
    if mine.shape[1] == 1:
        return jnp.argmax(free, axis=1, keepdims=True).astype(jnp.int32)
    return jax.vmap(lambda a, n: jnp.searchsorted(a, n).astype(jnp.int32))(
        jnp.cumsum(free, axis=1, dtype=jnp.int32), jnp.cumsum(mine, axis=1, dtype=jnp.int32)
    )
