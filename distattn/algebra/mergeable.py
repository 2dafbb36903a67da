"""States and gradients that merge: one set of operations for floating-point and for fixed-point sums.

Collectives and the backward pass call these and never ask which kind they hold. A state of either kind
has a
reference: the maximum of a `SoftmaxState`, the exponents of fixed-point sums. States of equal reference are
added plainly, and a packed state is one array, so a state travels in one message.

A gradient is an array [B, T, N, X] or a `FixedPoint` with rows [B, N, T], T being S for keys and values.
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
State = Any  # SoftmaxState, or FixedPoint or a pytree of them with the same rows


@dataclasses.dataclass(frozen=True)
class Monoid:
    """Operations on one kind of state."""

    merge: Callable[[State, State], State]
    merge_stacked: Callable[[State], State]  # over a leading dimension of the rows
    reference: Callable[[State], jax.Array]  # merged by `maximum`
    rescale: Callable[[State, jax.Array], State]  # to a reference not below its own
    pack: Callable[[State], jax.Array]
    unpack: Callable[[jax.Array, State], State]  # packed array, and a state of equal structure
    pack_sums: Callable[[State], jax.Array]  # without the reference
    unpack_sums: Callable[[jax.Array, jax.Array, State], State]  # with the reference
    finalize: Callable[..., tuple[jax.Array, jax.Array]]  # out [B, T, N, V] and lse [B, T, N]
    t_dimension: int  # dimension of T in the rows
    first_row: int  # dimension of a packed array at which the rows begin
    exact: bool  # merging rounds nothing


def monoid_of(x: State) -> Monoid:
    """Return the operations on a state."""
    return SOFTMAX if isinstance(x, SoftmaxState) else FIXED_POINT


def empty_like(x: State, axes: frozenset[str]) -> State:
    """Return the identity in the shapes of x, arrays or ShapeDtypeStructs, varying over the axes."""
    if isinstance(x, SoftmaxState):
        return softmax_state.empty(x.max.shape, x.weighted_sum.shape[-1], x.max.dtype, axes)
    return zeros_like(x, axes)


def rows_of(x: State) -> tuple[int, ...]:
    """Return the shape of the rows: [B, T, N] of a SoftmaxState."""
    return x.max.shape if isinstance(x, SoftmaxState) else fixed_points(x)[0].exponent.shape


def zeros_like(x: Any, axes: frozenset[str]) -> Any:
    """Return sums over no terms in the shapes of x, arrays or ShapeDtypeStructs, varying over the axes."""

    def zero(x: Any) -> Sum:
        if isinstance(x, FixedPoint):
            return fixed_point.zero(x.limbs[0].shape, x.limb_format, axes)
        return vary(jnp.zeros(x.shape, x.dtype), axes)

    return map_sums(zero, x)


def zeros_at(like: Sum, rows: tuple[int, ...], axes: frozenset[str]) -> Sum:
    """Return sums over no terms for rows of another shape: a bias, of which `like` is a shard."""
    if isinstance(like, FixedPoint):
        return fixed_point.zero((like.limbs[0].shape[0], *rows), like.limb_format, axes)
    return vary(jnp.zeros(rows, like.dtype), axes)


def add(a: Any, b: Any) -> Any:
    """Return the sums of the terms of both, pytrees of equal structure."""

    def pair(a: Any, b: Any) -> Sum:
        return fixed_point.merge(a, b) if isinstance(a, FixedPoint) else a + b

    return map_sums(pair, a, b)


def is_exact(x: Sum) -> bool:
    """Return whether a gradient is in fixed point, so that its sum rounds nothing."""
    return isinstance(x, FixedPoint)


def to_array(x: Sum) -> jax.Array:
    """Return [B, T, N, X] of the gradient of an input, [B, N, T, S] of a bias, or [N] of sinks."""
    if not isinstance(x, FixedPoint):
        return x
    value = deterministic_math.fusion_barrier(fixed_point.value, x)
    return value.transpose(1, 3, 2, 0) if x.exponent.ndim == 3 else value[0]


def sum_copies(x: Sum, times: int) -> Sum:
    """Return the gradient [B, S, K, H] of K heads from K * times heads, each repeated `times` times."""
    if times == 1:
        return x
    if isinstance(x, FixedPoint):
        batch, heads, keys = x.exponent.shape
        rows = (batch, heads // times, times, keys)
        limbs = tuple(limb.reshape(-1, *rows) for limb in x.limbs)
        split = FixedPoint(x.exponent.reshape(rows), limbs, x.limb_format)
        return fixed_point.merge_axes(split, 2)
    return x.reshape(*x.shape[:2], -1, times, x.shape[-1]).sum(axis=3)


def pack_rows(x: Sum) -> jax.Array:
    """Return a gradient as one array [B, T, N, Y], so that an exchange of T for N moves it."""
    return FIXED_POINT.pack(x).transpose(1, 3, 2, 0) if isinstance(x, FixedPoint) else x


def unpack_rows(packed: jax.Array, like: Sum) -> Sum:
    """Return the gradient of which `packed` is `pack_rows`, in the structure of `like`."""
    if isinstance(like, FixedPoint):
        return FIXED_POINT.unpack(packed.transpose(3, 0, 2, 1), like)
    return packed


SOFTMAX = Monoid(
    merge=softmax_state.merge,
    merge_stacked=softmax_state.merge_stacked,
    reference=lambda x: lax.stop_gradient(x.max),
    rescale=softmax_state.rescale,
    pack=softmax_state.pack,
    unpack=lambda packed, _: softmax_state.unpack(packed),
    pack_sums=lambda x: softmax_state.pack(x)[..., :-1],
    unpack_sums=lambda packed, high, _: SoftmaxState(high, packed[..., -1], packed[..., :-1]),
    finalize=softmax_state.finalize,
    t_dimension=1,
    first_row=0,
    exact=False,
)


def fixed_points(x: State) -> list[FixedPoint]:
    """Return the FixedPoints in x, one or a pytree of them."""
    return jax.tree.leaves(x, is_leaf=fixed_point.is_sums)


def with_fixed_points(x: State, leaves: list[FixedPoint]) -> State:
    """Return x with other FixedPoints in their places."""
    return jax.tree.unflatten(jax.tree.structure(x, is_leaf=fixed_point.is_sums), leaves)


def _exponents(x: State) -> jax.Array:
    """Return int32[L, ...] of the L FixedPoints in x."""
    return jnp.stack([leaf.exponent for leaf in fixed_points(x)])


def _with_exponents(x: State, exponents: jax.Array) -> State:
    leaves = zip(fixed_points(x), exponents, strict=True)
    # Not fused into the packing that follows, which XLA:CPU does item by item.
    barrier = deterministic_math.fusion_barrier
    return with_fixed_points(
        x, [barrier(fixed_point.with_exponent, leaf, exponent) for leaf, exponent in leaves]
    )


def _pack_limbs(x: State) -> jax.Array:
    """Return int32[sum of limbs * X, ...]."""
    return jnp.concatenate([limb for leaf in fixed_points(x) for limb in leaf.limbs])


def _unpack_limbs(packed: jax.Array, exponents: jax.Array, like: State) -> State:
    start, leaves = 0, []
    for leaf, exponent in zip(fixed_points(like), exponents, strict=True):
        limbs = []
        for limb in leaf.limbs:
            limbs.append(packed[start : start + limb.shape[0]])
            start += limb.shape[0]
        leaves.append(FixedPoint(exponent, tuple(limbs), leaf.limb_format))
    return with_fixed_points(like, leaves)


def _unpack(packed: jax.Array, like: State) -> State:
    count = len(fixed_points(like))
    return _unpack_limbs(packed[:-count], packed[-count:], like)


FIXED_POINT = Monoid(
    merge=fixed_point.merge,
    merge_stacked=lambda x: fixed_point.merge_axes(x, 0),
    reference=_exponents,
    rescale=_with_exponents,
    pack=lambda x: jnp.concatenate([_pack_limbs(x), _exponents(x)]),
    unpack=_unpack,
    pack_sums=_pack_limbs,
    unpack_sums=_unpack_limbs,
    finalize=fixed_point.finalize,
    t_dimension=2,
    first_row=1,
    exact=True,
)
