"""One block of attention: its logits, its softmax state, and its part of the gradients.

Layout inside a block: query [b, K, G, q, H], key [b, s, K, H], value [b, s, K, V], logits [b, K, G, q, s],
all in the state's dtype; lower-case letters are the sizes of the block. In the `flat` form, for few
queries, logits are [b, s, K, G, q]: XLA:CPU vectorises no reduction over the minor dimension.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from distattn.algebra.deterministic_math import prevent_fma
from distattn.algebra.softmax_state import SoftmaxState, softmax_weights

# XLA:CPU makes a transposed copy of the keys and values for a matmul with a batch of heads. A flat block of few
# queries avoids the copy by one matmul per head. With at most this many heads it takes a single matmul, in which
# the heads are folded into the contraction, [s, K*H] @ [K*H, K*G*q]: the query is block-diagonal, at K times
# the flops.
DIAGONAL_HEADS = 4


@dataclasses.dataclass(frozen=True)
class LogitConfig:
    """How a logit is made, apart from arrays: cap(scale * q.k + bias)."""

    scale: float
    soft_cap: float | None = None
    precision: jax.lax.PrecisionLike = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Block:
    """The inputs of one block. `bias` and `allowed` are laid out as the logits are."""

    query: jax.Array  # [b, K, G, q, H], times the scale
    key: jax.Array  # [b, s, K, H]
    value: jax.Array  # [b, s, K, V]
    bias: jax.Array | None  # [b|1, K|1, G|1, q|1, s|1]
    allowed: jax.Array | None  # bool, the same
    flat: bool = dataclasses.field(default=False, metadata={"static": True})
    # Whether the program may branch on data. Not where the compiler may have sharded batch or heads:
    # a condition on all of them would be a collective.
    branch: bool = dataclasses.field(default=True, metadata={"static": True})


class Cotangents(NamedTuple):
    """What a gradient takes by rows, of sum(d_sum * sum) + sum(d_weighted_sum * weighted_sum)."""

    reference: jax.Array  # f32[B, T, N], of the weights: the maximum or the log-sum-exp
    d_sum: jax.Array  # f32[B, T, N]
    d_weighted_sum: jax.Array  # f32[B, T, N, V]


def block_state(block: Block, logit_config: LogitConfig) -> SoftmaxState:
    """The state of one block: max and sum [b, K, G, q], weighted_sum [b, K, G, q, V]."""
    axis = 1 if block.flat else -1
    logits, _ = block_logits(block, logit_config)
    high = logits.max(axis=axis)
    weights = softmax_weights(logits, jnp.expand_dims(high, axis))
    return SoftmaxState(
        max=high,
        sum=weights.sum(axis=axis),
        weighted_sum=_weigh(weights, block, logit_config),
    )


def block_logits(block: Block, logit_config: LogitConfig) -> tuple[jax.Array, jax.Array | None]:
    """Logits (see the layouts above), -inf where not allowed; and d(logit)/d(uncapped), None for 1."""
    return finish_logits(_scores(block, logit_config), block.bias, block.allowed, logit_config)


def finish_logits(
    scores: jax.Array,
    bias: jax.Array | None,
    allowed: jax.Array | None,
    logit_config: LogitConfig,
    tanh: Callable[..., Any] = jnp.tanh,
) -> tuple[jax.Array, jax.Array | None]:
    """Return cap(scores + bias), -inf where not allowed, and its slope before the mask (None for 1).

    Blocks, the reproducible form and the kernels all call this, each in its own layout.

    Args:
      scores: scale * q.k.
      bias: broadcasts against the scores; None for 0.
      allowed: bool, broadcasts against the scores; None if every query attends to every key.
      logit_config: the soft cap.
      tanh: the function of the soft cap.
    """
    logits, slope = scores, None
    if bias is not None:
        logits = logits + bias
    if logit_config.soft_cap is not None:
        ratio = tanh(logits / logit_config.soft_cap)
        logits, slope = prevent_fma(logit_config.soft_cap * ratio), (1 - ratio) * (1 + ratio)
    if allowed is not None:
        logits = jnp.where(allowed, logits, -jnp.inf)
    return logits, slope


def gradient_of_logits(
    weights: jax.Array,
    d_weights: jax.Array,
    slope: jax.Array | None,
    allowed: jax.Array | None,
) -> jax.Array:
    """Return the gradient of logits before the soft cap: weights * d_weights * slope, 0 where not allowed.

    `slope` and `allowed` are those of `finish_logits`. The weights are 0 where not allowed, but keys and
    values of empty slots may be NaN, and 0 * NaN is NaN.
    """
    d_logits = weights * d_weights
    if slope is not None:
        d_logits = d_logits * slope
    return d_logits if allowed is None else jnp.where(allowed, d_logits, 0.0)


def block_gradients(
    block: Block, logit_config: LogitConfig, cotangents: Cotangents
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Gradients of sum(d_sum * sum) + sum(d_weighted_sum * weighted_sum), for weights exp(s - reference).

    With reference = max this is the gradient of a state. With reference = log-sum-exp, d_weighted_sum
    = dout and d_sum = dlse - sum(dout * out) it is the gradient of finished attention
    (FlashAttention-2, arXiv 2307.08691, section 3.1.2): the same formula.

        p = exp(s - reference),  ds = p * (d_weighted_sum . v + d_sum)

    Args:
      block: the inputs.
      logit_config: how logits are made.
      cotangents: [b, K, G, q], [b, K, G, q], [b, K, G, q, V].

    Returns:
      d_query [b, K, G, q, H] with respect to the scaled query, d_key [b, s, K, H], d_value
      [b, s, K, V], and d_logits before the soft cap [b, K, G, q, s].
    """
    reference, d_sum, d_weighted_sum = cotangents
    logits, slope = block_logits(block, logit_config)
    weights = softmax_weights(logits, reference[..., None])
    einsum = einsum_with(logit_config)
    d_value = einsum("bkgqs,bkgqv->bskv", weights, d_weighted_sum)
    d_weights = einsum("bkgqv,bskv->bkgqs", d_weighted_sum, block.value) + d_sum[..., None]
    d_logits = gradient_of_logits(weights, d_weights, slope, block.allowed)
    d_query = attended_sum(
        lambda w, x: einsum("bkgqs,bskh->bkgqh", w, x), d_logits, block.key, block
    )
    d_key = attended_sum(
        lambda w, x: einsum("bkgqs,bkgqh->bskh", w, x), d_logits, block.query, block
    )
    return d_query, d_key, d_value, d_logits


