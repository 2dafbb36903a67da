"""Run a schedule inside `shard_map`: states merged over the devices of an axis.

Everything here is what one device does. A state travels packed, in one message a round; the operand
of the lower rank comes first in each merge, so that all replicas are equal bit for bit.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from distattn._compat import all_gather_as_replicated
from distattn.algebra.mergeable import State, monoid_of, rows_of
from distattn.collectives.mesh import (
    AxisName,
    axes_size,
    mesh_order,
    own_part,
    sizes_of,
    topology_of,
    typed_as_varying,
)
from distattn.experimental.fused import hooks
from distattn.planning import cost
from distattn.planning.cost import Shape
from distattn.planning.schedule import Pairs, Schedule, hierarchical

ALL_REDUCES = ("butterfly", "psum", "all_gather")
BY_NAME = (*ALL_REDUCES, "fused")  # the last one is never chosen: it has not been timed


def all_reduce(state: State, axis_name: AxisName, *, schedule: str | Schedule = "auto") -> State:
    """The merge of all devices' states, on every device; to be called inside `shard_map`.

    Args:
      state: this device's state, f32[B, T, N], f32[B, T, N], f32[B, T, N, V]; or a `FixedPointState`, or
        another pytree of `FixedPoint` with the same rows, of which every schedule gives the same bits.
      axis_name: the axis, or a tuple of axes, to merge over.
      schedule: 'butterfly' (recursive doubling, ceil(log2 D) messages; level by level over a tuple of
        axes), 'psum' (a pmax and one packed psum), 'all_gather' (one all-gather, merged locally), 'fused'
        (the messages of 'butterfly' inside one TPU kernel, see below), a `Schedule` of one's own, or
        'auto' (the cheapest by `planner`).

    Returns:
      The state over all devices, equal bit for bit on all. Under `check_vma=True` that of 'psum' and
      'all_gather' is typed as replicated, that of a schedule of messages as varying; 'auto' takes one
      of the former there.

    'fused' is for TPUs, and 'auto' never takes it: it is compiled for v5e to tpu7x, and was not timed. All
    axes of the mesh must be axes of the shard_map. Axes that cross slices of a TPU are merged over last,
    as by 'butterfly'. The gradient is that of 'butterfly'. Under check_vma=True, on a mesh of several
    axes, the result is typed as varying over all of them.

    Raises:
      ValueError: an unknown name, an unbound axis, or a Schedule for another number of devices.
      NotImplementedError: 'fused' on another platform, with axes left to the compiler, for a state that is
        float64 or does not fit the memory of a kernel, or where slices are not known.

    Example:
      >>> import jax, jax.numpy as jnp, distattn
      >>> from jax.sharding import PartitionSpec as P
      >>> def mean(key, value):  # keys of equal weight; this device has a part of them
      ...     state = distattn.partial_attention(jnp.ones((1, 1, 1, 4)), key, value)
      ...     return distattn.finalize(distattn.all_reduce(state, "x"))[0]
      >>> mesh, shards = jax.sharding.Mesh(jax.devices(), ("x",)), P(None, "x")
      >>> run = jax.shard_map(mean, mesh=mesh, in_specs=(shards, shards), out_specs=P())
      >>> jax.jit(run)(jnp.zeros((1, 8, 1, 4)), jnp.arange(8.0).reshape(1, 8, 1, 1)).item()
      3.5

    Reference: Thakur, Rabenseifner & Gropp, IJHPCA 19(1), 2005, section 4 (recursive doubling).
    """
    axes = mesh_order(axis_name)
    size = axes_size(axes)
    schedule = chosen_schedule(schedule, state, axes)
    if isinstance(schedule, str):
        alone = schedule == "fused" and size == 1  # no message: nothing that any platform lacks
        schedule = _butterfly(axes) if schedule == "butterfly" or alone else schedule
    elif not isinstance(schedule, Schedule):
        raise ValueError(
            f"schedule is {schedule!r}; it must be 'auto', one of {BY_NAME}, or a distattn.Schedule"
        )
    elif schedule.size != size:
        raise ValueError(
            f"schedule is for {schedule.size} devices, but axis {axis_name!r} has {size}; "
            f"build it for {size}"
        )
    if size == 1 and not typed_as_varying(axes):
        return state
    monoid = monoid_of(state)
    if schedule == "fused":
        return hooks.all_reduce(state, axes, functools.partial(all_reduce, schedule="butterfly"))
    if schedule == "psum":
        gauge = lax.pmax(monoid.gauge(state), axes)
        summed = lax.psum(monoid.pack_sums(monoid.in_gauge(state, gauge)), axes)
        return monoid.unpack_sums(summed, gauge, state)
    if schedule == "all_gather":
        stacked = jnp.moveaxis(gather(monoid.pack(state), axes), 0, monoid.first_row)
        return monoid.merge_stacked(monoid.unpack(stacked, state))

    def send(state: State, pairs: Pairs) -> State:
        return monoid.unpack(lax.ppermute(monoid.pack(state), axes, pairs), state)

    return _run(schedule, state, axes, send=send, merge=monoid.merge)


def all_sum(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """The sum over the axes, equal bit for bit on all devices: XLA's own, or by messages, by the planner.

    Where messages are slow a butterfly waits for log2 D of them, and a ring, such as Gloo's, for 2 (D-1).
    For the body of a `shard_map` that does not track types.
    """
    axes = mesh_order(axes)
    if sum_schedule(x, axes) == "psum":
        return lax.psum(x, axes)
    return _run(
        _butterfly(axes),
        x,
        axes,
        send=lambda x, pairs: lax.ppermute(x, axes, pairs),
        merge=jnp.add,
    )


def chosen_schedule(
    schedule: str | Schedule, state: State, axes: tuple[str, ...]
) -> str | Schedule:
    """What `all_reduce` does with a schedule, 'auto' being made one of the others; or a ValueError."""
    if not isinstance(schedule, str):
        return schedule
    name = choose_all_reduce(state, mesh_order(axes)) if schedule == "auto" else schedule
    if name not in BY_NAME:
        raise ValueError(
            f"schedule is {name!r}; it must be 'auto', one of {BY_NAME}, or a distattn.Schedule"
        )
    return name


def sum_schedule(x: Any, axes: tuple[str, ...]) -> str:
    """How an array, or the arrays of a pytree, are summed in the least time: 'psum' or 'butterfly'."""
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(x))
    return cost.choose_sum(size, topology_of(mesh_order(axes)))


def choose_all_reduce(state: State, axes: tuple[str, ...]) -> str:
    """The cheapest of the all-reduces for this payload on these axes, by the planner."""
    rows = math.prod(rows_of(state))
    packed = jax.eval_shape(monoid_of(state).pack, state)
    width = packed.size // max(rows, 1) - 2  # a state of so wide values has as many numbers
    shape = Shape(1, rows, 0, 1, 1, width, width, packed.dtype.itemsize)
    # A schedule's result cannot be typed as replicated without one more collective.
    candidates = ("psum", "all_gather") if typed_as_varying(axes) else ALL_REDUCES
    topology = topology_of(axes)
    return cost.choose(shape, topology, query_sharded=False, candidates=candidates).strategy


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


def _butterfly(axes: tuple[str, ...]) -> Schedule:
    return hierarchical(sizes_of(axes))


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
