"""How keys and values are laid out for the TPU kernels, and what blocks a call is cut into.

Keys and values stay as they are, which is not always [B, S, K, .]: XLA lays out an array so that the tiles
of a TPU, 8 by 128, are full. Heads of 64 or 80 numbers lie with S along the lanes, [B, K, ., S], and 3
heads of 128 as [B, K, S, .]. The kernels take all three `Order`s: what they ask for is what there is.
"""

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax

from distattn._compat import device_kind_of
from distattn.kernels.rows import Cut
from distattn.kernels.tpu_blocks import (
    HALF_ITEMS,
    LANES,
    MOST_KEYS,
    Shape,
    Target,
    parts,
    sizes,
    target_of,
    vmem_bytes,
)
from distattn.kernels.tuned import chip_name, kind_of, tuned
from distattn.operands import Operands
from distattn.tiles import Machine

HEADS = 8  # of keys in a block, at most: the tile of HBM
Order = Literal["SKH", "KSH", "KHS"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TpuCut(Cut):
    """Sizes of a call and of its blocks."""

    heads: int  # of a block, of keys
    target: Target
    vmem_bytes: int  # that a kernel holds, about
    splits: bool = False  # whether keys may be split into parts

    @property
    def parts(self) -> int:
        """How many parts of the keys have a state of their own."""
        steps = self.batch * self.head_blocks * self.row_blocks
        return parts(self.target, steps, self.key_blocks) if self.splits else 1

    @property
    def head_blocks(self) -> int:
        """How many blocks of heads."""
        return self.kv_heads // self.heads


def cut_of(operands: Operands, machine: Machine, *, backward: bool = False) -> TpuCut:
    """The sizes for a call: as many heads in a block as there may be, fewer where memory is short."""
    batch, queries, heads, width = operands.query.shape
    keys, kv_heads, value_width = operands.value.shape[-3:]
    device_kind = device_kind_of()
    target = target_of(device_kind)
    kind = kind_of(queries * heads // kv_heads, backward=backward)
    measured = tuned(chip_name(device_kind), kind, width, operands.key.dtype)
    counts = [n for n in range(min(HEADS, kv_heads), 0, -1) if kv_heads % n == 0]
    arrays = operands.query, operands.key, operands.value
    if "SKH" in (order_of(x.shape, x.dtype) for x in arrays[1:]):
        counts = counts[:1]
    shapes = [
        Shape(
            rows=queries * heads // kv_heads,
            groups=heads // kv_heads,
            keys=keys,
            heads=count,
            width=width,
            value_width=value_width,
            itemsize=max(x.dtype.itemsize for x in arrays),
            backward=backward,
            key_itemsize=max(x.dtype.itemsize for x in arrays[1:]),
            most_keys=min(_most_keys(x, count) for x in arrays[1:]),
        )
        for count in counts
    ]
    sized = ((shape, *sizes(shape, target, machine.block_sizes, measured)) for shape in shapes)
    cuts = [
        TpuCut(
            batch=batch,
            queries=queries,
            keys=keys,
            kv_heads=kv_heads,
            groups=shape.groups,
            width=width,
            value_width=value_width,
            rows=rows,
            key_block=key_block,
            heads=shape.heads,
            target=target,
            vmem_bytes=vmem_bytes(shape, rows, key_block),
            splits=not backward,
        )
        for shape, rows, key_block in sized
    ]
    return next((cut for cut in cuts if cut.vmem_bytes <= target.budget_bytes), cuts[-1])


def order_of(shape: tuple[int, ...], dtype: jnp.dtype) -> Order:
    """How keys, or values, [..., S, K, .], lie in the memory of a TPU."""
    *_, kv_heads, width = shape
    if width % LANES:
        return "KHS"
    # Bytes are packed in fours, which 2 heads do not fill.
    few = (4,) if dtype.itemsize == 1 else (2, 4)
    return "SKH" if kv_heads in few or kv_heads % HEADS == 0 else "KSH"


def as_stored(x: jax.Array) -> jax.Array:
    """[L, B, S, K, .] with the last three in their `Order`; of float16, which Mosaic has not, the bits."""
    x = x if x.ndim == 5 else x[None]
    match order_of(x.shape, x.dtype):
        case "KHS":
            x = jnp.moveaxis(x, 2, 4)
        case "KSH":
            x = x.swapaxes(2, 3)
    if x.dtype != jnp.float16:
        return x
    # Last of all, where it becomes a part of the kernel: see `distattn.kernels.tpu_call.launch`.
    return lax.bitcast_convert_type(lax.optimization_barrier(x), jnp.uint16)


def _most_keys(x: jax.Array, heads: int) -> int:
    """Of a block with so many heads."""
    if x.dtype != jnp.float16:
        return MOST_KEYS
    # A tile is one of 8, full or not.
    rows = HEADS if order_of(x.shape, x.dtype) == "SKH" else heads
    return min(max(HALF_ITEMS // (rows * x.shape[-1]) // LANES * LANES, LANES), MOST_KEYS)


def as_given(x: jax.Array, order: Order) -> jax.Array:
    """The inverse, of one layer: [B, S, K, .]."""
    match order:
        case "KHS":
            return jnp.moveaxis(x[0], 3, 1)
        case "KSH":
            return x[0].swapaxes(1, 2)
    return x[0]
