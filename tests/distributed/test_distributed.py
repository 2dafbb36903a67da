"""Real processes over loopback, through the launcher; and errors that need only one process.

A process of JAX takes seconds to start, so this file is also the program of the ranks: each of `JOBS`
checks many things.
"""

import contextlib
import dataclasses
import functools
import itertools
import os
import re
import signal
import socket
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import distattn
import distattn.distributed
from distattn.distributed import arrays as meshes
from distattn.distributed.agreement import describe, differences, ranks
from distattn.testing import reference
from tests.cases import FULLY_OPTIMIZED, shardings
from tests.jobs import ROOT, ended_well, inherited, launcher
from tests.tolerance import assert_close

LIMIT_S = 100  # per job
B, T, S, N, K, H, V = 2, 6, 29, 8, 2, 8, 6
TOKENS = {
    1: (29,),
    2: (21, 8),
    3: (12, 0, 17),
    4: (3, 0, 20, 6),
}  # per host, by the number of hosts
ALL_REDUCES = ("auto", "butterfly", "psum", "all_gather")
QUERY_SHARDED = ("reduce_scatter", "gather_kv", "ring", "ulysses", "ulysses_ring")


# --- what ranks run ---


def say(*words: object) -> None:
    sys.stdout.write(" ".join(map(str, words)) + "\n")
    sys.stdout.flush()


