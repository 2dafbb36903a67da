"""Which token comes next: the likeliest, or one drawn at random.

The n-th token of a request is drawn with a key made of the request's seed and n alone. So a request gets
the same tokens whichever row it runs in, whatever its neighbours are, and with drafts or without.
"""

from __future__ import annotations

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
    """A token for each row and place.

        p = softmax(logits / temperature), of which the nucleus is kept; temperature 0 takes the likeliest

    Args:
      logits: f32[B, W, A], of W tokens in a row.
      temperature: f32[B], at least 0.
      top_p: f32[B], in (0, 1].
      seed: uint32[B], of the request in the row.
      count: int32[B], how many tokens of the request come before the first of the W.

    Returns:
      int32[B, W].

    Reference:
      Holtzman et al., "The Curious Case of Neural Text Degeneration", arXiv 1904.09751, section 3.1.
    """

    def likeliest() -> jax.Array:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def drawn() -> jax.Array:
        warm = jnp.where(temperature > 0, temperature, 1)[:, None, None]
        # The largest at 0, so that a small temperature makes -inf of the others, and no nan.
        scaled = (logits - logits.max(axis=-1, keepdims=True)) / warm
        kept = nucleus(jax.nn.softmax(scaled), top_p[:, None])
        number = count[:, None] + np.arange(logits.shape[1], dtype=np.int32)[None]
        keys = jax.vmap(jax.vmap(_key, (None, 0)))(seed, number)
        draw = jax.vmap(jax.vmap(jax.random.categorical))
        tokens = draw(keys, jnp.where(kept, scaled, -jnp.inf)).astype(jnp.int32)
        return jnp.where(temperature[:, None] > 0, tokens, likeliest())

    return lax.cond((temperature > 0).any(), drawn, likeliest)


def nucleus(probabilities: jax.Array, top_p: jax.Array) -> jax.Array:
    """The fewest likeliest tokens whose probabilities reach top_p, and any that tie with the last of them.

    All p >= t, for the largest t at which they sum to top_p. That t is found by bisection over the bits of
    float32, which for positive numbers are in the order of the numbers: no token is sorted, and where the
    vocabulary is split over devices only sums are exchanged.

    Args:
      probabilities: f32[..., A].
      top_p: f32[...], or broadcasts to it.

    Returns:
      bool[..., A].
    """
    bits = lax.bitcast_convert_type(probabilities, jnp.int32)

    def halve(_: int, bounds: tuple[Any, ...]) -> tuple[Any, ...]:
        low, high = bounds  # at low the mass suffices, at high it does not
        middle = low + (high - low) // 2
        mass = jnp.where(bits >= middle[..., None], probabilities, 0).sum(axis=-1)
        enough = mass >= top_p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low = jnp.zeros(probabilities.shape[:-1], jnp.int32)
    high = jnp.full_like(low, np.float32(1).view(np.int32) + 2**10)  # a softmax may round past 1
    low, _ = lax.fori_loop(0, 31, halve, (low, high))
    return (bits >= low[..., None]) | (top_p >= 1)[..., None]  # sums near 1 are rounded


def _key(seed: jax.Array, number: jax.Array) -> jax.Array:
    return jax.random.fold_in(jax.random.key(seed), number)
