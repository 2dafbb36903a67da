"""The cache: what it holds, what it attends to, what its compiled steps send and copy."""

import contextlib
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from distattn import KVCache
from distattn.cache.quantise import quantise
from distattn.cache.slots import PLACEMENTS, choose_owners
from distattn.testing import collective_bytes, collectives, reference
from tests.cases import KINDS, cache_sharding, mesh_of
from tests.tolerance import assert_close

B, T, N, K, H, V = 4, 5, 4, 2, 8, 6
CAPACITY = 40


def grid(kind):
    return jax.make_mesh((2, 2, 2), ("b", "kv", "h"), (KINDS[kind],) * 3)


LAYOUTS = {
    "one device": lambda: {},
    "auto": lambda: {"sharding": cache_sharding(mesh_of(8, "auto"))},
    "explicit": lambda: {"sharding": cache_sharding(mesh_of(8, "explicit"))},
    "three devices": lambda: {"sharding": cache_sharding(mesh_of(3, "auto"))},
    "sequences and heads": lambda: {"sharding": cache_sharding(grid("auto"), batch="b", heads="h")},
    "a tuple, explicit": lambda: {
        "sharding": cache_sharding(grid("explicit"), ("kv", "h"), batch="b")
    },
}
every_layout = pytest.mark.parametrize("name", LAYOUTS)


def make(name="one device", dtype=jnp.float32, **options):
    where = LAYOUTS[name]()
    return KVCache.create(B, CAPACITY, K, H, value_dim=V, dtype=dtype, **where, **options)


def within(cache):
    mesh = cache.layout.mesh
    return contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)


def tokens(seed, count=T, layers=None):
    rng = np.random.default_rng(seed)
    lead = () if layers is None else (layers,)
    shapes = [(*lead, B, count, K, width) for width in (H, V)]
    return tuple(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes)


def queries(seed=9, count=T):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(B, count, N, H)), jnp.float32)


append = jax.jit(KVCache.append, donate_argnums=0)


def filled(cache, layers=None):
    """Three appends, the second one ragged; and what every row holds then: (position, append, token)."""
    held = [[] for _ in range(B)]
    lengths = np.array([3, 0, 5, 1], np.int32)
    for seed, count in ((1, T), (2, lengths), (3, T)):
        key, value = tokens(seed, layers=layers)
        rows = np.broadcast_to(count, B)
        cache = append(cache, key, value, lengths=None if seed != 2 else lengths)
        for row, n in zip(held, rows, strict=True):
            start = len(row)
            row.extend((start + t, seed, t) for t in range(n))
    return cache, held


def contents(cache):
    """Of every row {position: (key, value)}; each position must be there once, and counts be right."""
    tags, key, value = (
        np.asarray(x, np.float64) for x in (cache.positions, cache.key, cache.value)
    )
    counts = (tags.reshape(B, cache.layout.devices, -1) >= 0).sum(axis=-1)
    np.testing.assert_array_equal(cache.counts, counts)
    rows = []
    for b in range(B):
        slots = np.flatnonzero(tags[b] >= 0)
        rows.append(
            {int(tags[b, s]): (key[..., b, s, :, :], value[..., b, s, :, :]) for s in slots}
        )
        assert len(rows[b]) == len(slots)
    return rows


def positions(cache):
    return [sorted(row) for row in contents(cache)]


def check_attention(cache, query, what, factor=1.0, key=None, value=None, **options):
    """That attention to the cache is the oracle's to its slots, whatever lies in those that are free."""
    layer = options.pop("layer", None)
    got, lse = jax.jit(
        lambda cache, query: cache.attend(query, layer=layer, return_residual=True, **options)
    )(cache, query)
    key, value = (
        np.asarray(x if layer is None else x[layer], np.float64)
        for x in (cache.key if key is None else key, cache.value if value is None else value)
    )
    asked = {"is_causal": True} | options
    tree = asked.pop("tree_mask", None)
    start = np.asarray(cache.next_position - np.minimum(cache.appended, query.shape[1]))
    tags = np.asarray(cache.positions)
    if tree is not None:
        asked["mask"] = np.broadcast_to(tags < start[:, None], (1, T, B, tags.shape[1])).copy()
        asked["mask"] = asked["mask"].transpose(2, 0, 1, 3)
        for b, s in np.argwhere(tags >= start[:, None]):
            asked["mask"][b, 0, :, s] = np.asarray(tree)[..., tags[b, s] - start[b]]
    asked.setdefault("query_positions", start[:, None] + np.arange(query.shape[1]))
    want, want_lse = reference.dot_product_attention(
        np.asarray(query, np.float64), key, value, key_positions=tags, **asked
    )
    assert_close(got, want, query.dtype, CAPACITY, factor, what=what)
    assert_close(lse, want_lse, jnp.float32, CAPACITY, factor, what=f"{what}: lse")


