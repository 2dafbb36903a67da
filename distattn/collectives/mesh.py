"""Axes of a mesh: their order and sizes, PartitionSpecs over them, and a body run on shards.

`on_shards` is the only place that splits a computation into the work of each device. The functions
that take `axes` alone are for its body.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Mapping
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
# Axes of the traced mesh whose devices are in different TPU slices; None if unknown. Part of the
# key of JAX's tracing cache.
_slice_axes = jax.make_user_context(None)


def mesh_order(axis_name: AxisName) -> tuple[str, ...]:
    """Return the axes in the order of the mesh.

    `ppermute` over a tuple in another order permutes wrongly (JAX up to 0.10.2). A merge does not
    depend on the order of devices.
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
    """Return the number of devices along the axes."""
    return math.prod(sizes_of(axes))


def sizes_of(axes: tuple[str, ...]) -> tuple[int, ...]:
    """Return the number of devices along each axis."""
    shape = jax.sharding.get_abstract_mesh().shape
    return tuple(shape[axis] for axis in axes)


def typed_as_varying(axes: tuple[str, ...]) -> bool:
    """Return True if `shard_map` tracks which values vary over the axes (check_vma=True)."""
    return bool(axes) and bool(varying_axes(lax.axis_index(axes)))


def topology_of(axes: tuple[str, ...]) -> Topology:
    """Return the topology of the axes on the devices that are traced for."""
    return topology_on(None, sizes_of(axes))


def topology_on(mesh: Any, sizes: tuple[int, ...]) -> Topology:
    """Return the topology of axes of these sizes; without a mesh, on the devices traced for."""
    chip = chip_of(device_kind_of(mesh))
    return Topology(platform_of(mesh), sizes, processes_of(mesh), chip=chip)


def local_shard(x: jax.Array, axes: tuple[str, ...], dimension: int) -> jax.Array:
    """Return this device's shard of a replicated array along the dimension."""
    size = x.shape[dimension] // axes_size(axes)
    return lax.dynamic_slice_in_dim(x, lax.axis_index(axes) * size, size, dimension)


def gather_shards(x: jax.Array, axes: tuple[str, ...], dimension: int = 1) -> jax.Array:
    """Concatenate the shards of all devices in the order of the axes: undo `local_shard`."""
    return lax.all_gather(x, axes, axis=dimension, tiled=True) if axes_size(axes) > 1 else x


def on_devices_of(mesh: Mesh) -> AbstractContextManager[None]:
    """Tell `slice_axes` that the programs traced meanwhile are for the devices of this mesh."""
    slices = np.vectorize(lambda device: getattr(device, "slice_index", None) or 0, otypes=[int])
    index = slices(mesh.devices)
    crosses = [(index != index.take([0], axis)).any() for axis in range(index.ndim)]
    return _slice_axes(tuple(itertools.compress(mesh.axis_names, crosses)))


def slice_axes(axes: tuple[str, ...]) -> tuple[str, ...] | None:
    """Return the axes whose devices are in different TPU slices; None if unknown.

    No axis crosses slices if all devices known to the process are in one slice.
    """
    known = _slice_axes.value
    if known is None and platform_of() == "tpu":
        local = jax.devices() if jax.default_backend() == "tpu" else []
        if len({getattr(device, "slice_index", None) for device in local}) != 1:
            return None
    return tuple(axis for axis in axes if axis in (known or ()))


def on_shards(
    f: Callable[..., Any],
    *,
    mesh: Mesh | AbstractMesh | None,
    in_specs: tuple[Any, ...],
    out_specs: Any,
    axis_names: Iterable[str],
) -> Callable[..., Any]:
    """Map `f`, which every device runs on its shards, to a function of global arrays.

    Arguments are first brought to `in_specs`: by `place` over Explicit axes, by the compiler over
    Auto axes. Inside a `shard_map` over other axes, its mesh is used.

    Args:
      f: function of local shards, with one argument per entry of `in_specs`.
      mesh: the mesh; None: `f` itself is returned.
      in_specs: for each argument a PartitionSpec, a pytree of them, or None for None.
      out_specs: pytree of PartitionSpec.
      axis_names: the axes that `f` sees as manual, at least those of the specs.

    Returns:
      A function of global arrays or tracers, usable under jit and outside.
    """
    if mesh is None:
        return f
    context = jax.sharding.get_abstract_mesh()
    around = context if context.manual_axes else mesh
    names = frozenset(axis_names)
    # check_vma=False: a state merged by messages is equal on all devices, but JAX can only type it
    # as varying, and would refuse an out_spec without the axis. The price: gradients of a
    # custom_vjp with collectives inside `f` would be divided by the number of devices. So put the
    # custom_vjp outside, and call `on_shards` in both of its directions.
    mapped = jax.shard_map(
        f, mesh=around, in_specs=in_specs, out_specs=out_specs, axis_names=names, check_vma=False
    )
    return lambda *arguments: mapped(*place(arguments, in_specs, mesh=around, axis_names=names))


