"""Supervisor of a rank: runs a command, and ends its session if `distattn launch` ends first.

    python supervisor.py DIRECTORY COMMAND ...

The launcher holds the other end of standard input and closes it to end the rank; it is also closed if the
launcher is killed. Then the supervisor removes DIRECTORY and kills its session. It runs without JAX.
"""

import os
import shutil
import signal
import subprocess
import sys
import threading


def main(directory: str, *command: str) -> int:
    """Run the command; return its exit code, or minus the number of the signal that ended it."""
    ending = threading.Event()

    def await_end() -> None:
        os.read(0, 1)
        ending.set()
        process.kill()

    try:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    except OSError as error:
        sys.stderr.write(f"{command[0]}: {error.strerror}\n")
        return 127
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    threading.Thread(target=await_end, daemon=True).start()
    code = process.wait()
    if ending.is_set():
        shutil.rmtree(directory, ignore_errors=True)
        os.killpg(0, signal.SIGKILL)
    return code


if __name__ == "__main__":
    code: int = main(*sys.argv[1:])
    sys.stderr.flush()
    if code < 0:  # end in the same way
        if code not in (-signal.SIGKILL, -signal.SIGSTOP):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)
