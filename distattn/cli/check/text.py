"""The report of a check as text."""

import math
from collections.abc import Iterable, Sequence

from distattn.cli.check.correctness import Check
from distattn.cli.check.examination import Report
from distattn.cli.check.strategies import Timing, slower

SHOWN = 4  # differing replicas of a strategy
HEADINGS = ("strategy over axes", "worst error", "in result", "verdict")


def text(report: Report) -> str:
    """The whole report; its last lines are the verdict."""
    return "\n".join(
        (
            *_machine(report),
            "",
            "correctness, forward and gradient, against float64; errors in units of the tolerance:",
            *_table([HEADINGS, *(_check_row(check) for check in report.checks)]),
            *(f"  not checked: {reason}" for reason in report.left_out),
            "",
            *_replicas(report),
            *_axes(report),
            *_timings(report.timings),
            "",
            *_verdict(report),
        )
    )


def _machine(report: Report) -> Iterable[str]:
    processes = f"{report.processes} process" + "es" * (report.processes > 1)
    kind = "" if report.device_kind == report.platform else f" ({report.device_kind})"
    mesh = ", ".join(f"{name}={size}" for name, size in report.mesh.items())
    yield "distattn check"
    yield "  " + ", ".join(f"{name} {version}" for name, version in report.versions.items())
    devices = f"{report.devices} {report.platform} device" + "s" * (report.devices > 1)
    yield f"  {devices}{kind} in {processes}, as a mesh of {mesh}"
    if report.devices == 1:
        yield "  one device: nothing is exchanged"


def _check_row(check: Check) -> tuple[str, ...]:
    if check.failure:
        return check.name, "-", "-", f"FAILED: {check.failure}"
    state = "ok" if check.passed else "FAILED"
    if check.unequal:
        state += ", replicas differ"
    return check.name, f"{check.error_fraction:.3g}", check.worst_result, state


def _replicas(report: Report) -> Iterable[str]:
    if report.devices == 1:
        yield "replicas: none on one device, nothing was compared"
        return
    if report.replicas_equal:
        yield "replicas: equal bit for bit on all devices"
        return
    if all(check.failure for check in report.checks):
        yield "replicas: not compared, because no strategy runs"
        return
    yield "replicas: NOT EQUAL"
    for check in report.checks:
        for line in check.unequal[:SHOWN]:
            yield f"  {check.name}: {line}"
        if len(check.unequal) > SHOWN:
            yield f"  {check.name}: and {len(check.unequal) - SHOWN} more"


def _axes(report: Report) -> Iterable[str]:
    if not report.axes:
        if report.devices > 1:
            yield "links and times: not measured, because a strategy does not run"
        return
    yield ""
    yield "links, one message of every device to its neighbour along an axis, all at once:"
    rows = [("axis", "latency", "bandwidth", "the fit is off by")]
    for name, axis in report.axes.items():
        bandwidth = f"{axis.link.bytes_per_s / 1e9:.3g} GB/s"
        rows.append((name, seconds(axis.link.latency_s), bandwidth, f"{axis.residual:.0%}"))
    yield from _table(rows)


def _timings(timings: Sequence[Timing]) -> Iterable[str]:
    if timings:
        yield ""
        yield "a call, forward, over all axes; 'auto' by the constants built in, and by these links:"
    for timing in timings:
        ordered = sorted(timing.seconds.items(), key=lambda item: item[1])
        yield f"  {timing.case.name}: " + ", ".join(f"{n} {seconds(s)}" for n, s in ordered)
        if len(timing.seconds) < 2:
            continue
        picks = ((timing.by_table, "auto"), (timing.by_links, "by these links"))
        yield "    " + ", ".join(f"{who} {name} ({_rank(timing, name)})" for name, who in picks)


def _rank(timing: Timing, strategy: str) -> str:
    factor = slower(timing, strategy)
    return "the fastest" if factor == 1 else f"{factor:.2f} times the fastest"


def _verdict(report: Report) -> Iterable[str]:
    failed = [check for check in report.checks if not check.passed]
    count = len(report.checks)
    if report.passed:
        passed = f"{'the one check' if count == 1 else f'all {count} checks'} passed"
        if report.devices > 1:
            yield f"verdict: {passed}"
        else:
            yield f"verdict: {passed} on one device; NOTHING BETWEEN DEVICES WAS CHECKED"
            yield "  to check that too pass --cpu-devices 8 (fake ones, on this machine), or start it where"
            yield "  there are more"
        return
    unequal = [check for check in report.checks if check.unequal]
    wrong = [f"{len(failed)} of {count} checks failed"] if failed else []
    wrong += [f"replicas differ in {len(unequal)}"] if unequal else []
    yield f"verdict: FAILED: {', '.join(wrong)}"
    for check in report.checks:
        if check.failure or not check.passed or check.unequal:
            yield f"  {check.name}: {_why(check)}"
    bad = dict.fromkeys(check.strategy for check in (*failed, *unequal))
    good = [c for c in dict.fromkeys(check.strategy for check in report.checks) if c not in bad]
    yield "what to do: do not trust results of these strategies on these devices" + (
        f"; name one that passed (strategy={good[0]!r})" if good else ""
    )
    yield (
        "  repeat with --strategies "
        + ",".join(bad)
        + " and another --seed; if the same devices are"
    )
    yield "  named each time, suspect these, else report it with the file of --json"


def _why(check: Check) -> str:
    if check.failure:
        return check.failure
    reasons = []
    if not check.passed:
        size = f"{check.error_fraction:.3g} times the tolerance"
        finite = math.isfinite(check.error_fraction)
        what = size if finite else "not finite where it should be, or the reverse"
        reasons.append(f"{check.worst_result} is {'off by ' if finite else ''}{what}")
    if check.unequal:
        reasons.append("replicas differ")
    return ", ".join(reasons)


def seconds(value: float) -> str:
    """In the unit that suits it."""
    for size, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")):
        if value >= size:
            return f"{value / size:.3g} {unit}"
    return f"{value / 1e-9:.3g} ns"


def _table(rows: Sequence[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ("  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)) for row in rows)
    return [f"  {line}".rstrip() for line in lines]
