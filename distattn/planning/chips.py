"""The table of chips: memory, flops and links, each constant with its source.

Sources: "Book" is "How to Scale Your Model" (jax-ml.github.io/scaling-book). "Cloud" is the page of the
chip at docs.cloud.google.com/tpu/docs. "NCCL" is its own model of itself (src/graph/tuning.cc). "DGX" and
"GPU" are NVIDIA's data sheets of a system and of a chip.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Link:
    """A connection between two devices, in one direction."""

    latency_s: float  # per message, however small
    bytes_per_s: float

    def __post_init__(self) -> None:
        """Check the signs."""
        if not (self.latency_s >= 0 and self.bytes_per_s > 0):
            raise ValueError(
                f"latency_s is {self.latency_s}, bytes_per_s is {self.bytes_per_s}; they must be "
                ">= 0 and > 0: pass the seconds of an empty message and the bytes per second of a long one"
            )

    def seconds(self, sent_bytes: float, messages: float = 1) -> float:
        """Return the seconds of messages that follow one another and have these bytes in all."""
        return messages * self.latency_s + sent_bytes / self.bytes_per_s


def worst(links: Sequence[Link]) -> Link:
    """Return the longest latency and the lowest bandwidth of some links."""
    return Link(max(x.latency_s for x in links), min(x.bytes_per_s for x in links))


def fit_link(samples: Sequence[tuple[float, float]]) -> tuple[Link, float]:
    """Return the link whose latency_s + bytes / bytes_per_s is nearest to the measured times.

    The fit minimises the squared relative error, so that small messages count as much as large ones. If
    time does not grow with size, `bytes_per_s` is the bandwidth that the largest message reached.

    Args:
      samples: (bytes, seconds) of single messages, of two sizes or more.

    Returns:
      Link, and the root mean square of (fitted - measured) / measured.

    Raises:
      ValueError: fewer than two sizes, or a time that is not above 0.
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


Collectives = Literal["ring", "tree"]


@dataclasses.dataclass(frozen=True)
class Chip:
    """A row of the table. The JAX devices of one chip share its memory, flops and links."""

    name: str
    platform: str  # "cpu", "gpu" or "tpu"
    hbm_bytes: int | None  # None: not known
    hbm_bytes_per_s: float
    flops_per_s: float  # bfloat16, dense, peak
    attained: float  # share of flops_per_s that attention reaches
    link: Link  # TPU: one hop over one ICI link; GPU: NVLink; CPU: memory
    network: Link  # TPU: the DCN of a host, between slices; GPU: InfiniBand of one GPU; CPU: TCP
    launch_s: float  # per collective or permute, without its messages
    merge_s: float  # per merge of one more state, however small
    per_host: int  # most chips of a host
    collectives: Collectives  # D - 1 or log2 D messages over `link`, twice that for an all-reduce
    network_collectives: Collectives
    torus_rank: int = 0  # dimensions of the ICI torus; 0: a switch connects the chips of a host
    wraps_at: int = 1  # a torus dimension is closed if its size is a multiple
    devices: int = 1  # JAX devices of a chip
    # A merge reads two states and writes one: a third of the bandwidth.
    merge_share: float = 1 / 3
    network_launch_s: float | None = None  # None: launch_s
    shared: bool = False  # all devices share the cores of one host
    overlaps: bool = True  # messages travel while the device computes

    @property
    def merge_bytes_per_s(self) -> float:
        """Bytes of states that a device merges per second."""
        return self.hbm_bytes_per_s * self.merge_share / self.devices

    @property
    def attained_flops_per_s(self) -> float:
        """Flops per second that attention reaches on one device."""
        return self.flops_per_s * self.attained / self.devices

    def across_processes(self) -> "Chip":
        """Return the chip with the network as its link, unless an ICI torus connects the processes."""
        if self.torus_rank:
            return self
        return dataclasses.replace(
            self,
            link=self.network,
            launch_s=self.network_launch_s or self.launch_s,
            collectives=self.network_collectives,
            shared=False,
        )


