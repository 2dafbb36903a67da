"""What crosses between devices, counted in the compiled program; and what memory that program takes."""

import functools
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import distattn
from distattn.collectives import all_reduce as collectives_of_states
from distattn.testing import collective_bytes, collectives, lower
from tests.cases import ALL_REDUCES, KINDS, QUERY_SHARDED, mesh_of, shardings
from tests.tolerance import assert_close

HEADS, KV_HEADS, WIDTH = 4, 2, 16


def shapes(mesh, queries, keys, *, rows=None, axes="kv", heads=HEADS, dtype=jnp.float32):
    query = jax.ShapeDtypeStruct(
        (1, queries, heads, WIDTH), dtype, sharding=NamedSharding(mesh, P(None, rows))
    )
    key = jax.ShapeDtypeStruct(
        (1, keys, KV_HEADS, WIDTH), dtype, sharding=NamedSharding(mesh, P(None, axes))
    )
    return query, key, key


def hlo(f, mesh, *arguments):
    with jax.set_mesh(mesh):
        return jax.jit(f).lower(*arguments).compile().as_text()


def call(mesh, strategy, *, is_causal=True):
    def f(query, key, value):
        return distattn.dot_product_attention(
            query,
            key,
            value,
            is_causal=is_causal,
            **shardings(mesh, mesh.axis_names, query="auto"),
            strategy=strategy,
        )

    return f


def gradient(f):
    return jax.grad(lambda *x: (f(*x) ** 2).sum(), argnums=(0, 1, 2))


@pytest.mark.parametrize(
    ("strategy", "devices", "expected", "kind"),
    [
        ("butterfly", 8, {"collective-permute": 3}, "auto"),
        ("butterfly", 8, {"collective-permute": 3}, "explicit"),
        ("butterfly", 6, {"collective-permute": 4}, "auto"),
        ("butterfly", 5, {"collective-permute": 4}, "explicit"),
        ("butterfly", 2, {"collective-permute": 1}, "auto"),
        *(("psum", 8, {"all-reduce": 2}, kind) for kind in KINDS),
        *(("all_gather", 8, {"all-gather": 1}, kind) for kind in KINDS),
    ],
)
def test_forward_of_a_replicated_query(strategy, devices, expected, kind):
    mesh = mesh_of(devices, kind)
    text = hlo(call(mesh, strategy), mesh, *shapes(mesh, 4, 8 * devices * 5))
    assert collectives(text) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_backward_is_one_all_reduce_of_the_query_gradient(kind):
    mesh = mesh_of(8, kind)
    text = hlo(gradient(call(mesh, "butterfly")), mesh, *shapes(mesh, 4, 320))
    assert collectives(text) == {"collective-permute": 3, "all-reduce": 1}
    # The query's gradient in float32, nothing else.
    assert collective_bytes(text)["all-reduce"] == 4 * HEADS * WIDTH * 4


@pytest.mark.parametrize(("devices", "rounds"), [(8, 3), (6, 4), (2, 1)])
def test_where_messages_are_slow_the_query_gradient_is_summed_by_messages(
    monkeypatch, devices, rounds
):
    monkeypatch.setattr(collectives_of_states.cost, "choose_sum", lambda *_: "butterfly")
    mesh = mesh_of(devices, "auto")
    sharded = shapes(mesh, 4, 40 * devices)
    run = jax.jit(
        gradient(call(mesh, "butterfly")), out_shardings=tuple(x.sharding for x in sharded)
    )
    assert collectives(run.lower(*sharded).compile().as_text()) == {
        "collective-permute": 2 * rounds
    }
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in sharded]
    got = run(*(jax.device_put(x, s.sharding) for x, s in zip(arrays, sharded, strict=True)))
    replicas = {shard.data.tobytes() for shard in got[0].addressable_shards}
    assert len(replicas) == 1, "equal bit for bit"
    expected = gradient(functools.partial(distattn.dot_product_attention, is_causal=True))(*arrays)
    for x, y, name in zip(got, expected, ("dq", "dk", "dv"), strict=True):
        assert_close(x, np.asarray(y, np.float64), jnp.float32, 40 * devices, what=name)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("strategy", "dtype", "forward", "backward"),
    [
        # The query is gathered, then states are halved; back, all that goes by rows is gathered in one
        # message (16 bits apart from 32), and dq is scattered.
        *(
            (
                "reduce_scatter",
                dtype,
                {"all-gather": 1, "collective-permute": 3},
                [{"all-gather": gathers, "collective-permute": 3, "reduce-scatter": 1}],
            )
            for dtype, gathers in ((jnp.float32, 2), (jnp.bfloat16, 3))
        ),
        # Keys and values apart: packed, they would be copied twice. Back they are gathered again, unless
        # XLA finds that the forward pass has them still.
        (
            "gather_kv",
            jnp.float32,
            {"all-gather": 2},
            [{"all-gather": count, "reduce-scatter": 2} for count in (2, 4)],
        ),
    ],
)
def test_a_query_sharded_along_t(strategy, dtype, forward, backward, kind):
    mesh = mesh_of(8, kind)
    arguments = shapes(mesh, 64, 64, rows="kv", dtype=dtype)
    assert collectives(hlo(call(mesh, strategy), mesh, *arguments)) == forward
    assert collectives(hlo(gradient(call(mesh, strategy)), mesh, *arguments)) in backward


