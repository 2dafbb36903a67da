"""Elementwise functions that round identically on every compilation.

A compiler's own exp may be one polynomial in a vector loop and another in its remainder, and may fuse a
product with the sum that follows (FMA) or round it first. Here every product that meets a sum is exact,
or is in one chain with it that is always or never fused. Errors are below 2 units in the last place over
the range that attention uses.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from distattn._compat import vary, varying_axes

# ln 2 as a sum of numbers with few bits: small integers times these are exact.
_LN2 = (0.693359375, -0.00021219253540039062, -1.9044819055125117e-09)
_LOWEST_EXPONENT, _HIGHEST_EXPONENT = -126, 127
# Coefficients of Moshier's Cephes library (single precision).
_EXP = (1.9875691e-4, 1.3981999e-3, 8.3334519e-3, 4.1665796e-2, 1.6666667e-1, 5.0000001e-1)
_TANH = (-5.7049822e-3, 2.0639054e-2, -5.3739750e-2, 1.3331444e-1, -3.3333282e-1)
_LOG = (
    7.0376836e-2,
    -1.1514610e-1,
    1.1676999e-1,
    -1.2420141e-1,
    1.4249323e-1,
    -1.6668058e-1,
    2.0000715e-1,
    -2.4999994e-1,
    3.3333331e-1,
)


def exp(x: jax.Array) -> jax.Array:
    """Return the exponential, f32; 0 below -87, where results are not normal numbers."""
    clipped = jnp.clip(x, -87.0, 88.0)
    power = lax.round(clipped * np.float32(1.4426950), lax.RoundingMethod.TO_NEAREST_EVEN)
    rest = clipped
    for part in _LN2:
        rest = rest - power * np.float32(part)
    result = _polynomial(_EXP, rest) * (rest * rest) + rest + 1.0
    return jnp.where(x < -87.0, 0.0, result * power_of_two(power.astype(jnp.int32)))


def sigmoid(x: jax.Array) -> jax.Array:
    """Return 1 / (1 + exp(-x)), f32."""
    return 1.0 / (1.0 + exp(-x))


def log(x: jax.Array) -> jax.Array:
    """Return the natural logarithm of normal positive numbers, f32."""
    bits = lax.bitcast_convert_type(x, jnp.int32)
    # The mantissa in [sqrt(1/2), sqrt(2)), so that the rest is small on both sides of 1.
    exponent = (bits - 0x3F3504F3) >> 23
    rest = lax.bitcast_convert_type(bits - (exponent << 23), jnp.float32) - 1.0
    power = exponent.astype(jnp.float32)
    square = rest * rest
    # Half of a float is exact, so it does not matter which of the two terms is rounded.
    result = prevent_fma((rest * square) * _polynomial(_LOG, rest)) - 0.5 * square
    for part in reversed(_LN2[1:]):
        result = result + power * np.float32(part)
    return rest + result + power * np.float32(_LN2[0])


def tanh(x: jax.Array) -> jax.Array:
    """Return the hyperbolic tangent, f32."""
    size = jnp.minimum(jnp.abs(x), 10.0)  # the result is 1 from there
    square = size * size
    near = size + prevent_fma(size * square) * _polynomial(_TANH, square)
    far = 1.0 - 2.0 / (exp(2.0 * size) + 1.0)
    return jnp.sign(x) * jnp.where(size < 0.625, near, far)


def exponent_of(x: jax.Array) -> jax.Array:
    """Return int32 e with 2^e <= |x| < 2^(e + 1); -127 below normal numbers, 128 for NaN and infinity."""
    return (lax.bitcast_convert_type(jnp.abs(x), jnp.int32) >> 23) - 127


def power_of_two(exponent: jax.Array) -> jax.Array:
    """Return 2^exponent, f32, exact; 0 below the normal numbers, the highest power above them."""
    clipped = jnp.clip(exponent, _LOWEST_EXPONENT, _HIGHEST_EXPONENT)
    power = lax.bitcast_convert_type((clipped + 127) << 23, jnp.float32)
    return jnp.where(exponent < _LOWEST_EXPONENT, 0.0, power)


def scaled(x: jax.Array, exponent: jax.Array) -> jax.Array:
    """Return x * 2^exponent, exact if the result is a normal number, even if 2^exponent is not."""
    half = exponent >> 1
    return (x * power_of_two(half)) * power_of_two(exponent - half)


def prevent_fma(product: jax.Array) -> jax.Array:
    """Return the product, rounded before a sum can be fused with it.

    It passes through a bound that changes nothing, and no compiler moves an operation across the bound.
    If two of these are added, the compiler chooses which one is fused, and may choose differently between
    devices.
    """
    bounded = jnp.maximum(product, jnp.finfo(product.dtype).min)
    return jnp.where(product == -jnp.inf, product, bounded)


def fusion_barrier(f: Callable[..., Any], *arrays: Any) -> Any:
    """Return f(*arrays), computed once and not again in each fusion that uses it.

    It runs under a condition that always holds, which no compiler knows; XLA:CPU drops
    `lax.optimization_barrier` before it fuses operations. Only the time depends on it. If the compiler may
    shard the arrays, the condition would be sent around, and f(*arrays) runs plainly.
    """
    mesh = jax.sharding.get_abstract_mesh()
    sharded = any(mesh.shape[axis] > 1 for axis in set(mesh.axis_names) - set(mesh.manual_axes))
    if sharded:
        return f(*arrays)
    first = next(x for x in jax.tree.leaves(arrays) if x.size and x.dtype.itemsize == 4)
    bits = lax.bitcast_convert_type(first[(0,) * first.ndim], jnp.int32)
    shapes, axes = jax.eval_shape(f, *arrays), varying_axes(*jax.tree.leaves(arrays))

    def always(*arrays: Any) -> Any:
        return jax.tree.map(lambda x: vary(x, axes), f(*arrays))

    def never(*_: Any) -> Any:
        return jax.tree.map(lambda x: vary(jnp.zeros(x.shape, x.dtype), axes), shapes)

    return lax.cond(bits & 1 <= 1, always, never, *arrays)


def ordered_sum(x: jax.Array, axis: int) -> jax.Array:
    """Return the sum over one dimension, by halves: the order does not depend on the other dimensions."""
    while x.shape[axis] > 1:
        half = (x.shape[axis] + 1) // 2
        first, rest = jnp.split(x, [half], axis=axis)
        widths = [(0, half - rest.shape[a] if a == axis % x.ndim else 0) for a in range(x.ndim)]
        x = first + jnp.pad(rest, widths)
    return x.sum(axis=axis)  # one entry, or none


def _polynomial(coefficients: tuple[float, ...], x: jax.Array) -> jax.Array:
    result = jnp.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        result = result * x + np.float32(coefficient)
    return result
