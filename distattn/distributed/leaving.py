"""The end of a process that JAX would make wait for the others."""

import contextlib
import os
import sys
import time
from types import TracebackType
from typing import NoReturn

import jax

LINGER_S = 1.0  # of rank 0, with which the others end: they may be about to say why, or to leave


def leave_at_once_on_error() -> None:
    """An exception that nobody catches ends the process, which at its end would wait for the others."""
    show = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        show(kind, error, trace)
        if jax.process_index() == 0:
            time.sleep(LINGER_S)
        end(130 if issubclass(kind, KeyboardInterrupt) else 1)

    sys.excepthook = hook


def end(code: int, message: str = "") -> NoReturn:
    """Ends this process now: what it has printed is out, and nothing else is waited for."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            if message and stream is sys.stderr:
                stream.write(f"{message}\n")
            stream.flush()
    os._exit(code)
