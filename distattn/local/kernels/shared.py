"""Shared parts of the TPU and the GPU kernels: sizes, layouts, mask vectors, block tables, refusals.

Rows: the queries of all heads of a KV head are adjacent, [B, K, R, .] with R >= T * G rows, so that few
queries fill a tile. Masks are vectors: two bounds on the position and a segment per row, a position and a
segment per key. Logits are rows by keys in one kernel and keys by rows in another.
"""

import dataclasses
import functools
import importlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from distattn._compat import interpreter
from distattn.algebra.softmax_state import softmax_weights
from distattn.local.block import Cotangents, LogitConfig, finish_logits, gradient_of_logits
from distattn.local.inputs import AttentionInputs
from distattn.local.mask import BlockSparsity, Mask, Span, saturating_add
from distattn.local.tiling import Machine
from distattn.planning.chips import chip_of

_MAX_POSITION = jnp.iinfo(jnp.int32).max


@dataclasses.dataclass(frozen=True, kw_only=True)
class TileConfig:
    """Sizes of a call and of its blocks.

    Each platform adds fields by inheritance: as a field of theirs it would precede every size they read.
    """

    batch: int  # B
    queries: int  # T
    keys: int  # S
    kv_heads: int  # K
    groups: int  # G
    width: int  # H
    value_width: int  # V
    row_block: int  # rows of a block
    key_block: int  # keys of a block
    row_span: int = 1  # blocks per entry of the block table
    key_span: int = 1

    @property
    def used_row_blocks(self) -> int:
        """Number of row blocks that hold a query."""
        return -(-self.queries * self.groups // self.row_block)

    @property
    def used_key_blocks(self) -> int:
        """Number of key blocks that hold a key."""
        return -(-self.keys // self.key_block)

    @property
    def row_blocks(self) -> int:
        """Number of row blocks, with those that fill the last span."""
        return -(-self.used_row_blocks // self.row_span) * self.row_span

    @property
    def key_blocks(self) -> int:
        """Number of key blocks, with those that fill the last span."""
        return -(-self.used_key_blocks // self.key_span) * self.key_span

    @property
    def padded_rows(self) -> int:
        """R, with the rows that fill the last block."""
        return self.row_blocks * self.row_block

    @property
    def padded_keys(self) -> int:
        """S, with the slots that fill the last block."""
        return self.key_blocks * self.key_block

    @property
    def pairs(self) -> int:
        """Number of (query, key) pairs of all heads."""
        return self.batch * self.kv_heads * self.groups * self.queries * self.keys


def call_sizes(inputs: AttentionInputs) -> dict[str, int]:
    """Return the sizes of a call, fields of `TileConfig`."""
    batch, queries, heads, width = inputs.query.shape
    keys, kv_heads, value_width = inputs.value.shape[-3:]
    return {
        "batch": batch,
        "queries": queries,
        "keys": keys,
        "kv_heads": kv_heads,
        "groups": heads // kv_heads,
        "width": width,
        "value_width": value_width,
    }


class BlockedArray(NamedTuple):
    """An input or output of a kernel, and the blocks it is read in."""

    array: Any  # shape and dtype alone for an output
    spec: Any  # pl.BlockSpec


# ------------------------------------------------------------------------------------------ layout of rows


def rows_by_kv_head(x: jax.Array, config: TileConfig) -> jax.Array:
    """Return [B, K, R, ...] from [B, T, N, ...]: the rows of one query after those of another."""
    x = x.reshape(*x.shape[:2], config.kv_heads, config.groups, *x.shape[3:])
    x = jnp.moveaxis(x, 2, 1)
    x = x.reshape(*x.shape[:2], config.queries * config.groups, *x.shape[4:])
    return _padded(x, 2, config.padded_rows)


def rows_by_query(x: jax.Array, config: TileConfig) -> jax.Array:
    """Return [B, T, N, ...] from [B, K, R, ...], the inverse of `rows_by_kv_head`."""
    x = x[:, :, : config.queries * config.groups]
    x = x.reshape(*x.shape[:2], config.queries, config.groups, *x.shape[3:])
    x = jnp.moveaxis(x, 1, 2)
    return x.reshape(*x.shape[:2], config.kv_heads * config.groups, *x.shape[4:])


def query_rows(
    inputs: AttentionInputs, dtype: Any, config: TileConfig, *, zero_padding: bool = False
) -> jax.Array:
    """Return the query as [B, K, R, H]; with `zero_padding`, 0 for queries past their length."""
    query, valid = inputs.query.astype(dtype), inputs.mask.query_valid
    if zero_padding and valid is not None:
        query = jnp.where(valid[..., None, None], query, jnp.zeros((), dtype))
    return rows_by_kv_head(query, config)


def reference_and_d_sum(cotangents: Cotangents, config: TileConfig) -> jax.Array:
    """Return both as f32[B, K, 2, R]."""
    both = jnp.stack([cotangents.reference, cotangents.d_sum], axis=-1)
    return rows_by_kv_head(both, config).swapaxes(2, 3)


def _padded(x: jax.Array, axis: int, size: int, value: int = 0) -> jax.Array:
    widths = [(0, size - x.shape[axis] if a == axis else 0) for a in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=value) if size > x.shape[axis] else x


# -------------------------------------------------------------------------------------------------- masks


class MaskVectors(NamedTuple):
    """The mask of a call; a first dimension of 1 holds for the whole batch."""

    rows: jax.Array  # int32[B|1, 3, R]: lowest position, highest position, segment
    keys: jax.Array  # int32[B|1, 2, padded S]: position, segment


def mask_vectors(mask: Mask, config: TileConfig) -> MaskVectors | None:
    """Return the vectors of a mask without a dense part; None if every row attends to every key."""
    vectors = mask.key_positions, mask.query_valid, mask.key_segment_ids
    if config.keys == config.padded_keys and all(x is None for x in vectors):
        return None
    left, right = mask.reach
    zeros = jnp.zeros((1, config.queries), jnp.int32)
    low, high, segments = zeros, zeros + _MAX_POSITION, zeros
    if left is not None:
        low = jnp.maximum(saturating_add(mask.query_positions, -left), 0)
    if right is not None:
        high = saturating_add(mask.query_positions, right)
    if mask.query_valid is not None:
        high = jnp.where(mask.query_valid, high, -1)
    positions = mask.key_positions
    if positions is None:
        positions = jnp.arange(config.keys, dtype=jnp.int32)[None]
    key_segments = jnp.zeros((1, config.keys), jnp.int32)
    if mask.key_segment_ids is not None:
        segments, key_segments = mask.query_segment_ids, mask.key_segment_ids
    # The rows that fill the last block attend to nothing; the slots that fill it are empty.
    rows = [
        _padded(jnp.repeat(x, config.groups, axis=1), 1, config.padded_rows, fill)
        for x, fill in ((low, 0), (high, -1), (segments, 0))
    ]
    keys = [
        _padded(positions, 1, config.padded_keys, -1),
        _padded(key_segments, 1, config.padded_keys),
    ]
    return MaskVectors(_stacked(rows), _stacked(keys))


def _stacked(vectors: list[jax.Array]) -> jax.Array:
    shape = jnp.broadcast_shapes(*(x.shape for x in vectors))
    return jnp.stack([jnp.broadcast_to(x, shape) for x in vectors], axis=1)


@dataclasses.dataclass(frozen=True)
class MaskComparison:
    """The `MaskVectors` that a kernel compares."""

    masked: bool  # whether there are any
    segments: bool

    @classmethod
    def of(cls, mask: Mask, vectors: MaskVectors | None) -> "MaskComparison":
        """Return the comparison of a call."""
        return cls(vectors is not None, mask.key_segment_ids is not None)

    def take(self, refs: Iterator[Any]) -> list[Any]:
        """Take the vectors of rows and of keys from the refs of a kernel; [] if it is not masked."""
        return [next(refs), next(refs)] if self.masked else []

    def allowed(
        self, row: Callable[[int], jax.Array], key: Callable[[int], jax.Array]
    ) -> jax.Array | None:
        """Return which row attends to which key, bool; None if all do.

        `row(n)` and `key(n)` are the n-th vectors of rows and of keys, which broadcast against each other.
        """
        if not self.masked:
            return None
        position = key(0)
        allowed = (position >= row(0)) & (position <= row(1))
        return allowed & (key(1) == row(2)) if self.segments else allowed


def attended_keys(allowed: jax.Array) -> jax.Array:
    """Return which keys of a block some row attends to, bool[1, keys] from bool[rows, keys].

    A slot that no query may attend to can hold anything: its weight is 0, but 0 * NaN is NaN. So each block
    of rows reads 0 for keys and values that none of its rows attends to.
    """
    return jnp.where(allowed, 1.0, 0.0).max(axis=0, keepdims=True) > 0


class BlockTable(NamedTuple):
    """The blocks that each block visits, in order; flat, as scalar memory needs it."""

    counts: jax.Array  # int32[B|1 * own]
    order: jax.Array  # int32[B|1 * own * others], visited blocks first
    own: int
    others: int
    batch: int  # 1 or B

    def row(self, batch: jax.Array, block: jax.Array) -> jax.Array:
        """Return the index of a block's count."""
        return (batch if self.batch > 1 else 0) * self.own + block


def block_tables(mask: Mask, config: TileConfig) -> tuple[BlockTable, BlockTable]:
    """Return the key blocks that each row block visits, and the row blocks that each key block visits."""
    counts = config.row_blocks, config.key_blocks
    row_block = min(config.row_block, config.queries * config.groups)
    # A row block may end within the groups of a query.
    names = "query_positions", "query_valid", "query_segment_ids"
    vectors = {name: getattr(mask, name) for name in names}
    repeated = {
        name: None if x is None else jnp.repeat(x, config.groups, axis=1)
        for name, x in vectors.items()
    }
    sparsity = BlockSparsity.of(
        dataclasses.replace(mask, **repeated), row_block, min(config.key_block, config.keys), counts
    )
    needed = jnp.ones((1, *counts), bool)
    if sparsity is not None:
        ranges = jax.tree.leaves((sparsity.queries, sparsity.keys))
        batch = jnp.arange(max(x.shape[0] for x in ranges), dtype=jnp.int32)
        needed = jax.vmap(lambda b: sparsity.table(Span(b, 1)))(batch)
    return _table(needed), _table(needed.swapaxes(1, 2))


def _table(needed: jax.Array) -> BlockTable:
    batch, own, others = needed.shape
    order = jnp.argsort(~needed, axis=2, stable=True).astype(jnp.int32)
    counts = needed.sum(axis=2, dtype=jnp.int32)
    return BlockTable(counts.reshape(-1), order.reshape(-1), own, others, batch)


# ------------------------------------------------------------------------------------ matmuls and logits

# Precisions that all kernels support.
EXACT = ("highest", "float32", lax.Precision.HIGHEST, (lax.Precision.HIGHEST,) * 2)
PLAIN = (None, "default", lax.Precision.DEFAULT, (lax.Precision.DEFAULT,) * 2)


@dataclasses.dataclass(frozen=True)
class MatmulConfig:
    """How matmuls are computed; they accumulate in float32."""

    dtype: jnp.dtype  # dtype of the operands
    precision: lax.Precision

    def dot(self, a: jax.Array, b: jax.Array, over: tuple[int, int]) -> jax.Array:
        """Return a . b in float32, contracted over one dimension of each."""
        return lax.dot_general(
            a.astype(self.dtype),
            b.astype(self.dtype),
            (((over[0],), (over[1],)), ((), ())),
            precision=self.precision,
            preferred_element_type=jnp.float32,
        )


def logits_of(
    scores: jax.Array, allowed: jax.Array | None, logit_config: LogitConfig
) -> tuple[jax.Array, jax.Array | None]:
    """Return the logits of q.k and their slope, see `distattn.local.block.finish_logits`."""
    return finish_logits(scores * logit_config.scale, None, allowed, logit_config)


def gradients_of(
    scores: jax.Array,
    d_weights: jax.Array,
    allowed: jax.Array | None,
    logit_config: LogitConfig,
    *,
    reference: jax.Array,
    d_sum: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """Return the weights, and the gradient of logits before the soft cap.

    `distattn.local.block.block_gradients` has the formula. `scores` are q.k, `d_weights` are
    d_weighted_sum . value; `reference` and `d_sum` of the rows broadcast against them.
    """
    logits, slope = logits_of(scores, allowed, logit_config)
    weights = softmax_weights(logits, reference)
    return weights, gradient_of_logits(weights, d_weights + d_sum, slope, allowed)


# --------------------------------------------------------------------------------- measured block sizes

# Written by scripts/bench/block_sizes.py: a list of rows with the fields chip, kind, width, dtype (of
# keys), row_block, key_block, seconds, jax and date. All chips share it, and all processes of a job need
# the same.
MEASURED = Path(__file__).with_name("block_sizes.json")
# Rows up to which a call counts as decoding: they are one block, whatever the table says.
_DECODE_ROWS = 128


def measured_blocks(
    chip: str, config: TileConfig, dtype: jnp.dtype, *, backward: bool
) -> tuple[int, int] | None:
    """Return the fastest rows and keys of a block for a call with keys of that dtype; None if unknown."""
    kind = call_kind(config.queries * config.groups, backward=backward)
    return _measured().get((chip, kind, config.width, dtype.name))


def call_kind(rows: int, *, backward: bool) -> str:
    """Return 'decode', 'prefill' or 'gradient' for a call of T * G rows."""
    if backward:
        return "gradient"
    return "decode" if rows <= _DECODE_ROWS else "prefill"


def chip_name(device_kind: str) -> str:
    """Return the name in `distattn.planning.chips`; JAX's name for a chip that is not there."""
    chip = chip_of(device_kind)
    return device_kind if chip is None else chip.name


@functools.cache
def _measured() -> dict[tuple[str, str, int, str], tuple[int, int]]:
    rows = json.loads(MEASURED.read_text(encoding="utf-8"))
    return {
        (x["chip"], x["kind"], x["width"], x["dtype"]): (x["row_block"], x["key_block"])
        for x in rows
    }


# --------------------------------------------------------------------------- why a kernel refuses a call


def unsupported_place(machine: Machine, platform: str, *, interpretable: bool = True) -> str | None:
    """Return why a kernel can't run here: another platform, or a compiler that would have to shard it.

    `distattn.testing.interpreted` runs an interpretable kernel on a CPU.
    """
    if machine.platform != platform and not (interpretable and interpreter()):
        remedy = " (for tests, distattn.testing.interpreted() runs it there, slowly)"
        return (
            f"it is a kernel for {platform.upper()}s, and the platform is {machine.platform!r}"
            f"{remedy if interpretable else ''}"
        )
    if machine.compiler_sharded:
        return "the compiler shards batch or heads unseen, and cannot cut a kernel; name their axes"
    return None


def unsupported_arguments(
    inputs: AttentionInputs, dtypes: tuple[Any, ...], *, quantised: tuple[Any, ...] = ()
) -> str | None:
    """Return which argument is a bias, a dense mask, or an array of another dtype than these.

    `quantised` are the dtypes of key and value with scales.
    """
    if inputs.bias is not None:
        return f"bias is given, of shape {inputs.bias.shape}"
    if inputs.mask.dense is not None:
        shape = inputs.mask.dense.shape
        return f"mask is given, of shape {shape}; supported are positions, lengths and segments"
    arrays = {"query": inputs.query, "key": inputs.key, "value": inputs.value}
    for name, x in arrays.items():
        supported = quantised if name != "query" and inputs.key_scale is not None else dtypes
        if x.dtype not in supported:
            names = ", ".join(dtype.__name__ for dtype in supported)
            return f"{name} has dtype {x.dtype}; supported are {names or 'none with a scale'}"
    return None


def missing_package(module: str) -> str | None:
    """Return which package a Pallas module lacks; None if it can be imported."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        return f"{module} needs the package {error.name!r}, which is not installed"
    return None
