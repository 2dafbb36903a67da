"""Which axes of a mesh shard which dimension of a call's arrays."""

import dataclasses
import math
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from distattn._compat import platform_of
from distattn.axes import topology_on
from distattn.cost import Topology
from distattn.division import Axes, AxisNames

__all__ = [
    "Axes",
    "AxisNames",
    "Placement",
    "check_mesh",
    "described",
    "free_axes",
    "identity_of",
    "sized",
]


@dataclasses.dataclass(frozen=True)
class Placement:
    """Which axes of the mesh shard which dimension. No mesh: everything on one device."""

    mesh: Mesh | AbstractMesh | None = None
    batch: Axes = ()
    heads: Axes = ()
    query: Axes = ()  # T
    key: Axes = ()  # S
    query_known: bool = True  # False: the layout of the query could not be read
    manual: Axes = ()  # axes that our shard_map takes: those above, and all whose layout is known
    compiler_sharded: bool = False  # other axes may shard batch and heads, unseen

    def size(self, axes: Axes) -> int:
        """The number of devices along the axes."""
        return math.prod(self.mesh.shape[axis] for axis in axes) if axes else 1

    def spec(
        self,
        letters: str,
        shape: tuple[int, ...],
        *,
        rows: Axes | None = None,
        keys: Axes | None = None,
        heads: Axes | None = None,
    ) -> PartitionSpec:
        """The PartitionSpec of an array from the letters of its dimensions; size 1 is not sharded.

        `rows`, `keys` and `heads` stand in for the axes of T, of S, and of N and K.
        """
        heads = self.heads if heads is None else heads
        by_letter = {
            "B": self.batch,
            "N": heads,
            "K": heads,
            "T": self.query if rows is None else rows,
            "S": self.key if keys is None else keys,
        }
        return PartitionSpec(
            *(
                by_letter.get(letter) or None if size != 1 else None
                for letter, size in zip(letters, shape, strict=True)
            )
        )

    def sized(self, axes: Axes) -> Axes:
        """The axes of more than one device."""
        return sized(axes, self.mesh)

    def topology(self, axes: Axes) -> Topology:
        """The devices along the axes, in the order of the mesh."""
        sizes = tuple(self.mesh.shape[axis] for axis in self.mesh.axis_names if axis in axes)
        return topology_on(self.mesh, sizes)

    @property
    def platform(self) -> str:
        """'cpu', 'gpu' or 'tpu'."""
        return platform_of(self.mesh)


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
