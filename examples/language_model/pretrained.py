"""The pretrained model for the examples: loading, prompts, and lines of progress."""

import argparse
import pydoc_data.topics
import sys
import time
from typing import Any

from distattn.testing import fake_devices
from language_model import smollm2
from language_model.layers import Tree
from language_model.llama import Config

DEVICES = 8
TOPICS = ("objects", "types", "specialnames", "compound")
Model = tuple[Config, Tree, Any]  # config, weights and tokenizer
STARTED = time.perf_counter()


def say(text: str) -> None:
    """Print a line of progress with the time since the start."""
    print(f"[{time.perf_counter() - STARTED:6.1f} s] {text}", flush=True)


def load(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Model | None:
    """Make eight fake devices and load the model; print what to install and return None if it is missing.

    Exit with a usage error if `options` asks for more tokens than the model reads.
    """
    try:
        path = smollm2.find_weights()
    except ModuleNotFoundError as missing:
        print(missing, file=sys.stderr)
        return None
    fake_devices(DEVICES)
    say(f"loading {path.name}")
    model = smollm2.load(path)
    max_context = model[0].max_context
    if options.context + options.tokens > max_context:
        parser.error(
            f"--context {options.context} and --tokens {options.tokens} are more than the {max_context} "
            "tokens of the model; ask for fewer"
        )
    return model


def encode(tokenizer: Any, text: str) -> list[int]:
    """Return the tokens of a text, without special tokens."""
    return tokenizer.encode(text, add_special_tokens=False).ids


def chat_prompt(tokenizer: Any, question: str) -> list[int]:
    """Return the tokens of a question as a chat."""
    return encode(tokenizer, "".join(smollm2.chat(question)))


def document_prompt(tokenizer: Any, question: str, length: int) -> list[int]:
    """Return exactly `length` tokens: a page of Python's documentation and a question, as a chat."""
    before, after = (encode(tokenizer, part) for part in smollm2.chat(question))
    topics = pydoc_data.topics.topics
    document = encode(tokenizer, "\n\n".join(topics[name] for name in TOPICS if name in topics))
    return before + document[: length - len(before) - len(after)] + after
