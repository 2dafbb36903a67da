"""Runner of `distattn check`: correctness, replicas, links and times of strategies, as one JSON report.

Every process of the job calls it and gets the same report.
"""

import dataclasses
import functools
import hashlib
import itertools
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from distattn._compat import platform_of
from distattn.attention.api import dot_product_attention
from distattn.attention.strategy import STRATEGIES
from distattn.collectives.all_reduce import BY_NAME
from distattn.collectives.mesh import on_devices_of, on_shards, slice_axes
from distattn.distributed.agreement import assert_same, meet
from distattn.distributed.start import versions
from distattn.planning import cost
from distattn.planning.chips import fit_link
from distattn.planning.cost import QUERY_REPLICATED, QUERY_SHARDED, Topology, Workload
from distattn.planning.plan import Axes
from distattn.testing import reference
from distattn.testing.reference import tolerance, worst

Say = Callable[[str], None]
Json = dict[str, Any]
NAMED = tuple(name for name in STRATEGIES if name != "auto")
RESULTS = ("out", "lse", "dquery", "dkey", "dvalue")
B, T, N, K, H, V = 2, 6, 4, 2, 8, 6
SLOTS = 4  # on each device
MAX_HEADS = 512  # the reference takes minutes for more: it computes one query and head at a time
HOPS = 8  # messages of a program, which share the time to start it
QUICK_SIZES = (8, 16 << 10, 256 << 10)
FULL_SIZES = (8, 1 << 10, 16 << 10, 256 << 10, 4 << 20)
TIMEOUT_S = 300.0  # for processes that compile more slowly


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much to check and measure."""

    quick: bool = False
    sizes: tuple[int, ...] | None = None  # bytes per message; None: QUICK_SIZES or FULL_SIZES
    repeats: int | None = None  # per measurement; None: 10 or 30
    strategies: tuple[str, ...] = NAMED
    seed: int = 0


def examine(mesh: Mesh, effort: Effort, say: Say) -> Json:
    """Check and measure on a mesh of all devices; return the report of `distattn check --json`.

    Args:
      mesh: mesh of all devices, slow axis first.
      effort: how much to do.
      say: function that is told each next step.

    Raises:
      RuntimeError, TimeoutError: processes differ or do not come, as in `distributed.assert_same`.
    """
    chosen, left_out = subjects(mesh, effort.strategies, quick=effort.quick)
    checks = check(mesh, chosen, effort.seed, say)
    equal = not any(found["unequal_replicas"] for found in checks)
    compared = any("failure" not in found for found in checks)
    device = mesh.devices.flat[0]
    report: Json = {
        "versions": versions() | {"numpy": np.__version__, "python": platform.python_version()},
        "platform": device.platform,
        "device_kind": device.device_kind,
        "devices": mesh.size,
        "processes": jax.process_count(),
        "mesh": dict(mesh.shape),
        "checks": checks,
        "not_checked": left_out,
        "between_devices_checked": mesh.size > 1,
        "replicas_equal": equal and compared if mesh.size > 1 else None,
        "axes": {},
        "strategy_s": {},
        "auto": {},
        "verdict": "passed" if equal and all(found["pass"] for found in checks) else "failed",
    }
    if mesh.size > 1 and not any("failure" in found for found in checks):
        sizes = effort.sizes or (QUICK_SIZES if effort.quick else FULL_SIZES)
        repeats = effort.repeats or (10 if effort.quick else 30)
        report["axes"] = measure_links(mesh, wide_axes(mesh), sizes, repeats, say)
        links = cost.links_from(report)
        for case in cases(mesh.size, quick=effort.quick):
            seconds = measure_strategies(mesh, case, effort.strategies, repeats, say)
            if seconds:
                report["strategy_s"][case.name] = seconds
                report["auto"][case.name] = predictions(mesh, case, seconds, links)
    return report


# --- programs that every process compiles and runs ---


class DoesNotCompile(Exception):
    """JAX or XLA rejects a program in some process; every process raises it."""


def prepare(name: str, f: Callable[..., Any], *arguments: jax.Array) -> Callable[..., Any]:
    """Compile `f` for these arguments and wait until every process has compiled the same program.

    So the processes reach its first collective together, which waits only 30 s for the others.
    """
    lowered, compiled, failure = None, None, ""
    try:
        lowered = jax.jit(f).lower(*arguments)
        compiled = lowered.compile()
    except (ValueError, RuntimeError, NotImplementedError) as error:
        failure = first_line(error)
    failures = gathered(f"{name}: compiled", failure)
    if compiled is None or any(failures):
        rank, failure = next((i, text) for i, text in enumerate(failures) if text)
        raise DoesNotCompile(failure + (f" (rank {rank})" if len(failures) > 1 else ""))
    if jax.process_count() > 1:
        assert_same(f"check: {name}", {"program": lowered}, timeout_s=TIMEOUT_S)
    return compiled


def first_line(error: Exception) -> str:
    """Return the type of an error and the start of its message."""
    return f"{type(error).__name__}: {error}".partition("\n")[0][:300]


def gathered(name: str, value: Any) -> list[Any]:
    """Return each rank's value, which JSON can hold."""
    texts = meet(f"check: {name}", json.dumps(value), timeout_s=TIMEOUT_S)
    return [json.loads(texts[rank]) for rank in sorted(texts)]


