"""distattn as the `attention_fn` of `flax.linen` and `flax.nnx`.

Both frameworks project, cache and mask themselves, and leave the rest to an `attention_fn`. linen passes it
only the keywords that its signature names, so the signature names all of them. nnx passes all keywords.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from distattn._compat import needed
from distattn.attention.api import dot_product_attention
from distattn.attention.sharding import Sharding
from distattn.attention.strategy import StrategyLike
from distattn.local.inputs import Window, window_sides

with needed("flax", by=__name__, extra="flax"):
    from flax.linen import dtypes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionMask:
    """Positions and segments, passed where Flax takes `mask`, instead of an array of size [T, S].

    It is a pytree, so it passes through jit and may differ from step to step. In decode mode Flax computes
    with the mask itself, so pass an array there.
    """

    dense: ArrayLike | None = None  # [batch..., N|1, T, S], nonzero = attend; in addition
    query_positions: ArrayLike | None = None  # int32[T] or [batch..., T]
    key_positions: ArrayLike | None = None  # int32[S] or [batch..., S]; negative = empty slot
    query_segment_ids: ArrayLike | None = None  # int32[T] or [batch..., T]; attend if equal
    key_value_segment_ids: ArrayLike | None = None  # int32[S] or [batch..., S]


def attention_fn(
    *,
    query_sharding: Sharding = None,
    key_value_sharding: Sharding = None,
    strategy: StrategyLike = "auto",
    is_causal: bool = False,
    local_window_size: Window = None,
    logits_soft_cap: float | None = None,
    query_positions: ArrayLike | None = None,
    key_positions: ArrayLike | None = None,
    implementation: str | None = None,
) -> Callable[..., jax.Array]:
    """Return the `attention_fn` of linen's MultiHeadDotProductAttention or nnx's MultiHeadAttention.

    It takes query [batch..., T, N, H], key [batch..., S, K, H], value [batch..., S, K, V], with any number
    of batch dimensions, and every keyword of `flax.linen.dot_product_attention` and
    `flax.nnx.dot_product_attention`. It returns [batch..., T, N, V] in the dtype of Flax's functions.

    * `mask` is a boolean or numeric array (nonzero = attend), or an `AttentionMask`. A query that attends
      to no key gives 0, not the mean of all values. A dense mask compares slots, not positions. If your
      tokens are reordered (zigzag), pass is_causal=True and no mask of `make_causal_mask`. Otherwise
      queries silently lose keys.
    * `dtype` and `promote_dtype` give the dtype of query, key and value. The softmax is float32 or float64.
      `force_fp32_for_softmax` makes the output float32, as in linen.
    * `broadcast_dropout` and `dropout_rng` have no effect.
    * A step of decode mode has one query and a mask over the whole cache. The cache may be sharded along
      its length over Auto axes; under Explicit axes JAX refuses Flax's write to it. strategy='auto' suits
      both training and decoding; a strategy for a sharded query is slow in decode mode.

    Args:
      query_sharding: as in `distattn.dot_product_attention`, of [batch..., T, N, H].
      key_value_sharding: of [batch..., S, K, H]; pass it inside jit under Auto axes.
      strategy: how devices exchange.
      is_causal: whether every call is causal. A step of decode mode (T = 1 < S with a mask) is causal by
        Flax's mask.
      local_window_size: int or (left, right), in positions.
      logits_soft_cap: c in c * tanh(logit / c).
      query_positions: int32[T] or int32[batch..., T] of every call, for example of a zigzag layout.
        Positions of an `AttentionMask` replace them.
      key_positions: int32[S] or int32[batch..., S].
      implementation: as in `distattn.dot_product_attention`.

    Returns:
      The function. It raises the errors of `distattn.dot_product_attention`, and NotImplementedError for
      dropout that is not deterministic, sown attention weights, positions of a rotary embedding, and
      replaced einsums. It raises ValueError for a causal mask or a window with T != S without
      query_positions.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from distattn.integrations.flax import attention_fn
      >>> layer = nnx.MultiHeadAttention(
      ...     8, 64, num_kv_heads=2, attention_fn=attention_fn(is_causal=True), decode=False,
      ...     rngs=nnx.Rngs(0),
      ... )
      >>> layer(jnp.ones((2, 16, 64))).shape
      (2, 16, 64)
    """
    always_causal, windowed = is_causal, window_sides(local_window_size) != (None, None)
    default = AttentionMask(query_positions=query_positions, key_positions=key_positions)

    def attention(
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        bias: jax.Array | None = None,
        mask: jax.Array | AttentionMask | None = None,
        broadcast_dropout: bool = True,
        dropout_rng: jax.Array | None = None,
        dropout_rate: float = 0.0,
        deterministic: bool = False,
        dtype: Any = None,
        precision: Any = None,
        module: Any = None,
        *,
        promote_dtype: Callable[..., Any] | None = None,
        is_causal: bool = False,
        input_positions: ArrayLike | None = None,
        force_fp32_for_softmax: bool = False,
        einsum_dot_general: Callable[..., Any] | None = None,
        qk_attn_weights_einsum: Callable[..., Any] | None = None,
        attn_weights_value_einsum: Callable[..., Any] | None = None,
    ) -> jax.Array:
        del broadcast_dropout, dropout_rng
        _check_supported(
            dropout_rate if not deterministic else 0,
            module,
            input_positions,
            einsum_dot_general=einsum_dot_general,
            qk_attn_weights_einsum=qk_attn_weights_einsum,
            attn_weights_value_einsum=attn_weights_value_einsum,
        )
        if promote_dtype is None:
            query, key, value = dtypes.promote_dtype(query, key, value, dtype=dtype)
        else:
            query, key, value = promote_dtype((query, key, value), dtype=dtype)
        if force_fp32_for_softmax:
            query = query.astype(jnp.promote_types(query.dtype, jnp.float32))
        batch = _batch(query, key, value)
        masks = _masks(mask, default)
        queries, keys = query.shape[-3], key.shape[-3]
        causal = is_causal or always_causal
        if (causal or windowed) and queries != keys and masks.query_positions is None:
            if queries != 1 or masks.dense is None or is_causal or windowed:
                raise ValueError(
                    f"query has T={queries} and key has S={keys}, and is_causal or local_window_size "
                    "compares positions: pass AttentionMask(query_positions=...) as mask, int32[T] "
                    "(jnp.arange(T) aligns them at the top left). In decode mode leave is_causal to "
                    "Flax's own mask, and write a window into the mask"
                )
            causal = False  # a step of decode mode: the mask is causal
        labels = ("query_positions", "key_positions", "query_segment_ids", "key_value_segment_ids")
        out = dot_product_attention(
            *(_flat(x, batch, 3) for x in (query, key, value)),
            bias=_broadcast("bias", bias, batch),
            mask=_broadcast("mask", _boolean(masks.dense), batch),
            is_causal=causal,
            local_window_size=local_window_size,
            implementation=implementation,
            logits_soft_cap=logits_soft_cap,
            precision=precision,
            **{name: _flat(getattr(masks, name), batch, 1) for name in labels},
            query_sharding=_flat_sharding(query_sharding, batch),
            key_value_sharding=_flat_sharding(key_value_sharding, batch),
            strategy=strategy,
        )
        return jnp.reshape(out, (*batch, *query.shape[-3:-1], value.shape[-1]))

    return attention


def _check_supported(
    dropout_rate: float, module: Any, input_positions: Any, **einsums: Callable[..., Any] | None
) -> None:
    """Raise NotImplementedError for arguments that would change the result and can't be honoured."""
    if dropout_rate > 0:
        raise NotImplementedError(
            f"dropout_rate is {dropout_rate} and deterministic is False: dropout of attention weights is "
            "not supported; make the layer with dropout_rate=0, drop from its output if needed, or pass "
            "deterministic=True"
        )
    if module is not None:
        raise NotImplementedError(
            "sow_weights=True: attention weights, [T, S] for each head, are never computed; pass "
            "sow_weights=False, or use the framework's own attention_fn to look at them"
        )
    if input_positions is not None:
        raise NotImplementedError(
            "input_positions is given: Flax's attention_fn with a rotary embedding rotates query and key "
            "by them, and this one does not; wrap it (functools.wraps) in a function that does, and for "
            "masks pass AttentionMask(query_positions=..., key_positions=...)"
        )
    for name, einsum in einsums.items():
        if einsum is not None:
            raise NotImplementedError(
                f"{name} is given: the matmuls are distattn's; leave it out, and pass precision "
                "for more or fewer bits"
            )


