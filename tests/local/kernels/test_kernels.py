"""The kernels by Pallas' interpreter, against the oracle.

On one device TPU kernels have the interpreter of the TPU, whose memory is NaN until it is written; on
several the plain one, since in the other their callbacks would wait for each other (design section 13).
GPU kernels have the plain one alone.
"""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest

import distattn
from distattn.testing import interpreted
from tests.cases import CASES, Case, check, mesh_of, shardings
from tests.kernel_calls import attention_by, every_kernel, inside, simulated
from tests.tolerance import assert_close

# Several blocks of rows and of keys, the last ones not full, and all that masks can say.
EVERYTHING = Case(
    2,
    150,
    300,
    permuted=True,
    empty_slots=40,
    segments=2,
    lengths=True,
    query_lengths=True,
    value_width=12,
    options=(
        ("is_causal", True),
        ("local_window_size", (200, 3)),
        ("logits_soft_cap", 3.0),
        ("scale", 0.5),
    ),
)
# Keys and values are stored in three orders, by their width and number of heads; see `Order` in
# `distattn.local.kernels.tpu.tiling`.
WIDE = dataclasses.replace(CASES["causal_permuted"], keys=140, width=128, value_width=128)
IN_BLOCKS = {
    "everything": EVERYTHING,
    "causal": Case(1, 300, 300, options=(("is_causal", True),)),
    "documents": Case(1, 300, 300, layout="random", documents=6),
    "no mask": Case(1, 130, 256, heads=3, kv_heads=3),
    "heads beside keys": dataclasses.replace(WIDE, queries=130, keys=260),
    "groups of three": Case(
        1,
        50,
        200,
        heads=6,
        permuted=True,
        empty_slots=90,
        options=(("is_causal", True),),
    ),
}
# In the last one the rows of a block end within the groups of a query.
IN_BLOCKS_OF_GPUS = ("everything", "no mask", "groups of three")
MORE = {
    "heads beside keys": WIDE,
    "heads before keys": dataclasses.replace(WIDE, heads=6, kv_heads=3),
    "values in another order": dataclasses.replace(WIDE, value_width=72),
    "16 heads of keys": dataclasses.replace(WIDE, batch=1, heads=16, kv_heads=16),
}
# Covered by the others.
COVERED = {"plain", "causal", "one_query", "window_left", "window_right", "lengths_permuted"}
DONE = MORE | {
    name: x
    for name, x in CASES.items()
    if x.bias is None and x.mask is None and name not in COVERED
}


# For the kernels of GPUs those that differ in what they load, and how it is divided among programs.
FOR_GPUS = {
    "heads before keys": dataclasses.replace(WIDE, heads=6, kv_heads=3, width=80, value_width=96),
    "values in another order": MORE["values in another order"],
    **{name: CASES[name] for name in ("mqa_one_query", "window_causal_sinks", "segments")},
}


@pytest.mark.parametrize("name", DONE)
def test_cases(name):
    with simulated("pallas_tpu"):
        check(DONE[name], attention_by("pallas_tpu"), what=f"pallas_tpu {name}")


@pytest.mark.parametrize("name", FOR_GPUS)
def test_cases_for_gpus(name):
    with simulated("pallas_gpu"):
        check(FOR_GPUS[name], attention_by("pallas_gpu"), what=f"pallas_gpu {name}")


def in_blocks(implementation):
    """Return the call in blocks of 64 queries and 128 keys, on a GPU 32 and 64, so there are several."""
    sizes = {"pallas_tpu": (64, 128), "pallas_gpu": (32, 64)}

    def run(**arguments):
        state = distattn.partial_attention(
            **arguments, implementation=implementation, block_sizes=sizes[implementation]
        )
        out, lse = distattn.finalize(state)
        return out.astype(arguments["query"].dtype), lse

    return run


@pytest.mark.parametrize(
    ("implementation", "name"),
    [
        *(("pallas_tpu", x) for x in IN_BLOCKS if x != "groups of three"),
        *(("pallas_gpu", x) for x in IN_BLOCKS_OF_GPUS),
    ],
)
def test_several_blocks(implementation, name):
    with simulated(implementation):
        what = f"{implementation} in blocks, {name}"
        check(IN_BLOCKS[name], in_blocks(implementation), what=what)


# As in test_attention.py: each product of the gradient starts from an output that was rounded once.
HALF_FACTOR = 2.0


@pytest.mark.parametrize(
    ("implementation", "name", "dtype"),
    [
        ("pallas_tpu", "everything", jnp.bfloat16),
        ("pallas_tpu", "everything", jnp.float16),
        ("pallas_tpu", "heads beside keys", jnp.bfloat16),
        ("pallas_gpu", "everything", jnp.bfloat16),
        ("pallas_gpu", "everything", jnp.float16),
    ],
)
def test_half_precision(implementation, name, dtype):
    with simulated(implementation):
        run = in_blocks(implementation)
        what = f"{implementation} {name}"
        check(IN_BLOCKS[name], run, dtype=dtype, what=what, factor=HALF_FACTOR)


@pytest.mark.parametrize(
    ("implementation", "strategy"),
    [("pallas_tpu", "butterfly"), ("pallas_tpu", "ring"), ("pallas_gpu", "ring")],
)
def test_over_a_mesh(implementation, strategy):
    attention = attention_by(implementation)
    case = dataclasses.replace(CASES["causal_permuted"], queries=8)
    rows = "kv" if strategy == "ring" else "auto"
    where = {**shardings(mesh_of(4, "auto"), "kv", query=rows), "strategy": strategy}
    with interpreted():
        check(case, functools.partial(attention, **where), what=f"{implementation} {strategy}")


@every_kernel
def test_inside_a_shard_map(implementation):
    run = functools.partial(inside, implementation, mesh=mesh_of(4, "auto"), check_vma=False)
    with interpreted():
        check(CASES["causal_permuted"], run, what=f"{implementation} inside")


@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [("pallas_tpu", jnp.float32), ("pallas_gpu", jnp.float32), ("pallas_gpu", jnp.int8)],
)
def test_a_cache_of_several_layers(implementation, dtype):
    rng = np.random.default_rng(0)
    new = jnp.asarray(rng.normal(size=(2, 3, 1, 9, 2, 8)), jnp.float32)  # k or v, layer, B, S, K, H
    cache = distattn.KVCache.create(
        batch=1, capacity=16, num_kv_heads=2, head_dim=8, layers=3, dtype=dtype
    )
    cache = cache.append(*new)
    query = jnp.asarray(rng.normal(size=(1, 2, 4, 8)), jnp.float32)
    for layer in (0, 2):
        want = cache.attend(query, is_causal=True, layer=layer)
        with simulated(implementation):
            got = cache.attend(query, is_causal=True, layer=layer, implementation=implementation)
        assert_close(got, want, jnp.float32, 9)
