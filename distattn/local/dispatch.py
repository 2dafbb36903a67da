"""The choice of an implementation for one device's attention, and its derivatives.

`implementation` names a kernel of `KERNELS`, "xla" (`blockwise`) or "dense"; "auto" is the first kernel
of the platform that supports the call, else "xla". Only "dense" has forward mode and second derivatives;
the others raise an error that says so.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Generator
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from distattn._compat import vary, varying_axes
from distattn.algebra.mergeable import Sum
from distattn.algebra.softmax_state import SoftmaxState
from distattn.local import reproducible
from distattn.local.block import Cotangents, LogitConfig
from distattn.local.blockwise import dense_state, fold, fold_gradients
from distattn.local.inputs import AttentionInputs
from distattn.local.kernels import cudnn
from distattn.local.kernels.gpu import support as pallas_gpu
from distattn.local.kernels.tpu import support as pallas_tpu
from distattn.local.mask import Mask
from distattn.local.reproducible import ReproducibleBlocks
from distattn.local.tiling import Machine


def local_fold(
    logit_config: LogitConfig,
    machine: Machine,
    implementation: str,
    reproducible_blocks: ReproducibleBlocks | None = None,
) -> Callable[[AttentionInputs], Any]:
    """Return the function from inputs to the state over their keys; only 'dense' is differentiable.

    The state is a `SoftmaxState`, or with `reproducible_blocks` a `FixedPointState`.
    """
    if reproducible_blocks is not None:
        return lambda inputs: reproducible.fold(inputs, logit_config, machine, reproducible_blocks)
    if implementation == "dense":
        return lambda inputs: dense_state(inputs, logit_config)

    def run(inputs: AttentionInputs) -> SoftmaxState:
        kernel = chosen_kernel(inputs, logit_config, machine, implementation)
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
    """Return the function from inputs to their gradients: arrays, or sums in fixed point.

    Args:
      logit_config: as in `local_fold`.
      machine: as in `local_fold`.
      implementation: as in `local_fold`.
      reproducible_blocks: as in `local_fold`; with them gradients are in fixed point.
      rows: `Cotangents` by name.
      key_dtype: as in `blockwise.fold_gradients`.
    """
    cotangents = Cotangents(**rows)
    if reproducible_blocks is not None:
        return lambda inputs: reproducible.fold_gradients(
            inputs, logit_config, machine, reproducible_blocks, cotangents
        )

    def run(inputs: AttentionInputs) -> tuple[Sum, Sum, Sum, Sum | None]:
        kernel = chosen_kernel(inputs, logit_config, machine, implementation, backward=True)
        gradients = kernel.fold_gradients if kernel else fold_gradients
        return gradients(inputs, logit_config, machine, cotangents, key_dtype=key_dtype)

    return run


def local_state(
    inputs: AttentionInputs, logit_config: LogitConfig, machine: Machine, implementation: str
) -> SoftmaxState:
    """Return the state over this device's keys, differentiable and without communication."""
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
    """Return fold(inputs), whose gradient `gradients` computes from the maximum of the state.

    Policies of `jax.checkpoint` know the state as 'distattn_state'.

    Args:
      fold: returns the state of inputs, f32[B, T, N] twice and f32[B, T, N, V].
      gradients: returns the gradients of inputs; takes inputs, and `Cotangents` by name.
      inputs: arrays that all vary over the same axes.
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
        pairs = zip(run(arrays, rows), arrays[:-1], strict=True)
        return *(None if x is None else g.astype(x.dtype) for g, x in pairs), None

    state.defvjp(forward, backward)
    return state(inputs.query, inputs.key, inputs.value, inputs.bias, inputs.mask)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A kernel: functions that import Pallas when they run."""

    platform: str
    # Return which argument the kernel does not support, and why; None if it supports the call.
    unsupported: Callable[..., str | None]
    fold: Callable[[AttentionInputs, LogitConfig, Machine], SoftmaxState]  # as `blockwise.fold`
    fold_gradients: Callable[..., tuple[Any, ...]]  # as `blockwise.fold_gradients`, without a bias
    # Return why implementation=None does not select it for a call that it supports; None if it does.
    not_by_default: Callable[[AttentionInputs], str | None] = lambda inputs: None


# implementation=None selects the first of its platform that supports a call.
KERNELS = {
    "pallas_tpu": Kernel("tpu", pallas_tpu.unsupported, pallas_tpu.fold, pallas_tpu.fold_gradients),
    "cudnn": Kernel(
        "gpu", cudnn.unsupported, cudnn.fold, cudnn.fold_gradients, cudnn.not_by_default
    ),
    "pallas_gpu": Kernel("gpu", pallas_gpu.unsupported, pallas_gpu.fold, pallas_gpu.fold_gradients),
}


def chosen_kernel(
    inputs: AttentionInputs,
    logit_config: LogitConfig,
    machine: Machine,
    implementation: str,
    *,
    backward: bool = False,
) -> Kernel | None:
    """Return the named kernel, or one of the platform; None for XLA's operations.

    Args:
      inputs: of the call.
      logit_config: of the call.
      machine: the machine it runs on.
      implementation: the name of a kernel, 'auto', or another implementation.
      backward: whether the gradient is computed.

    Raises:
      NotImplementedError: a kernel is named, and does not support the call.
    """
    if min(*inputs.query.shape, *inputs.value.shape) == 0:
        return None  # nothing to compute
    if implementation in KERNELS:
        kernel = KERNELS[implementation]
        reason = kernel.unsupported(inputs, logit_config, machine, backward=backward)
        if reason is None:
            return kernel
        raise NotImplementedError(
            f"implementation={implementation!r} does not support this call: {reason}; pass "
            "implementation=None, which selects one that does"
        )
    if implementation != "auto" or not _is_alone():
        return None
    for kernel in KERNELS.values():
        if kernel.platform == machine.platform and not (
            kernel.unsupported(inputs, logit_config, machine, backward=backward)
            or kernel.not_by_default(inputs)
        ):
            return kernel
    return None


def _is_alone() -> bool:
    """Return whether no compiler can shard the trace: in `shard_map` over all axes, or on one device."""
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
    """Raise NotImplementedError for forward mode outside jit; inside, JAX raises after the call."""
    try:
        yield
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        raise NotImplementedError(_FORWARD_MODE) from error


def refuse_second_derivative(f: Callable[..., Any]) -> Callable[..., Any]:
    """Return f, a gradient, with an error that says what to do instead of differentiating it."""
    guarded = jax.custom_jvp(f)

    @guarded.defjvp
    def _jvp(primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> NoReturn:
        raise NotImplementedError(_FORWARD_MODE)

    return guarded