@every_layout
def test_it_holds_what_was_appended(name):
    cache = make(name)
    with within(cache):
        cache, held = filled(cache)
        arrays = {seed: [np.asarray(x) for x in tokens(seed)] for seed in (1, 2, 3)}
        for b, (row, want) in enumerate(zip(contents(cache), held, strict=True)):
            assert sorted(row) == [position for position, *_ in want]
            for position, seed, t in want:
                for got, new in zip(row[position], arrays[seed], strict=True):
                    np.testing.assert_array_equal(got, new[b, t])
        np.testing.assert_array_equal(cache.next_position, [len(row) for row in held])
        np.testing.assert_array_equal(cache.appended, [T] * B)
        assert not np.asarray(cache.overflow).any()


@every_layout
@pytest.mark.parametrize("count", [1, T])
def test_attention_to_it(name, count):
    cache = make(name)
    with within(cache):
        check_attention(filled(cache)[0], queries(count=count), name)


@every_layout
def test_layers_under_one_set_of_tags(name):
    layers = 3
    cache = make(name, layers=layers)
    key, value = tokens(5, layers=layers)
    with within(cache):

        @jax.jit
        def step(cache, query):
            cache, slots = cache.reserve(T)

            def layer(carry, scanned):
                cache, x = carry
                i, key, value = scanned
                cache = cache.write(key, value, slots, layer=i)
                return (cache, x + cache.attend(x, layer=i, strategy="psum")[..., :1]), None

            index = jnp.arange(layers, dtype=jnp.int32)
            (cache, x), _ = jax.lax.scan(layer, (cache, query), (index, key, value))
            return cache, x

        whole, _ = filled(cache, layers)
        stepped, _ = step(whole, queries())
        for got, want in zip(contents(stepped), contents(whole.append(key, value)), strict=True):
            assert sorted(got) == sorted(want)
            for position, arrays in got.items():
                for x, y in zip(arrays, want[position], strict=True):
                    np.testing.assert_array_equal(x, y)
        check_attention(stepped, queries(), name, layer=1)


MASKS = {
    "window": {"local_window_size": (3, 0)},
    "not causal": {"is_causal": False},
    "soft cap and sinks": {
        "logits_soft_cap": 2.0,
        "sinks": np.linspace(-1, 1, N, dtype=np.float32),
    },
    "lengths": {
        "key_value_seq_lengths": np.array([2, 4, 0, 9], np.int32),
        "query_seq_lengths": np.array([5, 1, 3, 0], np.int32),
    },
    "query positions": {"query_positions": np.arange(3, 3 + T, dtype=np.int32)},
    "slots": {
        "bias": np.linspace(-1, 1, B * CAPACITY, dtype=np.float32).reshape(B, 1, 1, CAPACITY),
        "mask": np.arange(B * N * T * CAPACITY).reshape(B, N, T, CAPACITY) % 3 > 0,
    },
    "segments": {
        "query_segment_ids": np.arange(T, dtype=np.int32) % 2,
        "key_value_segment_ids": np.arange(CAPACITY, dtype=np.int32) % 2,
    },
    "tree": {"tree_mask": np.tril(np.arange(T * T).reshape(T, T) % 2 == 0) | np.eye(T, dtype=bool)},
}


