"""Block sizes of the GPU kernels, and the dtype and precision of their matmuls.

A program has a block of rows, those of all query heads of a KV head, and steps over the blocks of keys that
it visits, which Triton prefetches into shared memory.

* Sizes are powers of two, at least 16: Triton's arrays, and the tensor cores' tiles.
* Rows. A byte of bfloat16 keys and values is loaded once per block of rows, and serves 1 flop per row. Most
  loads hit the L2 cache, which gives about three times what the memory does, so 128 rows hide them on an
  H100 (989e12 flops/s, 3.35e12 bytes/s: 295 flops a byte from memory, 100 from L2).
* Keys. 64 of them a step; 128 if heads are narrow and rows few, so that a step has as much to load.
* Registers hold the sums of a block of rows, and what a step computes (logits, weights, their gradients):
  at most `MAX_REGISTERS` of the 255 of a thread. The rest is for addresses and inputs; those of float32
  are as large again and converted on their way. Eight warps share it, four if it is little. With more, the
  compiler for the H100 spills to memory.
* Shared memory holds keys and values of a step, once per stage, and queries.
* Exact matmuls are unrolled into one instruction per product: blocks are small, or compiling takes minutes.
* Splits. If there are fewer programs than multiprocessors, several share the keys of a block of rows, until
  each multiprocessor has two, and their states are merged.

Nothing of this has been timed: there was no GPU. A measured size takes precedence:
`distattn.local.kernels.shared.measured_blocks`.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from distattn._compat import device_kind_of
from distattn.local.block import LogitConfig
from distattn.local.inputs import AttentionInputs
from distattn.local.kernels.shared import (
    EXACT,
    PLAIN,
    MatmulConfig,
    TileConfig,
    call_sizes,
    chip_name,
    measured_blocks,
)
from distattn.local.tiling import Machine

KIB = 2**10
MIN_BLOCK = 16
MAX_REGISTERS = {2: 168, 4: 64}  # by the bytes of an operand
# The block table takes 4 MiB of the device's memory at most.
MAX_TABLE_ENTRIES = 2**20


@dataclasses.dataclass(frozen=True)
class ChipLimits:
    """Resources of a kernel on a chip."""

    name: str  # as in `distattn.planning.chips`
    cores: int  # streaming multiprocessors
    shared_bytes: int  # shared memory of one program


# CUDA C++ Programming Guide, table of technical specifications: 163 KiB at compute capability 8.0, 227 at
# 9.0 and 10.0, and 99 at 8.6 and 8.9, the least of those that Triton supports.
OTHER = ChipLimits("other", 64, 99 * KIB)
CHIPS = (
    OTHER,
    ChipLimits("a100", 108, 163 * KIB),
    ChipLimits("h100", 132, 227 * KIB),
    ChipLimits("h200", 132, 227 * KIB),
    ChipLimits("b200", 148, 227 * KIB),
)


def limits_of(device_kind: str) -> ChipLimits:
    """Return the limits of a device; of an unknown one, those of the chip with least memory."""
    return next((x for x in CHIPS if x.name == chip_name(device_kind)), OTHER)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GpuTileConfig(TileConfig):
    """Sizes of a call and of its blocks on a GPU."""

    chip: ChipLimits
    itemsize: int  # bytes of an operand's item in matmuls
    exact: bool = False  # float32 matmuls, for which there are no tensor cores
    backward: bool = False
    stages: int = 2  # steps whose loads are under way
    splits: int = 1  # programs that share the keys of a block of rows

    @property
    def warps(self) -> int:
        """Warps of a program, of 32 threads."""
        return 4 if not self.exact and self._numbers <= 4 * 32 * 64 else 8

    @property
    def fits(self) -> bool:
        """Whether a program has the registers and the shared memory."""
        registers = self._numbers // (32 * self.warps)
        enough = self.shared_bytes <= self.chip.shared_bytes
        return enough and registers <= MAX_REGISTERS[self.itemsize]

    @property
    def shared_bytes(self) -> int:
        """Bytes of shared memory of a program: more than the compiler for the H100 takes."""
        rows, keys = self.row_block, self.key_block
        both = padded_width(self.width) + padded_width(self.value_width)
        vectors = 16 * (rows + keys)
        if not self.backward:
            numbers = rows * padded_width(self.width) + self.stages * keys * both
            return numbers * self.itemsize + vectors
        numbers = (min(rows, keys) + self.stages * max(rows, keys)) * both
        # Weights and their gradients pass through it to the tensor cores.
        return numbers * self.itemsize + 4 * rows * keys + vectors

    @property
    def spans(self) -> "GpuTileConfig":
        """The config with spans in place of blocks, as the block table has them."""
        rows, keys = self.row_block * self.row_span, self.key_block * self.key_span
        return dataclasses.replace(self, row_block=rows, key_block=keys, row_span=1, key_span=1)

    @property
    def _numbers(self) -> int:
        """Numbers of 32 bits that the threads of a program hold, about."""
        rows, keys = self.row_block, self.key_block
        width, value_width = padded_width(self.width), padded_width(self.value_width)
        if self.backward:
            return max(rows * width, keys * (width + value_width)) + 3 * rows * keys
        return rows * value_width + 2 * rows * keys

    def chosen(
        self, wanted: tuple[int, int] | None = None, measured: tuple[int, int] | None = None
    ) -> "GpuTileConfig":
        """Return the config with the blocks of a call, powers of two.

        Args:
          wanted: queries and keys that the caller asks for; they are rounded up.
          measured: rows and keys that were fastest; they are halved if there is no room.
        """
        all_rows = power_of_two(self.queries * self.groups)
        rows = min(all_rows, 64 if self.backward else 128)
        narrow = max(self.width, self.value_width) <= 64 and rows <= 32 and not self.backward
        keys = 128 if narrow else 64
        if self.exact:
            rows, keys = min(rows, 32), 32
        if measured is not None:
            rows, keys = measured
        if wanted is not None:
            rows, keys = wanted[0] * self.groups, wanted[1]
        rows = min(power_of_two(rows), all_rows)
        keys = min(power_of_two(keys), power_of_two(self.keys))
        stages = 3 if rows * keys <= 64 * 64 and not self.backward else 2
        while True:
            config = dataclasses.replace(self, row_block=rows, key_block=keys, stages=stages)
            if wanted is not None or config.fits:
                return config
            if stages > 2:
                stages -= 1
            elif keys > MIN_BLOCK and (keys >= rows or rows == MIN_BLOCK):
                keys //= 2
            elif rows > MIN_BLOCK:
                rows //= 2
            else:
                return config

    def shared_out(self, key_itemsize: int, table_entries: int) -> "GpuTileConfig":
        """Return the config with splits for all multiprocessors, and with spans that fit the block table.

        Args:
          key_itemsize: bytes of a key's item.
          table_entries: entries that the block table may have.
        """
        row_span, key_span = 1, 1
        while True:
            own, others = (
                -(-blocks // span)
                for blocks, span in (
                    (self.used_row_blocks, row_span),
                    (self.used_key_blocks, key_span),
                )
            )
            if own * others <= table_entries or own == others == 1:
                break
            if own * self.row_block > others * self.key_block:
                row_span *= 2
            else:
                key_span *= 2
        programs = self.used_row_blocks * self.kv_heads * self.batch
        splits = 1
        if programs < self.chip.cores:
            # The states must not cost a quarter of what the keys do.
            state_bytes = self.used_row_blocks * self.row_block * (self.value_width + 2) * 4
            key_bytes = self.keys * (self.width + self.value_width) * key_itemsize
            splits = min(
                -(-2 * self.chip.cores // programs),
                self.used_key_blocks,
                key_bytes // (4 * state_bytes),
            )
        return dataclasses.replace(
            self, row_span=row_span, key_span=key_span, splits=max(splits, 1)
        )


def tile_config(
    inputs: AttentionInputs, logit_config: LogitConfig, machine: Machine, *, backward: bool = False
) -> GpuTileConfig:
    """Return the sizes of a call."""
    device_kind, dtype = device_kind_of(), inputs.key.dtype
    matmul = matmul_config(inputs, logit_config, backward=backward)
    config = GpuTileConfig(
        **call_sizes(inputs),
        row_block=MIN_BLOCK,
        key_block=MIN_BLOCK,
        chip=limits_of(device_kind),
        itemsize=matmul.dtype.itemsize,
        exact=matmul.precision == lax.Precision.HIGHEST,
        backward=backward,
    )
    measured = measured_blocks(chip_name(device_kind), config, dtype, backward=backward)
    masks = max([1, *(x.shape[0] for x in jax.tree.leaves(inputs.mask))])
    config = config.chosen(machine.block_sizes, measured)
    return config.shared_out(dtype.itemsize, MAX_TABLE_ENTRIES // masks)


# XLA:GPU takes TensorFloat-32 for these too.
_FAST = (*PLAIN, "high", "tensorfloat32", lax.Precision.HIGH, (lax.Precision.HIGH,) * 2)


def precision_of(logit_config: LogitConfig) -> lax.Precision | None:
    """Return HIGHEST for float32, DEFAULT for what is fast, None for an unsupported precision.

    Without a precision the call has that of `jax.default_matmul_precision`.
    """
    precision = logit_config.precision
    if precision is None:
        precision = getattr(jax.config, "jax_default_matmul_precision", None)
    if precision in EXACT:
        return lax.Precision.HIGHEST
    return lax.Precision.DEFAULT if precision in _FAST else None


def matmul_config(
    inputs: AttentionInputs, logit_config: LogitConfig, *, backward: bool = False
) -> MatmulConfig:
    """Return bfloat16 or float16 if all inputs have it and no other precision is asked for, else float32.

    float32 at the default precision is TensorFloat-32, which holds float16 and int8 exactly. float16 has
    too few exponents for gradients, and for weights times the scales of quantised values.
    """
    arrays = inputs.query, inputs.key, inputs.value
    dtypes = {x.dtype for x in arrays if x.dtype != jnp.int8}
    precision = precision_of(logit_config) or lax.Precision.DEFAULT
    narrow = len(dtypes) == 1 and precision == lax.Precision.DEFAULT
    dtype = dtypes.pop() if narrow else jnp.dtype(jnp.float32)
    if dtype == jnp.float16 and (backward or inputs.key_scale is not None):
        dtype = jnp.dtype(jnp.float32)
    return MatmulConfig(dtype, precision)


def power_of_two(x: int) -> int:
    """Return the next power of two, at least the size of the tensor cores' tiles."""
    return max(1 << (x - 1).bit_length(), MIN_BLOCK)


def padded_width(width: int) -> int:
    """Return the sum of the pieces of a width."""
    return -(-width // MIN_BLOCK) * MIN_BLOCK
