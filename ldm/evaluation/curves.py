"""The curves of a run, from its metrics.jsonl: one panel a metric, over steps."""

import json
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ldm.errors import UserError

COLUMNS = 3
SMOOTHED_OVER = 20
"""Values on each side of the running mean that is drawn over noisy curves."""


def read_metrics(run: Path) -> dict[str, tuple[list[float], list[float]]]:
    """Metric to its steps and values, numbers or lists of them, in the order in which metrics first appear; torn lines
    and what is neither are passed over.

    Raises:
        UserError: no metrics there.
    """
    path = run / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{path}: no such file; name the output_dir of a run")
    metrics: dict[str, tuple[list[float], list[float]]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if not isinstance(row, dict) or not isinstance(step := row.pop("step", None), int | float):
            continue
        for name, value in row.items():
            steps, values = metrics.get(name, ([], []))
            is_list = isinstance(value, list) and value and all(isinstance(part, int | float) for part in value)
            if not is_list and not isinstance(value, int | float):
                continue
            if values and isinstance(values[0], list) != is_list:
                continue
            metrics[name] = (steps, values)
            steps.append(step)
            values.append(value)
    if not metrics:
        raise UserError(f"{path}: holds no metrics yet")
    return metrics


def running_mean(values: list[float], reach: int) -> list[float]:
    """The mean of each value and up to `reach` on either side."""
    return [sum(part) / len(part) for part in (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))]


def curve_over_curve(axes: Axes, name: str, steps: list[float], lists: list[list[float]]) -> None:
    """A metric that is a list at each step: one line a step, from light to dark, over its places from 0 to 1."""
    for number, (step, values) in enumerate(zip(steps, lists, strict=True)):
        x = [(place + 0.5) / len(values) for place in range(len(values))]
        shade = (number + 1) / len(lists)
        label = f"step {step:,.0f}" if number in (0, len(lists) - 1) else None
        axes.plot(x, values, color="C0", alpha=shade, linewidth=1, label=label)
    axes.set_title(f"{name} (over t / T)", fontsize=9)
    axes.legend(fontsize=7)


def curves(run: Path) -> Figure:
    """All metrics of a run; those of many values with a running mean, those of one as a point."""
    metrics = read_metrics(run)
    rows = -(-len(metrics) // COLUMNS)
    figure = Figure((4.2 * COLUMNS, 2.8 * rows), layout="constrained")
    panels = figure.subplots(rows, COLUMNS, squeeze=False).flat
    for (name, (steps, values)), axes in zip(metrics.items(), panels, strict=False):
        axes.grid(alpha=0.3)
        if isinstance(values[0], list):
            curve_over_curve(axes, name, steps, values)
            continue
        many = len(values) > 4 * SMOOTHED_OVER
        axes.plot(steps, values, "." if len(values) == 1 else "-", color="C0", alpha=0.35 if many else 1, linewidth=1)
        if many:
            axes.plot(steps, running_mean(values, SMOOTHED_OVER), color="C0")
        axes.set_title(name, fontsize=9)
    for axes in panels:  # those that are left
        axes.set_visible(False)
    figure.suptitle(str(run))
    return figure