@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask):
    name = ["auto", "explicit", "sequences and heads"][list(MASKS).index(mask) % 3]
    cache = make(name)
    with within(cache):
        check_attention(filled(cache)[0], queries(), f"{name} {mask}", **MASKS[mask])


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        # Of 8 bits with scales, which lie as the slots do; of 16 there is nothing beside the arrays.
        ("one device", jnp.int8),
        ("auto", jnp.float8_e4m3fn),
        ("explicit", jnp.int8),
        ("a tuple, explicit", jnp.float8_e4m3fn),
        ("auto", jnp.bfloat16),
        ("explicit", jnp.float16),
    ],
)
def test_stored_in_few_bits(name, dtype):
    cache = make(name, dtype, layers=2)
    with within(cache):
        cache, _ = filled(cache, 2)
        scales = (
            {}
            if cache.key_scale is None
            else {
                side: np.asarray(getattr(cache, side), np.float64)
                * np.asarray(getattr(cache, f"{side}_scale"))[..., None]
                for side in ("key", "value")
            }
        )
        check_attention(cache, queries(), f"{name} {dtype}", layer=1, **scales)


@pytest.mark.parametrize(
    ("dtype", "step"), [(jnp.int8, None), (jnp.float8_e4m3fn, 2**-4), (jnp.float8_e5m2, 2**-3)]
)
def test_the_error_of_few_bits_is_as_stated(dtype, step):
    x = np.random.default_rng(0).normal(size=(50, 3, 64)).astype(np.float32)
    x *= np.logspace(-3, 3, 50, dtype=np.float32)[:, None, None]
    x[0] = 0
    numbers, scale = quantise(jnp.asarray(x), jnp.dtype(dtype))
    assert numbers.dtype == dtype
    assert scale.shape == (50, 3)
    error = np.abs(np.asarray(numbers, np.float64) * np.asarray(scale)[..., None] - x)
    largest = np.abs(x).max(axis=-1, keepdims=True)
    bound = largest / 254 if step is None else np.maximum(np.abs(x) * step, largest * 2.0**-16)
    assert (error <= bound * (1 + 1e-5)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_prefill_with_everything_sharded_along_the_sequence(kind):
    mesh = mesh_of(8, kind)
    cache = KVCache.create(
        B, 64, K, H, value_dim=V, dtype=jnp.float32, sharding=cache_sharding(mesh)
    )
    along = NamedSharding(mesh, P(None, "kv"))
    with jax.set_mesh(mesh):
        key, value = (jax.device_put(x, along) for x in tokens(1, 16))
        query = jax.device_put(queries(count=16), along)

        def prefill(cache, key, value, query):
            cache = cache.append(key, value, owner="local")
            return cache, cache.attend(query, query_sharding=P(None, "kv"))

        compiled = jax.jit(prefill, donate_argnums=0).lower(cache, key, value, query).compile()
        counts = collectives(compiled.as_text())
        assert counts == {"all-gather": 1, "collective-permute": 3}, "the query, and the states"
        cache, out = compiled(cache, key, value, query)
        tags = np.asarray(cache.positions)
        for device, slots in enumerate(np.split(tags, 8, axis=1)):
            assert [sorted(row[row >= 0]) for row in slots] == [[2 * device, 2 * device + 1]] * B
        want, _ = reference.dot_product_attention(
            *(np.asarray(x, np.float64) for x in (query, key, value)), is_causal=True
        )
        assert_close(out, want, jnp.float32, 16, what=kind)


def test_new_keys_seen_to_be_sharded_stay_where_they_are():
    mesh = mesh_of(8, "explicit")
    cache = KVCache.create(
        B, 64, K, H, value_dim=V, dtype=jnp.float32, sharding=cache_sharding(mesh)
    )
    with jax.set_mesh(mesh):
        along = NamedSharding(mesh, P(None, "kv"))
        cache = append(cache, *(jax.device_put(x, along) for x in tokens(1, 16)))
    assert [sorted(x[x >= 0]) for x in np.asarray(cache.positions)[:, :8]] == [[0, 1]] * B


def test_the_life_of_a_row():
    cache, _ = filled(make("auto"))
    assert positions(cache) == [list(range(n)) for n in (13, 10, 15, 11)]
    cache = cache.rewind(np.array([12, 10, 4, 0], np.int32))
    assert positions(cache) == [list(range(n)) for n in (12, 10, 4, 0)]
    np.testing.assert_array_equal(cache.next_position, [12, 10, 4, 0])
    cache = cache.evict(3, keep_first=2)
    assert positions(cache) == [[0, 1, 9, 10, 11], [0, 1, 7, 8, 9], [0, 1, 2, 3], []]
    cache = cache.fork([0, 2], [1, 3])
    assert positions(cache) == [[0, 1, 9, 10, 11], [0, 1, 9, 10, 11], [0, 1, 2, 3], [0, 1, 2, 3]]
    cache = cache.reset(np.array([True, False, False, True]))
    assert positions(cache) == [[], [0, 1, 9, 10, 11], [0, 1, 2, 3], []]
    cache = append(cache, *tokens(7), lengths=np.array([2, 1, 0, 5], np.int32))
    assert positions(cache) == [[0, 1], [0, 1, 9, 10, 11, 12], [0, 1, 2, 3], [0, 1, 2, 3, 4]]
    check_attention(cache, queries(), "after all that")


@pytest.mark.parametrize("name", ["sequences and heads", "a tuple, explicit"])
def test_a_fork_between_devices_copies_every_bit(name):
    cache = make(name)
    with within(cache):
        key, value = tokens(1)
        key = key.at[0, 0].set(jnp.array([-0.0, jnp.inf, -jnp.inf, 1, 2, 3, 4, jnp.nan]))
        cache = append(cache, key, value).fork(0, 3)
        rows = contents(cache)
        for position, arrays in rows[0].items():
            for x, y in zip(arrays, rows[3][position], strict=True):
                np.testing.assert_array_equal(x, y)
                np.testing.assert_array_equal(np.signbit(x), np.signbit(y))


def test_edits_under_jit_take_traced_numbers():
    cache, _ = filled(make("auto"))
    gone = jnp.array([False, True, False, False])
    assert positions(jax.jit(KVCache.reset)(cache, gone)) == positions(cache.reset(1))
    assert positions(jax.jit(KVCache.reset)(cache, jnp.int32(1))) == positions(cache.reset(1))
    lengths = jnp.array([3, 2, 1, 0], jnp.int32)
    assert positions(jax.jit(KVCache.rewind)(cache, lengths)) == [[0, 1, 2], [0, 1], [0], []]
    assert positions(jax.jit(KVCache.evict)(cache, lengths)) == positions(cache.evict(lengths))
    rows = jnp.array([2, 3], jnp.int32), jnp.array([0, 1], jnp.int32)
    assert positions(jax.jit(KVCache.fork)(cache, *rows)) == positions(cache.fork(*rows))


def test_a_token_tree_is_verified_and_its_path_accepted():
    cache, _ = filled(make("auto"))
    before = positions(cache)
    #          0     its children 1 and 2, 3 under 1, 4 under 2
    tree = np.array(
        [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [1, 0, 1, 0, 0], [1, 1, 0, 1, 0], [1, 0, 1, 0, 1]]
    )
    cache = append(cache, *tokens(4))
    check_attention(cache, queries(), "tree", tree_mask=tree.astype(bool))
    paths = np.array([[0, 2, 4], [0, 1, 3], [0, 2, 4], [0, 1, 3]], np.int32)
    kept = np.array([3, 2, 0, 1], np.int32)
    accepted = cache.accept(paths, kept)
    key, value = (np.asarray(x) for x in tokens(4))
    for b, row in enumerate(contents(accepted)):
        start = len(before[b])
        assert sorted(row) == list(range(start + kept[b]))
        for depth, node in enumerate(paths[b, : kept[b]]):
            np.testing.assert_array_equal(row[start + depth][0], key[b, node])
            np.testing.assert_array_equal(row[start + depth][1], value[b, node])
    np.testing.assert_array_equal(
        accepted.next_position, np.array([len(row) for row in before]) + kept
    )


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=8),
    st.lists(st.booleans(), min_size=12, max_size=12),
)
def test_the_least_loaded_device_is_taken_each_time(counts, wanted):
    padded = np.array([counts + [99] * (8 - len(counts))], np.int32)  # of full devices
    owners = choose_owners("least_loaded", padded, np.zeros(1, np.int32), np.array([wanted]), 99)
    levels = list(padded[0])
    for owner in np.asarray(owners)[0][wanted]:
        assert levels[owner] == min(levels)
        levels[owner] += 1


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_placements(placement):
    cache = make("auto", placement=placement)
    counts = {
        "least_loaded": [2] * 5 + [1] * 3,
        "round_robin": [2] * 5 + [1] * 3,
        "block": [5, 5, 3],
    }
    for seed in range(13):
        cache = append(cache, *tokens(seed, 1))
    want = counts[placement]
    np.testing.assert_array_equal(cache.counts, [want + [0] * (8 - len(want))] * B)
    check_attention(cache, queries(count=1), placement)


