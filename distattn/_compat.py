"""What differs between the JAX versions that are supported, in one place."""

from typing import Any

import jax
from jax import lax


def varying_axes(*arrays: jax.Array) -> frozenset[str]:
    """Mesh axes over which any of the arrays is typed as varying (empty outside `check_vma=True`)."""
    return frozenset().union(*(_varying(jax.typeof(x)) for x in arrays))


def vary(x: jax.Array, axes: frozenset[str]) -> jax.Array:
    """The same values, typed as varying over `axes` too.

    Loop carries, `cond` branches and the operands of a `custom_vjp` inside `shard_map` must agree
    in this type; the transpose of the cast is the sum over devices that a replicated operand needs.
    """
    missing = tuple(sorted(axes - varying_axes(x)))
    return lax.pcast(x, missing, to="varying") if missing else x


def _varying(kind: Any) -> frozenset[str]:
    if hasattr(kind, "vma"):  # JAX before 0.10
        return kind.vma
    return kind.manual_axis_type.varying
