"""The time of a message on a network, against a count of every hop of every message."""

import collections
import itertools
import math

import pytest

from distattn.planning.chips import Link
from distattn.planning.network import (
    Dimension,
    along,
    butterfly_s,
    halving_s,
    levels,
    ring_link,
)
from distattn.planning.schedule import butterfly, halving, hierarchical

HOP, BYTE = 1.0, 1000.0  # seconds of a hop, and of a byte on a link
UNIT = Link(HOP, 1 / BYTE)
TORI = [(4,), (8,), (5,), (6,), (4, 4), (3, 5), (4, 6), (5, 3), (4, 4, 4), (2, 3, 4)]
POWERS = [sizes for sizes in TORI if not any(size & (size - 1) for size in sizes)]
closed_or_open = pytest.mark.parametrize("closed", [True, False], ids=["closed", "open"])


def torus(sizes, closed):
    return tuple(
        Dimension(name, size, UNIT, "torus", closed=closed)
        for name, size in zip("xyz", sizes, strict=False)
    )


def counted_s(sizes, closed, pairs, sent_bytes=1):
    """Seconds of a round by walking all messages: hops of the farthest, load of the busiest link."""
    places = list(itertools.product(*map(range, sizes)))
    used, farthest = collections.Counter(), 0
    for source, rank in pairs:
        here, there, hops = list(places[source]), places[rank], 0
        for k in reversed(range(len(sizes))):
            up = (there[k] - here[k]) % sizes[k]
            way = 1 if (2 * up <= sizes[k] if closed else there[k] > here[k]) else -1
            while here[k] != there[k]:
                before = tuple(here)
                here[k] = (here[k] + way) % sizes[k]
                used[before, tuple(here), way] += 1  # by way: two places have two links, if closed
                hops += 1
        farthest = max(farthest, hops)
    return farthest * HOP + max(used.values()) * sent_bytes * BYTE


@closed_or_open
@pytest.mark.parametrize("sizes", TORI, ids=str)
def test_a_butterfly_of_an_axis_for_each_dimension_is_as_counted(sizes, closed):
    found = sum(butterfly_s(axis, 1) for axis in along(torus(sizes, closed), sizes))
    assert found == sum(counted_s(sizes, closed, pairs) for pairs in hierarchical(sizes).rounds)


@closed_or_open
@pytest.mark.parametrize("sizes", POWERS, ids=str)
def test_a_butterfly_of_one_axis_over_all_dimensions_is_as_counted(sizes, closed):
    total = math.prod(sizes)
    (axis,) = along(torus(sizes, closed), (total,))
    assert butterfly_s(axis, 1) == sum(
        counted_s(sizes, closed, pairs) for pairs in butterfly(total).rounds
    )


@closed_or_open
@pytest.mark.parametrize("cut", [(2, 8), (4, 4), (8, 2), (2, 2, 4)], ids=str)
def test_axes_that_cut_a_dimension_are_as_counted(cut, closed):
    found = sum(butterfly_s(axis, 1) for axis in along(torus((16,), closed), cut))
    assert found == sum(counted_s((16,), closed, pairs) for pairs in hierarchical(cut).rounds)


@closed_or_open
@pytest.mark.parametrize("sizes", TORI, ids=str)
def test_halving_is_nearly_as_counted(sizes, closed):
    total = math.prod(sizes)
    (axis,) = along(torus(sizes, closed), (total,))
    counted = sum(
        counted_s(
            sizes, closed, [(rank, (rank + shift) % total) for rank in range(total)], count / total
        )
        for shift, count in halving(total).rounds
    )
    assert 0.65 < halving_s(axis, 1) / counted < 1.01


@closed_or_open
@pytest.mark.parametrize("bit", range(4))
def test_an_exchange_at_distance_d_sends_d_messages_over_the_middle_link(bit, closed):
    """Among 2 d neighbors the lower d all send up over the link between the halves, the upper d down."""
    pairs = tuple((rank, rank ^ 1 << bit) for rank in range(16))
    assert counted_s((16,), closed, pairs) == (1 << bit) * (HOP + BYTE)


def test_devices_that_share_a_link_share_its_bandwidth():
    slices = Dimension("slice", 2, Link(7.0, 1.0), "tree", sharers=4)
    assert slices.shared_link == Link(7.0, 1 / 4)
    assert butterfly_s((slices,), 1) == 7 + 4
    # A shift that is carried to another slice waits for that network.
    x = Dimension("x", 2, Link(1.0, 1.0), "torus", closed=True)
    assert halving_s((slices, x), 8) == (7 + 4 * 4) + (7 + 2 * 4)
    assert butterfly_s((), 1) == halving_s((), 1) == 0


def test_a_ring_takes_neighbors_and_one_message_leaves_a_host():
    x = Dimension("x", 4, Link(1.0, 1.0), "torus", closed=True)
    slices = Dimension("slice", 2, Link(7.0, 0.5), "tree", sharers=4)
    assert ring_link((x,)) == Link(1.0, 1.0)
    assert ring_link((slices, x)) == Link(7.0, 0.5)


def test_collectives_use_all_links_of_a_torus_at_once():
    (level,) = levels(along(torus((16, 16, 16), True), (4096,))[0])
    assert (level.size, level.messages, level.gather) == (4096, 24, Link(24 * HOP, 6 / BYTE))
    (level,) = levels(along(torus((4, 4), False), (16,))[0])
    assert (level.size, level.messages, level.gather) == (16, 6, Link(6 * HOP, 2 / BYTE))


def test_switches_are_levels_of_their_own():
    host = Dimension("host", 16, Link(3.0, 1.0), "tree")
    device = Dimension("device", 8, Link(1.0, 1.0), "ring")
    outer, inner = levels((host, device))
    assert (outer.size, outer.messages, outer.gather) == (16, 4, Link(12.0, 1.0))
    assert (inner.size, inner.messages, inner.gather) == (8, 7, Link(7.0, 1.0))
    # A device sends 15 of its 16 parts to other hosts; all messages travel together.
    assert outer.exchange == Link(3.0, 16 / 15)
    assert inner.exchange == Link(1.0, 8 / 7)


@pytest.mark.parametrize("size", [2, 4, 6, 8])
def test_an_exchange_of_all_with_all_fills_the_middle_link(size):
    (level,) = levels(along(torus((size,), False), (size,))[0])
    crossing = sum(a < size / 2 <= b for a in range(size) for b in range(size))
    assert BYTE * level.exchange.bytes_per_s == pytest.approx(size / crossing)


@pytest.mark.parametrize("sizes", [(3, 3), (8, 3), (16, 2), (4,), (2, 8, 1, 2)], ids=str)
def test_axes_are_along_dimensions_or_not(sizes):
    dimensions = torus((4, 8), True)
    if math.prod(sizes) == 32 and 3 not in sizes:
        axes = along(dimensions, sizes)
        assert tuple(math.prod(d.size for d in axis) for axis in axes) == sizes
        return
    with pytest.raises(ValueError, match="sizes is .*x=4 x y=8") as error:
        along(dimensions, sizes)
    assert "take one axis for each dimension" in str(error.value)


def test_an_axis_may_end_only_at_a_divisor():
    with pytest.raises(ValueError, match=r"sizes is \(4, 6\)"):
        along(torus((6, 4), True), (4, 6))
