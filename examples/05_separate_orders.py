"""Keys and values that arrive separately, each in an order of its own.

What one learns:

1. On a mesh `layouts.align` makes pairs of them: one exchange brings every value to the device of
   its key, and no device ever holds more than its share.
2. Outside jit positions that do not pair up are an error; under jit they become empty slots, which
   are counted.
3. In a stream `PairJoin` folds a pair as soon as both halves are there. Here the order does cost
   memory: that of the halves which wait for a partner, and it says how many that were.

    python examples/05_separate_orders.py
"""

from collections.abc import Iterable

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import distattn
from distattn import layouts
from distattn.local.streaming import PairJoin
from distattn.testing import collectives, fake_devices

DEVICES = 8
KEYS, STREAM = 2048, 256
HEADS, KV_HEADS, WIDTH = 4, 2, 32
BOUND = 1e-5


def difference(actual: jax.Array, expected: jax.Array) -> float:
    """The largest error, relative to the largest expected number."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def on_a_mesh(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> None:
    """Eight devices; keys and values lie on them in two unrelated random orders."""
    query_positions = np.array([500, KEYS - 1], np.int32)
    mask = np.arange(KEYS) <= query_positions[:, None]
    expected = jax.nn.dot_product_attention(query, key, value, mask=mask[None, None])
    rng = np.random.default_rng(1)
    key_order, value_order = (rng.permutation(KEYS).astype(np.int32) for _ in range(2))
    mesh = jax.make_mesh((DEVICES,), ("kv",), axis_types=(AxisType.Auto,))
    rows, vector = PartitionSpec(None, "kv"), PartitionSpec("kv")
    scattered_key, scattered_value, key_positions, value_positions = (
        jax.device_put(x, NamedSharding(mesh, spec))
        for x, spec in (
            (key[:, key_order], rows),
            (value[:, value_order], rows),
            (key_order, vector),
            (value_order, vector),
        )
    )

    def attend(value: jax.Array) -> jax.Array:
        return distattn.dot_product_attention(
            query,
            scattered_key,
            value,
            is_causal=True,
            query_positions=query_positions,
            key_positions=key_positions,
        )

    aligned, _, unmatched = layouts.align(scattered_value, value_positions, key_positions)
    share = KEYS // DEVICES
    moved = np.count_nonzero(
        np.argsort(value_order)[key_order] // share != np.arange(KEYS) // share
    )
    print(f"On {DEVICES} devices, {KEYS} keys in one random order, their values in another:")
    print(f"  {moved} values lay on another device than their keys, {int(unmatched[0])} had no key")
    np.testing.assert_array_equal(aligned, value[:, key_order])
    assert aligned.sharding.is_equivalent_to(scattered_key.sharding, aligned.ndim)
    assert int(unmatched[0]) == 0
    right, wrong = (difference(attend(x), expected) for x in (aligned, scattered_value))
    print(f"  attention after align   difference from jax.nn {right:.1e}")
    print(f"  attention without it    difference from jax.nn {wrong:.1e}")
    assert right < BOUND
    assert wrong > 0.1

    # Inside jit an Auto mesh does not tell where the arrays lie, so the call does.
    aligning = jax.jit(lambda *arrays: layouts.align(*arrays, mesh=mesh, axis_name="kv"))
    program = aligning.lower(scattered_value, value_positions, key_positions).compile()
    counts = collectives(program.as_text())
    print(f"  what moves: {', '.join(f'{n} {kind}' for kind, n in counts.items())}")
    print(
        "    (the positions go round in a loop; the values in one exchange, more if it is uneven)"
    )
    assert counts["all-gather"] == 0

    # Two values say that they are of one position, so that another has none.
    faulty = value_order.copy()
    faulty[0] = faulty[1]
    faulty = jax.device_put(faulty, NamedSharding(mesh, vector))
    try:
        layouts.align(scattered_value, faulty, key_positions)
    except ValueError as error:
        print(f"  a position given twice, outside jit: {error}")
    else:
        raise AssertionError("positions that do not pair up were taken")
    _, kept, unmatched = program(scattered_value, faulty, key_positions)
    empty = np.count_nonzero(np.asarray(kept) < 0)
    print(f"  the same under jit: {empty} slots became empty, {int(unmatched[0])} items unmatched")
    assert (empty, int(unmatched[0])) == (2, 4)  # both keys; and both values


def arrivals(turns_of_keys: Iterable[float], turns_of_values: Iterable[float]) -> list[tuple]:
    """(position, whether it is the value), sorted by the turn at which each arrives."""
    keys = [(turn, position, False) for position, turn in enumerate(turns_of_keys)]
    values = [(turn, position, True) for position, turn in enumerate(turns_of_values)]
    return [(position, is_value) for _, position, is_value in sorted(keys + values)]


def in_a_stream(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> None:
    """One device; keys and values come one at a time."""
    query_positions = np.array([100, STREAM - 1], np.int32)
    mask = np.arange(STREAM) <= query_positions[:, None]
    expected = jax.nn.dot_product_attention(query, key, value, mask=mask[None, None])
    rng = np.random.default_rng(2)
    order, n = rng.permutation(STREAM), STREAM
    streams = {  # and how many wait at the worst time
        "a value right after its key": (arrivals(order, order + 0.5), [1]),
        "a value ten keys later": (arrivals(order, order + 10.5), [11]),
        "everything in random order": (arrivals(rng.random(n), rng.random(n)), range(n // 3, n)),
        "all keys, then all values": (arrivals(order, n + rng.permutation(n)), [n]),
    }
    print(f"\nIn a stream of {n} keys and {n} values, one at a time:")
    for name, (stream, expected_peak) in streams.items():
        join = PairJoin(query, is_causal=True, query_positions=query_positions)
        for position, is_value in stream:
            if is_value:
                join.add_value(position, value[:, position])
            else:
                join.add_key(position, key[:, position])
        out, _ = join.result()
        error = difference(out, expected)
        print(f"  {name:<28} at most {join.peak_pending:>3} waited, difference {error:.1e}")
        assert join.pending == 0
        assert join.peak_pending in expected_peak
        assert error < BOUND


def main() -> None:
    """Runs both."""
    fake_devices(DEVICES)
    rng = np.random.default_rng(0)
    query = rng.normal(size=(1, 2, HEADS, WIDTH)).astype(np.float32)
    key, value = rng.normal(size=(2, 1, KEYS, KV_HEADS, WIDTH)).astype(np.float32)
    on_a_mesh(query, key, value)
    in_a_stream(query, key[:, :STREAM], value[:, :STREAM])
    print("Pairs cost their names; keys and values that come apart cost the halves that wait.")


if __name__ == "__main__":
    main()
