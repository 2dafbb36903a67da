"""The local part as kernels for TPUs, for masks of positions, lengths and segments.

Nothing of the size of T x S exists, nor a copy of keys or values: of float16, which Mosaic has not, XLA
takes the bits block by block within the kernel; its gradients alone exist in float32 before they are
rounded. Keys and values of 8 bits with scales are folded as they are; their gradient, the query's alone, is
that of the numbers they stand for, which are then written out.
None of it has been timed: it is checked by Pallas' interpreter, and by the compilers of v4 to tpu7x.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from distattn.local.block import LogitConfig
from distattn.local.inputs import AttentionInputs
from distattn.local.kernels import shared
from distattn.local.kernels.shared import EXACT, PLAIN, late
from distattn.local.kernels.tpu.tiling import QUANTISED, TABLE_ENTRIES, cut_of
from distattn.local.tiling import Machine

# Of a block, worth timing: rows, keys.
CANDIDATES = (128, 256, 512, 1024), (128, 256, 512, 1024, 2048)
_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)

fold: Callable[..., Any] = late("tpu.forward", "fold")
fold_gradients: Callable[..., Any] = late("tpu.backward", "fold_gradients")


def refusal(
    inputs: AttentionInputs, logit_config: LogitConfig, machine: Machine, *, backward: bool = False
) -> str | None:
    """Which argument the kernels do not do, and why; None: they do the call."""
    return (
        shared.of_platform(machine, "tpu")
        or shared.of_sharding(machine)
        or shared.of_dense_arguments(inputs)
        or shared.of_dtypes(inputs, _DTYPES, quantised=QUANTISED)
        or _of_precision(logit_config)
        or shared.of_package("jax.experimental.pallas.tpu")
        or _of_sizes(inputs, machine, backward=backward)
    )


def sizes_of(
    inputs: AttentionInputs, logit_config: LogitConfig, machine: Machine, *, backward: bool = False
) -> tuple[int, int]:
    """Rows and keys of a block, as a call has them that is not refused."""
    del logit_config
    cut = cut_of(inputs, machine, backward=backward)
    return cut.rows, cut.key_block


def _of_precision(logit_config: LogitConfig) -> str | None:
    if logit_config.precision not in (*EXACT, *PLAIN):
        return f"precision is {logit_config.precision!r}; None, 'default' and 'highest' are done"
    return None


def _of_sizes(inputs: AttentionInputs, machine: Machine, *, backward: bool) -> str | None:
    cut = cut_of(inputs, machine, backward=backward)
    if cut.vmem_bytes > cut.target.budget_bytes:
        return (
            f"key has {cut.kv_heads} heads of {cut.width}: a block of them takes {cut.vmem_bytes} bytes, "
            f"and a kernel may take {cut.target.budget_bytes} on {cut.target.name}"
        )
    rows_share_it = all(x.shape[0] == 1 for x in jax.tree.leaves(inputs.mask))
    entries = cut.row_blocks * cut.key_blocks * (1 if rows_share_it else cut.batch)
    if entries > TABLE_ENTRIES:
        return (
            f"query and key are so long that the table of visits has {entries} entries, and "
            f"{TABLE_ENTRIES} fit the scalar memory"
        )
    return None
