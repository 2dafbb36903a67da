"""How many messages share a link, against a count of every hop of every message."""

import collections
import itertools
import math

import pytest

from distattn.planning.chips import Link
from distattn.planning.network import (
    Dimension,
    Stretch,
    along,
    butterfly_links,
    levels,
    ring_link,
    round_link,
    shift_link,
)
from distattn.planning.schedule import butterfly, halving, hierarchical

# So that a link's latency is its hops, and a byte takes as long as it has messages.
UNIT = Link(1.0, 1.0)
TORI = [(4,), (8,), (5,), (6,), (4, 4), (3, 5), (4, 6), (5, 3), (4, 4, 4), (2, 3, 4)]
closed_or_open = pytest.mark.parametrize("closed", [True, False], ids=["closed", "open"])


def torus(sizes, closed):
    return tuple(
        Dimension(name, size, UNIT, wired=True, closed=closed)
        for name, size in zip("xyz", sizes, strict=False)
    )


def counted(sizes, closed, pairs):
    """(hops of the farthest message, messages over the busiest link), by walking all of them."""
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
    return farthest, max(used.values())


def as_counts(link):
    return link.latency_s, round(1 / link.bytes_per_s)


@closed_or_open
@pytest.mark.parametrize("sizes", TORI, ids=str)
def test_a_butterfly_of_an_axis_for_each_dimension_is_as_counted(sizes, closed):
    axes = along(torus(sizes, closed), sizes)
    found = [x for axis in reversed(axes) for x in butterfly_links(axis)]
    rounds = hierarchical(sizes).rounds
    assert [as_counts(x) for x in found] == [counted(sizes, closed, pairs) for pairs in rounds]


@closed_or_open
@pytest.mark.parametrize("sizes", TORI, ids=str)
def test_a_butterfly_of_one_axis_over_all_dimensions_is_as_counted(sizes, closed):
    total = math.prod(sizes)
    (axis,) = along(torus(sizes, closed), (total,))
    rounds = butterfly(total).rounds
    assert [as_counts(x) for x in butterfly_links(axis)] == [
        counted(sizes, closed, pairs) for pairs in rounds
    ]


@closed_or_open
@pytest.mark.parametrize("sizes", TORI, ids=str)
def test_any_round_is_as_counted(sizes, closed):
    total = math.prod(sizes)
    stretches = tuple(s for axis in along(torus(sizes, closed), sizes) for s in axis)
    for pairs in (*butterfly(total).rounds, *hierarchical(sizes).rounds):
        assert as_counts(round_link(stretches, pairs)) == counted(sizes, closed, pairs)


@closed_or_open
@pytest.mark.parametrize("cut", [(2, 8), (4, 4), (8, 2), (2, 2, 4)], ids=str)
def test_axes_that_cut_a_dimension_are_as_counted(cut, closed):
    found = [
        x for axis in reversed(along(torus((16,), closed), cut)) for x in butterfly_links(axis)
    ]
    rounds = hierarchical(cut).rounds
    assert [as_counts(x) for x in found] == [counted((16,), closed, pairs) for pairs in rounds]


@closed_or_open
@pytest.mark.parametrize("sizes", TORI, ids=str)
def test_a_shift_goes_no_farther_than_said(sizes, closed):
    total = math.prod(sizes)
    stretches = tuple(s for axis in along(torus(sizes, closed), sizes) for s in axis)
    for shift, _ in halving(total).rounds:
        pairs = [(rank, (rank + shift) % total) for rank in range(total)]
        hops, load = as_counts(shift_link(stretches, shift))
        counted_hops, counted_load = counted(sizes, closed, pairs)
        assert counted_hops <= hops
        assert counted_load <= load <= counted_load + 1


