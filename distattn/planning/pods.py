"""A pod by its name: chips, how they are wired, and the mesh axes that lie along them."""

import dataclasses
import math
import re
from collections.abc import Collection, Mapping

from distattn.planning.chips import CHIPS, Chip, Link
from distattn.planning.cost import Topology
from distattn.planning.network import Dimension, along

FORM = (
    "v5p:16x16x16 (a torus of chips), v5p:16x16x16*16 (16 slices of it), h100:16x8 (hosts x GPUs of "
    "each), h100:8 (one host), cpu:8 (devices) or cpu:2x4 (processes x devices of each)"
)
# The two chiplets of a tpu7x are connected six times as fast as two chips by an ICI link (Cloud, tpu7x).
BETWEEN_CHIPLETS = 6


@dataclasses.dataclass(frozen=True)
class Pod:
    """So many chips of a kind, in a shape.

    Args:
      chip: a row of `chips.CHIPS`.
      shape: TPU: chips along each dimension of the torus of a slice; else (hosts, devices of each).
      slices: of TPU, connected by the network of the data centre.
    """

    chip: Chip
    shape: tuple[int, ...]
    slices: int = 1

    @property
    def name(self) -> str:
        """As `pod` takes it."""
        slices = f"*{self.slices}" if self.slices > 1 else ""
        # One host is not counted.
        shape = self.shape[1:] if not self.torus and self.shape[0] == 1 else self.shape
        return f"{self.chip.name}:{'x'.join(map(str, shape))}{slices}"

    @property
    def chips(self) -> int:
        """In all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        """Of JAX: two for a chip of tpu7x, else one."""
        return self.chips * self.chip.devices

    @property
    def torus(self) -> tuple[int, ...]:
        """Chips along each dimension of the torus of a slice; () where a switch connects them."""
        return self.shape if self.chip.torus_rank else ()

    @property
    def hosts(self) -> int:
        """Machines; of a CPU, processes."""
        if not self.torus:
            return self.shape[0]
        return self.slices * math.ceil(math.prod(self.shape) / self.chip.per_host)

    @property
    def hbm_bytes(self) -> int | None:
        """Memory of a device; None: not known."""
        return None if self.chip.hbm_bytes is None else self.chip.hbm_bytes // self.chip.devices

    @property
    def dimensions(self) -> tuple[Dimension, ...]:
        """Of the network, slowest first, in the order of the devices."""
        chip = self.chip
        if not self.torus:
            hosts, devices = self.shape
            # A GPU has a network card of its own.
            sharers = devices if chip.platform == "cpu" else 1
            return (
                Dimension(
                    "host",
                    hosts,
                    chip.network,
                    wired=False,
                    sharers=sharers,
                    collectives=chip.network_collectives,
                ),
                Dimension("device", devices, chip.link, wired=False, collectives=chip.collectives),
            )
        sharers = min(chip.per_host, math.prod(self.torus)) * chip.devices
        found = [Dimension("slice", self.slices, chip.network, wired=False, sharers=sharers)]
        cubes = chip.torus_rank < 3 or all(size % chip.wraps_at == 0 for size in self.torus)
        for name, size in zip("xyz", self.torus, strict=False):
            closed = cubes and size % chip.wraps_at == 0
            found.append(Dimension(name, size, chip.link, True, closed, sharers=chip.devices))
        between = Link(chip.link.latency_s, BETWEEN_CHIPLETS * chip.link.bytes_per_s)
        found.append(Dimension("core", chip.devices, between, wired=False))
        return tuple(found)

    @property
    def axes(self) -> dict[str, int]:
        """A mesh axis for each dimension of more than one device, slowest first."""
        axes = {d.name: d.size for d in self.dimensions if d.size > 1}
        return axes or {self.dimensions[-1].name: 1}

    def topology(
        self,
        sharding: Mapping[str, int] | None = None,
        links: Mapping[str, Link] | None = None,
        key_axes: Collection[str] | None = None,
    ) -> Topology:
        """The devices along mesh axes.

        Args:
          sharding: sizes of the axes by name, slowest first; their product is `devices`. None: `axes`.
          links: measured, by name of axis, for each axis of more than one device; None: of the table.
          key_axes: those of the axes that are to be taken; None: all.

        Returns:
          Topology of these, with the wiring; or with the links.

        Raises:
          ValueError: axes that do not lie along the dimensions, or one without a link.
        """
        sharding = self.axes if sharding is None else sharding
        sizes = tuple(sharding.values())
        if math.prod(sizes) != self.devices:
            raise ValueError(
                f"sharding is {dict(sharding)}, {math.prod(sizes)} devices, and {self.name} has "
                f"{self.devices}; pass axes whose product is that, as {self.axes}"
            )
        wiring = dict(zip(sharding, along(self.dimensions, sizes), strict=True))
        taken = {x: n for x, n in sharding.items() if key_axes is None or x in key_axes}
        missing = [name for name, size in taken.items() if size > 1 and name not in (links or {})]
        if links is not None and missing:
            raise ValueError(
                f"links is of {tuple(links)}, and the mesh axes are {dict(sharding)}: {missing} are not "
                "measured; pass the same axes to distattn check --mesh, or a sharding with its names"
            )
        own = None
        if links is not None:
            own = tuple(links.get(name, self.chip.link) for name in taken)
        return Topology(
            self.chip.platform,
            tuple(taken.values()),
            self.hosts,
            links=own,
            chip=self.chip,
            wiring=tuple(wiring[name] for name in taken),
        )


def pod(name: str, offered: Collection[str] = tuple(CHIPS)) -> Pod:
    """The pod of a name.

    >>> pod("v5p:16x16x16*16").devices
    65536

    Args:
      name: as v5p:16x16x16, v5e:4x4, v5p:16x16x16*16, h100:16x8, cpu:8.
      offered: the chips that an error is to list.

    Returns:
      Pod.

    Raises:
      ValueError: an unknown chip, another form, or a shape that the chip does not come in.
    """
    found = re.fullmatch(r"(\w+):([1-9]\d*(?:x[1-9]\d*)*)(?:\*([1-9]\d*))?", name)
    chip = CHIPS.get(found[1]) if found else None
    if chip is None:
        raise ValueError(
            f"topology is {name!r}; it must be CHIP:SHAPE with a chip of {', '.join(offered)}: write "
            f"{FORM}"
        )
    shape: tuple[int, ...] = tuple(map(int, found[2].split("x")))
    slices = int(found[3] or 1)
    if chip.torus_rank and len(shape) != chip.torus_rank:
        raise ValueError(
            f"topology is {name!r}; a slice of {chip.name} has {chip.torus_rank} dimensions and this has "
            f"{len(shape)}: write all of them, as {chip.name}:{'x'.join('4' * chip.torus_rank)}"
        )
    if not chip.torus_rank:
        shape = (1, *shape) if len(shape) == 1 else shape
        if len(shape) > 2 or max(shape[1:]) > chip.per_host or slices > 1:
            raise ValueError(
                f"topology is {name!r}; of {chip.name} it must be hosts x devices of each, at most "
                f"{chip.per_host} a host, without slices: write {FORM}"
            )
    return Pod(chip, shape, slices)
