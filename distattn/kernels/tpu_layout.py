"""How the operands of a call are laid out for the TPU kernels, and which blocks these visit.

Keys and values stay as they are, which is not always [B, S, K, .]: XLA lays out an array so that the tiles
of a TPU, 8 by 128, are full. Heads of 64 or 80 numbers lie with S along the lanes, [B, K, ., S], and 3
heads of 128 as [B, K, S, .]. The kernels take all three `Order`s: what they ask for is what there is.
The queries of all heads of a key head lie side by side, [B, K, R, .] with R >= T * G rows, so that few
queries fill a tile. What masks read is made of vectors: of a row the lowest and the highest position that
it may attend to and its segment, of a key its position and its segment.
"""

import dataclasses
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from distattn._compat import device_kind_of
from distattn.kernels.tpu_blocks import (
    HALF_ITEMS,
    LANES,
    MOST_KEYS,
    Shape,
    Target,
    parts,
    sizes,
    target_of,
    vmem_bytes,
)
from distattn.kernels.tuned import chip_name, kind_of, tuned
from distattn.mask import Mask, Span, saturating_add
from distattn.operands import Operands
from distattn.tiles import Machine
from distattn.visits import Visits

_HIGHEST = jnp.iinfo(jnp.int32).max
HEADS = 8  # of keys in a block, at most: the tile of HBM
Order = Literal["SKH", "KSH", "KHS"]
# Precisions of products that Mosaic has.
EXACT = ("highest", "float32", lax.Precision.HIGHEST, (lax.Precision.HIGHEST,) * 2)
PLAIN = (None, "default", lax.Precision.DEFAULT, (lax.Precision.DEFAULT,) * 2)


