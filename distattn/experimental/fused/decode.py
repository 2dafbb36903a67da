"""A whole decode attention as one kernel: the fold over keys, the exchange, and the division.

The states of all rows stay in VMEM. The devices that will exchange meet while keys are still folded, and
the first messages leave after the last block of keys.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from distattn.algebra.softmax_state import SoftmaxState, finalize
from distattn.experimental.fused.exchange import ROWS_SPEC, Exchange, barrier_of, scratch_of
from distattn.experimental.fused.message import MessageLayout
from distattn.experimental.fused.route import Route
from distattn.local.block import LogitConfig
from distattn.local.inputs import AttentionInputs
from distattn.local.kernels.shared import BlockedArray, rows_by_kv_head, rows_by_query
from distattn.local.kernels.tpu.block_ops import KernelSettings
from distattn.local.kernels.tpu.forward import fold_step, in_lanes, prepare_fold
from distattn.local.kernels.tpu.launch import LaunchSpec, launch
from distattn.local.kernels.tpu.tiling import LANES, TpuTileConfig


def attend(
    inputs: AttentionInputs,
    logit_config: LogitConfig,
    config: TpuTileConfig,
    layout: MessageLayout,
    route: Route,
) -> tuple[jax.Array, jax.Array]:
    """Return out [B, T, N, V] in query's dtype and lse f32[B, T, N], see `hooks.attend`."""
    settings, spec, arrays, scratch = prepare_fold(inputs, logit_config, config)
    if inputs.sinks is not None:
        sinks = jnp.broadcast_to(
            inputs.sinks.astype(jnp.float32), (1, config.queries, *inputs.sinks.shape)
        )
        sinks = rows_by_kv_head(sinks, config)[0, :, : layout.rows]
        arrays.append(_whole(sinks.reshape(-1, layout.heads, layout.rows)))
    if route.has_rows:
        arrays.append(BlockedArray(route.own_rows(), ROWS_SPEC))
    # Mosaic has no float16.
    dtype = jnp.float32 if inputs.query.dtype == jnp.float16 else inputs.query.dtype
    rows = (layout.blocks, layout.heads, layout.rows)
    out, lse = launch(
        functools.partial(_kernel, settings, spec, layout, route, inputs.sinks is not None),
        spec,
        arrays,
        [
            _whole(jax.ShapeDtypeStruct((*rows, config.value_width), dtype)),
            _whole(jax.ShapeDtypeStruct(rows, jnp.float32)),
        ],
        scratch=[
            pltpu.VMEM((1, config.heads, config.row_block, config.value_width), jnp.float32),
            pltpu.VMEM((config.heads, config.row_block, LANES), jnp.float32),
            pltpu.VMEM((config.heads, config.row_block, LANES), jnp.float32),
            pltpu.VMEM((config.row_block, LANES), jnp.int32),
            *scratch_of(route, layout),
            *scratch,
        ],
        width=config.width + config.value_width,
        collective_id=barrier_of(route),
        exchanged=route.varying,
    )
    out, lse = (
        rows_by_query(x.reshape(config.batch, config.kv_heads, *x.shape[2:]), config)
        for x in (out, lse)
    )
    return out.astype(inputs.query.dtype), lse


def _kernel(
    settings: KernelSettings,
    spec: LaunchSpec,
    layout: MessageLayout,
    route: Route,
    has_sinks: bool,
    counts: Any,
    *refs: Any,
) -> None:
    config, step, rest = settings.config, spec.step(counts), iter(refs[2:])  # after order and layer
    vectors = settings.comparison.take(rest)
    inputs = [*itertools.islice(rest, 3)]
    scales = settings.take_scales(rest)
    sinks = next(rest) if has_sinks else None
    rows = next(rest) if route.has_rows else None
    out, lse, *state, row_vectors = itertools.islice(rest, 6)
    exchange = Exchange(route, layout, rows, *itertools.islice(rest, 3))
    block = pl.program_id(1) * config.head_blocks + pl.program_id(2)

    @pl.when(step.is_first & (block == 0))
    def _() -> None:
        exchange.enter()

    fold_step(settings, step, vectors, inputs, scales, state, row_vectors, rest)
    weighted_sum, max_, sum_ = state

    @pl.when(step.is_last)
    def _() -> None:
        message = exchange.buffers.at[0, block]
        for head in range(config.heads):
            max_and_sum = in_lanes(max_[head], sum_[head])
            for n in range(2):
                layout.vector(message, n, head)[...] = max_and_sum[n : n + 1, : layout.rows]
            layout.matrix(message, 0, head)[...] = weighted_sum[0, head, : layout.rows]

    @pl.when(step.is_last & (block == layout.blocks - 1))
    def _() -> None:
        merged_in = exchange.run()

        @pl.loop(0, layout.blocks)
        def _(block: jax.Array) -> None:
            merged = layout.read(exchange.buffers.at[merged_in, block])
            block_sinks = None if sinks is None else sinks[block % config.head_blocks]
            results = finalize(SoftmaxState(*merged.vectors, *merged.matrices), block_sinks)
            out[block], lse[block] = results[0].astype(out.dtype), results[1]


def _whole(x: jax.Array | jax.ShapeDtypeStruct) -> BlockedArray:
    """Return an array that is in VMEM as long as the kernel runs."""
    return BlockedArray(x, pl.BlockSpec(x.shape, lambda *_: (0,) * len(x.shape)))
