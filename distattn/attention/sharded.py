"""The public call inside a `shard_map` of one's own: what one device does, collectives included."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from distattn._compat import platform_of, varying_axes
from distattn.attention.device_step import Own, Work, at_work, masks_at_work, reproducible_attention
from distattn.attention.strategy import (
    QUERY_SHARDED,
    Movement,
    StrategyLike,
    check_strategy,
    choose_sharded,
    movement_of,
)
from distattn.collectives.all_reduce import BY_NAME, typed_as_replicated
from distattn.collectives.mesh import AxisName, axes_size, mesh_order, topology_of, typed_as_varying
from distattn.experimental.fused import hooks
from distattn.local.inputs import (
    AttentionInputs,
    Window,
    check_implementation,
    make_inputs,
    make_logit_config,
)
from distattn.local.reproducible import reproducible_blocks_of
from distattn.local.tiling import Machine
from distattn.planning.cost import Workload
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
    """`dot_product_attention` as one device of a `jax.shard_map` of one's own sees it.

    Key and value are this device's shards along S. Differentiable in reverse mode, with check_vma True
    and False. Under check_vma=True the result for a replicated query is typed as replicated; a schedule
    of messages ('butterfly', 'fused', a `Schedule`) needs one more all-gather for that type.

    Args:
      query: [B, T, N, H], the same on all devices of the axis; with `query_sharded` this device's rows.
      key: [B, S, K, H], this device's keys.
      value: [B, S, K, V].
      bias: as in `dot_product_attention`, for this device's keys and all rows. With `query_sharded` for
        this device's rows and all keys, but for 'reduce_scatter', which takes all rows and these keys.
      mask: the same.
      axis_name: the axis of the shard_map, or a tuple of axes, over which S is sharded; shards count in
        the order of the tuple.
      query_sharded: whether query holds this device's rows, sharded over the same axes.
      strategy: 'auto', 'butterfly', 'psum', 'all_gather', 'fused' or a `Schedule`; with `query_sharded`
        'auto', 'reduce_scatter', 'gather_kv', 'ring', 'ulysses', 'ulysses_ring' or 'ulysses_gather_kv'.
        The gradient of 'fused' computes the states again, and merges them by the messages of 'butterfly'.
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
      reproducible: as in `dot_product_attention`. Blocks of 64 keys are cut from the start of each device's
        shard, so the bits are those of other numbers of devices where S here is a multiple of 64. With
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

    Example:
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
    rank = lax.axis_index(names)
    rows, keys = jnp.shape(query)[-3], jnp.shape(key)[-3]
    several = axes_size(axes) > 1
    # As in `movement`: in index order the last device works as without a mask.
    balanced = is_causal and query_positions is not None
    movement = _choose(strategy, query_sharded, names, query, key, value, (bias, mask), balanced)
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
        query_start=rank * rows if query_sharded and several else 0,
        key_start=rank * keys if several else 0,
        dense_rows=rows * axes_size(movement.gather_rows),
        dense_keys=keys if movement.all_reduce or movement.scatter else keys * axes_size(axes),
    )
    mesh = jax.sharding.get_abstract_mesh()
    others = [axis for axis in mesh.axis_names if axis not in mesh.manual_axes]
    machine = Machine(platform_of(), any(mesh.shape[axis] > 1 for axis in others))
    given = varying_axes(*jax.tree.leaves(inputs))
    if reproducible and strategy == "fused" and typed_as_varying(axes):
        more = varying_axes(*jax.tree.leaves(hooks.varied(inputs, axes))) - given - {*axes}
        if more:
            raise NotImplementedError(
                "reproducible=True with strategy='fused' under check_vma=True is not built where nothing "
                f"varies over other axes of the mesh, here {sorted(more)}; use 'butterfly', or "
                "check_vma=False"
            )
    if reproducible and machine.compiler_sharded:
        raise NotImplementedError(
            f"reproducible=True in a shard_map that leaves the axes {others} to the compiler is not built; "
            "name them in axis_names of the shard_map, or use distattn.dot_product_attention outside of it"
        )
    work = Work(logit_config, machine, implementation, movement, movement.keys_at_work(names))
    if reproducible:
        whole = _global_shapes(inputs, axes_size(axes), query_sharded)
        work = dataclasses.replace(
            work, reproducible_blocks=reproducible_blocks_of(whole, implementation)
        )
        out, lse = reproducible_attention(Own(work, axes, query_sharded), inputs)
    else:
        out, lse = _attend(work, inputs)
    if not query_sharded and typed_as_varying(axes):
        over = mesh_order((*axes, *(varying_axes(out) - given - {*axes})))
        if varying_axes(out) & set(axes):
            out = typed_as_replicated(out, over)
        if return_residual and varying_axes(lse) & set(axes):
            lse = typed_as_replicated(lse, over)
    if jnp.ndim(query) == 3:
        out, lse = out[0], lse[0]
    return (out, lse) if return_residual else out


