"""Block sizes of the TPU kernels, and the layout of keys, values and their scales in a TPU's memory.

A step of a kernel's grid loads a block of keys and values for up to 8 heads and multiplies it with a block
of rows. A tile of HBM is 8 by 128: if heads are adjacent, a block has 8 of them, or all 2 or 4.

* Rows. A byte of bfloat16 keys and values is loaded once per block of rows, and serves 1 flop per row:
  matmuls hide the loads if rows >= flops/s / bytes/s of the chip: 224 on v4, 240 on v5e, 166 on v5p, 560 on
  v6e, 312 on tpu7x. The next power of two is taken.
* Keys. A step costs about 0.35 us however little it does; 2 MiB of keys and values a step take 2.5 us of
  v5e's HBM, and 4 MiB 1.1 us of tpu7x's. At most 1024 keys: logits are rows x keys in float32, and only
  whole blocks are skipped.
* VMEM. Blocks that are loaded and stored are held twice, their last dimension padded to 128 lanes. The
  accumulator stays, and two numbers a row in 128 lanes each. A step computes with at most six arrays of
  rows x keys. Rows and keys are halved, the larger first, until that is half of the budget; the other half
  is for what the compiler spills and copies.

Nothing of this has been timed: there was no TPU. It compiles for every target, and fits. A measured size
takes precedence: `distattn.local.kernels.shared.measured_blocks`.

Keys and values are read as XLA lays them out, which is not always [B, S, K, .], so that the tiles are full.
Heads of 64 or 80 numbers have S along the lanes, [B, K, ., S], and 3 heads of 128 are [B, K, S, .].
"""

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from distattn._compat import device_kind_of
from distattn.local.inputs import AttentionInputs
from distattn.local.kernels.shared import TileConfig, call_sizes, chip_name, measured_blocks
from distattn.local.tiling import Machine

LANES = 128
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class ChipLimits:
    """Resources of a kernel on a chip."""

    name: str  # as in `distattn.planning.chips`
    budget_bytes: int  # VMEM of a core that a kernel may take
    rows: int  # rows of a block
    step_bytes: int  # bytes of keys and values that a step loads
    # Cores of a device: two on v4 and v5p, which share its HBM and between which a kernel's parallel steps
    # are split (docs.jax.dev, "TPUs in Megacore configuration"). The chips of v5e and v6e have one, and
    # each of the two of tpu7x is a device.
    cores: int = 1


# The VMEM of a core: v4 16 MiB, v5e and v6e 128, v5p and tpu7x 64.
V4 = ChipLimits("v4", 15 * MIB, rows=256, step_bytes=1 * MIB, cores=2)
CHIPS = (
    V4,
    ChipLimits("v5e", 64 * MIB, rows=256, step_bytes=2 * MIB),
    ChipLimits("v5p", 48 * MIB, rows=256, step_bytes=4 * MIB, cores=2),
    ChipLimits("v6e", 64 * MIB, rows=1024, step_bytes=4 * MIB),
    ChipLimits("tpu7x", 48 * MIB, rows=512, step_bytes=4 * MIB),
)
MAX_KEYS = 1024
# Items of float16 in a block of keys or of values, at most: XLA reads the bits of that many within the
# kernel. It does for 256 tiles of 8 by 128, of keys and of values; of 384 it copied one of both if a
# tile had 2 heads, and of 512 it copied all. For the gradient on v4, H 128, 2 heads, it copies one even so.
MAX_FLOAT16_ITEMS = 256 * 8 * LANES
# The share of the cores' time that may pass idle before each core gets keys of its own.
MAX_IDLE = 0.1
# Half of the 1 MiB of scalar memory is for the block table.
MAX_TABLE_ENTRIES = 2**17
MAX_HEADS = 8  # KV heads in a block: the tile of HBM
QUANTISED = (jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2)  # dtypes of keys and values with scales
# The order of keys [.., S, K, H] in memory, major to minor.
Order = Literal["SKH", "KSH", "KHS"]