@dataclasses.dataclass(frozen=True)
class Sequence:
    """Sequence of keys in random order, equal in every process."""

    query: np.ndarray
    key: np.ndarray
    value: np.ndarray
    positions: np.ndarray
    d_out: np.ndarray

    @classmethod
    def make(cls) -> "Sequence":
        rng = np.random.default_rng(3)
        shapes = ((B, T, N, H), (B, S, K, H), (B, S, K, V))
        query, key, value = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
        positions = rng.permutation(S).astype(np.int32)
        return cls(query, key, value, positions, rng.normal(size=(B, T, N, V)).astype(np.float32))

    def own(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the keys, values and positions of this process."""
        ends = np.cumsum((0, *TOKENS[jax.process_count()]))
        mine = slice(*ends[jax.process_index() : jax.process_index() + 2])
        return self.key[:, mine], self.value[:, mine], self.positions[mine]


QUERY_POSITIONS = np.arange(S - T, S, dtype=np.int32)


def over(mesh: Mesh, *axes: str) -> NamedSharding:
    """Return a sharding of tokens over these axes, or over all."""
    return NamedSharding(mesh, PartitionSpec(None, axes or mesh.axis_names))


def check_attention(mesh: Mesh, axes: tuple[str, ...], strategy: str) -> None:
    """Compare forward and gradient with the reference, and their bits in all processes."""
    whole = Sequence.make()
    key, value, positions = distattn.distributed.from_process_local(*whole.own(), over(mesh, *axes))
    where = shardings(mesh, axes, query=None if strategy in ALL_REDUCES else axes)

    @jax.jit
    def run(query, key, value, positions):
        def paired(query, key, value):
            out = distattn.dot_product_attention(
                query,
                key,
                value,
                is_causal=True,
                query_positions=jnp.asarray(QUERY_POSITIONS),
                key_positions=positions,
                strategy=strategy,
                **where,
            )
            return (out * whole.d_out).sum(), out

        return jax.grad(paired, (0, 1, 2), has_aux=True)(query, key, value)

    with jax.set_mesh(mesh):
        grads, out = run(whole.query, key, value, positions)
    fetch = distattn.distributed.fetch
    slots = {name: fetch(x) for name, x in (("key", key), ("value", value))}
    slots["key_positions"] = fetch(positions)
    masks = {"is_causal": True, "query_positions": QUERY_POSITIONS}
    expected, _ = reference.dot_product_attention(whole.query, **slots, **masks)
    expected_grads = reference.attention_gradients(whole.query, **slots, **masks, dout=whole.d_out)
    got = [fetch(x) for x in (out, *grads)]
    distattn.distributed.assert_same(f"{strategy}: results", got)
    assert_close(got[0], expected, jnp.float32, S, what=strategy)
    terms = S + H + V + T * N // K
    for x, name in zip(got[1:], ("query", "key", "value"), strict=True):
        assert_close(x, expected_grads[f"d{name}"], jnp.float32, terms, what=f"{strategy}: d{name}")
    say("checked", strategy, dict(mesh.shape), f"at {time.process_time():.1f} s")


def check_bits(mesh: Mesh, axes: tuple[str, ...], strategy: str) -> None:
    """Compare the bits of reproducible=True in all processes with those of one device of this process."""
    rng = np.random.default_rng(5)
    rows, keys = 64 * mesh.size, 128 * mesh.size
    shapes = (1, rows, 4, H), (1, keys, K, H), (1, keys, K, V)
    whole = [rng.normal(size=shape).astype(np.float32) for shape in shapes]

    def run(where, query, key, value):
        def total(*arrays):
            out = distattn.dot_product_attention(*arrays, reproducible=True, **where)
            return (out * out).sum(), out

        grads, out = jax.grad(total, (0, 1, 2), has_aux=True)(query, key, value)
        return out, *grads

    compiled = functools.partial(
        jax.jit, compiler_options=FULLY_OPTIMIZED
    )  # users compare optimized programs
    alone = compiled(functools.partial(run, {}))(*whole)
    split = NamedSharding(mesh, PartitionSpec(None, axes))
    there = [jax.make_array_from_callback(x.shape, split, x.__getitem__) for x in whole]
    where = {**shardings(mesh, axes, query=axes), "strategy": strategy}
    with jax.set_mesh(mesh):
        found = compiled(functools.partial(run, where))(*there)
    for x, y in zip(found, alone, strict=True):
        np.testing.assert_array_equal(distattn.distributed.fetch(x), np.asarray(y), strict=True)
    say("equal bits", strategy)


def check_arrays(mesh: Mesh) -> None:
    """Check that every token is stored once, on a device of its process."""
    whole = Sequence.make()
    own = whole.own()
    arrays = distattn.distributed.from_process_local(*own, over(mesh), slots=17)
    key, value, positions = map(distattn.distributed.fetch, arrays)
    assert key.shape == (B, 17 * mesh.size, K, H)
    full = positions >= 0
    assert sorted(positions[full]) == list(range(S))
    order = np.argsort(whole.positions)
    np.testing.assert_array_equal(key[:, full], whole.key[:, order[positions[full]]])
    np.testing.assert_array_equal(value[:, full], whole.value[:, order[positions[full]]])
    assert (key[:, ~full] == 0).all()
    local = np.concatenate([np.asarray(x.data) for x in arrays[2].addressable_shards])
    assert sorted(local[local >= 0]) == sorted(own[2])
    counts = [(np.asarray(x.data) >= 0).sum() for x in arrays[2].addressable_shards]
    assert max(counts) - min(counts) <= 1
    fetched = distattn.distributed.fetch(arrays[2], to=jax.process_count() - 1)
    if jax.process_index() == jax.process_count() - 1:
        np.testing.assert_array_equal(fetched, positions)
    else:
        assert fetched is None


def gave_up(rank: int) -> Path:
    """Return the file by which a process tells another that it waits no longer."""
    return Path(os.environ["DISTATTN_ROLL_CALL"], f"gave-up-{rank}")


def check_health() -> None:
    """Check that each process learns which ranks differ, and can go on."""
    rank, count = jax.process_index(), jax.process_count()
    last = count - 1
    same, barrier = distattn.distributed.assert_same, distattn.distributed.barrier
    rest = ranks(range(last))
    mesh = distattn.distributed.make_mesh()
    permuted = Mesh(mesh.devices[::-1], mesh.axis_names)
    x = jnp.ones(3)
    lowered = jax.jit(lambda x: x + (1 if rank == last else 2)).lower(x)
    same("alike", {"a": np.arange(3), "mesh": mesh, "f": jax.jit(lambda x: x + 2).lower(x)})
    with pytest.raises(RuntimeError) as caught:
        same(
            "unlike",
            {
                "shape": (2, 8 if rank == last else 4),
                "dtype": jnp.bfloat16 if rank == last else jnp.float32,
                "mesh": permuted if rank == last else mesh,
                "program": lowered,
                "equal": 1,
            },
        )
    text = str(caught.value)
    few = f"rank {last}"
    assert f"['shape'][1]: 4 on {rest}; 8 on {few}" in text or count == 2
    assert {"['shape'][1]", "['dtype']", "['mesh']", "['program']"} == set(
        re.findall(r"^  (\S+):", text, re.M)
    )
    assert few in text
    with pytest.raises(
        RuntimeError, match=rf"different places.*\n  place: .*'there' on rank {last}"
    ):
        barrier("there" if rank == last else "here")
    began = time.monotonic()
    if rank != last:
        with pytest.raises(TimeoutError, match=rf"rank {last} of {count} did not come to 'gone'"):
            barrier("gone", 0.5)
        assert time.monotonic() - began < 30
        gave_up(rank).touch()
    else:
        for other in range(last):  # a busy machine may let them wait
            while not gave_up(other).exists():
                assert time.monotonic() - began < 60, f"rank {other} still waits for the last"
                time.sleep(0.05)
            gave_up(other).unlink()
        with pytest.raises(TimeoutError, match="later than within"):
            barrier("gone", 0.5)
    barrier("and on")
    whole = Sequence.make()
    key, value, positions = whole.own()
    with pytest.raises(ValueError, match=rf"(?s)cannot use.*\n  rank {last}: positions has shape"):
        distattn.distributed.from_process_local(
            key, value, positions[None, None] if rank == last else positions, over(mesh)
        )
    with pytest.raises(ValueError, match=r"processes differ\n  value: float32.*float16"):
        distattn.distributed.from_process_local(
            key, value.astype(np.float16) if rank == last else value, positions, over(mesh)
        )


def job_all() -> None:
    """Do everything that a healthy job of n processes does."""
    strategies = sys.argv[2].split(",")
    kind = AxisType[sys.argv[3]]
    count, own = jax.process_count(), jax.local_device_count()
    mesh = distattn.distributed.make_mesh(axis_types=(kind, kind))
    assert dict(mesh.shape) == {"host": count, "device": own}
    for host, row in enumerate(mesh.devices):
        assert {device.process_index for device in row} == {host}
    distattn.distributed.initialize()  # again: nothing
    with pytest.raises(RuntimeError, match=f"already, with num_processes={count}, and now with 77"):
        distattn.distributed.initialize(num_processes=77)
    order = np.random.default_rng(1).permutation(mesh.size)
    scattered = Mesh(mesh.devices.flat[order], ("kv",), axis_types=(kind,))
    check_arrays(mesh)
    check_arrays(scattered)
    check_health()
    for strategy in strategies:
        check_attention(mesh, ("host", "device"), strategy)
    check_bits(mesh, ("host", "device"), "ring" if count == 2 else "reduce_scatter")
    if len(strategies) > 5:
        check_attention(scattered, ("kv",), strategies[0])


def job_fails() -> None:
    """Fail on rank 1 while the others wait for it in a collective."""
    mesh = distattn.distributed.make_mesh()
    arrays = distattn.distributed.from_process_local(*Sequence.make().own(), over(mesh))
    distattn.distributed.fetch(arrays[0])
    if jax.process_index() == 1:
        time.sleep(0.5)
        say("at", time.time())
        if sys.argv[2] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("only here")
    distattn.distributed.fetch(arrays[1])


def job_hangs() -> None:
    """Keep rank 1 from a collective; time-outs are in `ARGUMENTS`."""
    mesh = distattn.distributed.make_mesh()
    arrays = distattn.distributed.from_process_local(*Sequence.make().own(), over(mesh))
    distattn.distributed.fetch(arrays[0])  # the first among these devices has 30 s, whatever is set
    if jax.process_index() == 1:
        time.sleep(LIMIT_S)
    distattn.distributed.fetch(arrays[0])


def job_survives() -> None:
    """Kill rank 1 of three; the two others go on, in a job of two."""
    mesh, rank = distattn.distributed.make_mesh(), jax.process_index()
    with distattn.distributed.all_or_none(mesh):
        before = distattn.distributed.fetch(check_lost(mesh))
    with pytest.raises(KeyError, match="everywhere"), distattn.distributed.all_or_none(mesh):
        raise KeyError("everywhere")

    def dies():
        with distattn.distributed.all_or_none(mesh):
            if rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            if rank == 0:  # the others get all their results
                distattn.distributed.fetch(check_lost(mesh))

    with pytest.raises(distattn.distributed.HostsLost, match="lost rank 1;") as lost:
        dies()
    assert lost.value.ranks == (1,)
    smaller = lost.value.mesh
    assert smaller.devices.tolist() == mesh.devices[[0, 2]].tolist()
    assert distattn.distributed.make_mesh() == smaller
    distattn.distributed.barrier("the two")
    distattn.distributed.assert_same("the mesh", smaller)
    with distattn.distributed.all_or_none(smaller):
        after = distattn.distributed.fetch(check_lost(smaller))
    assert (before, after) == (3, 2)
    mine = Sequence.make()
    part = slice(0, 5) if rank == 0 else slice(5, 9)
    arrays = distattn.distributed.from_process_local(
        mine.key[:, part], mine.value[:, part], mine.positions[part], over(smaller)
    )
    positions = distattn.distributed.fetch(arrays[2])
    assert sorted(positions[positions >= 0]) == sorted(mine.positions[:9])
    sharding = over(smaller)
    cache = distattn.KVCache.create(B, 16, K, H, value_dim=V, dtype=jnp.float32, sharding=sharding)
    cache = cache.append(mine.key[:, :9], mine.value[:, :9])
    assert cache.save(sys.argv[2]) == 0
    restored = distattn.KVCache.restore(sys.argv[2], sharding=sharding)
    got, saved = (
        [distattn.distributed.fetch(x) for x in (c.positions, c.key)] for c in (restored, cache)
    )
    for x, y in zip(got, saved, strict=True):
        np.testing.assert_array_equal(x, y)
    with pytest.raises(ValueError, match="step=0 is in .* already"):
        cache.save(sys.argv[2], 0)
    with pytest.raises(FileNotFoundError, match="no step 5"):
        distattn.KVCache.restore(sys.argv[2], 5, sharding=sharding)
    private = f"{sys.argv[2]}/of-{rank}"
    with pytest.raises(ValueError, match=r"not the same for all processes: rank 2 cannot see 0"):
        cache.save(private)


def check_lost(mesh: Mesh) -> jax.Array:
    """Return the number of devices of the mesh, counted by a collective."""
    along = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    ones = jax.make_array_from_callback((mesh.size,), along, lambda index: np.ones(1, np.int32))
    whole = NamedSharding(mesh, PartitionSpec())
    return jax.jit(lambda x: x.sum(dtype=np.int32), out_shardings=whole)(ones)


def job_none() -> None:
    """Do nothing after the start."""


JOBS: dict[str, Callable[[], None]] = {
    "all": job_all,
    "fails": job_fails,
    "hangs": job_hangs,
    "survives": job_survives,
    "late": job_none,
    "devices": job_none,
    "world": job_none,
    "extra": job_none,
}
# Arguments of `initialize`, by job and rank.
ARGUMENTS = {
    ("late", 0): {"initialization_timeout_s": 2},
    ("hangs", 0): {"collective_timeout_s": 2},
    **dict.fromkeys(
        (("survives", rank) for rank in range(3)),
        {"recoverable": True, "heartbeat_timeout_s": 3, "collective_timeout_s": 3},
    ),
    ("devices", 1): {"cpu_devices": 1},
    ("world", 1): {"num_processes": 3},
    ("extra", 1): {"num_processes": 3, "process_id": 2},
}


def run_rank() -> None:
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    rank = int(os.environ["DISTATTN_PROCESS_ID"])
    say("pid", os.getpid(), "address", os.environ["DISTATTN_COORDINATOR_ADDRESS"])
    job = sys.argv[1]
    if (job, rank) == ("late", int(sys.argv[2]) if job == "late" else -1):
        time.sleep(LIMIT_S)
    began = time.monotonic()
    arguments = ARGUMENTS["late", 0] if job == "late" else ARGUMENTS.get((job, rank), {})
    distattn.distributed.initialize(**arguments)
    say(f"started after {time.monotonic() - began:.1f} s")
    JOBS[job]()
    say("done")


# --- what pytest runs ---


def run(*options: str, job: tuple[str, ...]) -> tuple[int, str, float]:
    """Return the launcher's exit code, output and end; check that nothing is left behind."""
    program = ("--", sys.executable, __file__, *job)
    process = launcher("--timeout", str(LIMIT_S), *options, *program)
    try:
        text, _ = process.communicate(timeout=LIMIT_S + 20)
    finally:
        process.kill()
        process.wait()
    ended = time.time()
    for pid in re.findall(r"pid (\d+)", text):
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)
    for port in set(re.findall(r"address 127\.0\.0\.1:(\d+)", text)):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", int(port)))
    return process.returncode, text, ended


