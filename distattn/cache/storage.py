"""How a key or value is stored: as it is, or as 8-bit numbers and a scale for each slot and head."""

import jax
import jax.numpy as jnp


def is_quantised(dtype: jnp.dtype) -> bool:
    """Whether numbers of this dtype need a scale: int8 and the 8-bit floating-point formats."""
    return dtype == jnp.int8 or (jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize == 1)


def quantise(x: jax.Array, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array]:
    """x as numbers of an 8-bit dtype, and their scale.

        scale = max|x| / (the largest number of the dtype),  x ~ numbers * scale

    The error of an item is at most half a step: max|x| / 254 for int8; for float8_e4m3fn 2^-4 of the item
    (or max|x| * 2^-19, where that is more), for float8_e5m2 2^-3 of it. What is not finite becomes NaN.

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


def write(stored: jax.Array, new: jax.Array, index: jax.Array, place: tuple = ()) -> jax.Array:
    """The store with new items at their slots; those whose index is past the end are dropped.

    Args:
      stored: [B, S, ...], or of all layers [L, B, S, ...].
      new: [B, T, ...], or for all layers at once [L, B, T, ...].
      index: int32[B, T].
      place: what stands before rows and slots in an index of the store: (layer,), or (slice(None),).

    Returns:
      As `stored`.
    """
    rows = jnp.arange(index.shape[0], dtype=jnp.int32)[:, None]
    return stored.at[(*place, rows, index)].set(new.astype(stored.dtype), mode="drop")
