"""Forms of a block for XLA:CPU, which make decoding on a CPU five times as fast.

XLA:CPU does three things that other backends do not:

* It copies keys and values, transposed, for a matmul with batch dimensions. For few queries that copy costs
  more than attention. So each KV head has a matmul of its own or, for few heads, one matmul contracts over
  all heads, with a block-diagonal query.
* It vectorises no reduction over the minor dimension. So keys come first in these logits: [b, s, K, G, q].
* It moves the conversion of an 8- or 16-bit array out of a loop, and so makes a float32 copy of all keys.
  So a block is cut from an integer array that the compiler cannot see through.
"""

import jax
import jax.numpy as jnp
from jax import lax

from distattn.local.mask import Span, take

DIAGONAL_HEADS = (
    4  # KV heads up to which one matmul contracts over all heads, at that many times the flops
)
# Query heads times queries up to which these forms cost less than a transposed copy of keys and values:
# with a matmul per head, and with a block-diagonal query.
FLAT_COLUMNS = 1024
FLAT_COLUMNS_DIAGONAL = 48


def is_flat(heads: int, kv_heads: int, queries: int) -> bool:
    """Return whether a call has few enough queries for these forms to cost less."""
    diagonal = kv_heads <= DIAGONAL_HEADS
    columns = FLAT_COLUMNS_DIAGONAL if diagonal else FLAT_COLUMNS
    return heads * queries <= columns


def scores_by_head(query: jax.Array, key: jax.Array, precision: jax.lax.PrecisionLike) -> jax.Array:
    """Return query . key as [1, s, K, G, q] from query [1, K, G, q, H] and key [1, s, K, H]."""
    _, heads, groups, rows, width = query.shape
    columns = groups * rows
    flat_key = key.reshape(-1, heads * width)
    if heads > DIAGONAL_HEADS:
        keys, queries = jnp.split(flat_key, heads, axis=1), query.reshape(heads, columns, width)
        over_width = ((1,), (1,)), ((), ())
        scores = [
            lax.dot_general(*pair, over_width, precision=precision)
            for pair in zip(keys, queries, strict=True)
        ]
        return jnp.concatenate(scores, axis=1).reshape(1, -1, heads, groups, rows)
    diagonal = (
        jnp.eye(heads, dtype=query.dtype)[:, None, :, None]
        * query.reshape(heads, columns, width).transpose(0, 2, 1)[:, :, None, :]
    ).reshape(heads * width, heads * columns)
    scores = lax.dot(flat_key, diagonal, precision=precision)
    return scores.reshape(1, -1, heads, groups, rows)


def weigh_by_head(
    weights: jax.Array, value: jax.Array, precision: jax.lax.PrecisionLike
) -> jax.Array:
    """Return weights . value as [1, K, G, q, V] from weights [1, s, K, G, q] and value [1, s, K, V]."""
    _, keys, heads, groups, rows = weights.shape
    weights, value = weights.reshape(keys, -1), value.reshape(keys, -1)

    def over_keys(w: jax.Array, x: jax.Array) -> jax.Array:
        return lax.dot_general(w, x, (((0,), (0,)), ((), ())), precision=precision)

    if heads > DIAGONAL_HEADS:
        pairs = zip(*(jnp.split(x, heads, axis=1) for x in (weights, value)), strict=True)
        result = jnp.stack([over_keys(*pair) for pair in pairs])
    else:
        full = over_keys(weights, value).reshape(heads, groups * rows, heads, -1)
        result = jnp.stack([full[k, :, k] for k in range(heads)])
    return result.reshape(1, heads, groups, rows, -1)


def take_bits(x: jax.Array, *spans: Span) -> jax.Array:
    """Return `take` of an 8- or 16-bit array, cut from integers that seem to change in each loop step."""
    bits, _ = lax.optimization_barrier((x, [span.start for span in spans]))
    bits = lax.bitcast_convert_type(bits, jnp.uint16 if x.dtype.itemsize == 2 else jnp.uint8)
    return lax.bitcast_convert_type(take(bits, *spans), x.dtype)
