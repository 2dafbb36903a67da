"""Scales of keys and values of 8 bits, laid out for the TPU kernels."""

import jax
import jax.numpy as jnp
from jax import lax

from distattn.kernels.tpu_layout import HEADS, TpuCut
from distattn.operands import Operands

# What keys and values may be beside a scale.
QUANTISED = (jnp.int8, jnp.float8_e4m3fn, jnp.float8_e5m2)


def scales_of(operands: Operands, cut: TpuCut) -> list[jax.Array]:
    """Of keys and of values, f32[L, B, K / heads, heads, S]; none where they are no bytes.

    So they lie in HBM where K is 1, 2, 4 or a multiple of 8, and nothing is copied. Elsewhere the scales
    of one layer are, 4 bytes for each H.
    """
    if operands.key_scale is None:
        return []
    scales = [operands.key_scale, operands.value_scale]
    if operands.layer is None:
        scales = [x[None] for x in scales]
    elif not _scales_lie_by_heads(cut):
        scales = [lax.dynamic_slice_in_dim(x, operands.layer, 1) for x in scales]
    return [
        x.swapaxes(2, 3).reshape(*x.shape[:2], cut.head_blocks, cut.heads, cut.keys) for x in scales
    ]


def _scales_lie_by_heads(cut: TpuCut) -> bool:
    return cut.kv_heads in (1, 2, 4) or cut.kv_heads % HEADS == 0
