"""The look that the figures of the benchmarks share. Needs matplotlib, and no JAX."""

from pathlib import Path
from typing import Any

# Okabe and Ito's colours, which the colour-blind tell apart.
BLACK, GREEN, SKY, BLUE = "#000000", "#009E73", "#56B4E9", "#0072B2"
ORANGE, RED, PINK = "#E69F00", "#D55E00", "#CC79A7"


def start(name: str) -> Any:
    """matplotlib's pyplot, set so that the same numbers give the same file."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams |= {
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.labelsize": 12,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlesize": 12,
        "font.size": 11,
        "grid.color": "#dddddd",
        "grid.linewidth": 0.6,
        "legend.frameon": False,
        "lines.markeredgecolor": "white",
        "lines.markeredgewidth": 0.5,
        "svg.fonttype": "path",
        "svg.hashsalt": name,
    }
    from matplotlib import pyplot as plt

    return plt


def weight(*, ours: bool) -> dict[str, float]:
    """Width of a line and size of its markers."""
    return {"linewidth": 3.0, "markersize": 8} if ours else {"linewidth": 1.6, "markersize": 6}


def powers_of_two(ax: Any, ticks: Any) -> None:
    """A logarithmic x axis, with these numbers written out on it."""
    from matplotlib.ticker import NullLocator, StrMethodFormatter

    ax.set_xscale("log", base=2)
    ax.set_xticks(sorted(ticks))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))


def plain(axis: Any) -> None:
    """Numbers on a logarithmic axis as one reads them: 1,000 and not a power of ten."""
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}" if x >= 1 else f"{x:g}"))


def save(figure: Any, path: Path) -> None:
    """Writes it, without the date."""
    from matplotlib import pyplot as plt

    undated = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, dpi=160, metadata=undated)
    plt.close(figure)
