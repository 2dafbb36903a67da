"""The cost of a strategy: its messages and merges by formula, their seconds, and the cheapest one.

The alpha-beta model, with launches apart from messages, because a ring is one launch of many messages and a
butterfly is many launches of one, and with the merges, which cost more than the messages if devices are
threads:

    time_s = launches * launch_s + sending_s - hidden_s + merges * merge_s + merged_bytes /
    merge_bytes_per_s

The attention itself is not included: whether the query or the keys are gathered, each of the D devices
computes one D-th of the (query, key) pairs. It only hides the messages of a ring.
"""

import dataclasses
import functools
import math
import reprlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from distattn.planning.chips import CHIPS, TYPICAL, Chip, Link, worst
from distattn.planning.network import (
    Dimension,
    Dimensions,
    butterfly_s,
    halving_s,
    levels,
    ring_link,
)
from distattn.planning.schedule import butterfly_round_count


@dataclasses.dataclass(frozen=True)
class Topology:
    """The devices of a call and what connects them."""

    platform: str  # "cpu", "gpu" or "tpu"
    sizes: tuple[int, ...]  # devices on each mesh axis, slowest first; () for one device
    processes: int = 1  # with several on CPUs or GPUs, messages cross a network
    links: tuple[Link, ...] | None = None  # measured, for each of `sizes`; None: those of the chip
    chip: Chip | None = None  # None: the typical chip of the platform
    # The dimensions of the network along each of `sizes`, as `network.along` returns them. None: any two
    # devices have a link of their own.
    wiring: tuple[Dimensions, ...] | None = None

    def __post_init__(self) -> None:
        """Check the platform, and that each axis has a link or dimensions."""
        for name, given in (("links", self.links), ("wiring", self.wiring)):
            if given is not None and len(given) != len(self.sizes):
                raise ValueError(
                    f"{name} is {given} and sizes is {self.sizes}; "
                    "pass one entry for each of sizes, or None"
                )
        if self.platform not in TYPICAL:
            raise ValueError(
                f"platform is {self.platform!r}; the constants are for 'cpu', 'gpu' and 'tpu': "
                "name a strategy instead of 'auto', or pass a similar platform with measured links"
            )

    @property
    def size(self) -> int:
        """Number of devices."""
        return math.prod(self.sizes)

    @property
    def constants(self) -> Chip:
        """The chip, with the link that messages cross if there is no wiring: the worst of measured ones.

        A collective along all axes at once, such as a ring, waits for the slowest of them in each step.
        """
        row = self.chip or CHIPS[TYPICAL[self.platform]]
        row = row.across_processes() if self.processes > 1 else row
        used = [link for link, size in zip(self.links or (), self.sizes, strict=False) if size > 1]
        return dataclasses.replace(row, link=worst(used)) if used else row

    @property
    def axis_dimensions(self) -> tuple[Dimensions, ...]:
        """The network along each axis."""
        if self.wiring is not None:
            return self.wiring
        row = self.constants
        links = self.links or (row.link,) * len(self.sizes)
        return tuple(
            (Dimension("", size, link, row.collectives),)
            for size, link in zip(self.sizes, links, strict=True)
        )

    @property
    def network(self) -> Dimensions:
        """The network along all axes together, for collectives that cross all of them at once."""
        if self.wiring is not None:
            return tuple(dimension for axis in self.wiring for dimension in axis)
        row = self.constants
        flat = Dimension("", self.size, row.link, row.collectives)
        return (flat,) if self.size > 1 else ()

    def take(self, axes: slice) -> "Topology":
        """Return the topology of some of the axes."""
        return dataclasses.replace(
            self,
            sizes=self.sizes[axes],
            links=self.links and self.links[axes],
            wiring=self.wiring and self.wiring[axes],
        )


