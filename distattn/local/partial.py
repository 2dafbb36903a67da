"""`partial_attention`: the public call for attention over some of the keys."""

from __future__ import annotations

import jax
from jax.typing import ArrayLike

from distattn._compat import platform_of
from distattn.algebra.softmax_state import SoftmaxState
from distattn.local.dispatch import local_state
from distattn.local.inputs import Window, check_implementation, make_inputs, make_logit_config
from distattn.local.tiling import Machine


def partial_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: Window = None,
    implementation: str | None = None,
    logits_soft_cap: float | None = None,
    precision: jax.lax.PrecisionLike = None,
    query_positions: ArrayLike | None = None,
    key_positions: ArrayLike | None = None,
    query_segment_ids: ArrayLike | None = None,
    key_value_segment_ids: ArrayLike | None = None,
    block_sizes: tuple[int, int] | None = None,
) -> SoftmaxState:
    """Return undivided attention over some of the keys, a state that `merge` takes.

        s = cap(scale * q . k + bias) where allowed, else -inf
        max = max(s), sum = sum(exp(s - max)), weighted_sum = sum(exp(s - max) * v)

    `finalize(partial_attention(...))` is attention. States over disjoint sets of keys, in any order,
    `merge` into the state of their union. Sinks are not an argument: they enter once, in `finalize`.
    Memory is O(T + block) forward and backward. Only `implementation='dense'` has forward mode.

    An empty slot (a negative position, or past the length) can hold anything, also NaN. In implementations
    other than kernels, so can a slot that the masks rule out for all queries of its sequence. A NaN that
    some query attends to may reach other queries.

    Args:
      query: [B, T, N, H] or [T, N, H]; bfloat16, float16, float32 or float64.
      key: [B, S, K, H] or [S, K, H]; N must be a multiple of K.
      value: [B, S, K, V] or [S, K, V].
      bias: float, broadcasts to [B, N, T, S]; added to the scaled logits. Differentiable.
      mask: bool, broadcasts to [B, N, T, S]; True = attend.
      scale: factor of q . k; default 1 / sqrt(H).
      is_causal: attend if key position <= query position.
      query_seq_lengths: int32[B]; query rows t >= length attend to nothing.
      key_value_seq_lengths: int32[B]; attend if key position < length.
      local_window_size: int or (left, right), inclusive, on positions; -1 or None = unbounded.
      implementation: None, 'xla', 'pallas_tpu', 'pallas_gpu', 'cudnn', or 'dense' for plain
        operations of size [T, S]; see `dot_product_attention`.
      logits_soft_cap: c in c * tanh(logit / c).
      precision: of matmuls, as in `jax.numpy.einsum`.
      query_positions: int32[T] or int32[B, T]; default 0, 1, 2, ...
      key_positions: int32[S] or int32[B, S], in any order; negative = empty slot; default 0, 1, 2, ...
      query_segment_ids: int32[T] or int32[B, T]; attend if equal.
      key_value_segment_ids: int32[S] or int32[B, S].
      block_sizes: queries and keys of one block, rounded up to sizes that a kernel supports; None: chosen.

    Returns:
      SoftmaxState: f32[B, T, N], f32[B, T, N], f32[B, T, N, V] (float64 if an input is); B = 1 if the
      arrays have no batch. A row that attends to no key is (-inf, 0, 0), with zero gradients.

    Raises:
      ValueError: an invalid shape, dtype or combination; the message says what to pass.
      NotImplementedError: an implementation that does not support the call; the message names the argument.

    Examples:
      >>> import jax, jax.numpy as jnp, distattn
      >>> query, key, value = jax.random.normal(jax.random.key(0), (3, 1, 8, 2, 4))
      >>> order = jnp.array([5, 0, 3, 7, 1, 4, 2, 6])  # keys in any order, each with its position
      >>> state = distattn.partial_attention(
      ...     query, key[:, order], value[:, order], is_causal=True,
      ...     query_positions=jnp.arange(8), key_positions=order,
      ... )
      >>> out, lse = distattn.finalize(state)
      >>> wanted = jax.nn.dot_product_attention(query, key, value, is_causal=True)
      >>> bool(jnp.allclose(out, wanted, atol=1e-5))
      True

    Reference: Rabe & Staats, arXiv 2112.05682, sections 2 and 3.
    """
    logit_config = make_logit_config(query, scale, logits_soft_cap, precision)
    implementation = check_implementation(implementation)
    inputs = make_inputs(
        query,
        key,
        value,
        bias,
        mask,
        is_causal=is_causal,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
        query_positions=query_positions,
        key_positions=key_positions,
        query_segment_ids=query_segment_ids,
        key_value_segment_ids=key_value_segment_ids,
    )
    if block_sizes is not None and (len(block_sizes) != 2 or min(block_sizes) < 1):
        raise ValueError(
            f"block_sizes is {block_sizes}; it must be (queries, keys), both at least 1, or None"
        )
    machine = Machine(platform_of(), block_sizes=block_sizes)
    return local_state(inputs, logit_config, machine, implementation)
