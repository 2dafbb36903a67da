"""Sums in fixed point, whose bits do not depend on their order: the second kind of state.

Floating-point addition rounds, so a tree over four devices gives other bits than a tree over five. Integer
addition is associative. A `FixedPoint` holds sums of real numbers in K int32 limbs of L bits. All numbers
of a row share one int32 exponent e, and limb k counts units of 2^(L (e - k)). A number x becomes limbs by

    w_0 = round(x / 2^(L e)),  w_1 = round((x - w_0 2^(L e)) / 2^(L (e - 1))),  ...

to nearest, ties to even. The exponent e is the lowest for which |w_0| <= 2^(L-1) in all of the row. A
limb is a function of x and of its unit alone: under a higher exponent the limbs before it are 0. So
`merge` takes the higher exponent, drops the limbs below its lowest unit, and adds integers. It rounds
nothing, it is exactly associative and commutative, and it has an exact identity (exponent -2^30, limbs
0).

Error: a number loses less than half of its lowest unit, 2^(L (e - K + 1)). The exponent of a sum is the
exponent of its largest term A, and 2^(L e - 1) < A. So n terms are in error by less than n 2^(-L (K - 1))
A. A limb is at most 2^(L-1), so n terms do not overflow while n 2^(L-1) < 2^31. `limb_format` takes L =
31 - log2 n and the fewest limbs whose error stays below 2^-24 A: half a unit in the last place of a
float32, the price of one conversion. The format changes at 1.9 times the powers of 16, which padding does
not cross.

Softmax weights have a second scale. The terms of a state are blocks of keys, and each block has a maximum
of its own. exp(maximum) overflows, so `scaled_exp` gives it as 2^(L e) r with an int32 e and a float32 r
near 1. The sums of the block are multiplied by r, rounded once, and enter with the exponent e. Above
about 2^28 a float32 is coarser than a step of L ln 2; there e counts float32 numbers, and r is 1.

A row with an infinite or NaN term becomes NaN, and so does each row that it is merged into.

Reference: Demmel & Nguyen, "Parallel Reproducible Summation", IEEE Trans. Computers 64(7), 2015, sum in
floating-point bins of this kind. Two things differ: 1. bins are integers, and the merge is exact, carries
included; 2. softmax weights bring an exponent, so no pass over the keys has to find the maximum first.
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

# Exponents of rows without a term, and of rows with a NaN. All others are between.
EMPTY, POISON = -(2**30), 2**30
# From this exponent on, exponents count float32 numbers, which are sparser than integers there; and the
# bits of the first such float32.
_SPARSE, _SPARSE_BITS = 2**23, 0x4B000000
# Added to a number of up to 2^22 in size, it leaves the nearest integer in the low bits.
_ROUNDER = np.float32(1.5 * 2**23)
_ROUNDER_BITS = np.int32(0x4B400000)


@dataclasses.dataclass(frozen=True)
class LimbFormat:
    """The limbs of a number in fixed point."""

    bits: int  # L, bits from one limb to the next
    count: int  # K


def limb_format(terms: int) -> LimbFormat:
    """Return the format for sums of up to `terms` terms; see the derivation above.

    Raises:
      ValueError: more than 2^24 terms.
    """
    if terms > 2**24:
        raise ValueError(
            f"a reproducible sum has at most 2^24 terms, and this one has {terms}; sum parts of it first"
        )
    # No round length is near 1.9 times a power of 16, so padding for the devices does not change the
    # format.
    log_terms = next(log for log in range(8, 25, 4) if terms < 1.9 * 2**log)
    bits = 31 - log_terms
    return LimbFormat(bits, 1 + math.ceil((25 + log_terms) / bits))


def scaled_exp(logit: jax.Array, bits: int) -> tuple[jax.Array, jax.Array]:
    """Return exponent and factor with exp(logit) = 2^(bits * exponent) * factor.

    Args:
      logit: f32[...]; -inf gives EMPTY and 0, NaN and +inf give POISON and 0.
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
    exponent = jnp.where(near, jnp.where(near, steps, 0.0).astype(jnp.int32), far)
    empty, number = logit == -jnp.inf, logit < jnp.inf
    exponent = jnp.where(empty, EMPTY, jnp.where(number, exponent, POISON))
    return exponent, jnp.where(empty | ~number, 0.0, factor)


