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
from distattn.local.kernels.tpu.tiling import TpuTileConfig


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

    def blocked(self, x: Any, dims: str) -> BlockedArray:
        """Return an array in blocks.

        Args:
          x: the array.
          dims: a letter per dimension: L layers, B batch (times key parts, if there are any), K KV heads,
            J blocks of KV heads, R rows, S keys; '.' for a dimension that is read whole.
        """
        config = self.config
        sizes = {"K": config.heads, "R": config.row_block, "S": config.key_block}
        shape = tuple(
            size if letter == "." else sizes.get(letter, 1)
            for letter, size in zip(dims, x.shape, strict=True)
        )

        def index(*place: Any) -> tuple[Any, ...]:
            part, batch, heads, row, key = self._blocks(*place)
            if x.shape[dims.index("B")] > config.batch:
                batch = part * config.batch + batch
            blocks = {"L": place[-1][0], "B": batch, "K": heads, "J": heads, "R": row, "S": key}
            return tuple(
                0 if size == 1 else blocks.get(letter, 0)
                for letter, size in zip(dims, x.shape, strict=True)
            )

        return BlockedArray(x, pl.BlockSpec(shape, index))

    def mask_vectors(self, vectors: MaskVectors | None) -> list[BlockedArray]:
        """Return the vectors of the mask in blocks, [] without a mask."""
        if vectors is None:
            return []
        return [self.blocked(vectors.rows, "B.R"), self.blocked(vectors.keys, "B.S")]

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

    `width` is the sum of the widths of its matmuls, for the compiler's estimate of its time.
    `collective_id` is the barrier of a kernel that exchanges with other devices, and `exchanged` the axes
    over which its results then vary. All its steps share what they exchange, so it keeps to one core.
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
