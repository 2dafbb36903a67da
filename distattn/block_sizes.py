"""How large one block of logits is, by the shapes of a device's part."""

# XLA:CPU makes a transposed copy of the keys and values for a product with a batch of heads. Few queries
# are spared that by one product for each head; or, with so few heads, by one product in which the heads
# are folded into the contraction: [s, K*H] @ [K*H, K*G*q], the query block-diagonal, K times the flops.
DIAGONAL_HEADS = 4
# Logits of one block, in elements: 1 MiB of float32 is what the second-level cache of a CPU core holds.
# Where positions decide, smaller blocks let more of them be skipped.
BLOCK_ELEMENTS = 2**18
BLOCK_ELEMENTS_SMALLER = 2**17
# Up to so many query heads times queries, the flat form of a block costs less than a transposed copy of
# the keys and values: with a product for each head, and with a block-diagonal one (`DIAGONAL_HEADS`).
FLAT_COLUMNS = 1024
FLAT_COLUMNS_DIAGONAL = 48


def is_flat(heads: int, kv_heads: int, queries: int) -> bool:
    """Whether the flat form of a block costs less, on a CPU."""
    columns = FLAT_COLUMNS if kv_heads > DIAGONAL_HEADS else FLAT_COLUMNS_DIAGONAL
    return heads * queries <= columns


def block_sizes(
    queries: int,
    heads: tuple[int, int],
    width: int,
    *,
    flat: bool,
    one_by_one: bool,
    smaller: bool,
) -> tuple[int, int]:
    """Queries and keys of a block, before both are made `even`.

    Args:
      queries: T.
      heads: of the query, of key and value.
      width: the head dimension.
      flat: the flat form, as `is_flat` says.
      one_by_one: one row of the batch and one key/value head at a time.
      smaller: the backward pass, or positions that are given.
    """
    query_heads, kv_heads = heads
    groups = query_heads // kv_heads
    elements = BLOCK_ELEMENTS_SMALLER if smaller else BLOCK_ELEMENTS
    query_block = min(queries, max(512 // groups, 16) if one_by_one else 256)
    if flat:
        return query_block, min(max(2**19 // max(kv_heads * width, 1), 256), 2048)
    return query_block, min(max(elements // max(groups * query_block, 1), 256), 1024)


def even(length: int, target: int) -> int:
    """The block size nearest below the target that divides the length, if one is half of it or more."""
    target = max(min(length, target), 1)
    even = (size for size in range(target, target // 2, -1) if length % size == 0)
    return next(even, target)
