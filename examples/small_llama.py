"""A llama of random weights that a process makes in an instant, for examples that are about processes."""

import functools

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from distattn import KVCache
from distattn.integrations import smollm2

LETTERS = " abcdefghijklmnopqrstuvwxyz.,?!0123456789"
CONFIG = smollm2.Config(
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


def make_weights() -> smollm2.Tree:
    """The weights, the same in every process, as numpy arrays."""
    random = np.random.default_rng(0)
    width, inner, layers = CONFIG.heads * CONFIG.head_dim, 128, CONFIG.layers

    def normal(*shape: int) -> np.ndarray:
        return random.normal(size=shape, scale=shape[-1] ** -0.5).astype(np.float32)

    return {
        "embedding": 4 * normal(len(LETTERS), width),
        "norm": 1 + normal(width),
        "layers": {
            "attention_norm": 1 + normal(layers, width),
            # Large: a sharp softmax, which is sensitive to what it sees.
            "qkv": 3
            * normal(layers, (CONFIG.heads + 2 * CONFIG.kv_heads) * CONFIG.head_dim, width),
            "attention_out": 2 * normal(layers, width, width),
            "mlp_norm": 1 + normal(layers, width),
            "gate": normal(layers, inner, width),
            "up": normal(layers, inner, width),
            "down": normal(layers, width, inner),
        },
    }


def place(weights: smollm2.Tree, mesh: Mesh) -> smollm2.Tree:
    """All weights on every device: with a host goes nothing that the others do not have."""
    return jax.device_put(weights, NamedSharding(mesh, PartitionSpec()))


@functools.partial(jax.jit, static_argnames="strategy")
def step(
    weights: smollm2.Tree,
    cache: KVCache,
    tokens: jax.Array,
    positions: jax.Array | None = None,
    *,
    strategy: str = "auto",
) -> tuple[jax.Array, KVCache]:
    """The likeliest next token int32[B] after tokens int32[B, T], and the cache; nothing is donated."""
    logits, cache = smollm2.forward(
        weights, cache, tokens, config=CONFIG, positions=positions, strategy=strategy
    )
    return logits[:, -1].argmax(axis=-1).astype(np.int32), cache


def encode(text: str) -> list[int]:
    """A letter a token."""
    return [LETTERS.index(letter) for letter in text]


def decode(tokens: list[int]) -> str:
    """And back."""
    return "".join(LETTERS[token] for token in tokens)