@pytest.mark.parametrize(
    ("processes", "devices", "kind", "strategies"),
    [
        # The first: alone on JAX versions that are not the default.
        (3, 1, "Auto", ("butterfly", "ring")),
        (4, 2, "Auto", ("auto", "ulysses_gather_kv")),
        (2, 4, "Explicit", ALL_REDUCES[1:] + QUERY_SHARDED),  # but "auto": one of these
    ],
    ids=lambda x: str(x) if isinstance(x, int) else "",
)
def test_a_healthy_job(processes, devices, kind, strategies):
    options = ("-n", str(processes), "--devices-per-process", str(devices))
    code, text, _ = run(*options, job=("all", ",".join(strategies), kind))
    assert code == 0, text
    for strategy, rank in itertools.product(strategies, range(processes)):
        assert f"[{rank}] checked {strategy} {{'host': {processes}" in text
    assert text.count("] equal bits") == processes
    assert text.count("] done") == processes


@pytest.mark.parametrize(
    ("how", "says"),
    [("kill", "rank 1 was killed by SIGKILL"), ("raise", "rank 1 ended with exit code 1")],
)
def test_a_rank_that_fails_is_named_within_two_seconds(how, says):
    code, text, ended = run("-n", "3", job=("fails", how))
    assert code == (137 if how == "kill" else 1)
    assert f"distattn launch: {says}" in text
    assert how == "kill" or "  [1] ValueError: only here" in text
    assert ended - float(re.search(r"at ([\d.]+)", text)[1]) < 2


