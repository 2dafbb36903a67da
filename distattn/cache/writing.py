"""New tokens: slots are reserved once for all layers, then each layer writes its keys and values there."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding
from jax.typing import ArrayLike

from distattn._manual import axes_of
from distattn.cache import storage
from distattn.cache.arguments import check_new, known, token_numbers, up_to_lengths
from distattn.cache.layout import Layout, letters_of
from distattn.cache.replicas import Replica, replica_layout, sent_to_replica
from distattn.cache.slots import Slots, take_slots

if TYPE_CHECKING:
    from distattn.cache.kv_cache import KVCache

LOCAL = "local"


def reserve(
    self: KVCache,
    tokens: int,
    *,
    positions: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    owner: ArrayLike | str | None = None,
) -> tuple[KVCache, Slots]:
    """Slots for new tokens, tagged with their positions, in every row: the first half of an append.

    The second half is `write`, once for each layer, before anything attends to the cache: until then the
    slots hold what was there before. Nothing is sent between devices.

    Args:
      tokens: T, the most that a row gets.
      positions: int32[T] or int32[B, T]; default the row's next ones. Negative: no token. Two tokens of a
        row may have one position; both are attended to.
      lengths: int32[B]; row b gets its first lengths[b] tokens; default T.
      owner: int32[T] or int32[B, T], the device of each token, counted along the axes of the slots;
        'local': the device that holds the token already, keys and values being sharded along T over these
        axes; default by the cache's placement.

    Returns:
      The cache with its tags, and the `Slots`. A row in which the tokens have no place is left as it was,
      whole, and its `overflow` set.

    Raises:
      ValueError: a wrong shape. Outside of jit also a row in which the tokens have no place.

    Example:
      >>> import jax.numpy as jnp, distattn
      >>> cache = distattn.KVCache.create(2, 8, 1, 4, dtype=jnp.float32)
      >>> cache, slots = cache.reserve(3, lengths=jnp.array([3, 1]))
      >>> slots.positions.tolist(), cache.next_position.tolist()
      ([[0, 1, 2], [0, -1, -1]], [3, 1])
    """
    if tokens < 1:
        raise ValueError(f"tokens is {tokens}; a reservation is for at least 1")
    batch, layout = self.positions.shape[0], self.layout
    local = isinstance(owner, str)
    if local and owner != LOCAL:
        raise ValueError(f"owner is {owner!r}; it must be int32[B, T], 'local' or None")
    if local and tokens % layout.devices:
        raise ValueError(
            f"owner='local' cuts T={tokens} tokens evenly over {layout.devices} devices; pad them to a "
            "multiple, and pass lengths"
        )
    devices = None
    if owner is not None and not local:
        devices = token_numbers("owner", owner, batch, tokens)
        numbers = known(devices)
        if numbers is not None and ((numbers < 0) | (numbers >= layout.devices)).any():
            raise ValueError(
                f"owner reaches from {numbers.min()} to {numbers.max()}; the slots lie on "
                f"{layout.devices} devices, 0 .. {layout.devices - 1}"
            )
    if positions is None:
        new = self.next_position[:, None] + np.arange(tokens, dtype=np.int32)[None]
    else:
        new = token_numbers("positions", positions, batch, tokens)
    new = up_to_lengths(new, lengths)

    def take(layout: Layout, tags: jax.Array) -> tuple[Any, ...]:
        return layout.run(
            take_slots,
            ("BS", "B.", "B", "B.", None if devices is None else "B."),
            ("BS", "B.", "DB.", "B.", "B"),
            *(tags, self.counts, self.placed, new, devices),
            static=(self.placement, local),
        )

    tags, counts, index, taken, overflow = take(layout, self.positions)
    _refuse(self, new, overflow)
    replica, replica_index = self.replica, None
    if replica is not None:
        copies, _, replica_index, _, _ = take(replica_layout(layout), replica.positions)
        replica = dataclasses.replace(replica, positions=copies)
    appended = (taken >= 0).sum(axis=1, dtype=jnp.int32)
    cache = dataclasses.replace(
        self,
        positions=tags,
        counts=counts,
        next_position=jnp.maximum(self.next_position, taken.max(axis=1) + 1),
        appended=appended,
        placed=self.placed + appended,
        overflow=overflow,
        replica=replica,
    )
    return cache, Slots(index, taken, overflow, replica_index, local)


def write(
    self: KVCache,
    key: jax.Array,
    value: jax.Array,
    slots: Slots,
    *,
    layer: ArrayLike | None = None,
) -> KVCache:
    """Keys and values in the slots that were reserved for them. Only owners write; nothing is sent.

    In a scan over layers carry the cache and write one layer at a time: that happens in place.

    Args:
      key: [B, T, K, H]; without a layer, in a cache of several, [L, B, T, K, H].
      value: [B, T, K, V]; the same.
      slots: from `reserve`.
      layer: int32[], the layer that is written; None: all.

    Returns:
      The cache with them.

    Raises:
      ValueError: keys or values of another shape than the slots have, or no floating-point numbers; a layer
        for a cache without layers.

    Example:
      >>> import jax.numpy as jnp, distattn
      >>> cache = distattn.KVCache.create(1, 8, 1, 4, layers=2, dtype=jnp.float32)
      >>> cache, slots = cache.reserve(3)
      >>> for layer in range(2):
      ...     new = jnp.full((1, 3, 1, 4), 1.0 + layer)
      ...     cache = cache.write(new, new, slots, layer=layer)
      >>> cache.key[:, 0, :4, 0, 0].tolist()
      [[1.0, 1.0, 1.0, 0.0], [2.0, 2.0, 2.0, 0.0]]
    """
    key, value = jnp.asarray(key), jnp.asarray(value)
    if layer is not None and self.layers is None:
        raise ValueError(
            "layer is given, but the cache has no layers; make it with layers=, or pass layer=None"
        )
    batch, tokens = slots.positions.shape
    heads = self.key.shape[-2]
    layers = self.layers if layer is None else None
    check_new("key", key, batch, tokens, heads, self.key.shape[-1], layers)
    check_new("value", value, batch, tokens, heads, self.value.shape[-1], layers)
    new = {"key": key, "value": value}
    if self.key_scale is not None:
        for name in ("key", "value"):
            new[name], new[f"{name}_scale"] = storage.quantise(new[name], self.key.dtype)

    letters = letters_of(self)
    at_rest = [letters[name] for name in new]
    arriving = [x.replace("S", "D" if slots.local else "T") for x in at_rest]
    if layer is not None:
        arriving = [x.removeprefix("L") for x in arriving]

    def put(layout: Layout, holder: KVCache | Replica, index: jax.Array) -> Any:
        written = layout.run(
            _write,
            ("DB.", None if layer is None else "", *at_rest, *arriving),
            at_rest,
            *(index, None if layer is None else jnp.asarray(layer, jnp.int32)),
            *(*(getattr(holder, name) for name in new), *new.values()),
            static=(self.layers is not None, slots.local),
        )
        return dataclasses.replace(holder, **dict(zip(new, written, strict=True)))

    cache = put(self.layout, self, slots.index)
    if self.replica is None:
        return cache
    copies = put(replica_layout(self.layout), self.replica, slots.replica_index)
    return dataclasses.replace(cache, replica=copies)


def append(
    self: KVCache,
    key: jax.Array,
    value: jax.Array,
    positions: ArrayLike | None = None,
    lengths: ArrayLike | None = None,
    owner: ArrayLike | str | None = None,
) -> KVCache:
    """New tokens in every row: `reserve` and `write`.

    Args:
      key: [B, T, K, H]; in a cache of several layers [L, B, T, K, H].
      value: [B, T, K, V]; the same.
      positions: int32[T] or int32[B, T]; default the row's next ones.
      lengths: int32[B], how many of the T tokens each row gets.
      owner: as in `reserve`; default by the cache's placement, or 'local' where key is seen to be
        sharded along T over the axes of the slots.

    Returns:
      The cache with them. A row in which its tokens have no place is left as it was, whole, and its
      `overflow` is set.

    Raises:
      ValueError: a wrong shape or dtype. Outside of jit also a row in which the tokens have no place:
        nothing is written then.

    Example:
      >>> import jax.numpy as jnp, distattn
      >>> cache = distattn.KVCache.create(2, 8, 1, 4, dtype=jnp.float32)
      >>> new = jnp.ones((2, 3, 1, 4))
      >>> cache = cache.append(new, new, lengths=jnp.array([3, 1]))
      >>> cache.positions.tolist()
      [[0, 1, 2, -1, -1, -1, -1, -1], [0, -1, -1, -1, -1, -1, -1, -1]]
    """
    key, value = jnp.asarray(key), jnp.asarray(value)
    sizes = (self.positions.shape[0], key.shape[-3] if key.ndim > 2 else 0, self.key.shape[-2])
    check_new("key", key, *sizes, self.key.shape[-1], self.layers)
    check_new("value", value, *sizes, self.value.shape[-1], self.layers)
    if owner is None and _lies_along(key, self.layout):
        owner = LOCAL
    cache, slots = self.reserve(sizes[1], positions=positions, lengths=lengths, owner=owner)
    return cache.write(key, value, slots)


def _write(
    layout: Layout,
    stacked: bool,
    local: bool,
    index: jax.Array,
    layer: jax.Array | None,
    *arrays: jax.Array,
) -> tuple[Any, ...]:
    """What one device does, in `Layout.run`: the second half of the arrays at their slots of the first."""
    stored, new = arrays[: len(arrays) // 2], arrays[len(arrays) // 2 :]
    if layout.wards and local:  # only its owner has the part of the new tokens
        new = [sent_to_replica(layout, x) for x in new]
    pairs = zip(stored, new, strict=True)
    if not stacked:
        return tuple(storage.write(old[None], new[None], index[0], 0)[0] for old, new in pairs)
    if layer is None:
        return tuple(storage.write(old, new, index[0], 0) for old, new in pairs)
    return tuple(storage.write(old, new[None], index[0], layer) for old, new in pairs)


def _refuse(cache: KVCache, new: jax.Array, overflow: jax.Array) -> None:
    """Outside of jit, an error for the rows that overflow."""
    refused = known(overflow)
    if refused is None or not refused.any():
        return
    rows = np.flatnonzero(refused)
    wanted, used = (np.asarray(x) for x in ((new >= 0).sum(axis=1), cache.counts))
    each = cache.capacity // cache.layout.devices
    row = rows[0]
    raise ValueError(
        f"row {row} gets {wanted[row]} new tokens, and its free slots are {(each - used[row]).tolist()} on "
        f"the devices of the cache (rows that overflow: {rows.tolist()}; placement {cache.placement!r}); "
        "nothing was written: evict, rewind or reset the row, resize the cache, or append less"
    )


def _lies_along(x: jax.Array, layout: Layout) -> bool:
    """Whether x [..., T, K, H] is seen to be sharded along T over the axes of the slots."""
    sharding = jax.typeof(x).sharding if isinstance(x, Tracer) else x.sharding
    if not layout.slots or not isinstance(sharding, NamedSharding):
        return False
    return axes_of(sharding.spec, x.ndim - 3) == layout.slots
