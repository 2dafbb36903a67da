"""One call over a mesh: forward and backward, each one `shard_map`, with the `custom_vjp` outside both.

Query, key and value enter the devices' program in their outer sharding, and all collectives are in
`device_step`. The compiler moves the rest: bias, mask, positions and segments that come in another sharding
than the inner one, lengths that the devices do not divide, T or S over several axes of which the first are
gathered and the last stay, and a whole result whose rows are sharded inside.
"""

import dataclasses
import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from distattn._compat import vary, varying_axes
from distattn.algebra.mergeable import to_array
from distattn.attention import device_step
from distattn.attention.strategy import Call
from distattn.collectives.mesh import axes_of, on_devices_of, on_shards, place
from distattn.local.dispatch import refuse_second_derivative
from distattn.local.inputs import (
    AttentionInputs,
    dequantised,
    letters_of,
    map_named,
    padded,
    with_repeated_heads,
)
from distattn.planning.plan import Axes


def outer_spec(call: Call, name: str, x: jax.Array) -> PartitionSpec:
    """Return how an input is sharded as it comes and goes; bias and masks come in the inner sharding."""
    if name not in ("query", "key", "value", "sinks"):
        return inner_spec(call, name, x)
    strategy = call.strategy
    gather_rows, gather_keys = strategy.gathers
    return call.placement.spec(
        letters_of(name, x),
        x.shape,
        rows=call.row_axes + gather_rows + strategy.heads,
        keys=call.key_axes + gather_keys + strategy.heads,
    )


def inner_spec(call: Call, name: str, x: jax.Array) -> PartitionSpec:
    """Return how an input is sharded while each device computes."""
    # Each hop of a ring takes its columns of a bias or a dense mask.
    whole = call.strategy.ring and name in ("bias", "dense")
    return call.placement.spec(
        letters_of(name, x),
        x.shape,
        rows=call.row_axes,
        keys=() if whole else call.key_axes,
        heads=call.placement.heads + call.strategy.heads,
    )


def result_spec(call: Call, x: Any) -> PartitionSpec:
    """Return how [B, T, N, V], or the same without last dimensions, is sharded with the result's rows."""
    rows = call.row_axes + call.strategy.scatter + call.strategy.heads
    return call.placement.spec("BTN."[: x.ndim], x.shape, rows=rows)


def summed_axes(call: Call, name: str, x: jax.Array) -> Axes:
    """Return the inner axes that do not shard this input: its gradient is a sum over them."""
    heads = call.strategy.heads
    spec = inner_spec(call, name, x)
    used = {axis for dimension in range(x.ndim) for axis in axes_of(spec, dimension)}
    if name in ("query", "key", "value"):
        used |= set(heads)  # heads that do not divide are repeated
    placement = call.placement
    inner = (*placement.batch, *placement.heads, *heads, *call.row_axes, *call.key_axes)
    return tuple(axis for axis in dict.fromkeys(inner) if axis not in used)


def on_devices(
    call: Call, body: Callable[..., Any], in_specs: tuple[Any, ...], out_specs: Any, *arrays: Any
) -> Any:
    """Return body(*arrays), run by every device on its shards."""
    placement = call.placement
    mapped = on_shards(
        body,
        mesh=placement.mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        axis_names=placement.manual,
    )
    # A shard_map that tracks no types forgets over which axes of one around it its values vary.
    axes = varying_axes(*jax.tree.leaves(arrays))
    fused = call.strategy.schedule == "fused" and isinstance(placement.mesh, Mesh)
    with on_devices_of(placement.mesh) if fused else nullcontext():
        results = mapped(*arrays)
    return jax.tree.map(lambda x: vary(x, axes), results)


