"""distattn inside Flax's layers, linen and nnx, on eight devices, against the attention of Flax.

Flax's attention runs on one device: with the sequence sharded over Explicit axes it raises
ShardingTypeError, and over Auto axes it is another program.
"""

import functools
import inspect

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import distattn.integrations.flax as adapter
from distattn import layouts
from distattn.integrations.flax import AttentionMask, attention_fn
from distattn.testing import collectives
from tests.cases import KINDS, shardings
from tests.tolerance import assert_close

BATCH, LENGTH, FEATURES, HEADS = 2, 16, 32, 8
# The layer's gradients are sums over keys, rows and, in the projections, features; both sides are float32.
TERMS, BOTH_SIDES = LENGTH * LENGTH + 2 * FEATURES, 2.0
X = np.random.default_rng(0).normal(size=(BATCH, LENGTH, FEATURES)).astype(np.float32)
D_OUT = np.random.default_rng(1).normal(size=X.shape).astype(np.float32)


def close(got, want, what, dtype=jnp.float32, unit=0.0):
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_close(x, y, dtype, TERMS, BOTH_SIDES, what=what, unit=unit)


@pytest.fixture(params=KINDS)
def mesh(request):
    mesh = jax.make_mesh((2, 4), ("data", "kv"), (KINDS[request.param],) * 2)
    with jax.set_mesh(mesh):
        yield mesh


def placed(mesh, x=X):
    return jax.device_put(x, NamedSharding(mesh, P("data", "kv")))


class Linen:
    def __init__(self, **options):
        self.layer = nn.MultiHeadDotProductAttention(HEADS, **options)
        one_device = nn.MultiHeadDotProductAttention(HEADS)
        # Biases start at zero, and a gradient there is easily right.
        shapes = jax.eval_shape(one_device.init, jax.random.key(0), X)
        rng = np.random.default_rng(2)
        self.parameters = jax.tree.map(
            lambda x: jnp.asarray(rng.normal(size=x.shape) / FEATURES**0.5, x.dtype), shapes
        )

    def __call__(self, parameters, x, **call):
        return self.layer.apply(parameters, x, **call)


class Nnx:
    def __init__(self, kv_heads=HEADS, **options):
        layer = nnx.MultiHeadAttention(
            HEADS, FEATURES, num_kv_heads=kv_heads, decode=False, rngs=nnx.Rngs(0), **options
        )
        self.definition, parameters, self.rest = nnx.split(layer, nnx.Param, ...)
        rng = np.random.default_rng(2)
        self.parameters = jax.tree.map(
            lambda x: jnp.asarray(rng.normal(size=x.shape) / FEATURES**0.5, x.dtype), parameters
        )

    def __call__(self, parameters, x, **call):
        return nnx.merge(self.definition, parameters, self.rest)(x, **call)


LAYERS = {"linen": Linen, "nnx": Nnx, "nnx_gqa": functools.partial(Nnx, 2)}


def run(layer, x, mask=None, **call):
    """Output, and the gradients of parameters and input."""

    def loss(parameters, x, mask):
        out = layer(parameters, x, mask=mask, **call)
        return (out * D_OUT).sum(), out

    grads, out = jax.jit(jax.grad(loss, (0, 1), has_aux=True))(layer.parameters, x, mask)
    return out, grads


def masks():
    """Return masks in which every query has a key; without keys Flax returns the mean of all values."""
    valid = np.arange(LENGTH) < np.array([[LENGTH], [11]])
    causal = nn.make_causal_mask(X[..., 0])  # float32
    padding = nn.make_attention_mask(np.ones_like(valid), valid, dtype=jnp.bool_)
    heads = np.random.default_rng(3).random((1, HEADS, LENGTH, LENGTH)) < 0.5
    return {
        "none": None,
        "causal": causal,
        "padding_bool": padding,
        "causal_and_padding_float32": nn.combine_masks(causal, padding.astype(jnp.float32)),
        "of_each_head_int32": (heads | np.eye(LENGTH, dtype=bool)).astype(np.int32),
    }


@functools.cache
def of_flax(kind, name):
    return run(LAYERS[kind](), X, masks()[name])


# Each mask in one layer at least, and each layer with none and with a mask that has it all.
@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("linen", "causal_and_padding_float32"),
        ("linen", "of_each_head_int32"),
        ("linen", "none"),
        ("nnx", "padding_bool"),
        ("nnx", "none"),
        ("nnx_gqa", "causal_and_padding_float32"),
        ("nnx_gqa", "none"),
    ],
)
def test_layer_agrees_with_flax(mesh, kind, name):
    ours = LAYERS[kind](
        attention_fn=attention_fn(**shardings(mesh, keys="kv", query="auto", batch="data"))
    )
    got = run(ours, placed(mesh), masks()[name])
    # The gradient of the key's bias is zero but for rounding, hence the unit.
    close(got, of_flax(kind, name), f"{kind} {name}", unit=1.0)


