"""The seconds that launches, messages, bytes and merges take on a platform.

The alpha-beta model, with a launch apart from a message, because a ring is one launch of many
messages and a butterfly is many launches of one, and with the merges, which cost more than the
messages where devices are threads:

    time_s = launches * launch_s + messages * latency_s + message_bytes / bytes_per_s
           + merges * merge_s + merged_bytes / merge_bytes_per_s - hidden_s - nearer_s

The attention itself is not in it: whether the query or the keys are gathered, each of the D devices
multiplies one D-th of the pairs of a query and a key. It only hides messages that are on their way
meanwhile, those of a ring.
"""

import dataclasses
import math
import reprlib
from collections.abc import Mapping
from typing import Any

from distattn.chips import CHIPS, TYPICAL, Chip, Collectives
from distattn.link import Link, worst
from distattn.wiring import Axis


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
                "name a combine instead of 'auto', or pass a similar platform with a measured link"
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
