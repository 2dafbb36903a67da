"""`distattn check`: it finds errors, measures links and times, and passes if all is well."""

import argparse
import dataclasses
import json
import os
import re
import sys

import jax
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from distattn.attention import device_step
from distattn.cli import main
from distattn.cli.check import command as check
from distattn.cli.check import runner
from distattn.cli.check import text as texts
from distattn.cli.check.runner import (
    HOPS,
    NAMED,
    Effort,
    Problem,
    Subject,
    cases,
    examine,
    measure_links,
    measure_strategies,
    on_mesh,
    predictions,
    subjects,
)
from distattn.cli.check.text import report_text
from distattn.planning import cost
from distattn.planning.cost import Link, Topology
from tests.jobs import ROOT, ended_well

LIMIT_S = 200  # for the launched job
EPS = np.finfo(np.float32).eps
KEYS = {
    "versions",
    "platform",
    "device_kind",
    "devices",
    "processes",
    "mesh",
    "checks",
    "not_checked",
    "between_devices_checked",
    "replicas_equal",
    "axes",
    "strategy_s",
    "auto",
    "verdict",
}


def mesh_of(**axes):
    kinds = (AxisType.Auto,) * len(axes)
    devices = jax.devices()[: int(np.prod(list(axes.values())))]
    return jax.make_mesh(tuple(axes.values()), tuple(axes), kinds, devices=devices)


def quiet(what):
    pass


@pytest.fixture
def started(monkeypatch):
    """Skip the start of the command: JAX runs already in this process."""
    monkeypatch.setattr(check, "initialize", lambda *, cpu_devices: None)


@pytest.fixture
def broken(monkeypatch):
    """Put a function of (state, axes) behind every all-reduce, and compile all programs again."""

    def breaks(change):
        real = device_step.all_reduce

        def all_reduce(state, axes, *, schedule):
            return change(real(state, axes, schedule=schedule), axes)

        monkeypatch.setattr(device_step, "all_reduce", all_reduce)
        jax.clear_caches()

    yield breaks
    monkeypatch.undo()
    jax.clear_caches()


def scaled(state, factor):
    return dataclasses.replace(state, weighted_sum=state.weighted_sum * factor)


def test_a_mesh_that_is_no_power_of_two():
    mesh = mesh_of(a=2, b=3)
    names = ("butterfly", "reduce_scatter", "ulysses_ring")  # each kind of movement
    found, left_out = subjects(mesh, names, quick=True)
    chosen = [subject for subject in found if subject.axes == ("a", "b")]
    assert [subject.strategy for subject in chosen] == list(names)
    assert left_out == []
    checks = runner.check(mesh, chosen, 1, quiet)
    for found in checks:
        assert found["pass"], found
        assert found["unequal_replicas"] == []
        assert 0 < found["error_fraction"] <= 1  # something was compared


def test_what_is_checked():
    mesh = mesh_of(host=2, one=1, device=4)
    quick, left_out = subjects(mesh, NAMED, quick=True)
    assert left_out == ["fused: needs TPUs"]
    full, _ = subjects(mesh, NAMED, quick=False)
    assert set(quick) < set(full)
    here = [n for n in NAMED if n != "fused"]  # a kernel for TPUs
    assert {s.strategy for s in quick} == set(here)
    orders = {("host", "device"), ("device", "host"), ("host",), ("device",)}
    assert {s.axes for s in quick} == {s.axes for s in full} == orders
    for order in orders:
        of_order = [s.strategy for s in full if s.axes == order]
        assert of_order == [n for n in here if len(order) == 2 or not n.startswith("ulysses_")]
    alone, _ = subjects(mesh_of(x=1, y=1), ("butterfly", "ring"), quick=True)
    assert alone == [Subject("butterfly", ("y",)), Subject("ring", ("y",))]
    three, _ = subjects(mesh_of(x=2, y=2, z=2), ("psum",), quick=False)
    assert len({s.axes for s in three}) == 6 + 3


