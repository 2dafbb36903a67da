"""Attention over a stream on one device: of pairs, or of keys and values one by one, in any order.

Pairs need the state and nothing else: O(1) memory, whatever their order. Keys and values that come
apart wait for one another, and what waits is all that needs memory beside the state, up to the
index: the set of positions that are done, kept as runs, two integers of log n bits for each gap in
it.
"""

from __future__ import annotations

import bisect
import functools
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from distattn.algebra.softmax_state import SoftmaxState, finalize, merge
from distattn.local.inputs import Window
from distattn.local.partial import partial_attention


@functools.partial(
    jax.jit, static_argnames=("scale", "is_causal", "local_window_size", "logits_soft_cap")
)
def fold(
    state: SoftmaxState | None,
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    local_window_size: Window = None,
    logits_soft_cap: float | None = None,
    query_positions: ArrayLike | None = None,
    key_positions: ArrayLike | None = None,
) -> SoftmaxState:
    """The state with more keys and values in it: one step of a stream, compiled once for a shape.

        state' = merge(state, partial_attention(query, key, value))

    Start from None, end with `finalize`.

    Args:
      state: of what has been folded so far, or None.
      query: [B, T, N, H].
      key: [B, S, K, H], keys that are not in the state yet; S = 1 for one pair.
      value: [B, S, K, V].
      scale: of q . k; default 1 / sqrt(H).
      is_causal: attend iff key position <= query position.
      local_window_size: int or (left, right), inclusive, on positions.
      logits_soft_cap: c in c * tanh(logit / c).
      query_positions: int32[T] or int32[B, T].
      key_positions: int32[S] or int32[B, S]; negative = empty slot.

    Returns:
      SoftmaxState: f32[B, T, N], f32[B, T, N], f32[B, T, N, V].

    Raises:
      ValueError: as `partial_attention`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from distattn import finalize
      >>> from distattn.local import streaming
      >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 8, 2, 4))
      >>> state = None
      >>> for i in (2, 0, 7, 3, 1, 6, 4, 5):  # one pair at a time, in any order
      ...     state = streaming.fold(state, query, key[:, i : i + 1], value[:, i : i + 1])
      >>> wanted = jax.nn.dot_product_attention(query, key, value)
      >>> bool(jnp.allclose(finalize(state)[0], wanted, atol=1e-5))
      True

    Reference: Rabe & Staats, arXiv 2112.05682, section 2.
    """
    more = partial_attention(
        query,
        key,
        value,
        scale=scale,
        is_causal=is_causal,
        local_window_size=local_window_size,
        logits_soft_cap=logits_soft_cap,
        query_positions=query_positions,
        key_positions=key_positions,
    )
    return more if state is None else merge(state, more)


