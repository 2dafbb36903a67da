"""The softmax state: undivided attention over some of the keys, and its merge.

Attention over a set of keys is a weighted mean, and an undivided weighted mean is a commutative monoid:
states of disjoint sets of keys merge, in any order and grouping, into the state of their union (Rabe &
Staats, arXiv 2112.05682, section 2; the operator is by Milakov & Gimelshein, arXiv 1805.02867). (max,
sum, weighted_sum) are FlashAttention-2's (m, l, unscaled O) and Rabe & Staats' (m*, s*, v*).

`max` is a free reference: (max, sum, weighted_sum) and (max + c, sum * exp(-c), weighted_sum * exp(-c))
are one state. So the gradient of `max` is zero by definition, and gradients travel in `sum` and
`weighted_sum` alone.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from distattn._compat import vary, varying_axes
from distattn.algebra.deterministic_math import prevent_fma


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class SoftmaxState:
    """Undivided attention over some of the keys: a softmax-weighted sum of values.

    Over no keys it is (-inf, 0, 0), the identity of `merge`. The dtype is float32, or float64 if an input
    is.

    Args:
      max: f32[B, T, N], a bound of the logits, usually their maximum; -inf if empty.
      sum: f32[B, T, N], sum of exp(logit - max).
      weighted_sum: f32[B, T, N, V], sum of exp(logit - max) * value.

    Examples:
      >>> import jax.numpy as jnp, distattn
      >>> query, key, value = jnp.ones((1, 2, 4, 8)), jnp.ones((1, 6, 2, 8)), jnp.ones((1, 6, 2, 16))
      >>> state = distattn.partial_attention(query, key, value)
      >>> state.max.shape, state.sum.shape, state.weighted_sum.shape
      ((1, 2, 4), (1, 2, 4), (1, 2, 4, 16))

    Reference: Rabe & Staats, arXiv 2112.05682, section 2; (m, l, unscaled O) of FlashAttention-2.
    """

    max: jax.Array  # f32[B, T, N]
    sum: jax.Array  # f32[B, T, N]
    weighted_sum: jax.Array  # f32[B, T, N, V]


def state_dtype(*arrays: jax.Array) -> jnp.dtype:
    """Return float64 if an input is, else float32."""
    double = any(x.dtype == jnp.float64 for x in arrays)
    return jnp.dtype(jnp.float64 if double else jnp.float32)


def identity(like: SoftmaxState) -> SoftmaxState:
    """Return the state over no keys, (-inf, 0, 0), in the shapes and dtypes of `like`.

    `merge(identity(x), x)` is x.

    Args:
      like: f32[B, T, N], f32[B, T, N], f32[B, T, N, V]; its values are ignored.

    Returns:
      SoftmaxState in the shapes of `like`.

    Examples:
      >>> import jax.numpy as jnp, distattn
      >>> x = distattn.from_lse(jnp.full((1, 1, 1, 2), 3.0), jnp.zeros((1, 1, 1)))
      >>> nothing = distattn.identity(x)
      >>> float(nothing.max[0, 0, 0]), distattn.merge(nothing, x).weighted_sum.ravel().tolist()
      (-inf, [3.0, 3.0])
    """
    empty = SoftmaxState(
        max=jnp.full_like(like.max, -jnp.inf),
        sum=jnp.zeros_like(like.sum),
        weighted_sum=jnp.zeros_like(like.weighted_sum),
    )
    return jax.tree.map(lambda x, y: vary(x, varying_axes(y)), empty, like)


def empty(
    rows: tuple[int, ...], width: int, dtype: jnp.dtype, axes: frozenset[str] = frozenset()
) -> SoftmaxState:
    """Return the identity for rows and a value width, typed as varying over the axes."""
    row = vary(jnp.zeros(rows, dtype), axes)
    return identity(SoftmaxState(row, row, vary(jnp.zeros((*rows, width), dtype), axes)))


def merge(a: SoftmaxState, b: SoftmaxState) -> SoftmaxState:
    """Return the state over the keys of both, which must not share a key.

        max = maximum(a.max, b.max)
        sum = a.sum * exp(a.max - max) + b.sum * exp(b.max - max), and weighted_sum alike

    The merge is associative and commutative up to rounding, with identity `identity`. Leading dimensions
    are
    free: all shapes [...], [...], [..., V] merge.

    Args:
      a: f32[B, T, N], f32[B, T, N], f32[B, T, N, V].
      b: the shapes of a.

    Returns:
      SoftmaxState in the shapes of a.

    Examples:
      >>> import jax, jax.numpy as jnp, distattn
      >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 8, 2, 4))
      >>> evens, odds = (distattn.partial_attention(query, key[:, i::2], value[:, i::2]) for i in (0, 1))
      >>> out, lse = distattn.finalize(distattn.merge(odds, evens))
      >>> bool(jnp.allclose(out, jax.nn.dot_product_attention(query, key, value), atol=1e-5))
      True

    Reference: Rabe & Staats, arXiv 2112.05682, section 2.1.
    """
    high = lax.stop_gradient(jnp.maximum(a.max, b.max))
    a, b = rescale(a, high), rescale(b, high)
    return SoftmaxState(high, a.sum + b.sum, a.weighted_sum + b.weighted_sum)


def rescale(state: SoftmaxState, high: jax.Array) -> SoftmaxState:
    """Return the state with `high` f32[B, T, N], not below its max, as max.

    States of equal max are merged by adding sum and weighted_sum.
    """
    weight = softmax_weights(lax.stop_gradient(state.max), high)
    return SoftmaxState(
        max=lax.stop_gradient(high),
        sum=prevent_fma(weight * state.sum),
        weighted_sum=prevent_fma(weight[..., None] * state.weighted_sum),
    )


def merge_stacked(states: SoftmaxState) -> SoftmaxState:
    """Merge all states along a leading axis, [D, B, T, N] and [D, B, T, N, V], at once."""
    high = lax.stop_gradient(states.max.max(axis=0))
    states = rescale(states, jnp.broadcast_to(high, states.max.shape))
    return SoftmaxState(high, states.sum.sum(axis=0), states.weighted_sum.sum(axis=0))


def finalize(state: SoftmaxState, sinks: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Return the attention output and the log-sum-exp of the logits, by one division.

        out = weighted_sum / sum,  lse = max + log(sum)

    Args:
      state: f32[B, T, N], f32[B, T, N], f32[B, T, N, V].
      sinks: f32[N], one more logit per head with value 0; it enters the sum here and only here.

    Returns:
      out f32[B, T, N, V] and lse f32[B, T, N] (natural log). A state over no keys gives 0 and -inf,
      or 0 and the sink.

    Examples:
      >>> import jax.numpy as jnp, distattn
      >>> row, values = jnp.zeros((1, 1, 1)), jnp.array([[[[6.0, 8.0]]]])  # of 4 keys with logit 0
      >>> out, lse = distattn.finalize(distattn.SoftmaxState(row, row + 4, values))
      >>> out.ravel().tolist(), jnp.exp(lse).round(4).item()
      ([1.5, 2.0], 4.0)

    Reference: Rabe & Staats, arXiv 2112.05682, section 2.
    """
    if sinks is not None:
        state = merge(_sink_state(state, sinks), state)
    empty = state.sum == 0
    total = jnp.where(empty, 1.0, state.sum)
    lse = jnp.where(empty, -jnp.inf, lax.stop_gradient(state.max) + jnp.log(total))
    return state.weighted_sum / total[..., None], lse


