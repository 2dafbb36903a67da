"""Where arrays are stored: shardings that are given, read, or can't be read."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import distattn
from distattn.testing import collectives
from tests.cases import KINDS, mesh_of
from tests.tolerance import assert_close

attention = distattn.dot_product_attention
KEYS = 16
ONE_TREE = {"collective-permute": 2}  # a butterfly over 4 devices


@functools.cache
def arrays():
    x = np.random.default_rng(0).normal(size=(3, 2, KEYS, 4, 8)).astype(np.float32)
    return jnp.asarray(x[0, :, :3]), jnp.asarray(x[1]), jnp.asarray(x[2])


def on(mesh, spec=None):
    query, *keys = arrays()
    spec = P(None, "kv") if spec is None else spec
    return query, *jax.device_put(keys, NamedSharding(mesh, spec))


def agrees(out):
    assert_close(out, jax.nn.dot_product_attention(*arrays()), jnp.float32, KEYS)


def compiled(run, *x):
    """The collectives of a call that is right."""
    agrees(jax.jit(run)(*x))
    return collectives(jax.jit(run).lower(*x).compile().as_text())


@pytest.mark.parametrize("kind", KINDS)
def test_a_sharding_is_a_constraint(kind):
    """Arrays on one device, on the mesh in another way, and as they are given, in jit and outside."""
    mesh = mesh_of(4, kind)
    sharding = NamedSharding(mesh, P(None, "kv"))
    run = functools.partial(attention, key_value_sharding=sharding, strategy="butterfly")
    one_device = tuple(jax.device_put(x, jax.devices()[5]) for x in arrays())
    with jax.set_mesh(mesh):
        for x in (on(mesh), on(mesh, P()), arrays()):
            assert compiled(run, *x)["collective-permute"] == 2
            agrees(run(*x))
    agrees(run(*one_device))
    agrees(run(*map(np.asarray, arrays())))


@pytest.mark.parametrize("kind", KINDS)
def test_a_sharding_that_is_given_wins_over_one_that_is_read(kind):
    """Query is stored along the batch, over an axis that the keys are to be sharded over."""
    mesh = jax.make_mesh((2, 2), ("data", "kv"), (KINDS[kind],) * 2, devices=jax.devices()[:4])
    x = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in arrays()]
    keys = NamedSharding(mesh, P(None, ("kv", "data")))
    with jax.set_mesh(mesh):
        agrees(attention(*x, key_value_sharding=keys))
        agrees(jax.jit(functools.partial(attention, key_value_sharding=keys))(*x))
        agrees(attention(*x, query_sharding=NamedSharding(mesh, P(None, None, "data"))))


@pytest.mark.parametrize("kind", KINDS)
def test_a_sharding_inside_a_shard_map_over_another_axis(kind):
    mesh = jax.make_mesh((2, 4), ("data", "kv"), (KINDS[kind],) * 2)
    run = functools.partial(attention, key_value_sharding=NamedSharding(mesh, P(None, "kv")))
    data = {"in_specs": (P("data"),) * 3, "out_specs": P("data"), "axis_names": {"data"}}
    x = [jax.device_put(x, NamedSharding(mesh, P("data"))) for x in arrays()]
    with jax.set_mesh(mesh):
        agrees(jax.jit(jax.shard_map(run, mesh=mesh, **data))(*x))


def test_arrays_on_other_devices_are_moved():
    """On the same devices in another order, on one device, on fewer: query, keys, bias and positions."""
    mesh = mesh_of(4, "auto")
    other = jax.sharding.Mesh(jax.devices()[3::-1], ("kv",))
    given = {"key_value_sharding": NamedSharding(mesh, P(None, "kv"))}
    agrees(attention(*on(other), **given))
    query, key, value = on(mesh)
    agrees(attention(jax.device_put(query, NamedSharding(other, P())), key, value, **given))
    bias = jax.device_put(jnp.zeros((1, 4, 1, KEYS)), jax.devices()[0])
    positions = jax.device_put(jnp.arange(KEYS), jax.devices()[6])
    agrees(attention(query, key, value, bias, key_positions=positions, **given))


def test_a_batch_that_is_sharded_needs_no_exchange():
    mesh = mesh_of(2, "auto")
    run = functools.partial(attention, key_value_sharding=NamedSharding(mesh, P("kv")))
    assert compiled(run, *on(mesh, P("kv"))) == {}


@pytest.mark.parametrize("kind", KINDS)
def test_a_spec_takes_the_mesh_of_the_context_or_of_the_arrays(kind):
    mesh = mesh_of(4, kind)
    run = functools.partial(attention, key_value_sharding=P(None, "kv"), strategy="butterfly")
    with jax.set_mesh(mesh):
        assert compiled(run, *arrays()) == ONE_TREE
    agrees(run(*on(mesh)))


def test_unbatched_arrays_have_shardings_of_three_dimensions():
    mesh = mesh_of(4, "auto")
    x = [x[0] for x in arrays()]
    given = {"key_value_sharding": NamedSharding(mesh, P("kv")), "strategy": "ring"}
    out = jax.jit(functools.partial(attention, **given))(*x)
    assert_close(out, jax.nn.dot_product_attention(*arrays())[0], jnp.float32, KEYS)


HEADS = [(("a",), ("a", "b")), ((), ("a",)), (("a",), ("a",)), (("a",), ()), (("a", "b"), ("a",))]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("keys", "queries"), HEADS)
def test_heads_of_the_query_over_more_axes(keys, queries, kind):
    """Tensor parallelism wider than the key/value heads; what one leaves open is the other's."""
    mesh = jax.make_mesh((2, 2, 2), ("a", "b", "kv"), (KINDS[kind],) * 3)
    query, key, value = arrays()
    key, value = key[:, :, :2], value[:, :, :2]
    where = {
        "query_sharding": NamedSharding(mesh, P(None, None, queries or None)),
        "key_value_sharding": NamedSharding(mesh, P(None, "kv", keys or None)),
    }

    def loss(f, *x):
        return (f(*x) ** 2).sum()

    run = functools.partial(attention, **where)
    if len(keys) > len(queries) > 0:
        with pytest.raises(ValueError, match=r"heads of query .*'a',\).*'a', 'b'\).*come first"):
            run(query, key, value)
        return
    with jax.set_mesh(mesh):
        got = jax.jit(jax.grad(functools.partial(loss, run), (0, 1, 2)))(query, key, value)
        out = jax.jit(run)(query, key, value)
    exact = jax.nn.dot_product_attention
    assert_close(out, exact(query, key, value), jnp.float32, KEYS)
    want = jax.grad(functools.partial(loss, exact), (0, 1, 2))(query, key, value)
    for x, y in zip(got, want, strict=True):
        assert_close(x, y, jnp.float32, KEYS, 2.0)


