"""Continuous batching: many requests on the rows of one cache, each row with a request of its own.

A step feeds every row its next tokens: a piece of a prompt that is still being read, or the token chosen
last and the drafts behind it. It has one of two lengths, `chunk` while a row has much to read and else
1 + `drafts`, so two programs are compiled however requests come and go. A row whose request is done is
reset in the step that begins the next one, while the others go on; tags are all that is edited.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from distattn.cache import KVCache
from distattn.integrations.drafts import Lookup
from distattn.integrations.sampling import choose

# forward(weights, cache, int32[B, T] tokens, lengths=int32[B], read=int32[B, W]) -> f32[B, W, A], cache
Forward = Callable[..., tuple[jax.Array, KVCache]]


@dataclasses.dataclass(frozen=True)
class Request:
    """What one row is asked for."""

    prompt: Sequence[int]  # at least one token
    max_tokens: int  # of the answer
    temperature: float = 0.0  # 0: the likeliest token, always
    top_p: float = 1.0  # draw among the likeliest tokens that have this probability together
    seed: int = 0  # in 0 .. 2^32 - 1; same seed, same tokens

    def __post_init__(self) -> None:
        """Checks the numbers, each alone."""
        if not len(self.prompt):
            raise ValueError("prompt has no tokens; a request needs at least one")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens is {self.max_tokens}; ask for at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(
                f"temperature is {self.temperature}; it must be 0, for the likeliest token, or positive"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}; it must be in (0, 1], and 1 keeps all tokens")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}; it must be in 0 .. 2^32 - 1")


@dataclasses.dataclass(frozen=True)
class Completion:
    """What came of a request."""

    tokens: tuple[int, ...]  # without the end token
    ended: bool  # by an end token, not by max_tokens
    drafted: int  # tokens that were guessed and verified
    accepted: int  # of these
    steps: int  # in which tokens of it were chosen


@functools.partial(jax.jit, static_argnames=("forward", "window"), donate_argnames=("cache",))
def step(
    weights: Any, cache: KVCache, feed: dict[str, jax.Array], *, forward: Forward, window: int
) -> tuple[dict[str, jax.Array], KVCache]:
    """One pass over the next tokens of every row, and the tokens that come after them.

    The last `drafted` of a row's tokens are guesses. The token after each is chosen as if they were right,
    with the randomness of its own number; those up to the first wrong guess are what would have been chosen
    one by one. What follows a wrong guess is taken out of the cache again.

    Args:
      weights: for `forward`.
      cache: donated.
      feed: tokens int32[B, T]; lengths, drafted int32[B]; begins bool[B], rows that are emptied first;
        temperature, top_p f32[B], seed uint32[B], count int32[B] as in `choose`.
      forward: the model.
      window: W, one more than the most guesses of a row.

    Returns:
      chosen int32[B, W], of which a row's first accepted + 1 count; accepted int32[B]; overflow bool[B].
      And the cache.
    """
    tokens, lengths, drafted = feed["tokens"], feed["lengths"], feed["drafted"]
    cache = cache.reset(feed["begins"])
    start = cache.next_position
    place = np.arange(window, dtype=np.int32)[None]
    read = jnp.clip((lengths - 1 - drafted)[:, None] + place, 0, tokens.shape[1] - 1)
    logits, cache = forward(weights, cache, tokens, lengths=lengths, read=read)
    overflow = cache.overflow
    chosen = choose(
        logits, **{name: feed[name] for name in ("temperature", "top_p", "seed", "count")}
    )
    guesses = jnp.take_along_axis(tokens, read[:, 1:], axis=1)
    right = (guesses == chosen[:, :-1]) & (place[:, 1:] <= drafted[:, None])
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
    lookup: Lookup | None
    begins: bool = True
    tokens: list[int] = dataclasses.field(default_factory=list)
    ended: bool = False
    drafted: int = 0
    accepted: int = 0
    steps: int = 0

    def next_tokens(self, length: int, drafts: int) -> tuple[list[int], int]:
        """At most `length` tokens to be fed, and how many of these, the last ones, are guesses."""
        fed, self.unread = self.unread[:length], self.unread[length:]
        if self.unread or self.lookup is None:
            return fed, 0
        left = self.request.max_tokens - len(self.tokens)
        guesses = self.lookup.propose(min(drafts, length - len(fed), left - 1))
        return fed + guesses, len(guesses)

    def take(self, chosen: list[int], drafted: int, end_tokens: Sequence[int]) -> Iterator[int]:
        """What was chosen, up to an end token."""
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
    """Answers all requests, as many at a time as the cache has rows, in the order in which they come.

    Args:
      weights: for `forward`.
      cache: of any content; it is donated, and its rows are emptied.
      requests: more than rows, or fewer.
      forward: forward(weights, cache, tokens, lengths=, read=) -> (logits, cache), as `smollm2.forward`.
        Pass the same function object each time: for each one programs are compiled.
      chunk: how many tokens of its prompt a row reads in a step.
      drafts: how many tokens at most are guessed and verified in a step, by looking them up in what the row
        has already; 0: none. They change the number of steps, and no token.
      end_tokens: with one of these an answer ends.
      on_token: called as on_token(index of the request, token) for each token when it comes, and with None
        when the answer is complete.

    Returns:
      The completions in the order of the requests.

    Raises:
      ValueError: a request that does not fit in a row of the cache, before anything is computed.
    """
    if drafts < 0 or chunk < 1 + drafts:
        raise ValueError(
            f"drafts is {drafts} and chunk is {chunk}; drafts must be at least 0, and chunk at least "
            "1 + drafts"
        )
    for i, request in enumerate(requests):
        # The last token of the answer is not fed any more.
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
                rows[b] = _Run(index, request, prompt, Lookup(prompt) if drafts else None)
        if not any(rows):
            return [completions[i] for i in range(len(requests))]
        feed = _feed(rows, chunk, 1 + drafts)
        out, cache = step(weights, cache, feed, forward=forward, window=1 + drafts)
        chosen, accepted, overflow = (np.asarray(out[name]) for name in _RESULTS)
        _refuse(overflow, cache, rows)
        for b, run in enumerate(rows):
            if run is None or run.unread:
                continue
            count = 1 + int(accepted[b])
            for token in run.take(chosen[b, :count].tolist(), int(feed["drafted"][b]), end_tokens):
                report(run.index, token)
            if run.done:
                report(run.index, None)
                completions[run.index], rows[b] = run.completion(), None


_RESULTS = ("chosen", "accepted", "overflow")


def _feed(rows: list[_Run | None], chunk: int, window: int) -> dict[str, np.ndarray]:
    """The numbers of a step, as `step` takes them."""
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


def _refuse(overflow: np.ndarray, cache: KVCache, rows: list[_Run | None]) -> None:
    """An error where the cache had no place: a placement that is not 'least_loaded' may have none."""
    if overflow.any():
        b = int(overflow.argmax())
        raise ValueError(
            f"request {rows[b].index} found no free slot where the placement {cache.placement!r} puts its "
            "next token; make the cache with more capacity, or with placement='least_loaded'"
        )


class TextStream:
    """Text from the tokens of many requests as they come; to be passed as `on_token`.

    A character may be spread over several tokens: they wait until it is whole.
    """

    def __init__(
        self,
        decode: Callable[[list[int]], str],
        write: Callable[[int, str | None], None],
    ):
        self._decode, self._write = decode, write
        self._waiting: dict[int, list[int]] = {}

    def __call__(self, index: int, token: int | None) -> None:
        """Writes write(index, text) for what is whole now, and write(index, None) at the end."""
        waiting = self._waiting.setdefault(index, [])
        if token is not None:
            waiting.append(token)
        text = self._decode(waiting) if waiting else ""
        if text and (token is None or not text.endswith("\N{REPLACEMENT CHARACTER}")):
            self._write(index, text)
            waiting.clear()
        if token is None:
            self._write(index, None)
