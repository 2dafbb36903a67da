"""What collectives know of the states that they merge: one table for both kinds.

A state of either kind has a gauge, in which it is brought by shifting it, and states of one gauge are
plainly added; packed, it is one array.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from distattn import elementary, fixed_point, state
from distattn.fixed_point import FixedPoint
from distattn.state import SoftmaxState
from distattn.sums import zeros_like

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
        return state.empty(x.max.shape, x.weighted_sum.shape[-1], x.max.dtype, axes)
    return zeros_like(x, axes)


def rows_of(x: State) -> tuple[int, ...]:
    """The shape of the rows: [B, T, N] of a SoftmaxState."""
    return x.max.shape if isinstance(x, SoftmaxState) else fixed_points(x)[0].top.shape


SOFTMAX = Monoid(
    merge=state.merge,
    merge_stacked=state.merge_stacked,
    gauge=lambda x: lax.stop_gradient(x.max),
    in_gauge=state.rescale,
    pack=state.pack,
    unpack=lambda packed, _: state.unpack(packed),
    pack_sums=lambda x: state.pack(x)[..., :-1],
    unpack_sums=lambda packed, gauge, _: SoftmaxState(gauge, packed[..., -1], packed[..., :-1]),
    finalize=state.finalize,
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
        x, [elementary.apart(fixed_point.raised, leaf, top) for leaf, top in leaves]
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
        leaves.append(FixedPoint(top, tuple(words), leaf.lattice))
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
