"""A cache on one device, in order, read by `jax.nn.dot_product_attention`, for comparison with distattn.

It has the methods of `distattn.KVCache` that the language model calls, and none of its code.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class PlainCache:
    """Slot s holds the key and value of position s."""

    key: jax.Array  # f32[L, B, S, K, H]
    value: jax.Array  # f32[L, B, S, K, H]
    next_position: jax.Array  # int32[B]

    @staticmethod
    def create(
        batch: int, capacity: int, num_kv_heads: int, head_dim: int, *, layers: int
    ) -> "PlainCache":
        """Create an empty cache on the first device."""
        shape = (layers, batch, capacity, num_kv_heads, head_dim)
        empty = (
            np.zeros(shape, np.float32),
            np.zeros(shape, np.float32),
            np.zeros(batch, np.int32),
        )
        return PlainCache(*jax.device_put(empty, jax.devices()[0]))

    def reserve(
        self, tokens: int, *, lengths: jax.Array | None = None, owner: None = None
    ) -> tuple["PlainCache", jax.Array]:
        """Return slots int32[B, T] for the next tokens; tokens past `lengths` get a slot past the end."""
        index = np.arange(tokens, dtype=np.int32)[None]
        if lengths is None:
            lengths = jnp.full(self.next_position.shape, tokens, np.int32)
        slots = self.next_position[:, None] + index
        slots = jnp.where(index < lengths[:, None], slots, self.key.shape[2])
        return dataclasses.replace(self, next_position=self.next_position + lengths), slots

    def write(
        self, key: jax.Array, value: jax.Array, slots: jax.Array, *, layer: jax.Array
    ) -> "PlainCache":
        """Write keys and values [B, T, K, H] of a layer to their slots."""
        rows = np.arange(slots.shape[0], dtype=np.int32)[:, None]
        place = (layer, rows, slots)
        return dataclasses.replace(
            self,
            key=self.key.at[place].set(key, mode="drop"),
            value=self.value.at[place].set(value, mode="drop"),
        )

    def attend(
        self, query: jax.Array, *, layer: jax.Array, query_positions: jax.Array, strategy: str
    ) -> jax.Array:
        """Compute causal attention with a mask, because `jax.nn` has no positions; ignore `strategy`."""
        ages = np.arange(self.key.shape[2], dtype=np.int32)[None, None]
        mask = (ages <= query_positions[:, :, None])[:, None]
        key, value = self.key[layer], self.value[layer]
        return jax.nn.dot_product_attention(query, key, value, mask=mask)
