"""The axes of the `shard_map` around: their order, sizes and types; everything here is for its body."""

import math
from contextlib import AbstractContextManager
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh

from distattn._compat import device_kind_of, platform_of, processes_of, varying_axes
from distattn.chips import chip_of
from distattn.cost import Topology

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
