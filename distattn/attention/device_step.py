"""From states and partial gradients of one device to results: for the global call and the inside form.

Everything here is what one device does, inside `shard_map` or alone.

What one device computes of a call, collectives included: for the global call and for the inside form.

An array is sharded in one way *at rest*, as it comes and goes, and in another *at work*, while each device
computes; a `Movement` is the difference. Query, key, value and sinks come as they rest, and `at_work`
brings them; bias and mask come as the work needs them.

What one device does inside somebody's `shard_map`: masks brought to work, and reproducible attention.

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
from distattn.algebra import deterministic_math, fixed_point
from distattn.algebra.fixed_point import FixedPoint, FixedPointState, limb_format
from distattn.algebra.mergeable import FIXED_POINT, State, Sum, monoid_of, rows_of
from distattn.algebra.softmax_state import softmax_weights
from distattn.attention.ring import Ring, ring_fold, ring_gradients, ring_state
from distattn.attention.strategy import Movement
from distattn.collectives.all_reduce import all_reduce, all_sum, chosen_schedule, sum_schedule
from distattn.collectives.all_to_all import heads_to_rows, rows_to_heads, together
from distattn.collectives.mesh import axes_size, gathered, mesh_order, own_part, typed_as_varying
from distattn.collectives.reduce_scatter import reduce_scatter
from distattn.collectives.reproducible_sum import reproducible_sum
from distattn.experimental.fused import hooks
from distattn.local.block import LogitConfig
from distattn.local.dispatch import local_fold, local_gradients, refuse_second_derivative
from distattn.local.inputs import (
    AttentionInputs,
    letters_of,
    map_named,
    padded,
    with_repeated_heads,
)
from distattn.local.reproducible import ReproducibleBlocks
from distattn.local.reproducible import softmax_weights as reproducible_weights
from distattn.local.tiling import Machine
from distattn.planning.plan import Axes
from distattn.planning.schedule import Schedule

LARGE_BYTES = 2**20  # of a state, from which on one more collective costs less than what it saves


def completed(
    state: State, movement: Movement, inputs: AttentionInputs
) -> tuple[jax.Array, jax.Array]:
    """out [B, T, N, V] in query's dtype and lse [B, T, N] of the rows that this device is to have.

    Args:
      state: over this device's keys, of the rows with which it has computed.
      movement: of the call.
      inputs: with which it has computed.
    """
    sinks, valid, dtype = inputs.sinks, inputs.mask.query_valid, inputs.query.dtype
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
        d_sum = d_lse - deterministic_math.ordered_sum(deterministic_math.prevent_fma(products), -1)
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
    scale = limb_format(lse.shape[0] * lse.shape[1])
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
    value = deterministic_math.fusion_barrier(fixed_point.value, x)
    return value.transpose(1, 3, 2, 0) if x.top.ndim == 3 else value[0]


def gradients_of(
    sums: dict[str, Sum], inputs: AttentionInputs, heads: Axes, times: int
) -> dict[str, jax.Array]:
    """Gradients as numbers, with the dtypes of the inputs and with rows where the inputs have them.

    Args:
      sums: by the name of the operand, of what the devices have given back.
      inputs: whose dtypes they take.
      heads: the axes over which heads were sharded in place of rows.
      times: how often key/value heads were repeated for that.
    """

    def number(name: str) -> jax.Array:
        return numbers(sums[name]).astype(getattr(inputs, name).dtype)

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
        return fixed_point.merge_axes(FixedPoint(top, tuple(words), x.limb_format), 2)
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


def at_work(
    inputs: AttentionInputs, movement: Movement, *rows: jax.Array
) -> tuple[AttentionInputs, list[jax.Array]]:
    """The inputs with rows, keys and heads as this device computes with them.

    Args:
      inputs: query, key, value and sinks as they rest, bias and mask as the work needs them.
      movement: of the call.
      rows: more arrays [B, T, N, .], which come as the result goes.
    """
    query, key, value, sinks = inputs.query, inputs.key, inputs.value, inputs.sinks
    moved = list(rows)
    if movement.heads:
        inputs = with_repeated_heads(inputs, axes_size(movement.heads))
        arrays = [query, inputs.key, inputs.value, *rows]
        query, key, value, *moved = rows_to_heads(arrays, movement.heads)
        sinks = None if sinks is None else own_part(sinks, movement.heads, 0)
    gather_rows, gather_keys = movement.gathers
    if gather_rows:  # of a result that is not scattered all devices have the rows
        scattered = moved if movement.scatter else []
        query, *scattered = together(lambda x: gathered(x, gather_rows), [query, *scattered])
        moved = scattered or moved
    # Keys and values apart: packed, they would be copied twice.
    key, value = (gathered(x, gather_keys) for x in (key, value))
    return dataclasses.replace(inputs, query=query, key=key, value=value, sinks=sinks), moved


@dataclasses.dataclass(frozen=True)
class Work:
    """All of a device's part in a call that is not an array."""

    logit_config: LogitConfig
    machine: Machine
    implementation: str
    movement: Movement
    key_axes: Axes  # of S at work, in the order of its shards
    reproducible_blocks: ReproducibleBlocks | None = None  # of a reproducible call

    @property
    def ring(self) -> Ring | None:
        """The devices round which keys travel, if they do."""
        return Ring(self.movement.ring, self.key_axes) if self.movement.ring else None

    def in_one_launch(self, inputs: AttentionInputs) -> bool:
        """Whether one kernel folds this device's keys, exchanges and divides, for inputs at work."""
        axes = mesh_order(self.movement.all_reduce)
        if (
            self.reproducible_blocks is not None
            or self.movement.schedule != "fused"
            or axes_size(axes) == 1
        ):
            return False
        return hooks.in_one_launch(
            inputs, self.logit_config, self.machine, self.implementation, axes
        )

    def launched(self, inputs: AttentionInputs) -> tuple[jax.Array, jax.Array]:
        """`result`, in one launch."""
        axes, valid = mesh_order(self.movement.all_reduce), inputs.mask.query_valid
        return hooks.attend(inputs, self.logit_config, self.machine, axes, valid)

    def differentiable_result(self, inputs: AttentionInputs) -> tuple[jax.Array, jax.Array]:
        """`result` of inputs at work, differentiated through the collectives; not reproducible."""
        state = ring_state(inputs, self.logit_config, self.machine, self.implementation, self.ring)
        return completed(state, self.movement, inputs)

    def result(self, inputs: AttentionInputs) -> tuple[jax.Array, jax.Array]:
        """out [B, T, N, V] in query's dtype and lse f32[B, T, N] of the rows that this device is to have.

        'dense' alone has a derivative.
        """
        inputs, _ = at_work(inputs, self.movement)
        if self.in_one_launch(inputs):
            return self.launched(inputs)
        local = local_fold(
            self.logit_config, self.machine, self.implementation, self.reproducible_blocks
        )
        return completed(ring_fold(local, inputs, self.ring), self.movement, inputs)

    def gradients(
        self, inputs: AttentionInputs, d_out: jax.Array, rows: jax.Array, axes: dict[str, Axes]
    ) -> dict[str, jax.Array]:
        """Those of query, key, value and, if there is one, bias, each as it rests, by name.

        Args:
          inputs: as in `result`.
          d_out: [B, T, N, V], as `row_cotangents` gives it, of the result's rows.
          rows: f32[B, T, N, 2], lse and d_sum.
          axes: by name, over which a gradient is summed, or scattered as the movement says.
        """
        movement = self.movement
        there, (d_out, rows) = at_work(inputs, movement, d_out, rows)
        kv_heads = there.key.shape[2] * axes_size(movement.heads)
        times = kv_heads // inputs.key.shape[2]  # that key/value heads were repeated
        keys_sum = movement.ring or axes["key"] or times > 1
        gradients = local_gradients(
            self.logit_config,
            self.machine,
            self.implementation,
            self.reproducible_blocks,
            by_row(rows, d_out),
            key_dtype=rows.dtype if keys_sum else None,
        )
        found = ring_gradients(gradients, there, self.ring)
        names = ("query", "key", "value", "bias")
        scatter = (movement.scatter, movement.gather_keys, movement.gather_keys, ())
        sums = {
            name: sum_over(x, axes[name], over)
            for name, x, over in zip(names, found, scatter, strict=True)
            if x is not None
        }
        return gradients_of(sums, inputs, movement.heads, times)


