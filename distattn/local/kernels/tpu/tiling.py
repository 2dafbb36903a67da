"""Block sizes of the TPU kernels: one table, by what a core of each target has.

The reasoning. A step of a kernel's grid loads a block of keys and values for up to 8 heads (a tile of HBM
is 8 by 128: where heads lie beside each other a block has 8 of them, or all 2 or 4) and multiplies it with
a block of rows, the rows of all query heads of a key head.

* Rows. A byte of bfloat16 keys and values is loaded once for each block of rows, and serves 1 flop for each
  row of it: products hide the loads where rows >= flops/s / bytes/s of the chip: 224 on v4, 240 on v5e,
  166 on v5p, 560 on v6e, 312 on tpu7x. The next power of two is taken.
* Keys. A step costs about 0.35 us however little it does; 2 MiB of keys and values a step take 2.5 us of
  v5e's HBM, and 4 MiB 1.1 us of tpu7x's. Not more than 1024 keys: logits are rows x keys in float32, and
  skipping is by whole blocks.
* VMEM. Blocks that come and go are held twice, their last dimension padded to 128 lanes; the accumulator,
  and two numbers a row in 128 lanes each, stay; what a step computes with (logits, weights, their
  gradients) is at most six arrays of rows x keys. Rows and keys are halved, the larger first, until that
  is half of the budget; the other half is for what the compiler spills and copies.

Nothing of this has been timed: there was no TPU. It compiles for every target, and fits. What a user has
measured goes before it: `distattn.local.kernels.tuned`.

How keys and values are laid out for the TPU kernels, and what blocks a call is cut into.

Keys and values stay as they are, which is not always [B, S, K, .]: XLA lays out an array so that the tiles
of a TPU, 8 by 128, are full. Heads of 64 or 80 numbers lie with S along the lanes, [B, K, ., S], and 3
heads of 128 as [B, K, S, .]. The kernels take all three `Order`s: what they ask for is what there is.

Scales of keys and values of 8 bits, laid out for the TPU kernels.
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from distattn._compat import device_kind_of
from distattn.local.inputs import AttentionInputs
from distattn.local.kernels.shared import Cut
from distattn.local.kernels.tuned import chip_name, kind_of, tuned
from distattn.local.tiling import Machine

LANES = 128
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Target:
    """A row of the table."""

    name: str  # of the chip, as in `distattn.planning.chips`
    budget_bytes: int  # what a kernel may take of the VMEM of a core
    rows: int
    step_bytes: int  # of keys and values
    # Of a device: two on v4 and v5p, which share its HBM and between which a kernel's parallel steps are
    # split (docs.jax.dev, "TPUs in Megacore configuration"). The chips of v5e and v6e have one, and each
    # of the two of tpu7x is a device.
    cores: int = 1


# The VMEM of a core: v4 16 MiB, v5e and v6e 128, v5p and tpu7x 64.
V4 = Target("v4", 15 * MIB, rows=256, step_bytes=1 * MIB, cores=2)
TARGETS = (
    V4,
    Target("v5e", 64 * MIB, rows=256, step_bytes=2 * MIB),
    Target("v5p", 48 * MIB, rows=256, step_bytes=4 * MIB, cores=2),
    Target("v6e", 64 * MIB, rows=1024, step_bytes=4 * MIB),
    Target("tpu7x", 48 * MIB, rows=512, step_bytes=4 * MIB),
)
MOST_KEYS = 1024
# Items of float16 in a block of keys or of values, at most: of as many XLA takes the bits within the
# kernel. It does for 256 tiles of 8 by 128, of keys and of values; of 384 it copied one of both where a
# tile had 2 heads, and of 512 it copied all. Of the gradient on v4, H 128, 2 heads, it copies one even so.
HALF_ITEMS = 256 * 8 * LANES
# The share of cores' time that may pass idle before each core gets keys of its own.
IDLE = 0.1
# Of the 1 MiB of scalar memory, half is for the table of which block visits which.
TABLE_ENTRIES = 2**17


def target_of(device_kind: str) -> Target:
    """The row for a device; of one that is not known, the one with least memory."""
    return next((x for x in TARGETS if x.name == chip_name(device_kind)), V4)


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of one call, what the sizes depend on."""

    rows: int  # T * G
    groups: int  # G
    keys: int  # S
    heads: int  # of key and value, in a block
    width: int  # H
    value_width: int  # V
    itemsize: int  # of the widest of query, key and value
    backward: bool = False
    key_itemsize: int | None = None  # of the wider of key and value; None: the same
    most_keys: int = MOST_KEYS

    @property
    def of_keys(self) -> int:
        """Bytes of an item of key or value."""
        return self.itemsize if self.key_itemsize is None else self.key_itemsize


