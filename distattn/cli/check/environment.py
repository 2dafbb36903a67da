"""What runs where: the block that stands at the head of a bug report."""

import importlib.metadata
import os
import platform
from collections.abc import Iterator

import jax
from jax.sharding import Mesh

from distattn.cli.check.examination import versions

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
    found = {name: x for name, x in sorted(os.environ.items()) if name.startswith(VARIABLES)}
    if not found:
        yield "environment", f"no variable that begins with {', '.join(VARIABLES)}"
    for name, value in found.items():
        yield "environment", f"{name}={value}"


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
