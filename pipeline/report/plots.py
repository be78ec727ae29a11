"""The report's plots, as PNG data URLs: a training stage's losses over its steps, and the sweeps' curves."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pipeline.report.overlay import UNSEEN
from pipeline.report.pictures import data_url
from pipeline.scoring.records import SweepPoint

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, DIM, GRID = "#1f2933", "#616e7c", "#e4e7eb"
# of the figure's width: room for numbers such as 0.0002, wider ones have more; and pixels between them and the axis
LEFT, AIR = 0.13, 16
UNDRAWN = ("step", "lr", "norm", "seconds", "waiting")
LINES = "#2f7ed8", "#d9720b", "#3f9b4f", "#8e6bbf", "#a8801a", "#128a8a", "#9c6b4e", "#5f6f81"  # dark enough for text


def loss_plot(rows: Sequence[Mapping[str, float]]) -> str:
    """One stage's losses over the steps, a smooth line over the faint raw one, each named at its end.

    `rows` hold `step`, `total` and the stage's other losses by name; those of `UNDRAWN` are left out.
    """
    losses = sorted(
        {name for row in rows for name in row if name not in UNDRAWN}, key=lambda name: (name != "total", name)
    )
    from matplotlib.ticker import LogLocator, NullFormatter

    figure, axes = _figure("step", width=0.57)
    ends, lowest, highest = [], np.inf, -np.inf
    for number, name in enumerate(losses):
        steps, values = np.array([(row["step"], row[name]) for row in rows if name in row], float).T
        window = np.ones(max(1, len(values) // 40))
        smooth = np.convolve(values, window, "same") / np.convolve(np.ones_like(values), window, "same")
        colour = INK if name == "total" else LINES[(number - 1) % len(LINES)]
        axes.plot(steps, values, color=colour, alpha=0.18, linewidth=0.7)
        axes.plot(steps, smooth, color=colour, linewidth=2 if name == "total" else 1.3)
        ends.append((float(smooth[-1]), f"{name.replace('_', ' ')}  {smooth[-1]:.3g}", colour, name == "total"))
        lowest, highest = min(lowest, float(smooth.min())), max(highest, float(smooth.max()))
    if lowest > 0 and highest > 30 * lowest:
        axes.set_yscale("log")
        # neighbouring powers of ten name only themselves; a shorter axis needs numbers between them
        between = (1.0,) if highest > 1000 * lowest else (1.0, 3.0) if highest > 100 * lowest else (1.0, 2.0, 5.0)
        axes.yaxis.set_major_locator(LogLocator(subs=between))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlim(left=0)
    axes.margins(x=0.01)
    return _finish(figure, axes, ends)


def sweep_plot(points: Sequence[SweepPoint], *, name: str, headline: float, top: float) -> str:
    """sPQ, uPQ and hPQ over a setting, with a line where the headline's setting is.

    Args:
        points: in ascending order of `value`.
        name: of the setting.
        headline: its value in the headline.
        top: where the vertical axis ends, so that plots side by side compare.
    """
    figure, axes = _figure(name, width=0.77)
    axes.axvline(headline, color=DIM, linewidth=1, linestyle=(0, (2, 2)))
    axes.text(headline, 1, " headline", transform=axes.get_xaxis_transform(), color=DIM, fontsize=8, va="top")
    ends = []
    values = [point.value for point in points]
    for key, colour in (("sPQ", LINES[0]), ("uPQ", UNSEEN), ("hPQ", INK)):
        heights = [getattr(point, key) for point in points]
        axes.plot(values, heights, color=colour, linewidth=2 if key == "hPQ" else 1.3, marker="o", markersize=3)
        ends.append((heights[-1], key, colour, key == "hPQ"))
    axes.set_ylim(0, top)
    axes.set_xlim(min(values) - 0.02, max(values) + 0.02)
    return _finish(figure, axes, ends)


def _figure(below: str, *, width: float) -> tuple[Figure, Axes]:
    """An empty plot; `width` of the picture is the axes', the rest on the right is for the lines' names."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.3, 2.8), dpi=200)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((LEFT, 0.15, width - (LEFT - 0.1), 0.82))
    axes.patch.set_visible(False)
    axes.grid(axis="y", color=GRID, linewidth=0.7)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color("#9aa5b1")
    axes.tick_params(colors=DIM, labelsize=8.5, length=0, which="both")
    axes.set_xlabel(below, fontsize=8.5, color=DIM, labelpad=1)
    return figure, axes


def _finish(figure: Figure, axes: Axes, ends: Sequence[tuple[float, str, str, bool]]) -> str:
    """Writes (height, text, colour, bold) at the right end of every line, and renders."""
    from matplotlib.ticker import FuncFormatter

    # plain numbers, and no power of ten above the axis
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    figure.draw_without_rendering()
    widest = max((label.get_window_extent().width for label in axes.get_yticklabels()), default=0.0)
    box, left = axes.get_position(), max(LEFT, (widest + AIR) / figure.bbox.width)
    axes.set_position((left, box.y0, box.x1 - left, box.height))
    place = axes.transData + axes.transAxes.inverted()
    end = axes.get_xlim()[1]
    heights = spread([float(place.transform((end, value))[1]) for value, *_ in ends], gap=0.085)
    for (_, text, colour, bold), height in zip(ends, heights, strict=True):
        weight = "bold" if bold else "normal"
        axes.text(1.03, height, text, transform=axes.transAxes, color=colour, fontsize=8.5, va="center", weight=weight)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", facecolor="none")  # the page's own, light or dark
    return data_url(buffer.getvalue(), "png")


def spread(heights: Sequence[float], *, gap: float) -> list[float]:
    """The heights, moved apart so that neighbours are at least `gap` from each other, and none above 1."""
    order = np.argsort(heights)
    moved = np.asarray(heights, float)[order]
    for i in range(1, len(moved)):
        moved[i] = max(moved[i], moved[i - 1] + gap)
    moved[-1] = min(moved[-1], 1)
    for i in reversed(range(len(moved) - 1)):
        moved[i] = min(moved[i], moved[i + 1] - gap)
    result = np.empty_like(moved)
    result[order] = moved
    return result.tolist()