@closed_or_open
@pytest.mark.parametrize("bit", range(4))
def test_an_exchange_at_distance_d_sends_d_messages_over_the_middle_link(bit, closed):
    """Of 2 d neighbours the lower d all send up over the link between the halves, the upper d down."""
    stretch = Stretch(Dimension("x", 16, UNIT, wired=True, closed=closed), 16)
    pairs = tuple((rank, rank ^ 1 << bit) for rank in range(16))
    assert as_counts(round_link((stretch,), pairs)) == (1 << bit, 1 << bit)


def test_devices_that_share_links_share_their_bandwidth():
    x = Dimension("x", 4, UNIT, wired=True, closed=True, sharers=2)
    slices = Dimension("slice", 2, Link(7.0, 1.0), wired=False, sharers=4)
    both = (Stretch(slices, 2), Stretch(x, 4))
    pairs = tuple((rank, (rank + 4) % 8) for rank in range(8))
    assert round_link(both, pairs) == Link(7.0, 1 / 4)
    pairs = tuple((rank, rank ^ 1) for rank in range(8))
    assert round_link(both, pairs) == Link(1.0, 1 / 2)
    # What goes to another slice goes there by that network, wherever it arrives.
    assert round_link(both, ((0, 6),)) == Link(7.0, 1 / 4)


def test_a_round_without_messages_takes_no_time():
    assert round_link((Stretch(torus((4,), True)[0], 4),), ()) == Link(0.0, math.inf)


def test_a_ring_takes_neighbours_and_one_message_leaves_a_host():
    x = Dimension("x", 4, UNIT, wired=True, closed=True)
    slices = Dimension("slice", 2, Link(7.0, 0.5), wired=False, sharers=4)
    assert ring_link((Stretch(x, 4),)) == UNIT
    assert ring_link((Stretch(slices, 2), Stretch(x, 4))) == Link(7.0, 0.5)


def test_collectives_use_all_links_of_a_torus_at_once():
    (level,) = levels(along(torus((16, 16, 16), True), (4096,))[0])
    assert (level.size, level.messages, level.link) == (4096, 24, Link(1.0, 6.0))
    (level,) = levels(along(torus((4, 4), False), (16,))[0])
    assert (level.size, level.messages, level.link) == (16, 6, Link(1.0, 2.0))


def test_switches_are_levels_of_their_own():
    host = Dimension("host", 16, Link(3.0, 1.0), wired=False)
    device = Dimension("device", 8, UNIT, wired=False, collectives="ring")
    outer, inner = levels((Stretch(host, 16), Stretch(device, 8)))
    assert (outer.size, outer.messages, outer.link) == (16, 4, Link(3.0, 1.0))
    assert (inner.size, inner.messages) == (8, 7)
    # Of what a device sends to all alike, 15 of 16 parts go to other hosts.
    assert outer.exchange.bytes_per_s == pytest.approx(16 / 15)


@pytest.mark.parametrize("size", [2, 4, 6, 8])
def test_an_exchange_of_all_with_all_fills_the_middle_link(size):
    (level,) = levels(along(torus((size,), False), (size,))[0])
    crossing = sum(a < size / 2 <= b for a in range(size) for b in range(size))
    assert 1 / level.exchange.bytes_per_s == pytest.approx(crossing / size)


@pytest.mark.parametrize("sizes", [(3, 3), (8, 3), (16, 2), (4,), (2, 8, 1, 2)], ids=str)
def test_axes_lie_along_dimensions_or_not(sizes):
    dimensions = torus((4, 8), True)
    if math.prod(sizes) == 32 and 3 not in sizes:
        axes = along(dimensions, sizes)
        assert tuple(math.prod(s.size for s in axis) for axis in axes) == sizes
        return
    with pytest.raises(ValueError, match="sizes is .*x=4 x y=8") as error:
        along(dimensions, sizes)
    assert "take one axis for each dimension" in str(error.value)


def test_an_axis_may_end_only_at_a_divisor():
    with pytest.raises(ValueError, match=r"sizes is \(4, 6\)"):
        along(torus((6, 4), True), (4, 6))
