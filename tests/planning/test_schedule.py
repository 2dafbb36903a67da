"""Schedules are checked as data: run here on tuples, without an array or a device."""

import collections
import itertools
import math
import pickle
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distattn.planning.schedule import (
    ScatterSchedule,
    Schedule,
    butterfly,
    butterfly_round_count,
    halving,
    hierarchical,
)

SIZES = range(1, 65)
MESHES = [(a, b) for a in range(1, 37) for b in range(1, 37) if a * b <= 36]


def run(schedule):
    """What a runner does with the steps, on trees of shards; None where no message arrives."""
    states = list(range(schedule.size))
    for step in schedule.steps:
        arrived = [None] * schedule.size
        for source, rank in step.pairs:
            arrived[rank] = states[source]
        for rank, message in enumerate(arrived):
            own = states[rank]
            merged = (message, own) if step.source_first[rank] else (own, message)
            taken = message if step.replaces[rank] else merged
            states[rank] = taken if step.receives[rank] else own
    return states


def shards(tree):
    """The leaves of a tree, in order, as often as they occur."""
    return [tree] if isinstance(tree, int) else shards(tree[0]) + shards(tree[1])


def merges(tree):
    return [] if isinstance(tree, int) else [tree, *merges(tree[0]), *merges(tree[1])]


def follow(size, rounds):
    """By the definition: the tree of each device, or None where the rounds are no all-reduce."""
    states = list(range(size))
    for pairs in rounds:
        before = list(states)
        for source, rank in pairs:
            own, message = set(shards(before[rank])), set(shards(before[source]))
            if not own & message:
                states[rank] = tuple(
                    sorted((before[rank], before[source]), key=lambda t: min(shards(t)))
                )
            elif own <= message:
                states[rank] = before[source]
            else:
                return None
    complete = all(sorted(shards(tree)) == list(range(size)) for tree in states)
    return states if complete and len(set(map(repr, states))) == 1 else None


def assert_all_reduce(schedule):
    states = run(schedule)
    for state in states:
        assert sorted(shards(state)) == list(range(schedule.size))
        assert state == states[0]  # one tree, so replicas are equal bit for bit
    for first, second in merges(states[0]):
        assert min(shards(first)) < min(shards(second))


@pytest.mark.parametrize("size", SIZES)
def test_butterfly_brings_every_shard_to_every_device_once(size):
    assert_all_reduce(butterfly(size))


@pytest.mark.parametrize("size", SIZES)
def test_butterfly_has_a_round_a_doubling_and_two_to_fold_and_unfold(size):
    doublings = math.floor(math.log2(size))
    expected = doublings if size == 2**doublings else doublings + 2
    assert len(butterfly(size).rounds) == butterfly_round_count(size) == expected


@pytest.mark.parametrize("sizes", [*MESHES, (2, 3, 4), (4, 1, 2, 3)], ids=str)
def test_hierarchical_brings_every_shard_to_every_device_once(sizes):
    schedule = hierarchical(sizes)
    assert schedule.size == math.prod(sizes)
    assert len(schedule.rounds) == sum(butterfly_round_count(size) for size in sizes)
    assert_all_reduce(schedule)


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_hierarchical_stays_within_the_fast_axis_first(sizes):
    slow, fast = sizes
    rounds = hierarchical(sizes).rounds
    inner = butterfly_round_count(fast)
    for index, (source, rank) in ((i, pair) for i, pairs in enumerate(rounds) for pair in pairs):
        same_row, same_column = source // fast == rank // fast, source % fast == rank % fast
        assert (same_row, same_column) == (index < inner, index >= inner)


def test_hierarchical_over_one_axis_is_a_butterfly():
    assert hierarchical((6,)) == hierarchical((1, 6, 1)) == butterfly(6)
    assert hierarchical((2, 4)) == hierarchical((2, 2, 2)) == butterfly(8)
    assert hierarchical(()) == butterfly(1) == Schedule(1, ())


@pytest.mark.parametrize("size", [4095, 4096])
def test_schedules_of_thousands_of_devices_are_checked_whole(size):
    schedule = butterfly(size)
    assert len(schedule.steps) == len(schedule.rounds) == butterfly_round_count(size)
    held = [1] * size
    for step in schedule.steps:
        before = list(held)
        for source, rank in step.pairs:
            held[rank] = before[source] + (0 if step.replaces[rank] else before[rank])
    assert held == [size] * size


def test_picture_of_six_devices():
    assert str(butterfly(6)).splitlines() == [
        "rank      0   1   2   3   4   5",
        "round 1  +4  +5   .   .   .   .",
        "round 2  +1  0+  +3  2+   .   .",
        "round 3  +2  +3  0+  1+   .   .",
        "round 4   .   .   .   .  =0  =1",
    ]


