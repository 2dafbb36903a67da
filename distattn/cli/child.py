"""The processes that `distattn launch` starts, as the first thing that runs in them.

Started by its path, with nothing but the standard library: it must not take the second that JAX takes.

  child.py rank LAUNCHER COMMAND...   becomes COMMAND, which the kernel ends when the launcher ends
  child.py guard                      reads `group NUMBER` and `directory PATH` from the launcher; if the
                                      launcher ends without having said `done`, ends and removes these.
"""

import ctypes
import os
import shutil
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> None:
    """Does what its arguments say."""
    role, *rest = sys.argv[1:]
    if role == "guard":
        _guard()
    else:
        _become(int(rest[0]), rest[1:])


def _become(launcher: int, command: list[str]) -> None:
    if sys.platform == "linux":  # elsewhere the guard alone must do
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != launcher:  # it ended before it could be watched
        os._exit(1)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.stderr.write(f"{command[0]}: {error.strerror}\n")
        os._exit(127)


def _guard() -> None:
    groups, directories = [], []
    for line in sys.stdin:  # until the launcher closes it, or ends
        word, _, rest = line.rstrip("\n").partition(" ")
        if word == "done":
            return
        (groups if word == "group" else directories).append(rest)
    for group in groups:
        try:
            os.killpg(int(group), signal.SIGKILL)
        except OSError:
            continue  # it is empty
    for directory in directories:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    main()
