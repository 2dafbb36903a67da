"""Time, memory and compile time of attention on this machine's CPU, against jax.nn.

    python scripts/bench/attention.py speed     # ratios of medians, contenders interleaved
    python scripts/bench/attention.py memory    # temp bytes of the compiled program
    python scripts/bench/attention.py compile   # seconds to trace and compile, eight devices
    python scripts/bench/attention.py devices   # eight fake devices, against XLA's partitioning
    python scripts/bench/attention.py reproducible  # reproducible=True against False, eight devices
    python scripts/bench/attention.py reproducible_compile  # seconds to compile these, interleaved medians

`speed` includes PyTorch's scaled_dot_product_attention if it is installed.
"""

import argparse
import functools
import importlib.util
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import distattn
from distattn.testing import collectives, fake_devices

# name: (B, T, S, N, K, H, dtype, causal, with gradient)
SPEED = {
    "decode f32": (1, 1, 65536, 32, 8, 128, "float32", False, False),
    "decode bf16": (1, 1, 65536, 32, 8, 128, "bfloat16", False, False),
    "decode batch 8": (8, 1, 8192, 9, 3, 64, "float32", False, False),
    "prefill 4096": (1, 4096, 4096, 8, 8, 64, "float32", False, False),
    "causal 2048": (1, 2048, 2048, 8, 8, 64, "float32", True, False),
    "chunk 256 of 32768": (1, 256, 32768, 8, 8, 64, "float32", False, False),
    "gradient causal 2048": (1, 2048, 2048, 8, 8, 64, "float32", True, True),
    "gradient 2048": (1, 2048, 2048, 8, 8, 64, "float32", False, True),
}


def inputs(batch, queries, keys, heads, kv_heads, width, dtype):
    rng = np.random.default_rng(0)
    shapes = [(batch, queries, heads, width)] + [(batch, keys, kv_heads, width)] * 2
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def ours(causal):
    return functools.partial(distattn.dot_product_attention, is_causal=causal)


def theirs(causal):
    return functools.partial(jax.nn.dot_product_attention, is_causal=causal)


def gradient(f):
    return jax.grad(lambda *x: (f(*x).astype(jnp.float32) ** 2).sum(), argnums=(0, 1, 2))


def torch_call(arrays, causal, with_gradient):
    """Return a function that runs PyTorch's attention, or None if it is not installed."""
    if importlib.util.find_spec("torch") is None:
        return None
    import torch

    def tensor(x):
        x = torch.tensor(np.asarray(x, np.float32)).movedim(2, 1)
        return x.to(torch.bfloat16) if arrays[0].dtype == jnp.bfloat16 else x

    query, key, value = (tensor(x).requires_grad_(with_gradient) for x in arrays)
    groups = query.shape[1] != key.shape[1]

    def run():
        out = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=causal, enable_gqa=groups
        )
        if with_gradient:
            (out**2).sum().backward()

    return run


def medians(contenders, repeats):
    """Return the median seconds of each contender, interleaved, each after one untimed run.

    Without the untimed run, memory pages that one contender frees slow down the next one.
    """
    times = {name: [] for name in contenders}
    for _ in range(repeats + 1):
        for name, run in contenders.items():
            run()
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(seconds[1:]) for name, seconds in times.items()}


def compiled_runner(f, arrays):
    compiled = jax.jit(f).lower(*arrays).compile()
    temp = compiled.memory_analysis().temp_size_in_bytes
    return (lambda: jax.block_until_ready(compiled(*arrays))), temp


