"""NVIDIA's cuDNN on GPUs, through the function by which `jax.nn.dot_product_attention` calls it.

Only the forward pass is cuDNN's. Its gradient ignores the cotangent of the log-sum-exp and rows without a
key, so the gradient is the library's own. jax.nn is not called, because it rounds the log-sum-exp to the
dtype of the query: in bfloat16 the weight of a device's state would be off by a hundredth and more.

**cuDNN has never been run here**: there was no GPU. The code around it is tested with a stand-in of the
same contract, and XLA:GPU compiles the program, which leaves the call to cuDNN as it is. The contract, as
JAX states it: out has the query's dtype; the log-sum-exp is f32[B, N, T] and natural; lengths count
leading slots; a window reaches to the left, under a causal mask only. Calls that no source describes are
refused (causal with T != S, a window with lengths) or not left to cuDNN (rows without a key).

A NaN in `value` can reach rows that a causal mask hides it from, so `implementation=None` selects cuDNN
only if no mask compares positions, and only for many queries.
"""

from typing import Any

import jax
import jax.numpy as jnp

from distattn import _compat
from distattn.algebra.softmax_state import SoftmaxState, from_lse
from distattn.local import blockwise
from distattn.local.block import Cotangents, LogitConfig
from distattn.local.inputs import AttentionInputs
from distattn.local.kernels import shared
from distattn.local.kernels.gpu import support as pallas_gpu
from distattn.local.mask import Mask
from distattn.local.tiling import Machine

# From here on each head has a block of rows of its own, as FlashAttention-2 divides them (64 to 128 rows;
# arXiv 2307.08691, section 3.3). Not measured.
FEW_QUERIES = 64
_DTYPES = (jnp.bfloat16, jnp.float16)
_AMPERE, _HOPPER = (8, 0), (9, 0)  # compute capabilities


def fold(inputs: AttentionInputs, logit_config: LogitConfig, machine: Machine) -> SoftmaxState:
    """Return the state over all keys, as `distattn.local.blockwise.fold`."""
    del machine
    mask, query = inputs.mask, inputs.query
    lengths = None
    if not mask.index_order.full:
        # No source says what cuDNN does without a key: each row has one here, and is emptied below.
        lengths = jnp.broadcast_to(jnp.maximum(_key_lengths(mask), 1), query.shape[:1])
    left, right = mask.reach
    out, lse = _compat.cudnn_attention(
        query,
        _without_empty_slots(inputs.key, mask),
        _without_empty_slots(inputs.value, mask),
        scale=logit_config.scale,
        is_causal=right == 0,
        left=left,
        key_lengths=lengths,
    )
    # JAX before 0.10 forgets over which axes of a shard_map they vary.
    axes = _compat.varying_axes(*jax.tree.leaves(inputs))
    out, lse = (_compat.vary(x, axes) for x in (out, lse))
    attended = rows_with_keys(mask, query.shape[1], inputs.key.shape[1])[..., None]
    lse = jnp.where(attended, lse.swapaxes(1, 2), -jnp.inf)
    return from_lse(out.astype(jnp.float32), lse)


