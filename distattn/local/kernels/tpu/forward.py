"""The fold over keys as one TPU kernel: a softmax state for each block of rows, kept in VMEM.

It differs from published TPU kernels in: 1. keys and values are read as they are stored, 8 heads at a
time, and never transposed; 2. masks are functions of positions that are data, in any order, and a block is
skipped, before it is loaded, by the range of its positions; 3. the state is returned undivided; 4. if a
device has two cores and one would idle, each folds every other block of keys, and the two states are
merged.
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
from distattn.local.kernels.shared import (
    BlockedArray,
    attended_keys,
    block_tables,
    logits_of,
    mask_vectors,
    query_rows,
    rows_by_query,
)
from distattn.local.kernels.tpu.block_ops import KernelSettings, as_float32, for_each_head
from distattn.local.kernels.tpu.launch import GridStep, LaunchSpec, launch
from distattn.local.kernels.tpu.tiling import (
    LANES,
    TpuTileConfig,
    as_stored,
    scales_as_stored,
    tile_config,
)
from distattn.local.tiling import Machine


def fold(inputs: AttentionInputs, logit_config: LogitConfig, machine: Machine) -> SoftmaxState:
    """Return the state over all keys, as `distattn.local.blockwise.fold`."""
    config = tile_config(inputs, machine)
    settings, spec, arrays, scratch = prepare_fold(inputs, logit_config, config)
    parts = config.key_parts
    lead = (parts * config.batch, config.kv_heads)
    weighted_sum, max_and_sum = launch(
        functools.partial(_kernel, settings, spec),
        spec,
        arrays,
        [
            spec.blocked(_float32(*lead, config.padded_rows, config.value_width), "BKR."),
            spec.blocked(_float32(*lead, 2, config.padded_rows), "BK.R"),
        ],
        scratch=[
            pltpu.VMEM((config.row_block, LANES), jnp.int32),
            pltpu.VMEM((config.heads, config.row_block, LANES), jnp.float32),
            pltpu.VMEM((config.heads, config.row_block, LANES), jnp.float32),
            *scratch,
        ],
        width=config.width + config.value_width,
    )
    states = [
        SoftmaxState(
            *(rows_by_query(x, config) for x in (vectors[:, :, 0], vectors[:, :, 1], total))
        )
        for vectors, total in zip(
            jnp.split(max_and_sum, parts), jnp.split(weighted_sum, parts), strict=True
        )
    ]
    return functools.reduce(merge, states)


def prepare_fold(
    inputs: AttentionInputs, logit_config: LogitConfig, config: TpuTileConfig
) -> tuple[KernelSettings, LaunchSpec, list[BlockedArray], list[Any]]:
    """Return settings, grid and inputs of a kernel that folds, and the scratch of its keys and values."""
    vectors = mask_vectors(inputs.mask, config)
    table, _ = block_tables(inputs.mask, config)
    settings = KernelSettings.of(inputs, logit_config, config, vectors)
    spec = LaunchSpec(config, table, inputs.layer, "keys")
    key, value = as_stored(inputs.key), as_stored(inputs.value)
    arrays = [
        *spec.mask_vectors(vectors),
        spec.blocked(query_rows(inputs, settings.matmul.dtype, config), "BKR."),
        spec.blocked(key, settings.key.dims),
        spec.blocked(value, settings.value.dims),
        *(spec.blocked(x, "LBJ.S") for x in scales_as_stored(inputs, config)),
    ]
    scratch = [
        *settings.key.scratch(config, key.dtype),
        *settings.value.scratch(config, value.dtype),
    ]
    return settings, spec, arrays, scratch


def _float32(*shape: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def _kernel(
    settings: KernelSettings, spec: LaunchSpec, counts: Any, order: Any, layer: Any, *refs: Any
) -> None:
    step, rest = spec.step(counts), iter(refs)
    vectors = settings.comparison.take(rest)
    query, key, value = itertools.islice(rest, 3)
    scales = settings.take_scales(rest)
    weighted_sum, max_and_sum, row_vectors, max_, sum_ = itertools.islice(rest, 5)
    state = weighted_sum, max_, sum_
    fold_step(settings, step, vectors, (query, key, value), scales, state, row_vectors, rest)

    @pl.when(step.is_last)
    def _() -> None:
        @for_each_head(settings.config.heads)
        def _(head: jax.Array) -> None:
            max_and_sum[0, head] = in_lanes(max_[head], sum_[head])


def fold_step(
    settings: KernelSettings,
    step: GridStep,
    vectors: list[Any],
    inputs: Any,
    scales: list[Any],
    state: Any,
    row_vectors: Any,
    scratch: Iterator[Any],
) -> None:
    """Fold a block of keys into the state of a block of rows: one step of a kernel.

    Args:
      settings: of the kernel.
      step: where in the grid this is; the first step of a block of rows empties the state.
      vectors: of the mask, or [].
      inputs: blocks of query, key and value.
      scales: blocks of the scales of keys and values, or [].
      state: f32[1, heads, rows, V], and maximum and sum f32[heads, rows, 128], equal in all lanes.
      row_vectors: int32[rows, 128], scratch.
      scratch: scratch of keys and values.
    """
    heads, dot = settings.config.heads, settings.matmul.dot
    query, key, value = inputs
    weighted_sum, max_, sum_ = state
    keys, values = settings.key.by_head(key, scratch), settings.value.by_head(value, scratch)

    @pl.when(step.is_first)
    def _() -> None:
        weighted_sum[...] = jnp.zeros_like(weighted_sum)
        max_[...] = jnp.full_like(max_, -jnp.inf)
        sum_[...] = jnp.zeros_like(sum_)
        settings.keep_rows(vectors, row_vectors)

    @pl.when(step.is_needed)
    def _() -> None:
        settings.key.load(key, keys)
        settings.value.load(value, values)
        allowed = settings.rows_by_keys(vectors, row_vectors)
        keys_seen = None if allowed is None else attended_keys(allowed)
        attended_values = settings.value.attended(keys_seen)

        def scale(which: int, head: jax.Array) -> jax.Array:
            x = scales[which][0, 0, 0, pl.ds(head, 1), :]
            return x if keys_seen is None else jnp.where(keys_seen, x, 0.0)

        @for_each_head(heads)
        def _(head: jax.Array) -> None:
            head_keys = as_float32(keys[head])
            scores = dot(query[0, head], head_keys, (1, 1 - settings.key.key_axis))
            if scales:
                scores = scores * scale(0, head)
            logits, _ = logits_of(scores, allowed, settings.logit_config)
            before = max_[head, :, :1]
            high = jnp.maximum(before, logits.max(axis=1, keepdims=True))
            weights, shrink = softmax_weights(logits, high), softmax_weights(before, high)
            total = shrink * sum_[head, :, :1] + weights.sum(axis=1, keepdims=True)
            max_[head] = jnp.broadcast_to(high, max_.shape[1:])
            sum_[head] = jnp.broadcast_to(total, sum_.shape[1:])
            if scales:
                weights = weights * scale(1, head)
            added = dot(weights, attended_values(values[head]), (1, settings.value.key_axis))
            weighted_sum[0, head] = weighted_sum[0, head] * shrink + added


def in_lanes(max_: jax.Array, sum_: jax.Array) -> jax.Array:
    """Return f32[2, rows] from maximum and sum of a head, f32[rows, 128], equal in all lanes."""
    lane = lax.broadcasted_iota(jnp.int32, max_.shape, 1)
    return jnp.swapaxes(jnp.where(lane == 0, max_, sum_), 0, 1)[:2]
