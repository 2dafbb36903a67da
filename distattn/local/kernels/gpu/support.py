"""The Pallas kernels for GPUs, in Triton: which calls they support, for masks of positions.

No array of size T x S exists, nor a copy of keys or values. None of it has been timed: Pallas' interpreter
and the compiler for the H100 check it.
"""

from typing import Any

import jax
import jax.numpy as jnp

from distattn.algebra.softmax_state import SoftmaxState
from distattn.local.block import Cotangents, LogitConfig
from distattn.local.inputs import AttentionInputs
from distattn.local.kernels import shared
from distattn.local.kernels.gpu.tiling import precision_of, tile_config
from distattn.local.tiling import Machine

_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


def fold(inputs: AttentionInputs, logit_config: LogitConfig, machine: Machine) -> SoftmaxState:
    """Return the state over all keys, as `distattn.local.blockwise.fold`."""
    from distattn.local.kernels.gpu import forward  # Pallas is imported when a kernel runs

    return forward.fold(inputs, logit_config, machine)


def fold_gradients(
    inputs: AttentionInputs,
    logit_config: LogitConfig,
    machine: Machine,
    cotangents: Cotangents,
    *,
    key_dtype: Any = None,
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    """Return the gradients, as `distattn.local.blockwise.fold_gradients`."""
    from distattn.local.kernels.gpu import backward

    return backward.fold_gradients(inputs, logit_config, machine, cotangents, key_dtype=key_dtype)


def unsupported(
    inputs: AttentionInputs, logit_config: LogitConfig, machine: Machine, *, backward: bool = False
) -> str | None:
    """Return which argument the kernels do not support, and why; None if they support the call."""
    reason = shared.unsupported_place(machine, "gpu")
    if not reason and inputs.key_scale is not None and backward:
        reason = "key and value are quantised, and gradients are asked for"
    reason = reason or shared.unsupported_arguments(inputs, _DTYPES, quantised=(jnp.int8,))
    if not reason and precision_of(logit_config) is None:
        done = "None, 'default', 'high', 'tensorfloat32' and 'highest'"
        reason = f"precision is {logit_config.precision!r}; supported are {done}"
    reason = reason or shared.missing_package("jax.experimental.pallas.triton")
    if reason:
        return reason
    config = tile_config(inputs, logit_config, machine, backward=backward)
    if config.shared_bytes > config.chip.shared_bytes:
        return (
            f"key has a width of {config.width}: blocks of {config.row_block} rows and "
            f"{config.key_block} keys take {config.shared_bytes} bytes, and a program may take "
            f"{config.chip.shared_bytes} on {config.chip.name}"
        )
    for name, x in (("key", inputs.key), ("value", inputs.value)):
        # Pallas computes an item's offset in 32 bits up to 2^32 bytes: half of that range for int8.
        if x.dtype.itemsize == 1 and 2**31 < x.size <= 2**32:
            return f"{name} has {x.size} items of one byte; supported are up to {2**31}, or over {2**32}"
    return None
