"""One launch of a GPU kernel: its grid, its arrays, and the blocks that a program steps over.

The grid is (own blocks and their splits, KV heads, batch), the first fastest, so that programs that run
together read the same keys. A program sees all of an array for its head and row of the batch, and reads the
blocks that the table lists, one after the other.
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
from distattn.local.kernels.gpu.tiling import GpuTileConfig, padded_width
from distattn.local.kernels.shared import BlockedArray, BlockTable, MaskVectors


def blocked(x: Any, dims: str) -> BlockedArray:
    """Return an array of which a program sees its row of the batch and its KV head.

    Args:
      x: the array.
      dims: a letter per dimension: B batch, K KV heads, W a width, which is padded to the sum of its
        pieces; other letters for dimensions that a program sees whole.
    """
    shape = tuple(
        None if letter in "BK" else padded_width(size) if letter == "W" else size
        for letter, size in zip(dims, x.shape, strict=True)
    )

    def index(_: Any, head: Any, row: Any) -> tuple[Any, ...]:
        place = {"K": head, "B": row if x.shape[dims.find("B")] > 1 else 0}
        return tuple(place.get(letter, 0) for letter in dims)

    return BlockedArray(x, pl.BlockSpec(shape, index))


def mask_vectors(vectors: MaskVectors | None) -> list[BlockedArray]:
    """Return the vectors of the mask, [] without a mask."""
    return [] if vectors is None else [blocked(vectors.rows, "B.R"), blocked(vectors.keys, "B.S")]


class Program(NamedTuple):
    """One program of a launch: its block, and the blocks that it steps over."""

    own: jax.Array  # its block
    split: jax.Array  # its split of the visited blocks
    first: jax.Array  # first visited block
    last: jax.Array  # end of the visited blocks
    order: Any  # spans of blocks
    row: jax.Array  # start of its own span's order
    others: int  # number of spans in the order
    span: int

    def over(self, body: Callable[[jax.Array, Any], Any], init: Any) -> Any:
        """Return the carry after body(block, carry) for each block that the program visits.

        The next block's number is read a step ahead: Triton prefetches what a step reads into shared
        memory, but half as far if the address depends on something else that the step reads.
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
class LaunchSpec:
    """The grid of a launch."""

    config: GpuTileConfig
    table: BlockTable  # its blocks are spans
    layer: jax.Array | None
    inner: Literal["rows", "keys"]  # a program steps over their blocks
    splits: int = 1

    @property
    def own_blocks(self) -> int:
        """Number of blocks that have programs of their own."""
        by_rows = self.inner == "keys"
        return self.config.used_row_blocks if by_rows else self.config.used_key_blocks

    def program(self, counts: Any, order: Any) -> Program:
        """Return the running program; call it outside of conditions."""
        own, split = pl.program_id(0), jnp.zeros((), jnp.int32)
        if self.splits > 1:
            own, split = lax.div(own, self.splits), lax.rem(own, self.splits)
        spans = self.config.row_span, self.config.key_span
        own_span, span = spans if self.inner == "keys" else spans[::-1]
        row = self.table.row(pl.program_id(2), lax.div(own, own_span))
        count = counts[row] * span
        first, last = (lax.div(count * x, self.splits) for x in (split, split + 1))
        others = self.table.others
        return Program(own, split, first, last, order, row * others, others, span)


def launch(
    kernel: Callable[..., None],
    spec: LaunchSpec,
    inputs: list[BlockedArray],
    outputs: list[BlockedArray],
    *,
    width: int,
) -> list[jax.Array]:
    """Run kernel(counts, order, layer, *inputs, *outputs) over the grid.

    `width` is the sum of the widths of its matmuls, for an estimate of its time.
    """
    config, table = spec.config, spec.table
    layer = jnp.zeros((), jnp.int32) if spec.layer is None else spec.layer
    scalars = [blocked(x, ".") for x in (table.counts, table.order, layer.reshape(1))]
    inputs = [*scalars, *inputs]
    arrays = [x.array for x in inputs]
    axes = varying_axes(*arrays)
    return pl.pallas_call(
        kernel,
        grid=(spec.own_blocks * spec.splits, config.kv_heads, config.batch),
        in_specs=[x.spec for x in inputs],
        out_specs=[x.spec for x in outputs],
        out_shape=[shaped(x.array.shape, x.array.dtype, axes) for x in outputs],
        compiler_params=plgpu.CompilerParams(num_warps=config.warps, num_stages=config.stages),
        cost_estimate=pl.CostEstimate(
            flops=2 * width * config.pairs,
            transcendentals=config.pairs,
            bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays),
        ),
        interpret=interpreter() is not None,
    )(*(vary(x, axes) for x in arrays))
