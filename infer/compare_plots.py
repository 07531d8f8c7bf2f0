"""The two plots of infer.compare's page, as SVG whose colours are the page's."""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np

COLOURS = {"#000101": "var(--text)", "#000202": "var(--quiet)", "#000303": "var(--line)"}
TEXT, QUIET, LINE = COLOURS
BINS = 100  # of positions; beyond, each point stands for several
SMALLEST_KL = 1e-12  # what a logarithmic axis has room for


def kl_by_position(kl: np.ndarray, begins: Sequence[int]) -> str:
    """KL [P] along the texts: mean and maximum of each bin; a line where a text begins, if they are few."""
    edges = np.linspace(0, len(kl), min(BINS, len(kl)) + 1).astype(int)
    middles = (edges[:-1] + edges[1:] - 1) / 2
    values = np.maximum(kl, SMALLEST_KL)
    figure, axes = _figure()
    if len(kl) > BINS:
        axes.plot(middles, np.maximum.reduceat(values, edges[:-1]), color=QUIET, linewidth=0.7, label="maximum")
    axes.plot(middles, np.add.reduceat(values, edges[:-1]) / np.diff(edges), color=TEXT, linewidth=1.2, label="mean")
    for begin in begins[1:] if len(begins) <= 20 else ():
        axes.axvline(begin, color=LINE, linewidth=0.8)
    axes.set(yscale="log", xlabel="token of the texts", ylabel="KL(a || b), nats")
    if len(kl) > BINS:
        _legend(axes)
    return _svg(figure, "KL divergence by position")


def histogram(differences: np.ndarray) -> str:
    """Of log p_b - log p_a of the texts' own tokens, nats [P]."""
    figure, axes = _figure()
    axes.hist(differences, bins=61, color=QUIET, log=True)
    axes.axvline(0, color=TEXT, linewidth=0.6)
    axes.set(xlabel="log p(b) - log p(a), nats; right of 0 b finds the token likelier", ylabel="tokens")
    return _svg(figure, "Histogram of log-likelihood differences")


def _figure() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2, 2.9), layout="constrained")
    axes = figure.add_subplot()
    axes.tick_params(colors=TEXT, which="both", labelsize=9)
    axes.xaxis.label.set_color(TEXT)
    axes.yaxis.label.set_color(TEXT)
    axes.grid(color=LINE, linewidth=0.5)
    axes.set_axisbelow(True)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(LINE)
    return figure, axes


def _legend(axes: Any) -> None:
    axes.legend(frameon=False, fontsize=9, labelcolor=TEXT, ncols=2, loc="lower left", bbox_to_anchor=(0, 1), borderpad=0)


def _svg(figure: Any, title: str) -> str:
    """The figure's <svg>, without what only a file of its own needs."""
    import matplotlib

    figure.patch.set_visible(False)
    for axes in figure.axes:
        axes.patch.set_visible(False)
    file = io.StringIO()
    settings = {"svg.fonttype": "none", "svg.hashsalt": title, "font.family": "sans-serif"}
    with matplotlib.rc_context(settings):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    for colour, name in COLOURS.items():
        svg = svg.replace(colour, name)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
