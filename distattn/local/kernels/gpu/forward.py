"""The fold over keys as one GPU kernel: a softmax state for each block of rows, kept in registers.

Few rows share their keys out to several programs, whose states are merged (flash-decoding: Dao et al.,
2023). It differs from published GPU kernels in: 1. keys and values are read as they lie, once for all query
heads of a key head; 2. masks are functions of positions that are given, in any order, and a block is left
out, before it is loaded, by the range of its positions; 3. each of the splits has the same share of the
blocks that are visited; 4. the state is returned undivided.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from distattn.algebra.softmax_state import SoftmaxState, merge_stacked, softmax_weights
from distattn.local.block import LogitConfig
from distattn.local.inputs import AttentionInputs
from distattn.local.kernels.gpu import launch as gpu_call
from distattn.local.kernels.gpu.block_ops import Piece, Plan, plan_of, unless_finite
from distattn.local.kernels.gpu.launch import Call, launch
from distattn.local.kernels.gpu.tiling import cut_of
from distattn.local.kernels.shared import by_key_heads, by_queries, index_of, logits_of, tables
from distattn.local.tiling import Machine


def fold(inputs: AttentionInputs, logit_config: LogitConfig, machine: Machine) -> SoftmaxState:
    """As `distattn.local.fold`; of inputs that the kernel takes, see `distattn.local.dispatch`."""
    cut = cut_of(inputs, logit_config, machine)
    index = index_of(inputs.mask, cut)
    table, _ = tables(inputs.mask, cut.coarse)
    plan = plan_of(inputs, logit_config, cut, index)
    query = by_key_heads(inputs.query.astype(plan.numbers.dtype), cut)
    scales = inputs.key_scale, inputs.value_scale
    arrays = [
        *gpu_call.index_parts(index),
        gpu_call.by_rows(query),
        *(gpu_call.by_keys(layered(x)) for x in (inputs.key, inputs.value)),
        *(gpu_call.of_keys(layered(x, 4)) for x in scales if x is not None),
    ]
    rows = (cut.splits, cut.batch, cut.kv_heads)
    call = Call(cut, table, "keys", cut.splits)
    weighted_sum, numbers = launch(
        functools.partial(_kernel, plan, call),
        call,
        inputs.layer,
        arrays,
        [
            gpu_call.by_rows(_float32(*rows, cut.all_rows, cut.value_width)),
            gpu_call.of_rows(_float32(*rows, 2, cut.all_rows)),
        ],
        width=cut.width + cut.value_width,
    )
    # The states are merged as they lie: [splits, B, K, R], and its values.
    states = SoftmaxState(numbers[..., 0, :], numbers[..., 1, :], weighted_sum)
    alone = cut.splits == 1
    state = jax.tree.map(lambda x: x[0], states) if alone else merge_stacked(states)
    return jax.tree.map(lambda x: by_queries(x, cut), state)


def layered(x: jax.Array, rank: int = 5) -> jax.Array:
    """[L, B, S, K, .], of one layer if there are not more."""
    return x if x.ndim == rank else x[None]


def _float32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _kernel(plan: Plan, call: Call, counts: Any, order: Any, layer: Any, *refs: Any) -> None:
    cut, parts = plan.cut, iter(refs)
    index = plan.compared.blocks(parts)
    query, key, value = (next(parts) for _ in range(3))
    scales = [next(parts), next(parts)] if plan.quantised else []
    weighted_sum, numbers = parts
    program = call.program(counts, order)
    first_row, of_layer = program.own * cut.rows, layer[0]
    rows = pl.ds(first_row, cut.rows)
    queries = plan.query.load(query, first_row, cut.rows)

    def logits_of_block(number: jax.Array) -> tuple[jax.Array, jax.Array]:
        start = number * cut.key_block
        keys = pl.ds(start, cut.key_block)
        own = plan.key.load(key, start, cut.key_block, of_layer)
        products = plan.scores(queries, own)
        if scales:
            scale = plan.key.load_numbers(scales[0], start, cut.key_block, of_layer)
            products = products * scale[None, :]
        allowed = plan.rows_by_keys(index, rows, keys)
        return start, logits_of(products, allowed, plan.logit_config)[0]

    def block(number: jax.Array, state: tuple[Any, ...]) -> tuple[Any, ...]:
        sums, before, total = state
        start, logits = logits_of_block(number)
        high = jnp.maximum(before, logits.max(axis=1))
        weights, shrink = softmax_weights(logits, high[:, None]), softmax_weights(before, high)
        total = shrink * total + weights.sum(axis=1)
        if scales:
            # A scale may be no number in a slot that nobody attends to.
            scale = plan.value.load_numbers(scales[1], start, cut.key_block, of_layer)
            weights = jnp.where(weights != 0, weights * scale[None, :], 0.0)
        found = plan.weigh(weights, plan.value.load(value, start, cut.key_block, of_layer))
        sums = tuple(x * shrink[:, None] + y for x, y in zip(sums, found, strict=True))
        return sums, high, total

    zero = jnp.zeros((cut.rows,), jnp.float32)
    empty = plan.out.zeros(cut.rows), jnp.full_like(zero, -jnp.inf), zero
    sums, high, total = program.over(block, empty)
    plan.out.store(weighted_sum, first_row, sums, program.split)
    numbers[program.split, 0, rows] = high
    numbers[program.split, 1, rows] = total

    def again(piece: Piece) -> None:
        def block(number: jax.Array, found: jax.Array) -> jax.Array:
            start, logits = logits_of_block(number)
            values = plan.value.load_piece(value, start, cut.key_block, piece, of_layer)
            return found + plan.weigh_guarded(softmax_weights(logits, high[:, None]), values)

        found = program.over(block, jnp.zeros((cut.rows, piece[1]), jnp.float32))
        plan.out.store_piece(weighted_sum, first_row, found, piece, program.split)

    if plan.may_leak(value):
        unless_finite(sums, plan.out, again)
