"""Meshes whose slow axis comes first.

Global arrays from what each process has, and back.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from distattn.collectives.mesh import check_mesh
from distattn.distributed.agreement import (
    TIMEOUT_S,
    describe,
    differences,
    fail_together,
    meet,
    present,
    ranks,
)
from distattn.planning.plan import AxisNames, as_axes


def make_mesh(
    axis_names: tuple[str, str] = ("host", "device"),
    *,
    axis_types: Sequence[AxisType] | None = None,
) -> Mesh:
    """A mesh of all devices: one axis between the processes, and one between the devices of each.

    Made from the topology (`mesh_utils`): neighbours along the second axis are as near as the hardware has
    them, whatever the numbers of the devices are. `strategy="auto"` crosses the first axis last, and once.

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


EMPTY = -1  # the position of a slot that holds no key


@dataclasses.dataclass(frozen=True)
class Shards:
    """How the tokens of one process lie on its shards: those of the axis that its devices hold."""

    numbers: tuple[int, ...]  # of the shards, ascending
    cuts: tuple[slice, ...]  # the tokens of each
    total: int  # shards of all processes

    @property
    def fullest(self) -> int:
        """The tokens of the shard that has most."""
        return max((cut.stop - cut.start for cut in self.cuts), default=0)


def from_process_local(
    key: Any,
    value: Any,
    positions: Any,
    *,
    mesh: Mesh,
    axis_name: AxisNames = None,
    batch_axis_name: AxisNames = None,
    heads_axis_name: AxisNames = None,
    slots: int | None = None,
    timeout_s: float = TIMEOUT_S,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Global keys, values and positions for `dot_product_attention`, from what each process has.

    Every process calls it with its own tokens: as many as it has, none too, in any order. They are spread
    evenly over its own devices, wherever these are in the mesh, and filled up to the size of the fullest
    device of all with empty slots (position -1). The processes agree on it, and on shapes and dtypes, in
    one exchange of a few hundred bytes.

    Empty slots cost memory on every device, as much as tokens do, and whatever sends keys sends them too;
    whole blocks of them take no time otherwise. How full the slots are says `(positions >= 0).mean()`:
    where that is far below 1, spread the tokens more evenly over the processes.

    Args:
      key: [B, S_own, K, H], numpy array or array of this process alone.
      value: [B, S_own, K, V], likewise.
      positions: int32[S_own] or int32[B, S_own], of the keys in the sequence; negative is an empty slot.
      mesh: of devices of all processes, in any order.
      axis_name: axis, or tuple of axes, over which tokens are spread; None: all that are not named below.
        Each shard lies on devices of one process.
      batch_axis_name: axes that shard B.
      heads_axis_name: axes that shard K.
      slots: of a device; None: as many as the fullest one needs. A number keeps shapes, and what is
        compiled for them, from one call to the next.
      timeout_s: seconds to wait for the other processes.

    Returns:
      key [B, D * slots, K, H] and value [B, D * slots, K, V], sharded along the axes, and their positions,
      int32[D * slots] or int32[B, D * slots] as they came. D is the number of devices along `axis_name`.

    Raises:
      ValueError: in every process, where one hands in what does not fit: says which, and what; or where
        they differ in shapes, dtypes, mesh or axes.
      TimeoutError, RuntimeError: as `barrier`.

    Example:
      >>> import numpy as np, distattn
      >>> key, value = np.ones((1, 5, 2, 8), np.float32), np.ones((1, 5, 2, 8), np.float32)
      >>> key, value, positions = distattn.distributed.from_process_local(
      ...     key, value, np.array([4, 2, 0, 3, 1]), mesh=distattn.distributed.make_mesh(), slots=5
      ... )
      >>> sorted(int(p) for p in positions if p >= 0), key.shape[1] == positions.size
      ([0, 1, 2, 3, 4], True)
    """
    check_mesh(mesh, devices=True)
    key, value, positions = map(_own, (key, value, positions))
    spread = as_axes("axis_name", axis_name)
    batch = as_axes("batch_axis_name", batch_axis_name)
    heads = as_axes("heads_axis_name", heads_axis_name)
    spread = spread or tuple(a for a in mesh.axis_names if a not in batch + heads)
    specs = {
        "key": PartitionSpec(batch or None, spread, heads or None),
        "value": PartitionSpec(batch or None, spread, heads or None),
        "positions": PartitionSpec(*((batch or None,) if positions.ndim == 2 else ()), spread),
    }
    arrays = {"key": key, "value": value, "positions": positions}
    shards, problem = Shards((), (), 0), ""
    try:
        _check(key, value, positions)
        shards = _shards(mesh, spread, positions.shape[-1])
        _check_slots(slots, shards)
    except ValueError as error:  # told to all: the others would wait for this process
        problem = str(error)
    facts = {name: f"{x.dtype}{_without_tokens(x)}" for name, x in arrays.items()}
    facts |= {"slots": str(slots), "specs": str(specs), **describe({"mesh": mesh})}
    texts = meet(
        "from_process_local", json.dumps([problem, shards.fullest, facts]), timeout_s=timeout_s
    )
    handed_in = {rank: json.loads(text) for rank, text in texts.items()}
    if problems := {rank: given[0] for rank, given in handed_in.items() if given[0]}:
        lines = (f"\n  {ranks([rank])}: {text}" for rank, text in problems.items())
        fail_together(
            ValueError(f"from_process_local cannot use what it was given:{''.join(lines)}")
        )
    if different := differences({rank: given[2] for rank, given in handed_in.items()}):
        fail_together(ValueError(f"from_process_local: the processes differ{different}"))
    size = slots or max(1, *(given[1] for given in handed_in.values()))
    made = {n: _global(x, shards, size, NamedSharding(mesh, specs[n])) for n, x in arrays.items()}
    return made["key"], made["value"], made["positions"]


def fetch(x: jax.Array, *, to: str | int = "all") -> np.ndarray | None:
    """A global array as a numpy array, in every process or in one.

    Every process calls it, unless the array lies in this process alone. All devices of the array receive
    all of it on the way.

    Args:
      x: any shape and dtype, on a mesh of devices of all processes or on devices of this one.
      to: "all", or the rank of the process that gets it.

    Returns:
      The array, or None in the processes that do not get it.

    Raises:
      ValueError: `to` is no rank.

    Example:
      >>> import jax.numpy as jnp, distattn
      >>> distattn.distributed.fetch(jnp.arange(3), to=0)  # in the process of rank 0; None in the others
      array([0, 1, 2], dtype=int32)
    """
    count = jax.process_count()
    if to != "all" and (isinstance(to, str) or not 0 <= to < count):
        raise ValueError(f"to={to!r}; it must be 'all' or a rank from 0 to {count - 1}")
    wanted = to in ("all", jax.process_index())
    if x.is_fully_addressable:
        return np.asarray(x) if wanted else None
    if x.is_fully_replicated:
        return np.asarray(x.addressable_data(0)) if wanted else None
    whole = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(whole) if wanted else None


def _own(x: Any) -> np.ndarray:
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        raise ValueError(
            f"an array of shape {x.shape} lies on devices of other processes too; from_process_local takes "
            "what this process has: a numpy array, or one on its own devices"
        )
    x = np.asarray(x)
    return np.asarray(x, jax.dtypes.canonicalize_dtype(x.dtype))


def _without_tokens(x: np.ndarray) -> list[int | str]:
    axis = 1 if x.ndim == 4 else x.ndim - 1
    return [size if i != axis else "S" for i, size in enumerate(x.shape)]


def _check(key: np.ndarray, value: np.ndarray, positions: np.ndarray) -> None:
    if key.ndim != 4 or value.shape[:3] != key.shape[:3] or value.ndim != 4:
        raise ValueError(
            f"key has shape {key.shape} and value {value.shape}; they must be [B, S_own, K, H] and "
            "[B, S_own, K, V]; a process without tokens has S_own=0"
        )
    if positions.shape not in (key.shape[1:2], key.shape[:2]):
        raise ValueError(
            f"positions has shape {positions.shape} and key S_own={key.shape[1]} tokens in "
            f"B={key.shape[0]} rows; positions must be int32[S_own] or int32[B, S_own]: one for each key"
        )
    if not np.issubdtype(positions.dtype, np.integer):
        raise ValueError(f"positions has dtype {positions.dtype}; it must be of integers, int32")


def _shards(mesh: Mesh, axes: tuple[str, ...], tokens: int) -> Shards:
    """Which shards this process holds, and which tokens go where."""
    unknown = [axis for axis in axes if axis not in mesh.axis_names]
    if unknown or not axes:
        raise ValueError(f"axis_name is {axes}; the mesh has the axes {mesh.axis_names}")
    total = int(np.prod([mesh.shape[axis] for axis in axes]))
    places = NamedSharding(mesh, PartitionSpec(axes)).devices_indices_map((total,))
    owners: dict[int, set[int]] = {}
    for device, (shard,) in places.items():
        owners.setdefault(shard.start or 0, set()).add(device.process_index)
    for shard, owner in owners.items():
        if len(owner) > 1:
            raise ValueError(
                f"shard {shard} along axis_name={axes} lies on devices of {ranks(owner)}; the tokens of a "
                "shard come from one process: pass axes, or a mesh (distattn.distributed.make_mesh), "
                "for which the other axes are inside a process"
            )
    own = tuple(sorted(s for s, owner in owners.items() if owner == {jax.process_index()}))
    if not own:
        raise ValueError("no device of this process is in the mesh; pass a mesh of all devices")
    ends = [tokens * i // len(own) for i in range(len(own) + 1)]
    return Shards(own, tuple(map(slice, ends[:-1], ends[1:])), total)


def _check_slots(slots: int | None, shards: Shards) -> None:
    if slots is not None and slots < max(1, shards.fullest):
        raise ValueError(
            f"slots={slots}, and a device has {shards.fullest} tokens; pass at least that many, or None"
        )


def _global(x: np.ndarray, shards: Shards, slots: int, sharding: NamedSharding) -> jax.Array:
    """The global array, each shard with its tokens first and empty slots behind them."""
    axis = 1 if x.ndim == 4 else x.ndim - 1
    fill = 0 if x.ndim == 4 else EMPTY
    shape = (*x.shape[:axis], shards.total * slots, *x.shape[axis + 1 :])
    dtype = x.dtype if x.ndim == 4 else np.dtype(np.int32)
    cut_of = dict(zip(shards.numbers, shards.cuts, strict=True))

    def shard(index: tuple[slice, ...]) -> np.ndarray:
        cut = cut_of[(index[axis].start or 0) // slots]
        own = x[(*index[:axis], cut, *index[axis + 1 :])]
        padded = np.full((*own.shape[:axis], slots, *own.shape[axis + 1 :]), fill, dtype)
        padded[(slice(None),) * axis + (slice(0, own.shape[axis]),)] = own
        return padded

    make: Callable[..., jax.Array] = jax.make_array_from_callback
    return make(shape, sharding, shard)
