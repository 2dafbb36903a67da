"""Heads in place of rows: one all-to-all, and each device has all rows of its part of the heads.

Everything here is what one device does, inside `shard_map` (Jacobs et al., "DeepSpeed Ulysses", arXiv
2309.14509; under a ring or a gather over other axes, Fang & Zhao, "USP", arXiv 2405.07719).
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def rows_to_heads(arrays: Sequence[jax.Array], axes: tuple[str, ...]) -> list[jax.Array]:
    """[B, T / D, N, ...] of each array to [B, T, N / D, ...]: rows in the order of the axes, as heads are.

    Arrays of one dtype and as many rows and heads go together, in one message to each other device.
    """
    return together(_all_to_all(axes, split=2, concat=1), arrays)


def heads_to_rows(arrays: Sequence[jax.Array], axes: tuple[str, ...]) -> list[jax.Array]:
    """The inverse of `rows_to_heads`."""
    return together(_all_to_all(axes, split=1, concat=2), arrays)


def _all_to_all(
    axes: tuple[str, ...], *, split: int, concat: int
) -> Callable[[jax.Array], jax.Array]:
    return functools.partial(
        lax.all_to_all, axis_name=axes, split_axis=split, concat_axis=concat, tiled=True
    )


def together(
    move: Callable[[jax.Array], jax.Array], arrays: Sequence[jax.Array]
) -> list[jax.Array]:
    """move(x) of each [B, T, N, .] or [B, T, N], all of one dtype and as many rows and heads at once."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, x in enumerate(arrays):
        groups.setdefault((x.dtype, x.shape[:3]), []).append(index)
    result: list[jax.Array] = list(arrays)
    for members in groups.values():
        parts = [x if x.ndim == 4 else x[..., None] for x in (arrays[i] for i in members)]
        widths = [x.shape[-1] for x in parts]
        moved = move(jnp.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0])
        starts = [sum(widths[:i]) for i in range(1, len(widths))]
        for index, part in zip(members, jnp.split(moved, starts, axis=-1), strict=True):
            result[index] = part if arrays[index].ndim == 4 else part[..., 0]
    return result
