"""The fastest block sizes of the kernels on this device: candidates, and what a call takes with each."""

import dataclasses
import datetime
import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from distattn._compat import device_kind_of, platform_of
from distattn.cli.check.runner import DoesNotCompile, medians, prepare
from distattn.local import dispatch
from distattn.local.block import Cotangents, LogitConfig
from distattn.local.inputs import AttentionInputs, make_inputs
from distattn.local.kernels.tuned import Kind, Measured, chip_name, kind_of
from distattn.local.tiling import Machine

# Of one sample, which is as many calls in one program: launching it, some 0.1 ms, must not count.
SAMPLE_S = 0.02
SCORING = LogitConfig(1 / 8)
Program = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class Workload:
    """Calls of one kind, for which sizes are sought."""

    kind: Kind
    batch: int
    queries: int
    keys: int
    heads: int
    kv_heads: int
    width: int  # H, and V
    dtype: jnp.dtype  # of keys and values; of 8 bits with scales, the query then bfloat16

    def inputs(self) -> AttentionInputs:
        """Random numbers; causal with more than one query, as a prompt is."""
        batch, keys, heads = self.batch, self.keys, self.kv_heads
        stored = (batch, keys, heads, self.width)
        narrow = self.dtype.itemsize == 1
        query_dtype = jnp.dtype(jnp.bfloat16) if narrow else self.dtype
        query = _random(0, (batch, self.queries, self.heads, self.width), query_dtype)
        key, value = (_random(seed, stored, self.dtype) for seed in (1, 2))
        scale = jnp.full(stored[:3], 1 / 64, jnp.float32) if narrow else None
        # The last query sees all keys, in a cache as in a prompt.
        start = keys - self.queries
        return make_inputs(
            query,
            key,
            value,
            None,
            None,
            is_causal=True,
            query_seq_lengths=None,
            key_value_seq_lengths=None,
            local_window_size=None,
            query_positions=jnp.arange(start, keys, dtype=jnp.int32),
            key_positions=jnp.arange(keys, dtype=jnp.int32),
            query_segment_ids=None,
            key_value_segment_ids=None,
            key_scale=scale,
            value_scale=scale,
        )


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Sizes of a block that a call can have."""

    rows: int
    keys: int
    seconds: float  # of one call, the median


@dataclasses.dataclass(frozen=True)
class Finding:
    """What came of a workload."""

    workload: Workload
    own: Candidate  # the library's choice
    candidates: tuple[Candidate, ...]  # that ran, the fastest first, `own` among them
    left_out: tuple[str, ...]  # those that do not compile, and why

    def measured(self) -> Measured:
        """The row for the file."""
        best = self.candidates[0]
        return Measured(
            chip=chip_name(device_kind_of()),
            kind=self.workload.kind,
            width=self.workload.width,
            dtype=self.workload.dtype.name,
            rows=best.rows,
            keys=best.keys,
            seconds=best.seconds,
            jax=jax.__version__,
            date=datetime.datetime.now(datetime.UTC).date().isoformat(),
        )


def tune(workload: Workload, repeats: int) -> Finding:
    """Times every size that a call can have, interleaved, on the first of these devices.

    Args:
      workload: the calls.
      repeats: how often each size is timed; the median counts.

    Returns:
      Finding.

    Raises:
      NotImplementedError: no kernel does such calls here; says why.
      ValueError: the workload is not of its kind.
    """
    groups = workload.heads // workload.kv_heads
    backward = workload.kind == "gradient"
    kind = kind_of(workload.queries * groups, backward=backward)
    if kind != workload.kind:
        raise ValueError(
            f"{workload.queries} queries of {groups} heads each are {kind!r}, not {workload.kind!r}; pass "
            "fewer queries for decode, more for prefill"
        )
    inputs = workload.inputs()
    machine = Machine(platform_of())
    kernel = dispatch.own(machine.platform)
    reason = kernel.refusal(inputs, SCORING, machine, backward=backward)
    if reason is not None:
        raise NotImplementedError(f"{kind}: {reason}")
    cotangents = _cotangents_of(inputs) if backward else None
    own = kernel.sizes_of(inputs, SCORING, machine, backward=backward)
    programs, left_out = _programs(workload, inputs, cotangents)
    if own not in programs:
        raise NotImplementedError("; ".join(left_out))
    calls = _calls_of_a_sample(programs[own], inputs, cotangents)
    timed = {f"{x}": (program, (calls, inputs, cotangents)) for x, program in programs.items()}
    seconds = medians(timed, repeats)
    found = sorted(
        (Candidate(*sizes, seconds[f"{sizes}"] / int(calls)) for sizes in programs),
        key=lambda x: x.seconds,
    )
    chosen = next(x for x in found if (x.rows, x.keys) == own)
    return Finding(workload, chosen, tuple(found), tuple(left_out))


def _programs(
    workload: Workload, inputs: AttentionInputs, cotangents: Cotangents | None
) -> tuple[dict[tuple[int, int], Program], list[str]]:
    """The compiled program of all sizes that there is room for, by rows and keys; which failed."""
    programs: dict[tuple[int, int], Program] = {}
    left_out: list[str] = []
    seen = set()
    backward = workload.kind == "gradient"
    kernel = dispatch.own(platform_of())
    for machine in _machines(kernel.CANDIDATES, workload.heads // workload.kv_heads):
        if kernel.refusal(inputs, SCORING, machine, backward=backward) is not None:
            continue
        sizes = kernel.sizes_of(inputs, SCORING, machine, backward=backward)
        if sizes in seen:
            continue
        seen.add(sizes)
        name = f"{workload.kind}, {sizes[0]} rows x {sizes[1]} keys"
        run = functools.partial(_calls, machine)
        try:
            programs[sizes] = prepare(name, run, jnp.ones((), jnp.int32), inputs, cotangents)
        except DoesNotCompile as error:
            left_out.append(f"{name}: {error}")
    return programs, left_out


def _machines(
    candidates: tuple[tuple[int, ...], tuple[int, ...]], groups: int
) -> Iterator[Machine]:
    yield Machine(platform_of())
    for rows in candidates[0]:
        for keys in candidates[1]:
            yield Machine(platform_of(), block_sizes=(-(-rows // groups), keys))


def _calls(
    machine: Machine, count: jax.Array, inputs: AttentionInputs, cotangents: Cotangents | None
) -> jax.Array:
    """A number that needs `count` calls, one after the other: of a fold, or of a gradient."""
    kernel = dispatch.own(machine.platform)

    def call(_: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        query, seen = carry
        own = dataclasses.replace(inputs, query=query)
        if cotangents is not None:
            results = kernel.fold_gradients(own, SCORING, machine, cotangents)[:3]
        else:
            state = kernel.fold(own, SCORING, machine)
            results = state.sum, state.weighted_sum
        seen = sum((x.ravel()[0].astype(jnp.float32) for x in results), seen)
        # It never is, but the next call cannot begin before that is known.
        return jnp.where(seen == jnp.inf, 0, query).astype(query.dtype), seen

    return lax.fori_loop(0, count, call, (inputs.query, jnp.zeros((), jnp.float32)))[1]


def _cotangents_of(inputs: AttentionInputs) -> Cotangents:
    shape = inputs.query.shape[:3]
    reference = jnp.full(shape, 8.0, jnp.float32)
    width = inputs.value.shape[-1]
    d_weighted_sum = _random(3, (*shape, width), jnp.dtype(jnp.float32))
    return Cotangents(reference, jnp.ones(shape), d_weighted_sum)


def _calls_of_a_sample(
    program: Program, inputs: AttentionInputs, cotangents: Cotangents | None
) -> jax.Array:
    one = jnp.ones((), jnp.int32)
    seconds = []
    for _ in range(2):  # the first warms up
        began = time.perf_counter()
        jax.block_until_ready(program(one, inputs, cotangents))
        seconds.append(time.perf_counter() - began)
    return jnp.asarray(max(math.ceil(SAMPLE_S / seconds[1]), 1), jnp.int32)


def _random(seed: int, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    if jnp.issubdtype(dtype, jnp.integer):
        return jax.random.randint(jax.random.key(seed), shape, -127, 128, dtype)
    return jax.random.normal(jax.random.key(seed), shape, jnp.float32).astype(dtype)
