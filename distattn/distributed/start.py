"""The start of a process in its job, and its exit after an error.

`jax.distributed.initialize` does the work. This file adds what JAX hangs on, accepts in silence, or
reports without saying which rank: absent ranks, ports in use, ranks that differ, uncaught exceptions.
"""

import atexit
import contextlib
import dataclasses
import errno
import functools
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import jax
import jaxlib.version

from distattn.distributed.agreement import assert_same, barrier

PREFIX = "DISTATTN_"  # starts the names of the launcher's variables
LAUNCHED_TIMEOUT_S, CLUSTER_TIMEOUT_S = 60, 300
SPARE_S = 30  # added to JAX's own time-out, which ends the process without saying why
LINGER_S = (
    1.0  # rank 0 exits last: its end is the end of the others, which may be printing an error
)
COLLECTIVE_TIMEOUT_FLAG = "xla_cpu_collective_timeout_seconds"


@dataclasses.dataclass(frozen=True)
class JobPlace:
    """Place of a process in its job. JAX's cluster detection finds what is None."""

    coordinator_address: str | None = None  # host:port of rank 0
    num_processes: int | None = None
    process_id: int | None = None
    cpu_devices: int | None = None  # per process
    roll_call: str | None = None  # directory of the launcher with a file per rank in `initialize`

    def variables(self) -> dict[str, str]:
        """Return the environment variables that `from_environment` reads."""
        fields = dataclasses.asdict(self)
        return {f"{PREFIX}{name.upper()}": str(value) for name, value in fields.items()}

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> "JobPlace | None":
        """Return the place that `distattn launch` has set, or None without a launcher.

        Raises:
          ValueError: some variables are absent or not numbers.
        """
        names = [f"{PREFIX}{field.name.upper()}" for field in dataclasses.fields(cls)]
        if not any(name in environment for name in names):
            return None
        try:
            address, *numbers, roll_call = (environment[name] for name in names)
            return cls(address, *map(int, numbers), roll_call=roll_call)
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"a variable of {', '.join(names)} is absent or not a number ({error}); `distattn launch` "
                "sets them: leave all of them to it, or unset all of them"
            ) from None

    def arrive(self) -> None:
        """Add this rank to the roll call."""
        if self.roll_call is not None:
            Path(self.roll_call, str(self.process_id)).touch()

    def absent(self) -> list[int]:
        """Return the ranks that are not in the roll call; none without a launcher."""
        if self.roll_call is None or self.num_processes is None:
            return []
        arrived = {path.name for path in Path(self.roll_call).iterdir()}
        return [rank for rank in range(self.num_processes) if str(rank) not in arrived]


