"""Figures of a comparison: mean score against bytes, every task, and the loss of each layer. No pyplot, no state.

Colours are those of Okabe and Ito, distinct with any colour vision, and marker shapes say the same again; labels stand
beside what they name. A figure is 12.8 inches wide: at 100 dots per inch it fills 1280 pixels.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import FuncNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from msmoe.analysis.comparison_points import (
    SAME_BYTES,
    Point,
    pareto_front,
    points,
    references,
    spread,
    standing,
    value_range,
)

from msmoe.comparison.summary import FULL, Row, Score, Summary, Task, count, megabytes

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">", "h", "p")
GREY, DARK, EMPTY, PALE = "#8C8C8C", "#333333", "#DDDDDD", "#F3F3F3"

WIDTH = 12.8  # inches
DPI = 200
LABEL_SIZE = 8  # points
LABEL_HEIGHT = 0.145  # inches from one label to the next
LETTER_WIDTH = 0.068  # inches, on average at that size
MAX_NAME = 30
MAX_COLOURED = len(MARKERS)  # methods; of more, the best six are coloured and the others grey
STYLE = {
    "font.size": 8.5,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "xtick.color": DARK,
    "ytick.color": DARK,
    "text.parse_math": False,  # a name may hold a dollar sign
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.w_pad": 0.1,  # inches: the last tick of a panel stays clear of the next one's first
    "svg.hashsalt": "msmoe",
    "savefig.dpi": DPI,
}


@dataclass(frozen=True)
class Look:
    """How a method is drawn."""

    colour: str
    marker: str
    line: str
    is_coloured: bool


def write_figures(summary: Summary, out: Path) -> list[Path]:
    """Draw every figure that there is data for, as PNG and SVG; the same summary gives the same bytes."""
    written = []
    for name, draw in FIGURES.items():
        with mpl.rc_context(STYLE):
            figure = draw(summary)
            if figure is None:
                continue
            for ending, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
                path = out / f"{name}.{ending}"
                figure.savefig(path, metadata=metadata)
                written.append(path)
    return written


def pareto(summary: Summary) -> Figure | None:
    """Mean score against stored bytes, one panel for each number of recovery steps; None without any mean."""
    panels = {steps: found for steps in summary.recover_steps if (found := points(summary, steps))}
    if not panels:
        return None
    looks = assign_looks(standing(summary))
    columns = min(len(panels), 2)
    rows = math.ceil(len(panels) / columns)
    width, height = WIDTH if columns > 1 else 0.7 * WIDTH, max(4.6, 0.17 * len(looks) + 0.6)
    figure = Figure(figsize=(width, rows * (height + 0.8) + 0.4))
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    low, high = value_range(summary, [point.score for found in panels.values() for point in found])
    for axes, steps in zip(grid.flat, panels, strict=False):
        axes.set_ylim(*((high, low) if summary.mean_metric == "loss" else (low, high)))
        draw_pareto(axes, summary, steps, panels[steps], looks, width=width / columns - 1.4, height=height)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    metric = "loss per token, lower is better" if summary.mean_metric == "loss" else "exact match"
    for axes in grid[:, 0]:
        axes.set_ylabel(f"mean over {count(len(summary.mean_tasks), 'task')}: {metric}")
    figure.legend(
        handles=[
            Line2D([], [], color=DARK, marker="o", markersize=9, markerfacecolor="none", linewidth=0.9,
                   label=f"Pareto front (bytes within {100 * SAME_BYTES:g} % count as equal)"),
            Line2D([], [], color=GREY, marker="|", markersize=11, markeredgewidth=1.2, linestyle="none",
                   label="95 % interval over examples and seeds; methods of one size stand side by side"),
        ],
        loc="outside lower center", ncols=2, frameon=False,
    )  # fmt: skip
    return figure


def draw_pareto(
    axes: Axes, summary: Summary, steps: int, found: Sequence[Point], looks: dict[str, Look], *, width: float,
    height: float,
) -> None:  # fmt: skip
    """One panel, `width` by `height` inches: names on the left, references on the right, sizes below."""
    axes.set_title(f"after {steps} steps of recovery" if steps else "without training")
    by_method: dict[str, list[Point]] = defaultdict(list)
    for point in sorted(found, key=lambda p: p.x):
        by_method[point.method].append(point)
    for method, line in by_method.items():
        draw_method(axes, line, looks[method])
    front = pareto_front(found, lower_is_better=summary.mean_metric == "loss")
    xs, ys = [point.x for point in front], [point.score.value for point in front]
    axes.plot(xs, ys, color=DARK, linewidth=0.9, drawstyle="steps-post", zorder=4, label="Pareto front")
    axes.plot(xs, ys, "o", color=DARK, markersize=10, markerfacecolor="none", markeredgewidth=0.9, zorder=6)

    axes.set_xscale("log")
    first, last = (f(np.log10([point.x for point in found])) for f in (min, max))
    margin = max(0.06 * (last - first), 0.01)
    names = [shorten(method) for method in by_method]
    strip = (LETTER_WIDTH * max(map(len, names)) + 0.45) / width
    reach = (last - first + 2 * margin) / (1 - strip)
    axes.set_xlim(10 ** (last + margin - reach), 10 ** (last + margin))
    label_sizes(axes, summary, found)

    starts = [line[0] for line in by_method.values()]
    heights = spread(fractions(axes, [point.score.value for point in starts]), LABEL_HEIGHT / height)
    for name, point, level in zip(names, starts, heights, strict=True):
        look = looks[point.method]
        axes.annotate(
            name, (point.x, point.score.value), (strip - 0.3 / width, level), textcoords="axes fraction",
            ha="right", va="center", fontsize=LABEL_SIZE, color=look.colour if look.is_coloured else DARK,
            arrowprops={"arrowstyle": "-", "color": look.colour, "linewidth": 0.5, "alpha": 0.7, "shrinkA": 2,
                        "shrinkB": 3, "relpos": (1, 0.5)},
        )  # fmt: skip
    draw_references(axes, summary, steps, start=strip - 0.2 / width, height=height)


def draw_method(axes: Axes, line: Sequence[Point], look: Look) -> None:
    """Points of a method with their intervals, and the line through them if it is coloured."""
    xs, ys = [point.x for point in line], [point.score.value for point in line]
    down = [max(point.score.value - point.score.low, 0) for point in line]
    up = [max(point.score.high - point.score.value, 0) for point in line]
    axes.errorbar(
        xs, ys, [down, up], color=look.colour, marker=look.marker, markersize=6 if look.is_coloured else 3,
        linestyle=look.line, linewidth=0.9, elinewidth=0.9, markeredgecolor="white", markeredgewidth=0.3,
        zorder=5 if look.is_coloured else 3, label=shorten(line[0].method),
    )  # fmt: skip


def draw_references(axes: Axes, summary: Summary, steps: int, *, start: float, height: float) -> None:
    """Horizontal lines with intervals, right of the names, for references; they are named on the right."""
    found = references(summary, steps)
    values = [score.value for _, score in found]
    levels = spread(fractions(axes, values), 2.2 * LABEL_HEIGHT / height)
    for (row, score), level in zip(found, levels, strict=True):
        axes.axhspan(score.low, score.high, start, color=GREY, alpha=0.12, linewidth=0)
        axes.axhline(score.value, start, color=DARK, linewidth=1, linestyle=dashes(row), label=row.method, zorder=2)
        untrained = " untrained" if steps not in row.measurements else ""
        axes.annotate(
            f"{shorten(row.method)}{untrained}\n{score.value:.3f}, {megabytes(row.num_bytes)} MB", (1.0, score.value),
            (1.012, level), xycoords=("axes fraction", "data"), textcoords="axes fraction", va="center",
            fontsize=LABEL_SIZE, color=DARK,
        )  # fmt: skip


def label_sizes(axes: Axes, summary: Summary, found: Sequence[Point]) -> None:
    """Ticks at the sizes' stored bytes, in words."""
    sizes = sorted({point.size for point in found})
    middles = [10 ** np.median([np.log10(point.x) for point in found if point.size == size]) for size in sizes]
    stored = [round(float(np.median([p.num_bytes for p in found if p.size == size]))) for size in sizes]
    texts = [f"{summary.sizes[s].experts:g} experts\n{megabytes(b)} MB" for s, b in zip(sizes, stored, strict=True)]
    axes.set_xticks(middles, texts)
    axes.minorticks_off()


