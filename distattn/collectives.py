"""Run a schedule inside `shard_map`: states merged over the devices of an axis.

Everything here is what one device does. A state travels packed, in one message a round; the operand
of the lower rank comes first in each merge, so that all replicas are equal bit for bit.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from distattn import planner
from distattn._compat import all_gather_as_replicated, varying_axes
from distattn.cost import Shape, Topology
from distattn.schedule import Pairs, ScatterSchedule, Schedule, halving, hierarchical
from distattn.state import SoftmaxState, merge, merge_stacked, pack, rescale, unpack

AxisName = str | tuple[str, ...]
ALL_REDUCES = ("butterfly", "psum", "all_gather")


def all_reduce(
    state: SoftmaxState, axis_name: AxisName, *, schedule: str | Schedule = "auto"
) -> SoftmaxState:
    """The merge of all devices' states, on every device; to be called inside `shard_map`.

    Args:
      state: this device's state, f32[B, T, N], f32[B, T, N], f32[B, T, N, V].
      axis_name: the axis, or a tuple of axes, to merge over.
      schedule: 'butterfly' (recursive doubling, ceil(log2 D) messages; level by level over a tuple of
        axes), 'psum' (a pmax and one packed psum), 'all_gather' (one all-gather, merged locally), a
        `Schedule` of one's own, or 'auto' (the cheapest by `planner`).

    Returns:
      SoftmaxState, equal bit for bit on all devices. Under `check_vma=True` that of 'psum' and
      'all_gather' is typed as replicated, that of a schedule of messages as varying; 'auto' takes one
      of the former there.

    Raises:
      ValueError: an unknown name, an unbound axis, or a Schedule for another number of devices.

    Reference: Thakur, Rabenseifner & Gropp, IJHPCA 19(1), 2005, section 4 (recursive doubling).
    """
    axes = mesh_order(axis_name)
    size = axes_size(axes)
    if isinstance(schedule, str):
        schedule = _named(schedule, state, axes)
    elif not isinstance(schedule, Schedule):
        raise ValueError(
            f"schedule is {schedule!r}; it must be 'auto', one of {ALL_REDUCES}, or a distattn.Schedule"
        )
    elif schedule.size != size:
        raise ValueError(
            f"schedule is for {schedule.size} devices, but axis {axis_name!r} has {size}; "
            f"build it for {size}"
        )
    if size == 1:
        return state
    if schedule == "psum":
        high = lax.pmax(lax.stop_gradient(state.max), axes)
        state = rescale(state, high)
        packed = lax.psum(pack(state)[..., :-1], axes)
        return SoftmaxState(high, packed[..., -1], packed[..., :-1])
    if schedule == "all_gather":
        return merge_stacked(unpack(gather(pack(state), axes)))
    return _run(
        schedule,
        state,
        axes,
        send=lambda state, pairs: unpack(lax.ppermute(pack(state), axes, pairs)),
        merge=merge,
    )


def all_sum(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """The sum over the axes, equal bit for bit on all devices: XLA's own, or by messages, by the planner.

    Where messages are slow a butterfly waits for log2 D of them, and a ring, such as Gloo's, for 2 (D-1).
    For the body of a `shard_map` that does not track types.
    """
    axes = mesh_order(axes)
    if planner.choose_sum(x.size * x.dtype.itemsize, topology_of(axes)) == "psum":
        return lax.psum(x, axes)
    return _run(
        _butterfly(axes),
        x,
        axes,
        send=lambda x, pairs: lax.ppermute(x, axes, pairs),
        merge=jnp.add,
    )


def reduce_scatter(
    state: SoftmaxState,
    axis_name: AxisName,
    *,
    scatter_dimension: int = 1,
    schedule: str | ScatterSchedule = "halving",
) -> SoftmaxState:
    """The merge of all devices' states, of which each device gets its part; inside `shard_map`.

    Device r gets the r-th of D equal parts along `scatter_dimension`, D the size of the axis; over a
    tuple of axes devices count in the order of the tuple.

    Args:
      state: this device's state, f32[B, T, N], f32[B, T, N], f32[B, T, N, V].
      axis_name: the axis, or a tuple of axes.
      scatter_dimension: 0, 1 or 2; its size must be a multiple of D.
      schedule: 'halving' (ceil(log2 D) messages, each about half of the one before), 'psum' (a pmax
        and one packed psum_scatter), or a `ScatterSchedule` of one's own.

    Returns:
      SoftmaxState with 1/D of the rows.

    Raises:
      ValueError: an unknown name, a dimension that D does not divide, a schedule of another size.

    Reference: Bruck et al., IEEE TPDS 8(11), 1997 (the all-gather that 'halving' runs backwards).
    """
    axes = mesh_order(axis_name)
    names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    size = axes_size(axes)
    rows = state.max.shape
    if scatter_dimension not in range(len(rows)):
        raise ValueError(
            f"scatter_dimension is {scatter_dimension}; it must be one of {list(range(len(rows)))}, "
            "a dimension of the state's rows"
        )
    if rows[scatter_dimension] % size:
        raise ValueError(
            f"scatter_dimension {scatter_dimension} of the state has size {rows[scatter_dimension]}, "
            f"which the {size} devices of {axis_name!r} do not divide; pad it to a multiple"
        )
    if schedule not in ("halving", "psum") and not isinstance(schedule, ScatterSchedule):
        raise ValueError(
            f"schedule is {schedule!r}; it must be 'halving', 'psum' or a ScatterSchedule"
        )
    if schedule == "halving":
        schedule = halving(size)
    if isinstance(schedule, ScatterSchedule) and schedule.size != size:
        raise ValueError(
            f"schedule is for {schedule.size} devices, but axis {axis_name!r} has {size}; "
            f"build it for {size}"
        )
    if size == 1:
        return state
    if schedule == "psum":
        high = lax.pmax(lax.stop_gradient(state.max), axes)
        packed = pack(rescale(state, high))[..., :-1]
        packed = lax.psum_scatter(packed, names, scatter_dimension=scatter_dimension, tiled=True)
        high = own_part(high, names, scatter_dimension)
        return SoftmaxState(high, packed[..., -1], packed[..., :-1])
    return _run_scatter(schedule, state, axes, names, scatter_dimension)


def choose_all_reduce(state: SoftmaxState, axes: tuple[str, ...]) -> str:
    """The cheapest of the all-reduces for this payload on these axes, by the planner."""
    batch, queries, heads, width = state.weighted_sum.shape
    shape = Shape(batch, queries, 0, heads, heads, width, width, state.max.dtype.itemsize)
    # A schedule's result cannot be typed as replicated without one more collective.
    candidates = ("psum", "all_gather") if typed_as_varying(axes) else ALL_REDUCES
    topology = topology_of(axes)
    return planner.choose(shape, topology, query_sharded=False, candidates=candidates).combine


def topology_of(axes: tuple[str, ...]) -> Topology:
    """The axes of the `shard_map` around, on the devices of the default backend."""
    return Topology(jax.default_backend(), _sizes(axes), jax.process_count())


def mesh_order(axis_name: AxisName) -> tuple[str, ...]:
    """The axes in the order of the mesh.

    `ppermute` over a tuple in another order permutes wrongly (JAX up to 0.10.2), and a merge does not
    care in which order devices are counted.
    """
    names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    mesh = jax.sharding.get_abstract_mesh()
    unbound = [name for name in names if name not in mesh.manual_axes]
    if unbound:
        raise ValueError(
            f"axis_name {unbound[0]!r} is not an axis of the shard_map around (its axes: "
            f"{list(mesh.manual_axes)}); call this inside jax.shard_map over that axis, or use "
            "distattn.dot_product_attention outside of it"
        )
    if len(set(names)) < len(names):
        raise ValueError(f"axis_name {names} names an axis twice; name each axis once")
    return tuple(name for name in mesh.axis_names if name in names)


def axes_size(axes: tuple[str, ...]) -> int:
    """The number of devices along the axes."""
    shape = jax.sharding.get_abstract_mesh().shape
    return math.prod(shape[axis] for axis in axes)


def typed_as_varying(axes: tuple[str, ...]) -> bool:
    """Whether `shard_map` tracks which values vary over the axes (check_vma=True)."""
    return bool(axes) and bool(varying_axes(lax.axis_index(axes)))


def gather(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """[D, ...]: x of every device, typed as replicated where types are tracked."""
    if typed_as_varying(axes):
        return all_gather_as_replicated(x, axes, axes_size(axes))
    return lax.all_gather(x, axes)


def typed_as_replicated(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """x, which is equal on all devices already, typed so: one all-gather of a D-th of x from each."""
    size = axes_size(axes)
    flat = x.reshape(-1)
    flat = jnp.pad(flat, (0, -flat.size % size))
    part = own_part(flat, axes, 0)
    return gather(part, axes).reshape(-1)[: x.size].reshape(x.shape)


def own_part(x: jax.Array, axes: tuple[str, ...], dimension: int) -> jax.Array:
    """This device's part of x, which all devices have, along the dimension."""
    part = x.shape[dimension] // axes_size(axes)
    return lax.dynamic_slice_in_dim(x, lax.axis_index(axes) * part, part, dimension)


