"""Position vectors, and arrays put into their order and back."""

import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from distattn.layouts import contiguous, reorder, restore, striped, zigzag
from tests.cases import KINDS, mesh_of

DEVICES = (1, 2, 3, 4, 8)
LAYOUTS = {
    "contiguous": contiguous,
    "zigzag": zigzag,
    "striped": striped,
    "stripes of 2": functools.partial(striped, stripe_size=2),
}
every_kind = pytest.mark.parametrize("kind", KINDS)
every_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)


def random_array(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def random_order(slots, seed=0):
    return np.random.default_rng(seed).permutation(slots).astype(np.int32)


def by_device(positions, devices):
    return positions.reshape(devices, -1).tolist()


def test_pictures():
    assert by_device(contiguous(8, 2), 2) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert by_device(zigzag(8, 2), 2) == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert by_device(zigzag(12, 3), 3) == [[0, 1, 10, 11], [2, 3, 8, 9], [4, 5, 6, 7]]
    assert by_device(striped(8, 2), 2) == [[0, 2, 4, 6], [1, 3, 5, 7]]
    assert by_device(striped(12, 2, stripe_size=3), 2) == [[0, 1, 2, 6, 7, 8], [3, 4, 5, 9, 10, 11]]


@every_layout
@pytest.mark.parametrize("shards", DEVICES)
def test_every_position_has_one_slot(layout, shards):
    positions = layout(48, shards)
    assert positions.dtype == np.int32
    assert sorted(positions.tolist()) == list(range(48))


@pytest.mark.parametrize("shards", DEVICES)
def test_zigzag_gives_all_devices_the_same_causal_work(shards):
    work = (zigzag(48, shards) + 1).reshape(shards, -1).sum(axis=1)
    assert len(set(work.tolist())) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: contiguous(10, 4), "seq_len is 10.*multiple of shards = 4.*pad .* to 12, with -1"),
        (lambda: zigzag(12, 4), "seq_len is 12.*multiple of 2 . shards = 8.*pad .* to 16"),
        (lambda: striped(12, 2, 4), "seq_len is 12.*shards . stripe_size = 8.*pad .* to 16"),
        (lambda: contiguous(-4, 2), "seq_len is -4; it must not be negative"),
        (lambda: contiguous(8, 0), "shards is 0.*the number of devices"),
        (lambda: striped(8, 2, 0), "stripe_size is 0.*pass 1"),
    ],
)
def test_lengths_that_do_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@hypothesis.given(
    st.permutations(range(12)),
    st.sampled_from([(0, (12, 3)), (1, (2, 12)), (1, (2, 12, 3)), (-2, (2, 12, 3)), (-1, (2, 12))]),
)
def test_restore_is_the_inverse_of_reorder(order, axis_and_shape):
    axis, shape = axis_and_shape
    x, positions = random_array(*shape), np.asarray(order, np.int32)
    there = reorder(x, positions, axis)
    np.testing.assert_array_equal(there, np.take(x, positions, axis))
    np.testing.assert_array_equal(restore(there, positions, axis), x)
    np.testing.assert_array_equal(reorder(restore(x, positions, axis), positions, axis), x)


@hypothesis.given(st.permutations(range(12)), st.permutations(range(12)))
def test_orders_compose(first, second):
    x, first, second = random_array(2, 12), np.asarray(first), np.asarray(second)
    np.testing.assert_array_equal(
        reorder(reorder(x, first), second), reorder(x, np.asarray(reorder(first[None], second))[0])
    )


def test_rows_with_orders_of_their_own():
    x = random_array(3, 8, 2)
    positions = np.stack([random_order(8, seed) for seed in range(3)])
    there = reorder(x, positions)
    np.testing.assert_array_equal(there, np.take_along_axis(x, positions[:, :, None], axis=1))
    np.testing.assert_array_equal(restore(there, positions, axis=-2), x)