def test_ranks_that_are_left_go_on(tmp_path):
    code, text, _ = run("-n", "3", "--may-fail", "1", job=("survives", str(tmp_path)))
    assert code == 0, text
    assert "rank 1 was killed by SIGKILL; the others go on" in text
    assert [f"[{rank}] done" in text for rank in range(3)] == [True, False, True]


def test_a_mesh_without_processes():
    def device(process):
        return types.SimpleNamespace(process_index=process)

    grid = np.array([[device(0), device(0)], [device(1), device(1)], [device(2), device(2)]])
    mesh = types.SimpleNamespace(
        devices=grid, axis_names=("a", "b"), axis_types=None, shape={"a": 3, "b": 2}
    )
    with pytest.raises(
        ValueError, match="devices of ranks 0-2 are not whole slices along one axis"
    ):
        meshes.without(mesh, (0, 1, 2))
    mesh.devices = np.array([[device(0), device(1)], [device(1), device(0)]])
    with pytest.raises(ValueError, match="devices of rank 1 are not whole slices"):
        meshes.without(mesh, (1,))


def test_alone_all_or_none_does_nothing():
    mesh = distattn.distributed.make_mesh()
    with distattn.distributed.all_or_none(mesh):
        assert int(check_lost(mesh)) == 8
    with pytest.raises(KeyError), distattn.distributed.all_or_none(mesh):
        raise KeyError("x")


