"""Guesses of what comes next, from what was there before: prompt lookup, without a second model."""

from collections.abc import Sequence

LONGEST = 3


class Lookup:
    """The tokens of a request, and where its n-grams occurred last.

    A draft is what followed the last tokens when they occurred before: the longest n-gram of at most
    `LONGEST` tokens that did.

    Reference:
      Saxena, "Prompt Lookup Decoding", 2023; Leviathan et al., "Fast Inference from Transformers via
      Speculative Decoding", arXiv 2211.17192, for why verifying drafts changes no token.
    """

    def __init__(self, tokens: Sequence[int]):
        self._tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # where the token after an n-gram stands
        for token in tokens:
            self.append(token)

    def append(self, token: int) -> None:
        """One more token. Only now are the n-grams before it known to be followed by something."""
        end = len(self._tokens)
        for n in range(1, min(LONGEST, end) + 1):
            self._after[tuple(self._tokens[end - n :])] = end
        self._tokens.append(token)

    def propose(self, count: int) -> list[int]:
        """At most `count` tokens that may come next; none where the last token is new."""
        if count < 1:
            return []
        for n in range(min(LONGEST, len(self._tokens)), 0, -1):
            start = self._after.get(tuple(self._tokens[-n:]))
            if start is not None:
                return self._tokens[start : start + count]
        return []
