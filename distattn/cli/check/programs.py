"""Programs that all processes compile, start and time together."""

import json
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from distattn.distributed import assert_same
from distattn.distributed.agreement import meet

TIMEOUT_S = 300.0  # for others that compile, or compute what is right, more slowly


class DoesNotCompile(Exception):
    """A program that JAX or XLA refuses, in one process or all; all are told."""


def prepare(name: str, f: Callable[..., Any], *arguments: jax.Array) -> Callable[..., Any]:
    """`f`, compiled for these arguments, when all processes have compiled the same.

    So they come to its first collective, which waits for the others for 30 s at most, together.

    Args:
      name: of the program, for the error of processes that differ.
      f: function of global arrays.
      arguments: the arrays.

    Returns:
      The compiled program.

    Raises:
      DoesNotCompile: in every process, where it does not in one of them.
      RuntimeError, TimeoutError: as `distattn.distributed.assert_same`.
    """
    made: tuple[Any, ...] = ()
    failure = ""
    try:
        lowered = jax.jit(f).lower(*arguments)
        made = (lowered, lowered.compile())
    except (ValueError, RuntimeError, NotImplementedError) as error:
        failure = first_line(error)
    failures = gathered(f"{name}: compiled", failure)
    if any(failures):
        rank, failure = next((i, text) for i, text in enumerate(failures) if text)
        where = f" (rank {rank})" if len(failures) > 1 else ""
        raise DoesNotCompile(f"{failure}{where}")
    lowered, compiled = made
    if jax.process_count() > 1:
        assert_same(f"check: {name}", {"program": lowered}, timeout_s=TIMEOUT_S)
    return compiled


def first_line(error: Exception) -> str:
    """The kind of an error, and the beginning of what it says."""
    return f"{type(error).__name__}: {error}".partition("\n")[0][:300]


def on_mesh(x: np.ndarray, mesh: Mesh, spec: PartitionSpec) -> jax.Array:
    """The global array of which every process has the whole."""
    make: Callable[..., jax.Array] = jax.make_array_from_callback
    return make(x.shape, NamedSharding(mesh, spec), lambda index: x[index])


def medians(
    programs: Mapping[str, tuple[Callable[..., Any], tuple[Any, ...]]], repeats: int
) -> dict[str, float]:
    """Seconds of each program: the median of interleaved runs, in the process where it takes longest.

    Args:
      programs: compiled program and arguments, by name, the same in every process.
      repeats: how often each is timed, after a run that is not.

    Returns:
      Seconds by name, the same in every process.
    """
    times: dict[str, list[float]] = {name: [] for name in programs}
    for turn in range(repeats + 1):
        for name, (program, arguments) in programs.items():
            began = time.perf_counter()
            jax.block_until_ready(program(*arguments))
            if turn:
                times[name].append(time.perf_counter() - began)
    own = {name: statistics.median(seconds) for name, seconds in times.items()}
    everywhere = gathered("times", own)
    return {name: max(process[name] for process in everywhere) for name in own}


def gathered(name: str, value: Any) -> list[Any]:
    """What each process hands in, by rank: anything that JSON can hold."""
    texts = meet(f"check: {name}", json.dumps(value), timeout_s=TIMEOUT_S)
    return [json.loads(texts[rank]) for rank in sorted(texts)]
