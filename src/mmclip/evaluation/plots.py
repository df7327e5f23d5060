"""Plots of a run: ROC curves, score distributions, AUROC with intervals, images; for PNG and page.

Figures are made without pyplot, so that nothing global changes and no display is needed.
"""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from jaxtyping import Float, UInt8
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from sklearn.calibration import calibration_curve
from sklearn.metrics import roc_curve

from mmclip.evaluation.intervals import Interval
from mmclip.evaluation.metrics import known

# On the page these become the theme's colours, so that the plots read in dark mode too.
INK, QUIET, PRESENT, ABSENT, ACCENT = "#1d2733", "#667180", "#b65708", "#5478a0", "#0f766e"
_THEME = {
    INK: "var(--ink)",
    QUIET: "var(--quiet)",
    PRESENT: "var(--present)",
    ABSENT: "var(--absent)",
    ACCENT: "var(--accent)",
}
_STYLE: dict[Any, Any] = {"font.size": 8, "svg.fonttype": "none", "text.color": INK}
_DASHED = (0, (3, 3))


class Entry(NamedTuple):
    """One line of the AUROC plot; a value of None is shown as undefined."""

    name: str
    auroc: float | None
    interval: Interval | None
    colour: str = INK


class Panel(NamedTuple):
    """One finding of the curves plot, with a positive and a negative image at least."""

    title: str
    labels: Float[np.ndarray, " n"]  # 1, 0 or NaN
    scores: Float[np.ndarray, " n"]


def roc_points(
    labels: Float[np.ndarray, " n"], scores: Float[np.ndarray, " n"], most: int = 200
) -> tuple[Float[np.ndarray, " p"], Float[np.ndarray, " p"]] | None:
    """False and true positive rates of the ROC curve, thinned to at most `most` points.

    Returns:
        Both rates, from (0, 0) to (1, 1); None when a class is missing.
    """
    pair = known(labels, scores)
    if pair is None:
        return None
    fpr, tpr, _ = roc_curve(*pair)
    keep = np.unique(np.linspace(0, len(fpr) - 1, min(most, len(fpr))).round().astype(int))
    return fpr[keep], tpr[keep]


def auroc_figure(entries: Sequence[Entry], low: float) -> Figure:
    """AUROC with intervals, a line an entry, on an axis from `low` to 1."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(6.4, 0.8 + 0.26 * len(entries)), layout="constrained")
        axes = figure.subplots()
        _plain_axes(axes)
        axes.axvline(0.5, color=QUIET, linewidth=0.7, linestyle=_DASHED)
        for y, entry in enumerate(entries):
            if entry.interval is not None:
                axes.plot(entry.interval, (y, y), color=entry.colour, linewidth=1.4, alpha=0.6)
            if entry.auroc is not None:
                axes.plot(entry.auroc, y, "o", color=entry.colour, markersize=5, clip_on=False)
        names = [e.name + (" (undefined)" if e.auroc is None else "") for e in entries]
        axes.set_yticks(range(len(entries)), names, color=INK, fontsize=8)
        axes.set(xlim=(low, 1), ylim=(len(entries) - 0.5, -0.5))
        axes.set_xlabel("AUROC, 95 % interval over resampled patients; dashed: chance", fontsize=7)
    return figure


def curves_figure(panels: Sequence[Panel], columns: int = 3) -> Figure:
    """A panel a finding, with its title and one legend for all."""
    columns = min(columns, len(panels))
    lines = -(-len(panels) // columns)
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(3.6 * columns, 2.0 * lines + 0.3))
        for i, panel in enumerate(panels):
            corner = (3.6 * (i % columns), 2.0 * (lines - 1 - i // columns))
            left = _draw_panel(figure, panel, corner, side_in=1.35)
            left.set_title(panel.title, loc="left", fontsize=9)
        keys = [Patch(color=PRESENT, label="images with"), Patch(color=ABSENT, label="without")]
        figure.legend(handles=keys, loc="upper right", ncols=2, frameon=False, handlelength=1)
    return figure


def pictures_figure(
    images: Sequence[tuple[UInt8[np.ndarray, "h w"], Mapping[str, UInt8[np.ndarray, "..."]]]],
) -> Figure:
    """One line per image: the image, then what stands beside it, a column for each name.

    Args:
        images: Each image, and images [h w] or [h w 3] by what they show.
    """
    names = list(dict.fromkeys(name for _, panels in images for name in panels))
    with mpl.rc_context(_STYLE):
        size = (1.5 * (1 + len(names)), 1.5 * len(images) + 0.3)
        engine = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
        figure = Figure(figsize=size, layout=engine)
        all_axes = figure.subplots(len(images), 1 + len(names), squeeze=False)
        for line, (image, panels) in zip(all_axes, images, strict=True):
            shown = {"image": image, **panels}
            for axes, name in zip(line, ("image", *names), strict=True):
                axes.set_axis_off()
                if name in shown:
                    axes.imshow(shown[name], cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        for axes, name in zip(all_axes[0], ("image", *names), strict=True):
            axes.set_title(name, fontsize=9)
    return figure


def curve_svg(panel: Panel) -> str:
    """One finding for the page: an SVG element in theme colours and the page's font."""
    style: dict[Any, Any] = {**_STYLE, "svg.hashsalt": panel.title}  # salts the ids
    with mpl.rc_context(style):
        figure = Figure(figsize=(3.3, 1.6))
        _draw_panel(figure, panel, (0.0, 0.0), side_in=1.17)
        return _svg(figure)


