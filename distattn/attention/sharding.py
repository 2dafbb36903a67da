"""The mesh axes that shard each dimension of a call, as given by shardings or read from arrays."""

import dataclasses
import math
import warnings
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from distattn._compat import concrete, platform_of, varying_axes
from distattn.collectives.mesh import (
    axes_of,
    described,
    explicit_axes,
    free_axes,
    identity_of,
    partition_spec,
    sized,
    topology_on,
)
from distattn.planning.cost import Topology
from distattn.planning.plan import Axes

Sharding = NamedSharding | PartitionSpec | None


@dataclasses.dataclass(frozen=True)
class Placement:
    """Axes of the mesh that shard each dimension. Without a mesh everything is on one device."""

    mesh: Mesh | AbstractMesh | None = None
    batch: Axes = ()
    heads: Axes = ()
    query: Axes = ()  # T
    key: Axes = ()  # S
    query_known: bool = True  # False: the layout of the query could not be read
    query_given: bool = False  # by the caller
    manual: Axes = ()  # axes that our shard_map takes: those above, and all whose layout is known
    compiler_sharded: bool = False  # other axes may shard batch and heads, unseen

    def size(self, axes: Axes) -> int:
        """Return the number of devices along the axes."""
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
        """Return the PartitionSpec of an array from its letters; size 1 is not sharded.

        `rows`, `keys` and `heads` replace the axes of T, S, and N and K.
        """
        heads = self.heads if heads is None else heads
        by_letter = {
            "B": self.batch,
            "N": heads,
            "K": heads,
            "T": self.query if rows is None else rows,
            "S": self.key if keys is None else keys,
        }
        return partition_spec(letters, by_letter, shape)

    def sized(self, axes: Axes) -> Axes:
        """Return the axes of more than one device."""
        return sized(axes, self.mesh)

    def topology(self, axes: Axes) -> Topology:
        """Return the devices along the axes, in the order of the mesh."""
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
    query_sharding: Sharding = None,
    key_value_sharding: Sharding = None,
    *,
    names: tuple[str, str] = ("query_sharding", "key_value_sharding"),
    leave_none: bool = False,
) -> Placement:
    """Return the axes that shard each dimension of a call.

    Args:
      query: [B, T, N, H] or [T, N, H], array, tracer or `jax.ShapeDtypeStruct`.
      key: [B, S, K, H] or [S, K, H].
      value: [B, S, K, V] or [S, K, V].
      query_sharding: as in `dot_product_attention`; None: read from query.
      key_value_sharding: as in `dot_product_attention`; None: read from key and value.
      names: of these two arguments, in errors.
      leave_none: leave no axis to the compiler: gather batches and heads that it may have sharded.

    Returns:
      Placement.

    Raises:
      ValueError: a sharding that is invalid for its array, or shardings that contradict each other.

    Warns:
      UserWarning: the sharding of key is not given and can't be read.
    """
    arguments = dict(zip(names, (query_sharding, key_value_sharding), strict=True))
    mesh = _find_mesh(query, key, value, arguments)
    letters = {"query": "BTNH", "key": "BSKH", "value": "BSKV"}
    letters = {
        name: letters[name][-x.ndim :]
        for name, x in (("query", query), ("key", key), ("value", value))
    }
    if mesh is None:
        for argument, sharding in arguments.items():
            _check_needs_no_mesh(argument, sharding, query.ndim)
        return Placement(query_given=query_sharding is not None)
    free = free_axes(mesh)
    rows = given_axes(names[0], query_sharding, letters["query"], mesh, free)
    keys = given_axes(names[1], key_value_sharding, letters["key"], mesh, free)
    readable = set(free)
    if rows is None:
        found, known = _layout(query, letters["query"], mesh, free)
        rows, readable = found, readable & known
    query_known = query_sharding is not None or readable == set(free)
    if keys is None:
        keys, known = _key_layout(key, value, letters, mesh, free)
        readable &= known
        if not keys.get("S"):
            used = {axis for axes in (*rows.values(), *keys.values()) for axis in axes} | readable
            _warn_of_unread_keys(names[1], sized(tuple(x for x in free if x not in used), mesh))
    else:
        readable = set(free)  # the whole layout is given
    if query_sharding is None and key_value_sharding is not None:
        rows = _without_conflicts(rows, keys)
    elif query_sharding is not None and key_value_sharding is None:
        keys = _without_conflicts(keys, rows)
    placement = Placement(
        mesh=mesh,
        batch=_shared("B", rows.get("B", ()), keys.get("B", ()), arguments),
        heads=_shared("heads", rows.get("N", ()), keys.get("K", ()), arguments),
        query=rows.get("T", ()),
        key=keys.get("S", ()),
        query_known=query_known,
        query_given=query_sharding is not None,
    )
    _check_disjoint(placement)
    _check_divisible("B", placement, placement.batch, query.shape[0] if query.ndim == 4 else 1)
    _check_divisible("N", placement, placement.heads, query.shape[-2])
    used = (*placement.batch, *placement.heads, *placement.query, *placement.key)
    if used:
        _check_context(mesh)
    manual = tuple(axis for axis in free if axis in {*used, *readable})
    unseen = any(mesh.shape[axis] > 1 for axis in free if axis not in manual)
    if leave_none and unseen:
        return dataclasses.replace(placement, manual=free)
    if not used:
        return Placement(compiler_sharded=unseen, query_given=placement.query_given)
    return dataclasses.replace(placement, manual=manual, compiler_sharded=unseen)


