"""Attention on one device, block by block: the state over all keys, and its gradient.

Memory is O(T + block) in both directions, never T x S: the backward pass recomputes the weights of a
block from the saved maximum or log-sum-exp (FlashAttention-2, arXiv 2307.08691, section 3). Three things
differ from that algorithm: 1. keys come in any order, and a block is skipped by the range of its
positions, not by its index;
2. blocks are merged by the public `merge`, so each block has a maximum of its own; 3. on a CPU, few queries
meet the keys head by head (`local.cpu`).
"""

from typing import Any

import jax
import jax.numpy as jnp

from distattn.algebra.softmax_state import SoftmaxState, merge, state_dtype
from distattn.local.block import (
    Block,
    Cotangents,
    LogitConfig,
    block_gradients,
    block_state,
    zero_unattended,
)
from distattn.local.inputs import AttentionInputs, dequantised
from distattn.local.mask import split_heads
from distattn.local.tiling import (
    Machine,
    Place,
    Tiles,
    add,
    choose_tiling,
    put,
    rows_first,
)


def fold(inputs: AttentionInputs, logit_config: LogitConfig, machine: Machine) -> SoftmaxState:
    """Return the state over all keys: f32[B, T, N], f32[B, T, N], f32[B, T, N, V]."""
    tiling = choose_tiling(inputs, machine)
    tiles = Tiles(inputs, tiling)
    sizes = tiles.sizes

    def step(state: SoftmaxState, place: Place, query: jax.Array) -> SoftmaxState:
        return merge(state, block_state(tiles.block(place, query), logit_config))

    def write(whole: SoftmaxState, place: Place, state: SoftmaxState) -> SoftmaxState:
        spans = (place.batch, place.query, place.query_heads)
        return jax.tree.map(lambda x, part: put(x, rows_first(part), *spans), whole, state)

    empty = tiles.empty_state(tiling.batch, tiling.heads, sizes.groups, tiling.query)
    whole = tiles.empty_state(sizes.batch, sizes.queries, sizes.heads)
    return tiles.fold(logit_config.scale, empty, step, write, whole)


def fold_gradients(
    inputs: AttentionInputs,
    logit_config: LogitConfig,
    machine: Machine,
    cotangents: Cotangents,
    *,
    key_dtype: jnp.dtype | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Return the gradients of inputs; see `block_gradients` for the formula and for its two uses.

    Args:
      inputs: as in `fold`.
      logit_config: as in `fold`.
      machine: as in `fold`.
      cotangents: f32[B, T, N], f32[B, T, N], f32[B, T, N, V].
      key_dtype: of d_key and d_value; None: of key and value.

    Returns:
      d_query f32[B, T, N, H], d_key [B, S, K, H], d_value [B, S, K, V], d_bias f32 in bias' shape or None.
    """
    tiling = choose_tiling(inputs, machine, backward=True)
    tiles = Tiles(inputs, tiling)
    key, value, bias = inputs.key, inputs.value, inputs.bias
    by_query = (tiles.zeros(inputs.query.shape), None if bias is None else tiles.zeros(bias.shape))
    by_key = tuple(tiles.zeros(x.shape, key_dtype or x.dtype) for x in (key, value))
    block_shape = tiling.batch, tiling.key, tiling.heads
    zero_keys = tuple(tiles.zeros((*block_shape, x.shape[-1])) for x in (key, value))

    def step(carry: tuple[Any, Any], place: Place, query: jax.Array) -> tuple[Any, Any]:
        (d_query, d_bias), (d_key, d_value) = carry
        block = tiles.block(place, query, sums_queries=True)
        rows = Cotangents(*(tiles.rows(x, place) for x in cotangents))
        dq, dk, dv, d_logits = block_gradients(block, logit_config, rows)
        dq = rows_first(dq * logit_config.scale)
        d_query = add(d_query, dq, place.batch, place.query, place.query_heads)
        if d_bias is not None:
            d_logits = d_logits.reshape(tiling.batch, -1, *d_logits.shape[3:])
            d_bias = add(d_bias, d_logits, place.batch, place.query_heads, place.query, place.key)
        return (d_query, d_bias), (d_key + dk, d_value + dv)

    def write(by_key: tuple[jax.Array, ...], place: Place, block: Any) -> tuple[jax.Array, ...]:
        # In an overlap with the block before, this block has 0, and the array has the gradient.
        how, spans = put if place.new_keys is None else add, (place.batch, place.key, place.heads)
        return tuple(how(x, y.astype(x.dtype), *spans) for x, y in zip(by_key, block, strict=True))

    scale = logit_config.scale
    by_query, by_key = tiles.fold_gradients(scale, zero_keys, step, write, (by_query, by_key))
    return by_query[0], *by_key, by_query[1]


def dense_state(inputs: AttentionInputs, logit_config: LogitConfig) -> SoftmaxState:
    """Return the state by operations on [B, K, G, T, S]: for forward mode, hessians, and as a check."""
    inputs = dequantised(inputs)
    kv_heads = inputs.key.shape[2]
    dtype = state_dtype(inputs.query, inputs.key, inputs.value)
    query, key, value = (x.astype(dtype) for x in (inputs.query, inputs.key, inputs.value))
    allowed = inputs.mask.allowed(kv_heads)
    key, value = zero_unattended(key, value, allowed)
    query = query.reshape(*query.shape[:2], kv_heads, -1, query.shape[-1])
    bias = inputs.bias
    block = Block(
        query=jnp.moveaxis(query, 1, 3) * logit_config.scale,
        key=key,
        value=value,
        bias=None if bias is None else split_heads(bias, kv_heads).astype(dtype),
        allowed=allowed,
    )
    return jax.tree.map(rows_first, block_state(block, logit_config))
