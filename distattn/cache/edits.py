"""What happens to a row in its life, all of it edits of tags.

A slot whose tag is negative is free, whatever key and value it still holds. All that is sent between
devices is the number of occupied slots, one integer a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from distattn.cache.arguments import (
    INT32,
    known,
    on_host,
    row_mask,
    row_numbers,
    token_numbers,
    up_to_lengths,
)
from distattn.cache.layout import Layout, letters_of
from distattn.cache.replicas import retagged
from distattn.cache.slots import FREE, occupied

if TYPE_CHECKING:
    from distattn.cache.kv_cache import KVCache


def reset(self: KVCache, rows: ArrayLike) -> KVCache:
    """Empties rows: the next requests take their place while the others go on.

    Args:
      rows: the index of a row, int32[n], or bool[B]. Under jit an index that is not there is passed over.

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
    names = ("positions", "counts", "next_position", "appended", "placed", "overflow", "refused")
    letters = [letters_of(self)[name] for name in names]
    arrays = (getattr(self, name) for name in names)
    changed = self.layout.run(_reset, ("B", *letters), letters, gone, *arrays)
    cache = dataclasses.replace(self, **dict(zip(names, changed, strict=True)))
    return retagged(cache, ["B"], _unless, gone)


def rewind(self: KVCache, lengths: ArrayLike) -> KVCache:
    """Frees all positions from a length on: what a rejected draft wrote, say.

    Args:
      lengths: int32[B], or one for all rows; positions below stay. A row with its own next position stays
        as it is. Python's and numpy's numbers are checked, for which a call outside of jit waits until
        `next_position` is known. Those of tracers, and of arrays on devices, are not: where they are
        larger than the next position the row stays as it is, and those below 0 empty it.

    Returns:
      The cache, whose next positions are at most the lengths.

    Raises:
      ValueError: lengths that are neither int32[B] nor one number; one below 0, or, outside of jit, past
        the next position of its row.

    Example:
      >>> import jax.numpy as jnp, distattn
      >>> cache = distattn.KVCache.create(1, 8, 1, 4, dtype=jnp.float32)
      >>> new = jnp.ones((1, 4, 1, 4))
      >>> cache = cache.append(new, new).rewind(lengths=2)  # the last two were a draft
      >>> cache.positions.tolist(), cache.next_position.tolist()
      ([[0, 1, -1, -1, -1, -1, -1, -1]], [2])
    """
    ends = None if on_host(lengths) is None else known(self.next_position)
    lengths = row_numbers(
        "lengths",
        lengths,
        self.positions.shape[0],
        high=INT32.max if ends is None else ends,
        remedy="a row is cut there, never made longer; pass cache.next_position for one that is to stay "
        "as it is, 0 to empty it",
    )
    lengths = jnp.maximum(lengths, 0)
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
      window: int32[B], or one for all rows: positions p >= next_position - window stay; 0: none of these.
      keep_first: int32[B], or one for all rows: positions p < keep_first stay.
        Of both, numbers of tracers and of arrays on devices are not checked, and count as 0 where they are
        negative.

    Returns:
      The cache.

    Raises:
      ValueError: window or keep_first is neither int32[B] nor one number, or is negative.

    Example:
      >>> import jax.numpy as jnp, distattn
      >>> cache = distattn.KVCache.create(1, 8, 1, 4, dtype=jnp.float32)
      >>> new = jnp.ones((1, 4, 1, 4))
      >>> cache = cache.append(new, new).evict(window=2, keep_first=1)
      >>> cache.positions.tolist()
      [[0, -1, 2, 3, -1, -1, -1, -1]]
    """
    batch = self.positions.shape[0]
    remedy = "it is how many positions stay; cache.reset empties a row"
    window = row_numbers("window", window, batch, remedy=remedy)
    keep_first = row_numbers("keep_first", keep_first, batch, remedy=remedy)
    first = self.next_position - jnp.maximum(window, 0)
    return _retag(self, _from_or_below, first, keep_first)


def accept(self: KVCache, nodes: ArrayLike, lengths: ArrayLike | None = None) -> KVCache:
    """Keeps of the last append, the nodes of a token tree, those on one path, and frees the others.

    The nodes of the path get the positions start, start + 1, ..., where start is the position of the first
    of the append; `tree_mask` of `attend` says what belongs to it. Keys stay as they were rotated: rotate
    the key of a node by start + its depth.

    Args:
      nodes: int32[P] or int32[B, P], indices into the tokens of the last append, from the root on, each
        once; a negative one is none. A row that the last append brought nothing, or refused, has none.
      lengths: int32[B], how many of the P nodes each row keeps; default P.
        Of both, Python's and numpy's numbers are checked, for which a call outside of jit waits until
        `appended` is known. Those of tracers, and of arrays on devices, are not: a node that is not there
        is none, one that comes twice has its first place and leaves the other's position empty, and
        lengths count as the nearest of 0 .. P.

    Returns:
      The cache, whose next position is one past the path.

    Raises:
      ValueError: nodes of a wrong shape or dtype; a node that comes twice; lengths that are not 0 .. P;
        outside of jit also a node that the last append did not bring.

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
    size = np.shape(nodes)[-1] if np.ndim(nodes) else 0
    given = on_host(nodes)
    nodes = token_numbers("nodes", nodes, batch, size)
    kept = size if lengths is None else on_host(lengths)
    if lengths is not None:
        remedy = f"of the P={size} nodes the first ones; 0 for a row that keeps none"
        lengths = row_numbers("lengths", lengths, batch, high=size, remedy=remedy)
    if given is not None and kept is not None:
        given, kept = np.broadcast_to(given, (batch, size)), np.broadcast_to(kept, batch)
        _check_nodes([row[:n] for row, n in zip(given, kept, strict=True)], known(self.appended))
    nodes = up_to_lengths(nodes, lengths)
    nodes = jnp.where(nodes < self.appended[:, None], nodes, -1)  # a refused append has none
    start = self.next_position - self.appended
    cache = _retag(self, _on_path, start, nodes)
    count = (nodes >= 0).sum(axis=1, dtype=jnp.int32)
    return dataclasses.replace(cache, next_position=start + count, appended=count)


def _retag(cache: KVCache, kept: Callable[..., Any], *numbers: jax.Array) -> KVCache:
    """The cache with tags = kept(tags, *numbers), on the devices that hold them, and its counts."""
    letters = ["B" + "." * (x.ndim - 1) for x in numbers]
    tags, counts = cache.layout.run(
        _retag_own, ("BS", *letters), ("BS", "B."), cache.positions, *numbers, static=(kept,)
    )
    cache = dataclasses.replace(cache, positions=tags, counts=counts)
    return retagged(cache, letters, kept, *numbers)


def _check_nodes(paths: list[np.ndarray], appended: np.ndarray | None) -> None:
    """That a path has each node once, and only those that the last append brought its row."""
    for row, path in enumerate(paths):
        nodes = path[path >= 0].tolist()
        if len(set(nodes)) < len(nodes):
            raise ValueError(
                f"nodes is {path.tolist()} for row {row}; a path has each node once: pass -1 for none, or "
                "lengths where rows keep fewer"
            )
        if appended is not None and 0 < appended[row] <= max(nodes, default=-1):
            raise ValueError(
                f"nodes is {path.tolist()} for row {row}, and the last append brought it {appended[row]} "
                f"tokens; it must be 0 .. {appended[row] - 1}, or negative for none: pass -1, or lengths "
                "where rows keep fewer"
            )


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
    return tags, occupied(layout, tags)


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
