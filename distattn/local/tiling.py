"""How one device's work is cut into blocks: their sizes, their places, and how they are loaded.

Gradients on their way to completion: arrays that are added, or sums in fixed point that are merged.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from distattn._compat import vary, varying_axes
from distattn.algebra import fixed_point
from distattn.algebra.fixed_point import FixedPoint
from distattn.algebra.mergeable import Sum
from distattn.algebra.softmax_state import SoftmaxState, empty, state_dtype
from distattn.local.block import DIAGONAL_HEADS, Block
from distattn.local.inputs import AttentionInputs
from distattn.local.mask import BlockSparsity, Mask, Span, split_heads, take

# Logits of one block, in elements: 1 MiB of float32 fits the second-level cache of a CPU core. If positions decide
# which blocks are skipped, and in the backward pass, blocks are smaller, so that more of them are skipped.
BLOCK_ELEMENTS = 2**18
BLOCK_ELEMENTS_SMALLER = 2**17
# Query heads times queries up to which a flat block costs less than a transposed copy of the keys and values: with
# a matmul per head, and with a block-diagonal one (`DIAGONAL_HEADS`).
FLAT_COLUMNS = 1024
FLAT_COLUMNS_DIAGONAL = 48


@dataclasses.dataclass(frozen=True)
class Machine:
    """What the cutting depends on besides shapes."""

    platform: str  # 'cpu', 'gpu', 'tpu'
    # Batch and heads may be sharded by the compiler: slicing them would gather them.
    compiler_sharded: bool = False
    block_sizes: tuple[int, int] | None = None  # queries, keys; None: chosen


@dataclasses.dataclass(frozen=True)
class Tiling:
    """The size of one block: rows of the batch, key/value heads, queries, keys."""

    batch: int
    heads: int
    query: int
    key: int
    flat: bool = False
    # XLA:CPU lifts the conversion of an 8- or 16-bit block out of the loop, that is, makes a float32 copy
    # of the whole array. It does not where the block is cut from integers that seem to change each time.
    as_bits: bool = False
    branch: bool = True  # see `Block`


def choose_tiling(inputs: AttentionInputs, machine: Machine, *, backward: bool = False) -> Tiling:
    """Block sizes for a call.

    On a CPU one row of the batch and one key/value head at a time, so that a block stays in the cache.
    Elsewhere, and where the compiler may have sharded them, batch and heads whole.
    """
    batch, queries, heads, width = inputs.query.shape
    keys, kv_heads = inputs.key.shape[-3:-1]
    groups = heads // kv_heads
    cpu = machine.platform == "cpu"
    one_by_one = cpu and not machine.compiler_sharded
    columns = FLAT_COLUMNS if kv_heads > DIAGONAL_HEADS else FLAT_COLUMNS_DIAGONAL
    flat = one_by_one and not backward and heads * queries <= columns
    few = groups * queries <= 64
    query_block = min(queries, max(512 // groups, 16) if one_by_one else 256)
    if flat:
        key_block = min(max(2**19 // max(kv_heads * width, 1), 256), 2048)
    else:
        smaller = backward or inputs.mask.key_positions is not None
        elements = BLOCK_ELEMENTS_SMALLER if smaller else BLOCK_ELEMENTS
        key_block = min(max(elements // max(groups * query_block, 1), 256), 1024)
        # In two, so that a shard of a zigzag layout is skipped by halves.
        if inputs.mask.compares_positions:
            key_block = min(key_block, max(keys // 2, 64))
    if machine.block_sizes is not None:
        query_block, key_block = machine.block_sizes
    return Tiling(
        batch=1 if one_by_one else batch,
        heads=1 if one_by_one and not (flat or few) else kv_heads,
        query=_divisor_near(queries, query_block),
        key=_divisor_near(keys, key_block),
        flat=flat,
        as_bits=cpu,
        branch=not machine.compiler_sharded,
    )


def _divisor_near(length: int, target: int) -> int:
    """Return the largest size from half the target to the target that divides the length, else the target."""
    target = max(min(length, target), 1)
    divisors = (size for size in range(target, target // 2, -1) if length % size == 0)
    return next(divisors, target)


class Place(NamedTuple):
    """Where one block lies."""

    batch: Span
    heads: Span  # of keys and values
    query_heads: Span
    query: Span
    key: Span


class Tiles:
    """The blocks of one call: how many there are, where they lie, and what is in them."""

    inputs: AttentionInputs
    tiling: Tiling
    batch: int  # the sizes of the inputs: B, T, S, K, V, G
    queries: int
    keys: int
    kv_heads: int
    value_width: int
    groups: int
    dtype: jnp.dtype  # of the state
    axes: frozenset[str]  # over which it varies
    is_empty: bool  # there is no block, nor any of the four counts
    batches: int
    head_blocks: int
    query_blocks: int
    key_blocks: int
    block_sparsity: BlockSparsity | None  # which blocks are visited; None: all

    def __init__(self, inputs: AttentionInputs, tiling: Tiling) -> None:
        self.inputs, self.tiling = inputs, tiling
        self.batch, self.queries, heads, _ = inputs.query.shape
        self.keys, self.kv_heads, self.value_width = inputs.value.shape[-3:]
        self.groups = heads // self.kv_heads
        self.dtype = state_dtype(inputs.query, inputs.key, inputs.value)
        self.axes = varying_axes(*jax.tree.leaves(inputs))
        self.is_empty = min(self.batch, self.queries, self.keys) == 0
        if not self.is_empty:
            self.batches = self.batch // tiling.batch
            self.head_blocks = self.kv_heads // tiling.heads
            self.query_blocks = math.ceil(self.queries / tiling.query)
            self.key_blocks = math.ceil(self.keys / tiling.key)
        self.block_sparsity = None
        if tiling.branch and not self.is_empty:
            counts = self.query_blocks, self.key_blocks
            self.block_sparsity = BlockSparsity.of(inputs.mask, tiling.query, tiling.key, counts)

    def place(self, batch: Any, heads: Any, row: Any, column: Any) -> Place:
        """The place of a block from the indices of its row of the batch, heads, queries and keys."""
        tiling, groups = self.tiling, self.groups
        return Place(
            Span(batch * tiling.batch, tiling.batch),
            Span(heads * tiling.heads, tiling.heads),
            Span(heads * tiling.heads * groups, tiling.heads * groups),
            _span(row, tiling.query, self.queries),
            _span(column, tiling.key, self.keys),
        )

    def query(self, place: Place, scale: float) -> jax.Array:
        """[b, K, G, q, H], times the scale."""
        spans = (place.batch, place.query, place.query_heads)
        query = self._load(self.inputs.query, *spans).astype(self.dtype)
        return self.heads_first(query * scale)

    def mask(self, place: Place) -> Mask:
        """The mask of the block."""
        return self.inputs.mask.block(place.batch, place.query_heads, place.query, place.key)

    def keys_for(self, place: Place, row: Any) -> jax.Array | None:
        """bool[key blocks] that a block of queries needs; None: any, or it must not be asked."""
        return (
            None if self.block_sparsity is None else self.block_sparsity.keys_for(place.batch, row)
        )

    def queries_for(self, place: Place, column: Any) -> jax.Array | None:
        """bool[query blocks] that need a block of keys; None: any."""
        return (
            None
            if self.block_sparsity is None
            else self.block_sparsity.queries_for(place.batch, column)
        )

    def block(
        self,
        place: Place,
        query: jax.Array,
        mask: Mask,
        *,
        fresh_keys: jax.Array | None,
        fresh_queries: jax.Array | None = None,
    ) -> Block:
        """The inputs of the block; entries that are not fresh belong to the block before."""
        inputs = self.inputs
        key = self._load_keys(inputs.key, inputs.key_scale, place)
        value = self._load_keys(inputs.value, inputs.value_scale, place)
        bias = take(self.inputs.bias, place.batch, place.query_heads, place.query, place.key)
        if bias is not None:
            bias = split_heads(bias, self.tiling.heads).astype(self.dtype)
        allowed = mask.allowed(self.tiling.heads)
        for fresh, shape in ((fresh_keys, (1, 1, 1, 1, -1)), (fresh_queries, (1, 1, 1, -1, 1))):
            if fresh is not None:
                fresh = fresh.reshape(shape)
                allowed = fresh if allowed is None else allowed & fresh
        if self.tiling.flat:
            bias, allowed = (None if x is None else jnp.moveaxis(x, -1, 1) for x in (bias, allowed))
        return Block(
            query, key, value, bias, allowed, flat=self.tiling.flat, branch=self.tiling.branch
        )

    def rows(self, x: jax.Array, place: Place) -> jax.Array:
        """[B, T, N, ...] to the rows of the block, [b, K, G, q, ...]."""
        return self.heads_first(take(x, place.batch, place.query, place.query_heads))

    def heads_first(self, x: jax.Array) -> jax.Array:
        """[b, q, K*G, ...] to [b, K, G, q, ...]."""
        x = x.reshape(*x.shape[:2], self.tiling.heads, self.groups, *x.shape[3:])
        return jnp.moveaxis(x, 1, 3)

    def zeros(self, shape: tuple[int, ...], dtype: jnp.dtype | None = None) -> jax.Array:
        """Zeros in the state's dtype, of the inputs' varying type."""
        return vary(jnp.zeros(shape, dtype or self.dtype), self.axes)

    def empty_state(self, *shape: int) -> SoftmaxState:
        """The identity, with rows of the given shape."""
        return empty(shape, self.value_width, self.dtype, self.axes)

    def _load_keys(self, x: jax.Array, scale: jax.Array | None, place: Place) -> jax.Array:
        """[b, s, K, .] of key or value in the state's dtype: of the layer, and times the scale."""
        layer = self.inputs.layer
        spans = (place.batch, place.key, place.heads)
        spans = spans if layer is None else (Span(layer, 1), *spans)
        block = self._load(x, *spans).astype(self.dtype)
        if scale is not None:
            block = block * take(scale, *spans).astype(self.dtype)[..., None]
        return block if layer is None else block[0]

    def _load(self, x: jax.Array, *spans: Span) -> jax.Array:
        if not self.tiling.as_bits or x.dtype.itemsize > 2:
            return take(x, *spans)
        bits, _ = lax.optimization_barrier((x, [span.start for span in spans]))
        bits = lax.bitcast_convert_type(bits, jnp.uint16 if x.dtype.itemsize == 2 else jnp.uint8)
        return lax.bitcast_convert_type(take(bits, *spans), x.dtype)