def scaled_log(exponent: jax.Array, factor: jax.Array, bits: int) -> jax.Array:
    """Return the natural logarithm of 2^(bits * exponent) * factor, a positive normal f32."""
    near = jnp.abs(exponent) < _SPARSE
    far = lax.bitcast_convert_type(jnp.abs(exponent) - _SPARSE + _SPARSE_BITS, jnp.float32)
    steps = jnp.where(near, exponent.astype(jnp.float32), jnp.where(exponent < 0, -far, far))
    result = deterministic_math.log(factor)
    for part in reversed(_multiples(steps, bits)):
        result = result + part
    return result


def _step(bits: int) -> float:
    return bits * math.log(2)


def _multiples(steps: jax.Array, bits: int) -> list[jax.Array]:
    """Return exact f32 summands of steps * bits * ln 2, largest first, for |steps| < 2^24."""
    high = jnp.trunc(steps * np.float32(2.0**-12)) * np.float32(2.0**12)
    halves = high, steps - high
    rest, products = _step(bits), []
    for _ in range(3):
        # 12 bits, like both halves: the product has 24.
        exponent = math.floor(math.log2(abs(rest))) - 11
        part = round(rest * 2.0**-exponent) * 2.0**exponent
        rest -= part
        products += [half * np.float32(part) for half in halves]
    return products


