"""The steps of a directory: which there are, which were interrupted, which are damaged."""

import shutil
import warnings
from pathlib import Path

import numpy as np

from distattn.cache.manifest import damage

UNFINISHED = ".unfinished"


def begin(directory: Path, step: int | None) -> int:
    """Makes the directory for a step, and says which it is."""
    steps = _steps(directory)
    if step is None:
        step = max(steps, default=-1) + 1
    if isinstance(step, bool) or not isinstance(step, int | np.integer) or step < 0:
        raise ValueError(f"step is {step!r}; it must be an int of at least 0")
    if step in steps:
        raise ValueError(
            f"step={step} is in {directory} already (steps there: {steps}); a step is never overwritten: "
            "pass another one, or delete that directory first"
        )
    unfinished = directory / f"{step}{UNFINISHED}"
    shutil.rmtree(unfinished, ignore_errors=True)  # of a save that was interrupted
    unfinished.mkdir(parents=True)
    return int(step)


def choose(directory: Path, step: int | None) -> int:
    """The step to be restored, when it is found whole."""
    step = _choose_step(directory, step)
    _check_whole(directory, step)
    return int(step)


def _choose_step(directory: Path, step: int | None) -> int:
    steps, interrupted = _steps(directory), _steps(directory, UNFINISHED)
    if step in steps:
        return step
    note = f"; interrupted, and not complete: {interrupted}" if interrupted else ""
    if not steps or step is not None:
        what = "no step" if step is None else f"no step {step}"
        raise FileNotFoundError(f"{what} in {directory}; complete steps there: {steps}{note}")
    if interrupted and interrupted[-1] > steps[-1]:
        warnings.warn(f"step {steps[-1]} of {directory} is restored{note}", stacklevel=3)
    return steps[-1]


def _check_whole(directory: Path, step: int) -> None:
    wrong = damage(directory / str(step))
    if wrong is None:
        return
    earlier = [x for x in reversed(_steps(directory)) if x < step]
    whole = next((x for x in earlier if damage(directory / str(x)) is None), None)
    remedy = "no earlier step is whole" if whole is None else f"pass step={whole}, which is whole"
    raise OSError(f"step {step} in {directory} is damaged: {wrong}; {remedy}")


def _steps(directory: Path, suffix: str = "") -> list[int]:
    """The steps in a directory, in order; with a suffix, those under such a name."""
    if not directory.is_dir():
        return []
    names = (path.name for path in directory.iterdir() if path.is_dir())
    numbers = (name.removesuffix(suffix) for name in names if name.endswith(suffix))
    return sorted(int(x) for x in numbers if x.isdecimal() and x == str(int(x)))
