"""Measure the strategy that strategy='auto' chooses against the fastest one, on a grid of shapes.

    python scripts/bench/planner.py                      # eight fake devices of one process
    python scripts/bench/planner.py --processes 2x4      # processes x devices on one machine, gloo

For each shape the runs of all strategies that fit are interleaved in one process or one job; the figures
are medians. `auto` is right if its choice is the fastest, or within --noise of it, by which two runs of one
program differ.
"""

import argparse
import functools
import os

import jax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from samples import array, interleaved_medians, print_samples, samples_of

import distattn
from distattn.planning import cost
from distattn.planning.cost import QUERY_REPLICATED, QUERY_SHARDED, Topology, Workload, fits
from distattn.testing import fake_devices

# B, T, S, N, K, H, whether the query is sharded
SHAPES = (
    (1, 1, 4096, 8, 2, 64, False),
    (1, 1, 65536, 8, 2, 64, False),
    (8, 1, 2048, 8, 2, 64, False),
    (1, 1, 16384, 32, 8, 128, False),
    (1, 16, 8192, 8, 2, 64, False),
    (1, 256, 4096, 8, 2, 64, False),
    (1, 1024, 1024, 8, 8, 64, False),
    (1, 64, 8192, 8, 2, 64, True),
    (1, 512, 512, 8, 8, 64, True),
    (1, 1024, 1024, 8, 2, 64, True),
    (1, 2048, 2048, 8, 1, 64, True),
    (1, 2048, 2048, 8, 8, 64, True),
)


def measure(mesh, processes, repeats):
    """Return [(shape, choice, {strategy: seconds})]."""
    found = []
    for b, t, s, n, k, h, sharded in SHAPES:
        shape = Workload(b, t, s, n, k, h, h, 4)
        topology = Topology("cpu", (mesh.size,), processes)
        known = QUERY_SHARDED if sharded else QUERY_REPLICATED
        names = [name for name in known if fits(name, shape, topology)]
        choice = cost.choose(shape, topology, query_sharded=sharded).strategy
        along = P(None, "kv")
        query = array((b, t, n, h), mesh, along if sharded else P())
        key = array((b, s, k, h), mesh, along)
        programs = {}
        for name in names:
            f = functools.partial(
                distattn.dot_product_attention,
                query_sharding=NamedSharding(mesh, along if sharded else P()),
                key_value_sharding=NamedSharding(mesh, along),
                strategy=name,
            )
            programs[name] = jax.jit(f).lower(query, key, key).compile()
        medians = interleaved_medians(programs, (query, key, key), repeats)
        found.append(((b, t, s, n, k, h, sharded), choice, medians))
    return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", metavar="PxD")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--noise", type=float, default=1.05)
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        distattn.distributed.initialize()
        mesh = jax.make_mesh((jax.device_count(),), ("kv",), (AxisType.Auto,))
        print_samples(measure(mesh, jax.process_count(), options.repeats))
        return
    if options.processes:
        processes, devices = map(int, options.processes.split("x"))
        script = os.path.abspath(__file__)
        samples = samples_of(script, processes, devices, options.repeats)
    else:
        fake_devices(8)
        mesh = jax.make_mesh((8,), ("kv",), (AxisType.Auto,))
        samples = measure(mesh, 1, options.repeats)
    ratios = []
    print(
        "| B, T, S, N, K, H | query | auto takes | beside the best | all, ms |\n|---|---|---|---|---|"
    )
    for (*sizes, sharded), choice, seconds in samples:
        best = min(seconds.values())
        ratios.append(seconds[choice] / best)
        listed = ", ".join(
            f"{name} {s * 1e3:.2f}" for name, s in sorted(seconds.items(), key=lambda x: x[1])
        )
        where = "sharded" if sharded else "whole"
        print(
            f"| {', '.join(map(str, sizes))} | {where} | {choice} | {ratios[-1]:.2f} | {listed} |"
        )
    right = sum(ratio <= options.noise for ratio in ratios)
    print(f"\nright in {right} of {len(ratios)}; at worst {max(ratios):.2f} times the best")


if __name__ == "__main__":
    main()
