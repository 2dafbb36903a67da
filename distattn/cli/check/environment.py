"""What runs where: the block that stands at the head of a bug report."""

import importlib.metadata
import os
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
from jax.sharding import Mesh

from distattn.cli.check.examination import versions
from distattn.distributed.start import NAMES

# Read, where they are installed, from what the packages say of themselves: nothing is imported for it.
PACKAGES = (
    *("flax", "equinox", "optax", "orbax-checkpoint", "ringattention", "tokamax"),
    *("libtpu", "jax-cuda12-plugin", "jax-cuda13-plugin", "jax-rocm7-plugin"),
)
# Of the environment only what these begin: no token and no password has such a name.
VARIABLES = ("JAX_", "XLA_", "LIBTPU_", "TPU_", "NCCL_", "CUDA_VISIBLE", "PJRT_", "DISTATTN_")
CONFIG = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_numpy_dtype_promotion",
    "jax_debug_nans",
    "jax_disable_jit",
    "jax_compilation_cache_dir",
)
IMPORTED = ("TPU_SKIP_MDS_QUERY", "1")  # JAX sets it as it is imported, where there is no TPU
STARTED_WITH = Path("/proc/self/environ")  # Linux keeps it; os.environ is what became of it


def environment(mesh: Mesh) -> str:
    """Versions, devices, mesh and flags, in lines to be pasted into a report; nothing is run.

    Args:
      mesh: whose devices and axes are meant.
    """
    lines = list(_lines(mesh))
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:{width}}  {value}" for name, value in lines)


def _lines(mesh: Mesh) -> Iterator[tuple[str, str]]:
    yield "versions", ", ".join(f"{name} {version}" for name, version in versions().items())
    installed = [f"{name} {version}" for name in PACKAGES if (version := _version(name))]
    yield "also installed", ", ".join(installed) or f"none of {', '.join(PACKAGES)}"
    yield "machine", f"{platform.platform()}, {os.cpu_count()} CPUs"
    devices = list(mesh.devices.flat)
    kinds = sorted({device.device_kind for device in devices})
    processes = {device.process_index for device in devices}
    yield (
        "devices",
        f"{len(devices)} {devices[0].platform} ({', '.join(kinds)}) in {len(processes)} of "
        f"{jax.process_count()} processes; the default backend is {jax.default_backend()}",
    )
    types = zip(mesh.shape.items(), mesh.axis_types, strict=True)
    yield "mesh", ", ".join(f"{name}={size} {kind.name}" for (name, size), kind in types)
    slices = {getattr(device, "slice_index", 0) for device in devices}
    if len(slices) > 1:
        yield "slices", str(len(slices))
    yield "config", ", ".join(f"{name}={getattr(jax.config, name)}" for name in CONFIG)
    yield from _variables(os.environ, _started_with())


def _variables(
    now: Mapping[str, str], before: Mapping[str, str] | None
) -> Iterator[tuple[str, str]]:
    """What the user has set, and apart from it what the launcher, JAX and distattn have."""
    present = _known(now)
    if before is None:
        for name, value in present.items():
            yield "set", f"{name}={value} (by whom, this system does not tell)"
        return
    first = _known(before)
    if NAMES & first.keys():  # the launcher hands on what JAX has set in it
        first = {name: x for name, x in first.items() if (name, x) != IMPORTED}
    own = {name: value for name, value in first.items() if name not in NAMES}
    for name, value in own.items():
        yield "set by you", f"{name}={value}"
    if not own:
        yield "set by you", f"no variable that begins with {', '.join(VARIABLES)}"
    for name in sorted(NAMES & first.keys()):
        yield "set by distattn launch", f"{name}={first[name]}"
    for name, value in present.items():
        if first.get(name) != value:  # XLA_FLAGS in which something was there before are in both
            yield "set by JAX or distattn", f"{name}={value}"


def _known(variables: Mapping[str, str]) -> dict[str, str]:
    return {name: x for name, x in sorted(variables.items()) if name.startswith(VARIABLES)}


def _started_with() -> dict[str, str] | None:
    """The variables with which the process began; None where the system does not keep them."""
    if not STARTED_WITH.exists():
        return None
    entries = os.fsdecode(STARTED_WITH.read_bytes()).split("\0")
    return {name: value for name, _, value in (entry.partition("=") for entry in entries) if name}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
