"""Meshes over all processes, global arrays from the data of each process, and the way back."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
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

EMPTY = -1  # position of a padding slot


def make_mesh(
    axis_names: tuple[str, str] = ("host", "device"),
    *,
    axis_types: Sequence[AxisType] | None = None,
) -> Mesh:
    """Return a mesh of all devices: one axis over processes, and one over the devices of each process.

    `mesh_utils` orders the devices: neighbours along the second axis are physically close, whatever their
    ids. `strategy="auto"` crosses the first axis last, and once.

    Args:
      axis_names: names of the slow axis and of the fast axis.
      axis_types: types of the two axes; None is `AxisType.Auto` for both.

    Returns:
      Mesh of shape (processes, devices per process), without lost processes; (1, devices) for a process
      that is alone.

    Raises:
      ValueError: not two names or types, or processes with different numbers of devices (from JAX).

    Examples:
      >>> import jax, distattn
      >>> mesh = distattn.distributed.make_mesh()
      >>> mesh.axis_names, mesh.size == jax.device_count()
      (('host', 'device'), True)
    """
    alive = set(present())
    devices = [device for device in jax.devices() if device.process_index in alive]
    local, processes = (1, jax.local_device_count()), (len(alive), 1)
    if len(alive) == 1:
        grid = mesh_utils.create_device_mesh(local, devices)
    else:
        grid = mesh_utils.create_hybrid_device_mesh(
            local, processes, devices, process_is_granule=True
        )
    types = (AxisType.Auto,) * 2 if axis_types is None else tuple(axis_types)
    return Mesh(np.asarray(grid), tuple(axis_names), axis_types=types)


def without(mesh: Mesh, lost: Collection[int]) -> Mesh:
    """Return the mesh without the devices of these ranks.

    Raises:
      ValueError: the devices are not whole slices along one axis.
    """
    gone = np.vectorize(lambda device: device.process_index in lost, otypes=[bool])(mesh.devices)
    for axis in range(gone.ndim):
        slices = np.moveaxis(gone, axis, 0).reshape(gone.shape[axis], -1)
        if (slices.all(axis=1) == slices.any(axis=1)).all() and not slices.all():
            kept = np.delete(mesh.devices, np.flatnonzero(slices[:, 0]), axis)
            return Mesh(kept, mesh.axis_names, axis_types=mesh.axis_types)
    raise ValueError(
        f"the devices of {ranks(lost)} are not whole slices along one axis of the mesh {dict(mesh.shape)}; "
        "use a mesh for which they are (distattn.distributed.make_mesh), and restore a checkpoint"
    )


def from_process_local(
    key: Any,
    value: Any,
    positions: Any,
    sharding: NamedSharding,
    *,
    slots: int | None = None,
    timeout_s: float = TIMEOUT_S,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return global keys, values and positions for `dot_product_attention`, from the data of each process.

    Call it in every process. Each passes its own tokens, in any order and of any number, including none.
    They are spread evenly over the devices of that process, wherever these are in the mesh. Padding slots
    (position -1) fill every device up to the size of the fullest one. The processes agree on this size,
    on shapes and on dtypes in one exchange of a few hundred bytes.

    Padding slots cost as much memory as tokens, and strategies that send keys send them too. Otherwise
    whole blocks of them take no time. `(positions >= 0).mean()` is the fraction of slots in use: if it is
    far below 1, spread the tokens more evenly over the processes.

    Args:
      key: [B, S_own, K, H], a numpy array or an array on devices of this process.
      value: [B, S_own, K, V], likewise.
      positions: int32[S_own] or int32[B, S_own], index of each key in the sequence; negative for padding.
      sharding: sharding of the global key, as in `NamedSharding(mesh, P(batch, tokens, heads))`, on a mesh
        of all processes in any device order. Each shard along the token axes must be in one process.
      slots: slots per device; None is as many as the fullest device needs. A fixed number keeps shapes,
        and so compiled programs, from one call to the next.
      timeout_s: seconds to wait for the other processes.

    Returns:
      key [B, D * slots, K, H], value [B, D * slots, K, V] and positions int32[D * slots] or
      int32[B, D * slots], sharded as `sharding` says. D is the number of devices along the token axes.

    Raises:
      ValueError: the arguments of a process do not fit, or the processes differ in shapes, dtypes or
        sharding. Every process raises it, and it names the ranks.
      TimeoutError, RuntimeError: as in `barrier`.

    Examples:
      >>> import jax, numpy as np, distattn
      >>> mesh = distattn.distributed.make_mesh()
      >>> sharding = jax.NamedSharding(mesh, jax.P(None, ("host", "device")))
      >>> key, value = np.ones((1, 5, 2, 8), np.float32), np.ones((1, 5, 2, 8), np.float32)
      >>> key, value, positions = distattn.distributed.from_process_local(
      ...     key, value, np.array([4, 2, 0, 3, 1]), sharding, slots=5
      ... )
      >>> sorted(int(p) for p in positions if p >= 0), key.shape[1] == positions.size
      ([0, 1, 2, 3, 4], True)
    """
    batch, spread, heads = _axes(sharding)
    arrays = {"key": _local(key), "value": _local(value), "positions": _local(positions)}
    specs = dict.fromkeys(("key", "value"), PartitionSpec(batch, spread, heads))
    by_sequence = arrays["positions"].ndim == 2
    specs["positions"] = PartitionSpec(batch, spread) if by_sequence else PartitionSpec(spread)
    tokens, fullest, problem = {}, 0, ""
    try:
        _check_tokens(**arrays)
        tokens = _tokens_by_shard(sharding.mesh, spread, arrays["positions"].shape[-1])
        fullest = max(shard.stop - shard.start for shard in tokens.values())
        if slots is not None and slots < max(1, fullest):
            raise ValueError(
                f"slots={slots}, and a device has {fullest} tokens; pass at least that many, or None"
            )
    except ValueError as error:  # every process raises it: the others would wait for this one
        problem = str(error)
    facts = {name: f"{x.dtype}{_without_tokens(x)}" for name, x in arrays.items()}
    facts |= {"slots": str(slots), "specs": str(specs), **describe({"mesh": sharding.mesh})}
    texts = meet("from_process_local", json.dumps([problem, fullest, facts]), timeout_s=timeout_s)
    received = {rank: json.loads(text) for rank, text in texts.items()}
    if problems := {rank: entry[0] for rank, entry in received.items() if entry[0]}:
        lines = (f"\n  {ranks([rank])}: {text}" for rank, text in problems.items())
        fail_together(
            ValueError(f"from_process_local cannot use what it was given:{''.join(lines)}")
        )
    if different := differences({rank: entry[2] for rank, entry in received.items()}):
        fail_together(ValueError(f"from_process_local: the processes differ{different}"))
    size = slots or max(1, *(entry[1] for entry in received.values()))
    shards = math.prod(sharding.mesh.shape[axis] for axis in spread)
    key, value, positions = (
        _global(x, tokens, size, shards, NamedSharding(sharding.mesh, specs[name]))
        for name, x in arrays.items()
    )
    return key, value, positions


