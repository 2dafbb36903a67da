"""All rounds of an exchange inside a kernel, by remote copies; and the kernel that does nothing else.

A device keeps its state in a buffer for each round: what arrives in a round goes to the buffer of that
round, is merged there with the device's own state, and is sent on from there. So nothing that is being
sent is written to, and nobody waits for a message of his own to leave before the end.

No message is sent before its receiver has entered the kernel: each device tells those from whom it will
receive, and waits for those to whom it will send.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from distattn._compat import interpreter, shaped, vary, varying_axes
from distattn.algebra.mergeable import State
from distattn.experimental.fused.route import (
    KEEP,
    NOBODY,
    OWN_FIRST,
    REPLACE,
    SOURCE_FIRST,
    Round,
    Route,
)
from distattn.experimental.fused.wire import Parts, Wire, form_of, parts_of, state_of, wire_of


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Of a kernel that is running: what it exchanges, and where that lies."""

    route: Route
    wire: Wire
    rows: Any  # SMEM, of `Route.own_rows`; None where none are needed
    buffers: Any  # VMEM [1 + rounds, *wire.shape]; the state of this device is put into the first
    sent: Any  # DMA semaphores [rounds]
    received: Any  # the same

    def enter(self) -> None:
        """Tells the devices that will send to this one that it is there."""
        for number, each in enumerate(self.route.rounds):
            _, source, _ = self._roles(number, each)

            def signal(each: Round = each, source: jax.Array = source) -> None:
                barrier = pltpu.get_barrier_semaphore()
                pl.semaphore_signal(barrier, 1, device_id=self._device(each, source))

            _when(source != NOBODY, signal, always=each.flip is not None)

    def run(self) -> jax.Array:
        """The number of the buffer that holds the merge of all devices' states, int32[]."""
        targets = jnp.int32(0)
        for number, each in enumerate(self.route.rounds):
            targets += (self._roles(number, each)[0] != NOBODY).astype(jnp.int32)
        pl.semaphore_wait(pltpu.get_barrier_semaphore(), targets)
        own, sources = jnp.int32(0), []
        for number, each in enumerate(self.route.rounds):
            target, source, action = self._roles(number, each)
            always = each.flip is not None
            sources.append(own)
            _when(target != NOBODY, self._message(number, each, own, target).start, always=always)
            _when(
                source != NOBODY,
                self._receive,
                number,
                each,
                own,
                source,
                action,
                always=always,
            )
            own = jnp.where(action == KEEP, own, number + 1)
        for number, (each, source) in enumerate(zip(self.route.rounds, sources, strict=True)):
            target, _, _ = self._roles(number, each)
            message = self._message(number, each, source, target)
            _when(target != NOBODY, message.wait_send, always=each.flip is not None)
        return own

    def _receive(
        self, number: int, each: Round, own: jax.Array, source: jax.Array, action: jax.Array
    ) -> None:
        inbox = number + 1
        self._message(number, each, own, source).wait_recv()
        first = jnp.where(action == SOURCE_FIRST, inbox, own)
        second = jnp.where(action == SOURCE_FIRST, own, inbox)

        def merge() -> None:
            @pl.loop(0, self.wire.blocks)
            def _(block: jax.Array) -> None:
                a, b = (self.wire.read(self.buffers.at[x, block]) for x in (first, second))
                self.wire.write(self.buffers.at[inbox, block], self.wire.form.merge(a, b))

        _when(action != REPLACE, merge, always=each.flip is not None)

    def _message(self, number: int, each: Round, own: jax.Array, target: jax.Array) -> Any:
        return pltpu.make_async_remote_copy(
            self.buffers.at[own],
            self.buffers.at[number + 1],
            self.sent.at[number],
            self.received.at[number],
            device_id=self._device(each, target),
        )

    def _device(self, each: Round, coordinate: jax.Array) -> dict[str, jax.Array]:
        """The one with another coordinate on an axis; those that are not named are this device's own."""
        told, last = self.route.told, len(self.route.rounds)
        own = {axis: self.rows[last, n] for n, axis in enumerate(told)}
        return own | {each.axis: coordinate}

    def _roles(self, number: int, each: Round) -> tuple[jax.Array, jax.Array, jax.Array]:
        """To whom, from whom, and what to do: `Round.table`, of this device."""
        if self.rows is not None:
            target, source, action = (self.rows[number, n] for n in range(3))
            return target, source, action
        own, flip = lax.axis_index(each.axis), each.flip
        assert flip is not None, "an irregular round without its table"
        partner = own ^ flip
        return partner, partner, jnp.where(partner < own, SOURCE_FIRST, OWN_FIRST)


