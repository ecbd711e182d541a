"""Figures 5 to 8 of the paper, and the curves of one run, from what report.json and metrics.jsonl
hold.

    points = {"reference": [(0.983, 0.11, None)], "deep_defense": [(0.984, 0.15, 25), (0.981, 0.18,
    10)]} png, pdf = plots.robustness_over_accuracy("plots", points)

`NAME(folder, ...)` writes NAME.png and NAME.pdf and returns their paths; `NAME_figure(...)` returns
the Matplotlib figure. A number may be None, NaN or infinite: it leaves a gap. A method without a
point keeps its place in the legend, marked "(no data)". Methods look the same in every figure, and
differ in gray print. The same data gives the same bytes, whatever the user's Matplotlib settings
are.
"""

import math
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dd_jax.results import _drawing as drawing
from dd_jax.results._drawing import Number, Numbers, Paths, Points
from dd_jax.results._styles import Look, looks, style

COLUMN_WIDTH, TEXT_WIDTH = 3.4, 5.5  # Inches, of papers in two columns and in one.
PANELS_PER_ROW, LONGEST_PANEL_LABEL, LINE_HEIGHT = 8, 13, 0.16
SWEPT = {
    "deep_defense": "$c$",
    "adversarial_fgsm": r"$\epsilon$",
    "deep_defense_fgsm": r"$\epsilon$",
}
RHO = r"Robustness $\rho_2$"
STAGES = {"reference": "reference", "defended": "fine-tuning"}
RUN_LOOKS = {
    "loss": Look("Training loss", "#000000", (), ""),
    "cross_entropy": Look("Its cross-entropy", "#0072b2", (3, 1.2), ""),
    "correct": Look("Training batches", "#7f7f7f", (), ""),
    "accuracy": Look("Test images", "#d55e00", (4, 1.5), "D"),
    "rho_l2": Look("Test images", "#d55e00", (4, 1.5), "D"),
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
    curves: Mapping[str, Sequence[Numbers]], *, unit: str = "pixel range = 1"
) -> Figure:
    """The success rate of FGSM over the size of its perturbation: lower is more robust.

    Args:
      curves: per method its epsilons and, at each of them, the success rate, 0 to 1. The order does
        not matter.
      unit: of epsilon, as the axis names it; may hold mathematics between dollars.

    Raises:
      ValueError: not a point to draw, lists of unequal length, or rates that are no fractions.
    """
    for name, curve in curves.items():
        if len(curve) != 2 or len(curve[0]) != len(curve[1]):
            raise ValueError(
                f"{name}'s curve must be two lists of equal length, epsilons and success rates."
            )
    series = {
        name: drawing.sort(drawing.table(list(zip(*curve, strict=True)), 2), 0)
        for name, curve in curves.items()
    }
    series = drawing.in_percent("success rates", series, 1)
    figure, (axes,) = drawing.new_figure((COLUMN_WIDTH, 2.3), 1)
    # Where the paper compares epsilons.
    axes.axhline(50, color="0.45", linewidth=0.7, dashes=(2, 2), zorder=1)
    drawing.draw_lines(axes, series, looks(list(series)))
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
    points: Mapping[str, Points], *, swept: Mapping[str, str] = SWEPT
) -> Figure:
    """rho_2 over benign accuracy, a method's points connected in the order of what was swept: up
    and right is better.

    Args:
      points: per method its (accuracy 0 to 1, rho_2, value swept or None). A line's first and last
        value stand beside it. Where some values are None, the points stay in the order given.
        "reference" is marked by a star.
      swept: per method the symbol of what was swept; may hold mathematics between dollars.

    Raises:
      ValueError: not a point to draw, a point that is no triple, or accuracies that are no
        fractions.
    """
    series = {name: drawing.table(rows, 3) for name, rows in points.items()}
    series = drawing.in_percent("accuracies", series, 0)
    series = {
        name: rows if np.isnan(rows[:, 2]).any() else drawing.sort(rows, 2)
        for name, rows in series.items()
    }
    looks_of = looks(list(series))
    figure, (axes,) = drawing.new_figure((COLUMN_WIDTH, 2.3), 1)
    drawing.draw_lines(
        axes, {name: rows[:, :2] for name, rows in series.items()}, looks_of, most_markers=math.inf
    )
    for line in axes.lines:
        # No line hides a point that stands alone.
        line.set_zorder(3 if len(line.get_xdata()) == 1 else 2)
    if "reference" in series:
        axes.lines[list(series).index("reference")].set(
            marker="*", markersize=10, markerfacecolor="black", zorder=2.5
        )
    axes.set(xlabel="Benign accuracy (%)", ylabel=RHO)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.margins(0.12)
    drawing.draw_legend(figure)
    notes = []
    for name, look in looks_of.items():
        rows = series[name][np.isfinite(series[name]).all(axis=1)]
        symbol = f"{swept[name]} = " if name in swept else ""
        ends = rows[sorted({0, len(rows) - 1})] if len(rows) else []
        notes += [(row[:2], f"{symbol}{row[2]:.4g}", look.color) for row in ends]
    drawing.annotate(figure, axes, notes)
    return figure


