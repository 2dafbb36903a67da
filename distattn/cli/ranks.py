"""The processes of `distattn launch`: started, heard, and ended."""

import collections
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import BinaryIO

from distattn.cli import child
from distattn.distributed.start import Launched

LINES = 20  # of each rank that are kept
DRAIN_S, LAST_DRAIN_S = 0.3, 2.0  # for the last lines of a rank that has ended; and at the very end
# What a process says that fails because another has: first those that were waiting for it, then those
# that JAX's coordination service ended, unless it refuses this one: a number out of range, or taken.
SECONDARY = (
    re.compile(
        r"[Gg]loo.*(failed|[Ee]rror|imed out)|Connection (reset|closed) by peer|did not come to"
    ),
    re.compile(r"detected fatal errors(?!.*(INVALID_ARGUMENT|ALREADY_EXISTS))|heartbeat timeout"),
)
# What Gloo says of each device that has its connections: a screen of it, in which a job's output drowns.
# Threads may tear it to pieces; a line that has anything else is none.
_PIECES = (r"\[Gloo\] Rank ", r" peer ranks\. Expected number of connected peer ranks is : ")
GREETING = re.compile(rf"(?=.*({'|'.join(_PIECES)}))({'|'.join(_PIECES)}| is connected to |\d)+")

_output = threading.Lock()  # lines of different ranks do not mix
_shown: collections.deque[int] = collections.deque(maxlen=LINES)  # whose the last lines were


class Guard:
    """The process that ends the ranks should the launcher be killed."""

    def __enter__(self) -> "Guard":
        """Starts it."""
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", child.__file__, "guard"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        return self

    def tell(self, line: str) -> None:
        """What it is to end or remove: see `child`."""
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()

    def spawn(
        self,
        command: Sequence[str],
        *,
        stdin: int,
        stdout: int,
        stderr: int,
        variables: Mapping[str, str] = MappingProxyType({}),
    ) -> subprocess.Popen[bytes]:
        """A process in a session of its own, which ends when this one does, however that is."""
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", child.__file__, "rank", str(os.getpid()), *command],
            stdin=stdin,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
            env=os.environ | variables,
        )
        self.tell(f"group {process.pid}")
        return process

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Ends it; after an exception it first does what it is there for."""
        with contextlib.suppress(BrokenPipeError):  # somebody has killed it
            if kind is None:
                self.tell("done")
            self._process.stdin.close()
        self._process.wait()


class Rank:
    """A process of the job, in a session of its own."""

    def __init__(
        self, number: int, process: subprocess.Popen[bytes], log: Path | None, show_gloo: bool
    ) -> None:
        self.number: int = number
        self.log: Path | None = log
        self.show_gloo: bool = show_gloo
        self.ended: float = 0.0  # when it was noticed, by time.monotonic
        self._process = process
        self._tail: collections.deque[str] = collections.deque(maxlen=LINES)
        self._reader = threading.Thread(target=self._read, args=(process.stdout,), daemon=True)
        self._reader.start()

    def code(self) -> int | None:
        """Its exit code, minus the number of the signal that ended it, or None while it runs."""
        before, code = self._process.returncode, self._process.poll()
        if before is None and code is not None:
            self.ended = time.monotonic()
            self._kill()  # what it has started and left behind
            self._reader.join(DRAIN_S)
        return code

    def notify(self) -> None:
        """Sends it a SIGTERM, the notice of an end to come, if it runs."""
        if self.code() is None:
            self._process.terminate()

    def end(self) -> None:
        """Ends it, and all that it has started in its session, if it runs."""
        if self.code() is None:
            self._kill()  # SIGTERM is not enough: JAX takes it for a notice
            self._process.wait()
        self._reader.join(LAST_DRAIN_S)

    def remoteness(self) -> int:
        """How far it was from the cause, as its last lines say: 0 where they blame no other process."""
        patterns = enumerate(SECONDARY, start=1)
        return max((i for i, p in patterns if any(map(p.search, self._tail))), default=0)

    def what(self) -> str:
        """How it ended."""
        code = self._process.returncode
        if code >= 0:
            return f"ended with exit code {code}"
        try:
            return f"was killed by {signal.Signals(-code).name}"
        except ValueError:  # a real-time signal has no name
            return f"was killed by signal {-code}"

    def last_lines(self, count: int = LINES) -> str:
        """The last lines that it has printed, each on a line of its own."""
        lines = [f"\n  [{self.number}] {line}" for line in list(self._tail)[-count:]]
        return "".join(lines) or " it has printed nothing"

    def just_shown(self) -> bool:
        """Whether its last lines were shown as they came, and those of no other rank after them."""
        with _output:
            count = len(self._tail)
            return count > 0 and list(_shown)[-count:] == [self.number] * count

    def _kill(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody is left in it
            os.killpg(self._process.pid, signal.SIGKILL)

    def _read(self, pipe: BinaryIO) -> None:
        with contextlib.ExitStack() as stack:
            stack.enter_context(pipe)
            log = stack.enter_context(self.log.open("wb", buffering=0)) if self.log else None
            for raw in pipe:
                if log is not None:
                    log.write(raw)
                line = raw.decode(errors="replace").rstrip("\r\n")
                greeting = GREETING.fullmatch(line) is not None
                if not greeting:
                    self._tail.append(line)
                elif not self.show_gloo:
                    continue
                with _output:
                    try:
                        print(f"[{self.number}] {line}", flush=True)
                        _shown.append(self.number)
                    except BrokenPipeError:  # `| head` has seen enough
                        _shown.clear()


def start(
    place: Launched, command: Sequence[str], log_dir: Path | None, guard: Guard, *, show_gloo: bool
) -> Rank:
    """Starts a rank."""
    process = guard.spawn(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        variables={"PYTHONUNBUFFERED": "1"} | place.variables(),
    )
    log = None if log_dir is None else log_dir / f"rank-{place.process_id}.log"
    return Rank(place.process_id, process, log, show_gloo)


@contextlib.contextmanager
def free_port() -> Generator[int, None, None]:
    """A free port that nobody else is given while the job runs.

    Bound and not listening: JAX's coordinator shares a port with its own user (SO_REUSEPORT), and all
    others find it taken.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def first_cause(failed: Sequence[Rank]) -> Rank:
    """The rank that failed by itself: those that blame others last, those killed by a signal first."""

    def order(rank: Rank) -> tuple[int, bool, float, int]:
        return rank.remoteness(), rank.code() >= 0, rank.ended, rank.number

    return min(failed, key=order)
