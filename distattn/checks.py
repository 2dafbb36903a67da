"""Checks of single arguments at the boundary: each gives the argument in its one form, or a ValueError.

An error names the argument, what it got, what it needs and what to do.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

Window = int | tuple[int | None, int | None] | None


def batched(
    query: ArrayLike, key: ArrayLike, value: ArrayLike, quantised: bool, stacked: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """query, key and value with a batch; `quantised`: keys and values are numbers of any dtype.

    `stacked`: key and value have a leading dimension of layers.
    """
    query, key, value = (jnp.asarray(x) for x in (query, key, value))
    if stacked:  # all layers are alike
        one_key, one_value = (jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in (key, value))
        _check_shapes(query, one_key, one_value, quantised)
        return query, key, value
    for name, x in (("query", query), ("key", key), ("value", value)):
        if x.ndim not in (3, 4) or x.ndim != query.ndim:
            raise ValueError(
                f"{name} has {x.ndim} dimensions; query, key and value must all be "
                "[B, T|S, heads, width], or all be without B; reshape or broadcast it; "
                f"got {_shapes(query, key, value)}"
            )
    if query.ndim == 3:
        query, key, value = query[None], key[None], value[None]
    _check_shapes(query, key, value, quantised)
    return query, key, value


def _check_shapes(query: Any, key: Any, value: Any, quantised: bool) -> None:
    shapes = _shapes(query, key, value)
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not jnp.issubdtype(x.dtype, jnp.floating) and not (quantised and name != "query"):
            raise ValueError(
                f"{name} has dtype {x.dtype}; it must be floating point, cast it with .astype"
            )
    if not query.shape[0] == key.shape[0] == value.shape[0]:
        raise ValueError(
            "query, key and value must have the same batch size B; broadcast them to it; "
            f"got {shapes}"
        )
    if key.shape[1] != value.shape[1]:
        raise ValueError(
            f"key has S={key.shape[1]} and value has S={value.shape[1]}; each key needs one value, "
            "in the same slot (distattn.layouts.align brings separately ordered ones together)"
        )
    if key.shape[2] != value.shape[2]:
        raise ValueError(
            f"key has K={key.shape[2]} heads and value has K={value.shape[2]}; they must be equal"
        )
    if query.shape[3] != key.shape[3]:
        raise ValueError(
            f"query has head dimension H={query.shape[3]} and key has H={key.shape[3]}; "
            "they must be equal (value may differ)"
        )
    heads, kv_heads = query.shape[2], key.shape[2]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(
            f"query has N={heads} heads and key has K={kv_heads}; N must be a multiple of K, "
            "each key/value head serves N / K query heads, and arrays are [B, T, N, H] and [B, S, K, H]: "
            f"{_shapes(query, key, value)}"
        )


def _shapes(query: Any, key: Any, value: Any) -> str:
    return f"query {query.shape}, key {key.shape}, value {value.shape}"


def broadcastable(name: str, x: Any, full: tuple[int, ...], kind: Any) -> jax.Array | None:
    """x with four dimensions, each 1 or that of `full`; `kind` is what its dtype must be."""
    if x is None:
        return None
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, kind):
        remedy = (
            "pass mask != 0, and an additive mask as bias"
            if name == "mask"
            else "cast it with .astype; a boolean mask goes to mask"
        )
        raise ValueError(f"{name} has dtype {x.dtype}; it must be {kind.__name__}; {remedy}")
    shape = (1,) * (4 - x.ndim) + x.shape
    if len(shape) != 4 or any(a not in (1, b) for a, b in zip(shape, full, strict=True)):
        raise ValueError(
            f"{name} has shape {x.shape}; it must broadcast to [B, N, T, S] = {list(full)}: each of its "
            "last dimensions 1 or that size"
        )
    return x.reshape(shape)


def integers(name: str, x: ArrayLike) -> jax.Array:
    """int32 of any shape."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{name} has dtype {x.dtype}; it must be int32, use .astype(jnp.int32)")
    return x.astype(jnp.int32)


def index(name: str, x: ArrayLike | None, letter: str, batch: int, size: int) -> jax.Array | None:
    """int32[B|1, T] or int32[B|1, S], by the letter."""
    if x is None:
        return None
    x = integers(name, x)
    if x.shape not in ((size,), (batch, size)):
        of = "query row" if letter == "T" else "key"
        raise ValueError(
            f"{name} has shape {x.shape} for B={batch}, {letter}={size}; it must be "
            f"int32[{letter}] or int32[B, {letter}]: one number for each {of}"
        )
    return x[None] if x.ndim == 1 else x


def lengths(name: str, x: ArrayLike | None, batch: int) -> jax.Array | None:
    """int32[B, 1] from int32[B]."""
    if x is None:
        return None
    x = integers(name, x)
    if x.shape != (batch,) and not (batch == 1 and x.shape == ()):
        raise ValueError(
            f"{name} has shape {x.shape}; it must be int32[B] = [{batch}]: one length for each row of "
            "the batch"
        )
    return x.reshape(batch, 1)


def window_sides(window: Window) -> tuple[int | None, int | None]:
    """(left, right), None where unbounded."""
    pair = window if isinstance(window, tuple | list) else (window, window)
    sides = [None if side is None or side == -1 else side for side in pair]
    if len(sides) != 2 or any(
        side is not None and (not isinstance(side, int | np.integer) or side < 0) for side in sides
    ):
        raise ValueError(
            f"local_window_size is {window!r}; it must be an int or a pair (left, right) of ints >= 0; "
            "-1 or None leaves a side unbounded"
        )
    left, right = (None if side is None else int(side) for side in sides)
    return left, right


def sink_logits(sinks: ArrayLike | None, heads: int) -> jax.Array | None:
    """[N], one logit a head."""
    if sinks is None:
        return None
    sinks = jnp.asarray(sinks)
    if sinks.shape != (heads,) or not jnp.issubdtype(sinks.dtype, jnp.floating):
        raise ValueError(
            f"sinks is {sinks.dtype}{list(sinks.shape)}; it must be float32[N] = [{heads}]: one logit for "
            "each query head"
        )
    return sinks


def sum_axes(x: jax.Array, axis: int | tuple[int, ...] | None) -> tuple[int, ...]:
    """The dimensions of x that are summed, counted from the first; x must be floating-point."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"x has dtype {x.dtype}; it must be floating-point: integers have the same sum in any order, "
            "use jnp.sum"
        )
    if x.dtype == jnp.float64:
        raise NotImplementedError(
            "a reproducible sum of float64 is not built; cast x to float32, with x.astype(jnp.float32)"
        )
    axes = range(x.ndim) if axis is None else (axis,) if isinstance(axis, int) else tuple(axis)
    if any(not -x.ndim <= a < x.ndim for a in axes) or len({a % x.ndim for a in axes}) < len(axes):
        raise ValueError(
            f"axis is {axis}, and x has {x.ndim} dimensions; name each of them once, by a number from "
            f"{-x.ndim} to {x.ndim - 1}"
        )
    return tuple(a % x.ndim for a in axes)


def hashable(precision: Any) -> Any:
    """A precision that can be a static argument."""
    return tuple(precision) if isinstance(precision, list) else precision
