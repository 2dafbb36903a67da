"""Sums whose bits do not depend on their order: the second monoid, of integers.

Floating-point addition rounds, so it is not associative, and a tree over four devices gives other bits
than one over five. Integers are associative. A `FixedPoint` holds sums of real numbers in words of int32
on a lattice that nothing depends on: with L bits a word, word k counts units of 2^(L (top - k)), for an
integer `top` of each row. A number x becomes digits, by

    w_0 = round(x / 2^(L top)),  w_1 = round((x - w_0 2^(L top)) / 2^(L (top - 1))),  ...

to the nearest, ties to even; `top` is the lowest for which |w_0| <= 2^(L-1) for all of a row. Then a digit
is a function of x and of its unit alone: with a higher top, the digits that come before are 0. So `merge`
takes the higher top, drops the words below the lowest unit of it, and adds integers. Nothing rounds in it;
it is associative and commutative exactly, and it has an exact unit (top -2^30, words 0).

How good it is. A number loses what is below the lowest of K units, at most half of 2^(L (top - K + 1)). The
top of a sum is that of its largest term A, in which 2^(L top - 1) < A (else it would be lower). So n terms
are in error by less than n 2^(-L (K - 1)) A together, whatever they are. A digit is at most 2^(L-1), so n
terms do not overflow while n 2^(L-1) < 2^31. `lattice` takes L = 31 - log2 n and the fewest words for which
the error stays below 2^-24 A: half a unit in the last place of a float32, which is also what one
conversion back costs. It changes at 1.9 times the powers of 16, where padding does not lead.

Attention has a second scale, that of its weights. The terms of a state are blocks of keys, each with the
maximum of its own, of which the nearest number of lattice steps is taken: max = g L ln 2 + r (`gauge`). Its
sums are multiplied by exp(r), rounded once, and enter with the gauge g.

A term that is no finite number makes its row, and all that it is merged into, not a number.

Reference: Demmel & Nguyen, "Parallel Reproducible Summation", IEEE Trans. Computers 64(7), 2015, sums in
bins of the same kind, of floating-point numbers. This differs from it in that: 1. bins are integers and
the monoid is exact, carries included; 2. the exponent of softmax weights is part of the lattice, so that no
pass over the keys has to find the maximum first.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from distattn import elementary, gauge
from distattn._compat import vary
from distattn.gauge import EMPTY, POISON
from distattn.words import Lattice, digits, moved_down, scaling


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FixedPoint:
    """Sums of numbers in fixed point: rows of X numbers that share their units, X the leading dimension."""

    top: jax.Array  # int32[...]
    words: tuple[jax.Array, ...]  # int32[X, ...], the coarsest first
    lattice: Lattice = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FixedPointState:
    """What a `SoftmaxState` is, in fixed point: attention over some of the keys, exact to merge."""

    sum: FixedPoint  # [1, B, N, T]           sum of exp(logit)
    weighted_sum: FixedPoint  # [V, B, N, T]  sum of exp(logit) * value


Sums = TypeVar("Sums")  # FixedPoint, or a pytree of them with the same rows


def zero(shape: tuple[int, ...], scale: Lattice, axes: frozenset[str] = frozenset()) -> FixedPoint:
    """The sums of nothing, [X, ...], typed as varying over the axes: the unit of `merge`."""
    top = vary(jnp.full(shape[1:], EMPTY, jnp.int32), axes)
    return FixedPoint(top, (vary(jnp.zeros(shape, jnp.int32), axes),) * scale.words, scale)


def quantise(
    x: jax.Array,
    scale: Lattice,
    steps: jax.Array | None = None,
    factor: jax.Array | None = None,
) -> FixedPoint:
    """x * factor * 2^(L steps) in fixed point.

    Args:
      x: f32[X, ...].
      scale: the lattice.
      steps: int32[...], one for a row, as `gauge.split` makes them; None: 0.
      factor: f32[...], positive; the product is rounded once, and neither overflows nor vanishes.
    """
    steps = jnp.zeros(x.shape[1:], jnp.int32) if steps is None else steps
    factor = jnp.ones(x.shape[1:], jnp.float32) if factor is None else factor
    least = jnp.full_like(steps, EMPTY)
    largest = jnp.abs(x).max(axis=0, initial=0.0)
    top, first, second = scaling(largest[None], steps[None], factor[None], least, scale)
    return FixedPoint(top, digits(x, first, second, scale), scale)


def accumulate(
    onto: FixedPoint,
    x: jax.Array,
    steps: jax.Array | None = None,
    factor: jax.Array | None = None,
) -> FixedPoint:
    """The sums `onto` and all the x * factor * 2^(L steps): as `merge` of one `quantise` after the other.

    Args:
      onto: [X, ...].
      x: f32[C, X, ...].
      steps: int32[C, ...], or None, as for `quantise`.
      factor: f32[C, ...], or None.
    """
    scale, rows = onto.lattice, (x.shape[0], *x.shape[2:])
    steps = jnp.zeros(rows, jnp.int32) if steps is None else steps
    factor = jnp.ones(rows, jnp.float32) if factor is None else factor

    def scale_rows(
        x: jax.Array, steps: jax.Array, factor: jax.Array, top: jax.Array
    ) -> tuple[Any, ...]:
        return scaling(jnp.abs(x).max(axis=1, initial=0.0), steps, factor, top, scale)

    high, first, second = elementary.apart(scale_rows, x, steps, factor, onto.top)
    words = raised(onto, high).words
    # One by one, so that each word is one loop over the sums; XLA:CPU vectorises that, and no reduction.
    for i in range(x.shape[0]):
        more = digits(x[i], first[i][None], second[i][None], scale)
        words = tuple(map(operator.add, words, more))
    return FixedPoint(high, words, scale)


def raised(x: FixedPoint, top: jax.Array) -> FixedPoint:
    """The same sums with a top, int32 that broadcasts to theirs, not below it: the words move down."""
    return FixedPoint(top, moved_down(x.words, (top - x.top)[None]), x.lattice)


def merge(a: Sums, b: Sums) -> Sums:
    """The sums of the terms of both: exactly associative and commutative, with `zero` as its unit.

    Args:
      a: FixedPoint [X, ...], FixedPointState, or a pytree of FixedPoint.
      b: the same, of the same shapes and on the same lattice.

    Raises:
      ValueError: other lattices.
    """

    def pair(a: FixedPoint, b: FixedPoint) -> FixedPoint:
        if a.lattice != b.lattice:
            raise ValueError(
                f"a is on {a.lattice} and b on {b.lattice}; sums merge on one lattice: make it, with "
                "`lattice`, for as many terms as they have together"
            )
        top = jnp.maximum(a.top, b.top)
        a, b = raised(a, top), raised(b, top)
        words = tuple(x + y for x, y in zip(a.words, b.words, strict=True))
        return FixedPoint(top, words, a.lattice)

    return map_sums(pair, a, b)


def merge_axes(x: Sums, axes: int | Sequence[int], *, keepdims: bool = False) -> Sums:
    """All the sums along some dimensions of the rows, merged at once."""
    axes = (axes,) if isinstance(axes, int) else tuple(axes)

    def merged(x: FixedPoint) -> FixedPoint:
        top = x.top.max(axis=axes, keepdims=True)
        words = raised(x, top).words
        inner = [axis + 1 for axis in axes]
        words = tuple(word.sum(axis=inner, keepdims=keepdims) for word in words)
        return FixedPoint(top if keepdims else jnp.squeeze(top, axes), words, x.lattice)

    return map_sums(merged, x)


def mantissa(x: FixedPoint) -> jax.Array:
    """f32[X, ...]: the sums divided by 2^(L top), rounded once and a little."""
    total = jnp.zeros(x.words[0].shape, jnp.float32)
    for place, word in reversed(list(enumerate(x.words))):
        # A product with a power of two is exact.
        total = word.astype(jnp.float32) * np.float32(2.0 ** (-x.lattice.bits * place)) + total
    return jnp.where((x.top >= POISON)[None], jnp.nan, total)


def value(x: FixedPoint) -> jax.Array:
    """f32[X, ...]: the sums as numbers."""
    bound = 512 // x.lattice.bits
    steps = jnp.clip(x.top, -bound, bound)
    return elementary.scaled(mantissa(x), (x.lattice.bits * steps)[None])


def finalize(state: FixedPointState, sinks: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Divide once: as `state.finalize`.

    Args:
      state: sums over all keys.
      sinks: f32[N], one extra logit a head whose value is zero.

    Returns:
      out f32[B, T, N, V] and lse f32[B, T, N], natural log; 0 and -inf for a row over no keys, 0 and the
      sink where there is one, and NaN for a row with a term that is no number.
    """
    total, scale = state.sum, state.sum.lattice
    if sinks is not None:
        steps, factor = gauge.split(sinks.astype(jnp.float32)[:, None], scale.bits)
        steps, factor = (jnp.broadcast_to(x, total.top.shape) for x in (steps, factor))
        total = merge(total, quantise(jnp.ones_like(factor)[None], scale, steps, factor))
    out, lse = elementary.apart(_divide, total, state.weighted_sum)
    return out.transpose(1, 3, 2, 0), lse.swapaxes(1, 2)


def _divide(total: FixedPoint, weighted: FixedPoint) -> tuple[jax.Array, jax.Array]:
    """out f32[V, B, N, T] and lse f32[B, N, T]."""
    bits = total.lattice.bits
    empty, odd = total.top == EMPTY, total.top >= POISON
    divisor = jnp.where(empty, 1.0, mantissa(total)[0])
    steps = jnp.clip(weighted.top - total.top, -(512 // bits), 512 // bits)
    out = elementary.scaled(mantissa(weighted) / divisor[None], (bits * steps)[None])
    lse = gauge.log(total.top, divisor, bits)
    lse = jnp.where(empty, -jnp.inf, jnp.where(odd, jnp.nan, lse))
    odd = odd | (weighted.top >= POISON)
    return jnp.where(empty[None], 0.0, jnp.where(odd[None], jnp.nan, out)), lse


def map_sums(f: Callable[..., Any], *trees: Any) -> Any:
    """f of each FixedPoint of the trees, in the same structure."""
    return jax.tree.map(f, *trees, is_leaf=is_sums)


def is_sums(x: Any) -> bool:
    """Whether a node of a tree is one FixedPoint: where `map_sums` stops."""
    return isinstance(x, FixedPoint)