def limits_of(device_kind: str) -> ChipLimits:
    """Return the limits of a device; of an unknown one, those of the chip with least memory."""
    return next((x for x in CHIPS if x.name == chip_name(device_kind)), V4)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuTileConfig(TileConfig):
    """Sizes of a call and of its blocks on a TPU."""

    chip: ChipLimits
    heads: int  # KV heads in a block
    itemsize: int  # bytes of the widest item of query, key and value
    key_itemsize: int  # bytes of the wider item of key and value
    backward: bool = False
    may_split: bool = True  # whether the keys may be split between cores
    max_keys: int = MAX_KEYS  # keys in a block

    @property
    def head_blocks(self) -> int:
        """Number of blocks of heads."""
        return self.kv_heads // self.heads

    @property
    def key_parts(self) -> int:
        """Number of parts of the keys that have a state of their own."""
        steps = self.batch * self.head_blocks * self.row_blocks
        can = self.may_split and not self.backward
        return key_parts(self.chip, steps, self.key_blocks) if can else 1

    @property
    def vmem_bytes(self) -> int:
        """Bytes of VMEM that a kernel holds, about."""
        rows, keys, heads = self.row_block, self.key_block, self.heads
        width, value_width = _round_up(self.width, LANES), _round_up(self.value_width, LANES)
        both = width + value_width
        key_bytes = heads * keys * both * self.key_itemsize
        query_bytes = heads * rows * width * self.itemsize
        state_bytes = heads * rows * 4 * (value_width + LANES)
        # Keys and values are there once more, head by head.
        held = 3 * key_bytes + 2 * (query_bytes + state_bytes) + heads * rows * 4 * 2 * LANES
        if self.backward:
            # The gradients of keys and values: accumulated, and stored.
            held += 2 * key_bytes + 4 * heads * keys * both
        return held + 6 * rows * keys * 4 + 4 * (rows + keys) * both

    def with_blocks(self, rows: int, keys: int) -> "TpuTileConfig":
        """Return the config with blocks of about these sizes.

        Keys are a multiple of 128. Rows are all rows, in sixteens, or whole queries and a multiple of 128.
        """
        return dataclasses.replace(self, row_block=self._rows(rows), key_block=self._keys(keys))

    def fitted(self, budget_bytes: int) -> "TpuTileConfig":
        """Return the config with rows and keys halved, the larger first, until it fits the budget."""
        config = self
        while config.vmem_bytes > budget_bytes:
            rows, keys = config.row_block, config.key_block
            fewer_rows, fewer_keys = self._rows(rows // 2), self._keys(keys // 2)
            if fewer_rows < rows and (rows >= keys or fewer_keys == keys):
                rows = fewer_rows
            elif fewer_keys < keys:
                keys = fewer_keys
            else:
                break
            config = dataclasses.replace(config, row_block=rows, key_block=keys)
        return config

    def chosen(
        self, wanted: tuple[int, int] | None = None, measured: tuple[int, int] | None = None
    ) -> "TpuTileConfig":
        """Return the config with the blocks of a call.

        Args:
          wanted: queries and keys that the caller asks for; they are rounded up.
          measured: rows and keys that were fastest; they are halved if more heads leave no room.
        """
        if wanted is not None:
            return self.with_blocks(wanted[0] * self.groups, wanted[1])
        if measured is not None:
            return self.with_blocks(*measured).fitted(self.chip.budget_bytes)
        widths = _round_up(self.width, LANES) + _round_up(self.value_width, LANES)
        keys = max(self.chip.step_bytes // (self.heads * self.key_itemsize * widths), LANES)
        config = self.with_blocks(self.chip.rows, min(keys, self.max_keys))
        return config.fitted(self.chip.budget_bytes // 2)

    def _rows(self, wanted: int) -> int:
        unit, whole = math.lcm(self.groups, LANES), self.queries * self.groups
        rows = max(wanted // unit, 1) * unit
        return rows if rows < whole else _round_up(whole, 16)

    def _keys(self, wanted: int) -> int:
        return min(_round_up(max(wanted, 1), LANES), _round_up(self.keys, LANES))


def key_parts(chip: ChipLimits, steps: int, key_blocks: int) -> int:
    """Return into how many parts keys are split, each with a state of its own, so that all cores work.

    Two more states are stored and loaded then, so a core may be idle now and then.

    Args:
      chip: the chip.
      steps: number of steps that are parallel anyway: batch, blocks of heads, blocks of rows.
      key_blocks: number of key blocks.
    """
    idle = 1 - steps / (-(-steps // chip.cores) * chip.cores)
    return chip.cores if idle > MAX_IDLE and key_blocks >= chip.cores else 1


def tile_config(
    inputs: AttentionInputs, machine: Machine, *, backward: bool = False
) -> TpuTileConfig:
    """Return the sizes of a call: as many heads in a block as possible, fewer if memory is short."""
    device_kind = device_kind_of()
    chip = limits_of(device_kind)
    stored = inputs.key, inputs.value
    key_itemsize = max(x.dtype.itemsize for x in stored)
    sizes = call_sizes(inputs)
    kv_heads = sizes["kv_heads"]
    counts = [n for n in range(min(MAX_HEADS, kv_heads), 0, -1) if kv_heads % n == 0]
    if "SKH" in (order_of(x.shape, x.dtype) for x in stored):
        counts = counts[:1]

    def with_heads(count: int) -> TpuTileConfig:
        config = TpuTileConfig(
            **sizes,
            row_block=LANES,
            key_block=LANES,
            chip=chip,
            heads=count,
            itemsize=max(inputs.query.dtype.itemsize, key_itemsize),
            key_itemsize=key_itemsize,
            backward=backward,
            max_keys=min(_max_keys(x, count) for x in stored),
        )
        name, dtype = chip_name(device_kind), inputs.key.dtype
        measured = measured_blocks(name, config, dtype, backward=backward)
        return config.chosen(machine.block_sizes, measured)

    configs = [with_heads(count) for count in counts]
    return next((x for x in configs if x.vmem_bytes <= chip.budget_bytes), configs[-1])


def order_of(shape: tuple[int, ...], dtype: jnp.dtype) -> Order:
    """Return the order of keys or values [..., S, K, .] in the memory of a TPU."""
    *_, kv_heads, width = shape
    if width % LANES:
        return "KHS"
    # Bytes are packed in fours, which 2 heads do not fill.
    few = (4,) if dtype.itemsize == 1 else (2, 4)
    return "SKH" if kv_heads in few or kv_heads % MAX_HEADS == 0 else "KSH"


def as_stored(x: jax.Array) -> jax.Array:
    """Return keys or values as [L, B, S, K, .] with the last three in their `Order`; float16 as bits."""
    x = x if x.ndim == 5 else x[None]
    match order_of(x.shape, x.dtype):
        case "KHS":
            x = jnp.moveaxis(x, 2, 4)
        case "KSH":
            x = x.swapaxes(2, 3)
    if x.dtype != jnp.float16:
        return x
    # Last, so that it becomes a part of the kernel: see `distattn.local.kernels.tpu.launch.launch`.
    return lax.bitcast_convert_type(lax.optimization_barrier(x), jnp.uint16)


def from_stored(x: jax.Array, order: Order) -> jax.Array:
    """Return [B, S, K, .] from one layer in its order, the inverse of `as_stored`."""
    match order:
        case "KHS":
            return jnp.moveaxis(x[0], 3, 1)
        case "KSH":
            return x[0].swapaxes(1, 2)
    return x[0]


def scales_as_stored(inputs: AttentionInputs, config: TpuTileConfig) -> list[jax.Array]:
    """Return the scales of keys and of values, f32[L, B, K / heads, heads, S]; [] if not quantised.

    They are stored so in HBM if K is 1, 2, 4 or a multiple of 8, and nothing is copied. Otherwise the
    scales of one layer are, 4 bytes per H items.
    """
    if inputs.key_scale is None:
        return []
    scales = [inputs.key_scale, inputs.value_scale]
    kv_heads = config.kv_heads
    if inputs.layer is None:
        scales = [x[None] for x in scales]
    elif kv_heads not in (1, 2, 4) and kv_heads % MAX_HEADS:
        scales = [lax.dynamic_slice_in_dim(x, inputs.layer, 1) for x in scales]
    blocks = config.head_blocks, config.heads, config.keys
    return [x.swapaxes(2, 3).reshape(*x.shape[:2], *blocks) for x in scales]


def _max_keys(x: jax.Array, heads: int) -> int:
    """Return the most keys of a block with that many heads."""
    if x.dtype != jnp.float16:
        return MAX_KEYS
    # A tile has 8 heads, full or not.
    rows = MAX_HEADS if order_of(x.shape, x.dtype) == "SKH" else heads
    keys = MAX_FLOAT16_ITEMS // (rows * x.shape[-1]) // LANES * LANES
    return min(max(keys, LANES), MAX_KEYS)


def _round_up(x: int, unit: int) -> int:
    return -(-x // unit) * unit
