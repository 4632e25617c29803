"""Plot a model's accuracy over epsilon, from what `python -m benchmarks.dp --json` has printed.

    python -m benchmarks.dp --data DIR --json > dp.json
    python examples/privacy_plot.py dp.json privacy.png

Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

COLOURS = {"central": "tab:blue", "distributed": "tab:orange"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path, help="the benchmark's output; its last line is read")
    parser.add_argument("image", type=Path, help="the file to write, in the format that its ending says")
    given = parser.parse_args()
    found: dict[str, Any] = json.loads(given.json.read_text().splitlines()[-1])

    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for mode, colour in COLOURS.items():
        mine = [one for one in found["results"] if one["mode"] == mode and one["epsilon"] is not None]
        mine.sort(key=lambda one: one["epsilon"])
        axes.plot(
            [one["epsilon"] for one in mine],
            [one["accuracy"] for one in mine],
            "o-",
            color=colour,
            label=f"{mode} noise, mean over the seeds",
        )
        for one in mine:
            axes.plot(
                [one["epsilon"]] * len(one["accuracy_by_seed"]), one["accuracy_by_seed"], ".", color=colour, alpha=0.4
            )
    exact = next(one for one in found["results"] if one["epsilon"] is None)
    axes.axhline(exact["accuracy"], color="grey", linestyle="--", label="clipped, no noise (band: its seeds)")
    axes.axhspan(min(exact["accuracy_by_seed"]), max(exact["accuracy_by_seed"]), color="grey", alpha=0.15)
    axes.set_xscale("log")
    ticks = sorted({one["epsilon"] for one in found["results"] if one["epsilon"] is not None})
    axes.set_xticks(ticks, [f"{one:g}" for one in ticks])
    axes.minorticks_off()
    axes.set_xlabel(f"epsilon after {found['rounds']} rounds, delta {found['delta']:g} (the less, the more private)")
    axes.set_ylabel("characters foretold right")
    axes.set_title(f"{found['cohort']} of {found['population']:,} clients a round, {found['params']:,} parameters")
    axes.legend()
    figure.savefig(given.image, dpi=150)


if __name__ == "__main__":
    main()
