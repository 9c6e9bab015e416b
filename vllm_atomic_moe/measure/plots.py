"""Pictures of what was pruned and what it cost: kept widths, perplexity over kept atoms, times.

Drawn with matplotlib's objects and the Agg canvas: no pyplot, no global state, no display. A file
is written complete or not at all. matplotlib is imported inside the functions, so that importing
this module costs nothing.

Legend: E experts, I full intermediate size, L layers.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_atomic_moe.files.profiles import DENSE, PruningProfile
from vllm_atomic_moe.files.tensors import replaced_file

# Colors of the two kinds of experts that keep nothing. They are far from each other and from every
# color of the scale, which starts at dark purple, for color-blind eyes too.
ZERO_WIDTH = (1.0, 1.0, 1.0)
NOT_ROUTABLE = (0.84, 0.15, 0.16)
# White lines across the latter, for prints without color.
HATCHED: Mapping[str, Any] = {"hatch": "///", "edgecolor": "1.0"}
COLOR_MAP = "viridis"
# Profiles -> columns of the grid; four columns above eight profiles.
COLUMNS = {1: 1, 2: 2, 3: 3, 4: 2, 5: 2, 6: 2, 7: 2, 8: 2}
PANEL_WIDTH = {1: 9.0, 2: 6.5, 3: 5.0, 4: 4.2}
DPI = 150
# Color-blind safe (Okabe and Ito), and markers for print without color.
LINES = (
    ("#0072B2", "o"),
    ("#D55E00", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#E69F00", "v"),
    ("#56B4E9", "P"),
    ("#000000", "X"),
)
# Profiles of one method with kept fractions closer than this were made for the same ratio.
SAME_KEPT = 0.005
# Above this ratio of the largest to the smallest perplexity a linear axis hides the good methods.
LOG_FROM = 3.0


@dataclass(frozen=True, slots=True)
class PerplexityPoint:
    """One measured profile.

    Attributes:
        method: how it was made. "" is not known, `dense` is the reference.
        kept: fraction of atoms kept.
        perplexity: measured.
        settings: of the method, except ratio and seed; profiles of one method and settings are one
            line.
        name: of the profile.
    """

    method: str
    kept: float
    perplexity: float
    settings: str = ""
    name: str = ""


def perplexity_points(rows: Sequence[Mapping[str, Any]]) -> list[PerplexityPoint]:
    """One point per row of `atomic-moe eval --json`, over all domains."""
    return [
        PerplexityPoint(
            row["method"], row["kept"], row["perplexity"]["all"], row["settings"], row["profile"]
        )
        for row in rows
    ]


@dataclass(frozen=True, slots=True)
class LayerPoint:
    """One measured cell of the layer benchmark.

    Attributes:
        shape: name of the layer.
        tokens: T.
        pruned: fraction of atoms removed.
        ratio: time ÷ (dense time × kept fraction).
        low, high: its quartiles.
    """

    shape: str
    tokens: int
    pruned: float
    ratio: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class ServerPoint:
    """One phase on one profile's server.

    Attributes:
        profile: its name.
        kept: fraction of atoms kept.
        phase: of the load generator.
        ratio: throughput over that of the dense server.
    """

    profile: str
    kept: float
    phase: str
    ratio: float


def plot_widths(profiles: Sequence[PruningProfile], path: Path) -> None:
    """Heat maps of kept width, layers x experts, one per profile, all on one scale.

    Args:
        profiles: at least one; they need not be of one model.
        path: file to write or replace; its suffix is the format.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    columns = COLUMNS.get(len(profiles), 4)
    rows = math.ceil(len(profiles) / columns)
    width = PANEL_WIDTH[columns]
    height = max(_panel_height(profile, width) for profile in profiles)
    figure = Figure(
        figsize=(columns * width + 1.0, rows * (height + 0.75) + 0.5), layout="constrained"
    )
    size = max(mask.shape[1] for profile in profiles for mask in profile.keep.values())
    scale = ScalarMappable(Normalize(0, size), COLOR_MAP)
    panels = figure.subplots(rows, columns, squeeze=False)
    for index, panel in enumerate(panels.flat):
        if index < len(profiles):
            _draw_widths(panel, profiles[index], scale, width)
        else:
            panel.set_axis_off()
    bar = figure.colorbar(scale, ax=panels, label="kept width (atoms)", pad=0.02, aspect=30)
    bar.set_ticks(_scale_ticks(size))
    figure.legend(
        handles=[
            Patch(facecolor=ZERO_WIDTH, edgecolor="0.4", label="zero width, still routable"),
            Patch(facecolor=NOT_ROUTABLE, label="not routable", **HATCHED),
        ],
        loc="outside lower center",
        ncols=2,
        frameon=False,
    )
    _save(figure, path)


