"""Logits as whole steps of a lattice and a small rest: the exponents of softmax weights, as integers.

exp(logit) overflows; so a weight is kept as 2^(L gauge) times a float32 near 1, where L is the number of
bits between the words of the lattice (`fixed_point`), and `gauge` an int32. What is above about 2^28 in
size has no rest: there a float32 is coarser than a step, and the gauge counts float32 numbers.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from distattn import elementary

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
    factor = jnp.where(jnp.abs(steps) >= 2**24, 1.0, elementary.exp(rest))
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
    result = elementary.log(factor)
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
