"""The cost model against the counts of the schedules and against what was measured."""

import collections
import dataclasses
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distattn.planning.chips import Link, fit_link, worst
from distattn.planning.cost import (
    FORMULAS,
    Topology,
    Traffic,
    Workload,
    fits,
    links_from,
    time_s,
    traffic,
)
from distattn.planning.pods import pod
from distattn.planning.schedule import halving, hierarchical

SHAPE = Workload(
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
STRATEGIES = ("butterfly", "psum", "all_gather", "reduce_scatter", "gather_kv")
DECODE = Workload(1, 1, 4096, 8, 2, 64, 64, 4)  # a payload of 2 KiB

topologies = st.builds(
    Topology,
    st.sampled_from(["cpu", "gpu", "tpu"]),
    st.lists(st.integers(1, 9), max_size=3).map(tuple),
    st.integers(1, 3),
)
shapes = st.builds(
    Workload,
    batch=st.integers(1, 8),
    query_length=st.integers(1, 4096),
    key_length=st.integers(1, 1 << 20),
    num_heads=st.integers(1, 64),
    num_kv_heads=st.integers(1, 64),
    head_dim=st.integers(1, 256),
    value_dim=st.integers(1, 256),
    itemsize=st.sampled_from([2, 4, 8]),
)
strategies = st.sampled_from(STRATEGIES)


def seconds(strategy, shape, topology):
    return time_s(traffic(strategy, shape, topology), topology)


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
    for strategy, sent in expected.items():
        assert traffic(strategy, SHAPE, topology).bytes_sent == pytest.approx(sent)


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
    def counts(strategy, topology):
        cost = traffic(strategy, SHAPE, topology)
        return cost.launches, cost.messages, cost.merges

    ring, tree = Topology("cpu", (8,), processes=8), Topology("tpu", (8,))
    assert counts("butterfly", ring) == counts("butterfly", tree) == (3, 3, 3)
    assert counts("psum", ring) == (2, 28, 1)
    assert counts("psum", tree) == (2, 12, 1)
    assert counts("all_gather", ring) == (1, 7, 1)  # the states that come are merged at once
    assert counts("all_gather", tree) == (1, 3, 1)
    assert counts("ulysses", ring) == counts("ulysses", tree) == (3, 3, 0)
    assert counts("reduce_scatter", ring) == (4, 10, 3)
    assert counts("gather_kv", ring) == (2, 14, 0)
    assert counts("ring", ring) == counts("ring", tree) == (14, 14, 7)


SIZES = [*((size,) for size in range(1, 65)), (2, 4), (3, 5), (6, 7), (2, 3, 5)]


def link_of_round(pairs, sizes, links):
    """The worst link that a message of the round crosses; ranks are row-major."""
    stride, crossed = 1, []
    for size, link in zip(reversed(sizes), reversed(links), strict=True):
        if any(a // stride % size != b // stride % size for a, b in pairs):
            crossed.append(link)
        stride *= size
    return worst(crossed)


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_a_butterfly_costs_what_its_schedule_does(sizes):
    links = tuple(Link(0.5**axis, 1e6 * 3**axis) for axis in range(len(sizes)))
    cost = traffic("butterfly", SHAPE, Topology("gpu", sizes, links=links))
    schedule = hierarchical(sizes)
    sent = collections.Counter(source for pairs in schedule.rounds for source, _ in pairs)
    merges = sum(step.receives != step.replaces for step in schedule.steps)
    sending_s = sum(link_of_round(x, sizes, links).seconds(N) for x in schedule.rounds)
    assert cost.launches == cost.messages == len(schedule.rounds)
    assert cost.bytes_sent == N * max(sent.values(), default=0)  # by the busiest device
    assert (cost.merges, cost.merged_bytes) == (merges, merges * N)
    assert cost.sending_s == pytest.approx(sending_s)


@pytest.mark.parametrize("size", range(1, 65))
def test_reduce_scatter_costs_what_halving_does(size):
    whole = traffic("reduce_scatter", SHAPE, Topology("tpu", (size,)))
    no_query = dataclasses.replace(SHAPE, head_dim=0)
    halved = traffic("reduce_scatter", no_query, Topology("tpu", (size,)))
    rounds = halving(size).rounds
    assert whole.launches == whole.merges + (size > 1) == len(rounds) + (size > 1)
    assert halved.bytes_sent == pytest.approx(sum(count for _, count in rounds) / size * N)


@pytest.mark.parametrize("strategy", sorted(FORMULAS), ids=str)
@pytest.mark.parametrize("sizes", [(), (1,), (1, 1)], ids=str)
def test_one_device_costs_nothing(strategy, sizes):
    topology = Topology("cpu", sizes)
    assert traffic(strategy, SHAPE, topology) == Traffic()
    assert seconds(strategy, SHAPE, topology) == 0


def test_seconds_are_the_sum_of_the_terms():
    cost = Traffic(2, 3, 5e5, sending_s=0.25, hidden_s=0.125, merges=4, merged_bytes=2e6)
    row = Topology("gpu", ()).constants
    expected = 2 * row.launch_s + 0.25 - 0.125 + 4 * row.merge_s + 2e6 / row.merge_bytes_per_s
    assert time_s(cost, Topology("gpu", (8,))) == pytest.approx(expected)


def test_messages_take_the_latency_and_the_bandwidth_of_the_table():
    link, n = Topology("gpu", ()).constants.link, N
    cost = traffic("butterfly", SHAPE, Topology("gpu", (8,)))
    assert cost.sending_s == pytest.approx(3 * link.latency_s + 3 * n / link.bytes_per_s)


def test_threads_share_their_cores():
    cost = Traffic(1, 1, 1e6, 1e-3, 0, 1, 1e6)
    two, eight = (time_s(cost, Topology("cpu", (size,))) for size in (2, 8))
    assert eight == pytest.approx(4 * two)
    assert time_s(cost, Topology("cpu", (2,), 2)) == time_s(cost, Topology("cpu", (8,), 2))


def test_a_measured_link_stands_in_for_the_table():
    topology = Topology("tpu", (8,), links=(Link(latency_s=0.25, bytes_per_s=4e6),))
    assert traffic("butterfly", SHAPE, topology).sending_s == pytest.approx(3 * (0.25 + N / 4e6))


SLOW, FAST = Link(latency_s=0.25, bytes_per_s=1e4), Link(latency_s=1e-3, bytes_per_s=1e6)
links = st.builds(Link, st.floats(0, 1), st.floats(1, 1e12))


def test_each_round_of_a_butterfly_takes_what_its_axis_takes():
    topology = Topology("tpu", (2, 8), links=(SLOW, FAST))
    row = topology.constants
    expected = 4 * (row.launch_s + row.merge_s + N / row.merge_bytes_per_s)
    expected += SLOW.latency_s + N / SLOW.bytes_per_s + 3 * (FAST.latency_s + N / FAST.bytes_per_s)
    assert seconds("butterfly", SHAPE, topology) == pytest.approx(expected)


def test_what_runs_along_all_axes_waits_for_the_worst_link():
    crossed = Link(1.0, 1e9), Link(0.1, 1e6)
    assert worst(crossed) == Link(1.0, 1e6)
    topology = Topology("tpu", (2, 4), links=crossed)
    assert topology.constants.link == Link(1.0, 1e6)
    alike = Topology("tpu", (2, 4), links=(Link(1.0, 1e6),) * 2)
    for strategy in ("psum", "all_gather", "gather_kv", "ring", "reduce_scatter", "ulysses"):
        assert seconds(strategy, SHAPE, topology) == seconds(strategy, SHAPE, alike)
    # An axis of one device has no link to wait for.
    assert Topology("tpu", (1, 4), links=crossed).constants.link == crossed[1]
    table = Topology("tpu", ()).constants.link
    assert Topology("tpu", (1, 1), links=crossed).constants.link == table


def test_heads_over_the_fast_axis_take_what_it_takes():
    shape = dataclasses.replace(SHAPE, query_length=1, key_length=8)
    topology = Topology("gpu", (2, 4), links=(SLOW, FAST))
    outer = Topology("gpu", (2,), links=(SLOW,))
    part = dataclasses.replace(shape, num_heads=2, num_kv_heads=1)  # of a device of a host
    whole = traffic("ulysses_gather_kv", shape, topology)
    moved = shape.query_bytes + shape.key_value_bytes + shape.query_bytes * 2  # V = 2 H
    expected = 3 * topology.constants.launch_s + 3 * FAST.latency_s
    expected += moved / 8 * 3 / 4 / FAST.bytes_per_s + seconds("gather_kv", part, outer)
    assert time_s(whole, topology) == pytest.approx(expected)


@given(shapes, topologies)
def test_links_like_those_of_the_table_change_nothing(shape, topology):
    alike = dataclasses.replace(topology, links=(topology.constants.link,) * len(topology.sizes))
    for strategy in FORMULAS:
        if fits(strategy, shape, topology):
            assert seconds(strategy, shape, alike) == seconds(strategy, shape, topology)


@given(shapes, topologies, st.data())
def test_a_better_axis_never_takes_more(shape, topology, data):
    own = tuple(data.draw(links) for _ in topology.sizes)
    worse = tuple(Link(2 * x.latency_s, x.bytes_per_s / 2) for x in own[:1]) + own[1:]
    here, there = (dataclasses.replace(topology, links=x) for x in (own, worse))
    for strategy in STRATEGIES:
        fast, slow = (seconds(strategy, shape, where) for where in (here, there))
        assert 0 <= fast <= slow * (1 + 1e-9)


PODS = [
    "v5p:4x4x4",
    "v5e:4x4",
    "v4:2x3x5",
    "v5e:6x16",
    "v5p:4x4x4*3",
    "tpu7x:4x4x4",
    "h100:3x8",
    "cpu:6",
]


def test_on_a_torus_each_round_takes_its_hops_and_the_messages_on_its_links():
    topology = pod("v5p:16x16x16").topology()
    row = topology.constants
    expected = 12 * (row.launch_s + row.merge_s + N / row.merge_bytes_per_s)
    for distance in (1, 2, 4, 8):
        expected += 3 * distance * (row.link.latency_s + N / row.link.bytes_per_s)
    assert seconds("butterfly", SHAPE, topology) == pytest.approx(expected)


def test_between_slices_a_message_takes_its_share_of_the_network_of_its_host():
    one, two = (pod(name).topology() for name in ("v5p:4x4x4", "v5p:4x4x4*2"))
    row, network = one.constants, pod("v5p:4x4x4").chip.network
    more = row.launch_s + row.merge_s + N / row.merge_bytes_per_s
    more += network.latency_s + 4 * N / network.bytes_per_s
    assert seconds("butterfly", SHAPE, two) == pytest.approx(
        seconds("butterfly", SHAPE, one) + more
    )


def test_an_all_reduce_on_a_torus_uses_six_links():
    prefill = dataclasses.replace(SHAPE, query_length=1 << 16)
    topology = pod("v5p:16x16x16").topology()
    row, n = topology.constants, prefill.payload_bytes
    expected = 2 * row.launch_s + 4 * 24 * row.link.latency_s + row.merge_s
    expected += 2 * n * 4095 / 4096 / (6 * row.link.bytes_per_s) + n / row.merge_bytes_per_s
    assert seconds("psum", prefill, topology) == pytest.approx(expected)


def test_a_gather_over_hosts_takes_each_part_over_its_own_links():
    topology = pod("h100:16x8").topology()
    row, chip, kv = topology.constants, pod("h100:16x8").chip, SHAPE.key_value_bytes
    expected = 2 * row.launch_s + 2 * (4 * chip.network.latency_s + 7 * chip.link.latency_s)
    expected += kv * 15 / 128 / chip.network.bytes_per_s + kv * 7 / 8 / chip.link.bytes_per_s
    assert seconds("gather_kv", SHAPE, topology) == pytest.approx(expected)
    sent = traffic("gather_kv", SHAPE, topology).bytes_sent
    assert sent == pytest.approx(kv * 127 / 128)


def test_hosts_of_one_gpu_reduce_by_trees():
    topology = pod("h100:16x1").topology()
    assert traffic("gather_kv", SHAPE, topology).messages == 2 * 4
    assert traffic("psum", SHAPE, pod("h100:8").topology()).messages == 4 * 7


@pytest.mark.parametrize("name", PODS)
def test_wiring_changes_no_count_of_launches_bytes_or_merges(name):
    topology = pod(name).topology()
    plain = dataclasses.replace(topology, wiring=None)
    for strategy in FORMULAS:
        if fits(strategy, SHAPE, topology):
            one, other = (traffic(strategy, SHAPE, where) for where in (topology, plain))
            assert one.launches == other.launches
            assert one.bytes_sent == pytest.approx(other.bytes_sent)
            assert (one.merges, one.merged_bytes) == (other.merges, other.merged_bytes)


@given(st.sampled_from(PODS), shapes, st.sampled_from(sorted(FORMULAS)))
def test_on_a_pod_more_rows_or_keys_never_take_less(name, shape, strategy):
    topology = pod(name).topology()
    larger = dataclasses.replace(
        shape, query_length=2 * shape.query_length, key_length=2 * shape.key_length
    )
    if fits(strategy, shape, topology):
        few, more = (seconds(strategy, x, topology) for x in (shape, larger))
        assert 0 <= few <= more * (1 + 1e-9)


def test_a_butterfly_grows_by_a_round_per_doubling():
    one_hop = pod("v5p:4x4x4").chip.link.latency_s
    taken = []
    for doublings in range(1, 5):
        topology = pod(f"v5e:{1 << doublings}x1").topology()
        assert traffic("butterfly", SHAPE, topology).launches == doublings
        taken.append(seconds("butterfly", dataclasses.replace(SHAPE, batch=1), topology))
    row = pod("v5e:2x1").topology().constants
    payload = N / 2
    for doublings, (few, more) in enumerate(zip(taken, taken[1:], strict=False), 1):
        distance = 1 << doublings
        round_s = row.launch_s + row.merge_s + payload / row.merge_bytes_per_s
        round_s += distance * (one_hop + payload / row.link.bytes_per_s)
        assert more - few == pytest.approx(round_s)


@given(st.floats(0, 1), st.floats(1, 1e12))
def test_a_fit_finds_the_link_that_made_the_samples(latency_s, bytes_per_s):
    sizes = (8, 1 << 10, 1 << 16, 1 << 22)
    link, residual = fit_link([(size, latency_s + size / bytes_per_s) for size in sizes])
    assert residual < 1e-6
    for size in sizes:
        assert link.latency_s + size / link.bytes_per_s == pytest.approx(
            latency_s + size / bytes_per_s
        )


def test_a_fit_weighs_small_messages_as_much_as_large_ones():
    exact = Link(1e-4, 1e9)
    noisy = [
        (size, (exact.latency_s + size / exact.bytes_per_s) * noise)
        for size, noise in ((8, 1.05), (4096, 0.95), (1 << 16, 1.05), (1 << 24, 0.95))
    ]
    link, residual = fit_link(noisy)
    assert 0.9 < link.latency_s / exact.latency_s < 1.1
    assert 0.9 < link.bytes_per_s / exact.bytes_per_s < 1.1
    assert 0.02 < residual < 0.06


def test_a_fit_keeps_to_what_a_link_can_be():
    # Faster than in proportion: no latency is below 0.
    link, _ = fit_link([(100, 1.0), (200, 4.0)])
    assert link.latency_s == 0
    assert link.bytes_per_s == pytest.approx((1e4 + 2500) / (100 + 50))
    # As long for a large one as for a small one, or less: at least what it reached.
    assert fit_link([(8, 2.0), (1000, 2.0)])[0] == Link(2.0, 500.0)
    link, residual = fit_link([(8, 2.0), (1000, 1.0)])
    assert 1 < link.latency_s < 2
    assert link.bytes_per_s == 1000
    assert residual > 0.1


def report(platform, processes, **axes):
    """As `distattn check --json` writes it, of 8 devices."""
    measured = {
        name: {"latency_s": a, "bytes_per_s": b, "residual": 0.1, "samples": []}
        for name, (a, b) in axes.items()
    }
    return {"platform": platform, "processes": processes, "devices": 8, "axes": measured}


@pytest.mark.parametrize(("platform", "processes"), [("cpu", 2), ("gpu", 1), ("tpu", 4)])
def test_a_report_gives_links_that_predict_what_was_measured(platform, processes):
    given = report(platform, processes, host=(1e-3, 1e6), device=(1e-8, 1e9))
    found = links_from(given)
    assert list(found) == ["host", "device"]
    assert found["device"] == Link(0.0, 1e9)  # shorter than a launch alone
    topology = Topology(platform, (2,), processes, links=(found["host"],))
    permute = Traffic(1, 1, 1e6, found["host"].seconds(1e6))
    assert time_s(permute, topology) == pytest.approx(1e-3 + 1.0)


def test_a_report_of_threads_divides_the_bandwidth_once():
    found = links_from(report("cpu", 1, device=(5e-4, 1e9)))
    topology = Topology("cpu", (8,), links=(found["device"],))
    launch_s = 8 * topology.constants.launch_s
    permute = Traffic(1, 1, 1e9, found["device"].seconds(1e9))
    assert time_s(permute, topology) == pytest.approx(launch_s + 1.0)


# Milliseconds over TCP, one process a host, 5 ms of delay each way, a payload of 2 KiB.
DELAYED = {
    "psum": {2: 36.8, 4: 108, 8: 204, 16: 412},
    "butterfly": {2: 9.5, 4: 18.3, 8: 33.7, 16: 42.3},
    "all_gather": {2: 9.5, 4: 28, 8: 63, 16: 140},
}
MESSAGE = Link(latency_s=9.2e-3, bytes_per_s=5e7)  # one permute between two of these hosts


@pytest.mark.parametrize("strategy", DELAYED)
@pytest.mark.parametrize("hosts", [2, 4, 8, 16])
def test_hosts_far_apart_take_as_long_as_measured(strategy, hosts):
    predicted = 1e3 * seconds(strategy, DECODE, Topology("cpu", (hosts,), hosts, links=(MESSAGE,)))
    assert 1 / 1.4 < predicted / DELAYED[strategy][hosts] < 1.4


def test_processes_on_one_machine_are_in_the_measured_order():
    topology = Topology("cpu", (8,), 8)
    predicted = {strategy: 1e3 * seconds(strategy, DECODE, topology) for strategy in DELAYED}
    assert predicted["butterfly"] < predicted["all_gather"] < predicted["psum"]
    for strategy, measured in {"butterfly": 6.4, "all_gather": 16, "psum": 39}.items():
        assert 1 / 2.5 < predicted[strategy] / measured < 2.5


@pytest.mark.parametrize(
    ("rows", "order", "butterfly_over_psum"),
    [  # of 2 KiB each, on eight threads; the first order as of a whole call: 0.44, 0.52 and 0.62 ms
        (1, ["all_gather", "psum", "butterfly"], 1.05 / 0.79),
        (64, ["psum", "butterfly", "all_gather"], 1.41 / 0.81),
        (1000, ["psum", "butterfly", "all_gather"], 2.85 / 1.02),
    ],
)
def test_threads_are_in_the_measured_order(rows, order, butterfly_over_psum):
    shape = dataclasses.replace(DECODE, query_length=rows)
    predicted = {strategy: seconds(strategy, shape, Topology("cpu", (8,))) for strategy in order}
    assert sorted(order, key=predicted.get) == order
    ratio = predicted["butterfly"] / predicted["psum"]
    assert 1 / 1.4 < ratio / butterfly_over_psum < 1.4


@given(strategies, shapes, topologies)
def test_more_rows_or_keys_never_take_less(strategy, shape, topology):
    larger = dataclasses.replace(
        shape, query_length=2 * shape.query_length, key_length=2 * shape.key_length
    )
    assert 0 <= seconds(strategy, shape, topology) <= seconds(strategy, larger, topology)


@given(strategies, shapes, topologies)
def test_a_worse_link_never_takes_less(strategy, shape, topology):
    link = topology.constants.link
    slower = (Link(2 * link.latency_s + 1e-6, link.bytes_per_s / 2),) * len(topology.sizes)
    worse = seconds(strategy, shape, dataclasses.replace(topology, links=slower))
    assert worse > seconds(strategy, shape, topology) or topology.size == 1


@given(st.sampled_from(["psum", "all_gather", "gather_kv"]), shapes, topologies, st.integers(1, 64))
def test_one_device_more_never_takes_less(strategy, shape, topology, size):
    few, more = (dataclasses.replace(topology, sizes=(d,)) for d in (size, size + 1))
    assert seconds(strategy, shape, few) <= seconds(strategy, shape, more)


@given(strategies, shapes, topologies)
def test_nobody_sends_more_than_there_is_time_for(strategy, shape, topology):
    cost = traffic(strategy, shape, topology)
    sent_s = cost.bytes_sent / topology.constants.link.bytes_per_s
    assert 0 <= sent_s <= cost.sending_s * (1 + 1e-9)
    assert cost.launches <= cost.messages


@given(strategies, strategies, shapes, topologies)
def test_one_after_the_other_takes_the_sum(first, second, shape, topology):
    one, two = traffic(first, shape, topology), traffic(second, shape, topology)
    assert time_s(one + two, topology) == pytest.approx(
        time_s(one, topology) + time_s(two, topology)
    )


@pytest.mark.parametrize(
    ("call", "got", "remedy"),
    [
        (lambda: Link(-1.0, 1e9), "latency_s is -1.0", "pass the seconds"),
        (lambda: Link(0.0, 0.0), "bytes_per_s is 0.0", "bytes per second"),
        (lambda: Link(float("nan"), 1e9), "latency_s is nan", "pass the seconds"),
        (
            lambda: Topology("cpu", (2, 4), links=(SLOW,)),
            "sizes is (2, 4)",
            "pass one entry for each of sizes",
        ),
        (lambda: fit_link([(8, 1.0)]), "samples is [(8, 1.0)]", "two sizes or more"),
        (lambda: fit_link([(8, 1.0), (9, 0.0)]), "samples is [(8, 1.0), (9, 0.0)]", "above 0"),
        (lambda: links_from({"platform": "cpu"}), "report is {'platform': 'cpu'}", "--json"),
        (lambda: links_from([]), "report is []", "pass what distattn check --json has written"),
        (lambda: links_from(report("cpu", 1, x=(1, 2)) | {"axes": 3}), "report is {", "--json"),
        (lambda: links_from(report("abacus", 1)), "platform is 'abacus'", "name a strategy"),
        (
            lambda: Topology("abacus", (8,)),
            "platform is 'abacus'",
            "name a strategy instead of 'auto'",
        ),
        (
            lambda: dataclasses.replace(pod("v5e:4x4").topology(), sizes=(16,)),
            "and sizes is (16,)",
            "pass one entry for each of sizes",
        ),
        (lambda: Topology("cuda", (8,)), "platform is 'cuda'", "'cpu', 'gpu' and 'tpu'"),
        (
            lambda: traffic("star", SHAPE, Topology("cpu", (8,))),
            "strategy is 'star'",
            "'butterfly', ",
        ),
    ],
)
def test_a_wrong_call_says_what_to_do(call, got, remedy):
    with pytest.raises(ValueError, match=re.escape(got)) as error:
        call()
    assert remedy in str(error.value)
