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
from distattn.axes import axes_size
from distattn.call import Call
from distattn.completion import (
    by_row,
    completed,
    goes_in_one_launch,
    gradients_of,
    numbers,
    one_launch,
    row_cotangents,
    sink_gradient,
    sum_over,
)
from distattn.derivatives import refuse_second_derivative
from distattn.local import local_fold, local_gradients
from distattn.movement import Movement
from distattn.operands import (
    Operands,
    letters_of,
    map_named,
    padded,
    plain,
    with_repeated_heads,
)
from distattn.placement import Axes
from distattn.ring import ring_fold, ring_gradients
from distattn.ulysses import by_heads


@functools.partial(jax.jit, static_argnums=0)
def attend(call: Call, operands: Operands) -> tuple[jax.Array, jax.Array]:
    """out [B, T, N, V] in query's dtype and lse f32[B, T, N], of global operands."""
    query = operands.query
    axes = varying_axes(*jax.tree.leaves(operands))  # of a shard_map around, if there is one
    operands = jax.tree.map(lambda x: vary(x, axes), operands)
    if call.movement.heads:
        operands = plain(operands)  # what moves is one layer, as numbers
    if operands.key.shape[-2] > 1:  # one head may lie on all devices
        operands = _for_head_shards(call, operands)
    operands = _in_whole_blocks(call, operands)
    if call.placement.size(call.row_axes + call.key_axes) > 1:
        operands = dataclasses.replace(operands, mask=operands.mask.apart())
    operands = call.place(operands, map_named(call.at_rest, operands))
    if call.implementation == "dense":
        out, lse = _forward(call, operands)
    else:
        out, lse = _attend(call, *_fields(operands))
    rows = query.shape[1]
    if operands.query.shape[1] != rows or call.movement.cuts_rows:
        whole = [call.placement.spec("BTN."[: x.ndim], x.shape, rows=()) for x in (out, lse)]
        out, lse = (
            call.uncut(x[:, :rows], "BTN."[: x.ndim]) for x in call.place([out, lse], whole)
        )
    return _laid_out_as(query, out), _laid_out_as(query, lse)


def _for_head_shards(call: Call, operands: Operands) -> Operands:
    """Key/value heads repeated where the devices that shard heads do not divide them."""
    repeated = with_repeated_heads(operands, call.placement.size(call.placement.heads))
    if call.units is not None and repeated is not operands:
        raise NotImplementedError(
            f"reproducible=True with K={operands.key.shape[-2]} key/value heads over the "
            f"{call.placement.size(call.placement.heads)} devices of {call.placement.heads} is not built: "
            "the devices must divide K; shard fewer heads, or pass reproducible=False"
        )
    return repeated


def _in_whole_blocks(call: Call, operands: Operands) -> Operands:
    """T and S brought to multiples of the devices and their blocks, with empty rows and empty slots."""
    placement, units = call.placement, call.units
    row_block, key_block = (1, 1) if units is None else (units.rows, units.keys)
    more = {
        "T": -operands.query.shape[1] % (placement.size(placement.query) * row_block),
        "S": -operands.key.shape[-3] % (placement.size(placement.key) * key_block),
    }

    def uncut(name: str, x: jax.Array) -> jax.Array:  # and so its gradient, which is cut again
        letters = letters_of(name, x)
        return call.uncut(x, letters) if any(more.get(letter) for letter in letters) else x

    return padded(map_named(uncut, operands), more)


def _laid_out_as(query: jax.Array, x: jax.Array) -> jax.Array:
    """x with the layout of the query, where layouts are types."""
    sharding = jax.typeof(query).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return x
    spec = [*sharding.spec, None, None, None, None][:3] + [None] * (x.ndim - 3)
    return jax.reshard(x, NamedSharding(sharding.mesh, PartitionSpec(*spec)))


def _fields(operands: Operands) -> tuple[Any, ...]:
    return tuple(getattr(operands, field.name) for field in dataclasses.fields(operands))


