"""Calls of the kernels that the tests and the bench compile, and what a compiled program may hold."""

import contextlib
import dataclasses
import functools
import itertools
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

import distattn
from distattn.local.kernels.tpu.tiling import QUANTISED
from distattn.planning.pods import pod
from distattn.testing import Report, compile_for, interpreted

TPU_TARGETS = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
GPU_TARGETS = ("h100:1x4",)
TARGETS = (*TPU_TARGETS, *GPU_TARGETS)
WIDTHS = (64, 80, 96, 128, 192, 256)
DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
# rows of the batch, queries, keys of a device, heads, heads of keys. No two of them multiply to
# the same size, so that no array passes for one of another kind.
CALLS = {
    "decode": (2, 1, 50_000, 32, 8),
    "decode_alone": (1, 1, 60_000, 32, 8),
    "decode_3_heads": (2, 2, 50_000, 9, 3),
    "prefill": (1, 600, 200_000, 8, 2),
    "gradient": (1, 600, 200_000, 8, 2),
}


every_kernel = pytest.mark.parametrize("implementation", ["pallas_tpu", "pallas_gpu"])


def simulated(implementation: str) -> contextlib.AbstractContextManager:
    """Run kernels on one device by the interpreter."""
    on_a_tpu = implementation == "pallas_tpu"
    return interpreted(pltpu.InterpretParams() if on_a_tpu else True)


def attention_by(implementation: str) -> Callable:
    """(out, lse) by a kernel."""
    return functools.partial(
        distattn.dot_product_attention, return_residual=True, implementation=implementation
    )


def inside(
    implementation: str, *, mesh: Any = None, check_vma: bool, is_causal: bool, **arrays: Any
):
    """Call `sharded_attention` in a shard_map."""
    along = P(None, "kv")
    specs = {"query": P(), "query_positions": P(), "key_positions": along}
    specs |= {"key": along, "value": along}
    run = functools.partial(
        distattn.sharded_attention,
        axis_name="kv",
        is_causal=is_causal,
        return_residual=True,
        implementation=implementation,
    )
    body = jax.shard_map(
        lambda arrays: run(**arrays),
        mesh=mesh,
        in_specs=(specs,),
        out_specs=P(),
        check_vma=check_vma,
    )
    return body(arrays)


def matrix() -> list[tuple[str, str, int, Any]]:
    """Return all programs to compile: target, call, width and dtype."""
    return list(itertools.product(TARGETS, CALLS, WIDTHS, DTYPES))


def kernel_of(target: str) -> str:
    """Return the implementation for a target."""
    return "pallas_gpu" if target in GPU_TARGETS else "pallas_tpu"


def caches() -> list[tuple[str, Any, int, int, int | None]]:
    """Return all caches whose attention is compiled: target, dtype, width, KV heads and layers."""
    few = ((8, None), (2, None), (3, None), (8, 3))
    return [
        (target, dtype, width, *more)
        for target, dtype, width, more in itertools.product(TPU_TARGETS, QUANTISED, WIDTHS, few)
    ]


class CallShapes(NamedTuple):
    """Shapes and dtypes of a compiled call, over the devices of an axis 'kv'."""

    query: jax.ShapeDtypeStruct
    key: jax.ShapeDtypeStruct
    value: jax.ShapeDtypeStruct
    query_positions: jax.ShapeDtypeStruct
    key_positions: jax.ShapeDtypeStruct

    @classmethod
    def of(
        cls,
        sizes: tuple[int, int, int, int, int],
        devices: int,
        width: int,
        dtype: Any,
        value_width: int | None = None,
    ) -> "CallShapes":
        """Return the shapes for sizes B, T, S of a device, N and K."""
        batch, queries, keys, heads, kv_heads = sizes
        struct = jax.ShapeDtypeStruct
        return cls(
            struct((batch, queries, heads, width), dtype),
            struct((batch, devices * keys, kv_heads, width), dtype),
            struct((batch, devices * keys, kv_heads, value_width or width), dtype),
            struct((batch, queries), jnp.int32),
            struct((batch, devices * keys), jnp.int32),
        )

    @classmethod
    def specs(cls) -> tuple[P, ...]:
        """Return how they are sharded."""
        along = P(None, "kv")
        return P(), along, along, P(), along


