"""What `test_fused.py` asks of kernels that exchange, on eight simulated TPUs, in a process of its own.

In the interpreter the devices wait for each other in callbacks, each of which needs a thread: PJRT_NPROC,
which is read when JAX starts. Memory is NaN until it is written, and races print a line. Copies are made as
soon as they are started, as a race is only seen then; or not before somebody waits for them, as late as can
be.
"""

import contextlib
import dataclasses
import functools
import io
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, Mesh, PartitionSpec

import distattn
from distattn import kernels
from distattn.fused import exchange
from tests.cases import CASES, Case, check

P = PartitionSpec
THREADS = {"PJRT_NPROC": "16"}
DEVICES = 8


def mesh_of(*sizes: int) -> Mesh:
    names = ("a", "kv")[-len(sizes) :]
    devices = jax.devices()[: int(np.prod(sizes))]
    return jax.make_mesh(sizes, names, (AxisType.Auto,) * len(sizes), devices=devices)


def on_tpus(*, late: bool = False) -> contextlib.AbstractContextManager:
    mode = "on_wait" if late else "eager"
    return kernels.interpreted(pltpu.InterpretParams(detect_races=True, dma_execution_mode=mode))


def states(sizes: tuple[int, ...], rows: tuple[int, ...], width: int) -> distattn.SoftmaxState:
    """A state for each device: far apart, one of no keys at all, one row that has none anywhere."""
    rng = np.random.default_rng(len(sizes))
    high = 50 * rng.normal(size=(*sizes, *rows))
    total, weighted = rng.uniform(1, 9, (*sizes, *rows)), rng.normal(size=(*sizes, *rows, width))
    for empty in ((0,) * len(sizes), (..., 0)):
        high[empty], total[empty] = -np.inf, 0.0
        weighted[empty if empty[0] is not ... else (..., 0, slice(None))] = 0.0
    return distattn.SoftmaxState(*(jnp.asarray(x, jnp.float32) for x in (high, total, weighted)))


def merged(mesh: Mesh, axes: Any, schedule: str, state: Any) -> Any:
    """What each device has after an all-reduce, with the axes of the mesh in front."""
    depth = len(mesh.axis_names)

    def body(state):
        state = jax.tree.map(lambda x: x.reshape(x.shape[depth:]), state)
        state = distattn.all_reduce(state, axes, schedule=schedule)
        return jax.tree.map(lambda x: x.reshape(*(1,) * depth, *x.shape), state)

    specs = P(*mesh.axis_names)
    run = jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=False)
    return jax.tree.map(np.asarray, jax.jit(run)(state))


def compared(mesh: Mesh, axes: Any, rows: tuple[int, ...] = (1, 2, 6), width: int = 12) -> None:
    """That the kernel gives the bits of the butterfly, and so the same to all devices."""
    sizes = tuple(mesh.shape.values())
    state = states(sizes, rows, width)
    messages = merged(mesh, axes, "butterfly", state)
    names = (axes,) if isinstance(axes, str) else axes
    along = tuple(mesh.axis_names.index(name) for name in names)
    for late in (False, True):
        with on_tpus(late=late):
            fused = merged(mesh, axes, "fused", state)
        for x, y in zip(jax.tree.leaves(fused), jax.tree.leaves(messages), strict=True):
            np.testing.assert_array_equal(x, y)
            np.testing.assert_array_equal(x, np.broadcast_to(x.max(along, keepdims=True), x.shape))
            assert not np.isnan(x).any()


def attention(devices: int, **options: Any) -> Callable:
    return functools.partial(
        distattn.dot_product_attention,
        mesh=mesh_of(devices),
        axis_name="kv",
        combine="fused",
        return_residual=True,
        **options,
    )


def judged(case: Case, devices: int, *, dtype: Any = jnp.float32, factor: float = 1.0, **options):
    """Against the oracle, forward and gradient."""
    run = attention(devices, **options)
    check(case, run, dtype=dtype, factor=factor, what=f"fused on {devices}")


def fixed_point(devices: int) -> None:
    """That integers are the same by the kernel as by messages."""
    case = dataclasses.replace(CASES["window_causal_sinks"], keys=64 * devices, queries=3)
    arguments = {
        name: jnp.asarray(x, jnp.float32) if getattr(x, "dtype", None) == np.float64 else x
        for name, x in case.arguments().items()
    }
    run = attention(devices, reproducible=True)
    options = dict(case.options)
    arrays = {name: x for name, x in arguments.items() if name not in options}
    results = [
        jax.jit(functools.partial(run, combine=x, **options))(**arrays)
        for x in ("fused", "butterfly")
    ]
    for x, y in zip(*results, strict=True):
        np.testing.assert_array_equal(x, y)


