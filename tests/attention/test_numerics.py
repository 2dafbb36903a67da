"""Extreme numbers, empty rows, and what lies in slots that nobody may attend to."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import distattn
from distattn.testing import reference
from tests.cases import mesh_of, shardings
from tests.tolerance import assert_close

MESHES = (None, 1, 3, 8)
attention = functools.partial(distattn.dot_product_attention, return_residual=True)


def on(devices, strategy="butterfly"):
    if devices is None:
        return attention
    mesh = mesh_of(devices, "auto")
    return functools.partial(attention, **shardings(mesh, "kv", query="auto"), strategy=strategy)


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("devices", MESHES)
@pytest.mark.parametrize("size", [1e4, -1e4])
def test_logits_of_ten_thousand(size, devices):
    query, key, value = random(1, 3, 2, 4), random(1, 24, 2, 4, seed=1), random(1, 24, 2, 4, seed=2)
    bias = np.full((1, 1, 1, 24), size, np.float32) + random(1, 1, 1, 24, seed=3)
    out, lse = jax.jit(on(devices))(query, key, value, bias)
    want_out, want_lse = reference.dot_product_attention(query, key, value, bias)
    # A logit near 1e4 has a rounding of 1e4 * eps, and so has each weight: 1e4 roundings of 1.
    assert_close(out, want_out, jnp.float32, 24, 1e4)
    assert_close(lse, want_lse, jnp.float32, 24)


@pytest.mark.parametrize("devices", MESHES)
def test_logits_from_one_end_to_the_other(devices):
    query, key, value = random(1, 3, 2, 4), random(1, 24, 2, 4, seed=1), random(1, 24, 2, 4, seed=2)
    bias = np.linspace(-1e4, 1e4, 24, dtype=np.float32).reshape(1, 1, 1, 24)
    got = jax.jit(on(devices))(query, key, value, bias)
    for x, y in zip(got, reference.dot_product_attention(query, key, value, bias), strict=True):
        assert_close(x, y, jnp.float32, 24)


@pytest.mark.parametrize(
    "strategy", ["butterfly", "psum", "all_gather", "reduce_scatter", "gather_kv"]
)
def test_a_row_that_attends_to_nothing(strategy):
    query, key, value = random(2, 4, 2, 4), random(2, 24, 2, 4, seed=1), random(2, 24, 2, 4, seed=2)
    mask = np.ones((2, 1, 4, 24), bool)
    mask[0, :, 1] = False
    mask[1] = False
    bias = random(1, 2, 4, 24, seed=3)

    def loss(query, key, value, bias):
        out, lse = on(4, strategy)(query, key, value, bias, mask)
        return (out * 3).sum() + lse.sum(), (out, lse)

    grads, (out, lse) = jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3), has_aux=True))(
        query, key, value, bias
    )
    for rows in ((0, 1), (1,)):
        np.testing.assert_array_equal(out[rows], 0)
        np.testing.assert_array_equal(lse[rows], -np.inf)
        np.testing.assert_array_equal(grads[0][rows], 0)
    np.testing.assert_array_equal(grads[1][1], 0)
    np.testing.assert_array_equal(grads[2][1], 0)
    np.testing.assert_array_equal(grads[3][0, :, 1], 0)
    assert all(np.isfinite(g).all() for g in grads)
    assert np.isfinite(lse[0, 0]).all()


@pytest.mark.parametrize("devices", [None, 5, 8])
def test_all_slots_empty_on_any_number_of_devices(devices):
    query, key = random(1, 2, 2, 4), np.full((1, 24, 2, 4), np.nan, np.float32)

    def loss(query, key, value):
        out, lse = on(devices)(query, key, value, key_positions=np.full(24, -1, np.int32))
        return out.sum() + lse.sum(), (out, lse)

    grads, (out, lse) = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(query, key, key)
    np.testing.assert_array_equal(out, 0)
    np.testing.assert_array_equal(lse, -np.inf)
    for g in grads:
        np.testing.assert_array_equal(g, 0)


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("garbage", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("devices", [None, 4])
def test_nothing_leaks_from_masked_slots(devices, garbage, queries):
    # Some slots are empty, some lie in the future of all queries, some in that of the first ones only.
    keys = 24
    query, key, value = (
        random(1, queries, 4, 4),
        random(1, keys, 2, 4, seed=1),
        random(1, keys, 2, 4, seed=2),
    )
    positions = np.random.default_rng(7).permutation(keys).astype(np.int32)
    query_positions = np.arange(8, 8 + queries, dtype=np.int32)
    positions[[2, 11]] = -1
    dirty_key, dirty_value = key.copy(), value.copy()
    bad = (positions < 0) | (positions > query_positions.max())
    dirty_key[:, bad], dirty_value[:, bad] = garbage, garbage

    def loss(query, key, value):
        out, lse = on(devices)(
            query,
            key,
            value,
            is_causal=True,
            query_positions=query_positions,
            key_positions=positions,
        )
        return (out**2).sum() + lse.sum(), (out, lse)

    run = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
    clean, dirty = run(query, key, value), run(query, dirty_key, dirty_value)
    for x, y in zip(jax.tree.leaves(dirty), jax.tree.leaves(clean), strict=True):
        assert np.isfinite(x).all()
        assert_close(x, np.asarray(y), jnp.float32, keys)


ROWS = np.arange(6, dtype=np.int32)
UNATTENDED = {  # masks, and the slots that no query may attend to
    "lengths": ({"key_value_seq_lengths": np.array([5], np.int32)}, slice(5, None)),
    "causal": ({"is_causal": True}, slice(6, None)),
    "segments": (
        {
            "query_segment_ids": np.array([1, 1, 3, 3, 1, 3], np.int32),
            "key_value_segment_ids": np.array([1, 1, 1, 2, 2, 2, 3, 3], np.int32),
        },
        slice(3, 6),
    ),
    "a window with gaps": (
        {"local_window_size": 1, "query_positions": ROWS // 3 * 6, "key_positions": np.arange(8)},
        slice(2, 5),
    ),
    "mask": ({"mask": np.arange(8)[None, None, None] != 3}, slice(3, 4)),
    "query lengths": (
        {"is_causal": True, "query_seq_lengths": np.array([4], np.int32)},
        slice(4, None),
    ),
}


@pytest.mark.parametrize("how", [{}, {"reproducible": True}, {"implementation": "dense"}], ids=str)
@pytest.mark.parametrize("name", UNATTENDED)
def test_slots_that_no_query_may_attend_to_can_hold_anything(name, how):
    masks, slots = UNATTENDED[name]
    query, key, value = (random(1, n, 2, 4, seed=i) for i, n in enumerate((6, 8, 8)))
    dirty_key, dirty_value = key.copy(), value.copy()
    dirty_key[:, slots], dirty_value[:, slots] = np.nan, np.inf

    def loss(query, key, value):
        out, lse = attention(query, key, value, **masks, **how)
        return (out**2).sum() + jnp.where(lse > -jnp.inf, lse, 0).sum(), (out, lse)

    run = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
    clean, dirty = run(query, key, value), run(query, dirty_key, dirty_value)
    for x, y in zip(jax.tree.leaves(dirty), jax.tree.leaves(clean), strict=True):
        np.testing.assert_array_equal(x, y)
    for gradient in dirty[0][1:]:
        np.testing.assert_array_equal(gradient[:, slots], 0)


def test_nothing_leaks_from_queries_past_the_length():
    query, key, value = (random(1, n, 2, 4, seed=i) for i, n in enumerate((6, 8, 8)))
    dirty = query.copy()
    dirty[:, 4:] = np.nan
    lengths = np.array([4], np.int32)

    def loss(query, key, value):
        out, lse = attention(query, key, value, query_seq_lengths=lengths)
        return (out**2).sum() + lse[:, :4].sum(), out

    run = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
    for x, y in zip(
        jax.tree.leaves(run(dirty, key, value)),
        jax.tree.leaves(run(query, key, value)),
        strict=True,
    ):
        np.testing.assert_array_equal(x, y)


def test_infinite_values_that_are_attended_show():
    query, key, value = random(1, 2, 2, 4), random(1, 4, 2, 4, seed=1), random(1, 4, 2, 4, seed=2)
    value[:, 1, 0, 0], value[:, 1, 0, 1], value[:, 1, 0, 2] = np.inf, -np.inf, np.nan
    for mask in (None, np.ones((1, 1, 1, 4), bool)):
        out = np.asarray(attention(query, key, value, mask=mask)[0])
        np.testing.assert_array_equal(out[0, :, 0, 0], np.inf)
        np.testing.assert_array_equal(out[0, :, 0, 1], -np.inf)
        assert np.isnan(out[0, :, 0, 2]).all()
        assert np.isfinite(out[0, :, 0, 3]).all()
        assert np.isfinite(out[0, :, 1]).all()


def test_windows_at_the_ends_of_int32_do_not_wrap():
    big = np.iinfo(np.int32).max
    query, key = random(1, 2, 1, 4), random(1, 3, 1, 4, seed=1)
    arguments = {
        "query_positions": np.array([0, big], np.int32),
        "key_positions": np.array([0, 5, big - 1], np.int32),
        "local_window_size": (big, big),
    }
    got = attention(query, key, key, **arguments)
    for x, y in zip(
        got, reference.dot_product_attention(query, key, key, **arguments), strict=True
    ):
        assert_close(x, y, jnp.float32, 3)


def test_bias_of_minus_infinity_masks():
    query, key = random(1, 2, 2, 4), random(1, 6, 2, 4, seed=1)
    bias = np.zeros((1, 1, 2, 6), np.float32)
    bias[..., 0, :] = -np.inf
    bias[..., 1, 3:] = -np.inf
    out, lse = attention(query, key, key, bias)
    np.testing.assert_array_equal(out[:, 0], 0)
    np.testing.assert_array_equal(lse[:, 0], -np.inf)
    want, _ = attention(query, key[:, :3], key[:, :3])
    assert_close(out[:, 1], np.asarray(want[:, 1]), jnp.float32, 6)
