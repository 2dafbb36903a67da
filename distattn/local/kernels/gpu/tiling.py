"""Block sizes of the GPU kernels: one table, by what a multiprocessor of each target has.

The reasoning. One program has a block of rows, those of all query heads of a key head, and steps over the
blocks of keys that it visits, which Triton brings into shared memory ahead of their use.

* Powers of two, at least 16: Triton's arrays, and the tensor cores' tiles.
* Rows. A byte of bfloat16 keys and values is loaded once for each block of rows, and serves 1 flop for each
  row of it; most of the loads hit the L2 cache, which gives about three times what the memory does, so 128
  rows hide them on an H100 (989e12 flops/s, 3.35e12 bytes/s: 295 flops a byte from memory, 100 from L2).
* Keys. 64 of them a step; 128 where heads are narrow and rows few, so that a step has as much to load.
* Registers. The sums of a block of rows stay in them, and what a step computes (logits, weights, their
  gradients): at most `MOST_NUMBERS` of the 255 that a thread has, the rest for addresses and inputs, of
  which those of float32 are as large again and converted on their way. Eight warps hold it, four where it
  is little. With more, the compiler for the H100 spills some to memory.
* Shared memory. Keys and values of a step, as often as there are stages, and what stays: queries.
* Exact products are unrolled into one instruction for each number: blocks are small, or it takes minutes
  to compile them.
* Splits. Where there are fewer programs than multiprocessors, several share the keys of a block of rows,
  until each multiprocessor has two, and their states are merged.

Nothing of this has been timed: there was no GPU.

How a call is cut for the GPU kernels, and what they compute it with.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from distattn._compat import device_kind_of
from distattn.local.block import LogitConfig
from distattn.local.inputs import AttentionInputs
from distattn.local.kernels.shared import EXACT, PLAIN, Cut, Numbers
from distattn.local.kernels.tuned import chip_name, kind_of, tuned
from distattn.local.tiling import Machine

KIB = 2**10
SMALLEST = 16
MOST_NUMBERS = {2: 168, 4: 64}  # by the bytes of an operand


@dataclasses.dataclass(frozen=True)
class Target:
    """A row of the table."""

    name: str  # of the chip, as in `distattn.planning.chips`
    cores: int  # streaming multiprocessors
    shared_bytes: int  # that one program may have


# CUDA C++ Programming Guide, table of technical specifications: 163 KiB at compute capability 8.0, 227 at
# 9.0 and 10.0, and 99 at 8.6 and 8.9, the least of those that Triton has.
OTHER = Target("other", 64, 99 * KIB)
TARGETS = (
    OTHER,
    Target("a100", 108, 163 * KIB),
    Target("h100", 132, 227 * KIB),
    Target("h200", 132, 227 * KIB),
    Target("b200", 148, 227 * KIB),
)
# Of the table of which block visits which, in the memory of the device: 4 MiB.
TABLE_ENTRIES = 2**20


def target_of(device_kind: str) -> Target:
    """The row for a device; of one that is not known, the one with least memory."""
    return next((x for x in TARGETS if x.name == chip_name(device_kind)), OTHER)


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of one call, what the sizes depend on."""

    rows: int  # T * G
    groups: int  # G
    keys: int  # S
    width: int  # H
    value_width: int  # V
    itemsize: int  # of the inputs of products
    backward: bool = False
    exact: bool = False  # products of float32, for which there are no tensor cores


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a block, and how a program runs."""

    rows: int
    keys: int
    warps: int  # of 32 threads
    stages: int  # that a step's loads are ahead, and one


def sizes(
    shape: Shape,
    target: Target,
    wanted: tuple[int, int] | None = None,
    measured: tuple[int, int] | None = None,
) -> Sizes:
    """Rows and keys of a block, powers of two.

    Args:
      shape: of the call.
      target: what it runs on.
      wanted: queries and keys; they are rounded up. None: as measured, or as the table says.
      measured: rows and keys that were fastest for such calls; they are halved where there is no room.
    """
    rows = min(power_of_two(shape.rows), 64 if shape.backward else 128)
    narrow = max(shape.width, shape.value_width) <= 64 and rows <= 32 and not shape.backward
    keys = 128 if narrow else 64
    if shape.exact:
        rows, keys = min(rows, 32), 32
    if measured is not None:
        rows, keys = (
            min(power_of_two(measured[0]), power_of_two(shape.rows)),
            power_of_two(measured[1]),
        )
    if wanted is not None:
        rows = min(power_of_two(wanted[0] * shape.groups), power_of_two(shape.rows))
        keys = power_of_two(wanted[1])
    keys = min(keys, power_of_two(shape.keys))
    stages = 3 if rows * keys <= 64 * 64 and not shape.backward else 2
    if wanted is not None:
        return _sizes(shape, rows, keys, stages)
    while True:
        size = _sizes(shape, rows, keys, stages)
        if fits(shape, size, target):
            return size
        if stages > 2:
            stages -= 1
        elif keys > SMALLEST and (keys >= rows or rows == SMALLEST):
            keys //= 2
        elif rows > SMALLEST:
            rows //= 2
        else:
            return size


def fits(shape: Shape, size: Sizes, target: Target) -> bool:
    """Whether a program has the registers and the shared memory."""
    of_a_thread = _numbers(shape, size.rows, size.keys) // (32 * size.warps)
    held = shared_bytes(shape, size)
    return of_a_thread <= MOST_NUMBERS[shape.itemsize] and held <= target.shared_bytes


def _numbers(shape: Shape, rows: int, keys: int) -> int:
    """Of 32 bits that the threads of a program hold, about."""
    width, value_width = padded(shape.width), padded(shape.value_width)
    if shape.backward:
        return max(rows * width, keys * (width + value_width)) + 3 * rows * keys
    return rows * value_width + 2 * rows * keys


def shared_bytes(shape: Shape, size: Sizes) -> int:
    """What a program holds in shared memory: more than the compiler for the H100 takes."""
    both = padded(shape.width) + padded(shape.value_width)
    of_vectors = 16 * (size.rows + size.keys)
    if not shape.backward:
        own = size.rows * padded(shape.width)
        return (own + size.stages * size.keys * both) * shape.itemsize + of_vectors
    most, least = max(size.rows, size.keys), min(size.rows, size.keys)
    # Weights, and their gradients, on their way to the tensor cores.
    on_their_way = 4 * size.rows * size.keys
    return (least + size.stages * most) * both * shape.itemsize + on_their_way + of_vectors


def power_of_two(x: int) -> int:
    """The next one, at least that of the tensor cores."""
    return max(1 << (x - 1).bit_length(), SMALLEST)


def padded(width: int) -> int:
    """What the pieces of a width are together."""
    return -(-width // SMALLEST) * SMALLEST


def _sizes(shape: Shape, rows: int, keys: int, stages: int) -> Sizes:
    little = not shape.exact and _numbers(shape, rows, keys) <= 4 * 32 * 64
    return Sizes(rows, keys, 4 if little else 8, stages)


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


def precision_of(logit_config: LogitConfig) -> lax.Precision | None:
    """HIGHEST: of float32; DEFAULT: of what is fast; None: another is asked for, which is not done.

    Where the call names none it is that of `jax.default_matmul_precision`.
    """
    precision = logit_config.precision
    if precision is None:
        precision = getattr(jax.config, "jax_default_matmul_precision", None)
    if precision in EXACT:
        return lax.Precision.HIGHEST
    return lax.Precision.DEFAULT if precision in _FAST else None


def numbers_of(
    inputs: AttentionInputs, logit_config: LogitConfig, *, backward: bool = False
) -> Numbers:
    """bfloat16 or float16 where all is, and no other precision is asked for; else float32.

    float32 at the default precision is TensorFloat-32, which holds float16 and int8 exactly. float16 has
    too few exponents for gradients, and for weights times the scales of what is quantised.
    """
    arrays = inputs.query, inputs.key, inputs.value
    dtypes = {x.dtype for x in arrays if x.dtype != jnp.int8}
    precision = precision_of(logit_config) or lax.Precision.DEFAULT
    narrow = len(dtypes) == 1 and precision == lax.Precision.DEFAULT
    dtype = dtypes.pop() if narrow else jnp.dtype(jnp.float32)
    if dtype == jnp.float16 and (backward or inputs.key_scale is not None):
        dtype = jnp.dtype(jnp.float32)
    return Numbers(dtype, precision)


def cut_of(
    inputs: AttentionInputs, logit_config: LogitConfig, machine: Machine, *, backward: bool = False
) -> GpuCut:
    """The sizes for a call."""
    batch, queries, heads, width = inputs.query.shape
    keys, kv_heads, value_width = inputs.value.shape[-3:]
    groups = heads // kv_heads
    device_kind = device_kind_of()
    target = target_of(device_kind)
    kind = kind_of(queries * groups, backward=backward)
    measured = tuned(chip_name(device_kind), kind, width, inputs.key.dtype)
    numbers = numbers_of(inputs, logit_config, backward=backward)
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
    table_rows = max([1, *(x.shape[0] for x in jax.tree.leaves(inputs.mask))])
    row_span, key_span = _spans(cut, TABLE_ENTRIES // table_rows)
    return dataclasses.replace(
        cut,
        row_span=row_span,
        key_span=key_span,
        splits=_splits(cut, inputs.key.dtype.itemsize),
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
