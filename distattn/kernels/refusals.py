"""What several kernels do not do, each in words that name the argument."""

import importlib
from typing import Any

from distattn.kernels.interpreter import interpreter
from distattn.operands import Operands
from distattn.tiles import Machine


def of_platform(machine: Machine, platform: str, *, simulated: bool = True) -> str | None:
    """That it runs elsewhere than on its platform.

    Args:
      machine: what it would run on.
      platform: 'tpu' or 'gpu'.
      simulated: whether `interpreted` runs it on a CPU.
    """
    if machine.platform == platform or (simulated and interpreter()):
        return None
    remedy = (
        " (for tests, distattn.kernels.interpreted() runs it there, slowly)" if simulated else ""
    )
    return (
        f"it is a kernel for {platform.upper()}s, and the platform is {machine.platform!r}{remedy}"
    )


def of_sharding(machine: Machine) -> str | None:
    """That a compiler would have to cut it."""
    if machine.compiler_sharded:
        return "the compiler shards batch or heads unseen, and cannot cut a kernel; name their axes"
    return None


def of_dense_arguments(operands: Operands) -> str | None:
    """A bias, and a mask that is an array."""
    if operands.bias is not None:
        return f"bias is given, of shape {operands.bias.shape}"
    if operands.mask.dense is not None:
        shape = operands.mask.dense.shape
        return f"mask is given, of shape {shape}; positions, lengths and segments are done"
    return None


def of_dtypes(operands: Operands, dtypes: tuple[Any, ...]) -> str | None:
    """An array of a dtype that is not among them."""
    arrays = {"query": operands.query, "key": operands.key, "value": operands.value}
    names = ", ".join(dtype.__name__ for dtype in dtypes)
    for name, x in arrays.items():
        if x.dtype not in dtypes:
            return f"{name} has dtype {x.dtype}; done are {names}"
    return None


def of_package(module: str) -> str | None:
    """That what it is written in is not installed."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        return f"{module} needs the package {error.name!r}, which is not installed"
    return None