def _scores(block: Block, logit_config: LogitConfig) -> jax.Array:
    query, key = block.query, block.key

    def batched() -> jax.Array:
        return einsum_with(logit_config)("bkgqh,bskh->bkgqs", query, key)

    if not block.flat:
        return batched()
    _, heads, groups, rows, width = query.shape
    columns = groups * rows
    flat_key = key.reshape(-1, heads * width)
    if heads > DIAGONAL_HEADS:
        parts = jnp.split(flat_key, heads, axis=1)
        logits = jnp.concatenate(
            [
                lax.dot_general(
                    part, own, (((1,), (1,)), ((), ())), precision=logit_config.precision
                )
                for part, own in zip(parts, query.reshape(heads, columns, width), strict=True)
            ],
            axis=1,
        )
        return logits.reshape(1, -1, heads, groups, rows)
    diagonal = (
        jnp.eye(heads, dtype=query.dtype)[:, None, :, None]
        * query.reshape(heads, columns, width).transpose(0, 2, 1)[:, :, None, :]
    ).reshape(heads * width, heads * columns)
    logits = lax.dot(flat_key, diagonal, precision=logit_config.precision)
    logits = logits.reshape(1, -1, heads, groups, rows)
    if block.allowed is None:
        return logits
    # A head that holds no number (0 * nan) reaches the others' logits; then take the separate form.
    return lax.cond(
        jnp.isfinite(logits).all(), lambda: logits, lambda: jnp.moveaxis(batched(), -1, 1)
    )


def _weigh(weights: jax.Array, block: Block, logit_config: LogitConfig) -> jax.Array:
    def batched(w: jax.Array, x: jax.Array) -> jax.Array:
        return einsum_with(logit_config)("bkgqs,bskv->bkgqv", w, x)

    def flat(w: jax.Array, x: jax.Array) -> jax.Array:
        _, keys, heads, groups, rows = weights.shape
        w, x = w.reshape(keys, -1), x.reshape(keys, -1)
        if heads > DIAGONAL_HEADS:
            pairs = zip(jnp.split(w, heads, axis=1), jnp.split(x, heads, axis=1), strict=True)
            own = jnp.stack([by_keys(*pair) for pair in pairs])
        else:
            full = by_keys(w, x).reshape(heads, groups * rows, heads, -1)
            own = jnp.stack([full[k, :, k] for k in range(heads)])
        return own.reshape(1, heads, groups, rows, -1)

    def by_keys(w: jax.Array, x: jax.Array) -> jax.Array:
        return lax.dot_general(w, x, (((0,), (0,)), ((), ())), precision=logit_config.precision)

    return attended_sum(flat if block.flat else batched, weights, block.value, block)


# Codes whose sums over the keys of a block tell which kinds of non-numbers were met.
_POSITIVE, _NEGATIVE, _NAN = 1.0, 2.0**12, 2.0**24


def attended_sum(
    product: Callable[..., Any], weights: jax.Array, x: jax.Array, block: Block
) -> jax.Array:
    """product(weights, x), to which entries of x that are not allowed contribute nothing.

    Their weight is 0 already, but 0 * nan is nan. So where the plain product is not finite, the finite
    entries are summed, and what is not finite is added for those who may attend to it.
    """
    allowed = block.allowed
    if allowed is None:
        return product(weights, x)

    def apart() -> jax.Array:
        attended = jnp.where(allowed, (weights != 0).astype(weights.dtype), 0.0)
        code = jnp.where(x == jnp.inf, _POSITIVE, jnp.where(x == -jnp.inf, _NEGATIVE, 0.0))
        code = jnp.where(jnp.isnan(x), _NAN, code).astype(x.dtype)
        met = product(attended, code)
        positive, negative = met % _NEGATIVE != 0, met % _NAN >= _NEGATIVE
        odd = jnp.where(positive, jnp.inf, 0.0) - jnp.where(negative, jnp.inf, 0.0)
        odd = jnp.where(met >= _NAN, jnp.nan, odd)
        return product(weights, jnp.where(jnp.isfinite(x), x, 0.0)) + odd

    if not block.branch:
        return apart()
    plain = product(weights, x)
    return lax.cond(jnp.isfinite(plain).all(), lambda: plain, apart)


def einsum_with(logit_config: LogitConfig) -> Callable[..., jax.Array]:
    """`jnp.einsum` with the precision of the call."""

    def einsum(spec: str, *inputs: Any) -> jax.Array:
        return jnp.einsum(spec, *inputs, precision=logit_config.precision)

    return einsum