def _when(condition: jax.Array, do: Any, *given: Any, always: bool) -> None:
    """do(*given) where the condition holds, which may be known before."""
    if always:
        do(*given)
    else:
        pl.when(condition)(lambda: do(*given))


def scratch_of(route: Route, wire: Wire) -> list[Any]:
    """Of an `Exchange`: buffers, and semaphores for what is sent and received."""
    rounds = len(route.rounds)
    semaphores = pltpu.SemaphoreType.DMA((rounds,))
    return [pltpu.VMEM((rounds + 1, *wire.shape), wire.form.dtype), semaphores, semaphores]


def rows_spec() -> pl.BlockSpec:
    """Where `Route.own_rows` lies in a kernel."""
    return pl.BlockSpec(memory_space=pltpu.SMEM)


def barrier_of(route: Route) -> int:
    """The collective_id for a kernel; the interpreter has fewer."""
    return route.collective_id & 0x7FFF if interpreter() else route.collective_id


def all_reduce(state: State, route: Route, vmem_bytes: int) -> State:
    """The merge of all devices' states, in one kernel that may take so much memory."""
    form, parts = form_of(state), parts_of(state)
    count = parts.vectors[0].size
    wire = wire_of(form, count)
    filled = [_filled(x, wire) for x in (*parts.vectors, *parts.matrices)]
    vectors = jnp.stack(filled[: form.vectors], axis=1)  # [blocks, vectors, 1, rows]
    arrays = [vectors, *filled[form.vectors :]]
    own_rows = [route.own_rows()] if route.has_rows else []
    inputs = [*own_rows, *arrays]
    axes = varying_axes(*inputs) | route.varying
    whole = pl.BlockSpec(memory_space=pltpu.VMEM)
    results = pl.pallas_call(
        functools.partial(_kernel, route, wire),
        in_specs=[*(rows_spec() for _ in own_rows), *(whole for _ in arrays)],
        out_specs=[whole for _ in arrays],
        out_shape=[shaped(x.shape, x.dtype, axes) for x in arrays],
        scratch_shapes=scratch_of(route, wire),
        compiler_params=pltpu.CompilerParams(
            collective_id=barrier_of(route), vmem_limit_bytes=vmem_bytes
        ),
        interpret=interpreter() or False,
    )(*(vary(x, axes) for x in inputs))
    vectors, *matrices = results
    merged = Parts(
        [vectors[:, n].reshape(-1)[:count] for n in range(form.vectors)],
        [x.reshape(-1, x.shape[-1])[:count] for x in matrices],
    )
    return state_of(merged, state)


def _kernel(route: Route, wire: Wire, *refs: Any) -> None:
    parts = list(refs)
    rows = parts.pop(0) if route.has_rows else None
    count = 1 + len(wire.form.widths)
    arrays, results, scratch = parts[:count], parts[count : 2 * count], parts[2 * count :]
    exchange = Exchange(route, wire, rows, *scratch)
    exchange.enter()

    @pl.loop(0, wire.blocks)
    def _(block: jax.Array) -> None:
        vectors, *matrices = (x[block] for x in arrays)
        numbers = [vectors[n] for n in range(wire.form.vectors)]
        wire.write(exchange.buffers.at[0, block], Parts(numbers, matrices))

    own = exchange.run()

    @pl.loop(0, wire.blocks)
    def _(block: jax.Array) -> None:
        merged = wire.read(exchange.buffers.at[own, block])
        for n, x in enumerate(merged.vectors):
            results[0][block, n] = x
        for result, x in zip(results[1:], merged.matrices, strict=True):
            result[block] = x


def _filled(x: jax.Array, wire: Wire) -> jax.Array:
    """[R, ...] to [blocks, heads, rows, ...]; rows beyond the last one are 0."""
    missing = wire.blocks * wire.heads * wire.rows - x.shape[0]
    x = jnp.pad(x, [(0, missing), *((0, 0) for _ in x.shape[1:])])
    return x.reshape(wire.blocks, wire.heads, wire.rows, *x.shape[1:])
