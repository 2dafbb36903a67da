"""`distattn launch`: a job of several processes on this machine, for simulation and tests."""

import argparse
import collections
import contextlib
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO

from distattn.cli.arguments import CommandError, Subparsers, at_least, seconds
from distattn.distributed.agreement import ranks as ranks_text
from distattn.distributed.start import JobPlace

SUPERVISOR = str(Path(__file__).with_name("supervisor.py"))
POLL_S = 0.05
SETTLE_S, SETTLE_SECONDARY_S = 0.3, 1.0  # wait for the cause after a failure, primary or secondary
DRAIN_S, LAST_DRAIN_S = 0.3, 2.0  # wait for a rank's last lines, while others run and at the end
LINES = 20  # last lines kept per rank
TIMED_OUT, TERMINATED = 124, 143  # exit codes of timeout(1) and of a shell
# Lines of ranks that fail because another did: first those that waited for it, then those that JAX's
# coordination service ended, unless it refused this rank (a number out of range, or taken).
SECONDARY = (
    re.compile(
        r"[Gg]loo.*(failed|[Ee]rror|imed out)|Connection (reset|closed) by peer|did not come to"
    ),
    re.compile(r"detected fatal errors(?!.*(INVALID_ARGUMENT|ALREADY_EXISTS))|heartbeat timeout"),
)
# Gloo greets each connection, on a screen full of lines that threads may tear to pieces.
_PIECES = r"\[Gloo\] Rank | peer ranks\. Expected number of connected peer ranks is : "
GREETING = re.compile(rf"(?=.*({_PIECES}))({_PIECES}| is connected to |\d)+")

_output = threading.Lock()  # keeps the lines of different ranks apart


def add(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = subparsers.add_parser(
        "launch",
        help="run a script as several processes on this machine, each with its own CPU devices",
        usage="distattn launch [options] -n N -- COMMAND ...",
        description="Start a command N times, as the ranks of one job: distattn.distributed.initialize() "
        "needs no arguments in it. Each line that a rank prints appears as [rank] line. If a rank fails, "
        "the others are ended, and the rank, its exit code and its last lines are printed.",
    )
    whole, argument = at_least(1), parser.add_argument
    argument("-n", "--processes", type=whole, required=True, metavar="N", help="number of ranks")
    text = "CPU devices per rank (default 1)"
    argument("--devices-per-process", type=whole, default=1, metavar="N", help=text)
    text = "number of ranks, without rank 0, that may fail while the others go on (default 0)"
    argument("--may-fail", type=at_least(0), default=0, metavar="N", help=text)
    text = "seconds that the ranks get to save after a SIGTERM (default 5)"
    argument("--grace", type=seconds, default=5.0, metavar="S", help=text)
    argument("--timeout", type=seconds, metavar="S", help="seconds after which the job is ended")
    argument("--log-dir", metavar="DIR", help="also write each rank's output to DIR/rank-N.log")
    text = "also show Gloo's greetings for new connections, which the logs always have"
    argument("--show-gloo", action="store_true", help=text)
    argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="command of each rank")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        example = "distattn launch -n 4 -- python script.py"
        raise CommandError(f"nothing to run; put the command behind --, as in: {example}")
    if shutil.which(command[0]) is None:
        raise CommandError(f"the command {command[0]!r} is not found, or may not be run")
    try:
        Path(options.log_dir or ".").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        path = shlex.quote(options.log_dir)
        raise CommandError(f"--log-dir {path}: {error.strerror}") from None
    began = time.monotonic()
    ranks: list[Rank] = []
    notices: list[int] = []  # numbers of signals
    previous = signal.signal(signal.SIGTERM, lambda number, _: notices.append(number))
    try:
        with held_port() as port, TemporaryDirectory(ignore_cleanup_errors=True) as roll_call:
            try:
                address, count = "{}:{}".format(*port.getsockname()), options.processes
                for number in range(count):
                    devices = options.devices_per_process
                    place = JobPlace(address, count, number, devices, roll_call)
                    log = Path(options.log_dir, f"rank-{number}.log") if options.log_dir else None
                    ranks.append(Rank(place, command, log, options.show_gloo))
                failed = _watch(ranks, options, began, notices)
            finally:
                running = [rank for rank in ranks if rank.code() is None]
                for rank in ranks:
                    rank.end()
    finally:
        signal.signal(signal.SIGTERM, previous)
    if notices:
        return TERMINATED
    if failed:
        return _report(min(failed, key=Rank.order), running, time.monotonic() - began)
    for rank in running:
        _say(f"rank {rank.number} is not done after {options.timeout:g} s:{rank.last_lines(5)}")
    return TIMED_OUT if running else 0


def _report(cause: "Rank", running: Sequence["Rank"], seconds: float) -> int:
    blames = ", because another process failed, as it says" if cause.secondary() else ""
    rest = f"; ended with it: {ranks_text(rank.number for rank in running)}" if running else ""
    _say(f"rank {cause.number} {cause.ending()} after {seconds:.1f} s{blames}{rest}")
    _say(f"its last lines:{cause.last_lines()}")
    if cause.log is not None:
        _say(f"all of them: {cause.log}")
    code = cause.code() or 1
    return code if code > 0 else 128 - code


