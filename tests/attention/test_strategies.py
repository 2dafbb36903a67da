"""Every strategy on every number of devices, against the oracle; and replicas equal bit for bit."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import distattn
from distattn.planning import schedule
from tests.cases import (
    ALL_REDUCES,
    CASES,
    FULLY_OPTIMIZED,
    KINDS,
    QUERY_SHARDED,
    Case,
    check,
    mesh_of,
    shardings,
)
from tests.tolerance import assert_close

STRATEGIES = (*ALL_REDUCES, *QUERY_SHARDED)


def with_heads_for(case, strategy, devices):
    """The case with as many heads as the strategy has devices to give them to."""
    heads = math.lcm(case.heads, devices) if strategy == "ulysses" else case.heads
    return dataclasses.replace(case, heads=heads)


def on(mesh, strategy):
    return functools.partial(
        distattn.dot_product_attention,
        **shardings(mesh, "kv", query="auto"),
        strategy=strategy,
        return_residual=True,
    )


# 24 keys on 5 and 7 devices, 6 rows on 4, 5, 7 and 8: padded inside. What is made of XLA's own collectives,
# or goes round, does not care for powers of two, and is spared some of the numbers in between. Each number
# has one kind of axes, each strategy both.
@pytest.mark.parametrize(
    ("devices", "strategy"),
    [
        (devices, strategy)
        for devices in range(1, 9)
        for strategy in STRATEGIES
        if strategy in ("butterfly", "reduce_scatter") or devices not in (4, 6, 7)
    ],
)
def test_devices(devices, strategy):
    kind = "explicit" if devices in (3, 8) else "auto"
    mesh = mesh_of(devices, kind)
    case = with_heads_for(CASES["everything"], strategy, devices)
    with jax.set_mesh(mesh):
        check(case, on(mesh, strategy), what=f"{strategy} on {devices} {kind}")


# Cases that differ only in options are equal to the devices: tests/attention/test_attention.py has them
# all.
OPTIONS_ALONE = ("causal_top_left", "window_left", "window_right", "bias_scalar_cap")


@pytest.mark.parametrize("name", [n for n in CASES if n not in (*OPTIONS_ALONE, "everything")])
def test_cases(name):
    strategy = STRATEGIES[list(CASES).index(name) % len(STRATEGIES)]
    kind = list(KINDS)[list(CASES).index(name) % 2]
    mesh = mesh_of(4, kind)
    case = with_heads_for(CASES[name], strategy, 4)
    with jax.set_mesh(mesh):
        check(case, on(mesh, strategy), what=f"{name} {strategy} {kind}")


def drawn(seed):
    """A case with each feature by the toss of a coin, and where to run it."""
    rng = np.random.default_rng(seed)

    def coin():
        return bool(rng.integers(2))

    def dimensions():
        return tuple(d for d in "BNTS" if coin()) if coin() else None

    kv_heads = int(rng.choice([1, 2, 3]))
    options = {}
    permuted = coin()
    if coin():
        options["is_causal"] = True
    if coin():
        sides = [int(rng.integers(12)), -1, None]
        options["local_window_size"] = (sides[rng.integers(3)], sides[rng.integers(3)])
    if coin():
        options["logits_soft_cap"] = 2.5
    if coin():
        options["scale"] = 0.4
    case = Case(
        batch=int(rng.integers(1, 4)),
        queries=int(rng.choice([1, 3, 8])),
        keys=int(rng.choice([5, 24, 31])),
        heads=kv_heads * int(rng.choice([1, 2, 4])),
        kv_heads=kv_heads,
        value_width=int(rng.choice([4, 8])),
        bias=dimensions(),
        mask=dimensions(),
        sinks=coin(),
        permuted=permuted,
        empty_slots=int(rng.integers(4)) if permuted else 0,
        segments=2 if coin() else 0,
        lengths=coin(),
        query_lengths=coin(),
        options=tuple(options.items()),
        seed=seed,
    )
    devices, strategy = int(rng.choice([2, 3, 4])), STRATEGIES[rng.integers(len(STRATEGIES))]
    return with_heads_for(case, strategy, devices), devices, strategy


@pytest.mark.parametrize("seed", range(10))
def test_arguments_in_any_combination(seed):
    case, devices, strategy = drawn(seed)
    check(case, on(mesh_of(devices, "auto"), strategy), what=f"{case} {devices} {strategy}")


@pytest.mark.parametrize("strategy", ["butterfly", "gather_kv", "ring", "ulysses"])
def test_half_precision(strategy):
    # As in test_attention: what enters the gradient is an output that was rounded once.
    mesh = mesh_of(4, "auto")
    check(CASES["everything"], on(mesh, strategy), dtype=jnp.bfloat16, what=strategy, factor=2.0)


def test_outside_jit():
    mesh = mesh_of(4, "auto")
    check(CASES["causal"], on(mesh, "butterfly"), what="outside jit", jit=False)


def test_a_schedule_of_ones_own():
    # A star: everything to device 0, then from it, in the order of the ranks.
    devices = 4
    rounds = [[(rank, 0)] for rank in range(1, devices)] + [[(0, r)] for r in range(1, devices)]
    star = schedule.Schedule(devices, rounds)
    check(CASES["causal_permuted"], on(mesh_of(devices, "auto"), star), what="star")


@pytest.mark.parametrize("devices", range(2, 9))
def test_replicas_are_equal_bit_for_bit(devices):
    mesh = mesh_of(devices, "auto")
    rng = np.random.default_rng(devices)
    query = jnp.asarray(rng.normal(size=(1, 4, 8, 16)), jnp.float32)
    key = jnp.asarray(rng.normal(size=(1, 32 * devices, 2, 16)), jnp.float32)

    # With everything the compiler does to a sum: fused multiply-adds are what tells inputs apart.
    @functools.partial(jax.jit, compiler_options=FULLY_OPTIMIZED)
    def replicas(query, key):
        def body(query, key):
            state = distattn.partial_attention(query, key, key)
            states = [
                distattn.all_reduce(state, "kv", schedule=name)
                for name in (*ALL_REDUCES, schedule.butterfly(devices))
            ]
            return jax.tree.map(lambda x: x[None], states)

        return jax.shard_map(
            body, mesh=mesh, in_specs=(P(), P(None, "kv")), out_specs=P("kv"), check_vma=False
        )(query, key)

    for state in replicas(query, key):
        for x in jax.tree.leaves(state):
            x = np.asarray(x)
            assert x.shape[0] == devices
            np.testing.assert_array_equal(x, np.broadcast_to(x[:1], x.shape))


@pytest.mark.parametrize("devices", [1, 3, 6, 8])
def test_reduce_scatter_gives_each_device_its_part(devices):
    mesh = mesh_of(devices, "auto")
    rng = np.random.default_rng(0)
    query, key = (
        jnp.asarray(rng.normal(size=(2 * devices, rows, 2 * devices, 4)), jnp.float32)
        for rows in (2 * devices, 3 * devices)
    )
    forms = list(itertools.product(["halving", "psum"], [0, 1, 2]))

    def body(query, key):
        state = distattn.partial_attention(query, key, key)
        parts = (
            distattn.reduce_scatter(state, "kv", scatter_dimension=dimension, schedule=form)
            for form, dimension in forms
        )
        return [distattn.finalize(part)[0] for part in parts]

    specs = [P(*(None,) * dimension, "kv") for _, dimension in forms]
    run = jax.shard_map(
        body, mesh=mesh, in_specs=(P(), P(None, "kv")), out_specs=specs, check_vma=False
    )
    whole = jax.jit(lambda *x: distattn.finalize(distattn.partial_attention(*x))[0])(
        query, key, key
    )
    for form, out in zip(forms, jax.jit(run)(query, key), strict=True):
        assert_close(out, whole, jnp.float32, key.shape[1], what=str(form))
