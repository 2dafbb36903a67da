"""A whole decode attention as one kernel: the fold over keys, the exchange, and the division.

The states of all rows stay in VMEM. The devices that will exchange meet while keys are still folded, and
the first messages leave when the last block of keys has been.
"""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from distattn.algebra.softmax_state import SoftmaxState, finalize
from distattn.experimental.fused.exchange import Exchange, barrier_of, rows_spec, scratch_of
from distattn.experimental.fused.route import Route
from distattn.experimental.fused.wire import Wire
from distattn.local.block import LogitConfig
from distattn.local.inputs import AttentionInputs
from distattn.local.kernels.shared import by_key_heads, by_queries
from distattn.local.kernels.tpu.block_ops import Plan
from distattn.local.kernels.tpu.forward import fold_step, numbers_of, prepared
from distattn.local.kernels.tpu.launch import Call, Part, launch
from distattn.local.kernels.tpu.tiling import LANES, TpuCut


def attend(
    inputs: AttentionInputs, logit_config: LogitConfig, cut: TpuCut, wire: Wire, route: Route
) -> tuple[jax.Array, jax.Array]:
    """out [B, T, N, V] in query's dtype and lse f32[B, T, N]; see `distattn.experimental.fused.hooks.attend`."""
    plan, call, arrays, scratch = prepared(inputs, logit_config, cut)
    if inputs.sinks is not None:
        arrays.append(_whole(_by_blocks(inputs.sinks, cut, wire)))
    if route.has_rows:
        arrays.append(Part(route.own_rows(), rows_spec()))
    # Mosaic has no float16.
    dtype = jnp.float32 if inputs.query.dtype == jnp.float16 else inputs.query.dtype
    rows = (wire.blocks, wire.heads, wire.rows)
    out, lse = launch(
        functools.partial(_kernel, plan, call, wire, route, inputs.sinks is not None),
        call,
        arrays,
        [
            _whole(jax.ShapeDtypeStruct((*rows, cut.value_width), dtype)),
            _whole(jax.ShapeDtypeStruct(rows, jnp.float32)),
        ],
        scratch=[
            pltpu.VMEM((1, cut.heads, cut.rows, cut.value_width), jnp.float32),
            pltpu.VMEM((cut.heads, cut.rows, LANES), jnp.float32),
            pltpu.VMEM((cut.heads, cut.rows, LANES), jnp.float32),
            pltpu.VMEM((cut.rows, LANES), jnp.int32),
            *scratch_of(route, wire),
            *scratch,
        ],
        width=cut.width + cut.value_width,
        collective_id=barrier_of(route),
        exchanged=route.varying,
    )
    out, lse = (
        by_queries(x.reshape(cut.batch, cut.kv_heads, *x.shape[2:]), cut) for x in (out, lse)
    )
    return out.astype(inputs.query.dtype), lse


def _kernel(
    plan: Plan, call: Call, wire: Wire, route: Route, has_sinks: bool, counts: Any, *refs: Any
) -> None:
    cut, step, parts = plan.cut, call.step(counts), iter(refs[2:])  # behind the order and the layer
    index = plan.compared.blocks(parts)
    inputs = [*itertools.islice(parts, 3)]
    scales = plan.scales(parts)
    sinks = next(parts) if has_sinks else None
    rows = next(parts) if route.has_rows else None
    out, lse, *state, row_index = itertools.islice(parts, 6)
    exchange = Exchange(route, wire, rows, *itertools.islice(parts, 3))
    block = pl.program_id(1) * cut.head_blocks + pl.program_id(2)

    @pl.when(step.is_first & (block == 0))
    def _() -> None:
        exchange.enter()

    fold_step(plan, step, index, inputs, scales, state, row_index, parts)
    weighted_sum, highest, sums = state

    @pl.when(step.is_last)
    def _() -> None:
        message = exchange.buffers.at[0, block]
        for head in range(cut.heads):
            numbers = numbers_of(highest[head], sums[head])
            for n in range(2):
                wire.vector(message, n, head)[...] = numbers[n : n + 1, : wire.rows]
            wire.matrix(message, 0, head)[...] = weighted_sum[0, head, : wire.rows]

    @pl.when(step.is_last & (block == wire.blocks - 1))
    def _() -> None:
        own = exchange.run()

        @pl.loop(0, wire.blocks)
        def _(block: jax.Array) -> None:
            merged = wire.read(exchange.buffers.at[own, block])
            own_sinks = None if sinks is None else sinks[block % cut.head_blocks]
            results = finalize(SoftmaxState(*merged.vectors, *merged.matrices), own_sinks)
            out[block], lse[block] = results[0].astype(out.dtype), results[1]


def _by_blocks(sinks: jax.Array, cut: TpuCut, wire: Wire) -> jax.Array:
    """f32[blocks of heads, heads, rows] from float[N]."""
    sinks = jnp.broadcast_to(sinks.astype(jnp.float32), (1, cut.queries, sinks.shape[0]))
    return by_key_heads(sinks, cut)[0, :, : wire.rows].reshape(-1, wire.heads, wire.rows)


def _whole(x: jax.Array | jax.ShapeDtypeStruct) -> Part:
    """An array that is in VMEM as long as the kernel runs."""
    return Part(x, pl.BlockSpec(x.shape, lambda *_: (0,) * len(x.shape)))