def tasks(summary: Summary) -> Figure | None:
    """A panel per task: a line per method, a marker with its interval per size; None without methods."""
    methods = standing(summary)
    if not methods or not summary.tasks:
        return None
    rows = math.ceil(len(summary.tasks) / 4)
    columns = math.ceil(len(summary.tasks) / rows)
    line = max(0.17, 0.075 * len(summary.sizes))
    width = min(WIDTH, 2.0 + 4.0 * columns)
    figure = Figure(figsize=(width, rows * (line * len(methods) + 0.8) + 0.7))
    grid = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axes, task in zip(grid.flat, summary.tasks, strict=False):
        draw_task(axes, summary, task, methods)
    for axes in grid.flat[len(summary.tasks) :]:
        axes.set_axis_off()
    handles = task_legend(summary)
    lines = math.ceil(len(handles) * 1.6 / width)
    figure.legend(handles=handles, loc="outside lower center", ncols=math.ceil(len(handles) / lines), frameon=False)
    return figure


def draw_task(axes: Axes, summary: Summary, task: Task, methods: Sequence[str]) -> None:
    """One panel; better is to the right."""
    axes.set_title(shorten(task.name))
    for i in range(0, len(methods), 2):
        axes.axhspan(i - 0.5, i + 0.5, color=PALE, linewidth=0, zorder=0)
    for row, score in references(summary, summary.recover_steps[-1], task=task.name):
        if row.method == FULL:
            axes.axvspan(score.low, score.high, color=GREY, alpha=0.12, linewidth=0, zorder=1)
        axes.axvline(score.value, color=DARK, linewidth=0.9, linestyle=dashes(row), zorder=1)
    if task.majority_share is not None:
        axes.axvline(task.majority_share, color=GREY, linewidth=0.9, linestyle="-.", zorder=1)
    offsets = (np.arange(len(summary.sizes)) - (len(summary.sizes) - 1) / 2) * min(0.26, 0.8 / len(summary.sizes))
    for i, (size, offset) in enumerate(zip(summary.sizes, offsets, strict=True)):
        for row in size.methods:
            for steps, measured in row.measurements.items():
                if task.name in measured.scores:
                    place = methods.index(row.method) + offset
                    draw_score(axes, measured.scores[task.name], place, i, filled=filling(summary, steps))
    axes.set_yticks(range(len(methods)), [shorten(method) for method in methods])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(methods) - 0.5, -0.5)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("loss per token (lower to the right)" if task.lower_is_better else "exact match")
    if task.lower_is_better:
        axes.invert_xaxis()