def _panel_height(profile: PruningProfile, width: float) -> float:
    """Inches of a square cell, so that it is legible and the figure fits a page."""
    layers, experts = len(profile.keep), next(iter(profile.keep.values())).shape[0]
    return min(max(width * layers / experts, 1.2), 0.75 * width)


def _draw_widths(panel: Any, profile: PruningProfile, scale: Any, inches: float) -> None:
    import numpy
    from matplotlib.colors import ListedColormap

    layers = list(profile.keep)
    widths_LE = numpy.stack([profile.widths(layer).numpy() for layer in layers])
    colors = scale.to_rgba(widths_LE)[..., :3]
    colors[widths_LE == 0] = ZERO_WIDTH
    excluded_LE = numpy.zeros(widths_LE.shape, dtype=bool)
    for row, layer in enumerate(layers):
        if layer in profile.routable:
            excluded_LE[row] = ~profile.routable[layer].numpy()
    panel.imshow(colors, aspect="auto", interpolation="nearest")
    experts = widths_LE.shape[1]
    corners = [numpy.arange(count + 1) - 0.5 for count in (experts, len(layers))]
    excluded = numpy.ma.masked_equal(excluded_LE, False)
    panel.pcolor(*corners, excluded, cmap=ListedColormap([NOT_ROUTABLE]), linewidth=0, **HATCHED)
    panel.set_title(f"{_shorten(profile.name, inches)}\n{profile.kept:.1%} of atoms kept", size=10)
    panel.set_xlabel("expert")
    panel.set_ylabel("layer")
    panel.set_xticks(_ticks(range(experts), 8))
    rows = _ticks(layers, 6)
    panel.set_yticks(rows, [str(layers[row]) for row in rows])
    panel.tick_params(labelsize=8)
    if experts <= 32:
        _separate_cells(panel, *widths_LE.shape)


def _separate_cells(panel: Any, layers: int, experts: int) -> None:
    """Thin lines between cells that are few, so that neighbors of one width can be counted."""
    panel.set_xticks([column - 0.5 for column in range(1, experts)], minor=True)
    panel.set_yticks([row - 0.5 for row in range(1, layers)], minor=True)
    panel.grid(which="minor", color="0.6", linewidth=0.4)
    panel.tick_params(which="minor", length=0)


def _ticks(indices: Sequence[int], wanted: int) -> list[int]:
    """Positions of about `wanted` round numbers among ascending `indices`."""
    step = 1
    while len(indices) > step * (wanted + 1):
        step *= 2
    return [at for at, index in enumerate(indices) if index % step == 0] or [0]


def _scale_ticks(size: int) -> list[float]:
    """From 0 to `size`, both among them."""
    return sorted({round(size * part / 4) for part in range(5)})


def _shorten(name: str, inches: float) -> str:
    """A name, cut in the middle to fit above a panel of this width."""
    limit = int(inches * 11)
    if len(name) <= limit:
        return name
    return f"{name[: limit // 2 - 1]}…{name[-(limit // 2) :]}"


