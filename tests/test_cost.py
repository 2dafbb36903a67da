"""The cost model against the counts of the schedules and against what was measured."""

import dataclasses
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distattn.cost import PLATFORMS, Link, Shape, Topology, Traffic, time_s
from distattn.schedule import Schedule, butterfly, halving, hierarchical
from distattn.traffic import traffic

SHAPE = Shape(
    batch=2,
    query_length=3,
    key_length=40,
    num_heads=8,
    num_kv_heads=4,
    head_dim=16,
    value_dim=32,
    itemsize=2,
)
N = 4 * 2 * 3 * 8 * (32 + 2)
COMBINES = ("butterfly", "psum", "all_gather", "reduce_scatter", "gather_kv")
DECODE = Shape(1, 1, 4096, 8, 2, 64, 64, 4)  # a payload of 2 KiB

topologies = st.builds(
    Topology,
    st.sampled_from(["cpu", "gpu", "tpu"]),
    st.lists(st.integers(1, 9), max_size=3).map(tuple),
    st.integers(1, 3),
)
shapes = st.builds(
    Shape,
    batch=st.integers(1, 8),
    query_length=st.integers(1, 4096),
    key_length=st.integers(1, 1 << 20),
    num_heads=st.integers(1, 64),
    num_kv_heads=st.integers(1, 64),
    head_dim=st.integers(1, 256),
    value_dim=st.integers(1, 256),
    itemsize=st.sampled_from([2, 4, 8]),
)
combines = st.sampled_from(COMBINES)


def seconds(combine, shape, topology):
    return time_s(traffic(combine, shape, topology), topology)


def test_payload_is_float32_unless_the_inputs_are_wider():
    assert SHAPE.payload_bytes == N
    assert dataclasses.replace(SHAPE, itemsize=8).payload_bytes == 2 * N


@pytest.mark.parametrize("size", [2, 3, 5, 8, 64])
def test_bytes_sent_are_those_of_the_design(size):
    topology = Topology("tpu", (size,))
    part = (size - 1) / size
    query, keys_and_values = 2 * 2 * 3 * 8 * 16, 2 * 2 * 40 * 4 * (16 + 32)
    expected = {
        "butterfly": N * math.ceil(math.log2(size)),
        "psum": 2 * N * part,
        "all_gather": N * (size - 1),
        "reduce_scatter": (query + N) * part,
        "gather_kv": keys_and_values * part,
        "ring": keys_and_values * part,
    }
    for combine, sent in expected.items():
        assert traffic(combine, SHAPE, topology).bytes_sent == pytest.approx(sent)


def test_heads_over_all_devices_or_over_the_last_axis():
    query, out = 2 * 2 * 3 * 8 * 16, 2 * 2 * 3 * 8 * 32
    keys_and_values = 2 * 2 * 40 * 4 * (16 + 32)
    four = traffic("ulysses", SHAPE, Topology("tpu", (4,)))
    assert four.bytes_sent == pytest.approx((query + keys_and_values + out) / 4 * 3 / 4)
    # On eight, each of the four heads of the keys is there twice.
    eight = traffic("ulysses", SHAPE, Topology("tpu", (8,)))
    assert eight.bytes_sent == pytest.approx((query + 2 * keys_and_values + out) / 8 * 7 / 8)
    levels = Topology("tpu", (2, 4))
    inner = (query + keys_and_values + out) / 8 * 3 / 4
    ring, gather = (traffic(f"ulysses_{way}", SHAPE, levels) for way in ("ring", "gather_kv"))
    assert ring.bytes_sent == gather.bytes_sent == pytest.approx(inner + keys_and_values / 4 / 2)
    assert ring.launches == gather.launches == 3 + 2


def test_launches_messages_and_merges_on_eight_devices():
    def counts(combine, topology):
        cost = traffic(combine, SHAPE, topology)
        return cost.launches, cost.messages, cost.merges

    ring, tree = Topology("cpu", (8,), processes=8), Topology("tpu", (8,))
    assert counts("butterfly", ring) == counts("butterfly", tree) == (3, 3, 3)
    assert counts("psum", ring) == (2, 28, 1)
    assert counts("psum", tree) == (2, 12, 1)
    assert counts("all_gather", ring) == (1, 7, 7)
    assert counts("all_gather", tree) == (1, 3, 7)
    assert counts("reduce_scatter", ring) == (4, 10, 3)
    assert counts("gather_kv", ring) == (2, 14, 0)
    assert counts("ring", ring) == counts("ring", tree) == (14, 14, 7)


