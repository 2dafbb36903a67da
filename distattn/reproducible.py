"""One device's part with the same bits on any number of devices: fixed blocks, sums in fixed point.

The unit of the keys is a block of `units.BLOCK`, and in the gradients of keys and values a block of rows.
Within a block the compiler's own products are used, always of one shape (`Units`); blocks, and whatever
lies beyond them, are added as integers (`fixed_point`), so that nothing depends on which blocks are here,
in which order, or how many are computed at a time. What stands between the products rounds the same
wherever it is compiled (`elementary`).
"""

from typing import Any

import jax
import jax.numpy as jnp

from distattn import by_key, elementary, fixed_point, gauge
from distattn._compat import varying_axes
from distattn.block import Cotangents, Scoring, attended_sum
from distattn.fixed_point import (
    FixedPoint,
    FixedPointState,
    accumulate,
    map_sums,
    quantise,
)
from distattn.operands import Operands
from distattn.step import FEW_COLUMNS, Columns, Step, load
from distattn.sums import add_at, put_at
from distattn.tiles import Machine, Tiles, Tiling, loop, unravel, visit
from distattn.units import BLOCK, Units
from distattn.words import Lattice

# Of one step: keys, rows of all heads, and terms.
STEP_KEYS, STEP_COLUMNS, STEP_TERMS = 512, 256, 16


def fold(operands: Operands, scoring: Scoring, machine: Machine, units: Units) -> FixedPointState:
    """The state over all keys: FixedPoint [1, B, N, T] and [V, B, N, T].

    T and S must be multiples of the units.
    """
    tiles = Tiles(operands, _tiling(operands, machine, units, backward=False))
    tiling, scale = tiles.tiling, units.by_keys

    def empty(*rows: int) -> FixedPointState:
        widths = 1, tiles.value_width
        return FixedPointState(*(fixed_point.zero((x, *rows), scale, tiles.axes) for x in widths))

    whole = empty(tiles.batch, tiles.kv_heads * tiles.groups, tiles.queries)
    if tiles.is_empty:
        return whole
    columns = _columns(tiles, units)

    def query_block(index: jax.Array, whole: FixedPointState) -> FixedPointState:
        batch, heads, row = unravel(index, tiles.batches, tiles.head_blocks, tiles.query_blocks)
        place = tiles.place(batch, heads, row, 0)
        query = tiles.query(place, scoring.scale)

        def key_block(column: jax.Array, state: FixedPointState) -> FixedPointState:
            step = load(
                tiles, columns, scoring, (batch, heads, row, column), query, sums_rows=False
            )
            if units.keys == 1:
                return by_key.add_step(state, step)
            return _add_step(state, step, units)

        rows = tiling.batch, tiling.heads, columns.count
        first = empty(*rows)
        if units.keys == 1:
            first = by_key.empty(rows, tiles.value_width, scale, tiles.axes)
        state = visit(tiles.keys_for(place, row), tiles.key_blocks, key_block, first)
        state = by_key.finished(state) if units.keys == 1 else state
        spans = (place.batch, place.query_heads, place.query)
        return map_sums(lambda x, part: put_at(x, _by_heads(part, columns), *spans), whole, state)

    return loop(tiles.batches * tiles.head_blocks * tiles.query_blocks, query_block, whole)


