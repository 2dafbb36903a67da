"""How many messages of a round share a link of a torus, and how far the farthest goes.

Devices are numbered row-major over the dimensions of a network, slowest first. A mesh axis lies along
one dimension, a part of one, or several: its stretches. A message goes the fastest stretch first, along
each the shorter way, upwards where both are equal. Messages of a round are sent at once, so one over
`hops` links whose busiest carries `load` messages takes hops * latency_s + load * bytes / bytes_per_s.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

from distattn.planning.chips import Collectives, Link, worst
from distattn.planning.schedule import Pairs, butterfly


@dataclasses.dataclass(frozen=True)
class Dimension:
    """Devices in a row: wired to their neighbours, or any two connected by a switch."""

    name: str
    size: int
    link: Link  # one hop, in one direction
    wired: bool
    closed: bool = False  # the last is wired to the first
    sharers: int = 1  # devices at each place of the row: all of them send at once
    collectives: Collectives = "tree"  # over a switch: D - 1 or log2 D messages


@dataclasses.dataclass(frozen=True)
class Stretch:
    """What an axis has of a dimension: `size` places, each `stride` from the next."""

    dimension: Dimension
    size: int
    stride: int = 1

    @property
    def closed(self) -> bool:
        """Whether the way over the end is open to it."""
        return self.dimension.closed and self.size * self.stride == self.dimension.size

    @property
    def diameter(self) -> int:
        """Hops between the two places that are farthest apart."""
        if not self.dimension.wired:
            return 1
        return self.stride * (self.size // 2 if self.closed else self.size - 1)

    def link(self, hops: float = 1, load: float = 1) -> Link:
        """Over so many places, where all sharers send and the busiest link has so many messages."""
        one = self.dimension.link
        if not self.dimension.wired:
            return Link(one.latency_s, one.bytes_per_s / self.dimension.sharers)
        load *= self.stride * self.dimension.sharers
        return Link(one.latency_s * hops * self.stride, one.bytes_per_s / load)

    def move(self, start: int, end: int) -> int:
        """Places from one to another, upwards above 0 and downwards below."""
        up = (end - start) % self.size
        if not self.closed:
            return end - start
        return up if 2 * up <= self.size else up - self.size


Axis = tuple[Stretch, ...]  # of a mesh axis, slowest first


def along(dimensions: Sequence[Dimension], sizes: Sequence[int]) -> tuple[Axis, ...]:
    """The stretches of each mesh axis, where devices are row-major in mesh and network.

    Args:
      dimensions: of the network, slowest first.
      sizes: of the mesh axes, slowest first; their product is that of the dimensions' sizes.

    Returns:
      For each axis its stretches; an axis of size 1 has none.

    Raises:
      ValueError: another number of devices, or an axis that ends within a row, at no divisor of it.
    """
    places = [(d, d.size) for d in dimensions]
    axes: list[Axis] = []
    for size in reversed(sizes):
        found: list[Stretch] = []
        while size > 1 and places:
            dimension, left = places.pop()
            taken = math.gcd(size, left)
            if taken not in (size, left):
                break
            if taken > 1:
                found.insert(0, Stretch(dimension, taken, dimension.size // left))
            size //= taken
            if left > taken:
                places.append((dimension, left // taken))
        if size > 1:
            break
        axes.insert(0, tuple(found))
    if len(axes) < len(sizes) or any(left > 1 for _, left in places):
        shape = " x ".join(f"{d.name}={d.size}" for d in dimensions)
        raise ValueError(
            f"sizes is {tuple(sizes)} for devices of {shape}; the axes must cover these in order, each "
            "whole dimensions or a divisor of one: take one axis for each dimension, or their product"
        )
    return tuple(axes)


def round_link(stretches: Axis, pairs: Pairs) -> Link:
    """A message of the round (source, destination), ranks row-major over the stretches."""
    loads: collections.Counter[tuple[Any, ...]] = collections.Counter()
    latency_s, crossed = 0.0, set()
    for source, rank in pairs:
        place, end, moved_s = _place(stretches, source), _place(stretches, rank), 0.0
        changed = [k for k, (a, b) in enumerate(zip(place, end, strict=True)) if a != b]
        if changed and not stretches[changed[0]].dimension.wired:
            changed = changed[:1]  # a network that reaches every device of the other side
        for k in reversed(changed):
            stretch = stretches[k]
            crossed.add(k)
            step = stretch.move(place[k], end[k])
            moved_s += stretch.link(hops=abs(step)).latency_s
            if stretch.dimension.wired:
                here, way = place[k], 1 if step > 0 else -1
                for _ in range(abs(step)):
                    loads[k, (*place[:k], here, *place[k + 1 :]), way] += 1
                    here = (here + way) % stretch.size
            place = (*place[:k], end[k], *place[k + 1 :])
        latency_s = max(latency_s, moved_s)
    busiest = {k: max((n for key, n in loads.items() if key[0] == k), default=1) for k in crossed}
    slowest = min(
        (stretches[k].link(load=busiest[k]).bytes_per_s for k in crossed), default=math.inf
    )
    return Link(latency_s, slowest)


@functools.cache
def butterfly_links(axis: Axis) -> tuple[Link, ...]:
    """A message of each round of `butterfly` over an axis, in order."""
    if any(s.size & (s.size - 1) for s in axis[1:]):
        rounds = butterfly(math.prod(s.size for s in axis)).rounds
        return tuple(round_link(axis, pairs) for pairs in rounds)
    # Powers of two but for the slowest: each bit lies within a stretch, and so does the fold.
    links = []
    for stretch in reversed(axis):
        links += [round_link((stretch,), pairs) for pairs in butterfly(stretch.size).rounds]
    return tuple(links)


def shift_link(stretches: Axis, shift: int) -> Link:
    """A message of the round in which every rank sends to rank + shift, cyclically: at most this."""
    latency_s, bytes_per_s, carries = 0.0, math.inf, False
    for stretch in reversed(stretches):
        shift, digit = divmod(shift, stretch.size)
        hops = load = 0
        for step in {digit % stretch.size, (digit + carries) % stretch.size} - {0}:
            back = stretch.size - step  # of those that would go over the end
            hops = max(hops, min(step, back) if stretch.closed else max(step, back))
            load = max(load, min(step, back))
        if hops:
            link = stretch.link(hops, load)
            bytes_per_s = min(bytes_per_s, link.bytes_per_s)
            latency_s += link.latency_s
        carries = carries or digit > 0
    return Link(latency_s, bytes_per_s)


def ring_link(stretches: Axis) -> Link:
    """A hop of a ring over all devices: to a neighbour, and one message crosses between hosts.

    The order of the ring is a snake through the torus, whose ends meet: it has one where a dimension is
    closed or even.
    """
    return worst([s.dimension.link if not s.dimension.wired else s.link() for s in stretches])


@dataclasses.dataclass(frozen=True)
class Level:
    """The stretches over which XLA's collectives run at once, and what a device reaches there."""

    size: int
    messages: int
    link: Link  # of all links of a device together
    exchange: Link  # of what each device sends to all others: of its bytes, own part and all


