"""`strategy='fused'`: the exchange of states inside one TPU kernel, and decode attention as one launch.

All rounds of a butterfly are remote copies from one chip's VMEM to another's, where XLA would start a
collective for each and wait for it. It has not been timed: Pallas' interpreter, which looks for races, and
the compilers of v5e to tpu7x check it.
"""

import dataclasses
import importlib
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from distattn._compat import device_kind_of, interpreter, platform_of, vary, varying_axes
from distattn.algebra.mergeable import State, rows_of
from distattn.collectives.mesh import axes_size, slice_axes
from distattn.experimental.fused.message import (
    LANES,
    SUBLANES,
    MessageLayout,
    form_of,
    layout_of,
    softmax_form,
)
from distattn.experimental.fused.route import Route, route_over
from distattn.local.block import LogitConfig
from distattn.local.dispatch import KERNELS, chosen_kernel
from distattn.local.inputs import AttentionInputs
from distattn.local.kernels.tpu.tiling import TpuTileConfig, limits_of, tile_config
from distattn.local.tiling import Machine

__all__ = ["all_reduce", "attend", "in_one_launch", "varied"]


def all_reduce(
    state: State, axes: tuple[str, ...], by_messages: Callable[[State, tuple[str, ...]], State]
) -> State:
    """Return the merge of all devices' states: within slices in one kernel, then between them by XLA.

    Args:
      state: of this device, of either kind, float32 or int32.
      axes: in the order of the mesh.
      by_messages: the same merge over some axes without a kernel, which JAX can differentiate.

    Raises:
      NotImplementedError: the call is not supported; the message says why, and what to do.
    """
    _check_place()
    inner = _inner_axes(axes)
    outer = tuple(axis for axis in axes if axis not in inner)
    route = route_over(inner)
    _check_state(state, route)
    if not route.rounds:
        return by_messages(state, axes)
    # Pallas is imported when a kernel runs, as in `distattn.local.dispatch`.
    from distattn.experimental.fused import exchange

    budget = limits_of(device_kind_of()).budget_bytes

    @jax.custom_vjp
    def merged(state: State) -> State:
        state = exchange.all_reduce(state, route, budget)
        return by_messages(state, outer) if outer else state

    # A kernel has no derivative. Its result is that of `by_messages` on each device, and so is its
    # transpose, in any shard_map.
    def backward(state: State, cotangent: State) -> tuple[State]:
        return jax.vjp(lambda x: by_messages(x, axes), state)[1](cotangent)

    merged.defvjp(lambda state: (merged(state), state), backward)
    return merged(varied(state, axes))


def varied(x: Any, axes: tuple[str, ...]) -> Any:
    """Return a pytree typed as varying where what a kernel exchanges over the axes is, see `Route.told`."""
    over = varying_axes(lax.axis_index(axes), *jax.tree.leaves(x)) | route_over(axes).varying
    return jax.tree.map(lambda leaf: vary(leaf, over), x)


def in_one_launch(
    inputs: AttentionInputs,
    logit_config: LogitConfig,
    machine: Machine,
    implementation: str,
    axes: tuple[str, ...],
) -> bool:
    """Return whether fold, exchange and division are one kernel: few rows, whose states fit the memory.

    Otherwise the fold and the exchange are two.

    Raises:
      NotImplementedError: 'pallas_tpu' is named and does not support the call, or nothing is fused here.
    """
    _check_place()
    kernel = chosen_kernel(inputs, logit_config, machine, implementation)
    if kernel is not KERNELS["pallas_tpu"] or slice_axes(axes) != ():
        return False
    config, layout, route = *_decode_layout(inputs, machine), route_over(axes)
    if not route.rounds or config.row_blocks > 1 or config.queries * config.groups > LANES:
        return False
    held = _held_bytes(route, layout) + config.vmem_bytes
    return held <= config.chip.budget_bytes


