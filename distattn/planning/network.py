"""The network along a mesh axis: switches and dimensions of a torus, with one bandwidth each.

Devices are numbered row-major over the dimensions of a network, slowest first. A mesh axis covers one
dimension, a part of one, or several. All devices send at once, so a message that travels `hops` links of a
row shares each of them with as many others.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal

from distattn.planning.chips import Link, worst
from distattn.planning.schedule import butterfly_round_count, halving


@dataclasses.dataclass(frozen=True)
class Dimension:
    """Devices in a row: neighbors are linked (a torus), or a switch connects any two."""

    name: str
    size: int
    link: Link  # one hop, in one direction
    # A torus, or a switch by the collectives over it: a ring of D - 1 messages, a tree of log2 D.
    kind: Literal["torus", "ring", "tree"]
    closed: bool = False  # a torus: the last device is linked to the first
    sharers: int = 1  # over a switch: devices that share the link of a host

    @property
    def torus(self) -> bool:
        """Whether only neighbors are linked."""
        return self.kind == "torus"

    @property
    def shared_link(self) -> Link:
        """The link of one device while all devices send."""
        return Link(self.link.latency_s, self.link.bytes_per_s / self.sharers)

    def part(self, size: int, stride: int) -> "Dimension":
        """Return `size` places of the dimension, each `stride` from the next."""
        if not self.torus:
            return dataclasses.replace(self, size=size)
        link = Link(self.link.latency_s * stride, self.link.bytes_per_s / stride)
        closed = self.closed and size * stride == self.size
        return dataclasses.replace(self, size=size, link=link, closed=closed)

    def butterfly_s(self, message_bytes: float) -> float:
        """Return the seconds that the messages of a butterfly take."""
        hops = load = butterfly_round_count(self.size)
        if self.torus:
            # Messages go over 1, 2, 4, ... links. A size that is no power of two is folded and unfolded.
            doublings = 1 << self.size.bit_length() - 1
            load = doublings - 1 + 2 * (self.size - doublings)
            hops = load if self.closed or self.size == doublings else 3 * doublings - 1
        return self.shared_link.seconds(load * message_bytes, hops)

    def shift_s(self, shift: int, message_bytes: float) -> float:
        """Return the seconds in which every device sends to the device `shift` places on, cyclically."""
        near, far = sorted((shift, self.size - shift)) if self.torus else (1, 1)
        return self.shared_link.seconds(near * message_bytes, near if self.closed else far)


Dimensions = tuple[Dimension, ...]  # the network along a mesh axis, slowest dimension first


def along(dimensions: Sequence[Dimension], sizes: Sequence[int]) -> tuple[Dimensions, ...]:
    """Return the dimensions, or parts of them, along each mesh axis; mesh and network are row-major.

    Args:
      dimensions: the network, slowest first.
      sizes: devices on each mesh axis, slowest first; their product is the number of devices.

    Returns:
      For each axis its dimensions; an axis of size 1 has none.

    Raises:
      ValueError: another number of devices, or an axis that ends within a dimension at no divisor of it.
    """
    places = [(d, d.size) for d in dimensions]
    axes: list[Dimensions] = []
    for size in reversed(sizes):
        parts: list[Dimension] = []
        while size > 1 and places:
            dimension, left = places.pop()
            taken = math.gcd(size, left)
            if taken not in (size, left):
                break
            if taken > 1:
                parts.insert(0, dimension.part(taken, dimension.size // left))
            size //= taken
            if left > taken:
                places.append((dimension, left // taken))
        if size > 1:
            break
        axes.insert(0, tuple(parts))
    if len(axes) < len(sizes) or any(left > 1 for _, left in places):
        shape = " x ".join(f"{d.name}={d.size}" for d in dimensions)
        raise ValueError(
            f"sizes is {tuple(sizes)} for devices of {shape}; the axes must cover these in order, each "
            "whole dimensions or a divisor of one: take one axis for each dimension, or their product"
        )
    return tuple(axes)


def butterfly_s(axis: Dimensions, message_bytes: float) -> float:
    """Return the seconds that the messages of a butterfly over an axis take."""
    return sum(dimension.butterfly_s(message_bytes) for dimension in axis)


def halving_s(axis: Dimensions, whole_bytes: float) -> float:
    """Return the seconds that the messages of `halving` over an axis take, the slowest dimension first.

    A shift along a dimension carries some messages to the next place of each slower one.
    """
    seconds = 0.0
    for k, dimension in enumerate(axis):
        whole_bytes /= dimension.size
        for shift, count in halving(dimension.size).rounds:
            carried = [slower.shift_s(1, count * whole_bytes) for slower in axis[:k]]
            seconds += max(dimension.shift_s(shift, count * whole_bytes), *carried, 0.0)
    return seconds


def ring_link(axis: Dimensions) -> Link:
    """Return the slowest link of a ring over all devices.

    Each device sends to a neighbor, and one message leaves a host. The ring is a snake through the torus
    whose ends meet, which exists if a dimension is closed or even.
    """
    return worst([dimension.link for dimension in axis])


@dataclasses.dataclass(frozen=True)
class Level:
    """Dimensions that a collective crosses at once: one switch, or the whole torus."""

    size: int
    messages: int  # per all-gather, one after another
    gather: Link  # all messages of an all-gather, over all links of a device
    exchange: Link  # all messages of an all-to-all; bytes count what a device holds, its own part included


def levels(axis: Dimensions) -> tuple[Level, ...]:
    """Return the levels of XLA's collectives over an axis, slowest first.

    On a torus rings run along all dimensions at once, both ways if closed, and the last byte travels half
    the diameter of each ("How to Scale Your Model", chapter 3). In an all-to-all of n devices in a row with
    b bytes each, half of what one half sends crosses the middle: n b / 4 over one link of an open row, or
    two of a closed one.
    """
    found: list[Level] = []
    torus = [dimension for dimension in axis if dimension.torus]
    for dimension in axis:
        if not dimension.torus:
            link, others = dimension.shared_link, dimension.size - 1
            messages = others if dimension.kind == "ring" else others.bit_length()
            gather = Link(link.latency_s * messages, link.bytes_per_s)
            exchange = Link(link.latency_s, link.bytes_per_s * dimension.size / others)
            found.append(Level(dimension.size, messages, gather, exchange))
        elif dimension is torus[0]:
            hops = [d.size // 2 if d.closed else d.size - 1 for d in torus]
            width = [(2 if d.closed else 1) * d.link.bytes_per_s for d in torus]
            latency_s = sum(n * d.link.latency_s for n, d in zip(hops, torus, strict=True))
            narrowest = min(4 * x / d.size for x, d in zip(width, torus, strict=True))
            gather, exchange = Link(latency_s, sum(width)), Link(latency_s, narrowest)
            found.append(Level(math.prod(d.size for d in torus), sum(hops), gather, exchange))
    return tuple(found)
