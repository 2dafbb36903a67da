"""The launcher: starts, output, blame and ends, with ranks that do not use JAX."""

import contextlib
import re
import signal
import socket
import sys
import textwrap
import time
from pathlib import Path

import pytest

from distattn.cli import main
from distattn.distributed.start import JobPlace
from tests.jobs import launcher

LIMIT_S = 30
# Start of every script: its rank, and a function that leaves a process behind.
PROLOGUE = """
import os, signal, subprocess, sys, time
rank = int(os.environ["DISTATTN_PROCESS_ID"])
def leave_behind():
    sleeper = subprocess.Popen(["sleep", "100"])
    print("pid", os.getpid(), flush=True)
    print("pid", sleeper.pid, flush=True)
"""


def script(code: str) -> list[str]:
    return ["--", sys.executable, "-S", "-c", PROLOGUE + textwrap.dedent(code)]


def launch(*options: str, code: str) -> int:
    return main(["launch", *options, *script(code)])


def pids(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"pid (\d+)", text)]


def alive(pid: int) -> bool:
    """Return whether a process runs and is not a zombie."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def assert_all_end(numbers: list[int]) -> None:
    deadline = time.monotonic() + 5
    while any(map(alive, numbers)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert [pid for pid in numbers if alive(pid)] == []


def test_every_line_has_its_rank_and_every_rank_its_place(capfd, tmp_path):
    code = """
    print("first", rank)
    print(*(os.environ["DISTATTN_" + name] for name in ("NUM_PROCESSES", "CPU_DEVICES")))
    print("to stderr", file=sys.stderr)
    print("input", repr(sys.stdin.read()))
    os.write(1, b"no newline \\xff")
    """
    options = ("-n", "3", "--devices-per-process", "2", "--log-dir", str(tmp_path / "a" / "b"))
    assert launch(*options, code=code) == 0
    captured = capfd.readouterr()
    assert captured.err == ""
    for rank in range(3):
        mine = [x for x in captured.out.splitlines() if x.startswith(f"[{rank}] ")]
        lines = [f"first {rank}", "3 2", "to stderr", "input ''", "no newline �"]
        assert mine == [f"[{rank}] {line}" for line in lines]
        log = (tmp_path / "a" / "b" / f"rank-{rank}.log").read_bytes()
        assert log.decode(errors="replace").splitlines() == lines
    assert len(captured.out.splitlines()) == 15


GLOO = "[Gloo] Rank {} is connected to 7 peer ranks. Expected number of connected peer ranks is : 7"
TORN = (
    "[Gloo] Rank [Gloo] Rank 01 is connected to  is connected to 77 peer ranks. Expected number of "
    "connected peer ranks is :  peer ranks. Expected number of connected peer ranks is : 77"
)
KEPT = (
    f"loss {GLOO.format(1)}",
    f"{GLOO.format(1)}0.5",
    f"{GLOO.format(1)} of many",
    "[Gloo] Rank 0 is lost",
    "Gloo all-reduce failed: Connection closed by peer",
    " is connected to 7",
    "77",
    "",
)


@pytest.mark.parametrize("shown", [False, True])
def test_greetings_of_gloo_are_shown_only_with_show_gloo(capfd, tmp_path, shown):
    greetings = (GLOO.format(0), TORN)
    printed = [greetings[0], *KEPT[:3], greetings[1], *KEPT[3:], GLOO.format(12)]
    code = f"print({chr(10).join(printed)!r})\nsys.exit(3)"
    options = ("-n", "1", "--log-dir", str(tmp_path), *(["--show-gloo"] if shown else []))
    assert launch(*options, code=code) == 3
    captured = capfd.readouterr()
    expected = printed if shown else list(KEPT)
    assert captured.out.splitlines() == [f"[0] {line}" for line in expected]
    assert (tmp_path / "rank-0.log").read_text().splitlines() == printed
    last = [x[len("  [0] ") :] for x in captured.err.splitlines() if x.startswith("  [0] ")]
    assert last == list(KEPT)  # greetings do not tell how it ended


def test_other_lines_appear_as_they_are_printed():
    rank = f"""
    print({GLOO.format(0)!r})
    print("first", flush=True)
    time.sleep(100)
    """
    process = launcher("-n", "1", *script(rank))
    try:
        assert process.stdout.readline() == "[0] first\n"
        assert process.poll() is None
    finally:
        process.terminate()
        process.communicate(timeout=LIMIT_S)


@pytest.mark.parametrize("separator", [["--"], []])
def test_the_command_keeps_its_arguments(capfd, separator):
    code = "import sys; print(sys.argv[1:])"
    command = [sys.executable, "-S", "-c", code, "-n", "7", "--", "--timeout", "x"]
    assert main(["launch", "-n", "1", *separator, *command]) == 0
    assert capfd.readouterr().out == "[0] ['-n', '7', '--', '--timeout', 'x']\n"


def test_the_variables_are_what_the_library_reads():
    place, read = JobPlace("127.0.0.1:1234", 4, 3, 2, "/somewhere"), JobPlace.from_environment
    assert read(place.variables() | {"OTHER": "x"}) == place
    assert read({"OTHER": "x"}) is None
    partial = place.variables()
    del partial["DISTATTN_CPU_DEVICES"]
    with pytest.raises(ValueError, match=r"absent .*\('DISTATTN_CPU_DEVICES'\).*unset all"):
        read(partial)
    with pytest.raises(ValueError, match="'x'.*unset all"):
        read(place.variables() | {"DISTATTN_PROCESS_ID": "x"})


def test_the_roll_call_knows_who_has_come_and_who_has_not(tmp_path):
    places = [JobPlace("h:1", 3, rank, 1, str(tmp_path)) for rank in range(3)]
    places[2].arrive()
    places[0].arrive()
    assert places[0].absent() == [1]
    assert JobPlace().absent() == []


def test_the_port_is_free_before_and_after(capfd):
    code = """
    import socket
    host, port = os.environ["DISTATTN_COORDINATOR_ADDRESS"].split(":")
    print("port", port)
    with socket.socket() as s:  # a socket that does not share finds it taken
        try:
            s.bind((host, int(port)))
            print("not held")
        except OSError:
            pass
    if rank == 0:
        with socket.socket() as s:  # as JAX's coordinator does
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            s.bind((host, int(port)))
            s.listen()
            socket.create_connection((host, int(port)), timeout=5).close()
    """
    assert launch("-n", "2", code=code) == 0
    out = capfd.readouterr().out
    assert "not held" not in out
    (port,) = set(re.findall(r"port (\d+)", out))
    with socket.socket() as s:
        s.bind(("127.0.0.1", int(port)))


@pytest.mark.parametrize(
    ("end", "code", "says"),
    [
        ("sys.exit(7)", 7, "rank 1 ended with exit code 7 "),
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "rank 1 was killed by SIGKILL "),
        ("raise ValueError('wrong')", 1, "rank 1 ended with exit code 1 "),
    ],
)
def test_a_rank_that_fails_ends_all(capfd, end, code, says):
    rank = f"""
    leave_behind()
    if rank == 1:
        for i in range(30):
            print("line", i)
        print("at", time.time(), flush=True)
        {end}
    time.sleep(100)
    """
    assert launch("-n", "4", code=rank) == code
    now = time.time()
    captured = capfd.readouterr()
    assert f"distattn launch: {says}" in captured.err
    assert re.search(r"ended with it: ranks 0, 2-3", captured.err)
    assert "  [1] line 29\n" in captured.err
    assert "line 0\n" not in captured.err
    assert "[1] line 0\n" in captured.out
    assert now - float(re.search(r"at ([\d.]+)", captured.out)[1]) < 2
    assert len(pids(captured.out)) >= 2
    assert_all_end(pids(captured.out))


def test_ranks_that_fail_because_of_another_are_not_blamed(capfd):
    code = """
    if rank == 2:
        time.sleep(0.4)
        print("the cause")
        sys.exit(5)
    if rank == 0:
        print("Gloo allreduce failed: Connection closed by peer [127.0.0.1]:1234")
        sys.exit(1)
    print("F1124 client.h:80] the JAX distributed service detected fatal errors. UNAVAILABLE")
    os.abort()
    """
    assert launch("-n", "3", code=code) == 5
    err = capfd.readouterr().err
    assert "rank 2 ended with exit code 5" in err
    assert "the cause" in err
    assert "Gloo" not in err


def test_ranks_that_may_fail(capfd):
    code = """
    if rank == 1:
        sys.exit(9)
    time.sleep(0.5)
    print("still here")
    if rank == 2 and len(sys.argv) > 1:
        sys.exit(4)
    """
    assert launch("-n", "3", "--may-fail", "1", code=code) == 0
    captured = capfd.readouterr()
    assert captured.err == "distattn launch: rank 1 ended with exit code 9; the others go on\n"
    assert captured.out.count("still here") == 2
    assert main(["launch", "-n", "3", "--may-fail", "1", *script(code), "again"]) in (4, 9)
    assert "the others go on" in capfd.readouterr().err
    code = "sys.exit(6) if rank == 0 else time.sleep(100)"
    assert launch("-n", "3", "--may-fail", "2", code=code) == 6
    assert "rank 0 ended with exit code 6" in capfd.readouterr().err


def test_a_failure_seen_only_from_another_is_said_to_be_that(capfd):
    code = """
    if rank == 0:
        print("Gloo allreduce failed: Connection closed by peer")
        sys.exit(1)
    time.sleep(100)
    """
    assert launch("-n", "2", code=code) == 1
    err = capfd.readouterr().err
    assert "rank 0 ended with exit code 1" in err
    assert "because another process failed, as it says; ended with it: rank 1" in err


def test_a_rank_that_is_done_may_leave_the_others(capfd):
    code = """
    if rank == 0:
        leave_behind()
        sys.exit(0)
    time.sleep(0.5)
    print("still here")
    """
    assert launch("-n", "2", code=code) == 0
    captured = capfd.readouterr()
    assert "[1] still here" in captured.out
    assert captured.err == ""
    assert_all_end(pids(captured.out))


def test_timeout(capfd):
    code = """
    leave_behind()
    if rank == 1:
        sys.exit(0)
    time.sleep(100)
    """
    began = time.monotonic()
    assert launch("-n", "3", "--timeout", "1", code=code) == 124
    assert time.monotonic() - began < 3
    captured = capfd.readouterr()
    assert "rank 0 is not done after 1 s:\n  [0] pid" in captured.err
    assert "rank 2 is not done after 1 s:\n  [2] pid" in captured.err
    assert "rank 1" not in captured.err
    assert len(pids(captured.out)) == 6
    assert_all_end(pids(captured.out))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-n", "0", "--", "true"], "'0' is not a whole number of at least 1"),
        (["-n", "2", "--devices-per-process", "x", "--", "true"], "'x' is not a whole number"),
        (["-n", "2", "--timeout", "-1", "--", "true"], "'-1' is not a number of seconds above 0"),
        (["--", "true"], "required: -n"),
        (["-n", "2", "--"], "nothing to run; put the command behind --, as in: distattn launch"),
        (["-n", "2"], "nothing to run"),
        (["-n", "2", "--", "no-such-command"], "'no-such-command' is not found"),
        (["-n", "2", "--log-dir", "/dev/null/x", "--", "true"], "--log-dir /dev/null/x: Not a dir"),
    ],
)
def test_wrong_use(capfd, arguments, says):
    try:
        code = main(["launch", *arguments])
    except SystemExit as leaving:  # argparse leaves so
        code = leaving.code
    assert code == 2
    assert says in capfd.readouterr().err


def test_the_ranks_get_a_notice_and_time_to_save():
    rank = """
    def save(number, frame):
        time.sleep(0.3)
        print("saved")
        sys.exit(0)
    signal.signal(signal.SIGTERM, save)
    print("ready", flush=True)
    time.sleep(100)
    """
    process = launcher("-n", "2", "--grace", "20", *script(rank))
    try:
        assert [process.stdout.readline()[4:] for _ in range(2)] == ["ready\n"] * 2
        began = time.monotonic()
        process.terminate()
        text, _ = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 143
        assert time.monotonic() - began < 10
        assert text.count("] saved") == 2
    finally:
        process.kill()


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGKILL, -9)]
)
def test_the_end_of_the_launcher_is_the_end_of_all(number, code):
    # The ranks do not listen to the signals that end the launcher.
    rank = """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    leave_behind()
    print("roll", os.environ["DISTATTN_ROLL_CALL"], flush=True)
    time.sleep(100)
    """
    process = launcher("-n", "2", "--grace", "0.5", *script(rank))
    try:
        lines = [process.stdout.readline() for _ in range(6)]
        numbers, (roll, _) = pids("".join(lines)), re.findall(r"roll (.*)", "".join(lines))
        assert len(numbers) == 4
        assert all(map(alive, numbers))
        assert Path(roll).is_dir()
        process.send_signal(number)
        assert process.wait(LIMIT_S) == code
        assert_all_end(numbers)
        deadline = time.monotonic() + 5
        while Path(roll).exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not Path(roll).exists()
    finally:
        process.kill()
        process.communicate(timeout=LIMIT_S)
