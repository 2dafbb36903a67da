"""Each token on two devices of different hosts, so that no key is lost with a host.

A device holds, beside its own share of the slots, a copy of the share of another one, its ward, which lies
on another host. The copy has the same slots as the original, and every change of a share is worked out
twice, by its owner and by the one that holds the copy, from the same numbers: nothing is sent for it. Only
the owner's share is attended to, so every key counts once.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax import lax

from distattn.cache.layout import Layout, letters_of

if TYPE_CHECKING:
    from distattn.cache.kv_cache import KVCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Replica:
    """The share of its ward that each device holds: the arrays of a `KVCache`, by the same names."""

    key: jax.Array
    value: jax.Array
    key_scale: jax.Array | None
    value_scale: jax.Array | None
    positions: jax.Array


NAMES = tuple(field.name for field in dataclasses.fields(Replica))


def check_replicas(replicas: int, layout: Layout) -> None:
    """That there can be so many copies of each token, or a ValueError."""
    if replicas not in (1, 2) or isinstance(replicas, bool):
        raise ValueError(f"replicas is {replicas!r}; it must be 1, or 2 for a copy on another host")
    if replicas == 2:
        wards_of(layout)


def replica_layout(layout: Layout) -> Layout:
    """The layout in whose `run` each device works on the share of its ward, and counts as that one."""
    return dataclasses.replace(layout, wards=wards_of(layout))


@functools.lru_cache
def wards_of(layout: Layout) -> tuple[int, ...]:
    """The ward of each device along the axes of the slots.

    Devices are sorted by host and turned by as many places as the fullest host has: each then has a ward
    on another host, and each is the ward of one. In a program of one process the first of the axes that
    has more than one device stands for the hosts.

    Raises:
      ValueError: no such assignment.
    """
    hosts = _hosts(layout)
    order = sorted(range(layout.devices), key=lambda shard: sorted(hosts[shard]))
    turn = max((hosts.count(own) for own in hosts), default=0)
    wards = [0] * layout.devices
    for place, ward in enumerate(order):
        wards[order[(place + turn) % layout.devices]] = ward
    if any(hosts[shard] & hosts[ward] for shard, ward in enumerate(wards)):
        lie = {shard: sorted(own) for shard, own in enumerate(hosts)}
        raise ValueError(
            f"replicas is 2, and the {layout.devices} devices along the axes {layout.slots} of the slots "
            f"lie on the hosts {lie}; a second copy is on another host: pass a mesh in which no host has "
            "more than half of them (distattn.distributed.make_mesh), or replicas=1"
        )
    return tuple(wards)


def replicas_fit(layout: Layout) -> bool:
    """Whether each share can have a copy on another host."""
    try:
        wards_of(layout)
    except ValueError:
        return False
    return True


def _hosts(layout: Layout) -> list[frozenset[int]]:
    """The hosts, by number, on which each share of the slots lies."""
    if layout.devices == 1:
        return [frozenset({0})]
    mesh = layout.mesh
    axes = [mesh.axis_names.index(axis) for axis in layout.slots]
    shares = np.moveaxis(mesh.devices, axes, range(len(axes))).reshape(layout.devices, -1)
    if len({device.process_index for device in shares.flat}) > 1:
        return [frozenset(device.process_index for device in share) for share in shares]
    first = next(mesh.shape[axis] for axis in layout.slots if mesh.shape[axis] > 1)
    return [frozenset({share // (layout.devices // first)}) for share in range(layout.devices)]


def with_replica(cache: "KVCache", replicas: int) -> "KVCache":
    """The cache with so many copies of each token: 1, or 2, for which all shares are sent once."""
    if replicas == 1:
        return dataclasses.replace(cache, replica=None)
    letters = replica_letters(cache)
    copies = replica_layout(cache.layout).run(
        _copy_of_ward, tuple(letters.values()), tuple(letters.values()), *arrays_of(cache, letters)
    )
    arrays = dict.fromkeys(NAMES) | dict(zip(letters, copies, strict=True))
    return dataclasses.replace(cache, replica=Replica(**arrays))


def retagged(
    cache: "KVCache", letters: list[str], kept: Callable[..., Any], *numbers: jax.Array
) -> "KVCache":
    """The cache whose copies, if there are any, have the tags kept(tags, *numbers)."""
    if cache.replica is None:
        return cache
    tags = replica_layout(cache.layout).run(
        _retag, ("BS", *letters), ("BS",), cache.replica.positions, *numbers, static=(kept,)
    )[0]
    return dataclasses.replace(cache, replica=dataclasses.replace(cache.replica, positions=tags))


def replica_letters(cache: "KVCache") -> dict[str, str]:
    """The letters of the dimensions of each array that has a copy, by name."""
    return {name: letters for name, letters in letters_of(cache).items() if name in NAMES}


def arrays_of(holder: "KVCache | Replica", names: dict[str, str]) -> list[jax.Array]:
    """The arrays of a cache, or of its copies, by name."""
    return [getattr(holder, name) for name in names]


# What one device does, in `Layout.run`.


def sent_to_replica(layout: Layout, x: jax.Array) -> jax.Array:
    """What the ward of this device has as x."""
    pairs = [(ward, holder) for holder, ward in enumerate(layout.wards)]
    return lax.ppermute(x, layout.slots, pairs)


def _copy_of_ward(layout: Layout, *arrays: jax.Array) -> tuple[Any, ...]:
    return tuple(sent_to_replica(layout, x) for x in arrays)


def _retag(
    layout: Layout, kept: Callable[..., Any], tags: jax.Array, *numbers: jax.Array
) -> tuple[Any, ...]:
    return (kept(tags, *numbers),)
