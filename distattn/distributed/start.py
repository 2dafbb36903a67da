"""What can be seen of the coordinator before JAX waits for it, in which it cannot be interrupted.

What `distattn launch` tells a rank, in the variables of its environment.

The end of a process that JAX would make wait for the others.

The start of a process that is one of many.
"""

import atexit
import contextlib
import dataclasses
import errno
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import jax
import jaxlib.version

from distattn.distributed.agreement import assert_same, barrier, differences


def check_port(address: str) -> None:
    """Refuses a port on which somebody listens: JAX would share it, and end the other job.

    Raises:
      RuntimeError: somebody does.
    """
    port = int(address.rpartition(":")[2])
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # not: after a job that ended
        try:
            probe.bind(("", port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                return  # JAX will say what it thinks of the address
            raise RuntimeError(
                f"port {port} of coordinator_address is in use on this machine, maybe by another job; "
                "choose a free one, in all processes"
            ) from None


def await_coordinator(address: str, rank: int, timeout_s: float) -> None:
    """Waits until something listens where rank 0 should.

    Raises:
      TimeoutError: nothing does.
    """
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError as error:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"rank {rank}: nobody answers at coordinator_address={address!r} after {timeout_s:g} s "
                    f"({error}); rank 0 must have started, and this must be its address"
                ) from None
            time.sleep(0.1)
        else:
            return


PREFIX = "DISTATTN_"


@dataclasses.dataclass(frozen=True)
class Launched:
    """A rank's place in its job."""

    coordinator_address: str  # host:port, of rank 0
    num_processes: int
    process_id: int
    cpu_devices: int  # of each process
    roll_call: str  # a directory, in which each rank that comes to `initialize` says so

    def variables(self) -> dict[str, str]:
        """The variables that `read` understands."""
        fields = dataclasses.asdict(self)
        return {f"{PREFIX}{name.upper()}": str(value) for name, value in fields.items()}

    def answer(self, facts: dict[str, str]) -> dict[int, dict[str, str]]:
        """Leaves this rank's facts in the roll call; returns those of all that have come so far."""
        directory = Path(self.roll_call)
        unfinished = directory / f"{self.process_id}.unfinished"
        unfinished.write_text(json.dumps(facts), encoding="utf-8")
        unfinished.rename(directory / str(self.process_id))
        present = (path for path in directory.iterdir() if path.name.isdecimal())
        return {int(path.name): json.loads(path.read_text(encoding="utf-8")) for path in present}

    def absent(self) -> list[int]:
        """The ranks that have not come to `initialize` yet."""
        there = {path.name for path in Path(self.roll_call).iterdir()}
        return [rank for rank in range(self.num_processes) if str(rank) not in there]


NAMES = frozenset(f"{PREFIX}{field.name.upper()}" for field in dataclasses.fields(Launched))


def read(environment: Mapping[str, str]) -> Launched | None:
    """What the launcher has set, or None where there is no launcher.

    Raises:
      ValueError: some of the variables and not the others, or no numbers in them.
    """
    fields = {f.name: int if f.type is int else str for f in dataclasses.fields(Launched)}
    given = {name: environment.get(f"{PREFIX}{name.upper()}") for name in fields}
    absent = [f"{PREFIX}{name.upper()}" for name, text in given.items() if text is None]
    if len(absent) == len(fields):
        return None
    remedy = "they are set by `distattn launch`: leave all of them to it, or unset all of them"
    if absent:
        raise ValueError(f"the environment lacks {', '.join(absent)}; {remedy}")
    try:
        return Launched(**{name: kind(given[name]) for name, kind in fields.items()})
    except ValueError as error:
        raise ValueError(f"the variables {PREFIX}* of the environment: {error}; {remedy}") from None


LINGER_S = 1.0  # of rank 0, with which the others end: they may be about to say why, or to leave


def leave_at_once_on_error() -> None:
    """An exception that nobody catches ends the process, which at its end would wait for the others."""
    show = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        show(kind, error, trace)
        if jax.process_index() == 0:
            time.sleep(LINGER_S)
        end(130 if issubclass(kind, KeyboardInterrupt) else 1)

    sys.excepthook = hook


def end(code: int, message: str = "") -> NoReturn:
    """Ends this process now: what it has printed is out, and nothing else is waited for."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            if message and stream is sys.stderr:
                stream.write(f"{message}\n")
            stream.flush()
    os._exit(code)


LOCAL_TIMEOUT_S, CLUSTER_TIMEOUT_S = 60, 300
SPARE_S = 30  # by which JAX's own time-out is later: it ends the process without saying why
COLLECTIVE_TIMEOUT_FLAG = "xla_cpu_collective_timeout_seconds"


@dataclasses.dataclass(frozen=True)
class Place:
    """Where this process is in its job; None: left to JAX's cluster detection."""

    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    cpu_devices: int | None = None


_first: list[Place] = []  # the place of the call that started this process


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    cpu_devices: int | None = None,
    local_device_ids: Sequence[int] | None = None,
    cluster_detection_method: str | None = None,
    coordinator_bind_address: str | None = None,
    initialization_timeout_s: int | None = None,
    heartbeat_timeout_s: int | None = None,
    shutdown_timeout_s: int = 300,
    collective_timeout_s: int | None = None,
    recoverable: bool = False,
) -> None:
    """Makes this process one of a job: `jax.distributed.initialize`, with checks and errors that say who.

    Comes before JAX is first used, in every process. Under `distattn launch`, and in the clusters that JAX
    detects (SLURM, Open MPI, Kubernetes, Cloud TPU), no arguments are needed; those that are given win. A
    process that is alone has nothing to do. A second call with the same arguments, or none, does nothing.

    When it returns, the devices of all processes are known, and all have the same versions of jax, jaxlib
    and distattn and as many devices each. From then on an exception that nobody catches ends the process at
    once, with its traceback and exit code 1: JAX would first wait for the others, which wait for this one.
    `sys.exit` with an error does wait for them, for `shutdown_timeout_s`; raise an exception instead.

    Args:
      coordinator_address: host:port, of rank 0, where the port is free.
      num_processes: of the job.
      process_id: the rank of this one, from 0.
      cpu_devices: run on the CPU, as so many devices; None: on the devices that there are.
      local_device_ids: those that this process sees, as in `jax.distributed.initialize`.
      cluster_detection_method: as there; None: where the first three arguments are known there is none.
      coordinator_bind_address: as there.
      initialization_timeout_s: how long to wait for the others; None: 60 under the launcher, else 300
        (JAX's `initialization_timeout`). After it the process ends with exit code 1 and says what is
        missing: what JAX waits in cannot be interrupted.
      heartbeat_timeout_s: after how long a process that is silent counts as dead: JAX then ends the others
        (its `heartbeat_timeout_seconds`, 100 by default). None: 30, or 10 where recoverable.
      shutdown_timeout_s: how long a process that is done waits for the others (JAX's
        `shutdown_timeout_seconds`).
      collective_timeout_s: after how long a collective on the CPU that waits for another process raises an
        error ("Gloo ... Timed out"): XLA's flag `--xla_cpu_collective_timeout_seconds`, unless `XLA_FLAGS`
        has it. None: 300, or 30 where recoverable. Used where JAX is set to run on the CPU. The first
        collective among some devices waits for 30 s, whatever is set ("Gloo context initialization
        failed"): where processes come to it at different times, `barrier` before it.
      recoverable: a process that dies does not end the others (JAX's `jax_enable_recoverability`): they can
        go on without it, see `all_or_none`. At its end a process waits for the others.

    Raises:
      ValueError: arguments that do not fit together.
      RuntimeError: JAX has been used already; a second call with other arguments; the port is in use; the
        processes differ in the size of the job, in versions, or in devices; an MPI that JAX does not detect
        has started several.
      TimeoutError: nobody answers at `coordinator_address`.

    Example:
      >>> import subprocess, sys
      >>> program = (
      ...     "import jax, distattn; distattn.distributed.initialize(cpu_devices=2);"
      ...     "print(jax.process_count(), jax.device_count())"
      ... )
      >>> subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.split()
      ['1', '2']
    """
    job = read(os.environ)
    given = Place(coordinator_address, num_processes, process_id, cpu_devices)
    if _first:
        _check_same_call(given, _first[0])
        return
    place = _place(given, job)
    timeout_s = initialization_timeout_s or (LOCAL_TIMEOUT_S if job else CLUSTER_TIMEOUT_S)
    _check_place(place)
    _configure(place, collective_timeout_s or (30 if recoverable else 300), recoverable)
    if place.num_processes == 1:
        _first.append(place)
        return
    options = {
        "local_device_ids": local_device_ids,
        "cluster_detection_method": cluster_detection_method,
        "coordinator_bind_address": coordinator_bind_address,
        "initialization_timeout": timeout_s + SPARE_S,
        "heartbeat_timeout_seconds": heartbeat_timeout_s or (10 if recoverable else 30),
        "shutdown_timeout_seconds": shutdown_timeout_s,
    }
    if jax.distributed.is_initialized() or _connect(place, job, timeout_s, options):
        leave_at_once_on_error()
        _check_others(place, timeout_s)
        if recoverable:
            atexit.register(_end_together, shutdown_timeout_s)
    _first.append(place)


