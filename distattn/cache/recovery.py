"""What is left of a cache when devices are gone: on the others, without a restart.

Nothing of the cache is read from another host but what is there already: each device keeps its share, and
that of its ward where the ward is gone. Then the tokens are spread evenly again, and each gets its second
copy anew.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import Mesh
from jax.typing import ArrayLike

from distattn.cache.capacity import counted, with_slots
from distattn.cache.layout import Layout, context_of, letters_of
from distattn.cache.replicas import (
    check_replicas,
    replica_letters,
    replicas_fit,
    wards_of,
    with_replica,
)
from distattn.cache.slots import FREE
from distattn.collectives.mesh import check_mesh

if TYPE_CHECKING:
    from distattn.cache.kv_cache import KVCache


def recover(
    self: KVCache,
    mesh: Mesh,
    *,
    expected: Sequence[ArrayLike] | None = None,
    replicas: int | None = None,
) -> tuple[KVCache, tuple[np.ndarray, ...]]:
    """The cache on those of its devices that are left, and the positions that are lost.

    With two replicas no position is lost with one host. The capacity stays, and the tokens are spread
    evenly over the devices that are left. Meanwhile a device needs memory for twice its share of the old
    cache, beside the old and the new one.

    The lost positions can be computed again from their tokens, all at once: reserve slots for them
    (`reserve(..., positions=lost)`) and attend to what is there by `query_positions`.

    Args:
      mesh: the mesh of the cache without the devices that are gone: along one axis, over which slots lie or
        copies of all, some indices are left out. `distattn.distributed.all_or_none` gives it.
      expected: int32[n] for each row, the positions that the row had; None: all below its next one. To be
        given where some had been evicted.
      replicas: from now on, 1 or 2; None: as before, or 1 where the devices left are of one host.

    Returns:
      The cache, and for each row the positions that it had and has no more, int32[n], ascending.

    Raises:
      ValueError: another mesh than that; positions that are expected and were not there, where some are
        lost; a cache under a trace. Nothing has changed then.

    Example:
      >>> import jax, jax.numpy as jnp, distattn
      >>> mesh = jax.sharding.Mesh(jax.devices(), ("x",))
      >>> cache = distattn.KVCache.create(1, 16, 1, 4, dtype=jnp.float32, mesh=mesh)
      >>> cache = cache.append(jnp.ones((1, 8, 1, 4)), jnp.ones((1, 8, 1, 4)))
      >>> left = jax.sharding.Mesh(mesh.devices[: -(-mesh.size // 2)], ("x",))  # half of the devices
      >>> cache, lost = cache.recover(left)
      >>> sorted([*lost[0].tolist(), *(p for p in cache.positions[0].tolist() if p >= 0)])
      [0, 1, 2, 3, 4, 5, 6, 7]
    """
    if isinstance(self.positions, Tracer):
        raise ValueError("recover was called under a trace of the cache; call it outside of jit")
    check_mesh(mesh, devices=True)
    old = self.layout
    axis, kept = _what_is_left(old, mesh)
    layout = dataclasses.replace(old, mesh=mesh)
    own = _shares_left(old, axis, kept)
    promoted, lost = _fate(self, own)
    if replicas is None:
        replicas = self.replicas if replicas_fit(layout) else 1
    check_replicas(replicas, layout)
    letters, shared = letters_of(self), replica_letters(self)
    with context_of(layout):
        arrays = {name: _carry(getattr(self, name), layout, x) for name, x in letters.items()}
        was = layout.numbers(arrays.pop("counts"))  # of the old devices
        if any(promoted):
            copies = (_carry(getattr(self.replica, name), layout, x) for name, x in shared.items())
            joined = layout.run(
                _promote,
                tuple(shared.values()) * 2,
                tuple(shared.values()),
                *(*(arrays[name] for name in shared), *copies),
                static=(tuple(shared.items()), promoted),
            )
            arrays |= zip(shared, joined, strict=True)
        cache = counted(dataclasses.replace(self, **arrays, layout=layout, replica=None))
        gone = _lost_positions(cache, was[:, lost].sum(axis=1), expected)
        cache = with_slots(cache, layout.rounded(self.capacity))
        return with_replica(cache, replicas), gone


def _what_is_left(layout: Layout, mesh: Mesh) -> tuple[str, list[int]]:
    """The axis along which devices are gone, and the indices that are left."""
    old = layout.mesh
    if old is None:
        raise ValueError("recover is for a cache on a mesh, and this one lies on one device")
    if mesh.axis_names == old.axis_names:
        for number, axis in enumerate(old.axis_names):
            slabs, left = _slabs(old, number), _slabs(mesh, number)
            kept = [index for index, slab in enumerate(slabs) if slab in left]
            if len(kept) == len(left) and [slabs[index] for index in kept] == left:
                if axis in (*layout.batch, *layout.heads):
                    raise ValueError(
                        f"mesh lacks devices along {axis!r}, over which the cache has its rows or heads: "
                        "these are gone as a whole; restore a saved cache on the mesh that is left"
                    )
                return axis, kept
    raise ValueError(
        f"mesh is {dict(mesh.shape)} and the cache lies on {dict(old.shape)}; mesh must be the same with "
        "some indices along one axis left out, in the same order, as distattn.distributed.all_or_none "
        "gives it"
    )


def _slabs(mesh: Mesh, number: int) -> list[list[Any]]:
    """The devices at each index along an axis."""
    slabs = np.moveaxis(mesh.devices, number, 0)
    return [list(slab) for slab in slabs.reshape(len(slabs), -1)]


def _shares_left(layout: Layout, axis: str, kept: list[int]) -> list[int]:
    """Which of the old shares each of the devices along the slots' axes has that are left."""
    shares = np.arange(layout.devices).reshape([layout.mesh.shape[a] for a in layout.slots])
    if axis in layout.slots:
        shares = shares.take(kept, axis=layout.slots.index(axis))
    return [int(share) for share in shares.flat]


def _fate(cache: KVCache, own: list[int]) -> tuple[tuple[bool, ...], list[int]]:
    """Of which devices the ward is gone, so that its copy takes its place; and the shares that are lost."""
    gone = set(range(cache.layout.devices)) - set(own)
    if cache.replica is None:
        return (False,) * len(own), sorted(gone)
    wards = wards_of(cache.layout)
    promoted = tuple(wards[share] in gone for share in own)
    return promoted, sorted(gone - {wards[share] for share in own})


def _carry(x: jax.Array, layout: Layout, letters: str) -> jax.Array:
    """What the devices that are left have of an array, as an array on these alone."""
    sharding = layout.sharding(letters)
    data = {shard.device: shard.data for shard in x.addressable_shards}
    # The addressable devices may hold copies, and each of them has its own.
    parts = [data[device] for device in sharding.addressable_devices]
    sizes = zip(letters, x.shape, parts[0].shape, strict=True)
    shape = tuple(own * layout.devices if name == "S" else whole for name, whole, own in sizes)
    return jax.make_array_from_single_device_arrays(shape, sharding, parts)


def _lost_positions(
    cache: KVCache, lost: np.ndarray, expected: Sequence[ArrayLike] | None
) -> tuple[np.ndarray, ...]:
    """Of each row the positions that are lost, of which the numbers are known."""
    if not lost.any():
        return tuple(np.zeros(0, np.int32) for _ in lost)
    tags, ends = map(cache.layout.numbers, (cache.positions, cache.next_position))
    wanted = (
        [np.arange(end) for end in ends] if expected is None else list(map(np.asarray, expected))
    )
    if len(wanted) != len(lost):
        raise ValueError(
            f"expected has {len(wanted)} rows, and the cache {len(lost)}; one for each row"
        )
    missing = tuple(
        np.setdiff1d(w, own).astype(np.int32) for w, own in zip(wanted, tags, strict=True)
    )
    for row, (found, count) in enumerate(zip(missing, lost, strict=True)):
        if len(found) != count:
            raise ValueError(
                f"row {row} has lost {count} positions with the devices that are gone, and of those that "
                f"are expected {len(found)} are missing: some had been evicted, or stood at other "
                "positions; pass expected=, the positions that each row had"
            )
    return missing


# What one device does, in `Layout.run`.


def _promote(
    layout: Layout,
    letters: tuple[tuple[str, str], ...],
    promoted: tuple[bool, ...],
    *arrays: jax.Array,
) -> tuple[Any, ...]:
    """Own share and copy, one behind the other; the copy free where its owner is there."""
    half = len(letters)
    mine = jnp.asarray(promoted)[layout.rank()]
    joined = []
    for (name, own), x, copy in zip(letters, arrays[:half], arrays[half:], strict=True):
        if name == "positions":
            copy = jnp.where(mine, copy, FREE)
        joined.append(jnp.concatenate([x, copy], axis=own.index("S")))
    return tuple(joined)
