"""The seconds that launches, messages, bytes and merges take on a platform.

The alpha-beta model, with a launch apart from a message, because a ring is one launch of many
messages and a butterfly is many launches of one, and with the merges, which cost more than the
messages where devices are threads:

    time_s = launches * launch_s + messages * latency_s + message_bytes / bytes_per_s
           + merges * merge_s + merged_bytes / merge_bytes_per_s - hidden_s - nearer_s

The attention itself is not in it: whether the query or the keys are gathered, each of the D devices
multiplies one D-th of the pairs of a query and a key. It only hides messages that are on their way
meanwhile, those of a ring.

What a strategy makes the busiest device do: launches, messages, bytes and merges, by formula.

Choose the strategy that moves a call's states, or its keys, in the least time; and say why.
"""

import collections
import dataclasses
import functools
import math
import reprlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from distattn.planning.chips import CHIPS, TYPICAL, Chip, Collectives, Link, worst
from distattn.planning.network import (
    Axis,
    butterfly_links,
    levels,
    ring_link,
    round_link,
    shift_link,
)
from distattn.planning.schedule import Schedule, butterfly_round_count, halving
from distattn.planning.text import bytes_text, count_text, seconds_text


@dataclasses.dataclass(frozen=True)
class Platform:
    """What `time_s` counts with, of the devices of a kind."""

    link: Link
    launch_s: float  # one collective or permute, beside its messages
    merge_s: float  # merging one more state, however small
    merge_bytes_per_s: float  # of the states that are merged into one's own
    collectives: Collectives  # D - 1 or log2 D messages, twice that for an all-reduce
    flops_per_s: float  # of attention's products, on one device
    shared: bool = False  # the devices share their cores, so that D devices take D times as long
    overlaps: bool = True  # a message travels while something else is computed


def constants_of(chip: Chip, *, network: bool = False) -> Platform:
    """The constants of devices of a chip; `network`: those of several processes, where it says so."""
    crosses = network and not chip.torus_rank  # processes of one slice share its ICI
    return Platform(
        link=chip.network if crosses else chip.link,
        launch_s=chip.network_launch_s if crosses and chip.network_launch_s else chip.launch_s,
        merge_s=chip.merge_s,
        merge_bytes_per_s=chip.merge_bytes_per_s,
        collectives=chip.network_collectives if crosses else chip.collectives,
        flops_per_s=chip.attained_flops_per_s,
        shared=chip.shared and not network,
        overlaps=chip.overlaps,
    )


# Constants by (platform, several processes), of a typical chip where no other is known.
PLATFORMS = {
    (platform, several): constants_of(CHIPS[name], network=several)
    for platform, name in TYPICAL.items()
    for several in (False, True)
}


@dataclasses.dataclass(frozen=True)
class Topology:
    """The devices that take part, and what connects them.

    Args:
      platform: 'cpu', 'gpu' or 'tpu'.
      sizes: devices on each mesh axis that takes part, slowest axis first; () for one device.
      processes: of the job. Several on a CPU or GPU: messages cross a network.
      link: a measured one, in place of the table's, for all axes.
      links: a measured one for each of `sizes`, instead of `link`.
      chip: a row of the table, in place of the typical one of the platform.
      wiring: for each of `sizes` the stretches of the network that it lies along, as `wiring.along` finds
        them; how far messages go, and how many share a link, follows. None: any two devices have a link
        to themselves. A measured link counts instead.
    """

    platform: str
    sizes: tuple[int, ...]
    processes: int = 1
    link: Link | None = None
    links: tuple[Link, ...] | None = None
    chip: Chip | None = None
    wiring: tuple[Axis, ...] | None = None

    def __post_init__(self) -> None:
        """Check that there are constants for it, and a link or stretches for each axis."""
        if self.links is not None and (self.link or len(self.links) != len(self.sizes)):
            raise ValueError(
                f"links is {self.links}, link is {self.link} and sizes is {self.sizes}; pass one link for "
                "each of sizes, or link alone for all of them"
            )
        wired = self.sizes if self.wiring is None else tuple(map(_places, self.wiring))
        if wired != self.sizes:
            raise ValueError(
                f"wiring is of axes of {wired} devices and sizes is {self.sizes}; they must agree: pass "
                "what wiring.along(dimensions, sizes) gives, or None"
            )
        if (self.platform, self.processes > 1) not in PLATFORMS:
            raise ValueError(
                f"platform is {self.platform!r}; the constants are for 'cpu', 'gpu' and 'tpu': "
                "name a strategy instead of 'auto', or pass a similar platform with a measured link"
            )

    @property
    def size(self) -> int:
        """Number of devices."""
        return math.prod(self.sizes)

    @property
    def constants(self) -> Platform:
        """Its row of the table, with the measured link if there is one: of several, the worst of all.

        What runs along all axes at once, such as a ring, waits for the slowest in each of its steps.
        """
        several = self.processes > 1
        row = PLATFORMS[self.platform, several]
        if self.chip is not None:
            row = constants_of(self.chip, network=several)
        crossed = zip(self.links or (), self.sizes, strict=False)
        used = [link for link, size in crossed if size > 1]
        return dataclasses.replace(row, link=worst(used) if used else self.link or row.link)

    @property
    def wired(self) -> tuple[Axis, ...] | None:
        """The wiring, where no measured link stands in for it."""
        return None if self.link or self.links else self.wiring

    @property
    def stretches(self) -> Axis:
        """Of all axes, slowest first."""
        return tuple(stretch for axis in self.wiring or () for stretch in axis)

    def link_of(self, axis: int) -> Link:
        """The link along one of `sizes`."""
        return self.links[axis] if self.links else self.constants.link


