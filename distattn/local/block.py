"""One block of attention: logits, softmax state, and gradients.

Layout of a block: query [b, K, G, q, H], key [b, s, K, H], value [b, s, K, V], logits [b, K, G, q, s],
all in the state's dtype. Lower-case letters are the sizes of the block. The `flat` form is for few
queries on a CPU, with logits [b, s, K, G, q]; see `local.cpu`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from distattn.algebra.deterministic_math import prevent_fma
from distattn.algebra.softmax_state import SoftmaxState, softmax_weights
from distattn.local.cpu import scores_by_head, weigh_by_head


@dataclasses.dataclass(frozen=True)
class LogitConfig:
    """Static arguments of a logit: cap(scale * q.k + bias)."""

    scale: float
    soft_cap: float | None = None
    precision: jax.lax.PrecisionLike = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Block:
    """Inputs of one block. `bias` and `allowed` have the layout of the logits."""

    query: jax.Array  # [b, K, G, q, H], times the scale
    key: jax.Array  # [b, s, K, H]
    value: jax.Array  # [b, s, K, V]
    bias: jax.Array | None  # [b|1, K|1, G|1, q|1, s|1]
    allowed: jax.Array | None  # bool[b|1, K|1, G|1, q|1, s|1]
    flat: bool = dataclasses.field(default=False, metadata={"static": True})


class Cotangents(NamedTuple):
    """Arrays by query row of a gradient of sum(d_sum * sum) + sum(d_weighted_sum * weighted_sum)."""

    reference: jax.Array  # f32[B, T, N], the maximum or the log-sum-exp that weights refer to
    d_sum: jax.Array  # f32[B, T, N]
    d_weighted_sum: jax.Array  # f32[B, T, N, V]


def zero_unattended(
    key: jax.Array, value: jax.Array, allowed: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Return key [b, s, K, H] and value [b, s, K, V] with 0 in the slots that no query may attend to.

    These slots can hold anything, and 0 * NaN is NaN, in matmuls and in gradients. A slot that some query
    of some head may attend to stays, for all queries.

    Args:
      key: [b, s, K, H].
      value: [b, s, K, V].
      allowed: bool[b|1, K|1, G|1, q|1, s|1] of `Mask.allowed`; None leaves all slots.
    """
    if allowed is None:
        return key, value
    attended = allowed.any(axis=(1, 2, 3))[:, :, None, None]
    return jnp.where(attended, key, 0), jnp.where(attended, value, 0)


def block_state(block: Block, logit_config: LogitConfig) -> SoftmaxState:
    """Return the state of one block: max and sum [b, K, G, q], weighted_sum [b, K, G, q, V]."""
    axis = 1 if block.flat else -1
    logits, _ = block_logits(block, logit_config)
    high = logits.max(axis=axis)
    weights = softmax_weights(logits, jnp.expand_dims(high, axis))
    if block.flat:
        weighted_sum = weigh_by_head(weights, block.value, logit_config.precision)
    else:
        weighted_sum = einsum_with(logit_config)("bkgqs,bskv->bkgqv", weights, block.value)
    return SoftmaxState(max=high, sum=weights.sum(axis=axis), weighted_sum=weighted_sum)


def block_logits(block: Block, logit_config: LogitConfig) -> tuple[jax.Array, jax.Array | None]:
    """Return logits, -inf where not allowed, and their slope before the cap; see `finish_logits`."""
    if block.flat:
        scores = scores_by_head(block.query, block.key, logit_config.precision)
    else:
        scores = einsum_with(logit_config)("bkgqh,bskh->bkgqs", block.query, block.key)
    return finish_logits(scores, block.bias, block.allowed, logit_config)


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
    """Return gradients of sum(d_sum * sum) + sum(d_weighted_sum * weighted_sum), p = exp(s - reference).

    With reference = max this is the gradient of a state. With reference = log-sum-exp, d_weighted_sum
    = dout and d_sum = dlse - sum(dout * out) it is the gradient of finished attention
    (FlashAttention-2, arXiv 2307.08691, section 3.1.2). The formula is the same:

        p = exp(s - reference),  ds = p * (d_weighted_sum . v + d_sum)

    Args:
      block: the inputs.
      logit_config: static arguments of the logits.
      cotangents: [b, K, G, q], [b, K, G, q], [b, K, G, q, V].

    Returns:
      d_query [b, K, G, q, H] of the scaled query, d_key [b, s, K, H], d_value [b, s, K, V], and d_logits
      before the soft cap [b, K, G, q, s].
    """
    reference, d_sum, d_weighted_sum = cotangents
    logits, slope = block_logits(block, logit_config)
    weights = softmax_weights(logits, reference[..., None])
    einsum = einsum_with(logit_config)
    d_value = einsum("bkgqs,bkgqv->bskv", weights, d_weighted_sum)
    d_weights = einsum("bkgqv,bskv->bkgqs", d_weighted_sum, block.value) + d_sum[..., None]
    d_logits = gradient_of_logits(weights, d_weights, slope, block.allowed)
    d_query = einsum("bkgqs,bskh->bkgqh", d_logits, block.key)
    d_key = einsum("bkgqs,bkgqh->bskh", d_logits, block.query)
    return d_query, d_key, d_value, d_logits


def einsum_with(logit_config: LogitConfig) -> Callable[..., jax.Array]:
    """Return `jnp.einsum` with the precision of the call."""

    def einsum(spec: str, *inputs: Any) -> jax.Array:
        return jnp.einsum(spec, *inputs, precision=logit_config.precision)

    return einsum