def draw_score(axes: Axes, score: Score, place: float, size: int, *, filled: float) -> None:
    """A marker, `filled` from 0 to 1, on its interval."""
    colour, marker = COLOURS[size % len(COLOURS)], MARKERS[size % len(MARKERS)]
    axes.hlines(place, score.low, score.high, color=colour, linewidth=0.7 + 0.4 * filled, alpha=0.75, zorder=2)
    axes.plot(
        score.value, place, marker, color=colour, markersize=3.6, markerfacecolor=tint(colour, filled),
        markeredgewidth=0.8, zorder=3 + filled,
    )  # fmt: skip


def task_legend(summary: Summary) -> list[Line2D]:
    """Sizes by colour and shape, recovery by filling, references by dashes."""
    handles = [
        Line2D([], [], color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)], markersize=5,
               label=f"{size.experts:g} experts")
        for i, size in enumerate(summary.sizes)
    ]  # fmt: skip
    if len(summary.recover_steps) > 1:
        handles += [
            Line2D([], [], color=DARK, marker="o", markersize=5, linestyle="none",
                   markerfacecolor=tint(DARK, filling(summary, steps)),
                   label=f"{steps} steps of recovery" if steps else "without training")
            for steps in summary.recover_steps
        ]  # fmt: skip
    named = {row.method: row for size in summary.sizes for row in size.rows if row.is_reference}
    handles += [Line2D([], [], color=DARK, linestyle=dashes(row), label=shorten(name)) for name, row in named.items()]
    if any(task.majority_share is not None for task in summary.tasks):
        handles.append(Line2D([], [], color=GREY, linestyle="-.", label="most frequent answer"))
    return handles


def filling(summary: Summary, steps: int) -> float:
    """How full a marker is: hollow for the fewest recovery steps of several, full for the most."""
    last = len(summary.recover_steps) - 1
    return summary.recover_steps.index(steps) / last if last else 1.0


def tint(colour: str, strength: float) -> tuple[float, float, float]:
    """The colour mixed with white."""
    red, green, blue = (1 - strength * (1 - channel) for channel in to_rgb(colour))
    return red, green, blue


