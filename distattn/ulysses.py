"""Heads in place of rows: one all-to-all, and each device has all rows of its part of the heads.

Everything here is what one device does, inside `shard_map` (Jacobs et al., "DeepSpeed Ulysses", arXiv
2309.14509; under a ring or a gather over other axes, Fang & Zhao, "USP", arXiv 2405.07719).
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from distattn.operands import Operands


def by_heads(
    operands: Operands, axes: tuple[str, ...], *rows: jax.Array
) -> tuple[Operands, list[jax.Array]]:
    """Query, key, value, and more arrays [B, T / D, N, ...], with heads sharded in place of rows."""
    arrays = [operands.query, operands.key, operands.value, *rows]
    query, key, value, *moved = rows_to_heads(arrays, axes)
    return dataclasses.replace(operands, query=query, key=key, value=value), moved


def rows_to_heads(arrays: Sequence[jax.Array], axes: tuple[str, ...]) -> list[jax.Array]:
    """[B, T / D, N, ...] of each array to [B, T, N / D, ...]: rows in the order of the axes, as heads are.

    Arrays of one dtype and as many rows and heads go together, in one message to each other device.
    """
    return _together(arrays, axes, split=2, concat=1)


def heads_to_rows(arrays: Sequence[jax.Array], axes: tuple[str, ...]) -> list[jax.Array]:
    """The inverse of `rows_to_heads`."""
    return _together(arrays, axes, split=1, concat=2)


def _together(
    arrays: Sequence[jax.Array], axes: tuple[str, ...], *, split: int, concat: int
) -> list[jax.Array]:
    groups: dict[tuple[Any, ...], list[int]] = {}
    for index, x in enumerate(arrays):
        groups.setdefault((x.dtype, x.shape[:3]), []).append(index)
    result: list[jax.Array] = list(arrays)
    for members in groups.values():
        parts = [x if x.ndim == 4 else x[..., None] for x in (arrays[i] for i in members)]
        widths = [x.shape[-1] for x in parts]
        packed = jnp.concatenate(parts, axis=-1) if len(parts) > 1 else parts[0]
        moved = lax.all_to_all(packed, axes, split_axis=split, concat_axis=concat, tiled=True)
        starts = [sum(widths[:i]) for i in range(1, len(widths))]
        for index, part in zip(members, jnp.split(moved, starts, axis=-1), strict=True):
            result[index] = part if arrays[index].ndim == 4 else part[..., 0]
    return result
