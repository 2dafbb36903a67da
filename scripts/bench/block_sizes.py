"""The fastest block sizes of the attention kernels on this machine's TPU or GPU.

    python scripts/bench/block_sizes.py            # prints the medians
    python scripts/bench/block_sizes.py --widths 64,128 --dtypes bfloat16,int8
    python scripts/bench/block_sizes.py --write    # the fastest go into the table

Every size that there is room for is timed on the first device, interleaved. The table is
distattn/local/kernels/block_sizes.json: a row per chip, kind of call, head dimension and dtype of keys. All
processes of a job need the same table, or they trace different programs.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import json
import math
import sys
import time

import jax
import jax.numpy as jnp
from jax import lax
from samples import interleaved_medians

from distattn._compat import device_kind_of, interpreted, platform_of
from distattn.local.block import Cotangents, LogitConfig
from distattn.local.dispatch import KERNELS
from distattn.local.inputs import make_inputs
from distattn.local.kernels import shared
from distattn.local.kernels.gpu import tiling as gpu_tiling
from distattn.local.kernels.tpu import tiling as tpu_tiling
from distattn.local.tiling import Machine

KINDS = ("decode", "prefill", "gradient")
# Rows and keys of a block that are worth timing.
CANDIDATES = {
    "pallas_tpu": ((128, 256, 512, 1024), (128, 256, 512, 1024, 2048)),
    "pallas_gpu": ((16, 32, 64, 128), (16, 32, 64, 128)),
}
# Seconds of one sample, which is many calls in one program: launching it, about 0.1 ms, must not count.
SAMPLE_S = 0.02
LOGITS = LogitConfig(1 / 8)


def kernel_name():
    """Return the kernel of this platform; on a CPU that of TPUs, which the interpreter runs."""
    return "pallas_gpu" if platform_of() == "gpu" else "pallas_tpu"


def blocks_of(inputs, machine, *, backward):
    """Return rows and keys of a block of a call."""
    if kernel_name() == "pallas_gpu":
        config = gpu_tiling.tile_config(inputs, LOGITS, machine, backward=backward)
    else:
        config = tpu_tiling.tile_config(inputs, machine, backward=backward)
    return config.row_block, config.key_block


def random(seed, shape, dtype):
    if jnp.issubdtype(dtype, jnp.integer):
        return jax.random.randint(jax.random.key(seed), shape, -127, 128, dtype)
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)


def inputs_of(kind, width, dtype, options):
    """Return random inputs, causal, the last query at the last key; 8-bit keys have scales."""
    decode = kind == "decode"
    batch, queries = (options.batch, 1) if decode else (1, options.tokens)
    keys = options.context if decode else options.tokens
    quantised = dtype.itemsize == 1
    stored = (batch, keys, options.kv_heads, width)
    query_dtype = jnp.dtype(jnp.bfloat16) if quantised else dtype
    scale = jnp.full(stored[:3], 1 / 64, jnp.float32) if quantised else None
    absent = ("query_seq_lengths", "key_value_seq_lengths", "local_window_size")
    segments = ("query_segment_ids", "key_value_segment_ids")
    return make_inputs(
        random(0, (batch, queries, options.heads, width), query_dtype),
        *(random(seed, stored, dtype) for seed in (1, 2)),
        None,
        None,
        is_causal=True,
        query_positions=jnp.arange(keys - queries, keys, dtype=jnp.int32),
        key_positions=jnp.arange(keys, dtype=jnp.int32),
        key_scale=scale,
        value_scale=scale,
        **dict.fromkeys((*absent, *segments)),
    )


def repeated(machine, count, inputs, cotangents):
    """Return a number that needs `count` calls, one after the other."""
    kernel = KERNELS[kernel_name()]

    def call(_, carry):
        query, seen = carry
        again = dataclasses.replace(inputs, query=query)
        if cotangents is not None:
            results = kernel.fold_gradients(again, LOGITS, machine, cotangents)[:3]
        else:
            state = kernel.fold(again, LOGITS, machine)
            results = state.sum, state.weighted_sum
        seen = sum((x.ravel()[0].astype(jnp.float32) for x in results), seen)
        # It never is, but the next call cannot begin before that is known.
        return jnp.where(seen == jnp.inf, 0, query).astype(query.dtype), seen

    return lax.fori_loop(0, count, call, (inputs.query, jnp.zeros((), jnp.float32)))[1]


def programs_of(inputs, cotangents, groups):
    """Return a compiled program per size there is room for, the library's choice first; and failures."""
    rows, keys = CANDIDATES[kernel_name()]
    wanted = [None, *((-(-row // groups), key) for row in rows for key in keys)]
    backward, programs, failed = cotangents is not None, {}, []
    for sizes in wanted:
        machine = Machine(platform_of(), block_sizes=sizes)
        reason = KERNELS[kernel_name()].unsupported(inputs, LOGITS, machine, backward=backward)
        if reason and sizes is None:
            raise NotImplementedError(reason)
        blocks = None if reason else blocks_of(inputs, machine, backward=backward)
        if blocks is None or blocks in programs:
            continue
        run = jax.jit(functools.partial(repeated, machine))
        try:
            programs[blocks] = run.lower(jnp.int32(1), inputs, cotangents).compile()
        except (ValueError, RuntimeError, NotImplementedError) as error:
            failed.append(f"{blocks}: {str(error)[:200]}")
    return programs, failed


def tune(kind, width, dtype, options):
    """Time a kind of call, print the medians, and return the row of the table."""
    inputs = inputs_of(kind, width, dtype, options)
    rows = inputs.query.shape[1] * options.heads // options.kv_heads
    backward = kind == "gradient"
    found = shared.call_kind(rows, backward=backward)
    if found != kind:
        raise ValueError(f"{rows} rows count as {found!r}, not {kind!r}; pass more --tokens")
    cotangents = None
    if backward:
        shape = inputs.query.shape[:3]
        d_weighted_sum = random(3, (*shape, width), jnp.dtype(jnp.float32))
        cotangents = Cotangents(jnp.full(shape, 8.0), jnp.ones(shape), d_weighted_sum)
    programs, failed = programs_of(inputs, cotangents, options.heads // options.kv_heads)
    if not programs:
        raise NotImplementedError("; ".join(failed))
    first, one = next(iter(programs)), (jnp.int32(1), inputs, cotangents)
    for _ in range(2):  # the first warms up
        began = time.perf_counter()
        jax.block_until_ready(programs[first](*one))
        seconds = time.perf_counter() - began
    calls = max(math.ceil(SAMPLE_S / seconds), 1)
    medians = interleaved_medians(programs, (jnp.int32(calls), inputs, cotangents), options.repeats)
    fastest = min(medians, key=medians.get)
    batch, queries, heads, _ = inputs.query.shape
    print(
        f"{shared.chip_name(device_kind_of())}: {kind}, B={batch} T={queries} S={inputs.key.shape[1]} "
        f"N={heads} K={options.kv_heads} H={width} {dtype.name}, median of {options.repeats}"
    )
    for blocks, median in sorted(medians.items(), key=lambda x: x[1]):
        note = "  (the library's choice)" if blocks == first else ""
        print(f"  {blocks[0]:6} rows x {blocks[1]:5} keys {1e3 * median / calls:12.4f} ms{note}")
    for failure in failed:
        print(f"  does not compile: {failure}")
    return {
        "chip": shared.chip_name(device_kind_of()),
        "kind": kind,
        "width": width,
        "dtype": dtype.name,
        "row_block": fastest[0],
        "key_block": fastest[1],
        "seconds": medians[fastest] / calls,
        "jax": jax.__version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def write(rows):
    """Put rows into the table, in place of those of the same calls."""
    table = json.loads(shared.MEASURED.read_text(encoding="utf-8"))
    by_call = {
        tuple(x[name] for name in ("chip", "kind", "width", "dtype")): x for x in table + rows
    }
    content = json.dumps([by_call[call] for call in sorted(by_call)], indent=1)
    shared.MEASURED.write_text(content + "\n", encoding="utf-8")


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="put the fastest into the table")
    parser.add_argument("--kinds", default=",".join(KINDS), help="default: all")
    parser.add_argument("--widths", default="128", help="head dimensions, as 64,128")
    parser.add_argument("--dtypes", default="bfloat16", help="of keys, as bfloat16,int8")
    parser.add_argument("--batch", type=int, default=4, help="of decode; otherwise 1")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--context", type=int, default=32768, help="keys of decode")
    parser.add_argument("--tokens", type=int, default=4096, help="of prefill and gradient")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument(
        "--interpret", action="store_true", help="try it on a CPU: its times say nothing"
    )
    options = parser.parse_args(arguments)
    if options.heads % options.kv_heads:
        parser.error(f"--heads {options.heads} is no multiple of --kv-heads {options.kv_heads}")
    if jax.default_backend() == "cpu" and not options.interpret:
        parser.error("there is nothing to time, JAX sees only a CPU here; or try it by --interpret")
    with interpreted() if options.interpret else contextlib.nullcontext():
        rows = [
            tune(kind, int(width), jnp.dtype(dtype), options)
            for kind in options.kinds.split(",")
            for width in options.widths.split(",")
            for dtype in options.dtypes.split(",")
            if kind != "gradient" or jnp.dtype(dtype).itemsize > 1  # 8-bit keys have no gradient
        ]
    if options.write:
        write(rows)
        print(f"wrote {shared.MEASURED}")


if __name__ == "__main__":
    sys.exit(main())
