"""Numbers out of range: an error where the host knows them, else what the docstrings say, and no more."""

from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from distattn import KVCache
from distattn.cache.arguments import known, on_host
from distattn.cache.slots import PLACEMENTS
from tests.cases import KINDS, cache_sharding, mesh_of

B, K, H, N, CAPACITY = 4, 2, 8, 4, 16
LENGTHS = (5, 3, 0, 4)
grid = jax.make_mesh((2, 2, 2), ("rows", "kv", "heads"), (KINDS["auto"],) * 3)
LAYOUTS = {
    "one": {},
    "8": {"sharding": cache_sharding(mesh_of(8, "auto"))},
    "rows": {"sharding": cache_sharding(grid, batch="rows", heads="heads")},
}
every_layout = pytest.mark.parametrize("layout", LAYOUTS)


def tokens(count=5, layers=None):
    lead = () if layers is None else (layers,)
    return np.random.default_rng(count).normal(size=(2, *lead, B, count, K, H)).astype(np.float32)


def filled(layout="one", dtype=jnp.float32, **options):
    """Rows of 5, 3, 0 and 4 tokens, all from the last append."""
    cache = KVCache.create(B, CAPACITY, K, H, dtype=dtype, **LAYOUTS[layout], **options)
    return append(cache, *tokens(layers=cache.layers), np.array(LENGTHS, np.int32))


append = jax.jit(lambda cache, key, value, lengths: cache.append(key, value, lengths=lengths))


def is_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for x, y in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        np.testing.assert_array_equal(x, y)


def write(cache, layer):
    cache, slots = cache.reserve(5, lengths=np.zeros(B, np.int32))
    return cache.write(*tokens(), slots, layer=layer)


def attend(cache, layer):
    return cache.attend(np.ones((B, 1, N, H), np.float32), layer=layer)


# A method, what it gets, and what the error says: the argument, its value, the range, the remedy.
WRONG = {
    "append, lengths": (
        lambda c, x: c.append(*tokens(), lengths=x),
        {
            6: r"lengths is 6; it must be 0 \.\. 5: the first ones of the T=5 tokens; append more",
            -1: r"lengths is -1; it must be 0 \.\. 5",
            (0, 5, 9, -1): r"lengths\[2\] is 9; it must be 0 \.\. 5.*0 for no token",
            2**32 + 1: r"lengths is 4294967297; it must be 0 \.\. 5",
        },
    ),
    "reserve, lengths": (
        lambda c, x: c.reserve(2, lengths=x),
        {3: r"lengths is 3; it must be 0 \.\. 2", (0, 0, 0, -7): r"lengths\[3\] is -7"},
    ),
    "reserve, owner": (
        lambda c, x: c.reserve(2, owner=x),
        {
            (0, 1): r"owner\[1\] is 1; it must be 0 \.\. 0: slots are on 1 devices",
            (-1, 0): r"owner\[0\] is -1; it must be 0 \.\. 0",
        },
    ),
    "reserve, positions": (
        lambda c, x: c.reserve(2, positions=x),
        {
            (0, 2**31 - 1): r"positions\[1\] is 2147483647; it must be .* \.\. 2147483646: .*int32",
            (2**40, 0): r"positions\[0\] is 1099511627776; it must be .*negative is no token",
        },
    ),
    "rewind": (
        lambda c, x: c.rewind(x),
        {
            -3: r"lengths is -3; for sequence 0 it must be 0 \.\. 5: .*longer; pass .*next_position",
            99: r"lengths is 99; for sequence 0 it must be 0 \.\. 5",
            4: r"lengths is 4; for sequence 1 it must be 0 \.\. 3",
            (5, 3, 0, 5): r"lengths\[3\] is 5; for sequence 3 it must be 0 \.\. 4",
        },
    ),
    "evict, window": (
        lambda c, x: c.evict(x),
        {
            -1: r"window is -1; it must be 0 \.\. 2147483647: it is how many positions stay",
            (3, 3, -2, 3): r"window\[2\] is -2; it must be 0 .*cache.reset empties",
        },
    ),
    "evict, keep_first": (
        lambda c, x: c.evict(3, keep_first=x),
        {-1: r"keep_first is -1; it must be 0", (0, -4, 0, 0): r"keep_first\[1\] is -4"},
    ),
    "accept, nodes": (
        lambda c, x: c.accept(x, lengths=np.array([2, 1, 2, 2])),
        {
            (
                0,
                5,
            ): r"nodes is \[0, 5\] for sequence 0, .* added 5 tokens to it; .* 0 \.\. 4, .*pass -1, or len",
            (
                3,
                -1,
            ): r"nodes is \[3\] for sequence 1, and the last append added 3 tokens to it; .* 0 \.\. 2",
            (1, 1): r"nodes is \[1, 1\] for sequence 0; a path has each node once: pass -1",
        },
    ),
    "accept, lengths": (
        lambda c, x: c.accept([0, 1, 2], lengths=x),
        {
            4: r"lengths is 4; it must be 0 \.\. 3: the first ones of the P=3 nodes; 0 for a sequence",
            (3, -1, 0, 3): r"lengths\[1\] is -1; it must be 0 \.\. 3",
        },
    ),
    "reset": (
        lambda c, x: c.reset(x),
        {
            4: r"sequences is 4; it must be 0 \.\. 3: an index of a sequence \(B=4\)",
            (1, -1): r"sequences\[1\] is -1; it must be 0 \.\. 3",
            2**40: r"sequences is 1099511627776; it must be 0 \.\. 3",
        },
    ),
    "fork, source": (
        lambda c, x: c.fork(x, 0),
        {-1: r"source is -1; it must be 0 \.\. 3", 9: r"source is 9; it must be 0 \.\. 3"},
    ),
    "fork, target": (
        lambda c, x: c.fork([0, 0], x),
        {
            (1, 4): r"target\[1\] is 4; it must be 0 \.\. 3",
            (2, 2): r"target is \[2, 2\]; .* pass each target once",
        },
    ),
}
LAYERED = {
    "write": (
        write,
        {2: r"layer is 2; it must be 0 \.\. 1: the cache has 2 layers", -1: "layer is -1"},
    ),
    "attend": (attend, {2: r"layer is 2; it must be 0 \.\. 1", -1: "layer is -1; it must be 0"}),
}
ALL = [
    (call, number, message, layers)
    for cases, layers in ((WRONG, None), (LAYERED, 2))
    for call, numbers in cases.values()
    for number, message in numbers.items()
]


