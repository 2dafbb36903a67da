"""Gradients on their way to completion: arrays that are added, or sums in fixed point that are merged."""

from typing import Any

import jax
import jax.numpy as jnp

from distattn import fixed_point, tiles
from distattn._compat import vary
from distattn.fixed_point import FixedPoint, map_sums
from distattn.mask import Span, take

Sum = jax.Array | FixedPoint


def zeros_like(x: Any, axes: frozenset[str]) -> Any:
    """The sums of nothing in the shapes of x, arrays or `jax.ShapeDtypeStruct`, varying over the axes."""

    def zero(x: Any) -> Sum:
        if isinstance(x, FixedPoint):
            return fixed_point.zero(x.words[0].shape, x.lattice, axes)
        return vary(jnp.zeros(x.shape, x.dtype), axes)

    return map_sums(zero, x)


def zeros_at(like: Sum, rows: tuple[int, ...], axes: frozenset[str]) -> Sum:
    """The sums of nothing for rows of another shape: those of a bias, of which `like` is a part."""
    if isinstance(like, FixedPoint):
        return fixed_point.zero((like.words[0].shape[0], *rows), like.lattice, axes)
    return vary(jnp.zeros(rows, like.dtype), axes)


def add(a: Any, b: Any) -> Any:
    """The sums of the terms of both, pytrees of the same structure."""

    def pair(a: Any, b: Any) -> Sum:
        return fixed_point.merge(a, b) if isinstance(a, FixedPoint) else a + b

    return map_sums(pair, a, b)


def add_at(x: Sum, part: Sum, *spans: Span) -> Sum:
    """x with the part added at its place among the rows."""
    return merge_at(x, part, *spans) if isinstance(x, FixedPoint) else tiles.add(x, part, *spans)


def put_at(x: FixedPoint, part: FixedPoint, *spans: Span) -> FixedPoint:
    """x with the part at its place among the rows."""
    inner = (Span(0, x.words[0].shape[0]), *spans)
    words = tuple(tiles.put(a, b, *inner) for a, b in zip(x.words, part.words, strict=True))
    return FixedPoint(tiles.put(x.top, part.top, *spans), words, x.lattice)


def merge_at(x: FixedPoint, part: FixedPoint, *spans: Span) -> FixedPoint:
    """x with the part merged at its place; dimensions of size 1 are kept whole."""
    spans = tuple(Span(0, 1) if x.top.shape[a] == 1 else span for a, span in enumerate(spans))
    there = FixedPoint(
        top=take(x.top, *spans),
        words=tuple(take(word, None, *spans) for word in x.words),
        lattice=x.lattice,
    )
    return put_at(x, fixed_point.merge(there, part), *spans)
