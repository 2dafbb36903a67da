"""What a plan looks like: time against context and against devices, and who sends to whom."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from distattn.planning.plan import Plan, plan
from distattn.planning.pods import Pod
from distattn.planning.schedule import butterfly
from distattn.planning.text import seconds_text

# Okabe and Ito's colours, which the colour-blind tell apart.
COLOURS = ("#009E73", "#0072B2", "#D55E00", "#CC79A7", "#56B4E9", "#E69F00", "#000000", "#999999")
MARKERS = "osD^vXP*"
MOST_DRAWN = 64  # devices of an axis, above which a picture of them is a blot
RC: dict[str, Any] = {"font.size": 10, "svg.fonttype": "path", "svg.hashsalt": "plan"}
STATES = ("butterfly", "fused")  # strategies whose rounds are a schedule of ours


def draw(found: Plan, pod: Pod, path: Path) -> None:
    """Writes the picture.

    Args:
      found: the plan.
      pod: of which the plan is.
      path: where to; its suffix says in which format.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams |= RC
    from matplotlib import pyplot as plt

    axes = {name: found.axes[name] for name in found.key_axes if found.axes[name] > 1}
    rounds = max((len(butterfly(size).rounds) for size in axes.values()), default=0)
    figure = plt.figure(figsize=(12, 4.6 + 1.9 * len(axes)), layout="constrained")
    above, below = figure.subfigures(
        2, 1, squeeze=False, height_ratios=(4.6, max(1.9 * len(axes), 0.1))
    )[:, 0]
    left, right = above.subplots(1, 2)
    names = (found.strategy, *sorted(x.strategy for x in found.alternatives))
    style = {name: (COLOURS[k % 8], MARKERS[k % 8]) for k, name in enumerate(names)}
    _lines(left, _contexts(found, pod), style, found, found.workload.context)
    left.set_xlabel("context (keys of a sequence)")
    _lines(right, _pods(found, pod), style, found, found.devices)
    right.set_xlabel(f"{pod.chip.name} devices, for a context of {found.workload.context:,}")
    for ax in (left, right):
        ax.set_ylabel("predicted time of a step (s)")
    handles, labels = left.get_legend_handles_labels()
    above.legend(
        handles, labels, loc="outside upper center", ncols=min(len(labels), 6), frameon=False
    )
    if axes:
        _exchange(below, found, axes, rounds)
    undated = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, dpi=160, metadata=undated)
    plt.close(figure)


def _as_in(found: Plan) -> dict[str, Any]:
    """What other plans in the picture have in common with this one."""
    return {
        "query_sharded": found.query_sharded,
        "batch_axis_name": found.batch_axes,
        "heads_axis_name": found.heads_axes,
    }


def _contexts(found: Plan, pod: Pod) -> Iterator[tuple[int, Plan]]:
    """Plans for contexts around that of the workload, in factors of 4."""
    same = _as_in(found) | {"sharding": found.axes, "links": found.links}
    for power in range(-4, 4):
        context = max(int(found.workload.context * 4.0**power), pod.devices)
        yield context, plan(found.workload.with_context(context), pod, **same)