def on_mesh(x: np.ndarray, mesh: Mesh, spec: PartitionSpec) -> jax.Array:
    """Return the global array of data that every process has."""
    make: Callable[..., jax.Array] = jax.make_array_from_callback
    return make(x.shape, NamedSharding(mesh, spec), lambda index: x[index])


def medians(
    programs: Mapping[str, tuple[Callable[..., Any], tuple[Any, ...]]], repeats: int
) -> dict[str, float]:
    """Return seconds of each program: the median of interleaved runs, in the slowest process.

    Args:
      programs: compiled program and arguments by name, equal in every process.
      repeats: number of timed runs, after one that is not timed.
    """
    times: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(repeats + 1):
        for name, (program, arguments) in programs.items():
            began = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            if turn:
                times[name].append(time.perf_counter() - began)
    everywhere = gathered("times", {name: statistics.median(x) for name, x in times.items()})
    return {name: max(process[name] for process in everywhere) for name in programs}


# --- correctness ---


@dataclasses.dataclass(frozen=True)
class Subject:
    """Strategy to check, and the axes that shard the keys, in the order of their shards."""

    strategy: str
    axes: Axes

    @property
    def name(self) -> str:
        """'ring over host, device'."""
        return f"{self.strategy} over {', '.join(self.axes)}"

    def num_heads(self, mesh: Mesh) -> int:
        """Return the number of query heads, a multiple of the devices that shard them."""
        if self.strategy not in cost.HEADS_SHARDED:
            return N
        over = self.axes[-1:] if self.strategy in cost.TWO_LEVELS else self.axes
        return math.lcm(N, math.prod(mesh.shape[axis] for axis in over))


def wide_axes(mesh: Mesh) -> Axes:
    """Return the axes of more than one device, or the last axis if every axis has one."""
    return tuple(a for a in mesh.axis_names if mesh.shape[a] > 1) or mesh.axis_names[-1:]


def subjects(
    mesh: Mesh, strategies: Sequence[str], *, quick: bool
) -> tuple[list[Subject], list[str]]:
    """Return what to check on a mesh, and the reason for each strategy that is left out.

    Every strategy is checked over all axes in the order of the mesh. Other orders and each axis alone are
    checked with every strategy too, or with the first one if `quick`.
    """
    axes = wide_axes(mesh)
    orders = list(itertools.permutations(axes)) if len(axes) <= 3 else [axes, axes[::-1]]
    alone = [(axis,) for axis in axes] if len(axes) > 1 else []
    if quick:
        orders = orders[:1] + orders[1:][-1:]  # the order of the mesh, and its reverse
    found, left_out = [], []
    if not alone:
        two = [name for name in strategies if name in cost.TWO_LEVELS]
        left_out = [f"{name}: needs two axes of devices" for name in two]
    if "fused" in strategies and platform_of(mesh) != "tpu":
        left_out.append("fused: needs TPUs")
        strategies = [name for name in strategies if name != "fused"]
    for order, strategy in itertools.product((*orders, *alone), strategies):
        subject = Subject(strategy, order)
        if strategy in cost.TWO_LEVELS and len(order) < 2:
            continue
        if strategy == "fused" and not _within_slices(mesh, order):
            left_out.append(f"{subject.name}: needs an axis within a slice")
        elif subject.num_heads(mesh) > MAX_HEADS:
            left_out.append(f"{subject.name}: needs {subject.num_heads(mesh)} heads")
        elif not quick or order == axes or strategy == strategies[0]:
            found.append(subject)
    return found, left_out


