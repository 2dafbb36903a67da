"""How close to a float64 reference is close enough: one rule by dtype, derived.

An error is relative to the largest magnitude of the reference, not to each element: attention is an
average, and where it cancels to nearly nothing no float32 sum is right to its last digits.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

# The oracle is float64 too, so a float64 result meets an error of its own size: the rule twice for
# each of the two sides.
FLOAT64_ROUNDINGS = 4.0
FLOAT64_EPS = float(np.finfo(np.float64).eps)


def tolerance(dtype: Any, keys: int) -> float:
    """Relative to max|reference|: one rounding of the output, a float32 sum over `keys` terms."""
    dtype = np.dtype(dtype)
    if dtype == np.float64:
        return FLOAT64_ROUNDINGS * FLOAT64_EPS * (1 + keys**0.5)
    return float(jnp.finfo(dtype).eps) + float(jnp.finfo(jnp.float32).eps) * keys**0.5


def worst(actual: Any, desired: Any, unit: float = 0.0) -> tuple[float, tuple[int, ...]]:
    """The largest |actual - desired| / max|desired| and its place; inf if non-finites differ.

    Args:
      actual: what is judged, any array.
      desired: the reference, of the same shape.
      unit: in place of max|desired|, where it is larger; 1 where both are 0.

    Returns:
      The error and the index of it.

    Raises:
      AssertionError: shapes that differ.
    """
    got, want = (np.asarray(x, dtype=np.float64) for x in (actual, desired))
    if got.shape != want.shape:
        raise AssertionError(f"shapes differ: got {got.shape}, want {want.shape}")
    if got.size == 0:
        return 0.0, ()
    finite = np.isfinite(want)
    unit = max(unit, np.max(np.abs(want), initial=0.0, where=finite)) or 1.0
    both = finite & np.isfinite(got)
    same = (got == want) | (np.isnan(got) & np.isnan(want))
    errors = np.full(got.shape, np.inf)
    errors[same] = 0.0
    errors[both] = np.abs(got[both] - want[both]) / unit
    where = np.unravel_index(np.argmax(errors), errors.shape)
    return float(errors[where]), tuple(int(i) for i in where)
