"""Plans for pods: the laws of memory and time, the same choice as combine='auto', and the command."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import types

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distattn.cli import main
from distattn.cost import time_s
from distattn.link import Link
from distattn.memory import bytes_per_device, largest_context
from distattn.plan import backward_traffic, plan
from distattn.planner import choose
from distattn.pods import pod
from distattn.roofline import BACKWARD, local_s
from distattn.tiles import Machine, choose_tiling
from distattn.traffic import FORMULAS, QUERY_REPLICATED, QUERY_SHARDED, traffic
from distattn.workload import Workload

LLAMA = Workload(context=33_000_000, heads=32, kv_heads=8, head_dim=128, layers=80)
SMALL = Workload(context=1 << 20, heads=32, kv_heads=8, head_dim=128, layers=4)
TRAINING = dataclasses.replace(SMALL, queries=1 << 20, training=True)

pods = st.sampled_from(
    [
        "v5p:4x4x4",
        "v5e:4x4",
        "v5e:1x1",
        "v4:2x3x5",
        "tpu7x:4x4x4*2",
        "h100:3x8",
        "b200:8",
        "cpu:2x4",
    ]
).map(pod)
workloads = st.builds(
    Workload,
    context=st.integers(1, 1 << 24),
    queries=st.sampled_from([1, 8, 1024]),
    batch=st.integers(1, 4),
    heads=st.sampled_from([8, 32]),
    kv_heads=st.sampled_from([1, 8]),
    head_dim=st.sampled_from([64, 128]),
    value_dim=st.sampled_from([None, 64]),
    layers=st.integers(1, 80),
    dtype_bytes=st.sampled_from([1, 2, 4]),
    training=st.booleans(),
)
combines = st.sampled_from(sorted(FORMULAS))


def test_a_pod_of_4096_decodes_with_a_butterfly():
    found = plan(LLAMA, pod("v5p:16x16x16"))
    assert (found.devices, found.combine, found.rounds) == (4096, "butterfly", 12)
    assert found.axis_order == ("z", "y", "x")
    assert found.fits
    assert not found.query_sharded
    keys = -(-33_000_000 // 4096)
    state = 4 * 32 * 130
    assert found.bytes_per_device == 80 * keys * 8 * 256 * 2 + 32 * 256 * 2 + 2 * state
    assert found.bytes_sent_per_device == 80 * 12 * state
    assert [x.combine for x in found.alternatives] == ["psum", "all_gather"]
    assert found.reason.startswith("butterfly on v5p:16x16x16, 4096 devices: 4.8")
    assert "the least time, against psum" in found.reason
    assert "84 more messages a layer" in found.alternatives[0].why


@given(workloads, pods)
def test_the_time_is_that_of_the_parts(workload, where):
    found = plan(workload, where)
    assert found.predicted_s == pytest.approx(sum(found.breakdown.values()))
    assert found.breakdown["local_s"] > 0
    assert found.breakdown["exchange_s"] >= 0
    ranking = [found, *found.alternatives]
    assert sorted(ranking, key=lambda x: (not x.fits, x.predicted_s)) == ranking
    assert all(x.why for x in found.alternatives)


@given(workloads.filter(lambda w: not w.training), pods)
def test_the_exchange_is_what_auto_predicts(workload, where):
    found, topology = plan(workload, where), where.topology()
    choice = choose(workload.shape, topology, query_sharded=found.query_sharded)
    names = QUERY_SHARDED if found.query_sharded else QUERY_REPLICATED
    for x in (found, *found.alternatives):
        assert x.combine in names
        exchange_s = x.predicted_s - found.breakdown["local_s"]
        predicted = workload.layers * time_s(traffic(x.combine, workload.shape, topology), topology)
        assert exchange_s == pytest.approx(predicted, abs=1e-9 * found.predicted_s)
    if all(x.fits for x in (found, *found.alternatives)):
        assert found.combine == choice.combine
        assert [x.combine for x in found.alternatives] == [name for name, _ in choice.alternatives]


@given(workloads, combines, st.integers(1, 6), st.integers(26, 38))
def test_the_largest_context_is_the_largest(workload, combine, devices, log_bytes):
    sizes, limit = (devices, 2), 1 << log_bytes
    longest = largest_context(combine, workload, sizes, limit)
    for context, fitting in ((longest, True), (longest + 1, False)):
        if context:
            held = bytes_per_device(combine, workload.with_context(context), sizes)
            assert (held <= limit) == fitting


# The others hold something of every device: a state, or padded keys or rows; and one device exchanges
# nothing, so nothing arrives there.
@given(workloads, st.sampled_from(["butterfly", "psum", "ring"]), st.integers(2, 64))
def test_more_devices_never_hold_less(workload, combine, devices):
    few, more = (largest_context(combine, workload, (d,), 1 << 34) for d in (devices, devices + 1))
    assert few <= more


@pytest.mark.parametrize("queries", [1, 1 << 20])
def test_twice_the_pod_holds_a_longer_context(queries):
    names = ("v5p:4x4x4", "v5p:4x4x8", "v5p:4x8x8", "v5p:8x8x8", "v5p:8x8x8*2")
    step = dataclasses.replace(SMALL, queries=queries)
    lengths = [plan(step, pod(name)).largest_context for name in names]
    assert lengths == sorted(set(lengths))
    if queries == 1:  # a state more or less
        for few, more in zip(lengths, lengths[1:], strict=False):
            assert more == pytest.approx(2 * few, rel=1e-4)


@given(workloads, combines, st.integers(1, 64), st.integers(1, 1 << 20))
def test_memory_never_falls_with_keys_rows_or_layers(workload, combine, devices, keys):
    def held(**changes):
        return bytes_per_device(combine, dataclasses.replace(workload, **changes), (devices, 2))

    assert held(context=workload.context + keys) >= held()
    assert held(queries=workload.queries + keys) >= held()
    assert held(layers=workload.layers + 1) > held()
    assert held(batch=workload.batch + 1) > held()


def test_a_combine_that_does_not_fit_is_not_taken_over_one_that_does():
    # Over NVLink one launch is fastest, and it holds a state of each device.
    where = pod("h200:8")
    free = plan(SMALL, where)
    lean = min((free, *free.alternatives), key=lambda x: x.bytes_per_device)
    assert free.combine == "all_gather"
    assert free.bytes_per_device > lean.bytes_per_device
    tight = where.hbm_bytes - lean.bytes_per_device
    found = plan(SMALL, where, reserved_bytes=tight)
    assert found.combine in ("butterfly", "psum")
    assert found.fits
    assert found.predicted_s > free.predicted_s
    assert found.alternatives[-1].combine == "all_gather"
    assert found.alternatives[-1].why.startswith("does not fit: ")
    assert found.reason.endswith("; all_gather not fitting")
    nothing = plan(SMALL, where, reserved_bytes=tight + 1)
    assert not nothing.fits
    assert "no combine fits" in nothing.reason
    # Keys are padded to as many on each device.
    longest = max(x.largest_context for x in nothing.alternatives)
    assert longest == SMALL.context - 8
    assert f"Take more devices, or a context of at most {longest}" in nothing.reason


def test_a_named_combine_is_taken_whatever_it_costs():
    found = plan(LLAMA, pod("v5p:16x16x16"), combine="all_gather")
    assert found.combine == "all_gather"
    assert found.alternatives[0].combine == "butterfly"
    assert re.match(r"faster, 0\.[23]\d of the time; it was not named", found.alternatives[0].why)
    assert "named by you, against butterfly" in found.reason
    large = plan(
        dataclasses.replace(LLAMA, context=1_275_000_000), pod("v5p:16x16x16"), combine="all_gather"
    )
    assert "it does not fit" in large.reason
    assert "where butterfly does" in large.reason


def test_what_is_not_hidden_is_why_a_gather_loses_to_a_ring():
    # Heads that do not divide, and enough to multiply while keys and values are on their way.
    prompt = Workload(context=1 << 20, queries=1 << 20, heads=33, kv_heads=11)
    found = plan(prompt, pod("h100:16x8"))
    assert found.combine == "ring"
    assert found.alternatives[0].combine == "gather_kv"
    assert found.alternatives[0].why.endswith("nothing sent while attention is computed")


def test_queries_are_sharded_where_there_are_as_many_as_devices():
    where = pod("v5e:4x4")
    for queries, sharded in ((1, False), (15, False), (16, True)):
        assert plan(dataclasses.replace(SMALL, queries=queries), where).query_sharded == sharded
    assert plan(SMALL, where, query_sharded=True).combine in QUERY_SHARDED
    assert plan(TRAINING, where, query_sharded=False).combine in QUERY_REPLICATED


def test_decoding_reads_keys_and_values_once_and_a_prompt_multiplies():
    chip = pod("v5p:4x4x4").chip
    bytes_read = (1 << 20) / 64 * 8 * 256 * 2 + 32 * 256 * 2
    assert local_s(SMALL.shape, 64, chip) == pytest.approx(bytes_read / chip.hbm_bytes_per_s)
    prompt = dataclasses.replace(SMALL, queries=1 << 20).shape
    forward = 2 * (1 << 40) * 32 * 256 / 64 / chip.attained_flops_per_s
    assert local_s(prompt, 64, chip) == pytest.approx(forward)
    both = local_s(prompt, 64, chip, query_sharded=True, training=True)
    assert both == pytest.approx((1 + BACKWARD) * forward)


def test_two_devices_of_a_chip_share_its_memory_and_products():
    where = pod("tpu7x:4x4x4")
    assert where.hbm_bytes == 96 << 30
    assert local_s(SMALL.shape, 128, where.chip) == pytest.approx(
        ((1 << 20) / 128 * 4096 + 32 * 512) / (7.38e12 / 2)
    )


def test_devices_of_one_process_share_its_cores():
    one, eight = (local_s(SMALL.shape, d, pod("cpu:8").chip) for d in (1, 8))
    assert eight == pytest.approx(one, rel=1e-3)  # each reads the query
    apart = local_s(SMALL.shape, 8, pod("cpu:8").chip, processes=8)
    assert apart == pytest.approx(one / 8, rel=1e-3)


@pytest.mark.parametrize("name", sorted(FORMULAS))
def test_backwards_gradients_go_back_as_keys_and_values_came(name):
    topology = pod("h100:2x8").topology()
    shape, wide = TRAINING.shape, dataclasses.replace(TRAINING.shape, itemsize=4)
    back = backward_traffic(name, shape, topology)
    assert back.bytes_sent > 0
    if name in QUERY_REPLICATED:  # keys and values stay: one sum of the query's gradient
        assert back.launches in (1, 4)
    if name in ("ring", "gather_kv"):
        there = traffic(name, shape, topology).bytes_sent
        assert back.bytes_sent == pytest.approx(there + traffic(name, wide, topology).bytes_sent)
    assert backward_traffic(name, shape, pod("h100:1").topology()).bytes_sent == 0


def test_training_holds_and_takes_more_than_a_prompt():
    where = pod("v5p:4x4x4")
    prompt = plan(dataclasses.replace(TRAINING, training=False), where)
    for x in (found := plan(TRAINING, where), *found.alternatives):
        same = next(y for y in (prompt, *prompt.alternatives) if y.combine == x.combine)
        assert x.predicted_s > 2 * same.predicted_s
        assert x.bytes_per_device > same.bytes_per_device
        assert x.largest_context < same.largest_context


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("queries", [1, 1 << 20])
@pytest.mark.parametrize("name", ["v5p:4x4x4", "h100:8", "cpu:8"])
def test_a_block_is_as_large_as_the_device_cuts_it(name, queries, training):
    where = pod(name)
    step = dataclasses.replace(SMALL, queries=queries, training=training)
    found = plan(step, where)
    keys, rows = step.context // where.devices, max(queries // where.devices, 1)
    operands = types.SimpleNamespace(
        query=types.SimpleNamespace(shape=(1, rows, 32, 128)),
        key=types.SimpleNamespace(shape=(1, keys, 8, 128)),
        mask=types.SimpleNamespace(key_positions=None, compares_positions=False),
    )
    tiling = choose_tiling(operands, Machine(where.chip.platform), backward=training)
    assert found.block_size == tiling.key


# Microseconds of one layer: XLA:TPU's own estimate of the compiled program, a packed butterfly for one
# token, N=32 K=8 H=128 bfloat16, 8192 keys a chip; and the model's time over it. The model reads keys
# and values once at full bandwidth and counts hops; the compiler counts what its fusions read, more than
# once, and 1.5 us a round whatever the distance. So the model is below where reading dominates.
XLA_US = {
    "v5p:4x4x4": (53, 0.51),
    "v5p:16x16x16": (62, 0.97),
    "v5e:16x16": (179, 0.44),
    "v6e:16x16": (81, 0.65),
    "tpu7x:4x4x4": (35, 0.79),
}


@pytest.mark.parametrize("name", XLA_US)
def test_how_far_the_model_is_from_the_compiler(name):
    estimate_us, ratio = XLA_US[name]
    where = pod(name)
    found = plan(Workload(context=8192 * where.devices), where, combine="butterfly")
    assert 1e6 * found.predicted_s / estimate_us == pytest.approx(ratio, abs=0.01)
    assert 1 / 2.3 < ratio < 2.3


def test_measured_links_are_taken():
    where = pod("cpu:4x2")
    slow = {"host": Link(1.0, 1e6), "device": Link(1e-6, 1e9)}
    found = plan(SMALL, where, links=slow)
    assert found.combine == "butterfly"
    assert found.breakdown["exchange_s"] > 4 * 2
    assert plan(SMALL, where).breakdown["exchange_s"] < 1


@pytest.mark.parametrize(
    ("call", "got", "remedy"),
    [
        (lambda: Workload(context=0), "context is 0", "1 or more"),
        (lambda: Workload(context=8, layers=1.5), "layers is 1.5", "whole number"),
        (lambda: Workload(context=8, heads=6, kv_heads=4), "heads is 6", "a multiple"),
        (
            lambda: plan(SMALL, pod("v5e:4x4"), combine="ring"),
            "combine is 'ring'; for 1 queries",
            "('all_gather', 'butterfly', 'psum'): name one, or pass query_sharded=True",
        ),
        (
            lambda: plan(SMALL, pod("v5e:4x4"), sharding={"a": 3}),
            "sharding is {'a': 3}",
            "as {'x': 4, 'y': 4}",
        ),
    ],
)
def test_a_wrong_call_says_what_to_do(call, got, remedy):
    with pytest.raises(ValueError, match=re.escape(got)) as error:
        call()
    assert remedy in str(error.value)


POD = ["plan", "--topology", "v5p:16x16x16", "--context", "33000000", "--heads", "32"]
MODEL = [*POD, "--kv-heads", "8", "--head-dim", "128", "--layers", "80", "--dtype", "bf16"]


def test_the_command_prints_a_table(capsys):
    assert main(MODEL) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "v5p:16x16x16, 4096 devices (x=16, y=16, z=16)" in out
    assert re.search(r"^combine +butterfly, over z, then y, then x$", out, re.M)
    assert re.search(
        r"^butterfly +4\.8\d ms +2\.46 GiB +15\.2 MiB +12 +1,275,064,320  taken$", out, re.M
    )
    assert re.search(r"^psum .* 1\.04 times as long", out, re.M)
    assert out.rstrip().splitlines()[-1].startswith("butterfly on v5p:16x16x16, 4096 devices: ")


def test_the_command_prints_json_and_nothing_else(capsys):
    assert main([*MODEL, "--json"]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert err == ""
    assert found == plan(LLAMA, pod("v5p:16x16x16")).as_json() | {
        "axis_order": ["z", "y", "x"],
        "alternatives": found["alternatives"],
    }
    assert {"devices", "combine", "predicted_s", "bytes_per_device", "alternatives"} <= set(found)
    assert found["devices"] == 4096
    assert [x["combine"] for x in found["alternatives"]] == ["psum", "all_gather"]


def test_the_command_starts_no_device():
    program = "import sys; from distattn.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", program, *MODEL, "--json"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env=os.environ | {"JAX_PLATFORMS": "no-such-platform"},  # which a start would not survive
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["devices"] == 4096


def test_the_command_trains_with_as_many_queries_as_keys(capsys):
    arguments = [*POD[:4], "1048576", *POD[5:], "--training", "--combine", "ring", "--json"]
    assert main(arguments) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["combine"] == "ring"
    assert found["query_sharded"]


def test_the_command_takes_what_check_measured(tmp_path, capsys):
    axes = {"host": {"latency_s": 0.5, "bytes_per_s": 1e6}}
    file = tmp_path / "check.json"
    file.write_text(json.dumps({"platform": "cpu", "processes": 4, "devices": 4, "axes": axes}))
    decode = ["plan", "--context", "4096", "--heads", "8", "--json", "--check", str(file)]
    assert main([*decode, "--topology", "cpu:4x1"]) == 0
    assert json.loads(capsys.readouterr().out)["predicted_s"] > 2 * 0.5
    assert main([*decode, "--topology", "cpu:8"]) == 2
    assert "measured on cpu in several processes" in capsys.readouterr().err
    assert main([*decode, "--topology", "cpu:4x2"]) == 2
    assert "['device'] are not measured" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--topology", "v9:4x4"], "topology is 'v9:4x4'"),
        (["--kv-heads", "5"], "heads is 32 and kv_heads is 5"),
        (["--combine", "ring"], "combine is 'ring'; for 1 queries"),
        (["--mesh", "a=5"], "sharding is {'a': 5}"),
        (["--check", "no-such-file"], "--check no-such-file: No such file"),
    ],
)
def test_what_the_user_can_mend_is_one_line_and_exit_code_2(arguments, said, capsys):
    assert main([*POD, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("distattn: ")
    assert said in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [["--context", "0"], ["--dtype", "int3"], ["--combine", "star"], ["--mesh", "a"]]
)
def test_arguments_that_do_not_parse_are_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as leaving:
        main([*POD, *arguments])
    assert leaving.value.code == 2
    assert arguments[0] in capsys.readouterr().err