def test_transforms_keep_a_sharding():
    mesh = mesh_of(4, "auto")
    sharding = NamedSharding(mesh, P(None, "kv"))
    run = functools.partial(attention, key_value_sharding=sharding)
    many = [jnp.stack([x, x + 1]) for x in arrays()]
    agrees(jax.jit(jax.vmap(run))(*many)[0])
    agrees(jax.checkpoint(run)(*arrays()))
    agrees(jax.lax.scan(lambda carry, x: (carry, run(*x)), 0, tuple(many))[1][0])


@pytest.mark.parametrize("transformation", [jax.jit, jax.checkpoint])
def test_what_the_compiler_is_left_to_decide_is_said(transformation):
    mesh = mesh_of(4, "auto")
    x = on(mesh)
    with pytest.warns(
        UserWarning, match=r"under Auto axes, here \('kv',\).*pass key_value"
    ) as caught:
        agrees(transformation(attention)(*x))
    assert caught[0].filename != distattn.dot_product_attention.__code__.co_filename
    # Nothing is left where it is said, or where types say it.
    agrees(transformation(functools.partial(attention, key_value_sharding=P()))(*x))
    assert (
        compiled(
            functools.partial(attention, key_value_sharding=P(None, "kv"), strategy="butterfly"), *x
        )
        == ONE_TREE
    )
    agrees(transformation(attention)(*on(mesh_of(4, "explicit"))))
    agrees(transformation(attention)(*arrays()))


