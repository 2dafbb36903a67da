"""One device: every argument, alone and together, against the oracle; forward and every gradient."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import distattn
from tests.cases import CASES, Case, as_float32, check
from tests.tolerance import assert_close

# In bfloat16 the weights of a row are as exact as in float32, but each of the gradient's products
# starts from an output that was rounded once: its rounding enters through delta = sum(dout * out).
BFLOAT16_FACTOR = 2.0


def attention(**arguments):
    return distattn.dot_product_attention(**arguments, return_residual=True)


def dense(**arguments):
    return attention(**arguments, implementation="dense")


def in_small_blocks(*, sinks=None, block_sizes=(4, 5), **arguments):
    """Blocks that divide neither T nor S, but for few cases."""
    state = distattn.partial_attention(**arguments, block_sizes=block_sizes)
    out, lse = distattn.finalize(state, sinks)
    return out.astype(arguments["query"].dtype), lse


@pytest.mark.parametrize("name", CASES)
def test_blocked(name):
    check(CASES[name], attention, what=f"xla {name}")


@pytest.mark.parametrize("name", CASES)
def test_dense(name):
    check(CASES[name], dense, what=f"dense {name}")


# `finalize` knows no query lengths: a row beyond one would keep the log-sum-exp of its sink.
@pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if not (case.sinks and case.query_lengths)]
)
def test_many_blocks(name):
    check(CASES[name], in_small_blocks, what=f"small blocks {name}")


# Lengths that blocks do not divide: the last block of queries, or of keys, overlaps the one before.
UNEVEN = {
    "window": Case(options=(("local_window_size", (4, 0)),)),
    "window permuted": Case(permuted=True, empty_slots=9, options=(("local_window_size", (7, 1)),)),
    "causal permuted": Case(permuted=True, empty_slots=20, options=(("is_causal", True),)),
    "documents": Case(documents=6),
    "documents in any order": Case(layout="random", documents=6, options=(("is_causal", True),)),
    "lengths": Case(lengths=True, query_lengths=True),
}


@pytest.mark.parametrize("name", UNEVEN)
def test_blocks_that_overlap(name):
    rows = 23 if UNEVEN[name].query_lengths else 47  # primes: no block divides them
    case = dataclasses.replace(UNEVEN[name], queries=rows, keys=47)
    for sizes in ((7, 3), (3, 7)):
        in_blocks = functools.partial(in_small_blocks, block_sizes=sizes)
        check(case, in_blocks, what=f"overlapping blocks, {name} {sizes}")


@pytest.mark.parametrize("length", [521, 1031])
def test_blocks_of_the_usual_size_that_overlap(length):
    case = Case(1, length, length, 2, 2, options=(("local_window_size", (8, 0)),))
    check(case, attention, what=f"overlapping blocks, {length}")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("name", ["plain", "one_query", "everything"])
def test_half_precision(name, dtype):
    check(CASES[name], attention, dtype=dtype, what=f"{name}", factor=BFLOAT16_FACTOR)


def test_unbatched():
    case = CASES["bias_rows"]
    arguments = as_float32(case.arguments())
    out, lse = attention(**{name: x[0] for name, x in arguments.items()})
    whole, whole_lse = attention(**{name: x[:1] for name, x in arguments.items()})
    assert out.shape == (case.queries, case.heads, case.value_width)
    assert lse.shape == (case.queries, case.heads)
    np.testing.assert_array_equal(out, whole[0])
    np.testing.assert_array_equal(lse, whole_lse[0])


@pytest.mark.parametrize("shape", [{"queries": 0}, {"keys": 0}, {"batch": 0}])
def test_nothing_at_all(shape):
    sizes = {"batch": 2, "queries": 3, "keys": 5} | shape
    query = jnp.ones((sizes["batch"], sizes["queries"], 4, 8))
    key = jnp.ones((sizes["batch"], sizes["keys"], 2, 8))
    out, lse = attention(query=query, key=key, value=key, is_causal=True)
    assert out.shape == query.shape
    assert lse.shape == query.shape[:3]
    np.testing.assert_array_equal(out, 0)
    np.testing.assert_array_equal(lse, -np.inf)


@pytest.mark.parametrize("implementation", ["xla", "dense"])
def test_precision_reaches_every_product(implementation):
    query, key = jnp.ones((1, 2, 4, 8)), jnp.ones((1, 6, 2, 8))

    def loss(query, key):
        out = distattn.dot_product_attention(
            query, key, key, precision="highest", implementation=implementation
        )
        return out.sum()

    text = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(query, key).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert products
    assert all("HIGHEST" in line for line in products)


def test_the_order_of_keys_does_not_matter():
    case = CASES["causal_permuted"]
    arguments = case.arguments()
    order = np.random.default_rng(5).permutation(case.keys)
    shuffled = arguments | {
        name: arguments[name][:, order] for name in ("key", "value", "key_positions")
    }
    for x, y in zip(
        attention(**as_float32(arguments)), attention(**as_float32(shuffled)), strict=True
    ):
        assert_close(x, y, jnp.float32, case.keys, what="order of keys")