def fold_gradients(
    operands: Operands,
    scoring: Scoring,
    machine: Machine,
    units: Units,
    cotangents: Cotangents,
) -> tuple[FixedPoint, FixedPoint, FixedPoint, FixedPoint | None]:
    """`local.fold_gradients` in fixed point.

    Args:
      operands: as in `fold`.
      scoring: as in `fold`.
      machine: as in `fold`.
      units: as in `fold`.
      cotangents: f32[B, T, N], the log-sum-exp, f32[B, T, N], f32[B, T, N, V].

    Returns:
      FixedPoint: d_query [H, B, N, T], d_key [H, B, K, S], d_value [V, B, K, S], and d_bias [1, ...] with
      the rows of bias, or None.
    """
    tiles = Tiles(operands, _tiling(operands, machine, units, backward=True))
    tiling, columns = tiles.tiling, _columns(tiles, units)
    key, value, bias = operands.key, operands.value, operands.bias

    def zero(x: jax.Array, scale: Lattice, rows: tuple[int, ...] | None = None) -> FixedPoint:
        """For the gradient of x [B, T|S, N|K, .], or of so many rows of it."""
        batch, length, heads, width = x.shape
        return fixed_point.zero((width, *(rows or (batch, heads, length))), scale, tiles.axes)

    grads = (
        zero(operands.query, units.by_keys),
        None if bias is None else fixed_point.zero((1, *bias.shape), units.by_bias, tiles.axes),
        *(zero(x, units.by_rows) for x in (key, value)),
    )

    def key_block(index: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        batch, heads, column = unravel(index, tiles.batches, tiles.head_blocks, tiles.key_blocks)
        place = tiles.place(batch, heads, 0, column)

        def query_block(row: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            d_query, d_bias, *d_keys = carry
            query = tiles.query(tiles.place(batch, heads, row, column), scoring.scale)
            step = load(tiles, columns, scoring, (batch, heads, row, column), query, sums_rows=True)
            place = step.place
            rows = Cotangents(*(columns.join(tiles.rows(x, place), 2) for x in cotangents))
            dq, d_keys, d_logits = _step_gradients(step, units, d_keys, rows)
            dq = _by_heads(dq, columns)
            d_query = add_at(d_query, dq, place.batch, place.query_heads, place.query)
            if d_bias is not None:
                more = _bias_gradient(columns.part(d_logits, 3), bias.shape, units)
                spans = (place.batch, place.query_heads, place.query, place.key)
                d_bias = add_at(d_bias, more, *spans)
            return d_query, d_bias, *d_keys

        d_query, d_bias, *d_keys = carry
        here = (tiling.batch, tiling.heads, tiling.key)
        zeros = [zero(x, units.by_rows, here) for x in (key, value)]
        d_query, d_bias, *blocks = visit(
            tiles.queries_for(place, column),
            tiles.query_blocks,
            query_block,
            (d_query, d_bias, *zeros),
        )
        spans = (place.batch, place.heads, place.key)
        d_keys = (add_at(x, block, *spans) for x, block in zip(d_keys, blocks, strict=True))
        return d_query, d_bias, *d_keys

    if not tiles.is_empty:
        grads = loop(tiles.batches * tiles.head_blocks * tiles.key_blocks, key_block, grads)
    d_query, d_bias, d_key, d_value = grads
    return d_query, d_key, d_value, d_bias


def _add_step(state: FixedPointState, step: Step, units: Units) -> FixedPointState:
    """The state, rows [b, K, m], and the keys of one step."""
    logits, _ = step.scores()
    logits = logits.reshape(logits.shape[0], -1, units.keys, *logits.shape[2:])
    high = logits.max(axis=2)  # [b, c, K, m]
    weights = elementary.apart(softmax_weights, logits, high[:, :, None])
    total = elementary.ordered_sum(weights, 2)
    weights = weights.reshape(weights.shape[0], -1, *weights.shape[3:])

    def product(weights: jax.Array, x: jax.Array) -> jax.Array:
        return step.over_keys(weights, x, units.keys)

    weighted = attended_sum(product, weights, step.value, step.block)
    total, high = (jnp.moveaxis(x, 1, 0) for x in (total, high))
    scaling = elementary.apart(lambda x: gauge.split(x, units.by_keys.bits), high)
    return FixedPointState(
        sum=accumulate(state.sum, total[:, None], *scaling),
        weighted_sum=accumulate(state.weighted_sum, weighted, *scaling),
    )


def softmax_weights(logits: jax.Array, reference: jax.Array) -> jax.Array:
    """`state.softmax_weights`, the same bits wherever it is compiled."""
    return elementary.exp(logits - jnp.where(reference == -jnp.inf, 0.0, reference))


def _step_gradients(
    step: Step, units: Units, d_keys: list[FixedPoint], cotangents: Cotangents
) -> tuple[FixedPoint, list[FixedPoint], jax.Array]:
    """Those of one step (see `block_gradients`).

    Args:
      step: the step.
      units: as in `fold`.
      d_keys: of key and value [H, b, K, s], [V, b, K, s], from the rows before.
      cotangents: f32[b, K, m], f32[b, K, m], f32[b, K, m, V].

    Returns:
      d_query [H, b, K, m], d_keys with this step, and d_logits f32[b, s, K, m].
    """
    reference, d_sum, d_weighted_sum = cotangents
    logits, slope = step.scores()
    weights = elementary.apart(softmax_weights, logits, reference[:, None])
    d_weights = step.with_keys(d_weighted_sum, step.value)

    def chained(weights: jax.Array, d_weights: jax.Array, d_sum: jax.Array) -> jax.Array:
        d_logits = weights * (d_weights + d_sum[:, None])
        if slope is not None:
            d_logits = d_logits * slope
        if step.block.allowed is None:
            return d_logits
        # The weights are 0 there, but values may be anything: 0 * nan.
        return jnp.where(step.block.allowed, d_logits, 0.0)

    d_logits = elementary.apart(chained, weights, d_weights, d_sum)

    def to_query(weights: jax.Array, x: jax.Array) -> jax.Array:
        return step.over_keys(weights, x, units.keys)

    def to_key(weights: jax.Array, x: jax.Array) -> jax.Array:
        return step.over_rows(weights, x, units.rows)

    d_query = attended_sum(to_query, d_logits, step.key, step.block)
    terms = attended_sum(to_key, d_logits, step.query, step.block), to_key(weights, d_weighted_sum)
    d_keys = [accumulate(x, y) for x, y in zip(d_keys, terms, strict=True)]
    nothing = fixed_point.zero(d_query.shape[1:], units.by_keys, varying_axes(d_query))
    d_query = accumulate(nothing, d_query * step.scoring.scale)
    return d_query, d_keys, d_logits


def _bias_gradient(d_logits: jax.Array, shape: tuple[int, ...], units: Units) -> FixedPoint:
    """[1, b|1, N|1, q|1, s|1] from d_logits [b, s, K, G, q]: summed where the bias has size 1."""
    b, keys, kv_heads, groups, rows = d_logits.shape
    x = jnp.moveaxis(d_logits, 1, -1).reshape(b, kv_heads * groups, rows, keys)
    # Rounded before it is added to others: a compiler may fuse the product with one of several sums.
    x = elementary.rounded(x)
    for axis, unit in ((2, units.rows), (3, units.keys)):
        if shape[axis] == 1:
            x = x.reshape(*x.shape[:axis], -1, unit, *x.shape[axis + 1 :])
            x = elementary.ordered_sum(x, axis + 1)
    terms = quantise(x[None], units.by_bias)
    summed = [axis for axis, size in enumerate(shape) if size == 1]
    return fixed_point.merge_axes(terms, summed, keepdims=True) if summed else terms


def _by_heads(x: FixedPoint, columns: Columns) -> FixedPoint:
    """Rows [b, K, m] to [b, K * G, q]."""

    def split(x: jax.Array, axis: int) -> jax.Array:
        x = columns.part(x, axis)
        return x.reshape(*x.shape[: axis - 1], -1, x.shape[-1])

    return FixedPoint(split(x.top, 2), tuple(split(word, 3) for word in x.words), x.lattice)


def _columns(tiles: Tiles, units: Units) -> Columns:
    return Columns(tiles.groups, tiles.tiling.query, units.columns)


def _tiling(operands: Operands, machine: Machine, units: Units, *, backward: bool) -> Tiling:
    queries, heads = operands.query.shape[1:3]
    keys, kv_heads = operands.key.shape[-3:-1]
    groups = heads // kv_heads
    few = groups * queries <= FEW_COLUMNS
    # Either all products are so narrow, or none is.
    columns = STEP_COLUMNS if units.columns == BLOCK else units.columns
    return Tiling(
        batch=1,
        heads=kv_heads if few and not backward else 1,
        query=_evenly(queries, units.rows, max(columns // groups, units.rows)),
        key=_evenly(keys, units.keys, STEP_KEYS if units.keys > 1 else STEP_TERMS),
        flat=True,
        as_bits=machine.platform == "cpu",
    )


def _evenly(length: int, unit: int, most: int) -> int:
    """The multiple of the unit, up to `most`, by which the length is cut with the least overlap."""
    blocks = length // unit
    count = max(-(-blocks // max(most // unit, 1)), 1)
    return -(-blocks // count) * unit