@pytest.mark.parametrize("rows", [1, 2])
def test_empty_slots_are_zero_and_give_nothing_back(rows):
    x = random_array(2, 6)
    one = np.array([4, -1, 0, 2, -7, 5], np.int32)
    positions = one if rows == 1 else np.stack([one, one[::-1]])
    there = np.asarray(reorder(x, positions))
    want = np.stack(
        [
            np.where(p < 0, 0, x[b, np.maximum(p, 0)])
            for b, p in enumerate(np.broadcast_to(positions, (2, 6)))
        ]
    )
    np.testing.assert_array_equal(there, want)
    there = np.where(there == 0, np.nan, there)
    back = np.where(np.isin(np.arange(6), one), x, 0)
    np.testing.assert_array_equal(restore(there, positions), back)


def test_a_position_of_which_there_are_two_copies_is_read_twice():
    x = random_array(1, 4)
    out, pull = jax.vjp(lambda x: reorder(x, np.array([2, 2, 0, -1])), jnp.asarray(x))
    np.testing.assert_array_equal(out, [[x[0, 2], x[0, 2], x[0, 0], 0]])
    np.testing.assert_array_equal(pull(jnp.array([[1.0, 2, 4, 8]]))[0], [[4, 0, 3, 0]])


@pytest.mark.parametrize(
    "dtype", [jnp.bfloat16, jnp.float16, jnp.float8_e4m3fn, jnp.int8, jnp.uint32, bool, complex]
)
def test_any_dtype(dtype):
    x = jnp.asarray(np.arange(12).reshape(2, 6) % 5, dtype)
    positions = np.array([4, -1, 0, 2, 3, 5], np.int32)
    there = reorder(x, positions)
    assert there.dtype == x.dtype
    zero = jnp.zeros((), x.dtype)
    np.testing.assert_array_equal(there, jnp.where(positions[None] < 0, zero, x[:, positions]))
    np.testing.assert_array_equal(restore(there, positions), x.at[:, 1].set(zero))


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.int32])
def test_any_integer_names_a_position(dtype):
    x, positions = random_array(2, 6), random_order(6).astype(dtype)
    np.testing.assert_array_equal(reorder(x, positions), x[:, positions])


def test_nothing_to_reorder():
    assert reorder(np.zeros((2, 0, 3)), np.zeros(0, np.int32)).shape == (2, 0, 3)
    assert restore(np.zeros((0, 4)), np.arange(4)).shape == (0, 4)


def placed(x, mesh, spec):
    return jax.device_put(x, NamedSharding(mesh, spec))


def meshes(kind):
    yield mesh_of(4, kind), P(None, "kv")
    yield jax.make_mesh((2, 4), ("b", "kv"), (KINDS[kind],) * 2), P("b", "kv")
    yield jax.make_mesh((2, 2, 2), ("h", "x", "y"), (KINDS[kind],) * 3), P(None, ("y", "x"), "h")


@pytest.mark.parametrize(
    ("which", "under_jit", "kind", "rows"),
    [  # any two of these in every combination
        (0, True, "auto", 1),
        (0, False, "explicit", 2),
        (1, True, "explicit", 1),
        (1, False, "auto", 2),
        (2, True, "auto", 2),
        (2, False, "explicit", 1),
    ],
)
def test_the_layout_on_the_mesh_stays(kind, which, under_jit, rows):
    mesh, spec = list(meshes(kind))[which]
    x = random_array(2, 16, 2)
    positions = random_order(16) if rows == 1 else np.stack([random_order(16), random_order(16, 1)])
    index = np.broadcast_to(positions, (2, 16))[:, :, None]
    want = np.take_along_axis(x, index, axis=1)
    sharded = placed(x, mesh, spec)
    wrap = jax.jit if under_jit else lambda f: f
    own = P(spec[1]) if rows == 1 else P(spec[0], spec[1])
    for order in (positions, jnp.asarray(positions), placed(positions, mesh, own)):
        there = wrap(reorder)(sharded, order)
        np.testing.assert_array_equal(there, want)
        assert there.sharding.is_equivalent_to(sharded.sharding, 3)
        back = wrap(restore)(there, order)
        np.testing.assert_array_equal(back, x)
        assert back.sharding.is_equivalent_to(sharded.sharding, 3)


@every_kind
@pytest.mark.parametrize("which", range(3))
def test_gradients_on_a_mesh(kind, which):
    mesh, spec = list(meshes(kind))[which]
    x, weight, positions = random_array(2, 16, 2), random_array(2, 16, 2, seed=1), random_order(16)
    sharded = placed(x, mesh, spec)
    for f, inverse in ((reorder, restore), (restore, reorder)):
        gradient = jax.jit(_pull(f))(sharded, positions, placed(weight, mesh, spec))
        np.testing.assert_array_equal(gradient, inverse(weight, positions))
        assert gradient.sharding.is_equivalent_to(sharded.sharding, 3)


