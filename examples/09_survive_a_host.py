"""A host dies in the middle of a sentence, and the others finish it: no restart, no key lost.

A language model (small, of random weights: this is about processes) answers on one process of eight
devices, undisturbed. Then on four processes of two, its keys and values spread over all of them in a
`distattn.KVCache`, and in the middle of the answer one of the processes is killed (SIGKILL, as when a
machine goes). What one learns:

1. `replicas=2`: each token lies on two devices of different hosts. The three processes that are left
   agree that the last token did not count, `cache.recover` makes what is left of the cache whole, and they
   go on: the same tokens as those of the undisturbed run.
2. `replicas=1`: nothing is there twice. `recover` says which positions are lost, exactly, and their keys
   and values are computed again from the tokens, in one step.

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
from processes import launch, say
from small_llama import CONFIG, decode, encode, make_weights, replicate, step

PROCESSES, DEVICES = 4, 2
PROMPT = "the quick brown fox jumps over the lazy dog, and then it sleeps. what does it dream of?"
ANSWER = 24  # tokens
KILLED = {2: 10}  # which rank, after how many tokens


# ------------------------------------------------------------------------ what each process does


def answer(replicas: int, killed: dict[int, int]) -> list[int]:
    """The tokens of the answer, as all processes that are left know them."""
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
        mesh=mesh,
        axis_name=mesh.axis_names,
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
                    whole = made_whole(weights, cache, mesh, prompt + tokens)
                else:
                    whole = cache
                token, new = step(weights, whole, np.array([unread], np.int32))
                token = int(token[0])
        except distributed.HostsLost as lost:
            mesh = lost.mesh
            say(f" - lost rank {lost.ranks[0]}; known after {time.monotonic() - began:.1f} s")
        else:
            if whole is not cache:
                say(f" - on {mesh.size} devices, next token after {time.monotonic() - began:.1f} s")
            cache, unread = new, [token]
            tokens.append(token)
    return tokens


def made_whole(
    weights: dict, cache: KVCache, mesh: jax.sharding.Mesh, tokens: list[int]
) -> KVCache:
    """The cache on the mesh that is left; what is lost is computed again from the tokens."""
    cache, (lost,) = cache.recover(mesh)
    say(f" - positions lost: {lost.tolist() or 'none'}")
    if lost.size:
        again = np.array([tokens], np.int32)[:, lost]
        _, cache = step(weights, cache, again, lost[None])
    return cache


def run_process(options: argparse.Namespace) -> None:
    """One of the processes that `distattn launch` starts."""
    distributed.initialize(recoverable=True, heartbeat_timeout_s=4, collective_timeout_s=5)
    killed = {int(rank): at for rank, at in json.loads(options.killed).items()}
    tokens = answer(options.replicas, killed)
    distributed.assert_same("the answer", tokens)
    say(f"answer {decode(tokens)!r}")


# ------------------------------------------------------------------------ what the user starts


def run(processes: int, devices: int, replicas: int, killed: dict[int, int]) -> str:
    """The answer of so many processes, of which some are killed."""
    program = [__file__, "--replicas", str(replicas), "--killed", json.dumps(killed)]
    code, last = launch(processes, devices, program, may_fail=len(killed))
    assert code == 0, "the job went on"
    return last


def main() -> None:
    """The runs, and their comparison."""
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
    print("the same, each token on one host:")
    assert run(PROCESSES, DEVICES, replicas=1, killed=KILLED) == expected
    print("A host was lost, and no token of the answer changed.")


if __name__ == "__main__":
    main()
