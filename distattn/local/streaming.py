"""Attention over a stream on one device: pairs, or keys and values that arrive separately, in any order.

Pairs need the state and nothing else: O(1) memory. A key or a value that arrives alone waits for its
partner.
"""

from __future__ import annotations

import functools
import operator

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
    """Return the state with more keys and values: one step of a stream, compiled once per shape.

        state' = merge(state, partial_attention(query, key, value))

    Start from None, end with `finalize`.

    Args:
      state: the state over the keys so far, or None.
      query: [B, T, N, H].
      key: [B, S, K, H], keys that are not in the state yet; S = 1 for one pair.
      value: [B, S, K, V].
      scale: factor of q . k; default 1 / sqrt(H).
      is_causal: attend if key position <= query position.
      local_window_size: int or (left, right), inclusive, on positions.
      logits_soft_cap: c in c * tanh(logit / c).
      query_positions: int32[T] or int32[B, T].
      key_positions: int32[S] or int32[B, S]; negative = empty slot.

    Returns:
      SoftmaxState: f32[B, T, N], f32[B, T, N], f32[B, T, N, V].

    Raises:
      ValueError: as `partial_attention`.

    Examples:
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
    """Attention over keys and values that arrive one at a time, each with its position, in any order.

    A pair is folded as soon as both halves have arrived, so only halves without a partner are held, and
    one integer per pair. If each value arrives at most n items before or after its key, at most n items
    are held.

    Args:
      query: [B, T, N, H].
      scale: factor of q . k; default 1 / sqrt(H).
      is_causal: attend if position <= query position; needs query_positions.
      local_window_size: int or (left, right), inclusive, on positions; needs query_positions.
      logits_soft_cap: c in c * tanh(logit / c).
      query_positions: int32[T] or int32[B, T].

    Attributes:
      pending: number of keys and values that wait for a partner now.
      peak_pending: largest number of items that have waited at one time.

    Raises:
      ValueError: query is not [B, T, N, H].

    Examples:
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
        self._waiting: dict[str, dict[int, jax.Array]] = {"key": {}, "value": {}}
        self._done: set[int] = set()
        self.peak_pending: int = 0

    @property
    def pending(self) -> int:
        """Number of keys and values that wait for a partner now."""
        return sum(map(len, self._waiting.values()))

    def add_key(self, position: int, key: ArrayLike) -> None:
        """Add a key, and fold its pair if the value has arrived.

        Args:
          position: position of the key and of its value, not negative.
          key: [B, K, H].

        Raises:
          ValueError: a second key with this position, or shapes that do not fit.
        """
        self._add("key", "value", position, key)

    def add_value(self, position: int, value: ArrayLike) -> None:
        """Add a value, and fold its pair if the key has arrived.

        Args:
          position: position of the value and of its key, not negative.
          value: [B, K, V].

        Raises:
          ValueError: a second value with this position, or shapes that do not fit.
        """
        self._add("value", "key", position, value)

    def result(self) -> tuple[jax.Array, jax.Array]:
        """Return the attention over all pairs.

        Returns:
          out f32[B, T, N, V] and lse f32[B, T, N], natural log.

        Raises:
          ValueError: keys or values still wait for their partners, or nothing has arrived.
        """
        faults = [
            f"{name}s at positions {_examples(sorted(items))} have no partner: {remedy} what is missing"
            for (name, items), remedy in zip(
                self._waiting.items(), ("add_value", "add_key"), strict=True
            )
            if items
        ]
        if faults:
            raise ValueError(
                f"the join is not complete, {self.pending} items wait; {'; '.join(faults)}"
            )
        if self._state is None:
            raise ValueError("no key and no value has come, so V is not known: add a pair first")
        return finalize(self._state)

    def _add(self, name: str, partner: str, position: int, item: ArrayLike) -> None:
        position = operator.index(position)
        if position < 0:
            raise ValueError(
                f"position is {position}; a {name} in a stream has one of 0, 1, 2, ...: leave out "
                "the items of empty slots"
            )
        if position in self._waiting[name] or position in self._done:
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
        if position not in self._waiting[partner]:
            self._waiting[name][position] = item
            self.peak_pending = max(self.peak_pending, self.pending)
            return
        pair = {name: item[:, None], partner: self._waiting[partner][position][:, None]}
        # Positions matter only to a mask that compares them; otherwise they may exceed int32.
        positions = np.array([position], np.int32) if self._by_position else None
        self._state = self._fold(self._state, self._query, **pair, key_positions=positions)
        del self._waiting[partner][position]
        self._done.add(position)


def _examples(positions: list[int]) -> str:
    shown = ", ".join(map(str, positions[:3]))
    return shown if len(positions) <= 3 else f"{shown} and {len(positions) - 3} more"
