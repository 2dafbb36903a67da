"""`sharded_attention` in a user's own `shard_map`: check_vma True and False, every strategy, gradients."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import distattn
from distattn.planning import schedule
from tests.cases import ALL_REDUCES, CASES, KINDS, QUERY_SHARDED, Case, as_float32, check, mesh_of
from tests.tolerance import assert_close

DEVICES = 4


def spec_of(name, x, axes, query_sharded, strategy):
    """How an argument lies: keys over the axes, and for a sharded query rows too."""
    if name in ("key", "value", "key_positions", "key_value_segment_ids"):
        return P(None, axes)
    if name in ("query", "query_positions", "query_segment_ids"):
        return P(None, axes) if query_sharded else P()
    if name not in ("bias", "mask"):
        return P()
    if query_sharded and strategy != "reduce_scatter":
        return P(None, None, axes) if x.shape[2] > 1 else P()
    return P(None, None, None, axes) if x.shape[3] > 1 else P()


def own_shard_map(mesh, check_vma, *, axes="kv", query_sharded=False, strategy="auto"):
    """The call as a user writes it: a shard_map over the axis of the keys."""

    def attention(**arguments):
        fixed = {k: x for k, x in arguments.items() if not hasattr(x, "shape")}
        arrays = {k: jnp.asarray(x) for k, x in arguments.items() if k not in fixed}
        specs = {
            name: spec_of(name, x, axes, query_sharded, strategy) for name, x in arrays.items()
        }
        out_spec = P(None, axes) if query_sharded else P()

        @functools.partial(
            jax.shard_map,
            mesh=mesh,
            in_specs=(specs,),
            out_specs=(out_spec, out_spec),
            check_vma=check_vma,
        )
        def body(arrays):
            return distattn.sharded_attention(
                **arrays,
                **fixed,
                axis_name=axes,
                query_sharded=query_sharded,
                strategy=strategy,
                return_residual=True,
            )

        if jax.typeof(arrays["query"]).sharding.mesh.are_all_axes_explicit:
            arrays = {
                k: jax.reshard(x, jax.sharding.NamedSharding(mesh, specs[k]))
                for k, x in arrays.items()
            }
        return body(arrays)

    return attention


EVERYTHING = Case(**{**vars(CASES["everything"]), "queries": 8})


@pytest.mark.parametrize(
    ("strategy", "check_vma"), [("auto", True), *itertools.product(ALL_REDUCES, (True, False))]
)
def test_replicated_query(strategy, check_vma):
    mesh = mesh_of(DEVICES, "auto")
    run = own_shard_map(mesh, check_vma, strategy=strategy)
    check(EVERYTHING, run, what=f"inside {strategy} {check_vma}")


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("strategy", QUERY_SHARDED)
def test_sharded_query(strategy, check_vma):
    mesh = mesh_of(DEVICES, "auto")
    run = own_shard_map(mesh, check_vma, strategy=strategy, query_sharded=True)
    check(EVERYTHING, run, what=f"inside {strategy} {check_vma}")


def test_auto_takes_the_combine_for_which_a_bias_is_cut():
    mesh = mesh_of(DEVICES, "auto")
    whole = jax.jit(distattn.dot_product_attention)
    for cut, dimensions in (("keys", "NTS"), ("rows", "NTS"), ("keys", "S"), ("rows", "T")):
        case = Case(queries=8, keys=16, bias=tuple(dimensions))
        arguments = as_float32(case.arguments())
        spec = P(None, None, None, "kv") if cut == "keys" else P(None, None, "kv")
        rows = P(None, "kv")

        @functools.partial(
            jax.shard_map, mesh=mesh, in_specs=(rows, rows, rows, spec), out_specs=rows
        )
        def run(query, key, value, bias):
            return distattn.sharded_attention(
                query, key, value, bias, axis_name="kv", query_sharded=True
            )

        out = jax.jit(run)(*(arguments[n] for n in ("query", "key", "value", "bias")))
        assert_close(out, whole(**arguments), jnp.float32, 16, what=cut)


@pytest.mark.parametrize(
    ("strategy", "check_vma", "names"),
    [
        ("ring", False, ("chip", "host")),
        ("ulysses", True, ("host", "chip")),
        ("ulysses_ring", True, ("chip", "host")),
        ("ulysses_gather_kv", False, ("chip", "host")),
    ],
)
def test_a_sharded_query_over_two_axes(strategy, check_vma, names):
    mesh = jax.make_mesh((2, 2), ("host", "chip"), (KINDS["auto"],) * 2, devices=jax.devices()[:4])
    # One head of keys, to be repeated; rows of a bias without heads; heads of a mask without rows.
    case = dataclasses.replace(EVERYTHING, bias=("B", "T", "S"), mask=("N", "S"), kv_heads=1)
    run = own_shard_map(mesh, check_vma, axes=names, strategy=strategy, query_sharded=True)
    check(case, run, what=f"inside {strategy} {names} {check_vma}")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("check_vma", [True, False])
def test_default_positions_count_over_the_shards(check_vma, kind):
    mesh = mesh_of(DEVICES, kind)
    with jax.set_mesh(mesh):
        check(CASES["causal"], own_shard_map(mesh, check_vma), what=f"{kind} {check_vma}")


@pytest.mark.parametrize(
    ("query_sharded", "strategy"), [(False, "butterfly"), (True, "reduce_scatter")]
)
@pytest.mark.parametrize("names", [("host", "chip"), ("chip", "host")])
def test_a_tuple_of_axes(names, query_sharded, strategy):
    mesh = jax.make_mesh((2, 4), ("host", "chip"), (KINDS["auto"],) * 2)
    case = Case(queries=16, keys=16, options=(("is_causal", True),))
    arguments = as_float32(case.arguments())
    arguments.pop("is_causal")
    rows = P(None, names) if query_sharded else P()

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(rows, P(None, names), P(None, names)),
        out_specs=rows,
    )
    def run(query, key, value):
        return distattn.sharded_attention(
            query,
            key,
            value,
            is_causal=True,
            axis_name=names,
            query_sharded=query_sharded,
            strategy=strategy,
        )

    expected = distattn.dot_product_attention(**arguments, is_causal=True)
    out = jax.jit(run)(*arguments.values())
    assert_close(out, expected, jnp.float32, case.keys, what=f"{names} {strategy}")


def test_only_some_axes_are_manual():
    mesh = jax.make_mesh((2, 4), ("data", "kv"), (KINDS["auto"],) * 2)
    arguments = as_float32(CASES["causal"].arguments())
    arguments.pop("is_causal")

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(), P(None, "kv"), P(None, "kv")),
        out_specs=P(),
        axis_names={"kv"},
    )
    def run(query, key, value):
        return distattn.sharded_attention(query, key, value, is_causal=True, axis_name="kv")

    batch = jax.sharding.NamedSharding(mesh, P("data"))
    placed = [jax.device_put(x, batch) for x in arguments.values()]
    expected = distattn.dot_product_attention(**arguments, is_causal=True)
    assert_close(jax.jit(run)(*placed), expected, jnp.float32, 24, what="partly manual")


def test_a_schedule_and_an_unbatched_call():
    mesh = mesh_of(DEVICES, "auto")
    arguments = as_float32(CASES["plain"].arguments())

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=(P(), P("kv"), P("kv")), out_specs=P())
    def run(query, key, value):
        return distattn.sharded_attention(
            query, key, value, axis_name="kv", strategy=schedule.butterfly(DEVICES)
        )

    out = jax.jit(run)(*(arguments[name][0] for name in ("query", "key", "value")))
    whole = distattn.dot_product_attention(**arguments)
    assert_close(out, np.asarray(whole[0]), jnp.float32, 24, what="unbatched")
