"""Devices that are not here: fake ones on a CPU, and abstract meshes to compile programs for."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from distattn.collectives.mesh import check_mesh

MeshAxes = AbstractMesh | Mesh | Mapping[str, int]


def fake_devices(count: int) -> None:
    """Make this process see `count` CPU devices and no others.

    Call it before JAX is first used, because JAX then fixes its devices. It does not start JAX, so
    `jax.distributed.initialize` may follow. It overrides the number in `XLA_FLAGS`.

    Args:
      count: number of devices, at least 1.

    Raises:
      ValueError: if `count` is not a positive number.
      RuntimeError: if JAX already runs with other devices.
    """
    if count < 1:
        raise ValueError(
            f"count={count} fake devices; a process needs at least 1: pass a positive int"
        )
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as late:
        devices = jax.devices()  # JAX is already running, so this does not start it
        if len(devices) != count or devices[0].platform != "cpu":
            raise RuntimeError(
                f"fake_devices({count}) comes too late: JAX already runs with {len(devices)} "
                f"{devices[0].platform} device(s). Call it before the process first uses JAX"
            ) from late
    jax.config.update("jax_platforms", "cpu")


def mesh_of(mesh: MeshAxes) -> AbstractMesh:
    """Return the abstract mesh of a mesh, or of sizes by name, whose axes are Explicit."""
    if isinstance(mesh, Mapping):
        for name, size in mesh.items():
            if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
                raise ValueError(
                    f"mesh has {size!r} devices along {name!r}; the size of an axis must be an int of at "
                    f"least 1: pass {{{name!r}: 8}} for eight devices"
                )
        kinds = (AxisType.Explicit,) * len(mesh)
        axes = AbstractMesh(tuple(map(int, mesh.values())), tuple(mesh), axis_types=kinds)
    else:
        check_mesh(mesh)
        axes = mesh.abstract_mesh
    if not axes.axis_names:
        raise ValueError(
            f"mesh is {mesh!r} and has no axis; it must have one at least: pass sizes by name, as "
            "{'kv': 8}, for one device {'kv': 1}"
        )
    return axes


def mesh_for(devices: int, topology: str, mesh: MeshAxes | None, arguments: Any) -> AbstractMesh:
    """Return the mesh that is given, else that of the arguments, else one axis `kv`."""
    if mesh is None:
        meshes = [x.sharding.mesh for x in jax.tree.leaves(arguments) if is_on_mesh(x)]
        mesh = meshes[0] if meshes else {"kv": devices}
    axes = mesh_of(mesh)
    size = math.prod(axes.axis_sizes)
    if size != devices:
        raise ValueError(
            f"mesh is {sizes_text(axes)}, {size} devices, and topology {topology!r} has {devices}; pass "
            f"axes whose product is {devices}"
        )
    return axes


def sizes_text(axes: AbstractMesh) -> str:
    """Format the sizes of a mesh, as `data=2 x kv=8`."""
    return " x ".join(f"{name}={size}" for name, size in axes.shape.items())


def is_on_mesh(x: Any) -> bool:
    """Return True if x has a NamedSharding on a mesh."""
    sharding = getattr(x, "sharding", None)
    return isinstance(sharding, NamedSharding) and not sharding.mesh.empty
