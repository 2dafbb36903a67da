"""Failures of a job on several processes: what the user sees, and after how many seconds.

    python scripts/bench/failures.py            # all cases, as the table in docs/pages/hosts.md
    python scripts/bench/failures.py killed ...

Two or three processes run under `distattn launch`, and one of them does something wrong. Seconds count from
that moment to the end of the launcher, which leaves no process. Time-outs are set to a few seconds here;
the table shows their defaults too.
"""

import argparse
import contextlib
import dataclasses
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from distattn import distributed

LIMIT_S = 120


@dataclasses.dataclass(frozen=True)
class Case:
    """Failure that the script causes."""

    what: str
    default: str  # seconds with the default time-outs
    says: str  # pattern of the user's message; its groups are shown
    arguments: Callable[[int], dict] = lambda rank: {}  # for initialize, by rank
    then: Callable[[int, Mesh], None] | None = None  # work after the start
    processes: int = 2
    launcher: tuple[str, ...] = ()


def summed(mesh: Mesh, size: int = 8) -> int:
    """Run a collective of all devices."""
    along = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    shape = (mesh.size * size,)
    ones = jax.make_array_from_callback(shape, along, lambda index: np.ones(size, np.int32))
    whole = NamedSharding(mesh, PartitionSpec())
    return int(jax.jit(lambda x: x.sum(dtype=jnp.int32), out_shardings=whole)(ones))


def fault() -> None:
    """Start to count seconds."""
    print("fault at", time.time(), flush=True)


def dies(rank: int, mesh: Mesh) -> None:
    if rank == 1:
        fault()
        os.kill(os.getpid(), signal.SIGKILL)
    summed(mesh)


def raises(rank: int, mesh: Mesh) -> None:
    if rank == 1:
        fault()
        raise ValueError("a mistake on this rank")
    summed(mesh)


def differs(rank: int, mesh: Mesh) -> None:
    step = jax.jit(lambda x: x + rank).lower(jnp.zeros(()))
    if rank == 1:
        fault()
    distributed.assert_same("the step", {"program": step, "batch": 8 if rank else 16})


def leaves_out(rank: int, mesh: Mesh) -> None:
    if rank == 1:
        fault()
        time.sleep(LIMIT_S)
    summed(mesh)


def late(rank: int, mesh: Mesh) -> None:
    if rank == 1:
        fault()
        time.sleep(LIMIT_S)
    distributed.barrier("the step", timeout_s=5)


def occupied() -> str:
    """Return an address at which another program listens."""
    other = socket.create_server(("127.0.0.1", 0))
    KEPT.append(other)
    return f"127.0.0.1:{other.getsockname()[1]}"


