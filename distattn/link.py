"""A connection between devices: its latency and its bandwidth, from the table or measured."""

import dataclasses
import math
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Link:
    """A connection between two devices, in one direction."""

    latency_s: float  # one message, however small
    bytes_per_s: float

    def __post_init__(self) -> None:
        """Check the signs."""
        if not (self.latency_s >= 0 and self.bytes_per_s > 0):
            raise ValueError(
                f"latency_s is {self.latency_s}, bytes_per_s is {self.bytes_per_s}; they must be "
                ">= 0 and > 0: measure seconds of an empty message, bytes a second of a long one"
            )


def worst(links: Sequence[Link]) -> Link:
    """The longest latency and the least bandwidth of some links."""
    return Link(max(x.latency_s for x in links), min(x.bytes_per_s for x in links))


def fit_link(samples: Sequence[tuple[float, float]]) -> tuple[Link, float]:
    """The link whose latency_s + bytes / bytes_per_s is nearest to what was measured.

    Least squares of the relative error, so that a small message counts as much as a large one, over
    latencies of at least 0. Where time does not grow with the size, bytes_per_s is what the largest
    message reached: no more can be said.

    Args:
      samples: (bytes, seconds) of single messages; of two sizes or more.

    Returns:
      Link, and the root of the mean square of (fitted - measured) / measured.

    Raises:
      ValueError: fewer than two sizes, or times that are not above 0.
    """
    if len({size for size, _ in samples}) < 2 or not all(t > 0 for _, t in samples):
        raise ValueError(
            f"samples is {list(samples)}; it must be (bytes, seconds) of two sizes or more, with seconds "
            "above 0: measure a small message and a large one"
        )
    weights = [(size, 1 / seconds) for size, seconds in samples]
    ww = sum(w * w for _, w in weights)
    wx = sum(w * w * x for x, w in weights)
    xx = sum((w * x) ** 2 for x, w in weights)
    w1, x1 = sum(w for _, w in weights), sum(w * x for x, w in weights)
    determinant = ww * xx - wx * wx
    latency_s = (xx * w1 - wx * x1) / determinant
    s_per_byte = (ww * x1 - wx * w1) / determinant
    if latency_s < 0:
        latency_s, s_per_byte = 0.0, x1 / xx
    largest, seconds = max(samples)
    if s_per_byte <= 0:
        latency_s, s_per_byte = w1 / ww, 0.0
    errors = [w * (latency_s + s_per_byte * x) - 1 for x, w in weights]
    residual = math.sqrt(sum(e * e for e in errors) / len(errors))
    return Link(latency_s, 1 / s_per_byte if s_per_byte else largest / seconds), residual