def test_a_collective_that_no_other_rank_reaches():
    code, text, _ = run("-n", "2", job=("hangs",))
    assert code == 1
    assert "distattn launch: rank 0 ended with exit code 1" in text
    assert "Timed out waiting 2000ms" in text


@pytest.mark.parametrize("absent", [0, 1])
def test_a_rank_that_never_comes(absent):
    began = time.time()
    code, text, ended = run("-n", "2", job=("late", str(absent)))
    assert code == 1
    assert f"rank {1 - absent} ended with exit code 1" in text
    if absent:
        assert "has waited 2 s for the others at 127.0.0.1:" in text
        assert "not come to initialize: 1" in text
    else:
        assert "rank 1: no answer at coordinator_address='127.0.0.1:" in text
        assert "rank 0 must have started" in text
    assert ended - began < 15


@pytest.mark.parametrize(
    ("job", "says"),
    [
        ("devices", "['devices of a process']: 2 on rank 0; 1 on rank 1"),
        ("world", "['num_processes']: 2 on rank 0; 3 on rank 1"),
    ],
)
def test_processes_that_disagree_are_told(job, says):
    code, text, _ = run("-n", "2", "--devices-per-process", "2", job=(job,))
    assert code == 1
    for rank in range(2):
        assert re.search(rf"^\[{rank}\] +{re.escape(says)}", text, re.M), text


