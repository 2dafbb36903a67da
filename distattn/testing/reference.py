"""Oracle of attention in float64 numpy: one query row at a time, over the keys it attends to.

No blocks, no merging, and a loop where an array would be faster: it is here to be read and believed.
Tests, examples and scripts compare against it, and the library does not import it.

Letters: B batch, T query length, S key length, N query heads, K key/value heads (query head n reads
key/value head n // (N // K)), H head dimension of query and key, V head dimension of value.

`tolerance` says how close is close enough, relative to the largest magnitude of the reference, not to
each element: attention is an average, and if it cancels to nearly 0 the last digits are rounding.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]
Window = int | tuple[int | None, int | None] | None


# NaN and inf are data here: they reach the rows that attend to them without a warning.
@np.errstate(over="ignore", invalid="ignore")
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: Window = None,
    logits_soft_cap: float | None = None,
    sinks: ArrayLike | None = None,
    query_positions: ArrayLike | None = None,
    key_positions: ArrayLike | None = None,
    query_segment_ids: ArrayLike | None = None,
    key_value_segment_ids: ArrayLike | None = None,
) -> tuple[Floats, Floats]:
    """Compute attention and its natural-log sum of exponentials, in float64.

    Over the keys s that row t attends to, logit_s = cap(scale * query_t . key_s + bias_ts), where
    cap(x) = c * tanh(x / c); lse = log(exp(sink) + sum_s exp(logit_s)), and
    out = sum_s exp(logit_s - lse) * value_s. A row with neither key nor sink: out 0, lse -inf.

    Args:
        query: [B, T, N, H] or [T, N, H]; like key and value anything numpy makes float64 of.
        key: [B, S, K, H] or [S, K, H].
        value: [B, S, K, V] or [S, K, V].
        bias: [B|1, N|1, T|1, S|1] or of lower rank and broadcastable to it.
        mask: bool, shapes as for bias; True = attend.
        scale: 1 / sqrt(H) by default.
        is_causal: attend iff key_position <= query_position.
        query_seq_lengths: int[B]; rows t >= length, by index, are empty (lse -inf), sink or not.
        key_value_seq_lengths: int[B]; attend iff key_position < length.
        local_window_size: (left, right), an int for both; attend iff query_position - left <=
            key_position <= query_position + right; -1 or None is unbounded.
        logits_soft_cap: c above; None: cap(x) = x.
        sinks: [N], one more logit in every row of a head, with value 0.
        query_positions: int[T] or int[B, T]; arange(T) by default.
        key_positions: int[S] or int[B, S]; negative = an empty slot; arange(S) by default.
        query_segment_ids: int[T] or int[B, T]; attend iff equal to the key's.
        key_value_segment_ids: int[S] or int[B, S].

    Returns:
        out, float64[B, T, N, V], and lse, float64[B, T, N]; without B if query is.

    Raises:
        ValueError: shapes that do not fit; one segment argument without the other; a causal or
            window mask with key_positions and without query_positions.

    Reference: Vaswani et al., arXiv 1706.03762, section 3.2.1 (with bias, cap, masks, sinks added).
    """
    arguments = dict(locals())  # by name, so that no argument is lost or swapped
    q, _, v = _batched(query, key, value)
    out, lse = np.zeros((*q.shape[:3], v.shape[3])), np.zeros(q.shape[:3])
    for row in _rows(**arguments):
        out[row.at] = row.weights @ row.values
        lse[row.at] = row.lse
    return (out, lse) if np.ndim(query) == 4 else (out[0], lse[0])


@np.errstate(over="ignore", invalid="ignore")
def attention_gradients(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    dout: ArrayLike,
    dlse: ArrayLike | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: Window = None,
    logits_soft_cap: float | None = None,
    sinks: ArrayLike | None = None,
    query_positions: ArrayLike | None = None,
    key_positions: ArrayLike | None = None,
    query_segment_ids: ArrayLike | None = None,
    key_value_segment_ids: ArrayLike | None = None,
) -> dict[str, Floats]:
    """Compute the gradients of sum(out * dout) + sum(lse * dlse), in float64, from the formulas.

    In each row, with weight_s = exp(logit_s - lse) and delta = dout . out, and slope_s =
    1 - (logit_s / c)^2 under a soft cap, else 1: the gradient of scale * query . key_s + bias_s is
    dlogit_s = slope_s * weight_s * (dout . value_s - delta + dlse). Then dbias_s = dlogit_s,
    dquery = scale * sum_s dlogit_s * key_s, dkey_s = scale * dlogit_s * query,
    dvalue_s = weight_s * dout, dsink = -exp(sink - lse) * (delta - dlse).

    Takes the arguments of `dot_product_attention`, dout (shape of out) and dlse (shape of lse, zero
    by default, ignored where lse is -inf).

    Returns:
        dquery, dkey, dvalue, dbias if there is a bias, dsinks if there are sinks: each float64, in
        the shape of its argument.

    Raises:
        ValueError: as `dot_product_attention`.

    Reference: Dao, arXiv 2307.08691, section 2.2 (with lse, sinks, bias and cap added).
    """
    arguments = dict(locals())
    del arguments["dout"], arguments["dlse"]
    q, k, v = _batched(query, key, value)
    of_lse = np.shape(query)[:-1]
    dout = np.asarray(dout, np.float64)
    dlse = np.zeros(of_lse) if dlse is None else np.asarray(dlse, np.float64)
    if dout.shape != (*of_lse, v.shape[3]) or dlse.shape != of_lse:
        raise ValueError(f"dout {dout.shape}, dlse {dlse.shape}: not the shapes of out and lse")
    dout, dlse = dout.reshape(*q.shape[:3], v.shape[3]), dlse.reshape(q.shape[:3])
    dq, dk, dv = np.zeros(q.shape), np.zeros(k.shape), np.zeros(v.shape)
    dbias, dsinks = np.zeros((q.shape[0], q.shape[2], q.shape[1], k.shape[1])), np.zeros(q.shape[2])
    for row in _rows(**arguments):
        if row.lse == -np.inf:
            continue  # an empty row: every gradient 0
        b, t, n = row.at
        shift = dlse[row.at] - dout[row.at] @ (row.weights @ row.values)
        dlogits = row.slopes * row.weights * (row.values @ dout[row.at] + shift)
        dq[row.at] = row.scale * (dlogits @ row.keys)
        dk[b, row.slots, row.head] += row.scale * np.outer(dlogits, q[row.at])
        dv[b, row.slots, row.head] += np.outer(row.weights, dout[row.at])
        dsinks[n] += row.p_sink * shift
        dbias[b, n, t, row.slots] = dlogits
    gradients: dict[str, Floats] = {"dquery": dq, "dkey": dk, "dvalue": dv}
    if np.ndim(query) == 3:
        gradients = {name: x[0] for name, x in gradients.items()}
    if bias is not None:  # sums over the dimensions that were broadcast
        lead = dbias.ndim - np.ndim(bias)
        sums = tuple(i for i in range(4) if i < lead or np.shape(bias)[i - lead] == 1)
        gradients["dbias"] = dbias.sum(axis=sums).reshape(np.shape(bias))
    if sinks is not None:
        gradients["dsinks"] = dsinks
    return gradients


def attend_mask(
    query: ArrayLike,
    key: ArrayLike,
    mask: ArrayLike | None = None,
    *,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: Window = None,
    query_positions: ArrayLike | None = None,
    key_positions: ArrayLike | None = None,
    query_segment_ids: ArrayLike | None = None,
    key_value_segment_ids: ArrayLike | None = None,
) -> Bools:
    """Combine all masks to bool[B, N|1, T, S], True where a query attends to a key.

    Takes the masks of `dot_product_attention`, and reads only the shapes of query and key. The result
    always has B, and has N if the mask does.

    Raises:
        ValueError: as `dot_product_attention`.
    """
    batch, queries, heads, _ = (1,) * (4 - np.ndim(query)) + np.shape(query)
    keys = np.shape(key)[-3]
    sides = local_window_size
    sides = sides if isinstance(sides, tuple | list) else (sides, sides)
    left, right = (None if side == -1 else side for side in sides)
    by_position = is_causal or left is not None or right is not None
    if by_position and key_positions is not None and query_positions is None:
        raise ValueError("key_positions without query_positions; causal and window masks need both")
    if (query_segment_ids is None) != (key_value_segment_ids is None):
        raise ValueError("query_segment_ids and key_value_segment_ids: pass both, got only one")

    allowed = _row_exists(query_seq_lengths, batch, queries)[:, None, :, None]
    q = _indices("query_positions", query_positions, batch, queries)[:, None, :, None]
    k = _indices("key_positions", key_positions, batch, keys)[:, None, None, :]
    allowed = allowed & (k >= 0)
    if is_causal:
        allowed &= k <= q
    if left is not None:
        allowed &= k >= q - left
    if right is not None:
        allowed &= k <= q + right
    if key_value_seq_lengths is not None:
        allowed &= k < _integers(key_value_seq_lengths).reshape(batch, 1, 1, 1)
    if query_segment_ids is not None and key_value_segment_ids is not None:
        q = _indices("query_segment_ids", query_segment_ids, batch, queries)
        k = _indices("key_value_segment_ids", key_value_segment_ids, batch, keys)
        allowed &= q[:, None, :, None] == k[:, None, None, :]
    if mask is not None:
        dense = np.asarray(mask).astype(bool, casting="same_kind")  # TypeError unless it is bool
        np.broadcast_to(dense, (batch, heads, queries, keys))  # ValueError if it does not fit
        allowed = allowed & dense
    return allowed


class _Row(NamedTuple):
    """One query row of one head, and the A keys that it attends to."""

    at: tuple[int, int, int]  # indices in [B, T, N]
    head: int  # index in K
    slots: NDArray[np.intp]  # [A], indices in S
    keys: Floats  # [A, H]
    values: Floats  # [A, V]
    scale: float
    slopes: Floats  # [A], derivative of the soft cap
    weights: Floats  # [A], exp(logit - lse)
    p_sink: float  # exp(sink - lse)
    lse: float


def _rows(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None,
    scale: float | None,
    logits_soft_cap: float | None,
    sinks: ArrayLike | None,
    **masking: Any,
) -> Iterator[_Row]:
    query, key, value = _batched(query, key, value)
    batch, queries, heads, width = query.shape
    full = (batch, heads, queries, key.shape[1])
    allowed = np.broadcast_to(attend_mask(query, key, **masking), full)
    bias = np.broadcast_to(np.asarray(0.0 if bias is None else bias, np.float64), full)
    sinks = np.full(heads, -np.inf) if sinks is None else np.asarray(sinks, np.float64)
    exists = _row_exists(masking["query_seq_lengths"], batch, queries)
    sinks = np.where(exists[:, :, None], sinks.reshape(heads), -np.inf)
    scale = 1 / math.sqrt(width) if scale is None else float(scale)
    for b, t, n in np.ndindex(batch, queries, heads):
        head = n // (heads // key.shape[2])
        # Masked slots are not read, so their contents cannot leak.
        slots = np.flatnonzero(allowed[b, n, t])
        keys, values = key[b, slots, head], value[b, slots, head]
        logits, slopes = scale * (keys @ query[b, t, n]) + bias[b, n, t, slots], np.ones(len(slots))
        if logits_soft_cap is not None:
            capped = np.tanh(logits / logits_soft_cap)
            logits, slopes = logits_soft_cap * capped, 1 - capped**2
        sink = sinks[b, t, n]
        top = np.maximum(sink, np.max(logits, initial=-np.inf))  # NaN if any logit is NaN
        if top == -np.inf:  # neither key nor sink
            weights, p_sink, lse = np.zeros(len(slots)), 0.0, -np.inf
        else:
            exps, exp_sink = np.exp(logits - top), np.exp(sink - top)
            total = exps.sum() + exp_sink
            weights, p_sink, lse = exps / total, exp_sink / total, top + np.log(total)
        yield _Row((b, t, n), head, slots, keys, values, scale, slopes, weights, p_sink, lse)


def _batched(*arrays: ArrayLike) -> tuple[Floats, Floats, Floats]:
    q, k, v = (np.asarray(x, dtype=np.float64) for x in arrays)
    fits = q.ndim == k.ndim == v.ndim and q.ndim in (3, 4)
    q, k, v = (x.reshape((1,) * (4 - x.ndim) + x.shape) for x in (q, k, v))
    fits = fits and k.shape[:3] == v.shape[:3] and q.shape[::3] == k.shape[::3] and k.shape[2] > 0
    if not fits or q.shape[2] % k.shape[2]:
        got = f"{q.shape}, {k.shape}, {v.shape}"
        raise ValueError(f"need [B, T, N, H], [B, S, K, H], [B, S, K, V], K divides N; got {got}")
    return q, k, v


def _integers(x: ArrayLike) -> NDArray[np.int64]:
    return np.asarray(x).astype(np.int64, casting="same_kind")  # TypeError for floats


def _indices(name: str, x: ArrayLike | None, batch: int, size: int) -> NDArray[np.int64]:
    x = np.arange(size) if x is None else _integers(x)
    if x.shape not in ((size,), (batch, size)):
        raise ValueError(f"{name} has shape {x.shape}; it must be [{size}] or [{batch}, {size}]")
    return np.broadcast_to(x, (batch, size))


def _row_exists(lengths: ArrayLike | None, batch: int, queries: int) -> Bools:
    if lengths is None:
        return np.ones((batch, queries), dtype=bool)
    return np.arange(queries) < _integers(lengths).reshape(batch, 1)


# A float64 result and the float64 reference have errors of equal size: twice the rule for each.
FLOAT64_ROUNDINGS = 4.0
FLOAT64_EPS = float(np.finfo(np.float64).eps)


def tolerance(dtype: Any, keys: int) -> float:
    """Return one rounding of the output plus a float32 sum over `keys` terms, over max|reference|."""
    dtype = np.dtype(dtype)
    if dtype == np.float64:
        return FLOAT64_ROUNDINGS * FLOAT64_EPS * (1 + keys**0.5)
    return float(jnp.finfo(dtype).eps) + float(jnp.finfo(jnp.float32).eps) * keys**0.5


def worst(actual: Any, desired: Any, unit: float = 0.0) -> tuple[float, tuple[int, ...]]:
    """Find the largest |actual - desired| / max|desired|; it is inf if non-finite values differ.

    Args:
      actual: any array.
      desired: the reference, of the same shape.
      unit: smallest divisor; max|desired| is used if it is larger, and 1 if both are 0.

    Returns:
      The error and its index.

    Raises:
      AssertionError: shapes that differ.
    """
    got, want = (np.asarray(x, dtype=np.float64) for x in (actual, desired))
    if got.shape != want.shape:
        raise AssertionError(f"shapes differ: got {got.shape}, want {want.shape}")
    if got.size == 0:
        return 0.0, ()
    finite = np.isfinite(want)
    unit = max(unit, np.max(np.abs(want), initial=0.0, where=finite)) or 1.0
    both = finite & np.isfinite(got)
    same = (got == want) | (np.isnan(got) & np.isnan(want))
    errors = np.full(got.shape, np.inf)
    errors[same] = 0.0
    errors[both] = np.abs(got[both] - want[both]) / unit
    where = np.unravel_index(np.argmax(errors), errors.shape)
    return float(errors[where]), tuple(int(i) for i in where)
