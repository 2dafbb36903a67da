"""Slots: which device and slot a token goes to, edits of their tags, and writes to them.

A slot is tagged with the position of its token; a negative tag means that the slot is free, whatever key
and value it still stores. Every device computes the owner of a new token by itself, from the counts of
occupied slots that all devices know, so nothing is sent. The owner chooses one of its free slots.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from distattn._compat import platform_of
from distattn.cache.layout import FREE, Layout
from distattn.local.tiling import loop

PLACEMENTS = ("least_loaded", "round_robin", "block")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Slots:
    """Slots that are reserved, and tagged, for new tokens.

    `index` is the slot on the device that owns the token; on other devices, and for a token without a slot,
    it is past the end. With `local` each device knows only its own shard of the T tokens.
    """

    index: jax.Array  # int32[D, B, T], with `local` int32[D, B, T / D]
    positions: jax.Array  # int32[B, T], -1 for tokens without a slot
    overflow: jax.Array  # bool[B], sequences for which the append was refused
    replica_index: jax.Array | None = None  # as index, in the replica
    local: bool = dataclasses.field(default=False, metadata={"static": True})


# Bodies for `Layout.run`, which see the slots of one device; and functions on what they see.


def occupied(layout: Layout, tags: jax.Array) -> jax.Array:
    """Return int32[B, D], the number of slots with a token on each device."""
    return layout.gather((tags >= 0).sum(axis=1, dtype=jnp.int32))


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
    """Tag slots for new tokens; a sequence without room for all of its tokens gets none.

    Args:
      layout: of the cache.
      placement: as in `choose_owners`, unless `owner` is given or `local` is set.
      local: shard the T tokens evenly, and leave each token on its device.
      tags: int32[B, S], of this device's slots.
      counts: int32[B, D].
      turn: int32[B].
      new: int32[B, T], positions of the new tokens; negative: no token.
      owner: int32[B, T] or None.

    Returns:
      the new tags and counts, and for `Slots` index int32[1, B, T], positions int32[B, T], overflow
      bool[B].
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
    positions = arriving = jnp.where(taken, new, -1)
    if local:
        size = tokens // devices
        mine, arriving = (
            lax.dynamic_slice_in_dim(x, layout.rank() * size, size, 1) for x in (mine, arriving)
        )
    index = jnp.where(mine, _free_slots(tags, mine), slots)
    tags = tags.at[rows, index].set(arriving, mode="drop")
    counts = jnp.where(overflow[:, None], counts, counts + added)
    return tags, counts, index[None], positions, overflow


def choose_owners(
    placement: str, counts: jax.Array, turn: jax.Array, wanted: jax.Array, slots: int
) -> jax.Array:
    """Return the device of each new token.

    Args:
      placement: 'least_loaded', 'round_robin' or 'block'.
      counts: int32[B, D], occupied slots.
      turn: int32[B], tokens ever placed.
      wanted: bool[B, T], which tokens need a slot.
      slots: of a sequence on one device.

    Returns:
      int32[B, T]; D, or a full device, for a token without room.
    """
    devices = counts.shape[1]
    ordinal = jnp.cumsum(wanted, axis=1, dtype=jnp.int32) - 1  # among the tokens of its sequence
    if placement == "round_robin":
        return (turn[:, None] + ordinal) % devices
    if placement == "block":
        return jax.vmap(lambda free, j: _count_below(jnp.cumsum(free, dtype=jnp.int32), j))(
            slots - counts, ordinal
        )
    return jax.vmap(_fill_evenly)(counts, ordinal)


