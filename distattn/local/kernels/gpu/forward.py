"""The fold over keys as one GPU kernel: a softmax state for each block of rows, kept in registers.

If rows are few, several programs share their keys, and their states are merged (flash-decoding: Dao et
al., 2023). It differs from published GPU kernels in: 1. keys and values are read as they are stored, once
for all query heads of a KV head; 2. masks are functions of positions that are data, in any order, and a
block is skipped, before it is loaded, by the range of its positions; 3. each split has the same share of
the visited blocks; 4. the state is returned undivided.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from distattn.algebra.softmax_state import SoftmaxState, merge_stacked, softmax_weights
from distattn.local.block import LogitConfig
from distattn.local.inputs import AttentionInputs
from distattn.local.kernels import shared
from distattn.local.kernels.gpu.block_ops import KernelSettings
from distattn.local.kernels.gpu.launch import LaunchSpec, blocked, launch, mask_vectors
from distattn.local.kernels.gpu.tiling import tile_config
from distattn.local.tiling import Machine


def fold(inputs: AttentionInputs, logit_config: LogitConfig, machine: Machine) -> SoftmaxState:
    """Return the state over all keys, as `distattn.local.blockwise.fold`."""
    config = tile_config(inputs, logit_config, machine)
    vectors = shared.mask_vectors(inputs.mask, config)
    table, _ = shared.block_tables(inputs.mask, config.spans)
    settings = KernelSettings.of(inputs, logit_config, config, vectors)
    spec = LaunchSpec(config, table, inputs.layer, "keys", config.splits)
    scales = inputs.key_scale, inputs.value_scale
    lead = (config.splits, config.batch, config.kv_heads)
    float32 = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
    weighted_sum, max_and_sum = launch(
        functools.partial(_kernel, settings, spec),
        spec,
        [
            *mask_vectors(vectors),
            blocked(shared.query_rows(inputs, settings.matmul.dtype, config), "BKRW"),
            *(blocked(layered(x), "LBSKW") for x in (inputs.key, inputs.value)),
            *(blocked(layered(x, 4), "LBSK") for x in scales if x is not None),
        ],
        [
            blocked(float32((*lead, config.padded_rows, config.value_width)), "NBKRW"),
            blocked(float32((*lead, 2, config.padded_rows)), "NBK.R"),
        ],
        width=config.width + config.value_width,
    )
    # The states are merged as they are stored: [splits, B, K, R], and the values.
    states = SoftmaxState(max_and_sum[..., 0, :], max_and_sum[..., 1, :], weighted_sum)
    alone = config.splits == 1
    state = jax.tree.map(lambda x: x[0], states) if alone else merge_stacked(states)
    return jax.tree.map(lambda x: shared.rows_by_query(x, config), state)


def layered(x: jax.Array, rank: int = 5) -> jax.Array:
    """Return [L, B, S, K, .], with one layer if x has no layers."""
    return x if x.ndim == rank else x[None]


def _kernel(
    settings: KernelSettings, spec: LaunchSpec, counts: Any, order: Any, layer: Any, *refs: Any
) -> None:
    config, rest = settings.config, iter(refs)
    vectors = settings.comparison.take(rest)
    query, key, value, *scales, weighted_sum, max_and_sum = rest
    program = spec.program(counts, order)
    first_row, layer = program.own * config.row_block, layer[0]
    rows = pl.ds(first_row, config.row_block)
    queries = settings.query.load(query, first_row, config.row_block)

    def block(number: jax.Array, state: tuple[Any, ...]) -> tuple[Any, ...]:
        sums, before, total = state
        start, count = number * config.key_block, config.key_block
        keys = pl.ds(start, count)
        scores = settings.scores(queries, settings.key.load(key, start, count, layer))
        if scales:
            scores *= settings.key.load_scales(scales[0], start, count, layer)[None, :]
        allowed = settings.rows_by_keys(vectors, rows, keys)
        logits, _ = shared.logits_of(scores, allowed, settings.logit_config)
        high = jnp.maximum(before, logits.max(axis=1))
        weights, shrink = softmax_weights(logits, high[:, None]), softmax_weights(before, high)
        total = shrink * total + weights.sum(axis=1)
        if scales:
            scale = settings.value.load_scales(scales[1], start, count, layer)
            (scale,) = settings.attended((scale,), allowed)
            weights *= scale[None, :]
        values = settings.value.load(value, start, count, layer)
        values = settings.attended(values, allowed)
        added = settings.weigh(weights, values)
        sums = tuple(x * shrink[:, None] + y for x, y in zip(sums, added, strict=True))
        return sums, high, total

    zero = jnp.zeros((config.row_block,), jnp.float32)
    empty = settings.out.zeros(config.row_block), jnp.full_like(zero, -jnp.inf), zero
    sums, high, total = program.over(block, empty)
    settings.out.store(weighted_sum, first_row, sums, program.split)
    max_and_sum[program.split, 0, rows] = high
    max_and_sum[program.split, 1, rows] = total
