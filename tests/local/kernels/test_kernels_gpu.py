"""Parts of the GPU kernels alone: splits of the keys, spans of blocks, precisions, quantised keys."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import distattn
from distattn.local.block import LogitConfig
from distattn.local.inputs import AttentionInputs
from distattn.local.kernels.gpu import forward, support, tiling
from distattn.local.mask import Mask
from distattn.local.tiling import Machine
from distattn.testing import interpreted
from tests.cases import Case, check
from tests.tolerance import assert_close

FEW_QUERIES = Case(
    queries=2,
    keys=300,
    permuted=True,
    empty_slots=150,
    segments=2,
    options=(("is_causal", True), ("logits_soft_cap", 2.0)),
)


def in_blocks(**arguments):
    """Call the kernel in blocks of 32 keys."""
    state = distattn.partial_attention(
        **arguments, implementation="pallas_gpu", block_sizes=(16, 32)
    )
    out, lse = distattn.finalize(state)
    return out.astype(arguments["query"].dtype), lse


def watched(monkeypatch, module=forward):
    """Collect the sizes of the calls that are made from here on."""
    found = []

    def tile_config(*arguments, **options):
        found.append(tiling.tile_config(*arguments, **options))
        return found[-1]

    monkeypatch.setattr(module, "tile_config", tile_config)
    return found


def test_few_queries_share_their_keys_out(monkeypatch):
    configs = watched(monkeypatch)
    with interpreted():
        check(FEW_QUERIES, in_blocks, what="pallas_gpu splits")
    assert {config.splits for config in configs} == {7}


def test_a_table_that_would_be_too_long_is_of_spans(monkeypatch):
    monkeypatch.setattr(tiling, "MAX_TABLE_ENTRIES", 8)
    configs = watched(monkeypatch)
    case = dataclasses.replace(FEW_QUERIES, queries=50, lengths=True, query_lengths=True)
    with interpreted():
        check(case, in_blocks, what="pallas_gpu spans")
    (config,) = set(configs)
    assert (config.row_span, config.key_span) == (2, 8)
    assert (config.row_blocks, config.used_key_blocks, config.key_blocks) == (4, 10, 16)


def test_scales_of_slots_that_nobody_attends_to_may_be_anything():
    rng = np.random.default_rng(0)
    cache = distattn.KVCache.create(
        batch=1, capacity=24, num_kv_heads=2, head_dim=16, dtype=jnp.int8
    )
    cache = cache.append(*jnp.asarray(rng.normal(size=(2, 1, 9, 2, 16)), jnp.float32))
    query = jnp.asarray(rng.normal(size=(1, 2, 4, 16)), jnp.bfloat16)
    want = cache.attend(query, is_causal=True)
    free = (np.asarray(cache.positions) < 0)[..., None]
    dirty = dataclasses.replace(
        cache,
        key_scale=jnp.where(free, jnp.nan, cache.key_scale),
        value_scale=jnp.where(free, jnp.inf, cache.value_scale),
    )
    with interpreted():
        got = dirty.attend(query, is_causal=True, implementation="pallas_gpu")
    assert_close(got, np.asarray(want, np.float32), jnp.bfloat16, 9)


def inputs_of(query, key, value_dtype=None, **more):
    struct = jax.ShapeDtypeStruct
    value = struct(key.shape, value_dtype or key.dtype)
    return AttentionInputs(query, key, value, None, None, Mask(), **more)


def test_products_are_as_narrow_as_the_precision_allows():
    struct = jax.ShapeDtypeStruct

    def dtype(query, key, precision=None, *, backward=False, quantised=False):
        inputs = inputs_of(
            struct((1, 1, 2, 64), query),
            struct((1, 9, 2, 64), key),
            key_scale=struct((1, 9, 2), jnp.float32) if quantised else None,
        )
        matmul = tiling.matmul_config(inputs, LogitConfig(1.0, None, precision), backward=backward)
        return matmul.dtype, matmul.precision

    fast, exact = jax.lax.Precision.DEFAULT, jax.lax.Precision.HIGHEST
    assert dtype(jnp.bfloat16, jnp.bfloat16) == (jnp.bfloat16, fast)
    assert dtype(jnp.bfloat16, jnp.bfloat16, "highest") == (jnp.float32, exact)
    assert dtype(jnp.bfloat16, jnp.float32) == (jnp.float32, fast)
    assert dtype(jnp.bfloat16, jnp.int8, quantised=True) == (jnp.bfloat16, fast)
    assert dtype(jnp.float16, jnp.float16) == (jnp.float16, fast)
    assert dtype(jnp.float16, jnp.float16, backward=True) == (jnp.float32, fast)
    assert dtype(jnp.float16, jnp.int8, quantised=True) == (jnp.float32, fast)
    with jax.default_matmul_precision("float32"):
        assert dtype(jnp.float32, jnp.float32) == (jnp.float32, exact)
        assert dtype(jnp.float32, jnp.float32, "default") == (jnp.float32, fast)


@pytest.mark.parametrize("backward", [False, True])
def test_what_is_quantised(backward):
    struct = jax.ShapeDtypeStruct
    unsupported = functools.partial(
        support.unsupported,
        logit_config=LogitConfig(1.0),
        machine=Machine("gpu"),
        backward=backward,
    )
    query, scale = struct((1, 1, 8, 128), jnp.bfloat16), struct((1, 9, 8), jnp.float32)
    sizes = {9: None, 2**21: None, 2**21 + 1: "key has 2147484672 items", 2**22 + 1: None}
    for keys, reason in sizes.items():
        key = struct((1, keys, 8, 128), jnp.int8)
        found = unsupported(inputs_of(query, key, key_scale=scale, value_scale=scale))
        if backward:
            assert "key and value are quantised, and gradients" in found
        else:
            assert (found or "").startswith(reason or "")
            assert bool(found) == bool(reason)
    assert "key has dtype int8" in unsupported(inputs_of(query, struct((1, 9, 8, 128), jnp.int8)))
