"""Bitwise reproducible sums of arrays, for any sharding and any order."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from distattn._compat import vary
from distattn.algebra import fixed_point
from distattn.algebra.fixed_point import limb_format, merge_axes, quantise
from distattn.collectives.all_reduce import all_reduce, sum_schedule
from distattn.collectives.mesh import AxisName, axes_size, mesh_order, typed_as_varying


def sum_axes(x: jax.Array, axis: int | tuple[int, ...] | None) -> tuple[int, ...]:
    """Return the dimensions of x to sum, counted from the first; check x and axis."""
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"x has dtype {x.dtype}; it must be floating-point: integers have the same sum in any order, "
            "use jnp.sum"
        )
    if x.dtype == jnp.float64:
        raise NotImplementedError(
            "a reproducible sum of float64 is not built; cast x to float32, with x.astype(jnp.float32)"
        )
    axes = range(x.ndim) if axis is None else (axis,) if isinstance(axis, int) else tuple(axis)
    if any(not -x.ndim <= a < x.ndim for a in axes) or len({a % x.ndim for a in axes}) < len(axes):
        raise ValueError(
            f"axis is {axis}, and x has {x.ndim} dimensions; name each of them once, by a number from "
            f"{-x.ndim} to {x.ndim - 1}"
        )
    return tuple(a % x.ndim for a in axes)


def reproducible_sum(
    x: jax.Array,
    axis: int | tuple[int, ...] | None = None,
    *,
    axis_name: AxisName | None = None,
    keepdims: bool = False,
) -> jax.Array:
    """Return a sum that is bitwise reproducible for any sharding and any order of the items.

    Items become integers, as in `distattn.algebra.fixed_point`, so nothing is rounded until the end. A
    sum along a sharded dimension needs no further argument: XLA adds integers too. Use it for a loss, or
    for the gradient of weights that all devices share.

    Args:
      x: float32, or bfloat16 or float16, which are summed as float32; at most 2^24 terms per sum.
      axis: dimensions to sum over, as in `jax.numpy.sum`; None: all; (): no dimension, only devices.
      axis_name: inside `jax.shard_map`, an axis or tuple of axes to sum over too.
      keepdims: whether summed dimensions stay, with size 1.

    Returns:
      The sum in x's dtype. Its error is below one unit in the last place of the largest item, or of itself
      if that is larger. NaN if an item is not finite. Differentiable, as a sum is.

    Raises:
      ValueError: not a floating-point array, an invalid axis, or more than 2^24 terms.
      NotImplementedError: float64.

    Examples:
      >>> import jax.numpy as jnp, distattn
      >>> x = jnp.array([1e8, 1.0, -1e8])
      >>> float(distattn.reproducible_sum(x, axis=0)), float(distattn.reproducible_sum(x[::-1], axis=0))
      (1.0, 1.0)

    Reference: Demmel & Nguyen, "Parallel Reproducible Summation", IEEE Trans. Computers 64(7), 2015.
    """
    x = jnp.asarray(x)
    axes = sum_axes(x, axis)
    names = () if axis_name is None else mesh_order(axis_name)
    x = vary(x, frozenset(names)) if typed_as_varying(names) else x
    return _sum(x, axes, names, keepdims)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
def _sum(x: jax.Array, axes: tuple[int, ...], names: tuple[str, ...], keepdims: bool) -> jax.Array:
    terms = math.prod(x.shape[axis] for axis in axes) * axes_size(names)
    total = quantise(x.astype(jnp.float32)[None], limb_format(max(terms, 1)))
    if axes:
        total = merge_axes(total, axes, keepdims=keepdims)
    if names:
        # Typed as replicated, as the tangent is, where types are tracked.
        schedule = "psum" if typed_as_varying(names) else sum_schedule(total, names)
        total = all_reduce(total, names, schedule=schedule)
    return fixed_point.value(total)[0].astype(x.dtype)


@_sum.defjvp
def _sum_jvp(
    axes: tuple[int, ...],
    names: tuple[str, ...],
    keepdims: bool,
    primals: tuple[jax.Array],
    tangents: tuple[jax.Array],
) -> tuple[jax.Array, jax.Array]:
    (x,), (dx,) = primals, tangents
    out = _sum(x, axes, names, keepdims)
    dx = dx.sum(axis=axes, keepdims=keepdims) if axes else dx
    return out, lax.psum(dx, names) if names else dx
