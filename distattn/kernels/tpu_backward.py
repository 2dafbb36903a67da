"""The gradient of the fold as two TPU kernels: of queries, over keys; of keys and values, over rows.

Both make the weights of a block again from the saved maximum or log-sum-exp, as FlashAttention-2 does
(arXiv 2307.08691, section 3); see `distattn.block.block_gradients` for the formula. In the second logits
lie keys by rows, so that no product is of a transposed left operand.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from distattn.block import Scoring
from distattn.kernels.rows import Index, by_key_heads, by_queries, index_of
from distattn.kernels.scores import gradients_of
from distattn.kernels.table import tables
from distattn.kernels.tpu_block import Plan, Side, each, guarded, loaded, plan_of
from distattn.kernels.tpu_blocks import LANES
from distattn.kernels.tpu_call import Call, launch
from distattn.kernels.tpu_layout import as_given, as_stored, cut_of
from distattn.operands import Operands
from distattn.tiles import Machine


def fold_gradients(
    operands: Operands,
    scoring: Scoring,
    machine: Machine,
    reference: jax.Array,
    d_sum: jax.Array,
    d_weighted_sum: jax.Array,
    *,
    key_dtype: jnp.dtype | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    """As `distattn.local.fold_gradients`; of operands that the kernels take, which have no bias."""
    cut = cut_of(operands, machine, backward=True)
    index = index_of(operands.mask, cut)
    by_rows, by_keys = tables(operands.mask, cut)
    plan = plan_of(operands, scoring, cut, masked=index is not None)
    dtype = plan.numbers.dtype
    rows = [
        by_key_heads(operands.query.astype(dtype), cut),
        by_key_heads(d_weighted_sum.astype(dtype), cut),
        by_key_heads(jnp.stack([reference, d_sum], axis=-1), cut).swapaxes(2, 3),
    ]
    arrays = [as_stored(operands.key), as_stored(operands.value)]
    sides = plan.key, plan.value
    d_query = _of_queries(plan, Call(cut, by_rows, operands.layer, "keys"), index, rows, arrays)
    given = operands.key.dtype, operands.value.dtype
    wanted = [key_dtype or x for x in given]
    results = [
        jax.ShapeDtypeStruct((1, *x.shape[1:]), jnp.float32 if dtype == jnp.float16 else dtype)
        for x, dtype in zip(arrays, wanted, strict=True)
    ]
    call = Call(cut, by_keys, operands.layer, "rows")
    d_key, d_value = _of_keys(plan, call, index, rows, arrays, results)
    d_key, d_value = (
        as_given(x, side.order).astype(dtype)
        for x, side, dtype in zip((d_key, d_value), sides, wanted, strict=True)
    )
    return by_queries(d_query, cut), d_key, d_value, None


def _inputs(plan: Plan, call: Call, index: Index | None, rows: list, arrays: list) -> list:
    query, d_weighted_sum, numbers = rows
    key, value = arrays
    return [
        *call.index(index),
        call.by_rows(query),
        call.by_rows(d_weighted_sum),
        call.of_rows(numbers),
        call.by_keys(key, plan.key.order),
        call.by_keys(value, plan.value.order),
    ]


def _of_queries(plan: Plan, call: Call, index, rows: list, arrays: list) -> jax.Array:
    """f32[B, K, R, H]."""
    cut = plan.cut
    d_query = jax.ShapeDtypeStruct(rows[0].shape, jnp.float32)
    (result,) = launch(
        functools.partial(_query_kernel, plan, call),
        call,
        _inputs(plan, call, index, rows, arrays),
        [call.by_rows(d_query)],
        scratch=[
            pltpu.VMEM((cut.rows, LANES), jnp.int32),
            pltpu.VMEM((cut.heads, cut.rows, LANES), jnp.float32),
            *plan.key.scratch(cut, arrays[0].dtype),
            *plan.value.scratch(cut, arrays[1].dtype),
        ],
        width=2 * cut.width + cut.value_width,
    )
    return result


def _query_kernel(plan: Plan, call: Call, counts, order, layer, *refs) -> None:
    cut, step, parts = plan.cut, call.step(counts), iter(refs)
    index = plan.index(parts)
    query, d_out, numbers, key, value, d_query, row_index, of_row = itertools.islice(parts, 8)
    keys, values = plan.key.by_heads(key, parts), plan.value.by_heads(value, parts)
    product = plan.numbers.product

    @pl.when(step.is_first)
    def _() -> None:
        d_query[...] = jnp.zeros_like(d_query)
        if index:
            row_index[:, :3] = jnp.swapaxes(index[0][0], 0, 1)

        @each(cut.heads)
        def _(head: jax.Array) -> None:
            of_row[head, :, :2] = jnp.swapaxes(numbers[0, head], 0, 1)

    @pl.when(step.is_needed)
    def _() -> None:
        plan.key.fill(key, keys)
        plan.value.fill(value, values)
        allowed = plan.allowed(
            lambda n: row_index[:, n : n + 1], lambda n: index[1][0, n : n + 1, :]
        )

        @each(cut.heads)
        def _(head: jax.Array) -> None:
            own = loaded(keys[head])
            _, d_logits = gradients_of(
                product(query[0, head], own, (1, 1 - plan.key.axis)),
                product(d_out[0, head], loaded(values[head]), (1, 1 - plan.value.axis)),
                allowed,
                plan.scoring,
                reference=of_row[head, :, :1],
                d_sum=of_row[head, :, 1:2],
            )

            def add(x: jax.Array) -> None:
                d_query[0, head] += x

            guarded(lambda w, x: product(w, x, (1, plan.key.axis)), d_logits, own, add)

    @pl.when(step.is_last)
    def _() -> None:
        d_query[...] *= plan.scoring.scale


def _of_keys(
    plan: Plan, call: Call, index, rows: list, arrays: list, results: list
) -> list[jax.Array]:
    """[1, B, S, K, H] and [1, B, S, K, V], each in its order."""
    cut, sides = plan.cut, (plan.key, plan.value)
    return launch(
        functools.partial(_key_kernel, plan, call),
        call,
        _inputs(plan, call, index, rows, arrays),
        [call.by_keys(x, side.order) for x, side in zip(results, sides, strict=True)],
        scratch=[
            pltpu.VMEM((cut.key_block, LANES), jnp.int32),
            *(pltpu.VMEM(side.shape(cut), jnp.float32) for side in sides),
            *plan.key.scratch(cut, arrays[0].dtype),
            *plan.value.scratch(cut, arrays[1].dtype),
        ],
        width=2 * (cut.width + cut.value_width),
    )


def _key_kernel(plan: Plan, call: Call, counts, order, layer, *refs) -> None:
    cut, step, parts = plan.cut, call.step(counts), iter(refs)
    index = plan.index(parts)
    query, d_out, numbers, key, value, *results = itertools.islice(parts, 7)
    key_index, *totals = itertools.islice(parts, 3)
    keys, values = plan.key.by_heads(key, parts), plan.value.by_heads(value, parts)
    product = plan.numbers.product

    def over_rows(side: Side, weights: jax.Array, x: jax.Array) -> jax.Array:
        # weights [keys, rows], x [rows, .]; the result lies as the keys do
        return product(x, weights, (0, 1)) if side.axis else product(weights, x, (1, 0))

    @pl.when(step.is_first)
    def _() -> None:
        for total in totals:
            total[...] = jnp.zeros_like(total)
        plan.key.fill(key, keys)
        plan.value.fill(value, values)
        if index:
            key_index[:, :2] = jnp.swapaxes(index[1][0], 0, 1)

    @pl.when(step.is_needed)
    def _() -> None:
        allowed = plan.allowed(
            lambda n: index[0][0, n : n + 1, :], lambda n: key_index[:, n : n + 1]
        )

        @each(cut.heads)
        def _(head: jax.Array) -> None:
            own, out = query[0, head], d_out[0, head]
            key_sum, value_sum = totals
            weights, d_logits = gradients_of(
                product(loaded(keys[head]), own, (1 - plan.key.axis, 1)),
                product(loaded(values[head]), out, (1 - plan.value.axis, 1)),
                allowed,
                plan.scoring,
                reference=numbers[0, head, :1, :],
                d_sum=numbers[0, head, 1:2, :],
            )
            value_sum[head] += over_rows(plan.value, weights, out)

            def add(x: jax.Array) -> None:
                key_sum[head] += x

            own = own.astype(jnp.float32)
            guarded(lambda w, x: over_rows(plan.key, w, x), d_logits, own, add)

    @pl.when(step.is_last)
    def _() -> None:
        both = zip((plan.key, plan.value), results, totals, (plan.scoring.scale, 1.0), strict=True)
        for side, result, total, scale in both:
            side.write(result, (total[...] * scale).astype(result.dtype))
