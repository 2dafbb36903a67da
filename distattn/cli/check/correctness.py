"""Every strategy against the float64 oracle, forward and gradient, and the bits of its replicas."""

import dataclasses
import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from distattn._compat import platform_of
from distattn.attention.api import dot_product_attention
from distattn.attention.strategy import STRATEGIES
from distattn.cli.check.programs import DoesNotCompile, first_line, gathered, on_mesh, prepare
from distattn.collectives.all_reduce import BY_NAME
from distattn.collectives.mesh import on_devices_of, slice_axes
from distattn.planning.cost import HEADS_SHARDED, TWO_LEVELS
from distattn.planning.plan import Axes
from distattn.testing import reference
from distattn.testing.reference import tolerance, worst

NAMED = tuple(name for name in STRATEGIES if name != "auto")
RESULTS = ("out", "lse", "dquery", "dkey", "dvalue")
B, T, N, K, H, V = 2, 6, 4, 2, 8, 6
SLOTS = 4  # on each device
MAX_HEADS = 512  # more would keep the oracle busy for minutes: one row and head at a time


@dataclasses.dataclass(frozen=True)
class Subject:
    """A strategy, and the axes over which the keys lie, in the order of their shards."""

    strategy: str
    axes: Axes

    @property
    def name(self) -> str:
        """'ring over host, device'."""
        return f"{self.strategy} over {', '.join(self.axes)}"

    def heads(self, mesh: Mesh) -> int:
        """As many as are needed to give each device that shards them as many."""
        if self.strategy not in HEADS_SHARDED:
            return N
        over = self.axes[-1:] if self.strategy in TWO_LEVELS else self.axes
        return math.lcm(N, math.prod(mesh.shape[axis] for axis in over))


@dataclasses.dataclass(frozen=True)
class Check:
    """What was found about a subject, on all devices."""

    name: str
    strategy: str
    error_fraction: (
        float  # the worst error over the tolerance; inf for what is not finite, or no result
    )
    worst_result: str  # of RESULTS
    unequal: tuple[str, ...] = ()  # replicas that differ: the result, and on which devices
    failure: str = ""  # the error, where there is no result

    @property
    def passed(self) -> bool:
        """Whether every result on every device is within the tolerance."""
        return not self.failure and self.error_fraction <= 1


@dataclasses.dataclass(frozen=True)
class Problem:
    """Keys in random order with empty slots, causal, G = N / K queries a key head; and what is right."""

    arguments: dict[str, np.ndarray]
    d_out: np.ndarray
    d_lse: np.ndarray
    expected: dict[str, np.ndarray]  # by RESULTS, float64

    @classmethod
    def draw(cls, devices: int, heads: int, seed: int) -> "Problem":
        """The same in every process: `SLOTS` on each device, the last of several without a key."""
        rng = np.random.default_rng(seed)
        slots = SLOTS * devices

        def normal(*shape: int) -> np.ndarray:
            return rng.normal(size=shape).astype(np.float32)

        places = np.stack([rng.permutation(3 * slots)[:slots] for _ in range(B)])
        places[rng.random(places.shape) < 0.25] = -1
        if devices > 1:
            places[:, -SLOTS:] = -1
        arguments = {
            "query": normal(B, T, heads, H),
            "key": normal(B, slots, K, H),
            "value": normal(B, slots, K, V),
            "query_positions": rng.integers(0, 3 * slots, (B, T), dtype=np.int32),
            "key_positions": places.astype(np.int32),
        }
        d_out, d_lse = normal(B, T, heads, V), normal(B, T, heads)
        out, lse = reference.dot_product_attention(**arguments, is_causal=True)
        gradients = reference.attention_gradients(
            **arguments, is_causal=True, dout=d_out, dlse=d_lse
        )
        return cls(arguments, d_out, d_lse, {"out": out, "lse": lse, **gradients})

    def tolerance(self, result: str) -> float:
        """By the terms of its sums: the keys; for a gradient a dot product more, and all rows of a key."""
        slots = self.arguments["key"].shape[1]
        heads = self.arguments["query"].shape[2]
        rows = T * heads // K if result in ("dkey", "dvalue") else 0
        more = H + V + rows if result.startswith("d") else 0
        return tolerance(np.float32, slots + more)


def subjects(
    mesh: Mesh, strategies: Sequence[str], *, quick: bool
) -> tuple[list[Subject], list[str]]:
    """What there is to check on a mesh, and what is left out, with the reason.

    All strategies over all axes in the order of the mesh, and over all axes in every other order and each
    axis alone: all strategies too, or, if quick, the first of them.

    Args:
      mesh: any; axes of one device are left alone, if others are not.
      strategies: names.
      quick: few.
    """
    axes = wide_axes(mesh)
    orders = list(itertools.permutations(axes)) if len(axes) <= 3 else [axes, axes[::-1]]
    alone = [(axis,) for axis in axes] if len(axes) > 1 else []
    if quick:
        orders = orders[:1] + orders[1:][-1:]  # as the mesh has them, and the other way round
    found, left_out = [], []
    if not alone:
        left_out = [
            f"{name}: needs two axes of devices" for name in strategies if name in TWO_LEVELS
        ]
    if "fused" in strategies and platform_of(mesh) != "tpu":
        left_out.append("fused: needs TPUs")
        strategies = [name for name in strategies if name != "fused"]
    for place, strategy in itertools.product((*orders, *alone), strategies):
        subject = Subject(strategy, place)
        if strategy in TWO_LEVELS and len(place) < 2:
            continue
        if strategy == "fused" and not _within_slices(mesh, place):
            left_out.append(f"{subject.name}: needs an axis within a slice")
        elif subject.heads(mesh) > MAX_HEADS:
            left_out.append(f"{subject.name}: needs {subject.heads(mesh)} heads")
        elif not quick or place == axes or strategy == strategies[0]:
            found.append(subject)
    return found, left_out


