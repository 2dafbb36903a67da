"""Programs compiled, or only lowered, for devices that are not here, and reports of what they do."""

from __future__ import annotations

import dataclasses
import math
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from distattn._compat import abstract_device, traced_processes
from distattn.collectives.mesh import on_devices_of
from distattn.planning.pods import pod
from distattn.planning.text import bytes_text, count_text, seconds_text
from distattn.testing.compilers import compiled_for, devices_of, environment
from distattn.testing.devices import MeshAxes, is_on_mesh, mesh_for, mesh_of, sizes_text
from distattn.testing.hlo import Program


@dataclasses.dataclass(frozen=True)
class Exchange:
    """Collectives of one kind along the same axes, in one run of a program.

    Args:
      kind: name of the collective in XLA: 'collective-permute', 'all-reduce', ....
      axes: axes of the mesh along which it communicates; () if its groups are not those of axes.
      count: number of collectives; those in a loop count once per iteration.
      bytes: size of their results on one device. The traffic on links differs, see
        `distattn.testing.collective_bytes`.
    """

    kind: str
    axes: tuple[str, ...]
    count: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Report:
    """Communication, memory and work of one device in one run of a program; `print` shows a table.

    The fields from `argument_bytes` to `optimal_s` are None if unknown, as after
    `distattn.testing.lower`, which compiles nothing.

    Args:
      target: topology that it was compiled for, or platform and mesh that it was lowered for.
      devices: number of devices.
      exchanges: collectives, by kind and axes. Their bytes are those of results, not those sent.
      rounds: length of the longest chain of collectives that wait for one another.
      argument_bytes: size of the arguments.
      output_bytes: size of the results.
      temp_bytes: size of everything else that the program holds while it runs.
      flops: operations counted by XLA, which counts the body of a loop once.
      accessed_bytes: bytes read from and written to memory; the body of a loop counts once.
      optimal_s: seconds of a run estimated by XLA, each loop once; nothing was timed.
      seconds: time that tracing, lowering and compiling took on this machine.
      hlo: text in which collectives were counted, optimised or as lowered.

    Examples:
      >>> from distattn.testing import Exchange, Report
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

    target: str
    devices: int
    exchanges: tuple[Exchange, ...]
    rounds: int
    argument_bytes: int | None = None
    output_bytes: int | None = None
    temp_bytes: int | None = None
    flops: float | None = None
    accessed_bytes: float | None = None
    optimal_s: float | None = None
    seconds: float = 0.0
    hlo: str = dataclasses.field(default="", repr=False)

    def __str__(self) -> str:
        """Format the report as a table, with units."""

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
        """Sums by kind: {'collective-permute': {'count': 12, 'bytes': 199680}, ...}."""
        sums: dict[str, dict[str, int]] = {}
        for x in self.exchanges:
            kind = sums.setdefault(x.kind, {"count": 0, "bytes": 0})
            kind["count"] += x.count
            kind["bytes"] += x.bytes
        return sums

    def as_json(self) -> dict[str, Any]:
        """Return all fields but the text of the program, with `collectives`."""
        fields = dataclasses.asdict(self) | {"collectives": self.collectives}
        del fields["hlo"]
        return fields


def compile_for(
    f: Callable[..., Any],
    *arguments: Any,
    topology: str,
    mesh: MeshAxes | None = None,
    specs: Any = None,
) -> Report:
    """Compile a function by the real compiler of an accelerator, on a machine that has none.

    The extra `tpu` brings XLA:TPU, `cuda-aot` XLA:GPU. While f is traced, the mesh of the context
    (`jax.sharding.get_abstract_mesh()`) has the axes of `mesh`, and its devices follow the torus row
    by row.

    Args:
      f: a function of arrays, jitted or not: one call or a whole training step.
      *arguments: pytrees of arrays or `jax.ShapeDtypeStruct`, of global shapes.
      topology: `v5p:16x16x16`, `v5p:16x16x16*16` for 16 slices of it, `h100:16x8` for 16 hosts of 8.
      mesh: sizes of Explicit axes by name, slowest first; or a mesh, with the types of its axes. None:
        the mesh of the arguments' shardings, or one axis `kv`.
      specs: for each argument a PartitionSpec or a pytree of them; None: as the arguments are sharded.

    Returns:
      Report.

    Raises:
      ModuleNotFoundError: the compiler is not installed.
      ValueError: an unknown topology, a mesh of another size, or one that `lower` refuses too.
      NotImplementedError: a chip without a compiler here.

    Examples:
      distattn.testing.compile_for(step, params, batch, topology="v5p:4x4x4", mesh={"data": 4, "kv": 16})
    """
    wanted = pod(topology, compiled_for())
    with environment():
        devices = devices_of(wanted)
        axes = mesh_for(devices.size, topology, mesh, arguments)
        target = Mesh(devices.reshape(axes.axis_sizes), axes.axis_names, axis_types=axes.axis_types)
        began = time.monotonic()
        platform = "cuda" if wanted.chip.platform == "gpu" else "tpu"
        hosts = traced_processes.set(wanted.hosts)
        try:
            with on_devices_of(target):
                traced = _traced(f, arguments, specs, target)
        finally:
            traced_processes.reset(hosts)
        compiled = traced.lower(lowering_platforms=(platform,)).compile()
        seconds = time.monotonic() - began
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis() or {}
    optimal_s = cost.get("optimal_seconds", 0.0)
    return dataclasses.replace(
        _report(topology, compiled.as_text(), target, [x.id for x in target.devices.flat]),
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
    """Lower a function for a mesh of any size, on any platform, without devices and compilers.

    The report counts what the program itself says before any optimisation: for
    `dot_product_attention` everything that its strategy sends, forward and backward. It lacks the
    collectives that XLA adds where it partitions arrays. Duplicates that XLA would remove count
    twice, as keys that are gathered again for the gradient.

    Args:
      f: as for `compile_for`.
      *arguments: as for `compile_for`.
      mesh: as for `compile_for`, but required.
      platform: 'tpu', 'cuda', 'rocm' or 'cpu'.
      specs: as for `compile_for`.

    Returns:
      Report, without memory, flops and time.

    Raises:
      ValueError: not a mesh, a mesh without axes, or a size that is not a positive int.
    """
    axes = mesh_of(mesh)
    device = abstract_device("gpu" if platform in ("cuda", "rocm") else platform)
    axes = AbstractMesh(axes.axis_sizes, axes.axis_names, axes.axis_types, abstract_device=device)
    began = time.monotonic()
    traced = _traced(f, arguments, specs, axes)
    text = traced.lower(lowering_platforms=(platform,)).as_text(dialect="hlo")
    report = _report(f"{platform}, {sizes_text(axes)}", text, axes)
    return dataclasses.replace(report, seconds=time.monotonic() - began)


def _traced(
    f: Callable[..., Any], arguments: tuple[Any, ...], specs: Any, mesh: AbstractMesh | Mesh
) -> Any:
    """Trace f for arguments that are sharded over the mesh."""
    specs = (None,) * len(arguments) if specs is None else specs
    if len(specs) != len(arguments):
        raise ValueError(
            f"specs has {len(specs)} entries and there are {len(arguments)} arguments; pass one for each"
        )

    def sharded(spec: PartitionSpec | None, x: Any) -> jax.ShapeDtypeStruct:
        if spec is None:
            spec = x.sharding.spec if is_on_mesh(x) else PartitionSpec()
        x = jax.typeof(x) if not hasattr(x, "shape") else x
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    shapes = jax.tree.map(
        lambda spec, argument: jax.tree.map(lambda x: sharded(spec, x), argument),
        tuple(specs),
        arguments,
        is_leaf=lambda x: x is None or isinstance(x, PartitionSpec),
    )
    jitted: Any = f if hasattr(f, "trace") else jax.jit(f)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return jitted.trace(*shapes)


def _report(
    target: str, text: str, mesh: AbstractMesh | Mesh, ids: list[int] | None = None
) -> Report:
    """Count the collectives of a program over a mesh; `ids` are those of its devices."""
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
