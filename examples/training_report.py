"""What a training run (example 08) shows: its progress, what its program sends, the curve of its loss."""

import re
import sys
import time
from collections import Counter
from pathlib import Path

import jax
from matplotlib.figure import Figure

from distattn.testing import collectives

SCOPE = re.compile(r'op_name="[^"]*\battention\b')  # of the model, in the metadata of HLO
STARTED = time.perf_counter()


def show(text: str) -> None:
    """Prints; of several processes the first does, as they all know the same."""
    if jax.process_index() == 0:
        print(text, flush=True)


def say(text: str) -> None:
    """A line of progress, with the time since the start."""
    show(f"[{time.perf_counter() - STARTED:6.1f} s] {text}")


def progress(done: int, steps: int, loss: float, tokens_per_s: float) -> None:
    """A bar that is drawn again and again on one line of the terminal, or of several processes a line."""
    bar = ("=" * (24 * done // steps)).ljust(24)
    text = f"[{bar}] step {done}/{steps}  loss {loss:.4f}  {tokens_per_s:,.0f} tokens/s "
    if jax.process_count() > 1:  # what starts them passes on whole lines
        show(text)
        return
    print(f"\r{text}", end="\n" if done == steps else "", file=sys.stderr, flush=True)


def moved(hlo: str) -> tuple[Counter[str], Counter[str]]:
    """The collectives that one run of a compiled step makes: those of attention, and all others.

    Where an operation comes from is in its metadata, and the model names the scope of attention. How
    often a loop runs is in there too, so the lines of loops stay.
    """
    rest = [x for x in hlo.splitlines() if " while(" in x or not SCOPE.search(x)]
    elsewhere = collectives("\n".join(rest), executed=True)
    return collectives(hlo, executed=True) - elsewhere, elsewhere


def listed(counts: Counter[str]) -> str:
    """A counter in words."""
    return ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items())) or "none"


def difference(losses: list[float], others: list[float]) -> float:
    """The largest between two runs, relative to the loss."""
    return max(abs(a - b) / b for a, b in zip(losses, others, strict=True))


def plot(path: Path, curves: dict[str, tuple[range, list[float]]], bound: float) -> None:
    """The loss of each run by its steps as a picture, and a line at the bound."""
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
