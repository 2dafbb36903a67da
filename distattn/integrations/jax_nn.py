"""distattn for code that is given its attention as a function and calls it as `jax.nn`'s."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from distattn.attention.api import dot_product_attention
from distattn.attention.sharding import Sharding
from distattn.attention.strategy import StrategyLike


def attention_fn(
    *,
    query_sharding: Sharding = None,
    key_value_sharding: Sharding = None,
    strategy: StrategyLike = "auto",
) -> Callable[..., Any]:
    """Return `distattn.dot_product_attention` with its shardings and strategy bound.

    The function takes all arguments of `jax.nn.dot_product_attention`. If you can change the call, call
    distattn instead. Don't assign it to `jax.nn`: functions that are already compiled keep the other one.

    It differs from `jax.nn` in three points:

    * `implementation='cudnn'` runs cuDNN on the keys of each device, and raises NotImplementedError if
      cuDNN doesn't support the call;
    * the residual of `return_residual=True` is float32 and differentiable;
    * a query that attends to no key gives 0, not the mean of all values.

    Args:
      query_sharding: as in `distattn.dot_product_attention`.
      key_value_sharding: as in `distattn.dot_product_attention`; pass it inside jit under Auto axes.
      strategy: how devices exchange.

    Returns:
      A function of query [B, T, N, H] or [T, N, H], key [B, S, K, H] and value [B, S, K, V], which returns
      [B, T, N, V], and with return_residual also f32[B, T, N].

    Examples:
      >>> import jax.numpy as jnp
      >>> from distattn.integrations.jax_nn import attention_fn
      >>> attention = attention_fn()
      >>> query, key = jnp.ones((1, 2, 4, 8)), jnp.ones((1, 6, 2, 8))
      >>> attention(query, key, key, is_causal=True, implementation="xla").shape
      (1, 2, 4, 8)
    """
    return functools.partial(
        dot_product_attention,
        query_sharding=query_sharding,
        key_value_sharding=key_value_sharding,
        strategy=strategy,
    )
