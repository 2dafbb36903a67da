"""The kernels compiled by the real compilers, for TPUs and GPUs that are not here."""

import itertools

import jax
import jax.numpy as jnp
import pytest

from distattn.local.kernels.gpu import tiling as gpu_tiling
from distattn.local.kernels.tpu import tiling as tpu_tiling
from distattn.testing.programs import compile_for
from tests.kernel_calls import (
    DTYPES,
    GPU_TARGETS,
    TPU_TARGETS,
    WIDTHS,
    CallShapes,
    arrays_like_keys,
    compiled,
    inside,
    key_bytes,
    launches,
)

# Every width and dtype on every TPU decodes, and on GPUs, whose compiler takes longer, every width in one
# dtype; other calls are thinned out, and all together are in scripts/bench/kernels.py.
DECODES = [
    (target, ("decode", "decode_3_heads")[n % 2], width, dtype)
    for target in TPU_TARGETS[1:]
    for n, (width, dtype) in enumerate(itertools.product(WIDTHS, DTYPES))
]
DECODES += [
    (target, ("decode", "decode_3_heads")[n % 2], width, DTYPES[n % 3])
    for target in GPU_TARGETS
    for n, width in enumerate(WIDTHS)
]
PREFILLS = [
    (TPU_TARGETS[1:][n % 4], "prefill", width, DTYPES[n % 3]) for n, width in enumerate(WIDTHS[::2])
]
PREFILLS += [("h100:1x4", "prefill", 192, jnp.float32)]
GRADIENTS = [
    ("v5e:2x2", 128, jnp.bfloat16),
    ("tpu7x:2x2x1", 64, jnp.bfloat16),
    ("h100:1x4", 128, jnp.bfloat16),
]


def check_compiled(report, call, width, dtype, count):
    assert launches(report) == count
    assert arrays_like_keys(report, call, width) == []
    assert report.temp_bytes < key_bytes(call, width, dtype) / 2


@pytest.mark.parametrize(("target", "call", "width", "dtype"), DECODES + PREFILLS)
def test_compiled_for(target, call, width, dtype):
    check_compiled(compiled(target, call, width, dtype), call, width, dtype, 1)


@pytest.mark.parametrize(("target", "width", "dtype"), GRADIENTS)
def test_gradients_compiled_for(target, width, dtype):
    report = compiled(target, "gradient", width, dtype)
    check_compiled(report, "gradient", width, dtype, 3)


# Pallas' interpreter does not know the types of check_vma=True; the compiler does.
@pytest.mark.parametrize(
    ("topology", "implementation", "check_vma"),
    [
        ("v5e:2x2", "pallas_tpu", True),
        ("v5e:2x2", "pallas_tpu", False),
        ("h100:1x4", "pallas_gpu", True),
    ],
)
def test_inside_a_shard_map_compiled(topology, implementation, check_vma):
    def loss(*arrays):
        named = CallShapes(*arrays)._asdict()
        out, lse = inside(implementation, **named, check_vma=check_vma, is_causal=True)
        return out.astype(jnp.float32).sum() + lse.sum()

    report = compile_for(
        jax.grad(loss, argnums=(0, 1, 2)),
        *CallShapes.of((1, 8, 1024, 8, 2), 4, 64, jnp.bfloat16),
        topology=topology,
        mesh={"kv": 4},
        specs=CallShapes.specs(),
    )
    assert launches(report) == 3


def test_keys_wider_than_values_compiled():
    report = compiled("v6e:2x2", "prefill", 192, jnp.bfloat16, value_width=128)
    check_compiled(report, "prefill", 128, jnp.bfloat16, 1)


# JAX's names of the devices.
KINDS_OF = {
    "v4": "TPU v4",
    "v5e": "TPU v5 lite",
    "v5p": "TPU v5",
    "v6e": "TPU v6 lite",
    "tpu7x": "TPU7x",
}


def call_sizes(rows, groups, width):
    return {
        "batch": 1,
        "queries": rows,
        "keys": 100_000,
        "groups": groups,
        "width": width,
        "value_width": width,
        "row_block": 16,
        "key_block": 128,
    }


@pytest.mark.parametrize("chip", tpu_tiling.CHIPS, ids=lambda x: x.name)
def test_blocks_fit_a_tpu(chip):
    assert tpu_tiling.limits_of(KINDS_OF[chip.name]) == chip
    for rows, groups, heads, width, itemsize, backward in itertools.product(
        (1, 96, 100_000),
        (1, 3, 8),
        (1, 3) if chip.name == "v4" else (1, 3, 8),
        WIDTHS,
        (2, 4),
        (False, True),
    ):
        config = tpu_tiling.TpuTileConfig(
            **call_sizes(rows, groups, width),
            kv_heads=heads,
            chip=chip,
            heads=heads,
            itemsize=itemsize,
            key_itemsize=itemsize,
            backward=backward,
        ).chosen()
        assert config.vmem_bytes <= chip.budget_bytes, config
        assert config.key_block % 128 == 0
        assert config.row_block % 128 == 0 or config.row_block >= rows * groups


GPU_KINDS = {
    "other": "NVIDIA L4",
    "a100": "NVIDIA A100-SXM4-80GB",
    "h100": "NVIDIA H100 80GB HBM3",
    "h200": "NVIDIA H200",
    "b200": "NVIDIA B200",
}


@pytest.mark.parametrize("chip", gpu_tiling.CHIPS, ids=lambda x: x.name)
def test_blocks_fit_a_gpu(chip):
    assert gpu_tiling.limits_of(GPU_KINDS[chip.name]) == chip
    for rows, groups, width, itemsize, backward in itertools.product(
        (1, 96, 100_000), (1, 3, 8), WIDTHS, (2, 4), (False, True)
    ):
        config = gpu_tiling.GpuTileConfig(
            **call_sizes(rows, groups, width),
            kv_heads=1,
            chip=chip,
            itemsize=itemsize,
            backward=backward,
        ).chosen()
        assert config.fits, config
        for x in (config.row_block, config.key_block):
            assert x >= 16
            assert x & (x - 1) == 0
