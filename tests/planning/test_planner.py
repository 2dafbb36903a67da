"""The planner finds what was measured to be fastest, and keeps to the laws of a choice."""

import dataclasses
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distattn.planning.chips import Link
from distattn.planning.cost import (
    QUERY_REPLICATED,
    QUERY_SHARDED,
    Topology,
    Workload,
    choose,
    choose_sum,
    fits,
    time_s,
    traffic,
)

DECODE = Workload(1, 1, 4096, 8, 2, 64, 64, 4)  # a payload of 2 KiB
GQA = Workload(1, 4096, 4096, 32, 8, 128, 128, 2)
FAR = Link(latency_s=5e-3, bytes_per_s=1e8)

topologies = st.builds(
    Topology,
    st.sampled_from(["cpu", "gpu", "tpu"]),
    st.lists(st.integers(1, 16), max_size=2).map(tuple),
    st.integers(1, 2),
)
shapes = st.builds(
    Workload,
    batch=st.integers(1, 4),
    query_length=st.integers(1, 4096),
    key_length=st.integers(1, 1 << 20),
    num_heads=st.sampled_from([8, 16, 32]),
    num_kv_heads=st.sampled_from([1, 4, 8]),
    head_dim=st.sampled_from([64, 128]),
    value_dim=st.sampled_from([64, 128]),
    itemsize=st.sampled_from([2, 4]),
)


def replicated(shape, topology, **kwargs):
    return choose(shape, topology, query_sharded=False, **kwargs)


def sharded(shape, topology, **kwargs):
    return choose(shape, topology, query_sharded=True, **kwargs)


@pytest.mark.parametrize(
    ("rows", "best"),
    [(1, "all_gather"), (64, "psum"), (1000, "psum")],
    ids=["2 KiB", "130 KiB", "2 MiB"],
)
def test_eight_threads_launch_as_little_as_they_can(rows, best):
    shape = dataclasses.replace(DECODE, query_length=rows)
    assert replicated(shape, Topology("cpu", (8,))).strategy == best


@pytest.mark.parametrize("hosts", [2, 4, 8, 16, 6])
def test_hosts_far_apart_take_a_butterfly(hosts):
    choice = replicated(DECODE, Topology("cpu", (hosts,), hosts, links=(FAR,)))
    assert choice.strategy == "butterfly"


@pytest.mark.parametrize(
    ("platform", "processes", "payload_bytes", "expected"),
    [
        ("cpu", 1, 2048, "psum"),  # threads meet for each launch
        ("cpu", 8, 2048, "butterfly"),  # Gloo's all-reduce is a ring
        ("cpu", 8, 1 << 28, "psum"),  # which sends 2 n (D-1)/D, and a butterfly n log2 D
        ("gpu", 8, 2048, "psum"),
        ("tpu", 1, 2048, "psum"),
    ],
)
def test_how_a_small_array_is_summed(platform, processes, payload_bytes, expected):
    assert choose_sum(payload_bytes, Topology(platform, (8,), processes)) == expected


def test_a_large_payload_takes_the_all_reduce_that_sends_least():
    prefill = dataclasses.replace(GQA, query_length=1 << 16)
    for topology in (Topology("tpu", (64,)), Topology("gpu", (64,), 8), Topology("cpu", (64,), 64)):
        assert replicated(prefill, topology).strategy == "psum"


def test_a_pod_takes_a_butterfly_for_one_token():
    assert replicated(DECODE, Topology("tpu", (16, 16, 16), 1024)).strategy == "butterfly"


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("processes", [1, 8])
def test_as_many_queries_as_keys_move_the_keys(platform, processes):
    topology = Topology(platform, (8,), processes)
    assert sharded(GQA, topology).strategy != "reduce_scatter"
    no_heads = dataclasses.replace(GQA, num_heads=33, num_kv_heads=11)
    assert sharded(no_heads, topology).strategy in ("gather_kv", "ring")


def test_a_ring_that_hides_behind_the_products_costs_its_launches():
    long = dataclasses.replace(GQA, query_length=1 << 20, key_length=1 << 20, num_heads=33)
    for topology in (Topology("tpu", (64,)), Topology("gpu", (64,), 8)):
        assert sharded(long, topology).strategy == "ring"
        cost = traffic("ring", long, topology)
        row = topology.constants
        merging_s = cost.merges * row.merge_s + cost.merged_bytes / row.merge_bytes_per_s
        assert time_s(cost, topology) == pytest.approx(126 * row.launch_s + merging_s)


def test_threads_hide_nothing_and_launch_as_little_as_they_can():
    no_heads = dataclasses.replace(GQA, num_heads=33, num_kv_heads=11)
    assert traffic("ring", no_heads, Topology("cpu", (8,))).hidden_s == 0
    assert sharded(no_heads, Topology("cpu", (8,))).strategy == "gather_kv"


