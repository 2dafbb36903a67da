"""Processes that tests start: a command that must succeed, and `distattn launch`."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent


def inherited(*dropped: str) -> dict[str, str]:
    """Return the environment without JAX's settings and variables that begin with one of `dropped`."""
    begins = ("JAX_", *dropped)
    return {name: value for name, value in os.environ.items() if not name.startswith(begins)}


def ended_well(
    command: Sequence[str | Path], *, env: dict[str, str], timeout_s: float, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Run a command that must end with 0, without input; the error shows its output."""
    done = subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        env=env,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-9000:]}\n{done.stderr[-9000:]}"
    return done


def launcher(*arguments: str) -> subprocess.Popen:
    """Start the launcher in its own session; its output and that of its ranks share one pipe."""
    return subprocess.Popen(
        [sys.executable, "-m", "distattn", "launch", *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
