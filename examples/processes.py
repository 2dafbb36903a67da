"""Starting the processes of an example, and printing from one of them."""

import os
import subprocess
import sys
from collections.abc import Sequence

import jax


def say(*words: object) -> None:
    """Print in the first process."""
    if jax.process_index() == 0:
        print(*words, flush=True)


def launch(
    processes: int, devices: int, program: Sequence[str], *, may_fail: int = 0
) -> tuple[int, str]:
    """Run a Python program as a job; return its exit code and the last line that it said."""
    command = [sys.executable, "-m", "distattn", "launch", "-n", str(processes), "--timeout", "120"]
    command += ["--devices-per-process", str(devices), "--may-fail", str(may_fail)]
    # Small programs take longer to compile than to run, and each process compiles them.
    quick = {"XLA_FLAGS": os.environ.get("XLA_FLAGS", "--xla_backend_optimization_level=0")}
    done = subprocess.run(
        [*command, "--", sys.executable, *program],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | quick,
    )
    first = [x.removeprefix("[0] ") for x in done.stdout.splitlines() if x.startswith("[0] ")]
    said = [line for line in first if line.startswith((" - ", "answer"))]
    launcher = [x for x in done.stderr.splitlines() if x.startswith("distattn launch: rank")]
    print(*said, *launcher, sep="\n")
    if done.returncode not in (0, 137):  # 137: a process was killed
        raise SystemExit(f"exit code {done.returncode}:\n{done.stdout}\n{done.stderr}")
    return done.returncode, said[-1] if said else ""
