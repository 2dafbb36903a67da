"""What the examples of a pretrained model share: the model, what it reads, and lines of progress."""

import argparse
import pydoc_data.topics
import sys
import time
from typing import Any

from distattn.integrations import smollm2
from distattn.testing import fake_devices

DEVICES = 8
TOPICS = ("objects", "types", "specialnames", "compound")
Model = tuple[smollm2.Config, dict[str, Any], Any]  # its numbers, weights and tokenizer
STARTED = time.perf_counter()


def say(text: str) -> None:
    """A line of progress, with the time since the start."""
    print(f"[{time.perf_counter() - STARTED:6.1f} s] {text}", flush=True)


def load(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Model | None:
    """The model, on a machine that from now on has eight devices; None, and why, where it is not installed.

    A command line that asks for more than it can read ends the process.
    """
    try:
        path = smollm2.find_weights()
    except ModuleNotFoundError as missing:
        print(missing, file=sys.stderr)
        return None
    fake_devices(DEVICES)
    say(f"loading {path.name}")
    model = smollm2.load(path)
    most = model[0].max_context
    if options.context + options.tokens > most:
        parser.error(
            f"--context {options.context} and --tokens {options.tokens} are more than the {most} tokens "
            "of the model; ask for fewer"
        )
    return model


def encode(tokenizer: Any, text: str) -> list[int]:
    """The tokens of a text, and no others."""
    return tokenizer.encode(text, add_special_tokens=False).ids


def document_prompt(tokenizer: Any, question: str, length: int) -> list[int]:
    """Exactly `length` tokens: a part of Python's documentation and a question, as a chat."""
    before, after = (encode(tokenizer, part) for part in smollm2.chat(question))
    topics = pydoc_data.topics.topics
    document = encode(tokenizer, "\n\n".join(topics[name] for name in TOPICS if name in topics))
    return before + document[: length - len(before) - len(after)] + after
