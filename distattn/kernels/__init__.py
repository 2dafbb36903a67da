"""The local part as Pallas kernels: for TPUs, `implementation='pallas_tpu'`.

`fold` and `fold_gradients` are those of `distattn.local`, for masks of positions, lengths and segments.
Nothing of the size of T x S exists, nor a copy of keys or values: of float16, which Mosaic has not, XLA
takes the bits block by block within the kernel; its gradients alone exist in float32 before they are
rounded. Keys and values of 8 bits with scales are folded as they are; their gradient, the query's alone, is
that of the numbers they stand for, which are then written out.
What they do not do `refusal` names. None of it has been timed: it is checked by Pallas' interpreter, and by
the compilers of v4 to tpu7x.
"""

import importlib
from typing import Any

import jax
import jax.numpy as jnp

from distattn.block import Scoring
from distattn.kernels.interpreter import interpreted, interpreter
from distattn.kernels.tpu_blocks import TABLE_ENTRIES
from distattn.kernels.tpu_layout import EXACT, PLAIN, cut_of
from distattn.kernels.tpu_scales import QUANTISED
from distattn.operands import Operands
from distattn.state import SoftmaxState
from distattn.tiles import Machine

__all__ = ["fold", "fold_gradients", "interpreted", "refusal", "serves", "sizes_of"]

_DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)


def fold(operands: Operands, scoring: Scoring, machine: Machine) -> SoftmaxState:
    """As `distattn.local.fold`, of operands that are not refused."""
    # Pallas is imported where it is needed: it is large, and not all versions of JAX bring all it needs.
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
    """As `distattn.local.fold_gradients`, of operands that are not refused, which have no bias."""
    from distattn.kernels import tpu_backward

    rows = reference, d_sum, d_weighted_sum
    return tpu_backward.fold_gradients(operands, scoring, machine, *rows, key_dtype=key_dtype)


def serves(
    operands: Operands,
    scoring: Scoring,
    machine: Machine,
    implementation: str,
    *,
    backward: bool = False,
) -> bool:
    """Whether the kernels compute this: where they are named, or by themselves on a TPU.

    Raises:
      NotImplementedError: they are named, and do not do such a call.
    """
    named = implementation == "pallas_tpu"
    if not named and not (implementation == "auto" and machine.platform == "tpu"):
        return False
    if min(*operands.query.shape, *operands.value.shape) == 0:
        return False  # nothing to compute
    reason = refusal(operands, scoring, machine, backward=backward)
    if named and reason:
        raise NotImplementedError(
            f"implementation='pallas_tpu' is not built for this call: {reason}; pass implementation=None, "
            "which takes what there is"
        )
    return not reason and (named or _is_alone())


def refusal(
    operands: Operands, scoring: Scoring, machine: Machine, *, backward: bool = False
) -> str | None:
    """Which argument the kernels do not do, and why; None: they do the call."""
    mask = operands.mask
    arrays = {"query": operands.query, "key": operands.key, "value": operands.value}
    if machine.platform != "tpu" and not interpreter():
        return (
            f"it is a kernel for TPUs, and the platform is {machine.platform!r} (for tests, "
            "distattn.kernels.interpreted() runs it there, slowly)"
        )
    if machine.compiler_sharded:
        return "the compiler shards batch or heads unseen, and cannot cut a kernel; name their axes"
    if operands.bias is not None:
        return f"bias is given, of shape {operands.bias.shape}"
    if mask.dense is not None:
        return (
            f"mask is given, of shape {mask.dense.shape}; positions, lengths and segments are done"
        )
    for name, x in arrays.items():
        if name != "query" and operands.key_scale is not None:
            if x.dtype not in QUANTISED:
                return f"{name} has dtype {x.dtype}; int8, float8_e4m3fn and float8_e5m2 are done"
        elif x.dtype not in _DTYPES:
            return f"{name} has dtype {x.dtype}; bfloat16, float16 and float32 are done"
    if scoring.precision not in (*EXACT, *PLAIN):
        return f"precision is {scoring.precision!r}; None, 'default' and 'highest' are done"
    try:
        importlib.import_module("jax.experimental.pallas.tpu")
    except ModuleNotFoundError as error:
        return f"Pallas needs the package {error.name!r}, which is not installed"
    cut = cut_of(operands, machine, backward=backward)
    if cut.vmem_bytes > cut.target.budget_bytes:
        return (
            f"key has {cut.kv_heads} heads of {cut.width}: a block of them takes {cut.vmem_bytes} bytes, "
            f"and a kernel may take {cut.target.budget_bytes} on {cut.target.name}"
        )
    entries = cut.row_blocks * cut.key_blocks * (1 if mask_is_shared(operands) else cut.batch)
    if entries > TABLE_ENTRIES:
        return (
            f"query and key are so long that the table of visits has {entries} entries, and "
            f"{TABLE_ENTRIES} fit the scalar memory"
        )
    return None


def sizes_of(operands: Operands, machine: Machine, *, backward: bool = False) -> tuple[int, int]:
    """Rows and keys of a block, as a call has them that is not refused."""
    cut = cut_of(operands, machine, backward=backward)
    return cut.rows, cut.key_block


def mask_is_shared(operands: Operands) -> bool:
    """Whether all rows of the batch have one mask."""
    return all(x.shape[0] == 1 for x in jax.tree.leaves(operands.mask))


def _is_alone() -> bool:
    """Whether no compiler may shard what is traced: within `shard_map` over all axes, or on one device."""
    mesh: Any = jax.sharding.get_abstract_mesh()
    if mesh.manual_axes:
        return set(mesh.manual_axes) == set(mesh.axis_names)
    return jax.device_count() == 1
