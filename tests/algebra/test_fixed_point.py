"""Sums in fixed point: the laws hold for equality, and the error is below the bound derived there."""

import fractions
import itertools
import math

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import distattn
from distattn.algebra import deterministic_math, fixed_point
from distattn.algebra.fixed_point import FixedPointState, limb_format
from tests.cases import FULLY_OPTIMIZED, mesh_of

FLOAT32_EPS = float(np.finfo(np.float32).eps)
SCALES = (1.0, 1e-3, 1e5, 1e20, 3e37, 1e-20, 1e-36, 0.0)
LARGEST = float(np.finfo(np.float32).max)


def same_bits(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, y, strict=True), a, b)


@st.composite
def terms(draw, count=3, width=4):
    """Rows of numbers, each in a regime of its own, with the number of bits of a limb_format."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    scales = [draw(st.sampled_from(SCALES)) for _ in range(count)]
    x = np.stack([np.clip(rng.normal(size=width), -9, 9) * scale for scale in scales])
    return x.astype(np.float32), limb_format(draw(st.sampled_from((1, 300, 10**4, 10**6))))


def fixed(x, scale):
    return fixed_point.quantise(jnp.asarray(x)[:, None], scale)


@hypothesis.given(terms())
def test_associativity(drawn):
    a, b, c = (fixed(x, drawn[1]) for x in drawn[0])
    merge = fixed_point.merge
    same_bits(merge(merge(a, b), c), merge(a, merge(b, c)))


@hypothesis.given(terms(count=2))
def test_commutativity(drawn):
    a, b = (fixed(x, drawn[1]) for x in drawn[0])
    same_bits(fixed_point.merge(a, b), fixed_point.merge(b, a))


@hypothesis.given(terms(count=1))
def test_identity(drawn):
    x = fixed(drawn[0][0], drawn[1])
    nothing = fixed_point.zero((4, 1), drawn[1])
    same_bits(fixed_point.merge(nothing, x), x)
    same_bits(fixed_point.merge(x, nothing), x)


@hypothesis.given(terms(count=6), st.integers(0, 6))
def test_merge_of_parts_is_the_whole(drawn, cut):
    x, scale = drawn

    def total(rows):
        onto = fixed_point.zero((4, 1), scale)
        return fixed_point.accumulate(onto, jnp.asarray(rows)[:, :, None]) if len(rows) else onto

    whole = total(x)
    same_bits(fixed_point.merge(total(x[:cut]), total(x[cut:])), whole)
    same_bits(total(x[::-1]), whole)
    rows = fixed_point.quantise(jnp.asarray(x).T, scale)  # all at once, as rows that are merged
    same_bits(fixed_point.merge_axes(rows, 0, keepdims=True), whole)


@hypothesis.given(terms(count=5))
def test_error_bound(drawn):
    x, scale = drawn

    total = fixed_point.merge_axes(fixed_point.quantise(jnp.asarray(x).T, scale), 0)
    got = fixed_point.value(total)
    normal = np.where(np.abs(x) < np.finfo(np.float32).tiny, 0, x)
    bits = scale.bits * (scale.count - 1)
    # The units go by the largest of a row of numbers, here of all of them.
    bound = len(x) * 2.0**-bits * float(np.abs(normal).max())
    for column, sum_ in zip(x.T, np.asarray(got), strict=True):
        exact = sum(fractions.Fraction(float(term)) for term in column)
        if abs(exact) > LARGEST:
            continue
        rounding = 4 * FLOAT32_EPS * abs(float(exact)) + float(np.finfo(np.float32).tiny) * len(x)
        assert abs(fractions.Fraction(float(sum_)) - exact) <= bound + rounding


def test_error_bound_is_below_half_a_unit_of_the_last_place():
    for count in (1, 100, 486, 487, 4096, 7782, 2**17 - 8, 2**20, 2**24):
        scale = limb_format(count)
        assert count * 2.0 ** (-scale.bits * (scale.count - 1)) <= FLOAT32_EPS / 2
        assert count * 2.0 ** (scale.bits - 1) < 2**31
    with pytest.raises(
        ValueError, match="at most 2\\^24 terms, and this one has 16777217; sum parts"
    ):
        limb_format(2**24 + 1)


def test_a_length_and_what_it_is_padded_to_have_one_lattice():
    for power, devices in itertools.product(range(25), range(1, 65)):
        for length in (2**power, 3 * 2**power, 10**power):
            padded = math.ceil(length / devices) * devices
            if padded <= 2**24:
                assert limb_format(length) == limb_format(padded)


def test_other_lattices_do_not_merge():
    a, b = (fixed_point.zero((1, 2), limb_format(count)) for count in (1, 10**6))
    with pytest.raises(ValueError, match="bits=23.*bits=11.*make it, with `limb_format`"):
        fixed_point.merge(a, b)


@pytest.mark.parametrize("odd", [np.inf, -np.inf, np.nan])
def test_what_is_no_number_makes_its_row_none(odd):
    x = jnp.array([[1.0, 2.0], [odd, 3.0]], jnp.float32).T  # rows (1, 2) and (odd, 3)
    value = np.asarray(fixed_point.value(fixed_point.quantise(x, limb_format(4))))
    np.testing.assert_array_equal(value, [[1, np.nan], [2, np.nan]])
    merged = fixed_point.merge_axes(fixed_point.quantise(x, limb_format(4)), 0)
    assert np.isnan(np.asarray(fixed_point.value(merged))).all()


def test_powers_of_two_and_ties():
    for scale in (limb_format(1), limb_format(4096), limb_format(10**5)):
        for exponent in range(-120, 121, 7):
            x = np.ldexp([1.0, -1.0, 1.5, 1.25], exponent).astype(np.float32)
            rows = fixed_point.quantise(jnp.asarray(x)[None], scale)
            np.testing.assert_array_equal(fixed_point.value(rows)[0], x)


def state_of(logits, values, unit, scale):
    """From the definition, one row whose blocks are `unit` keys."""
    logits, values = jnp.asarray(logits, jnp.float32), jnp.asarray(values, jnp.float32)
    blocks, parts = logits.reshape(-1, unit), values.reshape(-1, unit, values.shape[-1])
    high = blocks.max(axis=1)
    weights = deterministic_math.exp(blocks - jnp.where(high == -jnp.inf, 0.0, high)[:, None])
    scaling = [x[:, None, None, None] for x in fixed_point.scaled_exp(high, scale.bits)]
    sums = weights.sum(axis=1)[:, None], jnp.einsum("cs,csv->cv", weights, parts)
    rows = [
        fixed_point.accumulate(
            fixed_point.zero((x.shape[1], 1, 1, 1), scale), x[..., None, None, None], *scaling
        )
        for x in sums
    ]
    return FixedPointState(*rows)


REGIMES = {
    "ordinary": lambda rng: (rng.normal(size=64), rng.normal(size=(64, 3))),
    "far apart": lambda rng: (rng.normal(size=64) * 500, rng.normal(size=(64, 3))),
    "far from zero": lambda rng: (rng.normal(size=64) - 1e5, rng.normal(size=(64, 3))),
    "beyond exp": lambda rng: (1e30 * (rng.integers(3, size=64) - 2.0), rng.normal(size=(64, 3))),
    "one key": lambda rng: (np.where(np.arange(64) == 9, 3.0, -np.inf), rng.normal(size=(64, 3))),
    "empty": lambda rng: (np.full(64, -np.inf), rng.normal(size=(64, 3))),
    "huge values": lambda rng: (rng.normal(size=64), 1e36 * rng.normal(size=(64, 3))),
    "tiny values": lambda rng: (rng.normal(size=64), 1e-34 * rng.normal(size=(64, 3))),
}


@pytest.mark.parametrize("regime", REGIMES)
def test_states_finish_as_attention(regime):
    rng = np.random.default_rng(0)
    logits, values = (np.asarray(x, np.float32) for x in REGIMES[regime](rng))
    scale = limb_format(16)
    whole = state_of(logits, values, 4, scale)
    order = rng.permutation(16)
    blocks = [x.reshape(16, 4, *x.shape[1:])[order].reshape(x.shape) for x in (logits, values)]
    halves = [state_of(*(x[part] for x in blocks), 4, scale) for part in (slice(24), slice(24, 64))]
    same_bits(fixed_point.merge(*halves), whole)
    out, lse = fixed_point.finalize(whole)
    exact = logits.astype(np.float64)
    if np.isneginf(exact).all():
        assert (np.asarray(out) == 0).all()
        assert np.isneginf(lse).all()
        return
    high = exact.max()
    weights = np.exp(exact - high)
    want = weights @ values.astype(np.float64) / weights.sum()
    unit = float(np.abs(values).max())
    np.testing.assert_allclose(out[0, 0, 0], want, rtol=0, atol=64 * FLOAT32_EPS * unit)
    want = high + np.log(weights.sum())
    np.testing.assert_allclose(lse, want, rtol=0, atol=2 * FLOAT32_EPS * max(abs(want), 1.0))


def test_sinks():
    rng = np.random.default_rng(1)
    logits, values = rng.normal(size=8), rng.normal(size=(8, 3))
    sink = jnp.array([0.7])
    out, lse = fixed_point.finalize(state_of(logits, values, 4, limb_format(2)), sink)
    total = np.exp(logits).sum() + np.exp(0.7)
    want = np.exp(logits) @ values / total
    np.testing.assert_allclose(out[0, 0, 0], want, rtol=0, atol=8 * FLOAT32_EPS)
    np.testing.assert_allclose(lse, np.log(total), rtol=0, atol=8 * FLOAT32_EPS)
    empty = state_of(np.full(4, -np.inf), np.ones((4, 3)), 4, limb_format(2))
    out, lse = fixed_point.finalize(empty, sink)
    assert (np.asarray(out) == 0).all()
    np.testing.assert_allclose(lse, 0.7, rtol=0, atol=FLOAT32_EPS)


def test_functions_of_one_number():
    rng = np.random.default_rng(0)
    x = np.concatenate([rng.uniform(-86, 80, 10**4), rng.normal(size=10**4)]).astype(np.float32)
    exact = x.astype(np.float64)
    positive = np.exp(exact).astype(np.float32)
    pairs = (
        (deterministic_math.exp(x), np.exp(exact), np.exp(exact)),
        (deterministic_math.tanh(x), np.tanh(exact), np.tanh(np.abs(exact))),
        (
            deterministic_math.log(positive),
            np.log(positive.astype(np.float64)),
            np.maximum(np.abs(x), 1),
        ),
    )
    for got, want, unit in pairs:
        assert np.max(np.abs(np.asarray(got, np.float64) - want) / unit) < 2 * FLOAT32_EPS
    assert (
        deterministic_math.exp(jnp.float32(-200.0))
        == deterministic_math.exp(jnp.float32(-np.inf))
        == 0
    )


@pytest.mark.parametrize("bits", [7, 11, 15, 19, 23])
def test_gauge_and_back(bits):
    ordinary = np.linspace(-300, 300, 4001)
    far = [0.0, 1e4, -1e6, 3e7, -2.5e8, 1e20, -3e38]
    x = np.concatenate([ordinary, far]).astype(np.float32)
    steps, factor = fixed_point.scaled_exp(x, bits)
    assert (np.abs(np.log2(np.asarray(factor))) <= bits).all()
    back = np.asarray(fixed_point.scaled_log(steps, factor, bits), np.float64)
    assert np.max(np.abs(back - x) / np.maximum(np.abs(x), 1.0)) < 2 * FLOAT32_EPS
    order = np.argsort(x)
    assert (np.diff(np.asarray(steps)[order]) >= 0).all()
    odd = fixed_point.scaled_exp(jnp.array([-jnp.inf, jnp.inf, jnp.nan]), bits)
    np.testing.assert_array_equal(
        odd[0], [fixed_point.EMPTY, fixed_point.POISON, fixed_point.POISON]
    )
    np.testing.assert_array_equal(odd[1], 0)


# ---------------------------------------------------------------------------- sums of arrays


def numbers(shape, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) * np.exp(8 * rng.normal(size=shape))).astype(np.float32)


def test_reproducible_sum_in_any_order():
    x = numbers((2, 60, 5))
    total = np.asarray(distattn.reproducible_sum(x, axis=1))
    exact = x.astype(np.float64).sum(axis=1)
    unit = np.maximum(np.abs(x).max(axis=1), np.abs(exact))
    assert (np.abs(total - exact) <= FLOAT32_EPS * unit).all()
    order = np.random.default_rng(1).permutation(60)
    same_bits(np.asarray(distattn.reproducible_sum(x[:, order], axis=1)), total)
    floats = [np.asarray(jax.jit(lambda x: x.sum(axis=1))(y)) for y in (x, x[:, order])]
    assert (floats[0] != floats[1]).any()  # so that the test can fail


@pytest.mark.parametrize("kind", ["auto", "explicit"])
def test_reproducible_sum_over_devices(kind):
    x = numbers((2, 840, 5))
    total = np.asarray(distattn.reproducible_sum(x, axis=(0, 1)))
    for devices in (1, 3, 8):
        mesh = mesh_of(devices, kind)
        placed = jax.device_put(x, jax.NamedSharding(mesh, P(None, "kv")))

        def own(x, vma, mesh=mesh):
            return jax.shard_map(
                lambda x: distattn.reproducible_sum(x, axis=(0, 1), axis_name="kv"),
                mesh=mesh,
                in_specs=P(None, "kv"),
                out_specs=P(),
                check_vma=vma,
            )(x)

        forms = [
            lambda x: distattn.reproducible_sum(x, axis=(0, 1)),
            lambda x: own(x, True),
            lambda x: own(x, False),
        ]
        with jax.set_mesh(mesh):
            for form in forms:
                same_bits(
                    np.asarray(jax.jit(form, compiler_options=FULLY_OPTIMIZED)(placed)), total
                )


def test_reproducible_sum_has_the_gradient_of_a_sum():
    x, d = numbers((3, 8)), numbers((3, 1), seed=1)
    total, back = jax.vjp(lambda x: distattn.reproducible_sum(x, axis=-1, keepdims=True), x)
    assert total.shape == (3, 1)
    same_bits(np.asarray(back(d)[0]), np.broadcast_to(d, x.shape))
    tangent = jax.jvp(lambda x: distattn.reproducible_sum(x), (x,), (np.ones_like(x),))[1]
    assert tangent == x.size


def test_reproducible_sum_of_other_dtypes():
    x = jnp.asarray(numbers((64,)), jnp.bfloat16)
    assert distattn.reproducible_sum(x).dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="dtype int32; it must be floating-point.*jnp.sum"):
        distattn.reproducible_sum(jnp.arange(3))
    with pytest.raises(ValueError, match="axis is 2, and x has 1 dimensions.*from -1 to 0"):
        distattn.reproducible_sum(x, axis=2)
    with jax.enable_x64(True), pytest.raises(NotImplementedError, match="cast x to float32"):
        distattn.reproducible_sum(jnp.ones(3, jnp.float64))
