"""The gradient of the fold as two TPU kernels: of queries, over keys; of keys and values, over rows.

Both make the weights of a block again from the saved maximum or log-sum-exp, as FlashAttention-2 does
(arXiv 2307.08691, section 3); see `distattn.local.block.block_gradients` for the formula. In the second logits
lie keys by rows, so that no product is of a transposed left operand.
"""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from distattn.local.block import Cotangents, LogitConfig
from distattn.local.inputs import AttentionInputs
from distattn.local.kernels.shared import (
    Index,
    by_key_heads,
    by_queries,
    gradients_of,
    index_of,
    numbers_of_rows,
    tables,
)
from distattn.local.kernels.tpu.block_ops import Plan, Side, each, guarded, loaded, plan_of
from distattn.local.kernels.tpu.launch import Call, Part, launch
from distattn.local.kernels.tpu.tiling import LANES, as_given, as_stored, cut_of
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
    cut = cut_of(inputs, machine, backward=True)
    index = index_of(inputs.mask, cut)
    by_rows, by_keys = tables(inputs.mask, cut)
    plan = plan_of(inputs, logit_config, cut, index)
    dtype = plan.numbers.dtype
    given = _Operands(
        index,
        by_key_heads(inputs.query.astype(dtype), cut),
        by_key_heads(cotangents.d_weighted_sum.astype(dtype), cut),
        numbers_of_rows(cotangents, cut),
        as_stored(inputs.key),
        as_stored(inputs.value),
    )
    d_query = _of_queries(plan, Call(cut, by_rows, inputs.layer, "keys"), given)
    wanted = [key_dtype or x.dtype for x in (inputs.key, inputs.value)]
    results = [
        # Mosaic has no float16.
        jax.ShapeDtypeStruct((1, *x.shape[1:]), jnp.float32 if dtype == jnp.float16 else dtype)
        for x, dtype in zip((given.key, given.value), wanted, strict=True)
    ]
    d_keys = _of_keys(plan, Call(cut, by_keys, inputs.layer, "rows"), given, results)
    d_key, d_value = (
        as_given(x, side.order).astype(dtype)
        for x, side, dtype in zip(d_keys, (plan.key, plan.value), wanted, strict=True)
    )
    return by_queries(d_query, cut), d_key, d_value, None


@dataclasses.dataclass(frozen=True)
class _Operands:
    """What both kernels read."""

    index: Index | None
    query: jax.Array  # [B, K, R, H]
    d_weighted_sum: jax.Array  # [B, K, R, V]
    numbers: jax.Array  # f32[B, K, 2, R], reference and d_sum
    key: jax.Array  # [L, B, S, K, H] in its order
    value: jax.Array  # [L, B, S, K, V] in its order

    def parts(self, plan: Plan, call: Call) -> list[Part]:
        """All of them, in blocks."""
        return [
            *call.index(self.index),
            call.by_rows(self.query),
            call.by_rows(self.d_weighted_sum),
            call.of_rows(self.numbers),
            call.by_keys(self.key, plan.key.order),
            call.by_keys(self.value, plan.value.order),
        ]

    def scratch(self, plan: Plan) -> list[Any]:
        """Where blocks of keys and of values are put head by head."""
        key, value = self.key.dtype, self.value.dtype
        return [*plan.key.scratch(plan.cut, key), *plan.value.scratch(plan.cut, value)]


def _of_queries(plan: Plan, call: Call, given: _Operands) -> jax.Array:
    """f32[B, K, R, H]."""
    cut = plan.cut
    (result,) = launch(
        functools.partial(_query_kernel, plan, call),
        call,
        given.parts(plan, call),
        [call.by_rows(jax.ShapeDtypeStruct(given.query.shape, jnp.float32))],
        scratch=[
            pltpu.VMEM((cut.rows, LANES), jnp.int32),
            pltpu.VMEM((cut.heads, cut.rows, LANES), jnp.float32),
            *given.scratch(plan),
        ],
        width=2 * cut.width + cut.value_width,
    )
    return result


def _query_kernel(plan: Plan, call: Call, counts: Any, order: Any, layer: Any, *refs: Any) -> None:
    cut, step, parts = plan.cut, call.step(counts), iter(refs)
    index = plan.compared.blocks(parts)
    query, d_out, numbers, key, value, d_query, row_index, of_row = itertools.islice(parts, 8)
    keys, values = plan.key.by_heads(key, parts), plan.value.by_heads(value, parts)
    product = plan.numbers.product

    @pl.when(step.is_first)
    def _() -> None:
        d_query[...] = jnp.zeros_like(d_query)
        plan.keep_rows(index, row_index)

        @each(cut.heads)
        def _(head: jax.Array) -> None:
            of_row[head, :, :2] = jnp.swapaxes(numbers[0, head], 0, 1)

    @pl.when(step.is_needed)
    def _() -> None:
        plan.key.fill(key, keys)
        plan.value.fill(value, values)
        allowed = plan.rows_by_keys(index, row_index)

        @each(cut.heads)
        def _(head: jax.Array) -> None:
            own = loaded(keys[head])
            _, d_logits = gradients_of(
                product(query[0, head], own, (1, 1 - plan.key.axis)),
                product(d_out[0, head], loaded(values[head]), (1, 1 - plan.value.axis)),
                allowed,
                plan.logit_config,
                reference=of_row[head, :, :1],
                d_sum=of_row[head, :, 1:2],
            )

            def add(x: jax.Array) -> None:
                d_query[0, head] += x

            guarded(lambda w, x: product(w, x, (1, plan.key.axis)), d_logits, own, add)

    @pl.when(step.is_last)
    def _() -> None:
        d_query[...] *= plan.logit_config.scale


def _of_keys(
    plan: Plan, call: Call, given: _Operands, results: list[jax.ShapeDtypeStruct]
) -> list[jax.Array]:
    """[1, B, S, K, H] and [1, B, S, K, V], each in its order."""
    cut, sides = plan.cut, (plan.key, plan.value)
    return launch(
        functools.partial(_key_kernel, plan, call),
        call,
        given.parts(plan, call),
        [call.by_keys(x, side.order) for x, side in zip(results, sides, strict=True)],
        scratch=[
            pltpu.VMEM((cut.key_block, LANES), jnp.int32),
            *(pltpu.VMEM(side.shape(cut), jnp.float32) for side in sides),
            *given.scratch(plan),
        ],
        width=2 * (cut.width + cut.value_width),
    )


def _key_kernel(plan: Plan, call: Call, counts: Any, order: Any, layer: Any, *refs: Any) -> None:
    cut, step, parts = plan.cut, call.step(counts), iter(refs)
    index = plan.compared.blocks(parts)
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
        allowed = plan.compared.allowed(
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
                plan.logit_config,
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
        both = zip(
            (plan.key, plan.value), results, totals, (plan.logit_config.scale, 1.0), strict=True
        )
        for side, result, total, scale in both:
            side.write(result, (total[...] * scale).astype(result.dtype))
