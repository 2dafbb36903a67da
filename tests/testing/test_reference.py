"""The oracle: against jax.nn where they overlap, else by hand; its gradients by differences."""

import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import DTypeLike

from distattn.testing.reference import attend_mask, attention_gradients, dot_product_attention
from tests.tolerance import DIFFERENCE_STEP, assert_close, assert_close_to_difference, fraction

B, T, S, N, H = 2, 5, 7, 4, 8


def draw(*shape: int, seed: int = 0, dtype: DTypeLike = np.float32):
    return np.random.default_rng((seed, *shape)).normal(size=shape).astype(dtype)


def draw_bool(*shape, seed=0):
    return np.random.default_rng((seed, *shape)).random(shape) < 0.6


def arrays(kv_heads=2, width=H, value_width=H, queries=T, keys=S, dtype: DTypeLike = np.float32):
    query = draw(B, queries, N, width, seed=1, dtype=dtype)
    key = draw(B, keys, kv_heads, width, seed=2, dtype=dtype)
    value = draw(B, keys, kv_heads, value_width, seed=3, dtype=dtype)
    return query, key, value


def assert_same(actual, desired, keys=S):
    assert_close(actual, desired, np.float64, keys)


# --- against jax.nn.dot_product_attention ---


def compare_with_jax(inputs, mask=None, scale=None, gradients=True, **masking):
    """Output, lse and gradients, in the rows that attend to a key; others are a mean in jax.nn."""
    query, key, value, *bias = inputs
    rows = np.moveaxis(attend_mask(query, key, mask, **masking).any(axis=-1), 1, 2)
    rows = rows.reshape(*query.shape[:-2], -1)  # [B, T, N|1]
    in_rows = rows[..., None]
    assert rows.any()
    dout = np.where(in_rows, draw(*query.shape[:-1], value.shape[-1], seed=4), 0)

    def attention(inputs):
        return jax.nn.dot_product_attention(
            *inputs, mask=mask, scale=scale, return_residual=True, **masking
        )

    def run(inputs, dout):
        out, pull, lse = jax.vjp(attention, inputs, has_aux=True)
        return out, lse, pull(dout)[0] if gradients else ()

    # Without optimisation: most of the time of these tests is that of the compiler.
    run = jax.jit(run, compiler_options={"xla_backend_optimization_level": 0})
    with jax.default_matmul_precision("highest"):
        out, lse, got = run(inputs, dout)

    options = dict(mask=mask, scale=scale, **masking)
    want_out, want_lse = dot_product_attention(*inputs, **options)
    keys = key.shape[-3]
    for what, x, want, where in (("out", out, want_out, in_rows), ("lse", lse, want_lse, rows)):
        assert_close(np.where(where, x, 0), np.where(where, want, 0), x.dtype, keys, what=what)
    if not gradients:
        return
    want = attention_gradients(*inputs, dout=dout, **options)
    terms = dict.fromkeys(want, keys + query.shape[-3] * query.shape[-2] // key.shape[-2])
    unit = dict.fromkeys(want, 0.0)
    if bias:  # a sum of these, which cancel over the keys of a row
        full = (*query.shape[:-3], query.shape[-2], query.shape[-3], keys)
        inputs = query, key, value, np.broadcast_to(bias[0], full)
        summed = attention_gradients(*inputs, dout=dout, **options)["dbias"]
        unit["dbias"] = np.abs(summed).max()
        terms["dbias"] = keys + summed.size // bias[0].size
    for x, (name, desired) in zip(got, want.items(), strict=True):
        # Twice the tolerance: dout . value - delta cancels, and each of the two has been rounded.
        assert_close(x, desired, x.dtype, terms[name], factor=2, what=name, unit=unit[name])


@pytest.mark.parametrize("broadcast", list(itertools.product((True, False), repeat=4)))
def test_bias_and_mask_of_every_shape_agree_with_jax(broadcast):
    sizes = list(zip((B, N, T, S), broadcast, strict=True))
    bias = draw(*(1 if one else size for size, one in sizes))
    mask = draw_bool(*(size if one else 1 for size, one in sizes))
    mask.flat[0] = True
    compare_with_jax((*arrays(), bias), mask, gradients=False)


@pytest.mark.parametrize(
    ("bias", "mask"),
    [((S,), (N, T, S)), ((T, S), (S,)), ((N, 1, S), (T, 1)), ((B, 1, T, 1), (1, S)), ((), (1,))],
)
def test_bias_and_mask_of_lower_rank_agree_with_jax(bias, mask):
    compare_with_jax((*arrays(), np.asarray(draw(*bias))), draw_bool(*mask) | (np.prod(mask) == 1))


LENGTHS = {
    "query_seq_lengths": np.array([5, 2], np.int32),
    "key_value_seq_lengths": np.array([6, 1], np.int32),
}


@pytest.mark.parametrize(
    ("kv_heads", "masking"),
    [
        (1, {}),
        (2, {"scale": 0.3}),
        (4, {"is_causal": True}),
        (2, {"local_window_size": (2, 1)}),
        (1, {"local_window_size": 1}),
        (2, {"is_causal": True, "local_window_size": (1, 4)}),
        (4, {"key_value_seq_lengths": np.array([3, 7], np.int32)}),
        (2, {"query_seq_lengths": np.array([5, 2], np.int32)}),
        (1, {"is_causal": True, "local_window_size": (2, 0), **LENGTHS}),
    ],
    ids=lambda x: "+".join(x) or "full" if isinstance(x, dict) else str(x),
)
def test_masks_and_grouped_heads_agree_with_jax(kv_heads, masking):
    compare_with_jax(arrays(kv_heads), **masking)


def test_more_queries_than_keys_agree_with_jax():
    compare_with_jax(arrays(queries=9, keys=4), is_causal=True, local_window_size=(6, 0))


def test_without_batch_agrees_with_jax():
    compare_with_jax((*(x[0] for x in arrays()), draw(N, T, S)), is_causal=True)


# --- who attends to whom: with equal logits, the output lists the keys ---


def attended(queries, keys, **options):
    """Return for each query the set of keys it averages over, from the output of one-hot values."""
    out, lse = dot_product_attention(
        np.zeros((queries, 1, 1)), np.ones((keys, 1, 1)), np.eye(keys)[:, None], **options
    )
    sets = [set(np.flatnonzero(row)) for row in out[:, 0]]
    for row, one in zip(out[:, 0], sets, strict=True):
        assert_same(row, [1 / len(one) if s in one else 0 for s in range(keys)])
    assert_same(lse[:, 0], [math.log(len(one)) if one else -math.inf for one in sets])
    return sets


@pytest.mark.parametrize(
    ("window", "want"),
    [
        ((3, 2), range(3, 9)),  # the example in the docstring of jax.nn
        ((2, 0), range(4, 7)),
        (1, range(5, 8)),
        ((0, 0), [6]),
        ((2, -1), range(4, 10)),
        ((None, 1), range(8)),
        (-1, range(10)),
        (None, range(10)),
    ],
)
def test_window_is_inclusive_and_minus_one_is_unbounded(window, want):
    assert attended(10, 10, local_window_size=window)[6] == set(want)


def test_causal_is_aligned_top_left():
    assert attended(3, 5, is_causal=True) == [{0}, {0, 1}, {0, 1, 2}]


def test_masks_compare_positions_not_slots():
    options = {"query_positions": [0, 5, 3], "key_positions": [4, 0, 5, -1, 3]}
    assert attended(3, 5, is_causal=True, **options) == [{1}, {0, 1, 2, 4}, {1, 4}]
    assert attended(3, 5, local_window_size=(1, 1), **options) == [{1}, {0, 2}, {0, 4}]


def test_negative_position_is_an_empty_slot_without_any_other_mask():
    assert attended(1, 4, key_positions=[7, -1, 0, -5]) == [{0, 2}]
    assert attended(1, 4, key_positions=[-1, -1, -1, -1], local_window_size=-1) == [set()]
    far_left = attended(1, 3, key_positions=[-1, 0, 1], query_positions=[-1], local_window_size=1)
    assert far_left == [{1}]


def test_key_length_compares_positions_and_query_length_rows():
    assert attended(1, 5, key_value_seq_lengths=[3]) == [{0, 1, 2}]
    assert attended(1, 4, key_value_seq_lengths=[3], key_positions=[4, 2, -1, 0]) == [{1, 3}]
    assert attended(3, 2, query_seq_lengths=[2], query_positions=[9, 8, 0]) == [
        {0, 1},
        {0, 1},
        set(),
    ]


def test_query_positions_alone_leave_keys_their_index():
    assert attended(3, 3, is_causal=True, query_positions=[2, 0, 1]) == [{0, 1, 2}, {0}, {0, 1}]


def test_segments_attend_within_themselves():
    options = {"query_segment_ids": [2, 0, 1], "key_value_segment_ids": [0, 1, 1, 3]}
    assert attended(3, 4, **options) == [set(), {0}, {1, 2}]
    assert attended(3, 4, is_causal=True, **options) == [set(), {0}, {1, 2}]


def test_masks_are_joined_by_and():
    mask = np.array([[True, True, False, True]])
    options = {"query_positions": [2], "key_positions": [0, 3, 1, 2], "is_causal": True}
    assert attended(1, 4, mask=mask, **options) == [{0, 3}]
    assert attended(1, 4, mask=mask, key_value_seq_lengths=[2], **options) == [{0}]


def test_vectors_may_differ_between_rows_of_the_batch():
    query, key, _ = arrays()
    got = attend_mask(
        query,
        key,
        draw_bool(1, N, 1, S),
        is_causal=True,
        query_positions=np.array([[0, 1, 2, 3, 4], [4, 3, 2, 1, 0]]),
        key_positions=np.array([np.arange(S), np.arange(S)[::-1] - 1]),
        key_value_seq_lengths=[S, 3],
        query_segment_ids=np.array([[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]]),
        key_value_segment_ids=np.array([[0, 0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1, 0]]),
    )
    first = np.zeros((T, S), bool)
    first[0, :1] = first[1:3, :2] = first[3, 2:4] = first[4, 2:5] = True
    second = np.zeros((T, S), bool)  # positions 5 4 3 2 1 0 -1; slot 5 is of another segment
    second[:3, 3:5] = second[3, 4] = True
    np.testing.assert_array_equal(got, np.stack([first, second])[:, None] & draw_bool(1, N, 1, S))
    assert attend_mask(query[0], key[0], is_causal=True).shape == (1, 1, T, S)


# --- values by hand ---


def one_query(logits, values, **options):
    """Attend by one query of one head with these logits (query 1, scale 1) and values."""
    key, value = (np.reshape(x, (-1, 1, 1)) for x in (logits, values))
    out, lse = dot_product_attention(np.ones((1, 1, 1)), key, value, scale=1.0, **options)
    return out.item(), lse.item()


def test_two_keys():
    assert_same(one_query([0.0, math.log(3)], [1.0, 5.0]), [4.0, math.log(4)])


def test_sink_takes_weight_and_adds_no_value():
    got = one_query([0.0, math.log(3)], [1.0, 5.0], sinks=[math.log(4)])
    assert_same(got, [2.0, math.log(8)])


def test_sink_without_a_key_is_the_lse():
    assert_same(one_query([0.0], [1.0], mask=np.array(False), sinks=[-2.5]), [0.0, -2.5])
    # a row beyond the length has no sink either
    got = one_query([0.0], [1.0], query_seq_lengths=[0], sinks=[-2.5])
    assert_same(got, [0.0, -math.inf])


def test_sinks_belong_to_heads():
    query, key, value = arrays()
    sinks = draw(N)
    out, lse = dot_product_attention(query, key, value, sinks=sinks)
    plain_out, plain_lse = dot_product_attention(query, key, value)
    share = 1 / (1 + np.exp(sinks - plain_lse))
    assert_same(out, plain_out * share[..., None])
    assert_same(lse, plain_lse - np.log(share))


def test_soft_cap_comes_after_scale_and_bias_and_before_masks():
    capped = [2 * math.tanh((0.5 * k + b) / 2) for k, b in ((3.0, 0.25), (-8.0, -1.0))]
    weights = [math.exp(x) for x in capped]
    out, lse = dot_product_attention(
        [[[1.0]]],
        [[[3.0]], [[-8.0]], [[50.0]]],
        [[[1.0]], [[10.0]], [[7.0]]],
        [0.25, -1.0, 0.0],
        np.array([True, True, False]),
        scale=0.5,
        logits_soft_cap=2.0,
    )
    assert_same(out.item(), (weights[0] + 10 * weights[1]) / sum(weights))
    assert_same(lse.item(), math.log(sum(weights)))


def test_a_cap_bounds_even_an_infinite_bias():
    got = one_query([0.0, 0.0], [1.0, 2.0], bias=[-math.inf, 0.0], logits_soft_cap=math.log(3))
    assert_same(got, [1.75, math.log(4 / 3)])


def test_bias_of_minus_infinity_is_weight_zero():
    assert_same(one_query([0.0, 4.0], [1.0, 2.0], bias=[0.0, -math.inf]), [1.0, 0.0])
    assert_same(one_query([0.0, 4.0], [1.0, 2.0], bias=[-math.inf] * 2), [0.0, -math.inf])


def test_extreme_logits():
    assert_same(one_query([1e4, -1e4, 1e4], [1.0, 9.0, 3.0]), [2.0, 1e4 + math.log(2)])
    assert_same(one_query([-1e4, -1e4], [1.0, 3.0]), [2.0, math.log(2) - 1e4])


def test_query_head_reads_its_group_and_value_width_is_free():
    query = draw(T, N, H)
    value = np.zeros((S, 2, 3)) + np.array([[5.0, 6.0, 7.0], [-1.0, -2.0, -3.0]])
    out, _ = dot_product_attention(query, draw(S, 2, H), value)
    assert_same(out, np.zeros((T, N, 3)) + value[0, [0, 0, 1, 1]])


def test_narrow_dtypes_are_read_exactly():
    narrow = [jnp.asarray(x, jnp.bfloat16) for x in arrays()]
    wide = [np.asarray(x.astype(jnp.float32)) for x in narrow]
    got, lse = dot_product_attention(*narrow, bias=jnp.ones((S,), jnp.float16))
    want, _ = dot_product_attention(*wide, bias=np.ones(S))
    assert got.dtype == lse.dtype == np.float64
    np.testing.assert_array_equal(got, want)


# --- laws ---

RICH = {
    "scale": 0.7,
    "is_causal": True,
    "local_window_size": (5, 3),
    "logits_soft_cap": 1.5,
    "sinks": draw(N, dtype=np.float64),
    "query_seq_lengths": [T, 4],
    "key_value_seq_lengths": [6, 5],
    "query_positions": np.array([[0, 6, 3, 4, 5], [4, 0, 2, 9, 3]]),
    "key_positions": np.array([np.arange(S), [3, 0, 1, 2, -1, 5, 4]]),
    "query_segment_ids": np.array([[0, 0, 0, 0, 1], [0, 0, 1, 1, 0]]),
    "key_value_segment_ids": np.array([[0, 0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 0, 0]]),
}

NO_BATCH = {"scale", "is_causal", "local_window_size", "logits_soft_cap", "sinks"}
MASKS = {k: v for k, v in RICH.items() if k not in ("scale", "logits_soft_cap", "sinks")}


def everything():
    """Arrays, bias and mask for a call with RICH; it has rows of every kind."""
    inputs = (
        *arrays(width=3, value_width=2, dtype=np.float64),
        draw(1, N, 1, S),
        draw_bool(B, 1, T, S, seed=2),
    )
    _, lse = dot_product_attention(*inputs, **RICH)
    some_key = np.moveaxis(attend_mask(*inputs[:2], inputs[4], **MASKS).any(axis=-1), 1, 2)
    sink_only = np.isfinite(lse) & ~some_key
    assert np.isneginf(lse).any()
    assert sink_only.any()
    assert some_key.any()
    return inputs


def evaluate(*inputs, **options):
    """Everything there is to compute: out, lse and the gradients, by name."""
    out, lse = dot_product_attention(*inputs, **options)
    dout, dlse = draw(out.size).reshape(out.shape), draw(lse.size).reshape(lse.shape)
    gradients = attention_gradients(*inputs, dout=dout, dlse=dlse, **options)
    return {"out": out, "lse": lse, **gradients}


def test_order_of_keys_does_not_matter():
    query, key, value, bias, mask = everything()
    rng = np.random.default_rng(5)
    order = np.stack([rng.permutation(S) for _ in range(B)])  # another one in each row

    def moved(x):
        x = np.broadcast_to(x, (B, *x.shape[1:]))
        return np.stack([row[i] for row, i in zip(x, order, strict=True)])

    def last(x):
        return np.moveaxis(moved(np.moveaxis(x, -1, 1)), 1, -1)

    options = RICH | {
        name: moved(RICH[name]) for name in ("key_positions", "key_value_segment_ids")
    }
    bias = np.broadcast_to(bias, (B, N, 1, S))
    want = evaluate(query, key, value, bias, mask, **RICH)
    got = evaluate(query, moved(key), moved(value), last(bias), last(mask), **options)
    for name in ("dkey", "dvalue"):
        want[name] = moved(want[name])
    want["dbias"] = last(want["dbias"])
    for name, desired in want.items():
        assert_same(got[name], desired)


def test_without_batch_is_the_row_of_a_batch():
    inputs = everything()
    whole = dot_product_attention(*inputs, **RICH)
    for b in range(B):
        one = [x[b] if len(x) == B else x[0] for x in inputs]
        options = {k: v if k in NO_BATCH else v[b] for k, v in RICH.items()}
        kept = {k: v if k in NO_BATCH or np.ndim(v) == 0 else v[None] for k, v in options.items()}
        got, want = evaluate(*one, **options), evaluate(*(x[None] for x in one), **kept)
        for name, desired in want.items():
            np.testing.assert_array_equal(got[name], desired[0] if name != "dsinks" else desired)
        np.testing.assert_array_equal(got["out"], whole[0][b])
        np.testing.assert_array_equal(got["lse"], whole[1][b])


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_nothing_leaks_from_masked_slots(poison):
    query, key, value, bias, mask = everything()
    allowed = attend_mask(query, key, mask, **MASKS)
    unused = ~allowed.any(axis=(1, 2))  # [B, S]
    nobody = ~allowed.any(axis=(1, 3))  # [B, T]
    assert unused.any()
    assert nobody.any()
    bias = np.broadcast_to(bias, (B, N, T, S))
    want = evaluate(query, key, value, bias, mask, **RICH)
    got = evaluate(
        np.where(nobody[:, :, None, None], poison, query),
        np.where(unused[:, :, None, None], poison, key),
        np.where(unused[:, :, None, None], poison, value),
        np.where(allowed, bias, poison),
        mask,
        **RICH,
    )
    for name, desired in want.items():
        assert np.isneginf(desired).any() == (name == "lse")
        np.testing.assert_array_equal(got[name], desired)


def test_poison_reaches_only_the_rows_that_attend_to_it():
    query, key, value = arrays(queries=S)
    want, want_lse = dot_product_attention(query, key, value, is_causal=True)
    for index, bad in ((1, key.copy()), (2, value.copy())):
        bad[:, 4] = np.nan
        inputs = [bad if i == index else x for i, x in enumerate((query, key, value))]
        out, lse = dot_product_attention(*inputs, is_causal=True)
        np.testing.assert_array_equal(out[:, :4], want[:, :4])
        assert np.isnan(out[:, 4:]).all()
        assert np.isnan(lse[:, 4:]).all() == (index == 1)
        np.testing.assert_array_equal(lse[:, :4], want_lse[:, :4])


# --- gradients ---


def objective(inputs, sinks, dout, dlse, **options):
    out, lse = dot_product_attention(*inputs, sinks=sinks, **options)
    return np.sum(out * dout) + np.sum(dlse * lse, where=np.isfinite(lse))


@pytest.mark.parametrize("kind", ["everything", "no_mask", "one_query", "lower_rank_bias"])
def test_gradients_are_those_of_central_differences(kind):
    options = {}
    query, key, value, bias, mask = everything()
    sinks = RICH["sinks"]
    match kind:
        case "everything":
            options = {k: v for k, v in RICH.items() if k != "sinks"}
        case "no_mask":
            query, key, value = query[:1], key[:1], value[:1]
            bias, mask = draw(1, 1, T, S, seed=7), None
        case "one_query":
            query, key, value, mask = query[0, :1], key[0], value[0], None
            bias, sinks = None, None
            options = {"key_positions": [3, 1, -1, 0, -1, 9, 2], "key_value_seq_lengths": 8}
        case "lower_rank_bias":
            query, key, value = query[1:], key[1:], value[1:]
            bias, sinks, mask = draw(T, 1, seed=8), None, mask[1:, :, :1]
            options = {"logits_soft_cap": 0.8}
    inputs = [query, key, value, bias, mask]
    out, lse = dot_product_attention(*inputs, sinks=sinks, **options)
    dout, dlse = draw(*out.shape, dtype=np.float64), draw(*lse.shape, dtype=np.float64)
    got = attention_gradients(*inputs, dout=dout, dlse=dlse, sinks=sinks, **options)
    names = ["dquery", "dkey", "dvalue", "dbias", "dsinks"]
    inputs[3] = None if bias is None else bias.astype(np.float64)
    leaves = [*inputs[:4], sinks]
    assert set(got) == {n for n, x in zip(names, leaves, strict=True) if x is not None}
    for which, name in enumerate(names):
        if name not in got:
            continue
        want = np.zeros(leaves[which].shape)
        for at in np.ndindex(want.shape):
            ends = []
            for sign in (1, -1):
                moved = [x if x is None else x.copy() for x in leaves]
                moved[which][at] += sign * DIFFERENCE_STEP
                ends.append(objective([*moved[:4], mask], moved[4], dout, dlse, **options))
            want[at] = (ends[0] - ends[1]) / (2 * DIFFERENCE_STEP)
        assert_close_to_difference(got[name], want, name)


def test_empty_rows_have_no_gradient_and_ignore_theirs():
    query, key, value = arrays()
    sinks = draw(N)
    lengths = np.array([0, T])
    options = {"query_seq_lengths": lengths, "sinks": sinks}
    dout, dlse = draw(B, T, N, H), draw(B, T, N)
    got = attention_gradients(query, key, value, dout=dout, dlse=dlse, **options)
    bad = np.arange(B)[:, None, None] == 0
    dlse, dout = np.where(bad, np.nan, dlse), np.where(bad[..., None], np.nan, dout)
    poisoned = attention_gradients(query, key, value, dout=dout, dlse=dlse, **options)
    for name, x in got.items():
        np.testing.assert_array_equal(poisoned[name], x)
        if name != "dsinks":
            assert not x[0].any()
            assert x[1].any()


def test_gradient_of_a_sink_without_a_key_is_that_of_the_lse():
    got = attention_gradients(
        np.ones((1, 1, 1)),
        np.ones((1, 1, 1)),
        np.ones((1, 1, 1)),
        mask=np.array(False),
        sinks=[3.0],
        dout=np.ones((1, 1, 1)),
        dlse=[[2.0]],
    )
    assert {name: x.item() for name, x in got.items()} == {
        "dquery": 0.0,
        "dkey": 0.0,
        "dvalue": 0.0,
        "dsinks": 2.0,
    }


# --- wrong calls ---


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"is_causal": True, "key_positions": range(S)}, ValueError, "without query_positions"),
        ({"local_window_size": (1, -1), "key_positions": range(S)}, ValueError, "query_positions"),
        ({"query_segment_ids": [0] * T}, ValueError, "pass both"),
        ({"key_value_segment_ids": [0] * S}, ValueError, "pass both"),
        ({"key_positions": np.zeros((1, S), int)}, ValueError, r"key_positions has shape \(1, 7\)"),
        ({"query_positions": [0]}, ValueError, r"query_positions has shape \(1,\)"),
        ({"key_positions": np.zeros(S)}, TypeError, "same_kind"),
        ({"mask": np.ones(S, int)}, TypeError, "same_kind"),
        ({"mask": np.ones((3, 1, 1, 1), bool)}, ValueError, "broadcast"),
        ({"bias": np.ones((T, 3))}, ValueError, "broadcast"),
        ({"key_value_seq_lengths": [1]}, ValueError, "reshape"),
        ({"sinks": [0.0, 1.0]}, ValueError, "reshape"),
        ({"value": draw(B, S, 4, H)}, ValueError, r"\(2, 7, 4, 8\)"),
        ({"query": draw(B, T, 3, H)}, ValueError, "K divides N"),
        ({"query": draw(1, T, N, H)}, ValueError, r"\(1, 5, 4, 8\)"),
        ({"query": draw(T, N, H)}, ValueError, r"need \[B, T, N, H\]"),
    ],
)
def test_a_call_that_does_not_fit_is_an_error(options, error, match):
    call = dict(zip(("query", "key", "value"), arrays(), strict=True)) | options
    with pytest.raises(error, match=match):
        dot_product_attention(**call)


