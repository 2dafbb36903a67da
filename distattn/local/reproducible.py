"""One step of a reproducible fold: what it loads, and products whose bits depend on their blocks alone.

Logits lie as [b, s, K, m], m being the rows of all query heads of a key/value head: maxima and products
over keys then go along dimensions that XLA:CPU vectorises.

What a reproducible call sums as floating-point numbers, and on which lattices it sums the rest.

All from the global shapes of the call, so that it does not depend on the devices.

The step of a reproducible fold whose unit is a single key, as in a cache: no sum is floating-point.

The term of a key is exp(logit) times its value: a gauge and a factor for each row, and numbers that all
rows share. So no weights are made, and values are looked at once, not for each row. Words lie as
[b, K, m, V] here, since rows may be few and XLA:CPU vectorises the last dimension.

One device's part with the same bits on any number of devices: fixed blocks, sums in fixed point.

The unit of the keys is a block of `units.BLOCK`, and in the gradients of keys and values a block of rows.
Within a block the compiler's own products are used, always of one shape (`ReproducibleBlocks`); blocks, and whatever
lies beyond them, are added as integers (`fixed_point`), so that nothing depends on which blocks are here,
in which order, or how many are computed at a time. What stands between the products rounds the same
wherever it is compiled (`elementary`).
"""

import dataclasses
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from distattn._compat import varying_axes
from distattn.algebra import deterministic_math, fixed_point
from distattn.algebra import fixed_point as gauge
from distattn.algebra.fixed_point import (
    FixedPoint,
    FixedPointState,
    LimbFormat,
    accumulate,
    digits,
    limb_format,
    map_sums,
    moved_down,
    quantise,
    scaling,
)
from distattn.algebra.softmax_state import state_dtype
from distattn.local.block import (
    Block,
    Cotangents,
    LogitConfig,
    attended_sum,
    finish_logits,
    gradient_of_logits,
)
from distattn.local.inputs import KERNEL_NAMES, AttentionInputs
from distattn.local.tiling import (
    Machine,
    Place,
    Tiles,
    Tiling,
    add_at,
    fresh,
    loop,
    put_at,
    unravel,
    visit,
)

# Up to so many columns XLA:CPU is twice as fast with the wide operand on the right.
FEW_COLUMNS = 32
# Products are of so many keys at least: of one, XLA:CPU makes another kind of loop.
LEAST_KEYS = 16


