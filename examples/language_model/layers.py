"""The layers of a llama beside attention, their weights sharded over a mesh of one axis.

`FastLayers` is what XLA makes fast: its results depend on the number of devices in the last bits.
`ReproducibleLayers` is bitwise equal on any number of devices, and takes up to twice the time.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from distattn import reproducible_sum
from distattn.algebra import deterministic_math

Tree = dict[str, Any]
BLOCKS = 24  # a multiple of 1, 2, 3, 4, 6 and 8 devices


def constrain(mesh: Mesh | None, x: jax.Array, *spec: str | None) -> jax.Array:
    """Shard x as `spec` says; without a mesh, return x."""
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))


def put(mesh: Mesh | None, weights: Tree, specs: Tree) -> Tree:
    """Put the weights on the devices of the mesh; without a mesh, on the first device."""
    if mesh is None:
        return jax.device_put(weights, jax.devices()[0])
    return jax.device_put(weights, jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs))


@dataclasses.dataclass(frozen=True)
class FastLayers:
    """Layers in the order of operations that XLA chooses."""

    mesh: Mesh | None  # one axis of Auto type; None: one device

    def shard(self, weights: Tree) -> Tree:
        """Put weights [.., O, I] on the devices; raise ValueError if these do not divide them."""
        specs = self._specs()
        if self.mesh is not None:
            sizes = jax.tree.map(
                lambda w, spec: w.shape[len(spec) - 1] if spec else 0, weights, specs
            )
            sharded = {size for size in jax.tree.leaves(sizes) if size}
            if uneven := sorted(size for size in sharded if size % self.mesh.size):
                largest = math.gcd(*sharded)
                divisors = [n for n in range(1, largest + 1) if largest % n == 0]
                raise ValueError(
                    f"the mesh has {self.mesh.size} devices, which do not divide the dimensions {uneven} "
                    f"of the weights; use one of {divisors} devices, or reproducible=True, which allows "
                    "any number"
                )
        return put(self.mesh, weights, specs)

    def embed(self, embedding: jax.Array, tokens: jax.Array) -> jax.Array:
        """Return [B, T, E] of tokens int32[B, T]."""
        return constrain(self.mesh, embedding[tokens])

    def norm(self, x: jax.Array, weight: jax.Array, epsilon: float) -> jax.Array:
        """Divide x [B, T, E] by its root mean square, and multiply by weight [E]."""
        scale = jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon)
        return x * scale * weight[None, None]

    def rotate(
        self, x: jax.Array, positions: jax.Array, base: float, max_context: int
    ) -> jax.Array:
        """Apply a rotary embedding to x [B, T, N, H], in pairs (i, i + H/2), at positions int32[B, T]."""
        del max_context
        half = x.shape[-1] // 2
        frequency = (base ** (-np.arange(half) / half)).astype(np.float32)[None, None, None]
        angle = positions.astype(np.float32)[:, :, None, None] * frequency
        a, b, cos, sin = x[..., :half], x[..., half:], jnp.cos(angle), jnp.sin(angle)
        return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    def linear(self, x: jax.Array, weight: jax.Array, outputs: int) -> jax.Array:
        """Return [B, T, O], replicated, of x [B, T, I]; `outputs` is O."""
        del outputs
        return constrain(self.mesh, self._matmul(x, weight))

    def logits(self, x: jax.Array, embedding: jax.Array, vocabulary: int) -> jax.Array:
        """Return [B, T, A] of x [B, T, E]; `vocabulary` is A."""
        del vocabulary
        return self._matmul(x, embedding)

    def swiglu(self, x: jax.Array, weights: Tree) -> jax.Array:
        """Apply the feed-forward layer of the weights gate, up and down to x [B, T, E]."""
        y = jax.nn.silu(self._matmul(x, weights["gate"])) * self._matmul(x, weights["up"])
        return constrain(self.mesh, jnp.einsum("bti,oi->bto", y, weights["down"]))

    @property
    def _axis(self) -> str | None:
        return self.mesh.axis_names[0] if self.mesh else None

    def _matmul(self, x: jax.Array, weight: jax.Array) -> jax.Array:
        # Sharded before anything else: if XLA needed the whole output, it would gather the weight.
        return constrain(self.mesh, jnp.einsum("bti,oi->bto", x, weight), None, None, self._axis)

    def _specs(self) -> Tree:
        """Return the sharded dimension of each weight.

        Weights are sharded and not replicated, because fake devices share a machine, and each of them would
        compute with a replicated weight again. By outputs, except `down`, whose inputs come sharded. Never
        by heads: 8 devices do not divide 9 heads.
        """
        by_outputs = PartitionSpec(None, self._axis)
        layers = dict.fromkeys(("qkv", "attention_out", "gate", "up"), by_outputs)
        layers["down"] = PartitionSpec(None, None, self._axis)
        layers["attention_norm"] = layers["mlp_norm"] = PartitionSpec()
        return {"embedding": PartitionSpec(self._axis), "norm": PartitionSpec(), "layers": layers}


@dataclasses.dataclass(frozen=True)
class ReproducibleLayers:
    """Layers that are bitwise equal on any number of devices.

    They differ from `FastLayers` in three points.

    1. Each weight is cut into `BLOCKS` blocks of outputs, `down` of inputs, and each block has a matmul
       of one shape, on any mesh. Weights are [.., n, O/n, I], `down` is [L, n, O, I/n], sharded along
       n. If the devices do not divide the blocks, some devices get blocks of zeros.
    2. Sums over blocks of inputs and over squares are `distattn.reproducible_sum`.
    3. Elementwise functions are those of `distattn.algebra.deterministic_math`, which round identically on
       every compilation.
    """

    mesh: Mesh | None  # one axis of Auto type; None: one device

    def shard(self, weights: Tree) -> Tree:
        """Cut weights [.., O, I] into blocks and put them on the devices, which may be any number."""
        layers = {
            name: w if name.endswith("norm") else self._in_blocks(w, 2 if name == "down" else 1)
            for name, w in weights["layers"].items()
        }
        blocks = {
            "embedding": self._in_blocks(weights["embedding"], 0),
            "norm": weights["norm"],
            "layers": layers,
        }
        spec, layer_spec = PartitionSpec(*self._axes), PartitionSpec(None, *self._axes)
        specs = {
            "embedding": spec,
            "norm": PartitionSpec(),
            "layers": {
                k: layer_spec if w.ndim == 4 else PartitionSpec() for k, w in layers.items()
            },
        }
        return put(self.mesh, blocks, specs)

    def embed(self, embedding: jax.Array, tokens: jax.Array) -> jax.Array:
        """Return [B, T, E] of tokens int32[B, T]."""
        width = embedding.shape[1]
        return constrain(self.mesh, embedding[tokens // width, tokens % width])

    def norm(self, x: jax.Array, weight: jax.Array, epsilon: float) -> jax.Array:
        """Divide x [B, T, E] by its root mean square, and multiply by weight [E]."""
        total = reproducible_sum(x * x, axis=-1, keepdims=True)
        mean = deterministic_math.prevent_fma(total * np.float32(1 / x.shape[-1]))
        # Divided by a rounded root: XLA rewrites a quotient by a root otherwise.
        return x / deterministic_math.prevent_fma(jnp.sqrt(mean + epsilon)) * weight[None, None]

    def rotate(
        self, x: jax.Array, positions: jax.Array, base: float, max_context: int
    ) -> jax.Array:
        """Apply a rotary embedding to x [B, T, N, H], in pairs (i, i + H/2).

        Cosines and sines are a table, computed by numpy, of positions below max_context.
        """
        half = x.shape[-1] // 2
        angle = np.arange(max_context)[:, None] * base ** (-np.arange(half) / half)
        index = jnp.clip(positions, 0, max_context - 1)
        cos, sin = (jnp.asarray(f(angle), jnp.float32)[index][:, :, None] for f in (np.cos, np.sin))
        a, b, rounded = x[..., :half], x[..., half:], deterministic_math.prevent_fma
        halves = rounded(a * cos) - rounded(b * sin), rounded(b * cos) + rounded(a * sin)
        return jnp.concatenate(halves, axis=-1)

    def linear(self, x: jax.Array, weight: jax.Array, outputs: int) -> jax.Array:
        """Return [B, T, O], replicated, of x [B, T, I]; `outputs` is O, without padding."""
        y = jnp.moveaxis(constrain(self.mesh, self._by_blocks(x, weight)), 0, 2)
        return y.reshape(*x.shape[:2], -1)[..., :outputs]

    logits = linear

    def swiglu(self, x: jax.Array, weights: Tree) -> jax.Array:
        """Apply the feed-forward layer of the weights gate, up and down to x [B, T, E]."""
        gate, up = self._by_blocks(x, weights["gate"]), self._by_blocks(x, weights["up"])
        y = gate * deterministic_math.sigmoid(gate) * up
        return constrain(self.mesh, reproducible_sum(self._matmuls(y, weights["down"]), axis=0))

    def _by_blocks(self, x: jax.Array, weight: jax.Array) -> jax.Array:
        """Return [n, B, T, O/n] of x [B, T, I]."""
        return self._matmuls(jnp.broadcast_to(x, (weight.shape[0], *x.shape)), weight)

    def _matmuls(self, x: jax.Array, weight: jax.Array) -> jax.Array:
        """Return [n, B, T, o] of x [n, B, T, i] and weight [n, o, i], one matmul for each block."""
        return constrain(self.mesh, jnp.einsum("nbti,noi->nbto", x, weight), *self._axes)

    @property
    def _axes(self) -> tuple[str, ...]:
        return self.mesh.axis_names if self.mesh else ()

    def _in_blocks(self, w: np.ndarray, axis: int) -> np.ndarray:
        """Cut a dimension of w into blocks and move them before the last two dimensions."""
        devices = self.mesh.size if self.mesh else 1
        width = -(-w.shape[axis] // BLOCKS)
        count = -(-BLOCKS // devices) * devices
        missing = count * width - w.shape[axis]
        w = np.pad(w, [(0, missing if a == axis else 0) for a in range(w.ndim)])
        w = w.reshape(*w.shape[:axis], count, width, *w.shape[axis + 1 :])
        return np.ascontiguousarray(np.moveaxis(w, axis, -3))
