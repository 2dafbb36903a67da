"""reproducible=True: the same bits whatever the devices, strategy, mesh and order of the blocks."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import distattn
from distattn.local.reproducible import BLOCK
from distattn.testing import collectives, reference
from tests.cases import (
    ALL_REDUCES,
    CASES,
    DIFFERENTIABLE,
    FULLY_OPTIMIZED,
    KINDS,
    Case,
    check,
    mesh_of,
    shardings,
)
from tests.tolerance import assert_close

LONG = {"queries": 100, "keys": 5 * BLOCK, "kv_heads": 2, "heads": 4}
WHOLE = dataclasses.replace(CASES["everything"], **LONG)
# Windows, segments, sinks, a soft cap and a bias of heads, rows and keys are in WHOLE.
FEATURES = {
    "plain, key heads alone": Case(queries=72, keys=6 * BLOCK, kv_heads=4, value_width=12),
    "one query": Case(queries=1, keys=8 * BLOCK, heads=6, kv_heads=3, batch=1),
    "few queries, one head": Case(queries=3, keys=4 * BLOCK, heads=1, kv_heads=1),
    "rows of 64": Case(batch=1, queries=520, keys=4 * BLOCK, options=(("is_causal", True),)),
    "fewer keys than a block": Case(queries=9, keys=40, sinks=True, lengths=True),
    "bias of rows": Case(**LONG, bias=("B", "T"), mask=("N", "S")),
    "a scalar bias": Case(**LONG, bias=(), query_lengths=True, lengths=True),
    "bias of all": Case(**LONG, bias=("B", "N", "T", "S"), mask=("B", "T", "S")),
}


def arguments_of(case: Case, dtype: Any) -> tuple[dict, dict]:
    """Arrays, and what is constant; positions are spelt out, so that keys can be put in another order."""
    arguments = case.arguments()
    constants = {name: arguments.pop(name) for name, _ in case.options}
    arguments.setdefault("key_positions", np.arange(case.keys, dtype=np.int32))
    arguments.setdefault("query_positions", np.arange(case.queries, dtype=np.int32))
    arrays = {
        name: jnp.asarray(x, dtype if name in DIFFERENTIABLE else None)
        for name, x in arguments.items()
    }
    return arrays, constants


def program(case: Case, dtype: Any, **where: Any):
    """The function from arrays and cotangents to out, lse and gradients, compiled as users compile it."""
    constants = arguments_of(case, dtype)[1]

    def run(arrays: dict, d_out: jax.Array, d_lse: jax.Array) -> dict:
        floats = {name: x for name, x in arrays.items() if name in DIFFERENTIABLE}
        rest = {name: x for name, x in arrays.items() if name not in floats}

        def attention(floats: dict) -> tuple[jax.Array, jax.Array]:
            return distattn.dot_product_attention(
                **floats, **rest, **constants, **where, return_residual=True, reproducible=True
            )

        (out, lse), back = jax.vjp(attention, floats)
        return {"out": out, "lse": lse} | back((d_out, d_lse))[0]

    return jax.jit(run, compiler_options=FULLY_OPTIMIZED)


def cotangents_of(case: Case, dtype: Any) -> tuple[jax.Array, jax.Array]:
    d_out, d_lse = case.cotangents()
    return jnp.asarray(d_out, dtype), jnp.asarray(d_lse, jnp.float32)


@functools.cache
def on_one_device(case: Case, dtype: Any) -> dict[str, np.ndarray]:
    result = program(case, dtype, key_value_sharding=P(None, ()))(
        arguments_of(case, dtype)[0], *cotangents_of(case, dtype)
    )
    return jax.tree.map(np.asarray, result)


def keys_axis(name: str, x: Any) -> int | None:
    """The dimension of the keys in an argument, or in its gradient."""
    axes = {"key": 1, "value": 1, "bias": 3, "mask": 3}
    axes |= dict.fromkeys(("key_positions", "key_value_segment_ids"), x.ndim - 1)
    axis = axes.get(name)
    return None if axis is None or x.shape[axis] == 1 else axis


def in_order(tree: dict, order: np.ndarray) -> dict:
    """The arguments, or gradients, with their keys in that order."""
    return {
        name: x if keys_axis(name, x) is None else np.take(np.asarray(x), order, keys_axis(name, x))
        for name, x in tree.items()
    }


def check_bits(case: Case, dtype: Any = jnp.float32, **where: Any) -> None:
    """That the bits are those of one device, for the keys as they are and with their blocks shuffled."""
    expected, run = on_one_device(case, dtype), program(case, dtype, **where)
    arrays, cotangents = arguments_of(case, dtype)[0], cotangents_of(case, dtype)
    orders = [np.arange(case.keys)]
    if case.keys % BLOCK == 0:
        blocks = orders[0].reshape(-1, BLOCK)
        orders.append(np.random.default_rng(case.seed).permutation(blocks).ravel())
    for order in orders:
        found = run({k: jnp.asarray(x) for k, x in in_order(arrays, order).items()}, *cotangents)
        for name, x in in_order(expected, order).items():
            np.testing.assert_array_equal(np.asarray(found[name]), x, name, strict=True)


# Every number of devices, and every strategy on some of them that a round number does not fit.
GRID = [
    *((devices, "butterfly") for devices in (1, 2, 4, 5, 8)),
    (6, "reduce_scatter"),
    (3, "ring"),
    (5, "psum"),
    (6, "all_gather"),
    (7, "gather_kv"),
]


@pytest.mark.parametrize(("devices", "strategy"), GRID)
def test_devices_and_strategies(devices, strategy):
    mesh = mesh_of(devices, list(KINDS)[devices % 2])
    with jax.set_mesh(mesh):
        check_bits(WHOLE, **shardings(mesh, "kv", query="auto"), strategy=strategy)


@pytest.mark.parametrize("devices", [3, 6, 7])
def test_a_butterfly_of_devices_that_pair_up_unevenly(devices):
    check_bits(
        FEATURES["few queries, one head"],
        **shardings(mesh_of(devices, "auto"), "kv", query="auto"),
        strategy="butterfly",
    )


@pytest.mark.parametrize("name", [name for name in FEATURES if name != "few queries, one head"])
def test_features(name):
    index = list(FEATURES).index(name)
    mesh = mesh_of((3, 8, 5, 4)[index % 4], list(KINDS)[index % 2])
    strategy = ("auto", "reduce_scatter", "ring", "gather_kv", "psum")[index % 5]
    with jax.set_mesh(mesh):
        check_bits(FEATURES[name], **shardings(mesh, "kv", query="auto"), strategy=strategy)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_a_whole_query_are_cut_where_states_are_large(kind):
    case = Case(batch=1, queries=128, keys=4 * BLOCK, heads=8, kv_heads=1, sinks=True)
    mesh = mesh_of(8, kind)
    where = {**shardings(mesh, "kv", query=None)}
    forward = jax.jit(functools.partial(distattn.dot_product_attention, reproducible=True, **where))
    arrays = arguments_of(case, jnp.float32)[0]
    with jax.set_mesh(mesh):
        check_bits(case, **where)
        inputs = tuple(arrays[name] for name in ("query", "key", "value"))
        compiled = forward.lower(*inputs).compile()
    counts = collectives(compiled.as_text())
    assert counts["all-reduce"] == counts["reduce-scatter"] == 0 < counts["all-gather"], counts
    assert compiled.output_shardings.is_fully_replicated


@pytest.mark.parametrize(("dtype", "strategy"), [("bfloat16", "ring"), ("float16", "butterfly")])
def test_half_precision(dtype, strategy):
    check_bits(
        WHOLE,
        jnp.dtype(dtype),
        **shardings(mesh_of(4, "auto"), "kv", query="auto"),
        strategy=strategy,
    )


@pytest.mark.parametrize(
    ("strategy", "sizes", "axes"),
    [
        ("butterfly", (2, 3), ("kv", "x")),
        ("ulysses", (4,), "kv"),
        ("ulysses_ring", (2, 4), ("x", "kv")),  # 2 key/value heads on 4 devices: repeated
        ("ulysses_gather_kv", (3, 2), ("x", "kv")),
        ("ring", (2, 2), ("kv", "x")),
    ],
)
def test_levels_and_heads(strategy, sizes, axes):
    names = ("x", "kv")[-len(sizes) :]
    count = int(np.prod(sizes))
    mesh = jax.make_mesh(
        sizes, names, (KINDS["explicit"],) * len(sizes), devices=jax.devices()[:count]
    )
    with jax.set_mesh(mesh):
        check_bits(WHOLE, **shardings(mesh, axes, query="auto"), strategy=strategy)


def test_batch_and_heads_on_other_axes():
    mesh = jax.make_mesh((2, 2, 2), ("b", "h", "kv"), (KINDS["auto"],) * 3)
    where = shardings(mesh, "kv", query="auto", batch="b", heads="h")
    check_bits(WHOLE, strategy="ring", **where)
    # The compiler may shard batch and heads unseen.
    plain = FEATURES["plain, key heads alone"]
    check_bits(plain, **shardings(mesh, "kv", query="auto"), strategy="butterfly")


@pytest.mark.parametrize("name", ["everything", *list(FEATURES)[:4]])
def test_against_the_oracle(name):
    case = {"everything": WHOLE, **FEATURES}[name]
    attention = functools.partial(
        distattn.dot_product_attention, return_residual=True, reproducible=True
    )
    check(case, attention, what=f"reproducible {name}")


# ---------------------------------------------------------------------------- inside a shard_map


# Under check_vma=False JAX divides what comes back by the number of devices: exact for powers of two.
@pytest.mark.parametrize(
    ("devices", "strategy", "vma"),
    [
        (8, "butterfly", True),
        (4, "reduce_scatter", False),
        (2, "gather_kv", True),
        (4, "ring", True),
        (4, "ulysses", True),
    ],
)
def test_inside(devices, strategy, vma):
    case = Case(batch=1, queries=256, keys=24 * BLOCK, heads=4, kv_heads=2, sinks=True, seed=3)
    case = dataclasses.replace(case, bias=None if strategy == "ulysses" else ("N", "S"))
    sharded = strategy not in ALL_REDUCES
    split, mesh = P(None, "kv"), mesh_of(devices, "auto")
    bias_split = P(None, None, None, "kv") if not sharded or strategy == "reduce_scatter" else P()
    arrays, _ = arguments_of(case, jnp.float32)
    floats = {name: x for name, x in arrays.items() if name in DIFFERENTIABLE}
    specs = {"query": split if sharded else P(), "key": split, "value": split}
    specs |= {"bias": bias_split, "sinks": P()}

    def body(floats):
        return distattn.sharded_attention(
            **floats,
            axis_name="kv",
            strategy=strategy,
            query_sharded=sharded,
            is_causal=True,
            return_residual=True,
            reproducible=True,
        )

    @functools.partial(jax.jit, compiler_options=FULLY_OPTIMIZED)
    def run(floats, cotangents):
        mapped = jax.shard_map(
            body,
            mesh=mesh,
            in_specs=({name: specs[name] for name in floats},),
            out_specs=(specs["query"], specs["query"]),
            check_vma=vma,
        )
        (out, lse), back = jax.vjp(mapped, floats)
        return {"out": out, "lse": lse} | back(cotangents)[0]

    found = run(floats, cotangents_of(case, jnp.float32))
    one = dataclasses.replace(case, options=(("is_causal", True),))
    expected = dict(on_one_device(one, jnp.float32))
    if sharded and not vma:
        # A bias that all devices have: without types it is not known to be one, and JAX sums floats.
        assert_close(found.pop("bias", 0), expected.pop("bias", 0), jnp.float32, 256)
    for name, x in expected.items():
        np.testing.assert_array_equal(np.asarray(found[name]), x, name, strict=True)


# ---------------------------------------------------------------------------- the rest of the promise


def test_under_scan_and_remat():
    case = FEATURES["plain, key heads alone"]
    expected = on_one_device(case, jnp.float32)
    arrays, _ = arguments_of(case, jnp.float32)
    mesh = mesh_of(4, "auto")
    d_out, d_lse = cotangents_of(case, jnp.float32)

    @functools.partial(jax.jit, compiler_options=FULLY_OPTIMIZED)
    def run(query, key, value):
        @jax.checkpoint
        def attention(query, key, value):
            return distattn.dot_product_attention(
                query,
                key,
                value,
                **shardings(mesh, "kv", query="auto"),
                return_residual=True,
                reproducible=True,
            )

        def step(carry, _):
            (out, lse), back = jax.vjp(attention, query, key, value)
            return carry, (out, lse, *back((d_out, d_lse)))

        return jax.lax.scan(step, 0, length=2)[1]

    found = run(*(arrays[name] for name in ("query", "key", "value")))
    for name, x in zip(("out", "lse", "query", "key", "value"), found, strict=True):
        for repeat in np.asarray(x):
            np.testing.assert_array_equal(repeat, expected[name], name, strict=True)


def test_the_ordinary_bits_differ():
    # Else nothing is shown by the tests above.
    case = FEATURES["plain, key heads alone"]
    arrays, _ = arguments_of(case, jnp.float32)
    given = [arrays[name] for name in ("query", "key", "value")]
    mesh = mesh_of(5, "auto")
    outs = [
        jax.jit(functools.partial(distattn.dot_product_attention, **where))(*given)
        for where in ({}, {**shardings(mesh, "kv", query="auto"), "strategy": "butterfly"})
    ]
    assert (np.asarray(outs[0]) != np.asarray(outs[1])).any()


def test_a_row_that_attends_to_nan_is_nan():
    rng = np.random.default_rng(0)
    query, key, value = (
        rng.normal(size=(1, n, 2, 8)).astype(np.float32) for n in (4, 3 * BLOCK, 3 * BLOCK)
    )
    odd = [70, 130, 150]
    key[0, odd[0]], value[0, odd[1]], value[0, odd[2]] = np.nan, np.inf, np.nan
    # Rows attend to keys below 60, to the NaN key too, to the infinite value, and to other keys.
    mask = np.zeros((4, 3 * BLOCK), bool)
    mask[0, :60] = mask[1, :80] = mask[2, 120:140] = mask[3, 160:] = True
    mask[3, :60] = True
    unattended = mask.copy()
    unattended[:, odd] = False
    clean = [np.nan_to_num(x, posinf=0.0) for x in (key, value)]
    exact = reference.dot_product_attention(query, *clean, mask=unattended[None, None])
    for devices in (1, 3):
        out, lse = _on_devices(devices, query, key, value, mask)
        assert np.isnan(out[0, 1]).all()
        assert np.isnan(lse[0, 1]).all()
        assert np.isnan(out[0, 2]).all()
        assert np.isfinite(lse[0, 2]).all()
        for x, y in zip(_on_devices(devices, query, key, value, unattended), exact, strict=True):
            assert_close(x, y, jnp.float32, 3 * BLOCK)


def _on_devices(devices, query, key, value, mask):
    return distattn.dot_product_attention(
        query,
        key,
        value,
        mask=mask[None, None],
        **shardings(mesh_of(devices, "auto"), "kv", query="auto"),
        return_residual=True,
        reproducible=True,
    )


def test_one_key_dominates_a_million():
    keys = 2**20
    rng = np.random.default_rng(0)
    query = np.ones((1, 1, 1, 2), np.float32)
    key = rng.normal(size=(1, keys, 1, 2)).astype(np.float32)
    value = rng.normal(size=(1, keys, 1, 2)).astype(np.float32)
    key[0, 777_777] = 60.0
    run = functools.partial(distattn.dot_product_attention, scale=1.0, reproducible=True)
    out = np.asarray(jax.jit(run)(query, key, value))
    np.testing.assert_array_equal(out[0, 0, 0], value[0, 777_777, 0])
    huge = np.asarray(jax.jit(run)(query, key, value * np.float32(1e34)))
    assert_close(huge[0, 0, 0], value[0, 777_777, 0].astype(np.float64) * 1e34, jnp.float32, 1)


COUNTS = {
    "psum": {"all-reduce": 2},  # a maximum of tops, and a sum of integers
    "butterfly": {"collective-permute": 3},
    "all_gather": {"all-gather": 1},
    "reduce_scatter": {"all-gather": 1, "collective-permute": 3},
    "gather_kv": {"all-gather": 2},
}


@pytest.mark.parametrize("strategy", COUNTS)
def test_collectives(strategy):
    mesh = mesh_of(8, "auto")
    sharded = strategy in ("reduce_scatter", "gather_kv")
    specs = [P(None, "kv") if sharded else P(), P(None, "kv"), P(None, "kv")]
    arrays = [
        jax.ShapeDtypeStruct((1, n, 4, 16), jnp.float32, sharding=jax.NamedSharding(mesh, spec))
        for n, spec in zip((64, 1024, 1024), specs, strict=True)
    ]
    run = functools.partial(
        distattn.dot_product_attention,
        **shardings(mesh, "kv", query="kv" if sharded else None),
        strategy=strategy,
        reproducible=True,
    )
    text = jax.jit(run).lower(*arrays).compile().as_text()
    assert dict(collectives(text, executed=True)) == COUNTS[strategy]


def test_errors():
    query, key = jnp.ones((1, 2, 4, 8)), jnp.ones((1, 16, 2, 8))
    attention = functools.partial(distattn.dot_product_attention, reproducible=True)
    with pytest.raises(ValueError, match="implementation='dense' sums keys.*implementation=None"):
        attention(query, key, key, implementation="dense")
    with (
        jax.enable_x64(True),
        pytest.raises(NotImplementedError, match="float64.*cast them to float32"),
    ):
        attention(*(jnp.asarray(x, jnp.float64) for x in (query, key, key)))
    mesh = jax.make_mesh((4,), ("h",), (KINDS["auto"],), devices=jax.devices()[:4])
    with pytest.raises(
        NotImplementedError, match="K=2 key/value heads over the 4 devices.*shard fewer heads"
    ):
        attention(query, key, key, **shardings(mesh, query="auto", heads="h"))


@pytest.mark.parametrize("strategy", ["reduce_scatter", "ring", "gather_kv", "ulysses"])
@pytest.mark.parametrize("name", ["bias", "mask"])
def test_a_dense_array_that_would_be_padded_shard_by_shard_is_refused(name, strategy):
    """Inside a shard_map: 2 queries a device, which are no whole block."""
    mesh = mesh_of(2, "auto")
    query, key = jnp.ones((1, 4, 2, 4)), jnp.ones((1, 2 * BLOCK, 2, 4))
    dense = jnp.ones((1, 1, 4, 2 * BLOCK), jnp.bool_ if name == "mask" else jnp.float32)
    spec = P(None, None, None, "kv") if strategy == "reduce_scatter" else P(None, None, "kv")
    rows = P(None, "kv")

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(rows, rows, spec), out_specs=rows, check_vma=False
    )
    def run(query, key, dense):
        return distattn.sharded_attention(
            query,
            key,
            key,
            **{name: dense},
            axis_name="kv",
            query_sharded=True,
            strategy=strategy,
            reproducible=True,
        )

    with pytest.raises(NotImplementedError, match=f"{name} of shape.*T=2 on each device.*pad"):
        run(query, key, dense)
