"""Time and memory of attention, forward and backward, with query and keys sharded along T = S.

    python scripts/bench/training.py speed     # medians, interleaved, against XLA's partitioning
    python scripts/bench/training.py memory    # temp bytes per device of the compiled program
    python scripts/bench/training.py work      # work of each device, by layout, under a causal mask
    python scripts/bench/training.py skipping  # time under masks that leave little work

Causal, float32, 8 query and 2 key/value heads of 64, on eight fake devices of this machine's CPU. They
share its cores, so a step costs arithmetic here and hardly any communication. XLA:
`jax.nn.dot_product_attention`, partitioned by the compiler. ringattention: the PyPI package of that
name, version 0.1.2, if it is installed. It has no grouped heads, so its keys and values are repeated.
"""

import argparse
import dataclasses
import functools
import importlib.util
import time
import types
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import distattn
from attention import compiled_runner, gradient, inputs, medians
from distattn import layouts
from distattn.local.inputs import make_inputs
from distattn.local.mask import Span
from distattn.local.tiling import Machine, Tiles, choose_tiling
from distattn.testing import fake_devices

HEADS, KV_HEADS, WIDTH = 8, 2, 64
LENGTHS = (2048, 8192, 32768)
MESHES = {"kv": ((8,), ("kv",)), "host, chip": ((2, 4), ("host", "chip"))}
# Temp memory of all fake devices together, because it is that of one machine.
LIMIT_BYTES = 12 * 2**30

# name: (strategy, mesh, layout)
OURS = {
    "reduce_scatter": ("reduce_scatter", "kv", None),
    "gather_kv": ("gather_kv", "kv", None),
    "gather_kv zigzag": ("gather_kv", "kv", layouts.zigzag),
    "ring": ("ring", "kv", None),
    "ring zigzag": ("ring", "kv", layouts.zigzag),
    "ulysses": ("ulysses", "kv", None),
    "ulysses_ring 2x4": ("ulysses_ring", "host, chip", None),
    "ulysses_gather_kv 2x4": ("ulysses_gather_kv", "host, chip", None),
}


@dataclasses.dataclass(frozen=True)
class Contender:
    """An attention of (query, key, value), and the mesh over which they are sharded along T."""

    attention: Callable
    mesh: jax.sharding.Mesh

    def arrays(self, length):
        sharding = NamedSharding(self.mesh, P(None, self.mesh.axis_names))
        arrays = inputs(1, length, length, HEADS, KV_HEADS, WIDTH, "float32")
        return jax.device_put(arrays, sharding)

    def compiled(self, length):
        """Return a function that runs forward and backward, and its temp bytes on each device."""
        return compiled_runner(gradient(self.attention), self.arrays(length))


def mesh_of(name):
    sizes, axes = MESHES[name]
    return jax.make_mesh(sizes, axes, (AxisType.Auto,) * len(axes))


def ours(length, strategy, mesh, layout):
    order = None if layout is None else jnp.asarray(layout(length, jax.device_count()))
    sharding = NamedSharding(mesh, P(None, mesh.axis_names))
    attention = functools.partial(
        distattn.dot_product_attention,
        is_causal=True,
        query_positions=order,
        key_positions=order,
        query_sharding=sharding,
        key_value_sharding=sharding,
        strategy=strategy,
    )
    return Contender(attention, mesh)


def repaired_ringattention(chunk, causal_block_size):
    """Return the package's attention, or None; restore the JAX module that its import needs."""
    if importlib.util.find_spec("ringattention") is None:
        return None
    from jax.extend.backend import get_backend

    if not hasattr(jax.lib, "xla_bridge"):  # removed in JAX 0.8
        jax.lib.xla_bridge = types.SimpleNamespace(get_backend=get_backend)
    from ringattention import ringattention_jax

    settings = {
        "causal_block_size": causal_block_size,
        "query_chunk_size": chunk,
        "key_chunk_size": chunk,
        "deterministic": True,
        "dropout_rng": None,
        "attn_pdrop": 0.0,
        "dtype": jnp.float32,
        "policy": jax.checkpoint_policies.nothing_saveable,
        "precision": None,
        "prevent_cse": False,
    }

    def one_device(query, key, value):
        return ringattention_jax(query, key, value, None, None, None, "kv", True, settings)

    return one_device


