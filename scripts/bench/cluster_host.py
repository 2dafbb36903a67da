"""Program of each host of `scripts/bench/cluster`: check and time the contenders. Not run by hand.

cluster_host.py SOCKET PLAN    the socket of the bench, and a `Plan` as JSON
"""

import dataclasses
import functools
import json
import os
import socket
import sys
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import distattn
from distattn import distributed
from distattn.distributed import start
from distattn.testing import collectives, reference

AXES = ("host", "device")
TOLERANCE = 1e-4  # relative to the largest magnitude: float32 sums over thousands of keys
ECHO_PORT, ECHOES = 4712, 21
LIMIT_S = 180  # for the start, a compilation, a call
WARM_UPS = 1


@dataclasses.dataclass(frozen=True)
class Plan:
    """Work of all hosts, in the same order."""

    delays_ms: tuple[int, ...]
    passes: tuple[str, ...]
    contenders: tuple[str, ...]
    repeats: int
    tokens: int  # T
    keys: int  # per device
    devices: int  # per host
    heads: int
    kv_heads: int
    width: int


class Bench:
    """Connection to the bench, outside the network that is measured."""

    def __init__(self, path: str, rank: int) -> None:
        connection = socket.socket(socket.AF_UNIX)
        connection.connect(path)
        self._file, self._rank = connection.makefile("rw", encoding="utf-8"), rank

    def meet(self, *place: Any, value: Any = None) -> bool:
        """Wait for all hosts, and until all continue; return whether to do the next step.

        Args:
          place: place in the program, equal on all hosts.
          value: result for the bench.
        """
        self._file.write(json.dumps([self._rank, place, value]) + "\n")
        self._file.flush()
        line = self._file.readline()
        if not line:  # the bench has ended
            os._exit(1)
        moment, wanted = json.loads(line)
        time.sleep(max(0.0, moment - time.monotonic()))
        return wanted


def arrays_of(plan: Plan, devices: int) -> tuple[np.ndarray, ...]:
    """Return query, key, value, and the cotangent of the output."""
    rng = np.random.default_rng(0)
    queries = (1, plan.tokens, plan.heads, plan.width)
    slots = (1, devices * plan.keys, plan.kv_heads, plan.width)
    return tuple(
        rng.normal(size=shape).astype(np.float32) for shape in (queries, slots, slots, queries)
    )


