"""How a call is cut for the GPU kernels, and what they compute it with."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from distattn._compat import device_kind_of
from distattn.block import Scoring
from distattn.kernels.gpu_blocks import (
    TABLE_ENTRIES,
    Shape,
    Sizes,
    Target,
    shared_bytes,
    sizes,
    target_of,
)
from distattn.kernels.rows import Cut
from distattn.kernels.scores import EXACT, PLAIN, Numbers
from distattn.kernels.tuned import chip_name, kind_of, tuned
from distattn.operands import Operands
from distattn.tiles import Machine

# TensorFloat-32 is what XLA:GPU takes for these too.
_FAST = (*PLAIN, "high", "tensorfloat32", lax.Precision.HIGH, (lax.Precision.HIGH,) * 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuCut(Cut):
    """Sizes of a call and of its blocks."""

    splits: int  # programs that share the keys of a block of rows
    sizes: Sizes
    target: Target
    shared_bytes: int  # that a program holds, about

    @property
    def coarse(self) -> "GpuCut":
        """The same with spans for blocks, as the table of visits has them."""
        rows, keys = self.rows * self.row_span, self.key_block * self.key_span
        return dataclasses.replace(self, rows=rows, key_block=keys, row_span=1, key_span=1)


def precision_of(scoring: Scoring) -> lax.Precision | None:
    """HIGHEST: of float32; DEFAULT: of what is fast; None: another is asked for, which is not done.

    Where the call names none it is that of `jax.default_matmul_precision`.
    """
    precision = scoring.precision
    if precision is None:
        precision = getattr(jax.config, "jax_default_matmul_precision", None)
    if precision in EXACT:
        return lax.Precision.HIGHEST
    return lax.Precision.DEFAULT if precision in _FAST else None


def numbers_of(operands: Operands, scoring: Scoring, *, backward: bool = False) -> Numbers:
    """bfloat16 or float16 where all is, and no other precision is asked for; else float32.

    float32 at the default precision is TensorFloat-32, which holds float16 and int8 exactly. float16 has
    too few exponents for gradients, and for weights times the scales of what is quantised.
    """
    arrays = operands.query, operands.key, operands.value
    dtypes = {x.dtype for x in arrays if x.dtype != jnp.int8}
    precision = precision_of(scoring) or lax.Precision.DEFAULT
    narrow = len(dtypes) == 1 and precision == lax.Precision.DEFAULT
    dtype = dtypes.pop() if narrow else jnp.dtype(jnp.float32)
    if dtype == jnp.float16 and (backward or operands.key_scale is not None):
        dtype = jnp.dtype(jnp.float32)
    return Numbers(dtype, precision)


def cut_of(
    operands: Operands, scoring: Scoring, machine: Machine, *, backward: bool = False
) -> GpuCut:
    """The sizes for a call."""
    batch, queries, heads, width = operands.query.shape
    keys, kv_heads, value_width = operands.value.shape[-3:]
    groups = heads // kv_heads
    device_kind = device_kind_of()
    target = target_of(device_kind)
    kind = kind_of(queries * groups, backward=backward)
    measured = tuned(chip_name(device_kind), kind, width, operands.key.dtype)
    numbers = numbers_of(operands, scoring, backward=backward)
    shape = Shape(
        queries * groups,
        groups,
        keys,
        width,
        value_width,
        numbers.dtype.itemsize,
        backward,
        exact=numbers.precision == lax.Precision.HIGHEST,
    )
    size = sizes(shape, target, machine.block_sizes, measured)
    cut = GpuCut(
        batch=batch,
        queries=queries,
        keys=keys,
        kv_heads=kv_heads,
        groups=groups,
        width=width,
        value_width=value_width,
        rows=size.rows,
        key_block=size.keys,
        splits=1,
        sizes=size,
        target=target,
        shared_bytes=shared_bytes(shape, size),
    )
    table_rows = max([1, *(x.shape[0] for x in jax.tree.leaves(operands.mask))])
    row_span, key_span = _spans(cut, TABLE_ENTRIES // table_rows)
    return dataclasses.replace(
        cut,
        row_span=row_span,
        key_span=key_span,
        splits=_splits(cut, operands.key.dtype.itemsize),
    )


def _spans(cut: Cut, most: int) -> tuple[int, int]:
    """So many blocks for an entry of the table that it has no more entries than that."""
    row_span, key_span = 1, 1
    while True:
        own, others = -(-cut.used_row_blocks // row_span), -(-cut.used_key_blocks // key_span)
        if own * others <= most or own == others == 1:
            return row_span, key_span
        if own * cut.rows > others * cut.key_block:
            row_span *= 2
        else:
            key_span *= 2


def _splits(cut: GpuCut, itemsize: int) -> int:
    """Two programs for each multiprocessor; but states do not cost a quarter of what the keys do."""
    programs = cut.used_row_blocks * cut.kv_heads * cut.batch
    if programs >= cut.target.cores:
        return 1
    of_a_state = cut.used_row_blocks * cut.rows * (cut.value_width + 2) * 4
    of_keys = cut.keys * (cut.width + cut.value_width) * itemsize
    wanted = -(-2 * cut.target.cores // programs)
    return max(1, min(wanted, cut.used_key_blocks, of_keys // (4 * of_a_state)))
