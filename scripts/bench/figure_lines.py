"""Lines of a figure that compares contenders on logarithmic axes: ours wide, each with its own marker."""

from collections.abc import Sequence
from typing import Any


def draw_line(
    ax: Any, xs: Sequence[float], ys: Sequence[float], style: tuple[str, str, str], *, wide: bool
) -> None:
    """One contender, of a style (label, colour, marker)."""
    label, colour, marker = style
    ax.plot(
        xs,
        ys,
        label=label,
        color=colour,
        marker=marker,
        linewidth=3 if wide else 1.5,
        markersize=7.5 if wide else 5,
        markeredgecolor="white",
        markeredgewidth=0.5,
    )


def logarithmic(ax: Any) -> None:
    """Both axes, x in powers of two; a light grid behind the lines, and no box around them."""
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.grid(color="#e0e0e0", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
