"""When a kernel computes a call, and what it says of a call that it does not."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import distattn
from distattn.testing.programs import lower
from tests.kernel_calls import attention_by, every_kernel, launches, simulated


def random(*shape):
    return np.random.default_rng(0).normal(size=shape).astype(np.float32)


REFUSED = {
    "bias": {"bias": np.zeros((1, 1, 1, 6), np.float32)},
    "mask": {"mask": np.ones((1, 1, 1, 6), bool)},
    "precision": {"precision": jax.lax.DotAlgorithmPreset.BF16_BF16_F32},
}


@every_kernel
@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_built_is_named(implementation, name):
    query, key = random(1, 2, 2, 4), random(1, 6, 2, 4)
    with (
        simulated(implementation),
        pytest.raises(NotImplementedError, match=f"{implementation}.*: {name} is.*pass imp"),
    ):
        attention_by(implementation)(query, key, key, **REFUSED[name])


@every_kernel
def test_elsewhere_it_is_refused(implementation):
    attention = attention_by(implementation)
    platform = implementation[-3:].upper()
    query, key = random(1, 2, 2, 4), random(1, 6, 2, 4)
    for call in (attention, distattn.partial_attention):
        with pytest.raises(
            NotImplementedError, match=f"kernel for {platform}s, and the platform is 'cpu'"
        ):
            call(query, key, key, implementation=implementation)
    with (
        simulated(implementation),
        pytest.raises(NotImplementedError, match=f"{implementation}.*reproducible=True"),
    ):
        attention(query, key, key, reproducible=True)


@every_kernel
def test_without_what_it_is_written_in_it_is_refused(implementation, monkeypatch):
    module = {"pallas_tpu": "tpu", "pallas_gpu": "triton"}[implementation]
    query, key = random(1, 2, 2, 4), random(1, 6, 2, 4)
    with simulated(implementation):
        monkeypatch.setitem(sys.modules, f"jax.experimental.pallas.{module}", None)
        with pytest.raises(
            NotImplementedError,
            match=rf"{implementation}.*pallas\.{module} needs the package .*not installed; pass imp",
        ):
            attention_by(implementation)(query, key, key)


def kernels_of(platform, dtype=jnp.bfloat16, **options):
    """Return how many kernels a call has that names none, lowered for a platform."""
    struct, along = jax.ShapeDtypeStruct, P(None, "kv")
    arrays = [struct((1, n, heads, 64), dtype) for n, heads in ((1, 8), (512, 2), (512, 2))]
    f = functools.partial(distattn.dot_product_attention, strategy="butterfly", **options)
    specs = (P(), along, along)
    return launches(lower(f, *arrays, mesh={"kv": 4}, platform=platform, specs=specs))


@pytest.mark.parametrize("platform", ["tpu", "cuda"])
def test_none_takes_it_where_it_serves(platform):
    assert kernels_of(platform) == 1
    assert kernels_of(platform, is_causal=True, query_positions=np.array([9], np.int32)) == 1
    assert kernels_of("cpu") == 0
    assert kernels_of(platform, implementation="xla") == 0
    assert kernels_of(platform, bias=np.zeros((1, 1, 1, 512), np.float32)) == 0
    assert kernels_of("tpu", precision="tensorfloat32") == 0
    assert kernels_of("cuda", precision="tensorfloat32") == 1
