"""All of a call over a mesh that is not an array, and how its arrays are sharded, at rest and at work."""

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from distattn._compat import vary, varying_axes
from distattn._manual import axes_of, manual, place
from distattn.axes import on_devices_of
from distattn.block import Scoring
from distattn.movement import Combine, Movement, choose_movement
from distattn.operands import Operands, letters_of
from distattn.placement import Axes, AxisNames, Placement
from distattn.tiles import Machine
from distattn.units import Units
from distattn.work import Work


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
    operands: Operands,
    placement: Placement,
    scoring: Scoring,
    implementation: str,
    combine: Combine,
    query_axis_name: AxisNames,
    units: Units | None,
) -> Call:
    """The call whose devices exchange as `choose_movement` says, which raises what it raises."""
    placement, movement = choose_movement(placement, operands, combine, query_axis_name, units)
    work = Work(
        scoring,
        Machine(placement.platform, placement.compiler_sharded),
        implementation,
        movement,
        movement.keys_at_work(placement.key),
        units,
    )
    return Call(work, placement)
