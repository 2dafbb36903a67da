"""distattn's MultiheadAttention on eight devices, against Equinox's on one."""

import dataclasses
import functools
import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import distattn.integrations.equinox as adapter
from distattn import layouts
from distattn.integrations.equinox import MultiheadAttention
from tests.cases import KINDS
from tests.tolerance import assert_close

BATCH, LENGTH, FEATURES, HEADS = 2, 16, 32, 8
TERMS, BOTH_SIDES = LENGTH * LENGTH + 2 * FEATURES, 2.0  # as in test_flax.py
RNG = np.random.default_rng(0)
X = RNG.normal(size=(BATCH, LENGTH, FEATURES)).astype(np.float32)
D_OUT = RNG.normal(size=X.shape).astype(np.float32)
CAUSAL = np.tril(np.ones((LENGTH, LENGTH), bool))
OF_EACH_HEAD = (RNG.random((HEADS, LENGTH, LENGTH)) < 0.5) | np.eye(LENGTH, dtype=bool)
OPTIONS = {
    "plain": {},
    "biases": {f"use_{x}_bias": True for x in ("query", "key", "value", "output")},
    "widths": {"qk_size": 8, "vo_size": 12, "use_value_bias": True},
}


def close(got, want, what):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        # The gradient of the key's bias is zero but for rounding, hence the unit.
        assert_close(x, y, jnp.float32, TERMS, BOTH_SIDES, what=what, unit=1.0)


@pytest.fixture(params=KINDS)
def mesh(request):
    mesh = jax.make_mesh((8,), ("kv",), (KINDS[request.param],))
    with jax.set_mesh(mesh):
        yield mesh


def placed(mesh, x=X):
    return jax.device_put(x, NamedSharding(mesh, P(None, "kv")))


def along_keys(mesh):
    """Return the sharding of [S, N, H], without a batch, along S."""
    return NamedSharding(mesh, P("kv"))


def of_equinox(**options):
    return eqx.nn.MultiheadAttention(HEADS, FEATURES, key=jax.random.key(0), **options)


def run(module, x, **call):
    """Output, and the gradients of parameters and input, over a batch."""

    def loss(arguments):
        module, x = arguments
        out = jax.vmap(lambda x: module(x, x, x, **call))(x)
        return (out * D_OUT).sum(), out

    grads, out = eqx.filter_jit(eqx.filter_grad(loss, has_aux=True))((module, x))
    return out, grads


def rotated(query, key, value):
    """Rotate by the global index; Equinox's rotary embedding keeps arrays of another mesh."""
    half = query.shape[-1] // 2
    angles = np.arange(LENGTH)[:, None, None] / 10.0 ** np.arange(half)
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)

    def rotate(x):
        low, high = x[..., :half], x[..., half:]
        return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)

    return rotate(query), rotate(key), value


CALLS = {
    "nothing": {},
    "mask": {"mask": CAUSAL},
    "mask_of_each_head_rotary": {"mask": OF_EACH_HEAD, "process_heads": rotated},
}


@functools.cache
def expected(options, call):
    return run(of_equinox(**OPTIONS[options]), X, **CALLS[call])


@pytest.mark.parametrize(
    ("options", "call"),
    [("biases", "nothing"), ("plain", "mask"), ("widths", "mask_of_each_head_rotary")],
)
def test_module_agrees_with_equinox(mesh, options, call):
    module = MultiheadAttention.from_equinox(
        of_equinox(**OPTIONS[options]), key_value_sharding=along_keys(mesh)
    )
    close(run(module, placed(mesh), **CALLS[call]), expected(options, call), f"{options} {call}")


@pytest.mark.parametrize("strategy", ["gather_kv", "ring"])
def test_strategy_and_query_sharding_are_passed_on(mesh, strategy):
    module = MultiheadAttention(
        HEADS,
        FEATURES,
        key=jax.random.key(0),
        query_sharding=along_keys(mesh),
        key_value_sharding=along_keys(mesh),
        strategy=strategy,
    )
    close(run(module, placed(mesh), is_causal=True), expected("plain", "mask"), strategy)


def test_every_setting_arrives(arriving, elsewhere):
    """Not seen in a result, which does not depend on them."""
    seen, settings = arriving(adapter), elsewhere
    x = jnp.asarray(X[0])
    MultiheadAttention.from_equinox(of_equinox(), **settings)(x, x, x)
    assert {name: seen.pop(name) for name in settings} == settings
    MultiheadAttention(HEADS, FEATURES, key=jax.random.key(0), **settings)(x, x, x)
    assert {name: seen[name] for name in settings} == settings


def test_batch_on_another_axis():
    mesh = jax.make_mesh((2, 4), ("data", "kv"), (KINDS["auto"],) * 2)
    module = MultiheadAttention.from_equinox(of_equinox(), key_value_sharding=along_keys(mesh))
    x = jax.device_put(X, NamedSharding(mesh, P("data", "kv")))
    close(run(module, x, is_causal=True), expected("plain", "mask"), "data and kv")


