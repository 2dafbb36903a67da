"""Time and memory of attention forward and backward with query, keys and values sharded along T = S.

    python scripts/bench/training.py speed     # medians, contenders interleaved, beside XLA's partitioning
    python scripts/bench/training.py memory    # temp bytes a device of the compiled program

Causal, float32, 8 query and 2 key/value heads of 64, on eight fake devices of this machine's CPU, which
share its cores: what a step costs here is arithmetic, and hardly what it sends. XLA:
`jax.nn.dot_product_attention`, partitioned by the compiler. ringattention: the PyPI package of that name,
version 0.1.2, where it is installed; it has no grouped heads, so its keys and values are repeated.
"""

import argparse
import dataclasses
import functools
import importlib.util
import types
from collections.abc import Callable

import jax
import jax.numpy as jnp
from attention import compiled_runner, gradient, inputs, medians
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import distattn
from distattn import layouts
from distattn.testing import fake_devices

HEADS, KV_HEADS, WIDTH = 8, 2, 64
LENGTHS = (2048, 8192, 32768)
MESHES = {"kv": ((8,), ("kv",)), "host, chip": ((2, 4), ("host", "chip"))}
# On eight fake devices all temp memory comes out of one machine's.
LIMIT_BYTES = 12 * 2**30

# name: (combine, mesh, layout)
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
    """An attention of (query, key, value), and the mesh that they are sharded over along T."""

    attention: Callable
    mesh: jax.sharding.Mesh

    def arrays(self, length):
        sharding = NamedSharding(self.mesh, P(None, self.mesh.axis_names))
        arrays = inputs(1, length, length, HEADS, KV_HEADS, WIDTH, "float32")
        return jax.device_put(arrays, sharding)

    def compiled(self, length):
        """A function that runs forward and backward, and its temp bytes on each device."""
        return compiled_runner(gradient(self.attention), self.arrays(length))


def mesh_of(name):
    sizes, axes = MESHES[name]
    return jax.make_mesh(sizes, axes, (AxisType.Auto,) * len(axes))


def ours(length, combine, mesh, layout):
    order = None if layout is None else jnp.asarray(layout(length, jax.device_count()))
    attention = functools.partial(
        distattn.dot_product_attention,
        is_causal=True,
        query_positions=order,
        key_positions=order,
        mesh=mesh,
        axis_name=mesh.axis_names,
        query_axis_name=mesh.axis_names,
        combine=combine,
    )
    return Contender(attention, mesh)


def repaired_ringattention():
    """The package's attention, with what its import looks for in JAX put where it was; or None."""
    if importlib.util.find_spec("ringattention") is None:
        return None
    from jax.extend.backend import get_backend

    if not hasattr(jax.lib, "xla_bridge"):  # gone since JAX 0.8
        jax.lib.xla_bridge = types.SimpleNamespace(get_backend=get_backend)
    from ringattention import ringattention_jax

    return ringattention_jax


def ringattention(length, mesh):
    ring_attention = repaired_ringattention()
    if ring_attention is None:
        return None
    chunk = min(length // jax.device_count(), 512)
    settings = {
        "causal_block_size": 1,
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
        return ring_attention(query, key, value, None, None, None, "kv", True, settings)

    rows = P(None, "kv")
    sharded = jax.shard_map(
        one_device, mesh=mesh, in_specs=(rows, rows, rows), out_specs=rows, check_vma=False
    )

    def attention(query, key, value):
        key, value = (jnp.repeat(x, HEADS // KV_HEADS, axis=2) for x in (key, value))
        return sharded(query, key, value)

    return Contender(attention, mesh)


def contenders(length):
    """Each by name; None: not here."""
    xla = functools.partial(jax.nn.dot_product_attention, is_causal=True)
    return {
        "XLA": Contender(xla, mesh_of("kv")),
        **{
            name: ours(length, combine, mesh_of(mesh), layout)
            for name, (combine, mesh, layout) in OURS.items()
        },
        "ringattention": ringattention(length, mesh_of("kv")),
    }


def speed(lengths, repeats):
    print(f"a time is '-' where eight devices would need more than {LIMIT_BYTES / 2**30:.0f} GiB")
    print(f"{'':24}{'T = S':>8}{'ms':>10}{'ratio to XLA':>14}{'temp MiB':>12}")
    for length in lengths:
        runs, temps = {}, {}
        for name, contender in contenders(length).items():
            if contender is None:
                continue
            run, temps[name] = contender.compiled(length)
            if temps[name] * jax.device_count() < LIMIT_BYTES:
                runs[name] = run
        s = medians(runs, repeats)
        for name in contenders(length):
            ms = f"{s[name] * 1e3:10.1f}" if name in s else f"{'-':>10}"
            ratio = f"{s[name] / s['XLA']:14.2f}" if {name, "XLA"} <= set(s) else f"{'-':>14}"
            temp = f"{temps[name] / 2**20:12.1f}" if name in temps else f"{'-':>12}"
            print(f"{name:24}{length:8}{ms}{ratio}{temp}", flush=True)


def memory(lengths):
    print(f"{'temp MiB a device':24}" + "".join(f"{f'T = {length}':>12}" for length in lengths))
    for name in ("XLA", *OURS, "ringattention"):
        cells = []
        for length in lengths:
            contender = contenders(length)[name]
            temp = None if contender is None else contender.compiled(length)[1]
            cells.append(f"{'-':>12}" if temp is None else f"{temp / 2**20:12.1f}")
        print(f"{name:24}{''.join(cells)}", flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("speed", "memory"))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS, metavar="T")
    options = parser.parse_args()
    fake_devices(8)
    print(f"jax {jax.__version__}, B 1, N {HEADS}, K {KV_HEADS}, H {WIDTH}, float32, causal")
    match options.what:
        case "speed":
            speed(options.lengths, options.repeats)
        case "memory":
            memory(options.lengths)


if __name__ == "__main__":
    main()
