"""Processes that tests start: a command that ends well, and `distattn launch`."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parent.parent


def inherited(*dropped: str) -> dict[str, str]:
    """The environment of the tests without JAX's settings, and without what begins with one of those."""
    begins = ("JAX_", *dropped)
    return {name: value for name, value in os.environ.items() if not name.startswith(begins)}


def ended_well(
    command: Sequence[str | Path], *, env: dict[str, str], timeout_s: float, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """A command that reads nothing and ends with 0; if it does not, what it printed."""
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
    """Starts it, in a session of its own; what it prints, and what its ranks print, is in one pipe."""
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
