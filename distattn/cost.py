"""The seconds that launches, messages, bytes and merges take on a platform.

The alpha-beta model, with a launch apart from a message, because a ring is one launch of many
messages and a butterfly is many launches of one, and with the merges, which cost more than the
messages where devices are threads:

    time_s = launches * launch_s + messages * latency_s + message_bytes / bytes_per_s
           + merges * merge_s + merged_bytes / merge_bytes_per_s - hidden_s - nearer_s

The attention itself is not in it: whether the query or the keys are gathered, each of the D devices
multiplies T * S / D pairs. It only hides messages that are on their way meanwhile, those of a ring.
"""

import dataclasses
import math
import reprlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class Link:
    """A connection between two devices, in one direction."""

    latency_s: float  # one message, however small
    bytes_per_s: float

    def __post_init__(self) -> None:
        """Check the signs."""
        if not (self.latency_s >= 0 and self.bytes_per_s > 0):
            raise ValueError(
                f"latency_s is {self.latency_s}, bytes_per_s is {self.bytes_per_s}; they must be "
                ">= 0 and > 0: measure seconds of an empty message, bytes a second of a long one"
            )


def worst(links: Sequence[Link]) -> Link:
    """The longest latency and the least bandwidth of some links."""
    return Link(max(x.latency_s for x in links), min(x.bytes_per_s for x in links))


@dataclasses.dataclass(frozen=True)
class Platform:
    """A row of the table of constants."""

    link: Link
    launch_s: float  # one collective or permute, beside its messages
    merge_s: float  # merging one more state, however small
    merge_bytes_per_s: float  # of the states that are merged into one's own
    collectives: Literal["ring", "tree"]  # D - 1 or log2 D messages, twice that for an all-reduce
    flops_per_s: float  # of attention's products, on one device
    shared: bool = False  # the devices share their cores, so that D devices take D times as long


