"""The local part as kernels for TPUs, for masks of positions, lengths and segments.

Nothing of the size of T x S exists, nor a copy of keys or values, but for float16, of which XLA makes one.
None of it has been timed: it is checked by Pallas' interpreter, and by the compilers of v4 to tpu7x.
"""

import jax
import jax.numpy as jnp

from distattn.block import Scoring
from distattn.kernels import refusals
from distattn.kernels.scores import EXACT, PLAIN
from distattn.kernels.tpu_blocks import TABLE_ENTRIES
from distattn.kernels.tpu_layout import cut_of
from distattn.operands import Operands
from distattn.state import SoftmaxState
from distattn.tiles import Machine

_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


def fold(operands: Operands, scoring: Scoring, machine: Machine) -> SoftmaxState:
    """As `distattn.local.fold`."""
    # Not all versions of JAX bring all that Pallas needs.
    from distattn.kernels import tpu_forward

    return tpu_forward.fold(operands, scoring, machine)


def fold_gradients(
    operands: Operands,
    scoring: Scoring,
    machine: Machine,
    reference: jax.Array,
    d_sum: jax.Array,
    d_weighted_sum: jax.Array,
    *,
    key_dtype: jnp.dtype | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    """As `distattn.local.fold_gradients`."""
    from distattn.kernels import tpu_backward

    rows = reference, d_sum, d_weighted_sum
    return tpu_backward.fold_gradients(operands, scoring, machine, *rows, key_dtype=key_dtype)


def refusal(
    operands: Operands, scoring: Scoring, machine: Machine, *, backward: bool = False
) -> str | None:
    """Which argument the kernels do not do, and why; None: they do the call."""
    return (
        refusals.of_platform(machine, "tpu")
        or refusals.of_sharding(machine)
        or refusals.of_dense_arguments(operands)
        or refusals.of_dtypes(operands, _DTYPES)
        or _of_numbers(operands, scoring)
        or refusals.of_package("jax.experimental.pallas.tpu")
        or _of_sizes(operands, machine, backward=backward)
    )


def _of_numbers(operands: Operands, scoring: Scoring) -> str | None:
    if operands.key_scale is not None:
        return "key and value are quantised"
    if scoring.precision not in (*EXACT, *PLAIN):
        return f"precision is {scoring.precision!r}; None, 'default' and 'highest' are done"
    return None


def _of_sizes(operands: Operands, machine: Machine, *, backward: bool) -> str | None:
    cut = cut_of(operands, machine, backward=backward)
    if cut.vmem_bytes > cut.target.budget_bytes:
        return (
            f"key has {cut.kv_heads} heads of {cut.width}: a block of them takes {cut.vmem_bytes} bytes, "
            f"and a kernel may take {cut.target.budget_bytes} on {cut.target.name}"
        )
    shared = all(
        x.shape[0] == 1 for x in jax.tree.leaves(operands.mask)
    )  # by the rows of the batch
    entries = cut.row_blocks * cut.key_blocks * (1 if shared else cut.batch)
    if entries > TABLE_ENTRIES:
        return (
            f"query and key are so long that the table of visits has {entries} entries, and "
            f"{TABLE_ENTRIES} fit the scalar memory"
        )
    return None
