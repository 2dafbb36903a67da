"""The layout of states in the memory of a kernel, and in the message that one device sends to another.

A row of a state is that of one query and head. A block has `heads` times `rows` of them: weighted sums are
matrices, 8 by 128 in a tile, and single numbers of a row (a maximum, a sum, a shared exponent) are stored
along the lanes, in lines after them. On the minor axis, as V + 2 numbers, they would take another 128
lanes.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from distattn.algebra import fixed_point, softmax_state
from distattn.algebra.fixed_point import FixedPoint
from distattn.algebra.mergeable import State, fixed_points, with_fixed_points
from distattn.algebra.softmax_state import SoftmaxState
from distattn.local.kernels.tpu.tiling import LANES

SUBLANES = 8


class RowArrays(NamedTuple):
    """A state of rows, as a kernel holds it; both kinds of state consist of these."""

    vectors: list[jax.Array]  # [..., rows]
    matrices: list[jax.Array]  # [..., rows, width], each with its own width


@dataclasses.dataclass(frozen=True)
class StateForm:
    """The arrays of a kind of state, and its public merge."""

    dtype: jnp.dtype  # dtype of all arrays, of 4 bytes
    vectors: int
    widths: tuple[int, ...]  # widths of the matrices
    merge: Callable[[RowArrays, RowArrays], RowArrays]


@dataclasses.dataclass(frozen=True)
class MessageLayout:
    """The shape of a message: blocks of lines."""

    form: StateForm
    blocks: int
    heads: int
    rows: int  # rows of a head, a multiple of 8, at most 128

    @property
    def shape(self) -> tuple[int, int, int]:
        """Blocks, lines of a block, and lanes of a line."""
        vectors = -(-self.form.vectors * self.heads // SUBLANES) * SUBLANES
        width = max(-(-x // LANES) * LANES for x in (*self.form.widths, LANES))
        return self.blocks, self._vectors_start + vectors, width

    @property
    def bytes(self) -> int:
        """Bytes of a message."""
        return 4 * math.prod(self.shape)

    @property
    def _vectors_start(self) -> int:
        return len(self.form.widths) * self.heads * self.rows

    def matrix(self, block: Any, index: int, head: int | None = None) -> Any:
        """Return the lines of a matrix in a reference to a block: of one head, or of all."""
        size = self.rows if head is not None else self.heads * self.rows
        start = (index * self.heads + (head or 0)) * self.rows
        return block.at[start : start + size, : self.form.widths[index]]

    def vector(self, block: Any, index: int, head: int | None = None) -> Any:
        """Return the lines of a vector in a reference to a block, one per head."""
        start = self._vectors_start + index * self.heads + (head or 0)
        return block.at[start : start + (self.heads if head is None else 1), : self.rows]

    def read(self, block: Any) -> RowArrays:
        """Return [heads, rows] and [heads, rows, width] from a reference to a block."""
        matrices = [
            self.matrix(block, n)[...].reshape(self.heads, self.rows, width)
            for n, width in enumerate(self.form.widths)
        ]
        return RowArrays([self.vector(block, n)[...] for n in range(self.form.vectors)], matrices)

    def write(self, block: Any, arrays: RowArrays) -> None:
        """Write what `read` returns."""
        for n, x in enumerate(arrays.vectors):
            self.vector(block, n)[...] = x
        for n, x in enumerate(arrays.matrices):
            self.matrix(block, n)[...] = x.reshape(self.heads * self.rows, x.shape[-1])


def layout_of(form: StateForm, rows: int) -> MessageLayout:
    """Return the layout of that many rows, which have no order, in tiles as full as possible."""
    block_rows = min(-(-rows // SUBLANES) * SUBLANES, LANES)
    return MessageLayout(form, -(-rows // block_rows), 1, block_rows)


def softmax_form(width: int, dtype: Any) -> StateForm:
    """Return the form of a `SoftmaxState` with values of that width."""

    def merge(a: RowArrays, b: RowArrays) -> RowArrays:
        merged = softmax_state.merge(*(SoftmaxState(*x.vectors, *x.matrices) for x in (a, b)))
        return RowArrays([merged.max, merged.sum], [merged.weighted_sum])

    return StateForm(jnp.dtype(dtype), 2, (width,), merge)


def form_of(x: State) -> StateForm:
    """Return the form of a `SoftmaxState`, or of a pytree of `FixedPoint`."""
    if isinstance(x, SoftmaxState):
        return softmax_form(x.weighted_sum.shape[-1], x.max.dtype)
    leaves = fixed_points(x)
    sizes = [(len(leaf.limbs), leaf.limbs[0].shape[0]) for leaf in leaves]

    def merge(a: RowArrays, b: RowArrays) -> RowArrays:
        merged = RowArrays([], [])
        sides = [(iter(x.vectors), iter(x.matrices)) for x in (a, b)]
        for leaf, (count, width) in zip(leaves, sizes, strict=True):
            pair = [_take_fixed_point(*side, leaf.limb_format, count, width) for side in sides]
            sums = [fixed_point.merge(*halves) for halves in zip(*pair, strict=True)]
            merged.vectors.append(sums[0].exponent)
            target = merged.vectors if width == 1 else merged.matrices
            target.extend(limb[0] for limb in sums[-1].limbs)
        return merged

    vectors = sum(1 + count * (width == 1) for count, width in sizes)
    widths = tuple(width for count, width in sizes for _ in range(count) if width > 1)
    return StateForm(jnp.dtype(jnp.int32), vectors, widths, merge)


def _take_fixed_point(
    vectors: Any, matrices: Any, limb_format: Any, count: int, width: int
) -> list[FixedPoint]:
    """Return the shared exponents of rows, and the limbs: one row for each of the row's numbers."""
    exponent = next(vectors)
    if width == 1:
        return [FixedPoint(exponent, tuple(next(vectors)[None] for _ in range(count)), limb_format)]
    limbs = tuple(next(matrices)[None] for _ in range(count))
    return [
        FixedPoint(exponent, (), limb_format),
        FixedPoint(exponent[..., None], limbs, limb_format),
    ]


