"""Who belongs to whom when keys and values arrive separately, and the exchange that joins them.

Everything here is what one device does, on its own shards; with `axes = ()` it is one device alone.
No array is longer than the shards by more than a constant factor: not the values on their way, and
not the index, whose entries are "which item is it": an integer of log n bits each, and no more.

A *slot* is a place in the global array: `rank * length + index`, `length` being that of a shard.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from distattn._compat import vary, varying_axes
from distattn.collectives.mesh import axes_size

_NONE, _MANY = -1, -2  # in place of a slot: no item has this position, or more than one


def pair(
    value_positions: jax.Array, key_positions: jax.Array, axes: tuple[str, ...]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """For each value the slot of its key and for each key the slot of its value.

    The positions go once round the axis, all devices at a time, and on every device they visit they
    are looked up among the positions that live there. After D hops they are home, and know whether
    their position occurs exactly once on either side: so both sides agree on who is paired, and no
    index needs to travel with the values.

    Args:
      value_positions: int32[R, L], R = 1 or B; negative: empty slot.
      key_positions: int32[R, M].
      axes: the axes over which values and keys are sharded.

    Returns:
      there int32[R, L], the slot of the key of each value; back int32[R, M], the slot of the value
      of each key; -1 where there is no unique partner. unmatched int32[R], how many positions, of
      keys and values, over all devices, have none; the same on all devices.
    """
    values, keys = value_positions.shape[1], key_positions.shape[1]
    rank, size = _rank(axes)
    value_table = _Table.of(value_positions, rank * values)
    key_table = _Table.of(key_positions, rank * keys)

    def visit(hop: jax.Array | int, travellers: jax.Array) -> jax.Array:
        positions, partners = travellers
        value_at, key_at = jnp.split(positions, [values], axis=1)
        others = jnp.concatenate([key_table.find(value_at), value_table.find(key_at)], axis=1)
        alike = jnp.concatenate([value_table.find(value_at), key_table.find(key_at)], axis=1)
        # At home one finds oneself; anybody else with the same position spoils it.
        spoilt = (alike == _MANY) | ((alike != _NONE) & (hop != 0))
        found = jnp.where(partners == _NONE, others, jnp.where(others == _NONE, partners, _MANY))
        partners = jnp.where(spoilt, _MANY, found)
        return jnp.stack([positions, partners])

    def hop(index: jax.Array, travellers: jax.Array) -> jax.Array:
        step = [(source, (source + 1) % size) for source in range(size)]
        return lax.ppermute(visit(index, travellers), axes, step)

    positions = jnp.concatenate([value_positions, key_positions], axis=1)
    travellers = jnp.stack([positions, jnp.full_like(positions, _NONE)])
    travellers = vary(travellers, varying_axes(value_table.positions, key_table.positions))
    home = visit(0, travellers) if size == 1 else lax.fori_loop(0, size, hop, travellers)
    partners = jnp.where((positions < 0) | (home[1] < 0), -1, home[1])
    unmatched = jnp.sum((positions >= 0) & (partners < 0), axis=1, dtype=jnp.int32)
    if size > 1 or varying_axes(unmatched):
        unmatched = lax.psum(unmatched, axes)
    there, back = jnp.split(partners, [values], axis=1)
    return there, back, unmatched


def exchange(x: jax.Array, there: jax.Array, back: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Every item at its partner's slot; zero where a slot has no partner.

    One all_to_all moves the items, with room for what a random order sends from one device to
    another. An order that sends more to one device takes more rounds, in the same memory. What
    stays on its device takes none.

    Args:
      x: [B, L, ...].
      there: int32[R, L], R = 1 or B, the slot where each item goes, or -1.
      back: int32[R, M], the slot from which each item of the result comes, or -1; the inverse.
      axes: the axes over which x and the result are sharded.

    Returns:
      [B, M, ...], of the dtype of x.
    """
    rank, size = _rank(axes)
    sent, received = x.shape[1], back.shape[1]
    own = jnp.where((back >= 0) & (back // max(sent, 1) == rank), back - rank * sent, -1)
    result = _take(x, own)
    if size == 1 or min(sent, received) == 0:
        return result
    # Both sides list the items of one pair of devices in the order of the receiver's slots.
    sends = _Parcels.of(there // received, there, rank, size)
    receives = _Parcels.of(back // sent, _index(back), rank, size)
    room = room_for_pair(min(sent, received), size)
    rounds = lax.pmax(jnp.max(-(-sends.counts // room)), axes)

    def one_round(index: jax.Array, result: jax.Array) -> jax.Array:
        parcels = _take(x, sends.slots(index, room))
        parcels = lax.all_to_all(parcels, axes, split_axis=1, concat_axis=1, tiled=True)
        return _put(result, receives.slots(index, room), parcels)

    result = vary(result, varying_axes(x, sends.order, receives.order))
    return lax.fori_loop(0, rounds, one_round, result)


@dataclasses.dataclass(frozen=True)
class _Table:
    """The positions of one device, sorted, to look others up."""

    positions: jax.Array  # int32[R, L], ascending
    slots: jax.Array  # int32[R, L], where each of them is

    @classmethod
    def of(cls, positions: jax.Array, first_slot: jax.Array | int) -> "_Table":
        return cls(*_sort(positions, first_slot + _index(positions)))

    def find(self, positions: jax.Array) -> jax.Array:
        """int32[R, n]: the slot of each position, or _NONE, or _MANY."""
        if self.positions.shape[1] == 0:
            return jnp.full_like(positions, _NONE)
        at = jax.vmap(jnp.searchsorted)(self.positions, positions).astype(jnp.int32)
        first, second = (_take(self.positions, at + step, fill=_NONE) for step in (0, 1))
        slot = _take(self.slots, at, fill=_NONE)
        slot = jnp.where(second == positions, _MANY, jnp.where(first == positions, slot, _NONE))
        return jnp.where(positions < 0, _NONE, slot)


@dataclasses.dataclass(frozen=True)
class _Parcels:
    """The items that one device exchanges, grouped by the other device."""

    order: jax.Array  # int32[R, L], indices of items, device by device
    starts: jax.Array  # int32[R, D], where in `order` each device's begin
    counts: jax.Array  # int32[R, D], how many there are
    length: int

    @classmethod
    def of(
        cls, device: jax.Array, rank_in_parcel: jax.Array, rank: jax.Array, size: int
    ) -> "_Parcels":
        """Items whose device is negative or this one are left out."""
        device = jnp.where((device < 0) | (device == rank), size, device)
        device, _, order = _sort(device, rank_in_parcel, _index(device), keys=2)
        bounds = jnp.arange(size + 1, dtype=jnp.int32)
        bounds = jax.vmap(lambda row: jnp.searchsorted(row, bounds))(device).astype(jnp.int32)
        return cls(order, bounds[:, :-1], jnp.diff(bounds, axis=1), device.shape[1])

    def slots(self, index: jax.Array, room: int) -> jax.Array:
        """int32[R, D * room]: the items of one round, -1 where there is none."""
        entry = index * room + jnp.arange(room, dtype=jnp.int32)[None, None]
        at = self.starts[:, :, None] + entry
        at = jnp.where(entry < self.counts[:, :, None], at, self.length)
        return _take(self.order, at.reshape(at.shape[0], -1), fill=-1)


def room_for_pair(items: int, size: int) -> int:
    """Slots for one pair of devices: a random order needs more about once in 10^8 pairs."""
    mean = items / size
    return min(items, math.ceil(mean + 6 * math.sqrt(mean) + 4))


def _rank(axes: tuple[str, ...]) -> tuple[jax.Array | int, int]:
    if not axes:
        return 0, 1
    return lax.axis_index(axes), axes_size(axes)


def _index(like: jax.Array) -> jax.Array:
    return lax.broadcasted_iota(jnp.int32, like.shape, 1)


def _sort(*arrays: jax.Array, keys: int = 1) -> tuple[jax.Array, ...]:
    # Each output of a sort is typed as varying only where its own input is, which is wrong (argsort
    # is typed replicated inside shard_map), so the inputs are made alike.
    axes = varying_axes(*arrays)
    return tuple(lax.sort([vary(x, axes) for x in arrays], dimension=1, num_keys=keys))


def _take(x: jax.Array, index: jax.Array, fill: int = 0) -> jax.Array:
    """x[b, index[b, i]], with `fill` where the index is outside."""
    if x.shape[1] == 0:
        return jnp.full((x.shape[0], index.shape[1], *x.shape[2:]), fill, x.dtype)
    how = {"mode": "fill", "fill_value": fill, "wrap_negative_indices": False}
    if index.shape[0] == 1:
        return x.at[:, index[0]].get(**how)
    return jax.vmap(lambda row, at: row.at[at].get(**how))(x, index)


def _put(x: jax.Array, index: jax.Array, items: jax.Array) -> jax.Array:
    """x with x[b, index[b, i]] = items[b, i], where the index is inside."""
    how = {"mode": "drop", "wrap_negative_indices": False}
    if index.shape[0] == 1:
        return x.at[:, index[0]].set(items, **how)
    return jax.vmap(lambda row, at, new: row.at[at].set(new, **how))(x, index, items)
