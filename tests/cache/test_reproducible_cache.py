"""`KVCache.attend(reproducible=True)`: the same bits wherever tokens lie, on any number of devices.

At XLA's full optimisation, which is where bits come apart.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from distattn import KVCache
from distattn.cache.slots import PLACEMENTS
from distattn.testing import collectives, reference
from tests.cases import ALL_REDUCES, FULLY_OPTIMIZED, KINDS, cache_sharding, mesh_of
from tests.tolerance import assert_close

B, N, K, H, V = 2, 4, 2, 16, 12
TOKENS, CAPACITY = 37, 40
LENGTHS = np.array([TOKENS, 22], np.int32)
LAYERS, LAYER = 2, 1
DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "int8": jnp.int8}


def numbers(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


KEYS, VALUES = numbers(0, LAYERS, B, TOKENS, K, H), numbers(1, LAYERS, B, TOKENS, K, V)
QUERY = 2 * numbers(2, B, 4, N, H)
SINKS = numbers(4, N)
TREE = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 1, 0], [1, 0, 1, 1]], bool)
WINDOW = {"local_window_size": (11, 0), "logits_soft_cap": 3.0, "scale": 0.4}
VIEWS = {
    "a token": {},
    "a tree": {"tree_mask": TREE},
    "everything": {"sinks": SINKS, **WINDOW},
}


def on(devices, kind="auto"):
    return None if devices is None else mesh_of(devices, kind)


def empty(mesh=None, *, dtype=jnp.float32, layers=LAYERS, **options):
    options = {"sharding": cache_sharding(mesh), **options}
    return KVCache.create(B, CAPACITY, K, H, value_dim=V, layers=layers, dtype=dtype, **options)


append = jax.jit(KVCache.append)


def filled(mesh=None, *, seed=None, chunk=TOKENS, **options):
    """A cache of all the tokens; with a seed in another order, each with an owner of its own."""
    cache = empty(mesh, **options)
    positions = np.broadcast_to(np.arange(TOKENS, dtype=np.int32), (B, TOKENS))
    owner = None
    order = np.arange(TOKENS)
    if seed is not None:
        random = np.random.default_rng(seed)
        order = random.permutation(TOKENS)
        slots = np.repeat(np.arange(cache.layout.devices), cache.capacity // cache.layout.devices)
        owner = np.stack([random.permutation(slots)[:TOKENS] for _ in range(B)]).astype(np.int32)
    positions = np.where(positions < LENGTHS[:, None], positions, -1)[:, order]
    key, value = KEYS[:, :, order], VALUES[:, :, order]
    for start in range(0, TOKENS, chunk):
        part = slice(start, start + chunk)
        cache = append(
            cache,
            key[:, :, part],
            value[:, :, part],
            positions=positions[:, part],
            owner=None if owner is None else owner[:, part],
        )
    return as_appended(cache)


def as_appended(cache):
    """With what a cache knows of its past as if the last append had been of four tokens."""
    return dataclasses.replace(
        cache, appended=jnp.full_like(cache.appended, 4), placement=PLACEMENTS[0]
    )


def bias_and_mask(positions, xp=jnp):
    """[B, N, 1, S] and [B, 1, 1, S], by the positions of slots."""
    heads = 3 + xp.arange(N, dtype=np.int32)[None, :, None, None]
    rest = (positions[:, None, None] * heads) % 11
    return rest.astype(np.float32) / 4, (positions % 7 != 3)[:, None, None]


def attend_to(cache, view, *, reproducible=True, **options):
    """out and lse of one of the views."""
    query = jnp.asarray(QUERY[:, -1:] if view == "a token" else QUERY)
    options = {**VIEWS[view], **options}
    if view == "everything":
        options["bias"], options["mask"] = bias_and_mask(cache.positions)
    if cache.layers is not None:
        options.setdefault("layer", LAYER)
    given = {"return_residual": True, "reproducible": reproducible}
    return cache.attend(query, **given, **options)


@functools.cache
def program(view, reproducible=True, **options):
    """(out, lse) of a cache, at full optimisation."""
    run = functools.partial(attend_to, view=view, reproducible=reproducible, **options)
    return jax.jit(run, compiler_options=FULLY_OPTIMIZED)


def bits(results):
    return [np.asarray(x, np.float32).view(np.int32) for x in results]


@functools.cache
def wanted(view, dtype="float32"):
    """The bits on one device, of tokens in their order."""
    return bits(program(view)(filled(dtype=DTYPES[dtype])))


def check_same(got, want):
    for name, x, y in zip(("out", "lse"), bits(got), want, strict=True):
        assert np.array_equal(x, y), f"{name}: {(x != y).mean():.0%} differ"


def check_bits(cache, views=("a token", "everything"), dtype="float32", **options):
    for view in views:
        check_same(program(view, **options)(cache), wanted(view, dtype))


def contents(cache, name):
    """[B, position, K, .] of what the cache holds of the layer, as numbers."""
    x = np.asarray(getattr(cache, name)[LAYER], np.float64)
    scale = getattr(cache, f"{name}_scale")
    return x if scale is None else x * np.asarray(scale[LAYER], np.float64)[..., None]


@pytest.mark.parametrize(
    ("view", "dtype"),
    [*((view, "float32") for view in VIEWS), ("everything", "bfloat16"), ("everything", "int8")],
)
def test_it_is_right(view, dtype):
    cache = filled(dtype=DTYPES[dtype])
    tags, start = np.asarray(cache.positions), LENGTHS - 4
    options = {name: x for name, x in VIEWS[view].items() if name != "tree_mask"}
    positions, query = start[:, None] + np.arange(4), QUERY
    if view == "a token":
        positions, query = positions[:, -1:], QUERY[:, -1:]
    if view == "a tree":
        node = np.clip(tags - start[:, None], 0, 3)
        allowed = np.where(
            tags[:, None] >= start[:, None, None], TREE[:, node].swapaxes(0, 1), True
        )
        options["mask"] = allowed[:, None]
    if view == "everything":
        options["bias"], options["mask"] = bias_and_mask(tags, np)
    want = reference.dot_product_attention(
        np.asarray(query, np.float64),
        contents(cache, "key"),
        contents(cache, "value"),
        key_positions=tags,
        query_positions=positions,
        is_causal=True,
        **options,
    )
    for name, x, y in zip(("out", "lse"), program(view)(cache), want, strict=True):
        assert_close(x, y, jnp.float32, TOKENS, what=f"{view}: {name}")


@pytest.mark.parametrize("devices", range(1, 9))
def test_any_number_of_devices(devices):
    check_bits(filled(on(devices), seed=devices), VIEWS if devices == 8 else ("everything",))


def test_the_ordinary_sum_has_other_bits():
    """What the others compare can differ: or they would show nothing."""
    plain = program("a token", reproducible=False)
    one, eight = (bits(plain(filled(on(devices), seed=1))) for devices in (None, 8))
    assert not np.array_equal(one[0], eight[0])


@pytest.mark.parametrize(("devices", "kind"), [(3, "auto"), (8, "explicit")])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_any_dtype(dtype, devices, kind):
    cache = filled(on(devices, kind), seed=5, dtype=DTYPES[dtype])
    check_bits(cache, ["everything"], dtype)


def test_wherever_tokens_lie():
    for placement in PLACEMENTS:
        check_bits(filled(on(8), placement=placement), VIEWS)
    for seed in range(3):
        check_bits(filled(on(8), seed=10 + seed), VIEWS)


@pytest.mark.parametrize("devices", [None, 8])
def test_in_whatever_pieces_they_come(devices):
    check_bits(filled(on(devices), seed=20, chunk=9), VIEWS)


def test_edited_and_filled_again():
    """Slots that were freed keep what was in them, and others take the tokens."""
    cache = empty(on(8))
    junk = [np.full((LAYERS, B, 30, K, width), np.nan, np.float32) for width in (H, V)]
    cache = append(cache, *junk).reset(np.arange(B))
    cache = append(cache, KEYS[:, :, :30], VALUES[:, :, :30])
    lengths = np.array([19, 11])
    cache = cache.rewind(lengths)
    at = np.minimum(lengths[:, None] + np.arange(18), TOKENS - 1)
    rest = (x[:, np.arange(B)[:, None], at] for x in (KEYS, VALUES))
    cache = append(cache, *rest, lengths=LENGTHS - lengths)
    np.testing.assert_array_equal(cache.next_position, LENGTHS)
    cache = as_appended(cache)
    check_bits(cache, VIEWS)
    # What is left of a row, wherever it lies.
    few = filled()
    kept = (few.positions >= LENGTHS[:, None] - 12) | (few.positions < 3)
    few = dataclasses.replace(few, positions=jnp.where(kept, few.positions, -1))
    evicted = as_appended(cache.evict(12, keep_first=3))
    for view in VIEWS:
        check_same(program(view)(evicted), bits(program(view)(few)))


def test_resized_and_restored(tmp_path):
    cache = filled(on(3), seed=30)
    check_bits(cache.resize(sharding=cache_sharding(on(8))), VIEWS)
    check_bits(cache.resize(64, sharding=cache_sharding(on(8))), ["a token"])
    cache.resize(sharding=cache_sharding(on(5))).save(tmp_path)
    for devices in (None, 7, 8):
        check_bits(KVCache.restore(tmp_path, sharding=cache_sharding(on(devices))))


@pytest.mark.parametrize("strategy", [*ALL_REDUCES, "reduce_scatter"])
@pytest.mark.parametrize("kind", KINDS)
def test_any_strategy(strategy, kind):
    view, options = "a token", {}
    if strategy == "reduce_scatter":
        view, options = "a tree", {"query_sharding": P(None, "kv")}
    cache = filled(on(4, kind), seed=40)
    check_bits(cache, [view], strategy=strategy, **options)
    sent = collectives(program(view, strategy=strategy, **options).lower(cache).compile().as_text())
    assert bool(sent["collective-permute"]) == (strategy in ("butterfly", "reduce_scatter"))


def test_a_combine_of_no_power_of_two():
    for strategy in ("psum", "all_gather"):  # the butterfly is 'auto'
        check_bits(filled(on(5), seed=41), ["a token"], strategy=strategy)


def test_rows_and_heads_on_other_devices():
    mesh = jax.make_mesh((2, 2, 2), ("b", "kv", "h"), (KINDS["auto"],) * 3)
    sharding = cache_sharding(mesh, batch="b", heads="h")
    check_bits(filled(seed=50, sharding=sharding), ["everything"])


def test_a_cache_without_layers():
    cache, alone = filled(on(8), seed=60), empty(on(8), layers=None)
    same = ("positions", "counts", "next_position", "appended")
    alone = dataclasses.replace(
        alone,
        **{name: getattr(cache, name)[LAYER] for name in ("key", "value")},
        **{name: getattr(cache, name) for name in same},
    )
    check_bits(alone, ["a token"])


def test_one_slot_on_each_device():
    """A product of one key is another kind of loop in XLA; and of a cache that is empty."""
    query, key, value = numbers(70, 1, 1, 4, 64), numbers(71, 1, 6, 2, 64), numbers(72, 1, 6, 2, 64)
    results = []
    for devices in (None, 3, 6):
        cache = KVCache.create(1, 6, 2, 64, dtype=jnp.float32, sharding=cache_sharding(on(devices)))

        @functools.partial(jax.jit, compiler_options=FULLY_OPTIMIZED)
        def run(cache, lengths):
            cache = cache.append(key, value, lengths=lengths)
            return cache.attend(query, reproducible=True, return_residual=True)

        results.append([run(cache, np.array([n], np.int32)) for n in (6, 1, 0)])
    for other in results[1:]:
        jax.tree.map(np.testing.assert_array_equal, results[0], other)
    out, lse = results[0][2]
    assert not np.asarray(out).any()
    assert (np.asarray(lse) == -np.inf).all()


def test_the_gradient_of_a_query():
    def gradient(cache):
        def loss(query, key):
            held = dataclasses.replace(cache, key=key)
            return (held.attend(query, layer=LAYER, reproducible=True) ** 2).sum()

        return jax.grad(loss, (0, 1))(jnp.asarray(QUERY), cache.key)

    run = jax.jit(gradient, compiler_options=FULLY_OPTIMIZED)
    cache = filled(on(8), seed=80)
    d_query, d_key = (np.asarray(x) for x in run(cache))
    want_query, want_key = (np.asarray(x) for x in run(filled()))
    assert np.array_equal(d_query, want_query)
    tags = np.asarray(cache.positions)
    slots = np.nonzero(tags >= 0)
    for b, s in zip(*slots, strict=True):
        assert np.array_equal(d_key[:, b, s], want_key[:, b, tags[b, s]])


def test_a_query_sharded_over_other_devices():
    mesh = jax.make_mesh((2, 4), ("rows", "kv"), (KINDS["auto"],) * 2)
    cache = filled(mesh, seed=90)
    sharded = jax.device_put(QUERY, NamedSharding(mesh, P(None, "rows")))

    @functools.partial(jax.jit, compiler_options=FULLY_OPTIMIZED)
    def run(cache, query):
        given = {"query_sharding": P(None, "rows"), "reproducible": True, "return_residual": True}
        return cache.attend(query, layer=LAYER, tree_mask=TREE, **given)

    check_same(run(cache, sharded), wanted("a tree"))
