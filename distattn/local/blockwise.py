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
from distattn.local.inputs import AttentionInputs, plain
from distattn.local.mask import split_heads
from distattn.local.tiling import (
    Machine,
    Tiles,
    add,
    choose_tiling,
    loop,
    put,
    rows_first,
    unravel,
    visit,
)


def fold(inputs: AttentionInputs, logit_config: LogitConfig, machine: Machine) -> SoftmaxState:
    """Return the state over all keys: f32[B, T, N], f32[B, T, N], f32[B, T, N, V]."""
    tiling = choose_tiling(inputs, machine)
    tiles = Tiles(inputs, tiling)
    sizes = tiles.sizes
    whole = tiles.empty_state(sizes.batch, sizes.queries, sizes.heads)
    if tiles.is_empty:
        return whole

    def query_block(index: jax.Array, whole: SoftmaxState) -> SoftmaxState:
        batch, heads, row = unravel(index, tiles.batches, tiles.head_blocks, tiles.query_blocks)
        place = tiles.place(batch, heads, row, 0)
        query = tiles.query(place, logit_config.scale)

        def key_block(column: jax.Array, state: SoftmaxState) -> SoftmaxState:
            block = tiles.block(tiles.place(batch, heads, row, column), query)
            return merge(state, block_state(block, logit_config))

        empty = tiles.empty_state(tiling.batch, tiling.heads, sizes.groups, tiling.query)
        state = visit(tiles.keys_for(place, row), tiles.key_blocks, key_block, empty)
        spans = (place.batch, place.query, place.query_heads)
        return jax.tree.map(lambda x, part: put(x, rows_first(part), *spans), whole, state)

    return loop(tiles.batches * tiles.head_blocks * tiles.query_blocks, query_block, whole)


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
    grads = (
        tiles.zeros(inputs.query.shape),
        None if bias is None else tiles.zeros(bias.shape),
        tiles.zeros(key.shape, key_dtype or key.dtype),
        tiles.zeros(value.shape, key_dtype or value.dtype),
    )

    def key_block(index: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        batch, heads, column = unravel(index, tiles.batches, tiles.head_blocks, tiles.key_blocks)

        def query_block(row: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            d_query, d_bias, d_key_block, d_value_block = carry
            place = tiles.place(batch, heads, row, column)
            query = tiles.query(place, logit_config.scale)
            block = tiles.block(place, query, sums_queries=True)
            rows = Cotangents(*(tiles.rows(x, place) for x in cotangents))
            dq, dk, dv, d_logits = block_gradients(block, logit_config, rows)
            dq = rows_first(dq * logit_config.scale)
            d_query = add(d_query, dq, place.batch, place.query, place.query_heads)
            if d_bias is not None:
                d_logits = d_logits.reshape(tiling.batch, -1, *d_logits.shape[3:])
                spans = place.batch, place.query_heads, place.query, place.key
                d_bias = add(d_bias, d_logits, *spans)
            return d_query, d_bias, d_key_block + dk, d_value_block + dv

        d_query, d_bias, d_key, d_value = carry
        place = tiles.place(batch, heads, 0, column)
        zeros = [
            tiles.zeros((tiling.batch, tiling.key, tiling.heads, x.shape[-1])) for x in (key, value)
        ]
        d_query, d_bias, *blocks = visit(
            tiles.queries_for(place, column),
            tiles.query_blocks,
            query_block,
            (d_query, d_bias, *zeros),
        )
        # In an overlap with the block before, this block has 0, and the array has the gradient.
        write = put if place.new_keys is None else add
        d_key, d_value = (
            write(x, block.astype(x.dtype), place.batch, place.key, place.heads)
            for x, block in zip((d_key, d_value), blocks, strict=True)
        )
        return d_query, d_bias, d_key, d_value

    if not tiles.is_empty:
        grads = loop(tiles.batches * tiles.head_blocks * tiles.key_blocks, key_block, grads)
    d_query, d_bias, d_key, d_value = grads
    return d_query, d_key, d_value, d_bias


def dense_state(inputs: AttentionInputs, logit_config: LogitConfig) -> SoftmaxState:
    """Return the state by operations on [B, K, G, T, S]: for forward mode, hessians, and as a check."""
    inputs = plain(inputs)
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