def _within_slices(mesh: Mesh, axes: Axes) -> bool:
    """Return whether some of the axes are within a TPU slice."""
    with on_devices_of(mesh):
        return bool(set(axes) - set(slice_axes(axes) or ()))


@dataclasses.dataclass(frozen=True)
class Problem:
    """Causal attention to keys in random order with padding slots, and its float64 results."""

    arguments: dict[str, np.ndarray]
    cotangents: dict[str, np.ndarray]  # by name: dout, dlse
    expected: dict[str, np.ndarray]  # by RESULTS

    @classmethod
    def draw(cls, devices: int, num_heads: int, seed: int) -> "Problem":
        """Draw the same problem in every process; the last of several devices has no key."""
        rng = np.random.default_rng(seed)
        slots = SLOTS * devices

        def normal(*shape: int) -> np.ndarray:
            return rng.normal(size=shape).astype(np.float32)

        positions = np.stack([rng.permutation(3 * slots)[:slots] for _ in range(B)])
        positions[rng.random(positions.shape) < 0.25] = -1
        if devices > 1:
            positions[:, -SLOTS:] = -1
        arguments = {
            "query": normal(B, T, num_heads, H),
            "key": normal(B, slots, K, H),
            "value": normal(B, slots, K, V),
            "query_positions": rng.integers(0, 3 * slots, (B, T), dtype=np.int32),
            "key_positions": positions.astype(np.int32),
        }
        cotangents = {"dout": normal(B, T, num_heads, V), "dlse": normal(B, T, num_heads)}
        out, lse = reference.dot_product_attention(**arguments, is_causal=True)
        gradients = reference.attention_gradients(**arguments, is_causal=True, **cotangents)
        return cls(arguments, cotangents, {"out": out, "lse": lse, **gradients})

    def tolerance(self, result: str) -> float:
        """Return the tolerance for sums of this result: over keys, head_dim and, for keys, queries."""
        terms = self.arguments["key"].shape[1]
        if result.startswith("d"):
            terms += H + V
        if result in ("dkey", "dvalue"):
            terms += T * self.arguments["query"].shape[2] // K
        return tolerance(np.float32, terms)


def check(mesh: Mesh, chosen: Sequence[Subject], seed: int, say: Say) -> list[Json]:
    """Run each subject, and compare the results of every device in all processes."""
    draw = functools.cache(Problem.draw)
    local = []
    for number, subject in enumerate(chosen):
        say(f"correctness {number + 1}/{len(chosen)}: {subject.name}")
        devices = math.prod(mesh.shape[axis] for axis in subject.axes)
        problem = draw(devices, subject.num_heads(mesh), seed)
        try:
            local.append(compare(problem, _run(mesh, subject, problem)))
        except DoesNotCompile as error:
            local.append({"failure": str(error)})
        except jax.errors.JaxRuntimeError as error:
            error.add_note(f"distattn check: in {subject.name}")
            if jax.process_count() > 1:  # the others may be waiting in a collective
                raise
            local.append({"failure": first_line(error)})
    everywhere = gathered("correctness", local)
    return [summarize(s, [found[i] for found in everywhere]) for i, s in enumerate(chosen)]