def pmax_psums(mesh: Mesh, query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Compute attention by hand: a maximum, and two sums."""

    def one_host(query, key, value):
        grouped = query.reshape(*query.shape[:2], key.shape[2], -1, query.shape[3])
        logits = jnp.einsum("btkgh,bskh->btkgs", grouped, key) / query.shape[3] ** 0.5
        high = lax.pmax(lax.stop_gradient(logits.max(axis=-1, keepdims=True)), AXES)
        weights = jnp.exp(logits - high)
        total = lax.psum(weights.sum(axis=-1, keepdims=True), AXES)
        out = lax.psum(jnp.einsum("btkgs,bskh->btkgh", weights, value), AXES)
        return (out / total).reshape(query.shape)

    slots = P(None, AXES)
    return jax.shard_map(one_host, mesh=mesh, in_specs=(P(), slots, slots), out_specs=P())(
        query, key, value
    )


def attention_of(name: str, mesh: Mesh) -> Any:
    if name == "xla":
        return jax.nn.dot_product_attention
    if name == "pmax_psums":
        return functools.partial(pmax_psums, mesh)
    same, slots = NamedSharding(mesh, P()), NamedSharding(mesh, P(None, AXES))
    where = {"query_sharding": same, "key_value_sharding": slots}
    return functools.partial(distattn.dot_product_attention, strategy=name, **where)


class Contender:
    """An attention, forward or with its gradient, compiled."""

    def __init__(self, name: str, direction: str, arrays: tuple[np.ndarray, ...], mesh: Mesh):
        same, slots = NamedSharding(mesh, P()), NamedSharding(mesh, P(None, AXES))
        shardings = (same, slots, slots, same)
        attention = attention_of(name, mesh)

        def forward(query, key, value, cotangent):
            return (attention(query, key, value),)

        def weighted(query, key, value, cotangent):
            return (attention(query, key, value) * cotangent).sum()

        gradient = direction == "gradient"
        self._arrays = tuple(
            jax.make_array_from_callback(x.shape, to, x.__getitem__)
            for x, to in zip(arrays, shardings, strict=True)
        )
        f = jax.grad(weighted, argnums=(0, 1, 2)) if gradient else forward
        jitted = jax.jit(f, out_shardings=shardings[:3] if gradient else (same,))
        self._run = jitted.lower(*self._arrays).compile()
        self.collectives = dict(collectives(self._run.as_text()))

    def __call__(self) -> tuple[jax.Array, ...]:
        return jax.block_until_ready(self._run(*self._arrays))


def wanted(direction: str, arrays: tuple[np.ndarray, ...]) -> tuple[np.ndarray, ...]:
    """Return the results of all contenders, in float64."""
    *inputs, cotangent = arrays
    if direction == "gradient":
        gradients = reference.attention_gradients(*inputs, dout=cotangent)
        return tuple(gradients[f"d{name}"] for name in ("query", "key", "value"))
    return (reference.dot_product_attention(*inputs)[0],)


def check(what: str, got: tuple[jax.Array, ...], want: tuple[np.ndarray, ...]) -> None:
    """Raise AssertionError if a shard of this host is wrong."""
    for x, y in zip(got, want, strict=True):
        for shard in x.addressable_shards:
            error = np.abs(np.asarray(shard.data) - y[shard.index]).max() / np.abs(y).max()
            if not error <= TOLERANCE:
                raise AssertionError(f"{what} is wrong by {error:.1e} of the largest magnitude")


def echo() -> None:
    """Start rank 0's server, which sends back all messages."""
    server = socket.create_server(("", ECHO_PORT))

    def serve() -> None:
        while True:
            connection, _ = server.accept()
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with connection:
                while data := connection.recv(64):
                    connection.sendall(data)

    threading.Thread(target=serve, daemon=True).start()


def round_trip_ms(first: str) -> float:
    """Return the median round trip of small messages to rank 0, on one connection."""
    times = []
    with socket.create_connection((first, ECHO_PORT), timeout=10) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(ECHOES):
            began = time.perf_counter()
            connection.sendall(b".")
            connection.recv(64)
            times.append(time.perf_counter() - began)
    return 1e3 * float(np.median(times))


def main() -> None:
    path, plan = sys.argv[1], Plan(**json.loads(sys.argv[2]))
    place = start.JobPlace.from_environment(os.environ)
    rank, first = place.process_id, place.coordinator_address.partition(":")[0]
    bench = Bench(path, rank)
    bench.meet("the start")  # it names late hosts; later steps only wait for them
    distributed.initialize(initialization_timeout_s=LIMIT_S)
    if rank == 0:
        echo()
    bench.meet("initialized")
    mesh = distributed.make_mesh(AXES)
    arrays = arrays_of(plan, mesh.size)
    contenders = {}
    for direction in plan.passes:
        want = wanted(direction, arrays)
        for name in plan.contenders:
            contenders[direction, name] = contender = Contender(name, direction, arrays, mesh)
            # Gloo gives the hosts 30 s to connect at the first collective: all come to it together.
            bench.meet("compiled", direction, name, value=contender.collectives)
            check(f"{direction} by {name}", contender(), want)
    for delay_ms in plan.delays_ms:
        bench.meet("delay", delay_ms)
        bench.meet("round trip", delay_ms, value=round_trip_ms(first) if rank == 1 else None)
        for repeat in range(WARM_UPS + plan.repeats):
            order = list(contenders.items())
            np.random.default_rng(repeat).shuffle(order)  # the one before may leave its mark
            for (direction, name), contender in order:
                if not bench.meet("call", delay_ms, direction, name):
                    continue
                began = time.perf_counter()
                contender()
                seconds = time.perf_counter() - began
                if repeat >= WARM_UPS:
                    bench.meet("time", delay_ms, direction, name, value=seconds)
    bench.meet("done")


if __name__ == "__main__":
    main()