_first: list[JobPlace] = []  # place in the first call of `initialize`


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
    """Make this process a rank of a job: `jax.distributed.initialize`, with errors that name the ranks.

    Call it in every process before JAX is used. You need no arguments under `distattn launch` and in
    clusters that JAX detects (SLURM, Open MPI, Kubernetes, Cloud TPU); arguments that you pass win. It
    does nothing in a process that is alone, or in a second call with the same arguments or none.

    When it returns, the devices of all processes are known. All processes have the same versions of jax,
    jaxlib and distattn and as many devices. From then on an uncaught exception ends the process at once,
    with its traceback and exit code 1. (JAX alone would first wait for the others, which wait for this
    process.) `sys.exit` with an error does wait, for `shutdown_timeout_s`: raise an exception instead.

    Args:
      coordinator_address: host:port of rank 0; the port must be free there.
      num_processes: number of processes in the job.
      process_id: rank of this process, from 0.
      cpu_devices: number of CPU devices to run on; None keeps the devices of the machine.
      local_device_ids: devices that this process sees, as in `jax.distributed.initialize`.
      cluster_detection_method: as in `jax.distributed.initialize`. None detects nothing if the first
        three arguments are known.
      coordinator_bind_address: as in `jax.distributed.initialize`.
      initialization_timeout_s: seconds to wait for the others (JAX's `initialization_timeout`); None is
        60 under the launcher, else 300. After it the process prints what is missing and ends with exit
        code 1, because JAX's wait cannot be interrupted.
      heartbeat_timeout_s: seconds of silence after which a process counts as dead and JAX ends the
        others (`heartbeat_timeout_seconds`, 100 in JAX); None is 30, or 10 if recoverable.
      shutdown_timeout_s: seconds that a finished process waits for the others (JAX's
        `shutdown_timeout_seconds`).
      collective_timeout_s: seconds after which a CPU collective that waits for another process raises
        ("Gloo ... Timed out"); None is 300, or 30 if recoverable. It sets XLA's flag
        `--xla_cpu_collective_timeout_seconds` if JAX runs on the CPU and `XLA_FLAGS` lacks it. The first
        collective among some devices always waits for 30 s ("Gloo context initialization failed"):
        call `barrier` before it if processes reach it at different times.
      recoverable: let the others go on if a process dies (JAX's `jax_enable_recoverability`), see
        `all_or_none`. At its end a process then waits for the others.

    Raises:
      ValueError: the arguments contradict each other.
      RuntimeError: JAX has been used already, a second call has other arguments, the port is in use, the
        processes differ in job size, versions or devices, or JAX does not detect the MPI that started
        several processes.
      TimeoutError: there is no answer at `coordinator_address`.

    Examples:
      >>> import subprocess, sys
      >>> program = (
      ...     "import jax, distattn; distattn.distributed.initialize(cpu_devices=2);"
      ...     "print(jax.process_count(), jax.device_count())"
      ... )
      >>> subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.split()
      ['1', '2']
    """
    job = JobPlace.from_environment(os.environ)
    place = JobPlace(coordinator_address, num_processes, process_id, cpu_devices)
    if _first:
        _check_same_call(place, _first[0])
        return
    if job is not None:
        passed = {name: x for name, x in dataclasses.asdict(place).items() if x is not None}
        place = dataclasses.replace(job, **passed)
    _check(place)
    _configure(place, collective_timeout_s or (30 if recoverable else 300), recoverable)
    if place.num_processes != 1:
        timeout_s = initialization_timeout_s or (LAUNCHED_TIMEOUT_S if job else CLUSTER_TIMEOUT_S)
        options = {
            "local_device_ids": local_device_ids,
            "cluster_detection_method": cluster_detection_method,
            "coordinator_bind_address": coordinator_bind_address,
            "initialization_timeout": timeout_s + SPARE_S,
            "heartbeat_timeout_seconds": heartbeat_timeout_s or (10 if recoverable else 30),
            "shutdown_timeout_seconds": shutdown_timeout_s,
        }
        held = job is not None and job.coordinator_address == place.coordinator_address
        if jax.distributed.is_initialized() or _connect(place, held, timeout_s, options):
            sys.excepthook = functools.partial(_exit_on_error, sys.excepthook)
            _check_others(place, timeout_s)
            if recoverable:
                atexit.register(_end_together, shutdown_timeout_s)
    _first.append(place)


def _check_same_call(place: JobPlace, first: JobPlace) -> None:
    for name, value in dataclasses.asdict(place).items():
        if value not in (None, getattr(first, name)):
            raise RuntimeError(
                f"initialize has been called already, with {name}={getattr(first, name)!r}, and now with "
                f"{value!r}; a process starts once: call it once, or again without arguments"
            )


def _check(place: JobPlace) -> None:
    """Raise ValueError before any wait for a place that cannot be."""
    count, rank, address = place.num_processes, place.process_id, place.coordinator_address
    if count is not None and count < 1:
        raise ValueError(f"num_processes={count}; a job has at least 1: pass the number of ranks")
    if count is not None and rank is not None and not 0 <= rank < count:
        raise ValueError(
            f"process_id={rank} of num_processes={count}; ranks count from 0 to {count - 1}: start fewer "
            "processes, or pass a larger num_processes"
        )
    if address is not None and not address.rpartition(":")[2].isdecimal():
        raise ValueError(
            f"coordinator_address={address!r}; it must be host:port, as '10.0.0.1:1234'"
        )
    if place.cpu_devices is not None and place.cpu_devices < 1:
        raise ValueError(
            f"cpu_devices={place.cpu_devices}; a process has at least 1: pass 1 or more"
        )


def _configure(place: JobPlace, collective_timeout_s: int, recoverable: bool) -> None:
    """Set the options that JAX reads only at its start."""
    jax.config.update("jax_enable_recoverability", recoverable)
    if place.cpu_devices is not None:
        jax.config.update("jax_num_cpu_devices", place.cpu_devices)
        jax.config.update("jax_platforms", "cpu")
    flags = os.environ.get("XLA_FLAGS", "")
    if jax.config.values.get("jax_platforms") == "cpu" and COLLECTIVE_TIMEOUT_FLAG not in flags:
        flags += f" --{COLLECTIVE_TIMEOUT_FLAG}={collective_timeout_s}"
        os.environ["XLA_FLAGS"] = flags.strip()


