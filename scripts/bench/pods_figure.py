"""The figure of `scripts/bench/pods.py scaling`: rounds, bytes and predicted time from 1 device to 4096."""

from pathlib import Path

import drawing

CONTENDERS = {  # name: (in the figure, colour, marker, style of the line)
    "ring": ("ring: keys and values travel", drawing.PINK, "P", "-"),
    "xla": ("jax.nn, partitioned by XLA", drawing.RED, "X", "-"),
    "psum": ("distattn, psum: pmax, one packed psum", drawing.BLUE, "v", "-"),
    "published": ("published recipe: three all-reduces", drawing.ORANGE, "D", ":"),
    "butterfly": ("distattn, butterfly", drawing.GREEN, "s", "-"),
}
PANELS = {  # field: (factor, label)
    "rounds": (1, "collectives, one after another"),
    "bytes": (1 / 2**10, "results of collectives (KiB a device)"),
    "temp_bytes": (1 / 2**20, "temporary memory (MiB a device)"),
    "predicted_s": (1e6, "predicted time of a layer (µs)"),
}


def plot(found: dict, path: Path) -> None:
    """Draw a panel for each figure, against the number of chips."""
    plt = drawing.start("pods")
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), sharex=True, layout="constrained")
    chips = {row["devices"] for row in found["rows"]}
    for ax, (field, (factor, label)) in zip(axes.flat, PANELS.items(), strict=True):
        for name, (text, colour, marker, style) in CONTENDERS.items():
            rows = [row for row in found["rows"] if row["contender"] == name and row[field]]
            ax.plot(
                [row["devices"] for row in rows],
                [row[field] * factor for row in rows],
                style,
                label=text,
                color=colour,
                marker=marker,
                **drawing.weight(ours=name == "butterfly"),
            )
        ax.set_yscale("log")
        ax.set_ylabel(label)
        drawing.plain(ax.yaxis)
        drawing.powers_of_two(ax, sorted(chips)[::2])
    for ax in axes[-1]:
        ax.set_xlabel("v5p chips, 8192 keys each")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3)
    drawing.save(figure, path)