def _masks(mask: jax.Array | AttentionMask | None, default: AttentionMask) -> AttentionMask:
    """Return the call's masks, with the default positions if the call has none."""
    if not isinstance(mask, AttentionMask):
        return dataclasses.replace(default, dense=mask)
    if mask.query_positions is None and mask.key_positions is None:
        return dataclasses.replace(
            mask, query_positions=default.query_positions, key_positions=default.key_positions
        )
    return mask


def _boolean(mask: ArrayLike | None) -> jax.Array | None:
    if mask is None:
        return None
    mask = jnp.asarray(mask)
    return mask if mask.dtype == jnp.bool_ else mask != 0


def _batch(query: jax.Array, key: jax.Array, value: jax.Array) -> tuple[int, ...]:
    batch = query.shape[:-3]
    for name, x in (("key", key), ("value", value)):
        if x.shape[:-3] != batch:
            raise ValueError(
                f"{name} has batch dimensions {list(x.shape[:-3])} and query has {list(batch)}; they must "
                "be equal, broadcast them"
            )
    return batch


def _flat(x: ArrayLike | None, batch: tuple[int, ...], dims: int) -> ArrayLike | None:
    """Reshape [batch..., dims] to [B, dims]; return an array without batch dimensions as it is."""
    if x is None or len(batch) == 1:
        return x
    x = jnp.asarray(x)
    if x.ndim != len(batch) + dims or not batch and dims < 3:
        return x
    return x.reshape(math.prod(batch), *x.shape[len(batch) :])


