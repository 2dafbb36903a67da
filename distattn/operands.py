"""The boundary: what a caller passes becomes `Operands` and `Scoring`, or an error that says what to do.

Every check is made here, once, from static shapes and dtypes. ValueError is a wrong call;
NotImplementedError is a right call that is not built.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

from distattn.block import Scoring
from distattn.mask import Mask

IMPLEMENTATIONS = ("blocked", "dense")
ACCELERATOR_KERNELS = ("cudnn", "xla", "splash", "pallas_tpu", "pallas_gpu")
Window = int | tuple[int | None, int | None] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Operands:
    """What attention is computed from."""

    query: jax.Array  # [B, T, N, H]
    key: jax.Array  # [B, S, K, H]
    value: jax.Array  # [B, S, K, V]
    bias: jax.Array | None  # [B|1, N|1, T|1, S|1]
    sinks: jax.Array | None  # [N]
    mask: Mask


# The letters of every operand's dimensions; '.' is a width.
DIMENSIONS = {
    "query": "BTN.",
    "key": "BSK.",
    "value": "BSK.",
    "bias": "BNTS",
    "sinks": "N",
    "query_positions": "BT",
    "key_positions": "BS",
    "query_valid": "BT",
    "query_segment_ids": "BT",
    "key_segment_ids": "BS",
    "dense": "BNTS",
}


def map_named(f: Callable[[str, jax.Array], Any], operands: Operands) -> Operands:
    """f(name, array) for each array of the operands, in the same structure."""
    return jax.tree_util.tree_map_with_path(lambda path, x: f(path[-1].name, x), operands)


def make_operands(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None,
    mask: ArrayLike | None,
    *,
    is_causal: bool,
    query_seq_lengths: ArrayLike | None,
    key_value_seq_lengths: ArrayLike | None,
    local_window_size: Window,
    sinks: ArrayLike | None = None,
    query_positions: ArrayLike | None,
    key_positions: ArrayLike | None,
    query_segment_ids: ArrayLike | None,
    key_value_segment_ids: ArrayLike | None,
    query_start: ArrayLike = 0,
    key_start: ArrayLike = 0,
) -> Operands:
    """Check the arguments of a call and bring them into one form; arguments as in the public functions.

    `query_start` and `key_start` are the global indices of the first row and of the first key, where
    the arrays are one device's part of them. Unbatched arrays come out with B = 1.
    """
    query, key, value = _batched(query, key, value)
    batch, queries, heads, _ = query.shape
    keys = key.shape[1]
    window = _window(local_window_size)
    by_position = is_causal or window != (None, None)
    if by_position and key_positions is not None and query_positions is None:
        raise ValueError(
            "query_positions is None, but is_causal or local_window_size compares positions and "
            f"key_positions is given (shape {np.shape(key_positions)}); pass query_positions "
            "(int32[T] or int32[B, T]), the positions that the queries have among the keys'"
        )
    if (query_segment_ids is None) != (key_value_segment_ids is None):
        given, other = "query_segment_ids", "key_value_segment_ids"
        if query_segment_ids is None:
            given, other = other, given
        raise ValueError(f"{given} is given and {other} is None; segments need both, pass {other}")

    rows, slots = (
        jnp.arange(size, dtype=jnp.int32) + start
        for size, start in ((queries, query_start), (keys, key_start))
    )
    query_index = _index("query_positions", query_positions, "T", batch, queries)
    key_index = _index("key_positions", key_positions, "S", batch, keys)
    key_lengths = _lengths("key_value_seq_lengths", key_value_seq_lengths, batch)
    query_lengths = _lengths("query_seq_lengths", query_seq_lengths, batch)
    if key_index is None and (by_position or key_lengths is not None):
        key_index = slots[None]
    if key_lengths is not None:
        key_index = jnp.where(key_index < key_lengths, key_index, -1)
    if by_position and query_index is None:
        query_index = rows[None]
    return Operands(
        query=query,
        key=key,
        value=value,
        bias=_broadcastable("bias", bias, (batch, heads, queries, keys), jnp.floating),
        sinks=_sinks(sinks, heads),
        mask=Mask(
            query_positions=query_index if by_position else None,
            key_positions=key_index,
            query_valid=None if query_lengths is None else rows[None] < query_lengths,
            query_segment_ids=_index("query_segment_ids", query_segment_ids, "T", batch, queries),
            key_segment_ids=_index(
                "key_value_segment_ids", key_value_segment_ids, "S", batch, keys
            ),
            dense=_broadcastable("mask", mask, (batch, heads, queries, keys), jnp.bool_),
            is_causal=bool(is_causal),
            window=window,
        ),
    )


def make_scoring(
    query: ArrayLike,
    scale: float | None,
    logits_soft_cap: float | None,
    precision: jax.lax.PrecisionLike,
) -> Scoring:
    """`Scoring` from the public arguments; the default scale is 1 / sqrt(H)."""
    if scale is None:
        scale = 1.0 / math.sqrt(max(np.shape(query)[-1], 1))
    for name, number in (("scale", scale), ("logits_soft_cap", logits_soft_cap)):
        if isinstance(number, Tracer):
            raise ValueError(
                f"{name} is a traced value; it must be a Python number, a constant of the program. "
                "To learn a scale, multiply query by it and pass scale=1.0"
            )
    if not math.isfinite(scale):
        raise ValueError(f"scale is {scale}; it must be a finite number, or None for 1 / sqrt(H)")
    if logits_soft_cap is not None and not 0 < logits_soft_cap < math.inf:
        raise ValueError(
            f"logits_soft_cap is {logits_soft_cap}; it must be positive and finite, or None for no cap"
        )
    cap = None if logits_soft_cap is None else float(logits_soft_cap)
    return Scoring(float(scale), cap, _hashable(precision))


def check_implementation(implementation: str | None) -> str:
    """The name of an implementation that exists; None stands for 'blocked'."""
    if implementation is None:
        return "blocked"
    if implementation in ACCELERATOR_KERNELS:
        raise NotImplementedError(
            f"implementation={implementation!r} is not built; use None, or one of {IMPLEMENTATIONS}"
        )
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation is {implementation!r}; it must be None or one of {IMPLEMENTATIONS}"
        )
    return implementation


def _batched(*arrays: ArrayLike) -> tuple[jax.Array, jax.Array, jax.Array]:
    query, key, value = (jnp.asarray(x) for x in arrays)
    shapes = f"query {query.shape}, key {key.shape}, value {value.shape}"
    for name, x in (("query", query), ("key", key), ("value", value)):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise ValueError(
                f"{name} has dtype {x.dtype}; it must be floating point, cast it with .astype"
            )
        if x.ndim not in (3, 4) or x.ndim != query.ndim:
            raise ValueError(
                f"{name} has {x.ndim} dimensions; query, key and value must all be "
                "[B, T|S, heads, width], or all be without B; reshape or broadcast it; "
                f"got {shapes}"
            )
    if query.ndim == 3:
        query, key, value = query[None], key[None], value[None]
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
            "each key/value head serves N / K query heads"
        )
    return query, key, value


def _broadcastable(name: str, x: Any, full: tuple[int, ...], kind: Any) -> jax.Array | None:
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


def _integers(name: str, x: ArrayLike) -> jax.Array:
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{name} has dtype {x.dtype}; it must be int32, use .astype(jnp.int32)")
    return x.astype(jnp.int32)


def _index(name: str, x: ArrayLike | None, letter: str, batch: int, size: int) -> jax.Array | None:
    if x is None:
        return None
    x = _integers(name, x)
    if x.shape not in ((size,), (batch, size)):
        of = "query row" if letter == "T" else "key"
        raise ValueError(
            f"{name} has shape {x.shape} for B={batch}, {letter}={size}; it must be "
            f"int32[{letter}] or int32[B, {letter}]: one number for each {of}"
        )
    return x[None] if x.ndim == 1 else x


def _lengths(name: str, x: ArrayLike | None, batch: int) -> jax.Array | None:
    if x is None:
        return None
    x = _integers(name, x)
    if x.shape != (batch,) and not (batch == 1 and x.shape == ()):
        raise ValueError(
            f"{name} has shape {x.shape}; it must be int32[B] = [{batch}]: one length for each row of "
            "the batch"
        )
    return x.reshape(batch, 1)


def _window(window: Window) -> tuple[int | None, int | None]:
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


def _sinks(sinks: ArrayLike | None, heads: int) -> jax.Array | None:
    if sinks is None:
        return None
    sinks = jnp.asarray(sinks)
    if sinks.shape != (heads,) or not jnp.issubdtype(sinks.dtype, jnp.floating):
        raise ValueError(
            f"sinks is {sinks.dtype}{list(sinks.shape)}; it must be float32[N] = [{heads}]: one logit for "
            "each query head"
        )
    return sinks


def _hashable(precision: Any) -> Any:
    return tuple(precision) if isinstance(precision, list) else precision
