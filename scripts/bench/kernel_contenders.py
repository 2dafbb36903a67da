"""Attention on one device, ours and others', interleaved: the table of `kernels.py time`.

On one device keys are in order, as the others need. A contender that does not do a case, or
is not installed, is named with its reason.
"""

import dataclasses
import functools
import importlib
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from samples import interleaved_medians

import distattn
from distattn.local.inputs import KERNEL_NAMES
from distattn.planning.chips import chip_of
from distattn.planning.cost import Topology, Workload
from distattn.planning.plan import local_s

OURS = "distattn"


@dataclasses.dataclass(frozen=True)
class Case:
    """A call, in bfloat16."""

    batch: int
    queries: int
    keys: int
    heads: int = 32
    kv_heads: int = 8
    width: int = 128
    causal: bool = False
    gradient: bool = False

    @property
    def workload(self) -> Workload:
        """For the roofline; of a causal mask half of the pairs count, of which T = S."""
        keys = self.keys // 2 if self.causal else self.keys
        heads = self.heads, self.kv_heads
        sizes = self.batch, self.queries, keys, *heads, self.width, self.width
        return Workload(*sizes, itemsize=2, training=self.gradient)

    def arrays(self) -> tuple[jax.Array, ...]:
        """Query, key and value."""
        sizes = (self.queries, self.heads), (self.keys, self.kv_heads), (self.keys, self.kv_heads)
        random = np.random.default_rng(0)
        return tuple(
            jnp.asarray(random.normal(size=(self.batch, *size, self.width)), jnp.bfloat16)
            for size in sizes
        )


CASES = {
    "decode, batch 1": Case(1, 1, 262_144),
    "decode, batch 32": Case(32, 1, 8_192),
    "prefill": Case(1, 512, 131_072),
    "causal prompt": Case(1, 8_192, 8_192, causal=True),
    "causal, with gradient": Case(1, 8_192, 8_192, causal=True, gradient=True),
}


def small(case: Case) -> Case:
    """Return a case that takes a hundredth of a second on a CPU, to see that all runs."""
    keys = case.keys // 1024
    queries = 1 if case.queries == 1 else keys if case.queries == case.keys else 4
    return dataclasses.replace(case, batch=1, queries=queries, keys=keys, heads=4, kv_heads=2)


def contenders() -> dict[str, Callable]:
    """Functions of query, key and value and `is_causal`, by name."""
    ours = distattn.dot_product_attention
    names = {OURS: None, "distattn xla": "xla"} | {f"distattn {x}": x for x in KERNEL_NAMES}
    found: dict[str, Callable] = {
        name: functools.partial(ours, implementation=implementation)
        for name, implementation in names.items()
    }
    for name in ("xla", "cudnn"):
        found[f"jax.nn {name}"] = functools.partial(
            jax.nn.dot_product_attention, implementation=name
        )

    def tokamax(*arrays: jax.Array, is_causal: bool) -> jax.Array:
        return importlib.import_module("tokamax").dot_product_attention(
            *arrays, is_causal=is_causal
        )

    return found | {"tokamax": tokamax}


def compiled(attention: Callable, case: Case, arrays: tuple) -> Callable:
    """Return the program of a contender."""

    def forward(*arrays: jax.Array) -> jax.Array:
        return attention(*arrays, is_causal=case.causal)

    def gradient(*arrays: jax.Array) -> Any:
        return jax.grad(lambda *x: forward(*x).astype(jnp.float32).sum(), argnums=(0, 1, 2))(
            *arrays
        )

    return jax.jit(gradient if case.gradient else forward).lower(*arrays).compile()


def least_s(case: Case, device: jax.Device) -> float | None:
    """Seconds at the device's peak, of memory or of matmuls; None for a chip that is not in the table."""
    chip = chip_of(device.device_kind)
    if chip is None or chip.platform == "cpu":
        return None
    peak = dataclasses.replace(chip, attained=1.0)
    return local_s(case.workload, Topology(chip.platform, (), chip=peak))


def time_all(repeats: int, out: str | None, *, tiny: bool) -> None:
    """Prints a table for each case, and writes JSON.

    Args:
      repeats: of each program, of which all take turns; two more turns warm up.
      out: file for the figures, or None.
      tiny: cases so small that a CPU runs them: their figures say nothing.
    """
    device = jax.devices()[0]
    print(f"{device.device_kind}, jax {jax.__version__}; medians of {repeats}, interleaved")
    if tiny:
        print("small cases: these figures say nothing of the kernels")
    rows = []
    for name, case in CASES.items():
        case = small(case) if tiny else case
        arrays, programs, absent = case.arrays(), {}, {}
        for contender, attention in contenders().items():
            try:
                program = compiled(attention, case, arrays)
                jax.block_until_ready(program(*arrays))
            except Exception as error:  # noqa: BLE001 - what others raise is not known
                absent[contender] = " ".join(str(error).split())[:120]
            else:
                programs[contender] = program
        seconds, least = interleaved_medians(programs, arrays, repeats), least_s(case, device)
        print(f"\n{name}: {case}")
        print(f"{'':24}{'us':>12}{'ratio to distattn':>20}{'of roofline':>14}")
        for contender, median in sorted(seconds.items(), key=lambda x: x[1]):
            ratio = median / seconds.get(OURS, math.nan)
            share = None if least is None else least / median
            row = {"case": name, "contender": contender, "seconds": median}
            rows.append(row | {"ratio": ratio, "roofline": share})
            part = "not known" if share is None else f"{share:.0%}"
            print(f"{contender:24}{median * 1e6:12.1f}{ratio:20.2f}{part:>14}")
        for contender, reason in absent.items():
            print(f"{contender:24} not run: {reason}")
    if out:
        where = {"device": device.device_kind, "jax": jax.__version__, "repeats": repeats}
        Path(out).write_text(json.dumps(where | {"rows": rows}, indent=1), encoding="utf-8")