def fold_gradients(
    inputs: AttentionInputs,
    logit_config: LogitConfig,
    machine: Machine,
    cotangents: Cotangents,
    *,
    key_dtype: Any = None,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Return the gradient of `pallas_gpu` if it supports the call, else that of XLA's operations."""
    refused = pallas_gpu.unsupported(inputs, logit_config, machine, backward=True)
    run = blockwise.fold_gradients if refused else pallas_gpu.fold_gradients
    return run(inputs, logit_config, machine, cotangents, key_dtype=key_dtype)


def rows_with_keys(mask: Mask, queries: int, keys: int) -> jax.Array:
    """Return which rows attend to a key, bool[B|1, T], for a mask in index order without segments."""
    last = jnp.array([keys - 1], jnp.int32) if _is_full(mask) else _key_lengths(mask) - 1
    first, last = jnp.zeros((1, 1), jnp.int32), last[:, None]
    if mask.compares_positions:  # all count from 0 then
        rows = jnp.arange(queries, dtype=jnp.int32)[None]
        left, right = mask.reach
        if left is not None:
            first = jnp.maximum(first, rows - min(left, queries))
        if right is not None:
            last = jnp.minimum(last, rows + min(right, keys))
    attended = jnp.broadcast_to(first <= last, (last.shape[0], queries))
    return attended if mask.query_valid is None else attended & mask.query_valid


def unsupported(
    inputs: AttentionInputs, logit_config: LogitConfig, machine: Machine, *, backward: bool = False
) -> str | None:
    """Return which argument cuDNN does not support, and why; None if it supports the call."""
    del backward  # `fold_gradients` finds another kernel
    return (
        shared.unsupported_place(machine, "gpu", interpretable=False)
        or shared.unsupported_arguments(inputs, _DTYPES)
        or _unsupported_order(inputs)
        or _unsupported_logits(inputs, logit_config)
        or _unsupported_mask(inputs)
        or _unsupported_width(inputs)
        or _unsupported_library()
    )


def not_by_default(inputs: AttentionInputs) -> str | None:
    """Return why `implementation=None` does not select cuDNN for a call that it supports."""
    if inputs.query.shape[1] < FEW_QUERIES:
        return (
            "with few queries, `pallas_gpu` splits the keys, so that all processors of a GPU work"
        )
    if inputs.mask.compares_positions:
        return "a NaN in value may reach rows that a causal mask or a window hides it from"
    return None


def _unsupported_order(inputs: AttentionInputs) -> str | None:
    mask = inputs.mask
    if inputs.key_scale is not None or inputs.layer is not None:
        return "key and value are quantised, or have several layers"
    if mask.index_order is None:
        return "query_positions or key_positions are given, or a cache's; supported is index order alone"
    if mask.compares_positions and not mask.index_order.aligned:
        name = "is_causal" if mask.is_causal else "local_window_size"
        return (
            f"{name} compares positions, and the queries or keys of each device begin at another one, "
            "which cuDNN would have to know at compile time; shard B or heads instead of T and S "
            "(key_value_sharding, strategy='ulysses')"
        )
    return None


def _unsupported_logits(inputs: AttentionInputs, logit_config: LogitConfig) -> str | None:
    for name, x in (("key", inputs.key), ("value", inputs.value)):
        if x.dtype != inputs.query.dtype:
            return f"{name} has dtype {x.dtype}, and query {inputs.query.dtype}; they must be equal"
    if logit_config.precision not in shared.PLAIN:
        return f"precision is {logit_config.precision!r}; supported are None and 'default'"
    if logit_config.soft_cap is not None:
        return f"logits_soft_cap is {logit_config.soft_cap}"
    if inputs.mask.query_segment_ids is not None:
        return "query_segment_ids are given"
    return None


def _unsupported_mask(inputs: AttentionInputs) -> str | None:
    mask = inputs.mask
    if not mask.compares_positions:
        return None
    left, right = mask.reach
    if right != 0:
        return f"local_window_size is {mask.window}; supported are is_causal and windows (left, 0)"
    if left is not None and not mask.index_order.full:
        return (
            "local_window_size is given, and some slots of key are empty (key_value_seq_lengths, or an S "
            "that the devices do not divide); supported is one of the two"
        )
    queries, keys = inputs.query.shape[1], inputs.key.shape[1]
    if queries != keys:
        name = "is_causal" if mask.is_causal else "local_window_size"
        return f"{name} is given for T={queries} queries and S={keys} keys; T and S must be equal"
    return None


def _unsupported_width(inputs: AttentionInputs) -> str | None:
    width, value_width = inputs.query.shape[-1], inputs.value.shape[-1]
    widest = 256 if (_compat.compute_capability() or _AMPERE) >= _HOPPER else 128
    if width % 8 or width > widest:
        return f"query has a head dimension of {width}; supported are multiples of 8 up to {widest}"
    if value_width != width:
        return (
            f"value has a head dimension of {value_width}, and key of {width}; they must be equal"
        )
    return None


def _unsupported_library() -> str | None:
    capability = _compat.compute_capability()
    if capability is not None and capability < _AMPERE:
        return f"the GPU has compute capability {capability}; supported are {_AMPERE} and newer"
    if _compat.cudnn_version() is None:
        return "JAX finds no cuDNN on this platform; install nvidia-cudnn-cu12 (or -cu13)"
    return None


def _key_lengths(mask: Mask) -> jax.Array:
    """Return the number of leading slots that are not empty, int32[B|1]."""
    return (mask.key_positions >= 0).sum(axis=-1, dtype=jnp.int32)


def _without_empty_slots(x: jax.Array, mask: Mask) -> jax.Array:
    """Return keys or values [B, S, K, .] with 0 in empty slots, which may hold NaN."""
    if _is_full(mask):
        return x
    return jnp.where((mask.key_positions >= 0)[..., None, None], x, jnp.zeros((), x.dtype))


def _is_full(mask: Mask) -> bool:
    return mask.key_positions is None or (mask.index_order is not None and mask.index_order.full)
