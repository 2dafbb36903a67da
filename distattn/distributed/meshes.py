"""Meshes whose slow axis comes first."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from distattn.distributed.health import present, ranks


def make_mesh(
    axis_names: tuple[str, str] = ("host", "device"),
    *,
    axis_types: Sequence[AxisType] | None = None,
) -> Mesh:
    """A mesh of all devices: one axis between the processes, and one between the devices of each.

    Made from the topology (`mesh_utils`): neighbours along the second axis are as near as the hardware has
    them, whatever the numbers of the devices are. `combine="auto"` crosses the first axis last, and once.

    Args:
      axis_names: of the slow axis, and of the fast one.
      axis_types: of each axis; None: both `AxisType.Auto`.

    Returns:
      Mesh of (processes, devices of a process), without processes that are lost; of (1, devices) for a
      process that is alone.

    Raises:
      ValueError: names or types that are not two; processes with different numbers of devices.

    Example:
      >>> import jax, distattn
      >>> mesh = distattn.distributed.make_mesh()
      >>> mesh.axis_names, mesh.size == jax.device_count()
      (('host', 'device'), True)
    """
    types = (AxisType.Auto,) * 2 if axis_types is None else tuple(axis_types)
    for argument, given in (("axis_names", tuple(axis_names)), ("axis_types", types)):
        if len(given) != 2:
            raise ValueError(
                f"{argument} is {given}; it must have two: of the axis between processes, and of that "
                "between the devices of a process"
            )
    there = set(present())
    devices = [device for device in jax.devices() if device.process_index in there]
    processes, own = len(there), jax.local_device_count()
    if processes * own != len(devices):
        raise ValueError(
            f"{len(devices)} devices in {processes} processes, {own} of them in this one: a mesh "
            "needs as many in each; start every process with the same number"
        )
    if processes == 1:
        grid = mesh_utils.create_device_mesh((1, own), devices)
    else:
        grid = mesh_utils.create_hybrid_device_mesh(
            (1, own), (processes, 1), devices, process_is_granule=True
        )
    return Mesh(np.asarray(grid), tuple(axis_names), axis_types=types)


def without(mesh: Mesh, lost: Collection[int]) -> Mesh:
    """The mesh without the devices of some processes.

    Raises:
      ValueError: these are not whole slices along one axis.
    """
    gone = np.vectorize(lambda device: device.process_index in lost, otypes=[bool])(mesh.devices)
    for axis in range(gone.ndim):
        slices = np.moveaxis(gone, axis, 0).reshape(gone.shape[axis], -1)
        if (slices.all(axis=1) == slices.any(axis=1)).all() and not slices.all():
            left = np.delete(mesh.devices, np.flatnonzero(slices[:, 0]), axis)
            return Mesh(left, mesh.axis_names, axis_types=mesh.axis_types)
    raise ValueError(
        f"the devices of {ranks(lost)} are not whole slices along one axis of the mesh {dict(mesh.shape)}; "
        "make the mesh so that they are (distattn.distributed.make_mesh), and restore what was saved"
    )
