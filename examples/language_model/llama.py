"""A llama in JAX: RMSNorm, rotary positions, grouped-query attention, SwiGLU, tied embeddings.

The attention of a layer is one call to a cache of all layers: a `distattn.KVCache`, or any object with its
methods `reserve`, `write` and `attend`. `layers` computes everything else.

Letters beside those of `distattn`: L layers, E embedding, A vocabulary.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from distattn import KVCache
from language_model.layers import FastLayers, ReproducibleLayers, Tree


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes and constants of a model."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_base: float
    norm_epsilon: float
    max_context: int
    vocabulary: int
    end_token: int


def shard_weights(weights: Tree, mesh: Mesh | None, *, reproducible: bool = False) -> Tree:
    """Put the weights on the devices of a mesh of one axis; without a mesh, on the first device.

    Args:
      weights: numpy arrays [.., outputs, inputs], as `smollm2.load` returns them.
      mesh: of Auto type, or None.
      reproducible: as in `forward`, which needs the weights in fixed blocks.

    Returns:
      The tree of JAX arrays for `forward`.

    Raises:
      ValueError: the devices do not divide a dimension of the weights. Any number of devices is possible
        with reproducible=True.
    """
    return _layers(mesh, reproducible).shard(weights)


def _layers(mesh: Mesh | None, reproducible: bool) -> FastLayers | ReproducibleLayers:
    return ReproducibleLayers(mesh) if reproducible else FastLayers(mesh)


def new_cache(
    config: Config, batch: int, capacity: int, *, dtype: Any = jnp.float32, mesh: Mesh | None = None
) -> KVCache:
    """Return an empty cache of at least `capacity` slots a sequence, sharded over the mesh."""
    return KVCache.create(
        batch,
        capacity,
        config.kv_heads,
        config.head_dim,
        layers=config.layers,
        dtype=dtype,
        sharding=None if mesh is None else jax.NamedSharding(mesh, jax.P(None, mesh.axis_names)),
    )


def forward(
    weights: Tree,
    cache: KVCache,
    tokens: jax.Array,
    *,
    config: Config,
    mesh: Mesh | None = None,
    lengths: jax.Array | None = None,
    read: jax.Array | None = None,
    owner: jax.Array | None = None,
    positions: jax.Array | None = None,
    strategy: str = "auto",
    reproducible: bool = False,
) -> tuple[jax.Array, KVCache]:
    """Run the next tokens of each sequence through the model; write their keys and values to the cache.

    Args:
      weights: as `shard_weights` returns them.
      cache: of all layers. If you donate it, it is written in place.
      tokens: int32[B, T]. Their positions follow those in the cache.
      config: the sizes of the model.
      mesh: mesh of one Auto axis over which the weights are sharded; None: one device.
      lengths: int32[B], number of valid tokens of each sequence; default T.
      read: int32[B, W], the tokens whose logits are returned; default the last one, W = 1.
      owner: int32[B, T], the device that stores each token; default: the cache's placement.
      positions: int32[B, T]. Pass them to compute what a cache has lost again (`KVCache.recover`). A
        negative position marks no token. Default: the positions that follow those in the cache.
      strategy: as in `KVCache.attend`.
      reproducible: bitwise equal on any number of devices and for any placement, if the prompt is read in
        equal chunks. The weights must be sharded with reproducible=True.

    Returns:
      Logits f32[B, W, A] of the tokens that come next, and the new cache.
    """
    batch, count = tokens.shape
    heads, kv_heads = config.heads, config.kv_heads
    columns, width = (heads + 2 * kv_heads) * config.head_dim, weights["norm"].shape[0]
    layers = _layers(mesh, reproducible)
    norm = functools.partial(layers.norm, epsilon=config.norm_epsilon)
    rotate = functools.partial(layers.rotate, base=config.rope_base, max_context=config.max_context)
    options = {"strategy": strategy} | ({"reproducible": True} if reproducible else {})

    if positions is None:
        positions = cache.next_position[:, None] + np.arange(count, dtype=np.int32)[None]
        cache, slots = cache.reserve(count, lengths=lengths, owner=owner)
    else:
        cache, slots = cache.reserve(count, positions=positions, owner=owner)

    def layer(carry: tuple[Any, ...], scanned: tuple[Any, ...]) -> tuple[tuple[Any, ...], None]:
        # The cache of all layers is carried and written at T slots: each device writes its own slots, and
        # nothing moves. As a scanned input and output the whole cache would be copied for every token.
        x, cache = carry
        w, i = scanned
        y = norm(x, w["attention_norm"])
        qkv = layers.linear(y, w["qkv"], columns)
        qkv = qkv.reshape(batch, count, heads + 2 * kv_heads, config.head_dim)
        q, k, v = jnp.split(qkv, [heads, heads + kv_heads], axis=2)
        q, k = rotate(q, positions), rotate(k, positions)
        cache = cache.write(k, v, slots, layer=i)
        y = cache.attend(q, layer=i, query_positions=positions, **options)
        x = x + layers.linear(y.reshape(batch, count, -1), w["attention_out"], width)
        return (x + layers.swiglu(norm(x, w["mlp_norm"]), w), cache), None

    x = layers.embed(weights["embedding"], tokens)
    scanned = (weights["layers"], jnp.arange(config.layers, dtype=np.int32))
    (x, cache), _ = jax.lax.scan(layer, (x, cache), scanned)
    if read is None:
        last = jnp.full(batch, count, np.int32) if lengths is None else lengths
        read = last[:, None] - 1
    x = jnp.take_along_axis(x, read[:, :, None], axis=1, mode="clip")
    logits = layers.logits(norm(x, weights["norm"]), weights["embedding"], config.vocabulary)
    return logits, cache
