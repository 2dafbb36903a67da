"""Pairing of keys and values that arrive separately, and the exchange that joins them.

The functions run on one device's shards, inside `shard_map`; `axes = ()` means one device alone. No
array is longer than the shards by more than a constant factor, the index included: one int32 per
item. A *slot* is a place in the global array: `rank * length + index`, `length` that of a shard.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax

from distattn._compat import vary, varying_axes
from distattn.collectives.mesh import axes_size

_NONE, _MANY = -1, -2  # instead of a slot: no item has this position, or several have


def pair(
    value_positions: jax.Array, key_positions: jax.Array, axes: tuple[str, ...]
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Find for each value the slot of its key, and for each key the slot of its value.

    The positions go once round the axis, and each device looks them up among its own. After D hops
    they are back, and tell whether each occurs exactly once on both sides. So both sides agree on
    the pairs, and no index travels with the values.

    Args:
      value_positions: int32[R, L], R = 1 or B; negative: empty slot.
      key_positions: int32[R, M].
      axes: the axes over which values and keys are sharded.

    Returns:
      there int32[R, L], the slot of the key of each value, and back int32[R, M], the slot of the
      value of each key, -1 without a unique partner. unmatched int32[R], the number of keys and
      values of all devices without one, equal on all devices.
    """
    values, keys = value_positions.shape[1], key_positions.shape[1]
    rank, size = _rank(axes)
    value_table = _Table.of(value_positions, rank * values)
    key_table = _Table.of(key_positions, rank * keys)

    def visit(hop: jax.Array | int, message: jax.Array) -> jax.Array:
        positions, partners = message
        value_at, key_at = jnp.split(positions, [values], axis=1)
        others = jnp.concatenate([key_table.find(value_at), value_table.find(key_at)], axis=1)
        alike = jnp.concatenate([value_table.find(value_at), key_table.find(key_at)], axis=1)
        # Each finds itself at hop 0; another with its position makes the partner ambiguous.
        ambiguous = (alike == _MANY) | ((alike != _NONE) & (hop != 0))
        found = jnp.where(partners == _NONE, others, jnp.where(others == _NONE, partners, _MANY))
        partners = jnp.where(ambiguous, _MANY, found)
        return jnp.stack([positions, partners])

    def hop(index: jax.Array, message: jax.Array) -> jax.Array:
        step = [(source, (source + 1) % size) for source in range(size)]
        return lax.ppermute(visit(index, message), axes, step)

    positions = jnp.concatenate([value_positions, key_positions], axis=1)
    message = jnp.stack([positions, jnp.full_like(positions, _NONE)])
    message = vary(message, varying_axes(value_table.positions, key_table.positions))
    message = visit(0, message) if size == 1 else lax.fori_loop(0, size, hop, message)
    partners = jnp.where((positions < 0) | (message[1] < 0), -1, message[1])
    unmatched = jnp.sum((positions >= 0) & (partners < 0), axis=1, dtype=jnp.int32)
    if size > 1 or varying_axes(unmatched):
        unmatched = lax.psum(unmatched, axes)
    there, back = jnp.split(partners, [values], axis=1)
    return there, back, unmatched


