"""The TPU kernels: by Pallas' interpreter against the oracle, and compiled for TPUs that are not here.

On one device the interpreter is that of the TPU, whose memory is NaN until it is written; on several it is
the plain one, since in the other their callbacks would wait for each other (design section 13).
"""

import dataclasses
import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

import distattn
from distattn import kernels
from distattn.kernels import tpu_blocks, tpu_layout
from distattn.mask import Mask
from distattn.testing import compile_for, lower
from tests.cases import CASES, Case, as_float32, check, mesh_of
from tests.kernel_calls import (
    DTYPES,
    TARGETS,
    WIDTHS,
    arrays_like_keys,
    compiled,
    key_bytes,
    launches,
)
from tests.tolerance import assert_close

attention = functools.partial(
    distattn.dot_product_attention, return_residual=True, implementation="pallas_tpu"
)


def on_a_tpu():
    return kernels.interpreted(pltpu.InterpretParams())


# ------------------------------------------------------------------------------------- against the oracle

# Several blocks of rows and of keys, the last ones not full, and all that masks can say.
EVERYTHING = Case(
    2,
    150,
    300,
    permuted=True,
    empty_slots=40,
    segments=2,
    lengths=True,
    query_lengths=True,
    value_width=12,
    options=(
        ("is_causal", True),
        ("local_window_size", (200, 3)),
        ("logits_soft_cap", 3.0),
        ("scale", 0.5),
    ),
)
# Keys and values lie in three orders, by their width and number of heads; see `tpu_layout.Order`.
WIDE = dataclasses.replace(CASES["causal_permuted"], keys=140, width=128, value_width=128)
IN_BLOCKS = {
    "everything": EVERYTHING,
    "causal": Case(1, 300, 300, options=(("is_causal", True),)),
    "documents": Case(1, 300, 300, layout="random", documents=6),
    "no mask": Case(1, 130, 256, heads=3, kv_heads=3),
    "heads beside keys": dataclasses.replace(WIDE, queries=130, keys=260),
}
MORE = {
    "heads beside keys": WIDE,
    "heads before keys": dataclasses.replace(WIDE, heads=6, kv_heads=3),
    "values in another order": dataclasses.replace(WIDE, value_width=72),
    "16 heads of keys": dataclasses.replace(WIDE, batch=1, heads=16, kv_heads=16),
}
COVERED = {
    "plain",
    "causal",
    "one_query",
    "window_left",
    "window_right",
    "lengths_permuted",
}  # by the others
DONE = MORE | {
    name: x
    for name, x in CASES.items()
    if x.bias is None and x.mask is None and name not in COVERED
}


@pytest.mark.parametrize("name", DONE)
def test_cases(name):
    with on_a_tpu():
        check(DONE[name], attention, what=f"pallas_tpu {name}")


def in_blocks(**arguments):
    """Of 64 queries and 128 keys, so that there are several of each."""
    state = distattn.partial_attention(
        **arguments, implementation="pallas_tpu", block_sizes=(64, 128)
    )
    out, lse = distattn.finalize(state)
    return out.astype(arguments["query"].dtype), lse


@pytest.mark.parametrize("name", IN_BLOCKS)
def test_several_blocks(name):
    with on_a_tpu():
        check(IN_BLOCKS[name], in_blocks, what=f"pallas_tpu in blocks, {name}")


# As in test_attention.py: each product of the gradient starts from an output that was rounded once.
HALF_FACTOR = 2.0


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("everything", jnp.bfloat16),
        ("everything", jnp.float16),
        ("heads beside keys", jnp.bfloat16),
    ],
)
def test_half_precision(name, dtype):
    with on_a_tpu():
        check(IN_BLOCKS[name], in_blocks, dtype=dtype, what=f"{name}", factor=HALF_FACTOR)


@pytest.mark.parametrize("combine", ["butterfly", "ring"])
def test_over_a_mesh(combine):
    sharded = {"query_axis_name": "kv"} if combine == "ring" else {}
    case = dataclasses.replace(CASES["causal_permuted"], queries=8)
    where = {"mesh": mesh_of(4, "auto"), "axis_name": "kv", "combine": combine, **sharded}
    with kernels.interpreted():
        check(case, functools.partial(attention, **where), what=f"pallas_tpu {combine}")