# The one table of constants, by (platform, several processes).
PLATFORMS = {
    # Threads of one process meet for each launch and then copy memory; messages cost nothing more.
    # 8 devices, 2 cores, time over pmax + two psums at 2 KiB / 130 KiB / 2 MiB: pmax + one psum
    # 0.79 / 0.81 / 1.02, butterfly 1.05 / 1.41 / 2.85, all_gather 0.96 / 4.5 / 28 (jax 0.10.2). So
    # at 2 KiB a launch is 0.27 of pmax + one psum (about 1 ms) and a merge a quarter of a launch;
    # at 2 MiB merges are about 10 times the copies (memory: 31 GB/s). Products: 175 GFLOP/s.
    ("cpu", False): Platform(Link(0.0, 3e10), 3e-5, 8e-6, 4e9, "ring", 1.75e11, shared=True),
    # Gloo over TCP on one machine, 8 processes: butterfly 6.4, all_gather 16, pmax + psum 39 ms, in
    # 3, 7 and 28 messages; 2 processes of 4 devices: 10.6, 6.8, 17.7 ms, and with 0.5 MB 26, 104
    # and 32 ms more (jax 0.10.2). Between hosts 5 ms apart each message of its rings takes 9 ms,
    # there and back: pass Link(9e-3, ...) for those.
    ("cpu", True): Platform(Link(1e-3, 5e7), 3e-4, 8e-6, 4e9, "ring", 1.75e11),
    # NCCL's model of itself (src/graph/tuning.cc): 6.8 us a collective; 0.6 us a step over NVLink,
    # 2.7 over a network; rings in a host, trees between hosts. Data sheets of H100 and InfiniBand:
    # NVLink 450 GB/s a direction, network 50 GB/s, HBM 3.35 TB/s (a merge reads two states and
    # writes one: a third). 2 us: the launch of a kernel. Products in bfloat16: 989 TFLOP/s, of which
    # FlashAttention reaches about 40 %.
    ("gpu", False): Platform(Link(6e-7, 4.5e11), 6.8e-6, 2e-6, 1.1e12, "ring", 4e14),
    ("gpu", True): Platform(Link(2.7e-6, 5e10), 6.8e-6, 2e-6, 1.1e12, "tree", 4e14),
    # v5p, "How to Scale Your Model", chapter on TPUs: ICI 1e11 B/s a link and direction, 0.5 us a
    # hop, HBM 2.8e12 B/s (a third, as above). 1 us: XLA:TPU's own estimate of a butterfly grows by
    # 9 us from 64 chips to 4096, six rounds. A torus is no tree, but along all its axes and in both
    # directions it is nearly as short. Processes of one slice share its ICI. Products in bfloat16:
    # 459 TFLOP/s, of which half is counted on.
    ("tpu", False): Platform(Link(5e-7, 1e11), 1e-6, 5e-7, 9e11, "tree", 2.3e14),
    ("tpu", True): Platform(Link(5e-7, 1e11), 1e-6, 5e-7, 9e11, "tree", 2.3e14),
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
    """

    platform: str
    sizes: tuple[int, ...]
    processes: int = 1
    link: Link | None = None
    links: tuple[Link, ...] | None = None

    def __post_init__(self) -> None:
        """Check that there are constants for it, and a link for each axis."""
        if self.links is not None and (self.link or len(self.links) != len(self.sizes)):
            raise ValueError(
                f"links is {self.links}, link is {self.link} and sizes is {self.sizes}; pass one link for "
                "each of sizes, or link alone for all of them"
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
        row = PLATFORMS[self.platform, self.processes > 1]
        crossed = zip(self.links or (), self.sizes, strict=False)
        used = [link for link, size in crossed if size > 1]
        return dataclasses.replace(row, link=worst(used) if used else self.link or row.link)

    def link_of(self, axis: int) -> Link:
        """The link along one of `sizes`."""
        return self.links[axis] if self.links else self.constants.link


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
    def flops(self) -> int:
        """Of the two products, 2 B T S N (H + V), without regard to masks."""
        pairs = self.batch * self.query_length * self.key_length * self.num_heads
        return 2 * pairs * (self.head_dim + self.value_dim)


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


def fit_link(samples: Sequence[tuple[float, float]]) -> tuple[Link, float]:
    """The link whose latency_s + bytes / bytes_per_s is nearest to what was measured.

    Least squares of the relative error, so that a small message counts as much as a large one, over
    latencies of at least 0. Where time does not grow with the size, bytes_per_s is what the largest
    message reached: no more can be said.

    Args:
      samples: (bytes, seconds) of single messages; of two sizes or more.

    Returns:
      Link, and the root of the mean square of (fitted - measured) / measured.

    Raises:
      ValueError: fewer than two sizes, or times that are not above 0.
    """
    if len({size for size, _ in samples}) < 2 or not all(t > 0 for _, t in samples):
        raise ValueError(
            f"samples is {list(samples)}; it must be (bytes, seconds) of two sizes or more, with seconds "
            "above 0: measure a small message and a large one"
        )
    weights = [(size, 1 / seconds) for size, seconds in samples]
    ww = sum(w * w for _, w in weights)
    wx = sum(w * w * x for x, w in weights)
    xx = sum((w * x) ** 2 for x, w in weights)
    w1, x1 = sum(w for _, w in weights), sum(w * x for x, w in weights)
    determinant = ww * xx - wx * wx
    latency_s = (xx * w1 - wx * x1) / determinant
    s_per_byte = (ww * x1 - wx * w1) / determinant
    if latency_s < 0:
        latency_s, s_per_byte = 0.0, x1 / xx
    largest, seconds = max(samples)
    if s_per_byte <= 0:
        latency_s, s_per_byte = w1 / ww, 0.0
    errors = [w * (latency_s + s_per_byte * x) - 1 for x, w in weights]
    residual = math.sqrt(sum(e * e for e in errors) / len(errors))
    return Link(latency_s, 1 / s_per_byte if s_per_byte else largest / seconds), residual


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