@pytest.mark.parametrize("strategy", ["gather_kv", "ring", "ulysses"])
def test_strategy_and_query_sharding_are_passed_on(mesh, strategy):
    attention = attention_fn(
        **shardings(mesh, keys="kv", query="kv", batch="data"), strategy=strategy, is_causal=True
    )
    got = run(Nnx(2, attention_fn=attention), placed(mesh))
    close(got, of_flax("nnx_gqa", "causal"), strategy, unit=1.0)


def test_causal_of_the_call_and_of_the_function(mesh):
    where = shardings(mesh, keys="kv", query="auto", batch="data")
    of_function = run(Nnx(attention_fn=attention_fn(**where, is_causal=True)), placed(mesh))
    close(of_function, of_flax("nnx", "causal"), "is_causal of the function", unit=1.0)
    heads = placed(mesh, X.reshape(BATCH, LENGTH, 4, 8))
    of_call = jax.jit(functools.partial(attention_fn(**where), is_causal=True))(heads, heads, heads)
    want = nnx.dot_product_attention(*(X.reshape(BATCH, LENGTH, 4, 8),) * 3, is_causal=True)
    close(of_call, want, "is_causal of the call")


@pytest.mark.parametrize(
    ("kind", "said"),
    [("linen", "function"), ("linen", "call"), ("nnx", "call"), ("nnx_gqa", "function")],
)
def test_zigzag_layout(mesh, kind, said):
    order = layouts.zigzag(LENGTH, 4)
    positions = {"query_positions": order, "key_positions": order}
    options = positions if said == "function" else {}
    call = {"mask": AttentionMask(**positions)} if said == "call" else {}
    attention = attention_fn(
        **shardings(mesh, keys="kv", query="kv", batch="data"),
        is_causal=True,
        local_window_size=(5, 0),
        **options,
    )
    ours = LAYERS[kind](attention_fn=attention)
    x = placed(mesh, X[:, np.asarray(order)])
    got = jax.jit(ours)(ours.parameters, x, **call)
    near = np.tril(np.triu(np.ones((1, 1, LENGTH, LENGTH), bool), -5))
    theirs = LAYERS[kind]()
    want = jax.jit(theirs)(theirs.parameters, X, mask=near)
    close(got, want[:, np.asarray(order)], f"{kind} zigzag")


@pytest.mark.parametrize("kind", LAYERS)
def test_labels_in_the_place_of_a_mask(mesh, kind):
    segments = np.sort(np.random.default_rng(4).integers(0, 3, (BATCH, LENGTH))).astype(np.int32)
    dense = np.random.default_rng(5).random((BATCH, 1, LENGTH, LENGTH)) < 0.5
    dense |= np.eye(LENGTH, dtype=bool)
    mask = AttentionMask(dense, query_segment_ids=segments, key_value_segment_ids=segments)
    ours = LAYERS[kind](
        attention_fn=attention_fn(**shardings(mesh, keys="kv", query="auto", batch="data"))
    )
    same = segments[:, None, :, None] == segments[:, None, None]
    close(
        run(ours, placed(mesh), mask=mask),
        run(LAYERS[kind](), X, mask=same & dense),
        f"{kind} segments",
        unit=1.0,
    )


@pytest.mark.parametrize("batch", [(), (3,), (2, 3), (2, 1, 2)], ids=str)
@pytest.mark.parametrize("framework", [nn, nnx], ids=["linen", "nnx"])
def test_any_number_of_batch_dimensions_and_a_bias(framework, batch):
    rng = np.random.default_rng(6)
    heads = (rng.normal(size=(*batch, 6, 4, 8)) for _ in range(3))
    query, key, value = (jnp.asarray(x, jnp.float32) for x in heads)
    bias = jnp.asarray(rng.normal(size=(*batch, 4, 6, 6)), jnp.float32)
    shared = batch if len(batch) == 2 else (1,) * len(batch)
    mask = (rng.random((*shared, 1, 6, 6)) < 0.5) | np.eye(6, dtype=bool)

    def both(attention):
        def loss(*x):
            out = attention(*x, mask=mask)
            return (out**2).sum(), out

        return jax.jit(jax.grad(loss, (0, 1, 2, 3), has_aux=True))(query, key, value, bias)

    theirs = both(framework.dot_product_attention)
    close(both(attention_fn()), theirs, f"batch {batch}")


