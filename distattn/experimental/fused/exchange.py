"""All rounds of an exchange inside a kernel, by remote copies; and the kernel that does nothing else.

A device keeps its state in one buffer per round: what arrives in a round goes to the buffer of that round,
is merged there with the device's own state, and is sent on from there. So no buffer is written while it is
being sent, and a device waits for its own messages to leave only at the end.

No message is sent before its receiver has entered the kernel: each device signals those from which it will
receive, and waits for those to which it will send.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from distattn._compat import interpreter, shaped, vary, varying_axes
from distattn.algebra.mergeable import State
from distattn.experimental.fused.message import (
    MessageLayout,
    RowArrays,
    form_of,
    from_rows,
    layout_of,
    to_rows,
)
from distattn.experimental.fused.route import (
    KEEP,
    NOBODY,
    OWN_FIRST,
    REPLACE,
    SOURCE_FIRST,
    Round,
    Route,
)

ROWS_SPEC = pl.BlockSpec(memory_space=pltpu.SMEM)  # memory of `Route.own_rows`


@dataclasses.dataclass(frozen=True)
class Exchange:
    """The exchange of a running kernel, and its memory."""

    route: Route
    layout: MessageLayout
    rows: Any  # SMEM, `Route.own_rows`; None if not needed
    buffers: Any  # VMEM [1 + rounds, *layout.shape]; the first holds the state of this device
    sent: Any  # DMA semaphores [rounds]
    received: Any  # DMA semaphores [rounds]

    def enter(self) -> None:
        """Signal the devices that will send to this one that it has entered the kernel."""
        for number, each in enumerate(self.route.rounds):
            _, source, _ = self._roles(number, each)

            def signal(each: Round = each, source: jax.Array = source) -> None:
                barrier = pltpu.get_barrier_semaphore()
                pl.semaphore_signal(barrier, 1, device_id=self._device(each, source))

            _when(source != NOBODY, signal, always=each.flip is not None)

    def run(self) -> jax.Array:
        """Return the number of the buffer that holds the merge of all devices' states, int32[]."""
        rounds = list(enumerate(self.route.rounds))
        targets = [self._roles(*x)[0] != NOBODY for x in rounds]
        barrier = pltpu.get_barrier_semaphore()
        pl.semaphore_wait(barrier, sum((x.astype(jnp.int32) for x in targets), jnp.int32(0)))
        own, messages = jnp.int32(0), []
        for number, each in rounds:
            target, source, action = self._roles(number, each)
            always = each.flip is not None
            message = self._message(number, each, own, target)
            messages.append((target, message, always))
            _when(target != NOBODY, message.start, always=always)
            receive = functools.partial(self._receive, number, each, own, source, action)
            _when(source != NOBODY, receive, always=always)
            own = jnp.where(action == KEEP, own, number + 1)
        for target, message, always in messages:
            _when(target != NOBODY, message.wait_send, always=always)
        return own

    def _receive(
        self, number: int, each: Round, own: jax.Array, source: jax.Array, action: jax.Array
    ) -> None:
        inbox = number + 1
        self._message(number, each, own, source).wait_recv()
        first = jnp.where(action == SOURCE_FIRST, inbox, own)
        second = jnp.where(action == SOURCE_FIRST, own, inbox)

        def merge() -> None:
            @pl.loop(0, self.layout.blocks)
            def _(block: jax.Array) -> None:
                a, b = (self.layout.read(self.buffers.at[x, block]) for x in (first, second))
                self.layout.write(self.buffers.at[inbox, block], self.layout.form.merge(a, b))

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
        """Return the device with another coordinate on an axis; axes that are left out stay the same."""
        told, last = self.route.told, len(self.route.rounds)
        own = {axis: self.rows[last, n] for n, axis in enumerate(told)}
        return own | {each.axis: coordinate}

    def _roles(self, number: int, each: Round) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Return this device's row of `Round.table`."""
        if self.rows is not None:
            target, source, action = (self.rows[number, n] for n in range(3))
            return target, source, action
        own, flip = lax.axis_index(each.axis), each.flip
        assert flip is not None, "an irregular round without its table"
        partner = own ^ flip
        return partner, partner, jnp.where(partner < own, SOURCE_FIRST, OWN_FIRST)


