"""Output of a training run (example 08): progress, collectives, and the curve of the loss."""

import re
import sys
import time
from collections import Counter
from pathlib import Path

import jax
from matplotlib.figure import Figure

from distattn.testing import collectives

SCOPE = re.compile(r'op_name="[^"]*\battention\b')  # scope of the model in the metadata of HLO
STARTED = time.perf_counter()


def show(text: str) -> None:
    """Print in the first process."""
    if jax.process_index() == 0:
        print(text, flush=True)


def say(text: str) -> None:
    """Show a line of progress with the time since the start."""
    show(f"[{time.perf_counter() - STARTED:6.1f} s] {text}")


def progress(done: int, steps: int, loss: float, tokens_per_s: float) -> None:
    """Redraw the progress bar; in a job of several processes, print it on a line of its own."""
    bar = ("=" * (24 * done // steps)).ljust(24)
    text = f"[{bar}] step {done}/{steps}  loss {loss:.4f}  {tokens_per_s:,.0f} tokens/s "
    if jax.process_count() > 1:  # the launcher passes on whole lines only
        show(text)
        return
    print(f"\r{text}", end="\n" if done == steps else "", file=sys.stderr, flush=True)


def moved(hlo: str) -> tuple[Counter[str], Counter[str]]:
    """Count the collectives of one run of a compiled step: those of attention, and all others.

    The metadata of an operation has its scope, and the model names the scope of attention. Loops have their
    trip counts there too, so their lines stay.
    """
    lines = [x for x in hlo.splitlines() if " while(" in x or not SCOPE.search(x)]
    outside = collectives("\n".join(lines), executed=True)
    return collectives(hlo, executed=True) - outside, outside


def listed(counts: Counter[str]) -> str:
    """Return a counter as text."""
    return ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items())) or "none"


def difference(losses: list[float], others: list[float]) -> float:
    """Return the largest relative difference between the losses of two runs."""
    return max(abs(a - b) / b for a, b in zip(losses, others, strict=True))


def plot(path: Path, curves: dict[str, tuple[range, list[float]]], bound: float) -> None:
    """Plot the loss of each run over its steps, and a line at the bound."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss, nats a byte")
    for i, (name, (steps, losses)) in enumerate(curves.items()):
        points = [step + 1 for step in steps]
        axes.plot(
            points, losses, label=name, marker="osx"[i], fillstyle="none", markersize=10 - 3 * i
        )
    axes.axhline(bound, color="gray", linestyle=":", label="byte frequencies alone")
    axes.legend()
    figure.savefig(path, dpi=120)
