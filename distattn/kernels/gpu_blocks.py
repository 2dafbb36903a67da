"""Block sizes of the GPU kernels: one table, by what a multiprocessor of each target has.

The reasoning. One program has a block of rows, those of all query heads of a key head, and steps over the
blocks of keys that it visits, which Triton brings into shared memory ahead of their use.

* Powers of two, at least 16: Triton's arrays, and the tensor cores' tiles.
* Rows. A byte of bfloat16 keys and values is loaded once for each block of rows, and serves 1 flop for each
  row of it; most of the loads hit the L2 cache, which gives about three times what the memory does, so 128
  rows hide them on an H100 (989e12 flops/s, 3.35e12 bytes/s: 295 flops a byte from memory, 100 from L2).
* Keys. 64 of them a step; 128 where heads are narrow, so that a step has as much to do.
* Registers. The sums of a block of rows stay in them, and what a step computes (logits, weights, their
  gradients): at most `MOST_NUMBERS` of the 255 that a thread has, the rest for addresses and operands.
* Shared memory. Keys and values of a step, as often as there are stages, and what stays: queries.
* Splits. Where there are fewer programs than multiprocessors, several share the keys of a block of rows,
  until each multiprocessor has two, and their states are merged.

Nothing of this has been timed: there was no GPU.
"""

import dataclasses

from distattn.chips import chip_of

KIB = 2**10
SMALLEST = 16
MOST_NUMBERS = 168


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
    chip = chip_of(device_kind)
    return next((x for x in TARGETS if chip is not None and x.name == chip.name), OTHER)


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


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of a block, and how a program runs."""

    rows: int
    keys: int
    warps: int  # of 32 threads
    stages: int  # that a step's loads are ahead, and one


def sizes(shape: Shape, target: Target, wanted: tuple[int, int] | None = None) -> Sizes:
    """Rows and keys of a block, powers of two.

    Args:
      shape: of the call.
      target: what it runs on.
      wanted: queries and keys; they are rounded up. None: as the table says.
    """
    rows = min(power_of_two(shape.rows), 64 if shape.backward else 128)
    keys = 128 if max(shape.width, shape.value_width) <= 64 and not shape.backward else 64
    if wanted is not None:
        rows = min(power_of_two(wanted[0] * shape.groups), power_of_two(shape.rows))
        keys = power_of_two(wanted[1])
    keys = min(keys, power_of_two(shape.keys))
    stages = 3 if rows * keys <= 64 * 64 and not shape.backward else 2
    size = Sizes(rows, keys, _warps(rows), stages)
    if wanted is not None:
        return size
    while not fits(shape, size, target):
        if size.stages > 2:
            size = dataclasses.replace(size, stages=size.stages - 1)
        elif size.keys > 32 or size.rows == size.keys > SMALLEST:
            size = dataclasses.replace(size, keys=size.keys // 2)
        elif size.rows > SMALLEST:
            size = dataclasses.replace(size, rows=size.rows // 2, warps=_warps(size.rows // 2))
        else:
            break
    return size


def fits(shape: Shape, size: Sizes, target: Target) -> bool:
    """Whether a program has the registers and the shared memory."""
    return numbers(shape, size) <= MOST_NUMBERS and shared_bytes(shape, size) <= target.shared_bytes


def numbers(shape: Shape, size: Sizes) -> int:
    """Of 32 bits that a thread holds, about."""
    width, value_width = padded(shape.width), padded(shape.value_width)
    if shape.backward:
        sums = max(size.rows * width, size.keys * (width + value_width))
    else:
        sums = size.rows * value_width
    return (sums + (3 if shape.backward else 2) * size.rows * size.keys) // (32 * size.warps)


def shared_bytes(shape: Shape, size: Sizes) -> int:
    """What a program holds in shared memory, about."""
    both = padded(shape.width) + padded(shape.value_width)
    if not shape.backward:
        own = size.rows * padded(shape.width)
        return (own + size.stages * size.keys * both) * shape.itemsize
    most, least = max(size.rows, size.keys), min(size.rows, size.keys)
    return (least + size.stages * most) * both * shape.itemsize


def power_of_two(x: int) -> int:
    """The next one, at least that of the tensor cores."""
    return max(1 << (x - 1).bit_length(), SMALLEST)


def padded(width: int) -> int:
    """What the pieces of a width are together."""
    return -(-width // SMALLEST) * SMALLEST


def _warps(rows: int) -> int:
    return 8 if rows > 32 else 4