def bring(placement: Placement, letters: str, x: Any) -> Any:
    """Return x on the devices of the mesh, with the sharding of the placement.

    Only concrete arrays on other devices are moved: the compiler moves the others.
    """
    array = concrete(x)
    if not isinstance(placement.mesh, Mesh) or not isinstance(array, jax.Array):
        return x
    mesh = getattr(array.sharding, "mesh", None)
    if mesh is not None and (mesh.empty or mesh == placement.mesh):
        return x
    spec = placement.spec(letters[-x.ndim :], x.shape)
    divides = all(
        size % placement.size(axes_of(spec, dimension)) == 0
        for dimension, size in enumerate(x.shape)
    )
    return jax.device_put(x, NamedSharding(placement.mesh, spec if divides else PartitionSpec()))


def warn_of_one_device(query: Any, key: Any, value: Any) -> None:
    """Warn if types say, inside a shard_map, that keys are sharded and the query is not."""
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return
    if axes := varying_axes(key, value) - varying_axes(query):
        warnings.warn(
            f"inside a shard_map key and value differ along {tuple(sorted(axes))} and query does not, so "
            "this is attention to the keys of one device only; for all keys call "
            "distattn.sharded_attention with axis_name, and for states to merge partial_attention",
            stacklevel=3,
        )


def _warn_of_unread_keys(argument: str, unread: Axes) -> None:
    if unread:
        warnings.warn(
            "the axes that shard S, the length of key and value, can't be read inside jit, vmap and "
            f"jax.checkpoint under Auto axes, here {unread}: the compiler decides what moves, and may "
            f"gather all keys and values; pass {argument}, or {argument}=jax.P() if both are replicated",
            stacklevel=4,
        )


def _find_mesh(
    query: Any, key: Any, value: Any, arguments: dict[str, Sharding]
) -> Mesh | AbstractMesh | None:
    """Return the mesh of the given shardings, else of the arrays, else of `jax.set_mesh`."""
    context = jax.sharding.get_abstract_mesh()
    found, owner, given = None, "", False
    for argument, sharding in arguments.items():
        if not isinstance(sharding, NamedSharding):
            continue
        if found is not None and identity_of(found) != identity_of(sharding.mesh):
            raise ValueError(
                f"{argument} is on the mesh {described(sharding.mesh)}, but {owner} is on "
                f"{described(found)}; use one mesh for both"
            )
        found, owner, given = sharding.mesh, argument, True
    for name, x in (("key", key), ("value", value), ("query", query)):
        other = getattr(_sharding(x), "mesh", None)
        if other is None or other.empty:
            continue
        if found is None:
            found, owner = other, name
        elif identity_of(found) != identity_of(other) and not context.manual_axes:
            if given and isinstance(concrete(x), jax.Array):
                continue  # `bring` moves it
            raise ValueError(
                f"{name} is on the mesh {described(other)}, but {owner} is on {described(found)}; use one "
                "mesh, with the same axis types (Auto or Explicit): jax.device_put or jax.reshard the "
                "arrays to it"
            )
    if not context.empty and (found is None or context.manual_axes):
        if found is not None and found.shape != context.shape:
            raise ValueError(
                f"{owner} is on the mesh {described(found)}, but the call is inside a shard_map over "
                f"{described(context)}; use the mesh of the shard_map"
            )
        found = context  # inside a shard_map its mesh, of which some axes are manual
    return None if found is None or found.empty else found


