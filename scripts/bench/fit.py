"""Seconds of a decoding step as a N / p + b log2 p + c: what merging over p devices costs, measured.

    python scripts/bench/fit.py              # 1 to 8 fake devices of one process
    python scripts/bench/fit.py --processes  # 1 to 8 processes on one machine, gloo

The contenders are the butterfly, pmax and one packed psum, and the recipe that reduces maximum, sum and
weighted sum in three all-reduces. Their runs are interleaved in one process or one job; the figures are
medians. N is the number of keys of the whole sequence. Devices that share cores do not divide the work: the
first term is then a N.
"""

import argparse
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from samples import array, interleaved_medians, print_samples, samples_of

import distattn
from distattn.testing import fake_devices

HEADS, KV_HEADS, WIDTH = 8, 2, 64
KEYS = (840, 6720, 26880)  # multiples of 1 to 8
MODELS = ("butterfly", "psum", "three all-reduces")


def three_all_reduces(query, key, value):
    state = distattn.partial_attention(query, key, value)
    largest = lax.pmax(state.max, "kv")
    weight = jnp.exp(state.max - largest)
    total = lax.psum(state.sum * weight, "kv")
    return lax.psum(state.weighted_sum * weight[..., None], "kv") / total[..., None]


def programs(mesh):
    split = P(None, "kv")
    calls = {
        strategy: functools.partial(
            distattn.dot_product_attention,
            query_sharding=NamedSharding(mesh, P()),
            key_value_sharding=NamedSharding(mesh, split),
            strategy=strategy,
        )
        for strategy in MODELS[:2]
    }
    calls[MODELS[2]] = jax.shard_map(
        three_all_reduces, mesh=mesh, in_specs=(P(), split, split), out_specs=P(), check_vma=False
    )
    return calls


def measure(mesh, repeats):
    """Return [(contender, N, p, seconds)] for the devices of the mesh."""
    found = []
    for keys in KEYS:
        query = array((1, 1, HEADS, WIDTH), mesh, P())
        key = array((1, keys, KV_HEADS, WIDTH), mesh, P(None, "kv"))
        ready = {
            name: jax.jit(f).lower(query, key, key).compile() for name, f in programs(mesh).items()
        }
        seconds = interleaved_medians(ready, (query, key, key), repeats)
        found += [(name, keys, mesh.size, x) for name, x in seconds.items()]
    return found


def rank(repeats):
    """Measure in one process of a job."""
    distattn.distributed.initialize()
    mesh = jax.make_mesh((jax.device_count(),), ("kv",), (AxisType.Auto,))
    print_samples(measure(mesh, repeats))


def of_processes(repeats):
    script = os.path.abspath(__file__)
    return [tuple(x) for count in range(1, 9) for x in samples_of(script, count, 1, repeats)]


def of_devices(repeats):
    fake_devices(8)
    meshes = [
        jax.make_mesh((p,), ("kv",), (AxisType.Auto,), devices=jax.devices()[:p])
        for p in range(1, 9)
    ]
    return [sample for mesh in meshes for sample in measure(mesh, repeats)]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--processes", action="store_true")
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--repeats", type=int, default=25)
    options = parser.parse_args()
    if options.rank:
        rank(options.repeats)
        return
    samples = (of_processes if options.processes else of_devices)(options.repeats)
    print(
        f"jax {jax.__version__}, N {HEADS}, K {KV_HEADS}, H {WIDTH}, float32; {os.cpu_count()} cores"
    )
    print("| p | " + " | ".join(f"{name}, us" for name in MODELS) + " |\n|---|---|---|---|")
    for p in range(1, 9):
        row = [
            s for name in MODELS for n, keys, q, s in samples if (n, keys, q) == (name, KEYS[0], p)
        ]
        print(f"| {p} | " + " | ".join(f"{s * 1e6:.0f}" for s in row) + " |")
    print(f"({KEYS[0]} keys in all)\n")
    for name in MODELS:
        rows = [(n, p, s) for other, n, p, s in samples if other == name]
        n, p, s = (np.array(x, float) for x in zip(*rows, strict=True))
        for what, first in (("a N", n), ("a N / p", n / p)):
            # Relative errors, so that short and long sequences count alike.
            columns = np.stack([first, np.log2(p), np.ones_like(n)], axis=1) / s[:, None]
            (a, b, c), *_ = np.linalg.lstsq(columns, np.ones_like(s), rcond=None)
            residual = np.sqrt(np.mean((columns @ [a, b, c] - 1) ** 2))
            print(
                f"{name:18} {what} + b log2 p + c: a {a * 1e9:.1f} ns, b {b * 1e6:.0f} us, "
                f"c {c * 1e6:.0f} us; {residual:.0%} off"
            )


if __name__ == "__main__":
    main()
