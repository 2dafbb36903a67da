"""Schedules of messages between devices: plain data that can be read, checked, hashed and drawn.

A schedule says nothing about states or arrays. To check one, and to find what a receiver does with each
message, it is enough to follow *shards*: device r starts with shard r, its own partial result, and every
device must end with every shard exactly once.
"""

import dataclasses
import functools
import math
import operator
import reprlib
from typing import Any

Pairs = tuple[tuple[int, int], ...]


@dataclasses.dataclass(frozen=True)
class Step:
    """One round of a `Schedule` as each device sees it; the tuples of bools are indexed by rank."""

    pairs: Pairs  # (source, destination), as `ppermute` takes them
    receives: tuple[bool, ...]  # a message arrives; other devices keep their state
    replaces: tuple[bool, ...]  # it holds all of the receiver's shards: taken instead of merged
    source_first: tuple[bool, ...]  # the message is the first operand of the merge


@dataclasses.dataclass(frozen=True)
class Schedule:
    """An all-reduce: after the last round every device holds the merge of all shards.

    In a round each device sends at most one message and receives at most one. A message is the state of its
    source at the start of the round. The receiver merges a message that has no shard in common with its own
    state, and takes a message that holds all of its shards instead of its own state. Anything else would
    count a shard twice.

    The operand with the lowest shard comes first in each merge, and all devices must end with the same tree
    of merges, so all results are bitwise equal: floating-point merges do not associate.

    `print(schedule)` draws it.

    Args:
      size: number of devices.
      rounds: rounds[r] = ((source, destination), ...).

    Raises:
      ValueError: a message that cannot be sent or merged, a device left without a shard, or devices whose
        trees differ.

    Examples:
      >>> import distattn
      >>> print(distattn.Schedule(size=3, rounds=(((2, 0),), ((0, 1), (1, 0)), ((0, 2),))))
      rank      0   1   2
      round 1  +2   .   .
      round 2  +1  0+   .
      round 3   .   .  =0

    Reference: Thakur, Rabenseifner & Gropp, IJHPCA 19(1), 2005, section 4.
    """

    size: int
    rounds: tuple[Pairs, ...]

    def __post_init__(self) -> None:
        """Check the rounds by working out the steps: a schedule that exists is one that works."""
        object.__setattr__(self, "size", _device_count("size", self.size))
        rounds = _as_pairs(self.rounds, "((source, destination), ...)")
        # In a round messages have no order; sorted, so that equal schedules compare equal.
        object.__setattr__(self, "rounds", tuple(tuple(sorted(pairs)) for pairs in rounds))
        _ = self.steps

    @functools.cached_property
    def steps(self) -> tuple[Step, ...]:
        """The actions of each device in each round."""
        trees = _Trees(self.size)
        held = list(range(self.size))  # the tree that each device holds
        steps = []
        for index, pairs in enumerate(self.rounds):
            after = held.copy()
            sends, receives, replaces, source_first = ([False] * self.size for _ in range(4))
            for source, rank in pairs:
                where = f"rounds[{index}] sends {source} -> {rank}"
                if source == rank or not (0 <= source < self.size and 0 <= rank < self.size):
                    raise ValueError(
                        f"{where}; it needs two different ranks in 0..{self.size - 1}: count ranks "
                        "from 0, and leave out what a device would send to itself"
                    )
                if sends[source] or receives[rank]:
                    raise ValueError(
                        f"{where}, but rank {source if sends[source] else rank} has a message that "
                        "way already; a round has room for one from and one to each device: put "
                        "the second in another round"
                    )
                sends[source] = receives[rank] = True
                after[rank], replaces[rank], twice = trees.receive(held[rank], held[source])
                if twice:
                    raise ValueError(
                        f"{where}, and both hold {_shards_text(twice)}, which would count twice; a "
                        "message needs to hold none of the receiver's shards, or all: send it "
                        "before they have met, or leave it out"
                    )
                source_first[rank] = not replaces[rank] and trees.precedes(held[source], held[rank])
            held = after
            steps.append(Step(pairs, tuple(receives), tuple(replaces), tuple(source_first)))
        _check_end(self.size, held, trees)
        return tuple(steps)

    def __str__(self) -> str:
        """Draw a column per device: `+4` merges what 4 sends, `4+` with 4's first, `=4` takes it."""
        rows = [["rank", *map(str, range(self.size))]]
        for number, step in enumerate(self.steps, 1):
            row = [f"round {number}"] + ["."] * self.size
            for source, rank in step.pairs:
                first, takes = step.source_first[rank], step.replaces[rank]
                row[rank + 1] = f"={source}" if takes else f"{source}+" if first else f"+{source}"
            rows.append(row)
        margin, width = max(len(row[0]) for row in rows), len(str(self.size - 1)) + 3
        lines = (row[0].ljust(margin) + "".join(x.rjust(width) for x in row[1:]) for row in rows)
        return "\n".join(lines)