def place(
    arguments: Any, specs: Any, *, mesh: Mesh | AbstractMesh | None, axis_names: Iterable[str]
) -> Any:
    """Reshard the arguments to `specs` over the Explicit axes of the mesh.

    Auto axes are left alone. Explicit axes outside `axis_names` keep sharding what they shard.

    Args:
      arguments: pytree of arrays.
      specs: pytree of PartitionSpec, a prefix of `arguments`.
      mesh: the mesh; None: the arguments are returned.
      axis_names: the axes that the specs may name.

    Returns:
      pytree of arrays, as `arguments`.
    """
    explicit = () if mesh is None else explicit_axes(mesh)
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


def partition_spec(
    letters: str, axes: Mapping[str, Axes], shape: tuple[int, ...] | None = None
) -> PartitionSpec:
    """Return the PartitionSpec of an array from the letters of its dimensions.

    Args:
      letters: one per dimension, as 'BTNH'.
      axes: axes that shard a dimension, by its letter; other dimensions are not sharded.
      shape: shape of the array; a dimension of size 1 is not sharded.
    """
    sizes = shape or (None,) * len(letters)
    return PartitionSpec(
        *(
            axes.get(letter) or None if size != 1 else None
            for letter, size in zip(letters, sizes, strict=True)
        )
    )


def axes_of(spec: PartitionSpec | tuple[Any, ...], dimension: int) -> tuple[str, ...]:
    """Return the axes that shard a dimension; a spec may be shorter than the array."""
    entry = spec[dimension] if dimension < len(spec) else None
    return () if entry is None else entry if isinstance(entry, tuple) else (entry,)


def explicit_axes(mesh: Mesh | AbstractMesh) -> Axes:
    """Return the axes of the mesh whose type is Explicit."""
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return tuple(name for name, kind in kinds if kind == AxisType.Explicit)


def check_mesh(mesh: Any, *, devices: bool = False) -> None:
    """Raise ValueError if it is not a mesh, or, with `devices`, not a mesh of real devices."""
    if not isinstance(mesh, Mesh if devices else Mesh | AbstractMesh):
        wanted = "Mesh" if devices else "Mesh or AbstractMesh"
        raise ValueError(
            f"mesh is {mesh!r}; it must be a jax.sharding.{wanted}, as jax.make_mesh makes: pass "
            'jax.make_mesh((4,), ("kv",)) for four devices along one axis'
        )


def free_axes(mesh: Mesh | AbstractMesh) -> Axes:
    """Return the axes that are not manual in a `shard_map` around."""
    taken = set(jax.sharding.get_abstract_mesh().manual_axes)
    return tuple(name for name in mesh.axis_names if name not in taken)


def sized(axes: Axes, mesh: Mesh | AbstractMesh) -> Axes:
    """Return the axes of more than one device."""
    return tuple(axis for axis in axes if mesh.shape[axis] > 1)


def identity_of(mesh: Mesh | AbstractMesh) -> tuple[Any, ...]:
    """Return names, sizes and types of the axes, which are equal for interchangeable meshes."""
    return mesh.axis_names, mesh.axis_sizes, mesh.axis_types


def described(mesh: Mesh | AbstractMesh) -> str:
    """Format a mesh for an error: its axes with their sizes and types."""
    kinds = [str(kind).rpartition(".")[2] for kind in mesh.axis_types]
    return ", ".join(
        f"{name}={size} ({kind})"
        for (name, size), kind in zip(mesh.shape.items(), kinds, strict=True)
    )
