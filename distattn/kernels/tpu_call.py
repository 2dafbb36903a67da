"""One launch of a TPU kernel: the grid, and which block of each array a step of it has.

The grid is (rows of the batch, blocks of heads, own blocks, steps): a block of rows steps over the blocks
of keys that it visits, or the other way round. Beyond the last one a step has the same blocks as the step
before, so nothing is loaded for it, and computes nothing.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from distattn._compat import shaped, vary, varying_axes
from distattn.kernels.interpreter import interpreter
from distattn.kernels.tpu_layout import Cut, Index, Order, Table


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

    cut: Cut
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

            def at(*place: Any, whole: bool = whole, which: int = which) -> tuple:
                batch, _, *blocks = self._blocks(*place)
                return 0 if whole else batch, 0, blocks[which]

            parts.append(Part(x, pl.BlockSpec((1, x.shape[1], size), at)))
        return parts

    def by_rows(self, x: Any) -> Part:
        """[B, K, R, .], rows of all heads."""

        def at(*place: Any) -> tuple:
            batch, heads, row, _ = self._blocks(*place)
            return batch, heads, row, 0

        return Part(x, pl.BlockSpec((1, self.cut.heads, self.cut.rows, x.shape[3]), at))

    def of_rows(self, x: Any) -> Part:
        """[B, K, ., R], numbers of rows."""

        def at(*place: Any) -> tuple:
            batch, heads, row, _ = self._blocks(*place)
            return batch, heads, 0, row

        return Part(x, pl.BlockSpec((1, self.cut.heads, x.shape[2], self.cut.rows), at))

    def by_keys(self, x: Any, order: Order) -> Part:
        """[L, B, S, K, .] in its order, keys or values."""

        def at(*place: Any) -> tuple:
            batch, heads, _, key = self._blocks(*place)
            layer = place[-1][0] if x.shape[0] > 1 else 0
            index = {"S": key, "K": heads, "H": 0}
            return layer, batch, *(index[letter] for letter in order)

        sizes = {"S": self.cut.key_block, "K": self.cut.heads, "H": x.shape[2 + order.index("H")]}
        return Part(x, pl.BlockSpec((1, 1, *(sizes[letter] for letter in order)), at))

    def step(self, counts: Any) -> Step:
        """Of the kernel that is running."""
        batch, own, step = pl.program_id(0), pl.program_id(2), pl.program_id(3)
        count = counts[self.table.row(batch, own)]
        return Step(step == 0, step < count, step == self.table.others - 1)

    def _blocks(self, batch, heads, own, step, counts, order, _) -> tuple:
        """Row of the batch, block of heads, block of rows, block of keys."""
        row = self.table.row(batch, own)
        step = jnp.minimum(step, jnp.maximum(counts[row] - 1, 0))
        other = order[row * self.table.others + step]
        return batch, heads, *((own, other) if self.inner == "keys" else (other, own))


def launch(
    kernel: Callable,
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
    steps = ("parallel" if collective_id is None else "arbitrary",) * 3 + ("arbitrary",)
    return pl.pallas_call(
        kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(cut.batch, cut.head_blocks, table.own, table.others),
            in_specs=[x.spec for x in inputs],
            out_specs=[x.spec for x in outputs],
            scratch_shapes=scratch,
        ),
        out_shape=[shaped(x.array.shape, x.array.dtype, axes) for x in outputs],
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=steps,
            vmem_limit_bytes=cut.target.budget_bytes,
            collective_id=collective_id,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * width * pairs,
            transcendentals=pairs,
            bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in arrays),
        ),
        interpret=interpreter() or False,
    )(*arguments)
