"""Compile, count and predict attention on pods, without one.

    python scripts/bench/pods.py compile [--large]      # decode, prompt, training step for each topology
    python scripts/bench/pods.py scaling [--json FILE] [--plot FILE]  # 1 chip to 4096, five contenders
    python scripts/bench/pods.py estimate               # the compiler's, beside its own partitioning's
    python scripts/bench/pods.py memory                 # beside Rabe & Staats, Tables 2 and 3

These need the extras tpu and cuda-aot, or the environment that scripts/setup makes. None needs an
accelerator.
"""

import argparse
import functools
import json
import sys
from pathlib import Path

COMPILERS = Path(sys.prefix, "compilers")
if COMPILERS.is_dir():
    sys.path.append(str(COMPILERS))
sys.path.append(str(Path(__file__).parents[2] / "examples"))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import pods_figure  # noqa: E402
from jax.sharding import AxisType  # noqa: E402
from pods_programs import (  # noqa: E402
    HEADS,
    KEYS,
    KV_HEADS,
    WIDTH,
    compiled,
    contenders,
    model_step,
    training,
)

import distattn  # noqa: E402
from distattn.planning.cost import Workload, sum_traffic, time_s  # noqa: E402
from distattn.planning.plan import plan  # noqa: E402
from distattn.planning.pods import pod  # noqa: E402
from distattn.testing import compile_for  # noqa: E402

TOPOLOGIES = (
    "v4:4x4x4",
    "v5e:4x4",
    "v5e:16x16",
    "v5p:4x4x4",
    "v6e:16x16",
    "tpu7x:4x4x4",
    "h100:2x8",
    "h100:16x8",
)
LARGE = ("v5p:16x16x16", "v5p:16x16x16*16", "h100:512x8")
# Slices of v5p, from one chip to 4096.
SHAPES = "1x1x1 2x1x1 2x2x1 2x2x2 2x2x4 2x4x4 4x4x4 4x4x8 4x8x8 8x8x8 8x8x16 8x16x16 16x16x16"