def test_picture_of_two_hosts_of_three():
    assert str(hierarchical((2, 3))).splitlines() == [
        "rank      0   1   2   3   4   5",
        "round 1  +2   .   .  +5   .   .",
        "round 2  +1  0+   .  +4  3+   .",
        "round 3   .   .  =0   .   .  =3",
        "round 4  +3  +4  +5  0+  1+  2+",
    ]


def test_picture_stays_in_columns_with_wide_ranks():
    lines = str(butterfly(12)).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert lines[1].startswith("round 1   +8   +9  +10  +11    .")


@pytest.mark.parametrize("size", [1, 2, 6, 8])
def test_steps_say_what_happens_on_each_rank(size):
    for step, pairs in zip(butterfly(size).steps, butterfly(size).rounds, strict=True):
        assert step.pairs == pairs
        assert {rank for rank in range(size) if step.receives[rank]} == {rank for _, rank in pairs}
        for received, replaced, first in zip(
            step.receives, step.replaces, step.source_first, strict=True
        ):
            assert received or not (replaced or first)
            assert not (replaced and first)


def test_a_reduction_and_a_broadcast_are_an_all_reduce():
    chain = [[(rank + 1, rank)] for rank in reversed(range(4))]
    schedule = Schedule(5, (*chain, [(0, 3)], [(0, 1), (3, 2)], [(2, 4)]))
    assert run(schedule) == [(0, (1, (2, (3, 4))))] * 5


def test_a_message_may_replace_a_state_of_the_same_shards():
    assert run(Schedule(2, [[(0, 1), (1, 0)], [(0, 1)]])) == [(0, 1)] * 2


@given(st.integers(1, 12).flatmap(lambda size: st.permutations(range(size))))
def test_devices_may_be_renumbered(order):
    rounds = butterfly(len(order)).rounds
    renumbered = [[(order[source], order[rank]) for source, rank in pairs] for pairs in rounds]
    assert_all_reduce(Schedule(len(order), renumbered))


def possible_rounds(size):
    """All sets of messages with at most one from and one to each device."""
    for targets in itertools.product([None, *range(size)], repeat=size):
        used = [rank for rank in targets if rank is not None]
        if len(set(used)) == len(used) and all(s != d for s, d in enumerate(targets)):
            yield tuple((s, d) for s, d in enumerate(targets) if d is not None)


@pytest.mark.parametrize(("size", "count"), [(2, 4), (3, 3), (4, 2)])
def test_exactly_the_all_reduces_are_accepted(size, count):
    accepted = 0
    for rounds in itertools.product(possible_rounds(size), repeat=count):
        expected = follow(size, rounds)
        if expected is None:
            with pytest.raises(ValueError, match="rounds"):
                Schedule(size, rounds)
        else:
            assert run(Schedule(size, rounds)) == expected
            accepted += 1
    assert accepted > 0


def test_schedules_are_values():
    lists = Schedule(np.int64(2), [[[np.int32(0), np.int32(1)], (1, 0)]])
    assert lists == butterfly(2) == pickle.loads(pickle.dumps(lists))
    assert hash(lists) == hash(butterfly(2))
    assert lists.rounds == (((0, 1), (1, 0)),)
    assert type(lists.size) is type(lists.rounds[0][0][0]) is int
    assert hash(halving(6)) == hash(ScatterSchedule(6, [[4, 2], [2, 2], [1, 1]]))


def dissemination(size):
    """Bruck's exchange, which is right for gathering and wrong for sums."""
    shifts = [2**i for i in range(math.ceil(math.log2(size)))]
    return [[(rank, (rank + shift) % size) for rank in range(size)] for shift in shifts]


@pytest.mark.parametrize(
    ("size", "rounds", "got", "remedy"),
    [
        (0, (), "size is 0;", "pass the size of the mesh axis"),
        (2.0, (), "size is 2.0;", "must be a whole number"),
        (2, None, "rounds is None;", "compare butterfly(6).rounds"),
        (2, [(0, 1)], "rounds is [(0, 1)];", "each round must be ((source, destination), ...)"),
        (2, [[(0, 1.5)]], "rounds is [[(0, 1.5)]];", "in whole numbers"),
        (2, [[(0, 1, 0)]], "rounds is [[(0, 1, 0)]];", "each round must be"),
        (2, [[(0, 2)]], "rounds[0] sends 0 -> 2;", "different ranks in 0..1: count ranks from 0"),
        (2, [[(-1, 0)]], "rounds[0] sends -1 -> 0;", "count ranks from 0"),
        (2, [[(1, 1)]], "rounds[0] sends 1 -> 1;", "leave out what a device would send to itself"),
        (3, [[(0, 1), (0, 2)]], "sends 0 -> 2, but rank 0 has", "put the second in another round"),
        (3, [[(0, 2), (1, 2)]], "sends 1 -> 2, but rank 2 has", "put the second in another round"),
        (
            3,
            [[(0, 1)], [(1, 0)], [(2, 1)], [(1, 0)], [(0, 1)]],
            "rank 2 without shards 0, 1",
            "add",
        ),
        (2, [[(0, 1)]], "leave rank 0 without shard 1;", "as butterfly(2) does"),
        (9, (), "leave rank 0 without shards 1, 2, 3, 4, ...;", "every device needs all 9"),
        (
            3,
            [[(0, 1)], [(1, 2)], [(0, 1)]],
            "rounds[2] sends 0 -> 1, and both hold shard 0",
            "leave",
        ),
        (6, dissemination(6), "would count twice", "send it before they have met, or leave it out"),
        (4, dissemination(4), "another order on rank 1 than on rank 0", "or use butterfly(4)"),
    ],
)
def test_a_wrong_schedule_says_what_to_do(size, rounds, got, remedy):
    with pytest.raises(ValueError, match=re.escape(got)) as error:
        Schedule(size, rounds)
    assert remedy in str(error.value)


