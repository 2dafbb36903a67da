"""Checks of kernels that exchange, for `test_fused.py`, on eight simulated TPUs, in a process of its own.

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
from distattn.algebra.fixed_point import FixedPoint, FixedPointState, limb_format, quantise
from distattn.experimental.fused import exchange, hooks
from distattn.experimental.fused.route import route_over
from distattn.testing import interpreted, reference
from tests.cases import CASES, DIFFERENTIABLE, Case, as_float32, cache_sharding, check, shardings
from tests.tolerance import assert_close

P = PartitionSpec
THREADS = {"PJRT_NPROC": "16"}
DEVICES = 8


def mesh_of(*sizes: int) -> Mesh:
    names = ("a", "kv")[-len(sizes) :]
    devices = jax.devices()[: int(np.prod(sizes))]
    return jax.make_mesh(sizes, names, (AxisType.Auto,) * len(sizes), devices=devices)


def on_tpus(*, late: bool = False) -> contextlib.AbstractContextManager:
    mode = "on_wait" if late else "eager"
    return interpreted(pltpu.InterpretParams(detect_races=True, dma_execution_mode=mode))


def states(sizes: tuple[int, ...], rows: tuple[int, ...], width: int) -> distattn.SoftmaxState:
    """Return a state for each device: far apart, one of no keys at all, one row that has none anywhere."""
    rng = np.random.default_rng(len(sizes))
    high = 50 * rng.normal(size=(*sizes, *rows))
    total, weighted = rng.uniform(1, 9, (*sizes, *rows)), rng.normal(size=(*sizes, *rows, width))
    for empty in ((0,) * len(sizes), (..., 0)):
        high[empty], total[empty] = -np.inf, 0.0
        weighted[empty if empty[0] is not ... else (..., 0, slice(None))] = 0.0
    return distattn.SoftmaxState(*(jnp.asarray(x, jnp.float32) for x in (high, total, weighted)))


def merged(mesh: Mesh, axes: Any, schedule: str, state: Any) -> Any:
    """Return what each device has after an all-reduce, with the axes of the mesh in front."""
    depth = len(mesh.axis_names)

    def body(state):
        state = jax.tree.map(lambda x: x.reshape(x.shape[depth:]), state)
        state = distattn.all_reduce(state, axes, schedule=schedule)
        return jax.tree.map(lambda x: x.reshape(*(1,) * depth, *x.shape), state)

    specs = P(*mesh.axis_names)
    run = jax.shard_map(body, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=False)
    return jax.tree.map(np.asarray, jax.jit(run)(state))


def same(a: Any, b: Any) -> None:
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def compared(mesh: Mesh, axes: Any, state: Any) -> None:
    """Compare the kernel's bits with those of the butterfly, and between devices."""
    messages = merged(mesh, axes, "butterfly", state)
    names = (axes,) if isinstance(axes, str) else axes
    along = tuple(mesh.axis_names.index(name) for name in names)
    for late in (False, True):
        with on_tpus(late=late):
            found = merged(mesh, axes, "fused", state)
        same(found, messages)
        for x in jax.tree.leaves(found):
            np.testing.assert_array_equal(x, np.broadcast_to(x.max(along, keepdims=True), x.shape))
            assert not np.isnan(x).any()


def exchanged(*sizes: int, axes: Any = "kv", rows: tuple[int, ...] = (1, 2, 6), width: int = 12):
    compared(mesh_of(*sizes), axes, states(sizes, rows, width))


def attention(devices: int, **options: Any) -> Callable:
    named = {"strategy": "fused", "return_residual": True} | options
    return functools.partial(
        distattn.dot_product_attention, **shardings(mesh_of(devices), "kv", query="auto"), **named
    )


