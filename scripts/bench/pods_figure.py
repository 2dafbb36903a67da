"""The figure of `scripts/bench/pods.py scaling`: rounds, bytes and predicted time from 1 device to 4096."""

from pathlib import Path

from figure_lines import draw_line, logarithmic

# Name: (in the figure, colour, marker). Okabe and Ito's colours, which the colour-blind tell apart.
CONTENDERS = {
    "ring": ("ring: keys and values travel", "#CC79A7", "P"),
    "xla": ("jax.nn, partitioned by XLA", "#D55E00", "X"),
    "published": ("published recipe: three all-reduces", "#E69F00", "D"),
    "psum": ("distattn, psum: pmax, one packed psum", "#0072B2", "v"),
    "butterfly": ("distattn, butterfly", "#009E73", "s"),
}
PANELS = {  # field: (factor, label)
    "rounds": (1, "collectives, one after another"),
    "bytes": (1 / 2**10, "results of collectives (KiB a device)"),
    "temp_bytes": (1 / 2**20, "temporary memory (MiB a device)"),
    "predicted_s": (1e6, "predicted time of a layer (us)"),
}


def plot(found: dict, path: Path) -> None:
    """A panel for each figure, against the number of chips."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams |= {"font.size": 10, "svg.fonttype": "path", "svg.hashsalt": "pods"}
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(10, 7.4), sharex=True, layout="constrained")
    for ax, (field, (factor, label)) in zip(axes.flat, PANELS.items(), strict=True):
        for name, style in CONTENDERS.items():
            rows = [row for row in found["rows"] if row["contender"] == name and row[field]]
            xs, ys = [row["devices"] for row in rows], [row[field] * factor for row in rows]
            draw_line(ax, xs, ys, style, wide=name == "butterfly")
        logarithmic(ax)
        ax.set_ylabel(label)
    for ax in axes[-1]:
        ax.set_xlabel("v5p chips, 8192 keys each")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    undated = {"Date": None} if path.suffix == ".svg" else None
    figure.savefig(path, dpi=160, metadata=undated)
    plt.close(figure)
