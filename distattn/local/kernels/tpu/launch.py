"""One launch of a TPU kernel: the grid, and which block of each array a step of it has.

The grid is (parts, rows of the batch, blocks of heads, own blocks, steps): a block of rows steps over the
blocks of keys that it visits, or the other way round. Where there are two parts, one has every other of
them. Beyond the last one a step has the same blocks as the step before, so nothing is loaded for it, and
computes nothing.
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
from distattn.local.kernels.shared import Index, Table
from distattn.local.kernels.tpu.tiling import Order, TpuCut


class Part(NamedTuple):
    """An array of a call, and the blocks that it is cut into."""

    array: Any  # of a result, its shape and dtype
    spec: pl.BlockSpec


class Step(NamedTuple):
    """Where in the grid a kernel is."""

    is_first: jax.Array
    is_needed: jax.Array
    is_last: jax.Array


@dataclasses.dataclass(frozen=True)
class Call:
    """What the blocks of a call depend on."""

    cut: TpuCut
    table: Table
    layer: jax.Array | None
    inner: Literal["rows", "keys"]  # what a block steps over

    def index(self, index: Index | None) -> list[Part]:
        """The vectors of the mask."""
        if index is None:
            return []
        parts = []
        for x, size, which in ((index.rows, self.cut.rows, 0), (index.keys, self.cut.key_block, 1)):
            whole = x.shape[0] == 1

            def at(*place: Any, whole: bool = whole, which: int = which) -> tuple[Any, ...]:
                _, batch, _, *blocks = self._blocks(*place)
                return 0 if whole else batch, 0, blocks[which]

            parts.append(Part(x, pl.BlockSpec((1, x.shape[1], size), at)))
        return parts

    def by_rows(self, x: Any) -> Part:
        """[B, K, R, .], rows of all heads; or [parts * B, K, R, .], those of each part."""

        def at(*place: Any) -> tuple[Any, ...]:
            part, batch, heads, row, _ = self._blocks(*place)
            return self._row(x, part, batch), heads, row, 0

        return Part(x, pl.BlockSpec((1, self.cut.heads, self.cut.rows, x.shape[3]), at))

    def of_rows(self, x: Any) -> Part:
        """[B, K, ., R], numbers of rows; or [parts * B, K, ., R]."""

        def at(*place: Any) -> tuple[Any, ...]:
            part, batch, heads, row, _ = self._blocks(*place)
            return self._row(x, part, batch), heads, 0, row

        return Part(x, pl.BlockSpec((1, self.cut.heads, x.shape[2], self.cut.rows), at))

    def by_keys(self, x: Any, order: Order) -> Part:
        """[L, B, S, K, .] in its order, keys or values."""

        def at(*place: Any) -> tuple[Any, ...]:
            _, batch, heads, _, key = self._blocks(*place)
            layer = place[-1][0] if x.shape[0] > 1 else 0
            index = {"S": key, "K": heads, "H": 0}
            return layer, batch, *(index[letter] for letter in order)

        sizes = {"S": self.cut.key_block, "K": self.cut.heads, "H": x.shape[2 + order.index("H")]}
        return Part(x, pl.BlockSpec((1, 1, *(sizes[letter] for letter in order)), at))

    def by_scales(self, x: Any) -> Part:
        """[L, B, K / heads, heads, S], scales of keys or values."""

        def at(*place: Any) -> tuple[Any, ...]:
            _, batch, heads, _, key = self._blocks(*place)
            return place[-1][0] if x.shape[0] > 1 else 0, batch, heads, 0, key

        return Part(x, pl.BlockSpec((1, 1, 1, self.cut.heads, self.cut.key_block), at))

    def step(self, counts: Any) -> Step:
        """Of the kernel that is running."""
        part, batch, _, own, step = (pl.program_id(n) for n in range(5))
        count = counts[self.table.row(batch, own)]
        return Step(step == 0, self._visit(part, step) < count, step == self.steps - 1)

    @property
    def steps(self) -> int:
        """Of a block, at most."""
        return -(-self.table.others // self.cut.parts)

    def _visit(self, part: Any, step: Any) -> Any:
        """Which of its visits a block makes then."""
        return step * self.cut.parts + part if self.cut.parts > 1 else step

    def _row(self, x: Any, part: Any, batch: Any) -> Any:
        return batch if x.shape[0] == self.cut.batch else part * self.cut.batch + batch

    def _blocks(self, *place: Any) -> tuple[Any, ...]:
        """Part, row of the batch, block of heads, block of rows, block of keys."""
        part, batch, heads, own, step, counts, order, _ = place
        row = self.table.row(batch, own)
        # Neither is negative: `//` would ask for signs, and for those Pallas wants a chip that it knows.
        last = lax.div(jnp.maximum(counts[row] - 1 - part, 0), jnp.int32(self.cut.parts))
        other = order[row * self.table.others + self._visit(part, jnp.minimum(step, last))]
        return part, batch, heads, *((own, other) if self.inner == "keys" else (other, own))


def launch(
    kernel: Callable[..., None],
    call: Call,
    inputs: list[Part],
    outputs: list[Part],
    *,
    scratch: list[Any],
    width: int,
    collective_id: int | None = None,
    exchanged: frozenset[str] = frozenset(),
) -> list[jax.Array]:
    """kernel(counts, order, layer, *blocks of inputs and outputs, *scratch), over the grid of the call.

    `width` is the sum of the widths of its products, for the compiler's estimate of its time.
    `collective_id` is the barrier of a kernel that exchanges with other devices, and `exchanged` the axes
    over which its results vary for that; such a kernel keeps to one core, where a device has two, since all
    its steps share what they exchange.
    """
    cut, table = call.cut, call.table
    layer = jnp.zeros((), jnp.int32) if call.layer is None else call.layer
    arrays = [table.counts, table.order, layer.reshape(1), *(x.array for x in inputs)]
    axes = varying_axes(*arrays) | exchanged
    arguments = [vary(x, axes) for x in arrays]
    pairs = cut.batch * cut.kv_heads * cut.groups * cut.queries * cut.keys
    parallel = "parallel" if collective_id is None else "arbitrary"
    semantics = *(parallel,) * 4, "arbitrary"
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(cut.parts, cut.batch, cut.head_blocks, table.own, call.steps),
            in_specs=[x.spec for x in inputs],
            out_specs=[x.spec for x in outputs],
            scratch_shapes=scratch,
        ),
        out_shape=[shaped(x.array.shape, x.array.dtype, axes) for x in outputs],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=semantics,
            vmem_limit_bytes=cut.target.budget_bytes,
            collective_id=collective_id,
            # The bits of float16, which XLA takes block by block then; else it makes a copy of them.
            allow_input_fusion=[x.dtype == jnp.uint16 for x in arrays],
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * width * pairs,
            transcendentals=pairs,
            bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays),
        ),
        interpret=interpreter() or False,
    )(*arguments)