def test_gradients_refuse_unknown_names_and_cotangents_of_another_shape():
    inputs = arrays()
    with pytest.raises(TypeError, match="causal"):
        attention_gradients(*inputs, dout=draw(B, T, N, H), causal=True)
    with pytest.raises(ValueError, match="not the shapes of out and lse"):
        attention_gradients(*inputs, dout=draw(B, N, T, H))


# --- the tolerance itself ---


def test_assert_close_measures_in_units_of_the_tolerance(tmp_path, monkeypatch):
    record = tmp_path / "errors.jsonl"
    monkeypatch.setenv("DISTATTN_RECORD_ERRORS", str(record))
    unit = float(jnp.finfo(jnp.float32).eps) * 3  # one rounding and the sum over four keys
    desired = np.array([0.0, -8.0, -math.inf, math.nan])
    for share in (0.5, 1.5):
        actual = desired + np.array([share * unit * 8, 0, 0, 0])
        assert fraction(actual, desired, jnp.float32, 4) == pytest.approx(share)
    with pytest.raises(AssertionError, match=r"out: worst error is 1.5 of .* at \(0,\)"):
        assert_close(actual, desired, jnp.float32, 4, what="out")
    assert_close(actual, desired, jnp.float32, 4, factor=2.0)
    assert_close(actual, desired, jnp.bfloat16, 4)
    assert_close([0.0, unit / 2], [0.0, 0.0], jnp.float32, 4)  # a reference of zeros: absolute
    lines = [json.loads(line) for line in record.read_text().splitlines()]
    assert [line["dtype"] for line in lines] == ["float32", "float32", "bfloat16", "float32"]
    assert lines[0]["what"] == "out"
    assert lines[0]["fraction"] == pytest.approx(1.5)


@pytest.mark.parametrize(
    ("actual", "desired"),
    [
        (math.nan, 1.0),
        (1.0, math.nan),
        (math.inf, -math.inf),
        (-math.inf, -1e30),
        (0.0, -math.inf),
        ([1.0], 1.0),
        ([1.0, 1.0], [1.0]),
    ],
)
def test_assert_close_rejects_other_infinities_and_shapes(monkeypatch, actual, desired):
    monkeypatch.delenv("DISTATTN_RECORD_ERRORS", raising=False)  # these are meant to fail
    with pytest.raises(AssertionError):
        assert_close(actual, desired, jnp.bfloat16, 4, factor=1e9)
