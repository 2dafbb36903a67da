"""Attention on one device: keys folded block by block into a `SoftmaxState`, and its gradient.

Memory is O(T + block) in both directions, never T x S: the backward pass makes the weights of a block
again from the saved maximum or log-sum-exp (FlashAttention-2, arXiv 2307.08691, section 3). It differs
from the textbook algorithm in: 1. keys come in any order, and a block is skipped by the range of its
positions, not by its index; 2. the fold is the public `merge`, so that a block's state has a maximum of
its own; 3. few queries meet the keys head by head (`flat`), which on CPU spares a transposed copy of
all keys and values.

The local part by kernels: which there are, and which one computes a call.

A kernel is a module with the functions `refusal`, `fold` and `fold_gradients`. The latter two are those of
`distattn.local`, for calls that the first does not refuse. Those of others, `cudnn` and `splash`, have no
gradient of a device's part: instead of `fold_gradients` they name in `GRADIENTS_BY` whose is taken. A
`reservation`, where there is one, says why None does not take it. None of them has been timed: each says
how it is checked.

What is not differentiated, and says what to do instead: gradients, and what has only these.
"""

import contextlib
import importlib
from collections.abc import Callable, Generator
from typing import Any, NoReturn, Protocol

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from distattn._compat import vary, varying_axes
from distattn.algebra.mergeable import Sum
from distattn.algebra.softmax_state import SoftmaxState
from distattn.local import reproducible
from distattn.local.block import Cotangents, LogitConfig
from distattn.local.blockwise import dense_state, fold, fold_gradients
from distattn.local.inputs import KERNELS, AttentionInputs
from distattn.local.mask import Mask
from distattn.local.reproducible import ReproducibleBlocks
from distattn.local.tiling import (
    Machine,
)


def local_fold(
    logit_config: LogitConfig,
    machine: Machine,
    implementation: str,
    reproducible_blocks: ReproducibleBlocks | None = None,
) -> Callable[[AttentionInputs], Any]:
    """The function from inputs to the state over their keys; 'xla' has no derivative of its own.

    A `SoftmaxState`; with units it is reproducible, a `FixedPointState`. 'auto' is a kernel where one
    serves, else 'xla'.
    """
    if reproducible_blocks is not None:
        return lambda inputs: reproducible.fold(inputs, logit_config, machine, reproducible_blocks)
    if implementation == "dense":
        return lambda inputs: dense_state(inputs, logit_config)

    def run(inputs: AttentionInputs) -> SoftmaxState:
        kernel = chosen(inputs, logit_config, machine, implementation)
        return (kernel.fold if kernel else fold)(inputs, logit_config, machine)

    return run


def local_gradients(
    logit_config: LogitConfig,
    machine: Machine,
    implementation: str,
    reproducible_blocks: ReproducibleBlocks | None,
    rows: dict[str, jax.Array],
    *,
    key_dtype: jnp.dtype | None = None,
) -> Callable[[AttentionInputs], tuple[Sum, Sum, Sum, Sum | None]]:
    """The function from inputs to their gradients, arrays or, with units, sums in fixed point.

    `rows` are the `Cotangents` by name, and `key_dtype` is that of `fold_gradients`.
    """
    cotangents = Cotangents(**rows)
    if reproducible_blocks is not None:
        return lambda inputs: reproducible.fold_gradients(
            inputs, logit_config, machine, reproducible_blocks, cotangents
        )

    def run(inputs: AttentionInputs) -> tuple[Sum, Sum, Sum, Sum | None]:
        kernel = chosen(inputs, logit_config, machine, implementation, backward=True)
        gradients = kernel.fold_gradients if kernel else fold_gradients
        return gradients(inputs, logit_config, machine, cotangents, key_dtype=key_dtype)

    return run


def local_state(
    inputs: AttentionInputs, logit_config: LogitConfig, machine: Machine, implementation: str
) -> SoftmaxState:
    """The state over this device's keys, differentiable; no communication."""
    axes = varying_axes(*jax.tree.leaves(inputs))
    inputs = jax.tree.map(lambda x: vary(x, axes), inputs)
    local = local_fold(logit_config, machine, implementation)
    if implementation == "dense":
        return local(inputs)
    return with_gradients(
        local,
        lambda x, **rows: local_gradients(logit_config, machine, implementation, None, rows)(x),
        inputs,
    )


