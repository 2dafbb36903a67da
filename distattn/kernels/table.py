"""Which blocks the kernels visit: known before they start, by the ranges of positions and of segments."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from distattn.kernels.rows import Cut
from distattn.mask import Mask, Span
from distattn.visits import Visits


class Table(NamedTuple):
    """Which blocks each block visits, in which order; flat, as the scalar memory wants it."""

    counts: jax.Array  # int32[B|1 * own]
    order: jax.Array  # int32[B|1 * own * others], those that are visited first
    own: int
    others: int
    batch: int  # 1 or B

    def row(self, batch: jax.Array, block: jax.Array) -> jax.Array:
        """Where the block's count stands."""
        return (batch if self.batch > 1 else 0) * self.own + block


def tables(mask: Mask, cut: Cut) -> tuple[Table, Table]:
    """Of blocks of rows, the blocks of keys; and of blocks of keys, the blocks of rows."""
    counts = cut.row_blocks, cut.key_blocks
    row_block = min(cut.rows, cut.queries * cut.groups)
    visits = Visits.of(_of_rows(mask, cut.groups), row_block, min(cut.key_block, cut.keys), counts)
    batch = 1
    needed = jnp.ones((1, *counts), bool)
    if visits is not None:
        known = jax.tree.leaves((visits.queries, visits.keys))
        batch = max(x.shape[0] for x in known)
        rows = jnp.arange(batch, dtype=jnp.int32)
        needed = jax.vmap(lambda b: visits.table(Span(b, 1)))(rows)
    return _table(needed), _table(needed.swapaxes(1, 2))


def _of_rows(mask: Mask, groups: int) -> Mask:
    """The mask of rows: a block of them may end within the groups of a query."""
    names = "query_positions", "query_valid", "query_segment_ids"
    vectors = {name: getattr(mask, name) for name in names}
    rows = {
        name: None if x is None else jnp.repeat(x, groups, axis=1) for name, x in vectors.items()
    }
    return dataclasses.replace(mask, **rows)


def _table(needed: jax.Array) -> Table:
    batch, own, others = needed.shape
    order = jnp.argsort(~needed, axis=2, stable=True).astype(jnp.int32)
    counts = needed.sum(axis=2, dtype=jnp.int32)
    return Table(counts.reshape(-1), order.reshape(-1), own, others, batch)
