"""Streams on one device: pairs in O(1) memory, and halves that wait for one another."""

import gc
import itertools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from distattn.algebra.softmax_state import finalize
from distattn.local.streaming import PairJoin, fold
from distattn.testing import reference
from tests.tolerance import assert_close

BATCH, QUERIES, HEADS, KV_HEADS, WIDTH, VALUE_WIDTH = 2, 3, 4, 2, 8, 5


def arrays(pairs, seed=0):
    rng = np.random.default_rng(seed)
    shapes = (
        (BATCH, QUERIES, HEADS, WIDTH),
        (BATCH, pairs, KV_HEADS, WIDTH),
        (BATCH, pairs, KV_HEADS, VALUE_WIDTH),
    )
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


def assert_attention(result, query, key, value, **options):
    exact = [x.astype(np.float64) for x in (query, key, value)]
    want = reference.dot_product_attention(*exact, **options)
    for got, wanted, what in zip(result, want, ("out", "lse"), strict=True):
        assert got.dtype == jnp.float32
        assert_close(got, wanted, jnp.float32, key.shape[1], what=f"stream: {what}")


def join_of(query, key, value, key_order, value_order, **options):
    """One key, one value, one key, ... in these orders."""
    join = PairJoin(query, **options)
    for k, v in itertools.zip_longest(key_order, value_order):
        if k is not None:
            join.add_key(k, key[:, k])
        if v is not None:
            join.add_value(v, value[:, v])
    return join


@hypothesis.given(st.permutations(range(12)), st.integers(1, 12))
def test_pairs_in_any_order_and_any_portions(order, portion):
    query, key, value = arrays(12)
    state = None
    for start in range(0, 12, portion):
        some = order[start : start + portion]
        state = fold(state, query, key[:, some], value[:, some])
    assert_attention(finalize(state), query, key, value)


def test_pairs_with_all_options():
    query, key, value = arrays(16)
    positions = np.random.default_rng(1).permutation(16).astype(np.int32)
    queries = np.array([7, 15, 3], np.int32)
    options = {
        "scale": 0.3,
        "is_causal": True,
        "local_window_size": (9, 2),
        "logits_soft_cap": 2.0,
        "query_positions": queries,
    }
    state = None
    for i in range(16):
        here = slice(i, i + 1)
        state = fold(
            state, query, key[:, here], value[:, here], key_positions=positions[here], **options
        )
    assert_attention(finalize(state), query, key, value, key_positions=positions, **options)
    join = PairJoin(query, **options)
    for i, position in enumerate(positions.tolist()):
        join.add_value(position, value[:, i])
        join.add_key(position, key[:, i])
    assert_attention(join.result(), query, key, value, key_positions=positions, **options)


def test_the_stream_of_pairs_is_one_state_long():
    """No array lives on from one step to the next but the three of the state."""
    query, key, value = map(jnp.asarray, arrays(64))
    state = fold(None, query, key[:, :1], value[:, :1])
    gc.collect()  # what earlier tests have left would vanish some time later
    before = len(jax.live_arrays())
    for i in range(1, 64):
        state = fold(state, query, key[:, i : i + 1], value[:, i : i + 1])
        assert len(jax.live_arrays()) == before
    assert_attention(finalize(state), *map(np.asarray, (query, key, value)))


def test_gradient_of_a_stream_of_pairs():
    query, key, value = arrays(6)
    weight = np.random.default_rng(1).normal(size=(BATCH, QUERIES, HEADS, VALUE_WIDTH))
    weight = weight.astype(np.float32)

    def loss(query, key, value):
        state = None
        for i in (4, 0, 5, 1, 3, 2):
            state = fold(state, query, key[:, i : i + 1], value[:, i : i + 1])
        return jnp.sum(finalize(state)[0] * weight)

    gradients = jax.grad(loss, argnums=(0, 1, 2))(query, key, value)
    exact = [x.astype(np.float64) for x in (query, key, value)]
    want = reference.attention_gradients(
        *exact, dout=weight.astype(np.float64), dlse=np.zeros((BATCH, QUERIES, HEADS))
    )
    # Beside the keys, the terms of a logit and of its gradient.
    terms = 6 + query.shape[-1] + VALUE_WIDTH
    for name, gradient in zip(("query", "key", "value"), gradients, strict=True):
        # Twice the tolerance: each of the six merges rescales once more.
        assert_close(gradient, want[f"d{name}"], jnp.float32, terms, 2.0, what=f"stream: d{name}")


@hypothesis.given(st.permutations(range(10)), st.permutations(range(10)), st.data())
def test_halves_in_any_order(key_order, value_order, data):
    """Whatever comes when: attention, and no more is held than what waits."""
    query, key, value = arrays(10)
    join, keys, values = PairJoin(query), list(key_order), list(value_order)
    waiting, peak = set(), 0
    while keys or values:
        take_key = bool(keys) and (not values or data.draw(st.booleans()))
        position = (keys if take_key else values).pop()
        (join.add_key if take_key else join.add_value)(
            position, (key if take_key else value)[:, position]
        )
        waiting ^= {position}
        peak = max(peak, len(waiting))
        assert join.pending == len(waiting)
    assert join.peak_pending == peak
    assert_attention(join.result(), query, key, value)