def _connect(place: Place, job: Launched | None, timeout_s: float, options: dict[str, Any]) -> bool:
    """Starts JAX's distributed runtime; False where there is no job: this process is alone."""
    began, address, rank = time.monotonic(), place.coordinator_address, place.process_id
    where = (address, place.num_processes, rank)
    if None not in where and options["cluster_detection_method"] is None:
        options["cluster_detection_method"] = "deactivate"
    if job is not None and (different := differences(job.answer(_versions()))):
        # Processes with different versions of JAX may not even find each other.
        raise RuntimeError(f"initialize: the processes differ{different}")
    held = job is not None and job.coordinator_address == address  # the port, by the launcher
    if held and options["coordinator_bind_address"] is None:
        options["coordinator_bind_address"] = address  # not open to other machines
    if address is not None and rank is not None:
        if rank > 0:
            await_coordinator(address, rank, timeout_s)
        elif not held:
            check_port(options["coordinator_bind_address"] or address)
    left_s = max(1.0, timeout_s - (time.monotonic() - began))
    watch = threading.Timer(left_s, _give_up, (place, job, timeout_s))
    watch.daemon = True
    watch.start()
    try:
        jax.distributed.initialize(*where, **options)
    except ValueError as error:  # of cluster detection
        if set(where) == {None} and "coordinator_address should" in str(error):
            _check_alone(os.environ)
            return False
        raise
    except RuntimeError as error:
        if "must be called before" in str(error):
            raise _too_late() from None
        raise
    finally:
        watch.cancel()
    return True


