"""A run's finished rounds as rows for a spreadsheet or a program, and as a picture."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from seqfed.client.shown import traffic_dict
from seqfed.common.checkpoint import replacing
from seqfed.common.errors import ConfigError, storage_error
from seqfed.common.metrics import metric_names
from seqfed.common.views import RoundRecord, RunView

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PICTURES: Final = (".png", ".svg", ".pdf")
WIDTH: Final = 3  # panels beside each other


def rows(view: RunView) -> list[dict[str, Any]]:
    """One a round, all with the same keys: those of `columns`; None where a round has no such figure.

    traffic: client -> bytes_up, bytes_down.
    """
    metrics = metric_names(view.spec)
    return [
        {
            "round": record.round,
            **{name: value for metric in metrics for name, value in _figures(record, metric).items()},
            "evaluated_examples": record.evaluated_examples,
            "evaluated_clients": record.evaluated_clients,
            "bytes_up": record.bytes_up,
            "bytes_down": record.bytes_down,
            "traffic": traffic_dict(record),
            "seconds": round(record.seconds, 4),
        }
        for record in view.history
    ]


def columns(view: RunView) -> list[str]:
    """The keys of `rows`: each metric over all examples, then its median and worst decile over the clients."""
    return list(rows(_one_round(view))[0])


def as_csv(view: RunView) -> str:
    """A header and a line a round; an empty cell where there is no figure, and JSON in that of `traffic`."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns(view), lineterminator="\n")
    writer.writeheader()
    writer.writerows({**row, "traffic": json.dumps(row["traffic"])} for row in rows(view))
    return text.getvalue()


def as_json(view: RunView) -> str:
    """A list of one object a round; null where there is no figure."""
    return json.dumps(rows(view), indent=1) + "\n"


def save(path: Path, text: str) -> None:
    """Write it, whole or not at all; raises StorageError or StorageFull."""
    with replacing(path) as file:
        file.write(text.encode())


def require_plots(path: Path) -> None:
    """Raise ConfigError unless a picture of this name can be drawn, before anything else is done."""
    if path.suffix.lower() not in PICTURES:
        raise ConfigError(f"--plot {path}: a picture's name ends in {', '.join(PICTURES)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError("--plot needs matplotlib: pip install 'seqfed[plot]'") from None


def draw(view: RunView, path: Path, beside: Mapping[str, tuple[float, Sequence[float]]] | None = None) -> None:
    """A panel a metric over the rounds: over all examples, the clients' median, and what only the worst tenth is beyond.

    beside: of a metric, what the same model reaches on the pooled data and on each client's alone, to compare with.

    Raises ConfigError as `require_plots` does or if no round was evaluated, StorageError or StorageFull.
    """
    require_plots(path)
    evaluated = [record for record in view.history if record.evaluation]
    metrics = [one for one in metric_names(view.spec) if any(one in record.evaluation for record in evaluated)]
    if not metrics:
        raise ConfigError(f"--plot {path}: no round of run {view.run} has been evaluated yet; there is nothing to draw")

    from matplotlib.figure import Figure

    across, down = min(len(metrics), WIDTH), -(-len(metrics) // WIDTH)
    figure = Figure(figsize=(4 * across, 3 * down), layout="constrained")  # inches
    panels = figure.subplots(down, across, squeeze=False)
    for place, axes in enumerate(panels.flat):
        if place < len(metrics):
            _panel(axes, evaluated, metrics[place])
            if beside and metrics[place] in beside:
                pooled, alone = beside[metrics[place]]
                axes.axhline(pooled, linestyle="--", color="black", label="pooled data")
                axes.axhspan(min(alone), max(alone), color="tab:gray", alpha=0.2, label="each client alone")
                axes.legend(fontsize="small")
        else:
            axes.set_axis_off()
    panels.flat[0].legend(fontsize="small")
    figure.suptitle(f"{view.name} ({view.run})", parse_math=False)
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise storage_error(error, "writing the picture") from error


def _panel(axes: Axes, evaluated: list[RoundRecord], metric: str) -> None:
    rounds = [record.round for record in evaluated]
    found = [_figures(record, metric) for record in evaluated]
    for suffix, label, style in (
        ("", "all examples", {"color": "tab:blue"}),
        ("_median", "median of the clients", {"color": "tab:green", "linestyle": "--"}),
        ("_worst_decile", "worst decile of the clients", {"color": "tab:red", "linestyle": ":"}),
    ):
        values = [one[metric + suffix] for one in found]
        drawn = [math.nan if one is None else one for one in values]
        axes.plot(rounds, drawn, label=label, marker="." if len(rounds) < 20 else "", **style)  # type: ignore[arg-type]
    axes.set_xlabel("round")
    axes.set_ylabel(metric.replace("_", " "))
    axes.grid(alpha=0.3)


def _figures(record: RoundRecord, metric: str) -> dict[str, float | None]:
    median, worst = record.spread.get(metric, (None, None))
    return {metric: record.evaluation.get(metric), f"{metric}_median": median, f"{metric}_worst_decile": worst}


def _one_round(view: RunView) -> RunView:
    return RunView(**{**vars(view), "history": (RoundRecord(0, 0, (), ()),)})