def with_gradients(
    fold: Callable[[AttentionInputs], SoftmaxState],
    gradients: Callable[..., tuple[Any, ...]],
    inputs: AttentionInputs,
) -> SoftmaxState:
    """fold(inputs), whose gradient is computed by `gradients` from the maximum of the state.

    The state has a name for the policies of `jax.checkpoint`, 'distattn_state'.

    Args:
      fold: the state, f32[B, T, N] twice and f32[B, T, N, V].
      gradients: of inputs, and of `Cotangents` by name.
      inputs: all varying over the same axes.
    """

    def inputs_of(query: Any, key: Any, value: Any, bias: Any, mask: Mask) -> AttentionInputs:
        return AttentionInputs(query, key, value, bias, None, mask)

    @jax.custom_vjp
    def state(*arrays: Any) -> SoftmaxState:
        return fold(inputs_of(*arrays))

    def forward(*arrays: Any) -> tuple[SoftmaxState, tuple[Any, ...]]:
        result = jax.tree.map(lambda x: checkpoint_name(x, "distattn_state"), state(*arrays))
        return result, (arrays, result.max)

    def backward(residuals: tuple[Any, ...], cotangent: SoftmaxState) -> tuple[Any, ...]:
        arrays, reference = residuals

        @refuse_second_derivative
        def run(arrays: tuple[Any, ...], rows: dict[str, jax.Array]) -> tuple[Any, ...]:
            return gradients(inputs_of(*arrays), **rows)

        d_sum, d_weighted_sum = cotangent.sum, cotangent.weighted_sum
        rows = {"reference": reference, "d_sum": d_sum, "d_weighted_sum": d_weighted_sum}
        found = run(arrays, rows)
        query, key, value, bias, _ = arrays
        primals = (query, key, value, bias)
        cast = (
            None if x is None else g.astype(x.dtype) for g, x in zip(found, primals, strict=True)
        )
        return *cast, None

    state.defvjp(forward, backward)
    return state(inputs.query, inputs.key, inputs.value, inputs.bias, inputs.mask)


_MODULES = {
    "pallas_tpu": "tpu.support",
    "pallas_gpu": "gpu.support",
    "cudnn": "cudnn",
    "splash": "splash",
}
# What None takes, the first that serves; where none does, XLA's operations on blocks.
# Not 'splash': `pallas_tpu` does all that it does, and copies nothing.
_OF_PLATFORM = {"tpu": ("pallas_tpu",), "gpu": ("cudnn", "pallas_gpu")}


class Kernel(Protocol):
    """A kernel, a module."""

    @staticmethod
    def refusal(
        inputs: AttentionInputs,
        logit_config: LogitConfig,
        machine: Machine,
        *,
        backward: bool = False,
    ) -> str | None:
        """Which argument the kernel does not do, and why; None: it does the call."""
        ...

    @staticmethod
    def fold(inputs: AttentionInputs, logit_config: LogitConfig, machine: Machine) -> SoftmaxState:
        """As `distattn.local.fold`."""
        ...

    @staticmethod
    def fold_gradients(
        inputs: AttentionInputs,
        logit_config: LogitConfig,
        machine: Machine,
        cotangents: Cotangents,
        *,
        key_dtype: Any = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array, None]:
        """As `distattn.local.fold_gradients`, of a call without a bias."""
        ...


def chosen(
    inputs: AttentionInputs,
    logit_config: LogitConfig,
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
    if min(*inputs.query.shape, *inputs.value.shape) == 0:
        return None  # nothing to compute
    if not named and (implementation != "auto" or not _is_alone()):
        return None
    names = (implementation,) if named else _OF_PLATFORM.get(machine.platform, ())
    for name in names:
        # Imported where it is needed: a kernel brings Pallas, which is large.
        kernel: Any = importlib.import_module(f"distattn.local.kernels.{_MODULES[name]}")
        reason = kernel.refusal(inputs, logit_config, machine, backward=backward)
        if not named and hasattr(kernel, "reservation"):
            reason = reason or kernel.reservation(inputs)
        if not reason:
            substitutes = getattr(kernel, "GRADIENTS_BY", None) if backward else None
            if substitutes is None:
                return kernel
            return _serving(substitutes, inputs, logit_config, machine)
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
        f"distattn.local.kernels.{'gpu' if platform == 'gpu' else 'tpu'}.support"
    )


def _serving(
    names: tuple[str, ...], inputs: AttentionInputs, logit_config: LogitConfig, machine: Machine
) -> Kernel | None:
    """The first of these kernels that computes the gradient."""
    for name in names:
        if name in KERNELS:
            kernel: Any = importlib.import_module(f"distattn.local.kernels.{_MODULES[name]}")
            if not kernel.refusal(inputs, logit_config, machine, backward=True):
                return kernel
    return None


def _is_alone() -> bool:
    """Whether no compiler may shard what is traced: within `shard_map` over all axes, or on one device."""
    mesh: Any = jax.sharding.get_abstract_mesh()
    if mesh.manual_axes:
        return set(mesh.manual_axes) == set(mesh.axis_names)
    return jax.device_count() == 1


_FORWARD_MODE = (
    "a second derivative, or forward mode, of attention in blocks is not built; "
    "pass implementation='dense', which JAX differentiates to any order"
)


@contextlib.contextmanager
def forward_mode_refused() -> Generator[None]:
    """Says what to do instead of forward mode, outside jit; inside, JAX finds it when we have returned."""
    try:
        yield
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        raise NotImplementedError(_FORWARD_MODE) from error


def refuse_second_derivative(f: Callable[..., Any]) -> Callable[..., Any]:
    """f, which says what to do instead of being differentiated: it is a gradient already."""
    guarded = jax.custom_jvp(f)

    @guarded.defjvp
    def _jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> NoReturn:
        raise NotImplementedError(_FORWARD_MODE)

    return guarded