@dataclasses.dataclass(frozen=True)
class Own:
    """All of a device's reproducible call that is not an array."""

    work: Work
    axes: Axes  # over which keys are sharded, in the order of the mesh
    query_sharded: bool
    bias_shared: bool = False  # the same on all devices, known from its type


def reproducible_attention(own: Own, inputs: AttentionInputs) -> tuple[jax.Array, jax.Array]:
    """out [B, T, N, V] in query's dtype and lse f32[B, T, N], the same bits on any number of devices."""
    rows = inputs.query.shape[1]
    bias, typed = inputs.bias, typed_as_varying(own.axes)
    shared = typed and bias is not None and not varying_axes(bias) & set(own.axes)
    reproducible_blocks, movement = own.work.reproducible_blocks, own.work.movement
    more = {
        "T": -rows % reproducible_blocks.rows,
        "S": -inputs.key.shape[1] % reproducible_blocks.keys,
    }
    moves = movement.gather_keys or movement.ring or movement.heads
    inputs = padded(inputs, more, dense=not moves)  # where keys move, they are for all of them
    axes = varying_axes(*jax.tree.leaves(inputs), lax.axis_index(own.axes))
    inputs = jax.tree.map(lambda x: vary(x, axes), inputs)
    own = dataclasses.replace(own, bias_shared=shared)
    o = inputs
    out, lse = _attention(own, o.query, o.key, o.value, o.bias, o.sinks, o.mask)
    return out[:, :rows], lse[:, :rows]


