"""What a llama computes beside attention, with the same bits on any number of devices.

As `plain`, but: 1. Each weight lies in `BLOCKS` blocks of outputs, `down` of inputs, and products are
made block by block, each of one shape wherever it is made. Devices that do not divide the blocks get empty
ones too. 2. Sums over the blocks of inputs, and of squares, are `distattn.reproducible_sum`. 3. Between the
products stands what rounds in one way only (`distattn.algebra.deterministic_math`).
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from distattn.algebra import deterministic_math
from distattn.collectives.reproducible_sum import reproducible_sum

BLOCKS = 24  # which 1, 2, 3, 4, 6 and 8 devices divide
Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Exact:
    """The operations of a layer. Weights are [.., n, O/n, I], `down` is [L, n, O, I/n], split along n."""

    mesh: Mesh | None

    def place(self, weights: Tree) -> Tree:
        """The weights as `smollm2.load` returns them, on the devices, which may be any number."""
        layers = {
            name: w if name.endswith("norm") else self._in_blocks(w, 2 if name == "down" else 1)
            for name, w in weights["layers"].items()
        }
        placed = {"embedding": self._in_blocks(weights["embedding"], 0), "norm": weights["norm"]}
        return jax.tree.map(self._put, placed | {"layers": layers}, self._specs(layers))

    def embed(self, embedding: jax.Array, tokens: jax.Array) -> jax.Array:
        """[B, T, E] of tokens int32[B, T]."""
        width = embedding.shape[1]
        return self._pin(embedding[tokens // width, tokens % width])

    def norm(self, x: jax.Array, weight: jax.Array, epsilon: float) -> jax.Array:
        """x [B, T, E] over its root mean square, times weight [E]."""
        total = reproducible_sum(x * x, axis=-1, keepdims=True)
        mean = deterministic_math.prevent_fma(total * np.float32(1 / x.shape[-1]))
        # Divided by a root that is rounded before: not what XLA makes of a quotient by a root.
        return x / deterministic_math.prevent_fma(jnp.sqrt(mean + epsilon)) * weight[None, None]

    def turn(self, x: jax.Array, positions: jax.Array, base: float, most: int) -> jax.Array:
        """x [B, T, N, H] with the pairs (i, i + H/2) turned by angles proportional to positions [B, T].

        base is that of rotary embeddings, and positions are below `most`: angles are a table.
        """
        half = x.shape[-1] // 2
        frequency = base ** (-np.arange(half) / half)
        angle = np.arange(most)[:, None] * frequency
        index = jnp.clip(positions, 0, most - 1)
        cos, sin = (jnp.asarray(f(angle), jnp.float32)[index][:, :, None] for f in (np.cos, np.sin))
        a, b, rounded = x[..., :half], x[..., half:], deterministic_math.prevent_fma
        parts = rounded(a * cos) - rounded(b * sin), rounded(b * cos) + rounded(a * sin)
        return jnp.concatenate(parts, axis=-1)

    def linear(self, x: jax.Array, weight: jax.Array, outputs: int) -> jax.Array:
        """[B, T, O], replicated, from x [B, T, I] and a weight of so many outputs."""
        y = jnp.moveaxis(self._pin(self._by_blocks(x, weight)), 0, 2)
        return y.reshape(*x.shape[:2], -1)[..., :outputs]

    logits = linear

    def swiglu(self, x: jax.Array, w: Tree) -> jax.Array:
        """[B, T, E] of x [B, T, E]: the layer of weights gate, up and down."""
        gate, up = self._by_blocks(x, w["gate"]), self._by_blocks(x, w["up"])
        y = gate * deterministic_math.sigmoid(gate) * up
        return self._pin(reproducible_sum(self._products(y, w["down"]), axis=0))

    def _by_blocks(self, x: jax.Array, weight: jax.Array) -> jax.Array:
        """[n, B, T, O/n] from x [B, T, I]."""
        return self._products(jnp.broadcast_to(x, (weight.shape[0], *x.shape)), weight)

    def _products(self, x: jax.Array, weight: jax.Array) -> jax.Array:
        """[n, B, T, o] from x [n, B, T, i] and weight [n, o, i], one product for each block."""
        return self._pin(jnp.einsum("nbti,noi->nbto", x, weight), *self._axes)

    @property
    def _axes(self) -> tuple[str, ...]:
        return self.mesh.axis_names if self.mesh else ()

    def _pin(self, x: jax.Array, *spec: str) -> jax.Array:
        if self.mesh is None:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(self.mesh, PartitionSpec(*spec)))

    def _in_blocks(self, w: np.ndarray, axis: int) -> np.ndarray:
        """w with a dimension cut into blocks, which stand before the last two dimensions."""
        devices = self.mesh.size if self.mesh else 1
        width = -(-w.shape[axis] // BLOCKS)
        count = -(-BLOCKS // devices) * devices
        missing = count * width - w.shape[axis]
        w = np.pad(w, [(0, missing if a == axis else 0) for a in range(w.ndim)])
        w = w.reshape(*w.shape[:axis], count, width, *w.shape[axis + 1 :])
        return np.ascontiguousarray(np.moveaxis(w, axis, -3))

    def _specs(self, layers: Tree) -> Tree:
        split = {name: (None, *self._axes) if w.ndim == 4 else () for name, w in layers.items()}
        specs = {"embedding": self._axes, "norm": (), "layers": split}
        return jax.tree.map(
            lambda x: PartitionSpec(*x), specs, is_leaf=lambda x: isinstance(x, tuple)
        )

    def _put(self, w: np.ndarray, spec: PartitionSpec) -> jax.Array:
        where = NamedSharding(self.mesh, spec) if self.mesh else jax.devices()[0]
        return jax.device_put(w, where)
