"""What one device does inside somebody's `shard_map`: masks brought to work, and reproducible attention.

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
from distattn.axes import gathered, own_part, typed_as_varying
from distattn.completion import numbers, row_cotangents, sink_gradient, sum_over
from distattn.derivatives import refuse_second_derivative
from distattn.movement import Movement
from distattn.operands import Operands, letters_of, map_named, padded
from distattn.placement import Axes
from distattn.totals import reproducible_sum
from distattn.work import Work


@dataclasses.dataclass(frozen=True)
class Own:
    """All of a device's reproducible call that is not an array."""

    work: Work
    axes: Axes  # over which keys are sharded, in the order of the mesh
    query_sharded: bool
    bias_shared: bool = False  # the same on all devices, known from its type


def reproducible_attention(own: Own, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """out [B, T, N, V] in query's dtype and lse f32[B, T, N], the same bits on any number of devices."""
    rows = operands.query.shape[1]
    bias, typed = operands.bias, typed_as_varying(own.axes)
    shared = typed and bias is not None and not varying_axes(bias) & set(own.axes)
    units, movement = own.work.units, own.work.movement
    more = {"T": -rows % units.rows, "S": -operands.key.shape[1] % units.keys}
    moves = movement.gather_keys or movement.ring or movement.heads
    operands = padded(operands, more, dense=not moves)  # where keys move, they are for all of them
    axes = varying_axes(*jax.tree.leaves(operands), lax.axis_index(own.axes))
    operands = jax.tree.map(lambda x: vary(x, axes), operands)
    own = dataclasses.replace(own, bias_shared=shared)
    o = operands
    out, lse = _attention(own, o.query, o.key, o.value, o.bias, o.sinks, o.mask)
    return out[:, :rows], lse[:, :rows]


def _primal(own: Own, *fields: Any) -> tuple[jax.Array, jax.Array]:
    return own.work.result(masks_at_work(Operands(*fields), own.work.movement))


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
    movement, operands = own.work.movement, Operands(*fields)
    if movement.heads and operands.bias is not None:
        raise NotImplementedError(
            "the gradient of a bias under reproducible=True and a combine that shards heads is not "
            "built inside a shard_map; use 'ring' or 'gather_kv', or dot_product_attention outside"
        )
    if not own.query_sharded:
        d_out, d_lse = (_whole(x, own.axes) for x in (d_out, d_lse))
    d_out, d_sum = row_cotangents(out, lse, d_out, d_lse, reproducible=True)
    shared = own.axes if own.bias_shared else ()
    found = own.work.gradients(
        masks_at_work(operands, movement),
        d_out,
        jnp.stack([lse, d_sum], axis=-1),
        {"query": movement.all_reduce, "key": (), "value": (), "bias": shared},
    )
    if operands.sinks is not None:
        d_sinks = sink_gradient(operands.sinks, lse, d_sum, reproducible=True)
        d_sinks = sum_over(d_sinks, own.axes if own.query_sharded else ())
        found["sinks"] = numbers(d_sinks).astype(operands.sinks.dtype)
    once = {"sinks"} | ({"bias"} if own.bias_shared else set())
    if not own.query_sharded:
        once.add("query")
    first = lax.axis_index(own.axes) == 0
    given = {name: jnp.where(first, x, 0) if name in once else x for name, x in found.items()}
    return tuple(given.get(name) for name in ("query", "key", "value", "bias", "sinks"))


def _whole(x: jax.Array, axes: Axes) -> jax.Array:
    """The cotangent of a result that all devices have, from what came back on each."""
    if typed_as_varying(axes):
        axes = tuple(axis for axis in axes if axis in varying_axes(x))
    return reproducible_sum(x, (), axis_name=axes) if axes else x


def masks_at_work(operands: Operands, movement: Movement) -> Operands:
    """The operands with bias and mask for the rows, keys and heads with which this device computes.

    They come for those that it has. Bias and dense mask come as `sharded_attention` says, and only their
    heads move.
    """
    heads, local_rows = movement.heads, operands.query.shape[1]

    def bring(name: str, x: jax.Array) -> jax.Array:
        letters = letters_of(name, x)
        if name in ("query", "key", "value", "sinks"):
            return x
        if letters == "BNTS":
            return _dense_to_heads(x, heads, local_rows) if heads else x
        over = movement.gather_rows if "T" in letters else movement.gather_keys
        return gathered(gathered(x, heads), over)

    return map_named(bring, operands)


def _dense_to_heads(x: jax.Array, axes: Axes, local_rows: int) -> jax.Array:
    """[B|1, N|1, T|1, S|1] of this device's rows to all rows of its part of the heads."""
    has_rows = x.shape[2] > 1 or local_rows == 1  # or it is the same for all
    if x.shape[1] == 1:
        return gathered(x, axes, 2) if has_rows else x
    if has_rows:
        return lax.all_to_all(x, axes, split_axis=1, concat_axis=2, tiled=True)
    return own_part(x, axes, 1)
