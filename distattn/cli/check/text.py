"""Text of `distattn check`: the report, and the versions and devices for a bug report."""

import importlib.metadata
import os
import platform
from collections.abc import Iterable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from distattn.distributed.start import versions
from distattn.planning.text import count_text, seconds_text, table

Json = dict[str, Any]
SHOWN = 4  # differing replicas per strategy
HEADINGS = ("strategy over axes", "worst error", "in result", "verdict")
PACKAGES = (
    *("numpy", "flax", "equinox", "optax", "orbax-checkpoint", "ringattention", "tokamax"),
    *("libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "jax-rocm7-plugin"),
)
# Prefixes of the environment variables to show; no token or password has one.
VARIABLES = ("JAX_", "XLA_", "LIBTPU_", "TPU_", "NCCL_", "CUDA_VISIBLE", "PJRT_", "DISTATTN_")
CONFIG = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_numpy_dtype_promotion",
    "jax_debug_nans",
    "jax_disable_jit",
    "jax_compilation_cache_dir",
)


def report_text(report: Json) -> str:
    """Return the whole report; its last lines are the verdict."""
    checks = [HEADINGS, *(_check_row(check) for check in report["checks"])]
    return "\n".join(
        (
            *_machine(report),
            "",
            "correctness, forward and gradient, against float64; errors in units of the tolerance:",
            *table(checks),
            *(f"  not checked: {reason}" for reason in report["not_checked"]),
            "",
            *_replicas(report),
            *_axes(report),
            *_times(report),
            "",
            *_verdict(report),
        )
    )


def _machine(report: Json) -> Iterable[str]:
    kind = report["device_kind"]
    kind = "" if kind == report["platform"] else f" ({kind})"
    mesh = ", ".join(f"{name}={size}" for name, size in report["mesh"].items())
    devices = count_text(report["devices"], f"{report['platform']} device")
    processes = count_text(report["processes"], "process", "processes")
    yield "distattn check"
    yield "  " + ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    yield f"  {devices}{kind} in {processes}, as a mesh of {mesh}"
    if report["devices"] == 1:
        yield "  one device: nothing is exchanged"


def _check_row(check: Json) -> tuple[str, ...]:
    if "failure" in check:
        return check["name"], "-", "-", f"FAILED: {check['failure']}"
    state = "ok" if check["pass"] else "FAILED"
    if check["unequal_replicas"]:
        state += ", replicas differ"
    return check["name"], _error(check), check["worst"], state


def _error(check: Json) -> str:
    error = check["error_fraction"]
    return "inf" if error is None else f"{error:.3g}"


def _replicas(report: Json) -> Iterable[str]:
    if report["devices"] == 1:
        yield "replicas: none on one device, nothing was compared"
    elif report["replicas_equal"]:
        yield "replicas: equal bit for bit on all devices"
    elif all("failure" in check for check in report["checks"]):
        yield "replicas: not compared, because no strategy runs"
    else:
        yield "replicas: NOT EQUAL"
        for check in report["checks"]:
            unequal = check["unequal_replicas"]
            for line in unequal[:SHOWN]:
                yield f"  {check['name']}: {line}"
            if len(unequal) > SHOWN:
                yield f"  {check['name']}: and {len(unequal) - SHOWN} more"


def _axes(report: Json) -> Iterable[str]:
    if not report["axes"]:
        if report["devices"] > 1:
            yield "links and times: not measured, because a strategy does not run"
        return
    yield ""
    yield "links, one message of every device to its neighbour along an axis, all at once:"
    rows = [("axis", "latency", "bandwidth", "the fit is off by")]
    for name, axis in report["axes"].items():
        bandwidth = f"{axis['bytes_per_s'] / 1e9:.3g} GB/s"
        rows.append((name, seconds_text(axis["latency_s"]), bandwidth, f"{axis['residual']:.0%}"))
    yield from table(rows)


