"""The switch by which kernels run on a CPU, for tests.

Rows of queries for kernels of any platform, and what masks read of rows and of keys.

The queries of all heads of a key head lie side by side, [B, K, R, .] with R >= T * G rows, so that few
queries fill a tile. What masks read is made of vectors: of a row the lowest and the highest position that
it may attend to and its segment, of a key its position and its segment.

What kernels of any platform compute of a block: logits, weights and their gradients.

The orientation is free: rows by keys in one kernel, keys by rows in another.

What attention kernels of others return, (out, lse), made a `SoftmaxState`; and what they are given.

They finish attention over the keys of a device. What they do with a row that has no key, and with values
that have no weight, is not left to them.

Which blocks the kernels visit: known before they start, by the ranges of positions and of segments.

What several kernels do not do, each in words that name the argument.

Functions that are imported when they are called: not all versions of JAX bring all that Pallas needs.
"""

import dataclasses
import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from distattn._compat import interpreter, varying_axes
from distattn.algebra.softmax_state import SoftmaxState, from_lse, softmax_weights
from distattn.local.block import Cotangents, LogitConfig, finish_logits, gradient_of_logits
from distattn.local.inputs import AttentionInputs
from distattn.local.mask import BlockSparsity, Mask, Span, saturating_add
from distattn.local.tiling import Machine

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


# The precisions of products that all kernels have.
EXACT = ("highest", "float32", lax.Precision.HIGHEST, (lax.Precision.HIGHEST,) * 2)
PLAIN = (None, "default", lax.Precision.DEFAULT, (lax.Precision.DEFAULT,) * 2)


@dataclasses.dataclass(frozen=True)
class Numbers:
    """How products are made."""

    dtype: jnp.dtype  # of their inputs; they are summed in float32
    precision: lax.Precision

    def product(self, a: jax.Array, b: jax.Array, over: tuple[int, int]) -> jax.Array:
        """f32: a . b over a dimension of each."""
        return lax.dot_general(
            a.astype(self.dtype),
            b.astype(self.dtype),
            (((over[0],), (over[1],)), ((), ())),
            precision=self.precision,
            preferred_element_type=jnp.float32,
        )


def logits_of(
    products: jax.Array, allowed: jax.Array | None, logit_config: LogitConfig
) -> tuple[jax.Array, jax.Array | None]:
    """Return the logits of q.k and their slope, see `distattn.local.block.finish_logits`."""
    return finish_logits(products * logit_config.scale, None, allowed, logit_config)


