"""A job that dies is started again on fewer machines, and says what it would have said.

A language model (small, of random weights: this is about processes) answers on four processes of two
devices, and saves its cache, and what it has said so far, every few tokens. Then things go wrong. What one
learns:

1. One of the processes is killed (SIGKILL). `distattn launch` says which and ends the others.
2. The job is started again on two processes of two devices: each device reads its share of the last save.
   One of the two gets a SIGTERM, the notice that its machine will be taken away: all of them save, and end.
3. It is started again on one process of three devices, and is done.

What was saved is never lost, and the tokens are those of the run that nobody disturbed.

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
from processes import launch, say
from small_llama import CONFIG, decode, encode, make_weights, replicate, step

PROMPT = "it was a dark and stormy night, and the rain fell in torrents, except at intervals."
ANSWER, SAVED_EVERY = 24, 5  # tokens


# ------------------------------------------------------------------------ what each process does


def begin(directory: Path, mesh: jax.sharding.Mesh) -> tuple[KVCache, list[int]]:
    """The cache, and the tokens that have been said: of the last save if there is one."""
    where = {"mesh": mesh, "axis_name": mesh.axis_names}
    said = [int(path.name) for path in directory.glob("*") if path.name.isdecimal()]
    if said:
        cache = KVCache.restore(directory, max(said), **where)
        tokens = json.loads((directory / f"said-{max(said)}.json").read_text())
        say(f" - goes on behind {len(tokens)} tokens, on {mesh.size} devices")
        return cache, tokens
    room = len(PROMPT) + ANSWER
    heads = (CONFIG.kv_heads, CONFIG.head_dim)
    return KVCache.create(1, room, *heads, layers=CONFIG.layers, dtype=np.float32, **where), []


def save(directory: Path, cache: KVCache, tokens: list[int]) -> None:
    """A step: first what was said, then the cache, with which the step is there."""
    if jax.process_index() == 0:
        (directory / f"said-{len(tokens)}.json").write_text(json.dumps(tokens))
    cache.save(directory, len(tokens))


def answer(directory: Path, victim: int, at: int | None, by: signal.Signals) -> list[int] | None:
    """The tokens of the answer; None if the job is to end before."""
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
        # True in all processes at the same token, some time after one of them got the signal.
        noticed = reached_preemption_sync_point(len(tokens)) if jax.process_count() > 1 else False
        if noticed or len(tokens) >= saved + SAVED_EVERY:
            save(directory, cache, tokens)
            saved = len(tokens)
        if noticed:
            say(" - was told to end: saved, and ends")
            return None
        if at is not None and by == signal.SIGTERM and len(tokens) > at:
            distributed.barrier("slowly")  # so that the notice comes before the end
            time.sleep(0.3)
    return tokens


def run_process(options: argparse.Namespace) -> None:
    """One of the processes that `distattn launch` starts."""
    distributed.initialize()
    by = signal.Signals[options.signal]
    tokens = answer(Path(options.directory), jax.process_count() // 2, options.at, by)
    if tokens is not None:
        say(f"answer {decode(tokens)!r}")


# ------------------------------------------------------------------------ what the user starts


def run(
    directory: str, processes: int, devices: int, at: int | None = None, by: str = "SIGKILL"
) -> tuple[int, str]:
    """The exit code of so many processes, and the last that they said."""
    program = [__file__, "--directory", directory, "--signal", by]
    if at is not None:
        program += ["--at", str(at)]
    return launch(processes, devices, program)


def main() -> None:
    """The runs, and their comparison."""
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
        assert (code, "saved, and ends" in last) == (0, True)
        print("1 process of 3 devices:")
        code, last = run(directory, 1, 3)
        assert (code, last) == (0, expected)
    print("Killed, preempted and moved, it said what the undisturbed one said.")


if __name__ == "__main__":
    main()
