"""What can be seen of the coordinator before JAX waits for it, in which it cannot be interrupted."""

import errno
import socket
import time


def check_port(address: str) -> None:
    """Refuses a port on which somebody listens: JAX would share it, and end the other job.

    Raises:
      RuntimeError: somebody does.
    """
    port = int(address.rpartition(":")[2])
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # not: after a job that ended
        try:
            probe.bind(("", port))
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                return  # JAX will say what it thinks of the address
            raise RuntimeError(
                f"port {port} of coordinator_address is in use on this machine, maybe by another job; "
                "choose a free one, in all processes"
            ) from None


def await_coordinator(address: str, rank: int, timeout_s: float) -> None:
    """Waits until something listens where rank 0 should.

    Raises:
      TimeoutError: nothing does.
    """
    host, _, port = address.rpartition(":")
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=5).close()
        except OSError as error:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"rank {rank}: nobody answers at coordinator_address={address!r} after {timeout_s:g} s "
                    f"({error}); rank 0 must have started, and this must be its address"
                ) from None
            time.sleep(0.1)
        else:
            return
