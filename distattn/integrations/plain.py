"""What a llama computes beside attention, its weights split over a mesh, as fast as XLA makes it.

Where a sum is split over devices its bits depend on their number, and so do those of a product whose shape
does; `exact` is the other way.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from distattn.planning.plan import AxisNames

Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Plain:
    """The operations of a layer, over a mesh of one axis of Auto type, or on one device."""

    mesh: Mesh | None

    def place(self, weights: Tree) -> Tree:
        """The weights as `smollm2.load` returns them, [.., O, I], on the devices."""
        if self.mesh is None:
            return jax.device_put(weights, jax.devices()[0])
        specs = weight_specs(self._axis)
        sizes = jax.tree.map(lambda w, spec: w.shape[len(spec) - 1] if spec else 0, weights, specs)
        split = {size for size in jax.tree.leaves(sizes) if size}
        if rest := sorted(size for size in split if size % self.mesh.size):
            most = math.gcd(*split)
            fitting = [n for n in range(1, most + 1) if most % n == 0]
            raise ValueError(
                f"the mesh has {self.mesh.size} devices, which do not divide the dimensions {rest} of the "
                f"weights; use a number of them among {fitting}, or reproducible=True, which takes any"
            )
        return jax.tree.map(
            lambda x, spec: jax.device_put(x, NamedSharding(self.mesh, spec)), weights, specs
        )

    def embed(self, embedding: jax.Array, tokens: jax.Array) -> jax.Array:
        """[B, T, E] of tokens int32[B, T]."""
        return self._pin(embedding[tokens])

    def norm(self, x: jax.Array, weight: jax.Array, epsilon: float) -> jax.Array:
        """x [B, T, E] over its root mean square, times weight [E]."""
        scale = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon)
        return x * scale * weight[None, None]

    def turn(self, x: jax.Array, positions: jax.Array, base: float, most: int) -> jax.Array:
        """x [B, T, N, H] with the pairs (i, i + H/2) turned by an angle proportional to positions [B, T].

        base is that of rotary embeddings; positions are below `most`, which only `Exact` needs to know.
        """
        half = x.shape[-1] // 2
        frequency = (base ** (-np.arange(half) / half)).astype(np.float32)[None, None, None]
        angle = positions.astype(np.float32)[:, :, None, None] * frequency
        a, b, cos, sin = x[..., :half], x[..., half:], jnp.cos(angle), jnp.sin(angle)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    def linear(self, x: jax.Array, weight: jax.Array, outputs: int) -> jax.Array:
        """[B, T, O], replicated, from x [B, T, I] and a weight of so many outputs."""
        return self._pin(self._split(x, weight))

    def logits(self, x: jax.Array, embedding: jax.Array, size: int) -> jax.Array:
        """[B, T, A], from x [B, T, E] and the embedding of a vocabulary of that size."""
        return self._split(x, embedding)

    def swiglu(self, x: jax.Array, w: Tree) -> jax.Array:
        """[B, T, E] of x [B, T, E]: the layer of the weights gate, up and down."""
        y = jax.nn.silu(self._split(x, w["gate"])) * self._split(x, w["up"])
        return self._pin(jnp.einsum("bti,oi->bto", y, w["down"]))

    @property
    def _axis(self) -> AxisNames:
        return self.mesh.axis_names[0] if self.mesh else None

    def _pin(self, x: jax.Array, *spec: AxisNames) -> jax.Array:
        if self.mesh is None:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(*spec)))

    def _split(self, x: jax.Array, weight: jax.Array) -> jax.Array:
        # Pinned before anything else: asked for the whole output, XLA would gather the weight.
        return self._pin(jnp.einsum("bti,oi->bto", x, weight), None, None, self._axis)


def weight_specs(axis: AxisNames) -> Tree:
    """Which dimension of each weight is split over the mesh.

    Split, not replicated: fake devices share a machine, and what is replicated is computed by each of them
    again. By outputs, and by inputs where the inputs come split (`down`). Never by heads: 9 heads do not
    divide by 8.
    """
    split = PartitionSpec(None, axis)
    layers = dict.fromkeys(("qkv", "attention_out", "gate", "up"), split)
    layers["down"] = PartitionSpec(None, None, axis)
    layers["attention_norm"] = layers["mlp_norm"] = PartitionSpec()
    return {"embedding": PartitionSpec(axis), "norm": PartitionSpec(), "layers": layers}