def butterfly(size: int) -> Schedule:
    """Return recursive doubling: round i exchanges with the rank whose bit i differs.

    >>> print(butterfly(8))
    rank      0   1   2   3   4   5   6   7
    round 1  +1  0+  +3  2+  +5  4+  +7  6+
    round 2  +2  +3  0+  1+  +6  +7  4+  5+
    round 3  +4  +5  +6  +7  0+  1+  2+  3+

    If the size is not a power of two, with k = floor(log2 size), the size - 2^k extra ranks are first
    folded into the first ones, and take the result from them at the end:

    >>> print(butterfly(6))
    rank      0   1   2   3   4   5
    round 1  +4  +5   .   .   .   .
    round 2  +1  0+  +3  2+   .   .
    round 3  +2  +3  0+  1+   .   .
    round 4   .   .   .   .  =0  =1

    There are log2 size rounds for a power of two, otherwise k + 2.

    Reference: Thakur, Rabenseifner & Gropp, IJHPCA 19(1), 2005, section 4 (all-reduce).
    """
    return hierarchical((_device_count("size", size),))


def hierarchical(sizes: tuple[int, ...]) -> Schedule:
    """Return butterflies over one mesh axis after another, the last and fastest first.

    Args:
      sizes: devices on each axis, slowest axis first; ranks are row-major, the last axis fastest.

    Returns:
      Schedule of prod(sizes) devices. Messages travel along one axis in each round.
    """
    sizes = tuple(_device_count(f"sizes[{axis}]", size) for axis, size in enumerate(sizes))
    total, stride = math.prod(sizes), 1  # stride: between neighbors on the axis
    rounds: list[Pairs] = []
    for size in reversed(sizes):
        firsts = [first for first in range(total) if first // stride % size == 0]
        for pairs in _butterfly_rounds(size):
            rounds.append(tuple((i + s * stride, i + d * stride) for i in firsts for s, d in pairs))
        stride *= size
    return Schedule(total, tuple(rounds))


def butterfly_round_count(size: int) -> int:
    """Return len(butterfly(size).rounds) without building it."""
    doublings = size.bit_length() - 1
    return doublings if size == 1 << doublings else doublings + 2


@dataclasses.dataclass(frozen=True)
class ScatterSchedule:
    """A reduce-scatter: every device ends with its own chunk, merged from all shards.

    A shard is cut into `size` chunks, one owed to each rank. Rank r keeps them by *offset*: offset j is the
    chunk owed to rank (r + j) % size. In a round (shift, count) every rank sends its last `count` chunks,
    offsets [shift, shift + count), to rank (r + shift) % size, which merges them into its offsets [0,
    count); `shift` chunks are left.

    A chunk is moved or merged and never copied, so no shard counts twice. If each rank ends with offset 0
    alone, every chunk is where it is owed.

    Args:
      size: number of devices.
      rounds: ((shift, count), ...).

    Raises:
      ValueError: a round that does not send the last chunks held, or chunks left at the end.

    Examples:
      >>> import distattn
      >>> distattn.ScatterSchedule(size=4, rounds=((2, 2), (1, 1))).rounds
      ((2, 2), (1, 1))

    Reference: Bruck et al., IEEE TPDS 8(11), 1997: its all-gather backwards is one, see `halving`.
    """

    size: int
    rounds: Pairs

    def __post_init__(self) -> None:
        """Check the rounds by counting the chunks that each rank still holds."""
        object.__setattr__(self, "size", _device_count("size", self.size))
        object.__setattr__(self, "rounds", *_as_pairs([self.rounds], "(shift, count)"))
        held, valid = self.size, True
        for shift, count in self.rounds:
            valid = valid and shift + count == held and 1 <= count <= shift
            held = shift
        if not valid or held != 1:
            raise ValueError(
                f"rounds is {reprlib.repr(self.rounds)} for size {self.size}; each round needs "
                "1 <= count <= shift and shift + count = the chunks held, which are size at first "
                f"and shift after each round, and must be 1 at last: use halving({self.size})"
            )


def halving(size: int) -> ScatterSchedule:
    """Return recursive halving for any size: Bruck's all-gather run backwards.

    >>> halving(6).rounds
    ((4, 2), (2, 2), (1, 1))

    It has ceil(log2 size) rounds, and each device sends size - 1 chunks: neither can be less.

    Reference: Bruck et al., IEEE TPDS 8(11), 1997 (the all-gather).
    """
    doublings = (_device_count("size", size) - 1).bit_length()
    shifts = [1 << i for i in reversed(range(doublings))]
    return ScatterSchedule(size, tuple((shift, min(shift, size - shift)) for shift in shifts))


def _butterfly_rounds(size: int) -> list[list[tuple[int, int]]]:
    bits = size.bit_length() - 1
    extra = size - (1 << bits)
    fold = [[(rank + (1 << bits), rank) for rank in range(extra)]] if extra else []
    exchange = [[(rank ^ 1 << bit, rank) for rank in range(1 << bits)] for bit in range(bits)]
    return fold + exchange + [[(rank, source) for source, rank in pairs] for pairs in fold]


class _Trees:
    """The merge trees that occur, each stored once, as numbers: tree r < size is shard r."""

    def __init__(self, size: int):
        self._lowest = list(range(size))
        self._shards = [1] * size  # as bits, the lowest shard at bit 0: short among neighbors
        self._known: dict[tuple[int, int], int] = {}  # (first operand, second) -> tree

    def precedes(self, a: int, b: int) -> bool:
        """Return whether a is the first operand of a merge with b: it has the lowest shard of both."""
        return self._lowest[a] < self._lowest[b]

    def shards(self, tree: int) -> int:
        """Return the shards in a tree, as bits."""
        return self._shards[tree] << self._lowest[tree]

    def receive(self, own: int, message: int) -> tuple[int, bool, int]:
        """Return the tree after a message, whether it replaced the own tree, and shards counted twice."""
        inputs = (own, message) if self.precedes(own, message) else (message, own)
        if inputs not in self._known:
            a, b = self.shards(own), self.shards(message)
            if a & b:
                return message, True, 0 if a & b == a else a & b
            self._known[inputs] = len(self._shards)
            self._lowest.append(self._lowest[inputs[0]])
            self._shards.append((a | b) >> self._lowest[-1])
        return self._known[inputs], False, 0


def _shards_text(bits: int) -> str:
    """Return 'shard 3', or 'shards 0, 2, 4', with at most four of them."""
    shards = [str(shard) for shard in range(bits.bit_length()) if bits >> shard & 1]
    more = ", ..." if len(shards) > 4 else ""
    return ("shard " if len(shards) == 1 else "shards ") + ", ".join(shards[:4]) + more


def _device_count(name: str, size: Any) -> int:
    if hasattr(size, "__index__") and size >= 1:
        return operator.index(size)
    raise ValueError(
        f"{name} is {size!r}; it must be a whole number, 1 or more: pass the size of the mesh axis"
    )


def _as_pairs(rounds: Any, form: str) -> tuple[Pairs, ...]:
    """Return tuples of ints for any sequences, so that a schedule can be hashed."""
    try:
        return tuple(tuple((operator.index(a), operator.index(b)) for a, b in x) for x in rounds)
    except (TypeError, ValueError):
        raise ValueError(
            f"rounds is {reprlib.repr(rounds)}; each round must be {form}, in whole numbers: "
            "compare butterfly(6).rounds and halving(6).rounds"
        ) from None


def _check_end(size: int, held: list[int], trees: _Trees) -> None:
    for rank, tree in enumerate(held):
        if rank > 0 and tree == held[0]:
            continue
        missing = (1 << size) - 1 & ~trees.shards(tree)
        if missing:
            raise ValueError(
                f"rounds leave rank {rank} without {_shards_text(missing)}; every device needs all "
                f"{size}: add a round that brings it, as butterfly({size}) does"
            )
        if tree != held[0]:
            raise ValueError(
                f"rounds merge in another order on rank {rank} than on rank 0, so their last bits "
                "would differ; all devices need one tree of merges: exchange both ways in a round, "
                f"or merge on one device and send the result on, or use butterfly({size})"
            )
