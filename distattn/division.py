"""What each axis of a mesh divides: keys, sequences or heads."""

import dataclasses
import math
from collections.abc import Mapping

from distattn.workload import Workload

Axes = tuple[str, ...]
AxisNames = str | tuple[str, ...] | None


@dataclasses.dataclass(frozen=True)
class Division:
    """The axes of a mesh, each in one of three parts, in the order of the mesh."""

    axes: dict[str, int]  # all, slowest first
    keys: Axes
    batch: Axes
    heads: Axes

    def size(self, names: Axes) -> int:
        """Devices along the axes."""
        return math.prod(self.axes[name] for name in names)

    def group(self, workload: Workload) -> Workload:
        """What the devices along the axes of the keys have to share."""
        return workload.of_group(self.size(self.batch), self.size(self.heads))


def divide(
    workload: Workload,
    axes: Mapping[str, int],
    batch_axis_name: AxisNames = None,
    heads_axis_name: AxisNames = None,
) -> Division:
    """The axes of the keys are those that divide nothing else.

    >>> divide(Workload(4096, batch=8), {"data": 4, "sp": 2}, "data").keys
    ('sp',)

    Args:
      workload: of which B and N are to be divided.
      axes: of the mesh, slowest first.
      batch_axis_name: axes over which sequences are divided.
      heads_axis_name: axes over which heads are, of query, key and value.

    Raises:
      ValueError: an axis that is not there, or is named twice; B or N that the devices do not divide.
    """
    named = {
        "batch_axis_name": as_axes("batch_axis_name", batch_axis_name),
        "heads_axis_name": as_axes("heads_axis_name", heads_axis_name),
    }
    seen: dict[str, str] = {}
    for argument, names in named.items():
        for name in names:
            if name not in axes:
                raise ValueError(
                    f"{argument} is {names}, and {name!r} is no axis of the mesh {dict(axes)}; name one "
                    "of these, or pass a mesh that has it"
                )
            if name in seen:
                raise ValueError(
                    f"{argument} is {names}, and {name!r} is in {seen[name]} already; an axis divides "
                    "one thing: name it once"
                )
            seen[name] = argument
    batch, heads = (tuple(x for x in axes if x in names) for names in named.values())
    found = Division(dict(axes), tuple(x for x in axes if x not in seen), batch, heads)
    for (argument, names), size in zip(
        named.items(), (workload.batch, workload.heads), strict=True
    ):
        devices = found.size(names)
        if size % devices:
            what = "batch" if argument == "batch_axis_name" else "heads"
            raise ValueError(
                f"{argument} is {names}, {devices} devices, and {what} is {size}; they must divide it: "
                f"pass a multiple of {devices}, or axes of fewer devices"
            )
    return found


def as_axes(argument: str, axes: AxisNames) -> Axes:
    """The axes that a caller names: one, several or none, as a tuple."""
    names = axes if isinstance(axes, tuple | list) else () if axes is None else (axes,)
    if not all(isinstance(name, str) for name in names):
        raise ValueError(
            f"{argument} is {axes!r}; it must be an axis name or a tuple of axis names"
        )
    return tuple(names)
