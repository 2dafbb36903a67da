"""What the GPU kernels load of a block, and products that masks guard.

Triton's arrays are powers of two. A width is loaded in pieces that are, 80 as 64 and 16, so that no number
is loaded, held or multiplied that is not there, but for what fills the last sixteen.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from distattn.local.block import LogitConfig
from distattn.local.inputs import AttentionInputs
from distattn.local.kernels.gpu.tiling import SMALLEST, GpuCut, numbers_of, padded
from distattn.local.kernels.shared import Comparison, Index, Numbers

Piece = tuple[Any, int]  # of a width: start and size
Pieces = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Side:
    """An array of rows or of keys, [n, width]: which part of a block of it is there."""

    width: int
    length: int  # of those that there are
    is_ragged: bool = False  # whether blocks go beyond them

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The largest first."""
        whole, start, found = padded(self.width), 0, []
        while start < whole:
            size = 1 << ((whole - start).bit_length() - 1)
            found.append((start, size))
            start += size
        return tuple(found)

    def load(self, ref: Any, start: jax.Array, count: int, *lead: jax.Array) -> Pieces:
        """[count, .] each, from a start on, 0 for what is not there. `ref` is [*lead, n, width]."""
        return tuple(self.load_piece(ref, start, count, piece, *lead) for piece in self.pieces)

    def load_piece(
        self, ref: Any, start: jax.Array, count: int, piece: Piece, *lead: jax.Array
    ) -> jax.Array:
        """[count, size of the piece]."""
        place = ref.at[(*lead, pl.ds(start, count), pl.ds(*piece))]
        there = self._there(start, count, piece)
        other = None if there is None else jnp.zeros((), ref.dtype)
        return plgpu.load(place, mask=there, other=other)

    def store(self, ref: Any, start: jax.Array, pieces: Pieces, *lead: jax.Array) -> None:
        """The inverse; what is not there is not written."""
        for piece, x in zip(self.pieces, pieces, strict=True):
            self.store_piece(ref, start, x, piece, *lead)

    def store_piece(
        self, ref: Any, start: jax.Array, x: jax.Array, piece: Piece, *lead: jax.Array
    ) -> None:
        """Writes one of them."""
        count = x.shape[0]
        place = ref.at[(*lead, pl.ds(start, count), pl.ds(*piece))]
        plgpu.store(place, x.astype(ref.dtype), mask=self._there(start, count, piece))

    def load_numbers(self, ref: Any, start: jax.Array, count: int, *lead: jax.Array) -> jax.Array:
        """[count], 0 for what is not there. `ref` is [*lead, n]."""
        place = ref.at[(*lead, pl.ds(start, count))]
        if not self.is_ragged:
            return plgpu.load(place)
        there = start + lax.broadcasted_iota(jnp.int32, (count,), 0) < self.length
        return plgpu.load(place, mask=there, other=jnp.zeros((), ref.dtype))

    def zeros(self, count: int) -> Pieces:
        """f32: what sums start with."""
        return tuple(jnp.zeros((count, size), jnp.float32) for _, size in self.pieces)

    def _there(self, start: jax.Array, count: int, piece: Piece) -> jax.Array | None:
        """bool[count, size of the piece]; None: all."""
        shape, there = (count, piece[1]), None
        if self.is_ragged:
            there = start + lax.broadcasted_iota(jnp.int32, shape, 0) < self.length
        if self.width % SMALLEST and not (isinstance(piece[0], int) and sum(piece) <= self.width):
            within = piece[0] + lax.broadcasted_iota(jnp.int32, shape, 1) < self.width
            there = within if there is None else there & within
        return there


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a kernel computes with, apart from arrays."""

    cut: GpuCut
    logit_config: LogitConfig
    numbers: Numbers
    query: Side  # rows
    out: Side  # rows of the state, or of its gradient
    key: Side
    value: Side
    compared: Comparison
    quantised: bool

    def rows_by_keys(self, index: list[Any], rows: Any, keys: Any) -> jax.Array | None:
        """Who attends to whom, of a block of rows by one of keys."""
        return self.compared.allowed(
            lambda n: index[0][n, rows][:, None], lambda n: index[1][n, keys][None, :]
        )

    def scores(self, a: Pieces, b: Pieces) -> jax.Array:
        """a . b^T, [n, m], of vectors in pieces."""
        parts = [self.numbers.product(x, y, (1, 1)) for x, y in zip(a, b, strict=True)]
        return sum(parts[1:], parts[0])

    def weigh(self, weights: jax.Array, pieces: Pieces) -> Pieces:
        """f32: weights [n, m] . pieces [m, .]."""
        return tuple(self.numbers.product(weights, x, (1, 0)) for x in pieces)

    def weigh_guarded(self, weights: jax.Array, x: jax.Array) -> jax.Array:
        """f32: weights [n, m] . x [m, .], to which entries of x add nothing where their weight is 0.

        As `distattn.local.block.attended_sum`. What is not finite is added for who attends to it.
        """
        x = x.astype(jnp.float32)
        code = jnp.where(x == jnp.inf, 1.0, jnp.where(x == -jnp.inf, _NEGATIVE, 0.0))
        code = jnp.where(x != x, _NAN, code)
        met = _COUNTING.product(jnp.where(weights != 0, 1.0, 0.0), code, (1, 0))
        count = jnp.minimum(met, _NAN).astype(jnp.int32)
        odd = jnp.where(count % int(_NEGATIVE) > 0, jnp.inf, 0.0)
        odd = odd - jnp.where(count >= int(_NEGATIVE), jnp.inf, 0.0)
        odd = jnp.where(met >= _NAN, jnp.nan, odd)
        finite = jnp.where(jnp.abs(x) < jnp.inf, x, 0.0)
        return self.numbers.product(weights, finite, (1, 0)) + odd

    def may_leak(self, x: jax.Array) -> bool:
        """Whether an array can have what is no number where nobody may attend."""
        return self.compared.masked and x.dtype != jnp.int8


def plan_of(
    inputs: AttentionInputs,
    logit_config: LogitConfig,
    cut: GpuCut,
    index: Index | None,
    *,
    backward: bool = False,
) -> Plan:
    """The plan of a call."""
    is_ragged = cut.keys < cut.all_keys
    return Plan(
        cut,
        logit_config,
        numbers_of(inputs, logit_config, backward=backward),
        query=Side(cut.width, cut.all_rows),
        out=Side(cut.value_width, cut.all_rows),
        key=Side(cut.width, cut.keys, is_ragged),
        value=Side(cut.value_width, cut.keys, is_ragged),
        compared=Comparison.of(inputs.mask, index),
        quantised=inputs.key_scale is not None,
    )


def unless_finite(pieces: Pieces, side: Side, again: Callable[[Piece], None]) -> None:
    """Runs `again`, for each narrow piece of a side, where one of the sums is not finite.

    So what nobody attends to is looked for after the loop over blocks, once, and not in each of them: a
    weight of 0 times a NaN or an infinity is NaN, and stays so. Narrow, so that it takes no more registers.
    """
    odd = jnp.zeros((), jnp.float32)
    for x in pieces:
        kinds = jnp.where(jnp.abs(x) < jnp.inf, 0.0, 1.0)
        odd = jnp.maximum(odd, kinds.max(axis=1).max(axis=0))
    width = padded(side.width)
    size = _NARROW if width % _NARROW == 0 else SMALLEST

    @pl.when(odd > 0)
    def _() -> None:
        lax.fori_loop(0, width // size, lambda n, _: again((n * size, size)), None)


_NARROW = 32
# Codes whose sums over a block tell which kinds of non-numbers were met: bfloat16 has them exactly.
_NEGATIVE, _NAN = 2.0**12, 2.0**24
_COUNTING = Numbers(jnp.dtype(jnp.bfloat16), lax.Precision.DEFAULT)