GIB = 1 << 30
# Book, chapter 2, problem 5: half a microsecond per hop, for v5e. No other figure is published.
HOP_S = 5e-7
# Between slices: no published figure. Ten microseconds is an assumption (two network cards and some
# switches of a data centre). Pass links measured by `distattn check` if it matters.
DCN_S = 1e-5


def _tpu(
    name: str,
    hbm_bytes: int,
    hbm_bytes_per_s: float,
    flops_per_s: float,
    ici_bytes_per_s: float,
    dcn_bytes_per_s: float,
    per_host: int,
    torus_rank: int,
    devices: int = 1,
) -> Chip:
    return Chip(
        name=name,
        platform="tpu",
        hbm_bytes=hbm_bytes,
        hbm_bytes_per_s=hbm_bytes_per_s,
        flops_per_s=flops_per_s,
        attained=0.5,  # assumed, not measured here
        link=Link(HOP_S, ici_bytes_per_s),
        network=Link(DCN_S, dcn_bytes_per_s),
        # XLA:TPU's own estimate of a butterfly on v5p grows by 9 us from 64 chips to 4096, six rounds:
        # 1.5 us each, of which two thirds are the launch.
        launch_s=1e-6,
        merge_s=5e-7,
        per_host=per_host,
        # A torus is no tree, but along all its axes and in both directions it is nearly as short.
        collectives="tree",
        network_collectives="tree",
        torus_rank=torus_rank,
        # Book, chapter 2, note to the table of ICI: closed if an axis is a multiple of 4 on training chips,
        # and of 16 on the others. Cloud, v5p: full tori from one cube of 4x4x4 on.
        wraps_at=4 if torus_rank == 3 else 16,
        devices=devices,
    )


def _gpu(
    name: str,
    hbm_bytes: int,
    hbm_bytes_per_s: float,
    flops_per_s: float,
    nvlink_bytes_per_s: float,
    network_bytes_per_s: float,
) -> Chip:
    return Chip(
        name=name,
        platform="gpu",
        hbm_bytes=hbm_bytes,
        hbm_bytes_per_s=hbm_bytes_per_s,
        flops_per_s=flops_per_s,
        attained=0.4,  # about: FlashAttention-2 reaches 35 % on an H100 (arXiv 2407.08608, abstract)
        # NCCL: 0.6 us per step over NVLink, 2.7 over a network; 6.8 us per collective; rings in a host,
        # trees between hosts.
        link=Link(6e-7, nvlink_bytes_per_s),
        network=Link(2.7e-6, network_bytes_per_s),
        launch_s=6.8e-6,
        merge_s=2e-6,  # the launch of a kernel
        per_host=8,  # DGX, HGX
        collectives="ring",
        network_collectives="tree",
    )


