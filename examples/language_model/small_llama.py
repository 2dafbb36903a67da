"""A small llama with random weights, for the examples about processes."""

import functools

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from distattn import KVCache
from language_model import llama
from language_model.layers import Tree

LETTERS = " abcdefghijklmnopqrstuvwxyz.,?!0123456789"
CONFIG = llama.Config(
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=16,
    rope_base=1e4,
    norm_epsilon=1e-5,
    max_context=512,
    vocabulary=len(LETTERS),
    end_token=-1,
)


def make_weights() -> Tree:
    """Return the weights as numpy arrays, which are equal in every process."""
    random = np.random.default_rng(0)
    width, inner, layers = CONFIG.heads * CONFIG.head_dim, 128, CONFIG.layers

    def normal(*shape: int) -> np.ndarray:
        return random.normal(size=shape, scale=shape[-1] ** -0.5).astype(np.float32)

    return {
        "embedding": 4 * normal(len(LETTERS), width),
        "norm": 1 + normal(width),
        "layers": {
            "attention_norm": 1 + normal(layers, width),
            # Large, so that the softmax is sharp and depends on which keys it sees.
            "qkv": 3
            * normal(layers, (CONFIG.heads + 2 * CONFIG.kv_heads) * CONFIG.head_dim, width),
            "attention_out": 2 * normal(layers, width, width),
            "mlp_norm": 1 + normal(layers, width),
            "gate": normal(layers, inner, width),
            "up": normal(layers, inner, width),
            "down": normal(layers, width, inner),
        },
    }


def replicate(weights: Tree, mesh: Mesh) -> Tree:
    """Put all weights on every device, so that a lost host takes none away."""
    return jax.device_put(weights, NamedSharding(mesh, PartitionSpec()))


@functools.partial(jax.jit, static_argnames="strategy")
def step(
    weights: Tree,
    cache: KVCache,
    tokens: jax.Array,
    positions: jax.Array | None = None,
    *,
    strategy: str = "auto",
) -> tuple[jax.Array, KVCache]:
    """Return the most likely token int32[B] after tokens int32[B, T], and the cache; donate nothing."""
    logits, cache = llama.forward(
        weights, cache, tokens, config=CONFIG, positions=positions, strategy=strategy
    )
    return logits[:, -1].argmax(axis=-1).astype(np.int32), cache


def encode(text: str) -> list[int]:
    """Return one token for each letter."""
    return [LETTERS.index(letter) for letter in text]


def decode(tokens: list[int]) -> str:
    """Return the text of the tokens."""
    return "".join(LETTERS[token] for token in tokens)