def unsharded_lengths(call: Call, x: jax.Array, letters: str) -> jax.Array:
    """Tell the compiler, over Auto axes, that T and S of x are not sharded.

    Otherwise it may shard a length that the devices do not divide in ways for which JAX has no name.
    """
    mesh = call.placement.mesh
    if mesh is None or AxisType.Auto not in mesh.axis_types:
        return x
    spec = call.placement.spec(letters, x.shape, rows=(), keys=())
    if call.placement.compiler_sharded:
        free = PartitionSpec.UNCONSTRAINED
        spec = PartitionSpec(*(None if letter in "TS" else free for letter in letters))
    context = jax.sharding.get_abstract_mesh()
    mesh = context if context.manual_axes else mesh
    return lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def place_outer(call: Call, x: Any, specs: Any) -> Any:
    """Return x resharded to the specs over Explicit axes."""
    return place(x, specs, mesh=call.placement.mesh, axis_names=call.placement.manual)


@functools.partial(jax.jit, static_argnums=0)
def attend(call: Call, inputs: AttentionInputs) -> tuple[jax.Array, jax.Array]:
    """Return out [B, T, N, V] in query's dtype and lse f32[B, T, N] of global inputs."""
    query = inputs.query
    axes = varying_axes(*jax.tree.leaves(inputs))  # if the call is inside a shard_map
    inputs = jax.tree.map(lambda x: vary(x, axes), inputs)
    if call.strategy.heads:
        inputs = dequantised(inputs)  # one layer moves, as numbers
    if inputs.key.shape[-2] > 1:  # one head may be stored on all devices
        inputs = _for_head_shards(call, inputs)
    call, inputs = _in_whole_blocks(call, inputs)
    if call.placement.size(call.row_axes + call.key_axes) > 1:
        inputs = dataclasses.replace(inputs, mask=inputs.mask.with_unaligned_starts())
    inputs = place_outer(call, inputs, map_named(functools.partial(outer_spec, call), inputs))
    if call.implementation == "dense":
        out, lse = _forward(call, inputs)
    else:
        out, lse = _attend(call, *_fields(inputs))
    if "T" in call.strategy.whole:
        whole = [call.placement.spec("BTN."[: x.ndim], x.shape, rows=()) for x in (out, lse)]
        out, lse = (
            unsharded_lengths(call, x[:, : query.shape[1]], "BTN."[: x.ndim])
            for x in place_outer(call, [out, lse], whole)
        )
    return _sharded_as(query, out), _sharded_as(query, lse)


def _for_head_shards(call: Call, inputs: AttentionInputs) -> AttentionInputs:
    """Repeat key/value heads if the devices that shard heads do not divide them."""
    placement = call.placement
    repeated = with_repeated_heads(inputs, placement.size(placement.heads))
    if call.reproducible_blocks and repeated is not inputs:
        raise NotImplementedError(
            f"reproducible=True with K={inputs.key.shape[-2]} key/value heads over the "
            f"{placement.size(placement.heads)} devices of {placement.heads} is not built: "
            "the devices must divide K; shard fewer heads, or pass reproducible=False"
        )
    return repeated


def _in_whole_blocks(call: Call, inputs: AttentionInputs) -> tuple[Call, AttentionInputs]:
    """Pad T and S to multiples of the devices and their blocks, with empty queries and empty slots."""
    placement, blocks = call.placement, call.reproducible_blocks
    row_block, key_block = (blocks.rows, blocks.keys) if blocks else (1, 1)
    more = {
        "T": -inputs.query.shape[1] % (placement.size(placement.query) * row_block),
        "S": -inputs.key.shape[-3] % (placement.size(placement.key) * key_block),
    }

    def constrain(name: str, x: jax.Array) -> jax.Array:  # and so its gradient, which is cut again
        letters = letters_of(name, x)
        grows = any(more.get(letter) for letter in letters)
        return unsharded_lengths(call, x, letters) if grows else x

    whole = [letter for letter in more if more[letter] or letter in call.strategy.whole]
    strategy = dataclasses.replace(call.strategy, whole="".join(whole))
    call = dataclasses.replace(call, strategy=strategy)
    return call, padded(map_named(constrain, inputs), more)


def _sharded_as(query: jax.Array, x: jax.Array) -> jax.Array:
    """Return x with the sharding of query over Explicit axes."""
    sharding = jax.typeof(query).sharding
    if AxisType.Explicit not in sharding.mesh.axis_types:
        return x
    spec = [*sharding.spec, None, None, None, None][:3] + [None] * (x.ndim - 3)
    return jax.reshard(x, NamedSharding(sharding.mesh, PartitionSpec(*spec)))


