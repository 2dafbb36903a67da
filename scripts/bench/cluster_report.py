"""Fits, tables and figures of the measurements of `scripts/bench/cluster`, without JAX."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import drawing

CONTENDERS = {  # name: (in the figure, colour, marker)
    "auto": ("distattn, auto", drawing.BLACK, "o"),
    "butterfly": ("distattn, butterfly", drawing.GREEN, "s"),
    "all_gather": ("distattn, all_gather", drawing.SKY, "^"),
    "psum": ("distattn, psum", drawing.BLUE, "v"),
    "pmax_psums": ("by hand: pmax, two psums", drawing.ORANGE, "D"),
    "xla": ("XLA's own partitioning", drawing.RED, "X"),
    "ring": ("ring, keys and values", drawing.PINK, "P"),
}
MODELS = {"log2 D": math.log2, "D": float}
SUFFIXES = (".svg", ".png", ".pdf")


def fit(xs: Sequence[float], ys: Sequence[float]) -> tuple[float, float, float]:
    """Return (a, b, residual) of the least squares of y = a + b x; the residual is a root mean square."""
    count = len(xs)
    x_mean, y_mean = sum(xs) / count, sum(ys) / count
    spread = sum((x - x_mean) ** 2 for x in xs)
    pairs = list(zip(xs, ys, strict=True))
    b = sum((x - x_mean) * (y - y_mean) for x, y in pairs) / spread
    a = y_mean - b * x_mean
    return a, b, math.sqrt(sum((a + b * x - y) ** 2 for x, y in pairs) / count)


def fits(results: Sequence[dict]) -> list[dict]:
    """Return both models of each contender, if three or more numbers of hosts tell them apart."""
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
    """Yield the results of each pass and delay, by number of hosts."""
    keys = dict.fromkeys((row["pass"], row["delay_ms"]) for row in results)
    for key in keys:
        rows = [row for row in results if (row["pass"], row["delay_ms"]) == key]
        yield key, sorted(rows, key=lambda row: row["hosts"])


def table(results: Sequence[dict]) -> str:
    """Return, for each pass and delay, milliseconds, ratios to `auto` if it took part, and fits."""
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
    """Return saved measurements; raise ValueError if the file has none."""
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
    """Draw time against hosts: a row of panels per pass, a panel per delay."""
    plt = drawing.start("cluster")
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
        names = [name for name in CONTENDERS if name in rows[0]["ms"]]
        draw_lines(ax, rows, names, {row["hosts"] for row in results})
        what = "with gradient" if direction == "gradient" else direction
        ax.set_title(f"{what}, {delay_ms} ms one way")
    for ax in axes[-1]:
        ax.set_xlabel("hosts")
    for ax in axes[:, 0]:
        ax.set_ylabel("time of one call (ms)")
    handles, labels = axes[0, -1].get_legend_handles_labels()
    last = [line.get_ydata()[-1] for line in handles]
    order = sorted(range(len(last)), key=lambda i: -last[i])  # as the lines end in that panel
    figure.legend(
        [handles[i] for i in order], [labels[i] for i in order], loc="outside right center"
    )
    drawing.save(figure, path)


def headline(saved: dict, path: Path, *, delay_ms: int = 5) -> None:
    """Draw one panel: the time of a forward pass against the number of hosts."""
    plt = drawing.start("headline")
    rows = dict(panels(saved["results"]))["forward", delay_ms]
    figure, ax = plt.subplots(figsize=(8.6, 4.4), layout="constrained")
    names = ("ring", "xla", "pmax_psums", "auto")
    hosts = {row["hosts"] for row in rows}
    draw_lines(ax, rows, names, hosts)
    ax.set_xlabel(f"hosts, {delay_ms} ms one way between any two")
    ax.set_ylabel("attention of one query (ms)")
    floor = 0.0  # lowest place of the next label: lines may end closer together than text can
    for name in reversed(names):
        ms = rows[-1]["ms"][name]
        floor = max(ms, floor * 1.45)
        label, colour, _ = CONTENDERS[name]
        ax.annotate(
            f"{label}: {ms:,.0f} ms",
            (rows[-1]["hosts"] * 1.07, floor),
            color=colour,
            fontweight="bold" if name == "auto" else "normal",
            va="center",
            annotation_clip=False,
        )
    ax.set_xlim(min(hosts) / 1.1, max(hosts) * 1.04)
    drawing.save(figure, path)


def draw_lines(ax: Any, rows: Sequence[dict], names: Sequence[str], hosts: set[int]) -> None:
    """Draw the lines of a panel, on logarithmic axes."""
    for name in names:
        label, colour, marker = CONTENDERS[name]
        times = [row["ms"][name] for row in rows]
        ax.plot(
            [row["hosts"] for row in rows],
            times,
            label=label,
            color=colour,
            marker=marker,
            **drawing.weight(ours=name == "auto"),
        )
    ax.set_yscale("log")
    drawing.powers_of_two(ax, hosts)
    drawing.plain(ax.yaxis)
