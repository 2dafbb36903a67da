"""What each strategy takes for a little and for much, and what 'auto' would have taken."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from distattn.attention.api import dot_product_attention
from distattn.cli.check.correctness import wide_axes
from distattn.cli.check.programs import medians, on_mesh, prepare
from distattn.planning import cost
from distattn.planning.cost import QUERY_REPLICATED, QUERY_SHARDED, Link, Topology, Workload, fits


@dataclasses.dataclass(frozen=True)
class Case:
    """A workload for which each strategy is timed, forward."""

    name: str
    workload: Workload
    query_sharded: bool


@dataclasses.dataclass(frozen=True)
class Timing:
    """A workload, and what was measured and predicted."""

    case: Case
    seconds: dict[str, float]  # by strategy
    by_table: str  # what `auto` takes
    by_links: str  # and what it would, with the links that were measured

    @property
    def fastest(self) -> str:
        """The strategy that took least."""
        return min(self.seconds, key=lambda name: self.seconds[name])


def workloads(devices: int, *, quick: bool) -> tuple[Case, ...]:
    """One query and many for all keys, and rows that lie with the keys, a few and as many as keys."""
    keys, rows = (16, 32) if quick else (64, 256)  # keys of a device

    def sizes(queries: int) -> Workload:
        return Workload(1, queries, keys * devices, 8, 2, 64, 64, 4)

    return (
        Case("replicated query, 1 row", sizes(1), False),
        Case(f"replicated query, {rows} rows", sizes(rows), False),
        Case("sharded query, 1 row a device", sizes(devices), True),
        Case(f"sharded query, {keys} rows a device", sizes(keys * devices), True),
    )


def measure_strategies(
    mesh: Mesh,
    chosen: Sequence[Case],
    strategies: Sequence[str],
    links: Mapping[str, Link],
    repeats: int,
    say: Callable[[str], None],
) -> list[Timing]:
    """Times every strategy that fits, over all axes in the order of the mesh, in turn.

    Args:
      mesh: of devices of all processes.
      chosen: workloads.
      strategies: names; those that do not fit a workload are not timed there.
      links: as measured, by axis: of `cost.links_from`.
      repeats: how often each is timed.
      say: is told what comes next.

    Returns:
      Timing for each workload with a strategy that fits, the same in every process.
    """
    axes = wide_axes(mesh)
    sizes = tuple(mesh.shape[axis] for axis in axes)
    table = Topology(mesh.devices.flat[0].platform, sizes, jax.process_count())
    measured = dataclasses.replace(table, links=tuple(links[axis] for axis in axes))
    timings = []
    for case in chosen:
        known = QUERY_SHARDED if case.query_sharded else QUERY_REPLICATED
        names = [x for x in known if x in strategies and fits(x, case.workload, table)]
        if not names:
            continue
        say(f"{case.name}: timing {', '.join(names)}")
        arrays = _arrays(mesh, case)
        programs = {
            name: (prepare(f"{name}, {case.name}", _run(mesh, case, name), *arrays), arrays)
            for name in names
        }
        seconds = medians(programs, repeats)
        picks = (
            cost.choose(case.workload, where, query_sharded=case.query_sharded, candidates=names)
            for where in (table, measured)
        )
        timings.append(Timing(case, seconds, *(pick.strategy for pick in picks)))
    return timings


def _arrays(mesh: Mesh, case: Case) -> tuple[jax.Array, ...]:
    shape = case.workload
    rows, heads = (shape.query_length, shape.num_heads), (shape.key_length, shape.num_kv_heads)
    cut = PartitionSpec(None, wide_axes(mesh))
    dims = ((*rows, shape.head_dim), (*heads, shape.head_dim), (*heads, shape.value_dim))
    specs = (cut if case.query_sharded else PartitionSpec(), cut, cut)
    rng = np.random.default_rng(0)
    return tuple(
        on_mesh(rng.normal(size=(shape.batch, *d)).astype(np.float32), mesh, spec)
        for d, spec in zip(dims, specs, strict=True)
    )


def _run(mesh: Mesh, case: Case, strategy: str) -> Callable[..., Any]:
    axes = wide_axes(mesh)
    rows = axes if case.query_sharded else None
    options = {"mesh": mesh, "axis_name": axes, "query_axis_name": rows, "strategy": strategy}
    return lambda *arrays: dot_product_attention(*arrays, **options)


def slower(timing: Timing, strategy: str) -> float:
    """How many times the time of the fastest a strategy took."""
    least = timing.seconds[timing.fastest]
    return timing.seconds[strategy] / least if least else math.inf
