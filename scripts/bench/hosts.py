"""Simulated hosts on this machine, each with its own network, name, address and distance.

                       wire, delays what leaves          no delay
    host-0: tap0 -- its switch ======================= central switch ==== host-1, host-2, ...

A host is a process in unnamed namespaces (for the network, the host name and /etc/hosts), which end with
their last process. If this process is killed, switches and wires end with their standard input, and hosts
with their supervisor.
"""

import contextlib
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from distattn.cli.launch import Rank, held_port
from distattn.distributed.agreement import ranks as ranks_text
from distattn.distributed.start import JobPlace

MAX_HOSTS = 64
PORT = 4711  # rank 0's coordinator; its network has no other program
READY_S, SETTLE_S = 10.0, 1.0
# The programs, and the Debian packages that they are in.
PROGRAMS = {
    "ip": "iproute2",
    "unshare": "util-linux",
    "vde_switch": "vde2",
    "wirefilter": "vde2",
    "vde_plug2tap": "vde2",
}
# Queues between switches, wires and hosts hold 10 frames, and lose frames when full; a network card's hold
# a thousand. The limit belongs to the network of the process that makes the queue.
QUEUES = "echo 1000 >/proc/sys/net/unix/max_dgram_qlen"
# First commands of a host. $1 is the directory, $2 its number, $3 its address; then comes its command.
BOOT = (
    f"set -e; {QUEUES}"
    """
mount --bind "$1/hosts" /etc/hosts
hostname "host-$2"
ip link set lo up
vde_plug2tap --sock "$1/host-$2" tap0 &
tries=0
until ip link set tap0 up 2>/dev/null; do
  tries=$((tries + 1))
  [ $tries -lt 200 ] || { echo "host $2: no tap0; is there a /dev/net/tun?"; exit 1; }
  sleep 0.05
done
ip address add "$3/24" dev tap0
shift 3
exec "$@" >/dev/null # Gloo greets each new connection there
"""
)


class HostError(Exception):
    """Failure of a host, a switch or a wire; the message is for the user."""


def lacking(platform: str, user: int, which: Callable[[str], str | None] = shutil.which) -> str:
    """Return what this machine lacks for hosts, and how to get it; empty if nothing."""
    if not platform.startswith("linux"):
        return f"only Linux has network namespaces, and this is {platform}; run it on Linux"
    problems = []
    if packages := sorted({PROGRAMS[name] for name in PROGRAMS if which(name) is None}):
        names = ", ".join(name for name in PROGRAMS if which(name) is None)
        problems.append(f"not found: {names}; on Debian: apt-get install {' '.join(packages)}")
    if user != 0:
        problems.append("making network namespaces needs root; run it with sudo")
    return "\n".join(problems)


def address(number: int) -> str:
    return f"10.77.0.{number + 1}"


def hosts_file(count: int) -> str:
    """Return the text of /etc/hosts: Gloo listens at the address of its host's name."""
    return "127.0.0.1 localhost\n" + "".join(f"{address(i)} host-{i}\n" for i in range(count))


def queued(command: Sequence[str]) -> list[str]:
    return ["unshare", "--net", "sh", "-c", f'{QUEUES} && exec "$@"', "sh", *command]


def switch_command(directory: Path, name: str) -> list[str]:
    ports = ["--numports", str(MAX_HOSTS + 1)]
    return queued(["vde_switch", *ports, "--sock", str(directory / name)])


def wire_command(directory: Path, number: int) -> list[str]:
    return queued(["wirefilter", "-v", f"{directory / f'host-{number}'}:{directory / 'central'}"])


def delay_command(delay_ms: int) -> str:
    """Return the command that sets a wire's delay, all of it on the way out of the host.

    A wire rounds down to whole milliseconds: half of 1 ms on either side would be 0.
    """
    return f"delay LR{delay_ms}\n"


def host_command(directory: Path, number: int, command: Sequence[str]) -> list[str]:
    namespaces = ["unshare", "--net", "--uts", "--mount"]
    return [
        *namespaces,
        *("sh", "-c", BOOT, "sh", str(directory), str(number), address(number)),
        *command,
    ]


