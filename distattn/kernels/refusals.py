"""What several kernels do not do, each in words that name the argument."""

import importlib
from typing import Any

import jax

from distattn._compat import varying_axes
from distattn.block import Scoring
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


def of_dtypes(
    operands: Operands, dtypes: tuple[Any, ...], *, quantised: tuple[Any, ...] = ()
) -> str | None:
    """An array of a dtype that is not among them, key and value those of bytes where they have scales."""
    arrays = {"query": operands.query, "key": operands.key, "value": operands.value}
    for name, x in arrays.items():
        done = quantised if name != "query" and operands.key_scale is not None else dtypes
        if x.dtype not in done:
            names = ", ".join(dtype.__name__ for dtype in done)
            return f"{name} has dtype {x.dtype}; done are {names or 'none with a scale'}"
    return None


def of_mixed_dtypes(operands: Operands) -> str | None:
    """Arrays of several dtypes."""
    for name, x in (("key", operands.key), ("value", operands.value)):
        if x.dtype != operands.query.dtype:
            return (
                f"{name} has dtype {x.dtype}, and query {operands.query.dtype}; done is one for all"
            )
    return None


def of_index_order(operands: Operands) -> str | None:
    """Keys that lie in another order than 0, 1, 2, …, or positions that are compared and not known here."""
    mask = operands.mask
    if operands.key_scale is not None or operands.layer is not None:
        return "key and value are quantised, or those of several layers"
    if mask.index_order is None:
        return "query_positions or key_positions are given, or are a cache's; done is index order alone"
    if mask.compares_positions and not mask.index_order.aligned:
        name = "is_causal" if mask.is_causal else "local_window_size"
        return (
            f"{name} compares positions, and the queries or keys of each device begin at another one, "
            "which the kernel would have to know while it is compiled; shard B or heads instead of T and S "
            "(batch_axis_name, heads_axis_name, combine='ulysses')"
        )
    return None


def of_precision(scoring: Scoring, precisions: tuple[Any, ...]) -> str | None:
    """A precision that is not among them."""
    if scoring.precision not in precisions:
        return f"precision is {scoring.precision!r}; None and 'default' are done"
    return None


def of_types(operands: Operands) -> str | None:
    """A `shard_map` that tracks which values vary over its axes, where a kernel has no types for that."""
    if varying_axes(*jax.tree.leaves(operands)):
        return "the shard_map around has check_vma=True, and its results have no type there; pass False"
    return None


def of_package(module: str) -> str | None:
    """That what it is written in is not installed."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        return f"{module} needs the package {error.name!r}, which is not installed"
    return None
