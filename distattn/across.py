"""One call over a mesh: forward and backward, each one `shard_map`, with the `custom_vjp` outside both.

An array is sharded in one way *at rest*, as it comes and goes, and in another *at work*, while each device
computes; a `Movement` is the difference. Collectives stand in the two bodies at the end, and in what
brings query, key and value from rest to work.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from distattn._compat import vary, varying_axes
from distattn.call import Call
from distattn.collectives import all_reduce, all_sum, reduce_scatter
from distattn.local import fold_gradients, local_fold, refuse_second_derivative
from distattn.movement import Movement
from distattn.operands import Operands, letters_of, map_named, plain, with_repeated_heads
from distattn.placement import Axes
from distattn.ring import ring_fold, ring_gradients
from distattn.state import SoftmaxState, finalize, softmax_weights, state_dtype
from distattn.ulysses import by_heads, heads_to_rows


@functools.partial(jax.jit, static_argnums=0)
def attend(call: Call, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """out [B, T, N, V] in query's dtype and lse f32[B, T, N], of global operands."""
    query = operands.query
    axes = varying_axes(*jax.tree.leaves(operands))  # of a shard_map around, if there is one
    operands = jax.tree.map(lambda x: vary(x, axes), operands)
    if call.movement.heads:
        operands = plain(operands)  # what moves is one layer, as numbers
    if operands.key.shape[-2] > 1 or call.movement.heads:  # one head may lie on all devices
        operands = with_repeated_heads(operands, call.placement.size(call.head_axes))
    operands = _padded(call, operands)
    operands = call.place(operands, map_named(call.at_rest, operands))
    if call.implementation == "dense":
        out, lse = _forward(call, operands)
    else:
        out, lse = _attend(call, *_fields(operands))
    if operands.query.shape[1] != query.shape[1]:
        rows = query.shape[1]
        whole = [call.placement.spec("BTN."[: x.ndim], x.shape, rows=()) for x in (out, lse)]
        out, lse = (
            call.uncut(x[:, :rows], "BTN."[: x.ndim]) for x in call.place([out, lse], whole)
        )
    return _laid_out_as(query, out), _laid_out_as(query, lse)


def _padded(call: Call, operands: Operands) -> Operands:
    """T and S brought to multiples of the devices, with empty rows and empty slots."""
    mask, placement = operands.mask, call.placement
    rows, keys = operands.query.shape[1], operands.key.shape[-3]
    more = {
        "T": -rows % placement.size(placement.query),
        "S": -keys % placement.size(placement.key),
    }
    if not any(more.values()):
        return operands
    if more["S"] and mask.key_positions is None:
        mask = dataclasses.replace(mask, key_positions=jnp.arange(keys, dtype=jnp.int32)[None])
    if more["T"] and mask.query_valid is None:
        mask = dataclasses.replace(mask, query_valid=jnp.ones((1, rows), bool))

    def pad(name: str, x: jax.Array) -> jax.Array:
        letters = letters_of(name, x)
        if any(more.get(letter) for letter in letters):
            x = call.uncut(x, letters)  # and so its gradient, which is cut again
        sizes = {"T": rows, "S": keys}
        widths = [
            (0, more[letter] if size == sizes.get(letter) else 0) if letter in more else (0, 0)
            for letter, size in zip(letters, x.shape, strict=True)
        ]
        return jnp.pad(x, widths, constant_values=-1 if name == "key_positions" else 0)

    return map_named(pad, dataclasses.replace(operands, mask=mask))


def _laid_out_as(query: jax.Array, x: jax.Array) -> jax.Array:
    """x with the layout of the query, where layouts are types."""
    sharding = jax.typeof(query).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return x
    spec = [*sharding.spec, None, None, None, None][:3] + [None] * (x.ndim - 3)
    return jax.reshard(x, NamedSharding(sharding.mesh, PartitionSpec(*spec)))


def _fields(operands: Operands) -> tuple:
    return tuple(getattr(operands, field.name) for field in dataclasses.fields(operands))


