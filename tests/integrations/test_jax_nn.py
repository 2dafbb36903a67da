"""The stand-in for `jax.nn.dot_product_attention` on eight devices, beside the function itself."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import distattn.integrations.jax_nn as adapter
from distattn.integrations.jax_nn import stand_in
from tests.cases import KINDS, Case, as_float32
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
    """What code does that is given its attention as a function: output, residual and gradients."""

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
    attention = stand_in(mesh=mesh, axis_name="kv", query_axis_name="kv", strategy="gather_kv")
    got = model(attention, CALLS[name])((query, *rest))
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(of_jax_nn(name)), strict=True):
        # Both sides are float32.
        assert_close(x, y, jnp.float32, CASE.keys * CASE.queries, 2.0, what=name)


def test_residual_is_that_of_jax_nn(mesh):
    arrays = jax.device_put(ARRAYS, NamedSharding(mesh, P(None, "kv")))
    call = {"is_causal": True, "return_residual": True}
    got = jax.jit(lambda *x: stand_in(mesh=mesh, axis_name="kv")(*x, **call))(*arrays)
    want = jax.nn.dot_product_attention(*ARRAYS, **call)
    for x, y in zip(got, want, strict=True):
        assert_close(x, y, jnp.float32, CASE.keys + CASE.width, 2.0, what="residual")


def test_signature_is_that_of_jax_nn():
    ours = inspect.signature(stand_in()).parameters
    theirs = inspect.signature(jax.nn.dot_product_attention).parameters
    assert list(ours) == list(theirs), "this JAX has another signature: honour it or refuse it"
    for name in theirs:
        assert (ours[name].kind, ours[name].default) == (theirs[name].kind, theirs[name].default)


def test_every_setting_arrives(arriving, elsewhere):
    """Where the result is the same whatever is said."""
    seen = arriving(adapter)
    settings = elsewhere | {
        "batch_axis_name": "data",
        "heads_axis_name": "heads",
    }
    assert set(settings) == set(inspect.signature(stand_in).parameters)
    stand_in(**settings)(*ARRAYS)
    assert all(seen[name] is x for name, x in settings.items())


def test_implementations():
    query, key, value = (x[:, :4] for x in ARRAYS)
    plain = stand_in()(query, key, value)
    for name in ("xla", None):
        same = stand_in()(query, key, value, implementation=name)
        np.testing.assert_array_equal(same, plain)
    with pytest.raises(NotImplementedError, match="implementation='cudnn'.*platform is 'cpu'"):
        stand_in()(query, key, value, implementation="cudnn")
    with pytest.raises(ValueError, match="implementation is 'flash'"):
        stand_in()(query, key, value, implementation="flash")


def test_without_a_batch():
    query, key, value = (x[0] for x in ARRAYS)
    got = stand_in()(query, key, value, is_causal=True)
    want = jax.nn.dot_product_attention(query, key, value, is_causal=True)
    assert_close(got, want, jnp.float32, CASE.keys + CASE.width, 2.0, what="without a batch")