@dataclasses.dataclass(frozen=True)
class Workload:
    """The sizes of an attention call over all devices, and the layers that make it."""

    batch: int  # B
    query_length: int  # T: 1 for decoding, `key_length` for a prompt or training
    key_length: int  # S
    num_heads: int  # N
    num_kv_heads: int  # K
    head_dim: int  # H
    value_dim: int  # V
    itemsize: int  # bytes per item of query, key and value
    words: int = 1  # 32-bit words per number of a state; fixed point has several
    # The queries are the last of the sequence, in an order that gives all devices equal work, such as
    # `layouts.zigzag`.
    causal: bool = False
    layers: int = 1  # counted by `plan` alone
    training: bool = False  # the backward pass too; counted by `plan` alone

    @property
    def payload_bytes(self) -> int:
        """Bytes n of the packed state of all queries, B T N (V + 2) float32 (float64 for float64)."""
        rows = self.batch * self.query_length * self.num_heads
        return max(4, self.itemsize) * self.words * rows * (self.value_dim + 2)

    @property
    def query_bytes(self) -> int:
        """Bytes of the query, B T N H items."""
        return self.itemsize * self.batch * self.query_length * self.num_heads * self.head_dim

    @property
    def out_bytes(self) -> int:
        """Bytes of the result, B T N V items."""
        return self.itemsize * self.batch * self.query_length * self.num_heads * self.value_dim

    @property
    def key_value_bytes(self) -> int:
        """Bytes of key and value, B S K (H + V) items."""
        rows = self.batch * self.key_length * self.num_kv_heads
        return self.itemsize * rows * (self.head_dim + self.value_dim)

    @property
    def pairs(self) -> int:
        """Number of attended (query, key) pairs per head: T S, minus T (T - 1) / 2 if causal."""
        if not self.causal:
            return self.query_length * self.key_length
        rows = min(self.query_length, self.key_length)  # queries before the first key see none
        return rows * self.key_length - rows * (rows - 1) // 2

    @property
    def flops(self) -> int:
        """Flops of the two matmuls, 2 B N (H + V) per pair; masks other than `causal` are not counted."""
        return 2 * self.batch * self.num_heads * self.pairs * (self.head_dim + self.value_dim)

    def with_keys(self, key_length: int) -> "Workload":
        """Return the workload over another number of keys; as many queries as keys change with them."""
        queries = key_length if self.query_length == self.key_length > 1 else self.query_length
        return dataclasses.replace(self, key_length=key_length, query_length=queries)

    def of_group(self, batch: int, heads: int) -> "Workload":
        """Return the share of each group if `batch` groups divide the sequences and `heads` the heads.

        Heads of key and value that do not divide are repeated until they do, as in a call.
        """
        return dataclasses.replace(
            self,
            batch=self.batch // batch,
            num_heads=self.num_heads // heads,
            num_kv_heads=math.lcm(self.num_kv_heads, heads) // heads,
        )


@dataclasses.dataclass(frozen=True)
class Traffic:
    """The steps of the busiest device, one after another."""

    launches: int = 0  # collectives and permutes
    messages: int = 0  # in all launches, one after another
    bytes_sent: float = 0.0  # by the device itself: it may sit out a round
    sending_s: float = 0.0  # on the links
    hidden_s: float = 0.0  # part of sending_s in which the device computes
    merges: int = 0
    merged_bytes: float = 0.0

    def __add__(self, other: "Traffic") -> "Traffic":
        """Return the traffic of both, one after the other."""
        mine, others = dataclasses.astuple(self), dataclasses.astuple(other)
        return Traffic(*(a + b for a, b in zip(mine, others, strict=True)))


def time_s(traffic: Traffic, topology: Topology) -> float:
    """Return the seconds that the traffic takes."""
    row = topology.constants
    seconds = (
        traffic.launches * row.launch_s
        + traffic.sending_s
        - traffic.hidden_s
        + traffic.merges * row.merge_s
        + traffic.merged_bytes / row.merge_bytes_per_s
    )
    return seconds * topology.size if row.shared else seconds