def gradients_of(
    products: jax.Array,
    d_products: jax.Array,
    allowed: jax.Array | None,
    logit_config: LogitConfig,
    *,
    reference: jax.Array,
    d_sum: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Return the weights, and the gradient of logits before the soft cap.

    `distattn.local.block.block_gradients` has the formula.

    Args:
      products: q.k.
      d_products: d_weighted_sum . value.
      allowed: bool, who attends to whom; None if every row attends to every key.
      logit_config: the soft cap and the scale.
      reference: the maximum or the log-sum-exp of the rows, broadcasts.
      d_sum: the cotangent of the sum of the rows, broadcasts.
    """
    logits, slope = logits_of(products, allowed, logit_config)
    weights = softmax_weights(logits, reference)
    return weights, gradient_of_logits(weights, d_products + d_sum, slope, allowed)


def finished_state(out: jax.Array, lse: jax.Array, attended: jax.Array) -> SoftmaxState:
    """The state of a finished attention, whatever the kernel gives for rows without a key.

    Args:
      out: [B, T, N, V].
      lse: f32[B, T, N], natural log.
      attended: bool[B|1, T, N|1], whether the row has a key; what is not, may hold anything.

    Returns:
      SoftmaxState, f32[B, T, N], f32[B, T, N], f32[B, T, N, V].
    """
    lse = jnp.where(attended, lse.astype(jnp.float32), -jnp.inf)
    return from_lse(out.astype(jnp.float32), lse)


def rows_with_keys(mask: Mask, queries: int, keys: int) -> jax.Array:
    """bool[B|1, T]: which rows attend to a key at all, of a mask in index order without segments."""
    last = jnp.array([keys - 1], jnp.int32) if _is_full(mask) else key_lengths(mask) - 1
    first, last = jnp.zeros((1, 1), jnp.int32), last[:, None]
    if mask.compares_positions:  # counted from 0 then, by all
        rows = jnp.arange(queries, dtype=jnp.int32)[None]
        left, right = mask.reach
        if left is not None:
            first = jnp.maximum(first, rows - min(left, queries))
        if right is not None:
            last = jnp.minimum(last, rows + min(right, keys))
    attended = jnp.broadcast_to(first <= last, (last.shape[0], queries))
    return attended if mask.query_valid is None else attended & mask.query_valid


def key_lengths(mask: Mask) -> jax.Array:
    """int32[B|1]: how many slots are not empty, which are the first ones."""
    return (mask.key_positions >= 0).sum(axis=-1, dtype=jnp.int32)


def without_empty_slots(x: jax.Array, mask: Mask) -> jax.Array:
    """Keys or values [B, S, K, .] with 0 for the empty slots, which can hold anything: 0 * nan is nan."""
    if _is_full(mask):
        return x
    return jnp.where((mask.key_positions >= 0)[..., None, None], x, jnp.zeros((), x.dtype))


def scaled_query(query: jax.Array, logit_config: LogitConfig) -> jax.Array:
    """The query times the scale, in its own dtype, rounded once."""
    return (query.astype(jnp.float32) * logit_config.scale).astype(query.dtype)


def _is_full(mask: Mask) -> bool:
    return mask.key_positions is None or (mask.index_order is not None and mask.index_order.full)


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
    row_block = min(cut.rows, cut.queries * cut.groups)
    block_sparsity = BlockSparsity.of(
        _of_rows(mask, cut.groups), row_block, min(cut.key_block, cut.keys), counts
    )
    batch = 1
    needed = jnp.ones((1, *counts), bool)
    if block_sparsity is not None:
        known = jax.tree.leaves((block_sparsity.queries, block_sparsity.keys))
        batch = max(x.shape[0] for x in known)
        rows = jnp.arange(batch, dtype=jnp.int32)
        needed = jax.vmap(lambda b: block_sparsity.table(Span(b, 1)))(rows)
    return _table(needed), _table(needed.swapaxes(1, 2))


def _of_rows(mask: Mask, groups: int) -> Mask:
    """The mask of rows: a block of them may end within the groups of a query."""
    names = "query_positions", "query_valid", "query_segment_ids"
    vectors = {name: getattr(mask, name) for name in names}
    rows = {
        name: None if x is None else jnp.repeat(x, groups, axis=1) for name, x in vectors.items()
    }
    return dataclasses.replace(mask, **rows)


def _table(needed: jax.Array) -> Table:
    batch, own, others = needed.shape
    order = jnp.argsort(~needed, axis=2, stable=True).astype(jnp.int32)
    counts = needed.sum(axis=2, dtype=jnp.int32)
    return Table(counts.reshape(-1), order.reshape(-1), own, others, batch)


def of_platform(machine: Machine, platform: str, *, simulated: bool = True) -> str | None:
    """That it runs elsewhere than on its platform.

    Args:
      machine: what it would run on.
      platform: 'tpu' or 'gpu'.
      simulated: whether `interpreted` runs it on a CPU.
    """
    if machine.platform == platform or (simulated and interpreter()):
        return None
    remedy = (
        " (for tests, distattn.testing.interpreted() runs it there, slowly)" if simulated else ""
    )
    return (
        f"it is a kernel for {platform.upper()}s, and the platform is {machine.platform!r}{remedy}"
    )


def of_sharding(machine: Machine) -> str | None:
    """That a compiler would have to cut it."""
    if machine.compiler_sharded:
        return "the compiler shards batch or heads unseen, and cannot cut a kernel; name their axes"
    return None


def of_dense_arguments(inputs: AttentionInputs) -> str | None:
    """A bias, and a mask that is an array."""
    if inputs.bias is not None:
        return f"bias is given, of shape {inputs.bias.shape}"
    if inputs.mask.dense is not None:
        shape = inputs.mask.dense.shape
        return f"mask is given, of shape {shape}; positions, lengths and segments are done"
    return None


def of_dtypes(
    inputs: AttentionInputs, dtypes: tuple[Any, ...], *, quantised: tuple[Any, ...] = ()
) -> str | None:
    """An array of a dtype that is not among them, key and value those of bytes where they have scales."""
    arrays = {"query": inputs.query, "key": inputs.key, "value": inputs.value}
    for name, x in arrays.items():
        done = quantised if name != "query" and inputs.key_scale is not None else dtypes
        if x.dtype not in done:
            names = ", ".join(dtype.__name__ for dtype in done)
            return f"{name} has dtype {x.dtype}; done are {names or 'none with a scale'}"
    return None


def of_mixed_dtypes(inputs: AttentionInputs) -> str | None:
    """Arrays of several dtypes."""
    for name, x in (("key", inputs.key), ("value", inputs.value)):
        if x.dtype != inputs.query.dtype:
            return (
                f"{name} has dtype {x.dtype}, and query {inputs.query.dtype}; done is one for all"
            )
    return None


def of_index_order(inputs: AttentionInputs) -> str | None:
    """Keys that lie in another order than 0, 1, 2, …, or positions that are compared and not known here."""
    mask = inputs.mask
    if inputs.key_scale is not None or inputs.layer is not None:
        return "key and value are quantised, or those of several layers"
    if mask.index_order is None:
        return "query_positions or key_positions are given, or are a cache's; done is index order alone"
    if mask.compares_positions and not mask.index_order.aligned:
        name = "is_causal" if mask.is_causal else "local_window_size"
        return (
            f"{name} compares positions, and the queries or keys of each device begin at another one, "
            "which the kernel would have to know while it is compiled; shard B or heads instead of T and S "
            "(key_value_sharding, strategy='ulysses')"
        )
    return None


def of_precision(logit_config: LogitConfig, precisions: tuple[Any, ...]) -> str | None:
    """A precision that is not among them."""
    if logit_config.precision not in precisions:
        return f"precision is {logit_config.precision!r}; None and 'default' are done"
    return None


def of_types(inputs: AttentionInputs) -> str | None:
    """A `shard_map` that tracks which values vary over its axes, where a kernel has no types for that."""
    if varying_axes(*jax.tree.leaves(inputs)):
        return "the shard_map around has check_vma=True, and its results have no type there; pass False"
    return None


def of_package(module: str) -> str | None:
    """That what it is written in is not installed."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        return f"{module} needs the package {error.name!r}, which is not installed"
    return None


def late(module: str, name: str) -> Callable[..., Any]:
    """The function of that name, of a module of this package, which may be one that cannot be imported."""
    path = f"distattn.local.kernels.{module}"
    return lambda *arguments, **options: getattr(importlib.import_module(path), name)(
        *arguments, **options
    )
