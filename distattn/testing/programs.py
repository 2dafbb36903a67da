"""What is known of a program that was compiled, or lowered, for devices that are not here.

Many devices on a laptop: fake ones, or a pod to compile for; and what a program sends between them.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from distattn._compat import abstract_device, traced_processes
from distattn.collectives.mesh import check_mesh, on_devices_of
from distattn.planning.pods import pod
from distattn.planning.text import bytes_text, count_text, seconds_text
from distattn.testing.compilers import compiled_for, devices_of, environment
from distattn.testing.hlo import Program


@dataclasses.dataclass(frozen=True)
class Exchange:
    """All collectives of one kind along the same axes, in one run of a program.

    Args:
      kind: as XLA names it: 'collective-permute', 'all-reduce', ....
      axes: of the mesh, along which it goes; () where its groups are none of the mesh's.
      count: how many there are, those in the body of a loop as often as it runs.
      bytes: of what all of them leave on one device. What crosses links for that is another number, see
        `distattn.testing.programs.collective_bytes`.
    """

    kind: str
    axes: tuple[str, ...]
    count: int  # in one run
    bytes: int  # of what they leave on one device


@dataclasses.dataclass(frozen=True)
class Report:
    """What a program sends, holds and computes; `print` shows it as a table.

    The bytes of collectives are those of their results, not those sent.

    All is of one run, and sizes are those of one device. None is not known: `distattn.testing.programs.lower`
    compiles nothing, and then that is all from `argument_bytes` to `optimal_s`.

    Args:
      target: the topology that it was compiled for, or the platform and the mesh that it was lowered for.
      devices: their number.
      exchanges: its collectives, by kind and axes.
      rounds: the longest chain of collectives of which each waits for the one before.
      argument_bytes: of the arguments.
      output_bytes: of the results.
      temp_bytes: of what the program holds beside the two while it runs.
      flops: operations, as XLA counts them: the body of a loop once, however often it runs.
      accessed_bytes: read from and written to the memory of the device; the body of a loop once.
      optimal_s: seconds of a run, as XLA estimates them, each loop once; nothing was timed.
      seconds: that the report took to make on this machine, so none of a run: tracing, lowering and, by
        `compile_for`, compiling.
      hlo: the text that was counted: optimised, or as it was lowered.

    Example:
      >>> from distattn.testing.programs import Exchange, Report
      >>> states = Exchange("collective-permute", ("kv",), count=4, bytes=66560)
      >>> print(Report("tpu, kv=16", 16, (states,), rounds=4, seconds=0.25))
      tpu, kv=16: 16 devices, sizes of one
        collectives             4 collective-permute over kv, results 65 KiB
        wait for one another    4
        arguments               not known
        results                 not known
        temporary               not known
        flops, loops once       not known
        accessed, loops once    not known
        estimate, loops once    not known
        made in                 250 ms
    """

    target: str  # the topology, or the platform and the mesh
    devices: int
    exchanges: tuple[Exchange, ...]
    rounds: int  # collectives that wait for one another
    argument_bytes: int | None = None  # from here on None where it was not compiled
    output_bytes: int | None = None
    temp_bytes: int | None = None
    flops: float | None = None  # XLA's count, the body of a loop once; None where it says nothing
    accessed_bytes: float | None = None  # of memory, the body of a loop once
    optimal_s: float | None = None  # XLA's estimate; None where it has none or says what cannot be
    seconds: float = 0.0  # that tracing, lowering and compiling took; none of a run
    hlo: str = dataclasses.field(default="", repr=False)  # the text that was counted

    def __str__(self) -> str:
        """A table, with units."""

        def known(amount: float | None, text: Callable[[float], str]) -> str:
            return "not known" if amount is None else text(amount)

        sent = [
            f"{x.count} {x.kind} over {', '.join(x.axes) or 'no axis'}, results {bytes_text(x.bytes)}"
            for x in self.exchanges
        ]
        rows = [
            *zip(("collectives", *[""] * len(sent)), sent or ["none"], strict=False),
            ("wait for one another", str(self.rounds)),
            ("arguments", known(self.argument_bytes, bytes_text)),
            ("results", known(self.output_bytes, bytes_text)),
            ("temporary", known(self.temp_bytes, bytes_text)),
            ("flops, loops once", known(self.flops, "{:.3g}".format)),
            ("accessed, loops once", known(self.accessed_bytes, bytes_text)),
            ("estimate, loops once", known(self.optimal_s, seconds_text)),
            ("made in", seconds_text(self.seconds)),
        ]
        head = f"{self.target}: {count_text(self.devices, 'device')}, sizes of one"
        return "\n".join((head, *(f"  {name:22}  {value}" for name, value in rows)))

    @property
    def collectives(self) -> dict[str, dict[str, int]]:
        """{'collective-permute': {'count': 12, 'bytes': 199680}, ...}."""
        found: dict[str, dict[str, int]] = {}
        for x in self.exchanges:
            kind = found.setdefault(x.kind, {"count": 0, "bytes": 0})
            kind["count"] += x.count
            kind["bytes"] += x.bytes
        return found

    def as_json(self) -> dict[str, Any]:
        """All but the text of the program, with `collectives` and their axes."""
        fields = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("hlo", "exchanges")
        }
        exchanges = [dataclasses.asdict(x) for x in self.exchanges]
        return fields | {"collectives": self.collectives, "exchanges": exchanges}


def report_of(
    target: str, text: str, mesh: AbstractMesh | Mesh, ids: list[int] | None = None
) -> Report:
    """What a program sends over a mesh, whose devices have these ids in its replica groups."""
    program = Program(text)
    counts: Counter[tuple[str, tuple[str, ...]]] = Counter()
    sizes: Counter[tuple[str, tuple[str, ...]]] = Counter()
    for x in program.collectives():
        key = x.kind, x.axes(mesh.shape, ids or ())
        counts[key] += x.runs
        sizes[key] += x.runs * x.result_bytes
    exchanges = tuple(
        Exchange(kind, axes, counts[kind, axes], sizes[kind, axes]) for kind, axes in sorted(counts)
    )
    return Report(target, math.prod(mesh.shape.values()), exchanges, program.rounds, hlo=text)


MeshAxes = AbstractMesh | Mesh | Mapping[str, int]


def fake_devices(count: int) -> None:
    """Makes this process see `count` CPU devices and no others.

    Must come before JAX is first used: devices are fixed from then on. Does not itself start JAX, so
    `jax.distributed.initialize` may follow. Wins over the number in `XLA_FLAGS`.

    Args:
      count: number of devices, at least 1.

    Raises:
      ValueError: if `count` is not a positive number.
      RuntimeError: if JAX already runs with other devices.
    """
    if count < 1:
        raise ValueError(
            f"count={count} fake devices; a process needs at least 1: pass a positive int"
        )
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError as late:
        devices = jax.devices()  # JAX runs already: asking for its devices starts nothing
        if len(devices) != count or devices[0].platform != "cpu":
            raise RuntimeError(
                f"fake_devices({count}) comes too late: JAX already runs with {len(devices)} "
                f"{devices[0].platform} device(s). Call it before the process first uses JAX"
            ) from late
    jax.config.update("jax_platforms", "cpu")


def collectives(hlo_text: str, *, executed: bool = False) -> Counter[str]:
    """How many of each collective operation a compiled program holds, or runs.

    An operation in two halves (`all-gather-start`, `all-gather-done`) counts once, by its plain name.

    Args:
      hlo_text: optimised HLO, from `jax.jit(f).lower(...).compile().as_text()`.
      executed: count what is in the body of a loop as often as the loop runs, where XLA knows that;
        else once.

    Returns:
      Counter from the name of the operation, as XLA writes it, to its number; absent if it is 0.
    """
    total: Counter[str] = Counter()
    for found in Program(hlo_text).collectives():
        total[found.kind] += found.runs if executed else 1
    return total


def collective_bytes(hlo_text: str, *, executed: bool = False) -> dict[str, int]:
    """The size of what each kind of collective operation leaves on one device.

    That is the result, not the traffic: what crosses the links for it depends on the algorithm (a
    ring all-gather sends (D-1)/D of its result per device, a permute all of it).

    Args:
      hlo_text: optimised HLO, from `jax.jit(f).lower(...).compile().as_text()`.
      executed: as in `collectives`.

    Returns:
      Dict from the name of the operation to the bytes of its results per device, summed over
      its occurrences in the text, or over its runs.
    """
    total: Counter[str] = Counter()
    for found in Program(hlo_text).collectives():
        total[found.kind] += found.result_bytes * (found.runs if executed else 1)
    return dict(total)


def compile_for(
    f: Callable[..., Any],
    *arguments: Any,
    topology: str,
    mesh: MeshAxes | None = None,
    specs: Any = None,
) -> Report:
    """A function compiled by the real compiler of an accelerator, on a machine that has none.

    The extra `tpu` brings XLA:TPU, `cuda-aot` XLA:GPU. While f is traced, the mesh is that of the context
    (`jax.sharding.get_abstract_mesh()`), with the axes of `mesh`, its devices in rows along the torus.

    Args:
      f: a function of arrays, jitted or not: one call or a whole training step.
      *arguments: pytrees of arrays or `jax.ShapeDtypeStruct`, of global shapes.
      topology: `v5p:16x16x16`, `v5p:16x16x16*16` for 16 slices of it, `h100:16x8` for 16 hosts of 8.
      mesh: sizes of the axes by name, slowest first, as Explicit axes; or a mesh, which says the types of
        its axes. None: that of the arguments' shardings, or one axis `kv`.
      specs: for each argument a PartitionSpec or a pytree of them; None: as the arguments are sharded.

    Returns:
      Report.

    Raises:
      ModuleNotFoundError: the compiler is not installed.
      ValueError: an unknown topology, a mesh of another size, or one that `lower` would not take.
      NotImplementedError: a chip without a compiler here.

    Example:
      distattn.testing.programs.compile_for(step, params, batch, topology="v5p:4x4x4", mesh={"data": 4, "kv": 16})
    """
    wanted = pod(topology, compiled_for())
    with environment():
        devices = devices_of(wanted)
        axes = _axes_for(devices.size, topology, mesh, arguments)
        target = Mesh(devices.reshape(axes.axis_sizes), axes.axis_names, axis_types=axes.axis_types)
        began = time.monotonic()
        platform = "cuda" if wanted.chip.platform == "gpu" else "tpu"
        hosts = traced_processes.set(wanted.hosts)
        try:
            with on_devices_of(target):
                traced = _traced(f, arguments, specs, target)
        finally:
            traced_processes.reset(hosts)
        lowered = traced.lower(lowering_platforms=(platform,))
        compiled = lowered.compile()
        seconds = time.monotonic() - began
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    optimal_s = cost.get("optimal_seconds", 0.0)
    return dataclasses.replace(
        report_of(topology, compiled.as_text(), target, [x.id for x in target.devices.flat]),
        argument_bytes=memory.argument_size_in_bytes,
        output_bytes=memory.output_size_in_bytes,
        temp_bytes=memory.temp_size_in_bytes,
        flops=cost.get("flops"),
        accessed_bytes=cost.get("bytes accessed"),
        optimal_s=optimal_s if 0 < optimal_s < math.inf else None,
        seconds=seconds,
    )


def lower(
    f: Callable[..., Any], *arguments: Any, mesh: MeshAxes, platform: str = "tpu", specs: Any = None
) -> Report:
    """A function lowered for a mesh of any size, on any platform, with no devices and no compiler.

    What is counted is what the program says itself, before any optimisation: of `dot_product_attention`
    all that its strategy sends, forward and backward. What XLA adds where it partitions arrays on its own is
    not there yet, and what it finds to be there twice counts twice, as keys that are gathered again for
    the gradient.

    Args:
      f: as for `compile_for`.
      *arguments: the same.
      mesh: the same; it must be given.
      platform: 'tpu', 'cuda', 'rocm' or 'cpu'.
      specs: as for `compile_for`.

    Returns:
      Report, without memory, flops and time.

    Raises:
      ValueError: a mesh that is none, without an axis, or with one of no whole positive size.
    """
    axes = _axes(mesh)
    device = abstract_device("gpu" if platform in ("cuda", "rocm") else platform)
    axes = AbstractMesh(axes.axis_sizes, axes.axis_names, axes.axis_types, abstract_device=device)
    began = time.monotonic()
    traced = _traced(f, arguments, specs, axes)
    text = traced.lower(lowering_platforms=(platform,)).as_text(dialect="hlo")
    report = report_of(f"{platform}, {_sizes(axes)}", text, axes)
    return dataclasses.replace(report, seconds=time.monotonic() - began)


def _axes(mesh: MeshAxes) -> AbstractMesh:
    if isinstance(mesh, Mapping):
        for name, size in mesh.items():
            if isinstance(size, bool) or not isinstance(size, int | np.integer) or size < 1:
                raise ValueError(
                    f"mesh has {size!r} devices along {name!r}; the size of an axis must be an int of at "
                    f"least 1: pass {{{name!r}: 8}} for eight devices"
                )
        kinds = (AxisType.Explicit,) * len(mesh)
        axes = AbstractMesh(tuple(map(int, mesh.values())), tuple(mesh), axis_types=kinds)
    else:
        check_mesh(mesh)
        axes = mesh.abstract_mesh
    if not axes.axis_names:
        raise ValueError(
            f"mesh is {mesh!r} and has no axis; it must have one at least: pass sizes by name, as "
            "{'kv': 8}, for one device {'kv': 1}"
        )
    return axes


def _axes_for(devices: int, topology: str, mesh: MeshAxes | None, arguments: Any) -> AbstractMesh:
    """The axes that are meant, for so many devices."""
    placed = [x.sharding.mesh for x in jax.tree.leaves(arguments) if _is_placed(x)]
    axes = _axes(next(iter(placed), {"kv": devices}) if mesh is None else mesh)
    size = math.prod(axes.axis_sizes)
    if size != devices:
        raise ValueError(
            f"mesh is {_sizes(axes)}, {size} devices, and topology {topology!r} has {devices}; pass axes "
            f"whose product is {devices}"
        )
    return axes


def _sizes(axes: AbstractMesh) -> str:
    return " x ".join(f"{name}={size}" for name, size in axes.shape.items())


def _is_placed(x: Any) -> bool:
    sharding = getattr(x, "sharding", None)
    return isinstance(sharding, NamedSharding) and not sharding.mesh.empty


def _traced(
    f: Callable[..., Any], arguments: tuple[Any, ...], specs: Any, mesh: AbstractMesh | Mesh
) -> Any:
    """f traced for arguments that lie on the mesh."""
    specs = (None,) * len(arguments) if specs is None else specs
    if len(specs) != len(arguments):
        raise ValueError(
            f"specs has {len(specs)} entries and there are {len(arguments)} arguments; pass one for each"
        )

    def placed(spec: PartitionSpec | None, x: Any) -> jax.ShapeDtypeStruct:
        if spec is None:
            spec = x.sharding.spec if _is_placed(x) else PartitionSpec()
        x = jax.typeof(x) if not hasattr(x, "shape") else x
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    shapes = [
        jax.tree.map(
            lambda spec, part: jax.tree.map(lambda x: placed(spec, x), part),
            spec,
            argument,
            is_leaf=lambda x: x is None or isinstance(x, PartitionSpec),
        )
        for spec, argument in zip(specs, arguments, strict=True)
    ]
    jitted: Any = f if hasattr(f, "trace") else jax.jit(f)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jitted.trace(*shapes)
