"""What `scripts/bench/cluster` measured: fits, tables, a figure. Needs no JAX."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from figure_lines import draw_line, logarithmic

# Name: (in the figure, colour, marker). Okabe and Ito's colours, which the colour-blind tell apart.
CONTENDERS = {
    "auto": ("distattn, auto", "#000000", "o"),
    "butterfly": ("distattn, butterfly", "#009E73", "s"),
    "all_gather": ("distattn, all_gather", "#56B4E9", "^"),
    "psum": ("distattn, psum", "#0072B2", "v"),
    "pmax_psums": ("by hand: pmax, two psums", "#E69F00", "D"),
    "xla": ("XLA's own partitioning", "#D55E00", "X"),
    "ring": ("ring, keys and values", "#CC79A7", "P"),
}
MODELS = {"log2 D": math.log2, "D": float}
SUFFIXES = (".svg", ".png", ".pdf")


def fit(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float, float]:
    """(a, b, residual): least squares of y = a + b x, and the root mean square of what is left."""
    count = len(xs)
    x_mean, y_mean = sum(xs) / count, sum(ys) / count
    spread = sum((x - x_mean) ** 2 for x in xs)
    pairs = list(zip(xs, ys, strict=True))
    b = sum((x - x_mean) * (y - y_mean) for x, y in pairs) / spread
    a = y_mean - b * x_mean
    return a, b, math.sqrt(sum((a + b * x - y) ** 2 for x, y in pairs) / count)


def fits(results: Sequence[dict]) -> list[dict]:
    """Both models of each contender, where there are three numbers of hosts or more to tell them apart."""
    found = []
    for (direction, delay_ms), rows in panels(results):
        hosts = [row["hosts"] for row in rows]
        if len(hosts) < 3:
            continue
        for name in rows[0]["ms"]:
            ms = [row["ms"][name] for row in rows]
            models = {
                model: dict(zip(("a_ms", "b_ms", "residual_ms"), fit(x, ms), strict=True))
                for model, scale in MODELS.items()
                for x in [[scale(count) for count in hosts]]
            }
            better = min(models, key=lambda model: models[model]["residual_ms"])
            found.append(
                {"contender": name, "delay_ms": delay_ms, "pass": direction}
                | {"models": models, "better": better}
            )
    return found


def panels(results: Sequence[dict]) -> Iterator[tuple[tuple[str, int], list[dict]]]:
    """The rows of each pass and delay, by number of hosts."""
    keys = dict.fromkeys((row["pass"], row["delay_ms"]) for row in results)
    for key in keys:
        rows = [row for row in results if (row["pass"], row["delay_ms"]) == key]
        yield key, sorted(rows, key=lambda row: row["hosts"])


def table(results: Sequence[dict]) -> str:
    """For each pass and delay: ratios to `auto` where it took part, then milliseconds, then fits."""
    lines, fitted = [], fits(results)
    for (direction, delay_ms), rows in panels(results):
        trips = ", ".join(f"{row['round_trip_ms']:.1f}" for row in rows)
        lines += ["", f"{direction}, {delay_ms} ms one way (round trips measured: {trips} ms)"]
        hosts = "".join(f"{row['hosts']:>9}" for row in rows)
        lines.append(
            f"{'hosts':12}{hosts}   medians in ms; times auto's; better fit of D hosts, in ms"
        )
        for name in rows[0]["ms"]:
            ms = "".join(f"{row['ms'][name]:9.1f}" for row in rows)
            line = f"{name:12}{ms}   "
            if all("auto" in row["ms"] for row in rows):
                line += "".join(f"{row['ms'][name] / row['ms']['auto']:6.1f}x" for row in rows)
            for row in fitted:
                if (row["contender"], row["delay_ms"], row["pass"]) == (name, delay_ms, direction):
                    model = row["models"][row["better"]]
                    line += (
                        f"   {model['a_ms']:.1f} + {model['b_ms']:.1f} {row['better']}"
                        f" (off by {model['residual_ms']:.1f})"
                    )
            lines.append(line)
    return "\n".join(lines)


def load(path: Path) -> dict:
    """What was saved. Raises ValueError where it is something else."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        rows = saved["results"]
        whole = {"hosts", "delay_ms", "pass", "ms"}
        if not rows or not all(whole <= set(row) and row["ms"] for row in rows):
            raise KeyError("results")
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from None
    except (json.JSONDecodeError, KeyError, TypeError):
        raise ValueError(f"{path} is no JSON that this benchmark has saved") from None
    return saved


def plot(saved: dict, path: Path) -> None:
    """Time against hosts: a row of panels for each pass, a panel for each delay."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams |= {"font.size": 11, "svg.fonttype": "path", "svg.hashsalt": "cluster"}
    from matplotlib import pyplot as plt
    from matplotlib.ticker import NullLocator, StrMethodFormatter

    results = saved["results"]
    passes = list(dict.fromkeys(row["pass"] for row in results))
    delays = sorted({row["delay_ms"] for row in results})
    figure, axes = plt.subplots(
        len(passes),
        len(delays),
        figsize=(3.4 * len(delays) + 2.6, 3.4 * len(passes) + 0.5),
        sharex=True,
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for (direction, delay_ms), rows in panels(results):
        ax = axes[passes.index(direction), delays.index(delay_ms)]
        hosts = [row["hosts"] for row in rows]
        for name, style in CONTENDERS.items():
            if name in rows[0]["ms"]:
                draw_line(ax, hosts, [row["ms"][name] for row in rows], style, wide=name == "auto")
        logarithmic(ax)
        ax.set_xticks(sorted({row["hosts"] for row in results}))
        ax.xaxis.set_minor_locator(NullLocator())
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        what = f"{direction}, " if len(passes) > 1 else ""
        ax.set_title(f"{what}{delay_ms} ms one way")
    for ax in axes[-1]:
        ax.set_xlabel("hosts")
    for ax in axes[:, 0]:
        ax.set_ylabel("time of one call (ms)")
    handles, labels = axes[0, -1].get_legend_handles_labels()
    last = [line.get_ydata()[-1] for line in handles]
    order = sorted(range(len(last)), key=lambda i: -last[i])  # as the lines end in that panel
    figure.legend(
        [handles[i] for i in order],
        [labels[i] for i in order],
        loc="outside right center",
        frameon=False,
    )
    undated = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, dpi=160, metadata=undated)
    plt.close(figure)
