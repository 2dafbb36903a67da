"""Which axes of a mesh shard which dimension of a call's arrays.

Where the arrays of a call lie: what the caller says, and what meshes and shardings tell.
"""

import dataclasses
import math
import warnings
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from distattn._compat import concrete, platform_of, varying_axes
from distattn.collectives.mesh import (
    axes_of,
    check_mesh,
    described,
    free_axes,
    identity_of,
    sized,
    topology_on,
)
from distattn.planning.cost import Topology
from distattn.planning.plan import Axes, AxisNames, as_axes


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


def read_placement(
    query: Any,
    key: Any,
    value: Any,
    *,
    mesh: Mesh | AbstractMesh | None,
    axis_name: AxisNames,
    query_axis_name: AxisNames,
    batch_axis_name: AxisNames = None,
    heads_axis_name: AxisNames = None,
    leave_none: bool = False,
) -> Placement:
    """Where the arrays lie.

    Args:
      query: [B, T, N, H] or [T, N, H], array or tracer.
      key: [B, S, K, H] or [S, K, H].
      value: [B, S, K, V] or [S, K, V].
      mesh: said by the caller, or None.
      axis_name: axes of S said by the caller, () for none, or None.
      query_axis_name: axes of T said by the caller, None for replicated, 'auto' to read them.
      batch_axis_name: axes of B said by the caller, or None.
      heads_axis_name: axes of N and K said by the caller, or None.
      leave_none: leave no axis to the compiler: what it may have sharded unseen is gathered.

    Returns:
      Placement.

    Raises:
      ValueError: no mesh, what is none, another mesh, an axis that is not there, is manual, or is used
        twice; key and value sharded differently; B or N that the devices do not divide; a mesh said, and
        not which of its axes shard S.

    Warns:
      UserWarning: how key is sharded cannot be read, and nobody says it.
    """
    mesh_said = mesh is not None
    mesh = _find_mesh(query, key, value, mesh)
    said = as_axes("axis_name", axis_name)
    query_said = () if query_axis_name == "auto" else as_axes("query_axis_name", query_axis_name)
    batch = as_axes("batch_axis_name", batch_axis_name)
    heads = as_axes("heads_axis_name", heads_axis_name)
    names = ("axis_name", "query_axis_name", "batch_axis_name", "heads_axis_name")
    all_said = dict(zip(names, (said, query_said, batch, heads), strict=True))
    if mesh is None:
        for name, axes in all_said.items():
            if axes:
                raise ValueError(
                    f"{name} is {axes[0] if len(axes) == 1 else axes}, but there is no mesh; pass mesh=, "
                    "or enter jax.set_mesh(mesh), or pass arrays that lie on one"
                )
        return Placement()
    free = free_axes(mesh)
    for name, axes in all_said.items():
        _check_axes(name, axes, mesh, free)
    _check_divisible("batch_axis_name", batch, mesh, "B", query.shape[0] if query.ndim == 4 else 1)
    _check_divisible("heads_axis_name", heads, mesh, "N", query.shape[-2])

    dims = {"query": "BTNH", "key": "BSKH", "value": "BSKV"}
    read, known = {}, set(free)
    for name, x in (("query", query), ("key", key), ("value", value)):
        read[name], readable = _layout(x, dims[name][-x.ndim :], mesh, free)
        known &= readable
    key_axes = said
    for name in ("key", "value"):
        found = read[name].get("S", ())
        if axis_name is not None and found and sized(found, mesh) != sized(said, mesh):
            raise ValueError(
                f"axis_name is {said}, but {name} is sharded over {found} along S; pass "
                f"axis_name={found if len(found) > 1 else found[0]!r}, or reshard {name} first"
            )
    if axis_name is None:
        key_axes = read["key"].get("S", ())
        if key_axes != read["value"].get("S", ()):
            raise ValueError(
                f"key is sharded over {key_axes} along S and value over {read['value'].get('S', ())}; a "
                "key and its value must lie on one device: reshard one of them, or pass axis_name"
            )
    query_axes = read["query"].get("T", ()) if query_axis_name == "auto" else query_said
    if axis_name is None and not key_axes:
        taken = {*batch, *heads, *query_axes}
        taken.update(axis for axes in read.values() for x in axes.values() for axis in x)
        if not mesh_said or all(isinstance(_sharding(x), NamedSharding) for x in (key, value)):
            taken |= known  # what lies on the mesh is as it is read
        unread = tuple(axis for axis in free if axis not in taken)
        key_axes = _axes_unsaid(sized(unread, mesh), mesh, said=mesh_said)
    placement = Placement(
        mesh=mesh,
        batch=batch or read["key"].get("B", ()) or read["query"].get("B", ()),
        heads=heads or read["query"].get("N", ()) or read["key"].get("K", ()),
        query=query_axes,
        key=key_axes,
        query_known=query_axis_name != "auto" or known == set(free),
    )
    _check_disjoint(placement)
    if placement.batch or placement.heads or query_axes or key_axes:
        _check_context(mesh)
    used = {*placement.batch, *placement.heads, *query_axes, *key_axes} | known
    manual = tuple(axis for axis in free if axis in used)
    unseen = [axis for axis in free if axis not in used and mesh.shape[axis] > 1]
    if leave_none and unseen:
        return dataclasses.replace(placement, manual=free)
    if not (placement.batch or placement.heads or query_axes or key_axes):
        return Placement(compiler_sharded=bool(unseen))
    return dataclasses.replace(placement, manual=manual, compiler_sharded=bool(unseen))