def compile_table(large):
    """Print a row for each topology and program."""
    jax.config.update("jax_platforms", "cpu")
    attention = distattn.dot_product_attention
    print(
        "| topology | devices | program | compiled in s | collectives | rounds | temp MiB | XLA, us |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for name in TOPOLOGIES + (LARGE if large else ()):
        where = pod(name)
        devices = where.devices
        decode = functools.partial(attention, strategy="butterfly")
        prompt = functools.partial(attention, strategy="ring", is_causal=True)
        programs = {"decode": (decode, 1, KEYS * devices, False)}
        if devices <= 4096:  # 512 rows of a device
            programs["prompt"] = (prompt, 512 * devices, 512 * devices, True)
            programs["training"] = (training("ring"), 512 * devices, 512 * devices, True)
        reports = {
            what: functools.partial(compiled, f, rows, keys, where, sharded=sharded)
            for what, (f, rows, keys, sharded) in programs.items()
        }
        if devices <= 256:
            reports["model"] = functools.partial(model_step, where)
        for what, make in reports.items():
            try:
                report = make()
            except jax.errors.JaxRuntimeError as error:
                print(f"| {name} | {devices} | {what} | the compiler fails: {str(error)[:60]} |")
                continue
            counts = ", ".join(f"{x['count']} {k}" for k, x in report.collectives.items())
            estimate = "" if report.optimal_s is None else f"{report.optimal_s * 1e6:.0f}"
            print(
                f"| {name} | {devices} | {what} | {report.seconds:.1f} | {counts} | {report.rounds} | "
                f"{report.temp_bytes / 2**20:.1f} | {estimate} |",
                flush=True,
            )


def predicted(name, workload, where, report):
    """Return the predicted seconds: of a plan, or of attention and the all-reduces that were compiled."""
    if name in ("butterfly", "psum"):
        return plan(workload, where, strategy=name).predicted_s
    if name == "ring":
        return plan(workload, where, strategy="ring", query_sharded=True).predicted_s
    topology = where.topology()
    exchange_s = sum(
        x.count * time_s(sum_traffic("psum", x.bytes // x.count, topology), topology)
        for x in report.exchanges
    )
    return plan(workload, where).breakdown["local_s"] + exchange_s


def scaling():
    """Compile decoding on v5p, 8192 keys per chip: what each contender sends, and its predicted time."""
    jax.config.update("jax_platforms", "cpu")
    rows = []
    for shape in SHAPES.split():
        where = pod(f"v5p:{shape}")
        keys = KEYS * where.devices
        workload = Workload(1, 1, keys, HEADS, KV_HEADS, WIDTH, WIDTH, itemsize=2)
        for name, (f, kind) in contenders(where).items():
            report = compiled(f, 1, keys, where, sharded=False, kind=kind)
            row = {
                "contender": name,
                "topology": where.name,
                "devices": where.devices,
                "collectives": report.collectives,
                "rounds": report.rounds,
                "bytes": sum(x["bytes"] for x in report.collectives.values()),
                "temp_bytes": report.temp_bytes,
                "predicted_s": predicted(name, workload, where, report),
                "compiler_s": report.optimal_s,  # each loop once
            }
            rows.append(row)
            print(
                f"{where.devices:5} {name:10} {row['rounds']:5} rounds {row['bytes']:>13} bytes "
                f"{row['temp_bytes'] / 2**20:>7.1f} MiB temp {row['predicted_s'] * 1e6:>9.1f} us predicted",
                flush=True,
            )
    shape = f"B 1, T 1, N {HEADS}, K {KV_HEADS}, H {WIDTH}, bfloat16, {KEYS} keys a chip"
    return {"jax": jax.__version__, "shape": shape, "rows": rows}


def estimate():
    """Print XLA:TPU's estimates of a layer and of its own partitioning, without loops, to compare."""
    jax.config.update("jax_platforms", "cpu")
    dense = functools.partial(distattn.dot_product_attention, implementation="dense")
    print("| topology | devices | butterfly, us | psum, us | jax.nn, partitioned by XLA, us |")
    print("|---|---|---|---|---|")
    for name in ("v5e:16x16", "v6e:16x16", "v5p:4x4x4", "v5p:16x16x16", "tpu7x:4x4x4"):
        where = pod(name)
        keys = KEYS * where.devices
        row = []
        for strategy in ("butterfly", "psum"):
            f = functools.partial(dense, strategy=strategy)
            row.append(compiled(f, 1, keys, where, sharded=False))
        theirs = jax.nn.dot_product_attention
        row.append(compiled(theirs, 1, keys, where, sharded=False, kind=AxisType.Auto))
        cells = (f"{1e6 * x.optimal_s:.1f}" if x.optimal_s else "none" for x in row)
        print(f"| {name} | {where.devices} | {' | '.join(cells)} |", flush=True)


# Rabe & Staats, arXiv 2112.05682, Tables 2 and 3: n -> MiB of overhead, standard and memory-efficient;
# one head of 64, bfloat16 in and float32 out, measured on a TPUv3; None: out of memory.
TABLES = {
    "forward": {
        8: (0.264, 0.264),
        10: (4.0, 4.0),
        12: (64, 16),
        14: (1024, 17),
        16: (None, 21),
        18: (None, 64),
        20: (None, 256),
    },
    "gradient": {
        8: (0.52, 0.52),
        10: (8.0, 8.0),
        12: (128, 41),
        14: (2048, 64),
        16: (None, 257),
        18: (None, 1024),
        20: (None, 4096),
    },
}


def memory():
    """Print the temporary memory on one TPU chip beside the published tables."""
    jax.config.update("jax_platforms", "cpu")
    print("| | n | standard, published | jax.nn | memory-efficient, published | distattn |")
    print("|---|---|---|---|---|---|")
    for direction, table in TABLES.items():
        for power, published in table.items():
            array = jax.ShapeDtypeStruct((1, 1 << power, 1, 64), jnp.bfloat16)
            found = []
            for f in (jax.nn.dot_product_attention, distattn.dot_product_attention):
                found.append(temp_mib(f, array, gradient=direction == "gradient"))
            cells = [published[0], found[0], published[1], found[1]]
            text = " | ".join("out of memory" if x is None else f"{x:.3g} MiB" for x in cells)
            print(f"| {direction} | 2^{power} | {text} |", flush=True)


def temp_mib(f, array, *, gradient):
    def loss(*arrays):
        return f(*arrays).astype(jnp.float32).sum()

    g = jax.grad(loss, argnums=(0, 1, 2)) if gradient else f
    try:
        report = compile_for(g, array, array, array, topology="v5p:1x1x1", mesh={"kv": 1})
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return None
    return report.temp_bytes / 2**20


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("compile", "scaling", "memory", "estimate"))
    parser.add_argument("--large", action="store_true", help="4096 chips and more too")
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write, or with --plot alone read"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE")
    options = parser.parse_args()
    match options.what:
        case "compile":
            compile_table(options.large)
        case "scaling":
            if options.plot and options.json and options.json.exists():
                found = json.loads(options.json.read_text(encoding="utf-8"))
            else:
                found = scaling()
                if options.json:
                    options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            if options.plot:
                pods_figure.plot(found, options.plot)
        case "memory":
            memory()
        case "estimate":
            estimate()


if __name__ == "__main__":
    main()
