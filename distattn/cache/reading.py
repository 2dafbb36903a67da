"""Attention to what a cache holds."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from distattn.attention.global_call import attend as attend_across
from distattn.attention.global_call import choose_call
from distattn.attention.sharding import Placement, read_placement
from distattn.attention.strategy import QUERY_SHARDED, StrategyLike, check_strategy
from distattn.cache.arguments import layer_index, on_host
from distattn.cache.layout import Layout
from distattn.local.inputs import Window, check_implementation, make_inputs, make_logit_config
from distattn.local.reproducible import reproducible_blocks_of
from distattn.planning.plan import AxisNames

if TYPE_CHECKING:
    from distattn.cache.kv_cache import KVCache


def attend(
    self: KVCache,
    query: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    layer: ArrayLike | None = None,
    query_positions: ArrayLike | None = None,
    is_causal: bool = True,
    tree_mask: ArrayLike | None = None,
    scale: float | None = None,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: Window = None,
    implementation: str | None = None,
    return_residual: bool = False,
    logits_soft_cap: float | None = None,
    sinks: ArrayLike | None = None,
    precision: jax.lax.PrecisionLike = None,
    query_segment_ids: ArrayLike | None = None,
    key_value_segment_ids: ArrayLike | None = None,
    query_axis_name: AxisNames = "auto",
    strategy: StrategyLike = "auto",
    reproducible: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attention of queries to the keys and values of their rows, as `distattn.dot_product_attention`.

    Append the queries' own keys first. No key and no value moves, nor is any copied.

    Args:
      query: [B, T, N, H]; N must be a multiple of K.
      bias: float, broadcasts to [B, N, T, S]; S are the slots, whose positions are `cache.positions`.
      mask: bool, the same.
      layer: int32[], the layer that is meant, in a cache of several. Python's and numpy's numbers are
        checked; where a tracer, or an array on a device, says one that is not there, the nearest is meant.
      query_positions: int32[T] or int32[B, T]; default those of the last append, or of its last T tokens:
        next_position - min(appended, T) + 0, 1, ... Where tokens were appended at other than the row's
        next positions, pass them.
      is_causal: attend iff key position <= query position. Unlike in `dot_product_attention` this is the
        default: a cache may hold what comes after a query.
      tree_mask: bool[U, U] or bool[B, U, U] with U = T, for queries that are the last append and the nodes
        of a token tree, each after its parent: [t, u] says whether node t attends to node u (its
        ancestors and itself). All nodes attend to all that was there before. Append the nodes at the
        row's next positions, which then number them, and rotate by start + depth; see `accept`.
      scale: of query . key; default 1 / sqrt(H).
      query_seq_lengths: int32[B]; query rows t >= length give 0.
      key_value_seq_lengths: int32[B]; attend iff key position < length.
      local_window_size: int or (left, right), inclusive, on positions.
      implementation: as in `dot_product_attention`.
      return_residual: also return the log-sum-exp.
      logits_soft_cap: c in c * tanh(logit / c).
      sinks: f32[N], one extra logit with value 0.
      precision: of the matrix products.
      query_segment_ids: int32[T] or int32[B, T].
      key_value_segment_ids: int32[S] or int32[B, S], of the slots.
      query_axis_name: axes that shard T, the cache's own or others; None: replicated; 'auto': read from
        the query where that is possible, else replicated.
      strategy: 'auto', 'butterfly', 'psum', 'all_gather', 'fused' or a `Schedule`, for a query sharded
        along T over the cache's axes 'reduce_scatter'. 'gather_kv' would gather the cache, and is refused.
      reproducible: the same bits wherever tokens lie, in whatever order they came, on any number of
        devices; as in `dot_product_attention`, but the block is a single key, since slots fill up one by
        one. So each key is brought into fixed point alone: four times as long for one query, eleven for
        eight. Of the capacity bits depend on which of 486, 7782 and 124518 it is above, and on no more.

    Returns:
      out [B, T, N, V] in query's dtype; with return_residual also lse f32[B, T, N]. A row without keys
      gives 0 and -inf.

    Raises:
      ValueError: a wrong shape, dtype or combination; the message says what to pass.
      NotImplementedError: as `dot_product_attention`.

    Example:
      >>> import jax.numpy as jnp, distattn
      >>> cache = distattn.KVCache.create(1, 8, 1, 4, dtype=jnp.float32)
      >>> new = jnp.ones((1, 3, 1, 4))
      >>> cache = cache.append(new, jnp.arange(3.0).reshape(1, 3, 1, 1) * new)
      >>> cache.attend(new)[0, :, 0, 0].tolist()  # keys of equal weight, values 0, 1, 2: causal
      [0.0, 0.5, 1.0]
    """
    self.layout.check_outside()
    implementation = check_implementation(implementation)
    check_strategy(strategy)
    if strategy in QUERY_SHARDED and strategy != "reduce_scatter":
        raise ValueError(
            f"strategy={strategy!r} moves keys and values, and a cache stays where it is; use 'auto', "
            "'butterfly', 'psum', 'all_gather', 'fused', or 'reduce_scatter' for a query sharded along T"
        )
    query = jnp.asarray(query)
    if query.ndim != 4:
        raise ValueError(f"query has shape {query.shape}; a cache needs [B, T, N, H]")
    if (layer is None) != (self.layers is None):
        raise ValueError(
            f"layer is {layer}, and the cache has "
            f"{'no layers: pass None' if self.layers is None else f'{self.layers} layers: say which'}"
        )
    number = layer_index(layer, self.layers)
    if number is not None and on_host(layer) is None:
        number = jnp.clip(number, 0, self.key.shape[0] - 1)
    tokens = query.shape[1]
    start = self.next_position - jnp.minimum(self.appended, tokens)
    if query_positions is None and (is_causal or local_window_size is not None):
        query_positions = start[:, None] + jnp.arange(tokens, dtype=jnp.int32)[None]
    if tree_mask is not None:
        mask = _with_tree(self, start, tree_mask, mask, tokens)
    inputs = make_inputs(
        query,
        self.key,
        self.value,
        bias,
        mask,
        is_causal=is_causal,
        query_seq_lengths=query_seq_lengths,
        key_value_seq_lengths=key_value_seq_lengths,
        local_window_size=local_window_size,
        sinks=sinks,
        query_positions=query_positions,
        key_positions=self.positions,
        query_segment_ids=query_segment_ids,
        key_value_segment_ids=key_value_segment_ids,
        key_scale=self.key_scale,
        value_scale=self.value_scale,
        layer=number,
    )
    placement = _placement(self, query, query_axis_name)
    along = bool(set(placement.query) & set(placement.key))
    if strategy == "auto" and along and placement.size(placement.key) > 1:
        strategy = "reduce_scatter"
    units = reproducible_blocks_of(inputs, implementation, keys=1) if reproducible else None
    logit_config = make_logit_config(query, scale, logits_soft_cap, precision)
    call = choose_call(inputs, placement, logit_config, implementation, strategy, units)
    out, lse = attend_across(call, inputs)
    return (out, lse) if return_residual else out