def _primal(own: Own, *fields: Any) -> tuple[jax.Array, jax.Array]:
    return own.work.result(masks_at_work(AttentionInputs(*fields), own.work.movement))


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
    movement, inputs = own.work.movement, AttentionInputs(*fields)
    if movement.heads and inputs.bias is not None:
        raise NotImplementedError(
            "the gradient of a bias under reproducible=True and a strategy that shards heads is not "
            "built inside a shard_map; use 'ring' or 'gather_kv', or dot_product_attention outside"
        )
    if not own.query_sharded:
        d_out, d_lse = (_whole(x, own.axes) for x in (d_out, d_lse))
    d_out, d_sum = row_cotangents(out, lse, d_out, d_lse, reproducible=True)
    shared = own.axes if own.bias_shared else ()
    found = own.work.gradients(
        masks_at_work(inputs, movement),
        d_out,
        jnp.stack([lse, d_sum], axis=-1),
        {"query": movement.all_reduce, "key": (), "value": (), "bias": shared},
    )
    if inputs.sinks is not None:
        d_sinks = sink_gradient(inputs.sinks, lse, d_sum, reproducible=True)
        d_sinks = sum_over(d_sinks, own.axes if own.query_sharded else ())
        found["sinks"] = numbers(d_sinks).astype(inputs.sinks.dtype)
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


def masks_at_work(inputs: AttentionInputs, movement: Movement) -> AttentionInputs:
    """The inputs with bias and mask for the rows, keys and heads with which this device computes.

    They come for those that it has. Bias and dense mask come as `sharded_attention` says, and only their
    heads move.
    """
    heads, local_rows = movement.heads, inputs.query.shape[1]

    def bring(name: str, x: jax.Array) -> jax.Array:
        letters = letters_of(name, x)
        if name in ("query", "key", "value", "sinks"):
            return x
        if letters == "BNTS":
            return _dense_to_heads(x, heads, local_rows) if heads else x
        over = movement.gather_rows if "T" in letters else movement.gather_keys
        return gathered(gathered(x, heads), over)

    return map_named(bring, inputs)


def _dense_to_heads(x: jax.Array, axes: Axes, local_rows: int) -> jax.Array:
    """[B|1, N|1, T|1, S|1] of this device's rows to all rows of its part of the heads."""
    has_rows = x.shape[2] > 1 or local_rows == 1  # or it is the same for all
    if x.shape[1] == 1:
        return gathered(x, axes, 2) if has_rows else x
    if has_rows:
        return lax.all_to_all(x, axes, split_axis=1, concat_axis=2, tiled=True)
    return own_part(x, axes, 1)
