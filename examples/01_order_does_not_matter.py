"""Attention over a stream of keys and values, in any order, in memory that does not grow.

What one learns:

1. A `SoftmaxState` is attention that is not divided yet. Key-value pairs are folded into it one by
   one with `merge`, in whatever order they come, and the result is `jax.nn.dot_product_attention`.
2. What the order costs: the name of each key, log2 n bits, and only where a mask asks for it.
3. States of any two disjoint sets of keys merge into that of their union, so a stream can be cut
   anywhere: this is all that many devices need (example 02).

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
QUERY_POSITIONS = np.array([300, 1023], np.int32)  # the first of the two sees keys 0 ... 300 alone
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
    """The state with one more pair in it; a query sees the keys at its position and before."""
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
    """The same where every query sees every key: no position is asked for."""
    return distattn.merge(state, distattn.partial_attention(query, key, value))


def empty(query: jax.Array) -> distattn.SoftmaxState:
    """Attention over no keys: where every stream begins."""
    none = jnp.zeros((1, 0, KV_HEADS, WIDTH))
    return distattn.partial_attention(query, none, none)


def over(query: jax.Array, pairs: Iterable[Pair]) -> distattn.SoftmaxState:
    """The state over a stream of pairs, of which one at a time is in memory."""
    state = empty(query)
    for position, key, value in pairs:
        state = fold(state, query, np.int32(position), key, value)
    return state


def difference(actual: jax.Array, expected: jax.Array) -> float:
    """The largest error, relative to the largest expected number."""
    return float(jnp.abs(actual - expected).max() / jnp.abs(expected).max())


def why_the_order_costs_log_n() -> None:
    """The original question, in ten lines."""
    print(f"""
Why does the order cost log n?
   1. Rabe & Staats (arXiv 2112.05682): attention of one query needs O(1) memory, and O(log n) if
      its inputs come in another order than 0, 1, 2, ...
   2. It is not the sum that needs more: (max, sum, weighted_sum) is the same for every order.
   3. In order, a key's name is how many came before it, and nobody has to send or store it.
   4. In any other order each key must bring its name, since something asks for it: a causal mask,
      a window, a rotary embedding, or whoever fetches the pair from where it is stored.
   5. n names take log2 n bits; with fewer, two keys would share one. {KEYS} keys: {bits()} bits.
   6. A name is forgotten when its pair is folded: log2 n bits in all, not n log2 n.
   7. Where nothing asks for it, no name is needed, and any order costs nothing.
   8. In distattn the name is an entry of `key_positions`, an int32: room for {2**31:,} keys.""")


def bits() -> int:
    """Of a name among the keys."""
    return math.ceil(math.log2(KEYS))


def main() -> None:
    """Runs the three parts, each with its assertions."""
    fake_devices(1)  # one device is enough for all of this
    rng = np.random.default_rng(0)
    query = jnp.asarray(rng.normal(size=(1, len(QUERY_POSITIONS), HEADS, WIDTH)), jnp.float32)
    key, value = (rng.normal(size=(1, KEYS, KV_HEADS, WIDTH)).astype(np.float32) for _ in range(2))
    order = rng.permutation(KEYS)
    visible = np.arange(KEYS) <= QUERY_POSITIONS[:, None]
    expected = jax.nn.dot_product_attention(query, key, value, mask=visible[None, None])
    everything = jax.nn.dot_product_attention(query, key, value)

    def stream(positions: np.ndarray, names: np.ndarray | None = None) -> Iterable[Pair]:
        for position, name in zip(positions, positions if names is None else names, strict=True):
            yield int(name), key[:, position, None], value[:, position, None]

    print(f"A stream of {KEYS} pairs, first in order, then in a random one: {order[:8]} ...")
    for title, positions in (("in order", np.arange(KEYS)), ("random order", order)):
        state = over(query, stream(positions))
        out, _ = distattn.finalize(state)
        error = difference(out, expected)
        size = sum(x.nbytes for x in jax.tree.leaves(state))
        print(f"  {title:<13} {size} bytes of state, difference from jax.nn {error:.1e}")
        assert error < BOUND
    print(f"  all keys and values would be {key.nbytes + value.nbytes} bytes")

    why_the_order_costs_log_n()
    print("\nThe same stream in random order, without names:")
    state = empty(query)
    for _, one_key, one_value in stream(order):
        state = fold_unmasked(state, query, one_key, one_value)
    error = difference(distattn.finalize(state)[0], everything)
    print(f"  no mask      right: difference {error:.1e}")
    assert error < BOUND
    wrong, _ = distattn.finalize(over(query, stream(order, names=np.arange(KEYS))))
    error = difference(wrong, expected)
    print(f"  causal mask  wrong, if each key is called by its turn: difference {error:.1e}")
    assert error > 0.1

    print("\nThe stream cut in two anywhere, and the halves merged:")
    first, second = (over(query, stream(half)) for half in np.split(order, [KEYS // 3]))
    for title, merged in (
        ("first, second", distattn.merge(first, second)),
        ("second, first", distattn.merge(second, first)),
        (
            "and the empty one",
            distattn.merge(distattn.identity(first), distattn.merge(first, second)),
        ),
    ):
        error = difference(distattn.finalize(merged)[0], expected)
        print(f"  {title:<18} difference from jax.nn over the whole {error:.1e}")
        assert error < BOUND
    print("\nThe order of the keys does not matter; their names do.")


if __name__ == "__main__":
    main()
