"""Calls of the TPU kernels that the tests and the bench compile, and what a compiled program may hold."""

import functools
import itertools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

import distattn
from distattn.testing import Report, compile_for

TARGETS = ("v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
WIDTHS = (64, 80, 96, 128, 192, 256)
DTYPES = (jnp.bfloat16, jnp.float16, jnp.float32)
# rows of the batch, queries, keys of a device, heads, heads of keys. No two of their products are equal
# that would let an array of one kind pass for another.
CALLS = {
    "decode": (2, 1, 50_000, 32, 8),
    "decode_3_heads": (2, 2, 50_000, 9, 3),
    "prefill": (1, 600, 200_000, 8, 2),
    "gradient": (1, 600, 200_000, 8, 2),
}


def matrix() -> list[tuple[str, str, int, Any]]:
    """All that is to compile: target, call, width and dtype."""
    return list(itertools.product(TARGETS, CALLS, WIDTHS, DTYPES))


def compiled(
    target: str,
    call: str,
    width: int,
    dtype: Any,
    *,
    value_width: int | None = None,
    implementation: str | None = "pallas_tpu",
    combine: str = "butterfly",
) -> Report:
    """One call of `dot_product_attention` over the devices of a target, keys in any order."""
    batch, queries, keys, heads, kv_heads = CALLS[call]
    chips = math.prod(map(int, target.partition(":")[2].split("x")))
    devices = chips * (2 if target.startswith(("v4", "tpu7x")) else 1)  # a core is a device there
    f = functools.partial(
        distattn.dot_product_attention,
        is_causal=True,
        logits_soft_cap=30.0 if width == 256 else None,
        implementation=implementation,
        combine=combine,
    )

    def attention(query, key, value, query_positions, key_positions):
        return f(query, key, value, query_positions=query_positions, key_positions=key_positions)

    def gradient(*x):
        return jax.grad(lambda *y: attention(*y, *x[3:]).astype(jnp.float32).sum(), (0, 1, 2))(
            *x[:3]
        )

    struct = jax.ShapeDtypeStruct
    along = P(None, "kv")
    run: Callable = gradient if call == "gradient" else attention
    return compile_for(
        run,
        struct((batch, queries, heads, width), dtype),
        struct((batch, devices * keys, kv_heads, width), dtype),
        struct((batch, devices * keys, kv_heads, value_width or width), dtype),
        struct((batch, queries), jnp.int32),
        struct((batch, devices * keys), jnp.int32),
        topology=target,
        mesh={"kv": devices},
        specs=(P(), along, along, P(), along),
    )


def launches(report: Report) -> int:
    """How many kernels the compiled program launches."""
    return report.hlo.count('custom_call_target="tpu_custom_call"')


def arrays_like_keys(report: Report, call: str, width: int) -> list[str]:
    """What the program computes, outside of kernels, that is as large as the keys of a device.

    What XLA brings into VMEM before a kernel reads it (copy-done, slice-done) is not a copy.
    """
    batch, _, keys, _, kv_heads = CALLS[call]
    size = batch * keys * kv_heads * width
    free = {
        "parameter",
        "get-tuple-element",
        "bitcast",
        "tuple",
        "custom-call",
        "copy-done",
        "slice-done",
    }
    found = []
    for line in report.hlo.splitlines():
        match = re.match(r"\s*(?:ROOT )?%?(\S+) = \w+\[([\d,]+)\]\S* ([\w-]+)\(", line)
        if match and match[3] not in free:
            elements = math.prod(map(int, match[2].split(",")))
            if elements >= size:
                found.append(f"{match[3]} {match[2]}")
    return found


def key_bytes(call: str, width: int, dtype: Any) -> int:
    """Of the keys of a device."""
    batch, _, keys, _, kv_heads = CALLS[call]
    return batch * keys * kv_heads * width * jnp.dtype(dtype).itemsize
