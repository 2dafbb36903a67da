"""What happens to a row in its life. All are edits of tags, but for `fork`, which copies a row.

A slot whose tag is negative is free, whatever key and value it still holds. But for `fork` over sharded
rows, all that is sent between devices is the number of occupied slots, one integer a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from distattn.cache.arguments import (
    row_indices,
    row_mask,
    row_numbers,
    token_numbers,
    up_to_lengths,
)
from distattn.cache.layout import Layout, letters_of
from distattn.cache.replicas import arrays_of, replica_layout, replica_letters, retagged
from distattn.cache.storage import as_integers

if TYPE_CHECKING:
    from distattn.cache.kv_cache import KVCache

FREE = -1


def reset(self: KVCache, rows: ArrayLike) -> KVCache:
    """Empties rows: the next requests take their place while the others go on.

    Args:
      rows: the index of a row, int32[n], or bool[B].

    Returns:
      The cache in which they are as in a new one.

    Raises:
      ValueError: a row that is not there, or a mask of another length.

    Example:
      >>> import jax.numpy as jnp, distattn
      >>> cache = distattn.KVCache.create(2, 8, 1, 4, dtype=jnp.float32)
      >>> new = jnp.ones((2, 3, 1, 4))
      >>> cache = cache.append(new, new).reset(rows=0)
      >>> cache.next_position.tolist(), cache.counts.tolist()
      ([0, 3], [[0], [3]])
    """
    gone = row_mask("rows", rows, self.positions.shape[0])
    names = ("positions", "counts", "next_position", "appended", "placed", "overflow")
    letters = ("BS", "B.", "B", "B", "B", "B")
    arrays = (getattr(self, name) for name in names)
    changed = self.layout.run(_reset, ("B", *letters), letters, gone, *arrays)
    cache = dataclasses.replace(self, **dict(zip(names, changed, strict=True)))
    return retagged(cache, ["B"], _unless, gone)


def rewind(self: KVCache, lengths: ArrayLike) -> KVCache:
    """Frees all positions from a length on: what a rejected draft wrote, say.

    Args:
      lengths: int32[B], or one for all rows; positions below stay. A row that is shorter stays as it is.

    Returns:
      The cache, whose next positions are at most the lengths.

    Raises:
      ValueError: lengths that are neither int32[B] nor one number.

    Example:
      >>> import jax.numpy as jnp, distattn
      >>> cache = distattn.KVCache.create(1, 8, 1, 4, dtype=jnp.float32)
      >>> new = jnp.ones((1, 4, 1, 4))
      >>> cache = cache.append(new, new).rewind(lengths=2)  # the last two were a draft
      >>> cache.positions.tolist(), cache.next_position.tolist()
      ([[0, 1, -1, -1, -1, -1, -1, -1]], [2])
    """
    lengths = jnp.maximum(row_numbers("lengths", lengths, self.positions.shape[0]), 0)
    cache = _retag(self, _below, lengths)
    next_position = jnp.minimum(self.next_position, lengths)
    gone = self.next_position - next_position
    return dataclasses.replace(
        cache, next_position=next_position, appended=jnp.maximum(self.appended - gone, 0)
    )


def evict(self: KVCache, window: ArrayLike, *, keep_first: ArrayLike = 0) -> KVCache:
    """Frees old positions: the last `window` of a row stay, and the first `keep_first`.

    With keep_first > 0 these are the attention sinks of Xiao et al., "Efficient Streaming Language Models
    with Attention Sinks", arXiv 2309.17453, section 3. Positions do not move up: rotate keys by their
    positions, or by their rank, before they are appended.

    Args:
      window: int32[B], or one for all rows: positions p >= next_position - window stay.
      keep_first: int32[B], or one for all rows: positions p < keep_first stay.

    Returns:
      The cache.

    Raises:
      ValueError: window or keep_first is neither int32[B] nor one number.

    Example:
      >>> import jax.numpy as jnp, distattn
      >>> cache = distattn.KVCache.create(1, 8, 1, 4, dtype=jnp.float32)
      >>> new = jnp.ones((1, 4, 1, 4))
      >>> cache = cache.append(new, new).evict(window=2, keep_first=1)
      >>> cache.positions.tolist()
      [[0, -1, 2, 3, -1, -1, -1, -1]]
    """
    batch = self.positions.shape[0]
    first = self.next_position - jnp.maximum(row_numbers("window", window, batch), 0)
    keep_first = row_numbers("keep_first", keep_first, batch)
    return _retag(self, _from_or_below, first, keep_first)


def accept(self: KVCache, nodes: ArrayLike, lengths: ArrayLike | None = None) -> KVCache:
    """Keeps of the last append, the nodes of a token tree, those on one path, and frees the others.

    The nodes of the path get the positions start, start + 1, ..., where start is the position of the first
    of the append; `tree_mask` of `attend` says what belongs to it. Keys stay as they were rotated: rotate
    the key of a node by start + its depth.

    Args:
      nodes: int32[P] or int32[B, P], indices into the tokens of the last append, from the root on; a
        negative one is none.
      lengths: int32[B], how many of the P nodes each row keeps; default P.

    Returns:
      The cache, whose next position is one past the path.

    Raises:
      ValueError: nodes of a wrong shape or dtype.

    Example:
      >>> import jax.numpy as jnp, distattn
      >>> cache = distattn.KVCache.create(1, 8, 1, 4, dtype=jnp.float32)
      >>> new = jnp.ones((1, 4, 1, 4))
      >>> cache = cache.append(new, new)  # a root, two children, a grandchild
      >>> cache = cache.accept(jnp.array([0, 2, 3]))  # the root, its second child, the child of that
      >>> cache.positions.tolist(), cache.next_position.tolist()
      ([[0, -1, 1, 2, -1, -1, -1, -1]], [3])
    """
    batch = self.positions.shape[0]
    nodes = jnp.asarray(nodes)
    nodes = token_numbers("nodes", nodes, batch, nodes.shape[-1] if nodes.ndim else 0)
    nodes = up_to_lengths(nodes, lengths)
    nodes = jnp.where(nodes < self.appended[:, None], nodes, -1)  # a refused append has none
    start = self.next_position - self.appended
    cache = _retag(self, _on_path, start, nodes)
    count = (nodes >= 0).sum(axis=1, dtype=jnp.int32)
    return dataclasses.replace(cache, next_position=start + count, appended=count)


def fork(self: KVCache, source: ArrayLike, target: ArrayLike) -> KVCache:
    """Copies rows over others, keys and values included: for beams.

    The slots of a row keep their devices. Where rows are sharded, a row is sent to all of those devices.

    Args:
      source: the index of a row, or int32[n].
      target: the row, or rows, that become copies; each one once.

    Returns:
      The cache.

    Raises:
      ValueError: a row that is not there, or not as many sources as targets.

    Example:
      >>> import jax.numpy as jnp, distattn
      >>> cache = distattn.KVCache.create(2, 8, 1, 4, dtype=jnp.float32)
      >>> new = jnp.ones((2, 3, 1, 4))
      >>> cache = cache.append(new, new, lengths=jnp.array([3, 0]))
      >>> cache = cache.fork(source=0, target=1)
      >>> cache.next_position.tolist()
      [3, 3]
    """
    batch, layout = self.positions.shape[0], self.layout
    source = row_indices("source", source, batch)
    target = row_indices("target", target, batch)
    if source.shape != target.shape:
        raise ValueError(
            f"source has {source.shape[0]} rows and target {target.shape[0]}; each needs its own"
        )
    letters = letters_of(self)
    own = tuple(letters.values())
    arrays = [getattr(self, name) for name in letters]
    letters_in = (".", ".", *own)
    changed = layout.run(_fork, letters_in, own, source, target, *arrays, static=(own,))
    cache = dataclasses.replace(self, **dict(zip(letters, changed, strict=True)))
    if cache.replica is None:
        return cache
    letters = replica_letters(self)
    own = tuple(letters.values())
    copies = replica_layout(layout).run(
        _fork,
        (".", ".", *own),
        own,
        *(source, target, *arrays_of(cache.replica, letters)),
        static=(own,),
    )
    replica = dataclasses.replace(cache.replica, **dict(zip(letters, copies, strict=True)))
    return dataclasses.replace(cache, replica=replica)


def _retag(cache: KVCache, kept: Callable[..., Any], *numbers: jax.Array) -> KVCache:
    """The cache with tags = kept(tags, *numbers), on the devices that hold them, and its counts."""
    letters = ["B" + "." * (x.ndim - 1) for x in numbers]
    tags, counts = cache.layout.run(
        _retag_own, ("BS", *letters), ("BS", "B."), cache.positions, *numbers, static=(kept,)
    )
    cache = dataclasses.replace(cache, positions=tags, counts=counts)
    return retagged(cache, letters, kept, *numbers)


# What one device does, in `Layout.run`.


def _reset(
    layout: Layout, gone: jax.Array, tags: jax.Array, counts: jax.Array, *numbers: jax.Array
) -> tuple[Any, ...]:
    tags = _unless(tags, gone)
    counts = jnp.where(gone[:, None], 0, counts)
    return tags, counts, *(jnp.where(gone, jnp.zeros_like(x), x) for x in numbers)


def _retag_own(
    layout: Layout, kept: Callable[..., Any], tags: jax.Array, *numbers: jax.Array
) -> tuple[Any, ...]:
    tags = kept(tags, *numbers)
    return tags, layout.gather((tags >= 0).sum(axis=1, dtype=jnp.int32))


def _unless(tags: jax.Array, gone: jax.Array) -> jax.Array:
    return jnp.where(gone[:, None], FREE, tags)


def _below(tags: jax.Array, lengths: jax.Array) -> jax.Array:
    return jnp.where(tags < lengths[:, None], tags, FREE)


def _from_or_below(tags: jax.Array, first: jax.Array, keep_first: jax.Array) -> jax.Array:
    return jnp.where((tags >= first[:, None]) | (tags < keep_first[:, None]), tags, FREE)


def _on_path(tags: jax.Array, start: jax.Array, nodes: jax.Array) -> jax.Array:
    node = tags - start[:, None]
    found = (node[:, None] == nodes[:, :, None]) & (nodes >= 0)[:, :, None]  # [B, P, S]
    place = jnp.argmax(found, axis=1).astype(jnp.int32)
    on_path = jnp.where(found.any(axis=1), start[:, None] + place, FREE)
    return jnp.where(node < 0, tags, on_path)


def _fork(
    layout: Layout,
    letters: tuple[str, ...],
    source: jax.Array,
    target: jax.Array,
    *arrays: jax.Array,
) -> tuple[Any, ...]:
    axes = (x.index("B") for x in letters)
    return tuple(
        _copy(layout, x, source, target, axis) for x, axis in zip(arrays, axes, strict=True)
    )


def _copy(
    layout: Layout, x: jax.Array, source: jax.Array, target: jax.Array, axis: int
) -> jax.Array:
    batch = x.shape[axis]
    start = lax.axis_index(layout.batch) * batch if layout.batch else 0
    rows = jnp.take(x, source - start, axis=axis, mode="clip")
    if layout.batch:
        # One device has the row and the others add zeros, as integers: every item comes as it is.
        mine = (source >= start) & (source < start + batch)
        mine = mine.reshape([-1 if a == axis else 1 for a in range(x.ndim)])
        bits = rows.astype(jnp.uint8) if x.dtype == jnp.bool_ else as_integers(rows)
        bits = lax.psum(jnp.where(mine, bits, jnp.zeros_like(bits)), layout.batch)
        rows = bits != 0 if x.dtype == jnp.bool_ else lax.bitcast_convert_type(bits, x.dtype)
    place = jnp.where((target >= start) & (target < start + batch), target - start, batch)
    return x.at[(slice(None),) * axis + (place,)].set(rows, mode="drop")
