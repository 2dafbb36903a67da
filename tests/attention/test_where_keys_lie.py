"""A call for which nobody says over which axes keys lie: it reads, takes the only axis, or says so."""

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


def test_the_only_axis_of_the_mesh_is_taken():
    """In jit under Auto axes, and of arrays that lie on no mesh, in jit or outside."""
    mesh = mesh_of(4, "auto")
    run = functools.partial(attention, mesh=mesh, strategy="butterfly")
    assert compiled(run, *on(mesh)) == ONE_TREE
    assert compiled(run, *arrays()) == ONE_TREE
    agrees(run(*arrays()))
    agrees(run(*map(np.asarray, arrays())))


def test_an_axis_that_is_said_to_be_another_s_is_not_taken():
    mesh = mesh_of(2, "auto")
    run = functools.partial(attention, mesh=mesh, batch_axis_name="kv")
    assert compiled(run, *on(mesh, P("kv"))) == {}


@pytest.mark.parametrize("place", [lambda mesh: arrays(), on], ids=["nowhere", "sharded"])
def test_of_several_axes_none_is_guessed(place):
    mesh = jax.make_mesh((2, 2), ("data", "kv"), (KINDS["auto"],) * 2)
    run = jax.jit(functools.partial(attention, mesh=mesh))
    with pytest.raises(
        ValueError, match=r"data=2 \(Auto\), kv=2 .*axis_name is None.*axis_name=\(\)"
    ):
        run(*place(mesh))
    with pytest.raises(ValueError, match=r"over which of \('kv',\) S.*pass axis_name"):
        jax.jit(functools.partial(attention, mesh=mesh, batch_axis_name="data"))(*place(mesh))
    agrees(jax.jit(functools.partial(attention, mesh=mesh, axis_name=()))(*place(mesh)))
    agrees(attention(*on(mesh), mesh=mesh))  # read


@pytest.mark.parametrize("transformation", [jax.jit, jax.checkpoint])
def test_what_the_compiler_is_left_to_decide_is_said(transformation):
    mesh = mesh_of(4, "auto")
    x = on(mesh)
    with pytest.warns(UserWarning, match=r"under Auto axes, here \('kv',\).*axis_name=") as caught:
        agrees(transformation(attention)(*x))
    assert caught[0].filename != distattn.dot_product_attention.__code__.co_filename
    # Nothing is left where it is said, or where types say it.
    agrees(transformation(functools.partial(attention, axis_name=()))(*x))
    assert (
        compiled(functools.partial(attention, axis_name="kv", strategy="butterfly"), *x) == ONE_TREE
    )
    agrees(transformation(attention)(*on(mesh_of(4, "explicit"))))
    agrees(transformation(attention)(*arrays()))


def test_no_axis_is_not_said_of_keys_that_lie_on_one():
    with pytest.raises(ValueError, match=r"axis_name is \(\), but key is sharded over \('kv',\)"):
        attention(*on(mesh_of(4, "auto")), axis_name=())


@pytest.mark.parametrize("argnums", [0, 1, (0, 1, 2)])
def test_a_gradient_outside_jit_reads_the_arrays(argnums):
    """Of some of the arrays too: the others are read as ever, and they lie in the same way."""
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
        with pytest.raises(ValueError, match=f"strategy='{strategy}'.*over no axis: pass mesh="):
            f(*arrays())
    with pytest.raises(ValueError, match=f"strategy='{strategy}'.*over no axis: pass mesh="):
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
    with pytest.raises(ValueError, match="axis_name 'kv' is manual here.*sharded_attention"):
        run(functools.partial(attention, axis_name="kv"))
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
