"""A small random language model for tests: two layers, one token for each letter."""

import string
import types

import numpy as np

from language_model.llama import Config

ALPHABET = string.printable[:96]


def tiny_model():
    """Return config, weights and tokenizer, as `smollm2.load` does.

    8 devices do not divide its three heads, but its other dimensions.
    """
    config = Config(
        layers=2,
        heads=3,
        kv_heads=1,
        head_dim=8,
        rope_base=1e4,
        norm_epsilon=1e-5,
        max_context=512,
        vocabulary=len(ALPHABET),
        end_token=0,
    )
    random = np.random.default_rng(0)

    def normal(*shape):
        return random.normal(size=shape, scale=shape[-1] ** -0.5).astype(np.float32)

    layers = {
        "attention_norm": 1 + normal(2, 24),
        "qkv": 3 * normal(2, 40, 24),  # large, so that the softmax is sharp
        "attention_out": normal(2, 24, 24),
        "mlp_norm": 1 + normal(2, 24),
        "gate": normal(2, 32, 24),
        "up": normal(2, 32, 24),
        "down": normal(2, 24, 32),
    }
    weights = {"embedding": normal(len(ALPHABET), 24), "norm": 1 + normal(24), "layers": layers}
    tokenizer = types.SimpleNamespace(
        encode=lambda text, **_: types.SimpleNamespace(
            ids=[ALPHABET.index(letter) for letter in text if letter in ALPHABET]
        ),
        decode=lambda ids, **_: "".join(ALPHABET[i] for i in ids),
    )
    return config, weights, tokenizer