def speed(repeats):
    print(
        f"{'':24}{'ratio to jax.nn':>16}{'ms':>9}{'jax.nn ms':>11}{'torch':>8}   temp MiB (jax.nn)"
    )
    for name, (*shape, dtype, causal, with_gradient) in SPEED.items():
        arrays = inputs(*shape, dtype)
        wrap = gradient if with_gradient else (lambda f: f)
        run, temp = compiled_runner(wrap(ours(causal)), arrays)
        base, base_temp = compiled_runner(wrap(theirs(causal)), arrays)
        contenders = {"ours": run, "jax.nn": base}
        other = torch_call(arrays, causal, with_gradient)
        if other is not None:
            contenders["torch"] = other
        s = medians(contenders, repeats)
        torch_ratio = f"{s['torch'] / s['jax.nn']:8.2f}" if "torch" in s else f"{'-':>8}"
        print(
            f"{name:24}{s['ours'] / s['jax.nn']:16.2f}{s['ours'] * 1e3:9.1f}{s['jax.nn'] * 1e3:11.1f}"
            f"{torch_ratio}   {temp / 2**20:.1f} ({base_temp / 2**20:.1f})",
            flush=True,
        )


def memory():
    """Print temp memory for one head, H = 64, T = S, as in Rabe & Staats' tables 2 and 3."""
    print(f"{'T = S':>8}{'forward MiB':>14}{'jax.nn':>10}{'with gradient':>16}{'jax.nn':>10}")
    for power in range(12, 17):
        x = jax.ShapeDtypeStruct((1, 2**power, 1, 64), jnp.float32)
        row = []
        for wrap in (lambda f: f, gradient):
            for f in (ours(False), theirs(False)):
                compiled = jax.jit(wrap(f)).lower(x, x, x).compile()
                row.append(compiled.memory_analysis().temp_size_in_bytes / 2**20)
        print(f"{2**power:8}{row[0]:14.2f}{row[1]:10.1f}{row[2]:16.2f}{row[3]:10.1f}", flush=True)


def on_mesh(kind=AxisType.Auto):
    return jax.make_mesh((8,), ("kv",), (kind,))


def compile_time():
    mesh = on_mesh()
    arrays = inputs(1, 16, 8192, 8, 2, 64, "float32")
    key = NamedSharding(mesh, P(None, "kv"))
    arrays = (arrays[0], *(jax.device_put(x, key) for x in arrays[1:]))
    for causal in (False, True):
        f = functools.partial(ours(causal), key_value_sharding=key, strategy="butterfly")
        for name, g in (("forward", f), ("forward and backward", gradient(f))):
            jax.clear_caches()
            start = time.perf_counter()
            lowered = jax.jit(g).lower(*arrays)
            traced = time.perf_counter()
            compiled = lowered.compile()
            end = time.perf_counter()
            counts = dict(collectives(compiled.as_text()))
            seconds = f"trace {traced - start:.2f} s, compile {end - traced:.2f} s"
            print(f"causal={causal!s:6}{name:22}{seconds}, {counts}", flush=True)


def devices(repeats):
    """Time T = 1 on eight fake devices: our strategies, and XLA's partitioning of jax.nn."""
    mesh = on_mesh()
    for name in ("decode f32", "decode bf16"):
        *shape, dtype, causal, _ = SPEED[name]
        arrays = inputs(*shape, dtype)
        key = NamedSharding(mesh, P(None, "kv"))
        arrays = (
            jax.device_put(arrays[0], NamedSharding(mesh, P())),
            *(jax.device_put(x, key) for x in arrays[1:]),
        )
        contenders = {"XLA": compiled_runner(theirs(causal), arrays)[0]}
        for strategy in ("auto", "butterfly", "psum", "all_gather"):
            f = functools.partial(ours(causal), key_value_sharding=key, strategy=strategy)
            contenders[strategy] = compiled_runner(f, arrays)[0]
        s = medians(contenders, repeats)
        row = "  ".join(f"{k} {v / s['XLA']:.2f} ({v * 1e3:.0f} ms)" for k, v in s.items())
        print(f"{name}, ratio to XLA: {row}", flush=True)


# name: (B, T, S, N, K, H, dtype, causal, with gradient), strategy
REPRODUCIBLE = {
    "decode f32": (*SPEED["decode f32"], "psum"),
    "decode bf16": (*SPEED["decode bf16"], "psum"),
    "4096": (*SPEED["prefill 4096"], "auto"),
    "4096, psum": (*SPEED["prefill 4096"], "psum"),
    "4096, query sharded": (*SPEED["prefill 4096"], "gather_kv"),
    "4096, ring": (*SPEED["prefill 4096"], "ring"),
    "gradient 2048, gather_kv": (*SPEED["gradient 2048"], "gather_kv"),
    "gradient 2048, ring": (*SPEED["gradient 2048"], "ring"),
}


