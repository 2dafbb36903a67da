"""The exchange of states inside one TPU kernel: `strategy='fused'`, and decode attention as one launch.

All rounds of a butterfly are remote copies from one chip's VMEM to another's, where XLA would start a
collective for each and wait for it. It has not been timed: it is checked by Pallas' interpreter, which
looks for races, and by the compilers of v5e to tpu7x.
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
from distattn.experimental.fused.route import Route, route_over
from distattn.experimental.fused.wire import LANES, SUBLANES, Wire, form_of, softmax_form, wire_of
from distattn.local import dispatch
from distattn.local.block import LogitConfig
from distattn.local.inputs import AttentionInputs
from distattn.local.kernels.tpu.tiling import TpuCut, cut_of, target_of
from distattn.local.tiling import Machine

__all__ = ["all_reduce", "attend", "in_one_launch", "varied"]


def all_reduce(
    state: State, axes: tuple[str, ...], by_messages: Callable[[State, tuple[str, ...]], State]
) -> State:
    """The merge of all devices' states: within slices in one kernel, then between them by XLA's messages.

    Args:
      state: of this device, of either kind, float32 or int32.
      axes: in the order of the mesh.
      by_messages: the same merge over some axes without a kernel, which JAX can differentiate.

    Raises:
      NotImplementedError: the call cannot be done so; the message says why, and what to do.
    """
    _check_place()
    inner = _inner_axes(axes)
    outer = tuple(axis for axis in axes if axis not in inner)
    route = route_over(inner)
    _check_state(state, route)
    if not route.rounds:
        return by_messages(state, axes)
    # Pallas is imported where it is needed, as in `distattn.local.dispatch`.
    from distattn.experimental.fused import exchange

    budget = target_of(device_kind_of()).budget_bytes

    @jax.custom_vjp
    def merged(state: State) -> State:
        state = exchange.all_reduce(state, route, budget)
        return by_messages(state, outer) if outer else state

    # A kernel has no derivative. What each device computes is what it computes in the other form, and so is
    # its transpose, whatever the shard_map around makes of it.
    def backward(state: State, cotangent: State) -> tuple[State]:
        return jax.vjp(lambda x: by_messages(x, axes), state)[1](cotangent)

    merged.defvjp(lambda state: (merged(state), state), backward)
    return merged(varied(state, axes))


def varied(x: Any, axes: tuple[str, ...]) -> Any:
    """A pytree, typed as varying where what a kernel exchanges over the axes is; see `Route.told`."""
    over = varying_axes(lax.axis_index(axes), *jax.tree.leaves(x)) | route_over(axes).varying
    return jax.tree.map(lambda leaf: vary(leaf, over), x)


def in_one_launch(
    inputs: AttentionInputs,
    logit_config: LogitConfig,
    machine: Machine,
    implementation: str,
    axes: tuple[str, ...],
) -> bool:
    """Whether fold, exchange and division are one kernel: few rows, whose states fit the memory.

    Else the fold and the exchange are two.

    Raises:
      NotImplementedError: 'pallas_tpu' is named and does not do the call, or nothing is fused here.
    """
    _check_place()
    kernel = dispatch.chosen(inputs, logit_config, machine, implementation)
    if kernel is not dispatch.own("tpu") or slice_axes(axes) != ():
        return False
    cut, route = cut_for(inputs, machine), route_over(axes)
    if not route.rounds or cut.row_blocks > 1 or cut.queries * cut.groups > LANES:
        return False
    held = _held_bytes(route, wire_for(cut)) + cut.vmem_bytes
    return held <= cut.target.budget_bytes


def cut_for(inputs: AttentionInputs, machine: Machine) -> TpuCut:
    """That of the fold alone, but keys are in one part: one core exchanges, and has the state of all."""
    return dataclasses.replace(cut_of(inputs, machine), splits=False)


def wire_for(cut: TpuCut) -> Wire:
    """The message of a call: its rows lie by blocks of heads, as the fold has them."""
    rows = -(-cut.queries * cut.groups // SUBLANES) * SUBLANES
    form = softmax_form(cut.value_width, jnp.dtype(jnp.float32))
    return Wire(form, cut.batch * cut.head_blocks, cut.heads, rows)


def attend(
    inputs: AttentionInputs,
    logit_config: LogitConfig,
    machine: Machine,
    axes: tuple[str, ...],
    valid: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """Attention to the keys of all devices of the axes, in one launch.

    Args:
      inputs: of this device, with sinks; such that `in_one_launch`.
      logit_config: how logits are made.
      machine: what it runs on.
      axes: in the order of the mesh.
      valid: bool[B|1, T], of rows; those that are not are empty. None: all are.

    Returns:
      out [B, T, N, V] in query's dtype and lse f32[B, T, N]; a row over no keys gives 0 and -inf.
    """
    from distattn.experimental.fused import decode

    cut = cut_for(inputs, machine)
    out, lse = decode.attend(inputs, logit_config, cut, wire_for(cut), route_over(axes))
    if valid is not None:
        out = jnp.where(valid[..., None, None], out, jnp.zeros((), out.dtype))
        lse = jnp.where(valid[..., None], lse, -jnp.inf)
    return out, lse


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
            "devices are: name them (batch_axis_name, heads_axis_name), or in axis_names of the shard_map"
        )
    try:
        importlib.import_module("jax.experimental.pallas.tpu")
    except ModuleNotFoundError as error:
        raise _refused(f"Pallas needs the package {error.name!r}, which is not installed") from None


def _inner_axes(axes: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the axes along which devices are of one slice, so that one can write to another's memory."""
    slow = slice_axes(axes)
    if slow is None:
        raise _refused(
            "no chip can write to the memory of one in another slice, and which axes of this mesh lie "
            "within a slice is not known here: call distattn.dot_product_attention with mesh=, a Mesh of "
            "devices, or distattn.testing.compile_for"
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
            raise _refused(f"the state is {x.dtype}, and float32 and int32 are done")
    rows = math.prod(rows_of(state))
    held = _held_bytes(route, wire_of(form_of(state), rows))
    budget = target_of(device_kind_of()).budget_bytes
    if held > budget:
        raise _refused(
            f"query has {rows} rows on each device, one for each head of each query: with a buffer for "
            f"each round a kernel would hold {held} bytes, and it may take {budget}"
        )


def _held_bytes(route: Route, wire: Wire) -> int:
    """Of an exchange: a buffer for each round, one for the state, and the state as it comes and goes."""
    return (len(route.rounds) + 1 + 3) * wire.bytes


def _refused(reason: str) -> NotImplementedError:
    return NotImplementedError(
        f"strategy='fused' is not built for this call: {reason}; or use 'butterfly', which sends the same "
        "messages by XLA, or 'auto'"
    )
