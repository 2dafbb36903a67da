"""`distattn launch` as a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


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
