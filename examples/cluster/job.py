"""Job that the files in this folder start: one attention over the keys of all hosts.

Every process passes its own keys and values, in any order and number. They stay on their host; the
processes exchange softmax states. Each process then compares the result with numpy's over all keys, and
the first one prints a line.

    python job.py                                                        # one process
    distattn launch -n 2 --devices-per-process 2 -- python job.py        # several on this machine
    srun python job.py                                                   # if JAX knows the scheduler
    python job.py --coordinator 10.0.0.1:9911 --processes 2 --rank 0     # if it does not
"""

import argparse
from collections.abc import Sequence

import jax
import numpy as np

import distattn
import distattn.distributed

QUERIES, KEYS = 8, 1000
HEADS, KV_HEADS, WIDTH = 8, 2, 64
QUERY_POSITIONS = np.linspace(0, KEYS - 1, QUERIES, dtype=np.int32)
BOUND = 1e-5


def sequence() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return query, key and value, equal in every process, in place of a model's."""
    rng = np.random.default_rng(0)
    shapes = ((1, QUERIES, HEADS, WIDTH), (1, KEYS, KV_HEADS, WIDTH), (1, KEYS, KV_HEADS, WIDTH))
    query, key, value = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    return query, key, value


def deal(processes: int) -> list[np.ndarray]:
    """Return the positions of the keys of each process, in random number and order."""
    rng = np.random.default_rng(1)
    cuts = np.sort(rng.integers(0, KEYS, processes - 1))
    return np.split(rng.permutation(KEYS).astype(np.int32), cuts)


def on_one_process(query: np.ndarray, key: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Compute causal attention to all keys, in order."""
    key, value = (np.repeat(x, HEADS // KV_HEADS, axis=2) for x in (key, value))
    logits = np.einsum("btnh,bsnh->bnts", query, key) / np.sqrt(WIDTH)
    logits = np.where(np.arange(KEYS) <= QUERY_POSITIONS[:, None], logits, -np.inf)
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return np.einsum("bnts,bsnv->btnv", weights / weights.sum(axis=-1, keepdims=True), value)


def run(
    coordinator: str | None = None,
    processes: int | None = None,
    rank: int | None = None,
    cpu_devices: int | None = None,
) -> str:
    """Start this process, run the job and return its result as text; JAX or the launcher finds Nones."""
    distattn.distributed.initialize(coordinator, processes, rank, cpu_devices=cpu_devices)
    mesh = distattn.distributed.make_mesh()
    sharding = jax.NamedSharding(mesh, jax.P(None, ("host", "device")))  # for [B, S, K, H]
    query, key, value = sequence()
    positions = deal(jax.process_count())
    mine = positions[jax.process_index()]
    keys, values, key_positions = distattn.distributed.from_process_local(
        key[:, mine], value[:, mine], mine, sharding
    )

    @jax.jit
    def attention(*arrays: jax.Array) -> jax.Array:
        query, keys, values, query_positions, key_positions = arrays
        return distattn.dot_product_attention(
            query,
            keys,
            values,
            is_causal=True,
            query_positions=query_positions,
            key_positions=key_positions,
            query_sharding=jax.NamedSharding(mesh, jax.P()),
            key_value_sharding=sharding,
            precision=jax.lax.Precision.HIGHEST,  # float32 on GPUs and TPUs too, for the comparison
        )

    out = distattn.distributed.fetch(attention(query, keys, values, QUERY_POSITIONS, key_positions))
    assert out is not None
    expected = on_one_process(query, key, value)
    error = np.abs(out - expected).max() / np.abs(expected).max()
    assert error < BOUND, f"{error:.1e} from what one process computes"
    hosts, devices = mesh.devices.shape
    shares = " + ".join(str(len(x)) for x in positions)
    return (
        f"{hosts} x {devices} {mesh.devices.flat[0].platform} devices: "
        f"{QUERIES} queries attended to {shares} keys, {error:.1e} from what one process computes"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one process; the first one prints its result."""
    parser = argparse.ArgumentParser(description="One attention over the keys of many processes.")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="rank 0's host and a free port")
    parser.add_argument("--processes", type=int, metavar="N", help="number of processes")
    parser.add_argument("--rank", type=int, metavar="R", help="rank of this one, from 0")
    parser.add_argument("--cpu-devices", type=int, metavar="N", help="run on the CPU, as N devices")
    line = run(**vars(parser.parse_args(arguments)))
    if jax.process_index() == 0:
        print(line, flush=True)


if __name__ == "__main__":
    main()
