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
from distattn.kernels.tpu_blocks import LANES, Shape, Target, sizes, target_of, vmem_bytes
from distattn.operands import Operands
from distattn.tiles import Machine

HEADS = 8  # of keys in a block, at most: the tile of HBM
Order = Literal["SKH", "KSH", "KHS"]


@dataclasses.dataclass(frozen=True)
class Cut:
    """Sizes of a call and of its blocks."""

    batch: int
    queries: int  # T
    keys: int  # S
    kv_heads: int  # K
    groups: int  # G
    width: int  # H
    value_width: int  # V
    heads: int  # of a block, of keys
    rows: int  # of a block
    key_block: int
    target: Target
    vmem_bytes: int  # that a kernel holds, about

    @property
    def row_blocks(self) -> int:
        """How many blocks of rows."""
        return -(-self.queries * self.groups // self.rows)

    @property
    def key_blocks(self) -> int:
        """How many blocks of keys."""
        return -(-self.keys // self.key_block)

    @property
    def all_rows(self) -> int:
        """R, those that fill the last block included."""
        return self.row_blocks * self.rows

    @property
    def head_blocks(self) -> int:
        """How many blocks of heads."""
        return self.kv_heads // self.heads

    @property
    def is_ragged(self) -> bool:
        """Whether the last block of keys has slots beyond the keys."""
        return self.keys % self.key_block != 0


def cut_of(operands: Operands, machine: Machine, *, backward: bool = False) -> Cut:
    """The sizes for a call: as many heads in a block as there may be, fewer where memory is short."""
    batch, queries, heads, width = operands.query.shape
    keys, kv_heads, value_width = operands.value.shape[-3:]
    target = target_of(device_kind_of())
    counts = [n for n in range(min(HEADS, kv_heads), 0, -1) if kv_heads % n == 0]
    if "SKH" in (order_of(kv_heads, width), order_of(kv_heads, value_width)):
        counts = counts[:1]
    arrays = operands.query, operands.key, operands.value
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
        )
        for count in counts
    ]
    sized = ((shape, *sizes(shape, target, machine.block_sizes)) for shape in shapes)
    cuts = [
        Cut(
            batch,
            queries,
            keys,
            kv_heads,
            shape.groups,
            width,
            value_width,
            shape.heads,
            rows,
            key_block,
            target,
            vmem_bytes(shape, rows, key_block),
        )
        for shape, rows, key_block in sized
    ]
    return next((cut for cut in cuts if cut.vmem_bytes <= target.budget_bytes), cuts[-1])


def order_of(kv_heads: int, width: int) -> Order:
    """How keys, or values, of so many heads and such a width lie in the memory of a TPU."""
    if width % LANES:
        return "KHS"
    return "SKH" if kv_heads in (2, 4) or kv_heads % HEADS == 0 else "KSH"


def as_stored(x: jax.Array) -> jax.Array:
    """[L, B, S, K, .] with the last three in their `Order`; of float16, which Mosaic has not, the bits."""
    x = x if x.ndim == 5 else x[None]
    match order_of(*x.shape[-2:]):
        case "KHS":
            x = jnp.moveaxis(x, 2, 4)
        case "KSH":
            x = x.swapaxes(2, 3)
    return lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.float16 else x


def as_given(x: jax.Array, order: Order) -> jax.Array:
    """The inverse, of one layer: [B, S, K, .]."""
    match order:
        case "KHS":
            return jnp.moveaxis(x[0], 3, 1)
        case "KSH":
            return x[0].swapaxes(1, 2)
    return x[0]
