"""The local part by kernels: which there are, and which one computes a call.

A kernel is a module with the functions `refusal`, `fold` and `fold_gradients`. The latter two are those of
`distattn.local`, for calls that the first does not refuse. Those of others, `cudnn` and `splash`, have no
gradient of a device's part: instead of `fold_gradients` they name in `GRADIENTS_BY` whose is taken. A
`reservation`, where there is one, says why None does not take it. None of them has been timed: each says
how it is checked.
"""

import importlib
from typing import Any, Protocol

import jax

from distattn.block import Cotangents, Scoring
from distattn.kernels.interpreter import interpreted
from distattn.operands import KERNELS, Operands
from distattn.state import SoftmaxState
from distattn.tiles import Machine

__all__ = ["Kernel", "chosen", "interpreted", "own"]

# What None takes, the first that serves; where none does, XLA's operations on blocks.
# Not 'splash': `pallas_tpu` does all that it does, and copies nothing.
_OF_PLATFORM = {"tpu": ("pallas_tpu",), "gpu": ("cudnn", "pallas_gpu")}


class Kernel(Protocol):
    """A kernel, a module."""

    @staticmethod
    def refusal(
        operands: Operands, scoring: Scoring, machine: Machine, *, backward: bool = False
    ) -> str | None:
        """Which argument the kernel does not do, and why; None: it does the call."""
        ...

    @staticmethod
    def fold(operands: Operands, scoring: Scoring, machine: Machine) -> SoftmaxState:
        """As `distattn.local.fold`."""
        ...

    @staticmethod
    def fold_gradients(
        operands: Operands,
        scoring: Scoring,
        machine: Machine,
        cotangents: Cotangents,
        *,
        key_dtype: Any = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array, None]:
        """As `distattn.local.fold_gradients`, of a call without a bias."""
        ...


def chosen(
    operands: Operands,
    scoring: Scoring,
    machine: Machine,
    implementation: str,
    *,
    backward: bool = False,
) -> Kernel | None:
    """The kernel that computes this: the one that is named, or one of the platform's; None: none does.

    With `backward` it computes the gradient: another one, or none, where the one that folds has none.

    Raises:
      NotImplementedError: one is named, and does not do such a call.
    """
    named = implementation in KERNELS
    if min(*operands.query.shape, *operands.value.shape) == 0:
        return None  # nothing to compute
    if not named and (implementation != "auto" or not _is_alone()):
        return None
    names = (implementation,) if named else _OF_PLATFORM.get(machine.platform, ())
    for name in names:
        # Imported where it is needed: a kernel brings Pallas, which is large.
        kernel: Any = importlib.import_module(f"distattn.kernels.{name}")
        reason = kernel.refusal(operands, scoring, machine, backward=backward)
        if not named and hasattr(kernel, "reservation"):
            reason = reason or kernel.reservation(operands)
        if not reason:
            substitutes = getattr(kernel, "GRADIENTS_BY", None) if backward else None
            if substitutes is None:
                return kernel
            return _serving(substitutes, operands, scoring, machine)
        if named:
            raise NotImplementedError(
                f"implementation={name!r} is not built for this call: {reason}; pass implementation=None, "
                "which takes what there is"
            )
    return None


def own(platform: str) -> Any:
    """The kernel of the library's own for a platform; on a CPU that of TPUs, which `interpreted` runs.

    Beside what a `Kernel` has it has `CANDIDATES`, rows and keys of a block that are worth timing, and
    `sizes_of`, those that a call has.
    """
    return importlib.import_module(
        f"distattn.kernels.pallas_{'gpu' if platform == 'gpu' else 'tpu'}"
    )


def _serving(
    names: tuple[str, ...], operands: Operands, scoring: Scoring, machine: Machine
) -> Kernel | None:
    """The first of these kernels that computes the gradient."""
    for name in names:
        if name in KERNELS:
            kernel: Any = importlib.import_module(f"distattn.kernels.{name}")
            if not kernel.refusal(operands, scoring, machine, backward=True):
                return kernel
    return None


def _is_alone() -> bool:
    """Whether no compiler may shard what is traced: within `shard_map` over all axes, or on one device."""
    mesh: Any = jax.sharding.get_abstract_mesh()
    if mesh.manual_axes:
        return set(mesh.manual_axes) == set(mesh.axis_names)
    return jax.device_count() == 1