def _watch(
    ranks: Sequence["Rank"], options: argparse.Namespace, began: float, notices: Sequence[int]
) -> list["Rank"]:
    """Wait until all ranks are done, too many have failed, or it is too late; return those that failed."""
    deadline = began + (options.timeout or float("inf"))
    settled, announced = float("inf"), set[Rank]()
    while True:
        codes = [rank.code() for rank in ranks]
        failed = [rank for rank, code in zip(ranks, codes, strict=True) if code]
        if len(failed) <= options.may_fail and not codes[0]:
            for rank in {*failed} - announced:
                _say(f"rank {rank.number} {rank.ending()}; the others go on")
            announced |= {*failed}
            failed = []
        elif failed:
            wait = SETTLE_SECONDARY_S if all(rank.secondary() for rank in failed) else SETTLE_S
            settled = min(rank.ended for rank in failed) + wait
        if None not in codes or notices or time.monotonic() > min(settled, deadline):
            break
        time.sleep(POLL_S)
    if notices:
        _say(f"ended by {signal.Signals(notices[0]).name}")
        for rank in ranks:
            rank.notify()
        deadline = time.monotonic() + options.grace
        while None in [rank.code() for rank in ranks] and time.monotonic() < deadline:
            time.sleep(POLL_S)
    return failed


def _say(text: str) -> None:
    print(f"distattn launch: {text}", file=sys.stderr, flush=True)


def held_port() -> socket.socket:
    """Return a socket that keeps a free port from other programs; JAX's coordinator shares it."""
    holder = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    holder.bind(("127.0.0.1", 0))
    return holder


class Rank:
    """Process of the job, in its own session; its output is shown, and its last lines are kept."""

    def __init__(
        self, place: JobPlace, command: Sequence[str], log: Path | None, show_gloo: bool
    ) -> None:
        self.number: int = place.process_id or 0
        self.log: Path | None = log
        self.ended: float = 0.0  # when its end was noticed, by time.monotonic
        # The session ends with its supervisor's standard input, which ends with this process.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", SUPERVISOR, place.roll_call or "", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=os.environ | {"PYTHONUNBUFFERED": "1"} | place.variables(),
        )
        self._tail: collections.deque[str] = collections.deque(maxlen=LINES)
        output = (self._process.stdout, show_gloo)
        self._reader = threading.Thread(target=self._read, args=output, daemon=True)
        self._reader.start()

    def _read(self, pipe: IO[bytes], show_gloo: bool) -> None:
        with pipe, open(self.log or os.devnull, "wb", buffering=0) as log:
            for raw in pipe:
                log.write(raw)
                line = raw.decode(errors="replace").rstrip("\r\n")
                greeting = GREETING.fullmatch(line) is not None
                if not greeting:
                    self._tail.append(line)
                if show_gloo or not greeting:
                    with _output, contextlib.suppress(BrokenPipeError):  # from `| head`
                        print(f"[{self.number}] {line}", flush=True)

    def code(self) -> int | None:
        """Return its exit code, minus the number of the signal that ended it, or None while it runs."""
        before, code = self._process.returncode, self._process.poll()
        if before is None and code is not None:
            self.ended = time.monotonic()
            self._kill()  # processes that it left behind
            self._reader.join(DRAIN_S)
        return code

    def notify(self) -> None:
        """Send it a SIGTERM if it runs."""
        if self.code() is None:
            self._process.terminate()

    def end(self) -> None:
        """Kill its session if it runs."""
        self._process.stdin.close()  # JAX takes a SIGTERM for a notice
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(LAST_DRAIN_S)
        self._kill()
        self._process.wait()
        self._reader.join(LAST_DRAIN_S)

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # the session is empty
            os.killpg(self._process.pid, signal.SIGKILL)

    def order(self) -> tuple[int, bool, float, int]:
        """Return a key that sorts the cause first: a rank that blames others last, a signal first."""
        return self.secondary(), (self.code() or 0) >= 0, self.ended, self.number

    def secondary(self) -> int:
        """Return 0 if its last lines blame no other process, else 1 + the index in `SECONDARY`."""
        patterns = enumerate(SECONDARY, start=1)
        return max((i for i, p in patterns if any(map(p.search, list(self._tail)))), default=0)

    def ending(self) -> str:
        """Return how it ended, as text."""
        code, names = self._process.returncode, {x.value: x.name for x in signal.Signals}
        if code >= 0:
            return f"ended with exit code {code}"
        return f"was killed by {names.get(-code, f'signal {-code}')}"

    def last_lines(self, count: int = LINES) -> str:
        """Return its last lines, indented."""
        lines = [f"\n  [{self.number}] {line}" for line in list(self._tail)[-count:]]
        return "".join(lines) or " it has printed nothing"