def _without_conflicts(read: dict[str, Axes], given: dict[str, Axes]) -> dict[str, Axes]:
    """Return the axes that were read, without those that a given sharding uses otherwise.

    A given sharding is a constraint, and one that was read is not. T and S may share axes.
    """
    same = {"B": "B", "T": "S", "S": "T", "N": "K", "K": "N"}
    kept: dict[str, Axes] = {}
    for letter, axes in read.items():
        other = given.get(same[letter], ()) if letter in same else ()
        if letter in "BNK" and other:
            continue  # the given one says it all
        elsewhere = {x for name, used in given.items() if name != same.get(letter) for x in used}
        kept[letter] = tuple(axis for axis in axes if axis not in elsewhere)
    return kept


def _shared(what: str, query: Axes, key: Axes, arguments: dict[str, Sharding]) -> Axes:
    """Return the axes of a dimension that query and key share: either's, if the other has none."""
    if not query or not key or query == key:
        return query or key
    if what == "heads" and query[: len(key)] == key:
        return query  # tensor parallelism may be wider than the key/value heads
    shown = ", ".join(f"{name}={sharding}" for name, sharding in arguments.items())
    rule = (
        "query's heads may use more axes than key's, but key's axes come first"
        if what == "heads"
        else "both must be sharded over the same axes"
    )
    raise ValueError(
        f"{what} of query is sharded over {query} and {what} of key over {key} ({shown}); {rule}: "
        "change one of the shardings, or leave it None"
    )


def _check_context(mesh: Mesh | AbstractMesh) -> None:
    """Raise ValueError if `jax.set_mesh` has another mesh, over which JAX would not map."""
    context = jax.sharding.get_abstract_mesh()
    if context.empty or context.manual_axes or identity_of(context) == identity_of(mesh):
        return
    raise ValueError(
        f"query, key and value are used on the mesh {described(mesh)}, but jax.set_mesh has "
        f"{described(context)}; enter jax.set_mesh with the mesh of the arrays, or jax.device_put them "
        "onto its mesh"
    )


def _layout(x: Any, letters: str, mesh: Any, free: Axes) -> tuple[dict[str, Axes], set[str]]:
    """Return the axes of each dimension, and the axes of the mesh that could be read."""
    sharding = _sharding(x)
    spec = sharding.spec if isinstance(sharding, NamedSharding) and not sharding.mesh.empty else ()
    axes = {
        letter: tuple(axis for axis in axes_of(spec, dimension) if axis in free)
        for dimension, letter in enumerate(letters)
        if axes_of(spec, dimension)
    }
    if concrete(x) is not None:
        return axes, set(free)
    return axes, {*explicit_axes(mesh)}


def _sharding(x: Any) -> Any:
    found = concrete(x)
    if found is None:
        return jax.typeof(x).sharding
    return found.sharding if isinstance(found, jax.Array) else None


def _key_layout(
    key: Any, value: Any, letters: dict[str, str], mesh: Any, free: Axes
) -> tuple[dict[str, Axes], set[str]]:
    """Return the axes of key's dimensions, and the axes of the mesh that could be read."""
    keys, known = _layout(key, letters["key"], mesh, free)
    values, also = _layout(value, letters["value"], mesh, free)
    if keys.get("S", ()) != values.get("S", ()):
        raise ValueError(
            f"key is sharded over {keys.get('S', ())} along S and value over {values.get('S', ())}; a key "
            "and its value must be stored on one device: reshard one of them, or pass key_value_sharding"
        )
    return keys, known & also