@pytest.mark.parametrize(
    ("devices", "is_causal"), [(2, True), (2, False), (3, True), (5, False), (8, True)]
)
def test_a_ring_makes_a_hop_less_than_there_are_devices(devices, is_causal):
    mesh = mesh_of(devices, "auto")
    arguments = shapes(mesh, 8 * devices, 8 * devices, rows="kv")
    attention = call(mesh, "ring", is_causal=is_causal)
    hops = devices - 1
    # Key and value, and their positions where these are compared.
    there = hops * (3 if is_causal else 2)
    forward = hlo(attention, mesh, *arguments)
    assert collectives(forward, executed=True) == {"collective-permute": there}
    shard = 4 * 8 * KV_HEADS * WIDTH
    sent = hops * (2 * shard + (4 * 8 if is_causal else 0))
    assert collective_bytes(forward, executed=True) == {"collective-permute": sent}
    # Back the same again, and the gradients of key and value. With two devices there is no loop, and
    # XLA may find that the forward pass has the other's keys still.
    both = collectives(hlo(gradient(attention), mesh, *arguments), executed=True)
    again = (2 * there,) if devices > 2 else (there, 2 * there)
    assert both in [{"collective-permute": count + 2 * hops} for count in again]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("strategy", "merge"),
    [
        ("butterfly", {"collective-permute": 3}),
        ("psum", {"all-reduce": 2}),
        ("all_gather", {"all-gather": 1}),
    ],
)
def test_where_states_are_merged_whole_the_rows_of_a_sharded_query_are_gathered(
    strategy, merge, kind
):
    mesh = mesh_of(8, kind)
    arguments = shapes(mesh, 64, 320, rows="kv")
    with jax.set_mesh(mesh):
        program = jax.jit(call(mesh, strategy)).lower(*arguments).compile()
    assert collectives(program.as_text()) == Counter(merge) + Counter({"all-gather": 1})
    # Every device has all rows; Explicit axes cut them again as the query is, which sends nothing.
    assert program.output_shardings.is_fully_replicated == (kind == "auto")
    back = Counter(collectives(hlo(gradient(call(mesh, strategy)), mesh, *arguments)))
    # Where rows of the result are cut, its gradient has to be gathered as the query has.
    assert back - Counter(merge) == {"all-gather": 1 if kind == "auto" else 2, "all-reduce": 1}


def loops_with_permutes(jaxpr):
    """The bodies of all loops in which something is sent, however deep."""
    for equation in jaxpr.eqns:
        for parameter in equation.params.values():
            inner = getattr(parameter, "jaxpr", parameter)
            if not hasattr(inner, "eqns"):
                continue
            yield from loops_with_permutes(inner)
            sends = any(e.primitive.name == "ppermute" for e in inner.eqns)
            if equation.primitive.name == "scan" and sends:
                yield inner


def test_what_a_ring_sends_waits_for_nothing_that_is_computed_meanwhile():
    mesh = mesh_of(8, "auto")
    arguments = shapes(mesh, 64, 64, rows="kv")
    with jax.set_mesh(mesh):
        program = jax.make_jaxpr(gradient(call(mesh, "ring")))(*arguments)
    bodies = list(loops_with_permutes(program.jaxpr))
    assert len(bodies) == 3  # forward, the first two hops back, the others
    for body in bodies:
        sent = [e.invars[0] for e in body.eqns if e.primitive.name == "ppermute"]
        assert len(sent) >= 3
        assert set(sent) <= set(body.invars)