def _pods(found: Plan, pod: Pod) -> Iterator[tuple[int, Plan]]:
    """Plans for the pod, its halves, quarters and so on.

    Where axes divide sequences or heads they stay, and the axes of the keys are halved, as long as these
    can be and all lie along the pod.
    """
    axes = dict(found.axes) if found.batch_axes or found.heads_axes else None
    while True:
        if pod.devices > 1:
            try:
                yield pod.devices, plan(found.workload, pod, sharding=axes, **_as_in(found))
            except ValueError:  # the first is the plan itself, so it is the axes
                return
        if axes is not None:
            longest = max(found.key_axes, key=axes.__getitem__, default=None)
            if longest is None or axes[longest] % 2:
                return
            axes[longest] //= 2
        if pod.slices > 1:
            pod = dataclasses.replace(pod, slices=pod.slices // 2)
            continue
        # Where hosts are connected by a network those go first, in a torus the longest side.
        axis = 0 if not pod.torus and pod.shape[0] > 1 else pod.shape.index(max(pod.shape))
        if pod.shape[axis] == 1:
            return
        shape = (*pod.shape[:axis], pod.shape[axis] // 2, *pod.shape[axis + 1 :])
        pod = dataclasses.replace(pod, shape=shape)


def _lines(
    ax: Any, points: Iterator[tuple[int, Plan]], style: dict[str, Any], found: Plan, here: int
) -> None:
    times: dict[str, list[tuple[int, float]]] = {}
    for x, each in points:
        for option in (each, *each.alternatives):
            if option.fits and option.strategy in style:
                times.setdefault(option.strategy, []).append((x, option.predicted_s))
    for name, (colour, marker) in style.items():
        if name not in times:
            continue
        xs, ys = zip(*sorted(times[name]), strict=True)
        wide = name == found.strategy
        ax.plot(
            xs,
            ys,
            label=f"{name} (taken)" if wide and found.fits else name,
            color=colour,
            marker=marker,
            linewidth=3 if wide else 1.5,
            markersize=7 if wide else 5,
            zorder=3 if wide else 2,
        )
    ax.axvline(here, color="#bbbbbb", linewidth=1, linestyle="--", zorder=1)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    ax.grid(color="#e5e5e5", linewidth=0.6)
    ax.spines[["top", "right"]].set_visible(False)


def _rounds(strategy: str, size: int, *, fastest: bool) -> list[tuple[str, list[tuple[int, int]]]]:
    """What each round along an axis is called, and who sends to whom in it."""
    heads, _, outside = strategy.partition("_")
    if heads == "ulysses" and outside and not fastest:
        strategy = outside
    if strategy in STATES:
        schedule = butterfly(size)
        return [(f"round {k + 1}", list(pairs)) for k, pairs in enumerate(schedule.rounds)]
    neighbours = [(rank, (rank + 1) % size) for rank in range(size)]
    if strategy == "ring":
        return [(f"{size - 1} hops, all alike", neighbours)]
    if heads == "ulysses" and strategy.startswith(heads):
        everyone = [(a, b) for a in range(size) for b in range(size) if a != b]
        return [("all to all", everyone)]
    return [(f"XLA's own {strategy}: along a ring", neighbours)]


def _exchange(figure: Any, found: Plan, axes: dict[str, int], rounds: int) -> None:
    """A row for each axis of the mesh, the fastest first, with a circle of its devices for each round."""
    panels = figure.subplots(len(axes), rounds, squeeze=False)
    figure.suptitle(
        f"{found.strategy} on {found.topology}: who sends to whom, along each axis; a step takes "
        f"{seconds_text(found.predicted_s)}",
        fontsize=11,
    )
    fastest = next(reversed(axes))
    for row, (name, size) in zip(panels, reversed(axes.items()), strict=True):
        drawn = _rounds(found.strategy, size, fastest=name == fastest)
        for k, ax in enumerate(row):
            ax.set_axis_off()
            if k < len(drawn):
                title, pairs = drawn[k]
                _circle(ax, size, pairs, COLOURS[k % 8])
                ax.set_title(f"{name}={size}, {title}", fontsize=9)


def _circle(ax: Any, size: int, pairs: list[tuple[int, int]], colour: str) -> None:
    shown = min(size, MOST_DRAWN)
    points = [
        (math.sin(2 * math.pi * k / shown), math.cos(2 * math.pi * k / shown)) for k in range(shown)
    ]
    for source, target in pairs:
        if source < shown and target < shown:
            (x0, y0), (x1, y1) = points[source], points[target]
            ax.annotate(
                "",
                (x1, y1),
                (x0, y0),
                arrowprops={
                    "arrowstyle": "->",
                    "color": colour,
                    "lw": 0.8,
                    "shrinkA": 2,
                    "shrinkB": 2,
                },
            )
    ax.plot(*zip(*points, strict=True), "o", color="#333333", markersize=3)
    if shown < size:
        ax.text(0, -1.35, f"the first {shown} of {size}", ha="center", fontsize=7)
    ax.set_aspect("equal")
    ax.set_xlim(-1.25, 1.25)
    ax.set_ylim(-1.45, 1.25)
