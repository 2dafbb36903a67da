"""Compile-only devices of a named topology, from the real compilers of accelerators."""

import contextlib
import importlib.util
import os
from collections.abc import Generator
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies

from distattn._compat import command
from distattn.planning.chips import CHIPS
from distattn.planning.pods import Pod

# GpuTargetConfigProto of OpenXLA for an H100 SXM with 80 GB.
_H100 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84978434048
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
GPU_TARGETS = {"h100": _H100}

# Nothing here runs on a TPU: keep libtpu from asking a cloud for one, and from locking it.
_TPU_ENVIRONMENT = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",
}


@contextlib.contextmanager
def environment() -> Generator[None, None, None]:
    """Set the environment variables of the compilers, and hide XLA_FLAGS meanwhile.

    libtpu ends the process for a flag that only XLA:CPU knows. Its flags are in LIBTPU_INIT_ARGS.
    """
    jax.devices()  # JAX reads the flags when it starts
    for name, value in _TPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    flags = os.environ.pop("XLA_FLAGS", None)
    try:
        yield
    finally:
        if flags is not None:
            os.environ["XLA_FLAGS"] = flags


def compiled_for() -> tuple[str, ...]:
    """Return the chips for which `devices_of` has a compiler, if the extras are installed."""
    return tuple(x.name for x in CHIPS.values() if x.platform == "tpu" or x.name in GPU_TARGETS)


def devices_of(pod: Pod) -> np.ndarray:
    """Return the devices to compile for; call it in `environment`.

    Raises:
      ModuleNotFoundError: the compiler is not installed; says which extra brings it.
      ValueError: a topology that the compiler does not know.
      NotImplementedError: a chip without a compiler here.

    Returns:
      [slices, *torus] on a TPU, [hosts, GPUs of a host] on a GPU. If a chip is two devices, the last
      dimension counts them.
    """
    if pod.chip.platform == "tpu":
        return _tpu_devices(pod)
    if pod.chip.name in compiled_for():
        return _gpu_devices(pod)
    raise NotImplementedError(
        f"topology {pod.name!r}: there is no compiler here for {pod.chip.name}; compile for a TPU or one "
        f"of {sorted(GPU_TARGETS)}, or use distattn.testing.lower, which needs none"
    )


def _tpu_devices(pod: Pod) -> np.ndarray:
    _require("libtpu", "tpu", pod)
    shape = "x".join(map(str, pod.torus))
    more: dict[str, Any] = {"num_slices": pod.slices} if pod.slices > 1 else {}
    if pod.chip.name == "v4":  # as on real ones both cores of a chip are one device
        more["chip_config_name"] = "megacore"
    found = _topology(pod, platform="tpu", topology_name=f"{pod.chip.name}:{shape}", **more)

    def position(device: Any) -> tuple[int, ...]:
        # A mesh follows the torus row by row, the last dimension the fastest.
        coordinates = device.coords[: len(pod.torus)]
        return (getattr(device, "slice_index", None) or 0, *coordinates, device.core_on_chip)

    devices = _array(sorted(found, key=position))
    cores = devices.size // (pod.slices * int(np.prod(pod.torus)))
    return devices.reshape(pod.slices, *pod.torus, *((cores,) if cores > 1 else ()))


def _gpu_devices(pod: Pod) -> np.ndarray:
    _require("jax_plugins.xla_cuda12", "cuda-aot", pod)
    hosts, gpus = pod.hosts, pod.devices // pod.hosts
    name = f"1x{hosts}x{gpus}"
    found = _topology(
        pod,
        platform="cuda",
        topology_name=name,
        topology=name,
        target_config=GPU_TARGETS[pod.chip.name],
    )
    return _array(sorted(found, key=lambda device: device.id)).reshape(hosts, gpus)


def _topology(pod: Pod, **options: Any) -> list[Any]:
    try:
        return list(topologies.get_topology_desc(**options).devices)
    except (RuntimeError, ValueError, KeyError, jax.errors.JaxRuntimeError) as error:
        raise ValueError(
            f"topology {pod.name!r}: the {pod.chip.platform.upper()} compiler does not take it ({error}); "
            "use another, such as v5e:4x4, v5p:4x4x4 or h100:2x8"
        ) from error


def _require(module: str, extra: str, pod: Pod) -> None:
    try:
        found = importlib.util.find_spec(module)
    except ModuleNotFoundError:  # a package above it
        found = None
    if found is None:
        raise ModuleNotFoundError(
            f"topology {pod.name!r}: {module} is not installed, the compiler: "
            f"{command(extra)}, in a separate environment, since JAX then looks for these devices; or use "
            "distattn.testing.lower, which needs none",
            name=module,
        )


def _array(devices: list[Any]) -> np.ndarray:
    array = np.empty(len(devices), object)
    array[:] = devices
    return array