def test_strategies_that_need_very_many_heads_are_left_out_and_said(monkeypatch):
    monkeypatch.setattr(runner, "MAX_HEADS", 6)
    found, left_out = subjects(mesh_of(a=2, b=4), ("ulysses", "ring"), quick=True)
    assert "ulysses over a, b" not in {s.name for s in found}
    assert left_out[0] == "ulysses over a, b: needs 8 heads"


def test_the_problem_has_all_that_the_promise_names():
    problem = Problem.draw(8, 4, 0)
    positions = problem.arguments["key_positions"]
    assert (positions < 0).any()
    assert (positions[:, -runner.SLOTS :] < 0).all()  # a device without a key
    for row in positions:
        places = row[row >= 0]
        assert len(set(places)) == len(places)
        assert (np.diff(places) < 0).any()
    heads, kv_heads = (problem.arguments[name].shape[2] for name in ("query", "key"))
    assert heads > kv_heads > 1
    assert not np.array_equal(Problem.draw(8, 4, 1).arguments["key"], problem.arguments["key"])


def test_a_report_of_what_is_well(started, capfd, tmp_path):
    file = tmp_path / "report.json"
    arguments = ["--quick", "--mesh", "host=2,device=4", "--strategies", "psum,all_gather"]
    assert main(["check", *arguments, "--repeats", "2", "--json", str(file)]) == 0
    captured = capfd.readouterr()
    assert "verdict: all 5 checks passed\n" in captured.out
    assert "replicas: equal bit for bit on all devices" in captured.out
    assert "8 cpu devices in 1 process, as a mesh of host=2, device=4" in captured.out
    assert "correctness 1/5: psum over host, device" in captured.err
    report = json.loads(file.read_text())
    assert set(report) == KEYS
    assert (report["platform"], report["devices"], report["processes"]) == ("cpu", 8, 1)
    assert report["mesh"] == {"host": 2, "device": 4}
    assert report["versions"]["jax"] == jax.__version__
    assert report["between_devices_checked"] is True
    assert report["replicas_equal"] is True
    assert re.search(r"^  strategy over axes +worst error +in result +verdict$", captured.out, re.M)
    assert re.search(r"^  psum over host, device +0\.\d+ +\w+ +ok$", captured.out, re.M)
    assert report["verdict"] == "passed"
    for found in report["checks"]:
        assert set(found) >= {"name", "strategy", "pass", "error_fraction"}
        assert found["pass"]
        assert 0 < found["error_fraction"] <= 1
    assert list(report["axes"]) == ["host", "device"]
    for axis in report["axes"].values():
        assert axis["latency_s"] >= 0
        assert axis["bytes_per_s"] > 0
        assert axis["residual"] >= 0
        assert [sample["bytes"] for sample in axis["samples"]] == [8, 16 << 10, 256 << 10]
    assert len(report["strategy_s"]) == 2  # one replicated query, and many
    for name, seconds in report["strategy_s"].items():
        assert set(seconds) == {"psum", "all_gather"}
        assert min(seconds.values()) > 0
        auto = report["auto"][name]
        assert {auto["by_table"], auto["by_measured_links"]} <= set(seconds)
        assert seconds[auto["fastest"]] == min(seconds.values())
        assert auto["slower_than_fastest"] >= 1
    links = cost.links_from(report)
    assert list(links) == ["host", "device"]
    Topology("cpu", (2, 4), 1, links=tuple(links.values()))


def test_a_strategy_that_is_wrong_is_found(started, broken, capfd):
    broken(lambda state, axes: scaled(state, 1 + 1e-5))
    arguments = ["--mesh", "d=8", "--quick", "--strategies", "psum", "--repeats", "1"]
    assert main(["check", *arguments, "--json"]) == 1
    captured = capfd.readouterr()
    report = json.loads(captured.out)  # and nothing else
    assert report["verdict"] == "failed"
    assert report["replicas_equal"]
    for found in report["checks"]:
        assert not found["pass"]
        assert found["error_fraction"] > 1
    assert "verdict: FAILED: 1 of 1 checks failed" in captured.err
    assert "psum over d: out is off by" in captured.err
    assert "do not trust" in captured.err