@pytest.mark.parametrize(
    ("batch", "spec", "flat"),
    [
        ((2, 4), P("data", None, "kv"), P("data", "kv")),
        ((2, 4), P("data", "kv"), P(("data", "kv"))),
        ((2, 4), P(("data", "kv")), P(("data", "kv"))),
        ((), P("kv"), P(None, "kv")),
    ],
)
def test_shardings_are_those_of_the_arrays_as_passed(arriving, batch, spec, flat):
    mesh = jax.make_mesh((2, 4), ("data", "kv"))
    x = jnp.ones((*batch, 8, 4, 8))
    sharding = NamedSharding(mesh, spec)
    got = attention_fn(query_sharding=sharding, key_value_sharding=sharding)(x, x, x)
    close(got, nn.dot_product_attention(x, x, x), f"{batch} {spec}")
    seen = arriving(adapter)
    attention_fn(query_sharding=sharding, key_value_sharding=spec)(x, x, x)
    assert seen["query_sharding"] == NamedSharding(mesh, flat)
    assert seen["key_value_sharding"] == flat


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)], ids=str)
def test_labels_with_any_number_of_batch_dimensions(batch):
    rng = np.random.default_rng(8)
    x = jnp.asarray(rng.normal(size=(*batch, 6, 4, 8)), jnp.float32)
    segments = rng.integers(0, 2, (*batch, 6)).astype(np.int32)
    order = np.broadcast_to(rng.permutation(6), (*batch, 6)).astype(np.int32)
    labels = AttentionMask(
        query_positions=order[(0,) * len(batch)],  # one for all rows of the batch
        key_positions=order,
        query_segment_ids=segments,
        key_value_segment_ids=segments,
    )
    same = segments[..., :, None] == segments[..., None, :]
    before = order[..., :, None] >= order[..., None, :]
    got = jax.jit(lambda x: attention_fn(is_causal=True)(x, x, x, mask=labels))(x)
    want = nn.dot_product_attention(x, x, x, mask=(same & before)[..., None, :, :])
    close(got, want, f"labels of batch {batch}")


