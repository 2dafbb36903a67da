"""The Pallas kernels for TPUs: which calls they support, for masks of positions, lengths and segments.

No array of size T x S exists, nor a copy of keys or values. Mosaic has no float16: its bits are read block
by block within the kernel, and only its gradients exist in float32 before they are rounded. Quantised keys
and values are folded as they are stored; the gradient, of the query alone, dequantises them first. None of
it has been timed: Pallas' interpreter and the compilers of v4 to tpu7x check it.
"""

from typing import Any

import jax
import jax.numpy as jnp

from distattn.algebra.softmax_state import SoftmaxState
from distattn.local.block import Cotangents, LogitConfig
from distattn.local.inputs import AttentionInputs
from distattn.local.kernels import shared
from distattn.local.kernels.shared import EXACT, PLAIN
from distattn.local.kernels.tpu.tiling import MAX_TABLE_ENTRIES, QUANTISED, tile_config
from distattn.local.tiling import Machine

_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


def fold(inputs: AttentionInputs, logit_config: LogitConfig, machine: Machine) -> SoftmaxState:
    """Return the state over all keys, as `distattn.local.blockwise.fold`."""
    from distattn.local.kernels.tpu import forward  # Pallas is imported when a kernel runs

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
    from distattn.local.kernels.tpu import backward

    return backward.fold_gradients(inputs, logit_config, machine, cotangents, key_dtype=key_dtype)


def unsupported(
    inputs: AttentionInputs, logit_config: LogitConfig, machine: Machine, *, backward: bool = False
) -> str | None:
    """Return which argument the kernels do not support, and why; None if they support the call."""
    reason = shared.unsupported_place(machine, "tpu") or shared.unsupported_arguments(
        inputs, _DTYPES, quantised=QUANTISED
    )
    if not reason and logit_config.precision not in (*EXACT, *PLAIN):
        done = "None, 'default' and 'highest'"
        reason = f"precision is {logit_config.precision!r}; supported are {done}"
    reason = reason or shared.missing_package("jax.experimental.pallas.tpu")
    if reason:
        return reason
    config = tile_config(inputs, machine, backward=backward)
    if config.vmem_bytes > config.chip.budget_bytes:
        return (
            f"key has {config.kv_heads} heads of {config.width}: a block of them takes "
            f"{config.vmem_bytes} bytes, and a kernel may take {config.chip.budget_bytes} on "
            f"{config.chip.name}"
        )
    shared_mask = all(x.shape[0] == 1 for x in jax.tree.leaves(inputs.mask))
    entries = config.row_blocks * config.key_blocks * (1 if shared_mask else config.batch)
    if entries > MAX_TABLE_ENTRIES:
        return (
            f"query and key are so long that the block table has {entries} entries, and "
            f"{MAX_TABLE_ENTRIES} fit the scalar memory"
        )
    return None