def _connect(place: JobPlace, held: bool, timeout_s: float, options: dict[str, Any]) -> bool:
    """Start JAX's distributed runtime; return False if there is no job.

    Args:
      place: place of this process.
      held: whether the launcher holds the coordinator's port.
      timeout_s: seconds to wait for the others.
      options: further arguments of `jax.distributed.initialize`.
    """
    address, rank = place.coordinator_address, place.process_id
    arguments = (address, place.num_processes, rank)
    deadline = time.monotonic() + timeout_s
    if None not in arguments and options["cluster_detection_method"] is None:
        options["cluster_detection_method"] = "deactivate"
    if held and options["coordinator_bind_address"] is None:
        options["coordinator_bind_address"] = address  # not open to other machines
    place.arrive()
    if address is not None and rank is not None:
        if rank > 0:
            _await_coordinator(address, rank, timeout_s)
        elif not held:
            _check_port(options["coordinator_bind_address"] or address)
    try:
        with _exit_after(deadline, place, timeout_s):
            jax.distributed.initialize(*arguments, **options)
    except ValueError as error:  # from cluster detection
        if set(arguments) != {None} or "coordinator_address should" not in str(error):
            raise
        for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
            if os.environ.get(name, "1") != "1":
                raise RuntimeError(
                    f"MPI has started several processes, {name}={os.environ[name]}, but JAX does not see "
                    "it (Open MPI 5: only since jax 0.12), and each would be alone; pass "
                    "coordinator_address, num_processes and process_id"
                ) from None
        return False
    return True


def _check_port(address: str) -> None:
    """Raise RuntimeError if another program listens on the port: JAX would share it and end that job."""
    port = int(address.rpartition(":")[2])
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(
            socket.SOL_SOCKET, socket.SO_REUSEADDR, 1
        )  # a job that ended does not count
        try:
            probe.bind(("", port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:  # JAX reports other errors itself
                raise RuntimeError(
                    f"port {port} of coordinator_address is in use on this machine, maybe by another job; "
                    "choose a free one, in all processes"
                ) from None


def _await_coordinator(address: str, rank: int, timeout_s: float) -> None:
    """Wait until rank 0 listens; raise TimeoutError if it does not."""
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError as error:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"rank {rank}: no answer at coordinator_address={address!r} after {timeout_s:g} s "
                    f"({error}); rank 0 must have started, and this must be its address"
                ) from None
            time.sleep(0.1)
        else:
            return


@contextlib.contextmanager
def _exit_after(deadline: float, place: JobPlace, timeout_s: float) -> Generator[None, None, None]:
    """End the process at the deadline with a message about the absent ranks, unless the block is done."""

    def give_up() -> None:
        rank = "this process" if place.process_id is None else f"rank {place.process_id}"
        count = "" if place.num_processes is None else f" of {place.num_processes}"
        reason = (
            "some rank has not come to initialize, or has another version of jax, or two have the same "
            "number, or another job is there"
        )
        if absent := place.absent():
            reason = f"not come to initialize: {', '.join(map(str, absent))}"
        where = place.coordinator_address or "the coordinator"
        message = f"{rank}{count} has waited {timeout_s:g} s for the others at {where}; {reason}"
        sys.stderr.write(f"distattn.distributed.initialize: {message}\n")
        _exit(1)

    watch = threading.Timer(max(1.0, deadline - time.monotonic()), give_up)
    watch.daemon = True
    watch.start()
    try:
        yield
    finally:
        watch.cancel()


def _check_others(place: JobPlace, timeout_s: float) -> None:
    """Raise RuntimeError if the processes differ in job size, versions or devices; start the devices."""
    facts = {"num_processes": place.num_processes}  # JAX accepts a wrong one in silence
    assert_same("initialize", facts | versions(), timeout_s=timeout_s)
    local = jax.local_devices()
    devices = {"platform": local[0].platform, "devices of a process": len(local)}
    assert_same("initialize: devices", devices, timeout_s=timeout_s)


def versions() -> dict[str, str]:
    """Return the versions of distattn, jax and jaxlib."""
    package = sys.modules[__name__.partition(".")[0]]  # it imports this module
    jaxlib_version = jaxlib.version.__version__
    return {"distattn": package.__version__, "jax": jax.__version__, "jaxlib": jaxlib_version}


def _exit_on_error(
    show: Callable[..., Any],
    kind: type[BaseException],
    error: BaseException,
    trace: TracebackType | None,
) -> None:
    """Show an uncaught exception and end the process; JAX would make it wait for the others."""
    show(kind, error, trace)
    if jax.process_index() == 0:
        time.sleep(LINGER_S)
    _exit(130 if issubclass(kind, KeyboardInterrupt) else 1)


def _exit(code: int) -> NoReturn:
    """Flush the output and end the process without waiting for anything else."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    os._exit(code)


def _end_together(timeout_s: float) -> None:
    """Wait for the others at the end: JAX does not wait for recoverable processes."""
    with contextlib.suppress(RuntimeError, TimeoutError):  # the others have printed their errors
        barrier("the end of the program", timeout_s)
    if jax.process_index() == 0:
        time.sleep(LINGER_S)