def levels(stretches: Axis) -> tuple[Level, ...]:
    """The levels of a collective, slowest first: each switch by itself, the torus as a whole.

    On a torus: rings along all dimensions at once, both ways where closed, and half the diameter of each
    until the last byte has come ("How to Scale Your Model", chapter 3: max(hop_s * size / 2, bytes /
    bandwidth of all axes); here their sum, as everywhere). All to all, of n devices in a row that send b
    bytes each: half of what one half sends crosses the middle, n b / 4 over one link of an open row, or
    two of a closed one.
    """
    found, torus = [], [s for s in stretches if s.dimension.wired]
    for stretch in stretches:
        if not stretch.dimension.wired:
            others = stretch.size - 1
            messages = others if stretch.dimension.collectives == "ring" else others.bit_length()
            link = stretch.link()
            crossing = (stretch.size - 1) / stretch.size
            exchange = Link(link.latency_s, link.bytes_per_s / crossing)
            found.append(Level(stretch.size, messages, link, exchange))
        elif stretch is torus[0]:
            one = stretch.dimension.link
            width = sum((2 if s.closed else 1) * s.link().bytes_per_s for s in torus)
            slowest = min(s.link(load=s.size / (8 if s.closed else 4)).bytes_per_s for s in torus)
            size, hops = math.prod(s.size for s in torus), sum(s.diameter for s in torus)
            exchange = Link(one.latency_s, slowest)
            found.append(Level(size, hops, Link(one.latency_s, width), exchange))
    return tuple(found)


def _place(stretches: Axis, rank: int) -> tuple[int, ...]:
    place: list[int] = []
    for stretch in reversed(stretches):
        rank, at = divmod(rank, stretch.size)
        place.insert(0, at)
    return tuple(place)