@pytest.mark.parametrize(
    ("strategy", "forward", "backward"),
    [
        # Query, and key and value in one; and back out. With the gradient the log-sum-exp goes with out,
        # and beside the three again dout and a pair of numbers a row.
        ("ulysses", {"all-to-all": 3}, {"all-to-all": 6}),
        (
            "ulysses_gather_kv",
            {"all-to-all": 3, "all-gather": 2},
            {"all-to-all": 6, "all-gather": 2, "reduce-scatter": 2},
        ),
        (
            "ulysses_ring",
            {"all-to-all": 3, "collective-permute": 3},
            {"all-to-all": 6, "collective-permute": 5},
        ),
    ],
)
def test_heads_in_place_of_rows(strategy, forward, backward):
    mesh = jax.make_mesh((2, 2), ("host", "kv"), (KINDS["auto"],) * 2, devices=jax.devices()[:4])
    axes = ("host", "kv")
    arguments = shapes(mesh, 32, 32, rows=axes, axes=axes, heads=8)
    if strategy == "ulysses":
        mesh = mesh_of(2, "auto")
        arguments = shapes(mesh, 32, 32, rows="kv", heads=8)
    assert collectives(hlo(call(mesh, strategy), mesh, *arguments), executed=True) == forward
    both = hlo(gradient(call(mesh, strategy)), mesh, *arguments)
    assert collectives(both, executed=True) == backward


@pytest.mark.parametrize(
    ("strategy", "sizes", "sharded", "backward"),
    [
        *(
            (strategy, (4,), False, backward)
            for strategy in ALL_REDUCES
            for backward in (False, True)
        ),
        *(
            (strategy, (4,), True, backward)
            for strategy in QUERY_SHARDED
            for backward in (False, True)
        ),
        *(
            (f"ulysses_{way}", (2, 2), True, backward)
            for way in ("ring", "gather_kv")
            for backward in (False, True)
        ),
        # What comes back for its result, which is whole, is made whole by the compiler.
        ("butterfly", (4,), True, False),
    ],
)
def test_what_lower_counts_is_what_the_compiled_program_sends(strategy, sizes, sharded, backward):
    names = ("host", "kv")[-len(sizes) :]
    kinds = (KINDS["explicit"],) * len(sizes)
    mesh = jax.make_mesh(sizes, names, kinds, devices=jax.devices()[:4])
    arguments = shapes(mesh, 32, 32, rows=names if sharded else None, axes=names)
    f = functools.partial(distattn.dot_product_attention, is_causal=True, strategy=strategy)
    f = gradient(f) if backward else f
    with jax.set_mesh(mesh):
        lowered = jax.jit(f).lower(*arguments)
    # XLA takes what is gathered a second time from the first, which is no less of a message in the program.
    text = lowered.compile(compiler_options={"xla_disable_hlo_passes": "cse"}).as_text()
    sent = {
        kind: {"count": count, "bytes": collective_bytes(text, executed=True)[kind]}
        for kind, count in collectives(text, executed=True).items()
    }
    assert lower(f, *arguments, mesh=mesh, platform="cpu").collectives == sent != {}


def test_named_residuals_spare_the_second_forward_pass():
    mesh = mesh_of(3, "auto")
    arguments = shapes(mesh, 24, 24, rows="kv")
    names = ("distattn_out", "distattn_lse")
    attention = call(mesh, "ring")
    permutes_of_a_loop = 3  # key, value, positions

    def permutes(f):
        # As JAX hands it over: on a CPU, XLA finds by itself that a loop is there twice.
        with jax.set_mesh(mesh):
            text = jax.jit(gradient(f)).lower(*arguments).as_text()
        return text.count("stablehlo.collective_permute")

    policy = jax.checkpoint_policies.save_only_these_names(*names)
    once = permutes(attention)
    assert permutes(jax.checkpoint(attention, policy=policy)) == once
    assert permutes(jax.checkpoint(attention)) == once + permutes_of_a_loop


def test_bytes_of_a_round_are_those_of_the_packed_state():
    mesh = mesh_of(8, "auto")
    for keys in (320, 3200):  # independent of S
        text = hlo(call(mesh, "butterfly"), mesh, *shapes(mesh, 4, keys))
        assert collective_bytes(text) == {"collective-permute": 3 * 4 * 4 * HEADS * (WIDTH + 2)}


