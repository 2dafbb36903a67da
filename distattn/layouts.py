"""Orders of a sequence over devices, and functions that bring arrays into them.

A layout is a vector of positions, int32[S], as `key_positions` and `query_positions`: entry i is the
position of the token that is stored at slot i. Device d of D stores slots d * S / D to
(d + 1) * S / D - 1. `reorder` brings an array into a layout, `restore` brings it back, and `align`
brings values to their keys if both arrive in different orders.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from distattn.attention.align import align, align_shards
from distattn.collectives.mesh import explicit_axes

__all__ = ["align", "align_shards", "contiguous", "reorder", "restore", "striped", "zigzag"]


def contiguous(seq_len: int, shards: int) -> np.ndarray:
    """Return the layout in which each device holds one run of the sequence: position i at slot i.

    Args:
      seq_len: S, a multiple of `shards`.
      shards: D.

    Returns:
      int32[S], a numpy array.

    Raises:
      ValueError: seq_len is not a multiple of shards.

    Examples:
      >>> from distattn import layouts
      >>> layouts.contiguous(8, shards=2).tolist()
      [0, 1, 2, 3, 4, 5, 6, 7]
    """
    _check_lengths(seq_len, "shards", shards, shards)
    return np.arange(seq_len, dtype=np.int32)


def zigzag(seq_len: int, shards: int) -> np.ndarray:
    """Return the layout that balances a causal mask: device d holds chunks d and 2D - 1 - d of 2D.

    Args:
      seq_len: S, a multiple of 2 * `shards`.
      shards: D.

    Returns:
      int32[S], a numpy array.

    Raises:
      ValueError: seq_len is not a multiple of 2 * shards.

    Examples:
      >>> from distattn import layouts
      >>> layouts.zigzag(8, shards=2).tolist()  # chunks 0 and 3 on device 0, 1 and 2 on device 1
      [0, 1, 6, 7, 2, 3, 4, 5]

    Reference: Llama 3, arXiv 2407.21783, section 3.3.2 (context parallelism).
    """
    _check_lengths(seq_len, "2 * shards", 2 * shards, shards)
    chunks = np.arange(seq_len, dtype=np.int32).reshape(2 * shards, -1)
    device = np.arange(shards)
    return chunks[np.stack([device, 2 * shards - 1 - device], axis=1)].reshape(-1)


def striped(seq_len: int, shards: int, stripe_size: int = 1) -> np.ndarray:
    """Return the layout in which device d holds stripes d, d + D, d + 2D, ... of the sequence.

    Args:
      seq_len: S, a multiple of `shards` * `stripe_size`.
      shards: D.
      stripe_size: number of neighbours that stay together.

    Returns:
      int32[S], a numpy array.

    Raises:
      ValueError: seq_len is not a multiple of shards * stripe_size.

    Examples:
      >>> from distattn import layouts
      >>> layouts.striped(8, shards=2).tolist()
      [0, 2, 4, 6, 1, 3, 5, 7]
      >>> layouts.striped(8, shards=2, stripe_size=2).tolist()
      [0, 1, 4, 5, 2, 3, 6, 7]

    Reference: Brandon et al., "Striped Attention", arXiv 2311.09431, section 3.
    """
    if operator.index(stripe_size) < 1:
        raise ValueError(
            f"stripe_size is {stripe_size}; it must be at least 1: pass 1 for single tokens"
        )
    _check_lengths(seq_len, "shards * stripe_size", shards * stripe_size, shards)
    stripes = np.arange(seq_len, dtype=np.int32).reshape(-1, shards, stripe_size)
    return stripes.swapaxes(0, 1).reshape(-1)


def reorder(x: ArrayLike, positions: ArrayLike, axis: int = 1) -> jax.Array:
    """Bring an array into a layout.

        out[..., i, ...] = x[..., positions[i], ...]

    Works under jit and outside, is differentiable, and keeps the sharding of x.

    Args:
      x: [..., S, ...] in the order of positions, any dtype.
      positions: int32[S], or int32[B, S] for one order per sequence, B the leading axis of x. A
        negative position marks an empty slot; so does, under jit, a position of S or more.
      axis: the axis of S in x; with int32[B, S] it is 1.

    Returns:
      [..., S, ...], zero in empty slots.

    Raises:
      ValueError: several arrays; positions of a wrong shape or dtype, or known positions of S or more;
        an axis that x does not have.

    Examples:
      >>> import jax.numpy as jnp
      >>> from distattn import layouts
      >>> x = jnp.array([[10, 11, 12, 13]])
      >>> layouts.reorder(x, jnp.array([3, 0, -1, 2])).tolist()  # slot 2 is empty
      [[13, 10, 0, 12]]
    """
    x = _one_array("reorder", x)
    axis, positions = _check(x, positions, axis, unique=False)
    return _laid_out_as(x, lambda x, slots: _gather(x, slots, axis), positions)


def restore(x: ArrayLike, positions: ArrayLike, axis: int = 1) -> jax.Array:
    """Bring an array from a layout back to the order of positions: undo `reorder`.

        out[..., positions[i], ...] = x[..., i, ...]

    Args:
      x: [..., S, ...] in the layout, any dtype.
      positions: as in `reorder`, each position once. Empty slots are dropped.
      axis: the axis of S in x; with int32[B, S] it is 1.

    Returns:
      [..., S, ...], zero at positions without a slot.

    Raises:
      ValueError: as `reorder`; or known positions that occur twice.

    Examples:
      >>> import jax.numpy as jnp
      >>> from distattn import layouts
      >>> x, positions = jnp.array([[10, 11, 12, 13]]), layouts.striped(4, shards=2)
      >>> layouts.restore(layouts.reorder(x, positions), positions).tolist()
      [[10, 11, 12, 13]]
    """
    x = _one_array("restore", x)
    axis, positions = _check(x, positions, axis, unique=True)
    return _laid_out_as(x, lambda x, slots: _gather(x, _inverse(slots), axis), positions)


def _laid_out_as(x: jax.Array, f: Callable[..., Any], positions: jax.Array) -> jax.Array:
    """Call f(x, positions), whose result gets the sharding of x if that is known here."""
    shardings = [jax.typeof(y).sharding for y in (x, positions)]
    mesh = shardings[0 if shardings[1].mesh.empty else 1].mesh
    if explicit := explicit_axes(mesh):
        # The compiler does a gather along a sharded axis, if it knows the sharding of the result.
        spec = shardings[0].spec if shardings[0].mesh == mesh else PartitionSpec()
        result = NamedSharding(mesh, spec)
        run: Callable[..., Any] = jax.sharding.auto_axes(f, axes=explicit, out_sharding=result)
        return run(x, positions)
    out = f(x, positions)
    if not isinstance(x, Tracer) and isinstance(x.sharding, NamedSharding):
        return lax.with_sharding_constraint(out, x.sharding)
    return out


def _gather(x: jax.Array, index: jax.Array, axis: int) -> jax.Array:
    if x.size == 0:
        return x
    how = {"mode": "fill", "fill_value": 0, "wrap_negative_indices": False}
    if index.ndim == 1:
        taken = x.at[(slice(None),) * axis + (index,)].get(**how)
        shape = tuple(size if i == axis else 1 for i, size in enumerate(x.shape))
    else:
        taken = jax.vmap(lambda row, slots: row.at[slots].get(**how))(x, index)
        shape = x.shape[:2] + (1,) * (x.ndim - 2)
    # Inside jit and under Auto axes the sharding of x is unknown, and the compiler does not carry
    # it through the gather. It carries it through a select of which x is one case, never selected.
    case = jnp.where(index < 0, 1, 0).reshape(shape)
    return lax.select_n(jnp.broadcast_to(case, x.shape), taken, jnp.zeros_like(x), x)


def _inverse(positions: jax.Array) -> jax.Array:
    """Return the slot of each position, int32, -1 for positions without a slot."""
    rows = positions if positions.ndim == 2 else positions[None]
    slots = lax.broadcasted_iota(jnp.int32, rows.shape, 1)

    def invert(row: jax.Array, slots: jax.Array) -> jax.Array:
        return jnp.full_like(row, -1).at[row].set(slots, mode="drop", wrap_negative_indices=False)

    return jax.vmap(invert)(rows, slots).reshape(positions.shape)


def _one_array(function: str, x: Any) -> jax.Array:
    """Convert x to an array; raise ValueError for several arrays, which would be stacked silently."""
    if isinstance(x, tuple | list | dict) and any(map(jnp.ndim, jax.tree.leaves(x))):
        raise ValueError(
            f"x is a {type(x).__name__} of arrays; it must be one array: for each of them use "
            f"jax.tree.map(lambda x: layouts.{function}(x, positions), ...)"
        )
    return jnp.asarray(x)


def _check(x: jax.Array, positions: Any, axis: int, *, unique: bool) -> tuple[int, jax.Array]:
    """Check the arguments, and return the axis counted from the front and positions as int32."""
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis is {axis} and x has shape {x.shape}; pass an axis that x has")
    axis %= x.ndim
    if not isinstance(positions, jax.Array):
        positions = np.asarray(positions)
    shape, dtype, length = positions.shape, positions.dtype, x.shape[axis]
    if not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"positions is {dtype}; it must be int32: convert with astype('int32')")
    if len(shape) == 2 and axis == 1 and shape != (x.shape[0], length):
        raise ValueError(
            f"positions has shape {shape} and x has shape {x.shape}; per row it must be "
            f"int32[B, S] with B, S = {x.shape[0]}, {length}: a position for each slot of each row"
        )
    if len(shape) == 2 and axis != 1:
        raise ValueError(
            f"positions is given per row, shape {shape}, and axis is {axis}; rows are axis 0 and "
            "slots axis 1: move the axes of x, or pass int32[S]"
        )
    if len(shape) not in (1, 2) or shape[-1] != length:
        raise ValueError(
            f"positions has shape {shape}, but x has {length} slots along axis {axis}; pass "
            f"int32[S] with S={length}, one position for each slot (-1 for an empty one)"
        )
    if not isinstance(positions, Tracer) and getattr(positions, "is_fully_addressable", True):
        _check_known(np.asarray(positions), length, unique=unique)
    return axis, jnp.asarray(positions).astype(jnp.int32)


def _check_known(positions: np.ndarray, length: int, *, unique: bool) -> None:
    if positions.size and positions.max() >= length:
        raise ValueError(
            f"positions has {positions.max()}, and x has {length} slots: give 0 to {length - 1}, "
            "and -1 to empty slots"
        )
    if not unique:
        return
    for row in positions.reshape(-1, length):
        values, counts = np.unique(row[row >= 0], return_counts=True)
        if (counts > 1).any():
            raise ValueError(
                f"positions has {values[counts > 1][0]} more than once, so its inverse does not "
                "exist: give each position to one slot, and -1 to empty ones"
            )


def _check_lengths(seq_len: int, unit_name: str, unit: int, shards: int) -> None:
    if operator.index(shards) < 1:
        raise ValueError(f"shards is {shards}; it must be at least 1: pass the number of devices")
    if operator.index(seq_len) < 0:
        raise ValueError(f"seq_len is {seq_len}; it must not be negative: pass the number of slots")
    if seq_len % unit:
        raise ValueError(
            f"seq_len is {seq_len}; it must be a multiple of {unit_name} = {unit}: pad the "
            f"sequence to {-(-seq_len // unit) * unit}, with -1 for empty slots"
        )
