"""One launch of a GPU kernel: its grid, its arrays, and the blocks that a program steps over.

The grid is (own blocks and their splits, heads of keys, rows of the batch), the first the fastest, so that
programs that run together read the same keys. An array is passed whole but for the head and the row of the
batch: a program reads of it the blocks that the table names, one after the other.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from distattn._compat import interpreter, shaped, vary, varying_axes
from distattn.local.kernels.gpu.tiling import GpuCut, padded
from distattn.local.kernels.shared import Index, Table


class Part(NamedTuple):
    """An array of a call, and what a program sees of it."""

    array: Any  # of a result, its shape and dtype
    spec: pl.BlockSpec


def _part(x: Any, batch: int | None, heads: int | None, *, whole: bool = False) -> Part:
    """All of an array but for those two dimensions, of which a program has one entry.

    A last dimension after that of the heads is a width, and filled up to what its pieces are together.
    `whole`: one row holds for the batch.
    """
    kept = list(x.shape)
    if heads is not None and heads < x.ndim - 1:
        kept[-1] = padded(kept[-1])
    shape = [None if axis in (batch, heads) else size for axis, size in enumerate(kept)]

    def at(_: Any, head: Any, row: Any) -> tuple[Any, ...]:
        place = {heads: head, batch: 0 if whole else row}
        return tuple(place.get(axis, 0) for axis in range(x.ndim))

    return Part(x, pl.BlockSpec(tuple(shape), at))


def by_rows(x: Any) -> Part:
    """[B, K, R, .] or, with splits, [splits, B, K, R, .]: rows of all heads."""
    return _part(x, x.ndim - 4, x.ndim - 3)


def of_rows(x: Any) -> Part:
    """[B, K, ., R] or, with splits, [splits, B, K, ., R]: numbers of rows."""
    lead = x.ndim - 4
    shape = (*x.shape[:lead], None, None, *x.shape[lead + 2 :])
    return Part(x, pl.BlockSpec(shape, lambda _, head, row: (*[0] * lead, row, head, 0, 0)))


def by_keys(x: Any) -> Part:
    """[L, B, S, K, .], keys or values, or [B, S, K, .], their gradients."""
    return _part(x, x.ndim - 4, x.ndim - 2)


def of_keys(x: Any) -> Part:
    """[L, B, S, K]: scales."""
    return _part(x, 1, 3)


def index_parts(index: Index | None) -> list[Part]:
    """The vectors of the mask."""
    return [] if index is None else [_part(x, 0, None, whole=x.shape[0] == 1) for x in index]


class Program(NamedTuple):
    """One program of a launch: what it computes, and which blocks it steps over."""

    own: jax.Array  # block
    split: jax.Array  # of the splits of the block
    first: jax.Array  # of the blocks that are visited
    last: jax.Array
    order: Any  # of spans of blocks
    row: jax.Array  # where the order of its own starts
    others: int  # that it has
    span: int

    def over(self, body: Callable[[jax.Array, Any], Any], init: Any) -> Any:
        """body(block, carry) for each block that it visits.

        Which one is next is read a step ahead: Triton brings what a step reads into shared memory ahead of
        it, but half as far if that depends on something else that the step reads.
        """

        def block(index: jax.Array) -> jax.Array:
            index = jnp.minimum(index, self.others * self.span - 1)
            entry = self.order[self.row + lax.div(index, self.span)]
            return entry * self.span + lax.rem(index, self.span)

        def step(index: jax.Array, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
            this, state = carry
            following = block(index + 1)
            return following, body(this, state)

        return lax.fori_loop(self.first, self.last, step, (block(self.first), init))[1]


@dataclasses.dataclass(frozen=True)
class Call:
    """What a program steps over."""

    cut: GpuCut
    table: Table  # of spans of blocks
    inner: Literal["rows", "keys"]
    splits: int = 1

    @property
    def own_blocks(self) -> int:
        """How many blocks are not stepped over."""
        cut = self.cut
        return cut.used_row_blocks if self.inner == "keys" else cut.used_key_blocks

    @property
    def _spans(self) -> tuple[int, int]:
        """Of own blocks, of others."""
        rows, keys = self.cut.row_span, self.cut.key_span
        return (rows, keys) if self.inner == "keys" else (keys, rows)

    def program(self, counts: Any, order: Any) -> "Program":
        """The one that is running; to be called outside of what it does on a condition."""
        own, split = pl.program_id(0), jnp.zeros((), jnp.int32)
        if self.splits > 1:
            own, split = lax.div(own, self.splits), lax.rem(own, self.splits)
        own_span, span = self._spans
        row = self.table.row(pl.program_id(2), lax.div(own, own_span))
        count = counts[row] * span
        first, last = (lax.div(count * x, self.splits) for x in (split, split + 1))
        others = self.table.others
        return Program(own, split, first, last, order, row * others, others, span)


def launch(
    kernel: Callable[..., None],
    call: Call,
    layer: jax.Array | None,
    inputs: list[Part],
    outputs: list[Part],
    *,
    width: int,
) -> list[jax.Array]:
    """kernel(counts, order, layer, *inputs, *outputs), over the grid of the call.

    `width` is the sum of the widths of its products, for an estimate of its time.
    """
    cut, table = call.cut, call.table
    layer = jnp.zeros((), jnp.int32) if layer is None else layer
    scalars = [_part(x, None, None) for x in (table.counts, table.order, layer.reshape(1))]
    parts = [*scalars, *inputs]
    arrays = [x.array for x in parts]
    axes = varying_axes(*arrays)
    arguments = [vary(x, axes) for x in arrays]
    pairs = cut.batch * cut.kv_heads * cut.groups * cut.queries * cut.keys
    return pl.pallas_call(
        kernel,
        grid=(call.own_blocks * call.splits, cut.kv_heads, cut.batch),
        in_specs=[x.spec for x in parts],
        out_specs=[x.spec for x in outputs],
        out_shape=[shaped(x.array.shape, x.array.dtype, axes) for x in outputs],
        compiler_params=plgpu.CompilerParams(
            num_warps=cut.sizes.warps, num_stages=cut.sizes.stages
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * width * pairs,
            transcendentals=pairs,
            bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays),
        ),
        interpret=interpreter() is not None,
    )(*arguments)