def test_batch_and_heads_on_other_axes_add_no_collective():
    mesh = jax.make_mesh((2, 2, 2), ("data", "heads", "kv"), (KINDS["explicit"],) * 3)
    query = jax.ShapeDtypeStruct(
        (2, 4, HEADS, WIDTH), jnp.float32, sharding=NamedSharding(mesh, P("data", None, "heads"))
    )
    key = jax.ShapeDtypeStruct(
        (2, 64, KV_HEADS, WIDTH),
        jnp.float32,
        sharding=NamedSharding(mesh, P("data", "kv", "heads")),
    )
    f = functools.partial(distattn.dot_product_attention, strategy="butterfly")
    assert collectives(hlo(f, mesh, query, key, key)) == {"collective-permute": 1}
    assert collectives(hlo(gradient(f), mesh, query, key, key)) == {
        "collective-permute": 1,
        "all-reduce": 1,
    }


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("reduce_scatter", {"all-gather": 2, "collective-permute": 1, "reduce-scatter": 1}),
        ("gather_kv", {"all-gather": 2, "reduce-scatter": 2}),
        # With two devices, the forward pass has the other's keys.
        ("ring", {"collective-permute": 4}),
        ("ulysses", {"all-to-all": 6}),
    ],
)
def test_a_batch_that_the_compiler_would_shard_unseen(strategy, expected):
    mesh = jax.make_mesh((2, 2, 2), ("data", "heads", "kv"), (KINDS["auto"],) * 3)
    spec = NamedSharding(mesh, P("data", "kv", "heads"))
    query, key = (
        jax.ShapeDtypeStruct((2, 64, heads, WIDTH), jnp.float32, sharding=spec) for heads in (8, 2)
    )
    f = functools.partial(
        distattn.dot_product_attention,
        **shardings(mesh, "kv", query="kv", batch="data", heads="heads"),
        strategy=strategy,
    )
    text = hlo(gradient(f), mesh, query, key, key)
    assert collectives(text, executed=True) == expected


def test_a_tuple_of_axes_goes_level_by_level():
    mesh = jax.make_mesh((2, 4), ("host", "chip"), (KINDS["auto"],) * 2)
    spec = NamedSharding(mesh, P(None, ("host", "chip")))
    query = jax.ShapeDtypeStruct((1, 4, HEADS, WIDTH), jnp.float32)
    key = jax.ShapeDtypeStruct((1, 64, KV_HEADS, WIDTH), jnp.float32, sharding=spec)
    f = functools.partial(
        distattn.dot_product_attention,
        **shardings(mesh, ("host", "chip"), query="auto"),
        strategy="butterfly",
    )
    assert collectives(hlo(f, mesh, query, key, key)) == {"collective-permute": 3}


@pytest.mark.parametrize("queries", [1, 64])
def test_memory_does_not_grow_with_the_keys(queries):
    def temp_bytes(keys, dtype):
        query = jax.ShapeDtypeStruct((1, queries, HEADS, WIDTH), dtype)
        key = jax.ShapeDtypeStruct((1, keys, KV_HEADS, WIDTH), dtype)
        f = functools.partial(distattn.dot_product_attention, is_causal=True)
        compiled = jax.jit(f).lower(query, key, key).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    for dtype in (jnp.float32, jnp.bfloat16):
        # Beyond the blocks, only the default positions: 4 bytes a key, of which XLA may hold two.
        grown = temp_bytes(2**16, dtype) - temp_bytes(2**14, dtype)
        assert grown <= 2 * 4 * (2**16 - 2**14)


def test_no_quadratic_memory_with_a_gradient():
    length = 4096
    x = jax.ShapeDtypeStruct((1, length, 1, 64), jnp.float32)
    f = gradient(functools.partial(distattn.dot_product_attention, is_causal=True))
    temp = jax.jit(f).lower(x, x, x).compile().memory_analysis().temp_size_in_bytes
    assert temp < length * length * 4 / 4  # a quarter of one [T, S] of float32


def test_a_whole_pod_lowers_without_devices():
    mesh = jax.sharding.AbstractMesh((4096,), ("kv",), (KINDS["auto"],))
    query = jax.ShapeDtypeStruct((1, 1, HEADS, WIDTH), jnp.float32)
    key = jax.ShapeDtypeStruct((1, 4096 * 8, KV_HEADS, WIDTH), jnp.float32)
    f = functools.partial(
        distattn.dot_product_attention, **shardings(mesh, "kv", query="auto"), strategy="butterfly"
    )
    text = jax.jit(f).trace(query, key, key).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("stablehlo.collective_permute") == np.log2(4096)