def judged(case: Case, devices: int, *, dtype: Any = jnp.float32, factor: float = 1.0) -> None:
    """Check one launch against the oracle, forward: that of the gradient is its own (`test_kernels.py`)."""
    arguments = case.arguments()
    cast = {
        name: jnp.asarray(arguments[name], dtype) for name in DIFFERENTIABLE if name in arguments
    }
    rest = {name: x for name, x in arguments.items() if name not in cast}
    got = jax.jit(functools.partial(attention(devices, **KERNEL), **rest))(**cast)
    exact = {name: np.asarray(x, np.float64) for name, x in cast.items()}
    want = reference.dot_product_attention(**exact, **rest)
    assert got[0].dtype == dtype
    for x, y, kind in zip(got, want, (dtype, jnp.float32), strict=True):
        assert_close(x, y, kind, case.keys, factor)
        replicas = [np.asarray(shard.data) for shard in x.addressable_shards]
        assert len(replicas) == devices
        assert len({replica.tobytes() for replica in replicas}) == 1


def fixed_point(*sizes: int, gradient: bool) -> None:
    """Compare integers by the kernel with those by messages: of a state, or of some sums."""
    terms = [states(sizes, (2, 3, 2), 9).weighted_sum * 10.0**power for power in (-8, 0, 9)]
    scale = limb_format(1000)

    def quantised(x: jax.Array) -> FixedPoint:  # [..., X, rows]
        x = jnp.moveaxis(x, (0, -1), (-1, 0))
        found = quantise(x, scale)
        limbs = tuple(jnp.moveaxis(limb, -1, 0) for limb in found.limbs)
        return FixedPoint(jnp.moveaxis(found.exponent, -1, 0), limbs, scale)

    total, weighted, more = map(quantised, (terms[0][..., :1], terms[1], terms[2][..., :4]))
    state = {"key": more, "sum": total} if gradient else FixedPointState(total, weighted)
    compared(mesh_of(*sizes), "kv", state)


def reproducible() -> None:
    case = dataclasses.replace(CASES["window_causal_sinks"], keys=128, queries=1)
    arguments = as_float32(case.arguments())
    options = dict(case.options) | {"reproducible": True}
    arrays = {name: x for name, x in arguments.items() if name not in options}
    runs = (attention(2, strategy=x, **options) for x in ("fused", "butterfly"))
    same(*(jax.jit(run)(**arrays) for run in runs))


