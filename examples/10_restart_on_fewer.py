"""A job that dies is restarted on fewer machines, and its answer does not change.

A small language model with random weights answers on four processes of two devices, and saves its cache and
its tokens every few tokens. Then it is disturbed:

1. One of the processes is killed (SIGKILL). `distattn launch` names it and ends the others.
2. The job restarts on two processes of two devices, and each device reads its share of the last save.
   One of the two processes gets a SIGTERM, the notice that its machine will be taken away. Both save
   and end.
3. The job restarts on one process of three devices, and completes.

Saved tokens are never lost, and the answer is that of the undisturbed run.

    pip install -e '.[checkpoint]'
    python examples/10_restart_on_fewer.py
"""

import argparse
import json
import os
import signal
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from jax.experimental.multihost_utils import reached_preemption_sync_point

from distattn import KVCache, distributed
from language_model.small_llama import CONFIG, decode, encode, make_weights, replicate, step
from processes import launch, say

PROMPT = "it was a dark and stormy night, and the rain fell in torrents, except at intervals."
ANSWER, SAVED_EVERY = 24, 5  # tokens


# ------------------------------------------------------------------------ each process


def begin(directory: Path, mesh: jax.sharding.Mesh) -> tuple[KVCache, list[int]]:
    """Return the cache and the tokens of the last save, or an empty cache and no tokens."""
    sharding = jax.NamedSharding(mesh, jax.P(None, mesh.axis_names))
    steps = [int(path.name) for path in directory.glob("*") if path.name.isdecimal()]
    if steps:
        cache = KVCache.restore(directory, max(steps), sharding=sharding)
        tokens = json.loads((directory / f"tokens-{max(steps)}.json").read_text())
        say(f" - continues after {len(tokens)} tokens, on {mesh.size} devices")
        return cache, tokens
    room = len(PROMPT) + ANSWER
    cache = KVCache.create(
        1,
        room,
        CONFIG.kv_heads,
        CONFIG.head_dim,
        layers=CONFIG.layers,
        dtype=np.float32,
        sharding=sharding,
    )
    return cache, []


def save(directory: Path, cache: KVCache, tokens: list[int]) -> None:
    """Save the tokens, then the cache, which completes the step."""
    if jax.process_index() == 0:
        (directory / f"tokens-{len(tokens)}.json").write_text(json.dumps(tokens))
    cache.save(directory, len(tokens))


def answer(directory: Path, victim: int, at: int | None, by: signal.Signals) -> list[int] | None:
    """Return the tokens of the answer, or None if the job is told to end."""
    mesh = distributed.make_mesh()
    weights = replicate(make_weights(), mesh)
    cache, tokens = begin(directory, mesh)
    saved = len(tokens)
    while len(tokens) < ANSWER:
        if len(tokens) == at and jax.process_index() == victim:
            os.kill(os.getpid(), by)
        unread = tokens[-1:] or encode(PROMPT)
        token, cache = step(weights, cache, np.array([unread], np.int32))
        tokens.append(int(token[0]))
        # True in all processes after the same token, some time after one of them got the signal.
        told_to_end = (
            reached_preemption_sync_point(len(tokens)) if jax.process_count() > 1 else False
        )
        if told_to_end or len(tokens) >= saved + SAVED_EVERY:
            save(directory, cache, tokens)
            saved = len(tokens)
        if told_to_end:
            say(" - told to end: saved")
            return None
        if at is not None and by == signal.SIGTERM and len(tokens) > at:
            distributed.barrier("slowly")  # so that the notice comes before the last token
            time.sleep(0.3)
    return tokens


def run_process(options: argparse.Namespace) -> None:
    """Run one of the processes that `distattn launch` starts."""
    distributed.initialize()
    by = signal.Signals[options.signal]
    tokens = answer(Path(options.directory), jax.process_count() // 2, options.at, by)
    if tokens is not None:
        say(f"answer {decode(tokens)!r}")


# ------------------------------------------------------------------------ the command


def run(
    directory: str, processes: int, devices: int, at: int | None = None, by: str = "SIGKILL"
) -> tuple[int, str]:
    """Run a job; return its exit code and the last line that it said."""
    program = [__file__, "--directory", directory, "--signal", by]
    if at is not None:
        program += ["--at", str(at)]
    return launch(processes, devices, program)


def main() -> None:
    """Run the jobs and compare their answers."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--directory", help=argparse.SUPPRESS)
    parser.add_argument("--at", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--signal", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.directory is not None:
        run_process(options)
        return
    with tempfile.TemporaryDirectory() as undisturbed, tempfile.TemporaryDirectory() as directory:
        print("1 process of 8 devices, undisturbed:")
        _, expected = run(undisturbed, 1, 8)
        print("4 processes of 2 devices, of which one is killed:")
        code, _ = run(directory, 4, 2, at=12)
        assert code == 128 + signal.SIGKILL
        print("2 processes of 2 devices, of which one gets a SIGTERM:")
        code, last = run(directory, 2, 2, at=12, by="SIGTERM")
        assert (code, "told to end: saved" in last) == (0, True)
        print("1 process of 3 devices:")
        code, last = run(directory, 1, 3)
        assert (code, last) == (0, expected)
    print("Killed, preempted and moved, the job gave the undisturbed answer.")


if __name__ == "__main__":
    main()