def loop(count: int, body: Callable[..., Any], init: Any) -> Any:
    """fori_loop, or a plain call where there is nothing to loop over."""
    return body(0, init) if count == 1 else lax.fori_loop(0, count, body, init)


def visit(needed: jax.Array | None, count: int, body: Callable[..., Any], init: Any) -> Any:
    """`loop` over those of the indices that are needed, bool[count], in order; None: over all."""
    if needed is None:
        return loop(count, body, init)
    order = jnp.argsort(~needed, stable=True)
    return lax.fori_loop(0, needed.sum(), lambda i, carry: body(order[i], carry), init)


def unravel(index: Any, *counts: int) -> list[Any]:
    """Row-major coordinates of a flat loop index."""
    parts = []
    for count in reversed(counts):
        parts.append(index % count if count > 1 else 0)
        index = index // count if count > 1 else index
    return parts[::-1]


def fresh(index: Any, span: Span, length: int) -> jax.Array | None:
    """bool[size]: which entries of block `index` are not in the block before too; None: all."""
    if length % span.size == 0:
        return None
    return span.start + jnp.arange(span.size, dtype=jnp.int32) >= index * span.size


def rows_first(x: jax.Array) -> jax.Array:
    """[b, K, G, q, ...] to [b, q, K*G, ...]."""
    x = jnp.moveaxis(x, 3, 1)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def put(x: jax.Array, block: jax.Array, *spans: Span) -> jax.Array:
    """x with the block written at its place."""
    block = block.astype(x.dtype)
    if block.shape == x.shape:
        return block
    starts = [span.start for span in spans] + [0] * (x.ndim - len(spans))
    # Of one type, which under x64 the indices of loops and of devices are not.
    starts = [lax.convert_element_type(start, jnp.int32) for start in starts]
    return lax.dynamic_update_slice(x, block, starts)


