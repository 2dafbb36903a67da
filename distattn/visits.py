"""Which blocks need work, known for a whole row of them before any is looked at: the others cost nothing.

Decided by the ranges of positions and of segment ids in a block of queries and in a block of keys, in
whatever order they are. So a block may be visited in vain, never left out wrongly.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from distattn.mask import Mask, Span, saturating_add, take

_HIGH, _LOW = jnp.iinfo(jnp.int32).max, jnp.iinfo(jnp.int32).min


class Blocks(NamedTuple):
    """What decides about each block along T, or along S; None: it decides nothing."""

    there: jax.Array | None  # bool[B|1, blocks]: whether anything is in it
    first: jax.Array | None  # int32[B|1, blocks], the lowest position
    last: jax.Array | None  # and the highest
    first_segment: jax.Array | None
    last_segment: jax.Array | None


class Visits(NamedTuple):
    """The blocks of a mask, and how far its positions reach."""

    queries: Blocks
    keys: Blocks
    reach: tuple[int | None, int | None]
    counts: tuple[int, int]

    @classmethod
    def of(
        cls, mask: Mask, query_block: int, key_block: int, counts: tuple[int, int]
    ) -> "Visits | None":
        """`counts` blocks of so many queries and keys each; None where nothing is known about any."""
        if mask.key_positions is None and mask.query_valid is None and mask.key_segment_ids is None:
            return None
        there = None if mask.key_positions is None else mask.key_positions >= 0
        queries = _blocks(
            mask.query_valid, mask.query_positions, mask.query_segment_ids, query_block
        )
        positions = mask.key_positions if mask.compares_positions else None
        keys = _blocks(there, positions, mask.key_segment_ids, key_block)
        return cls(queries, keys, mask.reach, counts)

    def keys_for(self, batch: Span, row: Any) -> jax.Array:
        """bool[key blocks]: which may be attended to by a block of queries, in any row of the batch."""
        return self.table(batch, Span(row, 1))[0]

    def queries_for(self, batch: Span, column: Any) -> jax.Array:
        """bool[query blocks]: which may attend to a block of keys, in any row of the batch."""
        return self.table(batch, column=Span(column, 1))[:, 0]

    def table(self, batch: Span, row: Span | None = None, column: Span | None = None) -> jax.Array:
        """bool[query blocks, key blocks], of all where no row or column is named."""
        query, key = (
            Blocks(*(take(x, batch, span) for x in blocks))
            for blocks, span in ((self.queries, row), (self.keys, column))
        )
        terms = []
        if key.there is not None:
            terms.append(key.there[:, None, :])
        if query.there is not None:
            terms.append(query.there[:, :, None])
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
    there: jax.Array | None, positions: jax.Array | None, segments: jax.Array | None, size: int
) -> Blocks:
    """The ranges of each block of so many; an entry that is not there is in none.

    The last block ends with the data, and where that makes it overlap its neighbour it is computed whole.
    """

    def reduced(
        x: jax.Array | None, how: Callable[..., Any], fill: Any, mask: bool
    ) -> jax.Array | None:
        if x is None:
            return None
        if mask and there is not None:
            x = jnp.where(there, x, fill)
        length = x.shape[1]
        even = length - length % size
        parts = [how(x[:, :even].reshape(x.shape[0], even // size, size), axis=-1)]
        if even < length:
            parts.append(how(x[:, length - size :], axis=-1)[:, None])
        return jnp.concatenate(parts, axis=1)

    return Blocks(
        there=reduced(there, jnp.any, False, mask=False),
        first=reduced(positions, jnp.min, _HIGH, mask=True),
        last=reduced(positions, jnp.max, _LOW, mask=True),
        first_segment=reduced(segments, jnp.min, _HIGH, mask=True),
        last_segment=reduced(segments, jnp.max, _LOW, mask=True),
    )