def _when(condition: jax.Array, do: Any, *, always: bool) -> None:
    """Run do() if the condition holds; `always` if that is known before."""
    if always:
        do()
    else:
        pl.when(condition)(lambda: do())


def scratch_of(route: Route, layout: MessageLayout) -> list[Any]:
    """Return the memory of an `Exchange`: buffers, and semaphores for messages sent and received."""
    rounds = len(route.rounds)
    semaphores = pltpu.SemaphoreType.DMA((rounds,))
    return [pltpu.VMEM((rounds + 1, *layout.shape), layout.form.dtype), semaphores, semaphores]


def barrier_of(route: Route) -> int:
    """Return the collective_id of a kernel; the interpreter has fewer."""
    return route.collective_id & 0x7FFF if interpreter() else route.collective_id


def all_reduce(state: State, route: Route, vmem_bytes: int) -> State:
    """Return the merge of all devices' states, by one kernel that may take that much memory."""
    form, rows = form_of(state), to_rows(state)
    count = rows.vectors[0].size
    layout = layout_of(form, count)
    lead = (layout.blocks, layout.heads, layout.rows)

    def blocks(x: jax.Array) -> jax.Array:  # rows beyond the last one are 0
        missing = [(0, math.prod(lead) - count), *((0, 0) for _ in x.shape[1:])]
        return jnp.pad(x, missing).reshape(*lead, *x.shape[1:])

    vectors = jnp.stack([blocks(x) for x in rows.vectors], axis=1)  # [blocks, vectors, 1, rows]
    arrays = [vectors, *map(blocks, rows.matrices)]
    own_rows = [route.own_rows()] if route.has_rows else []
    inputs = [*own_rows, *arrays]
    axes = varying_axes(*inputs) | route.varying
    whole = pl.BlockSpec(memory_space=pltpu.VMEM)
    vectors, *matrices = pl.pallas_call(
        functools.partial(_kernel, route, layout),
        in_specs=[*(ROWS_SPEC for _ in own_rows), *(whole for _ in arrays)],
        out_specs=[whole for _ in arrays],
        out_shape=[shaped(x.shape, x.dtype, axes) for x in arrays],
        scratch_shapes=scratch_of(route, layout),
        compiler_params=pltpu.CompilerParams(
            collective_id=barrier_of(route), vmem_limit_bytes=vmem_bytes
        ),
        interpret=interpreter() or False,
    )(*(vary(x, axes) for x in inputs))
    merged = RowArrays(
        [vectors[:, n].reshape(-1)[:count] for n in range(form.vectors)],
        [x.reshape(-1, x.shape[-1])[:count] for x in matrices],
    )
    return from_rows(merged, state)


def _kernel(route: Route, layout: MessageLayout, *refs: Any) -> None:
    rest = list(refs)
    rows = rest.pop(0) if route.has_rows else None
    count = 1 + len(layout.form.widths)
    arrays, results, scratch = rest[:count], rest[count : 2 * count], rest[2 * count :]
    exchange = Exchange(route, layout, rows, *scratch)
    exchange.enter()

    @pl.loop(0, layout.blocks)
    def _(block: jax.Array) -> None:
        vectors, *matrices = (x[block] for x in arrays)
        vectors = [vectors[n] for n in range(layout.form.vectors)]
        layout.write(exchange.buffers.at[0, block], RowArrays(vectors, matrices))

    own = exchange.run()

    @pl.loop(0, layout.blocks)
    def _(block: jax.Array) -> None:
        merged = layout.read(exchange.buffers.at[own, block])
        for n, x in enumerate(merged.vectors):
            results[0][block, n] = x
        for result, x in zip(results[1:], merged.matrices, strict=True):
            result[block] = x