RELIABILITY_BINS = 10
"""Of equal numbers of scores. [chosen: so that no point is of a few images]"""


def reliability_svg(
    labels: Float[np.ndarray, "n k"], scores: Float[np.ndarray, "n k"]
) -> str | None:
    """What is said against what is found, over all known labels of all findings, for the page.

    None where scores are no probabilities, or no label is known.
    """
    is_known = ~np.isnan(labels)
    truth, said = labels[is_known], scores[is_known]
    if not len(truth) or said.min() < 0 or said.max() > 1:
        return None
    found, mean = calibration_curve(truth, said, n_bins=RELIABILITY_BINS, strategy="quantile")
    with mpl.rc_context({**_STYLE, "svg.hashsalt": "reliability"}):
        figure = Figure(figsize=(2.6, 2.4), layout="constrained")
        axes = figure.subplots()
        _plain_axes(axes)
        axes.plot([0, 1], [0, 1], color=QUIET, linewidth=0.7, linestyle=_DASHED)
        axes.plot(
            mean, found, color=ACCENT, linewidth=1.4, marker="o", markersize=3.5, clip_on=False
        )
        axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
        axes.set_xticks((0, 0.5, 1), ("0", "0.5", "1"))
        axes.set_yticks((0, 0.5, 1), ("0", "0.5", "1"))
        axes.set_xlabel("probability said", fontsize=7, labelpad=2)
        axes.set_ylabel("share found", fontsize=7, labelpad=2)
        return _svg(figure)


def _svg(figure: Figure) -> str:
    """A figure as an SVG element that can stand in a page with others."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", "inherit", svg)
    svg = re.sub(r'^(<svg[^>]*?) width="[^"]*"', r"\1", svg)
    svg = re.sub(r'^(<svg[^>]*?) height="[^"]*"', r"\1", svg)
    # matplotlib numbers its groups anew in every figure; ids must be unique on the page.
    used = set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg))
    svg = re.sub(r' id="([^"]*)"', lambda found: found[0] if found[1] in used else "", svg)
    for colour, variable in _THEME.items():
        svg = svg.replace(colour, variable)
    return svg


def _plain_axes(axes: Axes) -> None:
    axes.set_facecolor("none")
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set(color=QUIET, linewidth=0.6)
    axes.tick_params(colors=QUIET, labelsize=7, width=0.6, length=2.5)
    axes.xaxis.label.set_color(QUIET)
    axes.yaxis.label.set_color(QUIET)


def _draw_panel(
    figure: Figure, panel: Panel, corner_in: tuple[float, float], side_in: float
) -> Axes:
    """ROC curve and score distributions, in squares side by side; returns the axes of the curve.

    Their places are given: the words around them are the same for every finding, and to search for
    a layout takes longer than to draw.

    Args:
        figure: It has them.
        panel: The finding.
        corner_in: Lower left corner of both with their words, in inches.
        side_in: Side of a square, in inches.
    """
    width_in, height_in = figure.get_size_inches()
    left, right = (
        figure.add_axes(
            (
                (corner_in[0] + x_in) / width_in, (corner_in[1] + 0.35) / height_in,
                side_in / width_in, side_in / height_in,
            )
        )
        for x_in in (0.44, 0.76 + side_in)
    )  # fmt: skip
    _draw_roc(left, panel)
    _draw_scores(right, panel)
    return left


def _draw_roc(axes: Axes, panel: Panel) -> None:
    _plain_axes(axes)
    axes.plot([0, 1], [0, 1], color=QUIET, linewidth=0.7, linestyle=_DASHED)
    points = roc_points(panel.labels, panel.scores)
    if points is None:
        raise ValueError(
            f"{panel.title} lacks images with or without it: there is no curve to draw"
        )
    axes.fill_between(*points, color=ACCENT, alpha=0.10, linewidth=0)
    axes.plot(*points, color=ACCENT, linewidth=1.5, solid_joinstyle="round", clip_on=False)
    axes.set(xlim=(0, 1), ylim=(0, 1), aspect="equal")
    axes.set_xticks((0, 0.5, 1), ("0", "0.5", "1"))
    axes.set_yticks((0, 0.5, 1), ("0", "0.5", "1"))
    axes.set_xlabel("false positive rate", fontsize=7, labelpad=2)
    axes.set_ylabel("true positive rate", fontsize=7, labelpad=2)


def _draw_scores(axes: Axes, panel: Panel) -> None:
    _plain_axes(axes)
    scores = panel.scores[~np.isnan(panel.labels)]
    low, high = float(scores.min()), float(scores.max())
    if high - low < 1e-9:  # all equal
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, 17)
    for value, colour in ((0, ABSENT), (1, PRESENT)):
        chosen = panel.scores[panel.labels == value]
        share = np.histogram(chosen, edges)[0] / len(chosen)
        axes.stairs(share, edges, fill=True, color=colour, alpha=0.28, linewidth=0)
        axes.stairs(share, edges, color=colour, linewidth=1.2)
    axes.spines["left"].set_visible(False)
    axes.set(yticks=(), xlim=(low, high))
    axes.set_ylim(bottom=0)
    axes.locator_params(axis="x", nbins=4)
    axes.set_xlabel("score", fontsize=7, labelpad=2)
    axes.set_ylabel("share of images", fontsize=7, labelpad=2)
