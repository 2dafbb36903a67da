"""Style of the figures of the benchmarks; needs matplotlib and no JAX."""

from pathlib import Path
from typing import Any

# Okabe and Ito's colours, which colour-blind readers can distinguish.
BLACK, GREEN, SKY, BLUE = "#000000", "#009E73", "#56B4E9", "#0072B2"
ORANGE, RED, PINK = "#E69F00", "#D55E00", "#CC79A7"


def start(name: str) -> Any:
    """Return matplotlib's pyplot, configured so that equal numbers give equal files."""
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
    """Return the width of a line and the size of its markers."""
    return {"linewidth": 3.0, "markersize": 8} if ours else {"linewidth": 1.6, "markersize": 6}


def powers_of_two(ax: Any, ticks: Any) -> None:
    """Make the x axis logarithmic, and label these values."""
    from matplotlib.ticker import NullLocator, StrMethodFormatter

    ax.set_xscale("log", base=2)
    ax.set_xticks(sorted(ticks))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))


def plain(axis: Any) -> None:
    """Label a logarithmic axis with 1,000 and not with powers of ten."""
    from matplotlib.ticker import FuncFormatter

    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:,.0f}" if x >= 1 else f"{x:g}"))


def save(figure: Any, path: Path) -> None:
    """Write the figure without the date."""
    from matplotlib import pyplot as plt

    undated = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, dpi=160, metadata=undated)
    plt.close(figure)
