"""Attention on one device bitwise reproducible on any number of devices: fixed blocks, sums in fixed point.

Keys are summed in blocks of `BLOCK`, and in the gradients of keys and values query rows are. Inside a
block the compiler's own matmuls run, always on one shape (`ReproducibleBlocks`). Blocks are added as
integers (`fixed_point`). So bits do not depend on which blocks a device has, on their order, or on how
many a step computes. Elementwise functions round identically on every compilation (`deterministic_math`).

A cache has no fixed blocks: there one key is a block, and no sum is floating-point. The term of a key is
exp(logit) times its value: an exponent and a factor for each row, and numbers that all rows share. So no
weights are computed, and values are read once, not once per row.

Logits are [b, s, K, m], where m counts the rows of all query heads of a KV head. Maxima and matmuls over
keys then run along dimensions that XLA:CPU vectorises. With one key per block, limbs are [b, K, m, V],
since rows may be few.
"""

import dataclasses
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from distattn._compat import varying_axes
from distattn.algebra import deterministic_math, fixed_point
from distattn.algebra.fixed_point import (
    FixedPoint,
    FixedPointState,
    LimbFormat,
    accumulate,
    limb_format,
    map_sums,
    quantise,
    row_scaling,
    scaled_exp,
    shift_limbs,
    to_limbs,
)
from distattn.algebra.mergeable import Sum
from distattn.algebra.softmax_state import state_dtype
from distattn.local.block import (
    Block,
    Cotangents,
    LogitConfig,
    finish_logits,
    gradient_of_logits,
)
from distattn.local.inputs import KERNEL_NAMES, AttentionInputs, Sizes
from distattn.local.tiling import (
    Machine,
    Place,
    Tiles,
    Tiling,
    add_at,
    put_at,
)

BLOCK = 64  # keys, or rows of a head, whose sums are floating-point: part of the contract
# Largest step: keys, rows of all heads of a KV head, and terms if one key is a block.
STEP_KEYS, STEP_COLUMNS, STEP_TERMS = 512, 256, 16
# Up to this many columns XLA:CPU is twice as fast with the wide operand on the right.
FEW_COLUMNS = 32
# Least number of keys in a matmul: for one key XLA:CPU emits another kind of loop.
LEAST_KEYS = 16