def inside(check_vma: bool) -> Callable:
    """`sharded_attention` in a shard_map."""
    mesh, along = mesh_of(4), P(None, "kv")
    names = ("query", "key", "value", "query_positions", "key_positions")
    specs = dict(zip(names, (P(), along, along, P(), along), strict=True))

    def run(*, is_causal, **arrays):
        body = functools.partial(
            distattn.sharded_attention,
            axis_name="kv",
            strategy="fused",
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
    """Decode a token at a time, in caches of two layers, one of bytes with scales."""
    rng = np.random.default_rng(0)
    options = {"batch": 1, "capacity": 32, "num_kv_heads": 2, "head_dim": 8, "layers": 2}
    new = jnp.asarray(rng.normal(size=(2, 2, 1, 20, 2, 8)), jnp.float32)
    query = jnp.asarray(rng.normal(size=(1, 1, 4, 8)), jnp.float32)
    for dtype in (jnp.float32, jnp.int8):
        sharding = cache_sharding(mesh_of(4))
        held = distattn.KVCache.create(**options, dtype=dtype, sharding=sharding)
        held = held.append(*new)
        got = held.attend(query, layer=1, strategy="fused", **KERNEL)
        want = held.attend(query, layer=1, strategy="butterfly")
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def told() -> None:
    """Exchange as under check_vma=True, whose types the interpreter does not know."""

    def route(axes):
        return dataclasses.replace(route_over(axes), told=("a", "kv"))

    with mock.patch.object(hooks, "route_over", route):
        exchanged(2, 3)
        exchanged(2, 2, axes=("a", "kv"))


class Impatient(exchange.Exchange):
    """Reads what may not have arrived yet."""

    def _receive(self, *given):
        with mock.patch.object(pltpu, "make_async_remote_copy", mock.MagicMock()):
            super()._receive(*given)


class Crowded(exchange.Exchange):
    """Receives all messages in one place."""

    def _message(self, number, each, own, target):
        with mock.patch.object(pltpu, "make_async_remote_copy") as make:
            super()._message(number, each, own, target)
        (source, _, *rest), named = make.call_args
        return pltpu.make_async_remote_copy(source, self.buffers.at[1], *rest, **named)


def broken(kernel: type[exchange.Exchange]) -> None:
    with mock.patch.object(exchange, "Exchange", kernel):
        merged(mesh_of(4), "kv", "fused", states((4,), (1, 2, 6), 12))


def vmapped() -> None:
    """Exchange a batch of states."""
    state = states((3, 2), (2, 1), 8)

    def body(schedule, state):
        run = functools.partial(distattn.all_reduce, axis_name="kv", schedule=schedule)
        return jax.vmap(jax.vmap(run))(state)

    def of(schedule):
        run = functools.partial(body, schedule)
        return jax.shard_map(
            run, mesh=mesh_of(3), in_specs=P("kv"), out_specs=P("kv"), check_vma=False
        )

    same(*(jax.jit(of(schedule))(state) for schedule in ("fused", "butterfly")))


CAUSAL = dataclasses.replace(CASES["causal_permuted"], queries=2)
SINKS = dataclasses.replace(CASES["window_causal_sinks"], queries=3)
LENGTHS = dataclasses.replace(CASES["lengths_permuted"], query_lengths=True, queries=3)
ONE = dataclasses.replace(CASES["mqa_one_query"], keys=30, permuted=True, empty_slots=3)
WIDE = dataclasses.replace(CAUSAL, heads=6, kv_heads=3, width=128, value_width=128)
KERNEL = {"implementation": "pallas_tpu"}

CHECKS: dict[str, Callable[[], None]] = {
    **{f"{n} devices": functools.partial(exchanged, n) for n in range(2, 9)},
    "first axis of two": lambda: exchanged(4, 2, axes="a"),
    "last axis of two": lambda: exchanged(2, 4),
    "both axes": lambda: exchanged(2, 3, axes=("a", "kv")),
    "told where they are": told,
    "several blocks of rows": lambda: exchanged(3, rows=(3, 5, 20), width=130),
    "fixed point on 3": lambda: fixed_point(3, gradient=False),
    "fixed point on 4": lambda: fixed_point(4, gradient=True),
    "reproducible": reproducible,
    "one launch, 2": lambda: judged(CAUSAL, 2),
    "one launch, sinks, 3": lambda: judged(SINKS, 3),
    "one launch, lengths, 5": lambda: judged(LENGTHS, 5),
    "one launch, one query, 8": lambda: judged(ONE, 8),
    "one launch, wide, bfloat16": lambda: judged(WIDE, 4, dtype=jnp.bfloat16, factor=2.0),
    "gradient": lambda: check(SINKS, attention(2, **KERNEL), what="fused"),
    "gradient, two launches": lambda: check(CASES["everything"], attention(3), what="fused"),
    "gradient, inside": lambda: check(CAUSAL, inside(check_vma=False), what="inside"),
    "cache": cache,
    "vmapped": vmapped,
}
BROKEN = {  # races that must be seen
    "without waiting": functools.partial(broken, Impatient),
    "in one buffer": functools.partial(broken, Crowded),
}


def report(names: list[str]) -> Iterator[dict[str, Any]]:
    """Yield what went wrong in each check, and whether a race was seen."""
    for name in names:
        seen, failure = io.StringIO(), ""
        with contextlib.redirect_stdout(seen), on_tpus():
            try:
                (CHECKS | BROKEN)[name]()
            except Exception:  # noqa: BLE001  it is told
                failure = traceback.format_exc()
                pltpu.reset_tpu_interpret_mode_state()
        printed = seen.getvalue()
        races = (printed + failure).count("RACE DETECTED")  # from JAX 0.12 on they raise
        yield {"name": name, "failure": failure, "races": races, "printed": printed[:2000]}


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    jax.config.update("jax_numpy_rank_promotion", "raise")
    assert os.environ["PJRT_NPROC"] == THREADS["PJRT_NPROC"]
    for found in report(sys.argv[1:] or [*CHECKS, *BROKEN]):
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()
