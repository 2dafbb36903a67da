"""Every wrong call that we could think of: the message names what it got, and what to do."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import distattn
from distattn.planning.schedule import butterfly, halving
from tests.cases import KINDS, mesh_of, shardings

B, T, S, N, K, H = 2, 3, 8, 4, 2, 6
QUERY, KEY = jnp.ones((B, T, N, H)), jnp.ones((B, S, K, H))
POSITIONS = jnp.arange(S, dtype=jnp.int32)

# argument overrides, what the message must hold: the argument, what it got, the remedy
WRONG = {
    "rank": ({"query": jnp.ones((T, N, H))}, ["key has 4 dimensions", "(3, 4, 6)", "reshape"]),
    "rank_2": ({"query": jnp.ones((N, H))}, ["query has 2 dimensions", "reshape or broadcast"]),
    "integers": ({"key": jnp.ones((B, S, K, H), jnp.int32)}, ["key has dtype int32", ".astype"]),
    "batch": (
        {"key": jnp.ones((3, S, K, H)), "value": jnp.ones((3, S, K, H))},
        ["(3, 8, 2, 6)", "broadcast"],
    ),
    "lengths_of_key_and_value": ({"value": jnp.ones((B, 9, K, H))}, ["S=8", "S=9", "align"]),
    "heads_of_key_and_value": ({"value": jnp.ones((B, S, 4, H))}, ["K=2", "K=4"]),
    "head_dim": ({"query": jnp.ones((B, T, N, 5))}, ["H=5", "H=6", "must be equal"]),
    "groups": ({"query": jnp.ones((B, T, 3, H))}, ["N=3", "K=2", "multiple"]),
    "int_mask": (
        {"mask": jnp.ones((B, 1, T, S), jnp.int32)},
        ["mask has dtype int32", "mask != 0"],
    ),
    "float_mask": ({"mask": jnp.ones((B, 1, T, S))}, ["mask has dtype float32", "as bias"]),
    "mask_shape": (
        {"mask": jnp.ones((B, 1, S, T), bool)},
        ["mask has shape (2, 1, 8, 3)", "[2, 4, 3, 8]"],
    ),
    "mask_rank": (
        {"mask": jnp.ones((1, B, 1, T, S), bool)},
        ["mask has shape (1, 2, 1, 3, 8)", "broadcast"],
    ),
    "bool_bias": ({"bias": jnp.ones((B, 1, T, S), bool)}, ["bias has dtype bool", "goes to mask"]),
    "bias_shape": (
        {"bias": jnp.ones((B, 3, T, S))},
        ["bias has shape (2, 3, 3, 8)", "[2, 4, 3, 8]"],
    ),
    "positions_shape": (
        {"key_positions": POSITIONS[:5]},
        ["key_positions has shape (5,)", "int32[S]"],
    ),
    "positions_float": (
        {"key_positions": jnp.ones(S)},
        ["key_positions has dtype float32", ".astype(jnp.int32)"],
    ),
    "query_positions_shape": (
        {"query_positions": POSITIONS, "is_causal": True},
        ["query_positions has shape (8,)", "int32[T]"],
    ),
    "causal_without_query_positions": (
        {"key_positions": POSITIONS, "is_causal": True},
        ["query_positions is None", "pass query_positions"],
    ),
    "window_without_query_positions": (
        {"key_positions": POSITIONS, "local_window_size": 2},
        ["query_positions is None", "local_window_size"],
    ),
    "one_segment": (
        {"query_segment_ids": jnp.zeros(T, jnp.int32)},
        ["query_segment_ids is given", "pass key_value_segment_ids"],
    ),
    "other_segment": (
        {"key_value_segment_ids": jnp.zeros(S, jnp.int32)},
        ["key_value_segment_ids is given", "pass query_segment_ids"],
    ),
    "segments_shape": (
        {
            "query_segment_ids": jnp.zeros(5, jnp.int32),
            "key_value_segment_ids": jnp.zeros(S, jnp.int32),
        },
        ["query_segment_ids has shape (5,)", "int32[T]"],
    ),
    "lengths_shape": (
        {"key_value_seq_lengths": jnp.ones(3, jnp.int32)},
        ["key_value_seq_lengths has shape (3,)", "[2]"],
    ),
    "lengths_float": (
        {"query_seq_lengths": jnp.ones(B)},
        ["query_seq_lengths has dtype float32", ".astype"],
    ),
    "window": ({"local_window_size": -3}, ["local_window_size is -3", "None"]),
    "window_triple": (
        {"local_window_size": (1, 2, 3)},
        ["local_window_size is (1, 2, 3)", "(left, right)"],
    ),
    "window_float": ({"local_window_size": 2.5}, ["local_window_size is 2.5", "ints"]),
    "sinks": ({"sinks": jnp.ones(3)}, ["sinks is float32[3]", "[4]"]),
    "soft_cap": ({"logits_soft_cap": 0.0}, ["logits_soft_cap is 0.0", "positive"]),
    "scale": ({"scale": float("nan")}, ["scale is nan", "finite"]),
    "implementation": ({"implementation": "flash"}, ["'flash'", "'xla'"]),
    "strategy": ({"strategy": "tree"}, ["'tree'", "butterfly"]),
    "axis_without_mesh": (
        {"key_value_sharding": P(None, "kv")},
        ["key_value_sharding is P(None, 'kv')", "no mesh", "jax.set_mesh"],
    ),
}


def call(**overrides):
    return distattn.dot_product_attention(
        **({"query": QUERY, "key": KEY, "value": KEY} | overrides)
    )


def raises(kind, parts):
    return pytest.raises(kind, match="(?s)" + "".join(f"(?=.*{re.escape(part)})" for part in parts))


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name):
    overrides, parts = WRONG[name]
    with raises(ValueError, parts):
        call(**overrides)


def test_a_traced_scale():
    with raises(ValueError, ["scale is a traced value", "scale=1.0"]):
        jax.jit(lambda s: call(scale=s))(1.0)


@pytest.mark.parametrize("name", ["pallas_tpu", "pallas_gpu", "cudnn"])
def test_kernels_of_other_platforms(name):
    with raises(NotImplementedError, [f"'{name}' does not support this call", "platform is 'cpu'"]):
        call(implementation=name)


def test_dropout_is_not_an_argument():
    with pytest.raises(TypeError, match="dropout_rate"):
        call(dropout_rate=0.1)


KV = {"key_value_sharding": P(None, "kv")}
MESH_ERRORS = {
    "unknown_axis": (
        {"key_value_sharding": P(None, "seq")},
        ["key_value_sharding", "'seq' is not an axis", "kv=4", "['kv']"],
    ),
    "unknown_query_axis": (
        KV | {"query_sharding": P(None, "q")},
        ["query_sharding is", "'q' is not", "['kv']"],
    ),
    "axis_twice": ({"key_value_sharding": P("kv", "kv")}, ["'kv' twice", "once"]),
    "not_a_sharding": (
        {"key_value_sharding": "kv"},
        ["key_value_sharding is 'kv'", "jax.NamedSharding", "jax.P"],
    ),
    "a_mesh_for_a_sharding": (
        {"query_sharding": mesh_of(4, "auto")},
        ["query_sharding is", "must be a jax.NamedSharding"],
    ),
    "too_many_dimensions": (
        {"key_value_sharding": P(None, None, None, None, "kv")},
        ["5 dimensions", "[B, S, K, H]", "or fewer"],
    ),
    "width_sharded": (
        {"key_value_sharding": P(None, None, None, "kv")},
        ["shards H", "('kv',)", "heads"],
    ),
    "width_of_the_query_sharded": (
        {"query_sharding": P(None, None, None, "kv")},
        ["query_sharding", "shards H", "('kv',)"],
    ),
    "an_entry_that_leaves_it_open": (
        {"key_value_sharding": P(P.UNCONSTRAINED, "kv")},
        ["UNCONSTRAINED", "names of axes", "whole sharding"],
    ),
    "schedule_size": (KV | {"strategy": butterfly(8)}, ["8 devices", "4", "build it"]),
    "ring_with_replicated_query": (
        KV | {"strategy": "ring", "query_sharding": P()},
        ["'ring'", "query_sharding shards T over ()", "'butterfly'"],
    ),
    "heads_that_do_not_divide": (
        KV | {"strategy": "ulysses", "query": QUERY[:, :, :2]} | {"key": KEY, "value": KEY},
        ["'ulysses'", "heads of query over the 4 devices of ('kv',)", "are 2", "'ring'"],
    ),
    "batch_that_does_not_divide": (
        {"key_value_sharding": P("kv")},
        [f"B={B} is sharded over ('kv',), 4 devices", "multiple of 4"],
    ),
    "heads_that_the_devices_do_not_divide": (
        {"key_value_sharding": P(None, None, "kv"), "query": QUERY[:, :, :2]},
        ["N=2 is sharded over ('kv',), 4 devices", "multiple of 4"],
    ),
    "batch_and_keys": (
        KV
        | {"query_sharding": P("kv"), "query": jnp.ones((4, T, N, H))}
        | {"key": jnp.ones((4, S, K, H)), "value": jnp.ones((4, S, K, H))},
        ["'kv' shards both B ('kv',) and S ('kv',)", "query_sharding"],
    ),
    "one_level": (
        KV | {"strategy": "ulysses_ring"},
        ["'ulysses_ring'", "two levels", "('kv',)", "'ulysses' or 'ring'"],
    ),
    "scatter_with_replicated_query": (
        KV | {"strategy": "reduce_scatter", "query_sharding": P()},
        ["'reduce_scatter'", "query_sharding shards T over ()", "None"],
    ),
}


@pytest.mark.parametrize("name", MESH_ERRORS)
def test_wrong_places(name):
    overrides, parts = MESH_ERRORS[name]
    with raises(ValueError, parts), jax.set_mesh(mesh_of(4, "auto")):
        call(**overrides)


@pytest.mark.parametrize("mesh", [{"kv": 4}, "kv", 8, [1, 2]], ids=str)
def test_a_mesh_that_is_none(mesh):
    real = [f"mesh is {mesh!r}", "must be a jax.sharding.Mesh,", "pass jax.make_mesh"]
    create = functools.partial(distattn.KVCache.create, 1, 8, 1, 4, dtype=jnp.float32)
    with raises(ValueError, real):
        create().recover(mesh)
    with raises(
        ValueError, [f"sharding is {mesh!r}", "jax.NamedSharding of key", "pass jax.Named"]
    ):
        distattn.distributed.from_process_local(KEY, KEY, POSITIONS, mesh)
    with raises(ValueError, real), distattn.distributed.all_or_none(mesh):
        pass
    with raises(ValueError, ["sharding is", "jax.NamedSharding"]):
        distattn.layouts.align(KEY, POSITIONS, POSITIONS, sharding=mesh)


def test_shardings_that_contradict_each_other():
    mesh = jax.make_mesh((2, 2), ("a", "b"), (KINDS["auto"],) * 2, devices=jax.devices()[:4])
    with (
        jax.set_mesh(mesh),
        raises(ValueError, ["B of query", "('a',)", "B of key", "('b',)", "P('a'", "P('b'"]),
    ):
        call(query_sharding=P("a"), key_value_sharding=P("b"))
    other = NamedSharding(mesh_of(4, "auto"), P(None, "kv"))
    with raises(ValueError, ["on the mesh kv=4", "a=2", "one mesh"]):
        call(query_sharding=NamedSharding(mesh, P("a")), key_value_sharding=other)


@pytest.mark.parametrize("strategy", ["butterfly", "gather_kv", "ring"])
def test_a_strategy_that_could_not_be_obeyed(strategy):
    mesh = mesh_of(4, "auto")
    f = jax.jit(functools.partial(distattn.dot_product_attention, strategy=strategy))
    key = placed(mesh, KEY, None, "kv")
    with (
        jax.set_mesh(mesh),
        raises(ValueError, [repr(strategy), "inside jit", "pass key_value_sharding"]),
        pytest.warns(UserWarning, match="pass key_value_sharding"),
    ):
        f(placed(mesh, QUERY), key, key)


def test_heads_go_where_rows_and_keys_come_from():
    mesh = jax.make_mesh((2, 2), ("host", "kv"), (KINDS["auto"],) * 2)
    with raises(ValueError, ["same axes", "T is sharded over ('host',)", "S over ('host', 'kv')"]):
        call(**shardings(mesh, ("host", "kv"), query="host"), strategy="ulysses")


def placed(mesh, x, *spec):
    return jax.device_put(x, NamedSharding(mesh, P(*spec)))


def test_key_and_value_sharded_differently():
    mesh = mesh_of(4, "auto")
    with raises(ValueError, ["('kv',)", "()", "reshard"]):
        call(key=placed(mesh, KEY, None, "kv"), value=placed(mesh, KEY))


@pytest.mark.parametrize("what", ["axes", "types"])
def test_two_meshes(what):
    mesh = mesh_of(4, "explicit")
    other = mesh_of(2, "explicit") if what == "axes" else mesh_of(4, "auto")
    key = placed(mesh, KEY, None, "kv")
    with raises(ValueError, ["Explicit", "one mesh", "reshard"]):
        call(key=key, value=jax.device_put(KEY, NamedSharding(other, P())))


def inside(f, **options):
    mesh = mesh_of(4, "auto")
    specs = {"in_specs": (P(), P(None, "kv")), "out_specs": P()} | options
    return jax.shard_map(f, mesh=mesh, **specs)(QUERY, KEY)


def test_the_global_call_inside_a_shard_map():
    def f(query, key):
        return distattn.dot_product_attention(query, key, key, **KV)

    with raises(ValueError, ["'kv' is manual here", "sharded_attention"]):
        inside(f)


def test_the_inside_call_outside():
    with raises(ValueError, ["'kv' is not an axis of the shard_map", "dot_product_attention"]):
        distattn.sharded_attention(QUERY, KEY, KEY, axis_name="kv")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"axis_name": "seq"}, ["'seq'", "['kv']"]),
        (
            {"axis_name": "kv", "strategy": "gather_kv"},
            ["'gather_kv'", "query_sharded=False", "psum"],
        ),
        (
            {"axis_name": "kv", "strategy": "psum", "query_sharded": True},
            ["'psum'", "query_sharded=True", "gather_kv"],
        ),
        (
            {"axis_name": "kv", "strategy": butterfly(8)},
            ["8 devices", "has 4", "build it"],
        ),
    ],
)
def test_wrong_calls_inside(options, parts):
    with raises(ValueError, parts):
        inside(lambda query, key: distattn.sharded_attention(query, key, key, **options))


@pytest.mark.parametrize(
    ("f", "parts"),
    [
        (functools.partial(distattn.all_reduce, schedule="tree"), ["'tree'", "'butterfly'"]),
        (functools.partial(distattn.all_reduce, schedule=3), ["schedule is 3", "Schedule"]),
        (functools.partial(distattn.all_reduce, schedule=butterfly(2)), ["2 devices", "has 4"]),
        (functools.partial(distattn.reduce_scatter), ["size 3", "4 devices", "pad"]),
        (
            functools.partial(distattn.reduce_scatter, scatter_dimension=3),
            ["scatter_dimension is 3", "[0, 1, 2]"],
        ),
        (
            functools.partial(distattn.reduce_scatter, scatter_dimension=2, schedule="x"),
            ["'x'", "'halving'"],
        ),
        (
            functools.partial(distattn.reduce_scatter, scatter_dimension=2, schedule=halving(8)),
            ["8 devices", "has 4"],
        ),
    ],
)
def test_wrong_calls_of_the_algebra(f, parts):
    def body(query, key):
        return distattn.finalize(f(distattn.partial_attention(query, key, key), "kv"))[0]

    with raises(ValueError, parts):
        inside(body, check_vma=False)


def test_block_sizes():
    with raises(ValueError, ["block_sizes is (0, 4)", "at least 1"]):
        distattn.partial_attention(QUERY, KEY, KEY, block_sizes=(0, 4))


def test_numpy_arrays_and_other_integers_are_fine():
    out = call(
        query=np.asarray(QUERY),
        key_positions=np.arange(S, dtype=np.int16),
        query_positions=np.arange(T, dtype=np.uint8),
        is_causal=True,
    )
    assert out.shape == (B, T, N, H)