class Hosts:
    """Network for `count` hosts, and the hosts once they `run`; leaving the context ends them all.

    With `loopback` the hosts are plain processes of this machine.
    """

    def __init__(self, count: int, *, devices: int = 1, loopback: bool = False) -> None:
        self.count, self._devices_each, self._loopback = count, devices, loopback
        self.directory: Path  # shared by the hosts and this process
        self._devices: list[subprocess.Popen] = []
        self._wires: list[subprocess.Popen] = []
        self._ranks: list[Rank] = []

    def __enter__(self) -> "Hosts":
        with contextlib.ExitStack() as stack:
            self.directory = Path(
                stack.enter_context(
                    tempfile.TemporaryDirectory(
                        prefix="distattn-hosts-", ignore_cleanup_errors=True
                    )
                )
            )
            stack.callback(self._end)
            if self._loopback:
                port = stack.enter_context(held_port())
                self._coordinator = "{}:{}".format(*port.getsockname())
            else:
                self._coordinator = f"{address(0)}:{PORT}"
                self._connect()
            (self.directory / "roll-call").mkdir()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind, error, trace) -> None:
        self._stack.__exit__(kind, error, trace)

    def run(self, command: Sequence[str]) -> None:
        """Start the hosts: each runs the command, as a rank of one job."""
        for number in range(self.count):
            place = JobPlace(
                coordinator_address=self._coordinator,
                num_processes=self.count,
                process_id=number,
                cpu_devices=self._devices_each,
                roll_call=str(self.directory / "roll-call"),
            )
            becoming = command if self._loopback else host_command(self.directory, number, command)
            self._ranks.append(Rank(place, becoming, None, False))

    def delay(self, delay_ms: int) -> None:
        """Set the one-way delay between any two hosts."""
        for wire in self._wires:
            with contextlib.suppress(BrokenPipeError):  # it has ended: `check` reports it
                wire.stdin.write(delay_command(delay_ms).encode())
                wire.stdin.flush()

    def check(self) -> None:
        """Raise HostError if a host, a switch or a wire has ended."""
        if ended := [rank for rank in self._ranks if rank.code() is not None]:
            deadline = time.monotonic() + SETTLE_S  # others may turn out to be the cause
            while time.monotonic() < deadline:
                ended = [rank for rank in self._ranks if rank.code() is not None]
                time.sleep(0.05)
            cause = min(ended, key=Rank.order)
            raise HostError(
                f"host {cause.number} {cause.ending()}; its last lines:{cause.last_lines()}"
            )
        for process in self._devices:
            if process.poll() is not None:
                what = " ".join(process.args[-3:])
                raise HostError(f"{what} ended with {process.returncode}: the network is down")

    def _connect(self) -> None:
        (self.directory / "hosts").write_text(hosts_file(self.count), encoding="utf-8")
        names = ["central", *(f"host-{i}" for i in range(self.count))]
        for name in names:
            self._device(switch_command(self.directory, name))
        self._await([self.directory / name / "ctl" for name in names])
        for number in range(self.count):
            self._wires.append(self._device(wire_command(self.directory, number)))

    def _device(self, command: Sequence[str]) -> subprocess.Popen:
        """Start a switch or a wire, which reads commands and ends with its standard input."""
        quiet = subprocess.DEVNULL
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=quiet, stderr=quiet, start_new_session=True
        )
        self._devices.append(process)
        return process

    def _end(self) -> None:
        for process in self._devices:
            process.kill()
        for rank in self._ranks:
            rank.end()
        for process in self._devices:
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            process.wait()

    def _await(self, sockets: Sequence[Path]) -> None:
        deadline = time.monotonic() + READY_S
        while not all(path.exists() for path in sockets):
            self.check()
            if time.monotonic() > deadline:
                raise HostError(f"vde_switch: not up after {READY_S:g} s")
            time.sleep(0.02)


def named(numbers: Sequence[int]) -> str:
    """Return 'host 3' or 'hosts 0, 2-5'."""
    return ranks_text(numbers).replace("rank", "host", 1)
