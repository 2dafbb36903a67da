"""distattn with the signature of `jax.nn.dot_product_attention`, for code that is given its attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jax.typing import ArrayLike

from distattn.attention.api import dot_product_attention
from distattn.attention.sharding import Sharding
from distattn.attention.strategy import StrategyLike
from distattn.local.inputs import Window


def stand_in(
    *,
    query_sharding: Sharding = None,
    key_value_sharding: Sharding = None,
    strategy: StrategyLike = "auto",
) -> Callable[..., Any]:
    """`jax.nn.dot_product_attention`, its arguments and no others, with the mesh said once.

    `distattn.dot_product_attention` takes the same arguments and more: call that where the call can be
    changed. This is for a model that is given its attention as a function and calls it as jax.nn's. To put
    it into `jax.nn` itself is no good idea: functions that are compiled already keep the other one.

    It differs from jax.nn's in three things:

    * `implementation`: None and 'xla', which is what None means there, are what distattn chooses; 'cudnn'
      is cuDNN for the keys of each device, and raises NotImplementedError where it cannot do the call;
    * the residual of `return_residual=True` is float32 and has a gradient (there: key's dtype, and none);
    * a row that attends to no key gives 0 (there: the mean of all values).

    Args:
      query_sharding: as in `distattn.dot_product_attention`.
      key_value_sharding: as in `distattn.dot_product_attention`; pass it inside jit under Auto axes.
      strategy: how devices exchange.

    Returns:
      The function: query [B, T, N, H] or [T, N, H], key [B, S, K, H], value [B, S, K, V] -> [B, T, N, V],
      with return_residual also f32[B, T, N].

    Example:
      >>> import jax.numpy as jnp
      >>> from distattn.integrations.jax_nn import stand_in
      >>> attention = stand_in()
      >>> query, key = jnp.ones((1, 2, 4, 8)), jnp.ones((1, 6, 2, 8))
      >>> attention(query, key, key, is_causal=True, implementation="xla").shape
      (1, 2, 4, 8)
    """

    def attention(
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
        implementation: str | None = None,
        return_residual: bool = False,
    ) -> jax.Array | tuple[jax.Array, jax.Array]:
        return dot_product_attention(
            query,
            key,
            value,
            bias,
            mask,
            scale=scale,
            is_causal=is_causal,
            query_seq_lengths=query_seq_lengths,
            key_value_seq_lengths=key_value_seq_lengths,
            local_window_size=local_window_size,
            implementation=None if implementation == "xla" else implementation,
            return_residual=return_residual,
            query_sharding=query_sharding,
            key_value_sharding=key_value_sharding,
            strategy=strategy,
        )

    return attention
