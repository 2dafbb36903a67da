"""The switch by which kernels run on a CPU, for tests."""

import contextlib
from collections.abc import Generator
from typing import Any

import jax

# Part of the key under which JAX caches what it has traced.
_interpret = jax.make_user_context(None)


@contextlib.contextmanager
def interpreted(params: Any = True) -> Generator[None, None, None]:
    """While it is entered, the kernels that are traced run on a CPU, by Pallas' interpreter.

    Args:
      params: of `pallas_call`: True, or, for TPU kernels, a `pltpu.InterpretParams`, which simulates a
        TPU's memories and needs PJRT_NPROC=16 in the environment before JAX starts where several fake
        devices run kernels.
    """
    with _interpret(params):
        yield


def interpreter() -> Any:
    """By which kernels run, as `pallas_call` wants it; None: by none."""
    return _interpret.value