def _choose(
    strategy: StrategyLike,
    query_sharded: bool,
    names: Axes,
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    dense: tuple[jax.Array | None, ...],
    causal: bool,
) -> Movement:
    """What moves; ValueError where the strategy that is named does not fit the query."""
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
        return Movement(all_reduce=names, schedule=strategy)
    sizes = {axis: axes_size((axis,)) for axis in names}
    if strategy == "auto":
        strategy = _by_cost(sizes, query, key, value, dense, causal)
    return movement_of(strategy, names, sizes, query.shape[-2])


def _by_cost(
    sizes: dict[str, int],
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    dense: tuple[jax.Array | None, ...],
    causal: bool,
) -> str:
    size, rows, keys = math.prod(sizes.values()), query.shape[-3], key.shape[-3]
    shape = Workload(
        batch=query.shape[0] if query.ndim == 4 else 1,
        query_length=size * rows,
        key_length=size * keys,
        num_heads=query.shape[-2],
        num_kv_heads=key.shape[-2],
        head_dim=query.shape[-1],
        value_dim=value.shape[-1],
        itemsize=key.dtype.itemsize,
        causal=causal,
    )
    # A bias or a mask is cut for one or the other: it has all rows and these keys, or all keys.
    cuts = [(1, *jnp.shape(x))[-2:] for x in dense if x is not None and jnp.ndim(x)]
    if size > 1 and any(cut[0] not in (1, rows) or cut[1] == keys > 1 for cut in cuts):
        return "reduce_scatter"
    all_keys = any(cut[1] == size * keys for cut in cuts)
    return choose_sharded(
        shape, topology_of(mesh_order(tuple(sizes))), tuple(sizes.values()), all_keys=all_keys
    ).strategy


def _attend(work: Work, inputs: AttentionInputs) -> tuple[jax.Array, jax.Array]:
    """out and lse of this device's inputs, differentiated through the collectives."""
    movement = work.movement
    inputs, _ = at_work(masks_at_work(inputs, movement), movement)
    if not work.in_one_launch(inputs):
        return work.differentiable_result(inputs)

    # As in `collectives`: the transpose of the same computation in another form.
    def backward(
        inputs: AttentionInputs, cotangents: tuple[jax.Array, jax.Array]
    ) -> tuple[AttentionInputs]:
        apart = dataclasses.replace(
            work, movement=dataclasses.replace(movement, schedule="butterfly")
        )
        return jax.vjp(apart.differentiable_result, inputs)[1](cotangents)

    launched = jax.custom_vjp(work.launched)
    launched.defvjp(lambda inputs: (launched(inputs), inputs), backward)
    return launched(hooks.varied(inputs, mesh_order(movement.all_reduce)))


def _global_shapes(inputs: AttentionInputs, devices: int, query_sharded: bool) -> AttentionInputs:
    """The shapes of the whole call, from those of one device."""

    def longer(x: jax.Array, times: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((x.shape[0], x.shape[1] * times, *x.shape[2:]), x.dtype)

    return dataclasses.replace(
        inputs,
        query=longer(inputs.query, devices if query_sharded else 1),
        key=longer(inputs.key, devices),
        value=longer(inputs.value, devices),
    )