@dataclasses.dataclass(frozen=True)
class Cut:
    """Sizes of a call and of its blocks."""

    batch: int
    queries: int  # T
    keys: int  # S
    kv_heads: int  # K
    groups: int  # G
    width: int  # H
    value_width: int  # V
    heads: int  # of a block, of keys
    rows: int  # of a block
    key_block: int
    target: Target
    vmem_bytes: int  # that a kernel holds, about
    splits: bool = False  # whether keys may be split into parts

    @property
    def parts(self) -> int:
        """How many parts of the keys have a state of their own."""
        steps = self.batch * self.head_blocks * self.row_blocks
        return parts(self.target, steps, self.key_blocks) if self.splits else 1

    @property
    def row_blocks(self) -> int:
        """How many blocks of rows."""
        return -(-self.queries * self.groups // self.rows)

    @property
    def key_blocks(self) -> int:
        """How many blocks of keys."""
        return -(-self.keys // self.key_block)

    @property
    def all_rows(self) -> int:
        """R, those that fill the last block included."""
        return self.row_blocks * self.rows

    @property
    def head_blocks(self) -> int:
        """How many blocks of heads."""
        return self.kv_heads // self.heads

    @property
    def is_ragged(self) -> bool:
        """Whether the last block of keys has slots beyond the keys."""
        return self.keys % self.key_block != 0


def cut_of(operands: Operands, machine: Machine, *, backward: bool = False) -> Cut:
    """The sizes for a call: as many heads in a block as there may be, fewer where memory is short."""
    batch, queries, heads, width = operands.query.shape
    keys, kv_heads, value_width = operands.value.shape[-3:]
    device_kind = device_kind_of()
    target = target_of(device_kind)
    kind = kind_of(queries * heads // kv_heads, backward=backward)
    measured = tuned(chip_name(device_kind), kind, width, operands.key.dtype)
    counts = [n for n in range(min(HEADS, kv_heads), 0, -1) if kv_heads % n == 0]
    arrays = operands.query, operands.key, operands.value
    if "SKH" in (order_of(x.shape, x.dtype) for x in arrays[1:]):
        counts = counts[:1]
    shapes = [
        Shape(
            rows=queries * heads // kv_heads,
            groups=heads // kv_heads,
            keys=keys,
            heads=count,
            width=width,
            value_width=value_width,
            itemsize=max(x.dtype.itemsize for x in arrays),
            backward=backward,
            key_itemsize=max(x.dtype.itemsize for x in arrays[1:]),
            most_keys=min(_most_keys(x, count) for x in arrays[1:]),
        )
        for count in counts
    ]
    sized = ((shape, *sizes(shape, target, machine.block_sizes, measured)) for shape in shapes)
    cuts = [
        Cut(
            batch,
            queries,
            keys,
            kv_heads,
            shape.groups,
            width,
            value_width,
            shape.heads,
            rows,
            key_block,
            target,
            vmem_bytes(shape, rows, key_block),
            splits=not backward,
        )
        for shape, rows, key_block in sized
    ]
    return next((cut for cut in cuts if cut.vmem_bytes <= target.budget_bytes), cuts[-1])


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


class Index(NamedTuple):
    """What decides who attends to whom; a first dimension of 1 holds for the whole batch."""

    rows: jax.Array  # int32[B|1, 3, R]: lowest position, highest position, segment
    keys: jax.Array  # int32[B|1, 2, key blocks * block]: position, segment


def index_of(mask: Mask, cut: Cut) -> Index | None:
    """The vectors of a mask without a dense part; None where every row attends to every key."""
    known = mask.key_positions, mask.query_valid, mask.key_segment_ids
    if not cut.is_ragged and all(x is None for x in known):
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
    slots = _filled(slots, 1, cut.key_blocks * cut.key_block, -1)
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


class Table(NamedTuple):
    """Which blocks each block visits, in which order; flat, as the scalar memory wants it."""

    counts: jax.Array  # int32[B|1 * own]
    order: jax.Array  # int32[B|1 * own * others], those that are visited first
    own: int
    others: int
    batch: int  # 1 or B

    def row(self, batch: jax.Array, block: jax.Array) -> jax.Array:
        """Where the block's count stands."""
        return (batch if self.batch > 1 else 0) * self.own + block


def tables(mask: Mask, cut: Cut) -> tuple[Table, Table]:
    """Of blocks of rows, the blocks of keys; and of blocks of keys, the blocks of rows."""
    counts = cut.row_blocks, cut.key_blocks
    query_block = min(cut.rows // cut.groups, cut.queries) if counts[0] > 1 else cut.queries
    visits = Visits.of(mask, query_block, min(cut.key_block, cut.keys), counts)
    batch = 1
    needed = jnp.ones((1, *counts), bool)
    if visits is not None:
        known = jax.tree.leaves((visits.queries, visits.keys))
        batch = max(x.shape[0] for x in known)
        rows = jnp.arange(batch, dtype=jnp.int32)
        needed = jax.vmap(lambda b: visits.table(Span(b, 1)))(rows)
    return _table(needed), _table(needed.swapaxes(1, 2))


def _table(needed: jax.Array) -> Table:
    batch, own, others = needed.shape
    order = jnp.argsort(~needed, axis=2, stable=True).astype(jnp.int32)
    counts = needed.sum(axis=2, dtype=jnp.int32)
    return Table(counts.reshape(-1), order.reshape(-1), own, others, batch)


def order_of(shape: tuple[int, ...], dtype: jnp.dtype) -> Order:
    """How keys, or values, [..., S, K, .], lie in the memory of a TPU."""
    *_, kv_heads, width = shape
    if width % LANES:
        return "KHS"
    # Bytes are packed in fours, which 2 heads do not fill.
    few = (4,) if dtype.itemsize == 1 else (2, 4)
    return "SKH" if kv_heads in few or kv_heads % HEADS == 0 else "KSH"


def as_stored(x: jax.Array) -> jax.Array:
    """[L, B, S, K, .] with the last three in their `Order`; of float16, which Mosaic has not, the bits."""
    x = x if x.ndim == 5 else x[None]
    match order_of(x.shape, x.dtype):
        case "KHS":
            x = jnp.moveaxis(x, 2, 4)
        case "KSH":
            x = x.swapaxes(2, 3)
    if x.dtype != jnp.float16:
        return x
    # Last of all, where it becomes a part of the kernel: see `distattn.kernels.tpu_call.launch`.
    return lax.bitcast_convert_type(lax.optimization_barrier(x), jnp.uint16)


def _most_keys(x: jax.Array, heads: int) -> int:
    """Of a block with so many heads."""
    if x.dtype != jnp.float16:
        return MOST_KEYS
    rows = (
        HEADS if order_of(x.shape, x.dtype) == "SKH" else heads
    )  # a tile is one of 8, full or not
    return min(max(HALF_ITEMS // (rows * x.shape[-1]) // LANES * LANES, LANES), MOST_KEYS)


def as_given(x: jax.Array, order: Order) -> jax.Array:
    """The inverse, of one layer: [B, S, K, .]."""
    match order:
        case "KHS":
            return jnp.moveaxis(x[0], 3, 1)
        case "KSH":
            return x[0].swapaxes(1, 2)
    return x[0]


def _stacked(parts: list[jax.Array]) -> jax.Array:
    """[B|1, parts, n]."""
    shape = jnp.broadcast_shapes(*(x.shape for x in parts))
    return jnp.stack([jnp.broadcast_to(x, shape) for x in parts], axis=1)


def _filled(x: jax.Array, axis: int, size: int, value: int = 0) -> jax.Array:
    widths = [(0, size - x.shape[axis] if a == axis else 0) for a in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=value) if size > x.shape[axis] else x
