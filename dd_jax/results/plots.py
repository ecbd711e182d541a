"""Draws Figures 5 to 8 of the paper, and the curves of one run, from the contents of report.json
and metrics.jsonl.

    points = {
        "reference": [(0.983, 0.11, None)],
        "deep_defense": [(0.984, 0.15, 25), (0.981, 0.18, 10)],
    }
    png, pdf = plots.robustness_over_accuracy("plots", points)

`NAME(folder, ...)` writes NAME.png and NAME.pdf and returns their paths; `NAME_figure(...)` returns
the Matplotlib figure. `labels` gives the names of methods in the legend; a method without a label
keeps its own name. A number that is None, NaN or infinite leaves a gap. A method without points
stays in the legend, marked "(no data)". A method looks the same in every figure, and methods can be
told apart in gray print. The same data gives the same bytes, whatever the user's Matplotlib
settings are.
"""

import math
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dd_jax import extras

with extras.needed("plots"):
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    from dd_jax.results import _drawing as drawing
    from dd_jax.results._drawing import Number, Numbers, Paths, Points
    from dd_jax.results._styles import STRENGTH_SYMBOLS, Look, legend_names, looks, style

COLUMN_WIDTH, TEXT_WIDTH = 3.4, 5.5  # Inches, of papers in two columns and in one.
PANELS_PER_ROW, LONGEST_PANEL_LABEL, LINE_HEIGHT = 8, 13, 0.16
RHO = r"Robustness $\rho_2$"
STAGES = {"reference": "reference", "defended": "fine-tuning"}
RUN_LOOKS = {
    "loss": Look("#000000", (), ""),
    "cross_entropy": Look("#0072b2", (3, 1.2), ""),
    "correct": Look("#7f7f7f", (), ""),
    "accuracy": Look("#d55e00", (4, 1.5), "D"),
    "rho_l2": Look("#d55e00", (4, 1.5), "D"),
}
RUN_NAMES = {
    "loss": "Training loss",
    "cross_entropy": "Its cross-entropy",
    "correct": "Training batches",
    "accuracy": "Test images",
    "rho_l2": "Test images",
}
RUN_PANELS = {
    "Loss": ("loss", "cross_entropy"),
    "Accuracy (%)": ("correct", "accuracy"),
    RHO: ("rho_l2",),
}


def success_over_epsilon(
    folder: pathlib.Path | str, curves: Mapping[str, Sequence[Numbers]], **options: Any
) -> Paths:
    """Writes the paper's Figure 5, `success_over_epsilon_figure(curves, **options)`."""
    return drawing.save(
        success_over_epsilon_figure(curves, **options), folder, "success_over_epsilon"
    )