def inside(check_vma: bool) -> Callable:
    """`sharded_attention` in a shard_map of one's own."""
    mesh, along = mesh_of(4), P(None, "kv")
    names = ("query", "key", "value", "query_positions", "key_positions")
    specs = dict(zip(names, (P(), along, along, P(), along), strict=True))

    def run(*, is_causal, **arrays):
        body = functools.partial(
            distattn.sharded_attention,
            axis_name="kv",
            combine="fused",
            is_causal=is_causal,
            return_residual=True,
            implementation="pallas_tpu",
        )
        return jax.shard_map(
            lambda arrays: body(**arrays),
            mesh=mesh,
            in_specs=(specs,),
            out_specs=P(),
            check_vma=check_vma,
        )(arrays)

    return run


def cache() -> None:
    """A token at a time, in a cache of two layers over eight devices."""
    rng = np.random.default_rng(0)
    options = {"batch": 2, "capacity": 32, "num_kv_heads": 2, "head_dim": 8, "layers": 2}
    held = distattn.KVCache.create(
        **options, dtype=jnp.float32, mesh=mesh_of(8), axis_name="kv"
    ).append(*jnp.asarray(rng.normal(size=(2, 2, 2, 20, 2, 8)), jnp.float32))
    query = jnp.asarray(rng.normal(size=(2, 1, 4, 8)), jnp.float32)
    for how in ("pallas_tpu", None):
        got, want = (
            held.attend(query, layer=1, combine=x, implementation=y)
            for x, y in (("fused", how), ("butterfly", None))
        )
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def without_waiting() -> None:
    """A kernel that reads what may not have arrived yet: it must be seen."""

    class Impatient(exchange.Exchange):
        def _receive(self, number, each, own, action):
            with mock.patch.object(pltpu, "make_async_remote_copy", mock.MagicMock()):
                super()._receive(number, each, own, action)

    with mock.patch.object(exchange, "Exchange", Impatient):
        merged(mesh_of(4), "kv", "fused", states((4,), (1, 2, 6), 12))


SMALL = dataclasses.replace(CASES["causal_permuted"], queries=2)
SINKS = dataclasses.replace(CASES["window_causal_sinks"], queries=3)
LENGTHS = dataclasses.replace(CASES["lengths_permuted"], query_lengths=True, queries=3)
ONE = dataclasses.replace(CASES["mqa_one_query"], keys=30, permuted=True, empty_slots=3)
WIDE = dataclasses.replace(SMALL, heads=6, kv_heads=3, width=128, value_width=128)
KERNEL = {"implementation": "pallas_tpu"}

CHECKS: dict[str, Callable[[], None]] = {
    **{f"{n} devices": functools.partial(lambda n: compared(mesh_of(n), "kv"), n) for n in range(2, 9)},
    "first axis of two": lambda: compared(mesh_of(4, 2), "a"),
    "last axis of two": lambda: compared(mesh_of(2, 4), "kv"),
    "both axes": lambda: compared(mesh_of(2, 3), ("a", "kv")),
    "several blocks of rows": lambda: compared(mesh_of(3), "kv", (3, 5, 20), 130),
    "fixed point on 3": lambda: fixed_point(3),
    "fixed point on 8": lambda: fixed_point(8),
    "one launch, 2": lambda: judged(SMALL, 2, **KERNEL),
    "one launch, sinks, 3": lambda: judged(SINKS, 3, **KERNEL),
    "one launch, lengths, 5": lambda: judged(LENGTHS, 5, **KERNEL),
    "one launch, one query, 8": lambda: judged(ONE, 8, **KERNEL),
    "one launch, wide, bfloat16": lambda: judged(WIDE, 4, dtype=jnp.bfloat16, factor=2.0, **KERNEL),
    "two launches": lambda: judged(CASES["everything"], 4),
    "inside": lambda: check(SMALL, inside(check_vma=False), what="inside"),
    "cache": cache,
    "without waiting": without_waiting,
}  # fmt: skip


def report(names: list[str]) -> Iterator[dict[str, Any]]:
    """Of each check, what went wrong, and whether a race was seen."""
    for name in names:
        seen, failure = io.StringIO(), ""
        with contextlib.redirect_stdout(seen), on_tpus():
            try:
                CHECKS[name]()
            except Exception:  # noqa: BLE001  it is told
                failure = traceback.format_exc()
        printed = seen.getvalue()
        races = printed.count("RACE DETECTED")
        yield {"name": name, "failure": failure, "races": races, "printed": printed[:2000]}


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    assert os.environ["PJRT_NPROC"] == THREADS["PJRT_NPROC"]
    for found in report(sys.argv[1:] or list(CHECKS)):
        print(json.dumps(found), flush=True)
