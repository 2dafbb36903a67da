"""The one place where a computation is split into what each device does."""

from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec


def manual(
    f: Callable[..., Any],
    *,
    mesh: Mesh | AbstractMesh,
    in_specs: tuple[Any, ...],
    out_specs: Any,
    axis_names: Iterable[str],
) -> Callable[..., Any]:
    """`f`, run by every device on its own shards, as a function of global arrays.

    Under Explicit axes the arguments are first brought to `in_specs` (see `place`); under Auto axes
    the compiler does that. Inside somebody's `shard_map` over other axes, their mesh is taken.

    Args:
      f: function of local shards, with as many arguments as `in_specs` has entries.
      mesh: the mesh.
      in_specs: for each argument a PartitionSpec, a pytree of them, or None where the argument is
        None.
      out_specs: pytree of PartitionSpec.
      axis_names: the axes of the mesh that `f` sees as manual, at least those of the specs.

    Returns:
      A function of global arrays or tracers, usable under jit and outside.
    """
    context = jax.sharding.get_abstract_mesh()
    if context.manual_axes:
        mesh = context
    names = frozenset(axis_names)
    # check_vma=False: what a permute brings can be equal on all devices by construction (a state
    # merged up a tree), but JAX can only type it as varying and would refuse an out_spec without
    # the axis. The price: `f` must not hold a custom_vjp with collectives, whose gradients would
    # come out divided by the number of devices. A custom_vjp goes outside, and calls `manual` in
    # both directions.
    mapped = jax.shard_map(
        f, mesh=mesh, in_specs=in_specs, out_specs=out_specs, axis_names=names, check_vma=False
    )
    return lambda *arguments: mapped(*place(arguments, in_specs, mesh=mesh, axis_names=names))


def place(
    arguments: Any, specs: Any, *, mesh: Mesh | AbstractMesh, axis_names: Iterable[str]
) -> Any:
    """The arguments laid out by `specs` over the Explicit axes of the mesh.

    Auto axes are left alone. Explicit axes outside `axis_names` go on sharding what they shard.

    Args:
      arguments: pytree of arrays.
      specs: pytree of PartitionSpec, a prefix of `arguments`.
      mesh: the mesh.
      axis_names: the axes that the specs speak of.

    Returns:
      pytree of arrays, as `arguments`.
    """
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    explicit = {name for name, kind in kinds if kind == AxisType.Explicit}
    if not explicit:
        return arguments

    def move(x: Any, spec: PartitionSpec) -> jax.Array:
        current = jax.typeof(x).sharding
        kept = current.spec if current.mesh.axis_names == mesh.axis_names else ()
        dimensions = []
        for axis in range(x.ndim):
            others = [name for name in axes_of(kept, axis) if name not in axis_names]
            wanted = [name for name in [*others, *axes_of(spec, axis)] if name in explicit]
            dimensions.append(tuple(wanted) if wanted else None)
        return jax.reshard(x, NamedSharding(mesh, PartitionSpec(*dimensions)))

    return jax.tree.map(
        lambda spec, argument: jax.tree.map(lambda x: move(x, spec), argument),
        specs,
        arguments,
        is_leaf=lambda x: isinstance(x, PartitionSpec),
    )


def axes_of(spec: PartitionSpec | tuple[Any, ...], dimension: int) -> tuple[str, ...]:
    """The axes of the mesh that shard a dimension; a spec may be shorter than the array."""
    entry = spec[dimension] if dimension < len(spec) else None
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)
