"""Attention between hosts with a delay between them, all on this machine: time against their number.

    cluster.py --hosts 2,4,8,16 --delay-ms 0,1,5 [--pass forward,gradient] [--json FILE] [--plot FILE]
    cluster.py --loopback --hosts 2 --devices-per-host 4 --delay-ms 0 ...
    cluster.py --plot-from FILE --plot FILE

Each host is a network namespace with one process, or a plain process with --loopback. It has one CPU device
unless you ask for more. Every host has the query; keys and values are sharded over the hosts. The
contenders alternate within one run, in a new order each time. All hosts start each call at the same moment,
and the median time of rank 0 counts. All results are checked before they are timed.

auto, butterfly, psum, all_gather, ring: distattn's strategies (ring sends keys and values). xla:
jax.nn.dot_product_attention, partitioned by XLA. pmax_psums: one pmax and two psums, written by hand.

A slow contender sits out after 15 s of calls. This machine's cores limit the bandwidth of all wires
together to some 20 MB/s, and without delay the hosts mostly wait for a core: only the delays are simulated.

Needs Linux, root, and on Debian the packages iproute2 and vde2. The hosts end with the run.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import platform
import select
import signal
import socket
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TextIO

import jax
from cluster_host import LIMIT_S, Plan
from cluster_report import CONTENDERS, SUFFIXES, fits, load, plot, table
from hosts import MAX_HOSTS, HostError, Hosts, lacking, named

from distattn.cli.arguments import at_least, some_of

PASSES = ("forward", "gradient")
HEADS = {"heads": 8, "kv_heads": 2, "width": 64}
MAX_DELAY_MS = 100
LEAD_S = 0.02  # between the arrival of the last host and the start of all: enough to wake them
SHARE_S, LEAST_CALLS = 15, 3  # seconds and calls after which a contender sits out


def numbers(least: int, most: int):
    """Return a parser of whole numbers in these bounds, with commas between them."""

    def parse(text: str) -> tuple[int, ...]:
        try:
            found = tuple(sorted({int(part) for part in text.split(",")}))
        except ValueError:
            found = ()
        if not found or found[0] < least or found[-1] > most:
            raise argparse.ArgumentTypeError(
                f"{text!r} must be whole numbers from {least} to {most}, as in {least},{least + 2}"
            )
        return found

    return parse


def output(text: str) -> Path:
    path = Path(text)
    if not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r}: there is no directory {str(path.parent)!r}")
    return path


def figure(text: str) -> Path:
    path = output(text)
    if path.suffix not in SUFFIXES:
        raise argparse.ArgumentTypeError(f"{text!r} must end in one of {', '.join(SUFFIXES)}")
    return path


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="cluster", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, count = parser.add_argument, at_least(1)
    add("--hosts", type=numbers(2, MAX_HOSTS), default=(2, 4, 8, 16), metavar="D,D,...")
    add(
        "--delay-ms",
        type=numbers(0, MAX_DELAY_MS),
        default=(0, 1, 5),
        metavar="MS,MS,...",
        help="one way, in whole milliseconds",
    )
    add("--pass", dest="passes", type=some_of(PASSES), default=PASSES, metavar=",".join(PASSES))
    add(
        "--contenders",
        type=some_of(tuple(CONTENDERS)),
        default=tuple(CONTENDERS),
        metavar="NAME,...",
    )
    add("--tokens", type=count, default=1, metavar="T", help="query length (default %(default)s)")
    add("--devices-per-host", type=count, default=1, metavar="N", help="default %(default)s")
    add("--loopback", action="store_true", help="plain processes: no root, and no delay but 0")
    add(
        "--keys", type=count, default=512, metavar="N", help="keys per device (default %(default)s)"
    )
    add(
        "--repeats", type=count, default=15, metavar="N", help="calls of each (default %(default)s)"
    )
    add("--json", type=output, metavar="FILE", help="save the measurements")
    add("--plot", type=figure, metavar="FILE", help="draw them, as .svg, .png or .pdf")
    add(
        "--plot-from",
        type=Path,
        metavar="JSON",
        help="draw saved measurements, and measure nothing",
    )
    return parser


class Meeting:
    """Meeting point of the hosts, outside the network between them."""

    def __init__(self, path: Path, hosts: Hosts) -> None:
        self._hosts = hosts
        self._files: dict[socket.socket, TextIO] = {}
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(hosts.count)

    def __enter__(self) -> "Meeting":
        return self

    def __exit__(self, kind, error, trace) -> None:
        for connection in (self._listener, *self._files.values(), *self._files):
            with contextlib.suppress(BrokenPipeError):  # a line was not read
                connection.close()

    def gather(self) -> tuple[list, dict[int, object]]:
        """Wait for all hosts; return the place that they have reached, and the value of each."""
        came: dict[int, tuple[list, object]] = {}
        waiting = set(self._files)
        deadline = time.monotonic() + LIMIT_S
        while len(came) < self._hosts.count:
            self._hosts.check()
            for ready in select.select([self._listener, *waiting], [], [], 0.2)[0]:
                if ready is self._listener:
                    connection = ready.accept()[0]
                    self._files[connection] = connection.makefile("rw", encoding="utf-8")
                    waiting.add(connection)
                    continue
                waiting.remove(ready)
                if line := self._files[ready].readline():  # else it has ended, which `check` finds
                    rank, place, value = json.loads(line)
                    came[rank] = place, value
            if time.monotonic() > deadline:
                missing = named([i for i in range(self._hosts.count) if i not in came])
                where = " ".join(map(str, next(iter(came.values()))[0])) if came else "the start"
                raise HostError(f"{missing} did not come to {where!r} within {LIMIT_S:g} s")
        place = came[0][0]
        if any(other != place for other, _ in came.values()):
            raise HostError(f"the hosts are at different places: {sorted(came.items())}")
        return place, {rank: value for rank, (_, value) in came.items()}

    def go_on(self, wanted: bool) -> None:
        """Let all hosts continue at the same moment of the machine's clock, which they share."""
        text = json.dumps([time.monotonic() + LEAD_S, wanted])
        for file in self._files.values():
            with contextlib.suppress(BrokenPipeError):
                file.write(f"{text}\n")
                file.flush()