def _axes(sharding: Any) -> tuple[Any, tuple[str, ...], Any]:
    """Return the mesh axes of batch, tokens and heads."""
    if isinstance(sharding, NamedSharding):
        check_mesh(sharding.mesh, devices=True)
        batch, tokens, heads, *rest = (*sharding.spec, None, None, None)
        axes = tokens if isinstance(tokens, tuple) else (tokens,)
        names = tuple(axis for axis in axes if isinstance(axis, str))
        if names and names == axes and not any(rest):
            return batch, names, heads
    raise ValueError(
        f"sharding is {sharding!r}; it must be a jax.NamedSharding of key [B, S, K, H] that shards S, and "
        'not H: pass jax.NamedSharding(mesh, jax.P(None, ("host", "device")))'
    )


def _local(x: Any) -> np.ndarray:
    x = np.asarray(x)
    return np.asarray(x, jax.dtypes.canonicalize_dtype(x.dtype))


def _token_axis(x: np.ndarray) -> int:
    return 1 if x.ndim == 4 else x.ndim - 1


def _without_tokens(x: np.ndarray) -> list[int | str]:
    return ["S" if i == _token_axis(x) else size for i, size in enumerate(x.shape)]


def _check_tokens(key: np.ndarray, value: np.ndarray, positions: np.ndarray) -> None:
    if key.ndim != 4 or value.shape[:3] != key.shape[:3] or value.ndim != 4:
        raise ValueError(
            f"key has shape {key.shape} and value {value.shape}; they must be [B, S_own, K, H] and "
            "[B, S_own, K, V]; a process without tokens has S_own=0"
        )
    if positions.shape not in (key.shape[1:2], key.shape[:2]):
        raise ValueError(
            f"positions has shape {positions.shape} and key S_own={key.shape[1]} tokens in "
            f"B={key.shape[0]} sequences; positions must be int32[S_own] or int32[B, S_own]: one per key"
        )
    if not np.issubdtype(positions.dtype, np.integer):
        raise ValueError(f"positions has dtype {positions.dtype}; it must be integer: pass int32")


