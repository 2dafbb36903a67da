"""`distattn check`: test attention on these devices and hosts, and time what they exchange."""

import argparse
import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Generator
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from distattn.cli.arguments import (
    CommandError,
    Subparsers,
    amount_at_least,
    at_least,
    mesh_axes,
    refuse,
    some_of,
)
from distattn.cli.check.runner import NAMED, Effort, examine, gathered, subjects
from distattn.cli.check.text import environment_text, report_text
from distattn.distributed import initialize, make_mesh

STDOUT = "-"


def add(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "check",
        help="check results, and measure latency and bandwidth, on these devices and hosts",
        description="Compare every strategy with a float64 reference, forward and gradient, on random "
        "data. Check that all devices hold equal bits. Measure latency and bandwidth along each mesh axis, "
        "and the time of each strategy. Run it in one process on its devices, or in every process of a "
        "job: distattn launch -n 2 --devices-per-process 4 -- distattn check; srun and mpirun likewise. "
        "Rank 0 prints. The exit code is 1 in every process if something is wrong. On one device nothing "
        "is exchanged: the code is 0 if the results are right, and the verdict says that nothing else "
        "was checked.",
    )
    whole, argument = at_least(1), parser.add_argument
    text = "only print versions, devices, mesh and flags, as a block for an issue"
    argument("--report", action="store_true", help=text)
    argument("--quick", action="store_true", help="less of everything: under a minute")
    text = "slow axis first, as host=2,device=4 (default: processes, and the devices of each)"
    argument("--mesh", type=mesh_axes, metavar="AXIS=N,...", help=text)
    names = some_of(NAMED)
    text = f"only these of {', '.join(NAMED)}"
    argument("--strategies", type=names, default=NAMED, metavar="NAME,...", help=text)
    text = "bytes of the messages to time, as 8,64K,4M"
    argument("--sizes", type=_sizes, metavar="N,...", help=text)
    argument("--repeats", type=whole, metavar="N", help="number of runs per measurement")
    argument(
        "--seed", type=at_least(0), default=0, metavar="N", help="seed of the data (default 0)"
    )
    argument("--cpu-devices", type=whole, metavar="N", help="run on the CPU, as N devices")
    text = "write the report as JSON; without FILE, or as -, it is all that stdout gets"
    argument("--json", nargs="?", const=STDOUT, metavar="FILE", help=text)
    parser.set_defaults(run=_run)


def _sizes(value: str) -> tuple[int, ...]:
    try:
        sizes = {-(-amount_at_least(1)(size) // 4) * 4 for size in value.split(",")}
    except argparse.ArgumentTypeError:
        refuse(value, "numbers of bytes, as 8,64K,4M")
    if len(sizes) < 2:
        refuse(value, "two sizes or more (of 4 bytes each), to tell latency from bandwidth")
    return tuple(sorted(sizes))


def _run(options: argparse.Namespace) -> int:
    try:
        initialize(cpu_devices=options.cpu_devices)
    except (ValueError, RuntimeError, TimeoutError) as error:
        if jax.distributed.is_initialized():  # the others wait unless the process ends by an error
            raise
        raise CommandError(str(error)) from None
    mesh = _mesh(options.mesh)
    first = jax.process_index() == 0
    if options.report:
        if first:
            print(f"```text\n{environment_text(mesh)}\n```", flush=True)  # keeps the columns
        return 0
    effort = Effort(options.quick, options.sizes, options.repeats, options.strategies, options.seed)
    chosen, left_out = subjects(mesh, effort.strategies, quick=effort.quick)
    if not chosen:
        raise CommandError(
            f"--strategies: nothing to check on a mesh of {dict(mesh.shape)}: {'; '.join(left_out)}; name "
            "others, or another --mesh"
        )
    problems = gathered("--json", _unwritable(options.json) if first else "")
    if problems[0]:
        raise CommandError(problems[0])
    with _stdout_kept(options.json == STDOUT):
        report = examine(mesh, effort, _progress() if first else lambda _: None)
    if first:
        _print(report, options.json)
    return 0 if report["verdict"] == "passed" else 1


def _mesh(axes: dict[str, int] | None) -> Mesh:
    if axes is None:
        try:
            return make_mesh()
        except ValueError as error:
            raise CommandError(str(error)) from None
    devices, wanted = jax.device_count(), math.prod(axes.values())
    if wanted != devices:
        sizes = " x ".join(map(str, axes.values()))
        raise CommandError(
            f"--mesh: {sizes} = {wanted} devices, and there are {devices} in {jax.process_count()} "
            f"process(es); pass sizes whose product is {devices}, or start with other devices "
            "(--cpu-devices N; distattn launch --devices-per-process N)"
        )
    return jax.make_mesh(tuple(axes.values()), tuple(axes), (AxisType.Auto,) * len(axes))


def _unwritable(path: str | None) -> str:
    """Return why the file cannot be written, before the check takes minutes; empty if it can."""
    if path in (None, STDOUT):
        return ""
    existed = os.path.exists(path)
    try:
        with open(path, "a", encoding="utf-8"):
            pass
        if not existed:
            os.remove(path)
    except OSError as error:
        return f"--json {path}: {error.strerror}"
    return ""


@contextlib.contextmanager
def _stdout_kept(kept: bool) -> Generator[None, None, None]:
    """Send to stderr what libraries below Python (Gloo) print on stdout."""
    if not kept:
        yield
        return
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(stdout, 1)
        os.close(stdout)


def _progress() -> Callable[[str], None]:
    began = time.monotonic()

    def say(what: str) -> None:
        seconds = time.monotonic() - began
        print(f"distattn check: {seconds:5.1f} s  {what}", file=sys.stderr, flush=True)

    return say


def _print(report: dict[str, Any], path: str | None) -> None:
    """Print the text on stdout, or on stderr if JSON goes to stdout."""
    print(report_text(report), file=sys.stderr if path == STDOUT else sys.stdout, flush=True)
    content = json.dumps(report, indent=2, allow_nan=False) + "\n"
    if path == STDOUT:
        sys.stdout.write(content)
    elif path is not None:
        try:
            with open(path, "w", encoding="utf-8") as file:
                file.write(content)
        except OSError as error:
            raise CommandError(f"--json {path}: {error.strerror}") from None
