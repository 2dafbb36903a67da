"""The public call inside a `shard_map` of one's own: what one device does, collectives included."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from distattn import planner
from distattn._compat import varying_axes
from distattn.across import finish
from distattn.collectives import (
    ALL_REDUCES,
    AxisName,
    all_reduce,
    axes_size,
    mesh_order,
    reduce_scatter,
    topology_of,
    typed_as_replicated,
    typed_as_varying,
)
from distattn.cost import Shape
from distattn.local import local_state
from distattn.movement import QUERY_SHARDED, Combine, check_combine
from distattn.operands import Window, check_implementation, make_operands, make_scoring
from distattn.placement import Axes
from distattn.schedule import Schedule
from distattn.tiles import Machine


def sharded_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    axis_name: AxisName,
    query_sharded: bool = False,
    combine: Combine = "auto",
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: Window = None,
    implementation: str | None = None,
    return_residual: bool = False,
    logits_soft_cap: float | None = None,
    sinks: ArrayLike | None = None,
    precision: jax.lax.PrecisionLike = None,
    query_positions: ArrayLike | None = None,
    key_positions: ArrayLike | None = None,
    query_segment_ids: ArrayLike | None = None,
    key_value_segment_ids: ArrayLike | None = None,
    reproducible: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """`dot_product_attention` as one device of a `jax.shard_map` of one's own sees it.

    Key and value are this device's shards along S. Differentiable in reverse mode, with check_vma True
    and False. Under check_vma=True the result for a replicated query is typed as replicated; a schedule
    of messages ('butterfly', a `Schedule`) needs one more all-gather for that type.

    Args:
      query: [B, T, N, H], the same on all devices of the axis; with `query_sharded` this device's rows.
      key: [B, S, K, H], this device's keys.
      value: [B, S, K, V].
      bias: as in `dot_product_attention`, for this device's keys and all rows; for 'gather_kv', for this
        device's rows and all keys.
      mask: the same.
      axis_name: the axis of the shard_map, or a tuple of axes, over which S is sharded; shards count in
        the order of the tuple.
      query_sharded: whether query holds this device's rows, sharded over the same axes.
      combine: 'auto', 'butterfly', 'psum', 'all_gather' or a `Schedule`; with `query_sharded` 'auto',
        'reduce_scatter' or 'gather_kv'.
      scale: as in `dot_product_attention`, like all that is not listed here.
      is_causal: the same.
      query_seq_lengths: int32[B], in global rows.
      key_value_seq_lengths: int32[B], in positions.
      local_window_size: the same.
      implementation: the same.
      return_residual: the same.
      logits_soft_cap: the same.
      sinks: the same.
      precision: the same.
      query_positions: int32[T] or int32[B, T], of the rows given; default: global indices.
      key_positions: int32[S] or int32[B, S], of the keys given; default: axis_index * S + 0, 1, 2, ...
      query_segment_ids: of the rows given.
      key_value_segment_ids: of the keys given.
      reproducible: not built.

    Returns:
      out [B, T, N, V] in query's dtype, with `return_residual` also lse f32[B, T, N]: on all devices, or
      with `query_sharded` for this device's rows.

    Raises:
      ValueError: as `dot_product_attention`; an axis that the shard_map around does not have.
      NotImplementedError: as `dot_product_attention`.
    """
    implementation = check_implementation(implementation)
    check_combine(combine, reproducible)
    scoring = make_scoring(query, scale, logits_soft_cap, precision)
    axes = mesh_order(axis_name)
    names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    rank = lax.axis_index(names)
    rows, keys = jnp.shape(query)[-3], jnp.shape(key)[-3]
    combine = _fitting(combine, query_sharded, axes, query, key, value, bias, mask)
    by_rows, by_keys = combine == "reduce_scatter", combine == "gather_kv"

    def gathered(x: Any, wanted: bool, axis: int) -> Any:
        """x of all devices along its dimension `axis`, counted from the end."""
        if x is None or not wanted:
            return x
        return lax.all_gather(x, names, axis=jnp.ndim(x) + axis, tiled=True)

    operands = make_operands(
        gathered(query, by_rows, -3),
        gathered(key, by_keys, -3),
        gathered(value, by_keys, -3),
        bias,
        mask,
        is_causal=is_causal,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
        sinks=sinks,
        query_positions=gathered(query_positions, by_rows, -1),
        key_positions=gathered(key_positions, by_keys, -1),
        query_segment_ids=gathered(query_segment_ids, by_rows, -1),
        key_value_segment_ids=gathered(key_value_segment_ids, by_keys, -1),
        query_start=rank * rows if by_keys else 0,
        key_start=0 if by_keys else rank * keys,
    )
    mesh = jax.sharding.get_abstract_mesh()
    others = [axis for axis in mesh.axis_names if axis not in mesh.manual_axes]
    machine = Machine(jax.default_backend(), any(mesh.shape[axis] > 1 for axis in others))
    state = local_state(operands, scoring, machine, implementation)
    valid = operands.mask.query_valid
    if by_rows:
        state = reduce_scatter(state, names)
        if valid is not None:
            valid = lax.dynamic_slice_in_dim(valid, rank * rows, rows, axis=1)
    elif not by_keys:
        state = all_reduce(state, names, schedule=combine)
    out, lse = finish(state, operands.sinks, valid, operands.query.dtype)
    if not query_sharded and typed_as_varying(axes):
        if varying_axes(out) & set(axes):
            out = typed_as_replicated(out, axes)
        if return_residual and varying_axes(lse) & set(axes):
            lse = typed_as_replicated(lse, axes)
    if jnp.ndim(query) == 3:
        out, lse = out[0], lse[0]
    return (out, lse) if return_residual else out


def _fitting(
    combine: Combine, query_sharded: bool, axes: Axes, query, key, value, bias, mask
) -> Combine:
    """The combine to use; ValueError where the one that is named does not fit the query."""
    size = axes_size(axes)
    if isinstance(combine, str) and combine == "ring" and query_sharded:
        raise NotImplementedError(
            f"combine='ring' is not built; use one of {QUERY_SHARDED} for a sharded query"
        )
    fits = QUERY_SHARDED if query_sharded else ALL_REDUCES
    if combine == "auto" and not query_sharded:
        return combine
    if combine == "auto":
        # A bias or a mask is cut for one of the two: it has all rows, or all keys.
        for x in (bias, mask):
            if (
                x is not None
                and jnp.ndim(x)
                and jnp.shape(x)[-1] == size * jnp.shape(key)[-3] != jnp.shape(key)[-3]
            ):
                return "gather_kv"
            if (
                x is not None
                and jnp.ndim(x) > 1
                and jnp.shape(x)[-2] not in (1, jnp.shape(query)[-3])
            ):
                return "reduce_scatter"
        batch = query.shape[0] if query.ndim == 4 else 1
        shape = Shape(
            batch,
            size * query.shape[-3],
            size * key.shape[-3],
            query.shape[-2],
            key.shape[-2],
            query.shape[-1],
            value.shape[-1],
            key.dtype.itemsize,
        )
        return planner.choose(shape, topology_of(axes), query_sharded=True).combine
    if combine in fits or (isinstance(combine, Schedule) and not query_sharded):
        return combine
    raise ValueError(
        f"combine={combine!r} does not fit query_sharded={query_sharded}; use 'auto' or one of {fits}"
    )
