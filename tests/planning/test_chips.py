"""The table of chips, and pods by their names."""

import re

import pytest

from distattn.planning.chips import CHIPS, TYPICAL, Link, chip_of
from distattn.planning.cost import Topology, Workload, traffic
from distattn.planning.pods import Pod, pod

NAMES = {  # devices, chips of a torus, slices, hosts, mesh axes
    "v5p:16x16x16": (4096, (16, 16, 16), 1, 1024, {"x": 16, "y": 16, "z": 16}),
    "v5p:2x2x1": (4, (2, 2, 1), 1, 1, {"x": 2, "y": 2}),
    "v5e:4x4": (16, (4, 4), 1, 2, {"x": 4, "y": 4}),
    "v6e:16x16": (256, (16, 16), 1, 32, {"x": 16, "y": 16}),
    "v4:4x4x8": (128, (4, 4, 8), 1, 32, {"x": 4, "y": 4, "z": 8}),
    "v5p:16x16x16*16": (
        65536,
        (16, 16, 16),
        16,
        16384,
        {"slice": 16, "x": 16, "y": 16, "z": 16},
    ),
    "tpu7x:4x4x4": (128, (4, 4, 4), 1, 16, {"x": 4, "y": 4, "z": 4, "core": 2}),
    "h100:16x8": (128, (), 1, 16, {"host": 16, "device": 8}),
    "b200:8": (8, (), 1, 1, {"device": 8}),
    "cpu:8": (8, (), 1, 1, {"device": 8}),
    "cpu:2x4": (8, (), 1, 2, {"host": 2, "device": 4}),
    "cpu:1": (1, (), 1, 1, {"device": 1}),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_name_says_devices_torus_slices_and_hosts(name):
    found = pod(name)
    assert (found.devices, found.torus, found.slices, found.hosts, found.axes) == NAMES[name]
    assert found.name == name
    assert pod(found.name) == found


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("v9:4x4", "a chip of cpu, v4, v5e, v5p, v6e, tpu7x, a100, h100, h200, b200"),
        ("v5p", "v5p:16x16x16 (a torus of chips)"),
        ("v5p:16x16", "has 3 dimensions and this has 2"),
        ("v5e:4x4x4", "as v5e:4x4"),
        ("v5p:0x4x4", "CHIP:SHAPE"),
        ("v5p:4x4x4*0", "CHIP:SHAPE"),
        ("h100:16x16", "at most 8 per host"),
        ("h100:2x2x2", "hosts x devices of each"),
        ("h100:2x8*2", "without slices"),
        ("v5p: 4x4x4", "CHIP:SHAPE"),
        ("", "CHIP:SHAPE"),
    ],
)
def test_a_wrong_name_says_what_to_write(name, remedy):
    with pytest.raises(ValueError, match=re.escape(f"topology is {name!r}")) as error:
        pod(name)
    assert remedy in str(error.value)


def closed(name):
    return tuple(d.closed for d in pod(name).dimensions if d.torus)


def test_tori_are_closed_where_the_hardware_closes_them():
    assert closed("v5p:4x4x8") == closed("v4:4x4x4") == closed("tpu7x:8x4x4") == (True,) * 3
    assert closed("v5p:2x2x4") == (False,) * 3  # less than a cube
    assert closed("v5e:8x16") == (False, True)
    assert closed("v6e:4x8") == (False, False)


def test_the_chips_of_a_host_share_its_network():
    slices = pod("v5p:4x4x4*2").dimensions[0]
    assert (slices.name, slices.size, slices.sharers, slices.torus) == ("slice", 2, 4, False)
    assert pod("tpu7x:4x4x4*2").dimensions[0].sharers == 8  # devices
    assert pod("h100:16x8").dimensions[0].sharers == 1  # each GPU has its own card


def test_a_platform_stands_for_a_chip_of_the_one_table():
    assert TYPICAL == {"cpu": "cpu", "gpu": "h100", "tpu": "v5p"}
    for platform, name in TYPICAL.items():
        assert Topology(platform, ()).constants == CHIPS[name]
        assert Topology(platform, (), 2).constants == CHIPS[name].across_processes()
    assert CHIPS["h100"].across_processes().link == CHIPS["h100"].network
    assert CHIPS["v5p"].across_processes().link == CHIPS["v5p"].link
    assert not CHIPS["cpu"].across_processes().shared


@pytest.mark.parametrize("name", CHIPS)
def test_a_row_is_of_the_order_of_magnitude_of_its_kind(name):
    chip = CHIPS[name]
    assert chip.name == name
    if chip.platform == "cpu":
        return
    assert 10e9 < chip.hbm_bytes < 300e9
    assert 5e11 < chip.hbm_bytes_per_s < 1e13
    assert 100 < chip.flops_per_s / chip.hbm_bytes_per_s < 700  # operations a byte
    assert chip.hbm_bytes_per_s > chip.link.bytes_per_s > chip.network.bytes_per_s / chip.per_host
    assert chip.link.latency_s < chip.network.latency_s


def test_axes_of_one_s_own_lie_along_the_pod():
    where = pod("v5p:16x16x16")
    flat, own = where.topology({"all": 4096}), where.topology()
    shape = Workload(1, 1, 1 << 20, 32, 8, 128, 128, 2)
    # Powers of two: the same exchanges in the same order.
    assert traffic("butterfly", shape, flat) == traffic("butterfly", shape, own)
    assert where.topology({"a": 64, "b": 64}).sizes == (64, 64)
    with pytest.raises(ValueError, match=r"mesh is \{'all': 8\}, 8 devices") as error:
        where.topology({"all": 8})
    assert "axes whose product is that" in str(error.value)


def test_measured_links_stand_in_for_the_wiring():
    where, link = pod("h100:2x8"), Link(1e-3, 1e6)
    measured = where.topology(links={"host": link, "device": Link(1e-4, 1e7)})
    assert measured.axis_dimensions[0][0].link == measured.network[0].link == link
    assert measured.chip == CHIPS["h100"]
    with pytest.raises(ValueError, match=r"links is for \('device',\)") as error:
        where.topology(links={"device": link})
    assert "['host'] are not measured" in str(error.value)


def test_a_pod_is_a_value():
    assert Pod(CHIPS["v5e"], (4, 4)) == pod("v5e:4x4")
    assert hash(pod("v5e:4x4")) == hash(pod("v5e:4x4"))


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA B200", "b200"),
        ("cpu", None),
        ("TPU v3", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_a_chip_by_the_name_that_jax_has_for_it(kind, name):
    assert chip_of(kind) is (None if name is None else CHIPS[name])
