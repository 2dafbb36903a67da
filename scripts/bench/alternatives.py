"""Errors of sequence-parallel attention of other JAX packages, against `jax.nn` on one device.

    pip install ringattention==0.1.2 ejkernel==0.0.80.3    # one, both or neither
    python scripts/bench/alternatives.py

Query, keys and values are sharded along T = S over four fake devices, float32. It prints the largest
error of the output, and of the gradients of query, key and value, relative to the largest value of
`jax.nn`: 1e-6 is rounding, 1 is another function. ringattention and ejkernel run their XLA forms, and
ringattention gets back the JAX module that its import needs (`training.repaired_ringattention`).
"""

import functools
import importlib.metadata
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from training import repaired_ringattention

import distattn
from distattn.testing import fake_devices

DEVICES, TOKENS, HEADS, WIDTH, CHUNK = 4, 256, 8, 64, 64
ROWS = P(None, "kv")
# name: key/value heads, causal, whether tokens are in a random order
CASES = {
    "no mask": (8, False, False),
    "causal": (8, True, False),
    "causal, 2 key/value heads": (2, True, False),
    "causal, tokens in random order": (8, True, True),
}


def ours(query, key, value, order, *, is_causal):
    return distattn.sharded_attention(
        query,
        key,
        value,
        axis_name="kv",
        query_sharded=True,
        strategy="ring",
        is_causal=is_causal,
        query_positions=order,
        key_positions=order,
    )


def ejkernel(query, key, value, order, *, is_causal):
    from ejkernel.kernels._xla.ring_attention import ring_attention

    positions = order[None]
    return ring_attention(
        query,
        key,
        value,
        causal=is_causal,
        axis_name="kv",
        chunk_size=CHUNK,
        q_position_ids=positions,
        kv_position_ids=positions,
    )


def ringattention(query, key, value, order, *, is_causal):
    del order  # it takes no positions
    call = repaired_ringattention(CHUNK, 1 if is_causal else None)
    return call(query, key, value)


def errors(one_device, kv_heads, is_causal, shuffled):
    """Return the error of the output, and the largest of the gradients."""
    rng = np.random.default_rng(0)
    shapes = [(1, TOKENS, heads, WIDTH) for heads in (HEADS, kv_heads, kv_heads, HEADS)]
    *arrays, weight = (jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)
    order = jnp.asarray(rng.permutation(TOKENS) if shuffled else np.arange(TOKENS), jnp.int32)
    mesh = jax.make_mesh((DEVICES,), ("kv",), axis_types=(AxisType.Auto,))
    sharded = jax.shard_map(
        functools.partial(one_device, is_causal=is_causal),
        mesh=mesh,
        in_specs=(ROWS, ROWS, ROWS, P("kv")),
        out_specs=ROWS,
        check_vma=False,
    )

    def actual(*arrays):
        return sharded(*(x[:, order] for x in arrays), order)

    def expected(*arrays):
        return jax.nn.dot_product_attention(*arrays, is_causal=is_causal)[:, order]

    def both(f):
        def loss(*arrays):
            return (f(*arrays) * weight).sum()

        return jax.jit(f)(*arrays), jax.jit(jax.grad(loss, (0, 1, 2)))(*arrays)

    (out, gradients), (right, right_gradients) = both(actual), both(expected)
    pairs = zip(gradients, right_gradients, strict=True)
    return relative(out, right), max(relative(x, y) for x, y in pairs)


def relative(actual, expected):
    return float(jnp.abs(actual - expected).max() / jnp.abs(expected).max())


def main() -> None:
    """Print a line for each package and case."""
    fake_devices(DEVICES)
    print(f"{'':16}{'':32}{'forward':>10}{'gradient':>10}   jax {jax.__version__}")
    for one_device in (ours, ringattention, ejkernel):
        name = one_device.__name__
        if one_device is not ours and importlib.util.find_spec(name) is None:
            print(f"{name:16}not installed")
            continue
        version = "" if one_device is ours else f" {importlib.metadata.version(name)}"
        for case, settings in CASES.items():
            try:
                forward, gradient = errors(one_device, *settings)
            except (TypeError, ValueError) as error:
                what = f"   {type(error).__name__}: {str(error).splitlines()[0][:80]}"
            else:
                what = f"{forward:10.1e}{gradient:10.1e}"
            print(f"{name + version:24}{case:34}{what}", flush=True)


if __name__ == "__main__":
    main()