def reproducible(repeats):
    """Compare reproducible=True with False on eight fake devices: time, temp memory, collectives."""
    mesh = on_mesh()
    print(f"{'':26}{'ratio':>7}{'ms':>9}{'ordinary ms':>13}   temp MiB (ordinary)")
    for name, (*shape, dtype, causal, with_gradient, strategy) in REPRODUCIBLE.items():
        sharded = strategy in ("gather_kv", "ring")
        by_keys = NamedSharding(mesh, P(None, "kv"))
        by_query = by_keys if sharded else NamedSharding(mesh, P())
        arrays = jax.device_put(inputs(*shape, dtype), (by_query, by_keys, by_keys))
        wrap = gradient if with_gradient else (lambda f: f)
        contenders, temps, counts = {}, {}, {}
        for exact in (True, False):
            f = functools.partial(
                ours(causal),
                query_sharding=by_query,
                key_value_sharding=by_keys,
                strategy=strategy,
                reproducible=exact,
            )
            compiled = jax.jit(wrap(f)).lower(*arrays).compile()
            contenders[exact] = functools.partial(run_and_wait, compiled, arrays)
            temps[exact] = compiled.memory_analysis().temp_size_in_bytes / 2**20
            counts[exact] = dict(collectives(compiled.as_text(), executed=True))
        s = medians(contenders, repeats)
        print(
            f"{name:26}{s[True] / s[False]:7.2f}{s[True] * 1e3:9.1f}{s[False] * 1e3:13.1f}"
            f"   {temps[True]:.1f} ({temps[False]:.1f})   {counts[True]} ({counts[False]})",
            flush=True,
        )


def reproducible_compile(repeats):
    """Time tracing and compiling a gradient, T = S = 1024, on eight fake devices, interleaved."""
    mesh = on_mesh()
    print(f"{'gradient, T = S = 1024':26}{'ratio':>7}{'s':>9}{'ordinary s':>13}")
    for strategy in ("psum", "gather_kv", "ring"):
        times = {True: [], False: []}
        by_keys = NamedSharding(mesh, P(None, "kv"))
        by_query = by_keys if strategy != "psum" else NamedSharding(mesh, P())
        arrays = inputs(1, 1024, 1024, 8, 2, 64, "float32")
        arrays = jax.device_put(arrays, (by_query, by_keys, by_keys))
        for repeat in range(repeats + 1):  # the first one imports and sets up, and does not count
            for exact, seconds in times.items():
                f = functools.partial(
                    ours(True),
                    query_sharding=by_query,
                    key_value_sharding=by_keys,
                    strategy=strategy,
                    reproducible=exact,
                )
                jax.clear_caches()
                start = time.perf_counter()
                jax.jit(gradient(f)).lower(*arrays).compile()
                if repeat:
                    seconds.append(time.perf_counter() - start)
        exact, ordinary = (statistics.median(times[name]) for name in (True, False))
        print(f"{strategy:26}{exact / ordinary:7.2f}{exact:9.2f}{ordinary:13.2f}", flush=True)


def run_and_wait(compiled, arrays):
    jax.block_until_ready(compiled(*arrays))


MODES = ("speed", "memory", "compile", "devices", "reproducible", "reproducible_compile")


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=MODES)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    fake_devices(1 if arguments.what in ("speed", "memory") else 8)
    print(f"jax {jax.__version__}, {jax.device_count()} {jax.default_backend()} devices")
    match arguments.what:
        case "speed":
            speed(arguments.repeats)
        case "memory":
            memory()
        case "compile":
            compile_time()
        case "devices":
            devices(arguments.repeats)
        case "reproducible":
            reproducible(arguments.repeats)
        case "reproducible_compile":
            reproducible_compile(arguments.repeats)


if __name__ == "__main__":
    main()