@pytest.mark.parametrize(
    ("build", "got"),
    [
        (lambda: butterfly(0), "size is 0"),
        (lambda: butterfly("8"), "size is '8'"),
        (lambda: halving(-1), "size is -1"),
        (lambda: hierarchical((2, 0)), "sizes[1] is 0"),
    ],
)
def test_a_wrong_size_says_what_to_do(build, got):
    with pytest.raises(ValueError, match=re.escape(got)) as error:
        build()
    assert "pass the size of the mesh axis" in str(error.value)


def run_scatter(schedule):
    """What each rank holds at the end, {chunk: shards}, moved one by one as the docstring says."""
    size = schedule.size
    held = [{chunk: [rank] for chunk in range(size)} for rank in range(size)]
    for shift, count in schedule.rounds:
        messages = [
            {
                (rank + offset) % size: held[rank].pop((rank + offset) % size)
                for offset in range(shift, shift + count)
            }
            for rank in range(size)
        ]
        for rank, message in enumerate(messages):
            for chunk, some in message.items():
                receiver = (rank + shift) % size
                assert (chunk - receiver) % size < count
                held[receiver][chunk] += some
    return held


def assert_reduce_scatter(schedule):
    for rank, chunks in enumerate(run_scatter(schedule)):
        assert list(chunks) == [rank]
        assert sorted(chunks[rank]) == list(range(schedule.size))


@pytest.mark.parametrize("size", SIZES)
def test_halving_leaves_each_rank_its_own_chunk_of_every_shard(size):
    schedule = halving(size)
    assert_reduce_scatter(schedule)
    assert len(schedule.rounds) == math.ceil(math.log2(size))
    assert sum(count for _, count in schedule.rounds) == size - 1


@st.composite
def scatter_schedules(draw):
    size = held = draw(st.integers(1, 20))
    rounds = []
    while held > 1:
        shift = draw(st.integers((held + 1) // 2, held - 1))
        rounds.append((shift, held - shift))
        held = shift
    return ScatterSchedule(size, rounds)


@given(scatter_schedules())
def test_any_rounds_that_send_the_last_chunks_are_a_reduce_scatter(schedule):
    assert_reduce_scatter(schedule)


@pytest.mark.parametrize(
    ("size", "rounds", "got"),
    [
        (4, [(2, 2)], "rounds is ((2, 2),) for size 4"),  # stops early
        (4, [(2, 2), (1, 1), (1, 0)], "rounds is ((2, 2), (1, 1), (1, 0))"),  # goes on for nothing
        (4, [(2, 1), (1, 1)], "rounds is ((2, 1), (1, 1))"),  # forgets a chunk
        (4, [(1, 3)], "rounds is ((1, 3),)"),  # merges into what it sends
        (4, [(4, 0), (2, 2), (1, 1)], "rounds is ((4, 0), (2, 2), (1, 1))"),  # sends nothing
        (2, [(1, 1), (0, 1)], "rounds is ((1, 1), (0, 1))"),  # to itself
        (2, [(1, 1), (0, 0), (1, 0)], "rounds is ((1, 1), (0, 0), (1, 0))"),
        (2, (), "rounds is () for size 2"),
    ],
)
def test_a_wrong_scatter_schedule_says_what_to_do(size, rounds, got):
    with pytest.raises(ValueError, match=re.escape(got)) as error:
        ScatterSchedule(size, rounds)
    assert "shift + count = the chunks held" in str(error.value)
    assert f"use halving({size})" in str(error.value)


def test_rounds_of_a_scatter_schedule_must_be_pairs():
    with pytest.raises(ValueError, match=re.escape("must be (shift, count), in whole numbers")):
        ScatterSchedule(2, [[(0, 1)]])


def test_no_device_sends_more_than_a_message_a_round():
    for size in SIZES:
        sent = collections.Counter(s for pairs in butterfly(size).rounds for s, _ in pairs)
        assert max(sent.values(), default=0) == math.ceil(math.log2(size))
