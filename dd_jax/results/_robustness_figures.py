"""The paper's Figure 6, and robust accuracy over epsilon."""

import math
import pathlib
import textwrap
from collections.abc import Mapping, Sequence, Set
from types import MappingProxyType
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from dd_jax.results import _drawing as drawing
from dd_jax.results._drawing import Numbers, Paths, Points
from dd_jax.results._labels import Label, place_labels
from dd_jax.results._styles import (
    COLUMN_WIDTH,
    RHO,
    STRENGTH_SYMBOLS,
    TEXT_WIDTH,
    legend_names,
    looks,
    style,
)

SCATTER_HEIGHT, PANEL_HEIGHT = 2.9, 2.2  # Inches.
LONGEST_NAME, LONGEST_LINE = 22, 54  # Characters in a line.
SYMBOLS = {"l2": r"$\ell_2$", "linf": r"$\ell_\infty$", "l1": r"$\ell_1$"}
ALMOST_NONE = 3.0  # Percent: axes end where all curves have fallen so far.
HAVE_A_FACE = "o^svDPXd<>ph*"
FILLED = dict(markersize=4.5, markeredgecolor="black", markeredgewidth=0.7)


def robustness_over_accuracy(
    folder: pathlib.Path | str, points: Mapping[str, Points], **options: Any
) -> Paths:
    """Writes the paper's Figure 6 (left), `robustness_over_accuracy_figure(points, **options)`."""
    return drawing.save(
        robustness_over_accuracy_figure(points, **options), folder, "robustness_over_accuracy"
    )


@style()
def robustness_over_accuracy_figure(
    points: Mapping[str, Points],
    *,
    strength_symbols: Mapping[str, str] = STRENGTH_SYMBOLS,
    labels: Mapping[str, str] | None = None,
) -> Figure:
    """rho_2 over benign accuracy, a line per method. Up and right is better.

    Args:
      points: for each method its (accuracy 0 to 1, rho_2, swept strength or None). The line
        connects the points in the order of their strengths, or in the given order if a strength is
        None. Its name and its first and last strength are written beside the line. "reference" is
        marked by a star.
      strength_symbols: for each method the symbol of its strength; may contain mathematics between
        dollars.
      labels: from methods to their names in the figure.

    Raises:
      ValueError: there is no point to draw, a point is not a triple, or accuracies are not
        fractions.
    """
    series = {name: drawing.table(rows, 3) for name, rows in points.items()}
    series = drawing.in_percent("accuracies", series, 0)
    for name, rows in series.items():
        series[name] = rows if np.isnan(rows[:, 2]).any() else drawing.sort(rows, 2)
    names = legend_names(list(series), labels)
    figure, (axes,) = drawing.new_figure((COLUMN_WIDTH, SCATTER_HEIGHT), 1)
    drawn = {name: rows[:, :2] for name, rows in series.items()}
    _draw_points(axes, drawn, names)
    without = [names[name] for name, rows in drawn.items() if not np.isfinite(rows).all(1).any()]
    axes.set_xlabel("\n".join(["Benign accuracy (%)", *_no_data(without)]), parse_math=False)
    axes.set_ylabel(RHO)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.margins(0.12)
    place_labels(figure, axes, _labels(series, names, strength_symbols))
    return figure


def _no_data(names: Sequence[str]) -> list[str]:
    """A sentence in lines that names the methods without a point; none where all have one."""
    return textwrap.wrap(f"(no data: {', '.join(names)})", LONGEST_LINE) if names else []


def _draw_points(axes: Axes, points: Mapping[str, np.ndarray], names: Mapping[str, str]) -> None:
    """Draws a line per method with a marker at every point, and the reference as a star."""
    methods = list(points)
    drawing.draw_lines(axes, points, looks(methods), names, most_markers=math.inf)
    drawing.check_has_data(axes.lines)
    for line in axes.lines:
        # A single point must not be hidden by a line.
        line.set_zorder(3 if len(line.get_xdata()) == 1 else 2)
    if "reference" in methods:
        star = axes.lines[methods.index("reference")]
        star.set(marker="*", markersize=10, markerfacecolor="black", zorder=2.5)


def _labels(
    series: Mapping[str, np.ndarray], names: Mapping[str, str], symbols: Mapping[str, str]
) -> list[Label]:
    """The name of each method, beside any of its points, and its first and its last strength."""
    labels = []
    for method, look in looks(list(series)).items():
        rows = series[method][np.isfinite(series[method][:, :2]).all(axis=1)]
        if len(rows):
            name = textwrap.fill(names[method], LONGEST_NAME)
            labels.append(Label(rows[:, :2], name, look.color, is_plain=True))
        rows = rows[np.isfinite(rows[:, 2])]
        symbol = f"{symbols[method]} = " if method in symbols else ""
        ends = rows[sorted({0, len(rows) - 1})] if len(rows) else []
        labels += [Label(row[None, :2], f"{symbol}{row[2]:.4g}", look.color) for row in ends]
    return labels


