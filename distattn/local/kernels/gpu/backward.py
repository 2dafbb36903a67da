"""The gradient of the fold as two GPU kernels: of queries, over keys; of keys and values, over rows.

Both compute the weights of a block again from the saved maximum or log-sum-exp, as FlashAttention-2 does
(arXiv 2307.08691, section 3); `distattn.local.block.block_gradients` has the formula. Each sum belongs to
one program, or is added in the order of the splits, so the result is the same each time, without atomics.
In the second kernel logits are keys by rows, so that no matmul has a transposed left operand.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from distattn.local.block import Cotangents, LogitConfig
from distattn.local.inputs import AttentionInputs
from distattn.local.kernels import shared
from distattn.local.kernels.gpu.block_ops import KernelSettings, Pieces
from distattn.local.kernels.gpu.forward import layered
from distattn.local.kernels.gpu.launch import LaunchSpec, blocked, launch, mask_vectors
from distattn.local.kernels.gpu.tiling import tile_config
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
    config = tile_config(inputs, logit_config, machine, backward=True)
    vectors = shared.mask_vectors(inputs.mask, config)
    keys_of_rows, rows_of_keys = shared.block_tables(inputs.mask, config.spans)
    settings = KernelSettings.of(inputs, logit_config, config, vectors)
    dtype = settings.matmul.dtype
    d_out = shared.rows_by_kv_head(cotangents.d_weighted_sum.astype(dtype), config)
    arrays = [
        *mask_vectors(vectors),
        blocked(shared.query_rows(inputs, dtype, config, zero_padding=True), "BKRW"),
        blocked(d_out, "BKRW"),
        blocked(shared.reference_and_d_sum(cotangents, config), "BK.R"),
        *(blocked(layered(x), "LBSKW") for x in (inputs.key, inputs.value)),
    ]
    spec = LaunchSpec(config, keys_of_rows, inputs.layer, "keys", config.splits)
    shape = (config.splits, config.batch, config.kv_heads, config.padded_rows, config.width)
    (d_query,) = launch(
        functools.partial(_query_kernel, settings, spec),
        spec,
        arrays,
        [blocked(jax.ShapeDtypeStruct(shape, jnp.float32), "NBKRW")],
        width=2 * config.width + config.value_width,
    )
    d_query = d_query[0] if config.splits == 1 else d_query.sum(axis=0)
    spec = LaunchSpec(config, rows_of_keys, inputs.layer, "rows")
    d_key, d_value = launch(
        functools.partial(_key_kernel, settings, spec),
        spec,
        arrays,
        [
            blocked(jax.ShapeDtypeStruct(layered(x).shape[1:], key_dtype or x.dtype), "BSKW")
            for x in (inputs.key, inputs.value)
        ],
        width=2 * (config.width + config.value_width),
    )
    return shared.rows_by_query(d_query, config), d_key, d_value, None


def _query_kernel(
    settings: KernelSettings, spec: LaunchSpec, counts: Any, order: Any, layer: Any, *refs: Any
) -> None:
    config, rest = settings.config, iter(refs)
    vectors = settings.comparison.take(rest)
    query, d_out, of_rows, key, value, d_query = rest
    program = spec.program(counts, order)
    first_row, layer = program.own * config.row_block, layer[0]
    rows = pl.ds(first_row, config.row_block)
    queries = settings.query.load(query, first_row, config.row_block)
    d_outs = settings.out.load(d_out, first_row, config.row_block)
    reference, d_sum = (of_rows[n, rows][:, None] for n in range(2))

    def block(number: jax.Array, sums: Pieces) -> Pieces:
        start, count = number * config.key_block, config.key_block
        keys = pl.ds(start, count)
        block_keys = settings.key.load(key, start, count, layer)
        values = settings.value.load(value, start, count, layer)
        allowed = settings.rows_by_keys(vectors, rows, keys)
        _, d_logits = shared.gradients_of(
            settings.scores(queries, block_keys),
            settings.scores(d_outs, values),
            allowed,
            settings.logit_config,
            reference=reference,
            d_sum=d_sum,
        )
        block_keys = settings.attended(block_keys, allowed)
        return _added(sums, settings.weigh(d_logits, block_keys))

    sums = program.over(block, settings.query.zeros(config.row_block))
    scale = settings.logit_config.scale
    settings.query.store(d_query, first_row, tuple(x * scale for x in sums), program.split)


def _key_kernel(
    settings: KernelSettings, spec: LaunchSpec, counts: Any, order: Any, layer: Any, *refs: Any
) -> None:
    config, rest = settings.config, iter(refs)
    vectors = settings.comparison.take(rest)
    query, d_out, of_rows, key, value, d_key, d_value = rest
    program = spec.program(counts, order)
    start, count, layer = program.own * config.key_block, config.key_block, layer[0]
    keys = pl.ds(start, count)
    block_keys = settings.key.load(key, start, count, layer)
    values = settings.value.load(value, start, count, layer)

    def block(number: jax.Array, sums: tuple[Pieces, Pieces]) -> tuple[Pieces, Pieces]:
        first_row = number * config.row_block
        rows = pl.ds(first_row, config.row_block)
        queries = settings.query.load(query, first_row, config.row_block)
        d_outs = settings.out.load(d_out, first_row, config.row_block)
        weights, d_logits = shared.gradients_of(
            settings.scores(block_keys, queries),
            settings.scores(values, d_outs),
            settings.comparison.allowed(
                lambda n: vectors[0][n, rows][None, :], lambda n: vectors[1][n, keys][:, None]
            ),
            settings.logit_config,
            reference=of_rows[0, rows][None, :],
            d_sum=of_rows[1, rows][None, :],
        )
        key_sums, value_sums = sums
        value_sums = _added(value_sums, settings.weigh(weights, d_outs))
        return _added(key_sums, settings.weigh(d_logits, queries)), value_sums

    zeros = settings.key.zeros(count), settings.value.zeros(count)
    key_sums, value_sums = program.over(block, zeros)
    scale = settings.logit_config.scale
    settings.key.store(d_key, start, tuple(x * scale for x in key_sums))
    settings.value.store(d_value, start, value_sums)


def _added(sums: Pieces, more: Pieces) -> Pieces:
    return tuple(x + y for x, y in zip(sums, more, strict=True))
