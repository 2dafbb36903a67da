"""The local part as kernels for GPUs, written in Triton through Pallas, for masks of positions.

Nothing of the size of T x S exists, nor a copy of keys or values. None of it has been timed: it is checked
by Pallas' interpreter, and by the compiler for the H100.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from distattn.local.block import LogitConfig
from distattn.local.inputs import AttentionInputs
from distattn.local.kernels import shared
from distattn.local.kernels.gpu.tiling import cut_of, precision_of
from distattn.local.kernels.shared import late
from distattn.local.tiling import Machine

# Of a block, worth timing: rows, keys.
CANDIDATES = (16, 32, 64, 128), (16, 32, 64, 128)
_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)

fold: Callable[..., Any] = late("gpu.forward", "fold")
fold_gradients: Callable[..., Any] = late("gpu.backward", "fold_gradients")


def refusal(
    inputs: AttentionInputs, logit_config: LogitConfig, machine: Machine, *, backward: bool = False
) -> str | None:
    """Which argument the kernels do not do, and why; None: they do the call."""
    return (
        shared.of_platform(machine, "gpu")
        or shared.of_sharding(machine)
        or shared.of_dense_arguments(inputs)
        or _of_numbers(inputs, logit_config, backward=backward)
        or shared.of_package("jax.experimental.pallas.triton")
        or _of_sizes(inputs, logit_config, machine, backward=backward)
    )


def sizes_of(
    inputs: AttentionInputs, logit_config: LogitConfig, machine: Machine, *, backward: bool = False
) -> tuple[int, int]:
    """Rows and keys of a block, as a call has them that is not refused."""
    cut = cut_of(inputs, logit_config, machine, backward=backward)
    return cut.rows, cut.key_block


def _of_numbers(
    inputs: AttentionInputs, logit_config: LogitConfig, *, backward: bool
) -> str | None:
    if inputs.key_scale is not None and backward:
        return "key and value are quantised, and gradients are asked for"
    if precision_of(logit_config) is None:
        done = "None, 'default', 'high', 'tensorfloat32' and 'highest' are done"
        return f"precision is {logit_config.precision!r}; {done}"
    return shared.of_dtypes(inputs, _DTYPES, quantised=(jnp.int8,))


def _of_sizes(
    inputs: AttentionInputs, logit_config: LogitConfig, machine: Machine, *, backward: bool
) -> str | None:
    cut = cut_of(inputs, logit_config, machine, backward=backward)
    if cut.shared_bytes > cut.target.shared_bytes:
        return (
            f"key has a width of {cut.width}: blocks of {cut.rows} rows and {cut.key_block} keys take "
            f"{cut.shared_bytes} bytes, and a program may take {cut.target.shared_bytes} on "
            f"{cut.target.name}"
        )
    for name, x in (("key", inputs.key), ("value", inputs.value)):
        # Pallas computes the place of an item in 32 bits up to 2^32 bytes: half of those for int8 alone.
        if x.dtype.itemsize == 1 and 2**31 < x.size <= 2**32:
            return f"{name} has {x.size} items of one byte; up to {2**31}, or more than {2**32}, are done"
    return None