def _times(report: Json) -> Iterable[str]:
    if report["strategy_s"]:
        yield ""
        yield "a call, forward, over all axes; 'auto' by the constants built in, and by these links:"
    for workload, seconds in report["strategy_s"].items():
        ordered = sorted(seconds.items(), key=lambda item: item[1])
        yield f"  {workload}: " + ", ".join(f"{n} {seconds_text(s)}" for n, s in ordered)
        if len(ordered) < 2:
            continue
        picks = []
        for source, label in (("by_table", "auto"), ("by_measured_links", "by these links")):
            name = report["auto"][workload][source]
            factor = seconds[name] / ordered[0][1]
            slower = "the fastest" if factor == 1 else f"{factor:.2f} times the fastest"
            picks.append(f"{label} {name} ({slower})")
        yield "    " + ", ".join(picks)


def _verdict(report: Json) -> Iterable[str]:
    checks = report["checks"]
    count = len(checks)
    if report["verdict"] == "passed":
        passed = f"{'the one check' if count == 1 else f'all {count} checks'} passed"
        if report["devices"] > 1:
            yield f"verdict: {passed}"
        else:
            yield f"verdict: {passed} on one device; NOTHING BETWEEN DEVICES WAS CHECKED"
            yield "  to check that too pass --cpu-devices 8 (fake ones, on this machine), or start it where"
            yield "  there are more"
        return
    failed = [check for check in checks if not check["pass"]]
    unequal = [check for check in checks if check["unequal_replicas"]]
    wrong = [f"{len(failed)} of {count} checks failed"] if failed else []
    wrong += [f"replicas differ in {len(unequal)}"] if unequal else []
    yield f"verdict: FAILED: {', '.join(wrong)}"
    for check in checks:
        if reasons := _reasons(check):
            yield f"  {check['name']}: {', '.join(reasons)}"
    bad = dict.fromkeys(check["strategy"] for check in (*failed, *unequal))
    good = [check["strategy"] for check in checks if check["strategy"] not in bad]
    yield "what to do: do not trust results of these strategies on these devices" + (
        f"; pass one that passed (strategy={good[0]!r})" if good else ""
    )
    yield f"  repeat with --strategies {','.join(bad)} and another --seed; if the same devices are"
    yield "  named each time, suspect these, else report it with the file of --json"


def _reasons(check: Json) -> list[str]:
    if "failure" in check:
        return [check["failure"]]
    reasons = []
    if check["error_fraction"] is None:
        reasons.append(f"{check['worst']} is not finite where it should be, or the reverse")
    elif not check["pass"]:
        reasons.append(f"{check['worst']} is off by {_error(check)} times the tolerance")
    return reasons + (["replicas differ"] if check["unequal_replicas"] else [])


def environment_text(mesh: Mesh) -> str:
    """Return versions, devices, mesh and flags, as lines for a bug report."""
    lines = list(_environment(mesh))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:{width}}  {value}" for name, value in lines)


def _environment(mesh: Mesh) -> Iterator[tuple[str, str]]:
    installed = {x.name.lower(): x.version for x in importlib.metadata.distributions()}
    others = {name: installed[name] for name in PACKAGES if name in installed}
    found = versions() | {"python": platform.python_version()} | others
    yield "versions", ", ".join(f"{name} {version}" for name, version in found.items())
    if not others:
        yield "also installed", f"none of {', '.join(PACKAGES)}"
    yield "machine", f"{platform.platform()}, {os.cpu_count()} CPUs"
    devices = list(mesh.devices.flat)
    kinds = sorted({device.device_kind for device in devices})
    processes = {device.process_index for device in devices}
    yield (
        "devices",
        f"{len(devices)} {devices[0].platform} ({', '.join(kinds)}) in {len(processes)} of "
        f"{jax.process_count()} processes; the default backend is {jax.default_backend()}",
    )
    types = zip(mesh.shape.items(), mesh.axis_types, strict=True)
    yield "mesh", ", ".join(f"{name}={size} {kind.name}" for (name, size), kind in types)
    slices = {getattr(device, "slice_index", 0) for device in devices}
    if len(slices) > 1:
        yield "slices", str(len(slices))
    yield "config", ", ".join(f"{name}={getattr(jax.config, name)}" for name in CONFIG)
    variables = {name: x for name, x in sorted(os.environ.items()) if name.startswith(VARIABLES)}
    if not variables:
        yield "environment", f"no variable that begins with {', '.join(VARIABLES)}"
    for name, value in variables.items():
        yield "environment", f"{name}={value}"