@dataclasses.dataclass(frozen=True)
class Columns:
    """The rows of all query heads of a key/value head, side by side, in m columns, the last ones empty."""

    groups: int
    queries: int
    unit: int

    @property
    def count(self) -> int:
        """m, a multiple of the unit."""
        return -(-self.groups * self.queries // self.unit) * self.unit

    def join(self, x: jax.Array, axis: int) -> jax.Array:
        """[.., G|1, q|1, ..] from the axis on to [.., m, ..]; 1 where both are."""
        before, sizes, after = x.shape[:axis], x.shape[axis : axis + 2], x.shape[axis + 2 :]
        if sizes == (1, 1) != (self.groups, self.queries):
            return x.reshape(*before, 1, *after)
        x = jnp.broadcast_to(x, (*before, self.groups, self.queries, *after))
        return _filled(x.reshape(*before, -1, *after), axis, self.count)

    def part(self, x: jax.Array, axis: int) -> jax.Array:
        """The inverse."""
        x = lax.slice_in_dim(x, 0, self.groups * self.queries, axis=axis)
        return x.reshape(*x.shape[:axis], self.groups, self.queries, *x.shape[axis + 1 :])


@dataclasses.dataclass(frozen=True)
class Step:
    """What one step of a loop computes with; b, rows of the batch, is 1, and products are made by heads."""

    place: Place
    logit_config: LogitConfig
    query: jax.Array  # [b, K, m, H], times the scale
    key: jax.Array  # [b, s, K, H]
    value: jax.Array  # [b, s, K, V]
    block: Block  # for bias [b|1, s|1, K|1, m|1] and allowed, the same

    def scores(self) -> tuple[jax.Array, jax.Array | None]:
        """Logits [b, s, K, m] and slope, as `block_logits`."""
        scores = self.with_keys(self.query, self.key)
        return finish_logits(
            scores, self.block.bias, self.block.allowed, self.logit_config, deterministic_math.tanh
        )

    def with_keys(self, x: jax.Array, keys: jax.Array) -> jax.Array:
        """[b, s, K, m] from x [b, K, m, H] and keys [b, s, K, H]: products over H."""
        count, keys = keys.shape[1], _filled(keys, 1)
        parts = [
            self._dot(keys[0, :, k], x[0, k], (((1,), (1,)), ((), ()))) for k in range(x.shape[1])
        ]
        return jnp.stack(parts, axis=1)[None, :count]

    def over_keys(self, weights: jax.Array, x: jax.Array, keys: int) -> jax.Array:
        """[c, V, b, K, m] from weights [b, s, K, m] and x [b, s, K, V]: sums over blocks of keys."""
        if keys == 1:
            return jnp.moveaxis(x, (1, 3), (0, 1))[..., None] * jnp.moveaxis(weights, 1, 0)[:, None]
        weights, x = (y.reshape(y.shape[0], -1, keys, *y.shape[2:]) for y in (weights, x))
        over = ((1,), (1,)), ((0,), (0,))
        pairs = [(weights[0, :, :, k], x[0, :, :, k]) for k in range(x.shape[3])]
        # XLA:CPU is twice as fast with the wide operand on the right.
        if weights.shape[-1] <= FEW_COLUMNS:
            parts = jnp.stack([self._dot(w, x, over) for w, x in pairs])
            return parts.transpose(1, 3, 0, 2)[:, :, None]
        return jnp.stack([self._dot(x, w, over) for w, x in pairs], axis=2)[:, :, None]

    def over_rows(self, weights: jax.Array, x: jax.Array, rows: int) -> jax.Array:
        """[r, V, b, K, s] from weights [b, s, K, m] and x [b, K, m, V]: sums over blocks of rows."""
        count, weights = weights.shape[1], _filled(weights, 1)
        weights = weights.reshape(*weights.shape[:3], -1, rows)
        x = x.reshape(*x.shape[:2], -1, rows, x.shape[-1])
        over = ((1,), (2,)), ((0,), (1,))
        parts = [self._dot(x[0, k], weights[0, :, k], over) for k in range(x.shape[1])]
        return jnp.stack(parts, axis=2)[:, :, None, :, :count]

    def _dot(self, a: jax.Array, b: jax.Array, dimensions: Any) -> jax.Array:
        return lax.dot_general(a, b, dimensions, precision=self.logit_config.precision)


def load(
    tiles: Tiles,
    columns: Columns,
    logit_config: LogitConfig,
    index: tuple[Any, Any, Any, Any],
    query: jax.Array,
    *,
    sums_rows: bool,
) -> Step:
    """The step at an index of rows of the batch, heads, queries and keys; query [b, K, G, q, H].

    Blocks at the end of the keys may overlap the block before, in whole units, and what is in both is left
    out of the second; so are rows where they are summed over.
    """
    *_, row, column = index
    place = tiles.place(*index)
    block = tiles.block(
        place,
        query,
        tiles.mask(place),
        fresh_keys=fresh(column, place.key, tiles.keys),
        fresh_queries=fresh(row, place.query, tiles.queries) if sums_rows else None,
    )
    bias, allowed = (None if x is None else columns.join(x, 3) for x in (block.bias, block.allowed))
    block = dataclasses.replace(block, bias=bias, allowed=allowed)
    return Step(place, logit_config, columns.join(query, 2), block.key, block.value, block)


def _filled(x: jax.Array, axis: int, least: int = LEAST_KEYS) -> jax.Array:
    """x with zeros behind it along an axis that is shorter."""
    missing = max(least - x.shape[axis], 0)
    return jnp.pad(x, [(0, missing if a == axis else 0) for a in range(x.ndim)])


# Keys, and rows of a head, whose sums are floating-point: part of the contract.
BLOCK = 64


@dataclasses.dataclass(frozen=True)
class ReproducibleBlocks:
    """What is summed as floating-point numbers, and on which lattices the rest is."""

    keys: int  # in one block
    rows: int  # of one head, in one block
    columns: int  # the unit of the width of a product, for XLA chooses its loops by the shape
    by_keys: LimbFormat  # for sums over blocks of keys
    by_rows: LimbFormat  # over blocks of rows, and heads of a group
    by_bias: LimbFormat  # over all that shares a bias


def reproducible_blocks_of(
    inputs: AttentionInputs, implementation: str, keys: int = BLOCK
) -> ReproducibleBlocks:
    """The units of a call, from the global shapes: they must not depend on the devices.

    Args:
      inputs: all of a call, not of one device.
      implementation: as in `dot_product_attention`, with which the units must fit.
      keys: in one block; 1 where blocks have no fixed content, as in a cache.

    Raises:
      ValueError: implementation='dense'.
      NotImplementedError: float64; a kernel's name as implementation.
    """
    if implementation == "dense":
        raise ValueError(
            "implementation='dense' sums keys in the compiler's order, and reproducible=True in none; pass "
            "implementation=None, or reproducible=False"
        )
    if implementation in KERNEL_NAMES:
        raise NotImplementedError(
            f"implementation={implementation!r} with reproducible=True is not built, its sums not being of "
            "integers; pass implementation=None, or reproducible=False"
        )
    arrays = inputs.query, inputs.key, inputs.value
    if state_dtype(*arrays) != jnp.float32:
        raise NotImplementedError(
            "reproducible=True is not built for float64, and query, key and value are "
            f"{', '.join(str(x.dtype) for x in arrays)}; cast them to float32, or pass reproducible=False"
        )
    batch, queries, heads, _ = inputs.query.shape
    length, kv_heads = inputs.key.shape[-3:-1]
    groups = heads // kv_heads
    rows = _row_block(queries)
    blocks, row_blocks = max(-(-length // keys), 1), max(-(-queries // rows), 1)
    shared = 1
    if inputs.bias is not None:
        counts = (batch, heads, row_blocks, blocks)
        for size, count in zip(inputs.bias.shape, counts, strict=True):
            shared *= count if size == 1 else 1
    return ReproducibleBlocks(
        keys=keys,
        rows=rows,
        columns=max(min(groups * _power_of_two(queries), BLOCK), 2),
        by_keys=limb_format(blocks),
        by_rows=limb_format(groups * row_blocks),
        by_bias=limb_format(max(shared, 1)),
    )


def _row_block(queries: int) -> int:
    """BLOCK, or less where eight devices would have fewer rows each; 8 at least, or all of them."""
    return min(BLOCK, max(_power_of_two(queries // 8 + 1) // 2, 8), _power_of_two(queries))


def _power_of_two(x: int) -> int:
    """The least power of two that is not below x."""
    return 1 << max(x - 1, 0).bit_length()


def empty(
    rows: tuple[int, ...], width: int, scale: LimbFormat, axes: frozenset[str]
) -> FixedPointState:
    """The state over no keys, for rows [b, K, m], with the words of `weighted_sum` as [b, K, m, V]."""
    total, weighted = (fixed_point.zero((x, *rows), scale, axes) for x in (1, width))
    return FixedPointState(total, _with_width(weighted, 0, -1))


def finished(state: FixedPointState) -> FixedPointState:
    """The state as others have it, with words [V, b, K, m]."""
    return FixedPointState(state.sum, _with_width(state.weighted_sum, -1, 0))


def add_step(state: FixedPointState, step: Step) -> FixedPointState:
    """The state, as `empty` makes it, and the keys of one step."""
    scale = state.sum.limb_format
    logits, _ = step.scores()  # [b, s, K, m]

    def split(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        return gauge.split(jnp.moveaxis(logits, 1, 0), scale.bits)

    steps, factor = deterministic_math.fusion_barrier(split, logits)  # [s, b, K, m]
    value = jnp.moveaxis(step.value, 1, 0)  # [s, b, K, V]
    ones = jnp.ones_like(factor)[:, None]
    return FixedPointState(
        sum=accumulate(state.sum, ones, steps, factor),
        weighted_sum=_accumulate(state.weighted_sum, value, steps, factor),
    )


def _accumulate(
    onto: FixedPoint, value: jax.Array, steps: jax.Array, factor: jax.Array
) -> FixedPoint:
    """`fixed_point.accumulate`, of terms that share their numbers in all rows of a head.

    Args:
      onto: words [b, K, m, V].
      value: f32[C, b, K, V].
      steps: int32[C, b, K, m], as for `quantise`; where it is EMPTY a value may be anything.
      factor: f32[C, b, K, m].
    """
    scale = onto.limb_format

    def scale_rows(
        value: jax.Array, steps: jax.Array, factor: jax.Array, top: jax.Array
    ) -> tuple[jax.Array, ...]:
        largest = jnp.abs(value).max(axis=-1, initial=0.0, keepdims=True)
        largest = jnp.where(steps == gauge.EMPTY, 0.0, largest)
        top, first, second = scaling(largest, steps, factor, top, scale)
        return top, first, second, jnp.where(jnp.isfinite(value), value, 0.0)

    top, first, second, value = deterministic_math.fusion_barrier(
        scale_rows, value, steps, factor, onto.top
    )
    words = moved_down(onto.words, (top - onto.top)[..., None])
    for i in range(value.shape[0]):
        rows = first[i][..., None], second[i][..., None]
        more = digits(value[i][:, :, None], *rows, scale)
        words = tuple(map(operator.add, words, more))
    return FixedPoint(top, words, scale)


def _with_width(x: FixedPoint, source: int, to: int) -> FixedPoint:
    return FixedPoint(
        x.top, tuple(jnp.moveaxis(word, source, to) for word in x.words), x.limb_format
    )


# Of one step: keys, rows of all heads, and terms.
STEP_KEYS, STEP_COLUMNS, STEP_TERMS = 512, 256, 16


def fold(
    inputs: AttentionInputs,
    logit_config: LogitConfig,
    machine: Machine,
    reproducible_blocks: ReproducibleBlocks,
) -> FixedPointState:
    """The state over all keys: FixedPoint [1, B, N, T] and [V, B, N, T].

    T and S must be multiples of the units.
    """
    tiles = Tiles(inputs, _tiling(inputs, machine, reproducible_blocks, backward=False))
    tiling, scale = tiles.tiling, reproducible_blocks.by_keys

    def empty_state(*rows: int) -> FixedPointState:
        widths = 1, tiles.value_width
        return FixedPointState(*(fixed_point.zero((x, *rows), scale, tiles.axes) for x in widths))

    whole = empty_state(tiles.batch, tiles.kv_heads * tiles.groups, tiles.queries)
    if tiles.is_empty:
        return whole
    columns = _columns(tiles, reproducible_blocks)

    def query_block(index: jax.Array, whole: FixedPointState) -> FixedPointState:
        batch, heads, row = unravel(index, tiles.batches, tiles.head_blocks, tiles.query_blocks)
        place = tiles.place(batch, heads, row, 0)
        query = tiles.query(place, logit_config.scale)

        def key_block(column: jax.Array, state: FixedPointState) -> FixedPointState:
            step = load(
                tiles, columns, logit_config, (batch, heads, row, column), query, sums_rows=False
            )
            if reproducible_blocks.keys == 1:
                return add_step(state, step)
            return _add_step(state, step, reproducible_blocks)

        rows = tiling.batch, tiling.heads, columns.count
        first = empty_state(*rows)
        if reproducible_blocks.keys == 1:
            first = empty(rows, tiles.value_width, scale, tiles.axes)
        state = visit(tiles.keys_for(place, row), tiles.key_blocks, key_block, first)
        state = finished(state) if reproducible_blocks.keys == 1 else state
        spans = (place.batch, place.query_heads, place.query)
        return map_sums(lambda x, part: put_at(x, _by_heads(part, columns), *spans), whole, state)

    return loop(tiles.batches * tiles.head_blocks * tiles.query_blocks, query_block, whole)


def fold_gradients(
    inputs: AttentionInputs,
    logit_config: LogitConfig,
    machine: Machine,
    reproducible_blocks: ReproducibleBlocks,
    cotangents: Cotangents,
) -> tuple[FixedPoint, FixedPoint, FixedPoint, FixedPoint | None]:
    """`local.fold_gradients` in fixed point.

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
    tiling, columns = tiles.tiling, _columns(tiles, reproducible_blocks)
    key, value, bias = inputs.key, inputs.value, inputs.bias

    def zero(x: jax.Array, scale: LimbFormat, rows: tuple[int, ...] | None = None) -> FixedPoint:
        """For the gradient of x [B, T|S, N|K, .], or of so many rows of it."""
        batch, length, heads, width = x.shape
        return fixed_point.zero((width, *(rows or (batch, heads, length))), scale, tiles.axes)

    grads = (
        zero(inputs.query, reproducible_blocks.by_keys),
        None
        if bias is None
        else fixed_point.zero((1, *bias.shape), reproducible_blocks.by_bias, tiles.axes),
        *(zero(x, reproducible_blocks.by_rows) for x in (key, value)),
    )

    def key_block(index: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        batch, heads, column = unravel(index, tiles.batches, tiles.head_blocks, tiles.key_blocks)
        place = tiles.place(batch, heads, 0, column)

        def query_block(row: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            d_query, d_bias, *d_keys = carry
            query = tiles.query(tiles.place(batch, heads, row, column), logit_config.scale)
            step = load(
                tiles, columns, logit_config, (batch, heads, row, column), query, sums_rows=True
            )
            place = step.place
            rows = Cotangents(*(columns.join(tiles.rows(x, place), 2) for x in cotangents))
            dq, d_keys, d_logits = _step_gradients(step, reproducible_blocks, d_keys, rows)
            dq = _by_heads(dq, columns)
            d_query = add_at(d_query, dq, place.batch, place.query_heads, place.query)
            if d_bias is not None:
                more = _bias_gradient(columns.part(d_logits, 3), bias.shape, reproducible_blocks)
                spans = (place.batch, place.query_heads, place.query, place.key)
                d_bias = add_at(d_bias, more, *spans)
            return d_query, d_bias, *d_keys

        d_query, d_bias, *d_keys = carry
        here = (tiling.batch, tiling.heads, tiling.key)
        zeros = [zero(x, reproducible_blocks.by_rows, here) for x in (key, value)]
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


def _add_step(
    state: FixedPointState, step: Step, reproducible_blocks: ReproducibleBlocks
) -> FixedPointState:
    """The state, rows [b, K, m], and the keys of one step."""
    logits, _ = step.scores()
    logits = logits.reshape(logits.shape[0], -1, reproducible_blocks.keys, *logits.shape[2:])
    high = logits.max(axis=2)  # [b, c, K, m]
    weights = deterministic_math.fusion_barrier(softmax_weights, logits, high[:, :, None])
    total = deterministic_math.ordered_sum(weights, 2)
    weights = weights.reshape(weights.shape[0], -1, *weights.shape[3:])

    def product(weights: jax.Array, x: jax.Array) -> jax.Array:
        return step.over_keys(weights, x, reproducible_blocks.keys)

    weighted = attended_sum(product, weights, step.value, step.block)
    total, high = (jnp.moveaxis(x, 1, 0) for x in (total, high))
    scaling = deterministic_math.fusion_barrier(
        lambda x: gauge.split(x, reproducible_blocks.by_keys.bits), high
    )
    return FixedPointState(
        sum=accumulate(state.sum, total[:, None], *scaling),
        weighted_sum=accumulate(state.weighted_sum, weighted, *scaling),
    )


def softmax_weights(logits: jax.Array, reference: jax.Array) -> jax.Array:
    """`state.softmax_weights`, the same bits wherever it is compiled."""
    return deterministic_math.exp(logits - jnp.where(reference == -jnp.inf, 0.0, reference))


def _step_gradients(
    step: Step,
    reproducible_blocks: ReproducibleBlocks,
    d_keys: list[FixedPoint],
    cotangents: Cotangents,
) -> tuple[FixedPoint, list[FixedPoint], jax.Array]:
    """Those of one step (see `block_gradients`).

    Args:
      step: the step.
      reproducible_blocks: as in `fold`.
      d_keys: of key and value [H, b, K, s], [V, b, K, s], from the rows before.
      cotangents: f32[b, K, m], f32[b, K, m], f32[b, K, m, V].

    Returns:
      d_query [H, b, K, m], d_keys with this step, and d_logits f32[b, s, K, m].
    """
    reference, d_sum, d_weighted_sum = cotangents
    logits, slope = step.scores()
    weights = deterministic_math.fusion_barrier(softmax_weights, logits, reference[:, None])
    d_weights = step.with_keys(d_weighted_sum, step.value)

    def chained(weights: jax.Array, d_weights: jax.Array, d_sum: jax.Array) -> jax.Array:
        return gradient_of_logits(weights, d_weights + d_sum[:, None], slope, step.block.allowed)

    d_logits = deterministic_math.fusion_barrier(chained, weights, d_weights, d_sum)

    def to_query(weights: jax.Array, x: jax.Array) -> jax.Array:
        return step.over_keys(weights, x, reproducible_blocks.keys)

    def to_key(weights: jax.Array, x: jax.Array) -> jax.Array:
        return step.over_rows(weights, x, reproducible_blocks.rows)

    d_query = attended_sum(to_query, d_logits, step.key, step.block)
    terms = attended_sum(to_key, d_logits, step.query, step.block), to_key(weights, d_weighted_sum)
    d_keys = [accumulate(x, y) for x, y in zip(d_keys, terms, strict=True)]
    nothing = fixed_point.zero(
        d_query.shape[1:], reproducible_blocks.by_keys, varying_axes(d_query)
    )
    d_query = accumulate(nothing, d_query * step.logit_config.scale)
    return d_query, d_keys, d_logits


def _bias_gradient(
    d_logits: jax.Array, shape: tuple[int, ...], reproducible_blocks: ReproducibleBlocks
) -> FixedPoint:
    """[1, b|1, N|1, q|1, s|1] from d_logits [b, s, K, G, q]: summed where the bias has size 1."""
    b, keys, kv_heads, groups, rows = d_logits.shape
    x = jnp.moveaxis(d_logits, 1, -1).reshape(b, kv_heads * groups, rows, keys)
    # Rounded before it is added to others: a compiler may fuse the product with one of several sums.
    x = deterministic_math.prevent_fma(x)
    for axis, unit in ((2, reproducible_blocks.rows), (3, reproducible_blocks.keys)):
        if shape[axis] == 1:
            x = x.reshape(*x.shape[:axis], -1, unit, *x.shape[axis + 1 :])
            x = deterministic_math.ordered_sum(x, axis + 1)
    terms = quantise(x[None], reproducible_blocks.by_bias)
    summed = [axis for axis, size in enumerate(shape) if size == 1]
    return fixed_point.merge_axes(terms, summed, keepdims=True) if summed else terms


def _by_heads(x: FixedPoint, columns: Columns) -> FixedPoint:
    """Rows [b, K, m] to [b, K * G, q]."""

    def split(x: jax.Array, axis: int) -> jax.Array:
        x = columns.part(x, axis)
        return x.reshape(*x.shape[: axis - 1], -1, x.shape[-1])

    return FixedPoint(split(x.top, 2), tuple(split(word, 3) for word in x.words), x.limb_format)


def _columns(tiles: Tiles, reproducible_blocks: ReproducibleBlocks) -> Columns:
    return Columns(tiles.groups, tiles.tiling.query, reproducible_blocks.columns)


def _tiling(
    inputs: AttentionInputs,
    machine: Machine,
    reproducible_blocks: ReproducibleBlocks,
    *,
    backward: bool,
) -> Tiling:
    queries, heads = inputs.query.shape[1:3]
    keys, kv_heads = inputs.key.shape[-3:-1]
    groups = heads // kv_heads
    few = groups * queries <= FEW_COLUMNS
    # Either all products are so narrow, or none is.
    columns = STEP_COLUMNS if reproducible_blocks.columns == BLOCK else reproducible_blocks.columns
    return Tiling(
        batch=1,
        heads=kv_heads if few and not backward else 1,
        query=_evenly(
            queries, reproducible_blocks.rows, max(columns // groups, reproducible_blocks.rows)
        ),
        key=_evenly(
            keys,
            reproducible_blocks.keys,
            STEP_KEYS if reproducible_blocks.keys > 1 else STEP_TERMS,
        ),
        flat=True,
        as_bits=machine.platform == "cpu",
    )


def _evenly(length: int, unit: int, most: int) -> int:
    """The multiple of the unit, up to `most`, by which the length is cut with the least overlap."""
    blocks = length // unit
    count = max(-(-blocks // max(most // unit, 1)), 1)
    return -(-blocks // count) * unit
