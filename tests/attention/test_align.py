"""Keys and values that arrive separately: every value finds its key, or is counted."""

import functools
from collections import Counter
from contextlib import nullcontext

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import distattn
from distattn.collectives.pair_exchange import room_for_pair
from distattn.layouts import align, align_shards
from distattn.testing import collective_bytes, collectives, reference
from tests.cases import KINDS, mesh_of, shardings
from tests.tolerance import assert_close

DEVICES = (1, 2, 3, 4, 8)
BATCH, HEADS, WIDTH = 2, 2, 3

# Half the time to compile, and the same HLO.
jit = functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
every_kind = pytest.mark.parametrize("kind", KINDS)
every_count = pytest.mark.parametrize("devices", DEVICES)


def expected(value, value_positions, key_positions):
    """The pairs by dictionary: aligned values, kept key positions, and how many have no partner."""
    batch = value.shape[0]
    one_row = max(np.ndim(x) for x in (value_positions, key_positions)) == 1
    rows = [np.broadcast_to(x, (batch, x.shape[-1])) for x in (value_positions, key_positions)]
    aligned = np.zeros((batch, rows[1].shape[1], *value.shape[2:]), value.dtype)
    kept = np.full(rows[1].shape, -1, np.int32)
    unmatched = np.zeros(batch, np.int32)
    for b, (values, keys) in enumerate(zip(*rows, strict=True)):
        counts = [Counter(x[x >= 0].tolist()) for x in (values, keys)]
        pairs = {p for p in counts[0] if counts[0][p] == counts[1][p] == 1}
        slot_of = {p: j for j, p in enumerate(values.tolist()) if p in pairs}
        for i, p in enumerate(keys.tolist()):
            if p in pairs:
                aligned[b, i], kept[b, i] = value[b, slot_of[p]], p
        unmatched[b] = sum(counts[0].values()) + sum(counts[1].values()) - 2 * len(pairs)
    return aligned, kept[0] if one_row else kept, unmatched


def assert_aligned(actual, value, value_positions, key_positions):
    for got, want in zip(actual, expected(value, value_positions, key_positions), strict=True):
        np.testing.assert_array_equal(np.asarray(got), want)
        assert got.dtype == want.dtype


def random_value(slots, seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(BATCH, slots, HEADS, WIDTH)).astype(np.float32)