@style()
def success_over_epsilon_figure(
    curves: Mapping[str, Sequence[Numbers]],
    *,
    unit: str = "pixel range = 1",
    labels: Mapping[str, str] | None = None,
) -> Figure:
    """The success rate of FGSM over the size of its perturbation. Lower is more robust.

    Args:
      curves: for each method its epsilons, in any order, and the success rates at them, 0 to 1.
      unit: the unit of epsilon on the axis; may contain mathematics between dollars.
      labels: from methods to their names in the legend.

    Raises:
      ValueError: there is no point to draw, lists have unequal length, or rates are not fractions.
    """
    for name, curve in curves.items():
        if len(curve) != 2 or len(curve[0]) != len(curve[1]):
            raise ValueError(f"{name}'s curve must be two lists of equal length: epsilons, rates.")
    series = {
        name: drawing.sort(drawing.table(list(zip(*curve, strict=True)), 2), 0)
        for name, curve in curves.items()
    }
    series = drawing.in_percent("success rates", series, 1)
    figure, (axes,) = drawing.new_figure((COLUMN_WIDTH, 2.3), 1)
    # The paper compares epsilons at a success rate of 50 %.
    axes.axhline(50, color="0.45", linewidth=0.7, dashes=(2, 2), zorder=1)
    names = legend_names(list(series), labels)
    drawing.draw_lines(axes, series, looks(list(series)), names)
    axes.set_xlabel(rf"Size $\epsilon$ of the FGSM perturbation ($\ell_\infty$, {unit})")
    axes.margins(x=0.03)
    axes.set(ylabel="FGSM success rate (%)", ylim=(-3, 103), yticks=range(0, 101, 20))
    drawing.draw_legend(figure)
    return figure


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
        None. The first and the last strength are written beside the line. "reference" is marked by
        a star.
      strength_symbols: for each method the symbol of its strength; may contain mathematics between
        dollars.
      labels: from methods to their names in the legend.

    Raises:
      ValueError: there is no point to draw, a point is not a triple, or accuracies are not
        fractions.
    """
    series = {name: drawing.table(rows, 3) for name, rows in points.items()}
    series = drawing.in_percent("accuracies", series, 0)
    for name, rows in series.items():
        series[name] = rows if np.isnan(rows[:, 2]).any() else drawing.sort(rows, 2)
    figure, (axes,) = drawing.new_figure((COLUMN_WIDTH, 2.3), 1)
    _draw_points(axes, {name: rows[:, :2] for name, rows in series.items()}, labels)
    axes.set(xlabel="Benign accuracy (%)", ylabel=RHO)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.margins(0.12)
    drawing.draw_legend(figure)
    drawing.annotate(figure, axes, _strength_notes(series, strength_symbols))
    return figure


def _draw_points(
    axes: Axes, points: Mapping[str, np.ndarray], labels: Mapping[str, str] | None
) -> None:
    """Draws a line per method with a marker at every point, and the reference as a star."""
    methods = list(points)
    names = legend_names(methods, labels)
    drawing.draw_lines(axes, points, looks(methods), names, most_markers=math.inf)
    for line in axes.lines:
        # A single point must not be hidden by a line.
        line.set_zorder(3 if len(line.get_xdata()) == 1 else 2)
    if "reference" in methods:
        star = axes.lines[methods.index("reference")]
        star.set(marker="*", markersize=10, markerfacecolor="black", zorder=2.5)


def _strength_notes(
    series: Mapping[str, np.ndarray], symbols: Mapping[str, str]
) -> list[tuple[np.ndarray, str, str]]:
    """(point, text, color) for the first and the last strength of each method."""
    notes = []
    for name, look in looks(list(series)).items():
        rows = series[name][np.isfinite(series[name]).all(axis=1)]
        symbol = f"{symbols[name]} = " if name in symbols else ""
        ends = rows[sorted({0, len(rows) - 1})] if len(rows) else []
        notes += [(row[:2], f"{symbol}{row[2]:.4g}", look.color) for row in ends]
    return notes


class Example(NamedTuple):
    """An image that fools a method's net.

    `image`: (h, w), (h, w, 1) or (h, w, 3), 0 to 1. `label`: the class that the net predicts.
    `ratio`: ||perturbation||_2 / ||original||_2.
    """

    method: str
    image: np.ndarray
    label: str | int
    ratio: Number


def fooling_examples(
    folder: pathlib.Path | str, image: np.ndarray, examples: Sequence[Example], **options: Any
) -> Paths:
    """Writes the paper's Figure 7, `fooling_examples_figure(image, examples, **options)`."""
    return drawing.save(
        fooling_examples_figure(image, examples, **options), folder, "fooling_examples"
    )


@style()
def fooling_examples_figure(
    image: np.ndarray,
    examples: Sequence[Example],
    *,
    label: str | int | None = None,
    labels: Mapping[str, str] | None = None,
) -> Figure:
    """An image, and for each method an image that fools its net.

    The predicted class and the ratio of norms are written below. Pixels are clipped to 0..1; NaN is
    black.

    Args:
      image: the original: (h, w), (h, w, 1) or (h, w, 3), 0 to 1.
      examples: one or more.
      label: the original's class.
      labels: from methods to their names above the images.

    Raises:
      ValueError: there are no examples, or images have another shape.
    """
    if not examples:
        raise ValueError("There is no example to draw; give one or more.")
    images = [drawing.pixels(each) for each in (image, *(example.image for example in examples))]
    above, below = _names_above(examples, labels), _texts_below(examples, label)
    rows = math.ceil(len(images) / PANELS_PER_ROW)
    columns = math.ceil(len(images) / rows)
    width = TEXT_WIDTH / PANELS_PER_ROW
    num_lines = sum(max(text.count("\n") for text in texts) + 1 for texts in (above, below))
    aspect = max(each.shape[0] / each.shape[1] for each in images)
    height = width * aspect + LINE_HEIGHT * num_lines
    figure, all_axes = drawing.new_figure((width * columns, height * rows), columns, rows)
    for axes, *panel in zip(all_axes, images, above, below, strict=False):
        drawing.draw_image(axes, *panel)
    for axes in all_axes[len(images) :]:
        axes.remove()
    return figure