class Example(NamedTuple):
    """An image that fools a method's net: (h, w), (h, w, 1) or (h, w, 3), 0 to 1, and the class it
    is taken for.

    ratio: ||perturbation||_2 / ||original||_2.
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
    image: np.ndarray, examples: Sequence[Example], *, label: str | int | None = None
) -> Figure:
    """An image and, per method, what fools its net, with the class that is taken for and the ratio
    of norms below.

    Pixels are clipped to 0..1; those that are no numbers are black.

    Args:
      image: the original: (h, w), (h, w, 1) or (h, w, 3), 0 to 1.
      examples: one or more.
      label: the original's class.

    Raises:
      ValueError: no examples, or images of another shape.
    """
    if not examples:
        raise ValueError("There is no example to draw; give one or more.")
    images = [drawing.pixels(each) for each in (image, *(example.image for example in examples))]
    names = ["Original", *(looks([example.method])[example.method].label for example in examples)]
    names = [_wrap(name.replace(" (", "\n(").replace(" + ", "\n+ ")) for name in names]
    classes = ["" if label is None else _wrap(f"class {label}")]
    classes += [_wrap(f"taken for {example.label}") for example in examples]
    most_lines = max(text.count("\n") for text in classes)
    classes = [
        text.replace("$", r"\$") + "\n" * (most_lines - text.count("\n")) for text in classes
    ]
    ratios = drawing.table([[example.ratio] for example in examples], 1)[:, 0]
    sizes = [
        "",
        *(rf"$\rho_2$ = {'no data' if np.isnan(ratio) else f'{ratio:.3f}'}" for ratio in ratios),
    ]
    below = [f"{text}\n{size}" for text, size in zip(classes, sizes, strict=True)]
    rows = math.ceil(len(images) / PANELS_PER_ROW)
    columns = math.ceil(len(images) / rows)
    width = TEXT_WIDTH / PANELS_PER_ROW
    num_lines = max(name.count("\n") for name in names) + most_lines + 3
    height = width * max(each.shape[0] / each.shape[1] for each in images) + LINE_HEIGHT * num_lines
    figure, all_axes = drawing.new_figure((width * columns, height * rows), columns, rows)
    for axes, *panel in zip(all_axes, images, names, below, strict=False):
        drawing.draw_image(axes, *panel)
    for axes in all_axes[len(images) :]:
        axes.remove()
    return figure


def _wrap(text: str) -> str:
    """In lines that a panel is wide enough for, three for each that there was at most."""
    fill = lambda line: textwrap.fill(line, LONGEST_PANEL_LABEL, max_lines=3, placeholder=" ...")
    return "\n".join(map(fill, text.split("\n")))


def training_over_epochs(folder: pathlib.Path | str, histories: Mapping[str, Points]) -> Paths:
    """Writes the paper's Figure 8, `training_over_epochs_figure(histories)`."""
    return drawing.save(training_over_epochs_figure(histories), folder, "training_over_epochs")


@style()
def training_over_epochs_figure(histories: Mapping[str, Points]) -> Figure:
    """Test accuracy and rho_2 over the epochs of training, a line per method.

    Args:
      histories: per method its (epoch, accuracy 0 to 1, rho_2). The order does not matter.

    Raises:
      ValueError: not a point to draw, a point that is no triple, or accuracies that are no
        fractions.
    """
    series = {name: drawing.sort(drawing.table(rows, 3), 0) for name, rows in histories.items()}
    series = drawing.in_percent("accuracies", series, 1)
    figure, (left, right) = drawing.new_figure((TEXT_WIDTH, 2.2), 2)
    for axes, column in ((left, 1), (right, 2)):
        drawing.draw_lines(
            axes, {name: rows[:, [0, column]] for name, rows in series.items()}, looks(list(series))
        )
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
    """Loss and accuracy over the steps of one run, its stages one after the other, and rho_2 where
    it was measured.

    Args:
      lines: of metrics.jsonl: "stage", "step", and "loss", "correct" and perhaps "cross_entropy",
        means over the training batches before that step, or "test", with "accuracy" and "rho_l2".
        Other lines are passed over.

    Raises:
      ValueError: no such line.
    """
    rows, starts = _one_after_the_other(lines)
    curves = {
        key: drawing.table([[row["step"], row[key]] for row in rows if key in row], 2)
        for key in RUN_LOOKS
    }
    curves |= drawing.in_percent(
        "accuracies", {key: curves[key] for key in ("correct", "accuracy")}, 1
    )
    panels = {
        name: [key for key in keys if np.isfinite(curves[key]).all(1).any()]
        for name, keys in RUN_PANELS.items()
    }
    panels = {name: keys for name, keys in panels.items() if keys} or RUN_PANELS
    figure, all_axes = drawing.new_figure(
        (COLUMN_WIDTH, 0.4 + 1.2 * len(panels)), 1, len(panels), sharex=True
    )
    for axes, (name, keys) in zip(all_axes, panels.items(), strict=True):
        drawing.draw_lines(axes, curves, {key: RUN_LOOKS[key] for key in keys})
        axes.set_ylabel(name)
        if name == "Loss" and not any((curves[key][:, 1] <= 0).any() for key in keys):
            axes.set_yscale("log")
        for start in list(starts.values())[1:]:
            axes.axvline(start, color="0.45", linewidth=0.7, dashes=(2, 2), zorder=1)
    _name_stages(all_axes[0], [STAGES.get(stage, stage) for stage in starts], list(starts.values()))
    all_axes[-1].set_xlabel("Step")
    all_axes[-1].xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    figure.align_ylabels()
    drawing.draw_legend(figure)
    return figure


def _name_stages(axes: Axes, names: Sequence[str], starts: Sequence[int]) -> None:
    """Writes the first two stages' names above the axes, on both sides of where the second
    starts.
    """
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


def _one_after_the_other(
    lines: Sequence[Mapping[str, Any]],
) -> tuple[list[dict[str, Any]], dict[str, int]]:
    """The lines of training and testing with steps counted over all stages, and the step at which
    each stage starts.
    """
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
