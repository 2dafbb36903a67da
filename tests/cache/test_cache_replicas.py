"""Each token on two hosts, and what is left of a cache when hosts are gone: rows of fake devices here."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from distattn import KVCache
from distattn.cache import replicas
from distattn.cache.layout import read_layout
from distattn.testing import collectives, reference
from tests.cases import FULLY_OPTIMIZED, KINDS, cache_sharding, check_copies
from tests.tolerance import assert_close

B, K, N, H, V, CAPACITY = 2, 2, 4, 8, 6, 40
LENGTHS = (29, 17)
FORMS = {
    "float32": {"dtype": jnp.float32},
    "bfloat16_layers": {"dtype": jnp.bfloat16, "layers": 2},
    "int8": {"dtype": jnp.int8},
}


def mesh(kind: str, *shape: int, names: tuple[str, ...] = ("host", "device")) -> Mesh:
    devices = np.array(jax.devices()).reshape(shape)
    return Mesh(devices, names, axis_types=(KINDS[kind],) * len(names))


SLOTS = ("host", "device")


def over_rows_and_heads() -> NamedSharding:
    three = mesh("auto", 2, 2, 2, names=("rows", "host", "heads"))
    return cache_sharding(three, "host", batch="rows", heads="heads")


# The sharding of the cache; hosts are along the axis of that name.
PLACES = {
    "4x2": lambda: cache_sharding(mesh("auto", 4, 2), SLOTS),
    "4x2_explicit": lambda: cache_sharding(mesh("explicit", 4, 2), SLOTS),
    "rows_and_heads": over_rows_and_heads,
    "4_and_copies": lambda: cache_sharding(mesh("explicit", 4, 2), "host"),
}
append = jax.jit(KVCache.append, donate_argnums=0)
every_place = pytest.mark.parametrize("place", PLACES)
all_kinds = pytest.mark.parametrize(
    ("place", "form"),
    [*((place, "float32") for place in PLACES), *(("4x2", form) for form in FORMS)][1:],
)


def tokens(layers: int | None = None, count: int = max(LENGTHS)) -> tuple[np.ndarray, np.ndarray]:
    lead = (B, count, K) if layers is None else (layers, B, count, K)
    rng = np.random.default_rng(5)
    return tuple(rng.normal(size=(*lead, width)).astype(np.float32) for width in (H, V))


def filled(place: str, form: str = "float32", copies: int = 2) -> KVCache:
    """Two ragged rows, in three appends."""
    options = {"sharding": PLACES[place](), **FORMS[form], "replicas": copies}
    cache = KVCache.create(B, CAPACITY, K, H, value_dim=V, **options)
    key, value = tokens(cache.layers)
    with jax.set_mesh(cache.layout.mesh):
        for start, stop in ((0, 20), (20, 21), (21, 29)):
            part = np.s_[..., start:stop, :, :]
            lengths = np.clip(np.array(LENGTHS, np.int32) - start, 0, stop - start)
            cache = append(cache, key[part], value[part], lengths=lengths)
    return cache


def by_token(cache: KVCache) -> list[dict]:
    """Of every row {position: bytes of all that is stored for it}; each position is there once."""
    names = [name for name in replicas.token_letters(cache.arrays) if name != "positions"]
    arrays = [np.asarray(getattr(cache, name)) for name in names]
    tags, rows = np.asarray(cache.positions), []
    for b in range(B):
        slots = np.flatnonzero(tags[b] >= 0)
        at = [np.take(x, b, axis=0 if cache.layers is None else 1) for x in arrays]
        axis = 0 if cache.layers is None else 1
        rows.append(
            {int(tags[b, s]): [np.take(x, s, axis=axis).tobytes() for x in at] for s in slots}
        )
        assert len(rows[b]) == len(slots)
    counts = (tags.reshape(B, cache.layout.devices, -1) >= 0).sum(axis=-1)
    np.testing.assert_array_equal(cache.counts, counts)
    return rows


def without(cache: KVCache, *hosts: int) -> Mesh:
    """The mesh of the cache without hosts."""
    old = cache.layout.mesh
    axis = old.axis_names.index("host")
    return Mesh(np.delete(old.devices, hosts, axis), old.axis_names, axis_types=old.axis_types)


def attended(cache: KVCache) -> jax.Array:
    query = np.random.default_rng(1).normal(size=(B, 3, N, H)).astype(np.float32)
    with jax.set_mesh(cache.layout.mesh):
        layer = None if cache.layers is None else 1
        return cache.attend(query, layer=layer, query_positions=np.arange(26, 29, dtype=np.int32))


@all_kinds
def test_every_change_is_made_twice(place, form):
    cache = filled(place, form)
    assert cache.replicas == 2
    check_copies(cache)
    with jax.set_mesh(cache.layout.mesh):
        for changed in (
            cache.rewind(np.array([22, 17], np.int32)),
            cache.evict(7, keep_first=2),
            cache.accept(np.array([1, 3, 4], np.int32)),
            cache.reset(1),
            cache.fork(0, 1),
        ):
            check_copies(changed)
            assert changed.positions.tolist() != cache.positions.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_that_stay_on_their_device_are_sent_to_the_other(kind):
    where = mesh(kind, 4, 2)
    sharding = cache_sharding(where, SLOTS)
    cache = KVCache.create(
        B, 32, K, H, value_dim=V, dtype=jnp.float32, sharding=sharding, replicas=2
    )
    along = NamedSharding(where, P(None, ("host", "device")))
    with jax.set_mesh(where):
        key, value = (jax.device_put(x, along) for x in tokens(count=16))
        step = jax.jit(functools.partial(KVCache.append, owner="local"), donate_argnums=0)
        compiled = step.lower(cache, key, value).compile()
        assert collectives(compiled.as_text()) == {"collective-permute": 2}, "key and value"
        cache = compiled(cache, key, value)
    check_copies(cache)
    tags = np.asarray(cache.positions).reshape(B, 8, -1)
    assert [sorted(x[x >= 0]) for x in tags[0]] == [[2 * d, 2 * d + 1] for d in range(8)]


def test_a_step_sends_nothing_for_the_copies_and_copies_nothing():
    compiled = {}
    for copies in (1, 2):
        cache = KVCache.create(
            1, 4096, 1, 64, dtype=jnp.float32, sharding=PLACES["4x2"](), replicas=copies
        )
        new = jnp.zeros((1, 1, 1, 64), jnp.float32)

        def step(cache, new):
            cache = cache.append(new, new)
            return cache, cache.attend(new, strategy="butterfly")

        lowered = jax.jit(step, donate_argnums=0).lower(cache, new)
        compiled[copies] = lowered.compile(FULLY_OPTIMIZED)
    one, two = (collectives(compiled[n].as_text()) for n in (1, 2))
    assert one == two == {"collective-permute": 3}
    share = 2**17 // 8 * 64 * 4  # bytes of the keys of a device
    assert compiled[2].memory_analysis().temp_size_in_bytes < share


@all_kinds
def test_a_host_is_lost_and_no_key(place, form):
    cache = filled(place, form)
    cache = dataclasses.replace(cache, refused=cache.refused + np.array([0, 7], np.int32))
    before, out = by_token(cache), attended(cache)
    hosts = cache.layout.mesh.shape["host"]
    for host in range(hosts) if (place, form) == ("4x2", "float32") else (1,):
        left, lost = cache.recover(without(cache, host))
        assert [x.tolist() for x in lost] == [[], []]
        assert left.capacity >= CAPACITY
        assert left.layout.mesh.shape["host"] == hosts - 1
        assert left.replicas == (2 if left.layout.devices > 1 else 1)
        assert by_token(left) == before
        counts = np.asarray(left.counts)
        assert counts.max() <= left.capacity // left.layout.devices
        check_copies(left)
        for name in ("next_position", "appended", "placed", "overflow", "refused"):
            np.testing.assert_array_equal(getattr(left, name), getattr(cache, name))
        assert_close(attended(left), out, jnp.float32, max(LENGTHS), what=f"without {host}")


def test_hosts_of_one_device_each():
    """A mesh of one axis."""
    sharding = cache_sharding(mesh("auto", 8, names=("host",)), "host")
    append = {"key": np.ones((B, 9, K, H), np.float32), "value": np.ones((B, 9, K, V), np.float32)}
    cache = KVCache.create(
        B, CAPACITY, K, H, value_dim=V, dtype=jnp.float32, sharding=sharding
    ).append(**append)
    left, lost = cache.recover(without(cache, 1, 4))
    assert left.layout.devices == 6
    assert [
        sorted([*row[row >= 0], *gone]) for row, gone in zip(left.positions, lost, strict=True)
    ] == [list(range(9))] * B


def test_one_host_after_the_other():
    cache = filled("4x2")
    before, out = by_token(cache), attended(cache)
    key, value = tokens(count=3)
    for left, gone in ((3, 1), (2, 0)):
        cache, lost = cache.recover(without(cache, gone))
        assert not any(x.size for x in lost)
        assert cache.layout.mesh.shape["host"] == left
        assert by_token(cache) == before
        assert_close(attended(cache), out, jnp.float32, max(LENGTHS), what=f"{left} hosts")
        with jax.set_mesh(cache.layout.mesh):
            more = append(jax.tree.map(jnp.copy, cache), key, value)
        check_copies(more)
        assert [max(row) for row in by_token(more)] == [n + 2 for n in LENGTHS]


def test_hosts_that_hold_each_others_copies_are_lost_together():
    cache = filled("4x2")
    before = by_token(cache)
    left, lost = cache.recover(without(cache, 0, 2))
    assert not any(x.size for x in lost), "their sources are others"
    assert by_token(left) == before
    left, lost = cache.recover(without(cache, 1, 2))
    shares = np.asarray(cache.positions).reshape(B, 4, -1)
    for row in range(B):
        gone = shares[row, 1]
        assert lost[row].tolist() == sorted(gone[gone >= 0])
        kept = {p: x for p, x in before[row].items() if p not in gone}
        assert by_token(left)[row] == kept
    check_copies(left)


@every_place
def test_without_copies_what_is_lost_is_said_and_can_be_computed_again(place):
    cache = filled(place, copies=1)
    out, shares = attended(cache), cache.layout.mesh.shape["host"]
    left, lost = cache.recover(without(cache, 1))
    tags = np.asarray(cache.positions).reshape(B, shares, -1)[:, 1]
    assert [x.tolist() for x in lost] == [sorted(row[row >= 0]) for row in tags]
    assert all(x.dtype == np.int32 for x in lost)
    assert left.replicas == 1
    key, value = tokens()
    longest = max(map(len, lost))
    at = np.stack([np.pad(x, (0, longest - len(x)), constant_values=-1) for x in lost])
    rows = np.arange(B)[:, None]
    with jax.set_mesh(left.layout.mesh):
        whole = left.append(key[rows, at], value[rows, at], positions=at)
    assert by_token(whole) == by_token(cache)
    assert_close(attended(whole), out, jnp.float32, max(LENGTHS), what=place)
    np.testing.assert_array_equal(whole.next_position, cache.next_position)


def test_what_was_evicted_is_not_lost():
    cache = filled("4x2", copies=1)
    with jax.set_mesh(cache.layout.mesh):
        cache = cache.evict(10, keep_first=2)
    tags = np.asarray(cache.positions)
    smaller = without(cache, 2)
    with pytest.raises(
        ValueError, match=r"sequence 0 has lost \d positions.*some had been evicted.*expected="
    ):
        cache.recover(smaller)
    with pytest.raises(ValueError, match="expected has 1 sequences, and the cache 2"):
        cache.recover(smaller, expected=[range(3)])
    _, lost = cache.recover(smaller, expected=[row[row >= 0] for row in tags])
    gone = tags.reshape(B, 4, -1)[:, 2]
    assert [x.tolist() for x in lost] == [sorted(row[row >= 0]) for row in gone]


def test_a_cache_gets_its_copies_later_and_gives_them_up(tmp_path):
    cache = filled("4x2", copies=1)
    before = by_token(cache)
    twice = cache.resize(replicas=2)
    check_copies(twice)
    assert (twice.replicas, by_token(twice)) == (2, before)
    larger = twice.resize(80, sharding=cache_sharding(mesh("explicit", 2, 4), SLOTS))
    check_copies(larger)
    assert (larger.replicas, larger.capacity, by_token(larger)) == (2, 80, before)
    assert larger.resize(replicas=1).replica is None
    twice.save(tmp_path)
    assert KVCache.restore(tmp_path, sharding=PLACES["4x2"]()).replicas == 1
    restored = KVCache.restore(tmp_path, sharding=PLACES["4x2"](), replicas=2)
    check_copies(restored)
    assert by_token(restored) == before


def test_sources_are_on_other_hosts_in_any_order_of_the_devices():
    layout = read_layout(PLACES["4x2"]())
    assert replicas.replica_source(layout) == (6, 7, 0, 1, 2, 3, 4, 5)
    sources = replicas.replica_source(read_layout(cache_sharding(mesh("auto", 8, names=("kv",)))))
    assert sorted(sources) == list(range(8))
    assert all(source != device for device, source in enumerate(sources))


@pytest.mark.parametrize(
    ("hosts", "fits"),
    [
        ([0, 0, 1, 1, 2, 2], True),
        ([2, 0, 1, 1, 0, 2], True),
        ([0, 0, 0, 1, 1, 2], True),
        ([0, 0, 0, 0, 1, 2], False),
        ([5], False),
    ],
)
def test_uneven_hosts(monkeypatch, hosts, fits):
    monkeypatch.setattr(replicas, "_hosts", lambda layout: [frozenset({x}) for x in hosts])
    devices = np.array(jax.devices()[: len(hosts)])
    layout = read_layout(cache_sharding(Mesh(devices, ("kv",))))
    replicas.replica_source.cache_clear()
    try:
        assert replicas.replicas_fit(layout) == fits
        if fits:
            sources = replicas.replica_source(layout)
            assert sorted(sources) == list(range(len(hosts)))
            assert all(hosts[source] != hosts[device] for device, source in enumerate(sources))
        else:
            with pytest.raises(
                ValueError, match="no host has more than half of them.*or replicas=1"
            ):
                replicas.replica_source(layout)
    finally:
        replicas.replica_source.cache_clear()


def test_wrong_calls():
    cache = filled("4x2")
    with pytest.raises(ValueError, match="replicas is 3; it must be 1, or 2"):
        cache.resize(replicas=3)
    with pytest.raises(ValueError, match=r"replicas is 2, and the 1 devices.*or replicas=1"):
        KVCache.create(B, CAPACITY, K, H, dtype=jnp.float32, replicas=2)
    with pytest.raises(ValueError, match="for a cache on one device"):
        KVCache.create(B, CAPACITY, K, H, dtype=jnp.float32).recover(mesh("auto", 4, 2))
    for other in (
        mesh("auto", 2, 4),
        mesh("auto", 8, names=("kv",)),
        Mesh(cache.layout.mesh.devices[::-1], ("host", "device")),
        Mesh(cache.layout.mesh.devices[:3, :1], ("host", "device")),
    ):
        with pytest.raises(ValueError, match="some indices along one axis left out"):
            cache.recover(other)
    with pytest.raises(ValueError, match="recover was called under a trace"):
        jax.jit(lambda c: c.recover(without(cache, 1))[0])(cache)
    rows = filled("rows_and_heads")
    devices = rows.layout.mesh.devices
    with pytest.raises(
        ValueError, match="along 'rows', over which the cache shards sequences or heads"
    ):
        rows.recover(Mesh(devices[:1], rows.layout.mesh.axis_names))
    same, lost = cache.recover(cache.layout.mesh)
    assert by_token(same) == by_token(cache)
    assert [x.size for x in lost] == [0, 0]


def test_the_copies_take_part_in_no_attention():
    cache = filled("4x2")
    key, value = tokens()
    where = np.arange(max(LENGTHS))[None] < np.array(LENGTHS)[:, None]
    query = np.random.default_rng(1).normal(size=(B, 3, N, H)).astype(np.float32)
    at = np.arange(26, 29, dtype=np.int32)
    want, _ = reference.dot_product_attention(
        query, key, value, is_causal=True, query_positions=at, mask=where[:, None, None]
    )
    assert_close(attended(cache), want, jnp.float32, max(LENGTHS), what="copies")
