"""The seconds of attention itself on one device: what it reads from memory, or what it multiplies."""

from distattn.chips import Chip
from distattn.cost import Shape

# FlashAttention-2, arXiv 2307.08691, section 4.1: the backward pass has five products for two, so 2.5
# times the operations.
BACKWARD = 2.5


def local_s(
    shape: Shape,
    devices: int,
    chip: Chip,
    *,
    query_sharded: bool = False,
    processes: int = 1,
    training: bool = False,
) -> float:
    """Seconds of a call's products and reads on each device: the longer of the two.

    Keys and values are read once, which holds for one query and, in blocks, nearly so for many; each
    device multiplies its equal part of the pairs, which a causal mask halves where T = S. Memory at its
    full bandwidth, products at the rate that attention attains. The backward pass multiplies 2.5 times as
    much, and reads and writes twice.

    Args:
      shape: sizes over all of these devices.
      devices: over which keys, or keys and queries, are sharded.
      chip: what they are.
      query_sharded: whether each reads its part of the queries, or all.
      processes: of the job; the devices of one process on a CPU share its cores.
      training: the backward pass too.
    """
    rows_bytes = (shape.query_bytes + shape.out_bytes) / (devices if query_sharded else 1)
    read_s = (shape.key_value_bytes / devices + rows_bytes) * chip.devices / chip.hbm_bytes_per_s
    multiply_s = shape.flops / devices / chip.attained_flops_per_s
    seconds = max(read_s, multiply_s)
    if training:
        seconds += max(2 * read_s, BACKWARD * multiply_s)
    return seconds * devices if chip.shared and processes == 1 else seconds