def test_a_result_that_is_not_finite_is_found_and_is_json(broken):
    broken(lambda state, axes: scaled(state, float("nan")))
    report = examine(mesh_of(x=2), Effort(True, (8, 64), 1, ("psum",)), quiet)
    assert report["verdict"] == "failed"
    assert report["checks"][0]["error_fraction"] is None
    json.dumps(report, allow_nan=False)
    assert "is not finite where it should be" in report_text(report)


def test_replicas_that_differ_are_found(broken):
    # By less than the tolerance: only bits can tell.
    broken(lambda state, axes: scaled(state, 1 + EPS * lax.axis_index(axes).astype(EPS.dtype)))
    report = examine(mesh_of(x=2), Effort(True, (8, 64), 1, ("psum",)), quiet)
    assert [found["pass"] for found in report["checks"]] == [True]
    assert report["replicas_equal"] is False
    assert report["verdict"] == "failed"
    assert report["checks"][0]["unequal_replicas"][0].startswith("out differs between")
    assert "replicas: NOT EQUAL\n  psum over x: out differs between devices 0 | 1" in report_text(
        report
    )
    assert "verdict: FAILED: replicas differ in 1" in report_text(report)


def refuse(state, axes):
    raise ValueError("there is no such thing")


def test_a_strategy_that_does_not_compile_is_a_failure_and_the_others_go_on(broken):
    broken(refuse)
    report = examine(mesh_of(x=2), Effort(True, strategies=("psum", "gather_kv")), quiet)
    refused, fine = report["checks"]
    assert refused["failure"] == "ValueError: there is no such thing"
    assert not refused["pass"]
    assert fine["pass"]
    assert "pass one that passed (strategy='gather_kv')" in report_text(report)
    assert "not measured, because a strategy does not run" in report_text(report)


def test_nothing_that_ran_is_no_pass(broken):
    broken(refuse)
    report = examine(mesh_of(x=2), Effort(True, strategies=("psum",)), quiet)
    assert report["replicas_equal"] is False
    assert "replicas: not compared, because no strategy runs" in report_text(report)


def test_pieces_are_told_apart():
    # An array that is cut over x and has replicas over y, of which one has another bit.
    mesh = mesh_of(x=2, y=2)
    cut = NamedSharding(mesh, PartitionSpec(None, "x"))
    problem = Problem.draw(2, 4, 0)
    whole = problem.expected["dkey"].astype(np.float32)
    pieces = []
    for device, index in cut.addressable_devices_indices_map(whole.shape).items():
        piece = whole[index].copy()
        if device == mesh.devices[1, 1]:
            piece[0, 0, 0, 0] = np.nextafter(piece[0, 0, 0, 0], np.float32(np.inf))
        pieces.append(jax.device_put(piece, device))
    array = jax.make_array_from_single_device_arrays(whole.shape, cut, pieces)
    found = runner.compare(problem, {"dkey": array})
    assert 0 < found["error"] <= 1
    result = runner.summarize(Subject("psum", ("x",)), [found])
    numbers = [device.id for device in mesh.devices[1]]
    assert result["unequal_replicas"] == [
        f"dkey[0:2, 4:8, 0:2, 0:8] differs between devices {numbers[0]} | {numbers[1]}"
    ]


def test_one_device_moves_nothing():
    report = examine(mesh_of(host=1, device=1), Effort(True, strategies=("butterfly",)), quiet)
    assert report["axes"] == report["strategy_s"] == report["auto"] == {}
    assert "one device: nothing is exchanged" in report_text(report)
    assert "replicas: none on one device, nothing was compared" in report_text(report)
    verdict = report_text(report).partition("verdict: ")[2]
    assert verdict.startswith(
        "the one check passed on one device; NOTHING BETWEEN DEVICES WAS CHECK"
    )
    assert "pass --cpu-devices 8" in verdict
    assert (report["between_devices_checked"], report["replicas_equal"]) == (False, None)
    assert report["verdict"] == "passed"


