"""distattn as the attention of Flax: one function for `flax.linen` and for `flax.nnx`.

Both frameworks project, cache and mask by themselves and leave the rest to an `attention_fn`. What they
pass to it differs. linen passes only what is named in its signature, so every keyword is named here; nnx
passes all that it has.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
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
    """What a call may attend to, to be passed where Flax takes `mask`: labels instead of [T, S].

    A pytree, so it goes through jit, and differs from step to step if need be. Not in decode mode, where
    Flax itself computes with the mask.
    """

    dense: ArrayLike | None = None  # [batch..., N|1, T, S], nonzero = attend; beside the labels
    query_positions: ArrayLike | None = None  # int32[T] or [batch..., T]
    key_positions: ArrayLike | None = None  # int32[S] or [batch..., S]; negative = never attended
    query_segment_ids: ArrayLike | None = None  # int32[T] or [batch..., T]; attend iff equal
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
    """A function for `attention_fn=` of linen's MultiHeadDotProductAttention and nnx's MultiHeadAttention.

    It takes query [batch..., T, N, H], key [batch..., S, K, H], value [batch..., S, K, V], with any number
    of batch dimensions, and every keyword of `flax.linen.dot_product_attention` and of
    `flax.nnx.dot_product_attention`; it returns [batch..., T, N, V] in the dtype that these return.

    * `mask` is boolean or, as `make_causal_mask` makes it, of numbers: nonzero = attend. Or it is an
      `AttentionMask`, whose labels take no memory of size [T, S]. A row that attends to no key gives 0
      (in Flax: the mean of all values). A dense mask goes by slot, and what it forbids is forbidden:
      beside positions of another order, as of a zigzag layout, pass is_causal=True and no mask of
      `make_causal_mask`, which would take away keys that a row should see, without an error.
    * `dtype` and `promote_dtype` decide in which dtype query, key and value come in. The softmax is always
      float32, or float64; `force_fp32_for_softmax` makes the output float32, as it does in linen.
    * `broadcast_dropout` and `dropout_rng` only say how to drop, so they matter to nothing here.
    * A step of decode mode is a call with one query and a mask over the whole cache, which may be sharded
      along its length, over Auto axes: over Explicit ones Flax's own write to its cache is refused by JAX.
      strategy='auto' chooses for a step by its own shape; a strategy that is named for a sharded query in
      training serves badly there.

    Args:
      query_sharding: as in `distattn.dot_product_attention`.
      key_value_sharding: as in `distattn.dot_product_attention`; pass it inside jit under Auto axes.
      strategy: how devices exchange.
      is_causal: of every call, beside what a call says itself. A step of decode mode (T = 1 < S with a
        mask) needs none: Flax has it in the mask.
      local_window_size: int or (left, right), on positions.
      logits_soft_cap: c in c * tanh(logit / c).
      query_positions: int32[T] or int32[batch..., T] of every call, a layout such as zigzag; those of an
        `AttentionMask` go first.
      key_positions: int32[S] or int32[batch..., S].
      implementation: as in `distattn.dot_product_attention`.

    Returns:
      The function. Beside what `distattn.dot_product_attention` raises, it raises NotImplementedError for
      dropout that is not deterministic, for attention weights that are to be sown, for positions of a
      rotary embedding, and for replaced einsums; and ValueError for a causal mask or a window over T != S
      without query_positions, when it is not known where the queries stand.

    Example:
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
    usual = AttentionMask(query_positions=query_positions, key_positions=key_positions)

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
        _check_dropout(dropout_rate, deterministic)
        _check_built(
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
        labels = _labels(mask, usual)
        rows, keys = query.shape[-3], key.shape[-3]
        causal = is_causal or always_causal
        if (causal or windowed) and rows != keys and labels.query_positions is None:
            if rows != 1 or labels.dense is None or is_causal or windowed:
                raise ValueError(
                    f"query has T={rows} rows and key has S={keys}, and is_causal or local_window_size "
                    "compares positions: pass AttentionMask(query_positions=...) as mask, int32[T] "
                    "(jnp.arange(T) aligns them at the top left). In decode mode leave is_causal to "
                    "Flax's own mask, and write a window into the mask"
                )
            causal = False  # one step of decode mode: the mask has it
        out = dot_product_attention(
            _flat(query, batch, 3),
            _flat(key, batch, 3),
            _flat(value, batch, 3),
            _spread("bias", bias, batch),
            _spread("mask", _boolean(labels.dense), batch),
            is_causal=causal,
            local_window_size=local_window_size,
            implementation=implementation,
            logits_soft_cap=logits_soft_cap,
            precision=precision,
            query_positions=_flat(labels.query_positions, batch, 1),
            key_positions=_flat(labels.key_positions, batch, 1),
            query_segment_ids=_flat(labels.query_segment_ids, batch, 1),
            key_value_segment_ids=_flat(labels.key_value_segment_ids, batch, 1),
            query_sharding=query_sharding,
            key_value_sharding=key_value_sharding,
            strategy=strategy,
        )
        return jnp.reshape(out, (*batch, *query.shape[-3:-1], value.shape[-1]))

    return attention


def _check_dropout(rate: float, deterministic: bool) -> None:
    if rate > 0 and not deterministic:
        raise NotImplementedError(
            f"dropout_rate is {rate} and deterministic is {deterministic}: dropout of attention weights is "
            "not built; make the layer with dropout_rate=0, and if need be drop from its output, or pass "
            "deterministic=True"
        )


def _check_built(module: Any, input_positions: Any, **einsums: Callable[..., Any] | None) -> None:
    """The arguments that would change the result, or what is kept of it, and cannot."""
    if module is not None:
        raise NotImplementedError(
            "sow_weights=True: attention weights, [T, S] for each head, are never made, so none can be "
            "sown; pass sow_weights=False, or use the framework's own attention_fn to look at them"
        )
    if input_positions is not None:
        raise NotImplementedError(
            "input_positions is given: by these Flax's attention_fn with a rotary embedding turns query "
            "and key, and this one does not; wrap it (functools.wraps) in a function that does, and for "
            "masks pass AttentionMask(query_positions=..., key_positions=...)"
        )
    for name, einsum in einsums.items():
        if einsum is not None:
            raise NotImplementedError(
                f"{name} is given: the matrix products are distattn's own; leave it out, and say precision "
                "for more or fewer bits"
            )


def _labels(mask: jax.Array | AttentionMask | None, usual: AttentionMask) -> AttentionMask:
    """What the call says, and where it says nothing what every call of the function has."""
    if not isinstance(mask, AttentionMask):
        return dataclasses.replace(usual, dense=mask)
    positions = (mask.query_positions, mask.key_positions)
    if all(x is None for x in positions):
        positions = (usual.query_positions, usual.key_positions)
    return dataclasses.replace(mask, query_positions=positions[0], key_positions=positions[1])


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
    """[batch..., dims] as [B, dims]; what has no batch at all stays so."""
    if x is None or len(batch) == 1:
        return x
    x = jnp.asarray(x)
    if x.ndim != len(batch) + dims or not batch and dims < 3:
        return x
    return x.reshape(math.prod(batch), *x.shape[len(batch) :])


def _spread(name: str, x: jax.Array | None, batch: tuple[int, ...]) -> jax.Array | None:
    """[B|1, N|1, T|1, S|1] of an array that broadcasts to [batch..., N, T, S]."""
    if x is None or len(batch) == 1:
        return x
    missing = len(batch) + 3 - x.ndim
    lead = (1,) * missing + x.shape[: x.ndim - 3]
    if missing < 0 or any(a not in (1, b) for a, b in zip(lead, batch, strict=False)):
        raise ValueError(
            f"{name} has shape {x.shape}; it must broadcast to [batch..., N, T, S] with the batch "
            f"dimensions {list(batch)}: each of its first dimensions 1 or that size"
        )
    x = x.reshape((1,) * missing + x.shape)
    if any(size != 1 for size in x.shape[:-3]):
        x = jnp.broadcast_to(x, (*batch, *x.shape[-3:]))
    return x.reshape(math.prod(x.shape[:-3]), *x.shape[-3:])