def _flat_sharding(sharding: Sharding, batch: tuple[int, ...]) -> Sharding:
    """Return the sharding of `_flat` of an array: all axes of the batch dimensions shard B."""
    if sharding is None or len(batch) == 1:
        return sharding
    spec = tuple(sharding.spec if isinstance(sharding, NamedSharding) else sharding)
    leading = (x for x in spec[: len(batch)] if x is not None)
    axes = tuple(axis for x in leading for axis in (x if isinstance(x, tuple) else (x,)))
    flat = PartitionSpec(axes or None, *spec[len(batch) :])
    return NamedSharding(sharding.mesh, flat) if isinstance(sharding, NamedSharding) else flat


def _broadcast(name: str, x: jax.Array | None, batch: tuple[int, ...]) -> jax.Array | None:
    """Return [B|1, N|1, T|1, S|1] of an array that broadcasts to [batch..., N, T, S]."""
    if x is None or len(batch) == 1:
        return x
    missing = len(batch) + 3 - x.ndim
    leading = (1,) * missing + x.shape[: x.ndim - 3]
    if missing < 0 or any(a not in (1, b) for a, b in zip(leading, batch, strict=False)):
        raise ValueError(
            f"{name} has shape {x.shape}; it must broadcast to [batch..., N, T, S] with the batch "
            f"dimensions {list(batch)}: each of its first dimensions 1 or that size"
        )
    x = x.reshape((1,) * missing + x.shape)
    if any(size != 1 for size in x.shape[:-3]):
        x = jnp.broadcast_to(x, (*batch, *x.shape[-3:]))
    return x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])