def _places(axis: Axis) -> int:
    return math.prod(stretch.size for stretch in axis)


@dataclasses.dataclass(frozen=True)
class Shape:
    """The sizes of one call, over all devices that take part."""

    batch: int
    query_length: int
    key_length: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    itemsize: int  # bytes of an item of query, key and value
    words: int = 1  # of a number of a state: in fixed point it has several, of int32
    # The queries are the last of the sequence, in an order in which all devices have the same work.
    causal: bool = False

    @property
    def payload_bytes(self) -> int:
        """The packed state of all queries, B T N (V + 2) float32 (float64 for float64): n."""
        rows = self.batch * self.query_length * self.num_heads
        return max(4, self.itemsize) * self.words * rows * (self.value_dim + 2)

    @property
    def query_bytes(self) -> int:
        """The query, B T N H items."""
        rows = self.batch * self.query_length * self.num_heads
        return self.itemsize * rows * self.head_dim

    @property
    def out_bytes(self) -> int:
        """The result, B T N V items."""
        rows = self.batch * self.query_length * self.num_heads
        return self.itemsize * rows * self.value_dim

    @property
    def key_value_bytes(self) -> int:
        """Key and value, B S K (H + V) items."""
        rows = self.batch * self.key_length * self.num_kv_heads
        return self.itemsize * rows * (self.head_dim + self.value_dim)

    @property
    def pairs(self) -> int:
        """Of a query and a key that it attends to, in one head: T S, and if causal T (T - 1) / 2 fewer."""
        if not self.causal:
            return self.query_length * self.key_length
        rows = min(self.query_length, self.key_length)  # queries before the first key see none
        return rows * self.key_length - rows * (rows - 1) // 2

    @property
    def flops(self) -> int:
        """Of the two products, 2 B N (H + V) for each pair, without regard to other masks."""
        return 2 * self.batch * self.num_heads * self.pairs * (self.head_dim + self.value_dim)


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What happens one after another on the device that is busiest."""

    launches: int = 0  # collectives and permutes
    messages: int = 0  # of all launches
    message_bytes: float = 0.0  # of these messages
    bytes_sent: float = 0.0  # those that it sends itself: it may sit out a round
    merges: int = 0
    merged_bytes: float = 0.0
    hidden_s: float = 0.0  # of the messages, while something else is computed
    nearer_s: float = 0.0  # of the messages, by which their axes' links are faster than the worst

    def __add__(self, other: "Traffic") -> "Traffic":
        """First one, then the other."""
        mine, others = dataclasses.astuple(self), dataclasses.astuple(other)
        return Traffic(*(a + b for a, b in zip(mine, others, strict=True)))


def time_s(traffic: Traffic, topology: Topology) -> float:
    """Seconds that the traffic takes there."""
    row = topology.constants
    seconds = (
        traffic.launches * row.launch_s
        + traffic.messages * row.link.latency_s
        + traffic.message_bytes / row.link.bytes_per_s
        - traffic.hidden_s
        - traffic.nearer_s
        + traffic.merges * row.merge_s
        + traffic.merged_bytes / row.merge_bytes_per_s
    )
    return seconds * topology.size if row.shared else seconds


def links_from(report: Mapping[str, Any]) -> dict[str, Link]:
    """The links of a `Topology`, by the name of the axis, from what `distattn check --json` measured.

    There the latency is that of a whole permute, and the model counts its launch apart: it is taken off.
    Where the devices share their cores, a launch is all there is to a permute, and the bandwidth that is
    shared between the devices counts whole, as `time_s` divides it between them.

    Args:
      report: the JSON, with 'platform', 'processes', 'devices' and 'axes'.

    Returns:
      A Link for each axis that was measured: those of more than one device.

    Raises:
      ValueError: no such report, or of an unknown platform.
    """
    try:
        platform, processes = report["platform"], report["processes"]
        row = Topology(platform, (), processes).constants
        shared = report["devices"] if row.shared else 1
        return {
            name: Link(
                0.0 if row.shared else max(0.0, axis["latency_s"] - row.launch_s),
                axis["bytes_per_s"] * shared,
            )
            for name, axis in report["axes"].items()
        }
    except (KeyError, TypeError, AttributeError):
        raise ValueError(
            f"report is {reprlib.repr(report)}; it must have platform, processes, devices and axes: pass "
            "what distattn check --json has written"
        ) from None


def traffic(strategy: str | Schedule, shape: Shape, topology: Topology) -> Traffic:
    """What a strategy, by name or as a schedule of that many devices, costs on each device."""
    if isinstance(strategy, Schedule):
        if strategy.size != topology.size:
            raise ValueError(
                f"strategy is a schedule for {strategy.size} devices; it must be for the "
                f"{topology.size} of the topology {topology.sizes}: build it for {topology.size}"
            )
        return _schedule(strategy, shape, topology)
    if strategy not in FORMULAS:
        raise ValueError(
            f"strategy is {strategy!r}; it must be a Schedule or one of {tuple(FORMULAS)}: name one"
        )
    return FORMULAS[strategy](shape, topology) if topology.size > 1 else Traffic()


def fits(strategy: str, shape: Shape, topology: Topology) -> bool:
    """Whether there are enough levels, and heads, for a strategy that shards heads."""
    if strategy not in HEADS_SHARDED:
        return True
    if strategy == "ulysses":
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


def sum_traffic(strategy: str, payload_bytes: int, topology: Topology) -> Traffic:
    """What the sum of an array on each device costs: by 'butterfly', or by one all-reduce, 'psum'."""
    if strategy == "butterfly":
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


@dataclasses.dataclass(frozen=True)
class Choice:
    """A strategy, what it is predicted to cost, and what the others would."""

    strategy: str
    predicted_s: float  # of the movement and the merges; the attention itself is not in it
    bytes_sent: float  # by the device that sends most
    alternatives: tuple[tuple[str, float], ...]  # (strategy, seconds), the next best first
    reason: str


def choose(
    shape: Shape,
    topology: Topology,
    *,
    query_sharded: bool,
    candidates: Iterable[str] | None = None,
) -> Choice:
    """The fastest strategy by `cost.time_s`; of equals the first.

    Only movement and merges are compared, because the attention is the same work under all: whether
    queries or keys are gathered, D devices share its pairs. Memory is not compared: 'gather_kv'
    holds all keys and values on every device.

    Args:
      shape: sizes over all devices that take part.
      topology: the devices, and what connects them.
      query_sharded: whether the query is sharded along T over these devices, or replicated.
      candidates: names to choose among; None for all that fit the query:
        'butterfly', 'psum', 'all_gather' if replicated; 'reduce_scatter', 'gather_kv', 'ring' if
        sharded, and, where the heads divide, 'ulysses', and with two levels or more 'ulysses_ring' and
        'ulysses_gather_kv'.

    Returns:
      Choice.

    Raises:
      ValueError: no candidates, or one that does not fit.
    """
    known = QUERY_SHARDED if query_sharded else QUERY_REPLICATED
    fitting = tuple(name for name in known if fits(name, shape, topology))
    names = tuple(fitting if candidates is None else candidates)
    if not names or not set(names) <= set(fitting):
        raise ValueError(
            f"candidates is {names}; for query_sharded={query_sharded} they must be some of "
            f"{fitting}: name one or more of these, or pass None for all"
        )
    amounts = {name: traffic(name, shape, topology) for name in names}
    seconds = {name: time_s(amounts[name], topology) for name in names}
    best, *others = sorted(names, key=lambda name: seconds[name])  # stable
    alternatives = tuple((name, seconds[name]) for name in others)
    return Choice(
        strategy=best,
        predicted_s=seconds[best],
        bytes_sent=amounts[best].bytes_sent,
        alternatives=alternatives,
        reason=_reason(best, seconds[best], amounts[best], alternatives, topology),
    )


def choose_sum(payload_bytes: int, topology: Topology) -> str:
    """How an array is summed over devices in the least time: 'psum', one all-reduce, or 'butterfly'."""
    names = ("psum", "butterfly")
    return min(names, key=lambda name: time_s(sum_traffic(name, payload_bytes, topology), topology))


def _reason(
    best: str,
    seconds: float,
    amounts: Traffic,
    alternatives: tuple[tuple[str, float], ...],
    topology: Topology,
) -> str:
    if topology.size == 1:
        return f"{best}: one device, nothing moves"
    sent = f"{bytes_text(amounts.bytes_sent)} a device in {count_text(amounts.messages, 'message')}"
    work = f"{sent} of {count_text(amounts.launches, 'launch', 'launches')}"
    others = ", ".join(f"{name} {seconds_text(s)}" for name, s in alternatives)
    where = f"{topology.size} {topology.platform} devices"
    compared = f"against {others}" if others else "the only candidate"
    return f"{best} on {where}: {work}, {seconds_text(seconds)}; {compared}"