_CPU = Chip(
    # Threads of one process meet for each launch and then copy memory; messages cost nothing more.
    # 8 devices, 2 cores, time over pmax + two psums at 2 KiB / 130 KiB / 2 MiB: pmax + one psum
    # 0.79 / 0.81 / 1.02, butterfly 1.05 / 1.41 / 2.85, all_gather 0.96 / 4.5 / 28 (jax 0.10.2). So
    # at 2 KiB a launch is 0.27 of pmax + one psum (about 1 ms) and a merge a quarter of a launch;
    # at 2 MiB merges are about 10 times the copies (memory: 31 GB/s). Matmuls: 175 GFLOP/s.
    # Network: Gloo over TCP on one machine, 8 processes: butterfly 6.4, all_gather 16, pmax + psum
    # 39 ms, in 3, 7 and 28 messages; 2 processes of 4 devices: 10.6, 6.8, 17.7 ms, and with 0.5 MB
    # 26, 104 and 32 ms more (jax 0.10.2). Between hosts 5 ms apart each message of its rings takes
    # 9 ms, there and back: pass Link(9e-3, ...) for those.
    name="cpu",
    platform="cpu",
    hbm_bytes=None,
    hbm_bytes_per_s=3e10,
    flops_per_s=1.75e11,
    attained=1.0,
    link=Link(0.0, 3e10),
    network=Link(1e-3, 5e7),
    launch_s=3e-5,
    merge_s=8e-6,
    per_host=1 << 16,
    collectives="ring",
    network_collectives="ring",
    merge_share=4 / 30,
    network_launch_s=3e-4,
    shared=True,
    overlaps=False,  # XLA:CPU has no collective in two halves: it waits for each
)
_ROWS = (
    _CPU,
    # TPU: bytes of HBM, HBM bytes/s, flops/s, bytes/s of an ICI link, of a host's DCN, chips per host,
    # torus rank. Cloud, v4: 32 GiB, 1200 GB/s, 275 TFLOP/s. Book, chapter 2: ICI, DCN of a host, 4 chips a
    # host.
    _tpu("v4", 32 * GIB, 1.2e12, 2.75e14, 4.5e10, 2.5e10, 4, 3),
    # Cloud, v5e: 16 GB, 819 GB/s, 197 TFLOP/s, 400 GB/s over 4 ICI ports both ways, two cards of 100 Gb/s
    # for a host of 8 chips.
    _tpu("v5e", 16 * 10**9, 8.19e11, 1.97e14, 5e10, 2.5e10, 8, 2),
    # Cloud, v5p: 95 GiB to use, 2765 GB/s, 459 TFLOP/s, 1200 GB/s over 6 ICI ports both ways, DCN 50 Gb/s a
    # chip, 4 chips a host.
    _tpu("v5p", 95 * GIB, 2.765e12, 4.59e14, 1e11, 2.5e10, 4, 3),
    # Cloud, v6e: 32 GB, 1638 GB/s, 918 TFLOP/s, 800 GB/s over 4 ICI ports both ways, 8 chips a host; tpu7x,
    # its table of generations: DCN 100 Gb/s a chip.
    _tpu("v6e", 32 * 10**9, 1.638e12, 9.18e14, 1e11, 1e11, 8, 2),
    # Cloud, tpu7x: 192 GiB, 7380 GB/s, 2307 TFLOP/s, 1200 GB/s both ways (6 ICI ports as of v5p), DCN 100
    # Gb/s a chip, 4 chips a host; two chiplets, which are two JAX devices.
    _tpu("tpu7x", 192 * GIB, 7.38e12, 2.307e15, 1e11, 5e10, 4, 3, devices=2),
    # GPU: bytes of HBM, HBM bytes/s, flops/s, bytes/s of NVLink, of the network.
    # GPU, A100 80GB SXM: 2039 GB/s, 312 TFLOP/s, NVLink 600 GB/s both ways. DGX A100: 200 Gb/s a GPU.
    _gpu("a100", 80 * 10**9, 2.039e12, 3.12e14, 3e11, 2.5e10),
    # GPU, H100 SXM: 3.35 TB/s, 989 TFLOP/s, NVLink 900 GB/s both ways. DGX H100: 400 Gb/s a GPU.
    _gpu("h100", 80 * 10**9, 3.35e12, 9.89e14, 4.5e11, 5e10),
    # GPU, H200 SXM: 141 GB, 4.8 TB/s, all else as of the H100.
    _gpu("h200", 141 * 10**9, 4.8e12, 9.89e14, 4.5e11, 5e10),
    # DGX B200: 1440 GB and 64 TB/s in 8 GPUs, NVLink 1.8 TB/s both ways, 400 Gb/s a GPU. Book, chapter on
    # GPUs: 2250 TFLOP/s, 8 TB/s.
    _gpu("b200", 180 * 10**9, 8e12, 2.25e15, 9e11, 5e10),
)
CHIPS = {chip.name: chip for chip in _ROWS}
# The chip of a platform if no more is known.
TYPICAL = {"cpu": "cpu", "gpu": "h100", "tpu": "v5p"}
# JAX's names (`device_kind`): a whole name for a TPU, one word of it for a GPU.
_KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5e": "v5e",
    "TPU v5": "v5p",
    "TPU v5p": "v5p",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7x",
}


def chip_of(device_kind: str) -> Chip | None:
    """Return the chip that JAX calls so, or None if the table has none."""
    if device_kind in _KINDS:
        return CHIPS[_KINDS[device_kind]]
    words = device_kind.lower().replace("-", " ").split()
    return next((CHIPS[x] for x in words if x in CHIPS and CHIPS[x].platform == "gpu"), None)
