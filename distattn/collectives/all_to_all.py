"""All-to-all inside `shard_map` that exchanges a sharding of rows for a sharding of heads.

Jacobs et al., "DeepSpeed Ulysses", arXiv 2309.14509. Under a ring or a gather over other axes:
Fang & Zhao, "USP", arXiv 2405.07719.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax


def rows_to_heads(arrays: Sequence[jax.Array], axes: tuple[str, ...]) -> list[jax.Array]:
    """Bring each array from [B, T / D, N, ...] to [B, T, N / D, ...].

    Rows and heads are in the order of the axes. Arrays of equal dtype, rows and heads share a message.
    """
    return in_one_message(_all_to_all(axes, split=2, concat=1), arrays)


def heads_to_rows(arrays: Sequence[jax.Array], axes: tuple[str, ...]) -> list[jax.Array]:
    """Bring each array from [B, T, N / D, ...] to [B, T / D, N, ...]: undo `rows_to_heads`."""
    return in_one_message(_all_to_all(axes, split=1, concat=2), arrays)


def _all_to_all(
    axes: tuple[str, ...], *, split: int, concat: int
) -> Callable[[jax.Array], jax.Array]:
    return functools.partial(
        lax.all_to_all, axis_name=axes, split_axis=split, concat_axis=concat, tiled=True
    )


def in_one_message(
    move: Callable[[jax.Array], jax.Array], arrays: Sequence[jax.Array]
) -> list[jax.Array]:
    """Call `move` on [B, T, N, .] or [B, T, N], once for all of equal dtype, rows and heads."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, x in enumerate(arrays):
        groups.setdefault((x.dtype, x.shape[:3]), []).append(index)
    result: list[jax.Array] = list(arrays)
    for members in groups.values():
        columns = [x if x.ndim == 4 else x[..., None] for x in (arrays[i] for i in members)]
        widths = [x.shape[-1] for x in columns]
        moved = move(jnp.concatenate(columns, axis=-1))
        starts = [sum(widths[:i]) for i in range(1, len(widths))]
        for index, x in zip(members, jnp.split(moved, starts, axis=-1), strict=True):
            result[index] = x if arrays[index].ndim == 4 else x[..., 0]
    return result