def _fill_evenly(counts: jax.Array, ordinal: jax.Array) -> jax.Array:
    """Send each token to the device with the fewest tokens by then, as water fills a vessel of steps.

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
    """Count, for each x, the sorted numbers that are at most x."""
    return jnp.searchsorted(ascending, x, side="right").astype(jnp.int32)


def _free_slots(tags: jax.Array, mine: jax.Array) -> jax.Array:
    """Return int32[B, T]: the n-th free slot for the n-th token of a sequence that is mine."""
    free = tags < 0
    if mine.shape[1] == 1:
        return jnp.argmax(free, axis=1, keepdims=True).astype(jnp.int32)
    return jax.vmap(lambda a, n: jnp.searchsorted(a, n).astype(jnp.int32))(
        jnp.cumsum(free, axis=1, dtype=jnp.int32), jnp.cumsum(mine, axis=1, dtype=jnp.int32)
    )


def tally(
    layout: Layout,
    new: jax.Array,
    taken: jax.Array,
    next_position: jax.Array,
    placed: jax.Array,
    refused: jax.Array,
) -> tuple[jax.Array, ...]:
    """Return next_position, appended, placed and refused after an append."""
    appended = (taken >= 0).sum(axis=1, dtype=jnp.int32)
    wanted = (new >= 0).sum(axis=1, dtype=jnp.int32)
    return (
        jnp.maximum(next_position, taken.max(axis=1) + 1),
        appended,
        placed + appended,
        refused + wanted - appended,
    )


Edit = Callable[..., jax.Array]  # new tags from tags and other arrays


def retag(
    layout: Layout, edit: Edit, count: bool, tags: jax.Array, *arguments: jax.Array
) -> tuple[jax.Array, ...]:
    """Return edited tags and, with `count`, their counts."""
    tags = edit(tags, *arguments)
    return (tags, occupied(layout, tags)) if count else (tags,)


def clear(
    layout: Layout, gone: jax.Array, tags: jax.Array, *counters: jax.Array
) -> tuple[jax.Array, ...]:
    """Free the slots of the sequences that are gone, and zero their counters, [B] or [B, D]."""
    tags = jnp.where(gone[:, None], FREE, tags)
    masks = (gone if x.ndim == 1 else gone[:, None] for x in counters)
    return tags, *(
        jnp.where(mask, jnp.zeros_like(x), x) for mask, x in zip(masks, counters, strict=True)
    )


def below(tags: jax.Array, lengths: jax.Array) -> jax.Array:
    """Free the slots of positions from a length on."""
    return jnp.where(tags < lengths[:, None], tags, FREE)


def in_window(tags: jax.Array, first: jax.Array, keep_first: jax.Array) -> jax.Array:
    """Free the slots of positions from `keep_first` to `first`, exclusive."""
    return jnp.where((tags >= first[:, None]) | (tags < keep_first[:, None]), tags, FREE)


def on_path(tags: jax.Array, start: jax.Array, nodes: jax.Array) -> jax.Array:
    """Free the nodes from `start` on that are not on the path, and number those on it."""
    node = tags - start[:, None]
    match = (node[:, None] == nodes[:, :, None]) & (nodes >= 0)[:, :, None]  # [B, P, S]
    depth = jnp.argmax(match, axis=1).astype(jnp.int32)
    renumbered = jnp.where(match.any(axis=1), start[:, None] + depth, FREE)
    return jnp.where(node < 0, tags, renumbered)


def mask_of_tree(
    layout: Layout, tags: jax.Array, start: jax.Array, tree: jax.Array
) -> tuple[jax.Array]:
    """Return the mask bool[B, 1, T, S] of a token tree bool[B, T, T] that begins at `start`."""
    tokens = tree.shape[1]
    node = (tags - start[:, None])[:, None]  # [B, 1, S]
    index = jnp.broadcast_to(jnp.clip(node, 0, tokens - 1), (*tree.shape[:2], tags.shape[1]))
    inside = (node >= 0) & (node < tokens)
    allowed = jnp.where(inside, jnp.take_along_axis(tree, index, axis=2), node < 0)
    return (allowed[:, None],)


def write_tokens(
    layout: Layout,
    layers: bool,
    local: bool,
    index: jax.Array,
    layer: jax.Array | None,
    *arrays: jax.Array,
) -> tuple[jax.Array, ...]:
    """Write the second half of the arrays, new tokens, to their slots in the first half.

    Args:
      layout: of the cache, or of its replica.
      layers: whether the cache has layers.
      local: whether each device has its own shard of the new tokens.
      index: int32[1, B, T], of `Slots`.
      layer: int32[], the layer to write; None: all.
      *arrays: stored arrays [L, B, S, ...], then new ones, [L, B, T, ...] or of one layer [B, T, ...].

    Returns:
      The stored arrays.
    """
    stored, new = arrays[: len(arrays) // 2], arrays[len(arrays) // 2 :]
    if layout.replica_source and local:  # only its owner has this shard of the new tokens
        new = [from_source(layout, x) for x in new]
    pairs = zip(stored, new, strict=True)
    if not layers:
        return tuple(write(old[None], new[None], index[0], 0)[0] for old, new in pairs)
    if layer is None:
        return tuple(write(old, new, index[0], 0) for old, new in pairs)
    count, slots = stored[0].shape[0], stored[0].shape[2]
    index = jnp.where((layer >= 0) & (layer < count), index[0], slots)
    return tuple(write(old, new[None], index, layer) for old, new in pairs)


def write(stored: jax.Array, new: jax.Array, index: jax.Array, layer: jax.Array | int) -> jax.Array:
    """Write new items to their slots; drop those whose index is past the end.

    Args:
      stored: [L, B, S, ...].
      new: [1, B, T, ...], or for all layers [L, B, T, ...].
      index: int32[B, T].
      layer: int32[], the layer to write; 0 for all.

    Returns:
      As `stored`.
    """
    new = new.astype(stored.dtype)
    if stored.dtype.itemsize != 2 or platform_of() != "cpu":
        rows = jnp.arange(index.shape[0], dtype=jnp.int32)[:, None]
        layers = slice(None) if new.shape[0] == stored.shape[0] else layer
        new = new if new.shape[0] == stored.shape[0] else new[0]
        return stored.at[layers, rows, index].set(new, mode="drop")

    # XLA:CPU scatters in no 16-bit format, nor reads a slot where it writes one: it would widen, that is
    # copy, the whole array. So items are written one by one, and only those with a slot here.
    tokens, slots = index.shape[1], stored.shape[2]
    width = (0,) * (stored.ndim - 3)

    def put(i: jax.Array | int, stored: jax.Array) -> jax.Array:
        row, token = i // tokens, i % tokens
        slot = index[row, token]
        item = lax.dynamic_slice(
            new, (0, row, token, *width), (*new.shape[:1], 1, 1, *new.shape[3:])
        )
        return lax.cond(
            slot < slots,
            lambda x: lax.dynamic_update_slice(x, item, (layer, row, slot, *width)),
            lambda x: x,
            stored,
        )

    return loop(index.size, put, stored)


def copy_sequences(
    layout: Layout,
    letters: tuple[str, ...],
    source: jax.Array,
    target: jax.Array,
    *arrays: jax.Array,
) -> tuple[jax.Array, ...]:
    """Copy sequences over others, in each of the arrays, whose letters are given."""
    axes = [x.index("B") for x in letters]
    batch = arrays[0].shape[axes[0]]
    start = lax.axis_index(layout.batch) * batch if layout.batch else 0
    valid = (source >= 0) & (source < batch * layout.size(layout.batch))
    # All arrays of a sequence come from one source, in whatever order a device writes.
    again = jnp.triu((target[:, None] == target[None]) & valid[None], 1).any(axis=1)
    valid &= ~again & (target >= start) & (target < start + batch)
    place = jnp.where(valid, target - start, batch)
    return tuple(
        _copy(layout, x, source - start, place, axis) for x, axis in zip(arrays, axes, strict=True)
    )


def _copy(
    layout: Layout, x: jax.Array, source: jax.Array, place: jax.Array, axis: int
) -> jax.Array:
    """Copy sequences of x, whose index counts from this device's first; a place past the end is dropped."""
    copied = jnp.take(x, source, axis=axis, mode="clip")
    if layout.batch:
        # One device has the sequence and the others add zeros, as integers, which change no bit.
        mine = (source >= 0) & (source < x.shape[axis])
        mine = mine.reshape([-1 if a == axis else 1 for a in range(x.ndim)])
        bits = copied.astype(jnp.uint8) if x.dtype == jnp.bool_ else as_integers(copied)
        bits = lax.psum(jnp.where(mine, bits, jnp.zeros_like(bits)), layout.batch)
        copied = bits != 0 if x.dtype == jnp.bool_ else lax.bitcast_convert_type(bits, x.dtype)
    return x.at[(slice(None),) * axis + (place,)].set(copied, mode="drop")


def as_integers(x: jax.Array) -> jax.Array:
    """Return the bits of x as unsigned integers of the same size."""
    return lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))


def from_source(layout: Layout, x: jax.Array) -> jax.Array:
    """Send x from each device to the device that holds its replica."""
    pairs = [(source, holder) for holder, source in enumerate(layout.replica_source)]
    return lax.ppermute(x, layout.slots, pairs)
