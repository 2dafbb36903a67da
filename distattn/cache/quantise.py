"""8-bit storage of keys and values, with a float32 scale for each slot and head."""

import jax
import jax.numpy as jnp

from distattn.cache.layout import Arrays


def is_quantised(dtype: jnp.dtype) -> bool:
    """Return True if the dtype needs a scale: int8 and the 8-bit floating-point dtypes."""
    return dtype == jnp.int8 or (jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize == 1)


def as_stored(key: jax.Array, value: jax.Array, dtype: jnp.dtype) -> Arrays:
    """Return new keys and values as a cache of this dtype stores them, by the names of its arrays."""
    if not is_quantised(dtype):
        return {"key": key, "value": value}
    (key, key_scale), (value, value_scale) = quantise(key, dtype), quantise(value, dtype)
    return {"key": key, "value": value, "key_scale": key_scale, "value_scale": value_scale}


def quantise(x: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """Return x in an 8-bit dtype, and its scale.

        scale = max|x| / (the largest number of the dtype),  x ~ numbers * scale

    The error of an item is at most half a step: max|x| / 254 for int8; for float8_e4m3fn 2^-4 of the item
    (or max|x| * 2^-19, if that is more), for float8_e5m2 2^-3 of it. Infinities become NaN.

    Args:
      x: [..., H].
      dtype: int8 or an 8-bit floating-point dtype.

    Returns:
      numbers [..., H] and scale f32[...].
    """
    integer = jnp.issubdtype(dtype, jnp.integer)
    largest = float(jnp.iinfo(dtype).max if integer else jnp.finfo(dtype).max)
    x = x.astype(jnp.float32)
    scale = jnp.abs(x).max(axis=-1) / largest
    numbers = x / jnp.where(scale == 0, 1.0, scale)[..., None]
    if integer:
        numbers = jnp.round(numbers)
    # A quotient may round up past the largest number, which has no neighbour above it in the dtype.
    return jnp.clip(numbers, -largest, largest).astype(dtype), scale