def exchange(x: jax.Array, there: jax.Array, back: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Move every item to its partner's slot; slots without a partner become zero.

    One all_to_all moves the items, with room for what a random order sends from one device to
    another. An order that sends more to one device takes more rounds in equal memory. Items that
    stay on their device are not sent.

    Args:
      x: [B, L, ...].
      there: int32[R, L], R = 1 or B, the slot to which each item goes, or -1.
      back: int32[R, M], the slot from which each item of the result comes, or -1.
      axes: the axes over which x and the result are sharded.

    Returns:
      [B, M, ...], of the dtype of x.
    """
    rank, size = _rank(axes)
    sent, received = x.shape[1], back.shape[1]
    staying = (back >= 0) & (back // max(sent, 1) == rank)
    result = _take(x, jnp.where(staying, back - rank * sent, -1))
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
    """Sorted positions of one device, with their slots."""

    positions: jax.Array  # int32[R, L], ascending
    slots: jax.Array  # int32[R, L]

    @classmethod
    def of(cls, positions: jax.Array, first_slot: jax.Array | int) -> "_Table":
        return cls(*_sort(positions, first_slot + _index(positions)))

    def find(self, positions: jax.Array) -> jax.Array:
        """Return int32[R, n], the slot of each position, or _NONE, or _MANY."""
        if self.positions.shape[1] == 0:
            return jnp.full_like(positions, _NONE)
        at = jax.vmap(jnp.searchsorted)(self.positions, positions).astype(jnp.int32)
        first, second = (_take(self.positions, at + step, fill=_NONE) for step in (0, 1))
        slot = _take(self.slots, at, fill=_NONE)
        slot = jnp.where(second == positions, _MANY, jnp.where(first == positions, slot, _NONE))
        return jnp.where(positions < 0, _NONE, slot)


@dataclasses.dataclass(frozen=True)
class _Parcels:
    """Items that one device exchanges, grouped by the other device."""

    order: jax.Array  # int32[R, L], indices of items, device by device
    starts: jax.Array  # int32[R, D], start of each device's items in `order`
    counts: jax.Array  # int32[R, D], number of each device's items
    length: int  # L

    @classmethod
    def of(
        cls, device: jax.Array, rank_in_parcel: jax.Array, rank: jax.Array, size: int
    ) -> "_Parcels":
        """Group items by device, without those that stay here or go to no device (negative)."""
        device = jnp.where((device < 0) | (device == rank), size, device)
        device, _, order = _sort(device, rank_in_parcel, _index(device), keys=2)
        bounds = jnp.arange(size + 1, dtype=jnp.int32)
        bounds = jax.vmap(lambda row: jnp.searchsorted(row, bounds))(device).astype(jnp.int32)
        return cls(order, bounds[:, :-1], jnp.diff(bounds, axis=1), device.shape[1])

    def slots(self, index: jax.Array, room: int) -> jax.Array:
        """Return int32[R, D * room], the items of one round, -1 in unused places."""
        entry = index * room + jnp.arange(room, dtype=jnp.int32)[None, None]
        at = self.starts[:, :, None] + entry
        at = jnp.where(entry < self.counts[:, :, None], at, self.length)
        return _take(self.order, at.reshape(at.shape[0], -1), fill=-1)


def room_for_pair(items: int, size: int) -> int:
    """Return the slots for one pair of devices; a random order needs more once in 10^8 pairs."""
    mean = items / size
    return min(items, math.ceil(mean + 6 * math.sqrt(mean) + 4))


def _rank(axes: tuple[str, ...]) -> tuple[jax.Array | int, int]:
    if not axes:
        return 0, 1
    return lax.axis_index(axes), axes_size(axes)


def _index(like: jax.Array) -> jax.Array:
    return lax.broadcasted_iota(jnp.int32, like.shape, 1)


def _sort(*arrays: jax.Array, keys: int = 1) -> tuple[jax.Array, ...]:
    # JAX types each output of a sort as varying only if the input at its index varies, which is
    # wrong (argsort is typed as replicated inside shard_map). So all inputs get one type.
    axes = varying_axes(*arrays)
    return tuple(lax.sort([vary(x, axes) for x in arrays], dimension=1, num_keys=keys))


def _take(x: jax.Array, index: jax.Array, fill: int = 0) -> jax.Array:
    """Return x[b, index[b, i]], or `fill` if the index is outside."""
    if x.shape[1] == 0:
        return jnp.full((x.shape[0], index.shape[1], *x.shape[2:]), fill, x.dtype)
    how = {"mode": "fill", "fill_value": fill, "wrap_negative_indices": False}
    if index.shape[0] == 1:
        return x.at[:, index[0]].get(**how)
    return jax.vmap(lambda row, at: row.at[at].get(**how))(x, index)


def _put(x: jax.Array, index: jax.Array, items: jax.Array) -> jax.Array:
    """Set x[b, index[b, i]] = items[b, i] if the index is inside."""
    how = {"mode": "drop", "wrap_negative_indices": False}
    if index.shape[0] == 1:
        return x.at[:, index[0]].set(items, **how)
    return jax.vmap(lambda row, at, new: row.at[at].set(new, **how))(x, index, items)
