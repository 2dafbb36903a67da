"""How close is close enough: the rule of `distattn.testing.reference`; no other test has such numbers."""

import json
import os
from typing import Any

import numpy as np

from distattn.testing.reference import FLOAT64_EPS, tolerance, worst

# A central difference of step h is off by h^2 |f'''| / 6 + eps |f| / h. At h = eps^(1/3) both terms
# have the order eps^(2/3); 64 stands for |f| and |f'''| in units of the gradient.
DIFFERENCE_STEP = FLOAT64_EPS ** (1 / 3)
DIFFERENCE_TOLERANCE = 64 * FLOAT64_EPS ** (2 / 3)


def fraction(actual: Any, desired: Any, dtype: Any, keys: int) -> float:
    """Return the worst error as a fraction of the tolerance; inf if non-finite values differ."""
    return worst(actual, desired)[0] / tolerance(dtype, keys)


def assert_close(
    actual: Any,
    desired: Any,
    dtype: Any,
    keys: int,
    factor: float = 1.0,
    what: str = "",
    unit: float = 0.0,
) -> None:
    """Assert that the error is at most factor * tolerance(dtype, keys), relative to max|desired|.

    Values that are not finite must be the same in the same places; shapes must be equal. If the
    environment variable DISTATTN_RECORD_ERRORS names a file, a line of JSON goes there with the
    error as a fraction of the tolerance itself, whatever the factor.

    Args:
        actual: what is judged, any array.
        desired: the reference; its largest finite magnitude is the unit (1 if that is 0).
        dtype: of the output that is judged: its rounding counts.
        keys: how many terms the sums had, S.
        factor: how much looser; where it is not 1 a comment beside the call says why.
        what: name of what is compared, for the message and the record.
        unit: the unit is at least this. For sums that cancel: the gradient of a bias that is one
            number for all the keys of a row is zero but for rounding, that of its terms.
    """
    error, where = worst(actual, desired, unit)
    share = error / tolerance(dtype, keys)
    path = os.environ.get("DISTATTN_RECORD_ERRORS")
    if path:
        line = {"what": what, "dtype": np.dtype(dtype).name, "fraction": share, "factor": factor}
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
    if not share <= factor:
        got, want = (float(np.asarray(x, dtype=np.float64)[where]) for x in (actual, desired))
        raise AssertionError(
            f"{what or 'actual'}: worst error is {share:.3g} of the tolerance, allowed {factor:g} "
            f"(tolerance {tolerance(dtype, keys):.3g} for {np.dtype(dtype).name}, {keys} keys, "
            f"relative to the largest magnitude); at {where} got {got!r}, want {want!r}"
        )


def assert_close_to_difference(actual: Any, difference: Any, what: str = "") -> None:
    """Assert that a float64 gradient is the central difference taken with DIFFERENCE_STEP."""
    error, where = worst(actual, difference)
    share = error / DIFFERENCE_TOLERANCE
    assert share <= 1, f"{what}: worst error is {share:.3g} of the tolerance, at {where}"
