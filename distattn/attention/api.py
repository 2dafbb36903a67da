"""The public call on global arrays: the boundary, then one call over the mesh."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh
from jax.typing import ArrayLike

from distattn.attention.global_call import attend, choose_call
from distattn.attention.sharding import read_placement, warn_of_one_device
from distattn.attention.strategy import StrategyLike, check_exchange, check_strategy
from distattn.local.dispatch import forward_mode_refused
from distattn.local.inputs import Window, check_implementation, make_inputs, make_logit_config
from distattn.local.reproducible import reproducible_blocks_of
from distattn.planning.plan import AxisNames


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
    mesh: Mesh | AbstractMesh | None = None,
    axis_name: AxisNames = None,
    query_axis_name: AxisNames = "auto",
    batch_axis_name: AxisNames = None,
    heads_axis_name: AxisNames = None,
    strategy: StrategyLike = "auto",
    reproducible: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Exact attention; the keys and values may lie on many devices, in any order.

        out = softmax(cap(scale * query . key + bias), over the keys allowed by every mask) . value

    The arguments of `jax.nn.dot_product_attention` mean what they mean there. Two results differ: a row
    that attends to no key gives 0 (there: the mean of all values), and the residual is float32 and
    differentiable. Masked slots of key and value may hold anything, NaN included, without effect on
    outputs or gradients. Each device folds its own keys into a `SoftmaxState`, the states are merged:
    nothing of the size of key or value moves, unless strategy says so.

    Args:
      query: [B, T, N, H] or [T, N, H]; bfloat16, float16, float32 or float64.
      key: [B, S, K, H] or [S, K, H]; N must be a multiple of K.
      value: [B, S, K, V] or [S, K, V]; V may differ from H.
      bias: float, broadcasts to [B, N, T, S]; added to the scaled logits. Differentiable.
      mask: bool, broadcasts to [B, N, T, S]; True = attend.
      scale: of query . key; default 1 / sqrt(H). A Python number.
      is_causal: attend iff key position <= query position. Positions are global indices by default, so
        that T != S is aligned at the top left.
      query_seq_lengths: int32[B]; rows t >= length (by index, not by position) give 0 and -inf.
      key_value_seq_lengths: int32[B]; attend iff key position < length.
      local_window_size: int or (left, right), inclusive, on positions; -1 or None = unbounded.
      implementation: 'blocked': XLA's operations on blocks, memory O(T + block), reverse mode.
        'pallas_tpu' and 'pallas_gpu': the same as kernels for TPUs and for GPUs, for masks of positions,
        lengths and segments; no bias, dense mask or float64; compiled for v4 to tpu7x and for the H100, not
        timed yet. 'cudnn', 'splash': NVIDIA's and JAX's own kernels for the forward pass, of keys in index
        order and standard masks, causal ones where T and S are whole on a device; NaN in a value that a
        causal mask, a window or segments hide from some rows may reach these (see `distattn.local.kernels.cudnn`
        and `splash`). 'dense': plain operations of size [T, S], for forward mode, hessians, and as a check.
        None: on a TPU 'pallas_tpu', on a GPU 'cudnn' for many queries without causal mask or window and
        else 'pallas_gpu', where they serve and no axis is left to the compiler, else
        'blocked'.
      return_residual: also return the log-sum-exp of the logits.
      logits_soft_cap: c in c * tanh(logit / c).
      sinks: float[N], one extra logit a head whose value is 0. Differentiable. A row with a sink and no
        key gives 0, and the sink as its log-sum-exp.
      precision: of the matrix products, as in `jax.numpy.einsum`.
      query_positions: int32[T] or int32[B, T].
      key_positions: int32[S] or int32[B, S], in any order; negative = empty slot, never attended.
      query_segment_ids: int32[T] or int32[B, T]; attend iff equal.
      key_value_segment_ids: int32[S] or int32[B, S].
      mesh: the mesh; None: that of the arrays, or of `jax.set_mesh`.
      axis_name: axis or tuple of axes over which key and value are sharded along S; () = none. None: read
        from key, which is possible outside jit, and under Explicit axes; elsewhere the only axis of mesh
        if that is passed, else the compiler decides what moves, with a warning. Axes that replicate key
        and value take no part. S need not be a multiple of the devices: it is padded inside. Inside a
        `jax.shard_map` of one's own, key and value are one device's, and this attends to these alone:
        call `distattn.sharded_attention` there.
      query_axis_name: axes over which query is sharded along T; None = replicated; 'auto' = read, or,
        where it cannot be read, by cost.
      batch_axis_name: axes over which B is sharded; None: read, which inside jit and under Auto axes is not
        possible. Say it there: else what the compiler has sharded unseen is in part gathered, and blocks
        that a mask rules out are computed all the same.
      heads_axis_name: axes over which N and K are sharded; None: the same.
      strategy: how devices exchange. Of states, for a replicated query: 'butterfly' (ceil(log2 D)
        messages), 'psum', 'all_gather', 'fused', or a `Schedule`. For a query sharded along T over the
        axes of the keys: 'reduce_scatter' (query gathered, states scattered), 'gather_kv' (keys and values
        gathered), 'ring' (keys and values travel round, D - 1 hops), 'ulysses' (heads sharded instead of
        rows, by all-to-all), and over a tuple of axes 'ulysses_ring' and 'ulysses_gather_kv' (heads over
        the last axis, ring or gather over the others). 'auto': the cheapest by `planner`. The result is
        the same. 'fused' is 'butterfly' inside a TPU kernel, from chip to chip without XLA; where the
        kernels serve, states fit VMEM, and T * N / K is at most 128, the fold, the exchange and the
        division are one launch, else two. 'auto' never takes it: it compiles for v5e to tpu7x, and was not
        timed. Of a chip with two cores under one device (v4, v5p) it uses one.
      reproducible: the same bits on any number of devices, with any strategy, and for any order of whole
        blocks, in the result and in all gradients: sums over keys are made of integers (`fixed_point`). A
        block is 64 keys (`units.BLOCK`), cut from the start of the array; where the devices do not divide
        S into whole blocks, keys move, and what the compiler has sharded unseen is gathered. The promise is
        for one backend, processor and JAX version. Takes 1.3 to 2 times as long, and moves 3 times the
        states.

    Returns:
      out [B, T, N, V] in query's dtype (unbatched: [T, N, V]); with `return_residual` also lse, natural
      log, f32[B, T, N] (float64 if an input is), differentiable.

    Raises:
      ValueError: a wrong shape, dtype, axis, mesh or combination, heads that a strategy cannot shard, a
        strategy by name where key is sharded over no axis; the message says what to do.
      NotImplementedError: an implementation that cannot do the call, saying which argument it is;
        reproducible for float64, or for key heads that the devices of the heads do not divide; 'fused' on
        another platform, in float64, with axes that are left to the compiler, for states that do not fit
        VMEM, or where slices are not known; forward mode and second derivatives, but by 'dense'.

    Warns:
      UserWarning: inside jit, vmap or `jax.checkpoint`, under Auto axes of more than one device, without
        axis_name: how key is sharded cannot be read there. Inside a `jax.shard_map` with check_vma=True,
        where key varies over an axis and query does not.

    Example:
      >>> import jax, jax.numpy as jnp, distattn
      >>> query, key, value = jnp.ones((1, 2, 4, 8)), jnp.ones((1, 6, 2, 8)), jnp.ones((1, 6, 2, 8))
      >>> distattn.dot_product_attention(query, key, value, is_causal=True).shape
      (1, 2, 4, 8)

    Reference: Rabe & Staats, arXiv 2112.05682; the merge over devices is their section 3 across a mesh.
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
        query,
        key,
        value,
        mesh=mesh,
        axis_name=axis_name,
        query_axis_name=query_axis_name,
        batch_axis_name=batch_axis_name,
        heads_axis_name=heads_axis_name,
        leave_none=reproducible,
    )
    check_exchange(placement, strategy)
    if axis_name is None:
        warn_of_one_device(query, key, value)
    units = reproducible_blocks_of(inputs, implementation) if reproducible else None
    call = choose_call(
        inputs, placement, logit_config, implementation, strategy, query_axis_name, units
    )
    with forward_mode_refused():
        out, lse = attend(call, inputs)
    if jnp.ndim(query) == 3:
        out, lse = out[0], lse[0]
    return (out, lse) if return_residual else out