def from_lse(out: jax.Array, lse: jax.Array) -> SoftmaxState:
    """Return the state of finished attention, so that results of kernels, (out, lse), can be merged.

    Args:
      out: [B, T, N, V], the attention output over some keys.
      lse: f32[B, T, N], natural log; -inf for a row that attends to no key. Differentiable.

    Returns:
      SoftmaxState (lse, 1, out), or the identity in rows whose lse is -inf.

    Examples:
      >>> import jax.numpy as jnp, distattn
      >>> a = distattn.from_lse(jnp.full((1, 1, 1, 1), 2.0), jnp.log(jnp.full((1, 1, 1), 1.0)))
      >>> b = distattn.from_lse(jnp.full((1, 1, 1, 1), 6.0), jnp.log(jnp.full((1, 1, 1), 3.0)))
      >>> out, lse = distattn.finalize(distattn.merge(a, b))
      >>> out.round(4).item(), jnp.exp(lse).round(4).item()  # (1 * 2 + 3 * 6) / 4, and 1 + 3
      (5.0, 4.0)
    """
    dtype = state_dtype(lse, out)
    lse, out = lse.astype(dtype), out.astype(dtype)
    empty = lse == -jnp.inf
    high = lax.stop_gradient(lse)
    # exp(lse - high) is 1, and carries the gradient of lse into the sum.
    shift = jnp.where(empty, 0.0, lse) - jnp.where(empty, 0.0, high)
    total = jnp.where(empty, 0.0, jnp.exp(shift))
    return SoftmaxState(
        max=high,
        sum=total,
        weighted_sum=jnp.where(empty[..., None], 0.0, out * total[..., None]),
    )


def softmax_weights(logits: jax.Array, reference: jax.Array) -> jax.Array:
    """Return exp(logits - reference); weights of a row whose reference is -inf are 0.

    `reference` is a running maximum or a log-sum-exp, and a constant for differentiation.
    """
    reference = lax.stop_gradient(reference)
    return jnp.exp(logits - jnp.where(reference == -jnp.inf, 0.0, reference))


def pack(state: SoftmaxState) -> jax.Array:
    """Return the state as one array f32[..., V + 2], so that it travels in one message."""
    return jnp.concatenate(
        [state.weighted_sum, state.sum[..., None], state.max[..., None]], axis=-1
    )


def unpack(packed: jax.Array) -> SoftmaxState:
    """Return the state of which `packed` is `pack`."""
    return SoftmaxState(max=packed[..., -1], sum=packed[..., -2], weighted_sum=packed[..., :-2])


def _sink_state(state: SoftmaxState, sinks: jax.Array) -> SoftmaxState:
    """Return (sink, 1, 0); the gradient of the sink is in the sum, since max has none."""
    sinks = jnp.broadcast_to(sinks.astype(state.max.dtype), state.max.shape)
    high = lax.stop_gradient(sinks)
    total = jnp.where(high == -jnp.inf, 0.0, softmax_weights(sinks, high))
    return SoftmaxState(high, total, jnp.zeros_like(state.weighted_sum))
