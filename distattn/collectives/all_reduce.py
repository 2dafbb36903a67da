"""All-reduce of states inside `shard_map`, by a schedule of messages or by XLA's collectives.

Each round sends one message, the packed state. In each merge the state of the lower rank comes
first, so the replicas are bitwise equal.
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
    local_shard,
    mesh_order,
    sizes_of,
    topology_of,
    typed_as_varying,
)
from distattn.planning import cost
from distattn.planning.cost import Workload
from distattn.planning.schedule import Pairs, Schedule, hierarchical

ALL_REDUCES = ("butterfly", "psum", "all_gather")
BY_NAME = (*ALL_REDUCES, "fused")  # 'auto' never chooses 'fused', which has not been timed


def all_reduce(state: State, axis_name: AxisName, *, schedule: str | Schedule = "auto") -> State:
    """Merge the states of all devices, and return the result on each; call it inside `shard_map`.

    Args:
      state: this device's state, f32[B, T, N], f32[B, T, N], f32[B, T, N, V]; or a `FixedPointState`,
        or another pytree of `FixedPoint` of equal rows, which every schedule merges to equal bits.
      axis_name: the axis, or a tuple of axes, to merge over.
      schedule: 'butterfly' (recursive doubling, ceil(log2 D) messages, axis by axis), 'psum' (a pmax
        and one packed psum), 'all_gather' (one all-gather, merged locally), 'fused' (the messages of
        'butterfly' inside one TPU kernel), a `Schedule`, or 'auto' (the cheapest, without 'fused').

    Returns:
      The merged state, bitwise equal on all devices. Under `check_vma=True` the result of 'psum' and
      'all_gather' is typed as replicated, and 'auto' chooses between these two. The result of
      messages is typed as varying.

    'fused' is compiled for v5e to tpu7x and has not been timed. All axes of the mesh must be axes of
    the shard_map. Axes that cross TPU slices are merged last, by 'butterfly', whose gradient it has.
    Under check_vma=True the result is typed as varying over all axes of the mesh.

    Raises:
      ValueError: an unknown name, an unbound axis, or a Schedule for another number of devices.
      NotImplementedError: 'fused' on another platform, with axes left to the compiler, with a float64
        state or one too large for a kernel's memory, or if the TPU slices are unknown.

    Examples:
      >>> import jax, jax.numpy as jnp, distattn
      >>> from jax.sharding import PartitionSpec as P
      >>> def mean(key, value):  # keys of equal weight, one on each device
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
    if schedule == "butterfly" or (schedule == "fused" and size == 1):
        schedule = hierarchical(sizes_of(axes))
    if isinstance(schedule, Schedule) and schedule.size != size:
        raise ValueError(
            f"schedule is for {schedule.size} devices, but axis {axis_name!r} has {size}; "
            f"build it for {size}"
        )
    if size == 1 and not typed_as_varying(axes):
        return state
    monoid = monoid_of(state)
    if schedule == "fused":
        from distattn.experimental.fused import hooks

        return hooks.all_reduce(state, axes, functools.partial(all_reduce, schedule="butterfly"))
    if schedule == "psum":
        reference = lax.pmax(monoid.reference(state), axes)
        summed = lax.psum(monoid.pack_sums(monoid.rescale(state, reference)), axes)
        return monoid.unpack_sums(summed, reference, state)
    if schedule == "all_gather":
        stacked = jnp.moveaxis(gather(monoid.pack(state), axes), 0, monoid.first_row)
        return monoid.merge_stacked(monoid.unpack(stacked, state))

    def send(state: State, pairs: Pairs) -> State:
        return monoid.unpack(lax.ppermute(monoid.pack(state), axes, pairs), state)

    return _run(schedule, state, axes, send=send, merge=monoid.merge)


def all_sum(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Sum x over the axes, bitwise equal on all devices: by psum or by messages, as is cheaper.

    If messages are slow, a butterfly waits for log2 D of them, and a ring, as Gloo's, for 2 (D-1).
    For the body of a `shard_map` with check_vma=False.
    """
    axes = mesh_order(axes)
    if sum_schedule(x, axes) == "psum":
        return lax.psum(x, axes)

    def send(x: jax.Array, pairs: Pairs) -> jax.Array:
        return lax.ppermute(x, axes, pairs)

    return _run(hierarchical(sizes_of(axes)), x, axes, send=send, merge=jnp.add)


def chosen_schedule(
    schedule: str | Schedule, state: State, axes: tuple[str, ...]
) -> str | Schedule:
    """Return the schedule, with 'auto' replaced by the cheapest; raise ValueError if it is unknown."""
    if isinstance(schedule, str) and schedule == "auto":
        return choose_all_reduce(state, mesh_order(axes))
    if not isinstance(schedule, Schedule) and schedule not in BY_NAME:
        raise ValueError(
            f"schedule is {schedule!r}; it must be 'auto', one of {BY_NAME}, or a distattn.Schedule"
        )
    return schedule


def sum_schedule(x: Any, axes: tuple[str, ...]) -> str:
    """Choose 'psum' or 'butterfly', whichever sums the arrays of a pytree in less time."""
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(x))
    return cost.choose_sum(size, topology_of(mesh_order(axes)))


def choose_all_reduce(state: State, axes: tuple[str, ...]) -> str:
    """Choose the cheapest of ALL_REDUCES for this state on these axes."""
    rows = math.prod(rows_of(state))
    packed = jax.eval_shape(monoid_of(state).pack, state)
    width = packed.size // max(rows, 1) - 2  # V of a SoftmaxState of equal size
    shape = Workload(1, rows, 0, 1, 1, width, width, packed.dtype.itemsize)
    # A schedule's result cannot be typed as replicated without one more collective.
    candidates = ("psum", "all_gather") if typed_as_varying(axes) else ALL_REDUCES
    topology = topology_of(axes)
    return cost.choose(shape, topology, query_sharded=False, candidates=candidates).strategy


def gather(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Stack x of all devices to [D, ...], typed as replicated if `shard_map` tracks types."""
    if typed_as_varying(axes):
        return all_gather_as_replicated(x, axes, axes_size(axes))
    return lax.all_gather(x, axes)


def typed_as_replicated(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
    """Return x, which is equal on all devices, typed as such: by one all-gather of x / D from each."""
    flat = jnp.pad(x.reshape(-1), (0, -x.size % axes_size(axes)))
    return gather(local_shard(flat, axes, 0), axes).reshape(-1)[: x.size].reshape(x.shape)


def _run(
    schedule: Schedule,
    x: Any,
    axes: tuple[str, ...],
    *,
    send: Callable[[Any, Pairs], Any],
    merge: Callable[[Any, Any], Any],
) -> Any:
    """Merge a state or an array over all devices, by messages."""
    rank = lax.axis_index(axes)
    for step in schedule.steps:
        message = send(x, step.pairs)
        first = _where(step.source_first, rank, message, x)
        second = _where(step.source_first, rank, x, message)
        received = _where(step.replaces, rank, message, merge(first, second))
        # A device to which no other sends receives zeros, and zero is not the identity.
        x = _where(step.receives, rank, received, x)
    return x


def _where(table: tuple[bool, ...], rank: jax.Array, x: Any, y: Any) -> Any:
    """Return x on the devices whose entry of the table is True, else y."""
    if len(set(table)) == 1:
        return x if table[0] else y
    here = jnp.array(table)[rank]
    return jax.tree.map(lambda a, b: jnp.where(here, a, b), x, y)
