"""The softmax state and its monoid: the algebra that everything else stands on.

Attention over a set of keys is a weighted mean, and a weighted mean that is not divided yet is a
commutative monoid: states of disjoint sets of keys merge, in any order and in any grouping, into the
state of their union (Rabe & Staats, arXiv 2112.05682, section 2; the operator is that of Milakov &
Gimelshein, arXiv 1805.02867). (max, sum, weighted_sum) are FlashAttention-2's (m, l, unscaled O) and
Rabe & Staats' (m*, s*, v*).

`max` is a gauge: (max, sum, weighted_sum) and (max + c, sum * exp(-c), weighted_sum * exp(-c)) are the
same state. Its gradient is therefore zero by definition, and gradients travel in `sum` and
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
    """A softmax-weighted sum that is not finished yet: attention over some of the keys.

    Over no key at all it is (-inf, 0, 0), the identity of `merge`. The dtype is float32, or float64
    where an input is float64.

    Args:
      max: f32[B, T, N], a bound of the logits, usually their maximum; -inf if empty.
      sum: f32[B, T, N], the sum of exp(logit - max).
      weighted_sum: f32[B, T, N, V], the sum of exp(logit - max) * value.

    Example:
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
    """float64 if an input is, else float32."""
    double = any(x.dtype == jnp.float64 for x in arrays)
    return jnp.dtype(jnp.float64 if double else jnp.float32)


def identity(like: SoftmaxState) -> SoftmaxState:
    """The state over no keys, (-inf, 0, 0), in the shapes and dtypes of `like`.

    `merge(identity(x), x)` is x.

    Args:
      like: f32[B, T, N], f32[B, T, N], f32[B, T, N, V]; its numbers do not count.

    Returns:
      SoftmaxState of the same shapes.

    Example:
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
    """The identity for such rows and values of such a width, typed as varying over the axes."""
    row = vary(jnp.zeros(rows, dtype), axes)
    return identity(SoftmaxState(row, row, vary(jnp.zeros((*rows, width), dtype), axes)))


def merge(a: SoftmaxState, b: SoftmaxState) -> SoftmaxState:
    """The state over the keys of both, which must not share a key.

        max = maximum(a.max, b.max)
        sum = a.sum * exp(a.max - max) + b.sum * exp(b.max - max), and weighted_sum alike

    Associative and commutative up to rounding, with `identity` as its unit. Leading dimensions are
    free: anything of shapes [...], [...], [..., V] merges.

    Args:
      a: f32[B, T, N], f32[B, T, N], f32[B, T, N, V].
      b: the same shapes.

    Returns:
      SoftmaxState of the same shapes.

    Example:
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
    """The same state in another gauge: with `high` f32[B, T, N] as its max, which must not be below it.

    States of one gauge are added; that is all that merging is.
    """
    weight = softmax_weights(lax.stop_gradient(state.max), high)
    return SoftmaxState(
        max=lax.stop_gradient(high),
        sum=prevent_fma(weight * state.sum),
        weighted_sum=prevent_fma(weight[..., None] * state.weighted_sum),
    )


def merge_stacked(states: SoftmaxState) -> SoftmaxState:
    """All the states of a leading axis, [D, B, T, N] and [D, B, T, N, V], merged at once."""
    high = lax.stop_gradient(states.max.max(axis=0))
    states = rescale(states, jnp.broadcast_to(high, states.max.shape))
    return SoftmaxState(high, states.sum.sum(axis=0), states.weighted_sum.sum(axis=0))


def finalize(state: SoftmaxState, sinks: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """Divide once: the attention output, and the log-sum-exp of the logits.

        out = weighted_sum / sum,  lse = max + log(sum)

    Args:
      state: f32[B, T, N], f32[B, T, N], f32[B, T, N, V].
      sinks: f32[N], one extra logit a head whose value is zero; it enters the sum here and only here.

    Returns:
      out f32[B, T, N, V] and lse f32[B, T, N] (natural log). A state over no keys gives 0 and -inf,
      or 0 and the sink.

    Example:
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
    """The state of a finished attention, so that kernels which return (out, lse) can be merged.

    Args:
      out: [B, T, N, V], the attention output over some keys.
      lse: f32[B, T, N], natural log; -inf where no key was attended. Differentiable.

    Returns:
      SoftmaxState (lse, 1, out), or the identity where lse is -inf.

    Example:
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
    # exp(lse - high) is 1; written so, because the gradient of lse must go into the sum.
    shift = jnp.where(empty, 0.0, lse) - jnp.where(empty, 0.0, high)
    total = jnp.where(empty, 0.0, jnp.exp(shift))
    return SoftmaxState(
        max=high,
        sum=total,
        weighted_sum=jnp.where(empty[..., None], 0.0, out * total[..., None]),
    )


def softmax_weights(logits: jax.Array, reference: jax.Array) -> jax.Array:
    """exp(logits - reference), with 0 for the weights of a row whose reference is -inf.

    The one place where logits become weights. `reference` is a running maximum or a log-sum-exp; it
    counts as a constant for differentiation.
    """
    reference = lax.stop_gradient(reference)
    return jnp.exp(logits - jnp.where(reference == -jnp.inf, 0.0, reference))


def pack(state: SoftmaxState) -> jax.Array:
    """The state as one array f32[..., V + 2], so that it travels in one message."""
    return jnp.concatenate(
        [state.weighted_sum, state.sum[..., None], state.max[..., None]], axis=-1
    )


def unpack(packed: jax.Array) -> SoftmaxState:
    """The inverse of `pack`."""
    return SoftmaxState(max=packed[..., -1], sum=packed[..., -2], weighted_sum=packed[..., :-2])


def _sink_state(state: SoftmaxState, sinks: jax.Array) -> SoftmaxState:
    # (sink, 1, 0), with the gradient of the sink in its sum, since max has none.
    sinks = jnp.broadcast_to(sinks.astype(state.max.dtype), state.max.shape)
    high = lax.stop_gradient(sinks)
    total = jnp.where(high == -jnp.inf, 0.0, softmax_weights(sinks, high))
    return SoftmaxState(high, total, jnp.zeros_like(state.weighted_sum))
