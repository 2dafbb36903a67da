"""Blocks of one device's attention: their sizes, their places, and their contents."""

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
from distattn.algebra.mergeable import Sum, is_exact
from distattn.algebra.softmax_state import SoftmaxState, empty, state_dtype
from distattn.local.block import Block, zero_unattended
from distattn.local.cpu import is_flat, take_bits
from distattn.local.inputs import AttentionInputs, Sizes
from distattn.local.mask import BlockSparsity, Span, split_heads, take

# Logits of one block: 1 MiB of float32 fits the second-level cache of a CPU core. If positions decide which
# blocks are skipped, and in the backward pass, blocks are smaller, so that more of them are skipped.
BLOCK_ELEMENTS = 2**18
BLOCK_ELEMENTS_SMALLER = 2**17


@dataclasses.dataclass(frozen=True)
class Machine:
    """Facts besides shapes that decide the sizes of blocks."""

    platform: str  # 'cpu', 'gpu', 'tpu'
    # The compiler may shard batch and heads: slicing them would gather them.
    compiler_sharded: bool = False
    block_sizes: tuple[int, int] | None = None  # queries, keys; None: chosen


@dataclasses.dataclass(frozen=True)
class Tiling:
    """Sizes of one block: sequences, KV heads, queries, keys."""

    batch: int
    heads: int
    query: int
    key: int
    flat: bool = False  # see `local.cpu`
    as_bits: bool = False  # see `cpu.take_bits`
    # Skip blocks that the mask rules out. Not if the compiler may shard batch or heads: a condition on
    # all of them would be a collective.
    skips: bool = True