def _names_above(examples: Sequence[Example], labels: Mapping[str, str] | None) -> list[str]:
    """The names of the original and of the examples' methods."""
    methods = [example.method for example in examples]
    known = legend_names(methods, labels)
    names = ["Original", *(known[method] for method in methods)]
    return [_wrap(name.replace(" (", "\n(").replace(" + ", "\n+ ")) for name in names]


def _texts_below(examples: Sequence[Example], label: str | int | None) -> list[str]:
    """The classes of the original and of the examples, of equally many lines, and the ratios."""
    classes = ["" if label is None else _wrap(f"class {label}")]
    classes += [_wrap(f"taken for {example.label}") for example in examples]
    most_lines = max(text.count("\n") for text in classes)
    classes = [
        text.replace("$", r"\$") + "\n" * (most_lines - text.count("\n")) for text in classes
    ]
    ratios = drawing.table([[example.ratio] for example in examples], 1)[:, 0]
    shown = ["no data" if np.isnan(ratio) else f"{ratio:.3f}" for ratio in ratios]
    sizes = ["", *(rf"$\rho_2$ = {ratio}" for ratio in shown)]
    return [f"{text}\n{size}" for text, size in zip(classes, sizes, strict=True)]


def _wrap(text: str) -> str:
    """The text in lines that fit a panel; each given line becomes at most three."""
    fill = lambda line: textwrap.fill(line, LONGEST_PANEL_LABEL, max_lines=3, placeholder=" ...")
    return "\n".join(map(fill, text.split("\n")))


def training_over_epochs(
    folder: pathlib.Path | str, histories: Mapping[str, Points], **options: Any
) -> Paths:
    """Writes the paper's Figure 8, `training_over_epochs_figure(histories, **options)`."""
    return drawing.save(
        training_over_epochs_figure(histories, **options), folder, "training_over_epochs"
    )


@style()
def training_over_epochs_figure(
    histories: Mapping[str, Points], *, labels: Mapping[str, str] | None = None
) -> Figure:
    """Test accuracy and rho_2 over the epochs of training, a line per method.

    Args:
      histories: for each method its (epoch, accuracy 0 to 1, rho_2), in any order.
      labels: from methods to their names in the legend.

    Raises:
      ValueError: there is no point to draw, a point is not a triple, or accuracies are not
        fractions.
    """
    series = {name: drawing.sort(drawing.table(rows, 3), 0) for name, rows in histories.items()}
    series = drawing.in_percent("accuracies", series, 1)
    names = legend_names(list(series), labels)
    figure, (left, right) = drawing.new_figure((TEXT_WIDTH, 2.2), 2)
    for axes, column in ((left, 1), (right, 2)):
        lines = {name: rows[:, [0, column]] for name, rows in series.items()}
        drawing.draw_lines(axes, lines, looks(list(series)), names)
        axes.set_xlabel("Epoch")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    left.set_ylabel("Test accuracy (%)")
    right.set_ylabel(RHO)
    drawing.draw_legend(figure)
    return figure


def single_run(folder: pathlib.Path | str, lines: Sequence[Mapping[str, Any]]) -> Paths:
    """Writes `single_run_figure(lines)`."""
    return drawing.save(single_run_figure(lines), folder, "single_run")


