"""How a key or value is stored: as it is, or as 8-bit numbers and a scale for each slot and head."""

import jax
import jax.numpy as jnp
from jax import lax

from distattn._compat import platform_of
from distattn.local.tiling import loop


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


def write(stored: jax.Array, new: jax.Array, index: jax.Array, layer: jax.Array | int) -> jax.Array:
    """The store with new items at their slots; those whose index is past the end are dropped.

    Args:
      stored: [L, B, S, ...].
      new: [1, B, T, ...], or for all layers [L, B, T, ...].
      index: int32[B, T].
      layer: int32[], the one that is written; 0 where all are.

    Returns:
      As `stored`.
    """
    new = new.astype(stored.dtype)
    if stored.dtype.itemsize != 2 or platform_of() != "cpu":
        rows = jnp.arange(index.shape[0], dtype=jnp.int32)[:, None]
        layers = slice(None) if new.shape[0] == stored.shape[0] else layer
        new = new if new.shape[0] == stored.shape[0] else new[0]
        return stored.at[layers, rows, index].set(new, mode="drop")

    # XLA:CPU scatters in no 16-bit format, nor reads a slot where it writes one: it would widen, that is
    # copy, the whole store. So one by one, and not at all where the slot is not here.
    tokens, slots = index.shape[1], stored.shape[2]
    width = (0,) * (stored.ndim - 3)

    def put(i: jax.Array | int, stored: jax.Array) -> jax.Array:
        row, token = i // tokens, i % tokens
        slot = index[row, token]
        item = lax.dynamic_slice(
            new, (0, row, token, *width), (*new.shape[:1], 1, 1, *new.shape[3:])
        )
        return lax.cond(
            slot < slots,
            lambda x: lax.dynamic_update_slice(x, item, (layer, row, slot, *width)),
            lambda x: x,
            stored,
        )

    return loop(index.size, put, stored)


def as_integers(x: jax.Array) -> jax.Array:
    """The bits of numbers, as unsigned integers of their size."""
    return lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