def _within_slices(mesh: Mesh, axes: Axes) -> bool:
    """Whether some of the axes lie within a slice of a TPU."""
    with on_devices_of(mesh):
        return bool(set(axes) - set(slice_axes(axes) or ()))


def wide_axes(mesh: Mesh) -> Axes:
    """The axes of more than one device; where there are none, the last one."""
    return tuple(a for a in mesh.axis_names if mesh.shape[a] > 1) or mesh.axis_names[-1:]


def check(
    mesh: Mesh, chosen: Sequence[Subject], seed: int, say: Callable[[str], None]
) -> list[Check]:
    """Runs each subject in turn, and compares what every device has, in all processes.

    Args:
      mesh: of devices of all processes.
      chosen: the same in every process.
      seed: of the data.
      say: is told what comes next.

    Returns:
      Checks, the same in every process.
    """
    draw = functools.cache(Problem.draw)
    own = []
    for number, subject in enumerate(chosen):
        say(f"correctness {number + 1}/{len(chosen)}: {subject.name}")
        devices = math.prod(mesh.shape[axis] for axis in subject.axes)
        problem = draw(devices, subject.heads(mesh), seed)
        try:
            own.append(_judge(problem, _run(mesh, subject, problem)))
        except DoesNotCompile as error:
            own.append({"failure": str(error)})
        except jax.errors.JaxRuntimeError as error:
            error.add_note(f"distattn check: in {subject.name}")
            if jax.process_count() > 1:  # the others may be waiting in a collective
                raise
            own.append({"failure": first_line(error)})
    everywhere = gathered("correctness", own)
    return [_check(s, [found[i] for found in everywhere]) for i, s in enumerate(chosen)]


def _run(mesh: Mesh, subject: Subject, problem: Problem) -> dict[str, jax.Array]:
    """The results on the devices, by name."""
    replicated = subject.strategy in BY_NAME

    whole, cut = PartitionSpec(), PartitionSpec(None, subject.axes)

    def run(
        query: jax.Array,
        key: jax.Array,
        value: jax.Array,
        query_positions: jax.Array,
        key_positions: jax.Array,
        d_out: jax.Array,
        d_lse: jax.Array,
    ) -> dict[str, jax.Array]:
        def attention(*arrays: jax.Array) -> Any:
            return dot_product_attention(
                *arrays,
                is_causal=True,
                return_residual=True,
                # What is checked is the movement, not with how few bits a device multiplies.
                precision=jax.lax.Precision.HIGHEST,
                query_positions=query_positions,
                key_positions=key_positions,
                query_sharding=NamedSharding(mesh, whole if replicated else cut),
                key_value_sharding=NamedSharding(mesh, cut),
                strategy=subject.strategy,
            )

        (out, lse), pull = jax.vjp(attention, query, key, value)
        return dict(zip(RESULTS, (out, lse, *pull((d_out, d_lse))), strict=True))

    given = problem.arguments | {"d_out": problem.d_out, "d_lse": problem.d_lse}
    arrays = [
        on_mesh(x, mesh, cut if name in ("key", "value", "key_positions") else whole)
        for name, x in given.items()
    ]
    return jax.block_until_ready(prepare(subject.name, run, *arrays)(*arrays))


def _judge(problem: Problem, results: dict[str, jax.Array]) -> dict[str, Any]:
    """What the devices of this process have: the worst error, and a digest of each piece of a result."""
    error, where = 0.0, RESULTS[0]
    digests: dict[str, dict[str, list[int]]] = {}
    for name, result in results.items():
        expected = problem.expected[name]
        unit = float(np.max(np.abs(expected), initial=0.0, where=np.isfinite(expected)))
        for shard in result.addressable_shards:
            got = np.asarray(shard.data)
            fraction = worst(got, expected[shard.index], unit)[0] / problem.tolerance(name)
            if fraction > error:
                error, where = fraction, name
            if got.size * len(result.sharding.device_set) == result.size:
                continue  # each device has a part of its own: there are no replicas
            piece = digests.setdefault(_piece(name, got.shape, result.shape, shard.index), {})
            digest = hashlib.sha256(got.tobytes()).hexdigest()[:16]
            piece.setdefault(digest, []).append(shard.device.id)
    return {"error": error, "where": where, "digests": digests}


def _check(subject: Subject, found: list[dict[str, Any]]) -> Check:
    """One check from what each process has found."""
    if failures := [x["failure"] for x in found if "failure" in x]:
        return Check(subject.name, subject.strategy, math.inf, "", failure=failures[0])
    most = max(found, key=lambda x: x["error"])
    pieces: dict[str, dict[str, list[int]]] = {}
    for digests in (x["digests"] for x in found):
        for piece, owners in digests.items():
            for digest, devices in owners.items():
                pieces.setdefault(piece, {}).setdefault(digest, []).extend(devices)
    unequal = tuple(
        f"{piece} differs between devices {' | '.join(map(_few, owners.values()))}"
        for piece, owners in pieces.items()
        if len(owners) > 1
    )
    return Check(subject.name, subject.strategy, most["error"], most["where"], unequal)


def _piece(
    name: str, own: tuple[Any, ...], whole: tuple[Any, ...], index: tuple[slice, ...]
) -> str:
    """The name of a result, and which part of it this is."""
    cut = (
        f"{part.start or 0}:{part.stop or size}" for part, size in zip(index, whole, strict=True)
    )
    return name if own == whole else f"{name}[{', '.join(cut)}]"


def _few(devices: list[int]) -> str:
    more = ", ..." if len(devices) > 8 else ""
    return ", ".join(map(str, sorted(devices)[:8])) + more
