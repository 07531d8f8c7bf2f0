"""WORKDIR/report.png: loss, learning rate, gradient norm and tokens/s of a run, drawn from its files."""

from typing import Any

import numpy as np
from etils import epath

from train.metrics import EVALS, METRICS, read_lines

POINTS = 2000  # of a curve: more are averaged
SMOOTHED = 50  # steps of the running mean beside the loss
PANELS = (
    ("loss", "loss (nats per token)"),
    ("learning_rate", "learning rate"),
    ("grad_norm", "gradient norm, before clipping"),
    ("tokens_per_second", "tokens/s"),
)


def draw_report(workdir: epath.Path) -> None:
    """Draws report.png anew; needs at least one line in metrics.jsonl."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines, evals = read_lines(workdir / METRICS), read_lines(workdir / EVALS)
    if not lines:
        return
    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, label) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        steps, values = _curve(lines, name)
        axes.plot(*_thinned(steps, values), linewidth=0.8, color="tab:blue", alpha=0.6 if name == "loss" else 1.0)
        if name == "loss":
            _draw_losses(axes, steps, values, evals)
        axes.set(xlabel="step", title=label)
        axes.grid(alpha=0.3)
    figure.suptitle(f"{workdir.name}: {lines[-1]['step']:,} steps")
    beside = workdir / "report.new.png"
    with beside.open("wb") as file:
        figure.savefig(file, format="png", dpi=110)
    beside.replace(workdir / "report.png")


def _draw_losses(axes: Any, steps: np.ndarray, values: np.ndarray, evals: list[dict[str, Any]]) -> None:
    if len(values) > SMOOTHED:
        mean = np.convolve(values, np.ones(SMOOTHED) / SMOOTHED, mode="valid")
        axes.plot(*_thinned(steps[SMOOTHED - 1 :], mean), color="tab:blue", label=f"mean of {SMOOTHED} steps")
    names = sorted({key for line in evals for key in line if key.endswith("/loss")})
    for i, name in enumerate(names, 1):
        axes.plot(*_curve(evals, name), marker=".", color=f"C{i}", label=name)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=8)


def _curve(lines: list[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    pairs = [(line["step"], line[name]) for line in lines if line.get(name) is not None]
    return np.array([step for step, _ in pairs]), np.array([value for _, value in pairs], float)


def _thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most POINTS points, each the mean of as many neighbours."""
    group = -(-len(steps) // POINTS)
    if group <= 1:
        return steps, values
    whole = len(steps) // group * group
    return steps[:whole].reshape(-1, group)[:, -1], values[:whole].reshape(-1, group).mean(axis=1)
