"""How states lie in the memory of a kernel, and in the message that one sends to another.

Rows of a state are its numbers for one query and head. In a block there are `heads` times `rows` of them:
weighted sums lie as matrices, 8 by 128 in a tile, and what a row has one of (a maximum, a sum, the top of
fixed-point numbers) along the lanes, in lines after them. On the minor axis, as V + 2 numbers, they would
take another 128 lanes.
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


class Parts(NamedTuple):
    """A state of rows, as a kernel has it; both kinds of state are made of these."""

    vectors: list[jax.Array]  # [..., rows]
    matrices: list[jax.Array]  # [..., rows, width], of each its own width


@dataclasses.dataclass(frozen=True)
class Form:
    """What a kind of state consists of, and how two of them merge: by the public merge of that kind."""

    dtype: jnp.dtype  # of all parts, 4 bytes
    vectors: int
    widths: tuple[int, ...]  # of matrices
    merge: Callable[[Parts, Parts], Parts]


@dataclasses.dataclass(frozen=True)
class Wire:
    """The shape of a message: blocks of lines."""

    form: Form
    blocks: int
    heads: int
    rows: int  # of a head, a multiple of 8, at most 128

    @property
    def width(self) -> int:
        """Lanes of a line."""
        return max(-(-x // LANES) * LANES for x in (*self.form.widths, LANES))

    @property
    def lines(self) -> int:
        """Of a block."""
        numbers = self.form.vectors * self.heads
        return self._numbers_start + -(-numbers // SUBLANES) * SUBLANES

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of a message."""
        return self.blocks, self.lines, self.width

    @property
    def bytes(self) -> int:
        """Of a message."""
        return 4 * math.prod(self.shape)

    @property
    def _numbers_start(self) -> int:
        return len(self.form.widths) * self.heads * self.rows

    def matrix(self, block: Any, index: int, head: int | None = None) -> Any:
        """The lines of a matrix in a reference to a block: of all heads, or of one."""
        size = self.rows if head is not None else self.heads * self.rows
        start = (index * self.heads + (head or 0)) * self.rows
        return block.at[start : start + size, : self.form.widths[index]]

    def vector(self, block: Any, index: int, head: int | None = None) -> Any:
        """The lines of a vector in a reference to a block, one for each head."""
        start = self._numbers_start + index * self.heads + (head or 0)
        return block.at[start : start + (self.heads if head is None else 1), : self.rows]

    def read(self, block: Any) -> Parts:
        """[heads, rows] and [heads, rows, width] from a reference to a block."""
        matrices = [
            self.matrix(block, n)[...].reshape(self.heads, self.rows, width)
            for n, width in enumerate(self.form.widths)
        ]
        return Parts([self.vector(block, n)[...] for n in range(self.form.vectors)], matrices)

    def write(self, block: Any, parts: Parts) -> None:
        """The inverse."""
        for n, x in enumerate(parts.vectors):
            self.vector(block, n)[...] = x
        for n, x in enumerate(parts.matrices):
            self.matrix(block, n)[...] = x.reshape(self.heads * self.rows, x.shape[-1])


def wire_of(form: Form, rows: int) -> Wire:
    """For so many rows, which have no order: as full tiles as can be."""
    of_a_block = min(-(-rows // SUBLANES) * SUBLANES, LANES)
    return Wire(form, -(-rows // of_a_block), 1, of_a_block)


def form_of(x: State) -> Form:
    """Of a `SoftmaxState`, or of a pytree of `FixedPoint`."""
    if isinstance(x, SoftmaxState):
        return softmax_form(x.weighted_sum.shape[-1], x.max.dtype)
    leaves = fixed_points(x)
    lattices, counts = [leaf.limb_format for leaf in leaves], [len(leaf.words) for leaf in leaves]
    widths = [leaf.words[0].shape[0] for leaf in leaves]
    vectors = sum(1 + count * (width == 1) for count, width in zip(counts, widths, strict=True))

    def merge(a: Parts, b: Parts) -> Parts:
        vectors, matrices = [], []
        sides = [(iter(x.vectors), iter(x.matrices)) for x in (a, b)]
        for limb_format, count, width in zip(lattices, counts, widths, strict=True):
            pairs = [_fixed_point(*side, limb_format, count, width) for side in sides]
            merged = [fixed_point.merge(*pair) for pair in zip(*pairs, strict=True)]
            vectors.append(merged[0].top)
            (vectors if width == 1 else matrices).extend(x[0] for x in merged[-1].words)
        return Parts(vectors, matrices)

    matrices = [width for count, width in zip(counts, widths, strict=True) for _ in range(count)]
    return Form(
        jnp.dtype(jnp.int32), vectors, tuple(width for width in matrices if width > 1), merge
    )


def _fixed_point(
    vectors: Any, matrices: Any, limb_format: Any, count: int, width: int
) -> list[FixedPoint]:
    """The tops of rows, and the words: a row of one number for each of its numbers, of the same top."""
    top = next(vectors)
    if width == 1:
        return [FixedPoint(top, tuple(next(vectors)[None] for _ in range(count)), limb_format)]
    words = tuple(next(matrices)[None] for _ in range(count))
    return [FixedPoint(top, (), limb_format), FixedPoint(top[..., None], words, limb_format)]


def softmax_form(width: int, dtype: Any) -> Form:
    """Of a `SoftmaxState` with values of such a width."""

    def merge(a: Parts, b: Parts) -> Parts:
        merged = softmax_state.merge(*(SoftmaxState(*x.vectors, *x.matrices) for x in (a, b)))
        return Parts([merged.max, merged.sum], [merged.weighted_sum])

    return Form(jnp.dtype(dtype), 2, (width,), merge)


def parts_of(x: State) -> Parts:
    """[R] and [R, width], of the R rows of a state."""
    if isinstance(x, SoftmaxState):
        width = x.weighted_sum.shape[-1]
        return Parts([x.max.reshape(-1), x.sum.reshape(-1)], [x.weighted_sum.reshape(-1, width)])
    parts = Parts([], [])
    for leaf in fixed_points(x):
        parts.vectors.append(leaf.top.reshape(-1))
        for word in leaf.words:
            if word.shape[0] == 1:
                parts.vectors.append(word.reshape(-1))
            else:
                parts.matrices.append(word.reshape(word.shape[0], -1).T)
    return parts


def state_of(parts: Parts, like: State) -> State:
    """The inverse."""
    if isinstance(like, SoftmaxState):
        high, total = (x.reshape(like.max.shape) for x in parts.vectors)
        return SoftmaxState(high, total, parts.matrices[0].reshape(like.weighted_sum.shape))
    vectors, matrices = iter(parts.vectors), iter(parts.matrices)
    leaves = []
    for leaf in fixed_points(like):
        top = next(vectors).reshape(leaf.top.shape)
        words = tuple(
            next(vectors).reshape(word.shape)
            if word.shape[0] == 1
            else next(matrices).T.reshape(word.shape)
            for word in leaf.words
        )
        leaves.append(FixedPoint(top, words, leaf.limb_format))
    return with_fixed_points(like, leaves)