def layer_loss(summary: Summary) -> Figure | None:
    """Heat map of the loss added by each layer alone, methods by layers, one panel per size; None if not measured.

    Colours follow the square root of the loss, so that small ones are told apart; white is no change.
    """
    sizes = [size for size in summary.sizes if any(row.layer_loss for row in size.rows)]
    if not sizes:
        return None
    rows = [row for size in sizes for row in size.rows if row.layer_loss]
    layers = list(dict.fromkeys(layer for row in rows for layer in row.layer_loss))
    measured = {row.method: None for row in rows}
    methods = [method for method in standing(summary) if method in measured]
    methods += [method for method in measured if method not in methods]  # references
    tables = []
    for size in sizes:
        losses = {row.method: row.layer_loss for row in size.rows}
        values = [[losses.get(method, {}).get(layer, math.nan) for layer in layers] for method in methods]
        tables.append(np.ma.masked_invalid(np.array(values)))
    norm = root_norm([value for row in rows for value in row.layer_loss.values()])
    num_columns = len(sizes) if len(sizes) * len(layers) <= 24 else 1
    num_rows = math.ceil(len(sizes) / num_columns)
    cell = (WIDTH - 2.6) / num_columns / len(layers)
    labels = short_layers(layers)
    is_tight = LETTER_WIDTH * max(map(len, labels)) > 0.9 * cell
    figure = Figure(figsize=(WIDTH, num_rows * (max(0.21 * len(methods), 0.8) + 1.0) + 0.5))
    grid = figure.subplots(num_rows, num_columns, squeeze=False, sharey=True)
    for axes, size, table in zip(grid.flat, sizes, tables, strict=True):
        image = axes.imshow(table, norm=norm, cmap=mpl.colormaps["PuOr_r"].with_extremes(bad=EMPTY), aspect="auto")
        axes.set_title(size.title)
        axes.set_xticks(range(len(layers)), labels, rotation=90 if is_tight else 0)
        axes.set_yticks(range(len(methods)), [shorten(method) for method in methods])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        if cell > 0.4:
            write_values(axes, table, norm)
    bar = figure.colorbar(image, ax=grid, shrink=0.9, aspect=30, pad=0.01)
    bar.ax.set_ylim(min(0.0, *(float(t.min()) for t in tables)), max(0.0, *(float(t.max()) for t in tables)))
    bar.set_label("loss per token above the full\nmodel, only this layer compressed")
    bar.outline.set_visible(False)
    return figure


def root_norm(values: Sequence[float]) -> FuncNorm:
    """Zero in the middle, then the square root of the distance to it on either side."""
    largest = max(1e-6, *map(abs, values))
    root, square = (lambda x: np.sign(x) * np.sqrt(np.abs(x))), (lambda x: np.sign(x) * x**2)
    return FuncNorm((root, square), -largest, largest)


def write_values(axes: Axes, table: np.ma.MaskedArray, norm: FuncNorm) -> None:
    for (row, column), value in np.ma.ndenumerate(table):
        axes.text(
            column, row, f"{value:+.4f}" if abs(value) < 0.01 else f"{value:+.3f}", ha="center", va="center",
            fontsize=7, color="white" if abs(norm(value) - 0.5) > 0.33 else "black",
        )  # fmt: skip


def short_layers(names: Sequence[str]) -> list[str]:
    """Layer names without the parts that say nothing: those equal in all, or known from the parts before."""
    parts = [name.split(".") for name in names]
    if len(names) == 1 or len({len(p) for p in parts}) > 1:
        return list(names)
    kept: list[tuple[str, ...]] = [()] * len(names)
    for place in zip(*parts, strict=True):
        longer = [(*before, part) for before, part in zip(kept, place, strict=True)]
        if len(set(longer)) > len(set(kept)):
            kept = longer
    return [" ".join(k) for k in kept]


def assign_looks(methods: Sequence[str]) -> dict[str, Look]:
    """Colour, marker and line of methods given from the best to the worst."""
    num_coloured = len(methods) if len(methods) <= MAX_COLOURED else len(COLOURS)
    looks = {}
    for i, method in enumerate(methods):
        if i < num_coloured:
            line = "-" if i < len(COLOURS) else "--"
            looks[method] = Look(COLOURS[i % len(COLOURS)], MARKERS[i], line, is_coloured=True)
        else:
            looks[method] = Look(GREY, "o", "none", is_coloured=False)
    return looks


def dashes(row: Row) -> Literal["--", ":"]:
    return "--" if row.method == FULL else ":"


def fractions(axes: Axes, values: Sequence[float]) -> np.ndarray:
    """Height of values in the axes, 0 to 1."""
    bottom, top = axes.get_ylim()
    return (np.array(values) - bottom) / (top - bottom)


def shorten(name: str) -> str:
    """A name on one line, cut where it would not fit beside the data."""
    flat = " ".join(name.split())
    return flat if len(flat) <= MAX_NAME else flat[: MAX_NAME - 1] + "…"


FIGURES: dict[str, Callable[[Summary], Figure | None]] = {"pareto": pareto, "tasks": tasks, "layer_loss": layer_loss}
