"""`distattn generate`: a language model answers prompts, on a sharded key/value cache."""

import argparse
import functools
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

from distattn.cli.arguments import CommandError, Subparsers, at_least
from distattn.integrations import smollm2
from distattn.integrations.generation import Completion, Request, TextStream, generate
from distattn.testing.programs import fake_devices

DTYPES = ("float32", "bfloat16", "float16", "int8", "float8_e4m3fn", "float8_e5m2")
LINE = 72  # columns of text, where several answers come at once


def add(subparsers: Subparsers) -> None:
    """The command and its arguments."""
    parser = subparsers.add_parser(
        "generate",
        help="answers prompts with a language model on a sharded key/value cache",
        description="SmolLM2-135M-Instruct answers prompts, several at a time, its keys and values "
        "spread over the devices in a KVCache. Text goes to stdout as it comes; where there are several "
        "prompts each line says to which it belongs, as [2].",
    )
    whole, number = at_least(1), at_least(0)
    argument = parser.add_argument
    argument("--prompt", action="append", default=[], metavar="TEXT", help="a question; repeatable")
    argument(
        "--file",
        action="append",
        default=[],
        metavar="PATH",
        help="a file with a question, - for stdin; repeatable, these come after the prompts",
    )
    argument(
        "--devices", type=whole, metavar="N", help="fake CPU devices (default: the real devices)"
    )
    argument(
        "--rows",
        type=whole,
        default=4,
        metavar="N",
        help="how many are answered at a time (default %(default)s)",
    )
    argument(
        "--capacity",
        type=whole,
        metavar="N",
        help="slots of a row (default: as many as are needed)",
    )
    argument(
        "--tokens",
        type=whole,
        default=128,
        metavar="N",
        help="of an answer, at most (default %(default)s)",
    )
    argument("--temperature", type=float, default=0.0, help="default 0: always the likeliest token")
    argument(
        "--top-p",
        type=float,
        default=1.0,
        help="draw from the likeliest tokens that have this probability",
    )
    argument(
        "--seed",
        type=number,
        default=0,
        metavar="N",
        help="of prompt 1, prompt 2 has the next one (default 0)",
    )
    argument(
        "--speculate",
        type=number,
        default=0,
        metavar="N",
        help="guess N tokens from the text so far and verify them in a step (default 0)",
    )
    argument(
        "--cache-dtype",
        choices=DTYPES,
        default="float32",
        help="of keys and values at rest (default %(default)s)",
    )
    argument(
        "--reproducible",
        action="store_true",
        help="the same bits on any number of devices, which may be any then, in up to twice the time",
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    texts = [*options.prompt, *map(_read, options.file)]
    if not texts:
        raise CommandError("nothing to answer; pass --prompt TEXT or --file PATH")
    try:
        path = smollm2.find_weights()
    except ModuleNotFoundError as missing:
        raise CommandError(str(missing)) from None
    if options.devices is not None:
        fake_devices(options.devices)
    config, weights, tokenizer = smollm2.load(path)
    requests = _requests(options, texts, tokenizer)
    needed = _needed(requests, config.max_context)
    devices = jax.devices()
    mesh = None
    if len(devices) > 1:
        mesh = jax.make_mesh((len(devices),), ("kv",), axis_types=(AxisType.Auto,))
    try:
        weights = smollm2.place(weights, mesh, reproducible=options.reproducible)
    except ValueError as error:
        raise CommandError(f"--devices: {error}") from None
    rows = min(options.rows, len(requests))
    dtype = jnp.dtype(options.cache_dtype)
    cache = smollm2.new_cache(config, rows, options.capacity or needed, dtype=dtype, mesh=mesh)
    if cache.capacity < needed:
        raise CommandError(
            f"--capacity {options.capacity} is too small: the longest prompt and its answer need "
            f"{needed} slots"
        )
    forward = functools.partial(
        smollm2.forward, config=config, mesh=mesh, reproducible=options.reproducible
    )
    began = time.perf_counter()
    completions = generate(
        weights,
        cache,
        requests,
        forward=forward,
        chunk=max(64, 1 + options.speculate),
        drafts=options.speculate,
        end_tokens=(config.end_token,),
        on_token=TextStream(tokenizer.decode, _writer(len(requests))),
    )
    print(_summary(completions, len(devices), time.perf_counter() - began), file=sys.stderr)


def _read(path: str) -> str:
    try:
        text = sys.stdin.read() if path == "-" else pathlib.Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CommandError(f"--file {path}: {error}") from None
    return text


def _requests(options: argparse.Namespace, texts: list[str], tokenizer: Any) -> list[Request]:
    requests = []
    for i, text in enumerate(texts):
        prompt = tokenizer.encode("".join(smollm2.chat(text)), add_special_tokens=False).ids
        try:
            requests.append(
                Request(
                    prompt,
                    options.tokens,
                    temperature=options.temperature,
                    top_p=options.top_p,
                    seed=options.seed + i,
                )
            )
        except ValueError as error:
            raise CommandError(str(error)) from None
    return requests


def _needed(requests: list[Request], max_context: int) -> int:
    """Slots of a row for the longest request, which the model must be able to read."""
    sizes = [len(request.prompt) + request.max_tokens for request in requests]
    longest = int(np.argmax(sizes))
    if sizes[longest] > max_context:
        raise CommandError(
            f"prompt {longest + 1} has {len(requests[longest].prompt)} tokens, and with --tokens "
            f"{requests[longest].max_tokens} that is more than the {max_context} of the model's context; "
            "shorten it, or ask for fewer"
        )
    return sizes[longest]


def _writer(count: int) -> Callable[[int, str | None], None]:
    """Where text goes: at once for a single answer, by lines with their number for several."""
    if count == 1:

        def write(index: int, text: str | None) -> None:
            print("\n" if text is None else text, end="", flush=True)

        return write
    rests = [""] * count

    def write_lines(index: int, text: str | None) -> None:
        *lines, rest = (rests[index] + (text or "")).split("\n")
        while len(rest) > LINE and " " in rest[:LINE].strip():
            cut = rest.rindex(" ", 0, LINE)
            lines, rest = [*lines, rest[:cut]], rest[cut + 1 :]
        if text is None:
            lines, rest = [*lines, rest] if rest else lines, ""
        rests[index] = rest
        for line in lines:
            print(f"[{index + 1}] {line}", flush=True)

    return write_lines


def _summary(completions: list[Completion], devices: int, seconds: float) -> str:
    tokens = sum(len(completion.tokens) for completion in completions)
    lines = [
        f"{len(completions)} answered, {tokens} tokens in {seconds:.1f} s with compiling "
        f"({tokens / seconds:.1f} a second), on {devices} device{'s' * (devices > 1)}"
    ]
    if drafted := sum(completion.drafted for completion in completions):
        accepted = sum(completion.accepted for completion in completions)
        lines.append(
            f"{accepted} of {drafted} guessed tokens were right ({accepted / drafted:.0%})"
        )
    return "\n".join(lines)