def _run(mesh: Mesh, subject: Subject, problem: Problem) -> dict[str, jax.Array]:
    """Return the results on the devices, by name."""
    whole, split = PartitionSpec(), PartitionSpec(None, subject.axes)
    arguments = problem.arguments | problem.cotangents
    split_names = ("key", "value", "key_positions")

    def run(*arrays: jax.Array) -> dict[str, jax.Array]:
        given = dict(zip(arguments, arrays, strict=True))

        def attention(query: jax.Array, key: jax.Array, value: jax.Array) -> Any:
            return dot_product_attention(
                query,
                key,
                value,
                is_causal=True,
                return_residual=True,
                precision=lax.Precision.HIGHEST,  # the check is of the exchange
                query_positions=given["query_positions"],
                key_positions=given["key_positions"],
                query_sharding=NamedSharding(mesh, whole if subject.strategy in BY_NAME else split),
                key_value_sharding=NamedSharding(mesh, split),
                strategy=subject.strategy,
            )

        (out, lse), pull = jax.vjp(attention, *arrays[:3])
        gradients = pull((given["dout"], given["dlse"]))
        return dict(zip(RESULTS, (out, lse, *gradients), strict=True))

    arrays = [
        on_mesh(x, mesh, split if name in split_names else whole) for name, x in arguments.items()
    ]
    return jax.block_until_ready(prepare(subject.name, run, *arrays)(*arrays))


def compare(problem: Problem, results: dict[str, jax.Array]) -> Json:
    """Return the worst error on the devices of this process, and a digest of each replicated piece."""
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
                continue  # no replicas
            bounds = zip(shard.index, result.shape, strict=True)
            index = ", ".join(f"{cut.start or 0}:{cut.stop or size}" for cut, size in bounds)
            piece = name if got.shape == result.shape else f"{name}[{index}]"
            digest = hashlib.sha256(got.tobytes()).hexdigest()[:16]
            digests.setdefault(piece, {}).setdefault(digest, []).append(shard.device.id)
    return {"error": error, "where": where, "digests": digests}


def summarize(subject: Subject, found: list[Json]) -> Json:
    """Merge the findings of all processes into an entry of the report."""
    failures = [x["failure"] for x in found if "failure" in x]
    entry: Json = {"name": subject.name, "strategy": subject.strategy, "pass": False}
    if failures:
        more = {"error_fraction": None, "worst": "", "unequal_replicas": []}
        return entry | more | {"failure": failures[0]}
    most = max(found, key=lambda x: x["error"])
    finite = math.isfinite(most["error"])  # JSON has no infinity
    owners: dict[str, dict[str, list[int]]] = {}
    for piece, by_digest in itertools.chain(*(x["digests"].items() for x in found)):
        for digest, devices in by_digest.items():
            owners.setdefault(piece, {}).setdefault(digest, []).extend(devices)
    return entry | {
        "pass": most["error"] <= 1,
        "error_fraction": most["error"] if finite else None,
        "worst": most["where"],
        "unequal_replicas": [
            f"{piece} differs between devices {' | '.join(map(_few, by_digest.values()))}"
            for piece, by_digest in owners.items()
            if len(by_digest) > 1
        ],
    }


def _few(devices: list[int]) -> str:
    return ", ".join(map(str, sorted(devices)[:8])) + (", ..." if len(devices) > 8 else "")


# --- links ---


