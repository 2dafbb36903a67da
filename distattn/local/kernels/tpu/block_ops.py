"""What the TPU kernels compute on a block: who attends to whom, logits, and products that masks guard.

The orientation is free: rows by keys in one kernel, keys by rows in another.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from distattn.local.block import LogitConfig
from distattn.local.inputs import AttentionInputs
from distattn.local.kernels.shared import EXACT, Comparison, Index, Numbers
from distattn.local.kernels.tpu.tiling import QUANTISED, Order, TpuCut, order_of

# All of their numbers are numbers of bfloat16.
NARROW = (jnp.bfloat16, *QUANTISED)


def _numbers_of(logit_config: LogitConfig, *arrays: jax.Array) -> Numbers:
    """bfloat16 where it holds all numbers, and no other precision is asked for; else float32."""
    exact = logit_config.precision in EXACT
    narrow = not exact and all(x.dtype in NARROW for x in arrays)
    precision = lax.Precision.HIGHEST if exact else lax.Precision.DEFAULT
    return Numbers(jnp.dtype(jnp.bfloat16 if narrow else jnp.float32), precision)


@dataclasses.dataclass(frozen=True)
class Side:
    """Keys or values: how a block of them lies, and how it is used, head by head."""

    order: Order
    width: int
    # Of float16 the bits are taken inside the kernel, and then a block is read as a whole.
    moved: bool

    @property
    def axis(self) -> int:
        """Along which the keys of one head lie."""
        return 1 if self.order == "KHS" else 0

    def shape(self, cut: TpuCut) -> tuple[int, int, int]:
        """Of a block, head by head."""
        keys, width = cut.key_block, self.width
        return (cut.heads, width, keys) if self.axis else (cut.heads, keys, width)

    def scratch(self, cut: TpuCut, dtype: Any) -> list[Any]:
        """Where a block is put head by head, if it does not lie so."""
        return [pltpu.VMEM(self.shape(cut), dtype)] if self.moved else []

    def by_heads(self, block: Any, refs: Iterator[Any]) -> Any:
        """The block head by head, a reference; `fill` puts it there. Takes its scratch from the refs."""
        return next(refs) if self.moved else block.at[0, 0]

    def fill(self, block: Any, heads: Any) -> None:
        """Puts the block there."""
        if self.order == "SKH":
            heads[...] = jnp.swapaxes(block[0, 0], 0, 1)
        elif self.moved:
            heads[...] = block[0, 0]

    def write(self, block: Any, x: jax.Array) -> None:
        """The inverse: writes what lies head by head."""
        block[0, 0] = jnp.swapaxes(x, 0, 1) if self.order == "SKH" else x


def sides_of(inputs: AttentionInputs) -> tuple[Side, Side]:
    """Keys and values."""

    def side(x: jax.Array) -> Side:
        order = order_of(x.shape, x.dtype)
        return Side(order, x.shape[-1], order == "SKH" or x.dtype == jnp.float16)

    return side(inputs.key), side(inputs.value)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a kernel computes with, apart from arrays."""

    cut: TpuCut
    logit_config: LogitConfig
    numbers: Numbers
    key: Side
    value: Side
    compared: Comparison
    quantised: bool

    def scales(self, refs: Iterator[Any]) -> Callable[[int, jax.Array], jax.Array] | None:
        """f32[1, keys] of keys (0) or values (1) and a head, whose blocks are next of the refs, if any."""
        if not self.quantised:
            return None
        blocks = [next(refs), next(refs)]
        return lambda side, head: blocks[side][0, 0, 0, pl.ds(head, 1), :]

    def keep_rows(self, index: list[Any], row_index: Any) -> None:
        """Puts the vectors of a block of rows side by side, where `rows_by_keys` reads them."""
        if index:
            row_index[:, :3] = jnp.swapaxes(index[0][0], 0, 1)

    def rows_by_keys(self, index: list[Any], row_index: Any) -> jax.Array | None:
        """Who attends to whom, of a block of rows, as `keep_rows` keeps it, by one of keys."""
        return self.compared.allowed(
            lambda n: row_index[:, n : n + 1], lambda n: index[1][0, n : n + 1, :]
        )


def plan_of(
    inputs: AttentionInputs, logit_config: LogitConfig, cut: TpuCut, index: Index | None
) -> Plan:
    """The plan of a call."""
    numbers = _numbers_of(logit_config, inputs.query, inputs.key, inputs.value)
    compared = Comparison.of(inputs.mask, index)
    quantised = inputs.key_scale is not None
    return Plan(cut, logit_config, numbers, *sides_of(inputs), compared, quantised)


def loaded(x: jax.Array) -> jax.Array:
    """f32: numbers of a block; of float16 there are the bits."""
    if x.dtype != jnp.uint16:
        return x.astype(jnp.float32)
    bits = x.astype(jnp.int32)
    exponent, fraction = (bits >> 10) & 31, bits & 1023
    raised = jnp.where(exponent == 31, 255, exponent + 112)
    size = lax.bitcast_convert_type((raised << 23) | (fraction << 13), jnp.float32)
    # float32 has no such small numbers without a leading one on a TPU.
    size = jnp.where(exponent == 0, fraction.astype(jnp.float32) * 2.0**-24, size)
    return jnp.where(bits > 32767, -size, size)


def each(count: int) -> Callable[[Callable[[jax.Array], None]], None]:
    """Decorates what is done for each of the heads: a loop, so that its code is there once."""

    def run(body: Callable[[jax.Array], None]) -> None:
        lax.fori_loop(0, count, lambda head, _: body(head), None)

    return run


def guarded(
    product: Callable[[jax.Array, jax.Array], jax.Array],
    weights: jax.Array,
    x: jax.Array,
    add: Callable[[jax.Array], None],
) -> None:
    """Adds product(weights, x), to which entries of x contribute nothing where their weight is 0.

    They may be NaN: as `distattn.local.block.attended_sum`. What is not finite is added for who attends to it.
    """
    finite = jnp.abs(x) < jnp.inf

    @pl.when(jnp.max(jnp.where(finite, 0.0, 1.0)) > 0)
    def _() -> None:
        attended = jnp.where(weights != 0, 1.0, 0.0)
        odd = 0.0
        for kind, number in ((x == jnp.inf, jnp.inf), (x == -jnp.inf, -jnp.inf), (x != x, jnp.nan)):
            met = product(attended, jnp.where(kind, 1.0, 0.0))
            odd = odd + jnp.where(met > 0, number, 0.0)
        add(odd)

    add(product(weights, jnp.where(finite, x, 0.0)))
