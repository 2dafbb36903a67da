"""The public call on global arrays."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from distattn.attention.global_call import attend
from distattn.attention.sharding import Sharding, bring, read_placement, warn_of_one_device
from distattn.attention.strategy import (
    Call,
    StrategyLike,
    check_exchange,
    check_strategy,
    choose_strategy,
)
from distattn.local.dispatch import forward_mode_refused
from distattn.local.inputs import (
    Window,
    check_implementation,
    letters_of,
    make_inputs,
    make_logit_config,
    map_named,
)
from distattn.local.reproducible import reproducible_blocks_of


def dot_product_attention(
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
    return_residual: bool = False,
    logits_soft_cap: float | None = None,
    sinks: ArrayLike | None = None,
    precision: jax.lax.PrecisionLike = None,
    query_positions: ArrayLike | None = None,
    key_positions: ArrayLike | None = None,
    query_segment_ids: ArrayLike | None = None,
    key_value_segment_ids: ArrayLike | None = None,
    query_sharding: Sharding = None,
    key_value_sharding: Sharding = None,
    strategy: StrategyLike = "auto",
    reproducible: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Return attention over keys and values that may be sharded over devices, in any order.

    Examples:
      >>> import jax, jax.numpy as jnp, distattn
      >>> mesh, (query, key, value) = jax.make_mesh((1,), ("kv",)), jnp.ones((3, 1, 8, 2, 4))
      >>> sharded = jax.NamedSharding(mesh, jax.P(None, "kv"))  # [B, S, K, H] along S
      >>> distattn.dot_product_attention(query, key, value, key_value_sharding=sharded).shape
      (1, 8, 2, 4)

    The result is softmax(cap(scale * query . key + bias)) . value, over the keys that all masks allow.
    Arguments of `jax.nn.dot_product_attention` keep their meaning, but a query that attends to no key gives
    0, and the residual is float32 and differentiable. A slot that no query of its sequence may attend to
    can hold anything, also NaN. Inside `jax.shard_map` call `sharded_attention`.

    Args:
      query: [B, T, N, H] or [T, N, H]; bfloat16, float16, float32 or float64.
      key: [B, S, K, H] or [S, K, H]; K divides N.
      value: [B, S, K, V] or [S, K, V].
      bias: float, broadcasts to [B, N, T, S]; added to the scaled logits.
      mask: bool, broadcasts to [B, N, T, S]; True = attend.
      scale: Python number; None: 1 / sqrt(H).
      is_causal: attend if key position <= query position.
      query_seq_lengths: int32[B]; queries from this index on give 0.
      key_value_seq_lengths: int32[B]; attend if key position < length.
      local_window_size: int or (left, right), inclusive, in positions; -1 or None = unbounded.
      implementation: 'xla', 'dense', 'pallas_tpu', 'pallas_gpu', 'cudnn', or None for the best one that
        supports the call (page "Kernels"). Only 'dense' supports forward mode and second derivatives.
      return_residual: also return the log-sum-exp of the logits, natural log.
      logits_soft_cap: c in c * tanh(logit / c).
      sinks: float[N], one more logit per head with value 0; differentiable.
      precision: of matmuls, as in `jax.numpy.einsum`.

      query_positions: int32[T] or int32[B, T]; None: 0, 1, 2, ..., also if T < S.
      key_positions: int32[S] or int32[B, S], in any order; negative = empty slot; None: 0, 1, 2, ...
        Pass it if keys are reordered: otherwise masks are silently wrong. bias and mask go by slot.
      query_segment_ids: int32[T] or int32[B, T]; attend if equal.
      key_value_segment_ids: int32[S] or int32[B, S].

      query_sharding: `jax.NamedSharding`, or `jax.P` on the mesh of `jax.set_mesh` or of the arrays; heads
        may use more axes than key's. None: read from query, or chosen by cost if it can't be read.
      key_value_sharding: of key and value, which are moved if they are stored otherwise. None: read from
        them. Inside jit under Auto axes they can't be read, and the compiler decides, with a warning.

      strategy: how devices exchange (page "Attention"). For a replicated query 'butterfly', 'psum',
        'all_gather', 'fused' or a `Schedule`; for a query sharded along T over the axes of S 'ring',
        'gather_kv', 'reduce_scatter', 'ulysses', 'ulysses_ring', 'ulysses_gather_kv'; 'auto': the cheapest.
      reproducible: give bitwise equal results and gradients on any number of devices and for any order
        of blocks of 64 keys, on one backend and JAX version. Takes 1.3 to 2 times as long.

    Returns:
      out [B, T, N, V] or [T, N, V] in query's dtype, sharded as query; with `return_residual` also
      lse f32[B, T, N] or f32[T, N].

    Raises:
      ValueError: an invalid argument or combination; the message says what to pass.
      NotImplementedError: a valid call that an implementation or strategy doesn't support.

    Reference: Rabe & Staats, arXiv 2112.05682; section 3 is merged over devices here.
    """
    implementation = check_implementation(implementation)
    check_strategy(strategy)
    logit_config = make_logit_config(query, scale, logits_soft_cap, precision)
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
        sinks=sinks,
        query_positions=query_positions,
        key_positions=key_positions,
        query_segment_ids=query_segment_ids,
        key_value_segment_ids=key_value_segment_ids,
    )
    placement = read_placement(
        query, key, value, query_sharding, key_value_sharding, leave_none=reproducible
    )
    if query_sharding is not None or key_value_sharding is not None:
        inputs = map_named(lambda name, x: bring(placement, letters_of(name, x), x), inputs)
    check_exchange(placement, strategy)
    if key_value_sharding is None:
        warn_of_one_device(query, key, value)
    blocks = reproducible_blocks_of(inputs, implementation) if reproducible else None
    placement, chosen = choose_strategy(placement, inputs, strategy, blocks)
    call = Call(placement, chosen, logit_config, implementation, blocks)
    with forward_mode_refused():
        out, lse = attend(call, inputs)
    if jnp.ndim(query) == 3:
        out, lse = out[0], lse[0]
    return (out, lse) if return_residual else out
