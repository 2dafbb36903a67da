"""What attention kernels of others return, (out, lse), made a `SoftmaxState`; and what they are given.

They finish attention over the keys of a device. What they do with a row that has no key, and with values
that have no weight, is not left to them.
"""

import jax
import jax.numpy as jnp

from distattn.block import Scoring
from distattn.mask import Mask
from distattn.state import SoftmaxState, from_lse


def finished_state(out: jax.Array, lse: jax.Array, attended: jax.Array) -> SoftmaxState:
    """The state of a finished attention, whatever the kernel gives for rows without a key.

    Args:
      out: [B, T, N, V].
      lse: f32[B, T, N], natural log.
      attended: bool[B|1, T, N|1], whether the row has a key; what is not, may hold anything.

    Returns:
      SoftmaxState, f32[B, T, N], f32[B, T, N], f32[B, T, N, V].
    """
    lse = jnp.where(attended, lse.astype(jnp.float32), -jnp.inf)
    return from_lse(out.astype(jnp.float32), lse)


def rows_with_keys(mask: Mask, queries: int, keys: int) -> jax.Array:
    """bool[B|1, T]: which rows attend to a key at all, of a mask in index order without segments."""
    last = jnp.array([keys - 1], jnp.int32) if _is_full(mask) else key_lengths(mask) - 1
    first, last = jnp.zeros((1, 1), jnp.int32), last[:, None]
    if mask.compares_positions:  # counted from 0 then, by all
        rows = jnp.arange(queries, dtype=jnp.int32)[None]
        left, right = mask.reach
        if left is not None:
            first = jnp.maximum(first, rows - min(left, queries))
        if right is not None:
            last = jnp.minimum(last, rows + min(right, keys))
    attended = jnp.broadcast_to(first <= last, (last.shape[0], queries))
    return attended if mask.query_valid is None else attended & mask.query_valid


def key_lengths(mask: Mask) -> jax.Array:
    """int32[B|1]: how many slots are not empty, which are the first ones."""
    return (mask.key_positions >= 0).sum(axis=-1, dtype=jnp.int32)


def without_empty_slots(x: jax.Array, mask: Mask) -> jax.Array:
    """Keys or values [B, S, K, .] with 0 for the empty slots, which can hold anything: 0 * nan is nan."""
    if _is_full(mask):
        return x
    return jnp.where((mask.key_positions >= 0)[..., None, None], x, jnp.zeros((), x.dtype))


def scaled_query(query: jax.Array, scoring: Scoring) -> jax.Array:
    """The query times the scale, in its own dtype, rounded once."""
    return (query.astype(jnp.float32) * scoring.scale).astype(query.dtype)


def _is_full(mask: Mask) -> bool:
    return mask.key_positions is None or (mask.index_order is not None and mask.index_order.full)
