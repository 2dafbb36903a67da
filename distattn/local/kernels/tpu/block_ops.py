"""Blocks as the TPU kernels read them: masks, and keys and values head by head."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from distattn.local.block import LogitConfig
from distattn.local.inputs import AttentionInputs
from distattn.local.kernels.shared import EXACT, MaskComparison, MaskVectors, MatmulConfig
from distattn.local.kernels.tpu.tiling import QUANTISED, Order, TpuTileConfig, order_of

# bfloat16 holds all their values exactly.
_NARROW = (jnp.bfloat16, *QUANTISED)


@dataclasses.dataclass(frozen=True)
class KVOperand:
    """Keys or values: how a block of them is stored, and how a kernel reads it head by head."""

    order: Order
    width: int
    # Whether a block is copied to scratch: float16 bits are read as a whole block inside the kernel.
    copied: bool

    @classmethod
    def of(cls, x: jax.Array) -> "KVOperand":
        """Return the operand of key or value."""
        order = order_of(x.shape, x.dtype)
        return cls(order, x.shape[-1], order == "SKH" or x.dtype == jnp.float16)

    @property
    def dims(self) -> str:
        """Dimensions of the stored array, for `LaunchSpec.blocked`."""
        return "LB" + self.order.replace("H", ".")

    @property
    def key_axis(self) -> int:
        """Axis of the keys in a head's block."""
        return 1 if self.order == "KHS" else 0

    def shape(self, config: TpuTileConfig) -> tuple[int, int, int]:
        """Return the shape of a block, head by head."""
        keys, width = config.key_block, self.width
        return (config.heads, width, keys) if self.key_axis else (config.heads, keys, width)

    def scratch(self, config: TpuTileConfig, dtype: Any) -> list[Any]:
        """Return the memory for a copied block; [] if it is read in place."""
        return [pltpu.VMEM(self.shape(config), dtype)] if self.copied else []

    def by_head(self, block: Any, scratch: Iterator[Any]) -> Any:
        """Return a reference to the block head by head, which `load` fills; may take the next scratch."""
        return next(scratch) if self.copied else block.at[0, 0]

    def load(self, block: Any, by_head: Any) -> None:
        """Copy the block to where `by_head` refers, if it is copied."""
        if self.order == "SKH":
            by_head[...] = jnp.swapaxes(block[0, 0], 0, 1)
        elif self.copied:
            by_head[...] = block[0, 0]

    def store(self, block: Any, x: jax.Array) -> None:
        """Write x, one array per head, to the block."""
        block[0, 0] = jnp.swapaxes(x, 0, 1) if self.order == "SKH" else x

    def attended(self, keys: jax.Array | None) -> Callable[[jax.Array], jax.Array]:
        """Return the function that gives f32 keys or values of a head, with 0 for unattended keys.

        `keys` is that of `attended_keys`; None if all are attended.
        """
        if keys is None:
            return as_float32
        if not self.key_axis:
            columns = jnp.broadcast_to(jnp.where(keys, 1.0, 0.0), (8, keys.shape[1]))
            keys = jnp.swapaxes(columns, 0, 1)[:, :1] > 0
        return lambda x: jnp.where(keys, as_float32(x), 0.0)


@dataclasses.dataclass(frozen=True)
class KernelSettings:
    """Static settings of a kernel."""

    config: TpuTileConfig
    logit_config: LogitConfig
    matmul: MatmulConfig
    key: KVOperand
    value: KVOperand
    comparison: MaskComparison
    quantised: bool

    @classmethod
    def of(
        cls,
        inputs: AttentionInputs,
        logit_config: LogitConfig,
        config: TpuTileConfig,
        vectors: MaskVectors | None,
    ) -> "KernelSettings":
        """Return the settings of a call: matmuls of bfloat16 if it holds all inputs exactly."""
        exact = logit_config.precision in EXACT
        arrays = inputs.query, inputs.key, inputs.value
        narrow = not exact and all(x.dtype in _NARROW for x in arrays)
        precision = lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT
        return cls(
            config,
            logit_config,
            MatmulConfig(jnp.dtype(jnp.bfloat16 if narrow else jnp.float32), precision),
            KVOperand.of(inputs.key),
            KVOperand.of(inputs.value),
            MaskComparison.of(inputs.mask, vectors),
            inputs.key_scale is not None,
        )

    def take_scales(self, refs: Iterator[Any]) -> list[Any]:
        """Take the blocks of the scales of keys and values from the refs; [] if not quantised."""
        return [next(refs), next(refs)] if self.quantised else []

    def keep_rows(self, vectors: list[Any], row_vectors: Any) -> None:
        """Put the mask vectors of a block of rows into columns, where `rows_by_keys` reads them."""
        if vectors:
            row_vectors[:, :3] = jnp.swapaxes(vectors[0][0], 0, 1)

    def rows_by_keys(self, vectors: list[Any], row_vectors: Any) -> jax.Array | None:
        """Return which rows attend to which keys, bool[rows, keys]; None if all do."""
        return self.comparison.allowed(
            lambda n: row_vectors[:, n : n + 1], lambda n: vectors[1][0, n : n + 1, :]
        )


def as_float32(x: jax.Array) -> jax.Array:
    """Return a block in float32; float16 arrives as bits."""
    if x.dtype != jnp.uint16:
        return x.astype(jnp.float32)
    bits = x.astype(jnp.int32)
    exponent, fraction = (bits >> 10) & 31, bits & 1023
    raised = jnp.where(exponent == 31, 255, exponent + 112)
    size = lax.bitcast_convert_type((raised << 23) | (fraction << 13), jnp.float32)
    # A TPU flushes float32 subnormals to 0, so those of float16 are computed as numbers.
    size = jnp.where(exponent == 0, fraction.astype(jnp.float32) * 2.0**-24, size)
    return jnp.where(bits > 32767, -size, size)


def for_each_head(count: int) -> Callable[[Callable[[jax.Array], None]], None]:
    """Decorate what is done for each head: a loop, so that its code exists once."""

    def run(body: Callable[[jax.Array], None]) -> None:
        lax.fori_loop(0, count, lambda head, _: body(head), None)

    return run