def _fields(inputs: AttentionInputs) -> tuple[Any, ...]:
    return tuple(getattr(inputs, field.name) for field in dataclasses.fields(inputs))


def _attend_fields(call: Call, *fields: Any) -> tuple[jax.Array, jax.Array]:
    return _forward(call, AttentionInputs(*fields))


_attend: Any = jax.custom_vjp(_attend_fields, nondiff_argnums=(0,))


def _attend_forward(call: Call, *fields: Any) -> tuple[Any, ...]:
    out, lse = _attend(call, *fields)
    # Names for the policies of jax.checkpoint: with the inputs, all that the backward pass needs.
    out, lse = checkpoint_name(out, "distattn_out"), checkpoint_name(lse, "distattn_lse")
    return (out, lse), (fields, out, lse)


def _attend_backward(
    call: Call, residuals: tuple[Any, ...], cotangents: tuple[Any, ...]
) -> tuple[Any, ...]:
    fields, out, lse = residuals
    inputs = AttentionInputs(*fields)
    backward = refuse_second_derivative(functools.partial(_backward, call))
    found = backward((dequantised(inputs), out, lse), cotangents)
    if inputs.key_scale is not None:
        found |= {"key": None, "value": None}  # integers, or stored as if they were
    elif inputs.layer is not None:
        for name in ("key", "value"):
            layers = jnp.zeros_like(getattr(inputs, name))
            found[name] = lax.dynamic_update_index_in_dim(layers, found[name], inputs.layer, 0)
    return tuple(found.get(field.name) for field in dataclasses.fields(inputs))


_attend.defvjp(_attend_forward, _attend_backward)


def _forward(call: Call, inputs: AttentionInputs) -> tuple[jax.Array, jax.Array]:
    batch, rows, heads, _ = inputs.query.shape
    out = jax.ShapeDtypeStruct((batch, rows, heads, inputs.value.shape[-1]), jnp.float32)
    lse = jax.ShapeDtypeStruct((batch, rows, heads), jnp.float32)
    return on_devices(
        call,
        functools.partial(device_step.result, call),
        (map_named(functools.partial(outer_spec, call), inputs),),
        (result_spec(call, out), result_spec(call, lse)),
        inputs,
    )


def _backward(
    call: Call, residuals: tuple[AttentionInputs, jax.Array, jax.Array], cotangents: Any
) -> dict[str, Any]:
    """Return the gradients of query, key, value, and any bias and sinks, by name."""
    inputs, out, lse = residuals
    d_out, lse_and_dsum = device_step.row_cotangents(call, out, lse, *cotangents)
    arrays = {"query": inputs.query, "key": inputs.key, "value": inputs.value}
    if inputs.bias is not None:
        arrays["bias"] = inputs.bias
    axes = {name: summed_axes(call, name, x) for name, x in arrays.items()}
    outer = {name: outer_spec(call, name, x) for name, x in arrays.items()}
    keys = call.key_axes + call.strategy.gather_keys + call.strategy.heads
    keys = {x: call.placement.spec("BSK.", arrays[x].shape, keys=keys) for x in ("key", "value")}
    # Rows come with the query if its rows are those that the result has scattered.
    by_rows = functools.partial(outer_spec, call, "query")
    by_rows = by_rows if call.strategy.scatter else functools.partial(result_spec, call)
    result = on_devices(
        call,
        functools.partial(device_step.gradients, call, axes=axes),
        (
            map_named(functools.partial(outer_spec, call), inputs),
            by_rows(d_out),
            by_rows(lse_and_dsum),
        ),
        outer | {"query": result_spec(call, inputs.query)} | keys,
        inputs,
        d_out,
        lse_and_dsum,
    )
    result = place_outer(call, result, outer)
    if inputs.sinks is not None:
        d_sinks = device_step.sink_gradient(call, inputs.sinks, lse_and_dsum)
        result["sinks"] = to_array(d_sinks).astype(inputs.sinks.dtype)
    return result
