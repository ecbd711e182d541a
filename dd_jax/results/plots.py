"""Draws Figures 5 to 8 of the paper, robust accuracy over epsilon, and the curves of one run, from
the contents of report.json and metrics.jsonl.

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

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from dd_jax import extras

with extras.needed("plots"):
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    from dd_jax.results import _drawing as drawing
    from dd_jax.results._drawing import Numbers, Paths, Points
    from dd_jax.results._example_figure import Example, fooling_examples, fooling_examples_figure
    from dd_jax.results._robustness_figures import (
        robust_accuracy_over_epsilon,
        robust_accuracy_over_epsilon_figure,
        robustness_over_accuracy,
        robustness_over_accuracy_figure,
    )
    from dd_jax.results._run_figure import single_run, single_run_figure
    from dd_jax.results._styles import COLUMN_WIDTH, RHO, TEXT_WIDTH, legend_names, looks, style

__all__ = [
    "Example",
    "fooling_examples",
    "fooling_examples_figure",
    "robust_accuracy_over_epsilon",
    "robust_accuracy_over_epsilon_figure",
    "robustness_over_accuracy",
    "robustness_over_accuracy_figure",
    "single_run",
    "single_run_figure",
    "success_over_epsilon",
    "success_over_epsilon_figure",
    "training_over_epochs",
    "training_over_epochs_figure",
]


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
    series = {
        name: drawing.sort(drawing.pairs(name, curve, "epsilons and success rates"), 0)
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
