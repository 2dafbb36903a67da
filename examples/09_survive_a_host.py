"""A host dies in the middle of a sentence, and the other hosts finish it: no restart, no lost key.

A small language model with random weights answers on one process of eight devices, undisturbed. Then it
answers on four processes of two devices, with its keys and values spread over all of them in a
`distattn.KVCache`. In the middle of the answer one of the processes is killed (SIGKILL, as if its machine
failed). It shows:

1. `replicas=2`: each token is stored on two hosts. The three remaining processes agree to discard the
   unfinished token, `cache.recover` restores the cache on their devices, and they continue with the same
   tokens as the undisturbed run.
2. `replicas=1`: each token is stored once. `recover` returns exactly the lost positions, and one step
   computes their keys and values again from the tokens.

    python examples/09_survive_a_host.py
"""

import argparse
import json
import os
import signal
import time

import jax
import numpy as np

from distattn import KVCache, distributed
from language_model.small_llama import CONFIG, decode, encode, make_weights, replicate, step
from processes import launch, say

PROCESSES, DEVICES = 4, 2
PROMPT = "the quick brown fox jumps over the lazy dog, and then it sleeps. what does it dream of?"
ANSWER = 24  # tokens
KILLED = {2: 10}  # rank: number of tokens before it is killed


# ------------------------------------------------------------------------ each process


def answer(replicas: int, killed: dict[int, int]) -> list[int]:
    """Return the tokens of the answer, in all remaining processes."""
    mesh, prompt = distributed.make_mesh(), encode(PROMPT)
    host_weights = make_weights()
    weights = replicate(host_weights, mesh)
    cache = KVCache.create(
        1,
        len(prompt) + ANSWER,
        CONFIG.kv_heads,
        CONFIG.head_dim,
        layers=CONFIG.layers,
        dtype=np.float32,
        sharding=jax.NamedSharding(mesh, jax.P(None, mesh.axis_names)),
        replicas=replicas,
    )
    unread, tokens = list(prompt), []
    while len(tokens) < ANSWER:
        began = time.monotonic()
        try:
            with distributed.all_or_none(mesh):
                if killed.get(jax.process_index()) == len(tokens):
                    os.kill(os.getpid(), signal.SIGKILL)
                if cache.layout.mesh != mesh:  # hosts were lost
                    weights = replicate(host_weights, mesh)
                    current = recovered(weights, cache, mesh, prompt + tokens)
                else:
                    current = cache
                token, new = step(weights, current, np.array([unread], np.int32))
                token = int(token[0])
        except distributed.HostsLost as lost:
            mesh = lost.mesh
            say(f" - lost rank {lost.ranks[0]}; detected after {time.monotonic() - began:.1f} s")
        else:
            if current is not cache:
                say(f" - on {mesh.size} devices, next token after {time.monotonic() - began:.1f} s")
            cache, unread = new, [token]
            tokens.append(token)
    return tokens


def recovered(weights: dict, cache: KVCache, mesh: jax.sharding.Mesh, tokens: list[int]) -> KVCache:
    """Recover the cache on the remaining mesh; compute lost positions again from the tokens."""
    cache, (lost,) = cache.recover(mesh)
    say(f" - positions lost: {lost.tolist() or 'none'}")
    if lost.size:
        again = np.array([tokens], np.int32)[:, lost]
        _, cache = step(weights, cache, again, lost[None])
    return cache


def run_process(options: argparse.Namespace) -> None:
    """Run one of the processes that `distattn launch` starts."""
    distributed.initialize(recoverable=True, heartbeat_timeout_s=4, collective_timeout_s=5)
    killed = {int(rank): at for rank, at in json.loads(options.killed).items()}
    tokens = answer(options.replicas, killed)
    distributed.assert_same("the answer", tokens)
    say(f"answer {decode(tokens)!r}")


# ------------------------------------------------------------------------ the command


def run(processes: int, devices: int, replicas: int, killed: dict[int, int]) -> str:
    """Return the answer of a job in which the processes `killed` are killed."""
    program = [__file__, "--replicas", str(replicas), "--killed", json.dumps(killed)]
    code, last = launch(processes, devices, program, may_fail=len(killed))
    assert code == 0, "the job must continue"
    return last


def main() -> None:
    """Run the jobs and compare their answers."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--replicas", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--killed", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.replicas is not None:
        run_process(options)
        return
    print("1 process of 8 devices, undisturbed:")
    expected = run(1, 8, replicas=1, killed={})
    print(f"{PROCESSES} processes of {DEVICES}, one is killed, each token is on two hosts:")
    assert run(PROCESSES, DEVICES, replicas=2, killed=KILLED) == expected
    print(f"{PROCESSES} processes of {DEVICES}, one is killed, each token is on one host:")
    assert run(PROCESSES, DEVICES, replicas=1, killed=KILLED) == expected
    print("A host was lost, and no token of the answer changed.")


if __name__ == "__main__":
    main()