def _attend_fields(call: Call, *fields):
    return _forward(call, Operands(*fields))


_attend: Any = jax.custom_vjp(_attend_fields, nondiff_argnums=(0,))


def _attend_forward(call, *fields):
    out, lse = _attend(call, *fields)
    # All that the backward pass needs beside the operands, by names for the policies of jax.checkpoint.
    out, lse = checkpoint_name(out, "distattn_out"), checkpoint_name(lse, "distattn_lse")
    return (out, lse), (fields, out, lse)


def _attend_backward(call, residuals, cotangents):
    fields, out, lse = residuals
    operands = Operands(*fields)
    backward = refuse_second_derivative(functools.partial(_backward, call))
    query, key, value, bias, sinks = backward((_fields(plain(operands)), out, lse), cotangents)
    if operands.key_scale is not None:
        key = value = None  # integers, or stored as if they were
    elif operands.layer is not None:
        key, value = (
            lax.dynamic_update_index_in_dim(jnp.zeros_like(whole), part, operands.layer, 0)
            for whole, part in ((operands.key, key), (operands.value, value))
        )
    return query, key, value, bias, sinks, None, None, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _forward(call: Call, operands: Operands) -> tuple[jax.Array, jax.Array]:
    batch, rows, heads, _ = operands.query.shape
    valid = operands.mask.query_valid
    out_like = jax.ShapeDtypeStruct((batch, rows, heads, operands.value.shape[-1]), jnp.float32)
    lse_like = jax.ShapeDtypeStruct((batch, rows, heads), jnp.float32)
    finished = call.row_axes + call.movement.scatter
    return call.run(
        functools.partial(_forward_body, call),
        (
            map_named(call.at_entry, operands),
            None if valid is None else call.placement.spec("BT", valid.shape, rows=finished),
        ),
        (call.result(out_like), call.result(lse_like)),
        operands,
        valid,
    )


def _backward(call: Call, residuals: tuple, cotangents: tuple) -> tuple:
    fields, out, lse = residuals
    operands = Operands(*fields)
    query, sinks = operands.query, operands.sinks
    d_out, d_lse = cotangents
    dtype = lse.dtype
    # A row that attends to nothing is a constant: whatever comes back for it goes nowhere.
    dead = lse == -jnp.inf
    d_sum = d_lse - (d_out.astype(dtype) * out.astype(dtype)).sum(axis=-1)
    d_sum = jnp.where(dead, 0.0, d_sum)
    d_out = jnp.where(dead[..., None], 0.0, d_out)
    d_sinks = None
    if sinks is not None:
        weights = softmax_weights(sinks.astype(dtype)[None, None], lse)
        d_sinks = (weights * d_sum).sum(axis=(0, 1)).astype(sinks.dtype)
    # Where the result's rows are scattered, what goes by rows travels in two messages: what has the
    # query's dtype, and what has the state's.
    joins = bool(call.movement.scatter)
    rows = jnp.stack([lse, d_sum], axis=-1)
    joined = d_out
    if joins:
        like_query = call.place(d_out, call.at_rest("query", query))
        joined = jnp.concatenate([query, like_query], axis=-1)
    without_query = dataclasses.replace(operands, query=None if joins else query)
    gradients = {"query": query, "key": operands.key, "value": operands.value}
    if operands.bias is not None:
        gradients["bias"] = operands.bias
    axes = {name: call.missing(name, x) for name, x in gradients.items()}
    keys = None if call.movement.heads else call.key_axes + call.movement.gather_keys
    specs = {name: call.at_work(name, x) for name, x in gradients.items()}
    specs["query"] = call.result(query)
    for name in ("key", "value"):
        specs[name] = call.placement.spec("BSK.", gradients[name].shape, keys=keys)
    result = call.run(
        functools.partial(_backward_body, call, axes),
        (
            map_named(call.at_entry, without_query),
            call.at_entry("query", joined),
            call.at_entry("query", rows),
        ),
        specs,
        without_query,
        joined,
        rows,
    )
    result = call.place(result, {name: call.at_rest(name, x) for name, x in gradients.items()})
    return result["query"], result["key"], result["value"], result.get("bias"), d_sinks