def test_heads_that_do_not_divide_are_not_sharded():
    nine = dataclasses.replace(GQA, num_heads=9, num_kv_heads=3)
    one, two = Topology("tpu", (8,)), Topology("tpu", (8, 3))
    names = ("ulysses", "ulysses_ring", "ulysses_gather_kv")
    assert [fits(name, nine, one) for name in names] == [False] * 3
    assert [fits(name, nine, two) for name in names] == [False, True, True]
    assert [fits(name, GQA, one) for name in names] == [True, False, False]
    with pytest.raises(ValueError, match="candidates is .*'ulysses'"):
        sharded(nine, one, candidates=["ulysses"])


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
@pytest.mark.parametrize("processes", [1, 8])
def test_few_queries_move_the_states(platform, processes):
    shape = dataclasses.replace(GQA, query_length=16, key_length=1 << 17)
    assert sharded(shape, Topology(platform, (8,), processes)).strategy == "reduce_scatter"


@pytest.mark.parametrize("query_sharded", [False, True])
@pytest.mark.parametrize("sizes", [(), (1,), (1, 1)], ids=str)
def test_one_device_costs_nothing(query_sharded, sizes):
    choice = choose(GQA, Topology("gpu", sizes), query_sharded=query_sharded)
    assert choice.predicted_s == 0
    assert all(seconds == 0 for _, seconds in choice.alternatives)


def test_equals_are_told_apart_by_their_order():
    two = Topology("gpu", (2,))
    choice = replicated(DECODE, two)
    assert choice.alternatives[0] == ("all_gather", choice.predicted_s)
    assert choice.strategy == "butterfly"
    swapped = replicated(DECODE, two, candidates=("all_gather", "butterfly"))
    assert swapped.strategy == "all_gather"


@given(shapes, topologies, st.booleans())
def test_the_choice_is_the_least_time(shape, topology, query_sharded):
    choice = choose(shape, topology, query_sharded=query_sharded)
    ranking = [(choice.strategy, choice.predicted_s), *choice.alternatives]
    assert [s for _, s in ranking] == sorted(s for _, s in ranking)
    names = QUERY_SHARDED if query_sharded else QUERY_REPLICATED
    names = [name for name in names if fits(name, shape, topology)]
    assert dict(ranking) == {
        name: time_s(traffic(name, shape, topology), topology) for name in names
    }


@given(shapes, topologies, st.sets(st.sampled_from(sorted(QUERY_REPLICATED)), min_size=1))
def test_fewer_candidates_are_never_faster(shape, topology, names):
    restricted = replicated(shape, topology, candidates=sorted(names))
    assert restricted.strategy in names
    assert len(restricted.alternatives) == len(names) - 1
    assert restricted.predicted_s >= replicated(shape, topology).predicted_s


@given(shapes, topologies, st.booleans(), st.floats(1e-6, 1.0), st.floats(1e-6, 1.0))
def test_more_latency_never_chooses_more_messages(shape, topology, query_sharded, a, b):
    def messages(latency_s):
        links = (Link(latency_s, 1e9),) * len(topology.sizes)
        there = dataclasses.replace(topology, links=links)
        # A ring is left out: what computing hides costs no time, however many messages it is.
        names = QUERY_SHARDED if query_sharded else QUERY_REPLICATED
        names = [name for name in names if "ring" not in name and fits(name, shape, there)]
        choice = choose(shape, there, query_sharded=query_sharded, candidates=names)
        return traffic(choice.strategy, shape, there).messages

    assert messages(max(a, b)) <= messages(min(a, b))


@given(shapes, topologies, st.integers(1, 1000))
def test_more_rows_never_choose_more_bytes_a_row(shape, topology, factor):
    def marginal_s(rows, doubled):
        strategy = replicated(rows, topology).strategy
        one, two = (time_s(traffic(strategy, x, topology), topology) for x in (rows, doubled))
        return (two - one) / rows.payload_bytes

    def times(k):
        return dataclasses.replace(shape, query_length=k * shape.query_length)

    assert marginal_s(times(factor), times(2 * factor)) <= marginal_s(shape, times(2)) * (1 + 1e-6)


@given(shapes, topologies)
def test_more_keys_never_change_to_moving_them(shape, topology):
    longer = dataclasses.replace(shape, key_length=2 * shape.key_length)
    if sharded(shape, topology).strategy == "reduce_scatter":
        assert sharded(longer, topology).strategy == "reduce_scatter"


@pytest.mark.parametrize(
    ("candidates", "query_sharded", "remedy"),
    [
        ((), False, "('butterfly', 'psum', 'all_gather'): name one or more of these"),
        (("gather_kv",), False, "for query_sharded=False they must be some of"),
        (("psum", "ring"), False, "pass None for all"),
        (("butterfly",), True, "('reduce_scatter', 'gather_kv', 'ring', 'ulysses')"),
    ],
)
def test_candidates_that_do_not_fit_are_named(candidates, query_sharded, remedy):
    with pytest.raises(ValueError, match=re.escape(f"candidates is {candidates}")) as error:
        choose(DECODE, Topology("cpu", (8,)), query_sharded=query_sharded, candidates=candidates)
    assert remedy in str(error.value)