def sizes(
    shape: Shape,
    target: Target,
    wanted: tuple[int, int] | None = None,
    measured: tuple[int, int] | None = None,
) -> tuple[int, int]:
    """Rows and keys of a block.

    Keys are a multiple of 128. Rows are all of them, in sixteens; or whole queries, and a multiple of 128.

    Args:
      shape: of the call.
      target: what it runs on.
      wanted: queries and keys; they are rounded up. None: as measured, or as the table says.
      measured: rows and keys, see `distattn.local.kernels.tuned`; less where more heads leave no room for them.
    """
    if wanted is not None:
        return _rows(shape, wanted[0] * shape.groups), _keys(shape, wanted[1])
    if measured is not None:
        return _fitting(
            shape, _rows(shape, measured[0]), _keys(shape, measured[1]), target.budget_bytes
        )
    of_a_key = shape.heads * shape.of_keys * (_padded(shape.width) + _padded(shape.value_width))
    rows = _rows(shape, target.rows)
    keys = _keys(shape, min(max(target.step_bytes // of_a_key, LANES), shape.most_keys))
    return _fitting(shape, rows, keys, target.budget_bytes // 2)


def _fitting(shape: Shape, rows: int, keys: int, budget_bytes: int) -> tuple[int, int]:
    """Rows and keys halved, the larger first, until a kernel takes no more than that."""
    while vmem_bytes(shape, rows, keys) > budget_bytes:
        fewer_rows, fewer_keys = _rows(shape, rows // 2), _keys(shape, keys // 2)
        if fewer_rows < rows and (rows >= keys or fewer_keys == keys):
            rows = fewer_rows
        elif fewer_keys < keys:
            keys = fewer_keys
        else:
            break
    return rows, keys


def parts(target: Target, steps: int, key_blocks: int) -> int:
    """Into how many parts keys are split, each with a state of its own, so that all cores work.

    Two more states are written and read then, which is why a core may be idle now and then.

    Args:
      target: what it runs on.
      steps: that are parallel anyway: rows of the batch, blocks of heads, blocks of rows.
      key_blocks: how many there are.
    """
    idle = 1 - steps / (-(-steps // target.cores) * target.cores)
    return target.cores if idle > IDLE and key_blocks >= target.cores else 1


def vmem_bytes(shape: Shape, rows: int, keys: int) -> int:
    """What a kernel with such blocks holds, about."""
    width, value_width = _padded(shape.width), _padded(shape.value_width)
    both = width + value_width
    key_block = shape.heads * keys * both * shape.of_keys
    query_block = shape.heads * rows * width * shape.itemsize
    state = shape.heads * rows * 4 * (value_width + LANES)
    # Keys and values are there once more, head by head.
    held = 3 * key_block + 2 * (query_block + state) + shape.heads * rows * 4 * 2 * LANES
    if shape.backward:
        # The gradients of keys and values: accumulated, and written.
        held += 2 * key_block + 4 * shape.heads * keys * both
    return held + 6 * rows * keys * 4 + 4 * (rows + keys) * both


def _rows(shape: Shape, wanted: int) -> int:
    """At least one unit; all, where they are not many more."""
    unit = math.lcm(shape.groups, LANES)
    rows = max(wanted // unit, 1) * unit
    return rows if rows < shape.rows else _up(shape.rows, 16)


def _keys(shape: Shape, wanted: int) -> int:
    return min(_up(max(wanted, 1), LANES), _up(shape.keys, LANES))


def _padded(width: int) -> int:
    return _up(width, LANES)


def _up(x: int, unit: int) -> int:
    return -(-x // unit) * unit


HEADS = 8  # of keys in a block, at most: the tile of HBM
Order = Literal["SKH", "KSH", "KHS"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuCut(Cut):
    """Sizes of a call and of its blocks."""

    heads: int  # of a block, of keys
    target: Target
    vmem_bytes: int  # that a kernel holds, about
    splits: bool = False  # whether keys may be split into parts

    @property
    def parts(self) -> int:
        """How many parts of the keys have a state of their own."""
        steps = self.batch * self.head_blocks * self.row_blocks
        return parts(self.target, steps, self.key_blocks) if self.splits else 1

    @property
    def head_blocks(self) -> int:
        """How many blocks of heads."""
        return self.kv_heads // self.heads


def cut_of(inputs: AttentionInputs, machine: Machine, *, backward: bool = False) -> TpuCut:
    """The sizes for a call: as many heads in a block as there may be, fewer where memory is short."""
    batch, queries, heads, width = inputs.query.shape
    keys, kv_heads, value_width = inputs.value.shape[-3:]
    device_kind = device_kind_of()
    target = target_of(device_kind)
    kind = kind_of(queries * heads // kv_heads, backward=backward)
    measured = tuned(chip_name(device_kind), kind, width, inputs.key.dtype)
    counts = [n for n in range(min(HEADS, kv_heads), 0, -1) if kv_heads % n == 0]
    arrays = inputs.query, inputs.key, inputs.value
    if "SKH" in (order_of(x.shape, x.dtype) for x in arrays[1:]):
        counts = counts[:1]
    shapes = [
        Shape(
            rows=queries * heads // kv_heads,
            groups=heads // kv_heads,
            keys=keys,
            heads=count,
            width=width,
            value_width=value_width,
            itemsize=max(x.dtype.itemsize for x in arrays),
            backward=backward,
            key_itemsize=max(x.dtype.itemsize for x in arrays[1:]),
            most_keys=min(_most_keys(x, count) for x in arrays[1:]),
        )
        for count in counts
    ]
    sized = ((shape, *sizes(shape, target, machine.block_sizes, measured)) for shape in shapes)
    cuts = [
        TpuCut(
            batch=batch,
            queries=queries,
            keys=keys,
            kv_heads=kv_heads,
            groups=shape.groups,
            width=width,
            value_width=value_width,
            rows=rows,
            key_block=key_block,
            heads=shape.heads,
            target=target,
            vmem_bytes=vmem_bytes(shape, rows, key_block),
            splits=not backward,
        )
        for shape, rows, key_block in sized
    ]
    return next((cut for cut in cuts if cut.vmem_bytes <= target.budget_bytes), cuts[-1])


def order_of(shape: tuple[int, ...], dtype: jnp.dtype) -> Order:
    """How keys, or values, [..., S, K, .], lie in the memory of a TPU."""
    *_, kv_heads, width = shape
    if width % LANES:
        return "KHS"
    # Bytes are packed in fours, which 2 heads do not fill.
    few = (4,) if dtype.itemsize == 1 else (2, 4)
    return "SKH" if kv_heads in few or kv_heads % HEADS == 0 else "KSH"


def as_stored(x: jax.Array) -> jax.Array:
    """[L, B, S, K, .] with the last three in their `Order`; of float16, which Mosaic has not, the bits."""
    x = x if x.ndim == 5 else x[None]
    match order_of(x.shape, x.dtype):
        case "KHS":
            x = jnp.moveaxis(x, 2, 4)
        case "KSH":
            x = x.swapaxes(2, 3)
    if x.dtype != jnp.float16:
        return x
    # Last of all, where it becomes a part of the kernel: see `distattn.local.kernels.tpu.launch.launch`.
    return lax.bitcast_convert_type(lax.optimization_barrier(x), jnp.uint16)


def _most_keys(x: jax.Array, heads: int) -> int:
    """Of a block with so many heads."""
    if x.dtype != jnp.float16:
        return MOST_KEYS
    # A tile is one of 8, full or not.
    rows = HEADS if order_of(x.shape, x.dtype) == "SKH" else heads
    return min(max(HALF_ITEMS // (rows * x.shape[-1]) // LANES * LANES, LANES), MOST_KEYS)


def as_given(x: jax.Array, order: Order) -> jax.Array:
    """The inverse, of one layer: [B, S, K, .]."""
    match order:
        case "KHS":
            return jnp.moveaxis(x[0], 3, 1)
        case "KSH":
            return x[0].swapaxes(1, 2)
    return x[0]


# What keys and values may be beside a scale.
QUANTISED = (jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2)


def scales_of(inputs: AttentionInputs, cut: TpuCut) -> list[jax.Array]:
    """Of keys and of values, f32[L, B, K / heads, heads, S]; none where they are no bytes.

    So they lie in HBM where K is 1, 2, 4 or a multiple of 8, and nothing is copied. Elsewhere the scales
    of one layer are, 4 bytes for each H.
    """
    if inputs.key_scale is None:
        return []
    scales = [inputs.key_scale, inputs.value_scale]
    if inputs.layer is None:
        scales = [x[None] for x in scales]
    elif not _scales_lie_by_heads(cut):
        scales = [lax.dynamic_slice_in_dim(x, inputs.layer, 1) for x in scales]
    return [
        x.swapaxes(2, 3).reshape(*x.shape[:2], cut.head_blocks, cut.heads, cut.keys) for x in scales
    ]


def _scales_lie_by_heads(cut: TpuCut) -> bool:
    return cut.kv_heads in (1, 2, 4) or cut.kv_heads % HEADS == 0