def _place(given: Place, job: Launched | None) -> Place:
    """What the caller says, and where nothing is said what the launcher does."""
    if job is None:
        return given
    fields = dataclasses.asdict(given).items()
    return Place(**{name: getattr(job, name) if x is None else x for name, x in fields})


def _check_alone(environment: Mapping[str, str]) -> None:
    """That MPI has not started several: JAX detects Open MPI alone, and its version 5 only since 0.12."""
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if environment.get(name, "1") != "1":
            raise RuntimeError(
                f"MPI has started several processes, {name}={environment[name]}, but JAX does not see it "
                "(Open MPI 5: only since jax 0.12), and each would be alone; pass coordinator_address, "
                "num_processes and process_id"
            )


def _check_same_call(given: Place, first: Place) -> None:
    for name, value in dataclasses.asdict(given).items():
        if value not in (None, getattr(first, name)):
            raise RuntimeError(
                f"initialize has been called already, with {name}={getattr(first, name)!r}, and now with "
                f"{value!r}; a process starts once: call it once, or again without arguments"
            )


def _check_place(place: Place) -> None:
    count, rank, address = place.num_processes, place.process_id, place.coordinator_address
    if count is not None and count < 1:
        raise ValueError(f"num_processes={count}; a job has at least 1")
    if rank is not None and (rank < 0 or (count is not None and rank >= count)):
        of = "" if count is None else f" of num_processes={count}"
        raise ValueError(
            f"process_id={rank}{of}; ranks count from 0"
            + (
                f" to {count - 1}: start fewer processes, or say that there are more"
                if count
                else ""
            )
        )
    if address is not None and not address.rpartition(":")[2].isdecimal():
        raise ValueError(
            f"coordinator_address={address!r}; it must be host:port, as '10.0.0.1:1234'"
        )
    if place.cpu_devices is not None and place.cpu_devices < 1:
        raise ValueError(f"cpu_devices={place.cpu_devices}; a process has at least 1")