def attend(
    inputs: AttentionInputs,
    logit_config: LogitConfig,
    machine: Machine,
    axes: tuple[str, ...],
    valid: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Attend to the keys of all devices of the axes, in one launch.

    Args:
      inputs: of this device, with sinks; such that `in_one_launch`.
      logit_config: of the call.
      machine: the machine it runs on.
      axes: in the order of the mesh.
      valid: bool[B|1, T], which rows are not empty; None if all.

    Returns:
      out [B, T, N, V] in query's dtype and lse f32[B, T, N]; a row over no keys gives 0 and -inf.
    """
    from distattn.experimental.fused import decode

    config, layout = _decode_layout(inputs, machine)
    out, lse = decode.attend(inputs, logit_config, config, layout, route_over(axes))
    if valid is not None:
        out = jnp.where(valid[..., None, None], out, jnp.zeros((), out.dtype))
        lse = jnp.where(valid[..., None], lse, -jnp.inf)
    return out, lse


def _decode_layout(
    inputs: AttentionInputs, machine: Machine
) -> tuple[TpuTileConfig, MessageLayout]:
    """Return the sizes of the fold, and the message: its rows are in blocks of heads, as in the fold.

    The keys are not split: one core exchanges, and has the state of all.
    """
    config = dataclasses.replace(tile_config(inputs, machine), may_split=False)
    rows = -(-config.queries * config.groups // SUBLANES) * SUBLANES
    form = softmax_form(config.value_width, jnp.dtype(jnp.float32))
    return config, MessageLayout(form, config.batch * config.head_blocks, config.heads, rows)


def _check_place() -> None:
    platform = platform_of()
    if interpreter() is True:
        raise _refused(
            "Pallas' plain interpreter knows no remote copies: pass pltpu.InterpretParams() to "
            "distattn.testing.interpreted"
        )
    if platform != "tpu" and not interpreter():
        raise _refused(
            f"it is a kernel for TPUs, and the platform is {platform!r} (for tests, "
            "distattn.testing.interpreted(pltpu.InterpretParams()) runs it there, slowly)"
        )
    mesh = jax.sharding.get_abstract_mesh()
    others = [axis for axis in mesh.axis_names if axis not in mesh.manual_axes]
    if others:
        raise _refused(
            f"the axes {others} of the mesh are left to the compiler, which cannot tell a kernel where its "
            "devices are: shard over them by query_sharding and key_value_sharding, or name them in "
            "axis_names of the shard_map"
        )
    try:
        importlib.import_module("jax.experimental.pallas.tpu")
    except ModuleNotFoundError as error:
        raise _refused(f"Pallas needs the package {error.name!r}, which is not installed") from None


def _inner_axes(axes: tuple[str, ...]) -> tuple[str, ...]:
    """Return the axes along which devices are of one slice, so that one can write to another's memory."""
    slow = slice_axes(axes)
    if slow is None:
        raise _refused(
            "no chip can write to the memory of one in another slice, and which axes of this mesh stay "
            "within a slice is not known here: give distattn.dot_product_attention a key_value_sharding "
            "with a Mesh of devices, or use distattn.testing.compile_for"
        )
    inner = tuple(axis for axis in axes if axis not in slow)
    if slow and axes_size(inner) == 1:
        raise _refused(
            f"no chip can write to the memory of one in another slice, and the devices along {slow} are in "
            "several"
        )
    return inner


def _check_state(state: State, route: Route) -> None:
    for x in jax.tree.leaves(state):
        if x.dtype not in (jnp.float32, jnp.int32):
            raise _refused(f"the state is {x.dtype}; supported are float32 and int32")
    rows = math.prod(rows_of(state))
    held = _held_bytes(route, layout_of(form_of(state), rows))
    budget = limits_of(device_kind_of()).budget_bytes
    if held > budget:
        raise _refused(
            f"query has {rows} rows on each device, one for each head of each query: with a buffer for "
            f"each round a kernel would hold {held} bytes, and it may take {budget}"
        )


def _held_bytes(route: Route, layout: MessageLayout) -> int:
    """Return the bytes of an exchange: a buffer per round, and the state as read, kept and written."""
    return (len(route.rounds) + 1 + 3) * layout.bytes


def _refused(reason: str) -> NotImplementedError:
    return NotImplementedError(
        f"strategy='fused' does not support this call: {reason}; or use 'butterfly', which sends the same "
        "messages by XLA, or 'auto'"
    )