def to_rows(x: State) -> RowArrays:
    """Return [R] and [R, width] of the R rows of a state."""
    if isinstance(x, SoftmaxState):
        width = x.weighted_sum.shape[-1]
        vectors = [x.max.reshape(-1), x.sum.reshape(-1)]
        return RowArrays(vectors, [x.weighted_sum.reshape(-1, width)])
    arrays = RowArrays([], [])
    for leaf in fixed_points(x):
        arrays.vectors.append(leaf.exponent.reshape(-1))
        for limb in leaf.limbs:
            if limb.shape[0] == 1:
                arrays.vectors.append(limb.reshape(-1))
            else:
                arrays.matrices.append(limb.reshape(limb.shape[0], -1).T)
    return arrays


def from_rows(arrays: RowArrays, like: State) -> State:
    """Return the state of the shapes of `like`, the inverse of `to_rows`."""
    if isinstance(like, SoftmaxState):
        max_, sum_ = (x.reshape(like.max.shape) for x in arrays.vectors)
        return SoftmaxState(max_, sum_, arrays.matrices[0].reshape(like.weighted_sum.shape))
    vectors, matrices = iter(arrays.vectors), iter(arrays.matrices)
    leaves = []
    for leaf in fixed_points(like):
        exponent = next(vectors).reshape(leaf.exponent.shape)
        limbs = tuple(
            (next(vectors) if limb.shape[0] == 1 else next(matrices).T).reshape(limb.shape)
            for limb in leaf.limbs
        )
        leaves.append(FixedPoint(exponent, limbs, leaf.limb_format))
    return with_fixed_points(like, leaves)