def inside(*, mesh=None, check_vma, is_causal, **arrays):
    """The call in a shard_map of one's own."""
    along = P(None, "kv")
    specs = {"query": P(), "query_positions": P(), "key_positions": along}
    specs |= {"key": along, "value": along}
    run = functools.partial(
        distattn.sharded_attention,
        axis_name="kv",
        is_causal=is_causal,
        return_residual=True,
        implementation="pallas_tpu",
    )
    body = jax.shard_map(
        lambda arrays: run(**arrays),
        mesh=mesh,
        in_specs=(specs,),
        out_specs=P(),
        check_vma=check_vma,
    )
    return body(arrays)


def test_inside_a_shard_map():
    run = functools.partial(inside, mesh=mesh_of(4, "auto"), check_vma=False)
    with kernels.interpreted():
        check(CASES["causal_permuted"], run, what="pallas_tpu inside")


def test_a_cache_of_several_layers():
    rng = np.random.default_rng(0)
    new = jnp.asarray(rng.normal(size=(2, 3, 1, 9, 2, 8)), jnp.float32)  # k or v, layer, B, S, K, H
    cache = distattn.KVCache.create(
        batch=1, capacity=16, num_kv_heads=2, head_dim=8, layers=3, dtype=jnp.float32
    )
    cache = cache.append(*new)
    query = jnp.asarray(rng.normal(size=(1, 2, 4, 8)), jnp.float32)
    for layer in (0, 2):
        want = cache.attend(query, is_causal=True, layer=layer)
        with on_a_tpu():
            got = cache.attend(query, is_causal=True, layer=layer, implementation="pallas_tpu")
        assert_close(got, want, jnp.float32, 9)


# ------------------------------------------------------------------------------------------- what is masked


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("garbage", [np.nan, np.inf, 3e38])
def test_nothing_leaks_from_slots_that_some_rows_may_not_see(garbage):
    # The last key is garbage, and the last query sees it.
    keys = 12
    query, key, value = random(1, keys, 4, 8), random(1, keys, 2, 8, seed=1), random(1, keys, 2, 8)
    dirty = [x.copy() for x in (query, key, value)]
    for x in dirty[1:]:
        x[:, -1] = garbage

    def loss(query, key, value):
        out, lse = attention(query, key, value, is_causal=True)
        return (out[:, :-1] ** 2).sum() + lse[:, :-1].sum(), (out[:, :-1], lse[:, :-1])

    run = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))
    with on_a_tpu():
        grads, results = run(*dirty)
        clean_grads, clean = run(query, key, value)
    for x, y in zip(results, clean, strict=True):
        assert_close(x, np.asarray(y), jnp.float32, keys)
    # Keys and values have the last row's part in their gradients, which is not finite.
    assert_close(grads[0][:, :-1], np.asarray(clean_grads[0][:, :-1]), jnp.float32, 2 * keys)


def test_infinite_values_that_are_attended_show():
    query, key, value = random(1, 2, 2, 4), random(1, 4, 2, 4, seed=1), random(1, 4, 2, 4, seed=2)
    value[:, 1, 0, 0], value[:, 1, 0, 1], value[:, 1, 0, 2] = np.inf, -np.inf, np.nan
    with on_a_tpu():
        out = np.asarray(attention(query, key, value)[0])
    np.testing.assert_array_equal(out[0, :, 0, 0], np.inf)
    np.testing.assert_array_equal(out[0, :, 0, 1], -np.inf)
    assert np.isnan(out[0, :, 0, 2]).all()
    assert np.isfinite(out[0, :, 0, 3]).all()
    assert np.isfinite(out[0, :, 1]).all()


def test_rows_without_keys():
    query, key = random(1, 5, 2, 8), np.full((1, 24, 2, 8), np.nan, np.float32)

    def loss(query, key, value):
        out, lse = attention(query, key, value, key_positions=np.full(24, -1, np.int32))
        return out.sum() + lse.sum(), (out, lse)

    with on_a_tpu():
        grads, (out, lse) = jax.grad(loss, argnums=(0, 1, 2), has_aux=True)(query, key, key)
    np.testing.assert_array_equal(out, 0)
    np.testing.assert_array_equal(lse, -np.inf)
    for x in grads:
        np.testing.assert_array_equal(x, 0)


