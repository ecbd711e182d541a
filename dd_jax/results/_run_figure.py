"""The curves of one run: loss, accuracy and rho_2 over its steps."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from dd_jax.results import _drawing as drawing
from dd_jax.results._drawing import Paths
from dd_jax.results._styles import COLUMN_WIDTH, RHO, Look, style

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
