"""Arrays side by side in one message, and gathered by rows; for the body of a `shard_map`."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from distattn.axes import axes_size


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


def gathered(x: jax.Array, axes: tuple[str, ...], dimension: int = 1) -> jax.Array:
    """The parts of all devices of the axes along the dimension, T or S, in the order of the axes."""
    if axes_size(axes) == 1:
        return x
    return lax.all_gather(x, axes, axis=dimension, tiled=True)
