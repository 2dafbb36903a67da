"""Checks of what the methods of a cache are given."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from distattn.checks import integers


def known(x: Any) -> np.ndarray | None:
    """The numbers of x where this process can see them all, else None: under a trace, on other hosts."""
    if isinstance(x, Tracer):
        return None
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        return None
    return np.asarray(x)


def row_numbers(name: str, x: ArrayLike, batch: int) -> jax.Array:
    """int32[B] from int32[B] or one number for all rows."""
    x = integers(name, x)
    if x.shape not in ((), (batch,)):
        raise ValueError(
            f"{name} has shape {x.shape}; it must be int32[B] = [{batch}], a number for each row, or one "
            "for all"
        )
    return jnp.broadcast_to(x, (batch,))


def token_numbers(name: str, x: ArrayLike, batch: int, tokens: int) -> jax.Array:
    """int32[B, T] from int32[T] or int32[B, T]."""
    x = integers(name, x)
    if x.shape not in ((tokens,), (batch, tokens)):
        raise ValueError(
            f"{name} has shape {x.shape} for B={batch}, T={tokens}; it must be int32[T] or int32[B, T]: "
            "one number for each new token"
        )
    return jnp.broadcast_to(x if x.ndim == 2 else x[None], (batch, tokens))


def up_to_lengths(x: jax.Array, lengths: ArrayLike | None) -> jax.Array:
    """int32[B, T] with -1, for no token, from the length of each row on; lengths None: as it is."""
    if lengths is None:
        return x
    batch, tokens = x.shape
    index = np.arange(tokens, dtype=np.int32)[None]
    return jnp.where(index < row_numbers("lengths", lengths, batch)[:, None], x, -1)


def row_indices(name: str, x: ArrayLike, batch: int) -> jax.Array:
    """int32[n] from one index of a row or several."""
    x = jnp.atleast_1d(integers(name, x))
    if x.ndim != 1:
        raise ValueError(f"{name} has shape {x.shape}; it must be the index of a row, or int32[n]")
    numbers = known(x)
    if numbers is not None and ((numbers < 0) | (numbers >= batch)).any():
        raise ValueError(
            f"{name} is {numbers.tolist()}; rows are numbered 0 .. {batch - 1} (B={batch})"
        )
    return x


def row_mask(name: str, x: ArrayLike, batch: int) -> jax.Array:
    """bool[B] from bool[B], or from the index of a row or several."""
    x = jnp.asarray(x)
    if x.dtype == jnp.bool_:
        if x.shape != (batch,):
            raise ValueError(
                f"{name} has shape {x.shape}; a mask of rows must be bool[B] = [{batch}]: or pass indices"
            )
        return x
    return jnp.zeros(batch, bool).at[row_indices(name, x, batch)].set(True, mode="drop")


def check_new(
    name: str, x: Any, batch: int, tokens: int, heads: int, width: int, layers: int | None
) -> None:
    """That new keys or values are [B, T, K, H], with a leading dimension where all layers are meant."""
    wanted = (
        (batch, tokens, heads, width) if layers is None else (layers, batch, tokens, heads, width)
    )
    letters = "[B, T, K, .]" if layers is None else "[L, B, T, K, .]"
    if tuple(x.shape) != wanted:
        hint = (
            "" if layers is None else "; to write one layer, reserve slots and pass layer to write"
        )
        raise ValueError(
            f"{name} has shape {tuple(x.shape)}; this cache needs {letters} = {list(wanted)}{hint}"
        )
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"{name} has dtype {x.dtype}; it must be floating point, cast it with .astype"
        )
