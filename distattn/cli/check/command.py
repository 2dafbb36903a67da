"""`distattn check`: whether attention is right on these devices and hosts, and how fast they exchange."""

import argparse
import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Generator
from pathlib import Path

import jax
from jax.sharding import AxisType, Mesh

from distattn.cli.arguments import CommandError, Subparsers, at_least, mesh_axes, refuse, some_of
from distattn.cli.check.correctness import NAMED, subjects
from distattn.cli.check.environment import environment
from distattn.cli.check.examination import Effort, Report, examine
from distattn.cli.check.programs import gathered
from distattn.cli.check.text import text
from distattn.distributed import initialize, make_mesh

STDOUT = "-"
UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def add(subparsers: Subparsers) -> None:
    """The command and its arguments."""
    parser = subparsers.add_parser(
        "check",
        help="checks results, and measures latency and bandwidth, on these devices and hosts",
        description="Every strategy against a float64 reference, forward and gradient, on random data; "
        "that all devices hold the same bits; latency and bandwidth along each axis of the mesh; the time "
        "of each strategy. In one process on its devices, or in every process of a job, as by: distattn "
        "launch -n 2 --devices-per-process 4 -- distattn check; srun and mpirun likewise. Rank 0 prints. "
        "The exit code is 1 where something is wrong, in every process. On one device nothing is "
        "exchanged: the code is 0 where its own results are right, and the verdict says that no more was "
        "checked.",
    )
    whole, number = at_least(1), at_least(0)
    argument = parser.add_argument
    argument(
        "--report",
        action="store_true",
        help="only print versions, devices, mesh and flags: one block, to be pasted into an issue",
    )
    argument("--quick", action="store_true", help="less of everything: under a minute")
    argument(
        "--mesh",
        type=mesh_axes,
        metavar="AXIS=N,...",
        help="slow axis first, as host=2,device=4 (default: host is the processes, device theirs)",
    )
    argument(
        "--strategies",
        type=some_of(NAMED),
        default=NAMED,
        metavar="NAME,...",
        help=f"only these of {', '.join(NAMED)}",
    )
    argument(
        "--sizes",
        type=_sizes,
        metavar="N,...",
        help="bytes of the messages to time, as 8,64K,4M",
    )
    argument("--repeats", type=whole, metavar="N", help="how often each time is taken")
    argument("--seed", type=number, default=0, metavar="N", help="of the data (default 0)")
    argument("--cpu-devices", type=whole, metavar="N", help="run on the CPU, as N devices")
    argument(
        "--json",
        nargs="?",
        const=STDOUT,
        metavar="FILE",
        help="write the report as JSON; without FILE, or as -, to stdout and nothing else there",
    )
    parser.set_defaults(run=_run)


def _sizes(value: str) -> tuple[int, ...]:
    sizes = set()
    for part in value.upper().split(","):
        digits = part.rstrip("KMG")
        if not digits.isdecimal() or part[len(digits) :] not in UNITS or int(digits) == 0:
            refuse(value, "numbers of bytes, as 8,64K,4M")
        sizes.add(-(-int(digits) * UNITS[part[len(digits) :]] // 4) * 4)
    if len(sizes) < 2:
        refuse(value, "two sizes or more (of 4 bytes each), to tell latency from bandwidth")
    return tuple(sorted(sizes))


def _run(options: argparse.Namespace) -> int:
    _start(options.cpu_devices)
    mesh = _mesh(options.mesh)
    if options.report:
        if jax.process_index() == 0:
            print(f"```text\n{environment(mesh)}\n```", flush=True)  # an issue keeps its columns
        return 0
    effort = Effort(options.quick, options.sizes, options.repeats, options.strategies, options.seed)
    chosen, left_out = subjects(mesh, effort.strategies, quick=effort.quick)
    if not chosen:
        raise CommandError(
            f"--strategies: nothing to check on a mesh of {dict(mesh.shape)}: {'; '.join(left_out)}; name "
            "others, or another --mesh"
        )
    first = jax.process_index() == 0
    problems = gathered("--json", _unwritable(options.json) if first else "")
    if problems[0]:
        raise CommandError(problems[0])
    with _stdout_kept(options.json == STDOUT):
        report = examine(mesh, effort, _progress() if first else lambda _: None)
    if first:
        _print(report, options.json)
    return 0 if report.passed else 1


def _start(cpu_devices: int | None) -> None:
    try:
        initialize(cpu_devices=cpu_devices)
    except (ValueError, RuntimeError, TimeoutError) as error:
        if jax.distributed.is_initialized():  # the others wait for a process that leaves in peace
            raise
        raise CommandError(str(error)) from None


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
    """Why the file cannot be written, before minutes have gone into what belongs there."""
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
    """What libraries below Python say on stdout (gloo does) goes to stderr."""
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


def _print(report: Report, path: str | None) -> None:
    """The text on stdout, unless JSON goes there."""
    print(text(report), file=sys.stderr if path == STDOUT else sys.stdout, flush=True)
    if path is None:
        return
    content = json.dumps(report.as_json(), indent=2, allow_nan=False) + "\n"
    if path == STDOUT:
        sys.stdout.write(content)
        return
    try:
        Path(path).write_text(content, encoding="utf-8")
    except OSError as error:
        raise CommandError(f"--json {path}: {error.strerror}") from None
