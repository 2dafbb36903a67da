"""The gradient of the fold as two GPU kernels: of queries, over keys; of keys and values, over rows.

Both make the weights of a block again from the saved maximum or log-sum-exp, as FlashAttention-2 does
(arXiv 2307.08691, section 3); see `distattn.local.block.block_gradients` for the formula. Each sum is one
program's, or is added in the order of the splits: the same bits each time, and no atomic operation. In the
second logits lie keys by rows, so that no product is of a transposed left operand.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from distattn.local.block import Cotangents, LogitConfig
from distattn.local.inputs import AttentionInputs
from distattn.local.kernels.gpu import launch as gpu_call
from distattn.local.kernels.gpu.block_ops import Piece, Pieces, Plan, plan_of, unless_finite
from distattn.local.kernels.gpu.forward import layered
from distattn.local.kernels.gpu.launch import Call, Part, launch
from distattn.local.kernels.gpu.tiling import cut_of
from distattn.local.kernels.shared import (
    Table,
    by_key_heads,
    by_queries,
    gradients_of,
    index_of,
    numbers_of_rows,
    tables,
)
from distattn.local.tiling import Machine


def fold_gradients(
    inputs: AttentionInputs,
    logit_config: LogitConfig,
    machine: Machine,
    cotangents: Cotangents,
    *,
    key_dtype: jnp.dtype | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    """As `distattn.local.fold_gradients`; of inputs that the kernels take, which have no bias."""
    cut = cut_of(inputs, logit_config, machine, backward=True)
    index = index_of(inputs.mask, cut)
    by_rows, by_keys = tables(inputs.mask, cut.coarse)
    plan = plan_of(inputs, logit_config, cut, index, backward=True)
    dtype = plan.numbers.dtype
    arrays = [
        *gpu_call.index_parts(index),
        gpu_call.by_rows(by_key_heads(inputs.query.astype(dtype), cut)),
        gpu_call.by_rows(by_key_heads(cotangents.d_weighted_sum.astype(dtype), cut)),
        gpu_call.of_rows(numbers_of_rows(cotangents, cut)),
        *(gpu_call.by_keys(layered(x)) for x in (inputs.key, inputs.value)),
    ]
    d_query = _of_queries(plan, by_rows, inputs.layer, arrays)
    results = [
        jax.ShapeDtypeStruct(layered(x).shape[1:], key_dtype or x.dtype)
        for x in (inputs.key, inputs.value)
    ]
    call = Call(cut, by_keys, "rows")
    d_key, d_value = launch(
        functools.partial(_key_kernel, plan, call),
        call,
        inputs.layer,
        arrays,
        [gpu_call.by_keys(x) for x in results],
        width=2 * (cut.width + cut.value_width),
    )
    return by_queries(d_query, cut), d_key, d_value, None


def _of_queries(plan: Plan, table: Table, layer: jax.Array | None, arrays: list[Part]) -> jax.Array:
    """f32[B, K, R, H]."""
    cut = plan.cut
    call = Call(cut, table, "keys", cut.splits)
    shape = (cut.splits, cut.batch, cut.kv_heads, cut.all_rows, cut.width)
    (parts,) = launch(
        functools.partial(_query_kernel, plan, call),
        call,
        layer,
        arrays,
        [gpu_call.by_rows(jax.ShapeDtypeStruct(shape, jnp.float32))],
        width=2 * cut.width + cut.value_width,
    )
    return parts[0] if cut.splits == 1 else parts.sum(axis=0)


def _query_kernel(plan: Plan, call: Call, counts: Any, order: Any, layer: Any, *refs: Any) -> None:
    cut, parts = plan.cut, iter(refs)
    index = plan.compared.blocks(parts)
    query, d_out, numbers, key, value, d_query = parts
    program = call.program(counts, order)
    first_row, of_layer = program.own * cut.rows, layer[0]
    rows = pl.ds(first_row, cut.rows)
    queries = plan.query.load(query, first_row, cut.rows)
    d_outs = plan.out.load(d_out, first_row, cut.rows)
    reference, d_sum = (numbers[n, rows][:, None] for n in range(2))

    def gradients(number: jax.Array) -> tuple[jax.Array, Pieces, jax.Array]:
        start = number * cut.key_block
        keys = pl.ds(start, cut.key_block)
        own = plan.key.load(key, start, cut.key_block, of_layer)
        values = plan.value.load(value, start, cut.key_block, of_layer)
        _, d_logits = gradients_of(
            plan.scores(queries, own),
            plan.scores(d_outs, values),
            plan.rows_by_keys(index, rows, keys),
            plan.logit_config,
            reference=reference,
            d_sum=d_sum,
        )
        return start, own, d_logits

    def block(number: jax.Array, sums: Pieces) -> Pieces:
        _, own, d_logits = gradients(number)
        return _added(sums, plan.weigh(d_logits, own))

    sums = program.over(block, plan.query.zeros(cut.rows))
    plan.query.store(d_query, first_row, _times(sums, plan.logit_config.scale), program.split)

    def again(piece: Piece) -> None:
        def block(number: jax.Array, found: jax.Array) -> jax.Array:
            start, _, d_logits = gradients(number)
            own = plan.key.load_piece(key, start, cut.key_block, piece, of_layer)
            return found + plan.weigh_guarded(d_logits, own)

        found = program.over(block, jnp.zeros((cut.rows, piece[1]), jnp.float32))
        found = found * plan.logit_config.scale
        plan.query.store_piece(d_query, first_row, found, piece, program.split)

    if plan.may_leak(key):
        unless_finite(sums, plan.query, again)


def _key_kernel(plan: Plan, call: Call, counts: Any, order: Any, layer: Any, *refs: Any) -> None:
    cut, parts = plan.cut, iter(refs)
    index = plan.compared.blocks(parts)
    query, d_out, numbers, key, value, d_key, d_value = parts
    program = call.program(counts, order)
    start, of_layer = program.own * cut.key_block, layer[0]
    keys = pl.ds(start, cut.key_block)
    own_keys = plan.key.load(key, start, cut.key_block, of_layer)
    own_values = plan.value.load(value, start, cut.key_block, of_layer)

    def gradients(number: jax.Array) -> tuple[jax.Array, Pieces, Pieces, jax.Array, jax.Array]:
        first_row = number * cut.rows
        rows = pl.ds(first_row, cut.rows)
        queries = plan.query.load(query, first_row, cut.rows)
        d_outs = plan.out.load(d_out, first_row, cut.rows)
        weights, d_logits = gradients_of(
            plan.scores(own_keys, queries),
            plan.scores(own_values, d_outs),
            plan.compared.allowed(
                lambda n: index[0][n, rows][None, :], lambda n: index[1][n, keys][:, None]
            ),
            plan.logit_config,
            reference=numbers[0, rows][None, :],
            d_sum=numbers[1, rows][None, :],
        )
        return first_row, queries, d_outs, weights, d_logits

    def block(number: jax.Array, sums: tuple[Pieces, Pieces]) -> tuple[Pieces, Pieces]:
        _, queries, d_outs, weights, d_logits = gradients(number)
        key_sums, value_sums = sums
        value_sums = _added(value_sums, plan.weigh(weights, d_outs))
        return _added(key_sums, plan.weigh(d_logits, queries)), value_sums

    zeros = plan.key.zeros(cut.key_block), plan.value.zeros(cut.key_block)
    key_sums, value_sums = program.over(block, zeros)
    plan.key.store(d_key, start, _times(key_sums, plan.logit_config.scale))
    plan.value.store(d_value, start, value_sums)

    def again(piece: Piece) -> None:
        def block(number: jax.Array, found: jax.Array) -> jax.Array:
            first_row, *_, d_logits = gradients(number)
            queries = plan.query.load_piece(query, first_row, cut.rows, piece)
            return found + plan.weigh_guarded(d_logits, queries)

        found = program.over(block, jnp.zeros((cut.key_block, piece[1]), jnp.float32))
        plan.key.store_piece(d_key, start, found * plan.logit_config.scale, piece)

    if plan.may_leak(query):
        unless_finite(key_sums, plan.key, again)


def _added(sums: Pieces, more: Pieces) -> Pieces:
    return tuple(x + y for x, y in zip(sums, more, strict=True))


def _times(sums: Pieces, scale: float) -> Pieces:
    return tuple(x * scale for x in sums)
