"""A row as a copy of another: the one edit for which keys and values are copied, not tags alone."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from distattn.cache.arguments import known, row_indices
from distattn.cache.layout import Layout, letters_of
from distattn.cache.replicas import Replica, arrays_of, replica_layout, replica_letters
from distattn.cache.storage import as_integers

if TYPE_CHECKING:
    from distattn.cache.kv_cache import KVCache


def fork(self: KVCache, source: ArrayLike, target: ArrayLike) -> KVCache:
    """Copies rows over others, keys and values included: for beams.

    The slots of a row keep their devices. Where rows are sharded, a row is sent to all of those devices.

    Args:
      source: the index of a row, or int32[n].
      target: the row, or rows, that become copies; each one once. Under jit a pair of which one row is not
        there is passed over, and of pairs with one target the last counts.

    Returns:
      The cache. A copy has been through what its source has, `refused` and the other numbers too.

    Raises:
      ValueError: a row that is not there, a target that comes twice, or not as many sources as targets.

    Example:
      >>> import jax.numpy as jnp, distattn
      >>> cache = distattn.KVCache.create(2, 8, 1, 4, dtype=jnp.float32)
      >>> new = jnp.ones((2, 3, 1, 4))
      >>> cache = cache.append(new, new, lengths=jnp.array([3, 0]))
      >>> cache = cache.fork(source=0, target=1)
      >>> cache.next_position.tolist()
      [3, 3]
    """
    batch = self.positions.shape[0]
    sources, targets = (
        row_indices(n, x, batch) for n, x in (("source", source), ("target", target))
    )
    if sources.shape != targets.shape:
        raise ValueError(
            f"source has {sources.shape[0]} rows and target {targets.shape[0]}; each needs its own"
        )
    rows = known(target)
    if rows is not None and len(np.unique(rows)) < rows.size:
        raise ValueError(
            f"target is {rows.tolist()}; a row becomes a copy of one other: name each target once"
        )

    def copied(layout: Layout, holder: KVCache | Replica, letters: dict[str, str]) -> Any:
        own, arrays = tuple(letters.values()), arrays_of(holder, letters)
        changed = layout.run(
            _fork, (".", ".", *own), own, *(sources, targets, *arrays), static=(own,)
        )
        return dataclasses.replace(holder, **dict(zip(letters, changed, strict=True)))

    cache = copied(self.layout, self, letters_of(self))
    if self.replica is None:
        return cache
    copies = copied(replica_layout(self.layout), self.replica, replica_letters(self))
    return dataclasses.replace(cache, replica=copies)


# What one device does, in `Layout.run`.


def _fork(
    layout: Layout,
    letters: tuple[str, ...],
    source: jax.Array,
    target: jax.Array,
    *arrays: jax.Array,
) -> tuple[Any, ...]:
    axes = [x.index("B") for x in letters]
    batch = arrays[0].shape[axes[0]]
    start = lax.axis_index(layout.batch) * batch if layout.batch else 0
    there = (source >= 0) & (source < batch * layout.size(layout.batch))
    # All arrays of a row come from one source, whatever the order in which a device writes.
    again = jnp.triu((target[:, None] == target[None]) & there[None], 1).any(axis=1)
    there &= ~again & (target >= start) & (target < start + batch)
    place = jnp.where(there, target - start, batch)
    source -= start
    return tuple(
        _copy(layout, x, source, place, axis) for x, axis in zip(arrays, axes, strict=True)
    )


def _copy(
    layout: Layout, x: jax.Array, source: jax.Array, place: jax.Array, axis: int
) -> jax.Array:
    """x with its rows `source`, counted from this device's first, at `place`; past the end: at none."""
    rows = jnp.take(x, source, axis=axis, mode="clip")
    if layout.batch:
        # One device has the row and the others add zeros, as integers: every item comes as it is.
        mine = (source >= 0) & (source < x.shape[axis])
        mine = mine.reshape([-1 if a == axis else 1 for a in range(x.ndim)])
        bits = rows.astype(jnp.uint8) if x.dtype == jnp.bool_ else as_integers(rows)
        bits = lax.psum(jnp.where(mine, bits, jnp.zeros_like(bits)), layout.batch)
        rows = bits != 0 if x.dtype == jnp.bool_ else lax.bitcast_convert_type(bits, x.dtype)
    return x.at[(slice(None),) * axis + (place,)].set(rows, mode="drop")
