"""The step of a reproducible fold whose unit is a single key, as in a cache: no sum is floating-point.

The term of a key is exp(logit) times its value: a gauge and a factor for each row, and numbers that all
rows share. So no weights are made, and values are looked at once, not for each row. Words lie as
[b, K, m, V] here, since rows may be few and XLA:CPU vectorises the last dimension.
"""

import operator

import jax
import jax.numpy as jnp

from distattn import elementary, fixed_point, gauge
from distattn.fixed_point import FixedPoint, FixedPointState, accumulate
from distattn.step import Step
from distattn.words import Lattice, digits, moved_down, scaling


def empty(
    rows: tuple[int, ...], width: int, scale: Lattice, axes: frozenset[str]
) -> FixedPointState:
    """The state over no keys, for rows [b, K, m], with the words of `weighted_sum` as [b, K, m, V]."""
    total, weighted = (fixed_point.zero((x, *rows), scale, axes) for x in (1, width))
    return FixedPointState(total, _with_width(weighted, 0, -1))


def finished(state: FixedPointState) -> FixedPointState:
    """The state as others have it, with words [V, b, K, m]."""
    return FixedPointState(state.sum, _with_width(state.weighted_sum, -1, 0))


def add_step(state: FixedPointState, step: Step) -> FixedPointState:
    """The state, as `empty` makes it, and the keys of one step."""
    scale = state.sum.lattice
    logits, _ = step.scores()  # [b, s, K, m]

    def split(logits: jax.Array) -> tuple[jax.Array, jax.Array]:
        return gauge.split(jnp.moveaxis(logits, 1, 0), scale.bits)

    steps, factor = elementary.apart(split, logits)  # [s, b, K, m]
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
    scale = onto.lattice

    def scale_rows(
        value: jax.Array, steps: jax.Array, factor: jax.Array, top: jax.Array
    ) -> tuple[jax.Array, ...]:
        largest = jnp.abs(value).max(axis=-1, initial=0.0, keepdims=True)
        largest = jnp.where(steps == gauge.EMPTY, 0.0, largest)
        top, first, second = scaling(largest, steps, factor, top, scale)
        return top, first, second, jnp.where(jnp.isfinite(value), value, 0.0)

    top, first, second, value = elementary.apart(scale_rows, value, steps, factor, onto.top)
    words = moved_down(onto.words, (top - onto.top)[..., None])
    for i in range(value.shape[0]):
        rows = first[i][..., None], second[i][..., None]
        more = digits(value[i][:, :, None], *rows, scale)
        words = tuple(map(operator.add, words, more))
    return FixedPoint(top, words, scale)


def _with_width(x: FixedPoint, source: int, to: int) -> FixedPoint:
    return FixedPoint(x.top, tuple(jnp.moveaxis(word, source, to) for word in x.words), x.lattice)
