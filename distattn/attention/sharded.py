"""The public call inside your own `shard_map`: one device's view."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike

from distattn._compat import vary, varying_axes
from distattn.algebra.mergeable import to_array
from distattn.attention import device_step
from distattn.attention.sharding import Placement
from distattn.attention.strategy import (
    QUERY_SHARDED,
    Call,
    Strategy,
    StrategyLike,
    check_strategy,
    choose_sharded,
    sizes_of_call,
    strategy_of,
)
from distattn.collectives.all_reduce import BY_NAME, typed_as_replicated
from distattn.collectives.mesh import (
    AxisName,
    axes_size,
    gather_shards,
    local_shard,
    mesh_order,
    topology_of,
    typed_as_varying,
)
from distattn.collectives.reproducible_sum import reproducible_sum
from distattn.experimental.fused import hooks
from distattn.local.dispatch import refuse_second_derivative
from distattn.local.inputs import (
    AttentionInputs,
    Window,
    check_implementation,
    letters_of,
    make_inputs,
    make_logit_config,
    map_named,
    padded,
)
from distattn.local.reproducible import reproducible_blocks_of
from distattn.planning.plan import Axes
from distattn.planning.schedule import Schedule


def sharded_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    bias: jax.Array | None = None,
    mask: jax.Array | None = None,
    *,
    axis_name: AxisName,
    query_sharded: bool = False,
    strategy: StrategyLike = "auto",
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
    """Return attention as one device of your own `jax.shard_map` sees it.

    Key and value are this device's shards along S. The call is differentiable in reverse mode, with
    check_vma True and False. Under check_vma=True the result for a replicated query is typed as
    replicated; strategies of messages ('butterfly', 'fused', a `Schedule`) add one all-gather for that.

    Args:
      query: [B, T, N, H], the same on all devices of the axis; with `query_sharded` this device's rows.
      key: [B, S, K, H], this device's keys.
      value: [B, S, K, V].
      bias: as in `dot_product_attention`, for this device's keys and all rows. With `query_sharded` for
        this device's rows and all keys, but for 'reduce_scatter', which takes all rows and these keys.
      mask: as bias, but bool.
      axis_name: the axis of the shard_map, or a tuple of axes, over which S is sharded; shards count in
        the order of the tuple.
      query_sharded: whether query holds this device's rows, sharded over the same axes.
      strategy: 'auto', 'butterfly', 'psum', 'all_gather', 'fused' or a `Schedule`; with `query_sharded`
        'auto', 'reduce_scatter', 'gather_kv', 'ring', 'ulysses', 'ulysses_ring' or 'ulysses_gather_kv'.
      scale: as in `dot_product_attention`.
      is_causal: as in `dot_product_attention`.
      query_seq_lengths: int32[B], in global rows.
      key_value_seq_lengths: int32[B], in positions.
      local_window_size: as in `dot_product_attention`.
      implementation: as in `dot_product_attention`.
      return_residual: as in `dot_product_attention`.
      logits_soft_cap: as in `dot_product_attention`.
      sinks: as in `dot_product_attention`.
      precision: as in `dot_product_attention`.
      query_positions: int32[T] or int32[B, T], of the rows given; default: global indices.
      key_positions: int32[S] or int32[B, S], of the keys given; default: axis_index * S + 0, 1, 2, ...
      query_segment_ids: of the rows given.
      key_value_segment_ids: of the keys given.
      reproducible: as in `dot_product_attention`. Blocks of 64 keys start at the start of each device's
        shard, so results are equal on other numbers of devices if S here is a multiple of 64. With
        `query_sharded` the same holds for rows in the gradients of key and value: blocks of 64, or for
        fewer than 512 rows in all of an eighth of them, 8 at least. The gradient of a bias that is the same
        on all devices is reproducible under check_vma=True. Under check_vma=False JAX divides what comes
        back by the number of devices, so that gradients are those of another number if it is a power of
        two.

    Returns:
      out [B, T, N, V] in query's dtype, with `return_residual` also lse f32[B, T, N]: on all devices, or
      with `query_sharded` for this device's rows.

    Raises:
      ValueError: as `dot_product_attention`; an axis that the shard_map around does not have.
      NotImplementedError: as `dot_product_attention`.

    Examples:
      >>> import functools, jax, jax.numpy as jnp, distattn
      >>> from jax.sharding import PartitionSpec as P
      >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 8, 2, 4))
      >>> attend = functools.partial(distattn.sharded_attention, axis_name="x", is_causal=True)
      >>> mesh, shards = jax.sharding.Mesh(jax.devices(), ("x",)), P(None, "x")
      >>> run = jax.shard_map(attend, mesh=mesh, in_specs=(P(), shards, shards), out_specs=P())
      >>> wanted = jax.nn.dot_product_attention(query, key, value, is_causal=True)
      >>> bool(jnp.allclose(jax.jit(run)(query, key, value), wanted, atol=1e-5))
      True

    Reference: Rabe & Staats, arXiv 2112.05682, section 3, across devices.
    """
    implementation = check_implementation(implementation)
    check_strategy(strategy)
    logit_config = make_logit_config(query, scale, logits_soft_cap, precision)
    axes = mesh_order(axis_name)
    names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    rank, devices = lax.axis_index(names), axes_size(axes)
    rows, keys = jnp.shape(query)[-3], jnp.shape(key)[-3]
    # In index order the last device works as without a mask.
    balanced = is_causal and query_positions is not None
    chosen = _choose(strategy, query_sharded, names, (query, key, value), (bias, mask), balanced)
    inputs = make_inputs(
        query,
        key,
        value,
        bias,
        mask,
        is_causal=is_causal,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
        sinks=sinks,
        query_positions=query_positions,
        key_positions=key_positions,
        query_segment_ids=query_segment_ids,
        key_value_segment_ids=key_value_segment_ids,
        query_start=rank * rows if query_sharded and devices > 1 else 0,
        key_start=rank * keys if devices > 1 else 0,
        dense_rows=rows * axes_size(chosen.gather_rows),
        dense_keys=keys if chosen.all_reduce or chosen.scatter else keys * devices,
    )
    mesh = jax.sharding.get_abstract_mesh()
    others = [axis for axis in mesh.axis_names if axis not in mesh.manual_axes]
    placement = Placement(
        query=names if query_sharded else (),
        key=names,
        compiler_sharded=any(mesh.shape[axis] > 1 for axis in others),
    )
    given = varying_axes(*jax.tree.leaves(inputs))
    blocks = None
    if reproducible:
        _check_reproducible(inputs, axes, strategy, others, placement)
        whole = _global_shapes(inputs, devices, query_sharded)
        blocks = reproducible_blocks_of(whole, implementation)
    out, lse = _attend(Call(placement, chosen, logit_config, implementation, blocks), inputs)
    if not query_sharded and typed_as_varying(axes):
        over = mesh_order((*axes, *(varying_axes(out) - given - {*axes})))
        if varying_axes(out) & set(axes):
            out = typed_as_replicated(out, over)
        if return_residual and varying_axes(lse) & set(axes):
            lse = typed_as_replicated(lse, over)
    if jnp.ndim(query) == 3:
        out, lse = out[0], lse[0]
    return (out, lse) if return_residual else out


def _check_reproducible(
    inputs: AttentionInputs,
    axes: Axes,
    strategy: StrategyLike,
    others: list[str],
    placement: Placement,
) -> None:
    if strategy == "fused" and typed_as_varying(axes):
        given = varying_axes(*jax.tree.leaves(inputs))
        more = varying_axes(*jax.tree.leaves(hooks.varied(inputs, axes))) - given - {*axes}
        if more:
            raise NotImplementedError(
                "reproducible=True with strategy='fused' under check_vma=True is not built if nothing "
                f"varies over other axes of the mesh, here {sorted(more)}; use 'butterfly', or "
                "check_vma=False"
            )
    if placement.compiler_sharded:
        raise NotImplementedError(
            f"reproducible=True in a shard_map that leaves the axes {others} to the compiler is not built; "
            "name them in axis_names of the shard_map, or use distattn.dot_product_attention outside of it"
        )


def _choose(
    strategy: StrategyLike,
    query_sharded: bool,
    names: Axes,
    arrays: tuple[jax.Array, jax.Array, jax.Array],
    dense: tuple[jax.Array | None, ...],
    balanced: bool,
) -> Strategy:
    """Return the strategy; raise ValueError if the one that is named does not fit the query."""
    fitting = QUERY_SHARDED if query_sharded else BY_NAME
    if not (
        strategy == "auto"
        or strategy in fitting
        or (isinstance(strategy, Schedule) and not query_sharded)
    ):
        raise ValueError(
            f"strategy={strategy!r} does not fit query_sharded={query_sharded}; use 'auto' or one of "
            f"{fitting}"
        )
    if not query_sharded:
        return Strategy(all_reduce=names, schedule=strategy)
    sizes = {axis: axes_size((axis,)) for axis in names}
    if strategy == "auto":
        strategy = _by_cost(sizes, arrays, dense, balanced)
    return strategy_of(strategy, names, sizes, arrays[0].shape[-2])


def _by_cost(
    sizes: dict[str, int],
    arrays: tuple[jax.Array, jax.Array, jax.Array],
    dense: tuple[jax.Array | None, ...],
    balanced: bool,
) -> str:
    query, key, _ = arrays
    size, rows, keys = math.prod(sizes.values()), query.shape[-3], key.shape[-3]
    # A bias or a mask is sharded for one or the other: it has all rows and these keys, or all keys.
    dims = [(1, *jnp.shape(x))[-2:] for x in dense if x is not None and jnp.ndim(x)]
    if size > 1 and any(dim[0] not in (1, rows) or dim[1] == keys > 1 for dim in dims):
        return "reduce_scatter"
    batch = query.shape[0] if query.ndim == 4 else 1
    shapes = [
        jax.ShapeDtypeStruct((batch, size * x.shape[-3], *x.shape[-2:]), x.dtype) for x in arrays
    ]
    return choose_sharded(
        sizes_of_call(*shapes, causal=balanced),
        topology_of(mesh_order(tuple(sizes))),
        tuple(sizes.values()),
        all_keys=any(dim[1] == size * keys for dim in dims),
    ).strategy


def _global_shapes(inputs: AttentionInputs, devices: int, query_sharded: bool) -> AttentionInputs:
    """Return the shapes of the whole call, from those of one device."""

    def longer(x: jax.Array, times: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((x.shape[0], x.shape[1] * times, *x.shape[2:]), x.dtype)

    return dataclasses.replace(
        inputs,
        query=longer(inputs.query, devices if query_sharded else 1),
        key=longer(inputs.key, devices),
        value=longer(inputs.value, devices),
    )


def _attend(call: Call, inputs: AttentionInputs) -> tuple[jax.Array, jax.Array]:
    """Return out and lse of this device's inputs, differentiable.

    The custom_vjp holds collectives, so it keeps the two rules of differentiation inside a `shard_map` by
    itself. The cotangent of a result that all devices have is the sum of the cotangents on each device. The
    gradient of an input that all devices have is the sum of the gradients on each device, so one device
    returns a gradient that is whole already, and the others return 0.
    """
    rows, axes, strategy = inputs.query.shape[1], call.placement.key, call.strategy
    if call.implementation == "dense":
        return device_step.result(call, _masks_to_inner(inputs, strategy))
    replicated = ()
    if call.reproducible_blocks:
        more = {
            "T": -rows % call.reproducible_blocks.rows,
            "S": -inputs.key.shape[1] % call.reproducible_blocks.keys,
        }
        moves = strategy.gather_keys or strategy.ring or strategy.heads
        bias = inputs.bias
        if bias is not None and typed_as_varying(axes) and not varying_axes(bias) & {*axes}:
            replicated = ("bias",)
        if call.placement.query:
            _check_dense_lengths(inputs, more, moves=bool(moves))
        inputs = padded(inputs, more, dense=not moves)  # if keys move, they are for all of them
    if strategy.schedule == "fused" and axes_size(axes) > 1:
        inputs = hooks.varied(inputs, mesh_order(axes))
    varying = varying_axes(*jax.tree.leaves(inputs), lax.axis_index(axes))
    inputs = jax.tree.map(lambda x: vary(x, varying), inputs)
    x = inputs
    out, lse = _attention(call, replicated, x.query, x.key, x.value, x.bias, x.sinks, x.mask)
    return out[:, :rows], lse[:, :rows]


def _check_dense_lengths(inputs: AttentionInputs, more: dict[str, int], *, moves: bool) -> None:
    """Raise NotImplementedError if a bias or mask would have to be padded shard by shard."""
    for name, x in (("bias", inputs.bias), ("mask", inputs.mask.dense)):
        if x is None:
            continue
        grows = [("T", inputs.query.shape[1])] if more["T"] and x.shape[2] > 1 else []
        if moves and more["S"] and x.shape[3] > 1:
            grows.append(("S", inputs.key.shape[1]))
        for letter, size in grows:
            block = size + more[letter]
            raise NotImplementedError(
                f"reproducible=True with query_sharded=True and {name} of shape {x.shape} is not built for "
                f"{letter}={size} on each device: pad query, key, value and {name} to {letter}={block}, "
                "with negative key_positions, or use distattn.dot_product_attention outside the shard_map"
            )


def _primal(call: Call, replicated: tuple[str, ...], *fields: Any) -> tuple[jax.Array, jax.Array]:
    return device_step.result(call, _masks_to_inner(AttentionInputs(*fields), call.strategy))


_attention: Any = jax.custom_vjp(_primal, nondiff_argnums=(0, 1))


def _forward(call: Call, replicated: tuple[str, ...], *fields: Any) -> tuple[Any, ...]:
    out, lse = _primal(call, replicated, *fields)
    out, lse = checkpoint_name(out, "distattn_out"), checkpoint_name(lse, "distattn_lse")
    return (out, lse), (fields, out, lse)


def _backward(
    call: Call, replicated: tuple[str, ...], residuals: tuple[Any, ...], cotangents: Any
) -> tuple[Any, ...]:
    @refuse_second_derivative
    def run(residuals: tuple[Any, ...], cotangents: Any) -> tuple[Any, ...]:
        fields, out, lse = residuals
        return _gradients(call, replicated, fields, out, lse, cotangents)

    return *run(residuals, cotangents), None


_attention.defvjp(_forward, _backward)


def _gradients(
    call: Call,
    replicated: tuple[str, ...],
    fields: tuple[Any, ...],
    out: jax.Array,
    lse: jax.Array,
    cotangents: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array | None, ...]:
    """Return the gradients of query, key, value, bias and sinks; `replicated` names those of one device."""
    strategy, axes, inputs = call.strategy, call.placement.key, AttentionInputs(*fields)
    exact, query_sharded = call.reproducible_blocks is not None, bool(call.placement.query)
    if exact and strategy.heads and inputs.bias is not None:
        raise NotImplementedError(
            "the gradient of a bias under reproducible=True and a strategy that shards heads is not "
            "built inside a shard_map; use 'ring' or 'gather_kv', or dot_product_attention outside"
        )
    if not query_sharded:
        cotangents = _sum_cotangents(cotangents, axes, exact=exact)
    d_out, lse_and_dsum = device_step.row_cotangents(call, out, lse, *cotangents)
    gradients = device_step.gradients(
        call,
        _masks_to_inner(inputs, strategy),
        d_out,
        lse_and_dsum,
        {
            "query": strategy.all_reduce if exact else (),
            "key": (),
            "value": (),
            "bias": axes if "bias" in replicated else (),
        },
    )
    if strategy.heads and inputs.bias is not None:
        local_rows = inputs.query.shape[1]
        _, pull = jax.vjp(lambda x: _dense_to_heads(x, strategy.heads, local_rows), inputs.bias)
        (gradients["bias"],) = pull(gradients["bias"])
    if inputs.sinks is not None:
        d_sinks = device_step.sink_gradient(call, inputs.sinks, lse_and_dsum)
        d_sinks = device_step.sum_over(d_sinks, axes if exact and query_sharded else ())
        gradients["sinks"] = to_array(d_sinks).astype(inputs.sinks.dtype)
    whole = {*replicated}  # on every device, of which one returns it
    if exact or not query_sharded:
        whole.add("sinks")
    if exact and not query_sharded:
        whole.add("query")
    first = lax.axis_index(axes) == 0
    results = {
        name: jnp.where(first, x, 0) if name in whole else x for name, x in gradients.items()
    }
    return tuple(results.get(name) for name in ("query", "key", "value", "bias", "sinks"))


def _sum_cotangents(
    cotangents: tuple[jax.Array, jax.Array], axes: Axes, *, exact: bool
) -> tuple[jax.Array, jax.Array]:
    """Return the cotangents of a result that all devices have, from those on each device."""
    d_out, d_lse = cotangents
    if typed_as_varying(axes):
        axes = tuple(axis for axis in axes if axis in varying_axes(d_out, d_lse))
    if not axes:
        return cotangents
    if exact:
        return (
            reproducible_sum(d_out, (), axis_name=axes),
            reproducible_sum(d_lse, (), axis_name=axes),
        )
    packed = jnp.concatenate([d_out.astype(d_lse.dtype), d_lse[..., None]], axis=-1)
    packed = lax.psum(packed, axes)
    return packed[..., :-1], packed[..., -1]


def _masks_to_inner(inputs: AttentionInputs, strategy: Strategy) -> AttentionInputs:
    """Return the inputs with bias and mask for the queries, keys and heads of the inner sharding.

    Positions, segments and lengths come for those of this device. A bias and a dense mask come as
    `sharded_attention` says, and only their heads move.
    """
    heads, local_rows = strategy.heads, inputs.query.shape[1]

    def bring(name: str, x: jax.Array) -> jax.Array:
        letters = letters_of(name, x)
        if name in ("query", "key", "value", "sinks"):
            return x
        if letters == "BNTS":
            return _dense_to_heads(x, heads, local_rows) if heads else x
        over = strategy.gather_rows if "T" in letters else strategy.gather_keys
        return gather_shards(gather_shards(x, heads), over)

    return map_named(bring, inputs)


def _dense_to_heads(x: jax.Array, axes: Axes, local_rows: int) -> jax.Array:
    """Bring [B|1, N|1, T|1, S|1] of this device's queries to all queries of its shard of the heads."""
    has_rows = x.shape[2] > 1 or local_rows == 1  # otherwise it is equal for all
    if x.shape[1] == 1:
        return gather_shards(x, axes, 2) if has_rows else x
    if has_rows:
        return lax.all_to_all(x, axes, split_axis=1, concat_axis=2, tiled=True)
    return local_shard(x, axes, 1)
