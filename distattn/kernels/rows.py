"""Rows of queries for kernels of any platform, and what masks read of rows and of keys.

The queries of all heads of a key head lie side by side, [B, K, R, .] with R >= T * G rows, so that few
queries fill a tile. What masks read is made of vectors: of a row the lowest and the highest position that
it may attend to and its segment, of a key its position and its segment.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from distattn.block import Cotangents
from distattn.mask import Mask, saturating_add

_HIGHEST = jnp.iinfo(jnp.int32).max


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """Sizes of a call and of its blocks.

    Kernels of each platform add to it by inheritance, against the custom of the house: as a field of theirs
    it would stand before every size that they read.
    """

    batch: int
    queries: int  # T
    keys: int  # S
    kv_heads: int  # K
    groups: int  # G
    width: int  # H
    value_width: int  # V
    rows: int  # of a block
    key_block: int
    row_span: int = 1  # blocks that the table of visits has one entry for
    key_span: int = 1

    @property
    def used_row_blocks(self) -> int:
        """How many blocks of rows have one of a query."""
        return -(-self.queries * self.groups // self.rows)

    @property
    def used_key_blocks(self) -> int:
        """How many blocks of keys have one."""
        return -(-self.keys // self.key_block)

    @property
    def row_blocks(self) -> int:
        """Those that fill the last span included."""
        return -(-self.used_row_blocks // self.row_span) * self.row_span

    @property
    def key_blocks(self) -> int:
        """Those that fill the last span included."""
        return -(-self.used_key_blocks // self.key_span) * self.key_span

    @property
    def all_rows(self) -> int:
        """R, those that fill the last block included."""
        return self.row_blocks * self.rows

    @property
    def all_keys(self) -> int:
        """S, slots that fill the last block included."""
        return self.key_blocks * self.key_block


def by_key_heads(x: jax.Array, cut: Cut) -> jax.Array:
    """[B, T, N, ...] to [B, K, R, ...], the rows of one query after those of another."""
    x = x.reshape(*x.shape[:2], cut.kv_heads, cut.groups, *x.shape[3:])
    x = jnp.moveaxis(x, 2, 1)
    x = x.reshape(*x.shape[:2], cut.queries * cut.groups, *x.shape[4:])
    return _filled(x, 2, cut.all_rows)


def by_queries(x: jax.Array, cut: Cut) -> jax.Array:
    """The inverse: [B, K, R, ...] to [B, T, N, ...]."""
    x = x[:, :, : cut.queries * cut.groups]
    x = x.reshape(*x.shape[:2], cut.queries, cut.groups, *x.shape[3:])
    x = jnp.moveaxis(x, 1, 2)
    return x.reshape(*x.shape[:2], cut.kv_heads * cut.groups, *x.shape[4:])


def numbers_of_rows(cotangents: Cotangents, cut: Cut) -> jax.Array:
    """Reference and d_sum, f32[B, K, 2, R]."""
    numbers = jnp.stack([cotangents.reference, cotangents.d_sum], axis=-1)
    return by_key_heads(numbers, cut).swapaxes(2, 3)


class Index(NamedTuple):
    """What decides who attends to whom; a first dimension of 1 holds for the whole batch."""

    rows: jax.Array  # int32[B|1, 3, R]: lowest position, highest position, segment
    keys: jax.Array  # int32[B|1, 2, key blocks * block]: position, segment


def index_of(mask: Mask, cut: Cut) -> Index | None:
    """The vectors of a mask without a dense part; None where every row attends to every key."""
    known = mask.key_positions, mask.query_valid, mask.key_segment_ids
    is_ragged = cut.keys < cut.all_keys
    if not is_ragged and all(x is None for x in known):
        return None
    left, right = mask.reach
    queries = jnp.zeros((1, cut.queries), jnp.int32)
    low, high = queries, queries + _HIGHEST
    if left is not None:
        low = jnp.maximum(saturating_add(mask.query_positions, -left), 0)
    if right is not None:
        high = saturating_add(mask.query_positions, right)
    if mask.query_valid is not None:
        high = jnp.where(mask.query_valid, high, -1)
    slots = mask.key_positions
    if slots is None:
        slots = jnp.arange(cut.keys, dtype=jnp.int32)[None]
    slots = _filled(slots, 1, cut.all_keys, -1)
    own, segments = queries, jnp.zeros((1, cut.keys), jnp.int32)
    if mask.key_segment_ids is not None:
        own, segments = mask.query_segment_ids, mask.key_segment_ids
    segments = _filled(segments, 1, slots.shape[1])
    # The rows that fill the last block attend to nothing.
    rows = [
        _filled(jnp.repeat(x, cut.groups, axis=1), 1, cut.all_rows, fill)
        for x, fill in ((low, 0), (high, -1), (own, 0))
    ]
    return Index(_stacked(rows), _stacked([slots, segments]))


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Which vectors of an `Index` a kernel compares."""

    masked: bool  # whether there is one
    segments: bool

    @classmethod
    def of(cls, mask: Mask, index: Index | None) -> "Comparison":
        """That of a call."""
        return cls(index is not None, mask.key_segment_ids is not None)

    def blocks(self, refs: Iterator[Any]) -> list[Any]:
        """Those of the index, of rows and of keys, which are the next of the refs; [] without one."""
        return [next(refs), next(refs)] if self.masked else []

    def allowed(
        self, row: Callable[[int], jax.Array], key: Callable[[int], jax.Array]
    ) -> jax.Array | None:
        """Who attends to whom, from the vectors of rows and of keys, which broadcast; None: all do."""
        if not self.masked:
            return None
        position = key(0)
        allowed = (position >= row(0)) & (position <= row(1))
        return allowed & (key(1) == row(2)) if self.segments else allowed


def _stacked(parts: list[jax.Array]) -> jax.Array:
    """[B|1, parts, n]."""
    shape = jnp.broadcast_shapes(*(x.shape for x in parts))
    return jnp.stack([jnp.broadcast_to(x, shape) for x in parts], axis=1)


def _filled(x: jax.Array, axis: int, size: int, value: int = 0) -> jax.Array:
    widths = [(0, size - x.shape[axis] if a == axis else 0) for a in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=value) if size > x.shape[axis] else x