def robust_accuracy_over_epsilon(
    folder: pathlib.Path | str,
    curves: Mapping[str, Mapping[str, Sequence[Numbers]]],
    **options: Any,
) -> Paths:
    """Writes `robust_accuracy_over_epsilon_figure(curves, **options)`."""
    return drawing.save(
        robust_accuracy_over_epsilon_figure(curves, **options),
        folder,
        "robust_accuracy_over_epsilon",
    )


@style()
def robust_accuracy_over_epsilon_figure(
    curves: Mapping[str, Mapping[str, Sequence[Numbers]]],
    *,
    points: Mapping[str, Mapping[str, Points]] = MappingProxyType({}),
    unit: str = "pixel range = 1",
    labels: Mapping[str, str] | None = None,
) -> Figure:
    """The accuracy under all perturbations up to epsilon, a panel per norm and a line per method.
    Higher is more robust.

    Args:
      curves: by norm ("l2", "linf", "l1") and method: epsilons, in any order, and the accuracies at
        them, 0 to 1, such as `dd_jax.results.curves.line` gives.
      points: by norm and method: (epsilon, accuracy) by AutoAttack, drawn as filled points.
      unit: the unit of epsilon on the axes; may contain mathematics between dollars.
      labels: from methods to their names in the legend.

    Raises:
      ValueError: there is no point to draw, lists have unequal length, a norm is unknown, or
        accuracies are not fractions.
    """
    norms = _norms({*curves, *points})
    width = COLUMN_WIDTH if len(norms) == 1 else TEXT_WIDTH
    figure, all_axes = drawing.new_figure((width, PANEL_HEIGHT), len(norms), sharey=True)
    methods = [name for each in (curves, points) for norm in norms for name in each.get(norm, {})]
    names = legend_names(list(dict.fromkeys(methods)), labels)
    for axes, norm in zip(all_axes, norms, strict=True):
        _draw_robust_accuracies(axes, curves.get(norm, {}), points.get(norm, {}), names)
        between = " " if len(norms) == 1 else "\n"
        axes.set_xlabel(f"{SYMBOLS[norm]} size $\\epsilon${between}({unit})")
    all_axes[0].set(ylabel="Robust accuracy (%)", ylim=(-3, 103), yticks=range(0, 101, 20))
    drawing.draw_legend(figure, [_autoattack_handle()] if any(points.values()) else [])
    return figure


def _norms(given: Set[str]) -> list[str]:
    """The given norms in the order of their panels; the first one if there are none."""
    if unknown := sorted(given - SYMBOLS.keys()):
        raise ValueError(f"there is no norm {unknown[0]!r}; choose any of {', '.join(SYMBOLS)}.")
    return [norm for norm in SYMBOLS if norm in given] or list(SYMBOLS)[:1]


def _series(name: str, curve: Sequence[Numbers]) -> np.ndarray:
    """The points (epsilon, accuracy) of a curve, by epsilon."""
    return drawing.sort(drawing.pairs(name, curve, "epsilons and accuracies"), 0)


def _draw_robust_accuracies(
    axes: Axes,
    curves: Mapping[str, Sequence[Numbers]],
    points: Mapping[str, Points],
    names: Mapping[str, str],
) -> None:
    """One panel: the curves of the methods in `names`, and AutoAttack's points in their colors."""
    series = {name: _series(name, curves.get(name, ((), ()))) for name in names}
    series = drawing.in_percent("accuracies", series, 1)
    all_looks = looks(list(names))
    drawing.draw_lines(axes, series, all_looks, names)
    found = {name: drawing.table(rows, 2) for name, rows in points.items()}
    for name, rows in drawing.in_percent("accuracies", found, 1).items():
        color, _, marker = all_looks[name]
        look = dict(color=color, marker=marker if marker in HAVE_A_FACE else "o", **FILLED)
        axes.plot(*rows.T, linestyle="", gid=names[name], zorder=3, **look)
    ends = [_end_of(rows) for rows in series.values()]
    ends += [rows[:, 0].max() for rows in found.values() if len(rows)]
    axes.set_xlim(0, 1.03 * max(filter(np.isfinite, ends), default=0.0) or 1.0)


def _end_of(rows: np.ndarray) -> float:
    """Where a curve (epsilon, accuracy in percent) has fallen to ALMOST_NONE, or where it ends."""
    rows = rows[np.isfinite(rows).all(1)]
    fallen = rows[rows[:, 1] <= ALMOST_NONE]
    return float((fallen[0] if len(fallen) else rows[-1])[0]) if len(rows) else math.nan


def _autoattack_handle() -> Line2D:
    return Line2D([], [], linestyle="", marker="o", color="0.6", label="AutoAttack", **FILLED)
