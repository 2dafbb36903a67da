"""A pod by its name: chips, their network, and the mesh axes along it."""

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
    """Chips of one kind, in a shape."""

    chip: Chip
    shape: tuple[int, ...]  # TPU: chips along the torus of a slice; else (hosts, devices of each)
    slices: int = 1  # TPU slices, connected by the network of the data centre

    @property
    def name(self) -> str:
        """The name that `pod` takes."""
        slices = f"*{self.slices}" if self.slices > 1 else ""
        # A single host is left out.
        shape = self.shape[1:] if not self.torus and self.shape[0] == 1 else self.shape
        return f"{self.chip.name}:{'x'.join(map(str, shape))}{slices}"

    @property
    def devices(self) -> int:
        """Number of JAX devices: two per chip of tpu7x, otherwise one."""
        return math.prod(self.shape) * self.slices * self.chip.devices

    @property
    def torus(self) -> tuple[int, ...]:
        """Chips along each dimension of the torus of a slice; () if a switch connects them."""
        return self.shape if self.chip.torus_rank else ()

    @property
    def hosts(self) -> int:
        """Number of machines; on a CPU, of processes."""
        if not self.torus:
            return self.shape[0]
        return self.slices * math.ceil(math.prod(self.shape) / self.chip.per_host)

    @property
    def hbm_bytes(self) -> int | None:
        """Memory of a device; None: not known."""
        return None if self.chip.hbm_bytes is None else self.chip.hbm_bytes // self.chip.devices

    @property
    def dimensions(self) -> tuple[Dimension, ...]:
        """The network, slowest dimension first, in the order of the devices."""
        chip = self.chip
        if not self.torus:
            hosts, devices = self.shape
            sharers = devices if chip.platform == "cpu" else 1  # each GPU has its own network card
            return (
                Dimension("host", hosts, chip.network, chip.network_collectives, sharers=sharers),
                Dimension("device", devices, chip.link, chip.collectives),
            )
        sharers = min(chip.per_host, math.prod(self.torus)) * chip.devices
        cubes = chip.torus_rank < 3 or all(size % chip.wraps_at == 0 for size in self.torus)
        hop = Link(chip.link.latency_s, chip.link.bytes_per_s / chip.devices)
        chiplets = Link(chip.link.latency_s, BETWEEN_CHIPLETS * chip.link.bytes_per_s)
        return (
            Dimension("slice", self.slices, chip.network, "tree", sharers=sharers),
            *(
                Dimension(name, size, hop, "torus", closed=cubes and size % chip.wraps_at == 0)
                for name, size in zip("xyz", self.torus, strict=False)
            ),
            Dimension("core", chip.devices, chiplets, "tree"),
        )

    @property
    def axes(self) -> dict[str, int]:
        """A mesh axis for each dimension of more than one device, slowest first."""
        axes = {d.name: d.size for d in self.dimensions if d.size > 1}
        return axes or {self.dimensions[-1].name: 1}

    def topology(
        self,
        mesh: Mapping[str, int] | None = None,
        links: Mapping[str, Link] | None = None,
        key_axes: Collection[str] | None = None,
    ) -> Topology:
        """Return the devices along mesh axes, with the network of the pod or with measured links.

        Args:
          mesh: sizes of the axes by name, slowest first; their product is `devices`. None: `axes`.
          links: measured links by axis, for each axis of more than one device; None: those of the table.
          key_axes: the axes to take; None: all.

        Raises:
          ValueError: axes that do not fit the dimensions, or an axis without a link.
        """
        mesh = self.axes if mesh is None else mesh
        sizes = tuple(mesh.values())
        if math.prod(sizes) != self.devices:
            raise ValueError(
                f"mesh is {dict(mesh)}, {math.prod(sizes)} devices, and {self.name} has {self.devices}; "
                f"pass axes whose product is that, as {self.axes}"
            )
        wiring = dict(zip(mesh, along(self.dimensions, sizes), strict=True))
        taken = {x: n for x, n in mesh.items() if key_axes is None or x in key_axes}
        missing = [name for name, size in taken.items() if size > 1 and name not in (links or {})]
        if links is not None and missing:
            raise ValueError(
                f"links is for {tuple(links)}, and the mesh axes are {dict(mesh)}: {missing} are not "
                "measured; pass the same axes to distattn check --mesh, or a mesh with its names"
            )
        return Topology(
            self.chip.platform,
            tuple(taken.values()),
            self.hosts,
            links=None if links is None else tuple(links.get(x, self.chip.link) for x in taken),
            chip=self.chip,
            wiring=tuple(wiring[name] for name in taken) if links is None else None,
        )


def pod(name: str, offered: Collection[str] = tuple(CHIPS)) -> Pod:
    """Return the pod of a name.

    >>> pod("v5p:16x16x16*16").devices
    65536

    Args:
      name: such as v5p:16x16x16, v5e:4x4, v5p:16x16x16*16, h100:16x8, cpu:8.
      offered: the chips that an error lists.

    Raises:
      ValueError: an unknown chip, another form, or a shape that the chip does not come in.
    """
    found = re.fullmatch(r"(\w+):([1-9]\d*(?:x[1-9]\d*)*)(?:\*([1-9]\d*))?", name)
    chip = CHIPS.get(found[1]) if found else None
    if chip is None:
        raise ValueError(
            f"topology is {name!r}; it must be CHIP:SHAPE with a chip of {', '.join(offered)}: write {FORM}"
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
                f"topology is {name!r}; {chip.name} takes hosts x devices of each, at most "
                f"{chip.per_host} per host, without slices: write {FORM}"
            )
    return Pod(chip, shape, slices)
