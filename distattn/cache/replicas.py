"""Each token on two devices of different hosts, and what is left of a cache when hosts are lost.

A device stores, beside its own slots, a replica of the slots of another device, its source, which is on
another host. The replica has the same slots in the same order. Every change is computed twice from the same
values, by the source and by the holder of the replica, so nothing is sent for it. Attention reads only the
slots of the source, so every key counts once.

When devices are lost, each remaining device keeps its slots, and those of its source if that is gone. Then
the tokens are spread evenly again, and replicas are made anew. Nothing else is read from another host.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import ArrayLike

from distattn.cache.layout import FREE, TOKEN_LETTERS, Arrays, Layout, letters_in
from distattn.cache.resize import counted
from distattn.cache.slots import from_source


def check_replicas(replicas: int, layout: Layout) -> None:
    """Raise ValueError unless a cache of this layout can have this number of copies of each token."""
    if replicas not in (1, 2) or isinstance(replicas, bool):
        raise ValueError(
            f"replicas is {replicas!r}; it must be 1, or 2 for a second copy on another host"
        )
    if replicas == 2:
        replica_source(layout)


def replica_layout(layout: Layout) -> Layout:
    """Return the layout in which the body of `run` works on replicas, each as if it were its source."""
    return dataclasses.replace(layout, replica_source=replica_source(layout))


@functools.lru_cache
def replica_source(layout: Layout) -> tuple[int, ...]:
    """Return, for each device along the axes of the slots, the device whose slots it has a replica of.

    Devices are sorted by host and rotated by as many places as the fullest host has devices: each then has
    a source on another host, and is the source of one. In a program of one process, the first of the axes
    with more than one device stands for the hosts.

    Raises:
      ValueError: a host has more than half of the devices.
    """
    hosts = _hosts(layout)
    order = sorted(range(layout.devices), key=lambda device: sorted(hosts[device]))
    turn = max((hosts.count(host) for host in hosts), default=0)
    sources = [0] * layout.devices
    for place, source in enumerate(order):
        sources[order[(place + turn) % layout.devices]] = source
    if any(hosts[device] & hosts[source] for device, source in enumerate(sources)):
        by_device = {device: sorted(host) for device, host in enumerate(hosts)}
        raise ValueError(
            f"replicas is 2, and the {layout.devices} devices along the axes {layout.slots} of the slots "
            f"are on the hosts {by_device}; a second copy is on another host: pass a mesh in which no host "
            "has more than half of them (distattn.distributed.make_mesh), or replicas=1"
        )
    return tuple(sources)


def replicas_fit(layout: Layout) -> bool:
    """Return True if each device can have a source on another host."""
    try:
        replica_source(layout)
    except ValueError:
        return False
    return True


def _hosts(layout: Layout) -> list[frozenset[int]]:
    """Return the processes of the devices that store each of the D shards of the slots."""
    if layout.devices == 1:
        return [frozenset({0})]
    mesh = layout.mesh
    axes = [mesh.axis_names.index(axis) for axis in layout.slots]
    shards = np.moveaxis(mesh.devices, axes, range(len(axes))).reshape(layout.devices, -1)
    if len({device.process_index for device in shards.flat}) > 1:
        return [frozenset(device.process_index for device in shard) for shard in shards]
    first = next(mesh.shape[axis] for axis in layout.slots if mesh.shape[axis] > 1)
    return [frozenset({shard // (layout.devices // first)}) for shard in range(layout.devices)]


def replicated(layout: Layout, arrays: Arrays) -> Arrays:
    """Return the replica of a cache: each device sends its slots once."""
    return replica_layout(layout).update(_copy_of_source, arrays, token_letters(arrays))


def token_letters(arrays: Arrays) -> dict[str, str]:
    """Return the letters, by name, of the arrays that a replica has."""
    return {name: dims for name, dims in letters_in(arrays).items() if name in TOKEN_LETTERS}


def shards_left(layout: Layout, mesh: Mesh) -> list[int]:
    """Return which shard of the slots each device has that is left, along the axes of the slots.

    Args:
      layout: of the cache.
      mesh: its mesh, with some indices along one axis left out.

    Raises:
      ValueError: another mesh.
    """
    if layout.mesh is None:
        raise ValueError(
            "recover was called for a cache on one device; it needs a cache on a mesh: create it with "
            "sharding="
        )
    axis, kept = _axis_left(layout.mesh, mesh)
    if axis in (*layout.batch, *layout.heads):
        raise ValueError(
            f"mesh lacks devices along {axis!r}, over which the cache shards sequences or heads: these are "
            "lost as a whole; restore a saved cache on the remaining mesh"
        )
    shards = np.arange(layout.devices).reshape([layout.mesh.shape[a] for a in layout.slots])
    if axis in layout.slots:
        shards = shards.take(kept, axis=layout.slots.index(axis))
    return [int(shard) for shard in shards.flat]


def _axis_left(old: Mesh, mesh: Mesh) -> tuple[str, list[int]]:
    """Return the axis along which devices are gone, and the indices that are left."""
    if mesh.axis_names == old.axis_names:
        for number, axis in enumerate(old.axis_names):
            slabs, left = _slabs(old, number), _slabs(mesh, number)
            kept = [index for index, slab in enumerate(slabs) if slab in left]
            if len(kept) == len(left) and [slabs[index] for index in kept] == left:
                return axis, kept
    raise ValueError(
        f"mesh is {dict(mesh.shape)} and the cache is on {dict(old.shape)}; mesh must be the same with "
        "some indices along one axis left out, in the same order: pass the mesh of "
        "distattn.distributed.HostsLost"
    )


def _slabs(mesh: Mesh, number: int) -> list[list[Any]]:
    """Return the devices at each index along an axis."""
    slabs = np.moveaxis(mesh.devices, number, 0)
    return [list(slab) for slab in slabs.reshape(len(slabs), -1)]


def recovered(
    old: Layout, arrays: Arrays, replica: Arrays | None, new: Layout, shards: list[int]
) -> tuple[Arrays, np.ndarray]:
    """Return the arrays of a cache on the remaining devices, and int[B], how many tokens are lost.

    Args:
      old: the layout of the cache.
      arrays: of the cache.
      replica: of the cache.
      new: the layout on the remaining devices.
      shards: of the remaining devices, from `shards_left`.
    """
    promoted, lost = _fate(old, shards, replica is not None)
    letters, shared = letters_in(arrays), token_letters(arrays)
    arrays = {name: _kept(arrays[name], new, dims) for name, dims in letters.items()}
    counts = new.fetch(arrays.pop("counts"))  # on the old devices
    if any(promoted):
        copies = (_kept(replica[name], new, dims) for name, dims in shared.items())
        joined = new.run(
            _promote,
            (*shared.values(),) * 2,
            (*shared.values(),),
            *(*(arrays[name] for name in shared), *copies),
            static=((*shared.items(),), promoted),
        )
        arrays |= zip(shared, joined, strict=True)
    return counted(new, arrays), counts[:, lost].sum(axis=1)


def _fate(layout: Layout, shards: list[int], replicas: bool) -> tuple[tuple[bool, ...], list[int]]:
    """Return which devices' replica replaces its source, which is gone; and the shards that are lost."""
    gone = set(range(layout.devices)) - set(shards)
    if not replicas:
        return (False,) * len(shards), sorted(gone)
    source = replica_source(layout)
    promoted = tuple(source[shard] in gone for shard in shards)
    return promoted, sorted(gone - {source[shard] for shard in shards})