def test_keys_that_a_sharding_says_are_replicated_are_gathered():
    mesh = mesh_of(4, "auto")
    agrees(attention(*on(mesh), key_value_sharding=P()))
    agrees(jax.jit(functools.partial(attention, key_value_sharding=P()))(*on(mesh)))


@pytest.mark.parametrize("argnums", [0, 1, (0, 1, 2)])
def test_a_gradient_outside_jit_reads_the_arrays(argnums):
    """The gradient of some arrays reads the others too, and all are sharded alike."""
    mesh = mesh_of(4, "auto")

    def loss(f, *x):
        return (f(*x) ** 2).sum()

    got = jax.grad(functools.partial(loss, attention), argnums)(*on(mesh))
    want = jax.grad(functools.partial(loss, jax.nn.dot_product_attention), argnums)(*arrays())
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert_close(x, y, jnp.float32, KEYS, 2.0)
        if x.shape[1] == KEYS:
            assert x.sharding.spec == P(None, "kv"), "gradients stay with their keys"


@pytest.mark.parametrize("strategy", ["butterfly", "fused", "ring", "gather_kv"])
def test_a_strategy_without_devices(strategy):
    run = functools.partial(attention, strategy=strategy)
    for f in (run, jax.jit(run)):
        with pytest.raises(
            ValueError, match=f"strategy='{strategy}'.*over no axis: pass key_value_sharding"
        ):
            f(*arrays())
    with pytest.raises(
        ValueError, match=f"strategy='{strategy}'.*over no axis: pass key_value_sharding"
    ):
        run(*on(mesh_of(4, "explicit"), P()))


@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_a_shard_map_a_combine_is_that_of_sharded_attention(check_vma):
    """One device's keys are not all keys: a call that means all of them is told where to go."""
    mesh = mesh_of(4, "auto")
    keys = P(None, "kv")

    def run(f):
        return jax.shard_map(
            f, mesh=mesh, in_specs=(P(), keys, keys), out_specs=P(), check_vma=check_vma
        )(*arrays())

    with pytest.raises(ValueError, match=r"inside a shard_map over \('kv',\).*sharded_attention"):
        run(functools.partial(attention, strategy="ring"))
    with pytest.raises(ValueError, match="'kv' is manual here.*sharded_attention"):
        run(functools.partial(attention, key_value_sharding=P(None, "kv")))
    agrees(run(functools.partial(distattn.sharded_attention, axis_name="kv")))


def test_keys_of_one_device_are_told_by_their_types():
    """Where they are tracked; a map over the batch is nothing to tell of."""
    mesh, keys = mesh_of(2, "auto"), P(None, "kv")

    def run(query, keys):
        specs = {"in_specs": (query, keys, keys), "out_specs": P("kv")}
        return jax.shard_map(attention, mesh=mesh, **specs)(*arrays())

    with pytest.warns(UserWarning, match=r"differ along \('kv',\).*sharded_attention"):
        run(P(), keys)
    agrees(run(P("kv"), P("kv")))


@pytest.mark.parametrize("kinds", [("auto", "explicit"), ("explicit", "auto")])
def test_arrays_of_another_mesh_than_that_of_the_context(kinds):
    of_context, of_arrays = (mesh_of(4, kind) for kind in kinds)
    x = on(of_arrays)
    with (
        jax.set_mesh(of_context),
        pytest.raises(ValueError, match=r"on the mesh kv=4 .*jax.set_mesh has kv=4 .*device_put"),
    ):
        attention(*x)
