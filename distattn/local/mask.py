"""The mask as a value: which query may attend to which key, decided from positions.

No array of shape [T, S] is ever built, unless the caller passes one: a `Mask` holds vectors, and a block
of it is made with a block of logits. `BlockSparsity` tells from the ranges of positions and segment ids,
in any order, which blocks are skipped. It may keep a block in vain, and never skips one wrongly.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Span(NamedTuple):
    """Indices start .. start + size - 1 of one dimension; `start` may be a tracer."""

    start: jax.Array | int
    size: int


@dataclasses.dataclass(frozen=True)
class IndexOrder:
    """Static facts about positions that the caller has not passed.

    Query positions and key positions are consecutive, in the order of the arrays. Empty slots come last.
    """

    aligned: bool = True  # the first query and the first key have one position
    full: bool = True  # every slot has a key


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """The AND of all restrictions on which query may attend to which key; None: no restriction.

    A leading dimension of size 1 applies to every sequence of the batch. A key with a negative position
    is an empty slot. Key lengths are part of `key_positions` (a key past the length is an empty slot),
    query lengths of `query_valid`.
    """

    query_positions: jax.Array | None = None  # int32[B|1, T]
    key_positions: jax.Array | None = None  # int32[B|1, S]; negative: empty slot
    query_valid: jax.Array | None = None  # bool[B|1, T]
    query_segment_ids: jax.Array | None = None  # int32[B|1, T]
    key_segment_ids: jax.Array | None = None  # int32[B|1, S]
    dense: jax.Array | None = None  # bool[B|1, N|1, T|1, S|1]
    is_causal: bool = dataclasses.field(default=False, metadata={"static": True})
    # Inclusive distances to the left and right of the query's position; None: unbounded.
    window: tuple[int | None, int | None] = dataclasses.field(
        default=(None, None), metadata={"static": True}
    )
    # None: positions are arbitrary.
    index_order: IndexOrder | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def compares_positions(self) -> bool:
        """Whether the positions of queries matter."""
        return self.is_causal or self.window != (None, None)

    def block(self, batch: Span, heads: Span, query: Span, key: Span) -> "Mask":
        """Return the mask of some sequences, query heads, queries and keys."""
        return dataclasses.replace(
            self,
            query_positions=take(self.query_positions, batch, query),
            key_positions=take(self.key_positions, batch, key),
            query_valid=take(self.query_valid, batch, query),
            query_segment_ids=take(self.query_segment_ids, batch, query),
            key_segment_ids=take(self.key_segment_ids, batch, key),
            dense=take(self.dense, batch, heads, query, key),
            index_order=None,
        )

    def with_empty_slots(self, keys: int) -> "Mask":
        """Return the mask with key positions, which the caller pads for empty slots after these keys."""
        positions = self.key_positions
        if positions is None:
            positions = jnp.arange(keys, dtype=jnp.int32)[None]
        order = self.index_order and dataclasses.replace(self.index_order, full=False)
        return dataclasses.replace(self, key_positions=positions, index_order=order)

    def with_unaligned_starts(self) -> "Mask":
        """Return the mask of one device, whose queries and keys do not start at one index."""
        order = self.index_order and dataclasses.replace(self.index_order, aligned=False)
        return dataclasses.replace(self, index_order=order)

    def allowed(self, num_kv_heads: int) -> jax.Array | None:
        """Return bool[b, K|1, G|1, q|1, s|1], True = attend; None if every query attends to every key."""
        terms = []
        if self.key_positions is not None:
            terms.append(_on_keys(self.key_positions >= 0))
        if self.query_valid is not None:
            terms.append(_on_queries(self.query_valid))
        if self.compares_positions:
            left, right = self.reach
            query = _on_queries(self.query_positions)
            key = _on_keys(self.key_positions)
            if right is not None:
                terms.append(key <= saturating_add(query, right))
            if left is not None:
                terms.append(key >= saturating_add(query, -left))
        if self.query_segment_ids is not None:
            terms.append(_on_queries(self.query_segment_ids) == _on_keys(self.key_segment_ids))
        if self.dense is not None:
            terms.append(split_heads(self.dense, num_kv_heads))
        if not terms:
            return None
        return functools.reduce(operator.and_, terms)

    @property
    def reach(self) -> tuple[int | None, int | None]:
        """Distances to the left and right of its position that a query attends to; None: any distance."""
        left, right = self.window
        if self.is_causal:
            right = 0 if right is None else min(right, 0)
        return left, right


def take(x: Any, *spans: Span | None) -> Any:
    """Return x inside the spans; a dimension of size 1, or with span None, is kept whole."""
    if x is None:
        return None
    for axis, span in enumerate(spans):
        if span is not None and x.shape[axis] not in (1, span.size):
            x = lax.dynamic_slice_in_dim(x, span.start, span.size, axis)
    return x


def split_heads(x: jax.Array, num_kv_heads: int) -> jax.Array:
    """Return [b|1, K|1, G|1, q|1, s|1] from [b|1, N|1, q|1, s|1]."""
    heads = x.shape[1]
    groups = (num_kv_heads, heads // num_kv_heads) if heads > 1 else (1, 1)
    return x.reshape(x.shape[0], *groups, *x.shape[2:])


def _on_keys(x: jax.Array) -> jax.Array:
    return x[:, None, None, None, :]


def _on_queries(x: jax.Array) -> jax.Array:
    return x[:, None, None, :, None]


def saturating_add(x: jax.Array, offset: int) -> jax.Array:
    """Return x + offset, clipped to int32: a window at its ends must not wrap around."""
    info = jnp.iinfo(jnp.int32)
    offset = max(min(offset, info.max), info.min)
    if offset > 0:
        return jnp.minimum(x, info.max - offset) + offset
    return jnp.maximum(x, info.min - offset) + offset


_HIGH, _LOW = jnp.iinfo(jnp.int32).max, jnp.iinfo(jnp.int32).min


class Blocks(NamedTuple):
    """Ranges of the blocks along T, or along S; None: no restriction."""

    occupied: jax.Array | None  # bool[B|1, blocks], any entry is valid
    first: jax.Array | None  # int32[B|1, blocks], the lowest position
    last: jax.Array | None  # int32[B|1, blocks], the highest position
    first_segment: jax.Array | None  # int32[B|1, blocks]
    last_segment: jax.Array | None  # int32[B|1, blocks]


class BlockSparsity(NamedTuple):
    """Ranges of all blocks of a mask, and the reach of its positions."""

    queries: Blocks
    keys: Blocks
    reach: tuple[int | None, int | None]
    counts: tuple[int, int]

    @classmethod
    def of(
        cls, mask: Mask, query_block: int, key_block: int, counts: tuple[int, int]
    ) -> "BlockSparsity | None":
        """Return the ranges for `counts` blocks along T and S; None if the mask restricts no block."""
        if mask.key_positions is None and mask.query_valid is None and mask.key_segment_ids is None:
            return None
        valid = None if mask.key_positions is None else mask.key_positions >= 0
        queries = _blocks(
            mask.query_valid, mask.query_positions, mask.query_segment_ids, query_block
        )
        positions = mask.key_positions if mask.compares_positions else None
        keys = _blocks(valid, positions, mask.key_segment_ids, key_block)
        return cls(queries, keys, mask.reach, counts)

    def table(self, batch: Span, row: Span | None = None, column: Span | None = None) -> jax.Array:
        """Return bool[query blocks, key blocks], True if needed in any sequence; all, a row or a column."""
        query, key = (
            Blocks(*(take(x, batch, span) for x in blocks))
            for blocks, span in ((self.queries, row), (self.keys, column))
        )
        terms = []
        if key.occupied is not None:
            terms.append(key.occupied[:, None, :])
        if query.occupied is not None:
            terms.append(query.occupied[:, :, None])
        left, right = self.reach
        if right is not None:
            furthest = saturating_add(query.last, right)
            terms.append(key.first[:, None, :] <= furthest[:, :, None])
        if left is not None:
            furthest = saturating_add(query.first, -left)
            terms.append(key.last[:, None, :] >= furthest[:, :, None])
        if key.first_segment is not None:
            terms.append(key.first_segment[:, None, :] <= query.last_segment[:, :, None])
            terms.append(key.last_segment[:, None, :] >= query.first_segment[:, :, None])
        table = functools.reduce(operator.and_, terms)
        rows, columns = (
            count if span is None else 1
            for count, span in zip(self.counts, (row, column), strict=True)
        )
        return jnp.broadcast_to(table.any(axis=0), (rows, columns))


def _blocks(
    valid: jax.Array | None, positions: jax.Array | None, segments: jax.Array | None, size: int
) -> Blocks:
    """Return the ranges of blocks of `size` entries; invalid entries do not count.

    The last block ends with the data, so it may overlap its neighbour.
    """

    def reduced(
        x: jax.Array | None, how: Callable[..., Any], fill: Any, mask: bool
    ) -> jax.Array | None:
        if x is None:
            return None
        if mask and valid is not None:
            x = jnp.where(valid, x, fill)
        length = x.shape[1]
        even = length - length % size
        parts = [how(x[:, :even].reshape(x.shape[0], even // size, size), axis=-1)]
        if even < length:
            parts.append(how(x[:, length - size :], axis=-1)[:, None])
        return jnp.concatenate(parts, axis=1)

    return Blocks(
        occupied=reduced(valid, jnp.any, False, mask=False),
        first=reduced(positions, jnp.min, _HIGH, mask=True),
        last=reduced(positions, jnp.max, _LOW, mask=True),
        first_segment=reduced(segments, jnp.min, _HIGH, mask=True),
        last_segment=reduced(segments, jnp.max, _LOW, mask=True),
    )