def ringattention(length, mesh):
    one_device = repaired_ringattention(min(length // jax.device_count(), 512), 1)
    if one_device is None:
        return None

    rows = P(None, "kv")
    sharded = jax.shard_map(
        one_device, mesh=mesh, in_specs=(rows, rows, rows), out_specs=rows, check_vma=False
    )

    def attention(query, key, value):
        key, value = (jnp.repeat(x, HEADS // KV_HEADS, axis=2) for x in (key, value))
        return sharded(query, key, value)

    return Contender(attention, mesh)


def contenders(length):
    """Return all contenders by name; None: not installed."""
    xla = functools.partial(jax.nn.dot_product_attention, is_causal=True)
    return {
        "XLA": Contender(xla, mesh_of("kv")),
        **{
            name: ours(length, strategy, mesh_of(mesh), layout)
            for name, (strategy, mesh, layout) in OURS.items()
        },
        "ringattention": ringattention(length, mesh_of("kv")),
    }


def speed(lengths, repeats):
    print(f"a time is '-' if eight devices would need more than {LIMIT_BYTES / 2**30:.0f} GiB")
    print(f"{'':24}{'T = S':>8}{'ms':>10}{'ratio to XLA':>14}{'temp MiB':>12}")
    for length in lengths:
        runs, temps = {}, {}
        for name, contender in contenders(length).items():
            if contender is None:
                continue
            run, temps[name] = contender.compiled(length)
            if temps[name] * jax.device_count() < LIMIT_BYTES:
                runs[name] = run
        s = medians(runs, repeats) if repeats else {name: once(run) for name, run in runs.items()}
        for name in contenders(length):
            ms = f"{s[name] * 1e3:10.1f}" if name in s else f"{'-':>10}"
            ratio = f"{s[name] / s['XLA']:14.2f}" if {name, "XLA"} <= set(s) else f"{'-':>14}"
            temp = f"{temps[name] / 2**20:12.1f}" if name in temps else f"{'-':>12}"
            print(f"{name:24}{length:8}{ms}{ratio}{temp}", flush=True)


def once(run):
    """Return the seconds of the first run, for long sequences."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def memory(lengths):
    print(f"{'temp MiB a device':24}" + "".join(f"{f'T = {length}':>12}" for length in lengths))
    for name in ("XLA", *OURS, "ringattention"):
        cells = []
        for length in lengths:
            contender = contenders(length)[name]
            temp = None if contender is None else contender.compiled(length)[1]
            cells.append(f"{'-':>12}" if temp is None else f"{temp / 2**20:12.1f}")
        print(f"{name:24}{''.join(cells)}", flush=True)


def shards(length, layout):
    """Yield the arguments of the attention of each device's queries to all keys."""
    order = layout(length, 8)
    query, key, value = inputs(1, length, length, HEADS, KV_HEADS, WIDTH, "float32")
    for rows in np.split(np.arange(length), 8):
        yield query[:, rows], key, value, order[rows], order


def pairs(query, key, value, query_positions, key_positions):
    """Return the number of (query, key) pairs in visited blocks."""
    attention_inputs = make_inputs(
        query,
        key,
        value,
        None,
        None,
        is_causal=True,
        query_seq_lengths=None,
        key_value_seq_lengths=None,
        local_window_size=None,
        query_positions=query_positions,
        key_positions=key_positions,
        query_segment_ids=None,
        key_value_segment_ids=None,
    )
    tiling = choose_tiling(attention_inputs, Machine("cpu"), backward=True)
    table = Tiles(attention_inputs, tiling).block_sparsity.table(Span(0, 1))
    return int(table.sum()) * tiling.query * tiling.key


def work(lengths, repeats):
    """Print for each device alone: pairs in visited blocks, and time forward and backward."""

    def attention(query, key, value, query_positions, key_positions):
        return distattn.dot_product_attention(
            query,
            key,
            value,
            is_causal=True,
            query_positions=query_positions,
            key_positions=key_positions,
        )

    for length in lengths:
        busiest = {}
        for layout in (layouts.contiguous, layouts.zigzag, layouts.striped):
            name = layout.__name__
            devices = list(shards(length, layout))
            visited = [pairs(*arrays) for arrays in devices]
            # In each hop of a ring, all devices wait for the one with most work.
            order = np.split(layout(length, 8), 8)
            hops = [
                max(
                    pairs(
                        devices[rank][0],
                        *(x[:, : length // 8] for x in devices[rank][1:3]),
                        order[rank],
                        order[(rank - hop) % 8],
                    )
                    for rank in range(8)
                )
                for hop in range(8)
            ]
            run = jax.jit(gradient(attention)).lower(*devices[0]).compile()
            s = medians(
                {i: functools.partial(ready, run, arrays) for i, arrays in enumerate(devices)},
                repeats,
            )
            busiest[name] = (max(visited), sum(hops), max(s.values()))
            print(f"T = S = {length}, {name}")
            print("  million pairs visited " + "".join(f"{n / 1e6:8.2f}" for n in visited))
            print("  ms, with gradient     " + "".join(f"{s[i] * 1e3:8.1f}" for i in range(8)))
        print("work of the busiest device, contiguous over zigzag and striped")
        for index, what in enumerate(("pairs", "pairs, hop by hop of a ring", "time")):
            ratios = [
                busiest["contiguous"][index] / busiest[name][index]
                for name in ("zigzag", "striped")
            ]
            print(f"  {what:30}" + "".join(f"{ratio:8.2f}" for ratio in ratios), flush=True)


def ready(run, arrays):
    jax.block_until_ready(run(*arrays))


def skipping(lengths, repeats):
    """Time masks under which most blocks are empty, on one device, forward and backward."""
    print(f"{'':10}{'mask':34}{'pairs allowed':>14}{'time':>8}{'ms':>9}   ratios to no mask")
    for length in lengths:
        arrays = inputs(1, length, length, HEADS, KV_HEADS, WIDTH, "float32")
        documents = np.arange(length, dtype=np.int32) // (length // 16)
        shuffled = np.random.default_rng(0).permutation(length // 512)
        shuffled_positions = (
            np.arange(length, dtype=np.int32).reshape(-1, 512)[shuffled].reshape(-1)
        )
        positions = dict.fromkeys(("query_positions", "key_positions"), shuffled_positions)
        packed = {"query_segment_ids": documents, "key_value_segment_ids": documents}
        window = {"is_causal": True, "local_window_size": 256}
        causal = 0.5 * (1 + 1 / length)
        near = 257 / length
        masks = {
            "none": ({}, 1.0),
            "causal": ({"is_causal": True}, causal),
            "16 packed documents": (packed, 1 / 16),
            "window of 256, causal": (window, near),
            "window, runs of 512 shuffled": (window | positions, near),
        }
        runs = {
            name: compiled_runner(
                gradient(functools.partial(distattn.dot_product_attention, **options)), arrays
            )[0]
            for name, (options, _) in masks.items()
        }
        s = medians(runs, repeats)
        for name, (_, share) in masks.items():
            print(
                f"{length:<10}{name:34}{share:14.3f}{s[name] / s['none']:8.3f}{s[name] * 1e3:9.1f}",
                flush=True,
            )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("speed", "memory", "work", "skipping"))
    parser.add_argument("--repeats", type=int, default=3, help="0: one run each, without a warm-up")
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, metavar="T")
    options = parser.parse_args()
    fake_devices(8)
    print(f"jax {jax.__version__}, B 1, N {HEADS}, K {KV_HEADS}, H {WIDTH}, float32, causal")
    match options.what:
        case "speed":
            speed(options.lengths, options.repeats)
        case "memory":
            memory(options.lengths)
        case "work":
            work(options.lengths, options.repeats)
        case "skipping":
            skipping(options.lengths, options.repeats)


if __name__ == "__main__":
    main()