def _placement(cache: KVCache, query: jax.Array, query_axis_name: AxisNames) -> Placement:
    layout = cache.layout
    if layout.mesh is None:
        return Placement()
    keys, values = (jax.ShapeDtypeStruct(x.shape[-4:], x.dtype) for x in (cache.key, cache.value))
    found = read_placement(
        query,
        keys,
        values,
        None
        if query_axis_name == "auto"
        else P(None, None if query_axis_name is None else query_axis_name),
        NamedSharding(layout.mesh, P(layout.batch, layout.slots, layout.heads)),
    )
    return dataclasses.replace(
        found,
        mesh=layout.mesh,
        batch=layout.batch,
        # One head serves the queries of all, wherever they lie.
        heads=layout.heads or (found.heads if keys.shape[2] == 1 else ()),
        key=layout.slots,
        query_known=True,  # what cannot be read counts as replicated
        manual=layout.free_axes(),
        compiler_sharded=False,  # the cache knows what it is sharded over
    )


def _with_tree(
    cache: KVCache, start: jax.Array, tree: ArrayLike, mask: Any, tokens: int
) -> jax.Array:
    """The mask bool[B, N|1, T, S] in which the last append is a token tree."""
    batch = cache.positions.shape[0]
    tree = jnp.asarray(tree)
    if tree.dtype != jnp.bool_ or tree.shape not in ((tokens, tokens), (batch, tokens, tokens)):
        raise ValueError(
            f"tree_mask is {tree.dtype}{list(tree.shape)}; it must be bool[T, T] or bool[B, T, T] with "
            f"T={tokens}, B={batch}: which query attends to which of the last {tokens} tokens"
        )
    tree = jnp.broadcast_to(tree if tree.ndim == 3 else tree[None], (batch, tokens, tokens))

    allowed = cache.layout.run(
        _tree_mask, ("BS", "B", "B.."), ("B..S",), cache.positions, start, tree
    )[0]
    return allowed if mask is None else allowed & jnp.asarray(mask)


def _tree_mask(
    layout: Layout, tags: jax.Array, start: jax.Array, tree: jax.Array
) -> tuple[Any, ...]:
    """bool[B, 1, T, S] from tree bool[B, T, T]: what one device does, in `Layout.run`."""
    tokens = tree.shape[1]
    node = (tags - start[:, None])[:, None]  # [B, 1, S]
    index = jnp.broadcast_to(jnp.clip(node, 0, tokens - 1), (*tree.shape[:2], tags.shape[1]))
    inside = (node >= 0) & (node < tokens)
    allowed = jnp.where(inside, jnp.take_along_axis(tree, index, axis=2), node < 0)
    return (allowed[:, None],)