def _pull(f):
    return lambda x, positions, weight: jax.vjp(lambda x: f(x, positions), x)[1](weight)[0]


@every_kind
def test_gradient_outside_jit(kind):
    mesh = mesh_of(4, kind)
    x, positions = placed(random_array(2, 16), mesh, P(None, "kv")), random_order(16)
    with jax.set_mesh(mesh):
        gradient = jax.grad(lambda x: jnp.sum(reorder(x, positions) ** 2))(x)
    np.testing.assert_array_equal(gradient, 2 * x)


@every_kind
def test_positions_that_lie_on_a_mesh_where_x_does_not(kind):
    positions = random_order(16)
    order = placed(positions, mesh_of(4, kind), P("kv"))
    x = random_array(2, 16)
    np.testing.assert_array_equal(jax.jit(reorder)(x, order), x[:, positions])
    np.testing.assert_array_equal(jax.jit(restore)(x[:, positions], order), x)


@every_kind
def test_under_vmap(kind):
    mesh = mesh_of(4, kind)
    x, positions = random_array(3, 2, 16), random_order(16)
    sharded = placed(x, mesh, P(None, None, "kv"))
    mapped = jax.jit(jax.vmap(reorder, in_axes=(0, None)))(sharded, positions)
    np.testing.assert_array_equal(mapped, x[:, :, positions])


def test_inside_a_shard_map():
    x, positions = random_array(2, 16), random_order(4)

    @functools.partial(
        jax.shard_map, mesh=mesh_of(4, "auto"), in_specs=P(None, "kv"), out_specs=P(None, "kv")
    )
    def local(x):
        return restore(2 * reorder(x, positions), positions)

    np.testing.assert_array_equal(jax.jit(local)(x), 2 * x)


@pytest.mark.parametrize("f", [reorder, restore])
@pytest.mark.parametrize(
    ("positions", "axis", "message"),
    [
        (np.arange(5), 1, r"positions has shape \(5,\), but x has 6 slots along axis 1.*S=6"),
        (np.arange(6), 0, "x has 4 slots along axis 0"),
        (np.arange(6.0), 1, "positions is float64; it must be int32.*astype"),
        (np.ones(6, bool), 1, "positions is bool; it must be int32"),
        (np.arange(6), 2, r"axis is 2 and x has shape \(4, 6\).*axis that x has"),
        (np.arange(6), -3, "axis is -3"),
        (np.zeros((3, 6), int), 1, r"positions has shape \(3, 6\).*B, S = 4, 6"),
        (np.zeros((4, 6), int), 0, "positions is given per row.*axis is 0"),
        (np.zeros((1, 4, 6), int), 1, r"positions has shape \(1, 4, 6\).*int32\[S\]"),
        (np.arange(1, 7), 1, "positions has 6, and x has 6 slots: give 0 to 5"),
    ],
)
def test_wrong_positions(f, positions, axis, message):
    with pytest.raises(ValueError, match=message):
        f(np.zeros((4, 6), np.float32), positions, axis)


def test_what_has_no_inverse_is_not_restored():
    with pytest.raises(ValueError, match="positions has 2 more than once.*one slot.*-1"):
        restore(np.zeros((1, 4)), np.array([0, 2, 2, 1]))


def test_positions_beyond_the_end_are_empty_slots_where_they_are_not_known():
    x = random_array(1, 4)
    out = jax.jit(reorder)(x, np.array([1, 4, 9, 0]))
    np.testing.assert_array_equal(out, [[x[0, 1], 0, 0, x[0, 0]]])


@pytest.mark.parametrize("f", [reorder, restore])
@pytest.mark.parametrize("kind", [tuple, list])
def test_several_arrays_are_not_one(f, kind):
    message = f"x is a {kind.__name__} of arrays.*one array.*jax.tree.map.*layouts.{f.__name__}"
    with pytest.raises(ValueError, match=message):
        f(kind((np.zeros((1, 4)), np.zeros((1, 4, 2)))), np.arange(4))
