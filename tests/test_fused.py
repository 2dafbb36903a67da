"""The exchange in one TPU kernel, and decode attention in one launch: simulated, and compiled.

What devices send each other is simulated in one process for all of it (`fused_job`); what a kernel costs is
read off programs for TPUs that are not here.
"""

import json
import os
import subprocess
import sys

import pytest

from tests import fused_job
from tests.jobs import ROOT

BROKEN = "without waiting"
SECONDS = 300  # a third of a minute alone on two cores


@pytest.fixture(scope="module")
def simulated():
    """What the job says of each of its checks."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.fused_job"],
        cwd=ROOT,
        env=os.environ | fused_job.THREADS,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    found = {x["name"]: x for x in map(json.loads, done.stdout.splitlines())}
    assert set(found) == set(fused_job.CHECKS), done.stderr
    return found


@pytest.mark.parametrize("name", [name for name in fused_job.CHECKS if name != BROKEN])
def test_simulated(simulated, name):
    found = simulated[name]
    assert not found["failure"], found["failure"]
    assert not found["printed"], found["printed"]  # a race, a semaphore that is not back at 0


def test_races_would_be_seen(simulated):
    assert simulated[BROKEN]["races"] > 0
