"""Logits as whole steps of a limb_format and a small rest: the exponents of softmax weights, as integers.

exp(logit) overflows; so a weight is kept as 2^(L gauge) times a float32 near 1, where L is the number of
bits between the words of the limb_format (`fixed_point`), and `gauge` an int32. What is above about 2^28 in
size has no rest: there a float32 is coarser than a step, and the gauge counts float32 numbers.

Numbers as words of int32 on a limb_format: how they are cut into digits, and how digits move.

The derivation is that of `fixed_point`, which sums them.

Sums whose bits do not depend on their order: the second monoid, of integers.

Floating-point addition rounds, so it is not associative, and a tree over four devices gives other bits
than one over five. Integers are associative. A `FixedPoint` holds sums of real numbers in words of int32
on a limb_format that nothing depends on: with L bits a word, word k counts units of 2^(L (top - k)), for an
integer `top` of each row. A number x becomes digits, by

    w_0 = round(x / 2^(L top)),  w_1 = round((x - w_0 2^(L top)) / 2^(L (top - 1))),  ...

to the nearest, ties to even; `top` is the lowest for which |w_0| <= 2^(L-1) for all of a row. Then a digit
is a function of x and of its unit alone: with a higher top, the digits that come before are 0. So `merge`
takes the higher top, drops the words below the lowest unit of it, and adds integers. Nothing rounds in it;
it is associative and commutative exactly, and it has an exact unit (top -2^30, words 0).

How good it is. A number loses what is below the lowest of K units, at most half of 2^(L (top - K + 1)). The
top of a sum is that of its largest term A, in which 2^(L top - 1) < A (else it would be lower). So n terms
are in error by less than n 2^(-L (K - 1)) A together, whatever they are. A digit is at most 2^(L-1), so n
terms do not overflow while n 2^(L-1) < 2^31. `limb_format` takes L = 31 - log2 n and the fewest words for which
the error stays below 2^-24 A: half a unit in the last place of a float32, which is also what one
conversion back costs. It changes at 1.9 times the powers of 16, where padding does not lead.

Attention has a second scale, that of its weights. The terms of a state are blocks of keys, each with the
maximum of its own, of which the nearest number of limb_format steps is taken: max = g L ln 2 + r (`gauge`). Its
sums are multiplied by exp(r), rounded once, and enter with the gauge g.

A term that is no finite number makes its row, and all that it is merged into, not a number.

Reference: Demmel & Nguyen, "Parallel Reproducible Summation", IEEE Trans. Computers 64(7), 2015, sums in
bins of the same kind, of floating-point numbers. This differs from it in that: 1. bins are integers and
the monoid is exact, carries included; 2. the exponent of softmax weights is part of the limb_format, so that no
pass over the keys has to find the maximum first.
"""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from distattn._compat import vary
from distattn.algebra import deterministic_math

# Gauges of rows without a term, and of rows with one that is no number. All others lie between.
EMPTY, POISON = -(2**30), 2**30
# Gauges from here on count float32 numbers, of which there are fewer than whole numbers; the bits of the
# first of them.
_SPARSE, _SPARSE_BITS = 2**23, 0x4B000000