def warn_of_one_device(query: Any, key: Any, value: Any) -> None:
    """Of keys that are a part of those of a query: types tell, inside a shard_map with check_vma=True."""
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return
    if axes := varying_axes(key, value) - varying_axes(query):
        warnings.warn(
            f"inside a shard_map key and value differ along {tuple(sorted(axes))} and query does not, so "
            "this is attention to the keys of one device alone; for all keys call "
            "distattn.sharded_attention with axis_name, and for a part to be merged partial_attention",
            stacklevel=3,
        )


def _axes_unsaid(unread: Axes, mesh: Mesh | AbstractMesh, *, said: bool) -> Axes:
    """The axes of S that nobody says and that cannot be read: the only one of a mesh that is said."""
    if not unread:
        return ()
    if not said:
        warnings.warn(
            "over which axes S, the length of key and value, is sharded cannot be read inside jit, vmap "
            f"and jax.checkpoint under Auto axes, here {unread}: the compiler decides what moves, and may "
            "gather all keys and values; pass axis_name=, or axis_name=() to say that it is over none, and "
            "batch_axis_name= and heads_axis_name= where B and heads are sharded",
            stacklevel=4,
        )
        return ()
    if len(mesh.axis_names) > 1:
        raise ValueError(
            f"mesh is {described(mesh)}, axis_name is None, and over which of {unread} S, the length of "
            "key and value, is sharded cannot be read; pass axis_name, or axis_name=() to say: over none"
        )
    return unread


def _find_mesh(query: Any, key: Any, value: Any, mesh: Any) -> Mesh | AbstractMesh | None:
    if mesh is not None:
        check_mesh(mesh)
    context = jax.sharding.get_abstract_mesh()
    found, owner = mesh, "mesh"
    for name, x in (("key", key), ("value", value), ("query", query)):
        sharding = _sharding(x)
        other = getattr(sharding, "mesh", None)
        if other is None or other.empty:
            continue
        if found is None:
            found, owner = other, name
        elif identity_of(found) != identity_of(other) and not context.manual_axes:
            raise ValueError(
                f"{name} lies on the mesh {described(other)}, but {owner} is "
                f"{'' if owner == 'mesh' else 'on '}{described(found)}; use one mesh, with the same axis "
                "types (Auto or Explicit): jax.device_put or jax.reshard the arrays to it"
            )
    if found is None and not context.empty:
        found = context
    return None if found is None or found.empty else found


def _check_context(mesh: Mesh | AbstractMesh) -> None:
    """That JAX will map over the mesh: it refuses another than that of its context."""
    context = jax.sharding.get_abstract_mesh()
    if context.empty or context.manual_axes or identity_of(context) == identity_of(mesh):
        return
    raise ValueError(
        f"query, key and value are used on the mesh {described(mesh)}, but jax.set_mesh has "
        f"{described(context)}; enter jax.set_mesh with the mesh of the arrays, or jax.device_put them "
        "onto its mesh"
    )


def _layout(x: Any, letters: str, mesh: Any, free: Axes) -> tuple[dict[str, Axes], set[str]]:
    """The axes of each dimension, and the axes of the mesh of which that is the whole truth."""
    sharding = _sharding(x)
    spec = sharding.spec if isinstance(sharding, NamedSharding) and not sharding.mesh.empty else ()
    axes = {
        letter: tuple(axis for axis in axes_of(spec, dimension) if axis in free)
        for dimension, letter in enumerate(letters)
        if axes_of(spec, dimension)
    }
    if concrete(x) is not None:
        return axes, set(free)
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return axes, {name for name, kind in kinds if kind == AxisType.Explicit}


def _sharding(x: Any) -> Any:
    found = concrete(x)
    if found is None:
        return jax.typeof(x).sharding
    return found.sharding if isinstance(found, jax.Array) else None


def _check_axes(argument: str, axes: Axes, mesh: Mesh | AbstractMesh, free: Axes) -> None:
    for axis in axes:
        if axis not in mesh.axis_names:
            raise ValueError(
                f"{argument} {axis!r} is not an axis of the mesh {described(mesh)}; use one of "
                f"{list(mesh.axis_names)}"
            )
        if axis not in free:
            raise ValueError(
                f"{argument} {axis!r} is manual here: the call is inside a shard_map over it; use "
                "distattn.sharded_attention inside, or call dot_product_attention outside"
            )
    if len(set(axes)) < len(axes):
        raise ValueError(f"{argument} {axes} names an axis twice; name each axis once")


def _check_divisible(argument: str, axes: Axes, mesh: Any, letter: str, size: int) -> None:
    devices = math.prod(mesh.shape[axis] for axis in axes)
    if size % devices:
        raise ValueError(
            f"{argument} is {axes}, {devices} devices, and {letter}={size} is no multiple of that; pass "
            f"axes that divide it, or a multiple of {devices}"
        )


def _check_disjoint(placement: Placement) -> None:
    dims = {"B": placement.batch, "heads": placement.heads, "S": placement.key}
    for first, second in (("B", "heads"), ("B", "S"), ("heads", "S")):
        if shared := set(dims[first]) & set(dims[second]):
            raise ValueError(
                f"axis {sorted(shared)[0]!r} shards both {first} and {second} among query, key and "
                "value; an axis can shard one of them: reshard the arrays, or pass another axis_name"
            )
    if shared := set(placement.query) & ({*placement.batch, *placement.heads}):
        raise ValueError(
            f"axis {sorted(shared)[0]!r} shards T and also B or heads; reshard query, or pass another "
            "query_axis_name"
        )
