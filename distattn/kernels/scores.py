"""What kernels of any platform compute of a block: logits, weights and their gradients.

The orientation is free: rows by keys in one kernel, keys by rows in another.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from distattn.block import Scoring
from distattn.state import softmax_weights

# The precisions of products that all kernels have.
EXACT = ("highest", "float32", lax.Precision.HIGHEST, (lax.Precision.HIGHEST,) * 2)
PLAIN = (None, "default", lax.Precision.DEFAULT, (lax.Precision.DEFAULT,) * 2)


@dataclasses.dataclass(frozen=True)
class Numbers:
    """How products are made."""

    dtype: jnp.dtype  # of their operands; they are summed in float32
    precision: lax.Precision

    def product(self, a: jax.Array, b: jax.Array, over: tuple[int, int]) -> jax.Array:
        """f32: a . b over a dimension of each."""
        return lax.dot_general(
            a.astype(self.dtype),
            b.astype(self.dtype),
            (((over[0],), (over[1],)), ((), ())),
            precision=self.precision,
            preferred_element_type=jnp.float32,
        )


def logits_of(
    products: jax.Array, allowed: jax.Array | None, scoring: Scoring
) -> tuple[jax.Array, jax.Array | None]:
    """cap(scale * products), -inf where not allowed; and its slope, None for 1."""
    logits, slope = products * scoring.scale, None
    if scoring.soft_cap is not None:
        ratio = jnp.tanh(logits / scoring.soft_cap)
        logits, slope = scoring.soft_cap * ratio, (1 - ratio) * (1 + ratio)
    if allowed is not None:
        logits = jnp.where(allowed, logits, -jnp.inf)
    return logits, slope


def gradients_of(
    products: jax.Array,
    d_products: jax.Array,
    allowed: jax.Array | None,
    scoring: Scoring,
    *,
    reference: jax.Array,
    d_sum: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Weights, and the gradient of logits before the soft cap: as in `distattn.block.block_gradients`.

    Args:
      products: query . key.
      d_products: d_weighted_sum . value.
      allowed: who attends to whom; None: all do.
      scoring: how logits are made.
      reference: the maximum or the log-sum-exp of rows, broadcasts.
      d_sum: of rows, broadcasts.
    """
    logits, slope = logits_of(products, allowed, scoring)
    weights = softmax_weights(logits, reference)
    d_logits = weights * (d_products + d_sum)
    if slope is not None:
        d_logits = d_logits * slope
    return weights, d_logits if allowed is None else jnp.where(allowed, d_logits, 0.0)
