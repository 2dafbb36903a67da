"""Keys and values of new tokens: each layer writes its own to the slots that were reserved for all."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jax.sharding import NamedSharding
from jax.typing import ArrayLike

from distattn.cache import storage
from distattn.cache.arguments import check_new, layer_index
from distattn.cache.layout import Layout, letters_of
from distattn.cache.replicas import Replica, replica_layout, sent_to_replica
from distattn.cache.reserving import LOCAL
from distattn.cache.slots import Slots
from distattn.collectives.mesh import axes_of

if TYPE_CHECKING:
    from distattn.cache.kv_cache import KVCache


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
      layer: int32[], the layer that is written; None: all. Python's and numpy's numbers are checked; where
        a tracer, or an array on a device, says one that is not there, nothing is written.

    Returns:
      The cache with them.

    Raises:
      ValueError: keys or values of another shape than the slots have, or no floating-point numbers; a layer
        that is not there, or for a cache without layers.

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
    number = layer_index(layer, self.layers)
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
            *(index, number),
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
      lengths: int32[B] or one for all rows, 0 .. T, how many of the T tokens each row gets, as in
        `reserve`.
      owner: as in `reserve`; default by the cache's placement, or 'local' where key is seen to be
        sharded along T over the axes of the slots.

    Returns:
      The cache with them. A row in which its tokens have no place is left as it was, whole, its `overflow`
      is set, and its `refused` counts them.

    Raises:
      ValueError: a wrong shape or dtype, and what `reserve` refuses. Outside of jit also a row in which
        the tokens have no place: nothing is written then.

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
    layers, slots = stored[0].shape[0], stored[0].shape[2]
    index = jnp.where((layer >= 0) & (layer < layers), index[0], slots)
    return tuple(storage.write(old, new[None], index, layer) for old, new in pairs)


def _lies_along(x: jax.Array, layout: Layout) -> bool:
    """Whether x [..., T, K, H] is seen to be sharded along T over the axes of the slots."""
    sharding = jax.typeof(x).sharding if isinstance(x, Tracer) else x.sharding
    if not layout.slots or not isinstance(sharding, NamedSharding):
        return False
    return axes_of(sharding.spec, x.ndim - 3) == layout.slots
