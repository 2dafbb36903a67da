"""Slots that no query may attend to add nothing in the kernels, and blocks of them are not visited."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import distattn
from distattn.local.kernels.shared import block_tables
from distattn.local.mask import Mask
from tests.cases import CASES, as_float32
from tests.kernel_calls import attention_by, every_kernel, simulated
from tests.tolerance import assert_close


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


ROWS = np.arange(10, dtype=np.int32)
KEYS = np.arange(12, dtype=np.int32)
POSITIONS = {"query_positions": ROWS, "key_positions": KEYS}
UNATTENDED = {  # masks, and slots that no query may attend to
    "empty": (
        {**POSITIONS, "key_positions": np.where(KEYS % 5 == 3, -1, KEYS), "is_causal": True},
        (3, 8, 10, 11),
    ),
    "lengths": ({"key_value_seq_lengths": np.array([7], np.int32)}, range(7, 12)),
    "causal": ({"is_causal": True}, (10, 11)),
    "window with gaps": (
        {"local_window_size": 1, **POSITIONS, "query_positions": ROWS // 5 * 6},
        (2, 3, 4, 8, 9, 10, 11),
    ),
    "segments": (
        {"query_segment_ids": ROWS % 2, "key_value_segment_ids": KEYS % 3},
        (2, 5, 8, 11),
    ),
}


@every_kernel
@pytest.mark.parametrize("name", UNATTENDED)
@pytest.mark.parametrize("garbage", [np.nan, np.inf])
def test_nothing_leaks_from_slots_that_no_query_may_attend_to(implementation, name, garbage):
    """Nor from queries past their length."""
    masks, slots = UNATTENDED[name]
    query, key, value = random(1, 10, 4, 8), random(1, 12, 2, 8, seed=1), random(1, 12, 2, 8)
    dirty = [x.copy() for x in (query, key, value)]
    dirty[0][:, 9:] = garbage
    for x in dirty[1:]:
        x[:, [*slots]] = garbage

    def loss(query, key, value):
        lengths = np.array([9], np.int32)
        call = masks | {"query_seq_lengths": lengths}
        out, lse = attention_by(implementation)(query, key, value, **call)
        return (out**2).sum() + lse[:, :9].sum(), (out, lse)

    run = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
    with simulated(implementation):
        got, clean = run(*dirty), run(query, key, value)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(clean), strict=True):
        assert_close(x, np.asarray(y), jnp.float32, 24)


@every_kernel
def test_infinite_values_that_are_attended_show(implementation):
    query, key, value = random(1, 2, 2, 4), random(1, 4, 2, 4, seed=1), random(1, 4, 2, 4, seed=2)
    value[:, 1, 0, 0], value[:, 1, 0, 1], value[:, 1, 0, 2] = np.inf, -np.inf, np.nan
    with simulated(implementation):
        out = np.asarray(attention_by(implementation)(query, key, value)[0])
    np.testing.assert_array_equal(out[0, :, 0, 0], np.inf)
    np.testing.assert_array_equal(out[0, :, 0, 1], -np.inf)
    assert np.isnan(out[0, :, 0, 2]).all()
    assert np.isfinite(out[0, :, 0, 3]).all()
    assert np.isfinite(out[0, :, 1]).all()


@every_kernel
def test_rows_without_keys(implementation):
    query, key = random(1, 5, 2, 8), np.full((1, 24, 2, 8), np.nan, np.float32)

    def loss(query, key, value):
        out, lse = attention_by(implementation)(
            query, key, value, key_positions=np.full(24, -1, np.int32)
        )
        return out.sum() + lse.sum(), (out, lse)

    with simulated(implementation):
        grads, (out, lse) = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(query, key, key)
    np.testing.assert_array_equal(out, 0)
    np.testing.assert_array_equal(lse, -np.inf)
    for x in grads:
        np.testing.assert_array_equal(x, 0)


@every_kernel
def test_windows_at_the_ends_of_int32_do_not_wrap(implementation):
    big = np.iinfo(np.int32).max
    query, key = random(1, 2, 1, 4), random(1, 3, 1, 4, seed=1)
    positions = {
        "query_positions": np.array([0, big], np.int32),
        "key_positions": np.array([0, 5, big], np.int32),
    }
    for window in ((big, big), (big, 0), (0, big)):
        with simulated(implementation):
            got = attention_by(implementation)(
                query, key, key, **positions, local_window_size=window
            )
        want = distattn.dot_product_attention(
            query, key, key, **positions, local_window_size=window, return_residual=True
        )
        for x, y in zip(got, want, strict=True):
            assert_close(x, np.asarray(y), jnp.float32, 3)


@every_kernel
def test_states_of_parts_merge(implementation):
    case = CASES["causal_permuted"]
    arguments = as_float32(case.arguments())
    by_key = ("key", "value", "key_positions")
    with simulated(implementation):
        parts = [
            distattn.partial_attention(
                **{name: x[:, half] if name in by_key else x for name, x in arguments.items()},
                implementation=implementation,
            )
            for half in (slice(0, 10), slice(10, None))
        ]
    out, lse = distattn.finalize(distattn.merge(*parts))
    want = distattn.dot_product_attention(**arguments, return_residual=True)
    for x, y in zip((out, lse), want, strict=True):
        assert_close(x, np.asarray(y), jnp.float32, case.keys)


def test_blocks_that_no_row_can_see_are_not_visited():
    config = types.SimpleNamespace(
        row_block=256, groups=2, queries=512, keys=500, key_block=128, row_blocks=4, key_blocks=4
    )
    order = np.random.default_rng(0).permutation(4)
    keys = np.concatenate([np.arange(128) + 128 * block for block in order])[:500]
    keys = np.where(keys // 128 == 1, -1, keys)  # a block of empty slots
    mask = Mask(
        query_positions=jnp.arange(512, dtype=jnp.int32)[None],
        key_positions=jnp.asarray(keys, jnp.int32)[None],
        is_causal=True,
    )
    by_rows, by_keys = block_tables(mask, config)
    blocks = [block for block in range(4) if order[block] != 1]
    needed = {row: [x for x in blocks if order[x] <= row] for row in range(4)}
    for table, wanted in (
        (by_rows, needed),
        (by_keys, {x: [row for row in range(4) if x in needed[row]] for x in range(4)}),
    ):
        counts, found = np.asarray(table.counts), np.asarray(table.order).reshape(4, 4)
        for own, others in wanted.items():
            assert sorted(found[own, : counts[own]]) == others