def measure(count: int, plan: Plan, *, loopback: bool) -> list[dict]:
    """Return one result per pass and delay, on `count` hosts."""
    program = Path(__file__).with_name("cluster_host.py")
    sent: dict[tuple[str, str], dict] = {}
    trips: dict[int, float] = {}
    times: dict[tuple[int, str], dict[str, list[dict[int, float]]]] = {}
    with (
        Hosts(count, devices=plan.devices, loopback=loopback) as hosts,
        Meeting(hosts.directory / "meeting", hosts) as meeting,
    ):
        text = json.dumps(dataclasses.asdict(plan))
        hosts.run([sys.executable, str(program), str(hosts.directory / "meeting"), text])
        while True:
            place, values = meeting.gather()
            wanted = True
            match place:
                case ["compiled", direction, name]:
                    say(f"{count} hosts: {direction} by {name}")
                    sent[direction, name] = values[0]
                case ["delay", delay_ms]:
                    say(f"{count} hosts: {delay_ms} ms, {plan.repeats} calls of each")
                    hosts.delay(delay_ms)
                case ["round trip", delay_ms]:
                    trips[delay_ms] = values[1]
                case ["call", delay_ms, direction, name]:
                    calls = times.setdefault((delay_ms, direction), {})
                    wanted = not enough(call[0] for call in calls.setdefault(name, []))
                case ["time", delay_ms, direction, name]:
                    times[delay_ms, direction][name].append(values)
                case ["done"]:
                    break
            meeting.go_on(wanted)
    names = plan.contenders
    return [
        {
            "hosts": count,
            "devices_per_host": plan.devices,
            "delay_ms": delay_ms,
            "pass": direction,
            "ms": {name: median_ms(call[0] for call in of[name]) for name in names},
            "slowest_host_ms": {
                name: median_ms(max(call.values()) for call in of[name]) for name in names
            },
            "round_trip_ms": round(trips[delay_ms], 2),
            "calls": {name: len(of[name]) for name in names},
            "collectives": {name: sent[direction, name] for name in names},
        }
        for (delay_ms, direction), of in times.items()
    ]


def enough(seconds: Iterable[float]) -> bool:
    """Return whether a slow contender has had its share of the run."""
    taken = list(seconds)
    return len(taken) >= LEAST_CALLS and sum(taken) > SHARE_S


def median_ms(seconds: Iterable[float]) -> float:
    return round(1e3 * statistics.median(seconds), 3)


def environment(plan: Plan) -> dict:
    return {
        "jax": jax.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "repeats": plan.repeats,
        "shape": f"B 1, T {plan.tokens}, N {plan.heads}, K {plan.kv_heads}, H {plan.width}, "
        f"{plan.keys} keys per device, float32",
    }


def say(text: str) -> None:
    print(f"cluster: {text}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Make SIGTERM and SIGHUP raise an exception, as Ctrl-C does, so that the hosts end too."""

    def leave(number, frame):
        raise SystemExit(128 + number)

    kinds = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(kind, leave) for kind in kinds]
    try:
        yield
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)


def run(options: argparse.Namespace) -> int:
    plan = Plan(
        delays_ms=options.delay_ms,
        passes=options.passes,
        contenders=options.contenders,
        repeats=options.repeats,
        tokens=options.tokens,
        keys=options.keys,
        devices=options.devices_per_host,
        **HEADS,
    )
    saved = {"environment": environment(plan), "results": [], "fits": []}
    print(
        f"jax {jax.__version__}, {os.cpu_count()} cores, {saved['environment']['shape']}",
        flush=True,
    )
    try:
        with terminable():
            for hosts in options.hosts:
                saved["results"] += measure(hosts, plan, loopback=options.loopback)
                saved["fits"] = fits(saved["results"])
                if options.json:  # keep these results if the rest fails
                    options.json.write_text(json.dumps(saved, indent=1) + "\n", encoding="utf-8")
    except HostError as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        return 130
    print(table(saved["results"]))
    if options.plot:
        plot(saved, options.plot)
    return 0


def main(given: Sequence[str] | None = None) -> int:
    parser = arguments()
    options = parser.parse_args(given)
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib; pip install matplotlib")
    if options.plot_from:
        if not options.plot:
            parser.error("--plot-from needs --plot FILE, the file of the figure")
        try:
            saved = load(options.plot_from)
        except ValueError as error:
            parser.error(f"--plot-from {error}")
        print(table(saved["results"]))
        plot(saved, options.plot)
        return 0
    if options.loopback and options.delay_ms != (0,):
        parser.error("--loopback has no delay to set; pass --delay-ms 0 with it")
    if not options.loopback and (
        lack := lacking(sys.platform, os.geteuid() if hasattr(os, "geteuid") else 0)
    ):
        parser.error(lack)
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
