"""The laws of the monoid, on mixed regimes: ordinary, far apart, nearly equal, empty."""

import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np

import distattn
from distattn.algebra import softmax_state as states
from tests.tolerance import assert_close

WIDTH = 3
SHIFTS = (0.0, 1e-6, 1.0, -300.0, 1e4, -1e4, -np.inf)


@st.composite
def logits_and_values(draw, keys=8):
    """Logits of one row, with a regime for each half, and values."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = rng.normal(size=keys)
    logits[: keys // 2] += draw(st.sampled_from(SHIFTS))
    logits[keys // 2 :] += draw(st.sampled_from(SHIFTS))
    return logits, rng.normal(size=(keys, WIDTH))


def state_of(logits, values):
    """From the definition, one row, in float32."""
    logits, values = jnp.asarray(logits, jnp.float32), jnp.asarray(values, jnp.float32)
    high = logits.max(initial=-jnp.inf)
    weights = states.softmax_weights(logits, high)
    row = distattn.SoftmaxState(high, weights.sum(), weights @ values)
    return jax.tree.map(lambda x: x[None], row)


def exact(logits, values):
    logits = np.asarray(np.asarray(logits, np.float32), np.float64)
    if np.isneginf(logits).all():
        return np.zeros(WIDTH), -np.inf
    high = logits.max()
    weights = np.exp(logits - high)
    return weights @ values / weights.sum(), high + np.log(weights.sum())


def same(a, b, keys=8):
    """Equal as states: `max` is a gauge, so what is compared is what they finish as."""
    for x, y in zip(distattn.finalize(a), distattn.finalize(b), strict=True):
        # Each side is a float32 result that may be off by the tolerance.
        assert_close(x, y, jnp.float32, keys, 2.0)


@hypothesis.given(logits_and_values())
def test_identity(row):
    x = state_of(*row)
    for merged in (
        distattn.merge(distattn.identity(x), x),
        distattn.merge(x, distattn.identity(x)),
    ):
        jax.tree.map(np.testing.assert_array_equal, merged, x)


@hypothesis.given(logits_and_values(), logits_and_values())
def test_commutative(a, b):
    x, y = state_of(*a), state_of(*b)
    same(distattn.merge(x, y), distattn.merge(y, x))


@hypothesis.given(logits_and_values(), logits_and_values(), logits_and_values())
def test_associative(a, b, c):
    x, y, z = state_of(*a), state_of(*b), state_of(*c)
    same(distattn.merge(distattn.merge(x, y), z), distattn.merge(x, distattn.merge(y, z)), keys=24)


@hypothesis.given(logits_and_values(), st.integers(0, 8), st.randoms(use_true_random=False))
def test_parts_merge_into_the_whole_in_any_order(row, cut, random):
    logits, values = row
    order = list(range(len(logits)))
    random.shuffle(order)
    first, second = order[:cut], order[cut:]
    merged = distattn.merge(
        state_of(logits[first], values[first]), state_of(logits[second], values[second])
    )
    out, lse = distattn.finalize(merged)
    want_out, want_lse = exact(logits, values)
    assert_close(out[0], want_out, jnp.float32, 8)
    # The unit is a maximum or a logarithm: near 0 the log-sum-exp is a sum of both that cancels.
    assert_close(lse[0], want_lse, jnp.float32, 8, unit=1.0)


@hypothesis.given(logits_and_values())
def test_from_lse_is_the_inverse_of_finalize(row):
    x = state_of(*row)
    out, lse = distattn.finalize(x)
    same(distattn.from_lse(out, lse), x)
    same(distattn.merge(distattn.from_lse(out, lse), x), distattn.merge(x, x))


@hypothesis.given(logits_and_values())
def test_the_maximum_is_a_gauge(row):
    x = state_of(*row)
    shifted = states.rescale(x, x.max + 3.0)
    same(shifted, x)
    same(distattn.merge(shifted, x), distattn.merge(x, x))


@hypothesis.given(logits_and_values())
def test_a_sink_is_one_more_key_of_value_zero(row):
    logits, values = row
    sink = jnp.asarray([0.5], jnp.float32)
    out, lse = distattn.finalize(state_of(logits, values), sink)
    more = state_of(np.append(logits, 0.5), np.append(values, np.zeros((1, WIDTH)), axis=0))
    for x, y in zip((out, lse), distattn.finalize(more), strict=True):
        assert_close(x, y, jnp.float32, 8, 2.0)


@hypothesis.given(logits_and_values())
def test_pack_and_unpack(row):
    x = state_of(*row)
    assert states.pack(x).shape == (1, WIDTH + 2)
    jax.tree.map(np.testing.assert_array_equal, states.unpack(states.pack(x)), x)


def test_merge_stacked_is_merge():
    rng = np.random.default_rng(0)
    parts = [state_of(rng.normal(size=4) * 10, rng.normal(size=(4, WIDTH))) for _ in range(5)]
    parts.append(distattn.identity(parts[0]))
    one_by_one = parts[0]
    for part in parts[1:]:
        one_by_one = distattn.merge(one_by_one, part)
    same(states.merge_stacked(jax.tree.map(lambda *x: jnp.stack(x), *parts)), one_by_one, keys=24)


def test_the_gradient_of_the_maximum_is_zero():
    x = state_of([1.0, 2.0], np.ones((2, WIDTH)))
    y = state_of([5.0, -1.0], np.ones((2, WIDTH)))
    d_x, d_y = jax.grad(lambda x, y: distattn.merge(x, y).sum.sum(), argnums=(0, 1))(x, y)
    np.testing.assert_array_equal(d_x.max, 0)
    np.testing.assert_array_equal(d_y.max, 0)


def test_gradients_of_empty_states_are_finite():
    empty = distattn.identity(state_of([1.0], np.ones((1, WIDTH))))
    full = state_of([1.0], np.ones((1, WIDTH)))
    for pair in ((empty, empty), (empty, full), (full, empty)):

        def loss(x, y):
            out, lse = distattn.finalize(distattn.merge(x, y))
            return out.sum() + jnp.where(lse == -jnp.inf, 0.0, lse).sum()

        grads = jax.grad(loss, argnums=(0, 1))(*pair)
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    out, lse = jnp.zeros((1, WIDTH)), jnp.full((1,), -jnp.inf)
    grads = jax.grad(lambda o, s: distattn.from_lse(o, s).weighted_sum.sum(), argnums=(0, 1))(
        out, lse
    )
    assert all(np.isfinite(g).all() for g in grads)


def test_the_gradient_of_from_lse_is_that_of_the_log_sum_exp():
    out, lse = jnp.ones((1, WIDTH)), jnp.array([0.3])
    other = state_of([1.0, 2.0], np.zeros((2, WIDTH)))

    def total(lse):
        return distattn.finalize(distattn.merge(distattn.from_lse(out, lse), other))[1].sum()

    weight = jnp.exp(lse - distattn.finalize(distattn.merge(distattn.from_lse(out, lse), other))[1])
    assert_close(jax.grad(total)(lse), weight, jnp.float32, 3)