def test_only_json_is_on_stdout_whatever_libraries_say_there(started, monkeypatch, capfd):
    report = examine(mesh_of(host=1, device=1), Effort(True, strategies=("psum",)), quiet)

    def noisy(*_):
        os.write(1, b"[Gloo] Rank 0 is connected\n")
        return report

    monkeypatch.setattr(check, "examine", noisy)
    for arguments in (["--json"], ["--json", "-"]):
        assert main(["check", *arguments]) == 0
        captured = capfd.readouterr()
        assert json.loads(captured.out) == report
        assert "Rank 0 is connected" in captured.err
        assert "verdict: the one check passed on one device; NOTHING BETWEEN" in captured.err


def test_times_are_of_one_hop(monkeypatch):
    seconds = {8: 1e-3, 4096: 2e-3}

    def medians(programs, repeats):
        arrays = {name: arguments[0] for name, (_, arguments) in programs.items()}
        return {name: HOPS * seconds[x.nbytes // 2] for name, x in arrays.items()}

    monkeypatch.setattr(runner, "medians", medians)
    axis = measure_links(mesh_of(x=2), ("x",), (8, 4096), 3, quiet)["x"]
    assert axis["samples"] == [{"bytes": 8, "seconds": 1e-3}, {"bytes": 4096, "seconds": 2e-3}]
    assert axis["bytes_per_s"] == pytest.approx(4088 / 1e-3)


def test_hops_go_to_the_neighbour_along_the_axis():
    mesh = mesh_of(x=2, y=3)
    x = on_mesh(np.arange(6, dtype=np.float32), mesh, PartitionSpec(("x", "y")))
    assert HOPS % 3 == 2
    moved = np.asarray(jax.jit(runner.hops(mesh, "y"))(x)).reshape(2, 3)
    np.testing.assert_array_equal(moved, np.roll(np.arange(6).reshape(2, 3), 2, axis=1))


def test_auto_by_measured_links_is_what_the_planner_says_for_them(monkeypatch):
    def medians(programs, repeats):
        return {name: 1.0 + len(name) for name in programs}

    monkeypatch.setattr(runner, "prepare", lambda name, f, *arrays: None)
    monkeypatch.setattr(runner, "medians", medians)
    mesh = mesh_of(host=2, device=4)
    far = {name: Link(1.0, 1e12) for name in mesh.axis_names}
    names = ("butterfly", "psum", "gather_kv", "ring")
    sizes = cases(8, quick=True)
    times = [measure_strategies(mesh, size, names, 1, quiet) for size in sizes]
    assert list(map(list, times)) == [["butterfly", "psum"]] * 2 + [["gather_kv", "ring"]] * 2
    found = [predictions(mesh, *both, far) for both in zip(sizes, times, strict=True)]
    assert {x["by_table"] for x in found[:2]} == {"psum"}  # threads: few launches
    # A second a message: few of them.
    assert {x["by_measured_links"] for x in found[:2]} == {"butterfly"}
    assert [x["fastest"] for x in found] == ["psum", "psum", "ring", "ring"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--mesh", "host=2,device=3"], "--mesh: 2 x 3 = 6 devices, and there are 8"),
        (["--mesh", "host:2"], "'host:2' is not axes with their sizes"),
        (["--mesh", "host=2,host=4"], "each axis once"),
        (["--mesh", "host=0"], "'host=0' is not axes"),
        (["--strategies", "butterfly,star"], "'butterfly,star' is not some of butterfly, "),
        (["--sizes", "8"], "two sizes or more"),
        (["--sizes", "1,4"], "two sizes or more"),
        (["--sizes", "8,16Q"], "'8,16Q' is not numbers of bytes"),
        (["--repeats", "0"], "'0' is not a whole number of at least 1"),
        (["--cpu-devices", "x"], "'x' is not a whole number"),
        (["--json", "/dev/null/report.json"], "--json /dev/null/report.json: Not a directory"),
        (
            ["--strategies", "ulysses_ring"],
            "'device': 8}: ulysses_ring: needs two axes of devices; name",
        ),
        (["--json", "/"], "--json /: Is a directory"),
    ],
)
def test_wrong_use(started, monkeypatch, capfd, arguments, says):
    monkeypatch.setattr(check, "examine", lambda *_: pytest.fail("it began all the same"))
    try:
        code = main(["check", *arguments])
    except SystemExit as leaving:  # argparse leaves so
        code = leaving.code
    assert code == 2
    captured = capfd.readouterr()
    assert says in " ".join(captured.err.split())
    assert captured.out == ""


def test_too_late_for_other_devices_is_said(capfd):
    assert main(["check", "--cpu-devices", "3"]) == 2
    assert "should be updated before backends are initialized" in capfd.readouterr().err


def test_a_file_that_can_be_written_is_left_as_it_was(tmp_path):
    new, old = tmp_path / "new.json", tmp_path / "old.json"
    old.write_text("before")
    assert check._unwritable(str(new)) == check._unwritable(str(old)) == ""
    assert not new.exists()
    assert old.read_text() == "before"


def test_arguments_are_read():
    parser = argparse.ArgumentParser()
    check.add(parser.add_subparsers())
    options = parser.parse_args(
        ["check", "--mesh", "a=2,b=3,c=4", "--sizes", "64K,9,1m", "--strategies", "ring,psum,ring"]
    )
    assert options.mesh == {"a": 2, "b": 3, "c": 4}
    assert options.sizes == (12, 64 << 10, 1 << 20)
    assert options.strategies == ("ring", "psum")
    assert options.json is None


def test_two_processes(tmp_path):
    file = tmp_path / "report.json"
    launch = ["launch", "-n", "2", "--devices-per-process", "2", "--timeout", str(LIMIT_S), "--"]
    command = ["check", "--quick", "--strategies", "psum", "--repeats", "2", "--json", str(file)]
    module = [sys.executable, "-m", "distattn"]
    # XLA_FLAGS of conftest.py too: quick to compile.
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = ended_well([*module, *launch, *module, *command], env=env, timeout_s=LIMIT_S + 20)
    assert "[0] verdict: all 4 checks passed" in done.stdout
    # Nothing from rank 1, but what gloo says to stdout, which may be torn to pieces.
    other = [line for line in done.stdout.splitlines() if line.startswith("[1]")]
    assert [line for line in other if "distattn" in line or "check" in line] == []
    report = json.loads(file.read_text())
    assert (report["processes"], report["devices"]) == (2, 4)
    assert report["mesh"] == {"host": 2, "device": 2}
    assert list(report["axes"]) == ["host", "device"]
    assert report["replicas_equal"]
    launch_s = Topology("cpu", (), 2).constants.launch_s
    for name, link in cost.links_from(report).items():
        axis = report["axes"][name]
        assert link == Link(max(0.0, axis["latency_s"] - launch_s), axis["bytes_per_s"])


def test_report_of_what_runs_where(started, monkeypatch, capsys):
    for name in [name for name in os.environ if name.startswith(texts.VARIABLES)]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("SOME_TOKEN", "secret")
    monkeypatch.setenv("XLA_FLAGS", "--xla_mine=1")
    monkeypatch.setenv("DISTATTN_PROCESS_ID", "0")
    assert main(["check", "--report", "--mesh", "host=2,device=4"]) == 0
    text = capsys.readouterr().out
    for part in (
        f"jax {jax.__version__}",
        "equinox ",
        "8 cpu (cpu) in 1 of 1 processes",
        "host=2 Auto, device=4 Auto",
        "jax_numpy_dtype_promotion=strict",
    ):
        assert part in text
    assert "secret" not in text
    lines = text.splitlines()
    assert (lines[0], lines[-1]) == ("```text", "```")  # one block for an issue
    assert "" not in lines
    told = [re.split(r"  +", line, maxsplit=1) for line in lines if line.startswith("env")]
    assert told == [
        ["environment", "DISTATTN_PROCESS_ID=0"],
        ["environment", "XLA_FLAGS=--xla_mine=1"],
    ]


def test_a_report_without_variables_or_packages_says_where_it_has_looked(monkeypatch):
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr(texts, "PACKAGES", ("no-such-package", "nor-this-one"))
    text = texts.environment_text(mesh_of(x=2))
    assert re.search(r"^also installed +none of no-such-package, nor-this-one$", text, re.M)
    assert re.search(r"^environment +no variable that begins with JAX_, XLA_, ", text, re.M)
