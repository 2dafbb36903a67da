"""Checks of what the methods of a cache are given.

Numbers that the host has, Python's and numpy's, are always checked. A `jax.Array` is only where the call
waits for the devices anyway, or where it is an edit of whole rows: to read it is to wait for all that it
is computed from. A tracer has no numbers. What is not checked has a meaning that harms no other row; the
docstrings say which.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from distattn.local.inputs import integers

INT32 = np.iinfo(np.int32)


def known(x: Any) -> np.ndarray | None:
    """The numbers of x where this process can see them all, else None: under a trace, on other hosts."""
    parts = jax.tree.leaves(x)
    if any(isinstance(part, Tracer) for part in parts):
        return None
    arrays = [part for part in parts if isinstance(part, jax.Array)]
    seen = (
        part.is_fully_addressable or (part.is_fully_replicated and part.addressable_shards)
        for part in arrays
    )
    return np.asarray(x) if all(seen) else None


def on_host(x: Any) -> np.ndarray | None:
    """The numbers of x where no device has to be waited for, Python's and numpy's; else None."""
    return (
        None if any(isinstance(part, jax.Array) for part in jax.tree.leaves(x)) else np.asarray(x)
    )


def check_range(
    name: str, numbers: np.ndarray | None, low: int, high: int | np.ndarray, remedy: str
) -> None:
    """That the numbers of an argument, where they are known, lie in low .. high.

    Args:
      name: of the argument.
      numbers: int of any shape, or None.
      low: the least that there may be.
      high: the largest, of all; or int[B], of each row, for numbers int[B] or int[].
      remedy: what to do.
    """
    if numbers is None:
        return
    wrong = np.argwhere((numbers < low) | (numbers > high))
    if not len(wrong):
        return
    first = tuple(int(i) for i in wrong[0])
    at = first[: numbers.ndim]
    most, row = high, ""
    if isinstance(high, np.ndarray):
        most, row = high[first], f"in row {first[0]} "
    raise ValueError(
        f"{name}{list(at) if at else ''} is {numbers[at]}; {row}it must be {low} .. {most}: {remedy}"
    )


def row_numbers(
    name: str,
    x: ArrayLike,
    batch: int,
    *,
    high: int | np.ndarray = INT32.max,
    remedy: str,
    read: bool = False,
) -> jax.Array:
    """int32[B] from int32[B] or one number for all rows, each in 0 .. high.

    Args:
      name: of the argument.
      x: what was given.
      batch: B.
      high: the largest that there may be, of all or of each row.
      remedy: what to do where one is out of range.
      read: whether the numbers of a `jax.Array` are checked too.
    """
    whole = _integers(name, x)
    if whole.shape not in ((), (batch,)):
        raise ValueError(
            f"{name} has shape {whole.shape}; it must be int32[B] = [{batch}], a number for each row, or "
            "one for all"
        )
    check_range(name, known(x) if read else on_host(x), 0, high, remedy)
    return jnp.broadcast_to(whole, (batch,))


def token_numbers(name: str, x: ArrayLike, batch: int, tokens: int) -> jax.Array:
    """int32[B, T] from int32[T] or int32[B, T]."""
    x = _integers(name, x)
    if x.shape not in ((tokens,), (batch, tokens)):
        raise ValueError(
            f"{name} has shape {x.shape} for B={batch}, T={tokens}; it must be int32[T] or int32[B, T]: "
            "one number for each new token"
        )
    return jnp.broadcast_to(x if x.ndim == 2 else x[None], (batch, tokens))


def up_to_lengths(x: jax.Array, lengths: jax.Array | None) -> jax.Array:
    """int32[B, T] with -1, for no token, from the length int32[B] of each row on; None: as it is."""
    if lengths is None:
        return x
    index = np.arange(x.shape[1], dtype=np.int32)[None]
    return jnp.where(index < lengths[:, None], x, -1)


def row_indices(name: str, x: ArrayLike, batch: int) -> jax.Array:
    """int32[n] from one index of a row or several."""
    indices = jnp.atleast_1d(_integers(name, x))
    if indices.ndim != 1:
        raise ValueError(
            f"{name} has shape {indices.shape}; it must be the index of a row, or int32[n]"
        )
    check_range(name, known(x), 0, batch - 1, f"rows are numbered so (B={batch})")
    return indices


def row_mask(name: str, x: ArrayLike, batch: int) -> jax.Array:
    """bool[B] from bool[B], or from the index of a row or several; of a tracer's, those that are there."""
    mask = _as_array(x)
    if mask.dtype == jnp.bool_:
        if mask.shape != (batch,):
            raise ValueError(
                f"{name} has shape {mask.shape}; a mask of rows must be bool[B] = [{batch}]: or pass "
                "indices"
            )
        return mask
    return (np.arange(batch, dtype=np.int32)[:, None] == row_indices(name, x, batch)[None]).any(
        axis=1
    )


def layer_index(x: ArrayLike | None, layers: int | None) -> jax.Array | None:
    """int32[], or None where there is no dimension of layers, or all of them are meant."""
    if x is None:
        return None
    if layers is None:
        raise ValueError(
            "layer is given, but the cache has no layers; make it with layers=, or pass layer=None"
        )
    index = _integers("layer", x)
    if index.shape:
        raise ValueError(f"layer has shape {index.shape}; it must be one number, int32[]")
    check_range("layer", on_host(x), 0, layers - 1, f"the cache has {layers} layers")
    return index


def _integers(name: str, x: ArrayLike) -> jax.Array:
    """int32 of any shape."""
    return integers(name, _as_array(x))


def _as_array(x: ArrayLike) -> jax.Array:
    """Python's numbers as numpy has them: larger ones than int32 are for the checks of ranges to name."""
    numbers = on_host(x)
    return jnp.asarray(x if numbers is None else numbers)


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
