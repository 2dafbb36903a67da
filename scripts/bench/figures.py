"""Draw the figures of the README and the site from the results in scripts/bench/results.

    python scripts/bench/figures.py

It measures nothing, and needs only matplotlib. The numbers come from `scripts/bench/cluster --repeats 9
--json FILE` and `python scripts/bench/pods.py scaling --json FILE`.
"""

import json
from pathlib import Path

import cluster_report
import pods_figure

RESULTS = Path(__file__).parent / "results"


def draw(folder: Path) -> list[Path]:
    """Write all figures to the folder."""
    cluster = cluster_report.load(RESULTS / "cluster.json")
    pods = json.loads((RESULTS / "pods.json").read_text(encoding="utf-8"))
    drawn = []
    for name, plot, saved in (
        ("headline.svg", cluster_report.headline, cluster),
        ("cluster.svg", cluster_report.plot, cluster),
        ("pods.svg", pods_figure.plot, pods),
    ):
        plot(saved, folder / name)
        drawn.append(folder / name)
    return drawn


if __name__ == "__main__":
    print(*draw(RESULTS), sep="\n")