def add(x: jax.Array, block: jax.Array, *spans: Span) -> jax.Array:
    """x with the block added at its place, summed over the dimensions that x has not."""
    spans = tuple(Span(0, 1) if x.shape[a] == 1 else span for a, span in enumerate(spans))
    summed = [a for a, size in enumerate(x.shape) if size == 1 and block.shape[a] != 1]
    block = block.sum(axis=summed, keepdims=True) if summed else block
    return put(x, take(x, *spans) + block, *spans)


def _span(index: Any, size: int, length: int) -> Span:
    # The last block is moved back to end with the data, and overlaps its neighbour.
    return Span(jnp.minimum(index * size, length - size) if length % size else index * size, size)


def add_at(x: Sum, part: Sum, *spans: Span) -> Sum:
    """x with the part added at its place among the rows."""
    return merge_at(x, part, *spans) if isinstance(x, FixedPoint) else add(x, part, *spans)


def put_at(x: FixedPoint, part: FixedPoint, *spans: Span) -> FixedPoint:
    """x with the part at its place among the rows."""
    inner = (Span(0, x.words[0].shape[0]), *spans)
    words = tuple(put(a, b, *inner) for a, b in zip(x.words, part.words, strict=True))
    return FixedPoint(put(x.top, part.top, *spans), words, x.limb_format)


def merge_at(x: FixedPoint, part: FixedPoint, *spans: Span) -> FixedPoint:
    """x with the part merged at its place; dimensions of size 1 are kept whole."""
    spans = tuple(Span(0, 1) if x.top.shape[a] == 1 else span for a, span in enumerate(spans))
    there = FixedPoint(
        top=take(x.top, *spans),
        words=tuple(take(word, None, *spans) for word in x.words),
        limb_format=x.limb_format,
    )
    return put_at(x, fixed_point.merge(there, part), *spans)
