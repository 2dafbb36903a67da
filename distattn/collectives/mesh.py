"""The axes of the `shard_map` around: their order, sizes and types; everything here is for its body.

The one place where a computation is split into what each device does.

Which axes of a mesh shard which dimension of a call's arrays.
"""

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from distattn._compat import device_kind_of, platform_of, processes_of, varying_axes
from distattn.planning.chips import chip_of
from distattn.planning.cost import Topology
from distattn.planning.plan import Axes

AxisName = str | tuple[str, ...]
# Of the mesh that is traced for, the axes along which devices lie in different slices of a TPU; None: not
# known. Part of the key under which JAX caches what it has traced.
_slice_axes = jax.make_user_context(None)


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


def sizes_of(axes: tuple[str, ...]) -> tuple[int, ...]:
    """The number of devices along each axis."""
    return tuple(axes_size((axis,)) for axis in axes)


def topology_of(axes: tuple[str, ...]) -> Topology:
    """The axes of the `shard_map` around, on the devices that it is traced for."""
    return topology_on(None, sizes_of(axes))


def topology_on(mesh: Any, sizes: tuple[int, ...]) -> Topology:
    """Axes of so many devices of a mesh; None: of what is traced for."""
    chip = chip_of(device_kind_of(mesh))
    return Topology(platform_of(mesh), sizes, processes_of(mesh), chip=chip)


def own_part(x: jax.Array, axes: tuple[str, ...], dimension: int) -> jax.Array:
    """This device's part of x, which all devices have, along the dimension."""
    part = x.shape[dimension] // axes_size(axes)
    return lax.dynamic_slice_in_dim(x, lax.axis_index(axes) * part, part, dimension)


def gathered(x: jax.Array, axes: tuple[str, ...], dimension: int = 1) -> jax.Array:
    """The inverse of `own_part`: the parts of all devices, in the order of the axes."""
    return lax.all_gather(x, axes, axis=dimension, tiled=True) if axes_size(axes) > 1 else x


def on_devices_of(mesh: Mesh) -> AbstractContextManager[None]:
    """While it is entered, what is traced is for the devices of this mesh, of which `slice_axes` asks."""
    slices = np.vectorize(lambda device: getattr(device, "slice_index", None) or 0, otypes=[int])
    index = slices(mesh.devices)
    varies = [(index != index.take([0], axis)).any() for axis in range(index.ndim)]
    return _slice_axes(tuple(x for x, y in zip(mesh.axis_names, varies, strict=True) if y))


def slice_axes(axes: tuple[str, ...]) -> tuple[str, ...] | None:
    """Those of the axes along which devices lie in different slices of a TPU; None: it cannot be known.

    A `shard_map` knows its axes and not its devices. Where all that the process knows lie in one slice, no
    axis leaves it; else somebody must have said for which mesh this is traced.
    """
    known = _slice_axes.value
    if known is None and platform_of() == "tpu":
        own = jax.devices() if jax.default_backend() == "tpu" else []
        if len({getattr(device, "slice_index", None) for device in own}) != 1:
            return None
    return tuple(axis for axis in axes if axis in (known or ()))


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


def check_mesh(mesh: Any, *, devices: bool = False) -> None:
    """That it is a mesh; with `devices` one of real devices, and not an AbstractMesh."""
    if not isinstance(mesh, Mesh if devices else Mesh | AbstractMesh):
        wanted = "Mesh" if devices else "Mesh or AbstractMesh"
        raise ValueError(
            f"mesh is {mesh!r}; it must be a jax.sharding.{wanted}, as jax.make_mesh makes: pass "
            'jax.make_mesh((4,), ("kv",)) for four devices along one axis'
        )


def free_axes(mesh: Mesh | AbstractMesh) -> Axes:
    """The axes that no shard_map around has taken."""
    taken = set(jax.sharding.get_abstract_mesh().manual_axes)
    return tuple(name for name in mesh.axis_names if name not in taken)


def sized(axes: Axes, mesh: Mesh | AbstractMesh) -> Axes:
    """The axes of more than one device."""
    return tuple(axis for axis in axes if mesh.shape[axis] > 1)


def identity_of(mesh: Mesh | AbstractMesh) -> tuple[Any, ...]:
    """What two meshes must have in common to be one."""
    return mesh.axis_names, mesh.axis_sizes, mesh.axis_types


def described(mesh: Mesh | AbstractMesh) -> str:
    """A mesh in an error: its axes with their sizes and kinds."""
    kinds = [str(kind).rpartition(".")[2] for kind in mesh.axis_types]
    return ", ".join(
        f"{name}={size} ({kind})"
        for (name, size), kind in zip(mesh.shape.items(), kinds, strict=True)
    )
