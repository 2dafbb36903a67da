"""What a reproducible call sums as floating-point numbers, and on which lattices it sums the rest.

All from the global shapes of the call, so that it does not depend on the devices.
"""

import dataclasses

import jax.numpy as jnp

from distattn.operands import KERNELS, Operands
from distattn.state import state_dtype
from distattn.words import Lattice, lattice

# Keys, and rows of a head, whose sums are floating-point: part of the contract.
BLOCK = 64


@dataclasses.dataclass(frozen=True)
class Units:
    """What is summed as floating-point numbers, and on which lattices the rest is."""

    keys: int  # in one block
    rows: int  # of one head, in one block
    columns: int  # the unit of the width of a product, for XLA chooses its loops by the shape
    by_keys: Lattice  # for sums over blocks of keys
    by_rows: Lattice  # over blocks of rows, and heads of a group
    by_bias: Lattice  # over all that shares a bias


def units_of(operands: Operands, implementation: str, keys: int = BLOCK) -> Units:
    """The units of a call, from the global shapes: they must not depend on the devices.

    Args:
      operands: all of a call, not of one device.
      implementation: as in `dot_product_attention`, with which the units must fit.
      keys: in one block; 1 where blocks have no fixed content, as in a cache.

    Raises:
      ValueError: implementation='dense'.
      NotImplementedError: float64; a kernel's name as implementation.
    """
    if implementation == "dense":
        raise ValueError(
            "implementation='dense' sums keys in the compiler's order, and reproducible=True in none; pass "
            "implementation=None, or reproducible=False"
        )
    if implementation in KERNELS:
        raise NotImplementedError(
            f"implementation={implementation!r} with reproducible=True is not built, its sums not being of "
            "integers; pass implementation=None, or reproducible=False"
        )
    arrays = operands.query, operands.key, operands.value
    if state_dtype(*arrays) != jnp.float32:
        raise NotImplementedError(
            "reproducible=True is not built for float64, and query, key and value are "
            f"{', '.join(str(x.dtype) for x in arrays)}; cast them to float32, or pass reproducible=False"
        )
    batch, queries, heads, _ = operands.query.shape
    length, kv_heads = operands.key.shape[-3:-1]
    groups = heads // kv_heads
    rows = _row_block(queries)
    blocks, row_blocks = max(-(-length // keys), 1), max(-(-queries // rows), 1)
    shared = 1
    if operands.bias is not None:
        counts = (batch, heads, row_blocks, blocks)
        for size, count in zip(operands.bias.shape, counts, strict=True):
            shared *= count if size == 1 else 1
    return Units(
        keys=keys,
        rows=rows,
        columns=max(min(groups * _power_of_two(queries), BLOCK), 2),
        by_keys=lattice(blocks),
        by_rows=lattice(groups * row_blocks),
        by_bias=lattice(max(shared, 1)),
    )


def _row_block(queries: int) -> int:
    """BLOCK, or less where eight devices would have fewer rows each; 8 at least, or all of them."""
    return min(BLOCK, max(_power_of_two(queries // 8 + 1) // 2, 8), _power_of_two(queries))


def _power_of_two(x: int) -> int:
    """The least power of two that is not below x."""
    return 1 << max(x - 1, 0).bit_length()