def test_a_process_too_many():
    code, text, _ = run("-n", "2", job=("extra",))
    assert code == 134
    assert "rank 1 was killed by SIGABRT" in text
    assert "as it says" not in text
    assert re.search(r"^\[1\] .*Unexpected task registered with task=2", text, re.M)
    assert "its last lines:" in text


def alone(code: str) -> str:
    env = inherited("DISTATTN_") | {"PYTHONPATH": str(ROOT)}
    return ended_well([sys.executable, "-c", code], env=env, timeout_s=LIMIT_S).stdout


def test_a_process_alone_has_nothing_to_do():
    code = """
import jax, distattn.distributed
jax.config.update("jax_platforms", "cpu")
distattn.distributed.initialize()
distattn.distributed.initialize()
distattn.distributed.barrier("alone")
distattn.distributed.assert_same("alone", {"x": 1})
try:
    distattn.distributed.initialize(num_processes=2)
except RuntimeError as error:
    print(error)
print(jax.process_count(), jax.distributed.is_initialized())
"""
    out = alone(code)
    assert "already, with num_processes=None, and now with 2" in out
    assert out.endswith("1 False\n")


@pytest.fixture
def flags_restored(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])


@pytest.fixture
def taken():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        yield other.getsockname()[1]


initialize = functools.partial(distattn.distributed.initialize, initialization_timeout_s=1)


@pytest.mark.usefixtures("flags_restored")
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("h:1", 2, 2), "process_id=2 of num_processes=2; ranks count from 0 to 1"),
        (("h:1", 2, -1), "process_id=-1 of num_processes=2"),
        (("h:1", 0, 0), "num_processes=0; a job has at least 1"),
        (("h", 2, 0), "coordinator_address='h'; it must be host:port"),
    ],
)
def test_a_place_that_cannot_be(arguments, says):
    with pytest.raises(ValueError, match=says):
        initialize(*arguments)


@pytest.mark.usefixtures("flags_restored")
def test_a_port_in_use(taken):
    with pytest.raises(RuntimeError, match=f"port {taken} of coordinator_address is in use"):
        initialize(f"127.0.0.1:{taken}", 2, 0)


@pytest.mark.usefixtures("flags_restored")
def test_a_wrong_coordinator():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(TimeoutError, match=rf"rank 1: no answer .*'{address}' after 1 s"):
            initialize(address, 2, 1)


@pytest.mark.usefixtures("flags_restored")
def test_too_late():
    with pytest.raises(RuntimeError, match="must be called before any JAX calls"):
        initialize()
    with pytest.raises(RuntimeError, match="should be updated before backends are initialized"):
        initialize(cpu_devices=3)
    with pytest.raises(ValueError, match="cpu_devices=0"):
        initialize(cpu_devices=0)


def tokens(count: int, *, rows: int = 2) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    key, value = (rng.normal(size=(rows, count, 4, width)).astype(np.float32) for width in (8, 6))
    return key, value, np.stack([rng.permutation(count) for _ in range(rows)]).astype(np.int32)


def test_batch_and_heads_on_axes_of_their_own():
    mesh = Mesh(np.array(jax.devices()).reshape(2, 2, 2), ("b", "kv", "h"))
    key, value, positions = tokens(7)
    arrays = distattn.distributed.from_process_local(
        key, value, positions, NamedSharding(mesh, PartitionSpec("b", "kv", "h"))
    )
    assert [x.sharding.shard_shape(x.shape) for x in arrays] == [(1, 4, 2, 8), (1, 4, 2, 6), (1, 4)]
    got = [distattn.distributed.fetch(x) for x in arrays]
    full = got[2] >= 0
    assert full.sum() == 14
    for row in range(2):
        np.testing.assert_array_equal(got[0][row, full[row]], key[row])
        np.testing.assert_array_equal(got[1][row, full[row]], value[row])
        np.testing.assert_array_equal(got[2][row, full[row]], positions[row])


