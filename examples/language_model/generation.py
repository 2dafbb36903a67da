"""Continuous batching: many requests share the rows of one cache, one request a row at a time.

A step feeds each row its next tokens: a chunk of its prompt, or the last chosen token and drafts after it.
Steps have two lengths: `chunk` while a row has more of its prompt to read, else 1 + `drafts`. Therefore two
programs are compiled, whatever requests come and go. When a request is complete, its row is reset in the
next step and takes another request, while the other rows go on.
"""

import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distattn import KVCache
from language_model.sampling import choose

# forward(weights, cache, int32[B, T] tokens, lengths=int32[B], read=int32[B, W]) -> f32[B, W, A], cache
Forward = Callable[..., tuple[jax.Array, KVCache]]


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt, and how to answer it."""

    prompt: Sequence[int]  # at least one token
    max_tokens: int  # most tokens of the answer
    temperature: float = 0.0  # 0: always the most likely token
    top_p: float = 1.0  # total probability of the most likely tokens to draw from
    seed: int = 0  # in 0 .. 2^32 - 1; a seed always gives the same tokens

    def __post_init__(self) -> None:
        """Raise ValueError if a field is out of its range."""
        if not len(self.prompt):
            raise ValueError("prompt has no tokens; pass at least one")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}; ask for at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(
                f"temperature is {self.temperature}; pass 0, for the most likely token, or more"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be in (0, 1], and 1 keeps all tokens")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}; it must be in 0 .. 2^32 - 1")


@dataclasses.dataclass(frozen=True)
class Completion:
    """The answer to a request."""

    tokens: tuple[int, ...]  # without the end token
    ended: bool  # by an end token, not by max_tokens
    drafted: int  # drafts that were verified
    accepted: int  # drafts that were right
    steps: int  # steps that chose tokens of this answer


class PromptLookup:
    """Drafts from the text so far, without a second model.

    A draft is what followed the last tokens at their previous occurrence, for the longest n-gram of at most
    `LONGEST` tokens that occurred before.

    Reference:
      Saxena, "Prompt Lookup Decoding", 2023; Leviathan et al., "Fast Inference from Transformers via
      Speculative Decoding", arXiv 2211.17192, for why verified drafts change no token.
    """

    LONGEST = 3

    def __init__(self, tokens: Sequence[int]):
        self._tokens: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}  # index of the token after an n-gram
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        """Add a token. The n-grams that end before it are now known to be followed by it."""
        end = len(self._tokens)
        for n in range(1, min(self.LONGEST, end) + 1):
            self._next[tuple(self._tokens[end - n :])] = end
        self._tokens.append(token)

    def propose(self, count: int) -> list[int]:
        """Return at most `count` drafts of the next tokens; [] if the last token is new."""
        if count < 1:
            return []
        for n in range(min(self.LONGEST, len(self._tokens)), 0, -1):
            start = self._next.get(tuple(self._tokens[-n:]))
            if start is not None:
                return self._tokens[start : start + count]
        return []


@functools.partial(jax.jit, static_argnames=("forward", "window"), donate_argnames=("cache",))
def step(
    weights: Any, cache: KVCache, feed: dict[str, jax.Array], *, forward: Forward, window: int
) -> tuple[dict[str, jax.Array], KVCache]:
    """Run the next tokens of every row through the model, and choose the tokens after them.

    The last `drafted` tokens of a row are drafts. The token after each draft is chosen as if the draft
    were right. Tokens up to the first wrong draft are exactly those that would be chosen one by one.
    Later tokens are taken out of the cache again.

    Args:
      weights: for `forward`.
      cache: donated.
      feed: tokens int32[B, T]; lengths, drafted int32[B]; begins bool[B], rows to empty first;
        temperature, top_p f32[B], seed uint32[B], count int32[B] as in `choose`.
      forward: the model.
      window: W, the most drafts of a row plus one.

    Returns:
      chosen int32[B, W], valid up to accepted + 1; accepted int32[B]; overflow bool[B]. And the cache.
    """
    tokens, lengths, drafted = feed["tokens"], feed["lengths"], feed["drafted"]
    cache = cache.reset(feed["begins"])
    start = cache.next_position
    offset = np.arange(window, dtype=np.int32)[None]
    read = jnp.clip((lengths - 1 - drafted)[:, None] + offset, 0, tokens.shape[1] - 1)
    logits, cache = forward(weights, cache, tokens, lengths=lengths, read=read)
    overflow = cache.overflow
    chosen = choose(
        logits, **{name: feed[name] for name in ("temperature", "top_p", "seed", "count")}
    )
    drafts = jnp.take_along_axis(tokens, read[:, 1:], axis=1)
    right = (drafts == chosen[:, :-1]) & (offset[:, 1:] <= drafted[:, None])
    accepted = jnp.cumprod(right.astype(jnp.int32), axis=1).sum(axis=1, dtype=jnp.int32)
    if window > 1:
        cache = cache.rewind(start + lengths - drafted + accepted)
    return {"chosen": chosen, "accepted": accepted, "overflow": overflow}, cache


@dataclasses.dataclass
class _Run:
    """A request in a row."""

    index: int
    request: Request
    unread: list[int]  # tokens that the cache does not have yet
    lookup: PromptLookup | None
    begins: bool = True
    tokens: list[int] = dataclasses.field(default_factory=list)
    ended: bool = False
    drafted: int = 0
    accepted: int = 0
    steps: int = 0

    def next_tokens(self, length: int, drafts: int) -> tuple[list[int], int]:
        """Return at most `length` tokens to feed, and how many of the last ones are drafts."""
        fed, self.unread = self.unread[:length], self.unread[length:]
        if self.unread or self.lookup is None:
            return fed, 0
        left = self.request.max_tokens - len(self.tokens)
        proposed = self.lookup.propose(min(drafts, length - len(fed), left - 1))
        return fed + proposed, len(proposed)

    def take(self, chosen: list[int], drafted: int, end_tokens: Sequence[int]) -> Iterator[int]:
        """Yield the chosen tokens up to an end token."""
        self.steps += 1
        self.drafted += drafted
        self.accepted += len(chosen) - 1
        self.unread = chosen[-1:]
        for token in chosen:
            if token in end_tokens:
                self.ended = True
                return
            self.tokens.append(token)
            if self.lookup is not None:
                self.lookup.append(token)
            yield token

    @property
    def done(self) -> bool:
        return self.ended or len(self.tokens) >= self.request.max_tokens

    def completion(self) -> Completion:
        return Completion(tuple(self.tokens), self.ended, self.drafted, self.accepted, self.steps)


def generate(
    weights: Any,
    cache: KVCache,
    requests: Sequence[Request],
    *,
    forward: Forward,
    chunk: int = 64,
    drafts: int = 0,
    end_tokens: Sequence[int] = (),
    on_token: Callable[[int, int | None], None] | None = None,
) -> list[Completion]:
    """Answer all requests in their order, as many at a time as the cache has rows.

    Args:
      weights: for `forward`.
      cache: donated; its rows are emptied first.
      requests: any number of requests.
      forward: forward(weights, cache, tokens, lengths=, read=) -> (logits, cache), as `llama.forward`.
        Pass the same function object each time: programs are compiled for each object.
      chunk: most tokens of its prompt that a row reads in a step.
      drafts: most tokens that `PromptLookup` drafts for a step; 0: none. Drafts change the number of steps
        and no token.
      end_tokens: tokens that end an answer.
      on_token: called as on_token(index of the request, token) for each token when it is chosen, and with
        None when the answer is complete.

    Returns:
      The completions in the order of the requests.

    Raises:
      ValueError: a request does not fit in a row of the cache. It is raised before anything is computed.
    """
    if drafts < 0 or chunk < 1 + drafts:
        raise ValueError(
            f"drafts is {drafts} and chunk is {chunk}; drafts must be at least 0, and chunk at least "
            "1 + drafts"
        )
    for i, request in enumerate(requests):
        # The last token of the answer is not fed.
        if (needed := len(request.prompt) + request.max_tokens - 1) > cache.capacity:
            raise ValueError(
                f"request {i} has a prompt of {len(request.prompt)} tokens and max_tokens is "
                f"{request.max_tokens}: it needs {needed} slots, and a row of the cache has "
                f"{cache.capacity}; shorten it, or make the cache with more capacity"
            )
    waiting = deque(enumerate(requests))
    rows: list[_Run | None] = [None] * cache.next_position.shape[0]
    completions: dict[int, Completion] = {}
    report = on_token or (lambda index, token: None)
    while True:
        for b, run in enumerate(rows):
            if run is None and waiting:
                index, request = waiting.popleft()
                prompt = [int(token) for token in request.prompt]
                rows[b] = _Run(index, request, prompt, PromptLookup(prompt) if drafts else None)
        if not any(rows):
            return [completions[i] for i in range(len(requests))]
        feed = _feed(rows, chunk, 1 + drafts)
        out, cache = step(weights, cache, feed, forward=forward, window=1 + drafts)
        out = {name: np.asarray(x) for name, x in out.items()}
        _check_overflow(out["overflow"], cache, rows)
        for b, run in enumerate(rows):
            if run is None or run.unread:
                continue
            chosen = out["chosen"][b, : 1 + out["accepted"][b]].tolist()
            for token in run.take(chosen, int(feed["drafted"][b]), end_tokens):
                report(run.index, token)
            if run.done:
                report(run.index, None)
                completions[run.index], rows[b] = run.completion(), None


def _feed(rows: list[_Run | None], chunk: int, window: int) -> dict[str, np.ndarray]:
    """Return the argument `feed` of the next `step`."""
    long = any(run is not None and len(run.unread) > window for run in rows)
    batch, length = len(rows), chunk if long else window
    feed = {
        "tokens": np.zeros((batch, length), np.int32),
        "lengths": np.zeros(batch, np.int32),
        "drafted": np.zeros(batch, np.int32),
        "begins": np.zeros(batch, bool),
        "temperature": np.zeros(batch, np.float32),
        "top_p": np.ones(batch, np.float32),
        "seed": np.zeros(batch, np.uint32),
        "count": np.zeros(batch, np.int32),
    }
    for b, run in enumerate(rows):
        if run is None:
            continue
        feed["begins"][b], run.begins = run.begins, False
        feed["count"][b] = len(run.tokens)
        for name in ("temperature", "top_p", "seed"):
            feed[name][b] = getattr(run.request, name)
        tokens, feed["drafted"][b] = run.next_tokens(length, window - 1)
        feed["lengths"][b] = len(tokens)
        feed["tokens"][b, : len(tokens)] = tokens
    return feed


def _check_overflow(overflow: np.ndarray, cache: KVCache, rows: list[_Run | None]) -> None:
    """Raise ValueError if a row had no free slot, which only placement='least_loaded' rules out."""
    if overflow.any():
        b = int(overflow.argmax())
        raise ValueError(
            f"request {rows[b].index} found no free slot where the placement {cache.placement!r} puts its "
            "next token; make the cache with more capacity, or with placement='least_loaded'"
        )


class TextStream:
    """Text of the tokens of many requests as they come; pass it as `on_token`.

    A character may have several tokens: they are held back until it is complete.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        write: Callable[[int, str | None], None],
    ):
        self._decode, self._write = decode, write
        self._waiting: dict[int, list[int]] = {}

    def __call__(self, index: int, token: int | None) -> None:
        """Call write(index, text) for each complete text, and write(index, None) at the end."""
        waiting = self._waiting.setdefault(index, [])
        if token is not None:
            waiting.append(token)
        text = self._decode(waiting) if waiting else ""
        if text and (token is None or not text.endswith("\N{REPLACEMENT CHARACTER}")):
            self._write(index, text)
            waiting.clear()
        if token is None:
            self._write(index, None)