@pytest.mark.parametrize(("call", "number", "message", "layers"), ALL)
def test_a_number_out_of_range_is_named_with_the_range_and_the_remedy(
    call, number, message, layers
):
    cache = filled(layers=layers)
    given = number if not isinstance(number, tuple) else list(number)
    with pytest.raises(ValueError, match=message):
        call(cache, given)
    with pytest.raises(ValueError, match=message):
        call(cache, np.array(given))


@pytest.mark.parametrize("count", [0, -2, 2.5, True])
def test_a_reservation_is_for_a_number_of_tokens(count):
    with pytest.raises(
        ValueError, match=f"tokens is {count}; it must be an int of at least 1: pass len"
    ):
        filled().reserve(count)


def test_under_jit_the_numbers_of_the_host_are_checked_too():
    cache = filled()
    for call, message in (
        (lambda c: c.rewind(-3), r"lengths is -3; it must be 0 \.\. 2147483647"),
        (lambda c: c.evict(-1), "window is -1"),
        (lambda c: c.append(*tokens(), lengths=6), "lengths is 6"),
        (lambda c: c.accept([0, 0]), "each node once"),
        (lambda c: c.fork(4, 0), "source is 4"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.jit(call)(cache)
    # What only the devices know is not: the row stays as it is, as with a tracer.
    is_same(jax.jit(lambda c: c.rewind(99))(cache), cache)


def test_what_a_device_has_is_read_where_the_call_waits_for_it_anyway():
    cache = filled()
    for call, message in (
        (lambda: cache.append(*tokens(), lengths=jnp.array([0, 9, 0, 0])), r"lengths\[1\] is 9"),
        (lambda: cache.reserve(2, owner=jnp.array([0, 1])), r"owner\[1\] is 1"),
        (
            lambda: cache.reserve(1, positions=jnp.array([2**31 - 1])),
            r"positions\[0\] is 2147483647",
        ),
        (lambda: cache.reset(jnp.array([7])), r"sequences\[0\] is 7"),
        (lambda: cache.fork(jnp.int32(7), jnp.int32(0)), "source is 7"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    is_same(cache.rewind(jnp.array([99, 3, 5, 4])), cache)
    is_same(cache.rewind(jnp.int32(-3)), cache.rewind(0))
    is_same(cache.evict(jnp.int32(-3), keep_first=jnp.int32(-3)), cache.evict(0))
    is_same(cache.accept(jnp.array([0, 7]), jnp.int32(9)), cache.accept([0, -1], 2))


@every_layout
def test_a_tracer_out_of_range_does_what_is_written_and_harms_no_other_row(layout):
    cache = filled(layout)

    def traced(method, *numbers):
        return jax.jit(method)(cache, *(np.array(x, np.int32) for x in numbers))

    def host(method, *numbers):
        return jax.jit(lambda c: method(c, *(np.array(x, np.int32) for x in numbers)))(cache)

    lengths = lambda c, n: c.append(*tokens(), lengths=n)  # noqa: E731
    is_same(traced(lengths, [9, -4, 2, 0]), host(lengths, [5, 0, 2, 0]))
    is_same(traced(KVCache.rewind, [9, -4, 2, 1]), host(KVCache.rewind, [5, 0, 0, 1]))
    is_same(traced(KVCache.evict, [9, -4, 2, 1]), host(KVCache.evict, [9, 0, 2, 1]))
    is_same(
        traced(KVCache.accept, [[0, 4], [0, 4], [0, 4], [2, 0]], [9, 2, 2, -1]),
        host(KVCache.accept, [[0, 4], [0, -1], [-1, -1], [-1, -1]], [2, 2, 2, 0]),
    )
    is_same(traced(KVCache.reset, [-1, 4, 99]), cache)
    is_same(traced(KVCache.reset, [-1, 0]), host(KVCache.reset, [0]))
    # Pairs of which one row is not there; and of pairs with one target the last that is there.
    is_same(traced(KVCache.fork, [-1, 4, 0, 0], [1, 2, -1, 4]), cache)
    is_same(traced(KVCache.fork, [0, 1, 7, 1], [3, 3, 3, 0]), host(KVCache.fork, [1, 1], [3, 0]))


def test_of_a_tracer_a_device_that_is_not_there_has_no_place():
    for placement in PLACEMENTS:
        cache = filled("8", placement=placement)
        step = jax.jit(lambda c, owner: c.reserve(2, owner=owner))
        for owner in ([0, 8], [-1, 0]):
            refused, slots = step(cache, np.array(owner, np.int32))
            assert np.asarray(refused.overflow).all()
            assert (np.asarray(slots.positions) == -1).all()
            np.testing.assert_array_equal(refused.positions, cache.positions)
            np.testing.assert_array_equal(refused.counts, cache.counts)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.int8])
@every_layout
def test_of_a_tracer_a_layer_that_is_not_there_is_not_written_and_the_nearest_is_read(
    layout, dtype
):
    cache = filled(layout, dtype, layers=2)

    def put(cache, layer):
        cache, slots = cache.reserve(5)
        return cache.write(*tokens(), slots, layer=layer)

    with jax.set_mesh(cache.layout.mesh or jax.sharding.Mesh(np.empty((), object), ())):
        tags = jax.jit(lambda c: c.reserve(5)[0])(cache)
        for layer in (-1, 2, 99):
            is_same(jax.jit(put)(cache, np.int32(layer)), tags)
        assert (np.asarray(jax.jit(put)(cache, np.int32(1)).key) != np.asarray(tags.key)).any()
        outs = [np.asarray(jax.jit(attend)(cache, np.int32(x))) for x in (-1, 0, 1, 2)]
    assert (outs[0] == outs[1]).all()
    assert (outs[2] == outs[3]).all()
    assert (outs[1] != outs[2]).any()


def test_a_layer_is_one_integer():
    for call in (write, attend):
        with pytest.raises(ValueError, match="layer has dtype float.*int32"):
            call(filled(layers=2), 0.5)
        with pytest.raises(ValueError, match=r"layer has shape \(1,\); it must be one integer"):
            call(filled(layers=2), np.zeros(1, np.int32))


def test_a_row_that_the_last_append_brought_nothing_accepts_nothing():
    accepted = filled().accept([0, 1])  # row 2 got none of the tokens
    assert accepted.next_position.tolist() == [2, 2, 0, 2]
    assert accepted.appended.tolist() == [2, 2, 0, 2]


@pytest.mark.parametrize("replicated", [False, True])
def test_what_lies_on_other_hosts_alone_is_not_read(replicated):
    away = mock.MagicMock(spec=jax.Array)
    away.is_fully_addressable, away.is_fully_replicated = False, replicated
    away.addressable_shards = []
    assert isinstance(away, jax.Array)
    assert known(away) is None
    assert on_host(away) is None


def test_what_the_host_has():
    assert on_host(jnp.ones(3)) is None
    assert on_host([1, jnp.int32(2)]) is None
    assert on_host([1, 2]).tolist() == [1, 2]
    assert known([1, jnp.int32(2)]).tolist() == [1, 2]
    seen = []
    jax.jit(lambda x: seen.extend([known(x), known([1, x]), on_host(x)]))(0)
    assert seen == [None] * 3