def _tokens_by_shard(mesh: Mesh, axes: tuple[str, ...], count: int) -> dict[int, slice]:
    """Return which of its `count` tokens this process puts on each shard that it holds."""
    shards = math.prod(mesh.shape[axis] for axis in axes)
    indices = NamedSharding(mesh, PartitionSpec(axes)).devices_indices_map((shards,))
    owners: dict[int, set[int]] = {}
    for device, (index,) in indices.items():
        owners.setdefault(index.start or 0, set()).add(device.process_index)
    for shard, owner in owners.items():
        if len(owner) > 1:
            raise ValueError(
                f"shard {shard} along {axes} is on devices of {ranks(owner)}; the tokens of a shard come "
                "from one process: pass a sharding, or a mesh (distattn.distributed.make_mesh), whose "
                "other axes are inside a process"
            )
    own = sorted(shard for shard, owner in owners.items() if owner == {jax.process_index()})
    if not own:
        raise ValueError("the mesh has no device of this process; pass a mesh of all devices")
    ends = [count * i // len(own) for i in range(len(own) + 1)]
    return dict(zip(own, map(slice, ends[:-1], ends[1:]), strict=True))


def _global(
    x: np.ndarray,
    tokens: Mapping[int, slice],
    slots: int,
    shards: int,
    sharding: NamedSharding,
) -> jax.Array:
    """Return the global array: in each shard the tokens come first, then padding slots."""
    axis = _token_axis(x)
    fill, dtype = (0, x.dtype) if x.ndim == 4 else (EMPTY, np.dtype(np.int32))
    shape = (*x.shape[:axis], shards * slots, *x.shape[axis + 1 :])

    def shard(index: tuple[slice, ...]) -> np.ndarray:
        own = x[(*index[:axis], tokens[(index[axis].start or 0) // slots], *index[axis + 1 :])]
        padded = np.full((*own.shape[:axis], slots, *own.shape[axis + 1 :]), fill, dtype)
        padded[(slice(None),) * axis + (slice(0, own.shape[axis]),)] = own
        return padded

    make: Callable[..., jax.Array] = jax.make_array_from_callback
    return make(shape, sharding, shard)


def fetch(x: jax.Array, *, to: str | int = "all") -> np.ndarray | None:
    """Return a global array as a numpy array, in every process or in one.

    Call it in every process, unless the array is in this process alone. All devices of the array receive
    the whole array on the way.

    Args:
      x: array of any shape and dtype, on a mesh of all processes or on devices of this one.
      to: "all", or the rank of the process that gets it.

    Returns:
      The array, or None in processes that do not get it.

    Raises:
      ValueError: `to` is not a rank.

    Examples:
      >>> import jax.numpy as jnp, distattn
      >>> distattn.distributed.fetch(jnp.arange(3), to=0)  # None in processes other than rank 0
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