def _configure(place: Place, collective_timeout_s: int, recoverable: bool) -> None:
    """The settings of JAX that count only before it starts."""
    jax.config.update("jax_enable_recoverability", recoverable)
    if place.cpu_devices is not None:
        try:
            jax.config.update("jax_num_cpu_devices", place.cpu_devices)
        except RuntimeError:
            raise _too_late() from None
        jax.config.update("jax_platforms", "cpu")
    flags = os.environ.get("XLA_FLAGS", "")
    if jax.config.values.get("jax_platforms") == "cpu" and COLLECTIVE_TIMEOUT_FLAG not in flags:
        flags += f" --{COLLECTIVE_TIMEOUT_FLAG}={collective_timeout_s}"
        os.environ["XLA_FLAGS"] = flags.strip()


def _end_together(timeout_s: float) -> None:
    """JAX waits for no recoverable process at its end, and with rank 0 ends what the others need."""
    with contextlib.suppress(RuntimeError, TimeoutError):  # they have said what they had to say
        barrier("the end of the program", timeout_s)
    if jax.process_index() == 0:
        time.sleep(LINGER_S)  # while they take their leave


def _too_late() -> RuntimeError:
    return RuntimeError(
        "initialize comes too late: JAX has been used in this process (an array, jax.devices, "
        "jax.device_count, a computation); call initialize before any of that"
    )


def _give_up(place: Place, job: Launched | None, timeout_s: float) -> None:
    """Ends a process that waits for others which do not come."""
    of = "" if place.num_processes is None else f" of {place.num_processes}"
    rank = "this process" if place.process_id is None else f"rank {place.process_id}"
    who = (
        "some rank has not come to initialize, or has another version of jax, or two have the same "
        "number, or another job is there"
    )
    if job is not None and (absent := job.absent()):
        who = f"not come to initialize: {', '.join(map(str, absent))}"
    end(
        1,
        f"distattn.distributed.initialize: {rank}{of} has waited {timeout_s:g} s for the others at "
        f"{place.coordinator_address or 'the coordinator'}; {who}",
    )


def _check_others(place: Place, timeout_s: float) -> None:
    """That all processes are of one job and one build; starts the devices."""
    assert_same(
        "initialize", {"num_processes": place.num_processes} | _versions(), timeout_s=timeout_s
    )
    if place.num_processes not in (None, jax.process_count()):
        raise RuntimeError(
            f"num_processes={place.num_processes}, but JAX counts {jax.process_count()}; pass the same "
            "number in every process"
        )
    own = jax.local_devices()
    devices = {"platform": own[0].platform, "devices of a process": len(own)}
    assert_same("initialize: devices", devices, timeout_s=timeout_s)


def _versions() -> dict[str, str]:
    own = sys.modules[__name__.partition(".")[0]]  # which imports this, not the reverse
    versions = {"jax": jax.__version__, "jaxlib": jaxlib.version.__version__}
    return versions | {"distattn": own.__version__}
