"""The command `distattn` itself: its exit codes, and what it refuses."""

import subprocess
import sys

import pytest

from distattn import cli
from distattn.cli import launch, main


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "COMMAND"),
        (["launch", "--processes", "0"], "'0' is not a whole number of at least 1"),
        (["launch", "--processes", "many"], "'many' is not a whole number of at least 1"),
    ],
)
def test_the_command_refuses_what_it_cannot_read(capsys, arguments, message):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_an_interrupted_command_says_so(monkeypatch, capsys):
    class Interrupted:
        @staticmethod
        def add(subparsers):
            subparsers.add_parser("wait").set_defaults(run=Interrupted.run)

        @staticmethod
        def run(options):
            raise KeyboardInterrupt

    monkeypatch.setattr(cli, "COMMANDS", (launch, Interrupted))
    assert main(["wait"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_python_m_distattn_is_the_command():
    command = [sys.executable, "-m", "distattn", "launch", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    assert "usage: distattn launch" in done.stdout
