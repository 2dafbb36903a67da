"""The memory of a device that attention takes, in whole bytes; and the largest context that fits."""

import math
from collections.abc import Callable

from distattn.traffic import QUERY_SHARDED
from distattn.workload import Workload


def bytes_per_device(combine: str, workload: Workload, sizes: tuple[int, ...]) -> int:
    """Keys and values of all layers, and for one layer query, output, states and what is gathered.

    Weights and all other layers of the model are not in it. In training query, output and log-sum-exp of
    all layers stay too, and one layer's gradients, in float32.

    Args:
      combine: by name.
      workload: one step.
      sizes: of the mesh axes over which keys (and, as the combine needs it, queries) are sharded.
    """
    devices, w = math.prod(sizes), workload
    keys = _shard(w, devices)
    rows = -(-w.queries // devices) if combine in QUERY_SHARDED else w.queries
    each_row = w.batch * w.heads
    row_bytes = each_row * (w.head_dim + w.values) * w.dtype_bytes  # query and output
    total = key_value_bytes(w, sizes) + rows * row_bytes
    total += _exchanged(combine, w, sizes, keys, rows, w.dtype_bytes)
    if w.training:
        total += (w.layers - 1) * rows * row_bytes + w.layers * rows * each_row * 4
        # What is held of keys and values, and of the rows, is held of their gradients.
        total += keys * _key_bytes(w, 4) + rows * each_row * (w.head_dim + w.values) * 4
        total += _keys_held(combine, w, sizes, keys, 4)
    return total


def key_value_bytes(workload: Workload, sizes: tuple[int, ...], key_overhead: int = 0) -> int:
    """Keys and values of all layers on a device, and so many bytes beside each: those of scales."""
    w = workload
    each = _key_bytes(w, w.dtype_bytes) + w.batch * w.kv_heads * key_overhead
    return w.layers * _shard(w, math.prod(sizes)) * each


def largest_context(combine: str, workload: Workload, sizes: tuple[int, ...], limit: int) -> int:
    """The largest context with `bytes_per_device` of at most `limit`; 0 where not even one key fits.

    All else stays as it is, but for as many queries as keys, which grow with them.
    """

    def fits(context: int) -> bool:
        return bytes_per_device(combine, workload.with_context(context), sizes) <= limit

    return largest(fits)


def largest(fits: Callable[[int], bool]) -> int:
    """The largest number for which it holds, and 0 if not even for 1; it holds for all below that."""
    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _shard(w: Workload, devices: int) -> int:
    """Keys of a device, padded to as many on each."""
    return -(-w.context // devices)


def _key_bytes(w: Workload, itemsize: int) -> int:
    """Key and value of one position, for all sequences."""
    return w.batch * w.kv_heads * (w.head_dim + w.values) * itemsize


def _exchanged(
    combine: str, w: Workload, sizes: tuple[int, ...], keys: int, rows: int, itemsize: int
) -> int:
    """States, and what arrives from others."""
    devices = math.prod(sizes)
    state = max(4, w.dtype_bytes) * rows * w.batch * w.heads * (w.values + 2)
    if devices == 1:
        return state
    if combine in ("butterfly", "psum", "fused"):
        return 2 * state  # one's own, and one that arrives or is summed
    if combine == "all_gather":
        return (1 + devices) * state
    # Of all rows: queries and states, of which half arrive at first.
    if combine == "reduce_scatter":
        queries = devices * rows * w.batch * w.heads * w.head_dim * w.dtype_bytes
        return queries + devices * state + -(-devices * state // 2)
    held = state + _keys_held(combine, w, sizes, keys, itemsize)
    if combine.startswith("ulysses"):  # rows of some heads, beside some rows of all heads
        held += rows * w.batch * w.heads * (w.head_dim + w.values) * w.dtype_bytes
    return held


def _keys_held(combine: str, w: Workload, sizes: tuple[int, ...], keys: int, itemsize: int) -> int:
    """Keys and values of others, of one layer."""
    devices = math.prod(sizes)
    shard = keys * _key_bytes(w, itemsize)
    if devices == 1 or combine not in QUERY_SHARDED or combine == "reduce_scatter":
        return 0
    if combine == "gather_kv":
        return devices * shard
    if combine == "ring":
        return 2 * shard  # what is worked on, and what arrives
    inner = devices if combine == "ulysses" else sizes[-1]
    own = shard * (math.lcm(w.kv_heads, inner) // w.kv_heads)  # heads are repeated to divide
    if combine == "ulysses_ring":
        return 3 * own
    if combine == "ulysses_gather_kv":
        return own + own * (devices // inner)
    return own
