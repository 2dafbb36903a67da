"""Attention on one device: keys folded block by block into a `SoftmaxState`, and its gradient.

Memory is O(T + block) in both directions, never T x S: the backward pass makes the weights of a block
again from the saved maximum or log-sum-exp (FlashAttention-2, arXiv 2307.08691, section 3). It differs
from the textbook algorithm in: 1. keys come in any order, and a block is skipped by the range of its
positions, not by its index; 2. the fold is the public `merge`, so that a block's state has a maximum of
its own; 3. few queries meet the keys head by head (`flat`), which on CPU spares a transposed copy of
all keys and values.
"""

from typing import Any

import jax
import jax.numpy as jnp

from distattn.algebra.softmax_state import SoftmaxState, merge, state_dtype
from distattn.local.block import Block, Cotangents, LogitConfig, block_gradients, block_state
from distattn.local.inputs import AttentionInputs, plain
from distattn.local.mask import split_heads
from distattn.local.tiling import (
    Machine,
    Tiles,
    add,
    choose_tiling,
    fresh,
    loop,
    put,
    rows_first,
    unravel,
    visit,
)


def fold(inputs: AttentionInputs, logit_config: LogitConfig, machine: Machine) -> SoftmaxState:
    """The state over all keys, block by block: f32[B, T, N], f32[B, T, N], f32[B, T, N, V]."""
    tiling = choose_tiling(inputs, machine)
    tiles = Tiles(inputs, tiling)
    whole = tiles.empty_state(tiles.batch, tiles.queries, tiles.kv_heads * tiles.groups)
    if tiles.is_empty:
        return whole

    def query_block(index: jax.Array, whole: SoftmaxState) -> SoftmaxState:
        batch, heads, row = unravel(index, tiles.batches, tiles.head_blocks, tiles.query_blocks)
        place = tiles.place(batch, heads, row, 0)
        query = tiles.query(place, logit_config.scale)

        def key_block(column: jax.Array, state: SoftmaxState) -> SoftmaxState:
            place = tiles.place(batch, heads, row, column)
            fresh_keys = fresh(column, place.key, tiles.keys)
            block = tiles.block(place, query, tiles.mask(place), fresh_keys=fresh_keys)
            return merge(state, block_state(block, logit_config))

        empty = tiles.empty_state(tiling.batch, tiling.heads, tiles.groups, tiling.query)
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
    """Gradients of sum(d_sum * sum) + sum(d_weighted_sum * weighted_sum), for weights exp(s - reference).

    See `block_gradients` for the formula and for its two uses.

    Args:
      inputs: as in `fold`.
      logit_config: as in `fold`.
      machine: as in `fold`.
      cotangents: f32[B, T, N], f32[B, T, N], f32[B, T, N, V].
      key_dtype: of d_key and d_value; None: those of key and value.

    Returns:
      d_query f32[B, T, N, H], d_key [B, S, K, H], d_value [B, S, K, V], d_bias f32 as bias, or None.
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
            block = tiles.block(
                place,
                tiles.query(place, logit_config.scale),
                tiles.mask(place),
                fresh_keys=fresh(column, place.key, tiles.keys),
                fresh_queries=fresh(row, place.query, tiles.queries),
            )
            rows = Cotangents(*(tiles.rows(x, place) for x in cotangents))
            dq, dk, dv, d_logits = block_gradients(block, logit_config, rows)
            dq = rows_first(dq * logit_config.scale)
            d_query = add(d_query, dq, place.batch, place.query, place.query_heads)
            if d_bias is not None:
                d_logits = d_logits.reshape(tiling.batch, -1, *d_logits.shape[3:])
                d_bias = add(
                    d_bias, d_logits, place.batch, place.query_heads, place.query, place.key
                )
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
        # Entries that are not fresh are 0 in this block, and final in the array.
        write = put if fresh(column, place.key, tiles.keys) is None else add
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
    """The same state by plain operations on [B, K, G, T, S]: for forward mode, hessians, and as a check."""
    inputs = plain(inputs)
    kv_heads = inputs.key.shape[2]
    dtype = state_dtype(inputs.query, inputs.key, inputs.value)
    query, key, value = (x.astype(dtype) for x in (inputs.query, inputs.key, inputs.value))
    allowed = inputs.mask.allowed(kv_heads)
    if allowed is not None:
        # Slots that no query may attend to can hold anything, and 0 * nan is nan in a gradient too.
        seen = allowed.any(axis=(2, 3))  # [B|1, K|1, S|1]
        seen = jnp.moveaxis(seen, 1, 2)[..., None]
        key, value = jnp.where(seen, key, 0.0), jnp.where(seen, value, 0.0)
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
