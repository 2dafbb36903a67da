"""Reduce-scatter of states inside `shard_map`: each device gets its shard of the merged state."""

import jax
import jax.numpy as jnp
from jax import lax

from distattn.algebra.mergeable import State, monoid_of, rows_of
from distattn.collectives.mesh import AxisName, axes_size, local_shard, mesh_order, sizes_of
from distattn.planning.schedule import ScatterSchedule, halving


def reduce_scatter(
    state: State,
    axis_name: AxisName,
    *,
    scatter_dimension: int = 1,
    schedule: str | ScatterSchedule = "halving",
) -> State:
    """Merge the states of all devices, and return this device's shard; call it inside `shard_map`.

    Device r gets the r-th of D equal shards along `scatter_dimension`, D the size of the axis. Over
    a tuple of axes, devices count in the order of the tuple.

    Args:
      state: this device's state, as for `all_reduce`.
      axis_name: the axis, or a tuple of axes.
      scatter_dimension: dimension of the rows, 0, 1 or 2: T is 1 in a SoftmaxState, and 2 in fixed
        point. Its size must be a multiple of D.
      schedule: 'halving' (ceil(log2 D) messages, each about half of the one before), 'psum' (a pmax
        and one packed psum_scatter), or a `ScatterSchedule`.

    Returns:
      The state with 1/D of the rows.

    Raises:
      ValueError: an unknown name, a dimension that D does not divide, a schedule of another size.

    Examples:
      >>> import jax, jax.numpy as jnp, distattn
      >>> from jax.sharding import PartitionSpec as P
      >>> def means(key, value):  # for 8 rows; each device gets one
      ...     state = distattn.partial_attention(jnp.ones((1, 8, 1, 4)), key, value)
      ...     return distattn.finalize(distattn.reduce_scatter(state, "x"))[0]
      >>> mesh, shards = jax.sharding.Mesh(jax.devices(), ("x",)), P(None, "x")
      >>> run = jax.shard_map(means, mesh=mesh, in_specs=(shards, shards), out_specs=shards)
      >>> jax.jit(run)(jnp.zeros((1, 8, 1, 4)), jnp.arange(8.0).reshape(1, 8, 1, 1)).ravel().tolist()
      [3.5, 3.5, 3.5, 3.5, 3.5, 3.5, 3.5, 3.5]

    Reference: Bruck et al., IEEE TPDS 8(11), 1997 (the all-gather that 'halving' runs backwards).
    """
    axes = mesh_order(axis_name)
    names = (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)
    size = axes_size(axes)
    rows, monoid = rows_of(state), monoid_of(state)
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
    schedule = halving(size) if schedule == "halving" else schedule
    if schedule != "psum" and not isinstance(schedule, ScatterSchedule):
        raise ValueError(
            f"schedule is {schedule!r}; it must be 'halving', 'psum' or a ScatterSchedule"
        )
    if schedule != "psum" and schedule.size != size:
        raise ValueError(
            f"schedule is for {schedule.size} devices, but axis {axis_name!r} has {size}; "
            f"build it for {size}"
        )
    if size == 1:
        return state
    if schedule == "psum":
        reference = lax.pmax(monoid.reference(state), axes)
        packed = monoid.pack_sums(monoid.rescale(state, reference))
        dimension = monoid.first_row + scatter_dimension
        packed = lax.psum_scatter(packed, names, scatter_dimension=dimension, tiled=True)
        return monoid.unpack_sums(packed, local_shard(reference, names, dimension), state)
    return _run_scatter(schedule, state, axes, names, monoid.first_row + scatter_dimension)


def _run_scatter(
    schedule: ScatterSchedule,
    state: State,
    axes: tuple[str, ...],
    names: tuple[str, ...],
    dimension: int,
) -> State:
    """Run a schedule along a dimension of the packed state."""
    size, monoid = schedule.size, monoid_of(state)
    packed = monoid.pack(state)
    shards = jnp.stack(jnp.split(packed, size, axis=dimension))  # by owner, in the order of names
    if names != axes:
        by_axis = shards.reshape(*sizes_of(names), *shards.shape[1:])
        order = [names.index(axis) for axis in axes]
        shards = jnp.moveaxis(by_axis, order, range(len(names))).reshape(shards.shape)
    shards = jnp.roll(shards, -lax.axis_index(axes), axis=0)  # by the distance to the owner

    def merge(a: jax.Array, b: jax.Array) -> jax.Array:
        return monoid.pack(monoid.merge(monoid.unpack(a, state), monoid.unpack(b, state)))

    for shift, count in schedule.rounds:
        pairs = [(rank, (rank + shift) % size) for rank in range(size)]
        message = lax.ppermute(shards[shift : shift + count], axes, pairs)
        near = jax.vmap(merge)(shards[:count], message)
        shards = jnp.concatenate([near, shards[count:shift]])
    return monoid.unpack(shards[0], state)
