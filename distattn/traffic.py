"""What a combine makes the busiest device do: launches, messages, bytes and merges, by formula."""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterable

from distattn.cost import Shape, Topology, Traffic
from distattn.link import Link, worst
from distattn.schedule import Schedule, butterfly_round_count, halving
from distattn.wiring import butterfly_links, levels, ring_link, round_link, shift_link


def traffic(combine: str | Schedule, shape: Shape, topology: Topology) -> Traffic:
    """What a combine, by name or as a schedule of that many devices, costs on each device."""
    if isinstance(combine, Schedule):
        if combine.size != topology.size:
            raise ValueError(
                f"combine is a schedule for {combine.size} devices; it must be for the "
                f"{topology.size} of the topology {topology.sizes}: build it for {topology.size}"
            )
        return _schedule(combine, shape, topology)
    if combine not in FORMULAS:
        raise ValueError(
            f"combine is {combine!r}; it must be a Schedule or one of {tuple(FORMULAS)}: name one"
        )
    return FORMULAS[combine](shape, topology) if topology.size > 1 else Traffic()


def fits(combine: str, shape: Shape, topology: Topology) -> bool:
    """Whether there are enough levels, and heads, for a combine that shards heads."""
    if combine not in HEADS_SHARDED:
        return True
    if combine == "ulysses":
        return shape.num_heads % topology.size == 0
    return len(topology.sizes) > 1 and shape.num_heads % topology.sizes[-1] == 0


def _schedule(schedule: Schedule, shape: Shape, topology: Topology) -> Traffic:
    sent = collections.Counter(source for pairs in schedule.rounds for source, _ in pairs)
    merges = sum(step.receives != step.replaces for step in schedule.steps)
    busiest = max(sent.values(), default=0)
    whole = _rounds(len(schedule.rounds), busiest, merges, shape.payload_bytes)
    if topology.wired is not None:
        links = [round_link(topology.stretches, pairs) for pairs in schedule.rounds]
    elif topology.links is not None:
        links = [_link_of_round(pairs, topology) for pairs in schedule.rounds]
    else:
        return whole
    return whole + _nearer(((link, 1, shape.payload_bytes) for link in links), topology)