def test_no_tokens_at_all():
    mesh = distattn.distributed.make_mesh()
    assert dict(mesh.shape) == {"host": 1, "device": 8}
    key, _, positions = distattn.distributed.from_process_local(*tokens(0), over(mesh))
    assert key.shape == (2, 8, 4, 8)
    assert (np.asarray(positions) == -1).all()


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"key": np.zeros((7, 4, 8))}, r"key has shape \(7, 4, 8\) and value .*\[B, S_own, K, H\]"),
        ({"value": np.zeros((2, 6, 4, 8))}, r"value \(2, 6, 4, 8\)"),
        ({"positions": np.zeros(6, np.int32)}, r"positions has shape \(6,\) and key S_own=7"),
        ({"positions": np.zeros(7)}, "positions has dtype float32; it must be integer"),
        ({"slots": 0}, "slots=0, and a device has 1 tokens; pass at least that many"),
    ],
)
def test_tokens_that_do_not_fit(changed, says):
    key, value, positions = tokens(7)
    arguments = {"key": key, "value": value, "positions": positions} | changed
    mesh = distattn.distributed.make_mesh()
    with pytest.raises(ValueError, match=rf"cannot use what it was given:\n  rank 0: .*{says}"):
        distattn.distributed.from_process_local(**arguments, sharding=over(mesh))
    for spec in (PartitionSpec(), PartitionSpec(None, "host", None, "device")):
        sharding = NamedSharding(mesh, spec)
        with pytest.raises(ValueError, match="it must be a jax.NamedSharding of key .* shards S"):
            distattn.distributed.from_process_local(*tokens(7), sharding)


def test_wrong_arguments_of_make_mesh_and_fetch():
    with pytest.raises(ValueError, match="axis_names"):
        distattn.distributed.make_mesh(("a",))
    with pytest.raises(ValueError, match="axis_types"):
        distattn.distributed.make_mesh(axis_types=(AxisType.Auto,))
    for to in (1, -1, "one"):
        with pytest.raises(ValueError, match=r"it must be 'all' or a rank from 0 to 0"):
            distattn.distributed.fetch(jnp.ones(3), to=to)


def test_descriptions_name_what_counts_and_no_addresses():
    mesh = Mesh(np.array(jax.devices()[:2][::-1]), ("kv",))
    tree = {
        "array": jnp.ones((2, 3)),
        "numbers": np.arange(4),
        "one": np.float32(2),
        "none": None,
        "mesh": mesh,
        "object": object(),
        "function": tokens,
        "program": jax.jit(lambda x: x).lower(1.0),
    }
    got = describe(tree)
    assert got["['array']"] == "float32[2, 3]"
    assert got["['one']"] == "float32[] 2.0"
    assert got["['none']"] == "None"
    assert got["['mesh']"] == "mesh kv=2 (Auto) of devices 1 0"
    assert got["['object']"] == "builtins.object"
    assert got["['function']"].endswith("test_distributed.tokens")
    assert re.fullmatch(r"a program of \d+ characters with hash \w{12}", got["['program']"])
    assert got == describe(tree)
    assert got["['numbers']"] != describe({"numbers": np.arange(4) + 1})["['numbers']"]
    assert describe(3) == {"value": "3"}


def test_differences_are_by_rank():
    facts = {0: {"a": "1", "b": "x"}, 1: {"a": "1"}, 3: {"a": "2", "b": "x"}}
    assert differences(facts) == (
        "\n  a: 1 on ranks 0-1; 2 on rank 3\n  b: x on ranks 0, 3; absent on rank 1"
    )
    assert differences({0: {"a": "1"}, 1: {"a": "1"}}) == ""
    assert ranks([5, 3, 4, 0]) == "ranks 0, 3-5"


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        run_rank()