def test_windows_at_the_ends_of_int32_do_not_wrap():
    big = np.iinfo(np.int32).max
    query, key = random(1, 2, 1, 4), random(1, 3, 1, 4, seed=1)
    positions = {
        "query_positions": np.array([0, big], np.int32),
        "key_positions": np.array([0, 5, big], np.int32),
    }
    for window in ((big, big), (big, 0), (0, big)):
        with on_a_tpu():
            got = attention(query, key, key, **positions, local_window_size=window)
        want = distattn.dot_product_attention(
            query, key, key, **positions, local_window_size=window, return_residual=True
        )
        for x, y in zip(got, want, strict=True):
            assert_close(x, np.asarray(y), jnp.float32, 3)


def test_states_of_parts_merge():
    case = CASES["causal_permuted"]
    arguments = as_float32(case.arguments())
    by_key = ("key", "value", "key_positions")
    with on_a_tpu():
        parts = [
            distattn.partial_attention(
                **{name: x[:, half] if name in by_key else x for name, x in arguments.items()},
                implementation="pallas_tpu",
            )
            for half in (slice(0, 10), slice(10, None))
        ]
    out, lse = distattn.finalize(distattn.merge(*parts))
    want = distattn.dot_product_attention(**arguments, return_residual=True)
    for x, y in zip((out, lse), want, strict=True):
        assert_close(x, np.asarray(y), jnp.float32, case.keys)


