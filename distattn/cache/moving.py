"""To another capacity, to another mesh, from no mesh to one and back: the shapes of a live cache change.

The order of slots never matters, so a cache is cut anew along S wherever it lies: the tags go with their
keys. A cache of S slots on D devices becomes one of S' on D' in up to three steps, each of which is left
out where it changes nothing:

1. on the old devices, min(S, S') slots, rounded up so that both D and D' divide them (`capacity`);
2. to the new devices, in order;
3. on the new devices, S' slots.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import TYPE_CHECKING

import jax
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh

from distattn.cache.capacity import counted, with_slots
from distattn.cache.layout import Layout, context_of, letters_of, make_layout, sharding_of
from distattn.cache.replicas import check_replicas, with_replica
from distattn.planning.plan import AxisNames

if TYPE_CHECKING:
    from distattn.cache.kv_cache import KVCache

KEEP = "keep"


def resize(
    self: KVCache,
    capacity: int | None = None,
    *,
    mesh: Mesh | str | None = KEEP,
    axis_name: AxisNames = None,
    batch_axis_name: AxisNames = None,
    heads_axis_name: AxisNames = None,
    placement: str | None = None,
    replicas: int | None = None,
) -> KVCache:
    """The same tokens in a cache of another capacity, on another mesh, or both. Not under jit.

    On the same mesh no key and no value leaves its device, unless the cache shrinks and a device holds
    more of a row than it is to have slots for; then only those tokens move, to the devices with the
    fewest, and meanwhile a device needs as much memory again as its shares of the old and the new cache
    take. Between meshes each device gets its share of the slots, and none ever holds all.

    Args:
      capacity: tokens of a row, S, rounded up to a multiple of the new devices; None: as it is now.
      mesh: 'keep': it stays where it is, over the same axes; None: one device, or the mesh of
        `jax.set_mesh` if an axis is named; or a mesh. With `mesh=cache.layout.mesh` the axes are new.
      axis_name: axis, or tuple of axes, over which slots are spread, as in `create`; to be given with a
        mesh, like the next two.
      batch_axis_name: axes that shard the rows; None: they are not.
      heads_axis_name: axes that shard the key/value heads; None: they are not.
      placement: where new tokens go from now on; None: as before.
      replicas: of each token from now on, as in `create`; None: as before. Second copies are not moved, but
        made anew: each device sends its share once.

    Returns:
      The cache. Positions, next positions and all that a row has been through stay as they are.

    Raises:
      ValueError: a row holds more tokens than the new capacity, or what `create` refuses; nothing has
        changed then.

    Example:
      >>> import jax, jax.numpy as jnp, distattn
      >>> cache = distattn.KVCache.create(1, 8, 1, 4, dtype=jnp.float32)
      >>> new = jnp.ones((1, 3, 1, 4))
      >>> mesh = jax.sharding.Mesh(jax.devices(), ("x",))
      >>> cache = cache.append(new, new).resize(16, mesh=mesh)
      >>> held = sorted(p for p in cache.positions[0].tolist() if p >= 0)
      >>> cache.capacity, cache.layout.mesh == mesh, held
      (16, True, [0, 1, 2])
    """
    if isinstance(self.positions, Tracer):
        raise ValueError(
            "resize changes shapes and was called under a trace of the cache; call it outside of jit"
        )
    axes = {
        "axis_name": axis_name,
        "batch_axis_name": batch_axis_name,
        "heads_axis_name": heads_axis_name,
    }
    if isinstance(mesh, str):
        named = [name for name, x in axes.items() if x is not None]
        if mesh != KEEP or named:
            got = f"{named[0]} is {axes[named[0]]!r}" if named else f"mesh is {mesh!r}"
            raise ValueError(
                f"{got}; axes are those of a mesh that is given: pass mesh=cache.layout.mesh for other "
                "axes of the same one, another Mesh, or None for one device; 'keep' changes nothing"
            )
        layout = self.layout
    else:
        layout = make_layout(mesh, **axes)
    replicas = self.replicas if replicas is None else replicas
    check_replicas(replicas, layout)
    with context_of(layout):
        blank = blank_like(self, self.capacity if capacity is None else capacity, layout, placement)
    cache, slots = with_replica(self, 1), blank.capacity
    _check_fit(cache, slots)
    if layout != self.layout:
        both = math.lcm(self.layout.devices, layout.devices)
        common = math.ceil(min(self.capacity, slots) / both) * both
        with context_of(self.layout):
            cache = with_slots(cache, common)
        with context_of(layout):
            cache = moved(cache, layout)
    with context_of(layout):
        cache = with_replica(with_slots(cache, slots), replicas)
    return dataclasses.replace(cache, placement=blank.placement)


def blank_like(
    cache: KVCache, capacity: int, layout: Layout, placement: str | None = None
) -> KVCache:
    """An empty cache for the same kind of tokens, as shapes: what `create` would make, or its error."""
    create = functools.partial(
        type(cache).create,
        cache.positions.shape[0],
        capacity,
        *cache.key.shape[-2:],
        value_dim=cache.value.shape[-1],
        layers=cache.layers,
        dtype=cache.key.dtype,
        mesh=layout.mesh,
        axis_name=layout.slots,
        batch_axis_name=layout.batch,
        heads_axis_name=layout.heads,
        placement=cache.placement if placement is None else placement,
    )
    return jax.eval_shape(create)


def moved(cache: KVCache, layout: Layout) -> KVCache:
    """The cache with its slots cut over other devices, in order; the devices must divide them."""
    letters = letters_of(cache)
    arrays = {
        name: jax.device_put(getattr(cache, name), sharding_of(layout, letters[name]))
        for name in letters
        if name != "counts"
    }
    return counted(dataclasses.replace(cache, **arrays, layout=layout))


def _check_fit(cache: KVCache, slots: int) -> None:
    counts = cache.layout.numbers(cache.counts)
    held = counts.sum(axis=1)
    if held.max() <= slots:
        return
    row = int(held.argmax())
    raise ValueError(
        f"row {row} holds {held[row]} tokens, {counts[row].tolist()} on the devices, and capacity={slots} "
        f"has no place for them (rows with too many: {np.flatnonzero(held > slots).tolist()}); nothing was "
        f"changed: evict, rewind or reset the row first, or pass a capacity of at least {held.max()}"
    )
