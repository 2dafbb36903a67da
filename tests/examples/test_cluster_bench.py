"""The benchmark of hosts with a delay between them: all of it that needs neither root nor hosts."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from tests.jobs import ended_well

BENCH = Path(__file__).parent.parent.parent / "scripts" / "bench"
sys.path.insert(0, str(BENCH))  # where its modules find each other

import cluster_host  # noqa: E402
import cluster_report  # noqa: E402
import figures  # noqa: E402
import hosts  # noqa: E402

import cluster  # noqa: E402

HOSTS, DELAYS = (2, 4, 8, 16), (0, 5)
# Milliseconds on D hosts at a delay: one message a doubling, and one a host.
LAWS = {
    "auto": lambda count, delay_ms: 1 + 2 * (1 + delay_ms) * math.log2(count),
    "xla": lambda count, delay_ms: 3 + 4 * (1 + delay_ms) * count,
}


def saved():
    results = [
        {
            "hosts": count,
            "delay_ms": delay_ms,
            "pass": direction,
            "ms": {name: law(count, delay_ms) for name, law in LAWS.items()},
            "round_trip_ms": 2.0 * delay_ms,
        }
        for count in HOSTS
        for direction in ("forward", "gradient")
        for delay_ms in DELAYS
    ]
    return {"results": results}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "saved.json"
    path.write_text(json.dumps(saved()))
    return path


def test_the_law_of_each_contender_is_found():
    fits = cluster_report.fits(saved()["results"])
    assert len(fits) == len(LAWS) * len(DELAYS) * 2
    for fit in fits:
        message = 1 + fit["delay_ms"]
        model, a, b = {"auto": ("log2 D", 1, 2), "xla": ("D", 3, 4)}[fit["contender"]]
        assert fit["better"] == model
        found = fit["models"][model]
        assert [round(found[name], 9) for name in ("a_ms", "b_ms")] == [a, b * message]
        assert round(found["residual_ms"], 9) == 0
        (other,) = set(fit["models"]) - {model}
        assert fit["models"][other]["residual_ms"] > 0.1


def test_residual_is_the_root_mean_square():
    a, b, residual = cluster_report.fit([1, 2, 3, 4], [0, 2, 0, 2])
    assert (round(a, 9), round(b, 9), round(residual**2, 9)) == (0, 0.4, 0.8)


def test_two_numbers_of_hosts_fit_everything_and_are_not_fitted():
    assert cluster_report.fits([row for row in saved()["results"] if row["hosts"] < 8]) == []


def test_table_has_times_ratios_and_fits():
    text = cluster_report.table(saved()["results"])
    assert text.count("one way") == 4
    at_5_ms = text.split("forward, 5 ms one way")[1]
    xla = next(line for line in at_5_ms.splitlines() if line.startswith("xla"))
    assert xla.split()[1:5] == ["51.0", "99.0", "195.0", "387.0"]
    assert xla.split()[5:9] == ["3.9x", "4.0x", "5.3x", "7.9x"]
    assert "3.0 + 24.0 D" in xla


@pytest.mark.parametrize(("suffix", "start"), [("svg", b"<?xml"), ("png", b"\x89PNG")])
def test_figure_is_drawn_from_what_was_saved(file, suffix, start, capsys):
    path = file.with_suffix(f".{suffix}")
    assert cluster.main(["--plot-from", str(file), "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(start)
    assert "forward, 5 ms one way" in capsys.readouterr().out


def test_the_figures_that_are_kept_are_those_of_the_numbers_that_are_kept(tmp_path):
    drawn = figures.draw(tmp_path)
    kept = sorted(path.name for path in figures.RESULTS.glob("*.svg"))
    assert sorted(path.name for path in drawn) == kept
    stale = [
        path.name for path in drawn if path.read_text() != (figures.RESULTS / path.name).read_text()
    ]
    assert stale == [], "python scripts/bench/figures.py draws them again"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--hosts", "1,2"], "'1,2' must be whole numbers from 2 to 64, as in 2,4"),
        (["--hosts", "two"], "'two' must be whole numbers from 2"),
        (["--delay-ms", "0.5"], "'0.5' must be whole numbers from 0 to 100"),
        (["--pass", "backward"], "'backward' is not some of forward, gradient"),
        (["--contenders", "auto,bruck"], "is not some of auto, butterfly"),
        (["--tokens", "0"], "'0' is not a whole number of at least 1"),
        (["--json", "absent/a.json"], "there is no directory 'absent'"),
        (["--plot", "a.gif"], "must end in one of .svg, .png, .pdf"),
        (["--plot-from", "absent.json"], "--plot-from needs --plot FILE"),
        (["--plot-from", "absent.json", "--plot", "a.svg"], "absent.json: No such file"),
        (["--plot-from", str(BENCH / "cluster"), "--plot", "a.svg"], "is no JSON that"),
    ],
)
def test_wrong_arguments_are_named(given, message, capsys):
    with pytest.raises(SystemExit) as ended:
        cluster.main(given)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("text", ["{}", '{"results": []}', '{"results": [{"hosts": 2}]}', "[1]"])
def test_other_json_is_refused(file, text):
    file.write_text(text)
    with pytest.raises(ValueError, match="is no JSON that this benchmark has saved"):
        cluster_report.load(file)


@pytest.mark.parametrize(
    ("platform", "user", "absent", "messages"),
    [
        ("darwin", 0, (), ["this is darwin; run it on Linux"]),
        ("linux", 1000, (), ["needs root; run it with sudo"]),
        ("linux", 0, ("ip",), ["not found: ip; on Debian: apt-get install iproute2"]),
        (
            "linux",
            1000,
            ("ip", "vde_switch", "wirefilter", "vde_plug2tap"),
            [
                "ip, vde_switch, wirefilter, vde_plug2tap; on Debian: apt-get install iproute2 vde2",
                "sudo",
            ],
        ),
    ],
)
def test_what_is_lacking_is_said(platform, user, absent, messages):
    text = hosts.lacking(platform, user, lambda name: None if name in absent else f"/bin/{name}")
    assert all(message in text for message in messages)


def test_nothing_is_lacking():
    assert hosts.lacking("linux", 0, lambda name: name) == ""


def test_where_something_is_lacking_nothing_runs(monkeypatch, capsys):
    monkeypatch.setattr(cluster, "lacking", lambda platform, user: "no such luck")
    with pytest.raises(SystemExit) as ended:
        cluster.main([])
    assert ended.value.code == 2
    assert "no such luck" in capsys.readouterr().err


def test_hosts_and_wires_are_told_apart_by_their_number():
    directory = Path("shared")
    names = hosts.hosts_file(3).splitlines()
    assert [line.split() for line in names[1:]] == [
        [hosts.address(i), f"host-{i}"] for i in range(3)
    ]
    wire = hosts.wire_command(directory, 2)
    assert wire[-3:] == ["wirefilter", "-v", "shared/host-2:shared/central"]
    assert hosts.switch_command(directory, "host-2")[-2:] == ["--sock", "shared/host-2"]
    host = hosts.host_command(directory, 2, ["python", "x.py"])
    assert host[:4] == ["unshare", "--net", "--uts", "--mount"]
    assert host[-5:] == ["shared", "2", hosts.address(2), "python", "x.py"]
    assert hosts.named([0, 2, 3]) == "hosts 0, 2-3"
    assert hosts.named([1]) == "host 1"


def test_what_a_host_does_first_is_shell():
    subprocess.run(["sh", "-n", "-c", hosts.BOOT], check=True)
    subprocess.run(["bash", "-n", str(BENCH / "cluster")], check=True)


def test_a_slow_contender_has_its_share_and_no_more():
    assert not cluster.enough([20.0] * 2)
    assert cluster.enough([20.0] * 3)
    assert not cluster.enough([0.1] * 100)


PLAN = cluster_host.Plan(
    (0,), cluster.PASSES, tuple(cluster_report.CONTENDERS), 1, 1, 6, 1, 8, 2, 4
)


@pytest.mark.parametrize("direction", cluster.PASSES)
@pytest.mark.parametrize("name", ["auto", "xla", "pmax_psums"])
def test_contenders_give_what_is_wanted_and_what_is_wrong_is_named(name, direction):
    mesh = jax.make_mesh((1, 1), cluster_host.AXES, (AxisType.Auto,) * 2)
    arrays = cluster_host.arrays_of(PLAN, 1)
    contender = cluster_host.Contender(name, direction, arrays, mesh)
    want = cluster_host.wanted(direction, arrays)
    got = contender()
    cluster_host.check(name, got, want)
    with pytest.raises(AssertionError, match=f"{name} is wrong by"):
        cluster_host.check(name, got, tuple(np.roll(x, 1, axis=-1) for x in want))


def test_a_run_on_loopback(tmp_path):
    saved = tmp_path / "x.json"
    options = ["--loopback", "--hosts", "2", "--devices-per-host", "2", "--delay-ms", "0"]
    options += ["--contenders", "auto,xla", "--pass", "forward", "--keys", "8", "--repeats", "2"]
    command = [sys.executable, BENCH / "cluster.py", *options, "--json", saved]
    ended_well(command, env=os.environ | {"PYTHONPATH": str(BENCH.parent.parent)}, timeout_s=120)
    (result,) = cluster_report.load(saved)["results"]
    assert (result["hosts"], result["devices_per_host"], result["delay_ms"]) == (2, 2, 0)
    assert set(result["ms"]) == {"auto", "xla"}
    assert all(ms > 0 for ms in result["ms"].values())
    assert result["collectives"]["xla"] != result["collectives"]["auto"]


def test_loopback_has_no_delay(capsys):
    with pytest.raises(SystemExit):
        cluster.main(["--loopback", "--delay-ms", "5"])
    assert "--loopback has no delay to set; pass --delay-ms 0" in capsys.readouterr().err
