"""What one device computes of a call, collectives included: for the global call and for the inside form.

An array is sharded in one way *at rest*, as it comes and goes, and in another *at work*, while each device
computes; a `Movement` is the difference. Query, key, value and sinks come as they rest, and `at_work`
brings them; bias and mask come as the work needs them.
"""

import dataclasses

import jax

from distattn import fused
from distattn.axes import axes_size, gathered, mesh_order, own_part
from distattn.block import Scoring
from distattn.completion import by_row, completed, gradients_of, sum_over
from distattn.local import local_fold, local_gradients
from distattn.movement import Movement
from distattn.operands import Operands, with_repeated_heads
from distattn.placement import Axes
from distattn.ring import Ring, ring_fold, ring_gradients, ring_state
from distattn.tiles import Machine
from distattn.ulysses import rows_to_heads, together
from distattn.units import Units


def at_work(
    operands: Operands, movement: Movement, *rows: jax.Array
) -> tuple[Operands, list[jax.Array]]:
    """The operands with rows, keys and heads as this device computes with them.

    Args:
      operands: query, key, value and sinks as they rest, bias and mask as the work needs them.
      movement: of the call.
      rows: more arrays [B, T, N, .], which come as the result goes.
    """
    query, key, value, sinks = operands.query, operands.key, operands.value, operands.sinks
    moved = list(rows)
    if movement.heads:
        operands = with_repeated_heads(operands, axes_size(movement.heads))
        arrays = [query, operands.key, operands.value, *rows]
        query, key, value, *moved = rows_to_heads(arrays, movement.heads)
        sinks = None if sinks is None else own_part(sinks, movement.heads, 0)
    gather_rows, gather_keys = movement.gathers
    if gather_rows:  # of a result that is not scattered all devices have the rows
        scattered = moved if movement.scatter else []
        query, *scattered = together(lambda x: gathered(x, gather_rows), [query, *scattered])
        moved = scattered or moved
    # Keys and values apart: packed, they would be copied twice.
    key, value = (gathered(x, gather_keys) for x in (key, value))
    return dataclasses.replace(operands, query=query, key=key, value=value, sinks=sinks), moved


@dataclasses.dataclass(frozen=True)
class Work:
    """All of a device's part in a call that is not an array."""

    scoring: Scoring
    machine: Machine
    implementation: str
    movement: Movement
    key_axes: Axes  # of S at work, in the order of its shards
    units: Units | None = None  # of a reproducible call

    @property
    def ring(self) -> Ring | None:
        """The devices round which keys travel, if they do."""
        return Ring(self.movement.ring, self.key_axes) if self.movement.ring else None

    def in_one_launch(self, operands: Operands) -> bool:
        """Whether one kernel folds this device's keys, exchanges and divides, for operands at work."""
        axes = mesh_order(self.movement.all_reduce)
        if self.units is not None or self.movement.schedule != "fused" or axes_size(axes) == 1:
            return False
        return fused.in_one_launch(operands, self.scoring, self.machine, self.implementation, axes)

    def launched(self, operands: Operands) -> tuple[jax.Array, jax.Array]:
        """`result`, in one launch."""
        axes, valid = mesh_order(self.movement.all_reduce), operands.mask.query_valid
        return fused.attend(operands, self.scoring, self.machine, axes, valid)

    def differentiable_result(self, operands: Operands) -> tuple[jax.Array, jax.Array]:
        """`result` of operands at work, differentiated through the collectives; not reproducible."""
        state = ring_state(operands, self.scoring, self.machine, self.implementation, self.ring)
        return completed(state, self.movement, operands)

    def result(self, operands: Operands) -> tuple[jax.Array, jax.Array]:
        """out [B, T, N, V] in query's dtype and lse f32[B, T, N] of the rows that this device is to have.

        'dense' alone has a derivative.
        """
        operands, _ = at_work(operands, self.movement)
        if self.in_one_launch(operands):
            return self.launched(operands)
        local = local_fold(self.scoring, self.machine, self.implementation, self.units)
        return completed(ring_fold(local, operands, self.ring), self.movement, operands)

    def gradients(
        self, operands: Operands, d_out: jax.Array, rows: jax.Array, axes: dict[str, Axes]
    ) -> dict[str, jax.Array]:
        """Those of query, key, value and, if there is one, bias, each as it rests, by name.

        Args:
          operands: as in `result`.
          d_out: [B, T, N, V], as `row_cotangents` gives it, of the result's rows.
          rows: f32[B, T, N, 2], lse and d_sum.
          axes: by name, over which a gradient is summed, or scattered as the movement says.
        """
        movement = self.movement
        there, (d_out, rows) = at_work(operands, movement, d_out, rows)
        kv_heads = there.key.shape[2] * axes_size(movement.heads)
        times = kv_heads // operands.key.shape[2]  # that key/value heads were repeated
        keys_sum = movement.ring or axes["key"] or times > 1
        gradients = local_gradients(
            self.scoring,
            self.machine,
            self.implementation,
            self.units,
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
        return gradients_of(sums, operands, movement.heads, times)
