"""Meshes of every kind: how layouts are read, which axes take part, and that the others stay out of it."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import distattn
from distattn.testing import collectives
from tests.cases import CASES, KINDS, QUERY_SHARDED, Case, as_float32, check, shardings
from tests.tolerance import assert_close

attention = functools.partial(distattn.dot_product_attention, return_residual=True)
CASE = Case(batch=2, queries=8, keys=16, heads=4, kv_heads=2, options=(("is_causal", True),))


def mesh_of(sizes, names, kind):
    kinds = (KINDS[kind],) * len(names)
    count = int(np.prod(sizes))
    return jax.make_mesh(sizes, names, kinds, devices=jax.devices()[:count])


def placed(mesh, query, key, case=CASE):
    """The arguments of the case on the mesh, by the specs of query, and of key and value."""
    arguments = as_float32(case.arguments())
    specs = {"query": query, "key": key, "value": key}
    return {
        name: jax.device_put(x, NamedSharding(mesh, specs[name])) if name in specs else x
        for name, x in arguments.items()
    }


@functools.cache
def expected(case):
    return attention(**as_float32(case.arguments()), implementation="dense")


def agrees(got, case=CASE, what=""):
    for x, y in zip(got, expected(case), strict=True):
        assert_close(x, y, jnp.float32, case.keys, what=what)


# query spec, key spec: over one axis, a tuple in either order, batch and heads on other axes, T sharded
LAYOUTS = {
    "one_axis": (P(), P(None, "a")),
    "tuple": (P(), P(None, ("a", "b"))),
    "tuple_backwards": (P(), P(None, ("b", "a"))),
    "batch": (P("a"), P("a", "b")),
    "heads": (P(None, None, "a"), P(None, "b", "a")),
    "batch_only": (P("a"), P("a")),
    "heads_only": (P(None, None, "a"), P(None, None, "a")),
    "rows_same_axis": (P(None, "a"), P(None, "a")),
    "rows_other_axis": (P(None, "b"), P(None, "a")),
    "rows_both": (P(None, ("a", "b")), P(None, ("a", "b"))),
    "rows_both_backwards": (P(None, ("b", "a")), P(None, ("b", "a"))),
    "rows_part": (P(None, "a"), P(None, ("a", "b"))),
    "rows_more": (P(None, ("b", "a")), P(None, "a")),
    "rows_more_backwards": (P(None, ("a", "b")), P(None, "a")),
    "batch_and_rows": (P("b", "a"), P("b", "a")),
    "heads_of_the_query": (P(None, None, "a"), P(None, "b")),
    "nothing": (P(), P()),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_are_read_from_the_arrays(name, kind):
    mesh = mesh_of((2, 2), ("a", "b"), kind)
    arguments = placed(mesh, *LAYOUTS[name])
    with jax.set_mesh(mesh):
        agrees(attention(**arguments), what=f"{name} {kind}")


@pytest.mark.parametrize("name", ["tuple_backwards", "heads", "rows_both_backwards", "rows_more"])
def test_gradients_under_explicit_axes(name):
    mesh = mesh_of((2, 2), ("a", "b"), "explicit")
    query_spec, key_spec = LAYOUTS[name]

    def on_mesh(*, query, key, value, **rest):
        query = jax.reshard(query, NamedSharding(mesh, query_spec))
        key, value = (jax.reshard(x, NamedSharding(mesh, key_spec)) for x in (key, value))
        return attention(query, key, value, **rest)

    with jax.set_mesh(mesh):
        check(CASE, on_mesh, what=name)


@pytest.mark.parametrize(
    ("name", "strategy"),
    [
        ("rows_part", "reduce_scatter"),
        ("rows_part", "gather_kv"),
        ("rows_more", "gather_kv"),
        ("rows_more_backwards", "reduce_scatter"),
        ("rows_both_backwards", "reduce_scatter"),
        ("rows_both_backwards", "gather_kv"),
    ],
)
def test_gradients_of_sharded_queries(name, strategy):
    mesh = mesh_of((2, 2), ("a", "b"), "explicit")
    query_spec, key_spec = LAYOUTS[name]

    def on_mesh(*, query, key, value, **rest):
        query = jax.reshard(query, NamedSharding(mesh, query_spec))
        key, value = (jax.reshard(x, NamedSharding(mesh, key_spec)) for x in (key, value))
        return attention(query, key, value, strategy=strategy, **rest)

    with jax.set_mesh(mesh):
        check(CASE, on_mesh, what=f"{name} {strategy}")


@pytest.mark.parametrize("strategy", ["butterfly", "psum"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_strategy_of_replicated_queries_gathers_a_sharded_one(kind, strategy):
    mesh = mesh_of((4,), ("kv",), kind)

    def on_mesh(*, query, key, value, **rest):
        spread = NamedSharding(mesh, P(None, "kv"))
        if kind == "explicit":
            query, key, value = (jax.reshard(x, spread) for x in (query, key, value))
        return attention(
            query,
            key,
            value,
            **shardings(mesh, "kv", query="kv"),
            strategy=strategy,
            **rest,
        )

    with jax.set_mesh(mesh):
        check(CASE, on_mesh, what=f"{kind} {strategy}")


@pytest.mark.parametrize("kind", KINDS)
def test_positions_that_are_sharded_as_the_keys(kind):
    mesh = mesh_of((4,), ("kv",), kind)
    case = CASES["lengths_permuted"]
    arguments = placed(mesh, P(), P(None, "kv"), case)
    along = NamedSharding(mesh, P(None, "kv"))
    arguments["key_positions"] = jax.device_put(arguments["key_positions"], along)
    with jax.set_mesh(mesh):
        agrees(attention(**arguments), case, what=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_a_tuple_of_axes_in_the_compiled_form(kind):
    # Three axes, of which two hold the keys, not in the order of the mesh; batch on the third.
    mesh = mesh_of((2, 2, 2), ("a", "b", "c"), kind)
    arguments = placed(mesh, P("b"), P("b", ("c", "a")))
    with jax.set_mesh(mesh):
        run = jax.jit(
            lambda **a: attention(**a, **shardings(mesh, ("c", "a"), query="auto"), is_causal=True)
        )
        arguments.pop("is_causal")
        agrees(run(**arguments), what=kind)


def test_in_jit_under_auto_axes_the_caller_says_where_keys_lie():
    mesh = mesh_of((4, 2), ("kv", "data"), "auto")
    arguments = placed(mesh, P("data"), P("data", "kv"))
    arguments.pop("is_causal")

    def run(query, key, value):
        return attention(
            query,
            key,
            value,
            is_causal=True,
            **shardings(mesh, "kv", query="auto", batch="data"),
            strategy="butterfly",
        )

    compiled = jax.jit(run).lower(**arguments).compile()
    # No collective on the axis of the batch.
    assert collectives(compiled.as_text()) == {"collective-permute": 2}
    agrees(compiled(**arguments))


def test_the_mesh_of_the_context_is_taken():
    mesh = mesh_of((4,), ("kv",), "auto")
    arguments = as_float32(CASE.arguments())
    with jax.set_mesh(mesh):
        agrees(
            jax.jit(lambda a: attention(**a, is_causal=True, key_value_sharding=P(None, "kv")))(
                {k: arguments[k] for k in ("query", "key", "value")}
            )
        )


def test_an_axis_of_size_one_needs_no_collective():
    mesh = mesh_of((1, 2), ("kv", "data"), "auto")
    arguments = as_float32(CASE.arguments())
    run = jax.jit(
        lambda query, key, value: attention(
            query, key, value, is_causal=True, **shardings(mesh, "kv", query="auto")
        )
    )
    arguments.pop("is_causal")
    compiled = run.lower(**arguments).compile()
    assert not collectives(compiled.as_text())
    agrees(compiled(**arguments))


def test_keys_replicated_over_an_axis_count_once():
    # Two copies of every key: were they merged, out would be the same and lse larger by log 2.
    mesh = mesh_of((2, 2), ("kv", "copies"), "auto")
    agrees(attention(**placed(mesh, P(), P(None, "kv"))))


@pytest.mark.parametrize("strategy", ["ulysses", "ulysses_ring"])
def test_an_axis_of_size_one_among_those_of_the_keys(strategy):
    mesh = mesh_of((1, 4), ("one", "kv"), "auto")
    arguments = as_float32(Case(queries=8, keys=16).arguments())
    query, key, value = (
        jax.device_put(arguments[name], NamedSharding(mesh, P(None, axes)))
        for name, axes in (("query", "kv"), ("key", ("one", "kv")), ("value", ("one", "kv")))
    )
    out = distattn.dot_product_attention(query, key, value, strategy=strategy)
    assert_close(out, distattn.dot_product_attention(**arguments), jnp.float32, 16, what=strategy)


@pytest.mark.parametrize("strategy", QUERY_SHARDED)
@pytest.mark.parametrize("empty", ["B", "T", "S"])
def test_nothing_at_all(empty, strategy):
    sizes = {"B": 2, "T": 8, "S": 16} | {empty: 0}
    query, key = (jnp.ones((sizes["B"], sizes[x], 4, 8)) for x in "TS")
    mesh = mesh_of((4,), ("kv",), "auto")
    where = {**shardings(mesh, "kv", query="auto"), "strategy": strategy}
    out = distattn.dot_product_attention(query, key, key, **where)
    np.testing.assert_array_equal(out, jnp.zeros(query.shape))


@pytest.mark.parametrize("strategy", ["butterfly", "gather_kv", "ring", "ulysses"])
def test_batch_and_heads_by_name(strategy):
    mesh = jax.make_mesh((2, 2, 2), ("data", "heads", "kv"), (KINDS["auto"],) * 3)
    attention = functools.partial(
        distattn.dot_product_attention,
        **shardings(mesh, "kv", query="auto", batch="data", heads="heads"),
        strategy=strategy,
        return_residual=True,
    )
    check(CASES["everything"], attention, what=f"batch and heads by name, {strategy}")


@pytest.mark.parametrize(("strategy", "kind"), [("psum", "auto"), ("gather_kv", "explicit")])
@pytest.mark.parametrize("name", ["lengths", "bias_full", "mask_full", "plain"])
def test_sizes_that_the_devices_do_not_divide(name, strategy, kind):
    mesh = mesh_of((5,), ("kv",), kind)
    case = CASES[name]
    with jax.set_mesh(mesh):
        got = jax.jit(
            functools.partial(attention, **shardings(mesh, "kv", query="auto"), strategy=strategy)
        )(**as_float32(case.arguments()))
        agrees(got, case, what=f"{name} {kind} {strategy}")


@pytest.mark.parametrize("heads", [(4, 1), (4, 2), (8, 2), (6, 3)])
def test_query_heads_sharded_finer_than_key_heads(heads):
    # Four shards of heads, fewer key/value heads: these are repeated just as often as needed.
    case = Case(heads=heads[0], kv_heads=heads[1], keys=16)
    shards = 2 if heads[0] % 4 else 4
    mesh = mesh_of((shards, 2), ("heads", "kv"), "explicit")

    def on_mesh(*, query, key, value, **rest):
        query = jax.reshard(query, NamedSharding(mesh, P(None, None, "heads")))
        return attention(query, key, value, key_value_sharding=P(None, "kv"), **rest)

    with jax.set_mesh(mesh):
        check(case, on_mesh, what=str(heads))


@pytest.mark.parametrize("kind", KINDS)
def test_inside_a_shard_map_over_another_axis(kind):
    mesh = mesh_of((2, 4), ("data", "kv"), kind)
    arguments = placed(mesh, P("data"), P("data", "kv"))
    arguments.pop("is_causal")

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P("data"), P("data"), P("data")),
        out_specs=P("data"),
        axis_names={"data"},
    )
    def per_data_shard(query, key, value):
        return attention(query, key, value, is_causal=True, key_value_sharding=P(None, "kv"))

    def loss(query, key, value):
        out, lse = per_data_shard(query, key, value)
        return (out**2).sum() + lse.sum()

    def plain(query, key, value):
        out, lse = attention(query, key, value, is_causal=True)
        return (out**2).sum() + lse.sum()

    with jax.set_mesh(mesh):
        agrees(jax.jit(per_data_shard)(*arguments.values()), what=kind)
        grads = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*arguments.values())
    local = as_float32(CASE.arguments())
    exact = jax.grad(plain, argnums=(0, 1, 2))(local["query"], local["key"], local["value"])
    for x, y in zip(grads, exact, strict=True):
        assert_close(x, y, jnp.float32, CASE.keys + CASE.queries, what=kind)


def test_the_output_has_the_layout_of_the_query():
    mesh = mesh_of((2, 2), ("a", "b"), "explicit")
    for query_spec, key_spec in (LAYOUTS["rows_both_backwards"], LAYOUTS["heads"]):
        arguments = placed(mesh, query_spec, key_spec)
        with jax.set_mesh(mesh):
            out = distattn.dot_product_attention(**arguments)
        assert jax.typeof(out).sharding.spec == jax.typeof(arguments["query"]).sharding.spec


def test_both_kinds_of_axes_in_one_mesh():
    mesh = jax.make_mesh((2, 4), ("data", "kv"), (AxisType.Auto, AxisType.Explicit))
    arguments = placed(mesh, P("data"), P("data", "kv"))
    with jax.set_mesh(mesh):
        agrees(attention(**arguments))


def test_no_axis_of_the_mesh_is_named_in_the_program_without_need():
    mesh = mesh_of((2, 4), ("data", "kv"), "auto")
    arguments = placed(mesh, P("data"), P("data", "kv"))
    arguments.pop("is_causal")
    text = (
        jax.jit(
            functools.partial(
                attention, **shardings(mesh, "kv", query="auto", batch="data"), strategy="butterfly"
            )
        )
        .lower(**arguments)
        .compile()
        .as_text()
    )
    pairs = re.findall(r"source_target_pairs=\{(.*?)\}\}", text)
    assert pairs
    for pair in re.findall(r"\{(\d+),(\d+)", " ".join(pairs)):
        assert int(pair[0]) // 4 == int(pair[1]) // 4  # the same row of the mesh
