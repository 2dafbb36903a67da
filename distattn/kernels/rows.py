"""Rows of queries for kernels of any platform, and what masks read of rows and of keys.

The queries of all heads of a key head lie side by side, [B, K, R, .] with R >= T * G rows, so that few
queries fill a tile. What masks read is made of vectors: of a row the lowest and the highest position that
it may attend to and its segment, of a key its position and its segment.
"""

from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from distattn.mask import Mask, saturating_add

_HIGHEST = jnp.iinfo(jnp.int32).max


class Cut(Protocol):
    """Sizes of a call and of its blocks, as far as rows and keys go; each kernel has its own."""

    @property
    def queries(self) -> int:
        """T."""
        ...

    @property
    def keys(self) -> int:
        """S."""
        ...

    @property
    def kv_heads(self) -> int:
        """K."""
        ...

    @property
    def groups(self) -> int:
        """G."""
        ...

    @property
    def rows(self) -> int:
        """Of a block."""
        ...

    @property
    def key_block(self) -> int:
        """Keys of a block."""
        ...

    @property
    def row_blocks(self) -> int:
        """How many blocks of rows."""
        ...

    @property
    def key_blocks(self) -> int:
        """How many blocks of keys."""
        ...


def by_key_heads(x: jax.Array, cut: Cut) -> jax.Array:
    """[B, T, N, ...] to [B, K, R, ...], the rows of one query after those of another."""
    x = x.reshape(*x.shape[:2], cut.kv_heads, cut.groups, *x.shape[3:])
    x = jnp.moveaxis(x, 2, 1)
    x = x.reshape(*x.shape[:2], cut.queries * cut.groups, *x.shape[4:])
    return _filled(x, 2, cut.row_blocks * cut.rows)


def by_queries(x: jax.Array, cut: Cut) -> jax.Array:
    """The inverse: [B, K, R, ...] to [B, T, N, ...]."""
    x = x[:, :, : cut.queries * cut.groups]
    x = x.reshape(*x.shape[:2], cut.queries, cut.groups, *x.shape[3:])
    x = jnp.moveaxis(x, 1, 2)
    return x.reshape(*x.shape[:2], cut.kv_heads * cut.groups, *x.shape[4:])


class Index(NamedTuple):
    """What decides who attends to whom; a first dimension of 1 holds for the whole batch."""

    rows: jax.Array  # int32[B|1, 3, R]: lowest position, highest position, segment
    keys: jax.Array  # int32[B|1, 2, key blocks * block]: position, segment


def index_of(mask: Mask, cut: Cut) -> Index | None:
    """The vectors of a mask without a dense part; None where every row attends to every key."""
    known = mask.key_positions, mask.query_valid, mask.key_segment_ids
    is_ragged = cut.keys < cut.key_blocks * cut.key_block
    if not is_ragged and all(x is None for x in known):
        return None
    left, right = mask.reach
    queries = jnp.zeros((1, cut.queries), jnp.int32)
    low, high = queries, queries + _HIGHEST
    if left is not None:
        low = jnp.maximum(saturating_add(mask.query_positions, -left), 0)
    if right is not None:
        high = saturating_add(mask.query_positions, right)
    if mask.query_valid is not None:
        high = jnp.where(mask.query_valid, high, -1)
    slots = mask.key_positions
    if slots is None:
        slots = jnp.arange(cut.keys, dtype=jnp.int32)[None]
    slots = _filled(slots, 1, cut.key_blocks * cut.key_block, -1)
    own, segments = queries, jnp.zeros((1, cut.keys), jnp.int32)
    if mask.key_segment_ids is not None:
        own, segments = mask.query_segment_ids, mask.key_segment_ids
    segments = _filled(segments, 1, slots.shape[1])
    # The rows that fill the last block attend to nothing.
    rows = [
        _filled(jnp.repeat(x, cut.groups, axis=1), 1, cut.row_blocks * cut.rows, fill)
        for x, fill in ((low, 0), (high, -1), (own, 0))
    ]
    return Index(_stacked(rows), _stacked([slots, segments]))


def _stacked(parts: list[jax.Array]) -> jax.Array:
    """[B|1, parts, n]."""
    shape = jnp.broadcast_shapes(*(x.shape for x in parts))
    return jnp.stack([jnp.broadcast_to(x, shape) for x in parts], axis=1)


def _filled(x: jax.Array, axis: int, size: int, value: int = 0) -> jax.Array:
    widths = [(0, size - x.shape[axis] if a == axis else 0) for a in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=value) if size > x.shape[axis] else x