def _link_of_round(pairs: tuple[tuple[int, int], ...], topology: Topology) -> Link:
    """The worst link that a message of the round crosses; ranks are row-major."""
    stride, links = 1, []
    for axis in reversed(range(len(topology.sizes))):
        size = topology.sizes[axis]
        if any(a // stride % size != b // stride % size for a, b in pairs):
            links.append(topology.link_of(axis))
        stride *= size
    return worst(links) if links else topology.constants.link


def _nearer(messages: Iterable[tuple[Link, int, float]], topology: Topology) -> Traffic:
    """What messages, each (link, count, bytes of all), save over those that cross the worst link.

    On a torus that is one hop over a link of one's own, and what they save may be less than nothing.
    """
    slowest = topology.constants.link
    saved_s = sum(
        count * (slowest.latency_s - link.latency_s)
        + size * (1 / slowest.bytes_per_s - 1 / link.bytes_per_s)
        for link, count, size in messages
    )
    return Traffic(nearer_s=saved_s)


def sum_traffic(combine: str, payload_bytes: int, topology: Topology) -> Traffic:
    """What the sum of an array on each device costs: by 'butterfly', or by one all-reduce, 'psum'."""
    if combine == "butterfly":
        return _doubling(payload_bytes, topology)
    return _all_reduce(payload_bytes, topology)


def _butterfly(shape: Shape, topology: Topology) -> Traffic:
    """Sends n log2 D, in as many launches, each along one axis."""
    return _doubling(shape.payload_bytes, topology)


def _doubling(payload_bytes: int, topology: Topology) -> Traffic:
    counts = [butterfly_round_count(size) for size in topology.sizes]
    # Where a size is no power of two, the busiest rank sends nothing in the round that folds, and
    # nobody merges in the round that unfolds.
    sent = sum((size - 1).bit_length() for size in topology.sizes)
    whole = _rounds(sum(counts), sent, sent, payload_bytes)
    if topology.wired is not None:
        links = [(x, 1) for axis in topology.wired for x in butterfly_links(axis)]
    elif topology.links is not None:
        links = zip(topology.links, counts, strict=True)
    else:
        return whole
    messages = ((link, count, count * payload_bytes) for link, count in links)
    return whole + _nearer(messages, topology)


def _rounds(rounds: int, sent: int, merges: int, payload_bytes: int) -> Traffic:
    n = payload_bytes
    return Traffic(rounds, rounds, rounds * n, sent * n, merges, merges * n)


def _psum(shape: Shape, topology: Topology) -> Traffic:
    """Sends 2 n (D-1)/D in a pmax and one packed psum; rescaling in between counts as a merge."""
    n = shape.payload_bytes
    maxima = n / (shape.value_dim + 2)  # one number of those of a row
    sums = _all_reduce(maxima, topology) + _all_reduce(n - maxima, topology)
    return sums + Traffic(merges=1, merged_bytes=n)


def _all_reduce(whole_bytes: float, topology: Topology) -> Traffic:
    """A reduce-scatter, and as much back, in one launch."""
    there = gather_traffic(whole_bytes, topology)
    return dataclasses.replace(there + there, launches=1)


def _all_gather(shape: Shape, topology: Topology) -> Traffic:
    """Sends n (D-1) and merges D - 1 states, at once."""
    n, others = shape.payload_bytes, topology.size - 1
    return gather_traffic(n * topology.size, topology) + Traffic(merges=1, merged_bytes=others * n)


def _reduce_scatter(shape: Shape, topology: Topology) -> Traffic:
    """Sends (query + n) (D-1)/D: the query gathered, the states halved log2 D times."""
    rounds = (topology.size - 1).bit_length()
    sent = shape.payload_bytes * (topology.size - 1) / topology.size
    halved = Traffic(rounds, rounds, sent, sent, rounds, sent)
    if topology.wired is not None:
        chunk = shape.payload_bytes / topology.size
        messages = [
            (shift_link(topology.stretches, shift), 1, count * chunk)
            for shift, count in halving(topology.size).rounds
        ]
        halved += _nearer(messages, topology)
    return gather_traffic(shape.query_bytes, topology) + halved


def _gather_kv(shape: Shape, topology: Topology) -> Traffic:
    """Sends (key + value) (D-1)/D, apart, and merges nothing."""
    each = gather_traffic(shape.key_value_bytes / 2, topology)
    return each + each


def _ring(shape: Shape, topology: Topology) -> Traffic:
    """Sends (key + value) (D-1)/D in D - 1 hops of two messages, where it can be while it computes."""
    size, hops, row = topology.size, topology.size - 1, topology.constants
    link = row.link if topology.wired is None else ring_link(topology.stretches)
    sent = shape.key_value_bytes * hops / size
    sending_s = 2 * hops * link.latency_s + sent / link.bytes_per_s
    # Of D equal parts of a device's work, all but the last.
    computing_s = shape.flops / size * hops / size / row.flops_per_s if row.overlaps else 0.0
    whole = Traffic(
        launches=2 * hops,
        messages=2 * hops,
        message_bytes=sent,
        bytes_sent=sent,
        merges=hops,
        merged_bytes=hops * shape.payload_bytes / size,
        hidden_s=min(sending_s, computing_s),
    )
    return whole + _nearer([(link, 2 * hops, sent)], topology)


def _ulysses(shape: Shape, topology: Topology) -> Traffic:
    """Sends (query + key + value + out) / D (D-1)/D in three all-to-alls."""
    return _heads_over(shape, topology, topology.size)


def _heads_over(shape: Shape, topology: Topology, size: int) -> Traffic:
    """From rows to heads and back, among those of `size` devices; heads of keys are repeated to divide.

    The messages of an all-to-all to all the others are on their way together: one latency.
    """
    inner = topology.size
    repeated = math.lcm(shape.num_kv_heads, inner) // shape.num_kv_heads
    whole = shape.query_bytes + repeated * shape.key_value_bytes + shape.out_bytes
    sent = whole / size * (inner - 1) / inner
    if topology.wired is None:
        return Traffic(3, 3 if inner > 1 else 0, sent, sent)
    found = levels(topology.stretches)
    hops = sum(level.messages for level in found)
    crossed = [(level.exchange, 3 * level.messages, whole / size) for level in found]
    # Each level has its own links for the same bytes: so many more or less than are sent.
    surplus = (whole / size * len(found) - sent) / topology.constants.link.bytes_per_s
    nearer = _nearer(crossed, topology) + Traffic(nearer_s=-surplus)
    return Traffic(3, 3 * hops, sent, sent) + nearer


def _two_levels(outside: "_Formula", shape: Shape, topology: Topology) -> Traffic:
    """Heads over the last axis, then `outside` over the others, of a part of the heads each."""
    inner = topology.sizes[-1]
    links, wiring = topology.links, topology.wiring
    others = dataclasses.replace(
        topology,
        sizes=topology.sizes[:-1],
        links=links and links[:-1],
        wiring=wiring and wiring[:-1],
    )
    last = dataclasses.replace(
        topology, sizes=(inner,), links=links and links[-1:], wiring=wiring and wiring[-1:]
    )
    kv_heads = math.lcm(shape.num_kv_heads, inner) // inner
    part = dataclasses.replace(shape, num_heads=shape.num_heads // inner, num_kv_heads=kv_heads)
    heads, keys = _heads_over(shape, last, topology.size), outside(part, others)
    if topology.links is None:
        return heads + keys
    # Both have been counted without regard to each other's link.
    crossed = ((topology.links[-1], heads), (others.constants.link, keys))
    messages = ((link, part.messages, part.message_bytes) for link, part in crossed)
    return heads + keys + _nearer(messages, topology)


def gather_traffic(whole_bytes: float, topology: Topology) -> Traffic:
    """What the all-gather of an array, so large as a whole, costs."""
    if topology.wired is not None:
        return _gather_by_levels(whole_bytes, topology)
    others = topology.size - 1
    messages = others if topology.constants.collectives == "ring" else others.bit_length()
    sent = whole_bytes * others / topology.size
    return Traffic(1, messages, sent, sent)


def _gather_by_levels(whole_bytes: float, topology: Topology) -> Traffic:
    """Over the slowest level first, where the parts are smallest: it sends no more in all."""
    held, crossed = whole_bytes / topology.size, []
    for level in levels(topology.stretches):
        crossed.append((level.link, level.messages, held * (level.size - 1)))
        held *= level.size
    sent = whole_bytes * (topology.size - 1) / topology.size
    messages = sum(count for _, count, _ in crossed)
    return Traffic(1, messages, sent, sent) + _nearer(crossed, topology)


_Formula = Callable[[Shape, Topology], Traffic]
_Formulas = dict[str, _Formula]
QUERY_REPLICATED: _Formulas = {"butterfly": _butterfly, "psum": _psum, "all_gather": _all_gather}
QUERY_SHARDED: _Formulas = {
    "reduce_scatter": _reduce_scatter,
    "gather_kv": _gather_kv,
    "ring": _ring,
    "ulysses": _ulysses,
    "ulysses_ring": functools.partial(_two_levels, _ring),
    "ulysses_gather_kv": functools.partial(_two_levels, _gather_kv),
}
TWO_LEVELS = ("ulysses_ring", "ulysses_gather_kv")
HEADS_SHARDED = ("ulysses", *TWO_LEVELS)
# What is only taken by its name, since nobody has timed it; the messages are those of another.
UNTIMED: _Formulas = {"fused": _butterfly}
FORMULAS = QUERY_REPLICATED | QUERY_SHARDED | UNTIMED