def row_scaling(
    largest: jax.Array, exponent: jax.Array, factor: jax.Array, least: jax.Array, form: LimbFormat
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return the exponent of sums, and two factors that bring the numbers of C terms into its units.

    Args:
      largest: f32[C, ...], the largest magnitude in each row; broadcasts to the rows.
      exponent: int32[C, ...], as for `quantise`.
      factor: f32[C, ...].
      least: int32[...], the lowest exponent to return.
      form: the format of the sums.

    Returns:
      int32[...], and f32[C, ...] twice.
    """
    magnitude = deterministic_math.exponent_of(largest)
    # Numbers below the normal ones count as 0; processors disagree about them.
    none, odd = (magnitude < -126) | (exponent == EMPTY), (magnitude > 127) | (exponent >= POISON)
    shift = jnp.clip(magnitude, -126, 126)
    magnitude = shift + deterministic_math.exponent_of(
        largest * deterministic_math.power_of_two(-shift) * factor
    )
    needed = exponent + (magnitude + 1) // form.bits
    needed = jnp.where(odd, POISON, jnp.where(none, EMPTY, needed))
    high = jnp.maximum(needed.max(axis=0), least)
    # Two factors, since 2^(L below) alone may not be a normal number. Only the first product is rounded.
    below = jnp.clip(exponent - high[None], -(512 // form.bits), 512 // form.bits)
    half = jnp.clip(-shift, -100, 100)
    dead = none | (high == POISON)[None]
    first = jnp.where(dead, 0.0, factor * deterministic_math.power_of_two(half))
    second = jnp.where(dead, 0.0, deterministic_math.power_of_two(form.bits * below - half))
    return high, first, second


def to_limbs(
    x: jax.Array, first: jax.Array, second: jax.Array, form: LimbFormat
) -> tuple[jax.Array, ...]:
    """Return the limbs of x * first * second, finite numbers in units of the highest limb."""
    rest, limbs = x * first * second, []
    for _ in range(form.count):
        # Adding 1.5 * 2^23 rounds a number of up to 2^22 to an integer in the low bits. This takes half the
        # time of a conversion, for which XLA handles all other numbers too.
        limb = lax.bitcast_convert_type(rest + _ROUNDER, jnp.int32) - _ROUNDER_BITS
        limbs.append(limb)
        rest = (rest - limb.astype(jnp.float32)) * np.float32(2.0**form.bits)
    return tuple(limbs)


def shift_limbs(limbs: tuple[jax.Array, ...], steps: jax.Array) -> tuple[jax.Array, ...]:
    """Return the limbs of sums whose exponent rises by `steps`, int32 that broadcasts to them."""
    shifted = []
    for place, limb in enumerate(limbs):
        for step in range(1, place + 1):
            limb = jnp.where(steps == step, limbs[place - step], limb)
        shifted.append(jnp.where(steps > place, 0, limb))
    return tuple(shifted)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FixedPoint:
    """Sums in fixed point: rows of X numbers that share an exponent; X is the leading dimension."""

    exponent: jax.Array  # int32[...]
    limbs: tuple[jax.Array, ...]  # int32[X, ...], the coarsest first
    limb_format: LimbFormat = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FixedPointState:
    """A `SoftmaxState` in fixed point: attention over some of the keys, exact to merge."""

    sum: FixedPoint  # [1, B, N, T]           sum of exp(logit)
    weighted_sum: FixedPoint  # [V, B, N, T]  sum of exp(logit) * value


Sums = TypeVar("Sums")  # FixedPoint, or a pytree of them with the same rows


def zero(
    shape: tuple[int, ...], form: LimbFormat, axes: frozenset[str] = frozenset()
) -> FixedPoint:
    """Return sums over no terms, [X, ...], typed as varying over the axes: the identity of `merge`."""
    exponent = vary(jnp.full(shape[1:], EMPTY, jnp.int32), axes)
    return FixedPoint(exponent, (vary(jnp.zeros(shape, jnp.int32), axes),) * form.count, form)


def quantise(
    x: jax.Array,
    form: LimbFormat,
    exponent: jax.Array | None = None,
    factor: jax.Array | None = None,
) -> FixedPoint:
    """Return x * factor * 2^(L exponent) in fixed point.

    Args:
      x: f32[X, ...].
      form: the format.
      exponent: int32[...], one per row, as `scaled_exp` returns it; None: 0.
      factor: f32[...], positive; the product is rounded once, and must neither overflow nor vanish.
    """
    exponent = jnp.zeros(x.shape[1:], jnp.int32) if exponent is None else exponent
    factor = jnp.ones(x.shape[1:], jnp.float32) if factor is None else factor
    least = jnp.full_like(exponent, EMPTY)
    largest = jnp.abs(x).max(axis=0, initial=0.0)
    high, first, second = row_scaling(largest[None], exponent[None], factor[None], least, form)
    return FixedPoint(high, to_limbs(x, first, second, form), form)


def accumulate(
    onto: FixedPoint,
    x: jax.Array,
    exponent: jax.Array | None = None,
    factor: jax.Array | None = None,
) -> FixedPoint:
    """Add C terms x * factor * 2^(L exponent) to the sums, as one `merge` of a `quantise` after another.

    Args:
      onto: [X, ...].
      x: f32[C, X, ...].
      exponent: int32[C, ...] or None, as for `quantise`.
      factor: f32[C, ...] or None.
    """
    form, rows = onto.limb_format, (x.shape[0], *x.shape[2:])
    exponent = jnp.zeros(rows, jnp.int32) if exponent is None else exponent
    factor = jnp.ones(rows, jnp.float32) if factor is None else factor

    def scale_rows(
        x: jax.Array, exponent: jax.Array, factor: jax.Array, least: jax.Array
    ) -> tuple[Any, ...]:
        return row_scaling(jnp.abs(x).max(axis=1, initial=0.0), exponent, factor, least, form)

    high, first, second = deterministic_math.fusion_barrier(
        scale_rows, x, exponent, factor, onto.exponent
    )
    limbs = with_exponent(onto, high).limbs
    # Term by term, so that each limb is one loop over the sums. XLA:CPU vectorises a loop, and no
    # reduction.
    for i in range(x.shape[0]):
        more = to_limbs(x[i], first[i][None], second[i][None], form)
        limbs = tuple(map(operator.add, limbs, more))
    return FixedPoint(high, limbs, form)


def with_exponent(x: FixedPoint, exponent: jax.Array) -> FixedPoint:
    """Return the sums with another exponent, not below their own, that broadcasts to it."""
    return FixedPoint(exponent, shift_limbs(x.limbs, (exponent - x.exponent)[None]), x.limb_format)


def merge(a: Sums, b: Sums) -> Sums:
    """Return the sums of the terms of both: exactly associative and commutative, with identity `zero`.

    Args:
      a: FixedPoint [X, ...], FixedPointState, or a pytree of FixedPoint.
      b: of the same shapes and limb format.

    Raises:
      ValueError: different limb formats.
    """

    def pair(a: FixedPoint, b: FixedPoint) -> FixedPoint:
        if a.limb_format != b.limb_format:
            raise ValueError(
                f"a has {a.limb_format} and b has {b.limb_format}; sums merge in one format: make it, with "
                "`limb_format`, for as many terms as they have together"
            )
        exponent = jnp.maximum(a.exponent, b.exponent)
        a, b = with_exponent(a, exponent), with_exponent(b, exponent)
        return FixedPoint(exponent, tuple(map(operator.add, a.limbs, b.limbs)), a.limb_format)

    return map_sums(pair, a, b)


def merge_axes(x: Sums, axes: int | Sequence[int], *, keepdims: bool = False) -> Sums:
    """Merge all sums along dimensions of the rows."""
    axes = (axes,) if isinstance(axes, int) else tuple(axes)

    def merged(x: FixedPoint) -> FixedPoint:
        exponent = x.exponent.max(axis=axes, keepdims=True)
        limbs = with_exponent(x, exponent).limbs
        inner = [axis + 1 for axis in axes]
        limbs = tuple(limb.sum(axis=inner, keepdims=keepdims) for limb in limbs)
        exponent = exponent if keepdims else jnp.squeeze(exponent, axes)
        return FixedPoint(exponent, limbs, x.limb_format)

    return map_sums(merged, x)


def mantissa(x: FixedPoint) -> jax.Array:
    """Return the sums divided by 2^(L exponent), f32[X, ...], rounded about once."""
    total = jnp.zeros(x.limbs[0].shape, jnp.float32)
    for place, limb in reversed(list(enumerate(x.limbs))):
        # A product with a power of two is exact.
        total = limb.astype(jnp.float32) * np.float32(2.0 ** (-x.limb_format.bits * place)) + total
    return jnp.where((x.exponent >= POISON)[None], jnp.nan, total)


def value(x: FixedPoint) -> jax.Array:
    """Return the sums as floating-point numbers, f32[X, ...]."""
    bound = 512 // x.limb_format.bits
    exponent = jnp.clip(x.exponent, -bound, bound)
    return deterministic_math.scaled(mantissa(x), (x.limb_format.bits * exponent)[None])


def finalize(state: FixedPointState, sinks: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Divide once, as `softmax_state.finalize`.

    Args:
      state: sums over all keys.
      sinks: f32[N], one more logit per head with value 0.

    Returns:
      out f32[B, T, N, V] and lse f32[B, T, N], natural log. A row over no keys gives 0 and -inf, or 0 and
      the sink; a row with an infinite or NaN term gives NaN.
    """
    total, form = state.sum, state.sum.limb_format
    if sinks is not None:
        exponent, factor = scaled_exp(sinks.astype(jnp.float32)[:, None], form.bits)
        exponent, factor = (jnp.broadcast_to(x, total.exponent.shape) for x in (exponent, factor))
        total = merge(total, quantise(jnp.ones_like(factor)[None], form, exponent, factor))
    out, lse = deterministic_math.fusion_barrier(_divide, total, state.weighted_sum)
    return out.transpose(1, 3, 2, 0), lse.swapaxes(1, 2)


def _divide(total: FixedPoint, weighted: FixedPoint) -> tuple[jax.Array, jax.Array]:
    """Return out f32[V, B, N, T] and lse f32[B, N, T]."""
    bits = total.limb_format.bits
    empty, odd = total.exponent == EMPTY, total.exponent >= POISON
    divisor = jnp.where(empty, 1.0, mantissa(total)[0])
    steps = jnp.clip(weighted.exponent - total.exponent, -(512 // bits), 512 // bits)
    out = deterministic_math.scaled(mantissa(weighted) / divisor[None], (bits * steps)[None])
    lse = scaled_log(total.exponent, divisor, bits)
    lse = jnp.where(empty, -jnp.inf, jnp.where(odd, jnp.nan, lse))
    odd = odd | (weighted.exponent >= POISON)
    return jnp.where(empty[None], 0.0, jnp.where(odd[None], jnp.nan, out)), lse


def map_sums(f: Callable[..., Any], *trees: Any) -> Any:
    """Return f of each FixedPoint of the trees, in their structure."""
    return jax.tree.map(f, *trees, is_leaf=is_sums)


def is_sums(x: Any) -> bool:
    """Return whether a node of a tree is one FixedPoint, at which `map_sums` stops."""
    return isinstance(x, FixedPoint)
