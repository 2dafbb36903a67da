"""The exchange in one TPU kernel, and decode attention in one launch: simulated, and compiled.

One process (`fused_job`) simulates what devices send each other; programs for TPUs that are not here show
what a kernel costs.
"""

import functools
import json
import math
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import distattn
from distattn.experimental.fused import hooks
from distattn.experimental.fused.route import KEEP, OWN_FIRST, REPLACE, SOURCE_FIRST, rounds_over
from distattn.planning import cost, schedule
from distattn.planning.plan import plan
from distattn.testing import compile_for, interpreted, lower
from tests.cases import mesh_of, shardings
from tests.experimental import fused_job
from tests.jobs import ROOT
from tests.kernel_calls import (
    CACHE_SLOTS,
    CALLS,
    arrays_like_keys,
    arrays_of_size,
    decode_of_a_cache,
    key_bytes,
    launches,
)

SECONDS = 300  # for what takes one minute on two cores

# ------------------------------------------------------------------------------------------------ simulated


def test_simulated():
    """Run all of `fused_job`, in one test, since workers that share parameters would each run it."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.experimental.fused_job"],
        cwd=ROOT,
        env=os.environ | fused_job.THREADS,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    found = {x["name"]: x for x in map(json.loads, done.stdout.splitlines())}
    assert set(found) == {*fused_job.CHECKS, *fused_job.BROKEN}, done.stderr
    # Printed are races, and semaphores that are not back at 0.
    failures = [
        name for name in fused_job.CHECKS if found[name]["failure"] or found[name]["printed"]
    ]
    assert failures == [], "\n".join(str(found[name]) for name in failures)
    unseen = [name for name in fused_job.BROKEN if not found[name]["races"]]
    assert unseen == [], "a race that is there was not seen"


# --------------------------------------------------------------------------------------- who sends to whom


@pytest.mark.parametrize("sizes", [(1,), (2,), (5,), (8,), (2, 4), (3, 2), (2, 3, 5)])
def test_rounds_of_axes_are_those_of_the_schedule(sizes):
    axes = tuple("abc"[: len(sizes)])
    steps = schedule.hierarchical(sizes).steps
    rounds = rounds_over(axes, sizes)
    assert len(rounds) == len(steps)
    for each, step in zip(rounds, steps, strict=True):
        axis, pairs = axes.index(each.axis), []
        for rank in range(math.prod(sizes)):
            place = np.unravel_index(rank, sizes)
            target, source, action = (int(x) for x in each.table[place[axis]])

            def partner(coordinate, place=place, axis=axis):
                there = (*place[:axis], coordinate, *place[axis + 1 :])
                return int(np.ravel_multi_index(there, sizes))

            if target >= 0:
                pairs.append((rank, partner(target)))
            assert (source >= 0) == step.receives[rank]
            if source >= 0:
                assert (partner(source), rank) in step.pairs
            wanted = KEEP
            if step.receives[rank]:
                wanted = SOURCE_FIRST if step.source_first[rank] else OWN_FIRST
            assert action == (REPLACE if step.replaces[rank] else wanted)
        assert sorted(pairs) == sorted(step.pairs)


def test_what_needs_no_table():
    for size in range(2, 17):
        flips = [x.flip for x in rounds_over(("a",), (size,))]
        whole = size & (size - 1) == 0
        assert flips == [1 << n for n in range(len(flips))] if whole else set(flips) == {None}


def test_a_barrier_for_each_pattern():
    found = {}

    def body(x):
        for axes in (("a",), ("b",), ("a", "b"), ("b",)):
            found.setdefault(axes, set()).add(hooks.route_over(axes).collective_id)
        return x

    mesh = jax.make_mesh((2, 2), ("a", "b"), (AxisType.Auto,) * 2, devices=jax.devices()[:4])
    for shape in (mesh, jax.make_mesh((4, 2), ("a", "b"), (AxisType.Auto,) * 2)):
        jax.eval_shape(jax.shard_map(body, mesh=shape, in_specs=P(), out_specs=P()), np.zeros(2))
    ids = [x for several in found.values() for x in several]
    assert len(found) == 3
    assert len(ids) == len(set(ids)) == 6  # for two meshes
    assert all(0 <= x < 2**31 for x in ids)


# ------------------------------------------------------------------------------------------------- compiled

ALONG = P(None, "kv")


def compiled(
    topology,
    *,
    call="decode",
    width=128,
    dtype=jnp.bfloat16,
    mesh=None,
    axes="kv",
    run=None,
    keys=None,
    **more,
):
    """Compile a call of CALLS with keys along 'kv', by `run` or by dot_product_attention."""
    batch, queries, own_keys, heads, kv_heads = CALLS[call]
    keys = keys or own_keys
    sizes = [int(x) for x in topology.partition(":")[2].replace("*", "x").split("x")]
    devices = math.prod(sizes) * (2 if topology.startswith("tpu7x") else 1)
    mesh = mesh or {"kv": devices}
    if run is None:
        more["key_value_sharding"] = P(None, axes)
    struct = jax.ShapeDtypeStruct
    return compile_for(
        run or functools.partial(attention, **more),
        struct((batch, queries, heads, width), dtype),
        *(struct((batch, mesh["kv"] * keys, kv_heads, width), dtype) for _ in range(2)),
        topology=topology,
        mesh=mesh,
        specs=(P(), P(None, axes), P(None, axes)),
    )


attention = functools.partial(
    distattn.dot_product_attention, strategy="fused", return_residual=True
)
POSITIONS = {"is_causal": True, "query_positions": np.array([40_000], np.int32)}


@pytest.mark.parametrize(
    ("topology", "width", "dtype", "more"),
    [
        ("v5e:2x2", 128, jnp.bfloat16, {}),
        ("v5e:4x4", 128, jnp.bfloat16, POSITIONS),
        ("v5p:2x2x1", 64, jnp.bfloat16, {"sinks": np.ones(32, np.float32)}),
        ("v6e:2x2", 80, jnp.float32, POSITIONS),
        ("tpu7x:2x2x1", 256, jnp.bfloat16, {}),
    ],
)
def test_decode_is_one_launch(topology, width, dtype, more):
    report = compiled(topology, width=width, dtype=dtype, **more)
    assert launches(report) == 1
    assert report.collectives == {}
    assert arrays_like_keys(report, "decode", width) == []
    assert report.temp_bytes < key_bytes("decode", width, dtype) / 50


def test_decode_of_a_quantised_cache_is_one_launch():
    report = decode_of_a_cache("v5p:2x2x1", jnp.int8, 128, 8, 3, strategy="fused")
    assert launches(report) == 1
    assert report.collectives == {}
    assert arrays_of_size(report, 2 * CACHE_SLOTS * 8 * 128) == []


def test_otherwise_fold_and_exchange_are_two_launches():
    report = compiled("v5e:2x2", call="prefill", width=64)
    assert launches(report) == 2
    assert report.collectives == {}


@pytest.mark.parametrize("more", [{"reproducible": True}, {"implementation": "xla"}])
def test_other_folds_are_followed_by_the_exchange(more):
    report = compiled("v5e:2x2", keys=4096, **more)
    assert launches(report) == 1
    assert report.collectives == {}


def test_along_any_axis_of_any_mesh():
    for mesh, axes in (({"x": 2, "kv": 2, "y": 2}, "kv"), ({"x": 2, "kv": 4}, ("x", "kv"))):
        report = compiled("v5e:2x4", mesh=mesh, axes=axes)
        assert launches(report) == 1
        assert report.collectives == {}


def test_kernels_share_a_barrier_only_if_they_exchange_alike():
    def body(state):
        for axes in ("x", "kv", "x", ("x", "kv")):
            state = distattn.all_reduce(state, axes, schedule="fused")
        return state

    def run(*rows):
        state = distattn.SoftmaxState(*rows)
        return jax.shard_map(body, in_specs=P(), out_specs=P(), check_vma=False)(state)

    rows = [
        jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((1, 2, 4), (1, 2, 4), (1, 2, 4, 8))
    ]
    mesh = {"x": 2, "kv": 2}
    report = compile_for(run, *rows, topology="v5e:2x2", mesh=mesh, specs=(P(),) * 3)
    barriers = re.findall(r'"barrier_type":"CUSTOM","id":"(\d+)"', report.hlo)
    assert launches(report) == len(barriers) == 4
    assert sorted(barriers.count(x) for x in set(barriers)) == [1, 1, 2]


def test_between_slices_xla_exchanges():
    report = compiled("v5e:2x2*2", mesh={"host": 2, "kv": 4}, axes=("host", "kv"))
    assert launches(report) == 2
    assert {name: x["count"] for name, x in report.collectives.items()} == {"send": 1, "recv": 1}
    with pytest.raises(NotImplementedError, match=r"fused.*slice.*along \('kv',\).*'butterfly'"):
        compiled("v5e:2x2*2")


def test_untyped_results_are_refused_where_they_would_be_summed():
    def run(*arrays):
        body = functools.partial(
            distattn.sharded_attention, axis_name="kv", strategy="fused", reproducible=True
        )
        return jax.shard_map(body, in_specs=(P(), ALONG, ALONG), out_specs=P())(*arrays)

    with pytest.raises(NotImplementedError, match=r"reproducible.*'fused'.*\['x'\].*'butterfly'"):
        compiled("v5e:2x2", mesh={"x": 2, "kv": 2}, run=run)


# The interpreter does not know the types of check_vma=True.
@pytest.mark.parametrize("check_vma", [True, False])
def test_gradient_inside_a_shard_map(check_vma):
    def run(*arrays):
        body = functools.partial(
            distattn.sharded_attention, axis_name="kv", strategy="fused", return_residual=True
        )
        out, lse = jax.shard_map(
            body, in_specs=(P(), ALONG, ALONG), out_specs=P(), check_vma=check_vma
        )(*arrays)
        return out.astype(jnp.float32).sum() + lse.sum()

    mesh = {"x": 2, "kv": 2}  # over x nothing varies
    run = jax.value_and_grad(run, argnums=(0, 1, 2))
    report = compiled("v5e:2x2", width=64, mesh=mesh, run=run)
    assert launches(report) == 3  # the forward pass, and two for gradients


def test_gradient_of_the_call():
    def run(*arrays):
        return attention(*arrays)[0].astype(jnp.float32).sum()

    report = compiled("v5e:2x2", width=64, run=jax.grad(run, argnums=(0, 1, 2)))
    assert launches(report) == 3
    assert set(report.collectives) <= {"all-reduce", "collective-permute"}  # the query's gradient


# ---------------------------------------------------------------------------------------- where it is taken


def arrays(keys=64, queries=1, dtype=np.float32):
    rng = np.random.default_rng(0)
    sizes = ((queries, 4), (keys, 2), (keys, 2))
    return [rng.normal(size=(1, length, heads, 8)).astype(dtype) for length, heads in sizes]


def called(mesh, *given, **more):
    return attention(*given, **shardings(mesh, "kv", query="auto"), **more)


def test_elsewhere_it_is_refused():
    mesh = mesh_of(4, "auto")
    for more in ({}, {"reproducible": True}, {"implementation": "dense"}):
        with pytest.raises(
            NotImplementedError, match="strategy='fused'.*platform is 'cpu'.*butterf"
        ):
            called(mesh, *arrays(), **more)
    with interpreted(), pytest.raises(NotImplementedError, match=r"pltpu.InterpretParams"):
        called(mesh, *arrays())


@pytest.mark.parametrize("check_vma", [True, False])
def test_one_device_exchanges_nothing(check_vma):
    body = functools.partial(
        distattn.sharded_attention, axis_name="kv", strategy="fused", return_residual=True
    )
    specs = {"in_specs": (P(), ALONG, ALONG), "out_specs": P(), "check_vma": check_vma}
    mesh = mesh_of(1, "auto")
    inside = jax.jit(jax.shard_map(body, mesh=mesh, **specs))
    want = attention(*arrays(), strategy="auto")
    for got in (called(mesh, *arrays()), inside(*arrays())):
        for x, y in zip(got, want, strict=True):
            np.testing.assert_array_equal(x, y)


def test_axes_that_the_compiler_shards_are_refused():
    mesh = jax.make_mesh((2, 4), ("batch", "kv"), (AxisType.Auto,) * 2)
    body = functools.partial(distattn.sharded_attention, axis_name="kv", strategy="fused")
    specs = {"in_specs": (P(), ALONG, ALONG), "out_specs": P(), "check_vma": False}
    run = jax.jit(jax.shard_map(body, mesh=mesh, axis_names={"kv"}, **specs))
    with (
        interpreted(pltpu.InterpretParams()),
        pytest.raises(NotImplementedError, match=r"\['batch'\].*key_value_sharding"),
    ):
        run(*arrays())


def test_what_does_not_fit_is_refused():
    with (
        interpreted(pltpu.InterpretParams()),
        pytest.raises(NotImplementedError, match=r"query has 40000 rows.*may take \d+.*butterfly"),
    ):
        called(mesh_of(4, "auto"), *arrays(queries=10_000))


def test_float64_is_refused():
    with (
        jax.enable_x64(True),
        interpreted(pltpu.InterpretParams()),
        pytest.raises(NotImplementedError, match="the state is float64"),
    ):
        called(mesh_of(4, "auto"), *arrays(dtype=np.float64))


def test_without_devices_slices_are_not_known():
    shapes = [jax.ShapeDtypeStruct(x.shape, jnp.bfloat16) for x in arrays()]
    with pytest.raises(NotImplementedError, match="which axes of this mesh.*with a Mesh"):
        lower(attention, *shapes, mesh={"kv": 4}, specs=(P(), ALONG, ALONG))


def test_it_is_named_where_names_are():
    for call, name in (
        (lambda: called(mesh_of(2, "auto"), *arrays(), strategy="tree"), "strategy"),
        (lambda: fused_job.merged(mesh_of(2, "auto"), "kv", "tree", None), "schedule"),
    ):
        with pytest.raises(ValueError, match=f"{name} is 'tree'.*'fused'"):
            call()


def test_it_is_planned_by_name_alone():
    small = cost.Workload(1, 1, 4096, 32, 8, 128, 128, 2)
    by_name, free = plan(small, "v5e:4x4", strategy="fused"), plan(small, "v5e:4x4")
    messages = plan(small, "v5e:4x4", strategy="butterfly")
    assert by_name.strategy == "fused"
    assert by_name.predicted_s == messages.predicted_s
    assert "fused" not in {free.strategy, *(x.strategy for x in free.alternatives)}
    assert "fused" not in cost.QUERY_REPLICATED
    with pytest.raises(ValueError, match="strategy is 'fused'"):
        plan(small, "h100:2x8", strategy="fused")
