"""One device's computation, collectives included, in the global call and in `sharded_attention`.

Arrays have an outer sharding, in which they come and go, and an inner sharding, in which devices compute;
a `Strategy` is the difference. Query, key, value and sinks come in the outer sharding, and bias and mask in
the inner one.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from distattn.algebra import deterministic_math, fixed_point
from distattn.algebra.fixed_point import limb_format
from distattn.algebra.mergeable import (
    FIXED_POINT,
    State,
    Sum,
    is_exact,
    monoid_of,
    pack_rows,
    rows_of,
    sum_copies,
    to_array,
    unpack_rows,
)
from distattn.algebra.softmax_state import softmax_weights
from distattn.attention.ring import ring_fold, ring_gradients
from distattn.attention.strategy import Call, Strategy
from distattn.collectives.all_reduce import all_reduce, all_sum, chosen_schedule, sum_schedule
from distattn.collectives.all_to_all import heads_to_rows, in_one_message, rows_to_heads
from distattn.collectives.mesh import (
    axes_size,
    gather_shards,
    local_shard,
    mesh_order,
    typed_as_varying,
)
from distattn.collectives.reduce_scatter import reduce_scatter
from distattn.experimental.fused import hooks
from distattn.local.dispatch import local_fold, local_gradients
from distattn.local.inputs import AttentionInputs, with_repeated_heads
from distattn.local.reproducible import softmax_weights as reproducible_weights
from distattn.planning.plan import Axes
from distattn.planning.schedule import Schedule

LARGE_BYTES = 2**20  # a larger state saves more by one more collective than that costs


def result(call: Call, inputs: AttentionInputs) -> tuple[jax.Array, jax.Array]:
    """Return out [B, T, N, V] in query's dtype and lse f32[B, T, N], in their outer sharding.

    Only 'dense' can be differentiated.
    """
    inputs, _ = to_inner(call.strategy, inputs)
    axes = call.strategy.all_reduce
    if call.strategy.schedule == "fused" and not call.reproducible_blocks and axes_size(axes) > 1:
        axes = mesh_order(axes)
        how = call.logit_config, call.machine
        if hooks.in_one_launch(inputs, *how, call.implementation, axes):
            return hooks.attend(inputs, *how, axes, inputs.mask.query_valid)
    fold = local_fold(
        call.logit_config, call.machine, call.implementation, call.reproducible_blocks
    )
    return merge_and_normalize(ring_fold(fold, inputs, call.ring), call.strategy, inputs)


def gradients(
    call: Call,
    inputs: AttentionInputs,
    d_out: jax.Array,
    lse_and_dsum: jax.Array,
    axes: dict[str, Axes],
) -> dict[str, jax.Array]:
    """Return the gradients of query, key, value and any bias, by name.

    Args:
      call: static configuration.
      inputs: as in `result`.
      d_out: [B, T, N, V], as `row_cotangents` returns it, in the outer sharding of the result.
      lse_and_dsum: f32[B, T, N, 2], likewise.
      axes: axes over which each gradient is summed, or scattered if the strategy says so.
    """
    strategy = call.strategy
    inner, (d_out, lse_and_dsum) = to_inner(strategy, inputs, d_out, lse_and_dsum)
    kv_heads = inner.key.shape[2] * axes_size(strategy.heads)
    copies = kv_heads // inputs.key.shape[2]  # per key/value head
    dtype = lse_and_dsum.dtype
    summed = strategy.ring or axes["key"] or copies > 1
    local = local_gradients(
        call.logit_config,
        call.machine,
        call.implementation,
        call.reproducible_blocks,
        {
            "reference": lse_and_dsum[..., 0],
            "d_sum": lse_and_dsum[..., 1],
            "d_weighted_sum": d_out.astype(dtype),
        },
        key_dtype=dtype if summed else None,
    )
    by_name = dict(
        zip(
            ("query", "key", "value", "bias"),
            ring_gradients(local, inner, call.ring),
            strict=True,
        )
    )
    scatter = {
        "query": strategy.scatter,
        "key": strategy.gather_keys,
        "value": strategy.gather_keys,
    }
    sums = {
        name: sum_over(x, axes[name], scatter.get(name, ()))
        for name, x in by_name.items()
        if x is not None
    }
    if strategy.heads:
        sums = _to_outer_heads(sums, inputs, strategy.heads, copies)
    return {name: to_array(x).astype(getattr(inputs, name).dtype) for name, x in sums.items()}


def row_cotangents(
    call: Call, out: jax.Array, lse: jax.Array, d_out: jax.Array, d_lse: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return d_out [B, T, N, V] and (lse, d_sum) f32[B, T, N, 2] from the cotangents of out and lse.

    Both are 0 for a query that attends to no key: its result is a constant.
    """
    empty = lse == -jnp.inf
    products = d_out.astype(lse.dtype) * out.astype(lse.dtype)
    if call.reproducible_blocks:  # the bits must not depend on how the arrays are sharded
        delta = deterministic_math.ordered_sum(deterministic_math.prevent_fma(products), -1)
    else:
        delta = products.sum(axis=-1)
    d_sum = jnp.where(empty, 0.0, d_lse - delta)
    return jnp.where(empty[..., None], 0.0, d_out), jnp.stack([lse, d_sum], axis=-1)


