"""Block sizes of the GPU kernels: one table, by what a multiprocessor of each target has.

The reasoning. One program has a block of rows, those of all query heads of a key head, and steps over the
blocks of keys that it visits, which Triton brings into shared memory ahead of their use.

* Powers of two, at least 16: Triton's arrays, and the tensor cores' tiles.
* Rows. A byte of bfloat16 keys and values is loaded once for each block of rows, and serves 1 flop for each
  row of it; most of the loads hit the L2 cache, which gives about three times what the memory does, so 128
  rows hide them on an H100 (989e12 flops/s, 3.35e12 bytes/s: 295 flops a byte from memory, 100 from L2).
* Keys. 64 of them a step; 128 where heads are narrow and rows few, so that a step has as much to load.
* Registers. The sums of a block of rows stay in them, and what a step computes (logits, weights, their
  gradients): at most `MOST_NUMBERS` of the 255 that a thread has, the rest for addresses and operands, of
  which those of float32 are as large again and converted on their way. Eight warps hold it, four where it
  is little. With more, the compiler for the H100 spills some to memory.
* Shared memory. Keys and values of a step, as often as there are stages, and what stays: queries.
* Exact products are unrolled into one instruction for each number: blocks are small, or it takes minutes
  to compile them.
* Splits. Where there are fewer programs than multiprocessors, several share the keys of a block of rows,
  until each multiprocessor has two, and their states are merged.

Nothing of this has been timed: there was no GPU.
"""

import dataclasses

from distattn.kernels.tuned import chip_name

KIB = 2**10
SMALLEST = 16
MOST_NUMBERS = {2: 168, 4: 64}  # by the bytes of an operand


@dataclasses.dataclass(frozen=True)
class Target:
    """A row of the table."""

    name: str  # of the chip, as in `distattn.chips`
    cores: int  # streaming multiprocessors
    shared_bytes: int  # that one program may have


# CUDA C++ Programming Guide, table of technical specifications: 163 KiB at compute capability 8.0, 227 at
# 9.0 and 10.0, and 99 at 8.6 and 8.9, the least of those that Triton has.
OTHER = Target("other", 64, 99 * KIB)
TARGETS = (
    OTHER,
    Target("a100", 108, 163 * KIB),
    Target("h100", 132, 227 * KIB),
    Target("h200", 132, 227 * KIB),
    Target("b200", 148, 227 * KIB),
)
# Of the table of which block visits which, in the memory of the device: 4 MiB.
TABLE_ENTRIES = 2**20


def target_of(device_kind: str) -> Target:
    """The row for a device; of one that is not known, the one with least memory."""
    return next((x for x in TARGETS if x.name == chip_name(device_kind)), OTHER)


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of one call, what the sizes depend on."""

    rows: int  # T * G
    groups: int  # G
    keys: int  # S
    width: int  # H
    value_width: int  # V
    itemsize: int  # of the operands of products
    backward: bool = False
    exact: bool = False  # products of float32, for which there are no tensor cores


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a block, and how a program runs."""

    rows: int
    keys: int
    warps: int  # of 32 threads
    stages: int  # that a step's loads are ahead, and one


def sizes(
    shape: Shape,
    target: Target,
    wanted: tuple[int, int] | None = None,
    measured: tuple[int, int] | None = None,
) -> Sizes:
    """Rows and keys of a block, powers of two.

    Args:
      shape: of the call.
      target: what it runs on.
      wanted: queries and keys; they are rounded up. None: as measured, or as the table says.
      measured: rows and keys that were fastest for such calls; they are halved where there is no room.
    """
    rows = min(power_of_two(shape.rows), 64 if shape.backward else 128)
    narrow = max(shape.width, shape.value_width) <= 64 and rows <= 32 and not shape.backward
    keys = 128 if narrow else 64
    if shape.exact:
        rows, keys = min(rows, 32), 32
    if measured is not None:
        rows, keys = (
            min(power_of_two(measured[0]), power_of_two(shape.rows)),
            power_of_two(measured[1]),
        )
    if wanted is not None:
        rows = min(power_of_two(wanted[0] * shape.groups), power_of_two(shape.rows))
        keys = power_of_two(wanted[1])
    keys = min(keys, power_of_two(shape.keys))
    stages = 3 if rows * keys <= 64 * 64 and not shape.backward else 2
    if wanted is not None:
        return _sizes(shape, rows, keys, stages)
    while True:
        size = _sizes(shape, rows, keys, stages)
        if fits(shape, size, target):
            return size
        if stages > 2:
            stages -= 1
        elif keys > SMALLEST and (keys >= rows or rows == SMALLEST):
            keys //= 2
        elif rows > SMALLEST:
            rows //= 2
        else:
            return size


def fits(shape: Shape, size: Sizes, target: Target) -> bool:
    """Whether a program has the registers and the shared memory."""
    of_a_thread = _numbers(shape, size.rows, size.keys) // (32 * size.warps)
    held = shared_bytes(shape, size)
    return of_a_thread <= MOST_NUMBERS[shape.itemsize] and held <= target.shared_bytes


def _numbers(shape: Shape, rows: int, keys: int) -> int:
    """Of 32 bits that the threads of a program hold, about."""
    width, value_width = padded(shape.width), padded(shape.value_width)
    if shape.backward:
        return max(rows * width, keys * (width + value_width)) + 3 * rows * keys
    return rows * value_width + 2 * rows * keys


def shared_bytes(shape: Shape, size: Sizes) -> int:
    """What a program holds in shared memory: more than the compiler for the H100 takes."""
    both = padded(shape.width) + padded(shape.value_width)
    of_vectors = 16 * (size.rows + size.keys)
    if not shape.backward:
        own = size.rows * padded(shape.width)
        return (own + size.stages * size.keys * both) * shape.itemsize + of_vectors
    most, least = max(size.rows, size.keys), min(size.rows, size.keys)
    # Weights, and their gradients, on their way to the tensor cores.
    on_their_way = 4 * size.rows * size.keys
    return (least + size.stages * most) * both * shape.itemsize + on_their_way + of_vectors


def power_of_two(x: int) -> int:
    """The next one, at least that of the tensor cores."""
    return max(1 << (x - 1).bit_length(), SMALLEST)


def padded(width: int) -> int:
    """What the pieces of a width are together."""
    return -(-width // SMALLEST) * SMALLEST


def _sizes(shape: Shape, rows: int, keys: int, stages: int) -> Sizes:
    little = not shape.exact and _numbers(shape, rows, keys) <= 4 * 32 * 64
    return Sizes(rows, keys, 4 if little else 8, stages)