SIZES = [*((size,) for size in range(1, 65)), (2, 4), (3, 5), (6, 7), (2, 3, 5)]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_butterfly_by_name_costs_what_its_schedule_does(sizes):
    topology = Topology("gpu", sizes)
    by_name, by_schedule = (traffic(c, SHAPE, topology) for c in ("butterfly", hierarchical(sizes)))
    assert by_name == by_schedule


@pytest.mark.parametrize("size", range(1, 65))
def test_reduce_scatter_costs_what_halving_does(size):
    whole = traffic("reduce_scatter", SHAPE, Topology("tpu", (size,)))
    no_query = dataclasses.replace(SHAPE, head_dim=0)
    halved = traffic("reduce_scatter", no_query, Topology("tpu", (size,)))
    rounds = halving(size).rounds
    assert whole.launches == whole.merges + (size > 1) == len(rounds) + (size > 1)
    assert halved.bytes_sent == pytest.approx(sum(count for _, count in rounds) / size * N)


def test_the_busiest_device_of_a_schedule_counts():
    star = Schedule(3, (((1, 0),), ((2, 0),), ((0, 1),), ((0, 2),)))
    assert traffic(star, SHAPE, Topology("cpu", (3,))) == Traffic(
        launches=4, messages=4, message_bytes=4 * N, bytes_sent=2 * N, merges=2, merged_bytes=2 * N
    )


@pytest.mark.parametrize("combine", [*COMBINES, butterfly(1)], ids=str)
@pytest.mark.parametrize("sizes", [(), (1,), (1, 1)], ids=str)
def test_one_device_costs_nothing(combine, sizes):
    topology = Topology("cpu", sizes)
    assert traffic(combine, SHAPE, topology) == Traffic()
    assert seconds(combine, SHAPE, topology) == 0


def test_seconds_are_the_sum_of_the_terms():
    cost = Traffic(2, 3, 1e6, 5e5, 4, 2e6)
    row = PLATFORMS["gpu", False]
    expected = 2 * row.launch_s + 3 * row.link.latency_s + 1e6 / row.link.bytes_per_s
    expected += 4 * row.merge_s + 2e6 / row.merge_bytes_per_s
    assert time_s(cost, Topology("gpu", (8,))) == pytest.approx(expected)


def test_threads_share_their_cores():
    cost = Traffic(1, 1, 1e6, 1e6, 1, 1e6)
    two, eight = (time_s(cost, Topology("cpu", (size,))) for size in (2, 8))
    assert eight == pytest.approx(4 * two)
    assert time_s(cost, Topology("cpu", (2,), 2)) == time_s(cost, Topology("cpu", (8,), 2))


def test_a_measured_link_stands_in_for_the_table():
    cost = Traffic(messages=3, message_bytes=1e6)
    topology = Topology("tpu", (8,), link=Link(latency_s=0.25, bytes_per_s=4e6))
    assert time_s(cost, topology) == pytest.approx(3 * 0.25 + 0.25)


# Milliseconds over TCP, one process a host, 5 ms of delay each way, a payload of 2 KiB.
DELAYED = {
    "psum": {2: 36.8, 4: 108, 8: 204, 16: 412},
    "butterfly": {2: 9.5, 4: 18.3, 8: 33.7, 16: 42.3},
    "all_gather": {2: 9.5, 4: 28, 8: 63, 16: 140},
}
MESSAGE = Link(latency_s=9.2e-3, bytes_per_s=5e7)  # one permute between two of these hosts


@pytest.mark.parametrize("combine", DELAYED)
@pytest.mark.parametrize("hosts", [2, 4, 8, 16])
def test_hosts_far_apart_take_as_long_as_measured(combine, hosts):
    predicted = 1e3 * seconds(combine, DECODE, Topology("cpu", (hosts,), hosts, MESSAGE))
    assert 1 / 1.4 < predicted / DELAYED[combine][hosts] < 1.4