def compiled(
    target: str,
    call: str,
    width: int,
    dtype: Any,
    *,
    value_width: int | None = None,
    implementation: str | None = None,
    precision: str | None = None,
    strategy: str = "butterfly",
) -> Report:
    """Compile one call of `dot_product_attention` over the devices of a target, keys in any order.

    `implementation`: None for the kernels of the target.
    """
    devices = pod(target).devices
    f = functools.partial(
        distattn.dot_product_attention,
        is_causal=True,
        logits_soft_cap=30.0 if width == 256 else None,
        implementation=implementation or kernel_of(target),
        precision=precision,
        strategy=strategy,
    )

    def attention(query, key, value, query_positions, key_positions):
        return f(query, key, value, query_positions=query_positions, key_positions=key_positions)

    def gradient(*x):
        return jax.grad(lambda *y: attention(*y, *x[3:]).astype(jnp.float32).sum(), (0, 1, 2))(
            *x[:3]
        )

    run: Callable = gradient if call == "gradient" else attention
    return compile_for(
        run,
        *CallShapes.of(CALLS[call], devices, width, dtype, value_width),
        topology=target,
        mesh={"kv": devices},
        specs=CallShapes.specs(),
    )


# XLA's names of a kernel: on a TPU, and on a GPU up to jaxlib 0.10.2 and since.
_CUSTOM_CALLS = "tpu_custom_call", "__gpu$xla.gpu.triton", "triton_kernel_call_ffi"
CACHE_SLOTS = 50_000  # slots of a device, for each of 2 rows of the batch


def decode_of_a_cache(
    target: str,
    dtype: Any,
    width: int,
    kv_heads: int,
    layers: int | None,
    strategy: str = "butterfly",
) -> Report:
    """`KVCache.attend` of one bfloat16 query, the slots over the devices of a target."""
    devices = pod(target).devices
    batch, slots = 2, devices * CACHE_SLOTS
    lead = () if layers is None else (layers,)

    def attention(query, key, value, key_scale, value_scale, positions, layer):
        cache = distattn.KVCache.create(
            batch=batch,
            capacity=slots,
            num_kv_heads=kv_heads,
            head_dim=width,
            layers=layers,
            dtype=dtype,
            sharding=P(None, "kv"),
        )
        cache = dataclasses.replace(
            cache,
            key=key,
            value=value,
            key_scale=key_scale,
            value_scale=value_scale,
            positions=positions,
        )
        return cache.attend(
            query,
            layer=None if layers is None else layer,
            implementation="pallas_tpu",
            strategy=strategy,
        )

    struct = jax.ShapeDtypeStruct
    items = struct((*lead, batch, slots, kv_heads, width), dtype)
    scales = struct((*lead, batch, slots, kv_heads), jnp.float32)
    along, stacked = P(None, "kv"), P(*lead and (None,), None, "kv")
    return compile_for(
        attention,
        struct((batch, 1, 4 * kv_heads, width), jnp.bfloat16),
        items,
        items,
        scales,
        scales,
        struct((batch, slots), jnp.int32),
        struct((), jnp.int32),
        topology=target,
        mesh={"kv": devices},
        specs=(P(), *(stacked,) * 4, along, P()),
    )


def launches(report: Report) -> int:
    """Return how many kernels the compiled program launches."""
    return sum(report.hlo.count(f'custom_call_target="{name}"') for name in _CUSTOM_CALLS)


def arrays_like_keys(report: Report, call: str, width: int) -> list[str]:
    """Return the arrays outside of kernels that are as large as the keys of a device."""
    batch, _, keys, _, kv_heads = CALLS[call]
    return arrays_of_size(report, batch * keys * kv_heads * width)


def arrays_of_size(report: Report, size: int) -> list[str]:
    """Return the arrays outside of kernels that have at least `size` elements.

    An array that XLA brings into VMEM before a kernel reads it (copy-done, slice-done) is not a copy, nor
    is one that it computes block by block within a kernel (a fusion of the kind kCustom).
    """
    free = {
        "parameter",
        "get-tuple-element",
        "bitcast",
        "tuple",
        "custom-call",
        "copy-done",
        "slice-done",
    }
    found, fused = [], False
    for line in report.hlo.splitlines():
        if line.endswith("{"):  # first line of a computation
            fused = line.lstrip().startswith("%fused_computation")
        match = re.match(r"\s*(?:ROOT )?%?(\S+) = \w+\[([\d,]+)\]\S* ([\w-]+)\(", line)
        if match and not fused and match[3] not in free and "kind=kCustom" not in line:
            elements = math.prod(map(int, match[2].split(",")))
            if elements >= size:
                found.append(f"{match[3]} {match[2]}")
    return found


def key_bytes(call: str, width: int, dtype: Any) -> int:
    """Return the bytes of the keys of a device."""
    batch, _, keys, _, kv_heads = CALLS[call]
    return batch * keys * kv_heads * width * jnp.dtype(dtype).itemsize