def _kept(x: jax.Array, layout: Layout, letters: str) -> jax.Array:
    """Return the shards of x on the remaining devices as an array on these alone."""
    sharding = layout.sharding(letters)
    data = {shard.device: shard.data for shard in x.addressable_shards}
    # Devices may store copies of one shard, and each device keeps its own.
    shards = [data[device] for device in sharding.addressable_devices]
    sizes = zip(letters, x.shape, shards[0].shape, strict=True)
    shape = tuple(size * layout.devices if name == "S" else full for name, full, size in sizes)
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def lost_positions(
    tags: np.ndarray,
    next_position: np.ndarray,
    lost: np.ndarray,
    expected: Sequence[ArrayLike] | None,
) -> tuple[np.ndarray, ...]:
    """Return the lost positions of each sequence, int32[n].

    Args:
      tags: int32[B, S], what is left.
      next_position: int32[B].
      lost: int[B], how many tokens are lost.
      expected: the positions that each sequence had; None: all below its next position.

    Raises:
      ValueError: other positions than `lost` says are missing.
    """
    if not lost.any():
        return tuple(np.zeros(0, np.int32) for _ in lost)
    if expected is None:
        expected = [np.arange(end) for end in next_position]
    if len(expected) != len(lost):
        raise ValueError(
            f"expected has {len(expected)} sequences, and the cache {len(lost)}; pass the positions of each"
        )
    missing = tuple(
        np.setdiff1d(np.asarray(before), left).astype(np.int32)
        for before, left in zip(expected, tags, strict=True)
    )
    for sequence, (positions, count) in enumerate(zip(missing, lost, strict=True)):
        if len(positions) != count:
            raise ValueError(
                f"sequence {sequence} has lost {count} positions with the devices that are gone, and "
                f"{len(positions)} of those that are expected are missing: some had been evicted, or were "
                "at other positions; pass expected=, the positions that each sequence had"
            )
    return missing


# Bodies for `Layout.run`.


def _copy_of_source(layout: Layout, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(from_source(layout, x) for x in arrays)


def _promote(
    layout: Layout,
    letters: tuple[tuple[str, str], ...],
    promoted: tuple[bool, ...],
    *arrays: jax.Array,
) -> tuple[jax.Array, ...]:
    """Append the replica's slots to the own ones; they are free if their source is still there."""
    half = len(letters)
    mine = jnp.asarray(promoted)[layout.rank()]
    joined: list[jax.Array] = []
    for (name, dims), x, copy in zip(letters, arrays[:half], arrays[half:], strict=True):
        if name == "positions":
            copy = jnp.where(mine, copy, FREE)
        joined.append(jnp.concatenate([x, copy], axis=dims.index("S")))
    return tuple(joined)