def sink_gradient(call: Call, sinks: jax.Array, lse_and_dsum: jax.Array) -> Sum:
    """Return the gradient of sinks [N], summed over these queries: f32[N], or FixedPoint [1, N]."""
    lse, d_sum = lse_and_dsum[..., 0], lse_and_dsum[..., 1]
    logits = sinks.astype(lse.dtype)[None, None]
    if not call.reproducible_blocks:
        return (softmax_weights(logits, lse) * d_sum).sum(axis=(0, 1))
    terms = jnp.where(lse == -jnp.inf, 0.0, reproducible_weights(logits, lse) * d_sum)
    scale = limb_format(lse.shape[0] * lse.shape[1])
    return fixed_point.merge_axes(fixed_point.quantise(terms[None], scale), (0, 1))


def to_inner(
    strategy: Strategy, inputs: AttentionInputs, *rows: jax.Array
) -> tuple[AttentionInputs, list[jax.Array]]:
    """Return inputs and rows in the inner sharding.

    Args:
      strategy: of the call.
      inputs: query, key, value and sinks in the outer sharding, bias and mask in the inner one.
      rows: arrays [B, T, N, .] in the outer sharding of the result.
    """
    query, key, value, sinks = inputs.query, inputs.key, inputs.value, inputs.sinks
    moved = list(rows)
    if strategy.heads:
        inputs = with_repeated_heads(inputs, axes_size(strategy.heads))
        arrays = [query, inputs.key, inputs.value, *rows]
        query, key, value, *moved = rows_to_heads(arrays, strategy.heads)
        sinks = None if sinks is None else local_shard(sinks, strategy.heads, 0)
    gather_rows, gather_keys = strategy.gathers
    if gather_rows:  # if the result is not scattered, all devices have its rows
        scattered = moved if strategy.scatter else []
        query, *scattered = in_one_message(
            lambda x: gather_shards(x, gather_rows), [query, *scattered]
        )
        moved = scattered or moved
    # Keys and values apart: packed, they would be copied twice.
    key, value = (gather_shards(x, gather_keys) for x in (key, value))
    return dataclasses.replace(inputs, query=query, key=key, value=value, sinks=sinks), moved


