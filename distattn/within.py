"""What one device does inside somebody's `shard_map`: operands brought to work, and reproducible attention.

The reproducible form has a gradient of its own, since integers have none. It holds collectives, so it
keeps by hand the two rules of differentiation inside a `shard_map`: the cotangent of a result that all
devices have is the sum of what comes back on each, and the gradient of an operand that all devices have
is the sum of what each gives back, so that one device gives it whole and the others nothing. Both sums
are exact here, whether JAX makes them or not.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from distattn._compat import vary, varying_axes
from distattn.axes import axes_size, own_part, typed_as_varying
from distattn.block import Scoring
from distattn.completion import (
    by_row,
    completed,
    gradients_of,
    row_cotangents,
    sink_gradient,
    sum_over,
)
from distattn.derivatives import refuse_second_derivative
from distattn.local import local_fold, local_gradients
from distattn.movement import Movement
from distattn.operands import Operands, letters_of, map_named, padded, with_repeated_heads
from distattn.placement import Axes
from distattn.ring import Ring, ring_fold, ring_gradients
from distattn.tiles import Machine
from distattn.totals import reproducible_sum
from distattn.ulysses import by_heads, rows_to_heads
from distattn.units import Units


@dataclasses.dataclass(frozen=True)
class Own:
    """All of a device's call that is not an array."""

    scoring: Scoring
    machine: Machine
    movement: Movement
    units: Units
    axes: Axes  # over which keys are sharded, in the order of the mesh
    query_sharded: bool
    bias_shared: bool = False  # the same on all devices, known from its type

    @property
    def ring(self) -> Ring | None:
        """The devices round which keys travel, if they do."""
        return Ring(self.movement.ring, self.movement.ring) if self.movement.ring else None


