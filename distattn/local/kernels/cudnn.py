"""NVIDIA's cuDNN on GPUs, through the call by which `jax.nn.dot_product_attention` reaches it.

The forward pass is theirs, the gradient ours: cuDNN's takes the gradient of the output alone, where the
log-sum-exp has one too, and is of no use for a row without a key. jax.nn itself is not called, because
it rounds the log-sum-exp to the dtype of the query: in bfloat16 the weight of a device's part would be
off by a hundredth and more.

**cuDNN has never been run from here**: there was no GPU. What stands around it is checked with another
function in its place that keeps the same contract, and the program is compiled by XLA:GPU, which leaves the
call to cuDNN as it is. The contract, as JAX states it: out has the query's dtype, the log-sum-exp is
f32[B, N, T] and natural; lengths are those of leading slots; a window reaches to the left, under a causal
mask alone. What no source states is refused (causal with T other than S, a window beside lengths), or not
left to it (rows without a key).

A number that is no number in a value may reach rows that a causal mask keeps from it. None therefore takes
it only where no row sees less of the keys than another, and for many queries; by name it also does causal
masks and windows.
"""

import jax
import jax.numpy as jnp

from distattn import _compat
from distattn.algebra.softmax_state import SoftmaxState
from distattn.local.block import LogitConfig
from distattn.local.inputs import AttentionInputs
from distattn.local.kernels import shared
from distattn.local.kernels.shared import (
    PLAIN,
    finished_state,
    key_lengths,
    rows_with_keys,
    without_empty_slots,
)
from distattn.local.tiling import Machine

# No gradient of its own: that of the first that serves, else that of XLA's operations on blocks.
GRADIENTS_BY = ("pallas_gpu",)

# From so many on there is a block of rows for each head, and more, as FlashAttention-2 cuts them (64 to 128
# rows; arXiv 2307.08691, section 3.3). Not measured.
FEW_QUERIES = 64
_DTYPES = (jnp.bfloat16, jnp.float16)
_AMPERE, _HOPPER = (8, 0), (9, 0)  # compute capabilities


def fold(inputs: AttentionInputs, logit_config: LogitConfig, machine: Machine) -> SoftmaxState:
    """As `distattn.local.fold`."""
    del machine
    mask, query = inputs.mask, inputs.query
    queries, keys = query.shape[1], inputs.key.shape[1]
    lengths = None
    if not mask.index_order.full:
        # What it does without a single key is not known: a row of that kind has one, and is emptied below.
        lengths = jnp.broadcast_to(jnp.maximum(key_lengths(mask), 1), query.shape[:1])
    left, right = mask.reach
    out, lse = _compat.cudnn_attention(
        query,
        without_empty_slots(inputs.key, mask),
        without_empty_slots(inputs.value, mask),
        scale=logit_config.scale,
        is_causal=right == 0,
        left=left,
        key_lengths=lengths,
    )
    # JAX before 0.10 forgets over which axes of a shard_map they vary.
    axes = _compat.varying_axes(*jax.tree.leaves(inputs))
    out, lse = (_compat.vary(x, axes) for x in (out, lse))
    attended = rows_with_keys(mask, queries, keys)
    return finished_state(out, lse.swapaxes(1, 2), attended[..., None])


def refusal(
    inputs: AttentionInputs, logit_config: LogitConfig, machine: Machine, *, backward: bool = False
) -> str | None:
    """Which argument cuDNN does not do, and why; None: it does the call."""
    del backward  # the gradient is another kernel's
    return (
        shared.of_platform(machine, "gpu", simulated=False)
        or shared.of_sharding(machine)
        or shared.of_dense_arguments(inputs)
        or shared.of_dtypes(inputs, _DTYPES)
        or shared.of_mixed_dtypes(inputs)
        or shared.of_index_order(inputs)
        or shared.of_precision(logit_config, PLAIN)
        or _of_logits(inputs, logit_config)
        or _of_mask(inputs)
        or _of_widths(inputs)
        or _of_library()
    )


def reservation(inputs: AttentionInputs) -> str | None:
    """Why None does not take it, though it does the call."""
    if inputs.query.shape[1] < FEW_QUERIES:
        return "few queries: `pallas_gpu` cuts the keys, so that all processors of a GPU work"
    if inputs.mask.compares_positions:
        return "NaN that a causal mask or a window hides from some of the rows may reach them"
    return None


def _of_logits(inputs: AttentionInputs, logit_config: LogitConfig) -> str | None:
    if logit_config.soft_cap is not None:
        return f"logits_soft_cap is {logit_config.soft_cap}"
    if inputs.mask.query_segment_ids is not None:
        return "query_segment_ids are given"
    return None


def _of_mask(inputs: AttentionInputs) -> str | None:
    mask = inputs.mask
    if not mask.compares_positions:
        return None
    left, right = mask.reach
    if right != 0:
        return f"local_window_size is {mask.window}; done are windows to the left, (left, 0) or is_causal"
    if left is not None and not mask.index_order.full:
        return (
            "local_window_size is given, and some slots of key are empty (key_value_seq_lengths, or an S "
            "that the devices do not divide); it does one of the two"
        )
    queries, keys = inputs.query.shape[1], inputs.key.shape[1]
    if queries != keys:
        name = "is_causal" if mask.is_causal else "local_window_size"
        return f"{name} is given for T={queries} queries and S={keys} keys; it is done for as many"
    return None


def _of_widths(inputs: AttentionInputs) -> str | None:
    width, value_width = inputs.query.shape[-1], inputs.value.shape[-1]
    widest = 256 if (_compat.compute_capability() or _AMPERE) >= _HOPPER else 128
    if width % 8 or width > widest:
        return f"query has a head dimension of {width}; done are multiples of 8 up to {widest}"
    if value_width != width:
        return f"value has a head dimension of {value_width}, and key one of {width}; done are equal ones"
    return None


def _of_library() -> str | None:
    capability = _compat.compute_capability()
    if capability is not None and capability < _AMPERE:
        return f"the platform is a GPU of compute capability {capability}; done are those from {_AMPERE} on"
    if _compat.cudnn_version() is None:
        return "the platform has no cuDNN that JAX finds; install nvidia-cudnn-cu12 (or -cu13)"
    return None