def _attend_fields(call: Call, *fields: Any) -> tuple[jax.Array, jax.Array]:
    return _forward(call, Operands(*fields))


_attend: Any = jax.custom_vjp(_attend_fields, nondiff_argnums=(0,))


def _attend_forward(call: Call, *fields: Any) -> tuple[Any, ...]:
    out, lse = _attend(call, *fields)
    # All that the backward pass needs beside the operands, by names for the policies of jax.checkpoint.
    out, lse = checkpoint_name(out, "distattn_out"), checkpoint_name(lse, "distattn_lse")
    return (out, lse), (fields, out, lse)


def _attend_backward(
    call: Call, residuals: tuple[Any, ...], cotangents: tuple[Any, ...]
) -> tuple[Any, ...]:
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


def _backward(
    call: Call, residuals: tuple[Any, ...], cotangents: tuple[Any, ...]
) -> tuple[Any, ...]:
    fields, out, lse = residuals
    operands = Operands(*fields)
    query, sinks = operands.query, operands.sinks
    d_out, d_lse = cotangents
    exact = call.units is not None
    d_out, d_sum = row_cotangents(out, lse, d_out, d_lse, reproducible=exact)
    d_sinks = None
    if sinks is not None:
        d_sinks = numbers(sink_gradient(sinks, lse, d_sum, reproducible=exact)).astype(sinks.dtype)
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


def _forward_body(
    call: Call, operands: Operands, valid: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    movement = call.movement
    if movement.heads:
        operands, _ = _by_heads(movement, operands)
    local = local_fold(call.scoring, call.machine, call.implementation, call.units)
    given = call.scoring, call.machine
    if call.units is None and goes_in_one_launch(operands, movement, *given, call.implementation):
        return one_launch(operands, movement, *given, valid)
    state = ring_fold(local, operands, call.ring) if call.ring else local(operands)
    return completed(state, movement, operands.sinks, valid, operands.query.dtype)


def _by_heads(
    movement: Movement, operands: Operands, *rows: jax.Array
) -> tuple[Operands, list[jax.Array]]:
    """`by_heads`, of heads that divide, and keys and values gathered where the movement says so."""
    operands = with_repeated_heads(operands, axes_size(movement.heads))
    operands, moved = by_heads(operands, movement.heads, *rows)
    if movement.gather_keys:
        key, value = (
            lax.all_gather(x, movement.gather_keys, axis=1, tiled=True)
            for x in (operands.key, operands.value)
        )
        operands = dataclasses.replace(operands, key=key, value=value)
    return operands, moved


def _backward_body(
    call: Call, axes: dict[str, Axes], operands: Operands, d_out: jax.Array, rows: jax.Array
) -> dict[str, jax.Array]:
    movement = call.movement
    if movement.scatter:
        query, d_out = jnp.split(d_out, [operands.key.shape[-1]], axis=-1)
        operands = dataclasses.replace(operands, query=query)
    kv_heads = operands.key.shape[2]
    if movement.heads:
        operands, (d_out, rows) = _by_heads(movement, operands, d_out, rows)
    times = operands.key.shape[2] * axes_size(movement.heads) // kv_heads if movement.heads else 1
    keys_sum = call.ring or axes["key"] or times > 1
    gradients = local_gradients(
        call.scoring,
        call.machine,
        call.implementation,
        call.units,
        by_row(rows, d_out),
        key_dtype=rows.dtype if keys_sum else None,
    )
    found = ring_gradients(gradients, operands, call.ring) if call.ring else gradients(operands)
    names = ("query", "key", "value", "bias")
    scatter = (movement.scatter, movement.gather_keys, movement.gather_keys, ())
    sums = {
        name: sum_over(x, axes[name], over)
        for name, x, over in zip(names, found, scatter, strict=True)
        if x is not None
    }
    return gradients_of(sums, operands, movement.heads, times)
