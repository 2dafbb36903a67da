"""Who sends to whom in one kernel: the steps of a `Schedule` for each axis, as a device sees them.

A mesh is exchanged over axis by axis, the last and fastest first, by a butterfly over each: the rounds of
`schedule.hierarchical`, whose pairs differ in one coordinate. So a device needs only its own coordinate on
an axis, and the table of the axis.
"""

import dataclasses
import functools
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from distattn._compat import varying_axes
from distattn.collectives.mesh import sizes_of, typed_as_varying
from distattn.planning.schedule import Step, butterfly

# Actions of a device on what it receives in a round.
KEEP, OWN_FIRST, SOURCE_FIRST, REPLACE = range(4)
NOBODY = -1


@dataclasses.dataclass(frozen=True)
class Round:
    """One round of exchanges along an axis."""

    axis: str
    step: Step

    @functools.cached_property
    def table(self) -> np.ndarray:
        """int32[size, 3]: receiver, source and action of each device."""
        size = len(self.step.receives)
        rows = np.full((size, 3), NOBODY, np.int32)
        for source, rank in self.step.pairs:
            rows[source, 0], rows[rank, 1] = rank, source
        merges = np.where(self.step.source_first, SOURCE_FIRST, OWN_FIRST)
        rows[:, 2] = np.where(self.step.replaces, REPLACE, merges)
        rows[rows[:, 1] == NOBODY, 2] = KEEP
        return rows

    @functools.cached_property
    def flip(self) -> int | None:
        """The bit in which each device differs from its partner; None if the table has another pattern."""
        ranks = np.arange(len(self.table))
        flip = int(self.table[0, 0])
        partner = ranks ^ flip
        merges = np.where(partner < ranks, SOURCE_FIRST, OWN_FIRST)
        exchanges = np.stack([partner, partner, merges], axis=1)
        return flip if flip > 0 and np.array_equal(self.table, exchanges) else None


@dataclasses.dataclass(frozen=True)
class Route:
    """All rounds over some axes of the `shard_map`."""

    rounds: tuple[Round, ...]
    collective_id: (
        int  # id of the barrier: shared with another kernel only if its rounds are the same
    )
    # All axes of the mesh if a kernel must be told its coordinates: under check_vma=True it cannot bring
    # numbers that vary over several axes to one type. Its results then count as varying over them all.
    told: tuple[str, ...] = ()

    @property
    def has_rows(self) -> bool:
        """Whether partners do not follow from coordinates, so that a kernel needs `own_rows`."""
        return bool(self.told) or any(x.flip is None for x in self.rounds)

    def own_rows(self) -> jax.Array:
        """Return int32[rounds, .]: this device's rows of the tables, then its coordinates, if told."""
        rows = [jnp.asarray(x.table)[lax.axis_index(x.axis)] for x in self.rounds]
        if self.told:
            rows.append(jnp.stack([lax.axis_index(axis) for axis in self.told]))
        width = max(row.size for row in rows)
        return jnp.stack([jnp.pad(row, (0, width - row.size)) for row in rows])

    @property
    def varying(self) -> frozenset[str]:
        """The axes over which the state is typed as varying, before the exchange and after."""
        axes = {*self.told, *(x.axis for x in self.rounds)}
        return varying_axes(*(lax.axis_index(axis) for axis in axes))


def rounds_over(axes: tuple[str, ...], sizes: tuple[int, ...]) -> tuple[Round, ...]:
    """Return the rounds of `hierarchical(sizes)`."""
    by_axis = list(zip(axes, sizes, strict=True))[::-1]
    return tuple(Round(axis, step) for axis, size in by_axis for step in butterfly(size).steps)


def route_over(axes: tuple[str, ...]) -> Route:
    """Return the rounds over the axes, which are in the order of the mesh."""
    # If two kernels share a barrier, a signal of the second counts at the barrier of the first. With equal
    # rounds it cannot come too early: it goes to devices from which this kernel has received, and they had
    # passed their barrier. With other rounds it can, so each mesh and each tuple of axes has a barrier. XLA
    # numbers the barriers of a program itself, and asks only which are equal; 31 bits.
    mesh = jax.sharding.get_abstract_mesh()
    pattern = repr((mesh.axis_names, mesh.axis_sizes, axes)).encode()
    told = mesh.axis_names if len(mesh.axis_names) > 1 and typed_as_varying(axes) else ()
    return Route(rounds_over(axes, sizes_of(axes)), zlib.crc32(pattern) >> 1, told)