def test_processes_on_one_machine_are_in_the_measured_order():
    topology = Topology("cpu", (8,), 8)
    predicted = {combine: 1e3 * seconds(combine, DECODE, topology) for combine in DELAYED}
    assert predicted["butterfly"] < predicted["all_gather"] < predicted["psum"]
    for combine, measured in {"butterfly": 6.4, "all_gather": 16, "psum": 39}.items():
        assert 1 / 2.5 < predicted[combine] / measured < 2.5


@pytest.mark.parametrize(
    ("rows", "order", "butterfly_over_psum"),
    [  # of 2 KiB each, on eight threads
        (1, ["psum", "all_gather", "butterfly"], 1.05 / 0.79),
        (64, ["psum", "butterfly", "all_gather"], 1.41 / 0.81),
        (1000, ["psum", "butterfly", "all_gather"], 2.85 / 1.02),
    ],
)
def test_threads_are_in_the_measured_order(rows, order, butterfly_over_psum):
    shape = dataclasses.replace(DECODE, query_length=rows)
    predicted = {combine: seconds(combine, shape, Topology("cpu", (8,))) for combine in order}
    assert sorted(order, key=predicted.get) == order
    ratio = predicted["butterfly"] / predicted["psum"]
    assert 1 / 1.4 < ratio / butterfly_over_psum < 1.4


@given(combines, shapes, topologies)
def test_more_rows_or_keys_never_take_less(combine, shape, topology):
    larger = dataclasses.replace(
        shape, query_length=2 * shape.query_length, key_length=2 * shape.key_length
    )
    assert 0 <= seconds(combine, shape, topology) <= seconds(combine, larger, topology)


@given(combines, shapes, topologies)
def test_a_worse_link_never_takes_less(combine, shape, topology):
    link = topology.constants.link
    slower = Link(2 * link.latency_s + 1e-6, link.bytes_per_s / 2)
    worse = seconds(combine, shape, dataclasses.replace(topology, link=slower))
    assert worse > seconds(combine, shape, topology) or topology.size == 1


@given(st.sampled_from(["psum", "all_gather", "gather_kv"]), shapes, topologies, st.integers(1, 64))
def test_one_device_more_never_takes_less(combine, shape, topology, size):
    few, more = (dataclasses.replace(topology, sizes=(d,)) for d in (size, size + 1))
    assert seconds(combine, shape, few) <= seconds(combine, shape, more)


@given(combines, shapes, topologies)
def test_nobody_sends_more_than_there_is_time_for(combine, shape, topology):
    cost = traffic(combine, shape, topology)
    assert 0 <= cost.bytes_sent <= cost.message_bytes
    assert cost.launches <= cost.messages


@given(combines, combines, shapes, topologies)
def test_one_after_the_other_takes_the_sum(first, second, shape, topology):
    one, two = traffic(first, shape, topology), traffic(second, shape, topology)
    assert time_s(one + two, topology) == pytest.approx(
        time_s(one, topology) + time_s(two, topology)
    )


@pytest.mark.parametrize(
    ("call", "got", "remedy"),
    [
        (lambda: Link(-1.0, 1e9), "latency_s is -1.0", "measure seconds"),
        (lambda: Link(0.0, 0.0), "bytes_per_s is 0.0", "bytes a second"),
        (lambda: Link(float("nan"), 1e9), "latency_s is nan", "measure seconds"),
        (
            lambda: Topology("abacus", (8,)),
            "platform is 'abacus'",
            "name a combine instead of 'auto'",
        ),
        (lambda: Topology("cuda", (8,)), "platform is 'cuda'", "'cpu', 'gpu' and 'tpu'"),
        (
            lambda: traffic("star", SHAPE, Topology("cpu", (8,))),
            "combine is 'star'",
            "'butterfly', ",
        ),
        (
            lambda: traffic(butterfly(4), SHAPE, Topology("cpu", (2, 4))),
            "a schedule for 4 devices",
            "build it for 8",
        ),
    ],
)
def test_a_wrong_call_says_what_to_do(call, got, remedy):
    with pytest.raises(ValueError, match=re.escape(got)) as error:
        call()
    assert remedy in str(error.value)