def test_blocks_that_no_row_can_see_are_not_visited():
    cut = types.SimpleNamespace(
        rows=256, groups=2, queries=512, keys=500, key_block=128, row_blocks=4, key_blocks=4
    )
    order = np.random.default_rng(0).permutation(4)
    keys = np.concatenate([np.arange(128) + 128 * block for block in order])[:500]
    keys = np.where(keys // 128 == 1, -1, keys)  # a block of empty slots
    mask = Mask(
        query_positions=jnp.arange(512, dtype=jnp.int32)[None],
        key_positions=jnp.asarray(keys, jnp.int32)[None],
        is_causal=True,
    )
    by_rows, by_keys = tpu_layout.tables(mask, cut)
    blocks = [block for block in range(4) if order[block] != 1]
    needed = {row: [x for x in blocks if order[x] <= row] for row in range(4)}
    for table, wanted in (
        (by_rows, needed),
        (by_keys, {x: [row for row in range(4) if x in needed[row]] for x in range(4)}),
    ):
        counts, found = np.asarray(table.counts), np.asarray(table.order).reshape(4, 4)
        for own, others in wanted.items():
            assert sorted(found[own, : counts[own]]) == others


# --------------------------------------------------------------------------------------- when it is taken

REFUSED = {
    "bias": {"bias": np.zeros((1, 1, 1, 6), np.float32)},
    "mask": {"mask": np.ones((1, 1, 1, 6), bool)},
    "precision": {"precision": "tensorfloat32"},
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_built_is_named(name):
    query, key = random(1, 2, 2, 4), random(1, 6, 2, 4)
    with on_a_tpu(), pytest.raises(NotImplementedError, match=f"pallas_tpu.*: {name} is.*pass imp"):
        attention(query, key, key, **REFUSED[name])


def test_elsewhere_it_is_refused():
    query, key = random(1, 2, 2, 4), random(1, 6, 2, 4)
    for call in (attention, distattn.partial_attention):
        with pytest.raises(NotImplementedError, match="kernel for TPUs, and the platform is 'cpu'"):
            call(query, key, key, implementation="pallas_tpu")
    with on_a_tpu(), pytest.raises(NotImplementedError, match="pallas_tpu.*reproducible=True"):
        attention(query, key, key, reproducible=True)


def kernels_of(platform, dtype=jnp.bfloat16, **options):
    """How many kernels a call has that names none, lowered for a platform."""
    struct, along = jax.ShapeDtypeStruct, P(None, "kv")
    arrays = [struct((1, n, heads, 64), dtype) for n, heads in ((1, 8), (512, 2), (512, 2))]
    f = functools.partial(distattn.dot_product_attention, combine="butterfly", **options)
    specs = (P(), along, along)
    return lower(f, *arrays, mesh={"kv": 4}, platform=platform, specs=specs).hlo.count(
        'custom_call_target="tpu_custom_call"'
    )


def test_none_takes_it_on_a_tpu_where_it_serves():
    assert kernels_of("tpu") == 1
    assert kernels_of("tpu", is_causal=True, query_positions=np.array([9], np.int32)) == 1
    assert kernels_of("cpu") == 0
    assert kernels_of("tpu", implementation="blocked") == 0
    assert kernels_of("tpu", bias=np.zeros((1, 1, 1, 512), np.float32)) == 0
    assert kernels_of("tpu", precision="tensorfloat32") == 0


# ------------------------------------------------------------------------------------------------- compiled

# Every target, width and dtype; all of them together are in scripts/bench/kernels.py.
THINNED = [
    (TARGETS[1:][n % 4], ("decode", "prefill", "decode_3_heads")[n % 3], width, dtype)
    for n, (width, dtype) in enumerate(list(itertools.product(WIDTHS, DTYPES))[::2])
]
GRADIENTS = [
    ("v5e:2x2", 128, jnp.bfloat16),
    ("tpu7x:2x2x1", 64, jnp.bfloat16),
]


def check_compiled(report, call, width, dtype, count):
    assert launches(report) == count
    assert arrays_like_keys(report, call, width) == []
    assert report.temp_bytes < key_bytes(call, width, dtype) / 2


@pytest.mark.parametrize(("target", "call", "width", "dtype"), THINNED)
def test_compiled_for(target, call, width, dtype):
    check_compiled(compiled(target, call, width, dtype), call, width, dtype, 1)


@pytest.mark.parametrize(("target", "width", "dtype"), GRADIENTS)
def test_gradients_compiled_for(target, width, dtype):
    report = compiled(target, "gradient", width, dtype)
    check_compiled(report, "gradient", width, dtype, 3)


# Pallas' interpreter does not know the types of check_vma=True; the compiler does.
@pytest.mark.parametrize("check_vma", [True, False])
def test_inside_a_shard_map_compiled(check_vma):
    struct, along = jax.ShapeDtypeStruct, P(None, "kv")
    names = ("query", "key", "value", "query_positions", "key_positions")
    shapes = ((1, 8, 8, 64), (1, 4096, 2, 64), (1, 4096, 2, 64), (1, 8), (1, 4096))
    arrays = [
        struct(shape, jnp.int32 if "positions" in name else jnp.bfloat16)
        for name, shape in zip(names, shapes, strict=True)
    ]

    def loss(*arrays):
        named = dict(zip(names, arrays, strict=True))
        out, lse = inside(**named, check_vma=check_vma, is_causal=True)
        return out.astype(jnp.float32).sum() + lse.sum()

    report = compile_for(
        jax.grad(loss, argnums=(0, 1, 2)),
        *arrays,
        topology="v5e:2x2",
        mesh={"kv": 4},
        specs=(P(), along, along, P(), along),
    )
    assert launches(report) == 3


def test_keys_wider_than_values_compiled():
    report = compiled("v6e:2x2", "prefill", 192, jnp.bfloat16, value_width=128)
    check_compiled(report, "prefill", 128, jnp.bfloat16, 1)


# What JAX calls the devices.
KINDS_OF = {
    "v4": "TPU v4",
    "v5e": "TPU v5 lite",
    "v5p": "TPU v5",
    "v6e": "TPU v6 lite",
    "tpu7x": "TPU7x",
}


@pytest.mark.parametrize("target", tpu_blocks.TARGETS, ids=lambda x: x.name)
def test_blocks_fit(target):
    assert tpu_blocks.target_of(KINDS_OF[target.name]) == target
    for rows, groups, heads, width, itemsize, backward in itertools.product(
        (1, 96, 100_000),
        (1, 3, 8),
        (1, 3) if target.name == "v4" else (1, 3, 8),
        WIDTHS,
        (2, 4),
        (False, True),
    ):
        shape = tpu_blocks.Shape(
            rows * groups, groups, 100_000, heads, width, width, itemsize, backward
        )
        size = tpu_blocks.sizes(shape, target)
        assert tpu_blocks.vmem_bytes(shape, *size) <= target.budget_bytes, shape
        assert size[1] % 128 == 0
        assert size[0] % 128 == 0 or size[0] >= rows * groups