@style()
def single_run_figure(lines: Sequence[Mapping[str, Any]]) -> Figure:
    """Loss and accuracy over the steps of one run, stage after stage, and rho_2 if it was measured.

    Args:
      lines: the lines of metrics.jsonl. Each has "stage" and "step". Training lines have "loss",
        "correct" and perhaps "cross_entropy", means over the training batches before that step.
        Test lines have "test", with "accuracy" and "rho_l2". Other lines are ignored.

    Raises:
      ValueError: there is no such line.
    """
    rows, starts = _stage_after_stage(lines)
    curves = _curves(rows)
    panels = _panels_with_data(curves)
    height = 0.4 + 1.2 * len(panels)
    figure, all_axes = drawing.new_figure((COLUMN_WIDTH, height), 1, len(panels), sharex=True)
    for axes, (name, keys) in zip(all_axes, panels.items(), strict=True):
        _draw_panel(axes, name, {key: curves[key] for key in keys})
        for start in list(starts.values())[1:]:
            axes.axvline(start, color="0.45", linewidth=0.7, dashes=(2, 2), zorder=1)
    _name_stages(all_axes[0], [STAGES.get(stage, stage) for stage in starts], list(starts.values()))
    all_axes[-1].set_xlabel("Step")
    all_axes[-1].xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    figure.align_ylabels()
    drawing.draw_legend(figure)
    return figure


def _draw_panel(axes: Axes, name: str, curves: Mapping[str, np.ndarray]) -> None:
    """Draws curves of one quantity; a positive loss has a logarithmic axis."""
    drawing.draw_lines(axes, curves, {key: RUN_LOOKS[key] for key in curves}, RUN_NAMES)
    axes.set_ylabel(name)
    if name == "Loss" and not any((rows[:, 1] <= 0).any() for rows in curves.values()):
        axes.set_yscale("log")


def _curves(rows: Sequence[Mapping[str, Any]]) -> dict[str, np.ndarray]:
    """The points (step, value) of each curve of a run, with accuracies in percent."""
    curves = {
        key: drawing.table([[row["step"], row[key]] for row in rows if key in row], 2)
        for key in RUN_LOOKS
    }
    accuracies = {key: curves[key] for key in ("correct", "accuracy")}
    return curves | drawing.in_percent("accuracies", accuracies, 1)


def _panels_with_data(curves: Mapping[str, np.ndarray]) -> Mapping[str, Sequence[str]]:
    """The panels with the curves that have points; all panels if no curve has one."""
    has_points = lambda key: np.isfinite(curves[key]).all(1).any()
    panels = {name: list(filter(has_points, keys)) for name, keys in RUN_PANELS.items()}
    return {name: keys for name, keys in panels.items() if keys} or RUN_PANELS


def _name_stages(axes: Axes, names: Sequence[str], starts: Sequence[int]) -> None:
    """Writes the first two stages' names above the axes, on both sides of the second's start."""
    options = {"textcoords": "offset points", "fontsize": 8, "parse_math": False}
    if len(names) == 1:
        axes.annotate(names[0], (0, 1), (0, 3), xycoords="axes fraction", **options)
        return
    for name, side, alignment in zip(names, (-4, 4), ("right", "left"), strict=False):
        axes.annotate(
            name,
            (starts[1], 1),
            (side, 3),
            xycoords=axes.get_xaxis_transform(),
            ha=alignment,
            **options,
        )


def _stage_after_stage(
    lines: Sequence[Mapping[str, Any]],
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The training and test lines with steps counted over all stages, and where each starts."""
    rows, starts, start = [], {}, 0
    curve_lines = [line for line in lines if "loss" in line or "test" in line]
    for stage in dict.fromkeys(line["stage"] for line in curve_lines):
        starts[stage] = start
        own = sorted(
            (line for line in curve_lines if line["stage"] == stage), key=lambda line: line["step"]
        )
        rows += [{**line, **line.get("test", {}), "step": start + line["step"]} for line in own]
        start = rows[-1]["step"]
        rows.append({"step": start} | dict.fromkeys(RUN_LOOKS))  # A gap before the next stage.
    return rows, starts