class PairJoin:
    """Attention over keys and values that come one at a time, each with its position, in any order.

    A pair is folded into the state as soon as both halves are there, so only halves without a
    partner are held: a value that comes at most n items after its key, or before it, makes that at
    most n.

    Args:
      query: [B, T, N, H].
      scale: of q . k; default 1 / sqrt(H).
      is_causal: attend iff position <= query position; needs query_positions.
      local_window_size: int or (left, right), inclusive, on positions; needs query_positions.
      logits_soft_cap: c in c * tanh(logit / c).
      query_positions: int32[T] or int32[B, T].

    Raises:
      ValueError: query is not [B, T, N, H].

    Example:
      >>> import jax.numpy as jnp, distattn
      >>> join = distattn.PairJoin(jnp.ones((1, 1, 1, 4)))
      >>> for position in (1, 0):  # keys of equal weight
      ...     join.add_key(position, jnp.zeros((1, 1, 4)))
      >>> for position in (0, 1):
      ...     join.add_value(position, jnp.full((1, 1, 2), float(position)))
      >>> join.result()[0].ravel().tolist(), join.pending, join.peak_pending
      ([0.5, 0.5], 0, 2)

    Reference: Rabe & Staats, arXiv 2112.05682, section 2 (pairs in any order).
    """

    def __init__(
        self,
        query: ArrayLike,
        *,
        scale: float | None = None,
        is_causal: bool = False,
        local_window_size: Window = None,
        logits_soft_cap: float | None = None,
        query_positions: ArrayLike | None = None,
    ):
        if np.ndim(query) != 4:
            raise ValueError(
                f"query has shape {np.shape(query)}; it must be [B, T, N, H]: give one row a B of "
                "1 with query[None]"
            )
        self._query = jnp.asarray(query)
        self._fold = functools.partial(
            fold,
            scale=scale,
            is_causal=is_causal,
            local_window_size=local_window_size,
            logits_soft_cap=logits_soft_cap,
            query_positions=query_positions,
        )
        self._by_position = is_causal or local_window_size is not None
        self._state: SoftmaxState | None = None
        self._keys: dict[int, jax.Array] = {}
        self._values: dict[int, jax.Array] = {}
        self._done = _Runs()
        self._peak_pending = 0

    @property
    def pending(self) -> int:
        """How many keys and values wait for a partner now."""
        return len(self._keys) + len(self._values)

    @property
    def peak_pending(self) -> int:
        """The most that have waited at a time: what the order of this stream has cost, beside names."""
        return self._peak_pending

    def add_key(self, position: int, key: ArrayLike) -> None:
        """Take a key, [B, K, H], and fold its pair if the value is there.

        Args:
          position: of the key, not negative; its value has the same.
          key: [B, K, H].

        Raises:
          ValueError: a key was here with this position already, or shapes do not fit.
        """
        self._add("key", position, key, self._keys, self._values)

    def add_value(self, position: int, value: ArrayLike) -> None:
        """Take a value, [B, K, V], and fold its pair if the key is there.

        Args:
          position: of the value, not negative; its key has the same.
          value: [B, K, V].

        Raises:
          ValueError: a value was here with this position already, or shapes do not fit.
        """
        self._add("value", position, value, self._values, self._keys)

    def result(self) -> tuple[jax.Array, jax.Array]:
        """The attention over all pairs.

        Returns:
          out f32[B, T, N, V] and lse f32[B, T, N], natural log.

        Raises:
          ValueError: keys or values still wait for their partners, or nothing has come.
        """
        waiting = (("keys", self._keys, "add_value"), ("values", self._values, "add_key"))
        faults = [
            f"{name} at positions {_examples(sorted(items))} have no partner: {remedy} what is "
            "missing"
            for name, items, remedy in waiting
            if items
        ]
        if faults:
            raise ValueError(
                f"the join is not complete, {self.pending} items wait; {'; '.join(faults)}"
            )
        if self._state is None:
            raise ValueError("no key and no value has come, so V is not known: add a pair first")
        return finalize(self._state)

    def _add(
        self, name: str, position: int, item: ArrayLike, own: dict[int, Any], other: dict[int, Any]
    ) -> None:
        position = operator.index(position)
        if position < 0:
            raise ValueError(
                f"position is {position}; a {name} in a stream has one of 0, 1, 2, ...: leave out "
                "the items of empty slots"
            )
        if position in own or position in self._done:
            raise ValueError(
                f"a second {name} has position {position}: give each position one {name}, and make "
                "one join for each sequence"
            )
        batch = self._query.shape[0]
        if np.ndim(item) != 3 or np.shape(item)[0] != batch:
            raise ValueError(
                f"{name} has shape {np.shape(item)}; it must be one {name} without S, "
                f"[B, K, {'H' if name == 'key' else 'V'}] with B={batch} as in query"
            )
        item = jnp.asarray(item)
        if position not in other:
            own[position] = item
            self._peak_pending = max(self._peak_pending, self.pending)
            return
        partner = other[position]
        self._fold_pair(position, *((item, partner) if name == "key" else (partner, item)))
        del other[position]

    def _fold_pair(self, position: int, key: jax.Array, value: jax.Array) -> None:
        # Positions count only where a mask compares them, and beyond int32 they may be any number.
        positions = np.array([position], np.int32) if self._by_position else None
        key, value = key[:, None], value[:, None]
        self._state = self._fold(self._state, self._query, key, value, key_positions=positions)
        self._done.add(position)


class _Runs:
    """A set of integers, as runs of neighbours: it is small where few gaps are open."""

    def __init__(self):
        self._starts: list[int] = []
        self._ends: list[int] = []  # exclusive

    def __contains__(self, number: int) -> bool:
        at = bisect.bisect_right(self._starts, number)
        return at > 0 and number < self._ends[at - 1]

    def add(self, number: int) -> None:
        at = bisect.bisect_right(self._starts, number)
        joins_left = at > 0 and self._ends[at - 1] == number
        joins_right = at < len(self._starts) and self._starts[at] == number + 1
        if joins_left and joins_right:
            self._ends[at - 1] = self._ends.pop(at)
            del self._starts[at]
        elif joins_left:
            self._ends[at - 1] = number + 1
        elif joins_right:
            self._starts[at] = number
        else:
            self._starts.insert(at, number)
            self._ends.insert(at, number + 1)


def _examples(positions: list[int]) -> str:
    shown = ", ".join(map(str, positions[:3]))
    return shown if len(positions) <= 3 else f"{shown} and {len(positions) - 3} more"