KEPT: list[socket.socket] = []
WAITS = {"initialization_timeout_s": 5}
CASES = {
    "coordinator": Case(
        "wrong `coordinator_address`",
        "300 (60 under the launcher): `initialization_timeout_s`",
        r"(TimeoutError: rank 1: no answer at coordinator_address=.* after 5 s).*",
        lambda rank: {**WAITS, "coordinator_address": "127.0.0.1:9"} if rank else {},
    ),
    "port": Case(
        "port in use",
        "at once",
        r"(RuntimeError: port) \d+ (of coordinator_address is in use on this machine).*",
        lambda rank: {} if rank else {"coordinator_address": occupied()},
    ),
    "missing": Case(
        "a process never comes",
        "300 (60 under the launcher): `initialization_timeout_s`",
        r".*(rank 0 of 2 has waited 5 s) .* (not come to initialize: 1)",
        lambda rank: WAITS if not rank else {"coordinator_address": ""},
    ),
    "many": Case(
        "a process too many",
        "at once",
        r".*(Unexpected task registered with task=2).*",
        lambda rank: {"num_processes": 3, "process_id": 2} if rank else {},
    ),
    "devices": Case(
        "different `--devices-per-process`",
        "at once",
        r"(\['devices of a process'\]: 2 on rank 0; 1 on rank 1)",
        lambda rank: {"cpu_devices": 1} if rank else {},
    ),
    "versions": Case(
        "another size of the job, or version, on one rank",
        "at once",
        r"(\['num_processes'\]: 2 on rank 0; 3 on rank 1)",
        lambda rank: {"num_processes": 3} if rank else {},
    ),
    "killed": Case(
        "a rank is killed, under the launcher",
        "at once",
        r"(distattn launch: rank 1 was killed by SIGKILL after .*)",
        then=dies,
        processes=3,
    ),
    "killed alone": Case(
        "a rank is killed, no launcher ends the others",
        "30: `heartbeat_timeout_s` (10 where recoverable)",
        r".*(JAX distributed service detected fatal errors|Gloo [a-z-]+ failed).*",
        lambda rank: {"heartbeat_timeout_s": 5},
        then=dies,
        processes=3,
        launcher=("--may-fail", "3"),
    ),
    "exception": Case(
        "an exception on one rank", "at once", r"(ValueError: a mistake on this rank)", then=raises
    ),
    "code": Case(
        "other code on one rank, `assert_same` before it runs",
        "at once",
        r"(\['program'\]: a program .* with hash) \w+ (on rank 0;) .* (on rank 1)",
        then=differs,
    ),
    "collective": Case(
        "a collective that one rank leaves out",
        "300: `collective_timeout_s`",
        r".*(Gloo [a-z-]+ failed).*(Timed out waiting 5000ms).*",
        lambda rank: {"collective_timeout_s": 5},
        then=leaves_out,
    ),
    "barrier": Case(
        "`barrier` to which one rank does not come",
        "60: its `timeout_s`",
        r"(TimeoutError: rank 1 of 2 did not come to 'the step' within 5 s).*",
        then=late,
    ),
}


def run_rank(name: str) -> None:
    case, rank = CASES[name], int(os.environ["DISTATTN_PROCESS_ID"])
    print("pid", os.getpid(), flush=True)
    arguments = case.arguments(rank)
    if case.then is None and arguments and rank == (0 if name == "port" else 1):
        fault()
    if name == "missing" and rank:
        time.sleep(LIMIT_S)
    distributed.initialize(**arguments)
    mesh = distributed.make_mesh()
    if case.then is not None:
        summed(mesh, 4)  # the processes are connected
        case.then(rank, mesh)


def measure(name: str) -> str:
    """Return a row of the table."""
    case = CASES[name]
    command = [sys.executable, "-m", "distattn", "launch", "-n", str(case.processes)]
    command += ["--devices-per-process", "2", "--timeout", str(LIMIT_S), *case.launcher]
    done = subprocess.run(
        [*command, "--", sys.executable, __file__, "--rank", name],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    ended = time.time()
    began = re.search(r"fault at ([\d.]+)", done.stdout)
    lines = (re.sub(r"^\s*\[\d\]\s*", "", line) for line in done.stdout.splitlines())
    said = next((found for line in lines if (found := re.fullmatch(case.says, line))), None)
    left = [pid for pid in re.findall(r"pid (\d+)", done.stdout) if alive(int(pid))]
    if began is None or said is None or left or not done.returncode:
        raise SystemExit(f"{name}: exit code {done.returncode}, left {left}\n{done.stdout}")
    shown = " … ".join(said.groups())
    return f"| {case.what} | {ended - float(began[1]):.1f} | {case.default} | `{shown}` |"


def alive(pid: int) -> bool:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}")
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        run_rank(options.rank)
        return
    if unknown := set(options.cases) - set(CASES):
        parser.error(f"no case {sorted(unknown)[0]!r}; there are {', '.join(CASES)}")
    print("| what goes wrong | seconds here | by default | what the user sees |\n|---|---|---|---|")
    for name in options.cases or CASES:
        print(measure(name), flush=True)


if __name__ == "__main__":
    main()
