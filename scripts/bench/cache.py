"""Time of a decoding step on a sharded cache, and of the alternatives, on this machine's CPU.

    python scripts/bench/cache.py length     # a step at 1k, 8k and 64k cached tokens, eight fake devices
    python scripts/bench/cache.py devices    # the same at 64k tokens, on 1, 2, 4 and 8 fake devices
    python scripts/bench/cache.py memory     # temp bytes and collectives of the compiled step
    python scripts/bench/cache.py reproducible    # attention alone with reproducible=True, and without

A step appends one token and attends to all of them. XLA: `jax.nn.dot_product_attention` on a cache that
is sharded by the compiler. pmax + psum + psum: the published recipe of tree attention (arXiv 2408.04093,
section 5), each device attending to its keys by plain operations. Fake devices share the cores.
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from attention import medians
from distattn import KVCache
from distattn.testing import collectives, fake_devices

BATCH, HEADS, KV_HEADS, WIDTH = 1, 32, 8, 128
ROOM = 64  # free slots, for the steps that are timed
PRICED = ("ordinary", "reproducible")
STRATEGIES = ("auto", "butterfly", "psum", "all_gather")
SLOTS = P(None, "kv")


def mesh_of(devices):
    kind = (AxisType.Auto,)
    return jax.make_mesh((devices,), ("kv",), kind, devices=jax.devices()[:devices])


def token(seed, heads, tokens=1):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(BATCH, tokens, heads, WIDTH)).astype(np.float32)


def our_step(strategy, cache, query, key, value):
    cache = cache.append(key, value)
    return cache, cache.attend(query, strategy=strategy)


def our_cache(tokens, dtype, mesh):
    sharding = None if mesh is None else NamedSharding(mesh, SLOTS)
    cache = KVCache.create(BATCH, tokens, KV_HEADS, WIDTH, dtype=dtype, sharding=sharding)
    chunk = min(tokens - ROOM, 8128)
    append = jax.jit(KVCache.append, donate_argnums=0)
    for start in range(0, tokens - ROOM, chunk):
        length = np.full(BATCH, min(chunk, tokens - ROOM - start), np.int32)
        cache = append(cache, *(token(i, KV_HEADS, chunk) for i in range(2)), lengths=length)
    return cache


def plain_cache(tokens, dtype, mesh):
    sharding = NamedSharding(mesh, SLOTS)
    store = (np.zeros((BATCH, tokens, KV_HEADS, WIDTH), dtype) for _ in range(2))
    store = [jax.device_put(x, sharding) for x in store]
    return store, jax.device_put(np.int32(tokens - ROOM), NamedSharding(mesh, P()))


def xla_step(cache, query, key, value):
    (keys, values), length = cache
    keys, values = (
        lax.dynamic_update_slice_in_dim(x, new.astype(x.dtype), length, 1)
        for x, new in ((keys, key), (values, value))
    )
    lengths = jnp.broadcast_to(length + 1, BATCH)
    out = jax.nn.dot_product_attention(
        query.astype(keys.dtype), keys, values, key_value_seq_lengths=lengths
    )
    return ([keys, values], length + 1), out


def recipe_step(mesh, cache, query, key, value):
    def body(keys, values, length, query, key, value):
        rank, slots = lax.axis_index("kv"), keys.shape[1]
        place = length - rank * slots
        keys, values = (
            x.at[:, jnp.where(place < 0, slots, place)].set(new[:, 0].astype(x.dtype), mode="drop")
            for x, new in ((keys, key), (values, value))
        )
        grouped = query.astype(keys.dtype).reshape(BATCH, 1, KV_HEADS, -1, WIDTH)
        logits = jnp.einsum("btkgh,bskh->bkgts", grouped, keys, preferred_element_type=jnp.float32)
        index = jnp.arange(slots, dtype=jnp.int32) + rank * slots
        logits = jnp.where((index <= length)[None, None, None, None], logits / WIDTH**0.5, -jnp.inf)
        high = lax.pmax(logits.max(axis=-1, keepdims=True), "kv")
        weights = jnp.exp(logits - high)
        out = lax.psum(
            jnp.einsum("bkgts,bskh->btkgh", weights, values, preferred_element_type=jnp.float32),
            "kv",
        )
        total = lax.psum(weights.sum(axis=-1), "kv")
        out = out / jnp.moveaxis(total, -1, 1)[..., None]
        return keys, values, out.reshape(query.shape)

    (keys, values), length = cache
    keys, values, out = jax.shard_map(
        body, mesh=mesh, in_specs=(SLOTS, SLOTS, P(), P(), P(), P()), out_specs=(SLOTS, SLOTS, P())
    )(keys, values, length, query, key, value)
    return ([keys, values], length + 1), out


class Contender:
    """A compiled step with its cache, which is donated and replaced."""

    def __init__(self, step, cache, mesh):
        arrays = (token(2, HEADS), token(3, KV_HEADS), token(4, KV_HEADS))
        put = jax.devices()[0] if mesh is None else NamedSharding(mesh, P())
        self.arrays = jax.device_put(arrays, put)
        self.step = jax.jit(step, donate_argnums=0).lower(cache, *self.arrays).compile()
        self.cache = cache

    def __call__(self):
        self.cache, self.out = jax.block_until_ready(self.step(self.cache, *self.arrays))


def contenders(tokens, dtype, mesh, strategies=STRATEGIES):
    ours = {
        strategy: Contender(
            functools.partial(our_step, strategy), our_cache(tokens, dtype, mesh), mesh
        )
        for strategy in strategies
    }
    return ours | {
        "one device": Contender(
            functools.partial(our_step, "auto"), our_cache(tokens, dtype, None), None
        ),
        "XLA": Contender(xla_step, plain_cache(tokens, dtype, mesh), mesh),
        "pmax + psum + psum": Contender(
            functools.partial(recipe_step, mesh), plain_cache(tokens, dtype, mesh), mesh
        ),
    }


def report(title, runs, repeats):
    s = medians(runs, repeats)
    cells = (f"{name} {t * 1e3:.2f} ({t / s['XLA']:.2f})" for name, t in s.items())
    print(f"{title}: {'  '.join(cells)}", flush=True)


def reproducible(dtype, repeats):
    """Time attention alone, to one query and to several, with reproducible=True and without."""

    def attending(cache, tokens, exact):
        query = token(2, HEADS, tokens)
        run = jax.jit(lambda cache, query: cache.attend(query, reproducible=exact))
        run = run.lower(cache, query).compile()
        return lambda: jax.block_until_ready(run(cache, query))

    for slots in (2**10, 2**13, 2**16):
        cache = our_cache(slots, dtype, mesh_of(8))
        for tokens in (1, 8):
            runs = {name: attending(cache, tokens, name == "reproducible") for name in PRICED}
            s = medians(runs, repeats)
            cells = (f"{name} {t * 1e3:.2f} ({t / s['ordinary']:.2f})" for name, t in s.items())
            print(f"{slots} tokens, T {tokens}: {'  '.join(cells)}", flush=True)


def memory(dtype):
    """Print temp bytes and collectives of the compiled step, alone and in a scan."""
    mesh, layers = mesh_of(8), 4

    def model(cache, query, key, value):
        cache, slots = cache.reserve(1)

        def layer(carry, i):
            cache, query = carry
            cache = cache.write(key, value, slots, layer=i)
            return (cache, query + cache.attend(query, layer=i)), None

        index = jnp.arange(layers, dtype=jnp.int32)
        return lax.scan(layer, (cache, query), index)[0]

    for tokens in (2**14, 2**16, 2**18):
        for name, step, stack in (
            ("step", functools.partial(our_step, "auto"), None),
            ("scan over 4 layers", model, layers),
        ):
            sharding = NamedSharding(mesh, SLOTS)
            cache = KVCache.create(
                BATCH, tokens, KV_HEADS, WIDTH, dtype=dtype, sharding=sharding, layers=stack
            )
            step = Contender(step, cache, mesh).step
            m = step.memory_analysis()
            print(
                f"{tokens:7} tokens, {name:18}: cache {m.alias_size_in_bytes / 2**20:6.1f} MiB a device, "
                f"in place; temp {m.temp_size_in_bytes / 2**20:.2f} MiB; "
                f"{dict(collectives(step.as_text()))}",
                flush=True,
            )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("length", "devices", "memory", "reproducible"))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--dtype", default="float32")
    options = parser.parse_args()
    if options.repeats > ROOM // 2 - 2:
        parser.error(f"--repeats {options.repeats}: the caches have room for {ROOM // 2 - 2}")
    fake_devices(8)
    print(f"jax {jax.__version__}, {options.dtype}, N {HEADS}, K {KV_HEADS}, H {WIDTH}")
    what = "to ordinary attention" if options.what == "reproducible" else "to XLA's partitioning"
    print(f"milliseconds a step (ratio {what}), medians, interleaved")
    dtype = jnp.dtype(options.dtype)
    match options.what:
        case "length":
            for tokens in (2**10, 2**13, 2**16):
                report(f"{tokens} tokens", contenders(tokens, dtype, mesh_of(8)), options.repeats)
        case "devices":
            for devices in (1, 2, 4, 8):
                runs = contenders(2**16, dtype, mesh_of(devices), ("auto",))
                report(f"{devices} devices", runs, options.repeats)
        case "reproducible":
            reproducible(dtype, options.repeats)
        case "memory":
            memory(dtype)


if __name__ == "__main__":
    main()