def choose_tiling(inputs: AttentionInputs, machine: Machine, *, backward: bool = False) -> Tiling:
    """Return the block sizes of a call.

    On a CPU a block has one sequence and one KV head, so that it stays in the cache. On other platforms,
    and if the compiler may have sharded them, it has the whole batch and all heads.
    """
    sizes, cpu = Sizes.of(inputs), machine.platform == "cpu"
    one_by_one = cpu and not machine.compiler_sharded
    flat = one_by_one and not backward and is_flat(sizes.heads, sizes.kv_heads, sizes.queries)
    few = sizes.groups * sizes.queries <= 64
    query_block = min(sizes.queries, max(512 // sizes.groups, 16) if one_by_one else 256)
    if flat:
        key_block = min(max(2**19 // max(sizes.kv_heads * sizes.width, 1), 256), 2048)
    else:
        smaller = backward or inputs.mask.key_positions is not None
        elements = BLOCK_ELEMENTS_SMALLER if smaller else BLOCK_ELEMENTS
        key_block = min(max(elements // max(sizes.groups * query_block, 1), 256), 1024)
        # Two blocks at least, so that a shard of a zigzag layout is skipped by halves.
        if inputs.mask.compares_positions:
            key_block = min(key_block, max(sizes.keys // 2, 64))
    if machine.block_sizes is not None:
        query_block, key_block = machine.block_sizes
    return Tiling(
        batch=1 if one_by_one else sizes.batch,
        heads=1 if one_by_one and not (flat or few) else sizes.kv_heads,
        query=_divisor_near(sizes.queries, query_block),
        key=_divisor_near(sizes.keys, key_block),
        flat=flat,
        as_bits=cpu,
        skips=not machine.compiler_sharded,
    )


def _divisor_near(length: int, target: int) -> int:
    """Return the largest divisor of the length in (target / 2, target], or the target."""
    target = max(min(length, target), 1)
    divisors = (size for size in range(target, target // 2, -1) if length % size == 0)
    return next(divisors, target)


class Place(NamedTuple):
    """The place of one block in the arrays of a call.

    The last block along T or S ends with the data. If it overlaps the block before, the overlap is not
    `new`.
    """

    batch: Span
    heads: Span  # KV heads
    query_heads: Span
    query: Span
    key: Span
    new_queries: jax.Array | None  # bool[q]; None: all
    new_keys: jax.Array | None  # bool[s]; None: all


class Tiles:
    """The blocks of one call: their number, their places, and their contents."""

    inputs: AttentionInputs
    tiling: Tiling
    sizes: Sizes
    dtype: jnp.dtype  # dtype of the state
    axes: frozenset[str]  # axes over which the state varies
    is_empty: bool  # no block; the four counts are unset
    batches: int
    head_blocks: int
    query_blocks: int
    key_blocks: int
    block_sparsity: BlockSparsity | None  # None: every block is needed

    def __init__(self, inputs: AttentionInputs, tiling: Tiling) -> None:
        self.inputs, self.tiling, self.sizes = inputs, tiling, Sizes.of(inputs)
        self.dtype = state_dtype(inputs.query, inputs.key, inputs.value)
        self.axes = varying_axes(*jax.tree.leaves(inputs))
        self.is_empty = min(self.sizes.batch, self.sizes.queries, self.sizes.keys) == 0
        if not self.is_empty:
            self.batches = self.sizes.batch // tiling.batch
            self.head_blocks = self.sizes.kv_heads // tiling.heads
            self.query_blocks = math.ceil(self.sizes.queries / tiling.query)
            self.key_blocks = math.ceil(self.sizes.keys / tiling.key)
        self.block_sparsity = None
        if tiling.skips and not self.is_empty:
            counts = self.query_blocks, self.key_blocks
            self.block_sparsity = BlockSparsity.of(inputs.mask, tiling.query, tiling.key, counts)

    def fold(
        self,
        scale: float,
        empty: Any,
        step: Callable[[Any, Place, jax.Array], Any],
        write: Callable[[Any, Place, Any], Any],
        whole: Any,
    ) -> Any:
        """Return `whole` with the state of each block of queries over all keys that it needs.

        Args:
          scale: factor of the query.
          empty: the state over no keys of one block of queries.
          step: returns the state with one block of keys, from state, place and query [b, K, G, q, H].
          write: returns `whole` with the state of one block of queries, from whole, place and state.
          whole: the state over no keys of all queries.
        """

        def query_block(index: jax.Array, whole: Any) -> Any:
            batch, heads, row = unravel(index, self.batches, self.head_blocks, self.query_blocks)
            place = self.place(batch, heads, row, 0)
            query = self.query(place, scale)

            def key_block(column: jax.Array, state: Any) -> Any:
                return step(state, self.place(batch, heads, row, column), query)

            needed = self._needed(place.batch, row=row)
            return write(whole, place, visit(needed, self.key_blocks, key_block, empty))

        if self.is_empty:
            return whole
        return loop(self.batches * self.head_blocks * self.query_blocks, query_block, whole)

    def fold_gradients(
        self,
        scale: float,
        zero_keys: Any,
        step: Callable[[tuple[Any, Any], Place, jax.Array], tuple[Any, Any]],
        write: Callable[[Any, Place, Any], Any],
        gradients: tuple[Any, Any],
    ) -> tuple[Any, Any]:
        """Return gradients of query and bias, and of key and value, over all blocks.

        Args:
          scale: factor of the query.
          zero_keys: zero gradients of one block of keys and values.
          step: returns gradients of query and bias, and of one block of keys, with one more block of
            queries, from these gradients, place and query.
          write: returns gradients of all keys with those of one block, from gradients, place and block.
          gradients: zero gradients of query and bias, and of key and value.
        """

        def key_block(index: jax.Array, gradients: tuple[Any, Any]) -> tuple[Any, Any]:
            batch, heads, column = unravel(index, self.batches, self.head_blocks, self.key_blocks)
            place = self.place(batch, heads, 0, column)
            by_query, by_key = gradients

            def query_block(row: jax.Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
                place = self.place(batch, heads, row, column)
                return step(carry, place, self.query(place, scale))

            needed = self._needed(place.batch, column=column)
            by_query, block = visit(needed, self.query_blocks, query_block, (by_query, zero_keys))
            return by_query, write(by_key, place, block)

        if self.is_empty:
            return gradients
        return loop(self.batches * self.head_blocks * self.key_blocks, key_block, gradients)

    def place(self, batch: Any, heads: Any, row: Any, column: Any) -> Place:
        """Return the place of a block from its indices along batch, KV heads, queries and keys."""
        tiling, groups = self.tiling, self.sizes.groups
        query, new_queries = _span(row, tiling.query, self.sizes.queries)
        key, new_keys = _span(column, tiling.key, self.sizes.keys)
        return Place(
            Span(batch * tiling.batch, tiling.batch),
            Span(heads * tiling.heads, tiling.heads),
            Span(heads * tiling.heads * groups, tiling.heads * groups),
            query,
            key,
            new_queries,
            new_keys,
        )

    def query(self, place: Place, scale: float) -> jax.Array:
        """Return [b, K, G, q, H], times the scale; 0 in rows past the query length."""
        spans = (place.batch, place.query, place.query_heads)
        query = self._load(self.inputs.query, *spans).astype(self.dtype)
        valid = take(self.inputs.mask.query_valid, place.batch, place.query)
        if valid is not None:
            query = jnp.where(valid[..., None, None], query, 0)
        return self.heads_first(query * scale)

    def _needed(self, batch: Span, row: Any = None, column: Any = None) -> jax.Array | None:
        """Return bool[key blocks] of a row or bool[query blocks] of a column, True if needed; None: all."""
        if self.block_sparsity is None:
            return None
        spans = (None if x is None else Span(x, 1) for x in (row, column))
        return self.block_sparsity.table(batch, *spans).reshape(-1)

    def block(self, place: Place, query: jax.Array, *, sums_queries: bool = False) -> Block:
        """Return the inputs of the block; overlaps with the block before are not allowed.

        Args:
          place: of the block.
          query: [b, K, G, q, H], as `query` returns it.
          sums_queries: the overlap of queries is not allowed either.
        """
        inputs = self.inputs
        key = self._load_keys(inputs.key, inputs.key_scale, place)
        value = self._load_keys(inputs.value, inputs.value_scale, place)
        spans = place.batch, place.query_heads, place.query, place.key
        bias = take(inputs.bias, *spans)
        if bias is not None:
            bias = split_heads(bias, self.tiling.heads).astype(self.dtype)
        allowed = inputs.mask.block(*spans).allowed(self.tiling.heads)
        key, value = zero_unattended(key, value, allowed)
        new_queries = place.new_queries if sums_queries else None
        for new, shape in ((place.new_keys, (1, 1, 1, 1, -1)), (new_queries, (1, 1, 1, -1, 1))):
            if new is not None:
                new = new.reshape(shape)
                allowed = new if allowed is None else allowed & new
        if self.tiling.flat:
            bias, allowed = (None if x is None else jnp.moveaxis(x, -1, 1) for x in (bias, allowed))
        return Block(query, key, value, bias, allowed, flat=self.tiling.flat)

    def rows(self, x: jax.Array, place: Place) -> jax.Array:
        """Return the rows of the block, [b, K, G, q, ...] from [B, T, N, ...]."""
        return self.heads_first(take(x, place.batch, place.query, place.query_heads))

    def heads_first(self, x: jax.Array) -> jax.Array:
        """Return [b, K, G, q, ...] from [b, q, K*G, ...]."""
        x = x.reshape(*x.shape[:2], self.tiling.heads, self.sizes.groups, *x.shape[3:])
        return jnp.moveaxis(x, 1, 3)

    def zeros(self, shape: tuple[int, ...], dtype: jnp.dtype | None = None) -> jax.Array:
        """Return zeros in the state's dtype, of the inputs' varying type."""
        return vary(jnp.zeros(shape, dtype or self.dtype), self.axes)

    def empty_state(self, *shape: int) -> SoftmaxState:
        """Return the identity with rows of the given shape."""
        return empty(shape, self.sizes.value_width, self.dtype, self.axes)

    def _load_keys(self, x: jax.Array, scale: jax.Array | None, place: Place) -> jax.Array:
        """Return [b, s, K, .] of key or value in the state's dtype, of the layer and times the scale."""
        layer = self.inputs.layer
        spans = (place.batch, place.key, place.heads)
        spans = spans if layer is None else (Span(layer, 1), *spans)
        block = self._load(x, *spans).astype(self.dtype)
        if scale is not None:
            block = block * take(scale, *spans).astype(self.dtype)[..., None]
        return block if layer is None else block[0]

    def _load(self, x: jax.Array, *spans: Span) -> jax.Array:
        bits = self.tiling.as_bits and x.dtype.itemsize <= 2
        return take_bits(x, *spans) if bits else take(x, *spans)


def loop(count: int, body: Callable[..., Any], init: Any) -> Any:
    """Return fori_loop of body, or one plain call if count is 1."""
    return body(0, init) if count == 1 else lax.fori_loop(0, count, body, init)


def visit(needed: jax.Array | None, count: int, body: Callable[..., Any], init: Any) -> Any:
    """Return `loop` over the needed indices, bool[count], in ascending order; None: over all."""
    if needed is None:
        return loop(count, body, init)
    order = jnp.argsort(~needed, stable=True)
    return lax.fori_loop(0, needed.sum(), lambda i, carry: body(order[i], carry), init)


def unravel(index: Any, *counts: int) -> list[Any]:
    """Return row-major coordinates of a flat loop index."""
    parts = []
    for count in reversed(counts):
        parts.append(index % count if count > 1 else 0)
        index = index // count if count > 1 else index
    return parts[::-1]


def rows_first(x: jax.Array) -> jax.Array:
    """Return [b, q, K*G, ...] from [b, K, G, q, ...]."""
    x = jnp.moveaxis(x, 3, 1)
    return x.reshape(*x.shape[:2], -1, *x.shape[4:])


def put(x: jax.Array, block: jax.Array, *spans: Span) -> jax.Array:
    """Return x with the block written at its place."""
    block = block.astype(x.dtype)
    if block.shape == x.shape:
        return block
    starts = [span.start for span in spans] + [0] * (x.ndim - len(spans))
    # One type, which indices of loops and of devices do not have under x64.
    starts = [lax.convert_element_type(start, jnp.int32) for start in starts]
    return lax.dynamic_update_slice(x, block, starts)


def add(x: jax.Array, block: jax.Array, *spans: Span) -> jax.Array:
    """Return x with the block added at its place, summed over dimensions of size 1 in x."""
    spans = tuple(Span(0, 1) if x.shape[a] == 1 else span for a, span in enumerate(spans))
    summed = [a for a, size in enumerate(x.shape) if size == 1 and block.shape[a] != 1]
    block = block.sum(axis=summed, keepdims=True) if summed else block
    return put(x, take(x, *spans) + block, *spans)


def add_at(x: Sum, part: Sum, *spans: Span) -> Sum:
    """Return x with the part added at its place among the rows."""
    return merge_at(x, part, *spans) if is_exact(x) else add(x, part, *spans)


def put_at(x: FixedPoint, part: FixedPoint, *spans: Span) -> FixedPoint:
    """Return x with the part written at its place among the rows."""
    inner = (Span(0, x.limbs[0].shape[0]), *spans)
    limbs = tuple(put(a, b, *inner) for a, b in zip(x.limbs, part.limbs, strict=True))
    return FixedPoint(put(x.exponent, part.exponent, *spans), limbs, x.limb_format)


def merge_at(x: FixedPoint, part: FixedPoint, *spans: Span) -> FixedPoint:
    """Return x with the part merged at its place; dimensions of size 1 are kept whole."""
    spans = tuple(Span(0, 1) if x.exponent.shape[a] == 1 else span for a, span in enumerate(spans))
    before = FixedPoint(
        exponent=take(x.exponent, *spans),
        limbs=tuple(take(limb, None, *spans) for limb in x.limbs),
        limb_format=x.limb_format,
    )
    return put_at(x, fixed_point.merge(before, part), *spans)


def _span(index: Any, size: int, length: int) -> tuple[Span, jax.Array | None]:
    """Return the span of a block, and which entries are not in the block before (None: all)."""
    if length % size == 0:
        return Span(index * size, size), None
    span = Span(jnp.minimum(index * size, length - size), size)
    return span, span.start + jnp.arange(size, dtype=jnp.int32) >= index * size