def split(logit: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
    """gauge and factor with exp(logit) = 2^(bits * gauge) * factor.

    Args:
      logit: f32[...]; -inf gives EMPTY and 0, what is no number POISON and 0.
      bits: L.

    Returns:
      int32[...] and f32[...], at most about 2^(bits / 2).
    """
    steps = jnp.where(logit == -jnp.inf, 0.0, logit) * np.float32(1 / _step(bits))
    steps = lax.round(steps, lax.RoundingMethod.TO_NEAREST_EVEN)
    rest = logit
    for part in _multiples(steps, bits):
        rest = rest - part
    factor = jnp.where(jnp.abs(steps) >= 2**24, 1.0, deterministic_math.exp(rest))
    sparse = lax.bitcast_convert_type(jnp.abs(steps), jnp.int32) - _SPARSE_BITS + _SPARSE
    near = jnp.abs(steps) < _SPARSE
    far = jnp.where(steps < 0, -sparse, sparse)
    gauge = jnp.where(near, jnp.where(near, steps, 0.0).astype(jnp.int32), far)
    empty, number = logit == -jnp.inf, logit < jnp.inf
    gauge = jnp.where(empty, EMPTY, jnp.where(number, gauge, POISON))
    return gauge, jnp.where(empty | ~number, 0.0, factor)


def log(gauge: jax.Array, factor: jax.Array, bits: int) -> jax.Array:
    """The logarithm of 2^(bits * gauge) * factor, f32, natural; the factor is a positive normal number."""
    near = jnp.abs(gauge) < _SPARSE
    far = lax.bitcast_convert_type(jnp.abs(gauge) - _SPARSE + _SPARSE_BITS, jnp.float32)
    steps = jnp.where(near, gauge.astype(jnp.float32), jnp.where(gauge < 0, -far, far))
    result = deterministic_math.log(factor)
    for part in reversed(_multiples(steps, bits)):
        result = result + part
    return result


def _step(bits: int) -> float:
    return bits * math.log(2)


def _multiples(steps: jax.Array, bits: int) -> list[jax.Array]:
    """Exact f32 numbers, the largest first, that sum up to steps * bits * ln 2, for |steps| < 2^24."""
    high = jnp.trunc(steps * np.float32(2.0**-12)) * np.float32(2.0**12)
    limbs = high, steps - high
    rest, products = _step(bits), []
    for _ in range(3):
        # Of 12 bits, as both limbs are: the product has 24.
        exponent = math.floor(math.log2(abs(rest))) - 11
        part = round(rest * 2.0**-exponent) * 2.0**exponent
        rest -= part
        products += [limb * np.float32(part) for limb in limbs]
    return products


# Added to a number of up to 2^22 in size, it leaves the nearest whole number in the low bits.
_WHOLE = np.float32(1.5 * 2**23)
_WHOLE_BITS = np.int32(0x4B400000)


@dataclasses.dataclass(frozen=True)
class LimbFormat:
    """How many words a number has, and how many bits apart they are."""

    bits: int
    words: int


def limb_format(terms: int) -> LimbFormat:
    """The limb_format for sums of so many terms; see the derivation above.

    Args:
      terms: n, at most 2^24.

    Raises:
      ValueError: more terms than that.
    """
    if terms > 2**24:
        raise ValueError(
            f"a reproducible sum has at most 2^24 terms, and this one has {terms}; sum parts of it first"
        )
    # By 1.9 times a power of 16, which no length that is a round number comes near: a length that is
    # padded for the devices at hand must not change the limb_format.
    log = next(log for log in range(8, 25, 4) if terms < 1.9 * 2**log)
    bits = 31 - log
    return LimbFormat(bits, 1 + math.ceil((25 + log) / bits))


def scaling(
    largest: jax.Array, steps: jax.Array, factor: jax.Array, least: jax.Array, scale: LimbFormat
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The top of sums, and two factors that bring the numbers of C terms into its units.

    Args:
      largest: f32[C, ...], the largest magnitude in each row; broadcasts to the rows.
      steps: int32[C, ...], as for `quantise`.
      factor: f32[C, ...].
      least: int32[...], below which the top shall not be.
      scale: the limb_format.

    Returns:
      int32[...], and f32[C, ...] twice.
    """
    exponent = deterministic_math.exponent_of(largest)
    # What is below the normal numbers counts as nothing; processors disagree about it.
    none, odd = (exponent < -126) | (steps == EMPTY), (exponent > 127) | (steps >= POISON)
    shift = jnp.clip(exponent, -126, 126)
    exponent = shift + deterministic_math.exponent_of(
        largest * deterministic_math.power_of_two(-shift) * factor
    )
    top = steps + (exponent + 1) // scale.bits
    top = jnp.where(odd, POISON, jnp.where(none, EMPTY, top))
    high = jnp.maximum(top.max(axis=0), least)
    # In two parts, since 2^(L below) alone may be no normal number; that of x with the factor is rounded.
    below = jnp.clip(steps - high[None], -(512 // scale.bits), 512 // scale.bits)
    half = jnp.clip(-shift, -100, 100)
    dead = none | (high == POISON)[None]
    first = jnp.where(dead, 0.0, factor * deterministic_math.power_of_two(half))
    second = jnp.where(dead, 0.0, deterministic_math.power_of_two(scale.bits * below - half))
    return high, first, second


def digits(
    x: jax.Array, first: jax.Array, second: jax.Array, scale: LimbFormat
) -> tuple[jax.Array, ...]:
    """The words of x * first * second, finite, in units of the highest."""
    rest, words = x * first * second, []
    for _ in range(scale.words):
        # Up to 2^22 in size, a number is rounded to the nearest whole one by adding 1.5 * 2^23, and is in
        # the low bits then: half the time of a conversion, for which XLA asks about all other numbers.
        digit = lax.bitcast_convert_type(rest + _WHOLE, jnp.int32) - _WHOLE_BITS
        words.append(digit)
        rest = (rest - digit.astype(jnp.float32)) * np.float32(2.0**scale.bits)
    return tuple(words)


def moved_down(words: tuple[jax.Array, ...], steps: jax.Array) -> tuple[jax.Array, ...]:
    """The words of sums whose top rises by so many steps, int32 that broadcasts to them."""
    moved = []
    for place, word in enumerate(words):
        for step in range(1, place + 1):
            word = jnp.where(steps == step, words[place - step], word)
        moved.append(jnp.where(steps > place, 0, word))
    return tuple(moved)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FixedPoint:
    """Sums of numbers in fixed point: rows of X numbers that share their units, X the leading dimension."""

    top: jax.Array  # int32[...]
    words: tuple[jax.Array, ...]  # int32[X, ...], the coarsest first
    limb_format: LimbFormat = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FixedPointState:
    """What a `SoftmaxState` is, in fixed point: attention over some of the keys, exact to merge."""

    sum: FixedPoint  # [1, B, N, T]           sum of exp(logit)
    weighted_sum: FixedPoint  # [V, B, N, T]  sum of exp(logit) * value


Sums = TypeVar("Sums")  # FixedPoint, or a pytree of them with the same rows


def zero(
    shape: tuple[int, ...], scale: LimbFormat, axes: frozenset[str] = frozenset()
) -> FixedPoint:
    """The sums of nothing, [X, ...], typed as varying over the axes: the unit of `merge`."""
    top = vary(jnp.full(shape[1:], EMPTY, jnp.int32), axes)
    return FixedPoint(top, (vary(jnp.zeros(shape, jnp.int32), axes),) * scale.words, scale)


def quantise(
    x: jax.Array,
    scale: LimbFormat,
    steps: jax.Array | None = None,
    factor: jax.Array | None = None,
) -> FixedPoint:
    """x * factor * 2^(L steps) in fixed point.

    Args:
      x: f32[X, ...].
      scale: the limb_format.
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
    scale, rows = onto.limb_format, (x.shape[0], *x.shape[2:])
    steps = jnp.zeros(rows, jnp.int32) if steps is None else steps
    factor = jnp.ones(rows, jnp.float32) if factor is None else factor

    def scale_rows(
        x: jax.Array, steps: jax.Array, factor: jax.Array, top: jax.Array
    ) -> tuple[Any, ...]:
        return scaling(jnp.abs(x).max(axis=1, initial=0.0), steps, factor, top, scale)

    high, first, second = deterministic_math.fusion_barrier(scale_rows, x, steps, factor, onto.top)
    words = raised(onto, high).words
    # One by one, so that each word is one loop over the sums; XLA:CPU vectorises that, and no reduction.
    for i in range(x.shape[0]):
        more = digits(x[i], first[i][None], second[i][None], scale)
        words = tuple(map(operator.add, words, more))
    return FixedPoint(high, words, scale)


def raised(x: FixedPoint, top: jax.Array) -> FixedPoint:
    """The same sums with a top, int32 that broadcasts to theirs, not below it: the words move down."""
    return FixedPoint(top, moved_down(x.words, (top - x.top)[None]), x.limb_format)


def merge(a: Sums, b: Sums) -> Sums:
    """The sums of the terms of both: exactly associative and commutative, with `zero` as its unit.

    Args:
      a: FixedPoint [X, ...], FixedPointState, or a pytree of FixedPoint.
      b: the same, of the same shapes and on the same limb_format.

    Raises:
      ValueError: other limb formats.
    """

    def pair(a: FixedPoint, b: FixedPoint) -> FixedPoint:
        if a.limb_format != b.limb_format:
            raise ValueError(
                f"a is on {a.limb_format} and b on {b.limb_format}; sums merge on one limb_format: make it, with "
                "`limb_format`, for as many terms as they have together"
            )
        top = jnp.maximum(a.top, b.top)
        a, b = raised(a, top), raised(b, top)
        words = tuple(x + y for x, y in zip(a.words, b.words, strict=True))
        return FixedPoint(top, words, a.limb_format)

    return map_sums(pair, a, b)


def merge_axes(x: Sums, axes: int | Sequence[int], *, keepdims: bool = False) -> Sums:
    """All the sums along some dimensions of the rows, merged at once."""
    axes = (axes,) if isinstance(axes, int) else tuple(axes)

    def merged(x: FixedPoint) -> FixedPoint:
        top = x.top.max(axis=axes, keepdims=True)
        words = raised(x, top).words
        inner = [axis + 1 for axis in axes]
        words = tuple(word.sum(axis=inner, keepdims=keepdims) for word in words)
        return FixedPoint(top if keepdims else jnp.squeeze(top, axes), words, x.limb_format)

    return map_sums(merged, x)


def mantissa(x: FixedPoint) -> jax.Array:
    """f32[X, ...]: the sums divided by 2^(L top), rounded once and a little."""
    total = jnp.zeros(x.words[0].shape, jnp.float32)
    for place, word in reversed(list(enumerate(x.words))):
        # A product with a power of two is exact.
        total = word.astype(jnp.float32) * np.float32(2.0 ** (-x.limb_format.bits * place)) + total
    return jnp.where((x.top >= POISON)[None], jnp.nan, total)


def value(x: FixedPoint) -> jax.Array:
    """f32[X, ...]: the sums as numbers."""
    bound = 512 // x.limb_format.bits
    steps = jnp.clip(x.top, -bound, bound)
    return deterministic_math.scaled(mantissa(x), (x.limb_format.bits * steps)[None])


def finalize(state: FixedPointState, sinks: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Divide once: as `state.finalize`.

    Args:
      state: sums over all keys.
      sinks: f32[N], one extra logit a head whose value is zero.

    Returns:
      out f32[B, T, N, V] and lse f32[B, T, N], natural log; 0 and -inf for a row over no keys, 0 and the
      sink where there is one, and NaN for a row with a term that is no number.
    """
    total, scale = state.sum, state.sum.limb_format
    if sinks is not None:
        steps, factor = split(sinks.astype(jnp.float32)[:, None], scale.bits)
        steps, factor = (jnp.broadcast_to(x, total.top.shape) for x in (steps, factor))
        total = merge(total, quantise(jnp.ones_like(factor)[None], scale, steps, factor))
    out, lse = deterministic_math.fusion_barrier(_divide, total, state.weighted_sum)
    return out.transpose(1, 3, 2, 0), lse.swapaxes(1, 2)


def _divide(total: FixedPoint, weighted: FixedPoint) -> tuple[jax.Array, jax.Array]:
    """out f32[V, B, N, T] and lse f32[B, N, T]."""
    bits = total.limb_format.bits
    empty, odd = total.top == EMPTY, total.top >= POISON
    divisor = jnp.where(empty, 1.0, mantissa(total)[0])
    steps = jnp.clip(weighted.top - total.top, -(512 // bits), 512 // bits)
    out = deterministic_math.scaled(mantissa(weighted) / divisor[None], (bits * steps)[None])
    lse = log(total.top, divisor, bits)
    lse = jnp.where(empty, -jnp.inf, jnp.where(odd, jnp.nan, lse))
    odd = odd | (weighted.top >= POISON)
    return jnp.where(empty[None], 0.0, jnp.where(odd[None], jnp.nan, out)), lse


def map_sums(f: Callable[..., Any], *trees: Any) -> Any:
    """f of each FixedPoint of the trees, in the same structure."""
    return jax.tree.map(f, *trees, is_leaf=is_sums)


def is_sums(x: Any) -> bool:
    """Whether a node of a tree is one FixedPoint: where `map_sums` stops."""
    return isinstance(x, FixedPoint)