def test_an_owner_for_each_token():
    owner = np.array([7, 7, 0, 3, 7], np.int32)
    cache = append(make("auto"), *tokens(1), owner=owner)
    np.testing.assert_array_equal(cache.counts, [[1, 0, 0, 1, 0, 0, 0, 3]] * B)
    check_attention(cache, queries(), "owners")


def test_positions_of_ones_own_and_none():
    where = np.array([[9, 2, -1, 4, 7]] * B, np.int32)
    cache = append(make("auto"), *tokens(1), positions=where)
    assert positions(cache) == [[2, 4, 7, 9]] * B
    np.testing.assert_array_equal(cache.next_position, [10] * B)
    check_attention(cache, queries(), "positions", query_positions=np.arange(5, 10, dtype=np.int32))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_a_row_is_full_when_all_its_slots_are(placement):
    cache = make("auto", placement=placement)
    for seed in range(CAPACITY // T):
        cache = append(cache, *tokens(seed))
    assert not np.asarray(cache.overflow).any()
    assert (np.asarray(cache.positions) >= 0).all()
    full = append(cache, *tokens(9), lengths=np.array([1, 0, 0, 0], np.int32))
    np.testing.assert_array_equal(full.overflow, [True, False, False, False])


def test_a_row_that_overflows_is_left_as_it_was():
    cache, _ = filled(make("auto"))
    for seed in range(4):  # to 33, 30, 35 and 31 tokens
        cache = append(cache, *tokens(seed))
    before = positions(cache)
    key, value = tokens(8, 8)
    with pytest.raises(
        ValueError, match=r"sequence 0 gets 8 new .*overflow: \[0, 2\].*nothing was written: evict"
    ):
        cache.append(key, value)
    assert not np.asarray(cache.refused).any()
    refused = jax.jit(KVCache.append)(cache, key, value)
    np.testing.assert_array_equal(refused.overflow, [True, False, True, False])
    np.testing.assert_array_equal(refused.appended, [0, 8, 0, 8])
    np.testing.assert_array_equal(refused.refused, [8, 0, 8, 0])
    for row, (was, now) in enumerate(zip(before, positions(refused), strict=True)):
        assert now == (was if row in (0, 2) else [*was, *range(len(was), len(was) + 8)])
    nobody = jax.jit(KVCache.append)(cache, *tokens(1, 1), owner=np.full(1, 8, np.int32))
    assert np.asarray(nobody.overflow).all()


@every_layout
def test_what_was_refused_is_counted_from_create_or_reset_on(name):
    cache = make(name)
    with within(cache):
        for seed in range(CAPACITY // T):
            cache = append(cache, *tokens(seed))
        room, want = (
            np.full(B, cache.capacity - CAPACITY),
            np.zeros(B, int),
        )  # room for 2 on three devices
        for lengths in ([5, 4, 0, 1], [3, 1, 3, 0]):
            count = np.array(lengths, np.int32)
            cache = append(cache, *tokens(7), lengths=count)
            np.testing.assert_array_equal(cache.overflow, count > room)
            want += np.where(count > room, count, 0)
            room -= np.where(count > room, 0, count)
            np.testing.assert_array_equal(cache.refused, want)
        # It stays through what happens to a row, and an append that finds a place.
        cache = append(cache.rewind(6).evict(4), *tokens(8))
        assert not np.asarray(cache.overflow).any()
        np.testing.assert_array_equal(cache.refused, want)
        cache = cache.accept([0, 1])
        np.testing.assert_array_equal(cache.refused, want)
        assert want[0] > want[3]
        forked = cache.fork(0, 3)
        np.testing.assert_array_equal(forked.refused, [*want[:3], want[0]])
        np.testing.assert_array_equal(cache.reset([0, 2]).refused, [0, want[1], 0, want[3]])
        # Of tokens that have no place a row counts those that it was to get, not the padding.
        places = np.array([[-1, 9, -1, 8, -1]] * B, np.int32)
        nowhere = np.full(T, 99, np.int32)
        refused = jax.jit(KVCache.append)(cache, *tokens(1), places, owner=nowhere).refused
        np.testing.assert_array_equal(refused, want + 2)


def test_nothing_leaks_from_free_slots():
    cache, _ = filled(make("auto"))
    poisoned = {
        name: jnp.where(cache.positions[..., None, None] < 0, jnp.nan, getattr(cache, name))
        for name in ("key", "value")
    }
    check_attention(dataclasses.replace(cache, **poisoned), queries(), "poisoned")
    nan = jax.tree.map(lambda x: x * jnp.nan, tokens(4))
    rewound = cache.append(*nan).rewind(cache.next_position)
    check_attention(rewound, queries(), "rewound")


@pytest.mark.parametrize("layers", [None, 2])
def test_gradients_go_through_it(layers):
    cache, _ = filled(make("auto", layers=layers), layers)
    layer = None if layers is None else 1

    def loss(query, key, value, cache):
        cache = dataclasses.replace(cache, key=key, value=value)
        return (cache.attend(query, layer=layer) ** 2).sum()

    def plain(query, key, value, cache):
        key, value = (x if layer is None else x[layer] for x in (key, value))
        start = cache.next_position - T
        query_positions = start[:, None] + jnp.arange(T, dtype=jnp.int32)[None]
        seen = cache.positions[:, None] <= query_positions[..., None]
        seen &= cache.positions[:, None] >= 0
        return (jax.nn.dot_product_attention(query, key, value, mask=seen[:, None]) ** 2).sum()

    value = jnp.pad(cache.value, [(0, 0)] * (cache.value.ndim - 1) + [(0, H - V)])
    arguments = (queries(), cache.key, value, cache)  # jax.nn wants V = H
    got, want = (jax.jit(jax.grad(f, argnums=(0, 1, 2)))(*arguments) for f in (loss, plain))
    for x, y in zip(got, want, strict=True):
        assert_close(x, y, jnp.float32, CAPACITY * T, 2.0, what="gradient")


def compiled_step(tokens_cached, dtype, mesh, layers, count):
    cache = KVCache.create(
        1, tokens_cached, K, 64, dtype=dtype, sharding=cache_sharding(mesh), layers=layers
    )
    x = jnp.ones((1, count, N, 64))

    def attend(carry, layer, slots):
        cache, x = carry
        cache = cache.write(x[:, :, :K], x[:, :, :K], slots, layer=layer)
        return (cache, x + cache.attend(x, layer=layer)), None

    def step(cache, x):
        cache, slots = cache.reserve(count)
        if layers is None:
            return attend((cache, x), None, slots)[0]
        index = jnp.arange(layers, dtype=jnp.int32)
        return jax.lax.scan(lambda c, i: attend(c, i, slots), (cache, x), index)[0]

    return jax.jit(step, donate_argnums=0).lower(cache, x).compile()


@pytest.mark.parametrize(
    ("kind", "dtype", "layers", "count"),
    [
        ("auto", jnp.float32, None, 1),
        ("auto", jnp.float32, 4, 16),
        ("auto", jnp.bfloat16, 4, 1),
        ("auto", jnp.int8, None, 1),
        ("auto", jnp.int8, 4, 1),
        ("auto", jnp.int8, 4, 16),
        ("explicit", jnp.bfloat16, None, 1),
        ("explicit", jnp.bfloat16, 4, 16),
    ],
)
def test_a_step_moves_and_copies_nothing_of_the_cache(kind, dtype, layers, count):
    mesh = mesh_of(8, kind)
    with jax.set_mesh(mesh):
        small, large = (
            compiled_step(length, dtype, mesh, layers, count) for length in (2**15, 2**17)
        )
    counts = collectives(large.as_text())
    assert set(counts) <= {"collective-permute", "all-reduce", "all-gather"}
    assert sum(counts.values()) <= 3
    sent = collective_bytes(large.as_text())
    assert sent == collective_bytes(small.as_text()), "states, and nothing of the keys"
    memory = large.memory_analysis()
    width = np.dtype(dtype).itemsize * 64 + (4 if dtype == jnp.int8 else 0)
    store = (layers or 1) * 2 * 2**17 // 8 * K * width
    assert memory.alias_size_in_bytes >= store  # written in place
    assert memory.temp_size_in_bytes == pytest.approx(
        small.memory_analysis().temp_size_in_bytes,
        abs=2**19,  # tags: 4 bytes a slot and device
    )
    shapes = f"{2**17 // 8},{K},64]"
    copies = [line for line in large.as_text().splitlines() if " copy(" in line and shapes in line]
    assert copies == []


def test_edits_send_a_number_for_each_row():
    cache = make("auto")
    edits = {
        "reset": lambda cache: cache.reset(1),
        "rewind": lambda cache: cache.rewind(3),
        "evict": lambda cache: cache.evict(3),
        "accept": lambda cache: cache.accept(np.zeros(1, np.int32)),
        "fork": lambda cache: cache.fork(0, 1),
        "append": lambda cache: cache.append(*tokens(1)),
    }
    for name, edit in edits.items():
        text = jax.jit(edit, donate_argnums=0).lower(cache).compile().as_text()
        sent = {} if name in ("reset", "fork", "append") else {"all-gather": 1}
        assert collectives(text) == sent, name


def create(num_kv_heads=K, **options):
    return KVCache.create(1, 8, num_kv_heads, H, dtype=jnp.float32, **options)


WRONG = {
    "no room": (lambda: make().append(*tokens(1, 41)), "sequence 0 gets 41 new tokens"),
    "shape": (lambda: make().append(tokens(1)[1], tokens(1)[1]), r"key has shape \(4, 5, 2, 6\)"),
    "integers": (lambda: make().append(*(x.astype(int) for x in tokens(1))), "floating point"),
    "layers": (lambda: make(layers=2).append(*tokens(1)), r"needs \[L, B, T, K, .\]"),
    "which layer": (lambda: make(layers=2).attend(queries()), "the cache has 2 layers: say which"),
    "no layers": (lambda: make().attend(queries(), layer=0), "no layers: pass None"),
    "write": (lambda: make().write(*tokens(1), make().reserve(T)[1], layer=0), "has no layers"),
    "query": (lambda: make().attend(queries()[0]), r"needs \[B, T, N, H\]"),
    "gather": (lambda: make().attend(queries(), strategy="gather_kv"), "are never moved"),
    "tree": (lambda: make().attend(queries(), tree_mask=np.eye(3, dtype=bool)), r"with T=5, B=4"),
    "lengths": (
        lambda: make().append(*tokens(1), lengths=np.ones(3, np.int32)),
        r"int32\[B\] = \[4\]",
    ),
    "positions": (
        lambda: make().append(*tokens(1), positions=np.ones(3, np.int32)),
        r"positions has shape \(3,\) for B=4, T=5",
    ),
    "owner": (
        lambda: make("auto").append(*tokens(1), owner=np.full(T, 8, np.int32)),
        r"owner\[0\] is 8; it must be 0 .. 7: slots are on 8 devices",
    ),
    "local": (lambda: make("auto").append(*tokens(1), owner="local"), "pad them to a multiple"),
    "owner's name": (lambda: make().append(*tokens(1), owner="here"), "'local' or None"),
    "row": (lambda: make().reset(4), r"sequences is 4; it must be 0 .. 3: an index of a sequence"),
    "mask of rows": (lambda: make().reset(np.ones(3, bool)), r"bool\[B\] = \[4\]"),
    "fork": (lambda: make().fork([0, 1], 2), "source has 2 sequences and target 1"),
    "capacity": (lambda: KVCache.create(1, 0, K, H, dtype=jnp.float32), "capacity is 0"),
    "dtype": (lambda: KVCache.create(1, 8, K, H, dtype=jnp.int32), "dtype is int32"),
    "placement": (lambda: make(placement="random"), "placement is 'random'"),
    "no mesh": (
        lambda: create(sharding=P(None, "kv")),
        r"sharding is .*'kv'.*, but there is no mesh; pass a jax.NamedSharding, or enter jax.set_mesh",
    ),
    "no sharding": (
        lambda: create(sharding=mesh_of(8, "auto")),
        r"sharding is Mesh\(.*must be a jax.NamedSharding, a jax.P, or None: pass",
    ),
    "axis": (
        lambda: make("auto").resize(sharding=P(None, "x")),
        "sharding is .*'x'.*is not an axis of the mesh.*use axes of",
    ),
    "twice": (
        lambda: make("auto").resize(sharding=P("kv", "kv")),
        "sharding is .*uses 'kv' twice; use each axis once",
    ),
    "dimensions": (
        lambda: create(sharding=NamedSharding(mesh_of(8, "auto"), P(*[None] * 5))),
        r"5 dimensions, but the array is \[B, S, K, H\]; give one entry a dimension, or fewer",
    ),
    "width": (
        lambda: create(sharding=NamedSharding(grid("auto"), P(None, "kv", None, "h"))),
        r"it shards H, the last dimension of \[B, S, K, H\], over \('h',\).*shard B, the sequence",
    ),
    "batch": (
        lambda: create(sharding=cache_sharding(grid("auto"), batch="b")),
        r"batch is 1, and sharding shards it over \('b',\), 2 devices.*pass a multiple.*fewer axes",
    ),
    "heads": (
        lambda: create(num_kv_heads=3, sharding=cache_sharding(grid("auto"), heads="h")),
        r"num_kv_heads is 3, and sharding shards it over \('h',\), 2 devices.*pass a multiple",
    ),
    "query on one device": (
        lambda: make().attend(queries(), query_sharding=P(None, "kv")),
        "query_sharding is .*the cache is on one device; leave query_sharding None",
    ),
    "query's mesh": (
        lambda: make("auto").attend(
            queries(), query_sharding=NamedSharding(grid("auto"), P(None, "b"))
        ),
        "sharding is on the mesh kv=8 .*query_sharding is on b=2.*use one mesh for both",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_calls(name):
    call, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_inside_a_shard_map_over_its_axis():
    cache, mesh = make("auto"), mesh_of(8, "auto")

    def body(x):
        return x + cache.attend(queries()).sum()

    with pytest.raises(ValueError, match="call the cache outside: it opens"):
        jax.shard_map(body, mesh=mesh, in_specs=P(), out_specs=P())(jnp.float32(0))


@pytest.mark.parametrize("kind", KINDS)
def test_a_partition_spec_takes_the_mesh_of_the_context(kind):
    mesh = mesh_of(4, kind)
    with jax.set_mesh(mesh):
        cache = create(sharding=P(None, "kv"), value_dim=V)
        assert cache.layout.mesh == mesh
        assert cache.layout.slots == ("kv",)
        out = cache.append(*(x[:1] for x in tokens(1))).attend(queries()[:1], query_sharding=P())
    moved = cache.resize(sharding=P())  # the mesh of the cache
    assert (moved.layout.mesh, moved.layout.slots, moved.capacity) == (mesh, (), 8)
    assert moved.key.sharding.is_fully_replicated
    with jax.set_mesh(mesh):
        again = moved.append(*(x[:1] for x in tokens(1))).attend(queries()[:1])
    assert_close(again, np.asarray(out), jnp.float32, T, 2.0, what="replicated")
    assert create(sharding=P()).layout.mesh is None