def measure_links(
    mesh: Mesh, axes: Sequence[str], sizes: Sequence[int], repeats: int, say: Say
) -> Json:
    """Time permutes along each axis, interleaved, and fit latency and bandwidth.

    Args:
      mesh: mesh of all devices.
      axes: axes of more than one device.
      sizes: bytes per message, at least two different ones; rounded up to multiples of 4.
      repeats: number of timed runs.
      say: function that is told each next step.
    """
    programs: dict[str, Any] = {}
    names: dict[str, dict[int, str]] = {axis: {} for axis in axes}
    for axis in axes:
        say(f"permutes along {axis}: compiling {len(sizes)} sizes")
        for size in sizes:
            items = max(1, -(-size // 4))
            data = np.ones(mesh.size * items, np.float32)
            x = on_mesh(data, mesh, PartitionSpec(mesh.axis_names))
            name = names[axis][4 * items] = f"permute of {4 * items} bytes along {axis}"
            programs[name] = (prepare(name, hops(mesh, axis), x), (x,))
    say(f"permutes: timing {len(programs)} of them {repeats} times")
    seconds = medians(programs, repeats)
    report: Json = {}
    for axis, by_size in names.items():
        samples = [(size, seconds[name] / HOPS) for size, name in by_size.items()]
        link, residual = fit_link(samples)
        report[axis] = {
            "latency_s": link.latency_s,
            "bytes_per_s": link.bytes_per_s,
            "residual": residual,  # root mean square of (fitted - measured) / measured
            "samples": [{"bytes": size, "seconds": x} for size, x in samples],
        }
    return report


def hops(mesh: Mesh, axis: str) -> Callable[[jax.Array], jax.Array]:
    """Return a program that sends `HOPS` messages from every device to its neighbour along the axis."""
    size = mesh.shape[axis]
    pairs = [(i, (i + 1) % size) for i in range(size)]

    def body(x: jax.Array) -> jax.Array:
        return lax.fori_loop(0, HOPS, lambda _, y: lax.ppermute(y, axis, pairs), x)

    spec = PartitionSpec(mesh.axis_names)
    return on_shards(body, mesh=mesh, in_specs=(spec,), out_specs=spec, axis_names=mesh.axis_names)


# --- times of strategies ---


@dataclasses.dataclass(frozen=True)
class Case:
    """Workload for which each strategy is timed, forward."""

    name: str
    workload: Workload
    query_sharded: bool


def cases(devices: int, *, quick: bool) -> tuple[Case, ...]:
    """Return few and many replicated queries, and few and many queries sharded like the keys."""
    keys, queries = (16, 32) if quick else (64, 256)  # keys per device, replicated queries

    def sizes(length: int) -> Workload:
        return Workload(1, length, keys * devices, 8, 2, 64, 64, 4)

    return (
        Case("replicated query, T=1", sizes(1), False),
        Case(f"replicated query, T={queries}", sizes(queries), False),
        Case("sharded query, T=1 per device", sizes(devices), True),
        Case(f"sharded query, T={keys} per device", sizes(keys * devices), True),
    )


def _topology(mesh: Mesh) -> Topology:
    sizes = tuple(mesh.shape[axis] for axis in wide_axes(mesh))
    return Topology(mesh.devices.flat[0].platform, sizes, jax.process_count())


def measure_strategies(
    mesh: Mesh, case: Case, strategies: Sequence[str], repeats: int, say: Say
) -> dict[str, float]:
    """Return the seconds of each strategy that fits the case, over all axes in the mesh's order."""
    known = QUERY_SHARDED if case.query_sharded else QUERY_REPLICATED
    w, topology = case.workload, _topology(mesh)
    names = [x for x in known if x in strategies and cost.fits(x, w, topology)]
    if not names:
        return {}
    say(f"{case.name}: timing {', '.join(names)}")
    split = PartitionSpec(None, wide_axes(mesh))
    query_spec = split if case.query_sharded else PartitionSpec()
    queries, keys = (w.query_length, w.num_heads), (w.key_length, w.num_kv_heads)
    dims = ((*queries, w.head_dim), (*keys, w.head_dim), (*keys, w.value_dim))
    rng = np.random.default_rng(0)
    arrays = tuple(
        on_mesh(rng.normal(size=(w.batch, *d)).astype(np.float32), mesh, spec)
        for d, spec in zip(dims, (query_spec, split, split), strict=True)
    )

    def program(strategy: str) -> Callable[..., Any]:
        f = functools.partial(
            dot_product_attention,
            query_sharding=NamedSharding(mesh, query_spec),
            key_value_sharding=NamedSharding(mesh, split),
            strategy=strategy,
        )
        return prepare(f"{strategy}, {case.name}", f, *arrays)

    return medians({name: (program(name), arrays) for name in names}, repeats)


def predictions(
    mesh: Mesh, case: Case, seconds: Mapping[str, float], links: Mapping[str, cost.Link]
) -> Json:
    """Return what `strategy="auto"` chooses, with the built-in and with the measured links."""
    table = _topology(mesh)
    measured = dataclasses.replace(table, links=tuple(links[axis] for axis in wide_axes(mesh)))
    by_table, by_links = (
        cost.choose(
            case.workload,
            topology,
            query_sharded=case.query_sharded,
            candidates=tuple(seconds),
        ).strategy
        for topology in (table, measured)
    )
    fastest = min(seconds, key=lambda name: seconds[name])
    return {
        "payload_bytes": case.workload.payload_bytes,
        "query_sharded": case.query_sharded,
        "by_table": by_table,
        "by_measured_links": by_links,
        "fastest": fastest,
        "slower_than_fastest": seconds[by_table] / seconds[fastest],
    }