def merge_and_normalize(
    state: State, strategy: Strategy, inputs: AttentionInputs
) -> tuple[jax.Array, jax.Array]:
    """Merge the states of all devices; return out [B, T, N, V] and lse [B, T, N] in their outer sharding.

    Args:
      state: of this device's keys and the queries of the inner sharding.
      strategy: of the call.
      inputs: in the inner sharding.
    """
    sinks, valid, dtype = inputs.sinks, inputs.mask.query_valid, inputs.query.dtype
    if strategy.all_reduce and not strategy.scatter:
        out, lse = _all_reduce_and_normalize(
            state, strategy.all_reduce, strategy.schedule, sinks, valid, dtype
        )
    else:
        if strategy.all_reduce:
            state = all_reduce(state, strategy.all_reduce, schedule=strategy.schedule)
        if strategy.scatter:
            time = monoid_of(state).t_dimension
            state = reduce_scatter(state, strategy.scatter, scatter_dimension=time)
            valid = None if valid is None else local_shard(valid, strategy.scatter, 1)
        out, lse = _normalize(state, sinks, valid, dtype)
    if strategy.heads:
        out, lse = heads_to_rows([out, lse], strategy.heads)
    return out, lse


def _normalize(
    state: State, sinks: jax.Array | None, valid: jax.Array | None, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    out, lse = monoid_of(state).finalize(state, sinks)
    if valid is not None:  # a sink gives no log-sum-exp to a query that is not valid
        out = jnp.where(valid[..., None, None], out, 0.0)
        lse = jnp.where(valid[..., None], lse, -jnp.inf)
    return out.astype(dtype), lse


def _all_reduce_and_normalize(
    state: State,
    axes: Axes,
    schedule: str | Schedule,
    sinks: jax.Array | None,
    valid: jax.Array | None,
    dtype: jnp.dtype,
) -> tuple[jax.Array, jax.Array]:
    """Merge by an all-reduce, and normalize.

    An all-reduce is a reduce-scatter and an all-gather. If XLA makes that of a large state in fixed point,
    results are gathered instead: a third of the bytes, and each device divides its own rows only. If types
    are tracked, the gathered result would not count as replicated.
    """
    rows = rows_of(state)[-1]
    divides = rows % axes_size(axes) == 0 and not typed_as_varying(axes)
    if monoid_of(state).exact and divides:
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        if size >= LARGE_BYTES and chosen_schedule(schedule, state, axes) == "psum":
            time = FIXED_POINT.t_dimension
            state = reduce_scatter(state, axes, scatter_dimension=time, schedule="psum")
            valid = None if valid is None else local_shard(valid, axes, 1)
            out, lse = _normalize(state, sinks, valid, jnp.dtype(jnp.float32))
            packed = jnp.concatenate([out, lse[..., None]], axis=-1)
            whole = lax.all_gather(packed, axes, axis=1, tiled=True)
            return whole[..., :-1].astype(dtype), whole[..., -1]
    return _normalize(all_reduce(state, axes, schedule=schedule), sinks, valid, dtype)


def sum_over(x: Sum, axes: Axes, scatter: Axes = ()) -> Sum:
    """Sum x over the axes, and keep this device's shard along T or S for those in `scatter`."""
    fixed = is_exact(x)
    if axes_size(scatter) > 1 and fixed:
        time = FIXED_POINT.t_dimension
        x = reduce_scatter(x, scatter, scatter_dimension=time, schedule="psum")
    elif axes_size(scatter) > 1:
        x = lax.psum_scatter(x, scatter, scatter_dimension=1, tiled=True)
    rest = tuple(axis for axis in axes if axis not in scatter)
    if not rest:
        return x
    return all_reduce(x, rest, schedule=sum_schedule(x, rest)) if fixed else all_sum(x, rest)


def _to_outer_heads(
    sums: dict[str, Sum], inputs: AttentionInputs, axes: Axes, copies: int
) -> dict[str, Sum]:
    """Bring gradients with heads sharded over the axes to all heads of this device's rows.

    Numbers are shorter than sums in fixed point, but copies of a key/value head are still to be added.
    """
    moved = {
        name: x
        if name != "query" and copies > 1
        else to_array(x).astype(getattr(inputs, name).dtype)
        for name, x in sums.items()
        if name != "bias"
    }
    packed = heads_to_rows([pack_rows(x) for x in moved.values()], axes)
    for (name, x), y in zip(moved.items(), packed, strict=True):
        rows = unpack_rows(y, x)
        sums = sums | {name: rows if name == "query" else sum_copies(rows, copies)}
    return sums
