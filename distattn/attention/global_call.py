"""All of a call over a mesh that is not an array, and how its arrays are sharded, at rest and at work.

One call over a mesh: forward and backward, each one `shard_map`, with the `custom_vjp` outside both.

Query, key and value enter the devices' program as they lie at rest, and all collectives of a call are in
`work`. Left to the compiler is what lies otherwise than that: bias, mask, positions and segments that come
in another way than the work needs them, lengths that the devices do not divide, T or S over several axes
of which the first are gathered and the last stay, and a whole result where rows are cut for the work.
"""

import dataclasses
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from distattn._compat import vary, varying_axes
from distattn.attention.device_step import Work, numbers, row_cotangents, sink_gradient
from distattn.attention.sharding import Placement
from distattn.attention.strategy import Movement, StrategyLike, choose_movement
from distattn.collectives.mesh import axes_of, manual, on_devices_of, place
from distattn.local.block import LogitConfig
from distattn.local.dispatch import refuse_second_derivative
from distattn.local.inputs import (
    AttentionInputs,
    letters_of,
    map_named,
    padded,
    plain,
    with_repeated_heads,
)
from distattn.local.reproducible import ReproducibleBlocks
from distattn.local.tiling import Machine
from distattn.planning.plan import Axes


@dataclasses.dataclass(frozen=True)
class Call:
    """All of a call that is not an array."""

    work: Work
    placement: Placement

    @property
    def movement(self) -> Movement:
        """What moves between devices."""
        return self.work.movement

    @property
    def row_axes(self) -> Axes:
        """The axes of T at work."""
        moved = self.movement.gather_rows + self.movement.heads
        return tuple(axis for axis in self.placement.query if axis not in moved)

    @property
    def head_axes(self) -> Axes:
        """The axes of N and K at work."""
        return self.placement.heads + self.movement.heads

    def at_rest(self, name: str, x: jax.Array) -> PartitionSpec:
        """How an operand is sharded as it comes and goes: bias and masks come as work needs them."""
        if name not in ("query", "key", "value", "sinks"):
            return self.at_work(name, x)
        moved = self.movement
        gather_rows, gather_keys = moved.gathers
        return self.placement.spec(
            letters_of(name, x),
            x.shape,
            rows=self.row_axes + gather_rows + moved.heads,
            keys=self.work.key_axes + gather_keys + moved.heads,
        )

    def at_work(self, name: str, x: jax.Array) -> PartitionSpec:
        """How an operand is sharded while each device computes."""
        # Of a bias or a dense mask each hop of a ring takes its columns.
        whole = self.movement.ring and name in ("bias", "dense")
        return self.placement.spec(
            letters_of(name, x),
            x.shape,
            rows=self.row_axes,
            keys=() if whole else self.work.key_axes,
            heads=self.head_axes,
        )

    def result(self, x: jax.Array) -> PartitionSpec:
        """How an array [B, T, N, V], or without its last dimensions, is sharded with the result's rows."""
        rows = self.row_axes + self.movement.scatter + self.movement.heads
        return self.placement.spec("BTN."[: x.ndim], x.shape, rows=rows)

    def missing(self, name: str, x: jax.Array) -> Axes:
        """The axes of the work that do not shard this operand: its gradient is a sum over them."""
        spec = self.at_work(name, x)
        used = {axis for dimension in range(x.ndim) for axis in axes_of(spec, dimension)}
        if name in ("query", "key", "value"):
            used |= set(self.movement.heads)  # heads that do not divide are repeated
        work = (*self.placement.batch, *self.head_axes, *self.row_axes, *self.work.key_axes)
        return tuple(axis for axis in dict.fromkeys(work) if axis not in used)

    def whole(self, letters: str) -> "Call":
        """The same, with these dimensions whole at rest."""
        movement = dataclasses.replace(self.movement, whole=letters)
        return dataclasses.replace(self, work=dataclasses.replace(self.work, movement=movement))

    def run(
        self, body: Callable[..., Any], in_specs: tuple[Any, ...], out_specs: Any, *arguments: Any
    ) -> Any:
        """body(*arguments), by every device on its shards; plainly where there is no mesh."""
        if self.placement.mesh is None:
            return body(*arguments)
        mapped = manual(
            body,
            mesh=self.placement.mesh,
            in_specs=in_specs,
            out_specs=out_specs,
            axis_names=self.placement.manual,
        )
        # A shard_map that tracks no types forgets over which axes of one around it its values vary.
        axes = varying_axes(*jax.tree.leaves(arguments))
        with self._on_devices():
            results = mapped(*arguments)
        return jax.tree.map(lambda x: vary(x, axes), results)

    def _on_devices(self) -> AbstractContextManager[None]:
        """Tells a kernel that writes to other devices' memory which devices these are."""
        mesh = self.placement.mesh
        needed = self.movement.schedule == "fused" and isinstance(mesh, Mesh)
        return on_devices_of(mesh) if needed else nullcontext()

    def uncut(self, x: jax.Array, letters: str) -> jax.Array:
        """x with T and S not sharded, as the compiler is told where it decides.

        Left alone, it may cut a length that the devices do not divide in ways that JAX has no name for.
        """
        mesh = self.placement.mesh
        if mesh is None or AxisType.Auto not in mesh.axis_types:
            return x
        spec = self.placement.spec(letters, x.shape, rows=(), keys=())
        if self.placement.compiler_sharded:
            free = PartitionSpec.UNCONSTRAINED
            spec = PartitionSpec(*(None if letter in "TS" else free for letter in letters))
        context = jax.sharding.get_abstract_mesh()
        mesh = context if context.manual_axes else mesh
        return lax.with_sharding_constraint(x, NamedSharding(mesh, spec))

    def place(self, x: Any, specs: Any) -> Any:
        """x laid out by the specs where layouts are types, that is, over Explicit axes."""
        if self.placement.mesh is None:
            return x
        return place(x, specs, mesh=self.placement.mesh, axis_names=self.placement.manual)


