"""The gradient of the fold as two TPU kernels: of queries, over keys; of keys and values, over rows.

Both compute the weights of a block again from the saved maximum or log-sum-exp, as FlashAttention-2 does
(arXiv 2307.08691, section 3); `distattn.local.block.block_gradients` has the formula. In the second kernel
logits are keys by rows, so that no matmul has a transposed left operand.
"""

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
    attended_keys,
    block_tables,
    gradients_of,
    mask_vectors,
    query_rows,
    reference_and_d_sum,
    rows_by_kv_head,
    rows_by_query,
)
from distattn.local.kernels.tpu.block_ops import (
    KernelSettings,
    KVOperand,
    as_float32,
    for_each_head,
)
from distattn.local.kernels.tpu.launch import LaunchSpec, launch
from distattn.local.kernels.tpu.tiling import LANES, as_stored, from_stored, tile_config
from distattn.local.tiling import Machine


def fold_gradients(
    inputs: AttentionInputs,
    logit_config: LogitConfig,
    machine: Machine,
    cotangents: Cotangents,
    *,
    key_dtype: jnp.dtype | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    """Return the gradients, as `distattn.local.blockwise.fold_gradients`."""
    config = tile_config(inputs, machine, backward=True)
    vectors = mask_vectors(inputs.mask, config)
    keys_of_rows, rows_of_keys = block_tables(inputs.mask, config)
    settings = KernelSettings.of(inputs, logit_config, config, vectors)
    operands = settings.key, settings.value
    dtype, dtypes = (
        settings.matmul.dtype,
        [key_dtype or x.dtype for x in (inputs.key, inputs.value)],
    )
    query = query_rows(inputs, dtype, config, zero_padding=True)
    d_out = rows_by_kv_head(cotangents.d_weighted_sum.astype(dtype), config)
    of_rows = reference_and_d_sum(cotangents, config)
    stored = as_stored(inputs.key), as_stored(inputs.value)
    copies = [
        x
        for operand, y in zip(operands, stored, strict=True)
        for x in operand.scratch(config, y.dtype)
    ]

    def run(kernel: Any, spec: LaunchSpec, outputs: Any, scratch: Any, width: int) -> Any:
        arrays = [
            *spec.mask_vectors(vectors),
            *(spec.blocked(x, "BKR.") for x in (query, d_out)),
            spec.blocked(of_rows, "BK.R"),
            *(spec.blocked(x, y.dims) for x, y in zip(stored, operands, strict=True)),
        ]
        body = functools.partial(kernel, settings, spec)
        return launch(body, spec, arrays, outputs, scratch=[*scratch, *copies], width=width)

    spec = LaunchSpec(config, keys_of_rows, inputs.layer, "keys")
    scratch = [
        pltpu.VMEM((config.row_block, LANES), jnp.int32),
        pltpu.VMEM((config.heads, config.row_block, LANES), jnp.float32),
    ]
    outputs = [spec.blocked(jax.ShapeDtypeStruct(query.shape, jnp.float32), "BKR.")]
    (d_query,) = run(_query_kernel, spec, outputs, scratch, 2 * config.width + config.value_width)

    spec = LaunchSpec(config, rows_of_keys, inputs.layer, "rows")
    scratch = [
        pltpu.VMEM((config.key_block, LANES), jnp.int32),
        *(pltpu.VMEM(operand.shape(config), jnp.float32) for operand in operands),
    ]
    # Mosaic has no float16.
    written = [jnp.float32 if dtype == jnp.float16 else dtype for dtype in dtypes]
    outputs = [
        spec.blocked(jax.ShapeDtypeStruct((1, *x.shape[1:]), dtype), operand.dims)
        for x, operand, dtype in zip(stored, operands, written, strict=True)
    ]
    d_stored = run(_key_kernel, spec, outputs, scratch, 2 * (config.width + config.value_width))
    d_key, d_value = (
        from_stored(x, operand.order).astype(dtype)
        for x, operand, dtype in zip(d_stored, operands, dtypes, strict=True)
    )
    return rows_by_query(d_query, config), d_key, d_value, None


def _query_kernel(
    settings: KernelSettings, spec: LaunchSpec, counts: Any, order: Any, layer: Any, *refs: Any
) -> None:
    step, rest = spec.step(counts), iter(refs)
    vectors = settings.comparison.take(rest)
    query, d_out, of_rows, key, value, d_query, row_vectors, columns = itertools.islice(rest, 8)
    keys, values = settings.key.by_head(key, rest), settings.value.by_head(value, rest)
    heads, dot = settings.config.heads, settings.matmul.dot
    key_axis, value_axis = settings.key.key_axis, settings.value.key_axis

    @pl.when(step.is_first)
    def _() -> None:
        d_query[...] = jnp.zeros_like(d_query)
        settings.keep_rows(vectors, row_vectors)

        @for_each_head(heads)
        def _(head: jax.Array) -> None:
            columns[head, :, :2] = jnp.swapaxes(of_rows[0, head], 0, 1)

    @pl.when(step.is_needed)
    def _() -> None:
        settings.key.load(key, keys)
        settings.value.load(value, values)
        allowed = settings.rows_by_keys(vectors, row_vectors)
        attended = settings.key.attended(None if allowed is None else attended_keys(allowed))

        @for_each_head(heads)
        def _(head: jax.Array) -> None:
            head_keys = attended(keys[head])
            _, d_logits = gradients_of(
                dot(query[0, head], head_keys, (1, 1 - key_axis)),
                dot(d_out[0, head], as_float32(values[head]), (1, 1 - value_axis)),
                allowed,
                settings.logit_config,
                reference=columns[head, :, :1],
                d_sum=columns[head, :, 1:2],
            )
            d_query[0, head] += dot(d_logits, head_keys, (1, key_axis))

    @pl.when(step.is_last)
    def _() -> None:
        d_query[...] *= settings.logit_config.scale


def _key_kernel(
    settings: KernelSettings, spec: LaunchSpec, counts: Any, order: Any, layer: Any, *refs: Any
) -> None:
    step, rest = spec.step(counts), iter(refs)
    vectors = settings.comparison.take(rest)
    query, d_out, of_rows, key, value, *results = itertools.islice(rest, 7)
    key_vectors, d_keys, d_values = itertools.islice(rest, 3)
    keys, values = settings.key.by_head(key, rest), settings.value.by_head(value, rest)
    dot = settings.matmul.dot

    def over_rows(operand: KVOperand, weights: jax.Array, x: jax.Array) -> jax.Array:
        # weights [keys, rows], x [rows, .]; the result is stored as the keys are
        return dot(x, weights, (0, 1)) if operand.key_axis else dot(weights, x, (1, 0))

    @pl.when(step.is_first)
    def _() -> None:
        for total in (d_keys, d_values):
            total[...] = jnp.zeros_like(total)
        settings.key.load(key, keys)
        settings.value.load(value, values)
        if vectors:
            key_vectors[:, :2] = jnp.swapaxes(vectors[1][0], 0, 1)

    @pl.when(step.is_needed)
    def _() -> None:
        allowed = settings.comparison.allowed(
            lambda n: vectors[0][0, n : n + 1, :], lambda n: key_vectors[:, n : n + 1]
        )

        @for_each_head(settings.config.heads)
        def _(head: jax.Array) -> None:
            rows, d_rows = query[0, head], d_out[0, head]
            weights, d_logits = gradients_of(
                dot(as_float32(keys[head]), rows, (1 - settings.key.key_axis, 1)),
                dot(as_float32(values[head]), d_rows, (1 - settings.value.key_axis, 1)),
                allowed,
                settings.logit_config,
                reference=of_rows[0, head, :1, :],
                d_sum=of_rows[0, head, 1:2, :],
            )
            d_values[head] += over_rows(settings.value, weights, d_rows)
            d_keys[head] += over_rows(settings.key, d_logits, rows)

    @pl.when(step.is_last)
    def _() -> None:
        d_key, d_value = results
        scaled = d_keys[...] * settings.logit_config.scale
        settings.key.store(d_key, scaled.astype(d_key.dtype))
        settings.value.store(d_value, d_values[...].astype(d_value.dtype))
