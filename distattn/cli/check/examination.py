"""All of it in order, and the report: a value, and what it is as JSON."""

import dataclasses
import math
import platform
import sys
from collections.abc import Callable
from typing import Any

import jax
import jaxlib.version
import numpy as np
from jax.sharding import Mesh

from distattn.cli.check.correctness import NAMED, Check, check, subjects, wide_axes
from distattn.cli.check.links import Axis, measure_axes
from distattn.cli.check.strategies import Timing, measure_strategies, slower, workloads
from distattn.planning.cost import links_from

QUICK_SIZES = (8, 16 << 10, 256 << 10)
FULL_SIZES = (8, 1 << 10, 16 << 10, 256 << 10, 4 << 20)


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much is checked and measured."""

    quick: bool = False
    sizes: tuple[int, ...] | None = None  # bytes of messages; None: QUICK_SIZES or FULL_SIZES
    repeats: int | None = None  # of each measurement; None: 10 or 30
    strategies: tuple[str, ...] = NAMED
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class Report:
    """What was found, the same in every process."""

    mesh: dict[str, int]
    platform: str
    device_kind: str
    processes: int
    versions: dict[str, str]
    checks: list[Check]
    left_out: list[str]
    axes: dict[str, Axis]
    timings: list[Timing]

    @property
    def devices(self) -> int:
        """Their number."""
        return math.prod(self.mesh.values())

    @property
    def replicas_equal(self) -> bool:
        """Whether all devices that should have the same have the same bits; False if none has any."""
        compared = [check for check in self.checks if not check.failure]
        return bool(compared) and not any(check.unequal for check in compared)

    @property
    def passed(self) -> bool:
        """Whether there is nothing wrong. On one device that says nothing of what devices exchange."""
        return self.replicas_equal and all(check.passed for check in self.checks)

    def as_json(self) -> dict[str, Any]:
        """The report of `distattn check --json`; seconds and bytes a second as measured."""
        return {
            "versions": self.versions,
            "platform": self.platform,
            "device_kind": self.device_kind,
            "devices": self.devices,
            "processes": self.processes,
            "mesh": self.mesh,
            "checks": [_check_json(check) for check in self.checks],
            "not_checked": self.left_out,
            "between_devices_checked": self.devices > 1,
            "replicas_equal": self.replicas_equal if self.devices > 1 else None,
            "axes": {name: _axis_json(axis) for name, axis in self.axes.items()},
            "strategy_s": {timing.case.name: timing.seconds for timing in self.timings},
            "auto": {timing.case.name: _auto_json(timing) for timing in self.timings},
            "verdict": "passed" if self.passed else "failed",
        }


def examine(mesh: Mesh, effort: Effort, say: Callable[[str], None]) -> Report:
    """Checks and measures on a mesh of all devices; called in every process alike.

    Args:
      mesh: of devices of all processes, slow axis first.
      effort: how much.
      say: is told what comes next.

    Returns:
      Report, the same in every process.

    Raises:
      RuntimeError, TimeoutError: processes that differ, or do not come: as `distributed.assert_same`.
    """
    sizes = effort.sizes or (QUICK_SIZES if effort.quick else FULL_SIZES)
    repeats = effort.repeats or (10 if effort.quick else 30)
    chosen, left_out = subjects(mesh, effort.strategies, quick=effort.quick)
    checks = check(mesh, chosen, effort.seed, say)
    device = mesh.devices.flat[0]
    report = Report(
        mesh=dict(mesh.shape),
        platform=device.platform,
        device_kind=device.device_kind,
        processes=jax.process_count(),
        versions=versions(),
        checks=checks,
        left_out=left_out,
        axes={},
        timings=[],
    )
    if mesh.size == 1 or any(check.failure for check in checks):
        return report  # nothing moves, or what moves does not run
    report = dataclasses.replace(
        report, axes=measure_axes(mesh, wide_axes(mesh), sizes, repeats, say)
    )
    links = links_from(report.as_json())
    timings = measure_strategies(
        mesh,
        workloads(mesh.size, quick=effort.quick),
        effort.strategies,
        links,
        repeats,
        say,
    )
    return dataclasses.replace(report, timings=timings)


def versions() -> dict[str, str]:
    """Of what runs."""
    own = sys.modules[__name__.partition(".")[0]]  # which imports this, not the reverse
    return {
        "distattn": own.__version__,
        "jax": jax.__version__,
        "jaxlib": jaxlib.version.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


def _check_json(check: Check) -> dict[str, Any]:
    finite = math.isfinite(check.error_fraction)  # JSON has no other numbers
    found: dict[str, Any] = {
        "name": check.name,
        "strategy": check.strategy,
        "pass": check.passed,
        "error_fraction": check.error_fraction if finite else None,
        "worst": check.worst_result,
        "unequal_replicas": list(check.unequal),
    }
    return found | ({"failure": check.failure} if check.failure else {})


def _axis_json(axis: Axis) -> dict[str, Any]:
    return {
        "latency_s": axis.link.latency_s,
        "bytes_per_s": axis.link.bytes_per_s,
        "residual": axis.residual,
        "samples": [{"bytes": size, "seconds": seconds} for size, seconds in axis.samples],
    }


def _auto_json(timing: Timing) -> dict[str, Any]:
    shape = timing.case.workload
    return {
        "payload_bytes": shape.payload_bytes,
        "query_sharded": timing.case.query_sharded,
        "by_table": timing.by_table,
        "by_measured_links": timing.by_links,
        "fastest": timing.fastest,
        "slower_than_fastest": slower(timing, timing.by_table),
    }