@pytest.mark.parametrize("given", [None, jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("fp32_softmax", [False, True])
def test_dtypes_are_those_of_flax(given, fp32_softmax):
    x = jnp.asarray(np.random.default_rng(7).normal(size=(2, 6, 4, 8)), jnp.float32)
    halves = x.astype(jnp.bfloat16)
    call = {"dtype": given, "force_fp32_for_softmax": fp32_softmax}
    for arrays in ((x, x, x), (halves, halves, halves), (halves, x, halves)):
        with jax.numpy_dtype_promotion("standard"):  # Flax mixes dtypes here
            want = nn.dot_product_attention(*arrays, **call)
            got = attention_fn()(*arrays, **call)
        assert got.dtype == want.dtype
        half = given == jnp.bfloat16 or (given is None and arrays[1] is halves)
        # Flax rounds query, logits and weights to bfloat16 on the way, each once.
        factor = 4.0 if half else BOTH_SIDES
        dtype = jnp.bfloat16 if half else jnp.float32
        assert_close(got, want, dtype, TERMS, factor, what="dtype")
    promoted = attention_fn()(halves, x, x, promote_dtype=lambda x, dtype: [halves] * len(x))
    assert promoted.dtype == jnp.bfloat16


def test_layer_in_bfloat16(mesh):
    attention = attention_fn(**shardings(mesh, keys="kv", query="auto"), is_causal=True)
    for kind in ("linen", "nnx_gqa"):
        ours, theirs = (
            LAYERS[kind](dtype=jnp.bfloat16, **options)
            for options in ({"attention_fn": attention}, {})
        )
        got = jax.jit(ours)(ours.parameters, placed(mesh))
        with jax.numpy_dtype_promotion("standard"):  # jax.nn mixes dtypes here
            want = jax.jit(theirs)(theirs.parameters, X, mask=masks()["causal"])
        assert got.dtype == want.dtype == jnp.bfloat16
        # Projections, softmax (of Flax, in bfloat16) and output: each rounds to bfloat16.
        assert_close(got, want, jnp.bfloat16, TERMS, 4.0, what=kind)


def test_precision_is_passed_on():
    x = jnp.ones((1, 4, 2, 8))
    for precision in (None, jax.lax.Precision.HIGHEST):
        f = functools.partial(attention_fn(), precision=precision)
        assert ("HIGHEST" in str(jax.make_jaxpr(f)(x, x, x))) == (precision is not None)


def decode_inputs(mesh, **options):
    cache = NamedSharding(mesh, P(None, ("data", "kv")))
    # By name, so that a gather would be one of keys, and not of states.
    return attention_fn(key_value_sharding=cache, strategy="psum", **options), cache


def steps(step, cache):
    """Run every token, the cache donated."""
    outs = []
    for t in range(LENGTH):
        cache, out = step(cache, X[:, t : t + 1])
        outs.append(out)
    return cache, np.concatenate(outs, axis=1)


def assert_nothing_gathered(compiled, name):
    """Assert that no collective of the step has the size of the cache, or of a shard."""
    counts = collectives(compiled.as_text())
    assert not {"all-gather", "all-to-all"} & set(counts), (name, counts)


@pytest.mark.parametrize("always_causal", [False, True])
def test_nnx_decodes_on_a_sharded_cache(always_causal):
    mesh = jax.make_mesh((2, 4), ("data", "kv"), (KINDS["auto"],) * 2)
    # Made for training, or not: the steps of decode mode are causal by Flax's mask.
    attention, sharding = decode_inputs(mesh, is_causal=always_causal)
    ours = Nnx(2, attention_fn=attention)
    layer = nnx.merge(ours.definition, ours.parameters, ours.rest)
    layer.init_cache(X.shape)
    definition, parameters, cache = nnx.split(layer, nnx.Param, nnx.Cache)
    cache = jax.tree.map(lambda x: jax.device_put(x, sharding) if x.ndim > 1 else x, cache)

    def step(parameters, cache, x):
        layer = nnx.merge(definition, parameters, cache)
        out = layer(x, decode=True)
        return nnx.state(layer, nnx.Cache), out

    step = jax.jit(step, donate_argnums=1).lower(parameters, cache, X[:, :1]).compile()
    assert_nothing_gathered(step, "nnx")
    cache, got = steps(functools.partial(step, parameters), cache)
    assert cache["cached_key"][...].sharding == sharding
    theirs = Nnx(2)
    want = theirs(theirs.parameters, X, mask=masks()["causal"])
    close(got, want, "nnx steps")


def test_linen_decodes_on_a_sharded_cache():
    mesh = jax.make_mesh((2, 4), ("data", "kv"), (KINDS["auto"],) * 2)
    attention, sharding = decode_inputs(mesh)
    ours = Linen(attention_fn=attention, decode=True)
    cache = ours.layer.init(jax.random.key(0), X)["cache"]
    cache = jax.tree.map(lambda x: jax.device_put(x, sharding) if x.ndim > 1 else x, cache)

    def step(parameters, cache, x):
        out, changed = ours.layer.apply(parameters | {"cache": cache}, x, mutable=["cache"])
        return changed["cache"], out

    step = jax.jit(step, donate_argnums=1).lower(ours.parameters, cache, X[:, :1]).compile()
    assert_nothing_gathered(step, "linen")
    cache, got = steps(functools.partial(step, ours.parameters), cache)
    assert cache["cached_key"].sharding == sharding
    theirs = Linen()
    want = theirs(theirs.parameters, X, mask=masks()["causal"])
    close(got, want, "linen steps")


def test_every_setting_arrives(arriving, elsewhere):
    """Not seen in a result, which does not depend on them for most inputs."""
    seen = arriving(adapter)
    settings = elsewhere | {
        "is_causal": True,
        "local_window_size": (3, 0),
        "logits_soft_cap": 2.0,
        "query_positions": np.arange(4),
        "key_positions": np.arange(4),
        "implementation": "dense",
    }
    assert set(settings) == set(inspect.signature(attention_fn).parameters)
    x = jnp.ones((1, 4, 2, 8))
    attention_fn(**settings)(x, x, x)
    assert all(seen[name] is x for name, x in settings.items())


def spy(attention, seen):
    @functools.wraps(attention)  # linen reads the signature of what is wrapped
    def call(*arrays, **keywords):
        seen.update(keywords)
        return attention(*arrays, **keywords)

    return call


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_every_keyword_arrives(kind):
    framework = {"linen": nn, "nnx": nnx}[kind]
    seen = {}
    for name, attention in (
        ("ours", attention_fn()),
        ("theirs", framework.dot_product_attention),
    ):
        seen[name] = {}
        layer = LAYERS[kind](attention_fn=spy(attention, seen[name]))
        layer(layer.parameters, X, mask=masks()["causal"])
    assert set(seen["ours"]) == set(seen["theirs"]) > {"mask", "dropout_rate", "dtype", "precision"}


@pytest.mark.parametrize("framework", [nn, nnx], ids=["linen", "nnx"])
def test_every_argument_of_flax_is_named(framework):
    ours = inspect.signature(attention_fn()).parameters
    theirs = inspect.signature(framework.dot_product_attention).parameters
    assert set(theirs) <= set(ours), "a release of Flax has a new argument: honour it or refuse it"
    for name in theirs:
        assert name == "promote_dtype" or ours[name].default == theirs[name].default
    positional = [n for n, p in ours.items() if p.kind == p.POSITIONAL_OR_KEYWORD]
    assert positional == list(theirs)[: len(positional)]
    assert not [p for p in ours.values() if p.kind in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]


def test_calls_of_nnx_have_no_argument_that_is_not_known():
    """nnx passes on to its attention_fn every argument of a layer."""
    parameters = list(inspect.signature(nnx.MultiHeadAttention.__call__).parameters)
    arrays = ["self", "inputs_q", "inputs_k", "inputs_v"]
    assert parameters[:4] == arrays
    of_the_layer = {"rngs", "decode", "out_sharding", "qkv_sharding"}  # they stay there
    passed_on = {"mask", "deterministic", "sow_weights", "is_causal", "input_positions"}
    assert set(parameters[4:]) <= of_the_layer | passed_on


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_dropout_is_refused_unless_deterministic(kind):
    options = {"attention_fn": attention_fn(), "dropout_rate": 0.25}
    layer = LAYERS[kind](**options)
    rng = {"dropout_rng": jax.random.key(0)} if kind == "linen" else {"rngs": nnx.Rngs(0)}
    with pytest.raises(NotImplementedError, match=r"dropout_rate is 0\.25.*dropout_rate=0"):
        layer(layer.parameters, X, deterministic=False, **rng)
    theirs = LAYERS[kind]()
    got = layer(layer.parameters, X, deterministic=True)
    close(got, theirs(theirs.parameters, X), "deterministic")


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_weights_are_not_sown(kind):
    layer = LAYERS[kind](attention_fn=attention_fn())
    with pytest.raises(NotImplementedError, match="pass sow_weights=False"):
        layer(layer.parameters, X, sow_weights=True)


def test_positions_of_a_rotary_embedding_are_refused():
    x = jnp.ones((1, 4, 2, 8))
    with pytest.raises(NotImplementedError, match="input_positions.*AttentionMask"):
        attention_fn()(x, x, x, input_positions=jnp.arange(4))


def test_replaced_einsums_are_refused():
    x = jnp.ones((1, 4, 2, 8))
    for name in ("einsum_dot_general", "qk_attn_weights_einsum", "attn_weights_value_einsum"):
        with pytest.raises(NotImplementedError, match=f"{name} is given.*leave it out"):
            attention_fn()(x, x, x, **{name: jnp.einsum})


@pytest.mark.parametrize(
    ("options", "call"),
    [
        ({"is_causal": True}, {}),
        ({}, {"is_causal": True, "mask": jnp.ones((1, 1, 1, 6))}),
        ({"local_window_size": 3}, {"mask": jnp.ones((1, 1, 1, 6))}),
    ],
    ids=["function", "call", "window"],
)
def test_positions_of_fewer_queries_must_be_said(options, call):
    query, key = jnp.ones((1, 1, 2, 8)), jnp.ones((1, 6, 2, 8))
    attention = attention_fn(**options)
    with pytest.raises(ValueError, match=r"T=1 and key has S=6.*query_positions"):
        attention(query, key, key, **call)
    said = AttentionMask(query_positions=jnp.array([3]))
    attention(query, key, key, **call | {"mask": said})


def test_shapes_that_do_not_fit():
    x = jnp.ones((2, 3, 4, 2, 8))
    other = jnp.ones((3, 2, 4, 2, 8))
    with pytest.raises(
        ValueError, match=r"key has batch dimensions \[3, 2\] and query has \[2, 3\]"
    ):
        attention_fn()(x, other, other)
    with pytest.raises(ValueError, match=r"mask has shape \(2, 2, 1, 4, 4\).*\[2, 3\]"):
        attention_fn()(x, x, x, mask=jnp.ones((2, 2, 1, 4, 4)))
    with pytest.raises(ValueError, match=r"bias has shape \(1, 1, 1, 1, 4, 4\).*\[2, 3\]"):
        attention_fn()(x, x, x, bias=jnp.ones((1, 1, 1, 1, 4, 4)))
