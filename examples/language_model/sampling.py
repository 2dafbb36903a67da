"""The choice of the next token: the most likely one, or one drawn at random.

The n-th token of a request is drawn with a key made of the request's seed and n alone. A request therefore
gets the same tokens in any row, beside any other requests, and with or without drafts.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def choose(
    logits: jax.Array,
    *,
    temperature: jax.Array,
    top_p: jax.Array,
    seed: jax.Array,
    count: jax.Array,
) -> jax.Array:
    """Choose a token for each row and each of its W places.

    Draw from softmax(logits / temperature), restricted to its nucleus; temperature 0 takes the most likely.

    Args:
      logits: f32[B, W, A].
      temperature: f32[B], at least 0.
      top_p: f32[B], in (0, 1].
      seed: uint32[B], the seed of the row's request.
      count: int32[B], number of tokens that the request got before the first of the W.

    Returns:
      int32[B, W].

    Reference:
      Holtzman et al., "The Curious Case of Neural Text Degeneration", arXiv 1904.09751, section 3.1.
    """

    def most_likely() -> jax.Array:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def drawn() -> jax.Array:
        positive = jnp.where(temperature > 0, temperature, 1)[:, None, None]
        # The largest is 0, so a small temperature makes the others -inf and never NaN.
        scaled = (logits - logits.max(axis=-1, keepdims=True)) / positive
        kept = nucleus(jax.nn.softmax(scaled), top_p[:, None])
        number = count[:, None] + np.arange(logits.shape[1], dtype=np.int32)[None]
        keys = jax.vmap(jax.vmap(_key, (None, 0)))(seed, number)
        draw = jax.vmap(jax.vmap(jax.random.categorical))
        tokens = draw(keys, jnp.where(kept, scaled, -jnp.inf)).astype(jnp.int32)
        return jnp.where(temperature[:, None] > 0, tokens, most_likely())

    return lax.cond((temperature > 0).any(), drawn, most_likely)


def nucleus(probabilities: jax.Array, top_p: jax.Array) -> jax.Array:
    """Return a mask of the fewest most likely tokens whose probabilities reach top_p, ties included.

    The mask is p >= t for the largest t at which the kept probabilities sum to top_p. A bisection over the
    bits of float32 finds t, because positive floats and their bits have one order. It sorts nothing, and if
    the vocabulary is sharded, devices exchange only sums.

    Args:
      probabilities: f32[..., A].
      top_p: f32[...], or an array that broadcasts to it.

    Returns:
      bool[..., A].
    """
    bits = lax.bitcast_convert_type(probabilities, jnp.int32)

    def halve(_: int, bounds: tuple[Any, ...]) -> tuple[Any, ...]:
        low, high = bounds  # the probabilities suffice at low, and do not at high
        middle = low + (high - low) // 2
        total = jnp.where(bits >= middle[..., None], probabilities, 0).sum(axis=-1)
        enough = total >= top_p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low = jnp.zeros(probabilities.shape[:-1], jnp.int32)
    high = jnp.full_like(low, np.float32(1).view(np.int32) + 2**10)  # a softmax may round past 1
    low, _ = lax.fori_loop(0, 31, halve, (low, high))
    return (bits >= low[..., None]) | (top_p >= 1)[..., None]  # sums near 1 are rounded


def _key(seed: jax.Array, number: jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed), number)
