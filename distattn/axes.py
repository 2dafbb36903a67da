"""The axes of the `shard_map` around: their order, sizes and types; everything here is for its body."""

import math
from typing import Any

import jax
from jax import lax

from distattn._compat import device_kind_of, platform_of, processes_of, varying_axes
from distattn.chips import chip_of
from distattn.cost import Topology

AxisName = str | tuple[str, ...]


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
