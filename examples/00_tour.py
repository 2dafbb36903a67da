# %% [markdown]
# # A tour of distattn
#
# Each cell shows one thing and asserts it. Run it as a script, in ten seconds, or as a notebook in an
# editor that knows `# %%`.
#
#     python examples/00_tour.py

# %% Eight devices on this CPU
import jax
import jax.numpy as jnp
import numpy as np

import distattn
from distattn.testing import collectives, fake_devices, lower

fake_devices(8)
mesh = jax.make_mesh((8,), ("kv",), axis_types=(jax.sharding.AxisType.Explicit,))
split = jax.NamedSharding(mesh, jax.P(None, "kv"))
rng = np.random.default_rng(0)
S, N, K, H = 1024, 8, 2, 64
query = jnp.asarray(rng.normal(size=(1, 1, N, H)), jnp.float32)  # one token
key, value = (jnp.asarray(rng.normal(size=(1, S, K, H)), jnp.float32) for _ in range(2))
plain = jax.nn.dot_product_attention(query, key, value)


def same(a: jax.Array, b: jax.Array) -> bool:
    """Return whether a and b are equal but for rounding."""
    return bool(jnp.allclose(a, b, atol=1e-5))


# %% [markdown]
# ## 1. Softmax states can be merged
#
# `partial_attention` returns the state over some of the keys: a maximum, a sum, and a weighted sum of
# values. `merge` merges two states, in either order. `finalize` divides.

# %%
first = distattn.partial_attention(query, key[:, :300], value[:, :300])
rest = distattn.partial_attention(query, key[:, 300:], value[:, 300:])
for one, other in ((first, rest), (rest, first)):
    out, _ = distattn.finalize(distattn.merge(one, other))
    assert same(out, plain)
print("1. two states, merged in either order, give attention over all keys")

# %% [markdown]
# ## 2. Keys may be on many devices, in any order
#
# Each key has its position in `key_positions`, and masks compare positions.

# %%
order = rng.permutation(S).astype(np.int32)
keys, values = jax.device_put((key[:, order], value[:, order]), split)
at = {"query_positions": np.array([700], np.int32), "key_positions": order}
out = distattn.dot_product_attention(query, keys, values, is_causal=True, **at)
assert same(out, jax.nn.dot_product_attention(query, key[:, :701], value[:, :701]))
print("2. eight devices, keys in random order, causal mask: the same result")

# %% [markdown]
# ## 3. Only states move, in log2 D messages
#
# Collectives are counted in the compiled program. No `strategy=` changes the result.

# %%
for strategy, sent in (("butterfly", "3 collective-permute"), ("all_gather", "1 all-gather")):
    run = jax.jit(distattn.dot_product_attention, static_argnames="strategy")
    program = run.lower(query, keys, values, strategy=strategy).compile()
    moved = ", ".join(f"{n} {kind}" for kind, n in collectives(program.as_text()).items())
    assert moved == sent
    assert same(run(query, keys, values, strategy=strategy), plain)
    print(f"3. {strategy}: {moved}")

# %% [markdown]
# ## 4. Gradients of keys and values stay on their devices


# %%
def loss(attention, query, key, value):
    """Compute any function of attention."""
    return (attention(query, key, value) ** 2).sum()


ours = jax.jit(jax.grad(lambda *x: loss(distattn.dot_product_attention, *x), argnums=(0, 1, 2)))
theirs = jax.grad(lambda *x: loss(jax.nn.dot_product_attention, *x), argnums=(0, 1, 2))
d_query, d_key, d_value = ours(query, keys, values)
expected = theirs(query, key, value)
assert same(d_query, expected[0])
assert same(jnp.asarray(np.asarray(d_key)), expected[1][:, order])
assert d_key.sharding.is_equivalent_to(keys.sharding, d_key.ndim)
print("4. the gradient of the keys has their sharding")

# %% [markdown]
# ## 5. A cache that devices share
#
# Any device can store a token. Storing sends nothing, and attending sends a state.

# %%
cache = distattn.KVCache.create(1, 64, K, H, dtype=jnp.float32, sharding=split)
for token in range(5):
    cache = cache.append(key[:, token, None], value[:, token, None])
assert same(cache.attend(query), jax.nn.dot_product_attention(query, key[:, :5], value[:, :5]))
print(f"5. five tokens in a cache, by device: {np.asarray(cache.counts)[0]}")

# %% [markdown]
# ## 6. Bitwise reproducible on any number of devices

# %%
bits = {
    np.asarray(distattn.dot_product_attention(query, k, v, reproducible=True)).tobytes()
    for k, v in ((key, value), jax.device_put((key, value), split))
}
assert len(bits) == 1
print("6. reproducible=True: one device and eight agree to the last bit")

# %% [markdown]
# ## 7. The same program for 4096 chips, without one
#
# `lower` counts collectives before compiling; `distattn plan` and `distattn.testing.compile_for` tell more.

# %%
struct, specs = jax.ShapeDtypeStruct, (jax.P(), jax.P(None, "kv"), jax.P(None, "kv"))
report = lower(
    lambda *x: distattn.dot_product_attention(*x, strategy="butterfly"),
    struct((1, 1, 32, 128), jnp.bfloat16),
    *(struct((1, 8192 * 4096, 8, 128), jnp.bfloat16),) * 2,
    mesh={"kv": 4096},
    platform="tpu",
    specs=specs,
)
assert report.rounds == 12
print(f"7. {report.devices} chips, 33 million keys: {report.rounds} messages, one after another")
