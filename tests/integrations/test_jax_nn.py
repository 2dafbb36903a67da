"""The adapter for calls of `jax.nn.dot_product_attention`, against the function, on eight devices."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import distattn.integrations.jax_nn as adapter
from distattn.integrations.jax_nn import attention_fn
from tests.cases import KINDS, Case, as_float32, shardings
from tests.tolerance import assert_close

CASE = Case(batch=2, queries=16, keys=16, heads=4, kv_heads=2)
ARRAYS = tuple(as_float32(CASE.arguments())[name] for name in ("query", "key", "value"))
RNG = np.random.default_rng(1)
# Every row has a key in each of them: for one without, jax.nn takes the mean of all values.
CALLS = {
    "nothing": {},
    "causal": {"is_causal": True, "implementation": "xla"},
    "window_scale": {"is_causal": True, "local_window_size": (5, 0), "scale": 0.5},
    "lengths": {"key_value_seq_lengths": np.array([16, 9], np.int32)},
    "mask": {"mask": (RNG.random((2, 1, 16, 16)) < 0.5) | np.eye(16, dtype=bool)},
    "bias": {"bias": RNG.normal(size=(1, 4, 16, 16)).astype(np.float32), "scale": 1.5},
}


@pytest.fixture(params=KINDS)
def mesh(request):
    mesh = jax.make_mesh((8,), ("kv",), (KINDS[request.param],))
    with jax.set_mesh(mesh):
        yield mesh


def model(attention, call):
    """Return the output, residual and gradients of a model that is given its attention."""

    def loss(arrays):
        out = attention(*arrays, **call)
        return (out**2).sum(), out

    return jax.jit(jax.grad(loss, has_aux=True))


@functools.cache
def of_jax_nn(name):
    return model(jax.nn.dot_product_attention, CALLS[name])(ARRAYS)


@pytest.mark.parametrize("name", CALLS)
def test_agrees_with_jax_nn(mesh, name):
    query, *rest = jax.device_put(ARRAYS, NamedSharding(mesh, P(None, "kv")))
    attention = attention_fn(**shardings(mesh, keys="kv", query="kv"), strategy="gather_kv")
    got = model(attention, CALLS[name])((query, *rest))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(of_jax_nn(name)), strict=True):
        # Both sides are float32.
        assert_close(x, y, jnp.float32, CASE.keys * CASE.queries, 2.0, what=name)


def test_residual_is_that_of_jax_nn(mesh):
    arrays = jax.device_put(ARRAYS, NamedSharding(mesh, P(None, "kv")))
    call = {"is_causal": True, "return_residual": True}
    got = jax.jit(lambda *x: attention_fn(**shardings(mesh, keys="kv"))(*x, **call))(*arrays)
    want = jax.nn.dot_product_attention(*ARRAYS, **call)
    for x, y in zip(got, want, strict=True):
        assert_close(x, y, jnp.float32, CASE.keys + CASE.width, 2.0, what="residual")


def test_every_argument_of_jax_nn_is_taken():
    ours = inspect.signature(attention_fn()).parameters
    theirs = inspect.signature(jax.nn.dot_product_attention).parameters
    assert list(ours)[: len(theirs)] == list(theirs), "JAX has a new argument: honour or refuse it"
    for name in theirs:
        assert (ours[name].kind, ours[name].default) == (theirs[name].kind, theirs[name].default)


def test_every_setting_arrives(arriving, elsewhere):
    """Not seen in a result, which does not depend on them."""
    seen = arriving(adapter)
    assert set(elsewhere) == set(inspect.signature(attention_fn).parameters)
    attention_fn(**elsewhere)(*ARRAYS)
    assert all(seen[name] is x for name, x in elsewhere.items())


def test_implementations():
    query, key, value = (x[:, :4] for x in ARRAYS)
    plain = attention_fn()(query, key, value)
    for name in ("xla", None):
        same = attention_fn()(query, key, value, implementation=name)
        np.testing.assert_array_equal(same, plain)
    with pytest.raises(NotImplementedError, match="implementation='cudnn'.*platform is 'cpu'"):
        attention_fn()(query, key, value, implementation="cudnn")
    with pytest.raises(ValueError, match="implementation is 'flash'"):
        attention_fn()(query, key, value, implementation="flash")


def test_without_a_batch():
    query, key, value = (x[0] for x in ARRAYS)
    got = attention_fn()(query, key, value, is_causal=True)
    want = jax.nn.dot_product_attention(query, key, value, is_causal=True)
    assert_close(got, want, jnp.float32, CASE.keys + CASE.width, 2.0, what="without a batch")
