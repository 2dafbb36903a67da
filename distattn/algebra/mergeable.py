"""Gradients on their way to completion: arrays that are added, or sums in fixed point that are merged.

What collectives know of the states that they merge: one table for both kinds.

A state of either kind has a gauge, in which it is brought by shifting it, and states of one gauge are
plainly added; packed, it is one array.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from distattn._compat import vary
from distattn.algebra import deterministic_math, fixed_point, softmax_state
from distattn.algebra.fixed_point import FixedPoint, map_sums
from distattn.algebra.softmax_state import SoftmaxState

Sum = jax.Array | FixedPoint


def zeros_like(x: Any, axes: frozenset[str]) -> Any:
    """The sums of nothing in the shapes of x, arrays or `jax.ShapeDtypeStruct`, varying over the axes."""

    def zero(x: Any) -> Sum:
        if isinstance(x, FixedPoint):
            return fixed_point.zero(x.words[0].shape, x.limb_format, axes)
        return vary(jnp.zeros(x.shape, x.dtype), axes)

    return map_sums(zero, x)


def zeros_at(like: Sum, rows: tuple[int, ...], axes: frozenset[str]) -> Sum:
    """The sums of nothing for rows of another shape: those of a bias, of which `like` is a part."""
    if isinstance(like, FixedPoint):
        return fixed_point.zero((like.words[0].shape[0], *rows), like.limb_format, axes)
    return vary(jnp.zeros(rows, like.dtype), axes)


def add(a: Any, b: Any) -> Any:
    """The sums of the terms of both, pytrees of the same structure."""

    def pair(a: Any, b: Any) -> Sum:
        return fixed_point.merge(a, b) if isinstance(a, FixedPoint) else a + b

    return map_sums(pair, a, b)


State = Any  # SoftmaxState, or FixedPoint or a pytree of them with the same rows


@dataclasses.dataclass(frozen=True)
class Monoid:
    """The operations of one kind of state."""

    merge: Callable[[State, State], State]
    merge_stacked: Callable[[State], State]  # all the states of a leading dimension of the rows
    gauge: Callable[[State], jax.Array]  # merged by `maximum`
    in_gauge: Callable[[State, jax.Array], State]  # for a gauge that is not below its own
    pack: Callable[[State], jax.Array]
    # Packed, and a state that is like it but for its rows.
    unpack: Callable[[jax.Array, State], State]
    pack_sums: Callable[[State], jax.Array]  # without the gauge
    unpack_sums: Callable[[jax.Array, jax.Array, State], State]  # with the gauge
    finalize: Callable[..., tuple[jax.Array, jax.Array]]  # out [B, T, N, V] and lse [B, T, N]
    time: int  # which dimension of the rows is T, or S in a gradient
    first_row: int  # the dimension of a packed array with which the rows begin


def monoid_of(x: State) -> Monoid:
    """The operations for a state."""
    return SOFTMAX if isinstance(x, SoftmaxState) else FIXED_POINT


def empty_like(x: State, axes: frozenset[str]) -> State:
    """The identity in the shapes of x, arrays or `jax.ShapeDtypeStruct`, typed as varying over the axes."""
    if isinstance(x, SoftmaxState):
        return softmax_state.empty(x.max.shape, x.weighted_sum.shape[-1], x.max.dtype, axes)
    return zeros_like(x, axes)


def rows_of(x: State) -> tuple[int, ...]:
    """The shape of the rows: [B, T, N] of a SoftmaxState."""
    return x.max.shape if isinstance(x, SoftmaxState) else fixed_points(x)[0].top.shape


SOFTMAX = Monoid(
    merge=softmax_state.merge,
    merge_stacked=softmax_state.merge_stacked,
    gauge=lambda x: lax.stop_gradient(x.max),
    in_gauge=softmax_state.rescale,
    pack=softmax_state.pack,
    unpack=lambda packed, _: softmax_state.unpack(packed),
    pack_sums=lambda x: softmax_state.pack(x)[..., :-1],
    unpack_sums=lambda packed, gauge, _: SoftmaxState(gauge, packed[..., -1], packed[..., :-1]),
    finalize=softmax_state.finalize,
    time=1,
    first_row=0,
)


def fixed_points(x: State) -> list[FixedPoint]:
    """The FixedPoints in x, which is one or a pytree of them."""
    return jax.tree.leaves(x, is_leaf=fixed_point.is_sums)


def with_fixed_points(x: State, leaves: list[FixedPoint]) -> State:
    """x with others in their place."""
    return jax.tree.unflatten(jax.tree.structure(x, is_leaf=fixed_point.is_sums), leaves)


def _tops(x: State) -> jax.Array:
    """int32[L, ...], of the L FixedPoints in x."""
    return jnp.stack([leaf.top for leaf in fixed_points(x)])


def _with_tops(x: State, tops: jax.Array) -> State:
    leaves = zip(fixed_points(x), tops, strict=True)
    # Apart from the packing that follows, which XLA:CPU does item by item.
    return with_fixed_points(
        x,
        [deterministic_math.fusion_barrier(fixed_point.raised, leaf, top) for leaf, top in leaves],
    )


def _pack_words(x: State) -> jax.Array:
    """int32[sum of words * X, ...]."""
    return jnp.concatenate([word for leaf in fixed_points(x) for word in leaf.words])


def _unpack_words(packed: jax.Array, tops: jax.Array, like: State) -> State:
    start, leaves = 0, []
    for leaf, top in zip(fixed_points(like), tops, strict=True):
        words = []
        for word in leaf.words:
            words.append(packed[start : start + word.shape[0]])
            start += word.shape[0]
        leaves.append(FixedPoint(top, tuple(words), leaf.limb_format))
    return with_fixed_points(like, leaves)


def _unpack(packed: jax.Array, like: State) -> State:
    count = len(fixed_points(like))
    return _unpack_words(packed[:-count], packed[-count:], like)


FIXED_POINT = Monoid(
    merge=fixed_point.merge,
    merge_stacked=lambda x: fixed_point.merge_axes(x, 0),
    gauge=_tops,
    in_gauge=_with_tops,
    pack=lambda x: jnp.concatenate([_pack_words(x), _tops(x)]),
    unpack=_unpack,
    pack_sums=_pack_words,
    unpack_sums=_unpack_words,
    finalize=fixed_point.finalize,
    time=2,
    first_row=1,
)
