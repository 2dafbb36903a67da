"""JAX's own attention kernel for TPUs, `jax.experimental.pallas.ops.tpu.splash_attention`, by name.

The forward pass is theirs, the gradient that of `pallas_tpu`: theirs takes the gradient of the output
alone, and of finished attention alone, where here other devices have keys too. It is for comparison, and
for those who know it to be faster on their shapes: `pallas_tpu` serves all that it does, reads keys and
values as they lie, [B, S, K, H], where this one has them copied to [B, K, S, H], and in any order. A number
that is no number in a value reaches all rows whose block holds it, also those that causal masks, windows
and segments keep from it (not from empty slots, which are cleared first). A query of 16 bits is scaled
before the product, and so rounded once more.

Facts of JAX 0.9.2 to 0.12: its log-sum-exp is float32 and natural, [N, T]; that of a row without a key is
its mask value, or -inf with NaN as the output; causal masks are aligned at the top left, as here.
"""

import jax
import jax.numpy as jnp

from distattn._compat import interpreter
from distattn.algebra.softmax_state import SoftmaxState
from distattn.local.block import LogitConfig
from distattn.local.inputs import AttentionInputs
from distattn.local.kernels import shared
from distattn.local.kernels.shared import (
    PLAIN,
    finished_state,
    scaled_query,
    without_empty_slots,
)
from distattn.local.mask import Mask
from distattn.local.tiling import Machine

# No gradient of its own: that of the first that serves, else that of XLA's operations on blocks.
GRADIENTS_BY = ("pallas_tpu",)

MODULE = "jax.experimental.pallas.ops.tpu.splash_attention"
_DTYPES = (jnp.bfloat16, jnp.float32)
_BLOCKS = (512, 256, 128)
_MASKED = -2.0e38  # a logit that is not allowed; its own default is about that
_EMPTY = -1.0e38  # no row with a key has a log-sum-exp below


def fold(inputs: AttentionInputs, logit_config: LogitConfig, machine: Machine) -> SoftmaxState:
    """As `distattn.local.fold`."""
    from jax.experimental.pallas.ops.tpu import splash_attention

    mask = inputs.mask
    _, queries, heads, _ = inputs.query.shape
    keys = inputs.key.shape[1]
    block_q, block_kv = _blocks(queries, keys, machine)
    left, right = mask.reach
    if left is None and right is None:
        rule = splash_attention.FullMask((queries, keys))
    elif left is None and right == 0:
        rule = splash_attention.CausalMask((queries, keys))
    else:
        rule = splash_attention.LocalMask((queries, keys), (left, right), offset=0)
    attention = splash_attention.make_splash_mha_single_device(
        splash_attention.MultiHeadMask([rule] * heads),
        block_sizes=splash_attention.BlockSizes(block_q=block_q, block_kv=block_kv),
        save_residuals=True,
        mask_value=_MASKED,
        attn_logits_soft_cap=logit_config.soft_cap,
        interpret=interpreter() or False,
    )
    arrays = (
        scaled_query(inputs.query, logit_config),
        inputs.key,
        without_empty_slots(inputs.value, mask),
    )
    ids = _segment_ids(inputs)
    segments = ids and splash_attention.SegmentIds(*ids)
    out, (lse,) = jax.vmap(attention)(*(x.swapaxes(1, 2) for x in arrays), segments)
    lse = lse.swapaxes(1, 2)
    attended = ~(lse < _EMPTY)
    if mask.query_valid is not None:
        attended &= mask.query_valid[..., None]
    return finished_state(out.swapaxes(1, 2), lse, attended)


def refusal(
    inputs: AttentionInputs, logit_config: LogitConfig, machine: Machine, *, backward: bool = False
) -> str | None:
    """Which argument the kernel does not do, and why; None: it does the call."""
    del backward  # the gradient is another kernel's
    return (
        shared.of_platform(machine, "tpu")
        or shared.of_sharding(machine)
        or shared.of_types(inputs)
        or shared.of_dense_arguments(inputs)
        or shared.of_dtypes(inputs, _DTYPES)
        or shared.of_mixed_dtypes(inputs)
        or shared.of_index_order(inputs)
        or shared.of_precision(logit_config, PLAIN)
        or _of_segments(inputs.mask)
        or _of_sizes(inputs, machine)
        or shared.of_package(MODULE)
    )


def _of_segments(mask: Mask) -> str | None:
    if mask.query_segment_ids is not None and _has_empty_slots(mask):
        return (
            "query_segment_ids are given, and some slots of key are empty (key_value_seq_lengths, or an S "
            "that the devices do not divide); it does one of the two"
        )
    return None


def _of_sizes(inputs: AttentionInputs, machine: Machine) -> str | None:
    queries, keys = inputs.query.shape[1], inputs.key.shape[1]
    block_q, block_kv = _blocks(queries, keys, machine)
    if not block_q:
        return (
            f"query has T={queries} on a device; done are up to {_BLOCKS[0]}, and multiples of 128"
        )
    if not block_kv:
        return f"key has S={keys} on a device; done are multiples of 128"
    if queries % block_q or keys % block_kv:
        blocks = (block_q, block_kv)
        return f"block_sizes come to {blocks}, which do not divide T={queries} and S={keys}"
    return None


def _blocks(queries: int, keys: int, machine: Machine) -> tuple[int, int]:
    """Queries and keys of a block; 0 where there is none."""

    def fitting(size: int) -> int:
        return next((block for block in _BLOCKS if size % block == 0), 0)

    if machine.block_sizes:
        rows, columns = machine.block_sizes
        return min(rows, queries), -(-columns // 128) * 128
    return queries if queries <= _BLOCKS[0] else fitting(queries), fitting(keys)


def _segment_ids(inputs: AttentionInputs) -> tuple[jax.Array, jax.Array] | None:
    """int32[B, T] and int32[B, S], which also tell empty slots from others."""
    mask = inputs.mask
    (batch, queries), keys = inputs.query.shape[:2], inputs.key.shape[1]
    if mask.query_segment_ids is not None:
        ids = mask.query_segment_ids, mask.key_segment_ids
    elif _has_empty_slots(mask):
        ids = jnp.zeros((1, queries), jnp.int32), (mask.key_positions < 0).astype(jnp.int32)
    else:
        return None
    rows, columns = ids
    return jnp.broadcast_to(rows, (batch, queries)), jnp.broadcast_to(columns, (batch, keys))


def _has_empty_slots(mask: Mask) -> bool:
    return mask.index_order is not None and not mask.index_order.full
