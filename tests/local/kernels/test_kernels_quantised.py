"""The TPU kernel on keys and values of 8 bits with scales: by Pallas' interpreter, and compiled."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

import distattn
from distattn.local.kernels.tpu.tiling import QUANTISED
from distattn.testing import interpreted
from tests.cases import cache_sharding, mesh_of
from tests.kernel_calls import (
    CACHE_SLOTS,
    arrays_of_size,
    decode_of_a_cache,
    launches,
)
from tests.tolerance import assert_close


def on_a_tpu():
    return interpreted(pltpu.InterpretParams())


def random(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def filled(dtype, *, batch=2, keys=20, kv_heads=2, width=8, capacity=24, layers=None):
    """Return a cache with free slots at its end."""
    lead = () if layers is None else (layers,)
    cache = distattn.KVCache.create(
        batch=batch,
        capacity=capacity,
        num_kv_heads=kv_heads,
        head_dim=width,
        layers=layers,
        dtype=dtype,
    )
    items = (*lead, batch, keys, kv_heads, width)
    return cache.append(random(*items), random(*items, seed=1))


# Keys are stored in three orders, and 2 heads of bytes otherwise than 2 of bfloat16.
SHAPES = {
    "keys along the lanes": {},
    "heads beside keys": {"kv_heads": 4, "width": 128},
    "heads before keys": {"kv_heads": 2, "width": 128},
    "16 heads": {"kv_heads": 16, "width": 128, "batch": 1},
    "one layer of three": {"layers": 3},
    "one layer of three, 3 heads": {"layers": 3, "kv_heads": 3},
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, jnp.int8) for name in SHAPES), *(("keys along the lanes", x) for x in QUANTISED[1:])],
)
def test_as_the_blocked_form(name, dtype):
    shape = SHAPES[name]
    cache = filled(dtype, **shape)
    batch, heads, width = cache.key.shape[-4], 2 * cache.key.shape[-2], cache.key.shape[-1]
    query = random(batch, 3, heads, width, seed=2)
    attend = functools.partial(
        cache.attend,
        layer=1 if "layers" in shape else None,
        logits_soft_cap=2.0,
        return_residual=True,
    )
    with on_a_tpu():
        got = attend(query, implementation="pallas_tpu")
    for x, y in zip(got, attend(query, implementation="xla"), strict=True):
        assert_close(x, np.asarray(y), jnp.float32, 20)


@pytest.mark.parametrize("dtype", QUANTISED[:2])
def test_nothing_leaks_from_free_slots(dtype):
    cache = filled(dtype)
    free = cache.positions < 0
    assert free.sum() == 8
    dirty = {
        name: jnp.where(free.reshape(*free.shape, *[1] * (x.ndim - 2)), garbage, x).astype(x.dtype)
        for name, x, garbage in (
            ("key", cache.key, 127 if dtype == jnp.int8 else np.nan),
            ("value", cache.value, 127 if dtype == jnp.int8 else np.nan),
            ("key_scale", cache.key_scale, np.nan),
            ("value_scale", cache.value_scale, np.inf),
        )
    }

    def attended(cache, implementation):
        return cache.attend(random(2, 3, 4, 8, seed=2), implementation=implementation)

    with on_a_tpu():
        got = attended(dataclasses.replace(cache, **dirty), "pallas_tpu")
    assert_close(got, np.asarray(attended(cache, "xla")), jnp.float32, 20)


def test_a_scale_that_is_no_number_and_is_attended_shows():
    cache = filled(jnp.int8)
    cache = dataclasses.replace(cache, value_scale=cache.value_scale.at[0, 3, 1].set(np.nan))
    with on_a_tpu():
        out = cache.attend(random(2, 1, 4, 8), implementation="pallas_tpu")
    assert np.isnan(out[0, 0, 2:]).all()
    assert np.isfinite(out[0, 0, :2]).all()
    assert np.isfinite(out[1]).all()


def test_gradient_of_the_query():
    cache = filled(jnp.int8)

    def loss(query, implementation):
        return (cache.attend(query, implementation=implementation) ** 2).sum()

    query = random(2, 3, 4, 8, seed=2)
    with on_a_tpu():
        got = jax.grad(loss)(query, "pallas_tpu")
    assert_close(got, np.asarray(jax.grad(loss)(query, "xla")), jnp.float32, 2 * 20)


def test_over_a_mesh():
    cache = distattn.KVCache.create(
        batch=2,
        capacity=24,
        num_kv_heads=2,
        head_dim=8,
        dtype=jnp.int8,
        sharding=cache_sharding(mesh_of(4, "auto")),
    )
    cache = cache.append(random(2, 13, 2, 8), random(2, 13, 2, 8, seed=1))
    query = random(2, 2, 4, 8, seed=2)
    with interpreted():
        got = cache.attend(query, implementation="pallas_tpu", strategy="butterfly")
    assert_close(got, np.asarray(cache.attend(query)), jnp.float32, 13)


def test_other_dtypes_are_refused():
    cache = filled(jnp.float8_e4m3fnuz)
    query = random(2, 1, 4, 8)
    want = (
        "key has dtype float8_e4m3fnuz; supported are int8, float8_e4m3fn, float8_e5m2.*pass impl"
    )
    with on_a_tpu(), pytest.raises(NotImplementedError, match=want):
        cache.attend(query, implementation="pallas_tpu")


# ------------------------------------------------------------------------------------------------ compiled

# Target, dtype, width, heads of keys, layers. All of them: scripts/bench/kernels.py.
COMPILED = [
    ("v4:2x2x1", jnp.int8, 80, 8, None),
    ("v5e:2x2", jnp.int8, 128, 2, None),
    ("v5p:2x2x1", jnp.int8, 64, 3, 3),
    ("v5p:2x2x1", jnp.float8_e4m3fn, 128, 8, 3),
    ("v6e:2x2", jnp.float8_e5m2, 192, 8, None),
    ("tpu7x:2x2x1", jnp.int8, 256, 8, 3),
]


@pytest.mark.parametrize(("target", "dtype", "width", "kv_heads", "layers"), COMPILED)
def test_compiled_for(target, dtype, width, kv_heads, layers):
    report = decode_of_a_cache(target, dtype, width, kv_heads, layers)
    assert launches(report) == 1
    size = 2 * CACHE_SLOTS * kv_heads * width
    assert arrays_of_size(report, size) == []
    assert report.temp_bytes < size / 2
