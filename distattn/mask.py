"""The mask as a value: which query may attend to which key, decided from positions.

Nothing of shape [T, S] is ever built, unless the caller passes one in: a `Mask` holds vectors, a block
of it is made where a block of logits is, and `visits` tells which blocks are not even looked at.
"""

import dataclasses
import functools
import operator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Span(NamedTuple):
    """Indices start .. start + size - 1 of one dimension; `start` may be a tracer."""

    start: jax.Array | int
    size: int


@dataclasses.dataclass(frozen=True)
class IndexOrder:
    """What is known of positions before any is looked at, where nobody has passed them.

    Those of queries and those of keys are consecutive, in the order of the arrays; empty slots come last.
    """

    aligned: bool = True  # the first query and the first key have the same position
    full: bool = True  # no slot is empty


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Mask:
    """Who may attend to whom: the AND of what is given; None stands for "no restriction".

    A leading dimension of size 1 holds for every row of the batch. A key whose position is negative is
    an empty slot. Key lengths are folded into `key_positions` (a key beyond the length is an empty
    slot), query lengths into `query_valid`.
    """

    query_positions: jax.Array | None = None  # int32[B|1, T]
    key_positions: jax.Array | None = None  # int32[B|1, S]; negative: empty slot
    query_valid: jax.Array | None = None  # bool[B|1, T]
    query_segment_ids: jax.Array | None = None  # int32[B|1, T]
    key_segment_ids: jax.Array | None = None  # int32[B|1, S]
    dense: jax.Array | None = None  # bool[B|1, N|1, T|1, S|1]
    is_causal: bool = dataclasses.field(default=False, metadata={"static": True})
    # Inclusive distances to the left and right of the query's position; None: unbounded.
    window: tuple[int | None, int | None] = dataclasses.field(
        default=(None, None), metadata={"static": True}
    )
    # None: positions are what they are.
    index_order: IndexOrder | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def compares_positions(self) -> bool:
        """Whether the positions of queries matter."""
        return self.is_causal or self.window != (None, None)

    def block(self, batch: Span, heads: Span, query: Span, key: Span) -> "Mask":
        """The mask of some rows of the batch, query heads, queries and keys."""
        return dataclasses.replace(
            self,
            query_positions=take(self.query_positions, batch, query),
            key_positions=take(self.key_positions, batch, key),
            query_valid=take(self.query_valid, batch, query),
            query_segment_ids=take(self.query_segment_ids, batch, query),
            key_segment_ids=take(self.key_segment_ids, batch, key),
            dense=take(self.dense, batch, heads, query, key),
            index_order=None,
        )

    def with_empty_slots(self, keys: int) -> "Mask":
        """The same for more keys than these, int32[B|1, keys + ...]: its key positions are to be padded."""
        positions = self.key_positions
        if positions is None:
            positions = jnp.arange(keys, dtype=jnp.int32)[None]
        order = self.index_order and dataclasses.replace(self.index_order, full=False)
        return dataclasses.replace(self, key_positions=positions, index_order=order)

    def apart(self) -> "Mask":
        """The same, of one device's queries and keys, which do not begin at the same index."""
        order = self.index_order and dataclasses.replace(self.index_order, aligned=False)
        return dataclasses.replace(self, index_order=order)

    def allowed(self, num_kv_heads: int) -> jax.Array | None:
        """bool[b, K|1, G|1, q|1, s|1]: True = attend; None where nothing is forbidden."""
        terms = []
        if self.key_positions is not None:
            terms.append(_on_keys(self.key_positions >= 0))
        if self.query_valid is not None:
            terms.append(_on_queries(self.query_valid))
        if self.compares_positions:
            left, right = self.reach
            query = _on_queries(self.query_positions)
            key = _on_keys(self.key_positions)
            if right is not None:
                terms.append(key <= saturating_add(query, right))
            if left is not None:
                terms.append(key >= saturating_add(query, -left))
        if self.query_segment_ids is not None:
            terms.append(_on_queries(self.query_segment_ids) == _on_keys(self.key_segment_ids))
        if self.dense is not None:
            terms.append(split_heads(self.dense, num_kv_heads))
        if not terms:
            return None
        return functools.reduce(operator.and_, terms)

    @property
    def reach(self) -> tuple[int | None, int | None]:
        """How far to the left and to the right of its position a query may attend; None: any distance."""
        left, right = self.window
        if self.is_causal:
            right = 0 if right is None else min(right, 0)
        return left, right


def take(x: Any, *spans: Span | None) -> Any:
    """The part of x inside the spans; a dimension of size 1, or with span None, is kept whole."""
    if x is None:
        return None
    for axis, span in enumerate(spans):
        if span is not None and x.shape[axis] not in (1, span.size):
            x = lax.dynamic_slice_in_dim(x, span.start, span.size, axis)
    return x


def split_heads(x: jax.Array, num_kv_heads: int) -> jax.Array:
    """[b|1, N|1, q|1, s|1] to [b|1, K|1, G|1, q|1, s|1]."""
    heads = x.shape[1]
    groups = (num_kv_heads, heads // num_kv_heads) if heads > 1 else (1, 1)
    return x.reshape(x.shape[0], *groups, *x.shape[2:])


def _on_keys(x: jax.Array) -> jax.Array:
    return x[:, None, None, None, :]


def _on_queries(x: jax.Array) -> jax.Array:
    return x[:, None, None, :, None]


def saturating_add(x: jax.Array, offset: int) -> jax.Array:
    """x + offset, as far as int32 goes: a window at its ends must not wrap round."""
    info = jnp.iinfo(jnp.int32)
    offset = max(min(offset, info.max), info.min)
    if offset > 0:
        return jnp.minimum(x, info.max - offset) + offset
    return jnp.maximum(x, info.min - offset) + offset