def test_positions_segments_and_a_window(mesh):
    order = np.asarray(layouts.striped(LENGTH, 8))
    segments = (np.arange(LENGTH) // 6).astype(np.int32)
    module = MultiheadAttention.from_equinox(of_equinox(), key_value_sharding=along_keys(mesh))
    call = {"query_positions": order, "key_positions": order, "is_causal": True}
    call |= {"query_segment_ids": segments[order], "key_value_segment_ids": segments[order]}
    call |= {"local_window_size": (4, 0)}
    x = placed(mesh, X[:, order])
    got = jax.jit(jax.vmap(lambda x: module(x, x, x, **call)))(x)
    near = CAUSAL & np.triu(np.ones_like(CAUSAL), -4) & (segments[:, None] == segments)
    want = jax.vmap(lambda x: of_equinox()(x, x, x, near))(X)
    close(got, want[:, order], "positions")


def test_cross_attention_with_features_of_its_own(mesh):
    sizes = {"key_size": 24, "value_size": 20, "output_size": 28}
    theirs = of_equinox(**sizes)
    module = MultiheadAttention.from_equinox(theirs, key_value_sharding=along_keys(mesh))
    rng = np.random.default_rng(1)
    query, key, value = (
        jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in ((5, 32), (16, 24), (16, 20))
    )
    sharding = NamedSharding(mesh, P("kv"))
    got = eqx.filter_jit(module)(query, *jax.device_put((key, value), sharding))
    close(got, theirs(query, key, value), "cross attention")


def test_same_parameters_by_the_same_key():
    ours = MultiheadAttention(HEADS, FEATURES, key=jax.random.key(0), **OPTIONS["widths"])
    theirs = of_equinox(**OPTIONS["widths"])
    for x, y in zip(*(jax.tree.leaves_with_path(m) for m in (ours, theirs)), strict=True):
        assert x[0] == y[0]
        np.testing.assert_array_equal(x[1], y[1])
    assert isinstance(ours, eqx.nn.MultiheadAttention)
    positional = MultiheadAttention(HEADS, FEATURES, 24, key=jax.random.key(0))
    assert positional.key_proj.in_features == 24


def test_from_equinox_keeps_what_was_trained_or_replaced():
    theirs = eqx.nn.inference_mode(of_equinox(dropout_p=0.25))
    theirs = eqx.tree_at(lambda m: m.value_proj, theirs, eqx.nn.Identity())
    ours = MultiheadAttention.from_equinox(theirs)
    assert ours.query_proj.weight is theirs.query_proj.weight
    assert isinstance(ours.value_proj, eqx.nn.Identity)
    assert (ours.dropout.p, ours.dropout.inference) == (0.25, True)
    close(run(ours, X), run(theirs, X), "replaced projection")
    inside = {"attention": theirs, "other": jnp.ones(3)}
    model = eqx.tree_at(lambda m: m["attention"], inside, ours)
    assert isinstance(model["attention"], MultiheadAttention)


def test_dropout_is_refused_but_for_inference():
    module = MultiheadAttention.from_equinox(of_equinox(dropout_p=0.25))
    x, key = jnp.asarray(X[0]), jax.random.key(1)
    with pytest.raises(NotImplementedError, match=r"dropout_p is 0\.25.*dropout_p=0"):
        module(x, x, x, key=key)
    with pytest.raises(NotImplementedError, match="inference is False.*inference=True"):
        eqx.nn.inference_mode(module)(x, x, x, key=key, inference=False)
    want = of_equinox()(x, x, x)
    close(module(x, x, x, inference=True), want, "inference")
    close(eqx.nn.inference_mode(module)(x, x, x, key=key), want, "inference mode")
    with pytest.warns(UserWarning, match="pass inference"):
        close(module(x, x, x, deterministic=True), want, "deterministic")
    with (
        pytest.warns(UserWarning, match="pass inference"),
        pytest.raises(NotImplementedError, match="inference is False"),
    ):
        module(x, x, x, deterministic=False)


def test_half_precision_comes_out_as_in_equinox():
    theirs = of_equinox(dtype=jnp.bfloat16)
    x = jnp.asarray(X[0], jnp.bfloat16)
    got = MultiheadAttention.from_equinox(theirs)(x, x, x, mask=CAUSAL)
    want = theirs(x, x, x, mask=CAUSAL)
    assert got.dtype == want.dtype == jnp.bfloat16
    # Projections, logits and weights (of Equinox) and output: each rounds to bfloat16.
    assert_close(got, want, jnp.bfloat16, TERMS, 4.0, what="bfloat16")
    mixed = of_equinox()
    with jax.numpy_dtype_promotion("standard"):
        ours = MultiheadAttention.from_equinox(mixed)(x, x, x)
        assert ours.dtype == mixed(x, x, x).dtype == jnp.float32


def test_shapes_that_do_not_fit():
    module = MultiheadAttention(HEADS, FEATURES, key=jax.random.key(0))
    x = jnp.asarray(X[0])
    with pytest.raises(ValueError, match=r"mask has shape \(1, 16\).*bool\[T, S\] = \[16, 16\]"):
        module(x, x, x, mask=CAUSAL[:1])
    with pytest.raises(ValueError, match="process_heads made.*must not change"):
        module(x, x, x, process_heads=lambda query, key, value: (query[:4], key, value))
    with pytest.raises(ValueError, match="key has S=16 and value has S=15"):
        module(x, x, x[1:])


def test_every_argument_of_equinox_is_named():
    ours, theirs = (
        inspect.signature(module.__call__).parameters
        for module in (MultiheadAttention, eqx.nn.MultiheadAttention)
    )
    assert list(ours)[: len(theirs)] == list(theirs), "a release has a new argument"
    for argument in theirs:
        assert ours[argument].default == theirs[argument].default
        assert ours[argument].kind == theirs[argument].kind
    assert all(ours[n].kind == inspect.Parameter.KEYWORD_ONLY for n in set(ours) - set(theirs))


def test_every_field_of_equinox_is_carried_over():
    theirs = of_equinox(**OPTIONS["widths"])
    ours = MultiheadAttention.from_equinox(theirs, strategy="psum")
    fields = {field.name for field in dataclasses.fields(theirs)}
    assert all(getattr(ours, name) is getattr(theirs, name) for name in fields)
    added = {field.name for field in dataclasses.fields(ours)} - fields
    assert added == {"query_sharding", "key_value_sharding", "strategy"}
    assert ours.strategy == "psum"
