"""Arrays, interleaved times, and samples of jobs, for benchmarks of one or more processes."""

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
    """Return a random float32 array, equal on any mesh; each process makes its shards."""

    def shard(index):
        return np.random.default_rng(0).normal(size=shape).astype(np.float32)[index]

    return jax.make_array_from_callback(shape, NamedSharding(mesh, spec), shard)


def interleaved_medians(programs, arrays, repeats):
    """Return the median seconds of each program; each repeat runs all of them, and two warm up."""
    times = {name: [] for name in programs}
    for _ in range(repeats + 2):
        for name, program in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(program(*arrays))
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds[2:]) for name, seconds in times.items()}


def print_samples(samples):
    """Print the samples of the first process of a job, for `samples_of`."""
    if jax.process_index() == 0:
        print(MARK + json.dumps(samples), flush=True)


def samples_of(script, processes, devices, repeats):
    """Run the script as a job and return its samples."""
    command = [sys.executable, "-m", "distattn", "launch", "-n", str(processes)]
    command += ["--devices-per-process", str(devices), "--", sys.executable, script]
    command += ["--rank", "--repeats", str(repeats)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    if done.returncode:
        sys.exit(done.stdout[-3000:] + done.stderr[-3000:])
    line = next(x for x in done.stdout.splitlines() if MARK in x)
    return json.loads(line.partition(MARK)[2])