def _named(name: str, state: SoftmaxState, axes: tuple[str, ...]) -> str | Schedule:
    if name == "auto":
        name = choose_all_reduce(state, axes)
    if name not in ALL_REDUCES:
        raise ValueError(
            f"schedule is {name!r}; it must be 'auto', one of {ALL_REDUCES}, or a distattn.Schedule"
        )
    return _butterfly(axes) if name == "butterfly" else name


def _butterfly(axes: tuple[str, ...]) -> Schedule:
    return hierarchical(_sizes(axes))


def _sizes(axes: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(axes_size((axis,)) for axis in axes)


def _run(
    schedule: Schedule,
    own: Any,
    axes: tuple[str, ...],
    *,
    send: Callable[[Any, Pairs], Any],
    merge: Callable[[Any, Any], Any],
) -> Any:
    """What all devices have, merged: a state, or an array."""
    rank = lax.axis_index(axes)
    for step in schedule.steps:
        message = send(own, step.pairs)
        first = _where(step.source_first, rank, message, own)
        second = _where(step.source_first, rank, own, message)
        taken = _where(step.replaces, rank, message, merge(first, second))
        # A device to which nothing is sent receives zeros, and zero is not the identity.
        own = _where(step.receives, rank, taken, own)
    return own


def _where(table: tuple[bool, ...], rank: jax.Array, x: Any, y: Any) -> Any:
    """x on the devices for which the table holds, else y."""
    if len(set(table)) == 1:
        return x if table[0] else y
    here = jnp.array(table)[rank]
    return jax.tree.map(lambda a, b: jnp.where(here, a, b), x, y)


def _run_scatter(schedule, state, axes, names, dimension):
    size = schedule.size
    packed = pack(state)
    shape = packed.shape
    part = shape[dimension] // size
    parts = packed.reshape(*shape[:dimension], size, part, *shape[dimension + 1 :])
    parts = jnp.moveaxis(
        parts, dimension, 0
    )  # [D, ...]: by the owner, counted in the order of names
    if names != axes:
        sizes = [axes_size((name,)) for name in names]
        parts = parts.reshape(*sizes, *parts.shape[1:])
        parts = parts.transpose(
            *(names.index(axis) for axis in axes), *range(len(sizes), parts.ndim)
        ).reshape(size, *parts.shape[len(sizes) :])
    parts = jnp.roll(parts, -lax.axis_index(axes), axis=0)  # by the distance to the owner
    for shift, count in schedule.rounds:
        pairs = [(rank, (rank + shift) % size) for rank in range(size)]
        message = lax.ppermute(parts[shift : shift + count], axes, pairs)
        near = pack(merge(unpack(parts[:count]), unpack(message)))
        parts = jnp.concatenate([near, parts[count:shift]])
    return unpack(parts[0])