@dataclasses.dataclass(frozen=True)
class Columns:
    """Rows of all query heads of a KV head, side by side in m columns; the last columns are padding."""

    groups: int
    queries: int
    unit: int

    @property
    def count(self) -> int:
        """Number of columns m, a multiple of the unit."""
        return -(-self.groups * self.queries // self.unit) * self.unit

    def join(self, x: jax.Array, axis: int) -> jax.Array:
        """Return [.., m, ..] from [.., G|1, q|1, ..], starting at the axis; size 1 if both are 1."""
        before, sizes, after = x.shape[:axis], x.shape[axis : axis + 2], x.shape[axis + 2 :]
        if sizes == (1, 1) != (self.groups, self.queries):
            return x.reshape(*before, 1, *after)
        x = jnp.broadcast_to(x, (*before, self.groups, self.queries, *after))
        return _zero_padded(x.reshape(*before, -1, *after), axis, self.count)

    def split(self, x: jax.Array, axis: int) -> jax.Array:
        """Return [.., G, q, ..] from [.., m, ..], without the padding."""
        x = lax.slice_in_dim(x, 0, self.groups * self.queries, axis=axis)
        return x.reshape(*x.shape[:axis], self.groups, self.queries, *x.shape[axis + 1 :])


@dataclasses.dataclass(frozen=True)
class Step:
    """Inputs of one step of a loop. It has one sequence (b = 1) and one matmul per KV head."""

    place: Place
    logit_config: LogitConfig
    # query [b, K, m, H], key [b, s, K, H], value [b, s, K, V], bias and allowed [b|1, s|1, K|1, m|1]
    block: Block

    def logits(self) -> tuple[jax.Array, jax.Array | None]:
        """Return logits [b, s, K, m] and their slope, as `finish_logits`."""
        block = self.block
        scores = self.with_keys(block.query, block.key)
        tanh = deterministic_math.tanh
        return finish_logits(scores, block.bias, block.allowed, self.logit_config, tanh)

    def with_keys(self, x: jax.Array, keys: jax.Array) -> jax.Array:
        """Return [b, s, K, m] from x [b, K, m, H] and keys [b, s, K, H]: matmuls over H."""
        count, keys = keys.shape[1], _zero_padded(keys, 1)
        parts = [
            self._dot(keys[0, :, k], x[0, k], (((1,), (1,)), ((), ()))) for k in range(x.shape[1])
        ]
        return jnp.stack(parts, axis=1)[None, :count]

    def over_keys(self, weights: jax.Array, x: jax.Array, keys: int) -> jax.Array:
        """Return [c, V, b, K, m] from weights [b, s, K, m] and x [b, s, K, V]: sums over blocks of keys."""
        if keys == 1:
            return jnp.moveaxis(x, (1, 3), (0, 1))[..., None] * jnp.moveaxis(weights, 1, 0)[:, None]
        weights, x = (y.reshape(y.shape[0], -1, keys, *y.shape[2:]) for y in (weights, x))
        over = ((1,), (1,)), ((0,), (0,))
        pairs = [(weights[0, :, :, k], x[0, :, :, k]) for k in range(x.shape[3])]
        if weights.shape[-1] <= FEW_COLUMNS:
            parts = jnp.stack([self._dot(w, x, over) for w, x in pairs])
            return parts.transpose(1, 3, 0, 2)[:, :, None]
        return jnp.stack([self._dot(x, w, over) for w, x in pairs], axis=2)[:, :, None]

    def over_rows(self, weights: jax.Array, x: jax.Array, rows: int) -> jax.Array:
        """Return [r, V, b, K, s] from weights [b, s, K, m] and x [b, K, m, V]: sums over blocks of rows."""
        count, weights = weights.shape[1], _zero_padded(weights, 1)
        weights = weights.reshape(*weights.shape[:3], -1, rows)
        x = x.reshape(*x.shape[:2], -1, rows, x.shape[-1])
        over = ((1,), (2,)), ((0,), (1,))
        parts = [self._dot(x[0, k], weights[0, :, k], over) for k in range(x.shape[1])]
        return jnp.stack(parts, axis=2)[:, :, None, :, :count]

    def _dot(self, a: jax.Array, b: jax.Array, dimensions: Any) -> jax.Array:
        return lax.dot_general(a, b, dimensions, precision=self.logit_config.precision)


def load_step(
    tiles: Tiles,
    columns: Columns,
    logit_config: LogitConfig,
    place: Place,
    query: jax.Array,
    *,
    sums_queries: bool,
) -> Step:
    """Return the step at a place, for query [b, K, G, q, H]; see `Tiles.block`.

    The last block may overlap the block before, in whole units.
    """
    block = tiles.block(place, query, sums_queries=sums_queries)
    bias, allowed = (None if x is None else columns.join(x, 3) for x in (block.bias, block.allowed))
    query = columns.join(query, 2)
    return Step(place, logit_config, Block(query, block.key, block.value, bias, allowed))


def _zero_padded(x: jax.Array, axis: int, least: int = LEAST_KEYS) -> jax.Array:
    """Return x with zeros at the end of an axis that is shorter than `least`."""
    missing = max(least - x.shape[axis], 0)
    return jnp.pad(x, [(0, missing if a == axis else 0) for a in range(x.ndim)])


@dataclasses.dataclass(frozen=True)
class ReproducibleBlocks:
    """Blocks that are summed in floating point, and the formats of all other sums."""

    keys: int  # keys of one block
    rows: int  # rows of one head in one block
    columns: int  # unit of a matmul's width: XLA chooses loops by the shape
    by_keys: LimbFormat  # sums over blocks of keys
    by_rows: LimbFormat  # sums over blocks of rows, and over the heads of a group
    by_bias: LimbFormat  # sums over everything that shares a bias


def reproducible_blocks_of(
    inputs: AttentionInputs, implementation: str, keys: int = BLOCK
) -> ReproducibleBlocks:
    """Return the blocks of a call from its global shapes; they must not depend on the devices.

    Args:
      inputs: the inputs of the whole call, not of one device.
      implementation: as in `dot_product_attention`.
      keys: keys of one block; 1 if blocks have no fixed content, as in a cache.

    Raises:
      ValueError: implementation='dense'.
      NotImplementedError: float64; the name of a kernel as implementation.
    """
    if implementation == "dense":
        raise ValueError(
            "implementation='dense' sums keys in the compiler's order, so it can't be reproducible; pass "
            "implementation=None, or reproducible=False"
        )
    if implementation in KERNEL_NAMES:
        raise NotImplementedError(
            f"implementation={implementation!r} with reproducible=True is not built: a kernel does not "
            "sum integers; pass implementation=None, or reproducible=False"
        )
    arrays = inputs.query, inputs.key, inputs.value
    if state_dtype(*arrays) != jnp.float32:
        raise NotImplementedError(
            "reproducible=True is not built for float64, and query, key and value are "
            f"{', '.join(str(x.dtype) for x in arrays)}; cast them to float32, or pass reproducible=False"
        )
    sizes, rows = Sizes.of(inputs), _row_block(inputs.query.shape[1])
    blocks, row_blocks = max(-(-sizes.keys // keys), 1), max(-(-sizes.queries // rows), 1)
    shared = 1
    if inputs.bias is not None:
        counts = (sizes.batch, sizes.heads, row_blocks, blocks)
        for size, count in zip(inputs.bias.shape, counts, strict=True):
            shared *= count if size == 1 else 1
    return ReproducibleBlocks(
        keys=keys,
        rows=rows,
        columns=max(min(sizes.groups * _power_of_two(sizes.queries), BLOCK), 2),
        by_keys=limb_format(blocks),
        by_rows=limb_format(sizes.groups * row_blocks),
        by_bias=limb_format(max(shared, 1)),
    )


def _row_block(queries: int) -> int:
    """Return BLOCK, or less if eight devices would have fewer rows each; at least 8, or all rows."""
    return min(BLOCK, max(_power_of_two(queries // 8 + 1) // 2, 8), _power_of_two(queries))


def _power_of_two(x: int) -> int:
    """Return the least power of two that is not below x."""
    return 1 << max(x - 1, 0).bit_length()


def _with_width(state: FixedPointState, source: int, to: int) -> FixedPointState:
    """Return the state with the value width of its limbs moved to another dimension."""
    x = state.weighted_sum
    limbs = tuple(jnp.moveaxis(limb, source, to) for limb in x.limbs)
    return FixedPointState(state.sum, FixedPoint(x.exponent, limbs, x.limb_format))


def _add_keys(state: FixedPointState, step: Step) -> FixedPointState:
    """Add the keys of one step to a state with limbs [b, K, m, V], each key a block of its own."""
    form = state.sum.limb_format
    logits, _ = step.logits()  # [b, s, K, m]

    def split(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        return scaled_exp(jnp.moveaxis(logits, 1, 0), form.bits)

    exponent, factor = deterministic_math.fusion_barrier(split, logits)  # [s, b, K, m]
    value = jnp.moveaxis(step.block.value, 1, 0)  # [s, b, K, V]
    ones = jnp.ones_like(factor)[:, None]
    return FixedPointState(
        sum=accumulate(state.sum, ones, exponent, factor),
        weighted_sum=_accumulate_values(state.weighted_sum, value, exponent, factor),
    )


def _accumulate_values(
    onto: FixedPoint, value: jax.Array, exponent: jax.Array, factor: jax.Array
) -> FixedPoint:
    """Add terms whose numbers are equal in all rows of a head, as `fixed_point.accumulate`.

    Args:
      onto: limbs [b, K, m, V].
      value: f32[C, b, K, V]; anything if the exponent is EMPTY.
      exponent: int32[C, b, K, m], as for `quantise`.
      factor: f32[C, b, K, m].
    """
    form = onto.limb_format

    def scale_rows(
        value: jax.Array, exponent: jax.Array, factor: jax.Array, least: jax.Array
    ) -> tuple[jax.Array, ...]:
        largest = jnp.abs(value).max(axis=-1, initial=0.0, keepdims=True)
        largest = jnp.where(exponent == fixed_point.EMPTY, 0.0, largest)
        high, first, second = row_scaling(largest, exponent, factor, least, form)
        return high, first, second, jnp.where(jnp.isfinite(value), value, 0.0)

    high, first, second, value = deterministic_math.fusion_barrier(
        scale_rows, value, exponent, factor, onto.exponent
    )
    limbs = shift_limbs(onto.limbs, (high - onto.exponent)[..., None])
    for i in range(value.shape[0]):
        rows = first[i][..., None], second[i][..., None]
        limbs = tuple(map(operator.add, limbs, to_limbs(value[i][:, :, None], *rows, form)))
    return FixedPoint(high, limbs, form)


def fold(
    inputs: AttentionInputs,
    logit_config: LogitConfig,
    machine: Machine,
    reproducible_blocks: ReproducibleBlocks,
) -> FixedPointState:
    """Return the state over all keys: FixedPoint [1, B, N, T] and [V, B, N, T].

    T and S must be multiples of the blocks.
    """
    tiles = Tiles(inputs, _tiling(inputs, machine, reproducible_blocks, backward=False))
    tiling, sizes = tiles.tiling, tiles.sizes
    by_key = reproducible_blocks.keys == 1

    def empty_state(*rows: int) -> FixedPointState:
        form, widths = reproducible_blocks.by_keys, (1, sizes.value_width)
        return FixedPointState(*(fixed_point.zero((x, *rows), form, tiles.axes) for x in widths))

    columns = Columns(sizes.groups, tiling.query, reproducible_blocks.columns)

    def step(state: FixedPointState, place: Place, query: jax.Array) -> FixedPointState:
        inputs = load_step(tiles, columns, logit_config, place, query, sums_queries=False)
        if by_key:
            return _add_keys(state, inputs)
        return _add_blocks(state, inputs, reproducible_blocks)

    def write(whole: FixedPointState, place: Place, state: FixedPointState) -> FixedPointState:
        state = _with_width(state, -1, 0) if by_key else state
        spans = (place.batch, place.query_heads, place.query)
        return map_sums(lambda x, part: put_at(x, _by_heads(part, columns), *spans), whole, state)

    empty = empty_state(tiling.batch, tiling.heads, columns.count)
    empty = _with_width(empty, 0, -1) if by_key else empty
    whole = empty_state(sizes.batch, sizes.heads, sizes.queries)
    return tiles.fold(logit_config.scale, empty, step, write, whole)


def fold_gradients(
    inputs: AttentionInputs,
    logit_config: LogitConfig,
    machine: Machine,
    reproducible_blocks: ReproducibleBlocks,
    cotangents: Cotangents,
) -> tuple[FixedPoint, FixedPoint, FixedPoint, FixedPoint | None]:
    """Return the gradients of inputs in fixed point, as `blockwise.fold_gradients`.

    Args:
      inputs: as in `fold`.
      logit_config: as in `fold`.
      machine: as in `fold`.
      reproducible_blocks: as in `fold`.
      cotangents: f32[B, T, N], the log-sum-exp, f32[B, T, N], f32[B, T, N, V].

    Returns:
      FixedPoint: d_query [H, B, N, T], d_key [H, B, K, S], d_value [V, B, K, S], and d_bias [1, ...] with
      the rows of bias, or None.
    """
    tiles = Tiles(inputs, _tiling(inputs, machine, reproducible_blocks, backward=True))
    tiling, sizes, bias = tiles.tiling, tiles.sizes, inputs.bias
    columns = Columns(sizes.groups, tiling.query, reproducible_blocks.columns)

    def zero(form: LimbFormat, *shape: int) -> FixedPoint:
        return fixed_point.zero(shape, form, tiles.axes)

    def zero_keys(*rows: int) -> list[FixedPoint]:
        widths = sizes.width, sizes.value_width
        return [zero(reproducible_blocks.by_rows, width, *rows) for width in widths]

    def step(carry: tuple[Any, Any], place: Place, query: jax.Array) -> tuple[Any, Any]:
        (d_query, d_bias), d_keys = carry
        inputs = load_step(tiles, columns, logit_config, place, query, sums_queries=True)
        rows = Cotangents(*(columns.join(tiles.rows(x, place), 2) for x in cotangents))
        dq, d_keys, d_logits = _step_gradients(inputs, reproducible_blocks, d_keys, rows)
        dq = _by_heads(dq, columns)
        d_query = add_at(d_query, dq, place.batch, place.query_heads, place.query)
        if d_bias is not None:
            more = _bias_gradient(columns.split(d_logits, 3), bias.shape, reproducible_blocks)
            spans = (place.batch, place.query_heads, place.query, place.key)
            d_bias = add_at(d_bias, more, *spans)
        return (d_query, d_bias), d_keys

    def write(d_keys: list[Sum], place: Place, block: list[Sum]) -> list[Sum]:
        spans = (place.batch, place.heads, place.key)
        return [add_at(x, y, *spans) for x, y in zip(d_keys, block, strict=True)]

    query_shape = sizes.width, sizes.batch, sizes.heads, sizes.queries
    by_query = (
        zero(reproducible_blocks.by_keys, *query_shape),
        None if bias is None else zero(reproducible_blocks.by_bias, 1, *bias.shape),
    )
    (d_query, d_bias), (d_key, d_value) = tiles.fold_gradients(
        logit_config.scale,
        zero_keys(tiling.batch, tiling.heads, tiling.key),
        step,
        write,
        (by_query, zero_keys(sizes.batch, sizes.kv_heads, sizes.keys)),
    )
    return d_query, d_key, d_value, d_bias


def _add_blocks(
    state: FixedPointState, step: Step, reproducible_blocks: ReproducibleBlocks
) -> FixedPointState:
    """Add the blocks of keys of one step to a state with rows [b, K, m]."""
    logits, _ = step.logits()
    logits = logits.reshape(logits.shape[0], -1, reproducible_blocks.keys, *logits.shape[2:])
    high = logits.max(axis=2)  # [b, c, K, m]
    weights = deterministic_math.fusion_barrier(softmax_weights, logits, high[:, :, None])
    total = deterministic_math.ordered_sum(weights, 2)
    weights = weights.reshape(weights.shape[0], -1, *weights.shape[3:])
    weighted = step.over_keys(weights, step.block.value, reproducible_blocks.keys)
    total, high = (jnp.moveaxis(x, 1, 0) for x in (total, high))
    scale = deterministic_math.fusion_barrier(
        lambda x: scaled_exp(x, reproducible_blocks.by_keys.bits), high
    )
    return FixedPointState(
        sum=accumulate(state.sum, total[:, None], *scale),
        weighted_sum=accumulate(state.weighted_sum, weighted, *scale),
    )


def softmax_weights(logits: jax.Array, reference: jax.Array) -> jax.Array:
    """Return `softmax_state.softmax_weights`, rounded identically on every compilation."""
    return deterministic_math.exp(logits - jnp.where(reference == -jnp.inf, 0.0, reference))


def _step_gradients(
    step: Step,
    reproducible_blocks: ReproducibleBlocks,
    d_keys: list[FixedPoint],
    cotangents: Cotangents,
) -> tuple[FixedPoint, list[FixedPoint], jax.Array]:
    """Return the gradients of one step; see `block_gradients`.

    Args:
      step: the step.
      reproducible_blocks: as in `fold`.
      d_keys: gradients of key and value [H, b, K, s], [V, b, K, s], from the rows before.
      cotangents: f32[b, K, m], f32[b, K, m], f32[b, K, m, V].

    Returns:
      d_query [H, b, K, m], d_keys with this step added, and d_logits f32[b, s, K, m].
    """
    reference, d_sum, d_weighted_sum = cotangents
    logits, slope = step.logits()
    weights = deterministic_math.fusion_barrier(softmax_weights, logits, reference[:, None])
    d_weights = step.with_keys(d_weighted_sum, step.block.value)

    def chained(weights: jax.Array, d_weights: jax.Array, d_sum: jax.Array) -> jax.Array:
        return gradient_of_logits(weights, d_weights + d_sum[:, None], slope, step.block.allowed)

    d_logits = deterministic_math.fusion_barrier(chained, weights, d_weights, d_sum)

    rows = reproducible_blocks.rows
    d_query = step.over_keys(d_logits, step.block.key, reproducible_blocks.keys)
    terms = (
        step.over_rows(d_logits, step.block.query, rows),
        step.over_rows(weights, d_weighted_sum, rows),
    )
    d_keys = [accumulate(x, y) for x, y in zip(d_keys, terms, strict=True)]
    nothing = fixed_point.zero(
        d_query.shape[1:], reproducible_blocks.by_keys, varying_axes(d_query)
    )
    d_query = accumulate(nothing, d_query * step.logit_config.scale)
    return d_query, d_keys, d_logits


def _bias_gradient(
    d_logits: jax.Array, shape: tuple[int, ...], reproducible_blocks: ReproducibleBlocks
) -> FixedPoint:
    """Return [1, b|1, N|1, q|1, s|1] from d_logits [b, s, K, G, q], summed where the bias has size 1."""
    b, keys, kv_heads, groups, rows = d_logits.shape
    x = jnp.moveaxis(d_logits, 1, -1).reshape(b, kv_heads * groups, rows, keys)
    # The compiler might fuse the product with one of several sums.
    x = deterministic_math.prevent_fma(x)
    for axis, unit in ((2, reproducible_blocks.rows), (3, reproducible_blocks.keys)):
        if shape[axis] == 1:
            x = x.reshape(*x.shape[:axis], -1, unit, *x.shape[axis + 1 :])
            x = deterministic_math.ordered_sum(x, axis + 1)
    terms = quantise(x[None], reproducible_blocks.by_bias)
    summed = [axis for axis, size in enumerate(shape) if size == 1]
    return fixed_point.merge_axes(terms, summed, keepdims=True) if summed else terms


def _by_heads(x: FixedPoint, columns: Columns) -> FixedPoint:
    """Return rows [b, K * G, q] from [b, K, m]."""

    def split(x: jax.Array, axis: int) -> jax.Array:
        x = columns.split(x, axis)
        return x.reshape(*x.shape[: axis - 1], -1, x.shape[-1])

    limbs = tuple(split(limb, 3) for limb in x.limbs)
    return FixedPoint(split(x.exponent, 2), limbs, x.limb_format)


def _tiling(
    inputs: AttentionInputs,
    machine: Machine,
    reproducible_blocks: ReproducibleBlocks,
    *,
    backward: bool,
) -> Tiling:
    sizes, blocks = Sizes.of(inputs), reproducible_blocks
    few = sizes.groups * sizes.queries <= FEW_COLUMNS
    # Either all matmuls are narrow, or none is.
    columns = STEP_COLUMNS if blocks.columns == BLOCK else blocks.columns
    return Tiling(
        batch=1,
        heads=sizes.kv_heads if few and not backward else 1,
        query=_evenly(sizes.queries, blocks.rows, max(columns // sizes.groups, blocks.rows)),
        key=_evenly(sizes.keys, blocks.keys, STEP_KEYS if blocks.keys > 1 else STEP_TERMS),
        flat=True,
        as_bits=machine.platform == "cpu",
    )


def _evenly(length: int, unit: int, most: int) -> int:
    """Return the multiple of the unit, up to `most`, that cuts the length with the least overlap."""
    blocks = length // unit
    count = max(-(-blocks // max(most // unit, 1)), 1)
    return -(-blocks // count) * unit
