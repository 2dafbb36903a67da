"""From states and partial gradients of one device to results: for the global call and the inside form.

Everything here is what one device does, inside `shard_map` or alone.
"""

import jax
import jax.numpy as jnp
from jax import lax

from distattn import elementary, fixed_point
from distattn.axes import axes_size, own_part, typed_as_varying
from distattn.collectives import (
    all_reduce,
    all_sum,
    chosen_schedule,
    sum_schedule,
)
from distattn.fixed_point import FixedPoint, FixedPointState
from distattn.monoid import FIXED_POINT, State, monoid_of, rows_of
from distattn.movement import Movement
from distattn.operands import Operands
from distattn.placement import Axes
from distattn.reproducible import softmax_weights as reproducible_weights
from distattn.scatter import reduce_scatter
from distattn.schedule import Schedule
from distattn.state import softmax_weights
from distattn.sums import Sum
from distattn.ulysses import heads_to_rows
from distattn.words import lattice

LARGE_BYTES = 2**20  # of a state, from which on one more collective costs less than what it saves


def completed(state: State, movement: Movement, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """out [B, T, N, V] in query's dtype and lse [B, T, N] of the rows that this device is to have.

    Args:
      state: over this device's keys, of the rows with which it has computed.
      movement: of the call.
      operands: with which it has computed.
    """
    sinks, valid, dtype = operands.sinks, operands.mask.query_valid, operands.query.dtype
    if movement.all_reduce and not movement.scatter:
        out, lse = finish_over(state, movement.all_reduce, movement.schedule, sinks, valid, dtype)
    else:
        if movement.all_reduce:
            state = all_reduce(state, movement.all_reduce, schedule=movement.schedule)
        if movement.scatter:
            time = monoid_of(state).time
            state = reduce_scatter(state, movement.scatter, scatter_dimension=time)
            valid = None if valid is None else own_part(valid, movement.scatter, 1)
        out, lse = finish(state, sinks, valid, dtype)
    if movement.heads:
        out, lse = heads_to_rows([out, lse], movement.heads)
    return out, lse


def finish(
    state: State, sinks: jax.Array | None, valid: jax.Array | None, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """out in the given dtype and lse, from the state over all keys; rows that are not valid are empty."""
    out, lse = monoid_of(state).finalize(state, sinks)
    if valid is not None:  # a sink gives no log-sum-exp to a row that is not there
        out = jnp.where(valid[..., None, None], out, 0.0)
        lse = jnp.where(valid[..., None], lse, -jnp.inf)
    return out.astype(dtype), lse


def finish_over(
    state: State,
    axes: Axes,
    schedule: str | Schedule,
    sinks: jax.Array | None,
    valid: jax.Array | None,
    dtype: jnp.dtype,
) -> tuple[jax.Array, jax.Array]:
    """`finish`, from the state of each device of the axes.

    An all-reduce is a reduce-scatter and an all-gather. Where XLA makes that of a large state in fixed
    point, results are gathered instead: a third of the bytes, and each device divides its own rows only.
    Where types are tracked, what is gathered so would not count as replicated.
    """
    rows = rows_of(state)[-1]
    divides = rows % axes_size(axes) == 0 and not typed_as_varying(axes)
    if isinstance(state, FixedPointState) and divides:
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
        if size >= LARGE_BYTES and chosen_schedule(schedule, state, axes) == "psum":
            time = FIXED_POINT.time
            state = reduce_scatter(state, axes, scatter_dimension=time, schedule="psum")
            valid = None if valid is None else own_part(valid, axes, 1)
            out, lse = finish(state, sinks, valid, jnp.dtype(jnp.float32))
            parts = jnp.concatenate([out, lse[..., None]], axis=-1)
            whole = lax.all_gather(parts, axes, axis=1, tiled=True)
            return whole[..., :-1].astype(dtype), whole[..., -1]
    return finish(all_reduce(state, axes, schedule=schedule), sinks, valid, dtype)


def row_cotangents(
    out: jax.Array, lse: jax.Array, d_out: jax.Array, d_lse: jax.Array, *, reproducible: bool
) -> tuple[jax.Array, jax.Array]:
    """d_out and d_sum, as `block_gradients` takes them, from the cotangents of a finished attention.

    Args:
      out: [B, T, N, V].
      lse: f32[B, T, N].
      d_out: [B, T, N, V].
      d_lse: f32[B, T, N].
      reproducible: whether the bits must not depend on how the arrays are cut.

    Returns:
      d_out [B, T, N, V] and d_sum f32[B, T, N], 0 for a row that attends to nothing: it is a constant, and
      whatever comes back for it goes nowhere.
    """
    dead = lse == -jnp.inf
    products = d_out.astype(lse.dtype) * out.astype(lse.dtype)
    if reproducible:
        d_sum = d_lse - elementary.ordered_sum(elementary.rounded(products), -1)
    else:
        d_sum = d_lse - products.sum(axis=-1)
    return jnp.where(dead[..., None], 0.0, d_out), jnp.where(dead, 0.0, d_sum)


def by_row(rows: jax.Array, d_out: jax.Array) -> dict[str, jax.Array]:
    """What `fold_gradients` takes by rows, by name, from lse and d_sum f32[B, T, N, 2] and d_out."""
    lse, d_sum = rows[..., 0], rows[..., 1]
    return {"reference": lse, "d_sum": d_sum, "d_weighted_sum": d_out.astype(rows.dtype)}


def sink_gradient(sinks: jax.Array, lse: jax.Array, d_sum: jax.Array, *, reproducible: bool) -> Sum:
    """That of f32[N], summed over rows [B, T, N]; with `reproducible` FixedPoint [1, N]."""
    sinks = sinks.astype(lse.dtype)[None, None]
    if not reproducible:
        return (softmax_weights(sinks, lse) * d_sum).sum(axis=(0, 1))
    weights = reproducible_weights(sinks, lse)
    terms = jnp.where(lse == -jnp.inf, 0.0, weights * d_sum)
    scale = lattice(lse.shape[0] * lse.shape[1])
    return fixed_point.merge_axes(fixed_point.quantise(terms[None], scale), (0, 1))


def sum_over(x: Sum, axes: Axes, scatter: Axes = ()) -> Sum:
    """The sum over the axes; along T or S, each device's part only, for those to scatter over."""
    fixed = isinstance(x, FixedPoint)
    if axes_size(scatter) > 1 and fixed:
        time = FIXED_POINT.time
        x = reduce_scatter(x, scatter, scatter_dimension=time, schedule="psum")
    elif axes_size(scatter) > 1:
        x = lax.psum_scatter(x, scatter, scatter_dimension=1, tiled=True)
    rest = tuple(axis for axis in axes if axis not in scatter)
    if not rest:
        return x
    return all_reduce(x, rest, schedule=sum_schedule(x, rest)) if fixed else all_sum(x, rest)


def numbers(x: Sum) -> jax.Array:
    """[B, T, N, X] from sums with rows [B, N, T]; [B, N, T, S] or [N] from those of a bias or of sinks."""
    if not isinstance(x, FixedPoint):
        return x
    value = elementary.apart(fixed_point.value, x)
    return value.transpose(1, 3, 2, 0) if x.top.ndim == 3 else value[0]


def gradients_of(
    sums: dict[str, Sum], operands: Operands, heads: Axes, times: int
) -> dict[str, jax.Array]:
    """Gradients as numbers, with the dtypes of the operands and with rows where the operands have them.

    Args:
      sums: by the name of the operand, of what the devices have given back.
      operands: whose dtypes they take.
      heads: the axes over which heads were sharded in place of rows.
      times: how often key/value heads were repeated for that.
    """

    def number(name: str) -> jax.Array:
        return numbers(sums[name]).astype(getattr(operands, name).dtype)

    if heads:
        moved = ("query", "key", "value")
        # Numbers are shorter than sums, but those of copies are yet to be added.
        parts = [sums[name] if name != "query" and times > 1 else number(name) for name in moved]
        sums = sums | dict(zip(moved, _rows_again(parts, heads), strict=True))
        sums |= {name: _heads_summed(sums[name], times) for name in ("key", "value")}
    return {name: number(name) for name in sums}


def _heads_summed(x: Sum, times: int) -> Sum:
    """[B, S, K, H] from K * times heads, copies of which the gradients are summed."""
    if times == 1:
        return x
    if isinstance(x, FixedPoint):
        batch, heads, keys = x.top.shape
        rows = (batch, heads // times, times, keys)
        top, words = x.top.reshape(rows), (word.reshape(-1, *rows) for word in x.words)
        return fixed_point.merge_axes(FixedPoint(top, tuple(words), x.lattice), 2)
    return x.reshape(*x.shape[:2], -1, times, x.shape[-1]).sum(axis=3)


def _rows_again(sums: list[Sum], axes: Axes) -> list[Sum]:
    """Sums with heads sharded over the axes, with rows sharded in their place: see `heads_to_rows`."""
    arrays = [
        FIXED_POINT.pack(x).transpose(1, 3, 2, 0) if isinstance(x, FixedPoint) else x for x in sums
    ]
    moved = heads_to_rows(arrays, axes)
    return [
        FIXED_POINT.unpack(y.transpose(3, 0, 2, 1), x) if isinstance(x, FixedPoint) else y
        for x, y in zip(sums, moved, strict=True)
    ]
