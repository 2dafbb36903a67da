"""Attention over a stream of keys and values, in any order, in memory that does not grow.

It shows:

1. A `SoftmaxState` is attention before the division. `merge` folds key-value pairs into it one by one, in
   any order, and the result is that of `jax.nn.dot_product_attention`.
2. The cost of the order: the position of each key, log2 n bits, and only if a mask asks for it.
3. States over any two disjoint sets of keys merge into the state over their union, so a stream can be cut
   anywhere. Many devices need nothing else (example 02).

    python examples/01_order_does_not_matter.py
"""

import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

import distattn
from distattn.testing import fake_devices

KEYS = 1024  # n
HEADS, KV_HEADS, WIDTH = 4, 2, 16
QUERY_POSITIONS = np.array([300, 1023], np.int32)  # the first query sees keys 0 ... 300 only
BOUND = 1e-5  # relative, in float32; both sides round

Pair = tuple[int, np.ndarray, np.ndarray]  # position, key [1, 1, K, H], value [1, 1, K, V]


@jax.jit
def fold(
    state: distattn.SoftmaxState,
    query: jax.Array,
    position: jax.Array,
    key: jax.Array,
    value: jax.Array,
) -> distattn.SoftmaxState:
    """Fold a pair into the state; a query sees the keys at its position and before."""
    pair = distattn.partial_attention(
        query,
        key,
        value,
        is_causal=True,
        query_positions=QUERY_POSITIONS,
        key_positions=position[None],
    )
    return distattn.merge(state, pair)


@jax.jit
def fold_unmasked(
    state: distattn.SoftmaxState, query: jax.Array, key: jax.Array, value: jax.Array
) -> distattn.SoftmaxState:
    """Fold a pair into the state if every query sees every key; no position is needed."""
    return distattn.merge(state, distattn.partial_attention(query, key, value))


def empty(query: jax.Array) -> distattn.SoftmaxState:
    """Return the state over no keys, with which every stream begins."""
    no_keys = jnp.zeros((1, 0, KV_HEADS, WIDTH))
    return distattn.partial_attention(query, no_keys, no_keys)


def fold_all(query: jax.Array, pairs: Iterable[Pair]) -> distattn.SoftmaxState:
    """Return the state over a stream of pairs; only one pair at a time is in memory."""
    state = empty(query)
    for position, key, value in pairs:
        state = fold(state, query, np.int32(position), key, value)
    return state


def difference(actual: jax.Array, expected: jax.Array) -> float:
    """Return the largest error, relative to the largest expected value."""
    return float(jnp.abs(actual - expected).max() / jnp.abs(expected).max())


def explain_log_n() -> None:
    """Answer the original question in ten lines."""
    print(f"""
Why does the order cost log n?
   1. Rabe & Staats (arXiv 2112.05682): attention of one query needs O(1) memory, and O(log n) if
      its inputs come in another order than 0, 1, 2, ...
   2. The sum does not need more: (max, sum, weighted_sum) is the same for every order.
   3. In order, the position of a key is the number of keys before it. It is neither sent nor stored.
   4. In any other order each key must bring its position, because something asks for it: a causal mask,
      a window, a rotary embedding, or the code that fetches the pair from storage.
   5. n positions take log2 n bits; with fewer, two keys would share one. {KEYS} keys: {bits()} bits.
   6. A position is forgotten when its pair is folded: log2 n bits in total, not n log2 n.
   7. If nothing asks for positions, none are needed, and any order costs nothing.
   8. In distattn a position is an entry of `key_positions`, an int32: room for {2**31:,} keys.""")


def bits() -> int:
    """Return the number of bits of a position."""
    return math.ceil(math.log2(KEYS))


def main() -> None:
    """Run the three parts, each with its assertions."""
    fake_devices(1)  # one device is enough for all of this
    rng = np.random.default_rng(0)
    query = jnp.asarray(rng.normal(size=(1, len(QUERY_POSITIONS), HEADS, WIDTH)), jnp.float32)
    key, value = (rng.normal(size=(1, KEYS, KV_HEADS, WIDTH)).astype(np.float32) for _ in range(2))
    order = rng.permutation(KEYS)
    visible = np.arange(KEYS) <= QUERY_POSITIONS[:, None]
    expected = jax.nn.dot_product_attention(query, key, value, mask=visible[None, None])
    everything = jax.nn.dot_product_attention(query, key, value)

    def stream(order: np.ndarray, positions: np.ndarray | None = None) -> Iterable[Pair]:
        for index, position in zip(order, order if positions is None else positions, strict=True):
            yield int(position), key[:, index, None], value[:, index, None]

    print(f"A stream of {KEYS} pairs, first in order, then in a random one: {order[:8]} ...")
    for title, positions in (("in order", np.arange(KEYS)), ("random order", order)):
        state = fold_all(query, stream(positions))
        out, _ = distattn.finalize(state)
        error = difference(out, expected)
        size = sum(x.nbytes for x in jax.tree.leaves(state))
        print(f"  {title:<13} {size} bytes of state, difference from jax.nn {error:.1e}")
        assert error < BOUND
    print(f"  all keys and values would be {key.nbytes + value.nbytes} bytes")

    explain_log_n()
    print("\nThe same stream in random order, without positions:")
    state = empty(query)
    for _, one_key, one_value in stream(order):
        state = fold_unmasked(state, query, one_key, one_value)
    error = difference(distattn.finalize(state)[0], everything)
    print(f"  no mask      right: difference {error:.1e}")
    assert error < BOUND
    wrong, _ = distattn.finalize(fold_all(query, stream(order, positions=np.arange(KEYS))))
    error = difference(wrong, expected)
    print(f"  causal mask  wrong, if each key is numbered as it comes: difference {error:.1e}")
    assert error > 0.1

    print("\nThe stream cut in two anywhere, and the halves merged:")
    first, second = (fold_all(query, stream(half)) for half in np.split(order, [KEYS // 3]))
    for title, merged in (
        ("first, second", distattn.merge(first, second)),
        ("second, first", distattn.merge(second, first)),
        (
            "and the empty state",
            distattn.merge(distattn.identity(first), distattn.merge(first, second)),
        ),
    ):
        error = difference(distattn.finalize(merged)[0], expected)
        print(f"  {title:<19} difference from jax.nn over all keys {error:.1e}")
        assert error < BOUND
    print("\nThe order of the keys does not matter; their positions do.")


if __name__ == "__main__":
    main()
