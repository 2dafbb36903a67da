"""The gradient of the fold as two TPU kernels: of queries, over the keys; of keys and values, over the rows.

Both make the weights of a block again from the saved maximum or log-sum-exp, as FlashAttention-2 does
(arXiv 2307.08691, section 3); see `distattn.block.block_gradients` for the formula. In the second logits
lie keys by rows, so that no product is of a transposed left operand.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from distattn.block import Scoring
from distattn.kernels.tpu_block import (
    Plan,
    by_heads,
    each,
    gradients_of,
    guarded,
    loaded,
    plan_of,
    split_heads,
)
from distattn.kernels.tpu_blocks import LANES
from distattn.kernels.tpu_call import Call, launch
from distattn.kernels.tpu_layout import (
    Index,
    as_stored,
    by_key_heads,
    by_queries,
    cut_of,
    index_of,
    tables,
)
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
    d_query = _of_queries(plan, Call(cut, by_rows, operands.layer, "keys"), index, rows, arrays)
    results = [
        jax.ShapeDtypeStruct(
            (1, *x.shape[1:]), jnp.float32 if wanted == jnp.float16 else wanted
        )
        for x, wanted in zip(
            arrays,
            (key_dtype or operands.key.dtype, key_dtype or operands.value.dtype),
            strict=True,
        )
    ]
    call = Call(cut, by_keys, operands.layer, "rows")
    d_key, d_value = _of_keys(plan, call, index, rows, arrays, results)
    return by_queries(d_query, cut), d_key[0], d_value[0], None


def _inputs(call: Call, index: Index | None, rows: list, arrays: list) -> list:
    query, d_weighted_sum, numbers = rows
    return [
        *call.index(index),
        call.by_rows(query),
        call.by_rows(d_weighted_sum),
        call.of_rows(numbers),
        *(call.by_keys(x) for x in arrays),
    ]


def _of_queries(plan: Plan, call: Call, index, rows: list, arrays: list) -> jax.Array:
    """f32[B, K, R, H]."""
    cut = plan.cut
    d_query = jax.ShapeDtypeStruct(rows[0].shape, jnp.float32)
    (result,) = launch(
        functools.partial(_query_kernel, plan, call),
        call,
        _inputs(call, index, rows, arrays),
        [call.by_rows(d_query)],
        scratch=[
            pltpu.VMEM((cut.rows, LANES), jnp.int32),
            pltpu.VMEM((cut.heads, cut.rows, LANES), jnp.float32),
            *by_heads(cut, *arrays),
        ],
    )
    return result


def _query_kernel(plan: Plan, call: Call, counts, order, layer, *refs) -> None:
    *index, query, d_out, numbers, key, value, d_query, row_index, of_row, keys, values = refs
    cut, step = plan.cut, call.step(counts)

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
        split_heads(key, keys)
        split_heads(value, values)
        allowed = plan.allowed(
            lambda n: row_index[:, n : n + 1], lambda n: index[1][0, n : n + 1, :]
        )

        @each(cut.heads)
        def _(head: jax.Array) -> None:
            own, product = loaded(keys[head]), plan.numbers.product
            _, d_logits = gradients_of(
                product(query[0, head], own, (1, 1)),
                product(d_out[0, head], loaded(values[head]), (1, 1)),
                allowed,
                plan.scoring,
                reference=of_row[head, :, :1],
                d_sum=of_row[head, :, 1:2],
            )

            def add(x: jax.Array) -> None:
                d_query[0, head] += x

            add(guarded(d_logits, own, plan.numbers, add))

    @pl.when(step.is_last)
    def _() -> None:
        d_query[...] *= plan.scoring.scale


def _of_keys(
    plan: Plan, call: Call, index, rows: list, arrays: list, results: list
) -> list[jax.Array]:
    """[1, B, S, K, H] and [1, B, S, K, V]."""
    cut = plan.cut
    return launch(
        functools.partial(_key_kernel, plan, call),
        call,
        _inputs(call, index, rows, arrays),
        [call.by_keys(x) for x in results],
        scratch=[
            pltpu.VMEM((cut.key_block, LANES), jnp.int32),
            *by_heads(cut, *arrays),
            *(pltpu.VMEM((cut.heads, cut.key_block, x.shape[-1]), jnp.float32) for x in arrays),
        ],
    )


def _key_kernel(plan: Plan, call: Call, counts, order, layer, *refs) -> None:
    *index, query, d_out, numbers, key, value, d_key, d_value = refs[:-5]
    key_index, keys, values, key_sum, value_sum = refs[-5:]
    cut, step = plan.cut, call.step(counts)

    @pl.when(step.is_first)
    def _() -> None:
        key_sum[...] = jnp.zeros_like(key_sum)
        value_sum[...] = jnp.zeros_like(value_sum)
        split_heads(key, keys)
        split_heads(value, values)
        if index:
            key_index[:, :2] = jnp.swapaxes(index[1][0], 0, 1)

    @pl.when(step.is_needed)
    def _() -> None:
        allowed = plan.allowed(
            lambda n: index[0][0, n : n + 1, :], lambda n: key_index[:, n : n + 1]
        )

        @each(cut.heads)
        def _(head: jax.Array) -> None:
            product = plan.numbers.product
            own, out = query[0, head], d_out[0, head]
            weights, d_logits = gradients_of(
                product(loaded(keys[head]), own, (1, 1)),
                product(loaded(values[head]), out, (1, 1)),
                allowed,
                plan.scoring,
                reference=numbers[0, head, :1, :],
                d_sum=numbers[0, head, 1:2, :],
            )
            value_sum[head] += product(weights, out, (1, 0))

            def add(x: jax.Array) -> None:
                key_sum[head] += x

            add(guarded(d_logits, own.astype(jnp.float32), plan.numbers, add))

    @pl.when(step.is_last)
    def _() -> None:
        for result, total, scale in ((d_key, key_sum, plan.scoring.scale), (d_value, value_sum, 1)):
            found = (total[...] * scale).astype(result.dtype)
            if cut.heads == 1:
                result[0, 0, :, 0, :] = found[0]
            else:
                result[0, 0] = jnp.swapaxes(found, 0, 1)