def choose_call(
    inputs: AttentionInputs,
    placement: Placement,
    logit_config: LogitConfig,
    implementation: str,
    strategy: StrategyLike,
    reproducible_blocks: ReproducibleBlocks | None,
) -> Call:
    """The call whose devices exchange as `choose_movement` says, which raises what it raises."""
    placement, movement = choose_movement(placement, inputs, strategy, reproducible_blocks)
    work = Work(
        logit_config,
        Machine(placement.platform, placement.compiler_sharded),
        implementation,
        movement,
        movement.keys_at_work(placement.key),
        reproducible_blocks,
    )
    return Call(work, placement)


@functools.partial(jax.jit, static_argnums=0)
def attend(call: Call, inputs: AttentionInputs) -> tuple[jax.Array, jax.Array]:
    """out [B, T, N, V] in query's dtype and lse f32[B, T, N], of global inputs."""
    query = inputs.query
    axes = varying_axes(*jax.tree.leaves(inputs))  # of a shard_map around, if there is one
    inputs = jax.tree.map(lambda x: vary(x, axes), inputs)
    if call.movement.heads:
        inputs = plain(inputs)  # what moves is one layer, as numbers
    if inputs.key.shape[-2] > 1:  # one head may lie on all devices
        inputs = _for_head_shards(call, inputs)
    call, inputs = _in_whole_blocks(call, inputs)
    if call.placement.size(call.row_axes + call.work.key_axes) > 1:
        inputs = dataclasses.replace(inputs, mask=inputs.mask.apart())
    inputs = call.place(inputs, map_named(call.at_rest, inputs))
    if call.work.implementation == "dense":
        out, lse = _forward(call, inputs)
    else:
        out, lse = _attend(call, *_fields(inputs))
    if "T" in call.movement.whole:
        whole = [call.placement.spec("BTN."[: x.ndim], x.shape, rows=()) for x in (out, lse)]
        out, lse = (
            call.uncut(x[:, : query.shape[1]], "BTN."[: x.ndim])
            for x in call.place([out, lse], whole)
        )
    return _laid_out_as(query, out), _laid_out_as(query, lse)


def _for_head_shards(call: Call, inputs: AttentionInputs) -> AttentionInputs:
    """Key/value heads repeated where the devices that shard heads do not divide them."""
    repeated = with_repeated_heads(inputs, call.placement.size(call.placement.heads))
    if call.work.reproducible_blocks is not None and repeated is not inputs:
        raise NotImplementedError(
            f"reproducible=True with K={inputs.key.shape[-2]} key/value heads over the "
            f"{call.placement.size(call.placement.heads)} devices of {call.placement.heads} is not built: "
            "the devices must divide K; shard fewer heads, or pass reproducible=False"
        )
    return repeated


