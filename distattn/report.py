"""What is known of a program that was compiled, or lowered, for devices that are not here."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from typing import Any

from jax.sharding import AbstractMesh, Mesh

from distattn.hlo import Program


@dataclasses.dataclass(frozen=True)
class Exchange:
    """All collectives of one kind along the same axes, in one run of a program."""

    kind: str
    axes: tuple[str, ...]
    count: int
    bytes: int  # of what they leave on one device


@dataclasses.dataclass(frozen=True)
class Report:
    """What a program sends, holds and computes. Sizes are those of one device."""

    target: str  # the topology, or the platform and the mesh
    devices: int
    exchanges: tuple[Exchange, ...]
    rounds: int  # collectives that wait for one another
    argument_bytes: int | None = None  # from here on None where it was not compiled
    output_bytes: int | None = None
    temp_bytes: int | None = None
    flops: float | None = None  # XLA's count, the body of a loop once; None where it says nothing
    accessed_bytes: float | None = None  # of memory
    optimal_s: float | None = None  # XLA's estimate; None where it has none or says what cannot be
    seconds: float = 0.0  # that tracing and compiling took
    hlo: str = dataclasses.field(default="", repr=False)  # the text that was counted

    @property
    def collectives(self) -> dict[str, dict[str, int]]:
        """{'collective-permute': {'count': 12, 'bytes': 199680}, ...}."""
        found: dict[str, dict[str, int]] = {}
        for x in self.exchanges:
            kind = found.setdefault(x.kind, {"count": 0, "bytes": 0})
            kind["count"] += x.count
            kind["bytes"] += x.bytes
        return found

    def as_json(self) -> dict[str, Any]:
        """All but the text of the program, with `collectives` and their axes."""
        fields = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("hlo", "exchanges")
        }
        exchanges = [dataclasses.asdict(x) for x in self.exchanges]
        return fields | {"collectives": self.collectives, "exchanges": exchanges}


def report_of(
    target: str, text: str, mesh: AbstractMesh | Mesh, ids: list[int] | None = None
) -> Report:
    """What a program sends over a mesh, whose devices have these ids in its replica groups."""
    program = Program(text)
    counts: Counter[tuple[str, tuple[str, ...]]] = Counter()
    sizes: Counter[tuple[str, tuple[str, ...]]] = Counter()
    for x in program.collectives():
        key = x.kind, x.axes(mesh.shape, ids or ())
        counts[key] += x.runs
        sizes[key] += x.runs * x.result_bytes
    exchanges = tuple(
        Exchange(kind, axes, counts[kind, axes], sizes[kind, axes]) for kind, axes in sorted(counts)
    )
    return Report(target, math.prod(mesh.shape.values()), exchanges, program.rounds, hlo=text)
