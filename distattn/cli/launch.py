"""`distattn launch`: the processes of a job on this machine, for simulation and tests."""

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Generator
from pathlib import Path
from types import FrameType

from distattn.cli.arguments import CommandError, Subparsers, at_least
from distattn.cli.ranks import Guard, Rank, first_cause, free_port, start
from distattn.distributed.agreement import ranks as ranks_text
from distattn.distributed.start import Launched

POLL_S = 0.05
# After the first failure: how long others that fail may turn out to be the cause; and how long, where
# all that failed so far say only that another process did.
SETTLE_S, SETTLE_SECONDARY_S = 0.3, 1.0
TIMED_OUT, TERMINATED = 124, 143  # exit codes, as of timeout(1) and of a shell
EXAMPLE = "distattn launch -n 4 --devices-per-process 2 -- python script.py"


class Terminated(SystemExit):
    """The launcher has got a SIGTERM."""


def add(subparsers: Subparsers) -> None:
    """The command and its arguments."""
    parser = subparsers.add_parser(
        "launch",
        help="runs a script as several processes on this machine, each with its own CPU devices",
        usage="distattn launch [-h] -n N [--devices-per-process N] [--may-fail N] [--timeout S] "
        "[--grace S] [--log-dir DIR] [--show-gloo] -- COMMAND ...",
        description="Starts a command N times, as the ranks of one job. A script that calls "
        "distattn.distributed.initialize() without arguments becomes one of N processes of a JAX program. "
        "What the ranks print comes out line by line as [rank] line. When a rank fails the others are "
        "ended, and the rank, its exit code and its last lines are printed.",
    )
    whole, argument = at_least(1), parser.add_argument
    argument("-n", "--processes", type=whole, required=True, metavar="N", help="how many ranks")
    argument(
        "--devices-per-process",
        type=whole,
        default=1,
        metavar="N",
        help="CPU devices of each (default %(default)s)",
    )
    argument(
        "--may-fail",
        type=at_least(0),
        default=0,
        metavar="N",
        help="so many ranks may fail, but not rank 0, and the others go on (default %(default)s)",
    )
    argument(
        "--grace",
        type=_seconds,
        default=5.0,
        metavar="S",
        help="on SIGTERM the ranks get one, and so many seconds to save and end (default %(default)s)",
    )
    argument("--timeout", type=_seconds, metavar="S", help="end the job after so many seconds")
    argument("--log-dir", metavar="DIR", help="also write what each rank prints to DIR/rank-N.log")
    argument(
        "--show-gloo",
        action="store_true",
        help="also show the lines in which Gloo says that a device is connected to its peers; without it "
        "they are in the files of --log-dir alone",
    )
    argument("command", nargs=argparse.REMAINDER, metavar="-- COMMAND", help="what each rank runs")
    parser.set_defaults(run=_run)


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return seconds


def _run(options: argparse.Namespace) -> int:
    command = options.command[1:] if options.command[:1] == ["--"] else options.command
    if not command:
        raise CommandError(f"nothing to run; put the command behind --, as in: {EXAMPLE}")
    if shutil.which(command[0]) is None:
        raise CommandError(f"the command {command[0]!r} is not found, or may not be run")
    log_dir = _make(options.log_dir)
    began = time.monotonic()
    ranks: list[Rank] = []
    with free_port() as port, Guard() as guard, _roll_call(guard) as roll_call, _terminable():
        try:
            for number in range(options.processes):
                place = Launched(
                    coordinator_address=f"127.0.0.1:{port}",
                    num_processes=options.processes,
                    process_id=number,
                    cpu_devices=options.devices_per_process,
                    roll_call=roll_call,
                )
                rank = start(place, command, log_dir, guard, show_gloo=options.show_gloo)
                ranks.append(rank)
            failed = _watch(ranks, options.may_fail, options.timeout and began + options.timeout)
        except Terminated:
            _give_notice(ranks, options.grace)
            raise
        finally:
            running = [rank.number for rank in ranks if rank.code() is None]
            for rank in ranks:
                rank.end()
    seconds = time.monotonic() - began
    if failed:
        return _report(first_cause(failed), running, seconds)
    if running:
        _say(f"not done after {options.timeout:g} s, ended; still running: {ranks_text(running)}")
        for rank in ranks:
            if rank.number in running:
                _say(f"the last lines of rank {rank.number}:{rank.last_lines(5)}")
        return TIMED_OUT
    return 0


def _watch(ranks: list[Rank], may_fail: int, deadline: float | None) -> list[Rank]:
    """Waits for the ranks: until all are done, too many have failed, or it is too late.

    Returns:
      Those that failed; none where they were not too many.
    """
    settled = None
    said: set[int] = set()
    while True:
        codes = [rank.code() for rank in ranks]
        failed = [rank for rank, code in zip(ranks, codes, strict=True) if code]
        now = time.monotonic()
        if len(failed) <= may_fail and not ranks[0].code():
            for rank in failed:
                if rank.number not in said:
                    _say(f"rank {rank.number} {rank.what()}; the others go on")
            said |= {rank.number for rank in failed}
            failed = []
        if failed:
            secondary = all(rank.remoteness() for rank in failed)
            first = min(rank.ended for rank in failed)
            settled = first + (SETTLE_SECONDARY_S if secondary else SETTLE_S)
        if None not in codes or (settled and now > settled) or (deadline and now > deadline):
            return failed
        time.sleep(POLL_S)


def _give_notice(ranks: list[Rank], grace_s: float) -> None:
    """Tells the ranks that they will be ended, and waits for those that end by themselves."""
    for rank in ranks:
        rank.notify()
    deadline = time.monotonic() + grace_s
    while None in [rank.code() for rank in ranks] and time.monotonic() < deadline:
        time.sleep(POLL_S)


def _report(cause: Rank, running: list[int], seconds: float) -> int:
    rest = f"; ended with it: {ranks_text(running)}" if running else ""
    seen = ", because another process failed, as it says" if cause.remoteness() else ""
    _say(f"rank {cause.number} {cause.what()} after {seconds:.1f} s{seen}{rest}")
    above = cause.just_shown() and _one_screen()
    _say("its last lines are above" if above else f"its last lines:{cause.last_lines()}")
    if cause.log is not None:
        _say(f"all of them: {cause.log}")
    code = cause.code() or 1
    return code if code > 0 else 128 - code


def _one_screen() -> bool:
    """Whether what is said here and what the ranks print go to the same place."""
    try:
        return os.path.sameopenfile(sys.stdout.fileno(), sys.stderr.fileno())
    except (OSError, ValueError):  # a stream that is no file, or is closed
        return False


def _say(text: str) -> None:
    print(f"distattn launch: {text}", file=sys.stderr, flush=True)


def _make(log_dir: str | None) -> Path | None:
    if log_dir is None:
        return None
    path = Path(log_dir)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CommandError(f"--log-dir {shlex.quote(log_dir)}: {error.strerror}") from None
    return path


@contextlib.contextmanager
def _roll_call(guard: Guard) -> Generator[str, None, None]:
    with tempfile.TemporaryDirectory(prefix="distattn-", ignore_cleanup_errors=True) as directory:
        guard.tell(f"directory {directory}")
        yield directory


@contextlib.contextmanager
def _terminable() -> Generator[None, None, None]:
    """SIGTERM ends the launcher by an exception, so that it can end the ranks."""

    def leave(number: int, frame: FrameType | None) -> None:
        _say(f"ended by {signal.Signals(number).name}")
        raise Terminated(TERMINATED)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
