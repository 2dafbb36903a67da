"""One launch of a TPU kernel: its grid, and which block of each array a step of the grid reads.

The grid is (key parts, batch, blocks of heads, own blocks, steps): a block of rows steps over the blocks of
keys that it visits, or a block of keys over the blocks of rows. With two key parts, each visits every other
block. After the last visit a step keeps the blocks of the step before, so it loads and computes nothing.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from distattn._compat import interpreter, shaped, vary, varying_axes
from distattn.local.kernels.shared import BlockedArray, BlockTable, MaskVectors
from distattn.local.kernels.tpu.tiling import Order, TpuTileConfig


class GridStep(NamedTuple):
    """The place of a running kernel in its grid."""

    is_first: jax.Array  # first step of its own block
    is_needed: jax.Array  # whether it visits a block
    is_last: jax.Array


@dataclasses.dataclass(frozen=True)
class LaunchSpec:
    """The grid of a launch, and the blocks of its arrays."""

    config: TpuTileConfig
    table: BlockTable
    layer: jax.Array | None
    inner: Literal["rows", "keys"]  # a block steps over their blocks

    def mask_vectors(self, vectors: MaskVectors | None) -> list[BlockedArray]:
        """Return the vectors of the mask in blocks, [] without a mask."""
        if vectors is None:
            return []
        sizes = self.config.row_block, self.config.key_block
        blocked = []
        for which, (x, size) in enumerate(zip(vectors, sizes, strict=True)):

            def index(*place: Any, shared: bool = x.shape[0] == 1, which: int = which) -> Any:
                _, batch, _, *blocks = self._blocks(*place)
                return 0 if shared else batch, 0, blocks[which]

            blocked.append(BlockedArray(x, pl.BlockSpec((1, x.shape[1], size), index)))
        return blocked

    def row_matrix(self, x: Any) -> BlockedArray:
        """Return [B, K, R, .] or, per key part, [parts * B, K, R, .] in blocks."""

        def index(*place: Any) -> tuple[Any, ...]:
            part, batch, heads, row, _ = self._blocks(*place)
            return self._batch_of(x, part, batch), heads, row, 0

        shape = (1, self.config.heads, self.config.row_block, x.shape[3])
        return BlockedArray(x, pl.BlockSpec(shape, index))

    def row_vectors(self, x: Any) -> BlockedArray:
        """Return [B, K, ., R] or, per key part, [parts * B, K, ., R] in blocks."""

        def index(*place: Any) -> tuple[Any, ...]:
            part, batch, heads, row, _ = self._blocks(*place)
            return self._batch_of(x, part, batch), heads, 0, row

        shape = (1, self.config.heads, x.shape[2], self.config.row_block)
        return BlockedArray(x, pl.BlockSpec(shape, index))

    def key_matrix(self, x: Any, order: Order) -> BlockedArray:
        """Return keys or values [L, B, S, K, .], stored in that order, in blocks."""

        def index(*place: Any) -> tuple[Any, ...]:
            _, batch, heads, _, key = self._blocks(*place)
            layer = place[-1][0] if x.shape[0] > 1 else 0
            blocks = {"S": key, "K": heads, "H": 0}
            return layer, batch, *(blocks[letter] for letter in order)

        width = x.shape[2 + order.index("H")]
        sizes = {"S": self.config.key_block, "K": self.config.heads, "H": width}
        return BlockedArray(x, pl.BlockSpec((1, 1, *(sizes[letter] for letter in order)), index))

    def key_scales(self, x: Any) -> BlockedArray:
        """Return the scales of keys or values, [L, B, K / heads, heads, S], in blocks."""

        def index(*place: Any) -> tuple[Any, ...]:
            _, batch, heads, _, key = self._blocks(*place)
            return place[-1][0] if x.shape[0] > 1 else 0, batch, heads, 0, key

        shape = (1, 1, 1, self.config.heads, self.config.key_block)
        return BlockedArray(x, pl.BlockSpec(shape, index))

    def step(self, counts: Any) -> GridStep:
        """Return where the running kernel is."""
        part, batch, _, own, step = (pl.program_id(n) for n in range(5))
        count = counts[self.table.row(batch, own)]
        return GridStep(step == 0, self._visit(part, step) < count, step == self.steps - 1)

    @property
    def steps(self) -> int:
        """Number of steps of a block."""
        return -(-self.table.others // self.config.key_parts)

    def _visit(self, part: Any, step: Any) -> Any:
        parts = self.config.key_parts
        return step * parts + part if parts > 1 else step

    def _batch_of(self, x: Any, part: Any, batch: Any) -> Any:
        return batch if x.shape[0] == self.config.batch else part * self.config.batch + batch

    def _blocks(self, *place: Any) -> tuple[Any, ...]:
        """Return the key part, batch, block of heads, block of rows and block of keys of a step."""
        part, batch, heads, own, step, counts, order, _ = place
        row = self.table.row(batch, own)
        # Neither is negative: `//` would ask for signs, and for those Pallas wants a chip that it knows.
        parts = jnp.int32(self.config.key_parts)
        last = lax.div(jnp.maximum(counts[row] - 1 - part, 0), parts)
        other = order[row * self.table.others + self._visit(part, jnp.minimum(step, last))]
        return part, batch, heads, *((own, other) if self.inner == "keys" else (other, own))


def launch(
    kernel: Callable[..., None],
    spec: LaunchSpec,
    inputs: list[BlockedArray],
    outputs: list[BlockedArray],
    *,
    scratch: list[Any],
    width: int,
    collective_id: int | None = None,
    exchanged: frozenset[str] = frozenset(),
) -> list[jax.Array]:
    """Run kernel(counts, order, layer, *blocks of inputs and outputs, *scratch) over the grid.

    Args:
      kernel: the body.
      spec: the grid.
      inputs: arrays to read.
      outputs: shapes to write.
      scratch: memory that stays while the kernel runs.
      width: the sum of the widths of its matmuls, for the compiler's estimate of its time.
      collective_id: the barrier of a kernel that exchanges with other devices. It keeps to one core, since
        all its steps share what they exchange.
      exchanged: the axes over which its results vary because of that.
    """
    config, table = spec.config, spec.table
    layer = jnp.zeros((), jnp.int32) if spec.layer is None else spec.layer
    arrays = [table.counts, table.order, layer.reshape(1), *(x.array for x in inputs)]
    axes = varying_axes(*arrays) | exchanged
    parallel = "parallel" if collective_id is None else "arbitrary"
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(config.key_parts, config.batch, config.head_blocks, table.own, spec.steps),
            in_specs=[x.spec for x in inputs],
            out_specs=[x.spec for x in outputs],
            scratch_shapes=scratch,
        ),
        out_shape=[shaped(x.array.shape, x.array.dtype, axes) for x in outputs],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=(*(parallel,) * 4, "arbitrary"),
            vmem_limit_bytes=config.chip.budget_bytes,
            collective_id=collective_id,
            # The bits of float16 are read block by block; without this XLA would copy them.
            allow_input_fusion=[x.dtype == jnp.uint16 for x in arrays],
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * width * config.pairs,
            transcendentals=config.pairs,
            bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays),
        ),
        interpret=interpreter() or False,
    )(*(vary(x, axes) for x in arrays))
