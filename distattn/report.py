"""What is known of a program that was compiled, or lowered, for devices that are not here."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from typing import Any

from jax.sharding import AbstractMesh, Mesh

from distattn.amounts import bytes_text, count_text, seconds_text
from distattn.hlo import Program


@dataclasses.dataclass(frozen=True)
class Exchange:
    """All collectives of one kind along the same axes, in one run of a program.

    Args:
      kind: as XLA names it: 'collective-permute', 'all-reduce', ....
      axes: of the mesh, along which it goes; () where its groups are none of the mesh's.
      count: how many there are, those in the body of a loop as often as it runs.
      bytes: of what all of them leave on one device. What crosses links for that is another number, see
        `distattn.testing.collective_bytes`.
    """

    kind: str
    axes: tuple[str, ...]
    count: int  # in one run
    bytes: int  # of what they leave on one device


@dataclasses.dataclass(frozen=True)
class Report:
    """What a program sends, holds and computes; `print` shows it as a table.

    The bytes of collectives are those of their results, not those sent.

    All is of one run, and sizes are those of one device. None is not known: `distattn.testing.lower`
    compiles nothing, and then that is all from `argument_bytes` to `optimal_s`.

    Args:
      target: the topology that it was compiled for, or the platform and the mesh that it was lowered for.
      devices: their number.
      exchanges: its collectives, by kind and axes.
      rounds: the longest chain of collectives of which each waits for the one before.
      argument_bytes: of the arguments.
      output_bytes: of the results.
      temp_bytes: of what the program holds beside the two while it runs.
      flops: operations, as XLA counts them: the body of a loop once, however often it runs.
      accessed_bytes: read from and written to the memory of the device; the body of a loop once.
      optimal_s: seconds of a run, as XLA estimates them, each loop once; nothing was timed.
      seconds: that the report took to make on this machine, so none of a run: tracing, lowering and, by
        `compile_for`, compiling.
      hlo: the text that was counted: optimised, or as it was lowered.

    Example:
      >>> from distattn.report import Exchange, Report
      >>> states = Exchange("collective-permute", ("kv",), count=4, bytes=66560)
      >>> print(Report("tpu, kv=16", 16, (states,), rounds=4, seconds=0.25))
      tpu, kv=16: 16 devices, sizes of one
        collectives             4 collective-permute over kv, results 65 KiB
        wait for one another    4
        arguments               not known
        results                 not known
        temporary               not known
        flops, loops once       not known
        accessed, loops once    not known
        estimate, loops once    not known
        made in                 250 ms
    """

    target: str  # the topology, or the platform and the mesh
    devices: int
    exchanges: tuple[Exchange, ...]
    rounds: int  # collectives that wait for one another
    argument_bytes: int | None = None  # from here on None where it was not compiled
    output_bytes: int | None = None
    temp_bytes: int | None = None
    flops: float | None = None  # XLA's count, the body of a loop once; None where it says nothing
    accessed_bytes: float | None = None  # of memory, the body of a loop once
    optimal_s: float | None = None  # XLA's estimate; None where it has none or says what cannot be
    seconds: float = 0.0  # that tracing, lowering and compiling took; none of a run
    hlo: str = dataclasses.field(default="", repr=False)  # the text that was counted

    def __str__(self) -> str:
        """A table, with units."""

        def known(amount: float | None, text: Callable[[float], str]) -> str:
            return "not known" if amount is None else text(amount)

        sent = [
            f"{x.count} {x.kind} over {', '.join(x.axes) or 'no axis'}, results {bytes_text(x.bytes)}"
            for x in self.exchanges
        ]
        rows = [
            *zip(("collectives", *[""] * len(sent)), sent or ["none"], strict=False),
            ("wait for one another", str(self.rounds)),
            ("arguments", known(self.argument_bytes, bytes_text)),
            ("results", known(self.output_bytes, bytes_text)),
            ("temporary", known(self.temp_bytes, bytes_text)),
            ("flops, loops once", known(self.flops, "{:.3g}".format)),
            ("accessed, loops once", known(self.accessed_bytes, bytes_text)),
            ("estimate, loops once", known(self.optimal_s, seconds_text)),
            ("made in", seconds_text(self.seconds)),
        ]
        head = f"{self.target}: {count_text(self.devices, 'device')}, sizes of one"
        return "\n".join((head, *(f"  {name:22}  {value}" for name, value in rows)))

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