def _forward_body(call: Call, operands: Operands, valid: jax.Array | None):
    movement = call.movement
    if movement.heads:
        operands, _ = _by_heads(movement, operands)
    local = local_fold(call.scoring, call.machine, call.implementation)
    state = ring_fold(local, operands, call.ring) if call.ring else local(operands)
    if movement.all_reduce:
        state = all_reduce(state, movement.all_reduce, schedule=movement.schedule)
    if movement.scatter:
        state = reduce_scatter(state, movement.scatter)
    out, lse = finish(state, operands.sinks, valid, operands.query.dtype)
    return tuple(heads_to_rows([out, lse], movement.heads)) if movement.heads else (out, lse)


def _by_heads(
    movement: Movement, operands: Operands, *rows: jax.Array
) -> tuple[Operands, list[jax.Array]]:
    """`by_heads`, and keys and values gathered where the movement says so."""
    operands, moved = by_heads(operands, movement.heads, *rows)
    if movement.gather_keys:
        key, value = (
            lax.all_gather(x, movement.gather_keys, axis=1, tiled=True)
            for x in (operands.key, operands.value)
        )
        operands = dataclasses.replace(operands, key=key, value=value)
    return operands, moved


def finish(
    state: SoftmaxState, sinks: jax.Array | None, valid: jax.Array | None, dtype: jnp.dtype
) -> tuple[jax.Array, jax.Array]:
    """out in the given dtype and lse, from the state over all keys; rows that are not valid are empty."""
    out, lse = finalize(state, sinks)
    if valid is not None:  # a sink gives no log-sum-exp to a row that is not there
        out = jnp.where(valid[..., None, None], out, 0.0)
        lse = jnp.where(valid[..., None], lse, -jnp.inf)
    return out.astype(dtype), lse


def _backward_body(call: Call, axes: dict[str, Axes], operands: Operands, d_out, rows):
    movement = call.movement
    if movement.scatter:
        query, d_out = jnp.split(d_out, [operands.key.shape[-1]], axis=-1)
        operands = dataclasses.replace(operands, query=query)
    if movement.heads:
        operands, (d_out, rows) = _by_heads(movement, operands, d_out, rows)
    query, key, value = operands.query, operands.key, operands.value
    dtype = state_dtype(query, key, value)
    cotangents = {
        "reference": rows[..., 0],
        "d_sum": rows[..., 1],
        "d_weighted_sum": d_out.astype(dtype),
    }
    if call.ring:
        d_query, d_key, d_value, d_bias = ring_gradients(
            operands, call.scoring, call.machine, call.ring, **cotangents
        )
    else:
        key_dtype = dtype if axes["key"] else None
        d_query, d_key, d_value, d_bias = fold_gradients(
            operands, call.scoring, call.machine, **cotangents, key_dtype=key_dtype
        )
    result = {
        "query": _summed(d_query, axes["query"], movement.scatter).astype(query.dtype),
        "key": _summed(d_key, axes["key"], movement.gather_keys).astype(key.dtype),
        "value": _summed(d_value, axes["value"], movement.gather_keys).astype(value.dtype),
    }
    if movement.heads:
        names = ("query", "key", "value")
        moved = heads_to_rows([result[name] for name in names], movement.heads)
        result = dict(zip(names, moved, strict=True))
    if operands.bias is not None:
        result["bias"] = _summed(d_bias, axes["bias"], ()).astype(operands.bias.dtype)
    return result


def _summed(x: jax.Array, axes: Axes, scatter: Axes) -> jax.Array:
    """The sum over the axes; along dimension 1, each device's part only, for those to scatter over."""
    if scatter:
        x = lax.psum_scatter(x, scatter, scatter_dimension=1, tiled=True)
    rest = tuple(axis for axis in axes if axis not in scatter)
    return all_sum(x, rest) if rest else x