def reproducible_attention(own: Own, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """out [B, T, N, V] in query's dtype and lse f32[B, T, N], the same bits on any number of devices."""
    rows = operands.query.shape[1]
    bias, typed = operands.bias, typed_as_varying(own.axes)
    shared = typed and bias is not None and not varying_axes(bias) & set(own.axes)
    more = {"T": -rows % own.units.rows, "S": -operands.key.shape[1] % own.units.keys}
    moves = own.movement.gather_keys or own.movement.ring or own.movement.heads
    operands = padded(operands, more, dense=not moves)  # where keys move, they are for all of them
    axes = varying_axes(*jax.tree.leaves(operands), lax.axis_index(own.axes))
    operands = jax.tree.map(lambda x: vary(x, axes), operands)
    own = dataclasses.replace(own, bias_shared=shared)
    o = operands
    out, lse = _attention(own, o.query, o.key, o.value, o.bias, o.sinks, o.mask)
    return out[:, :rows], lse[:, :rows]


def _primal(own: Own, *fields: Any) -> tuple[jax.Array, jax.Array]:
    movement = own.movement
    own_rows = fields[-1].query_valid
    operands = at_work(Operands(*fields), movement)
    local = local_fold(own.scoring, own.machine, "blocked", own.units)
    state = ring_fold(local, operands, own.ring) if own.ring else local(operands)
    valid = own_rows if movement.scatter else operands.mask.query_valid
    return completed(state, movement, operands.sinks, valid, operands.query.dtype)


_attention: Any = jax.custom_vjp(_primal, nondiff_argnums=(0,))


def _forward(own: Own, *fields: Any) -> tuple[Any, ...]:
    out, lse = _primal(own, *fields)
    out, lse = checkpoint_name(out, "distattn_out"), checkpoint_name(lse, "distattn_lse")
    return (out, lse), (fields, out, lse)


def _backward(own: Own, residuals: tuple[Any, ...], cotangents: tuple[Any, ...]) -> tuple[Any, ...]:
    @refuse_second_derivative
    def run(residuals: tuple[Any, ...], cotangents: tuple[Any, ...]) -> tuple[Any, ...]:
        return _gradients(own, *residuals, *cotangents)

    return *run(residuals, cotangents), None


_attention.defvjp(_forward, _backward)


def _gradients(
    own: Own,
    fields: tuple[Any, ...],
    out: jax.Array,
    lse: jax.Array,
    d_out: jax.Array,
    d_lse: jax.Array,
) -> tuple[jax.Array | None, ...]:
    movement, operands = own.movement, Operands(*fields)
    kv_heads = operands.key.shape[2]
    if not own.query_sharded:
        d_out, d_lse = (_whole(x, own.axes) for x in (d_out, d_lse))
    d_out, d_sum = row_cotangents(out, lse, d_out, d_lse, reproducible=True)
    sums: dict[str, Any] = {}
    if operands.sinks is not None:
        d_sinks = sink_gradient(operands.sinks, lse, d_sum, reproducible=True)
        sums["sinks"] = sum_over(d_sinks, own.axes if own.query_sharded else ())
    rows = jnp.stack([lse, d_sum], axis=-1)
    if movement.scatter:
        d_out, rows = (
            lax.all_gather(x, movement.gather_rows, axis=1, tiled=True) for x in (d_out, rows)
        )
    elif movement.heads:
        d_out, rows = rows_to_heads([d_out, rows], movement.heads)
    there = at_work(operands, movement)
    times = there.key.shape[2] * axes_size(movement.heads) // kv_heads
    cotangents = by_row(rows, d_out)
    gradients = local_gradients(own.scoring, own.machine, "blocked", own.units, cotangents)
    found = ring_gradients(gradients, there, own.ring) if own.ring else gradients(there)
    query, key, value, bias = found
    sums["query"] = sum_over(query, movement.all_reduce, movement.scatter)
    sums["key"], sums["value"] = (sum_over(x, (), movement.gather_keys) for x in (key, value))
    if movement.heads and bias is not None:
        raise NotImplementedError(
            "the gradient of a bias under reproducible=True and a combine that shards heads is not "
            "built inside a shard_map; use 'ring' or 'gather_kv', or dot_product_attention outside"
        )
    if bias is not None:
        sums["bias"] = sum_over(bias, own.axes if own.bias_shared else ())
    once = {"sinks"} | ({"bias"} if own.bias_shared else set())
    if not own.query_sharded:
        once.add("query")
    first = lax.axis_index(own.axes) == 0
    found = gradients_of(sums, operands, movement.heads, times)
    given = {name: jnp.where(first, x, 0) if name in once else x for name, x in found.items()}
    return tuple(given.get(name) for name in ("query", "key", "value", "bias", "sinks"))


def _whole(x: jax.Array, axes: Axes) -> jax.Array:
    """The cotangent of a result that all devices have, from what came back on each."""
    if typed_as_varying(axes):
        axes = tuple(axis for axis in axes if axis in varying_axes(x))
    return reproducible_sum(x, (), axis_name=axes) if axes else x


def at_work(operands: Operands, movement: Movement) -> Operands:
    """The operands with rows, keys and heads as this device computes with them.

    Bias and dense mask come as `sharded_attention` says, and only their heads move.
    """
    heads = movement.heads
    local_rows = operands.query.shape[1]
    if heads:
        operands, _ = by_heads(with_repeated_heads(operands, axes_size(heads)), heads)

    def bring(name: str, x: jax.Array) -> jax.Array:
        letters = letters_of(name, x)
        if letters == "BNTS":
            return _dense_to_heads(x, heads, local_rows) if heads else x
        if letters == "N":
            return own_part(x, heads, 0) if heads else x
        moved = () if name in ("query", "key", "value") else heads
        over = movement.gather_rows if "T" in letters else movement.gather_keys
        for axes in (moved, over):
            x = lax.all_gather(x, axes, axis=1, tiled=True) if axes else x
        return x

    return map_named(bring, operands)


def _dense_to_heads(x: jax.Array, axes: Axes, local_rows: int) -> jax.Array:
    """[B|1, N|1, T|1, S|1] of this device's rows to all rows of its part of the heads."""
    has_rows = x.shape[2] > 1 or local_rows == 1  # or it is the same for all
    if x.shape[1] == 1:
        return lax.all_gather(x, axes, axis=2, tiled=True) if has_rows else x
    if has_rows:
        return lax.all_to_all(x, axes, split_axis=1, concat_axis=2, tiled=True)
    return own_part(x, axes, 1)