def plot_perplexity(points: Sequence[PerplexityPoint], path: Path) -> None:
    """Perplexity over the kept fraction: one line per method, the dense model as the reference.

    Several profiles of one method at one kept fraction (seeds) are markers, with a band from the
    lowest to the highest; the line goes through their median.

    Args:
        points: at least one; those of method `dense` are the reference.
        path: file to write or replace; its suffix is the format.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 5.0), layout="constrained")
    panel = figure.subplots()
    dense = next((point.perplexity for point in points if point.method == DENSE), None)
    lines = _lines([point for point in points if point.method != DENSE])
    # By name, not by rank: the same methods look the same in every picture.
    looks = {method: index for index, method in enumerate(sorted(method for method, _ in lines))}
    for method, groups in lines:
        _draw_method(panel, method, groups, looks[method], dense)
    if dense is not None:
        panel.axhline(dense, color="0.35", linestyle="--", linewidth=1.2, zorder=1)
        panel.plot(
            [100.0], [dense], color="0.35", linestyle="--", marker=".", label=f"dense ({dense:.2f})"
        )
    _finish_axes(panel, [point.perplexity for point in points])
    panel.set_title("Perplexity as served, all domains", size=11)
    panel.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), frameon=False)
    _save(figure, path)


def _lines(points: Sequence[PerplexityPoint]) -> list[tuple[str, list[list[PerplexityPoint]]]]:
    """Label and groups of points of each line, most kept first; the line that ends worst is first.

    So the legend beside the plot reads in the order of the lines' ends. A method with several
    settings has several lines, which carry the name of their first profile.
    """
    lines: dict[tuple[str, str], list[list[PerplexityPoint]]] = defaultdict(list)
    for point in sorted(points, key=lambda point: -point.kept):
        groups = lines[point.method, point.settings]
        if groups and abs(groups[-1][0].kept - point.kept) < SAME_KEPT:
            groups[-1].append(point)
        else:
            groups.append([point])
    methods = [method for method, _ in lines]
    labelled = [
        (method if methods.count(method) == 1 else groups[0][0].name, groups)
        for (method, _), groups in lines.items()
    ]
    return sorted(labelled, key=lambda item: -_median(item[1][-1]))


def _median(group: Sequence[PerplexityPoint]) -> float:
    return statistics.median(point.perplexity for point in group)


def _verbatim(label: str) -> str:
    """A label that matplotlib shows literally: no formula between dollars, none left out.

    Legends omit labels that start with an underscore, so a zero-width space comes before it.
    """
    return ("\u200b" if label.startswith("_") else "") + label.replace("$", r"\$")


def _draw_method(
    panel: Any,
    method: str,
    groups: Sequence[Sequence[PerplexityPoint]],
    index: int,
    dense: float | None,
) -> None:
    color, marker = LINES[index % len(LINES)]
    kept = [100 * statistics.fmean(point.kept for point in group) for group in groups]
    middle = [_median(group) for group in groups]
    lowest = [min(point.perplexity for point in group) for group in groups]
    highest = [max(point.perplexity for point in group) for group in groups]
    start = [] if dense is None else [(100.0, dense)]
    panel.plot(
        [x for x, _ in start] + kept,
        [y for _, y in start] + middle,
        color=color,
        linewidth=1.6,
        linestyle=("-", ":", "--")[index // len(LINES) % 3],
        marker=marker,
        markersize=6,
        markevery=range(len(start), len(start) + len(kept)),
        label=_verbatim(method or "method not known"),
        zorder=3,
    )
    if lowest != highest:
        edge = [y for _, y in start]
        panel.fill_between(
            [x for x, _ in start] + kept, edge + lowest, edge + highest, color=color, alpha=0.15
        )
        seeds = [point for group in groups if len(group) > 1 for point in group]
        panel.scatter(
            [100 * point.kept for point in seeds],
            [point.perplexity for point in seeds],
            s=12,
            color=color,
            marker=marker,
            alpha=0.6,
            linewidths=0,
            zorder=2,
        )


def _finish_axes(panel: Any, values: Sequence[float]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

    panel.set_xlabel("atoms kept")
    panel.set_ylabel("perplexity")
    panel.xaxis.set_major_formatter(PercentFormatter(decimals=0))
    # Dense on the left, pruning to the right: lines fan out towards their names.
    panel.invert_xaxis()
    if max(values) > LOG_FROM * min(values):
        panel.set_yscale("log")
        decade = max(values) > 30 * min(values)
        panel.yaxis.set_major_locator(
            LogLocator(subs=(1, 2, 5) if decade else (1, 1.5, 2, 3, 5, 7))
        )
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        panel.yaxis.set_minor_locator(NullLocator())
    panel.grid(color="0.9", linewidth=0.8)
    panel.set_axisbelow(True)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)


def plot_layers(points: Sequence[LayerPoint], path: Path) -> None:
    """Ratio over tokens, one panel per layer shape, one line per pruned fraction.

    Args:
        points: at least one.
        path: file to write or replace; its suffix is the format.
    """
    from matplotlib.figure import Figure

    shapes = list(dict.fromkeys(point.shape for point in points))
    tokens = sorted({point.tokens for point in points})
    figure = Figure(figsize=(2.4 * len(shapes) + 1.6, 3.2), layout="constrained")
    panels = figure.subplots(1, len(shapes), sharey=True, squeeze=False)[0]
    for panel, shape in zip(panels, shapes, strict=True):
        panel.axhline(1.0, color="0.35", linestyle="--", linewidth=1.2, zorder=1)
        for index, pruned in enumerate(sorted({point.pruned for point in points})):
            line = [p for p in points if (p.shape, p.pruned) == (shape, pruned)]
            line.sort(key=lambda point: point.tokens)
            color, marker = LINES[index % len(LINES)]
            at = [tokens.index(point.tokens) for point in line]
            panel.plot(
                at,
                [point.ratio for point in line],
                color=color,
                marker=marker,
                markersize=5,
                linewidth=1.5,
                label=f"{pruned:.0%} pruned",
            )
            low, high = [p.low for p in line], [p.high for p in line]
            panel.fill_between(at, low, high, color=color, alpha=0.15, linewidth=0)
        panel.set_title(shape, size=10)
        panel.set_xticks(range(len(tokens)), [str(count) for count in tokens])
        panel.set_xlabel("tokens")
        panel.set_ylim(bottom=0)
        panel.grid(axis="y", color="0.9", linewidth=0.8)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
    panels[0].set_ylabel("time ÷ (dense × kept)")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right center", frameon=False)
    _save(figure, path)


def plot_servers(points: Sequence[ServerPoint], path: Path) -> None:
    """Throughput over that of dense, over the kept fraction: one line per phase.

    The dashed line is 1 / kept, what experts would gain if nothing else took time.

    Args:
        points: at least one.
        path: file to write or replace; its suffix is the format.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(7.0, 4.2), layout="constrained")
    panel = figure.subplots()
    kept = [max(point.kept, 0.05) for point in points]
    ideal = [min(kept) + (1 - min(kept)) * step / 50 for step in range(51)]
    panel.plot(
        [100 * at for at in ideal],
        [1 / at for at in ideal],
        color="0.35",
        linestyle="--",
        linewidth=1.2,
        label="1 / kept",
    )
    for index, phase in enumerate(dict.fromkeys(point.phase for point in points)):
        color, marker = LINES[index % len(LINES)]
        line = sorted((p for p in points if p.phase == phase), key=lambda point: -point.kept)
        panel.plot(
            [100 * point.kept for point in line],
            [point.ratio for point in line],
            color=color,
            marker=marker,
            linewidth=1.6,
            label=phase,
        )
    panel.set_xlabel("atoms kept")
    panel.set_ylabel("throughput ÷ dense")
    panel.xaxis.set_major_formatter(PercentFormatter(decimals=0))
    panel.invert_xaxis()
    panel.grid(color="0.9", linewidth=0.8)
    for side in ("top", "right"):
        panel.spines[side].set_visible(False)
    panel.legend(frameon=False)
    _save(figure, path)


def _save(figure: Any, path: Path) -> None:
    """Write the figure, complete or not at all, with mode 0644."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    FigureCanvasAgg(figure)
    with replaced_file(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:].lower(), dpi=DPI)