@pytest.mark.parametrize("lag", [0, 1, 5])
def test_a_lag_bounds_what_waits(lag):
    """Values come `lag` steps after their keys: that many keys wait, however long the stream is."""
    pairs = 40
    query, key, value = arrays(pairs)
    join = PairJoin(query)
    for step in range(pairs + lag):
        if step >= lag:
            join.add_value(step - lag, value[:, step - lag])
        if step < pairs:
            join.add_key(step, key[:, step])
    # With no lag a value is there one call before its key, and waits for it.
    assert join.peak_pending == max(lag, 1)
    assert_attention(join.result(), query, key, value)


def test_opposite_orders_make_all_wait():
    """Keys 0, 1, 2, ... against values n-1, n-2, ...: until the middle nothing finds its partner."""
    pairs = 40
    query, key, value = arrays(pairs)
    join = join_of(query, key, value, range(pairs), reversed(range(pairs)))
    assert join.peak_pending == pairs
    assert_attention(join.result(), query, key, value)


def test_memory_is_what_waits():
    """Counted in live arrays, not by the join's own account."""
    pairs = 30
    query, key, value = arrays(pairs)
    rng = np.random.default_rng(0)
    steps = [("key", i) for i in range(pairs)] + [("value", i) for i in range(pairs)]
    rng.shuffle(steps)
    join = PairJoin(query)
    items = {"key": (KV_HEADS, WIDTH), "value": (KV_HEADS, VALUE_WIDTH)}

    def live():
        shapes = [x.shape for x in jax.live_arrays()]
        return sum(shapes.count((BATCH, *shape)) for shape in items.values())

    gc.collect()  # what earlier tests have left would vanish some time later
    base, peak = live(), 0
    for name, position in steps:
        position = int(position)
        add = join.add_key if name == "key" else join.add_value
        add(position, (key if name == "key" else value)[:, position])
        assert live() - base == join.pending
        peak = max(peak, live() - base)
    assert join.pending == 0
    assert peak == join.peak_pending > 5
    assert_attention(join.result(), query, key, value)


def test_positions_may_be_any_numbers():
    query, key, value = arrays(4)
    join = PairJoin(query)
    for i, position in enumerate((10**12, 3, np.int64(2**40), 0)):
        join.add_key(position, key[:, i])
        join.add_value(position, value[:, i])
    assert_attention(join.result(), query, key, value)


@pytest.mark.parametrize("name", ["key", "value"])
@pytest.mark.parametrize("joined", [True, False])
def test_a_second_one_with_the_same_position(name, joined):
    query, key, value = arrays(12)
    order = [0, 2, 4, 6, 1, 11, 5, 3]
    join = join_of(query, key, value, order, order if joined else [])
    if not joined:
        join = join_of(query, key, value, *(([3], []) if name == "key" else ([], [3])))
    add = join.add_key if name == "key" else join.add_value
    for position in order if joined else [3]:
        with pytest.raises(
            ValueError, match=f"a second {name} has position {position}.*one {name}"
        ):
            add(position, (key if name == "key" else value)[:, position])
    assert join.pending == (0 if joined else 1)


@hypothesis.given(st.permutations(range(9)), st.integers(1, 8))
def test_what_is_done_is_known_exactly(order, count):
    query, key, value = arrays(9)
    done = order[:count]
    join = join_of(query, key, value, done, done)
    for position in done:
        with pytest.raises(ValueError, match="a second key"):
            join.add_key(position, key[:, position])
    for position in order[count:]:
        join.add_key(position, key[:, position])
        join.add_value(position, value[:, position])
    assert_attention(join.result(), query, key, value)


def test_an_incomplete_join_names_what_waits():
    query, key, value = arrays(12)
    join = join_of(query, key, value, range(6), [7, 0])
    message = (
        r"6 items wait; keys at positions 1, 2, 3 and 2 more have no partner: add_value.*"
        r"values at positions 7 have no partner: add_key"
    )
    with pytest.raises(ValueError, match=message):
        join.result()
    for position in range(1, 6):
        join.add_value(position, value[:, position])
    join.add_key(7, key[:, 7])
    there = [*range(6), 7]
    assert_attention(join.result(), query, key[:, there], value[:, there])


def test_wrong_calls():
    query, key, value = arrays(2)
    join = PairJoin(query)
    with pytest.raises(ValueError, match="no key and no value has come.*add a pair"):
        join.result()
    with pytest.raises(ValueError, match=r"query has shape \(3, 4, 8\).*query\[None\]"):
        PairJoin(query[0])
    with pytest.raises(ValueError, match="position is -1; a key .*leave out"):
        join.add_key(-1, key[:, 0])
    with pytest.raises(TypeError):
        join.add_key(0.5, key[:, 0])
    with pytest.raises(ValueError, match=r"value has shape \(2, 2, 2, 5\).*\[B, K, V\] with B=2"):
        join.add_value(0, value)
    with pytest.raises(ValueError, match=r"key has shape \(1, 2, 8\).*\[B, K, H\] with B=2"):
        join.add_key(0, key[:1, 0])
    assert join.pending == 0


def test_a_pair_that_does_not_fit_leaves_the_join_as_it_was():
    query, key, value = arrays(2)
    join = PairJoin(query)
    join.add_value(0, value[:, 0])
    with pytest.raises(ValueError, match="key"):
        join.add_key(0, key[:, 0, :, :3])
    assert join.pending == 1
    join.add_key(0, key[:, 0])
    assert_attention(join.result(), query, key[:, :1], value[:, :1])


def test_masks_by_position_need_the_queries_positions():
    query, key, value = arrays(1)
    join = PairJoin(query, is_causal=True)
    join.add_key(0, key[:, 0])
    with pytest.raises(ValueError, match="query_positions"):
        join.add_value(0, value[:, 0])