def orders(slots, devices, rows, seed=0):
    """Pairs of (value, key) positions, from all values staying where they are to all moving."""
    rng = np.random.default_rng(seed)
    index = np.arange(slots, dtype=np.int32)

    def shuffled():
        return np.stack([rng.permutation(index) for _ in range(rows)])[:: 1 if rows > 1 else rows]

    def same(x):
        return np.stack([x] * rows)

    pairs = [
        (shuffled(), shuffled()),
        (same(index), same(index)),
        (same(index), same(np.roll(index, slots // devices))),  # all to one other device
        (same(index), same(index[::-1])),
        (shuffled(), same(index.reshape(devices, -1).T.reshape(-1))),
    ]
    return [tuple(x[0] if rows == 1 else x for x in pair) for pair in pairs]


def faulty(slots, rows, seed=0):
    """Positions with empty slots, duplicates on both sides, and others that one side lacks."""
    rng = np.random.default_rng(seed)
    shape = (slots,) if rows == 1 else (rows, slots)
    return tuple(rng.integers(-4, slots, shape).astype(np.int32) for _ in range(2))


@every_count
@pytest.mark.parametrize("rows", [1, BATCH])
def test_each_value_comes_to_its_key(devices, rows):
    slots = 480
    # Each number of devices, and each form of the positions, on both kinds of axes.
    kind = list(KINDS)[(DEVICES.index(devices) + (rows == 1)) % 2]
    share = slots // devices
    # So that the orders that send a share to one device take more than one round.
    assert devices == 1 or room_for_pair(share, devices) < share
    run = jit(
        functools.partial(align, sharding=NamedSharding(mesh_of(devices, kind), P(None, "kv")))
    )
    value = random_value(slots)
    for positions in orders(slots, devices, rows):
        assert_aligned(run(value, *positions), value, *positions)
    for seed in range(3):
        positions = faulty(slots, rows, seed)
        assert_aligned(run(value, *positions), value, *positions)


@every_kind
def test_outside_jit(kind):
    mesh = mesh_of(4, kind)
    value = random_value(16)
    for positions in orders(16, 4, 1):
        assert_aligned(
            align(value, *positions, sharding=NamedSharding(mesh, P(None, "kv"))), value, *positions
        )


@pytest.mark.parametrize("devices", [1, 4])
def test_more_slots_than_pairs_on_either_side(devices):
    rng = np.random.default_rng(0)
    values, keys = (np.full(slots, -1, np.int32) for slots in (24, 40))
    for x in (values, keys):
        x[rng.choice(x.size, 20, replace=False)] = 7 * rng.permutation(20)
    value = random_value(24)
    aligned = align(
        value, values, keys, sharding=NamedSharding(mesh_of(devices, "auto"), P(None, "kv"))
    )
    assert_aligned(aligned, value, values, keys)
    assert not aligned[2].any()
    back = align(
        np.asarray(aligned[0]),
        keys,
        values,
        sharding=NamedSharding(mesh_of(devices, "auto"), P(None, "kv")),
    )
    np.testing.assert_array_equal(back[0], np.where((values >= 0)[:, None, None], value, 0))


@pytest.mark.parametrize(("value_rows", "key_rows"), [(1, BATCH), (BATCH, 1)])
@every_kind
def test_one_side_per_row(kind, value_rows, key_rows):
    rng = np.random.default_rng(0)
    positions = [
        rng.permutation(16).astype(np.int32)
        if rows == 1
        else np.stack([rng.permutation(16) for _ in range(rows)]).astype(np.int32)
        for rows in (value_rows, key_rows)
    ]
    value = random_value(16)
    mesh = mesh_of(4, kind)
    assert_aligned(
        align(value, *positions, sharding=NamedSharding(mesh, P(None, "kv"))), value, *positions
    )


@hypothesis.given(st.permutations(range(16)), st.permutations(range(16)))
def test_the_order_of_the_values_does_not_matter(first, second):
    value = random_value(16)
    keys = np.arange(16, dtype=np.int32)[::-1]
    results = [
        _align_on_four(value[:, order], np.asarray(order, np.int32), keys)[0]
        for order in (first, second)
    ]
    np.testing.assert_array_equal(*results)
    np.testing.assert_array_equal(results[0], value[:, ::-1])


@functools.cache
def _four():
    return jit(functools.partial(align, sharding=NamedSharding(mesh_of(4, "auto"), P(None, "kv"))))


def _align_on_four(*arrays):
    return _four()(*arrays)


@every_kind
@pytest.mark.parametrize("devices", [1, 3, 8])
def test_gradient_goes_back_the_same_way(devices, kind):
    slots = 240
    mesh = mesh_of(devices, kind)
    value, weight = random_value(slots), random_value(slots, seed=1)

    def loss(value, *positions):
        return jnp.sum(
            align(value, *positions, sharding=NamedSharding(mesh, P(None, "kv")))[0] * weight
        )

    with jax.set_mesh(mesh):
        gradient = jit(jax.grad(loss))
        for positions in (*orders(slots, devices, BATCH)[:3], faulty(slots, BATCH)):
            returned, _, _ = expected(weight, *positions[::-1])
            np.testing.assert_array_equal(gradient(value, *positions), returned)


def test_gradient_of_the_gradient():
    mesh = mesh_of(4, "auto")
    value, weight = random_value(16), random_value(16, seed=1)
    positions = orders(16, 4, 1)[0]

    def cubes(value):
        return jnp.sum(
            align(value, *positions, sharding=NamedSharding(mesh, P(None, "kv")))[0] ** 3 * weight
        )

    second = jit(jax.grad(lambda value: jnp.sum(jax.grad(cubes)(value))))(value)
    want = 6 * value * expected(weight, *positions[::-1])[0]
    np.testing.assert_allclose(second, want, rtol=0, atol=1e-4)


@every_kind
def test_gradient_outside_jit(kind):
    mesh = mesh_of(4, kind)
    positions = orders(16, 4, 1)[0]
    value, weight = random_value(16), random_value(16, seed=1)
    with jax.set_mesh(mesh):
        gradient = jax.grad(
            lambda value: jnp.sum(
                align(value, *positions, sharding=NamedSharding(mesh, P(None, "kv")))[0] * weight
            )
        )(jnp.asarray(value))
    np.testing.assert_array_equal(gradient, expected(weight, *positions[::-1])[0])


@pytest.mark.parametrize(
    ("devices", "rows", "check_vma"),
    [
        (1, 1, True),
        (1, BATCH, False),
        (3, 1, False),
        (3, BATCH, True),
        (8, 1, True),
        (8, BATCH, False),
        (8, BATCH, True),
    ],
)
def test_inside_a_shard_map(devices, rows, check_vma):
    slots = 240
    index = P("kv") if rows == 1 else P(None, "kv")
    run = jax.shard_map(
        functools.partial(align_shards, axis_name="kv"),
        mesh=mesh_of(devices, "auto"),
        in_specs=(P(None, "kv"), index, index),
        out_specs=(P(None, "kv"), index, P()),
        check_vma=check_vma,
    )
    value, weight = random_value(slots), random_value(slots, seed=1)

    def both(value, *positions):
        result, pull = jax.vjp(lambda value: run(value, *positions)[0], value)
        return run(value, *positions), result, pull(weight)[0]

    both = jit(both)
    for positions in (*orders(slots, devices, rows)[:3], faulty(slots, rows)):
        triple, aligned, gradient = both(value, *positions)
        assert_aligned(triple, value, *positions)
        np.testing.assert_array_equal(aligned, triple[0])
        np.testing.assert_array_equal(gradient, expected(weight, *positions[::-1])[0])


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("axis_name", [("a", "b"), ("b", "a")])
def test_inside_a_shard_map_over_three_axes(axis_name, check_vma):
    """S over two axes in either order, heads over a third, of which the positions know nothing."""
    mesh = jax.make_mesh((2, 2, 2), ("a", "h", "b"), (KINDS["auto"],) * 3)
    value, weight = random_value(16), random_value(16, seed=1)
    spec = P(None, axis_name, "h")
    run = jax.shard_map(
        functools.partial(align_shards, axis_name=axis_name),
        mesh=mesh,
        in_specs=(spec, P(axis_name), P(axis_name)),
        out_specs=(spec, P(axis_name), P()),
        check_vma=check_vma,
    )
    gradient = jit(jax.grad(lambda value, *x: jnp.sum(run(value, *x)[0] * weight)))
    forward = jit(run)
    for positions in orders(16, 4, 1)[:3]:
        assert_aligned(forward(value, *positions), value, *positions)
        returned = expected(weight, *positions[::-1])[0]
        np.testing.assert_array_equal(gradient(value, *positions), returned)


@pytest.mark.parametrize("check_vma", [True, False])
def test_values_that_are_replicated_where_positions_vary(check_vma):
    """Then the gradient is the sum of what comes back from all replicas."""
    mesh = jax.make_mesh((2, 4), ("r", "kv"), (KINDS["auto"],) * 2)
    value = random_value(16)
    weight = np.stack([random_value(16, seed=seed) for seed in (1, 2)])
    first, second = (x[0] for x in orders(16, 4, 1)[:2])
    values, keys = (np.stack(pair) for pair in ((first, second), (second, first)))

    def body(value, values, keys):
        return align_shards(value, values[0], keys[0], axis_name="kv")[0][None]

    run = jax.shard_map(
        body,
        mesh=mesh,
        in_specs=(P(None, "kv"), P("r", "kv"), P("r", "kv")),
        out_specs=P("r", None, "kv"),
        check_vma=check_vma,
    )
    gradient = jit(jax.grad(lambda value: jnp.sum(run(value, values, keys) * weight)))(value)
    want = sum(expected(w, k, v)[0] for w, v, k in zip(weight, values, keys, strict=True))
    np.testing.assert_allclose(gradient, want, rtol=0, atol=1e-6)


def mesh_with_batch_and_heads(kind):
    return jax.make_mesh((2, 2, 2), ("b", "kv", "h"), (KINDS[kind],) * 3)


@every_kind
@pytest.mark.parametrize("under_jit", [True, False])
@pytest.mark.parametrize("said", [True, False])
def test_other_axes_of_the_mesh_pass_through(kind, under_jit, said):
    """Layouts are read from the arrays where they can be: not from a tracer under Auto axes."""
    mesh = mesh_with_batch_and_heads(kind)
    spec = P("b", "kv", "h")
    value = random_value(16)
    run = functools.partial(
        align, **({"sharding": NamedSharding(mesh, P("b", "kv", "h"))} if said else {})
    )
    run = jit(run) if under_jit else run
    unread = under_jit and kind == "auto" and not said
    left = pytest.warns(UserWarning, match="pass sharding") if unread else nullcontext()
    with left:
        for positions in (*orders(16, 2, BATCH)[:3], *orders(16, 2, 1)[:1]):
            placed = jax.device_put(value, NamedSharding(mesh, spec))
            index = NamedSharding(mesh, P("b", "kv") if positions[0].ndim == 2 else P("kv"))
            aligned = run(placed, *(jax.device_put(x, index) for x in positions))
            assert_aligned(aligned, value, *positions)
            if not unread:
                assert aligned[0].sharding.is_equivalent_to(placed.sharding, 4)


@every_kind
def test_groups_of_devices_take_rounds_of_their_own(kind):
    """Rows of the batch on different devices: one stays, one takes one round, one takes several."""
    mesh = jax.make_mesh((2, 4), ("b", "kv"), (KINDS[kind],) * 2)
    value = np.concatenate([random_value(480, seed) for seed in range(2)])
    pairs = orders(480, 4, 1)
    # In pairs, since both rows of a group share its rounds.
    positions = [np.stack([pairs[i][side] for i in (1, 1, 0, 2)]) for side in (0, 1)]
    placed = [jax.device_put(x, NamedSharding(mesh, P("b", "kv"))) for x in (value, *positions)]
    run = jax.jit(functools.partial(align, sharding=NamedSharding(mesh, P(None, "kv"))))
    assert_aligned(run(*placed), value, *positions)


@every_kind
@pytest.mark.parametrize("axis_name", [("x", "y"), ("y", "x")])
def test_a_tuple_of_axes_in_either_order(kind, axis_name):
    mesh = jax.make_mesh((2, 4), ("x", "y"), (KINDS[kind],) * 2)
    value = random_value(24)
    run = jit(functools.partial(align, sharding=NamedSharding(mesh, P(None, axis_name))))
    for positions in orders(24, 8, 1):
        aligned = run(value, *positions)
        assert_aligned(aligned, value, *positions)
        assert aligned[0].sharding.spec[1] == axis_name


def compiled(devices, slots, *, gradient=False, batch=BATCH, width=WIDTH):
    mesh = mesh_of(devices, "auto")

    def run(value, *positions):
        def forward(value):
            return align(value, *positions, sharding=NamedSharding(mesh, P(None, "kv")))[0]

        # A linear map: its transpose does not need the forward pass.
        return jax.vjp(forward, value)[1](value) if gradient else forward(value)

    value = jax.ShapeDtypeStruct(
        (batch, slots, HEADS, width), jnp.float32, sharding=NamedSharding(mesh, P(None, "kv"))
    )
    index = jax.ShapeDtypeStruct((slots,), jnp.int32, sharding=NamedSharding(mesh, P("kv")))
    return jax.jit(run).lower(value, index, index).compile()


@pytest.mark.parametrize("gradient", [False, True])
def test_one_exchange_and_one_message_a_hop(gradient):
    slots, devices = 1 << 14, 8
    hlo = compiled(devices, slots, gradient=gradient).as_text()
    # The permute is that of the positions. The all-reduce is the number of rounds; who looks at
    # `unmatched` adds another one.
    assert collectives(hlo) == Counter({"all-to-all": 1, "collective-permute": 1, "all-reduce": 1})
    sent = collective_bytes(hlo)
    share = 4 * slots // devices
    assert sent["all-to-all"] < 1.5 * share * BATCH * HEADS * WIDTH
    # Positions of keys and of values, each with an index.
    assert sent["collective-permute"] == 2 * 2 * share


@pytest.mark.parametrize("devices", [None, 1])
def test_nothing_is_sent_where_there_is_one_device(devices):
    where = (
        {} if devices is None else {"sharding": NamedSharding(mesh_of(1, "auto"), P(None, "kv"))}
    )
    value, positions = random_value(12), orders(12, 3, 1)[0]
    run = jit(functools.partial(align, **where))
    assert not collectives(run.lower(value, *positions).compile().as_text())
    assert_aligned(run(value, *positions), value, *positions)


@pytest.mark.parametrize("gradient", [False, True])
def test_memory_is_a_share(gradient):
    slots = 1 << 16
    temp = {
        devices: compiled(devices, slots, gradient=gradient, width=16)
        .memory_analysis()
        .temp_size_in_bytes
        for devices in (2, 8)
    }
    share = 4 * slots * BATCH * HEADS * 16 // 8
    assert temp[8] < temp[2] / 3
    # What leaves, what arrives, the result, and integers of log n bits.
    assert temp[8] < 5 * share


@pytest.mark.parametrize(
    ("slots", "devices"), [(64, 8), (1 << 10, 8), (1 << 12, 64), (1 << 16, 16)]
)
def test_a_random_order_takes_one_round(slots, devices):
    """One round has room for it; and the room is about a share, not all."""
    share = slots // devices
    room = room_for_pair(share, devices)
    rng = np.random.default_rng(0)
    for _ in range(20):
        destination = rng.permutation(slots) // share
        counts = np.stack(
            [np.bincount(x, minlength=devices) for x in destination.reshape(devices, -1)]
        )
        assert counts.max() <= room
    assert room <= share
    if share >= 36 * devices:
        assert room * devices <= 2.2 * share


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.int8, jnp.bool_])
def test_dtypes(dtype):
    value = np.asarray(
        jnp.asarray(random_value(16) > 0 if dtype == jnp.bool_ else random_value(16) * 9, dtype)
    )
    positions = orders(16, 4, 1)[0]
    assert_aligned(_align_on_four(value, *positions), value, *positions)


@every_kind
def test_nan_without_a_partner_does_not_leak(kind):
    mesh = mesh_of(4, kind)
    values, keys = faulty(16, BATCH)
    value, weight = random_value(16), random_value(16, seed=1)
    paired = expected(weight, keys, values)[1] >= 0
    value = np.where(paired[:, :, None, None], value, np.nan)
    run = functools.partial(align, sharding=NamedSharding(mesh, P(None, "kv")))
    with jax.set_mesh(mesh):
        aligned, pull = jit(lambda v: jax.vjp(lambda v: run(v, values, keys)[0], v))(value)
    np.testing.assert_array_equal(aligned, expected(np.nan_to_num(value), values, keys)[0])
    assert np.isfinite(pull(jnp.asarray(weight))[0]).all()


def test_vmap_and_scan():
    mesh = mesh_of(4, "auto")
    value = np.stack([random_value(16, seed) for seed in range(3)])
    positions = [orders(16, 4, 1, seed)[0] for seed in range(3)]
    stacked = tuple(np.stack(x) for x in zip(*positions, strict=True))
    run = functools.partial(align, sharding=NamedSharding(mesh, P(None, "kv")))
    mapped = jit(jax.vmap(run))(value, *stacked)
    scanned = jit(lambda *x: jax.lax.scan(lambda _, x: (None, run(*x)), None, x)[1])(
        value, *stacked
    )
    for i in range(3):
        for result in (mapped, scanned):
            assert_aligned([x[i] for x in result], value[i], *positions[i])


@every_kind
def test_attention_over_what_came_separately(kind):
    rng = np.random.default_rng(0)
    slots, mesh = 32, mesh_of(8, kind)
    query = rng.normal(size=(BATCH, 5, 4, 8)).astype(np.float32)
    key = rng.normal(size=(BATCH, slots, HEADS, 8)).astype(np.float32)
    value = random_value(slots)
    values, keys = (rng.permutation(slots).astype(np.int32) for _ in range(2))

    def attention(query, key, value):
        value, positions, _ = align(
            value, values, keys, sharding=NamedSharding(mesh, P(None, "kv"))
        )
        return distattn.dot_product_attention(
            query,
            key,
            value,
            is_causal=True,
            query_positions=np.arange(20, 25, dtype=np.int32),
            key_positions=positions,
            **shardings(mesh, "kv", query="auto"),
        )

    with jax.set_mesh(mesh):
        out = jit(attention)(query, key, value)
    in_order = [
        np.asarray(x, np.float64)[:, np.argsort(p)] for x, p in ((key, keys), (value, values))
    ]
    want, _ = reference.dot_product_attention(
        query.astype(np.float64), *in_order, is_causal=True, query_positions=np.arange(20, 25)
    )
    assert_close(out, want, jnp.float32, slots, what="attention after align")


INDEX = np.arange(16, dtype=np.int32)
TWICE = np.where(INDEX == 3, 4, INDEX)
WRONG_CALLS = {
    "value without heads": (
        {"value": np.zeros((2, 16, 3), np.float32)},
        r"value has shape \(2, 16, 3\).*\[B, S, K, V\].*value\[None\]",
    ),
    "float positions": (
        {"key_positions": INDEX.astype(np.float32)},
        "key_positions is float32.*int32.*astype",
    ),
    "too few positions": (
        {"value_positions": INDEX[:8]},
        r"value_positions has shape \(8,\), and value has S=16.*one position for each value",
    ),
    "positions of another batch": (
        {"key_positions": np.stack([INDEX] * 3)},
        r"key_positions has shape \(3, 16\).*B=2.*row by row",
    ),
    "a scalar position": (
        {"key_positions": np.int32(3)},
        r"key_positions has shape \(\).*\[B, S\]",
    ),
    "not divisible": (
        {"key_positions": np.arange(15, dtype=np.int32)},
        "key_positions has 15 slots.*4 devices.*pad to 16 slots, with -1",
    ),
    "an axis and no mesh": (
        {"sharding": P(None, "x")},
        "sharding is P.*, but there is no mesh",
    ),
    "not a sharding": ({"sharding": "kv"}, "sharding is 'kv'; it must be a jax.NamedSharding"),
    "a width sharded": (
        {"sharding": NamedSharding(mesh_of(4, "auto"), P(None, None, None, "kv"))},
        "sharding is P.*shards H",
    ),
    "a position twice among keys": (
        {"key_positions": TWICE},
        "key_positions has 4 more than once; value_positions has 3, which key_positions has not",
    ),
    "a position twice among values": (
        {"value_positions": TWICE},
        "value_positions has 4 more than once; key_positions has 3, which value_positions has not",
    ),
    "other sets": (
        {"key_positions": INDEX + 10},
        "key_positions has 16, 17, 18 and 7 others, which value_positions has not; "
        "value_positions has 0, 1, 2 and 7 others, which key_positions has not.*-1 to .*under jit",
    ),
    "a fault in one row": (
        {"key_positions": np.stack([INDEX, TWICE])},
        "in row 1: key_positions has 4 more than once",
    ),
}


@pytest.mark.parametrize("name", WRONG_CALLS)
def test_wrong_calls(name):
    change, message = WRONG_CALLS[name]
    arguments = {"value": random_value(16), "value_positions": INDEX, "key_positions": INDEX}
    where = {"sharding": NamedSharding(mesh_of(4, "auto"), P(None, "kv"))}
    with pytest.raises(ValueError, match=f"(?s){message}"):
        align(**arguments | where | change)


def test_arrays_of_one_device_need_no_mesh_but_pairs():
    with pytest.raises(ValueError, match="value_positions has 4 more than once"):
        align(random_value(16), TWICE, INDEX)


def test_align_inside_a_shard_map_names_the_other_form():
    mesh = mesh_of(4, "auto")

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=P(None, "kv"), out_specs=P(None, "kv"))
    def body(value):
        return align(value, INDEX[:4], INDEX[:4], sharding=P(None, "kv"))[0]

    with pytest.raises(ValueError, match="manual here.*align_shards"):
        body(random_value(16))


def test_align_shards_outside_of_one_says_so():
    with pytest.raises(ValueError, match="'kv' is not an axis of the shard_map around"):
        align_shards(random_value(16), INDEX, INDEX, axis_name="kv")
