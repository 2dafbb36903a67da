"""Blocks as the GPU kernels load, multiply and store them.

Triton's arrays are powers of two. A width is loaded in pieces that are, 80 as 64 and 16, so that only what
fills the last sixteen is loaded, held and multiplied in vain.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from distattn.local.block import LogitConfig
from distattn.local.inputs import AttentionInputs
from distattn.local.kernels.gpu.tiling import (
    GpuTileConfig,
    matmul_config,
    padded_width,
)
from distattn.local.kernels.shared import (
    MaskComparison,
    MaskVectors,
    MatmulConfig,
    attended_keys,
)

Piece = tuple[int, int]  # start and size in a width
Pieces = tuple[jax.Array, ...]


@dataclasses.dataclass(frozen=True)
class Operand:
    """An array of rows or of keys, [length, width], of which a program reads and writes blocks."""

    width: int
    length: int
    is_ragged: bool = False  # whether blocks go beyond its length

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """The pieces of the width, the largest first."""
        whole, start, pieces = padded_width(self.width), 0, []
        while start < whole:
            size = 1 << ((whole - start).bit_length() - 1)
            pieces.append((start, size))
            start += size
        return tuple(pieces)

    def load(self, ref: Any, start: jax.Array, count: int, *lead: jax.Array) -> Pieces:
        """Return `count` entries of ref [*lead, length, width], [count, size] per piece; 0 beyond it."""
        pieces = []
        for piece in self.pieces:
            inside = self._inside(start, count, piece)
            other = None if inside is None else jnp.zeros((), ref.dtype)
            place = ref.at[(*lead, pl.ds(start, count), pl.ds(*piece))]
            pieces.append(plgpu.load(place, mask=inside, other=other))
        return tuple(pieces)

    def store(self, ref: Any, start: jax.Array, pieces: Pieces, *lead: jax.Array) -> None:
        """Write the pieces, but nothing beyond the array."""
        for piece, x in zip(self.pieces, pieces, strict=True):
            place = ref.at[(*lead, pl.ds(start, x.shape[0]), pl.ds(*piece))]
            plgpu.store(place, x.astype(ref.dtype), mask=self._inside(start, x.shape[0], piece))

    def load_scales(self, ref: Any, start: jax.Array, count: int, *lead: jax.Array) -> jax.Array:
        """Return `count` scales, 0 beyond the array; `ref` is [*lead, length]."""
        place = ref.at[(*lead, pl.ds(start, count))]
        if not self.is_ragged:
            return plgpu.load(place)
        inside = start + lax.broadcasted_iota(jnp.int32, (count,), 0) < self.length
        return plgpu.load(place, mask=inside, other=jnp.zeros((), ref.dtype))

    def zeros(self, count: int) -> Pieces:
        """Return zeros in float32, to sum onto."""
        return tuple(jnp.zeros((count, size), jnp.float32) for _, size in self.pieces)

    def _inside(self, start: jax.Array, count: int, piece: Piece) -> jax.Array | None:
        """Return which items are in the array, bool[count, size]; None if all are."""
        shape, inside = (count, piece[1]), None
        if self.is_ragged:
            inside = start + lax.broadcasted_iota(jnp.int32, shape, 0) < self.length
        if sum(piece) > self.width:
            narrow = piece[0] + lax.broadcasted_iota(jnp.int32, shape, 1) < self.width
            inside = narrow if inside is None else inside & narrow
        return inside


@dataclasses.dataclass(frozen=True)
class KernelSettings:
    """Static settings of a kernel."""

    config: GpuTileConfig
    logit_config: LogitConfig
    matmul: MatmulConfig
    query: Operand
    out: Operand  # rows of the state, or of its gradient
    key: Operand
    value: Operand
    comparison: MaskComparison
    quantised: bool

    @classmethod
    def of(
        cls,
        inputs: AttentionInputs,
        logit_config: LogitConfig,
        config: GpuTileConfig,
        vectors: MaskVectors | None,
    ) -> "KernelSettings":
        """Return the settings of a call."""
        is_ragged = config.keys < config.padded_keys
        return cls(
            config,
            logit_config,
            matmul_config(inputs, logit_config, backward=config.backward),
            query=Operand(config.width, config.padded_rows),
            out=Operand(config.value_width, config.padded_rows),
            key=Operand(config.width, config.keys, is_ragged),
            value=Operand(config.value_width, config.keys, is_ragged),
            comparison=MaskComparison.of(inputs.mask, vectors),
            quantised=inputs.key_scale is not None,
        )

    def rows_by_keys(self, vectors: list[Any], rows: Any, keys: Any) -> jax.Array | None:
        """Return which rows attend to which keys, bool[rows, keys]; None if all do."""
        return self.comparison.allowed(
            lambda n: vectors[0][n, rows][:, None], lambda n: vectors[1][n, keys][None, :]
        )

    def attended(self, pieces: Pieces, allowed: jax.Array | None) -> Pieces:
        """Return keys, values or scales of a block, with 0 for keys that none of its rows attends to."""
        if allowed is None or jnp.issubdtype(pieces[0].dtype, jnp.integer):
            return pieces
        keys = attended_keys(allowed)[0]
        return tuple(
            jnp.where(keys.reshape(-1, *[1] * (x.ndim - 1)), x, jnp.zeros((), x.dtype))
            for x in pieces
        )

    def scores(self, a: Pieces, b: Pieces) -> jax.Array:
        """Return a . b^T, f32[n, m], of vectors in pieces."""
        terms = [self.matmul.dot(x, y, (1, 1)) for x, y in zip(a, b, strict=True)]
        return sum(terms[1:], terms[0])

    def weigh(self, weights: jax.Array, pieces: Pieces) -> Pieces:
        """Return weights [n, m] . pieces [m, .], f32."""
        return tuple(self.matmul.dot(weights, x, (1, 0)) for x in pieces)
