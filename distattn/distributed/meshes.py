"""Meshes whose slow axis comes first."""

from collections.abc import Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh


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
      Mesh of (processes, devices of a process); of (1, devices) for a process that is alone.

    Raises:
      ValueError: names or types that are not two; processes with different numbers of devices.
    """
    types = (AxisType.Auto,) * 2 if axis_types is None else tuple(axis_types)
    for argument, given in (("axis_names", tuple(axis_names)), ("axis_types", types)):
        if len(given) != 2:
            raise ValueError(
                f"{argument} is {given}; it must have two: of the axis between processes, and of that "
                "between the devices of a process"
            )
    processes, own = jax.process_count(), jax.local_device_count()
    if processes * own != jax.device_count():
        raise ValueError(
            f"{jax.device_count()} devices in {processes} processes, {own} of them in this one: a mesh "
            "needs as many in each; start every process with the same number"
        )
    if processes == 1:
        devices = mesh_utils.create_device_mesh((1, own))
    else:
        devices = mesh_utils.create_hybrid_device_mesh(
            (1, own), (processes, 1), process_is_granule=True
        )
    return Mesh(np.asarray(devices), tuple(axis_names), axis_types=types)