def links_from(report: Mapping[str, Any]) -> dict[str, Link]:
    """Return the links that `distattn check --json` has measured, by the name of the axis.

    The measured latency is that of a whole permute. Its launch, which the model counts apart, is taken off.
    If the devices share their cores, the latency is all launch, and the bandwidth is that of all devices
    together, which `time_s` divides between them.

    Args:
      report: the JSON, with "platform", "processes", "devices" and "axes".

    Returns:
      A Link for each measured axis: those of more than one device.

    Raises:
      ValueError: not a report of `distattn check`, or an unknown platform.
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


# ---------------------------------------------------------------- formulas


def gather_traffic(whole_bytes: float, topology: Topology) -> Traffic:
    """Return the traffic of the all-gather of an array that has `whole_bytes` in all."""
    held, messages, seconds = whole_bytes / topology.size, 0, 0.0
    for level in levels(topology.network):  # slowest first, while the parts are smallest
        messages += level.messages
        seconds += level.gather.seconds(held * (level.size - 1))
        held *= level.size
    sent = whole_bytes * (topology.size - 1) / topology.size
    return Traffic(1, messages, sent, seconds)


def sum_traffic(strategy: str, payload_bytes: float, topology: Topology) -> Traffic:
    """Return the traffic of the sum of an array: 'butterfly', or one all-reduce, 'psum'."""
    if strategy == "butterfly":
        rounds = sum(butterfly_round_count(size) for size in topology.sizes)
        # If a size is no power of two, the busiest device sits out the round that folds, and no device
        # merges in the round that unfolds.
        sent = sum((size - 1).bit_length() for size in topology.sizes)
        seconds = sum(butterfly_s(axis, payload_bytes) for axis in topology.axis_dimensions)
        merged = sent * payload_bytes
        return Traffic(rounds, rounds, merged, seconds, merges=sent, merged_bytes=merged)
    scatter = gather_traffic(payload_bytes, topology)  # a reduce-scatter, and as much back
    return dataclasses.replace(scatter + scatter, launches=1)


def _butterfly(w: Workload, topology: Topology) -> Traffic:
    """Send n log2 D bytes in as many launches, each along one axis."""
    return sum_traffic("butterfly", w.payload_bytes, topology)


def _psum(w: Workload, topology: Topology) -> Traffic:
    """Send 2 n (D-1)/D bytes in a pmax and a packed psum; the rescaling in between counts as a merge."""
    n = w.payload_bytes
    maxima = n / (w.value_dim + 2)
    sums = sum_traffic("psum", maxima, topology) + sum_traffic("psum", n - maxima, topology)
    return sums + Traffic(merges=1, merged_bytes=n)


def _all_gather(w: Workload, topology: Topology) -> Traffic:
    """Send n (D-1) bytes, and merge D - 1 states at once."""
    n, others = w.payload_bytes, topology.size - 1
    return gather_traffic(n * topology.size, topology) + Traffic(merges=1, merged_bytes=others * n)


def _reduce_scatter(w: Workload, topology: Topology) -> Traffic:
    """Send (query + n) (D-1)/D bytes: gather the query, and halve the states log2 D times."""
    rounds, n = (topology.size - 1).bit_length(), w.payload_bytes
    sent = n * (topology.size - 1) / topology.size
    seconds = halving_s(topology.network, n)
    halved = Traffic(rounds, rounds, sent, seconds, merges=rounds, merged_bytes=sent)
    return gather_traffic(w.query_bytes, topology) + halved


def _gather_kv(w: Workload, topology: Topology) -> Traffic:
    """Send (key + value) (D-1)/D bytes in two launches, and merge nothing."""
    each = gather_traffic(w.key_value_bytes / 2, topology)
    return each + each


def _ring(w: Workload, topology: Topology) -> Traffic:
    """Send (key + value) (D-1)/D bytes in D - 1 hops of two messages, hidden while the device computes."""
    size, hops, row = topology.size, topology.size - 1, topology.constants
    if not hops:
        return Traffic()
    sent = w.key_value_bytes * hops / size
    sending_s = ring_link(topology.network).seconds(sent, 2 * hops)
    # All but the last of D equal parts of a device's work.
    computing_s = w.flops / size * hops / size / row.attained_flops_per_s if row.overlaps else 0.0
    return Traffic(
        launches=2 * hops,
        messages=2 * hops,
        bytes_sent=sent,
        sending_s=sending_s,
        hidden_s=min(sending_s, computing_s),
        merges=hops,
        merged_bytes=hops * w.payload_bytes / size,
    )


def _ulysses(w: Workload, topology: Topology) -> Traffic:
    """Send (query + key + value + out) / D (D-1)/D bytes in three all-to-alls."""
    return _shard_heads(w, topology, topology.size)


def _shard_heads(w: Workload, topology: Topology, devices: int) -> Traffic:
    """Return the traffic from rows to heads and back over a topology that is one level of `devices`.

    Heads of keys are repeated to divide. All messages of an all-to-all travel together: one latency.
    """
    inner = topology.size
    repeated = math.lcm(w.num_kv_heads, inner) // w.num_kv_heads
    held = (w.query_bytes + repeated * w.key_value_bytes + w.out_bytes) / devices
    crossed = levels(topology.network)
    messages = 3 if crossed else 0
    seconds = sum(level.exchange.seconds(held, 3) for level in crossed)
    return Traffic(3, messages, held * (inner - 1) / inner, seconds)


def _two_levels(outer_formula: "Formula", w: Workload, topology: Topology) -> Traffic:
    """Shard heads over the last axis, then apply `outer_formula` over the others, for some heads each."""
    inner, outer = topology.take(slice(-1, None)), topology.take(slice(-1))
    group = w.of_group(batch=1, heads=inner.size)
    return _shard_heads(w, inner, topology.size) + outer_formula(group, outer)


Formula = Callable[[Workload, Topology], Traffic]
QUERY_REPLICATED: dict[str, Formula] = {
    "butterfly": _butterfly,
    "psum": _psum,
    "all_gather": _all_gather,
}
QUERY_SHARDED: dict[str, Formula] = {
    "reduce_scatter": _reduce_scatter,
    "gather_kv": _gather_kv,
    "ring": _ring,
    "ulysses": _ulysses,
    "ulysses_ring": functools.partial(_two_levels, _ring),
    "ulysses_gather_kv": functools.partial(_two_levels, _gather_kv),
}
TWO_LEVELS = ("ulysses_ring", "ulysses_gather_kv")
HEADS_SHARDED = ("ulysses", *TWO_LEVELS)
# Taken only by name, because it was never timed; its messages are those of another strategy.
UNTIMED: dict[str, Formula] = {"fused": _butterfly}
FORMULAS = QUERY_REPLICATED | QUERY_SHARDED | UNTIMED


def traffic(strategy: str, workload: Workload, topology: Topology) -> Traffic:
    """Return the traffic of the busiest device under a strategy."""
    if strategy not in FORMULAS:
        raise ValueError(f"strategy is {strategy!r}; it must be one of {tuple(FORMULAS)}: name one")
    return FORMULAS[strategy](workload, topology) if topology.size > 1 else Traffic()


def backward_traffic(strategy: str, workload: Workload, topology: Topology) -> Traffic:
    """Return the traffic of the backward pass: what the forward pass gathered, and the gradients of it.

    The gradient of a whole query is summed over the devices. The gradients of keys and values stay, or
    return in float32 the way that keys and values came.
    """
    if topology.size == 1:
        return Traffic()
    wide = dataclasses.replace(workload, itemsize=max(4, workload.itemsize))
    if strategy not in QUERY_SHARDED:
        return sum_traffic(choose_sum(wide.query_bytes, topology), wide.query_bytes, topology)
    if strategy == "reduce_scatter":
        rows_bytes = workload.query_bytes + wide.out_bytes  # queries, and cotangents of results
        return gather_traffic(rows_bytes, topology) + gather_traffic(wide.query_bytes, topology)
    return traffic(strategy, workload, topology) + traffic(strategy, wide, topology)


# ---------------------------------------------------------------- choice


@dataclasses.dataclass(frozen=True)
class Choice:
    """The cheapest strategy, and the predicted cost of all."""

    strategy: str
    predicted_s: float  # movement and merges; the attention itself is not included
    alternatives: tuple[tuple[str, float], ...]  # (strategy, seconds), the next best first


def fits(strategy: str, workload: Workload, topology: Topology) -> bool:
    """Return whether there are enough levels, and heads, for a strategy that shards heads."""
    if strategy not in HEADS_SHARDED:
        return True
    if strategy == "ulysses":
        return workload.num_heads % topology.size == 0
    return len(topology.sizes) > 1 and workload.num_heads % topology.sizes[-1] == 0


def choose(
    workload: Workload,
    topology: Topology,
    *,
    query_sharded: bool,
    candidates: Iterable[str] | None = None,
) -> Choice:
    """Return the strategy with the least `time_s`, the first of equals.

    Only movement and merges are compared, because the attention is the same work under all strategies.
    Memory is not compared: 'gather_kv' holds all keys and values on every device.

    Args:
      workload: sizes over all devices of the call.
      topology: the devices, and what connects them.
      query_sharded: whether the query is sharded along T over these devices, or replicated.
      candidates: strategies to choose from; None: all that fit. For a replicated query these are
        'butterfly', 'psum' and 'all_gather'; for a sharded one 'reduce_scatter', 'gather_kv', 'ring', if
        the heads divide 'ulysses', and with two axes or more 'ulysses_ring' and 'ulysses_gather_kv'.

    Raises:
      ValueError: no candidates, or one that does not fit.
    """
    known = QUERY_SHARDED if query_sharded else QUERY_REPLICATED
    fitting = tuple(name for name in known if fits(name, workload, topology))
    names = fitting if candidates is None else tuple(candidates)
    if not names or not set(names) <= set(fitting):
        raise ValueError(
            f"candidates is {names}; for query_sharded={query_sharded} they must be some of "
            f"{fitting}: name one or more of these, or pass None for all"
        )
    seconds = {name: time_s(traffic(name, workload, topology), topology) for name in names}
    best, *others = sorted(names, key=lambda name: seconds[name])  # stable
    return Choice(best, seconds[best], tuple((name, seconds[name]) for name in others))


def choose_sum(payload_bytes: float, topology: Topology) -> str:
    """Return the faster way to sum an array over devices: 'psum', one all-reduce, or 'butterfly'."""
    names = ("psum", "butterfly")
    return min(names, key=lambda name: time_s(sum_traffic(name, payload_bytes, topology), topology))