def given_axes(
    argument: str, sharding: Sharding, letters: str, mesh: Any, free: Axes
) -> dict[str, Axes] | None:
    """Return the axes of each dimension that a sharding names; None if there is no sharding."""
    if sharding is None:
        return None
    spec = _spec_of(argument, sharding)
    dims = f"[{', '.join(letters)}]"
    if len(spec) > len(letters):
        raise ValueError(
            f"{argument} is {spec}, {len(spec)} dimensions, but the array is {dims}; give one entry "
            "a dimension, or fewer"
        )
    axes = {letter: axes_of(spec, dimension) for dimension, letter in enumerate(letters)}
    _check_axes(argument, spec, mesh, free)
    if axes[letters[-1]]:
        raise ValueError(
            f"{argument} is {spec}: it shards {letters[-1]}, the last dimension of {dims}, over "
            f"{axes[letters[-1]]}; attention needs it whole: shard B, the sequence or heads"
        )
    return axes


def _spec_of(argument: str, sharding: Any) -> PartitionSpec:
    spec = sharding.spec if isinstance(sharding, NamedSharding) else sharding
    if isinstance(spec, PartitionSpec):
        if PartitionSpec.UNCONSTRAINED in tuple(spec) or spec.unreduced or spec.reduced:
            raise ValueError(
                f"{argument} is {spec}; its entries must be names of axes, tuples of them, or None, "
                "since the call needs the whole sharding; replace what is unconstrained or unreduced"
            )
        return spec
    raise ValueError(
        f"{argument} is {sharding!r}; it must be a jax.NamedSharding, a jax.P, or None: pass, for "
        'example, jax.NamedSharding(mesh, jax.P(None, "kv")) for an array sharded along its sequence'
    )


def _check_needs_no_mesh(argument: str, sharding: Sharding, dimensions: int) -> None:
    spec = () if sharding is None else _spec_of(argument, sharding)
    if len(spec) > dimensions:
        raise ValueError(
            f"{argument} is {spec}, {len(spec)} dimensions, but the array has {dimensions}; give one entry "
            "a dimension, or fewer"
        )
    if any(axes_of(spec, dimension) for dimension in range(len(spec))):
        raise ValueError(
            f"{argument} is {spec}, but there is no mesh; pass a jax.NamedSharding, or enter "
            "jax.set_mesh(mesh), or pass arrays that are sharded over a mesh"
        )


def _check_axes(argument: str, spec: PartitionSpec, mesh: Any, free: Axes) -> None:
    axes = [axis for dimension in range(len(spec)) for axis in axes_of(spec, dimension)]
    for axis in axes:
        if axis not in mesh.axis_names:
            raise ValueError(
                f"{argument} is {spec}, but {axis!r} is not an axis of the mesh {described(mesh)}; use "
                f"axes of {list(mesh.axis_names)}"
            )
        if axis not in free:
            raise ValueError(
                f"{argument} is {spec}, but {axis!r} is manual here: the call is inside a shard_map over "
                "it; use distattn.sharded_attention inside, or call dot_product_attention outside"
            )
        if axes.count(axis) > 1:
            raise ValueError(f"{argument} is {spec}: it uses {axis!r} twice; use each axis once")


def _check_divisible(letter: str, placement: Placement, axes: Axes, size: int) -> None:
    devices = placement.size(axes)
    if size % devices:
        raise ValueError(
            f"{letter}={size} is sharded over {axes}, {devices} devices, which do not divide it; shard it "
            f"over fewer devices, or pass a multiple of {devices}"
        )


def _check_disjoint(placement: Placement) -> None:
    dims = {
        "B": placement.batch,
        "heads": placement.heads,
        "S": placement.key,
        "T": placement.query,
    }
    for first, second in (
        ("B", "heads"), ("B", "S"), ("heads", "S"), ("B", "T"), ("heads", "T")
    ):  # fmt: skip
        if shared := set(dims[first]) & set(dims[second]):
            raise ValueError(
                f"axis {sorted(shared)[0]!r} shards both {first} {dims[first]} and {second} {dims[second]} "
                "among query, key and value; an axis can shard one of them: reshard the arrays, or change "
                "query_sharding or key_value_sharding"
            )