def _in_whole_blocks(call: Call, inputs: AttentionInputs) -> tuple[Call, AttentionInputs]:
    """T and S brought to multiples of the devices and their blocks, with empty rows and empty slots."""
    placement, reproducible_blocks = call.placement, call.work.reproducible_blocks
    row_block, key_block = (
        (1, 1)
        if reproducible_blocks is None
        else (reproducible_blocks.rows, reproducible_blocks.keys)
    )
    more = {
        "T": -inputs.query.shape[1] % (placement.size(placement.query) * row_block),
        "S": -inputs.key.shape[-3] % (placement.size(placement.key) * key_block),
    }

    def uncut(name: str, x: jax.Array) -> jax.Array:  # and so its gradient, which is cut again
        letters = letters_of(name, x)
        return call.uncut(x, letters) if any(more.get(letter) for letter in letters) else x

    whole = [letter for letter in more if more[letter] or letter in call.movement.whole]
    return call.whole("".join(whole)), padded(map_named(uncut, inputs), more)


def _laid_out_as(query: jax.Array, x: jax.Array) -> jax.Array:
    """x with the layout of the query, where layouts are types."""
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
    # All that the backward pass needs beside the inputs, by names for the policies of jax.checkpoint.
    out, lse = checkpoint_name(out, "distattn_out"), checkpoint_name(lse, "distattn_lse")
    return (out, lse), (fields, out, lse)


def _attend_backward(
    call: Call, residuals: tuple[Any, ...], cotangents: tuple[Any, ...]
) -> tuple[Any, ...]:
    fields, out, lse = residuals
    inputs = AttentionInputs(*fields)
    backward = refuse_second_derivative(functools.partial(_backward, call))
    query, key, value, bias, sinks = backward((_fields(plain(inputs)), out, lse), cotangents)
    if inputs.key_scale is not None:
        key = value = None  # integers, or stored as if they were
    elif inputs.layer is not None:
        key, value = (
            lax.dynamic_update_index_in_dim(jnp.zeros_like(whole), part, inputs.layer, 0)
            for whole, part in ((inputs.key, key), (inputs.value, value))
        )
    return query, key, value, bias, sinks, None, None, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def _forward(call: Call, inputs: AttentionInputs) -> tuple[jax.Array, jax.Array]:
    batch, rows, heads, _ = inputs.query.shape
    out_like = jax.ShapeDtypeStruct((batch, rows, heads, inputs.value.shape[-1]), jnp.float32)
    lse_like = jax.ShapeDtypeStruct((batch, rows, heads), jnp.float32)
    return call.run(
        call.work.result,
        (map_named(call.at_rest, inputs),),
        (call.result(out_like), call.result(lse_like)),
        inputs,
    )


def _backward(
    call: Call, residuals: tuple[Any, ...], cotangents: tuple[Any, ...]
) -> tuple[Any, ...]:
    fields, out, lse = residuals
    inputs = AttentionInputs(*fields)
    query, sinks = inputs.query, inputs.sinks
    d_out, d_lse = cotangents
    exact = call.work.reproducible_blocks is not None
    d_out, d_sum = row_cotangents(out, lse, d_out, d_lse, reproducible=exact)
    d_sinks = None
    if sinks is not None:
        d_sinks = numbers(sink_gradient(sinks, lse, d_sum, reproducible=exact)).astype(sinks.dtype)
    rows = jnp.stack([lse, d_sum], axis=-1)
    gradients = {"query": query, "key": inputs.key, "value": inputs.value}
    if inputs.bias is not None:
        gradients["bias"] = inputs.bias
    axes = {name: call.missing(name, x) for name, x in gradients.items()}
    specs = {name: call.at_rest(name, x) for name, x in gradients.items()}
    specs["query"] = call.result(query)
    keys = call.work.key_axes + call.movement.gather_keys + call.movement.heads
    for name in ("key", "value"):
        specs[name] = call.placement.spec("BSK.", gradients[name].shape, keys=keys)
    # What goes by rows comes with the query where its rows are those that the result has scattered.
    by_rows = functools.partial(call.at_rest, "query") if call.movement.scatter else call.result
    result = call.run(
        functools.partial(call.work.gradients, axes=axes),
        (map_named(call.at_rest, inputs), by_rows(d_out), by_rows(rows)),
        specs,
        inputs,
        d_out,
        rows,
    )
    result = call.place(result, {name: call.at_rest(name, x) for name, x in gradients.items()})
    return result["query"], result["key"], result["value"], result.get("bias"), d_sinks
