"""The fold over keys as one TPU kernel: a softmax state for each block of rows, kept in VMEM.

It differs from published TPU kernels in: 1. keys and values are read as they lie, [B, S, K, .], 8 heads at
a time, and never transposed; 2. masks are functions of positions that are given, in any order, and a block
is left out, before it is loaded, by the range of its positions; 3. the state is returned undivided; 4.
where a device has two cores and one would idle, each folds every other block of keys, and the two states
are merged.
"""

import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from distattn.algebra.softmax_state import SoftmaxState, merge, softmax_weights
from distattn.local.block import LogitConfig
from distattn.local.inputs import AttentionInputs
from distattn.local.kernels.shared import by_key_heads, by_queries, index_of, logits_of, tables
from distattn.local.kernels.tpu.block_ops import Plan, each, guarded, loaded, plan_of
from distattn.local.kernels.tpu.launch import Call, Part, Step, launch
from distattn.local.kernels.tpu.tiling import LANES, TpuCut, as_stored, cut_of, scales_of
from distattn.local.tiling import Machine


def fold(inputs: AttentionInputs, logit_config: LogitConfig, machine: Machine) -> SoftmaxState:
    """As `distattn.local.fold`; of inputs that the kernel takes, see `distattn.local.dispatch`."""
    cut = cut_of(inputs, machine)
    plan, call, arrays, scratch = prepared(inputs, logit_config, cut)
    rows = (cut.parts * cut.batch, cut.kv_heads)
    weighted_sum, numbers = launch(
        functools.partial(_kernel, plan, call),
        call,
        arrays,
        [
            call.by_rows(_float32(*rows, cut.all_rows, cut.value_width)),
            call.of_rows(_float32(*rows, 2, cut.all_rows)),
        ],
        scratch=[
            pltpu.VMEM((cut.rows, LANES), jnp.int32),
            pltpu.VMEM((cut.heads, cut.rows, LANES), jnp.float32),
            pltpu.VMEM((cut.heads, cut.rows, LANES), jnp.float32),
            *scratch,
        ],
        width=cut.width + cut.value_width,
    )
    parts = [
        SoftmaxState(
            by_queries(own[:, :, 0], cut), by_queries(own[:, :, 1], cut), by_queries(total, cut)
        )
        for own, total in zip(
            jnp.split(numbers, cut.parts), jnp.split(weighted_sum, cut.parts), strict=True
        )
    ]
    return functools.reduce(merge, parts)


def prepared(
    inputs: AttentionInputs, logit_config: LogitConfig, cut: TpuCut
) -> tuple[Plan, Call, list[Part], list[Any]]:
    """Of a kernel that folds: plan and call, its inputs, and the scratch of its keys and values."""
    index = index_of(inputs.mask, cut)
    table, _ = tables(inputs.mask, cut)
    plan = plan_of(inputs, logit_config, cut, index)
    call = Call(cut, table, inputs.layer, "keys")
    key, value = as_stored(inputs.key), as_stored(inputs.value)
    query = by_key_heads(inputs.query.astype(plan.numbers.dtype), cut)
    arrays = [
        *call.index(index),
        call.by_rows(query),
        call.by_keys(key, plan.key.order),
        call.by_keys(value, plan.value.order),
        *(call.by_scales(x) for x in scales_of(inputs, cut)),
    ]
    scratch = [*plan.key.scratch(cut, key.dtype), *plan.value.scratch(cut, value.dtype)]
    return plan, call, arrays, scratch


def _float32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _kernel(plan: Plan, call: Call, counts: Any, order: Any, layer: Any, *refs: Any) -> None:
    cut, step, parts = plan.cut, call.step(counts), iter(refs)
    index = plan.compared.blocks(parts)
    query, key, value = itertools.islice(parts, 3)
    scales = plan.scales(parts)
    weighted_sum, numbers, row_index, highest, sums = itertools.islice(parts, 5)
    state = weighted_sum, highest, sums
    fold_step(plan, step, index, (query, key, value), scales, state, row_index, parts)

    @pl.when(step.is_last)
    def _() -> None:
        @each(cut.heads)
        def _(head: jax.Array) -> None:
            numbers[0, head] = numbers_of(highest[head], sums[head])


def fold_step(
    plan: Plan,
    step: Step,
    index: list[Any],
    inputs: Any,
    scales: Any,
    state: Any,
    row_index: Any,
    scratch: Iterator[Any],
) -> None:
    """One step of the fold, in a kernel: a block of keys folded into the state of a block of rows.

    Args:
      plan: of the call.
      step: where in the grid this is; the first one of a block of rows empties the state.
      index: of the mask, or [].
      inputs: blocks of query, key and value.
      scales: of keys and values, as `Plan.scales` gives them.
      state: f32[1, heads, rows, V], and maximum and sum f32[heads, rows, 128], the same in all lanes.
      row_index: int32[rows, 128], scratch.
      scratch: the rest of it, of keys and values.
    """
    cut, product = plan.cut, plan.numbers.product
    query, key, value = inputs
    weighted_sum, highest, sums = state
    keys, values = plan.key.by_heads(key, scratch), plan.value.by_heads(value, scratch)

    @pl.when(step.is_first)
    def _() -> None:
        weighted_sum[...] = jnp.zeros_like(weighted_sum)
        highest[...] = jnp.full_like(highest, -jnp.inf)
        sums[...] = jnp.zeros_like(sums)
        plan.keep_rows(index, row_index)

    @pl.when(step.is_needed)
    def _() -> None:
        plan.key.fill(key, keys)
        plan.value.fill(value, values)
        allowed = plan.rows_by_keys(index, row_index)

        @each(cut.heads)
        def _(head: jax.Array) -> None:
            products = product(query[0, head], loaded(keys[head]), (1, 1 - plan.key.axis))
            products = products if scales is None else products * scales(0, head)
            logits, _ = logits_of(products, allowed, plan.logit_config)
            before = highest[head, :, :1]
            high = jnp.maximum(before, logits.max(axis=1, keepdims=True))
            weights, shrink = softmax_weights(logits, high), softmax_weights(before, high)
            total = shrink * sums[head, :, :1] + weights.sum(axis=1, keepdims=True)
            highest[head] = jnp.broadcast_to(high, highest.shape[1:])
            sums[head] = jnp.broadcast_to(total, sums.shape[1:])
            weighted_sum[0, head] *= shrink
            if scales is not None:  # in an empty slot the scale may be NaN
                weights = jnp.where(weights != 0, weights * scales(1, head), 0.0)

            def add(x: jax.Array) -> None:
                weighted_sum[0, head] += x

            guarded(
                lambda w, x: product(w, x, (1, plan.value.axis)), weights, loaded(values[head]), add
            )


def numbers_of(highest: jax.Array, sums: jax.Array) -> jax.Array:
    """f32[2, rows] from maximum and sum of a head, f32[rows, 128], the same in all lanes."""
    lane = lax.broadcasted_iota(jnp.int32, highest.shape, 1)
    return jnp.swapaxes(jnp.where(lane == 0, highest, sums), 0, 1)[:2]
