"""What benchmarks of one process and of several share: arrays, times by turns, samples of jobs."""

import json
import statistics
import subprocess
import sys
import time

import jax
import numpy as np
from jax.sharding import NamedSharding

MARK = "samples "


def array(shape, mesh, spec):
    """Random float32, the same on any mesh; each process makes its part."""

    def part(index):
        return np.random.default_rng(0).normal(size=shape).astype(np.float32)[index]

    return jax.make_array_from_callback(shape, NamedSharding(mesh, spec), part)


def by_turns(programs, arrays, repeats):
    """The median seconds of each program, of which all run once in each turn; two turns warm up."""
    times = {name: [] for name in programs}
    for _ in range(repeats + 2):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*arrays))
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds[2:]) for name, seconds in times.items()}


def hand_in(samples):
    """From one process of a job; the first speaks for all."""
    if jax.process_index() == 0:
        print(MARK + json.dumps(samples), flush=True)


def samples_of(script, processes, devices, repeats):
    """What a job of that script has handed in."""
    command = [sys.executable, "-m", "distattn", "launch", "-n", str(processes)]
    command += ["--devices-per-process", str(devices), "--", sys.executable, script]
    command += ["--rank", "--repeats", str(repeats)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    if done.returncode:
        sys.exit(done.stdout[-3000:] + done.stderr[-3000:])
    line = next(x for x in done.stdout.splitlines() if MARK in x)
    return json.loads(line.partition(MARK)[2])
