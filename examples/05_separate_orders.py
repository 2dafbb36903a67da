"""Keys and values that arrive separately, in two different orders.

It shows:

1. On a mesh `layouts.align` pairs them: one exchange brings every value to the device of its key, and each
   device holds only its share at any time.
2. Positions that do not pair up are an error outside jit. Inside jit they become empty slots, and
   `align` counts them.
3. In a stream `PairJoin` folds a pair as soon as it has both halves. Here the order costs memory: halves
   wait for their partners, and `PairJoin` counts them.

    python examples/05_separate_orders.py
"""

from collections.abc import Iterable

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import distattn
from distattn import layouts
from distattn.local.streaming import PairJoin
from distattn.testing import collectives, fake_devices

DEVICES = 8
KEYS, STREAM = 2048, 256
HEADS, KV_HEADS, WIDTH = 4, 2, 32
BOUND = 1e-5


def difference(actual: jax.Array, expected: jax.Array) -> float:
    """Return the largest error, relative to the largest expected value."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def on_a_mesh(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> None:
    """Align keys and values that eight devices store in two unrelated random orders."""
    query_positions = np.array([500, KEYS - 1], np.int32)
    mask = np.arange(KEYS) <= query_positions[:, None]
    expected = jax.nn.dot_product_attention(query, key, value, mask=mask[None, None])
    rng = np.random.default_rng(1)
    key_order, value_order = (rng.permutation(KEYS).astype(np.int32) for _ in range(2))
    mesh = jax.make_mesh((DEVICES,), ("kv",), axis_types=(AxisType.Auto,))
    by_keys, by_slot = NamedSharding(mesh, P(None, "kv")), NamedSharding(mesh, P("kv"))
    scattered_key, scattered_value, key_positions, value_positions = (
        jax.device_put(x, sharding)
        for x, sharding in (
            (key[:, key_order], by_keys),
            (value[:, value_order], by_keys),
            (key_order, by_slot),
            (value_order, by_slot),
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
    print(
        f"  {moved} values were on another device than their keys, {int(unmatched[0])} had no key"
    )
    np.testing.assert_array_equal(aligned, value[:, key_order])
    assert aligned.sharding.is_equivalent_to(scattered_key.sharding, aligned.ndim)
    assert int(unmatched[0]) == 0
    right, wrong = (difference(attend(x), expected) for x in (aligned, scattered_value))
    print(f"  attention after align   difference from jax.nn {right:.1e}")
    print(f"  attention without it    difference from jax.nn {wrong:.1e}")
    assert right < BOUND
    assert wrong > 0.1

    # Inside jit an array with Auto axes does not tell how it is sharded, so the call does.
    aligning = jax.jit(lambda *arrays: layouts.align(*arrays, sharding=by_keys))
    program = aligning.lower(scattered_value, value_positions, key_positions).compile()
    counts = collectives(program.as_text())
    print(f"  collectives: {', '.join(f'{n} {kind}' for kind, n in counts.items())}")
    print(
        "    (positions circulate in a loop; values move in one exchange, or more if it is uneven)"
    )
    assert counts["all-gather"] == 0

    # Two values have the same position, and another position has no value.
    faulty = value_order.copy()
    faulty[0] = faulty[1]
    faulty = jax.device_put(faulty, by_slot)
    try:
        layouts.align(scattered_value, faulty, key_positions)
    except ValueError as error:
        print(f"  a repeated position, outside jit: {error}")
    else:
        raise AssertionError("align accepted positions that do not pair up")
    _, kept, unmatched = program(scattered_value, faulty, key_positions)
    empty = np.count_nonzero(np.asarray(kept) < 0)
    print(
        f"  a repeated position, inside jit: {empty} slots became empty, "
        f"{int(unmatched[0])} items unmatched"
    )
    assert (empty, int(unmatched[0])) == (2, 4)  # both keys and both values


def arrivals(key_times: Iterable[float], value_times: Iterable[float]) -> list[tuple]:
    """Return (position, whether it is the value), sorted by time of arrival."""
    keys = [(time, position, False) for position, time in enumerate(key_times)]
    values = [(time, position, True) for position, time in enumerate(value_times)]
    return [(position, is_value) for _, position, is_value in sorted(keys + values)]


def in_a_stream(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> None:
    """Join keys and values that one device receives one at a time."""
    query_positions = np.array([100, STREAM - 1], np.int32)
    mask = np.arange(STREAM) <= query_positions[:, None]
    expected = jax.nn.dot_product_attention(query, key, value, mask=mask[None, None])
    rng = np.random.default_rng(2)
    order, n = rng.permutation(STREAM), STREAM
    streams = {  # with the largest number of halves that wait
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
    """Run both."""
    fake_devices(DEVICES)
    rng = np.random.default_rng(0)
    query = rng.normal(size=(1, 2, HEADS, WIDTH)).astype(np.float32)
    key, value = rng.normal(size=(2, 1, KEYS, KV_HEADS, WIDTH)).astype(np.float32)
    on_a_mesh(query, key, value)
    in_a_stream(query, key[:, :STREAM], value[:, :STREAM])
    print("Pairs cost their positions; separate keys and values cost the halves that wait.")


if __name__ == "__main__":
    main()
