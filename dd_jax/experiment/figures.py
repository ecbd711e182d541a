"""The paper's Figures 5 to 8, and a run's curves, from the runs that hold what they show."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dd_jax import data, defenses, log
from dd_jax.experiment.build import Run, restore_state
from dd_jax.experiment.measuring import variables_of
from dd_jax.results import curves as robustness
from dd_jax.results import plots
from dd_jax.results.report import DEFENDED, Report, rows

LABELS = {name: defense.label for name, defense in defenses.DEFENSES.items()}
SYMBOLS = {name: defense.swept_symbol for name, defense in defenses.DEFENSES.items()}
# Figure 7 shows a 0, the first that all nets classify rightly, among so many images.
EXAMPLE_CANDIDATES, EXAMPLE_LABEL = 200, 0
Measured = Mapping[str, Mapping[str, Any]]
"""The figures of each net."""
Examples = tuple[np.ndarray, list[plots.Example], str]
"""An image, the examples that fool the nets, and the image's class."""


class Net(NamedTuple):
    """A row of a comparison: a run's defended net, or the reference that runs share."""

    label: str
    method: str
    run: Run
    stage: str
    report: Report

    @property
    def measured(self) -> dict[str, Any]:
        """The figures of this net."""
        return self.report.measured[self.stage]


def draw_run(workdir: pathlib.Path, report: Report, unit: str) -> pathlib.Path | None:
    """Draws one run's curves into its plots/; None where there is nothing to draw. `unit`: of
    epsilon.
    """
    folder, lines = workdir / "plots", list(log.read_lines(workdir))
    measured = {row.label: row.measured for row in rows(report)}
    curves = _curves(measured)
    trained = any("loss" in line or "test" in line for line in lines)
    if trained:
        plots.single_run(folder, lines)
    labels = _legend_labels(list(measured))
    if curves:
        plots.success_over_epsilon(folder, curves, unit=unit, labels=labels)
    is_robust = _draw_robust_accuracies(folder, measured, unit=unit, labels=labels)
    return folder if trained or curves or is_robust else None


def _legend_labels(names: Sequence[str]) -> dict[str, str]:
    """The labels of defenses and of the reference; other nets keep their own names."""
    return {"reference": "Reference"} | {name: LABELS[name] for name in names if name in LABELS}


def _curves(measured: Measured) -> dict[str, tuple[list[float], list[float]]]:
    """Epsilons and success rates of the nets whose FGSM curve was measured."""
    pair = lambda curve: (curve["epsilons"], curve["success"])
    return {
        label: pair(figures["fgsm_curve"])
        for label, figures in measured.items()
        if "fgsm_curve" in figures
    }


def _draw_robust_accuracies(folder: pathlib.Path, measured: Measured, **options: Any) -> bool:
    """Draws robust accuracy over epsilon; whether any net has a curve, or a point by AutoAttack."""
    curves: dict[str, dict[str, Any]] = {}
    points: dict[str, dict[str, list]] = {}
    for label, figures in measured.items():
        for norm, curve in robustness.curves(figures).items():
            curves.setdefault(norm, {})[label] = robustness.line(curve)
        for norm, epsilon, _, accuracy, _ in robustness.points(figures):
            points.setdefault(norm, {}).setdefault(label, []).append((epsilon, accuracy))
    if curves or points:
        plots.robust_accuracy_over_epsilon(folder, curves, points=points, **options)
    return bool(curves or points)


def draw_comparison(nets: Sequence[Net], out: pathlib.Path, found: Examples | None) -> None:
    """Figures 5 to 8, as far as the runs hold what they show; `found`: `fooling_examples(nets)`."""
    labels = _legend_labels([net.label for net in nets])
    measured = {net.label: net.measured for net in nets}
    unit = nets[0].run.facts.input_unit
    if curves := _curves(measured):
        plots.success_over_epsilon(out, curves, unit=unit, labels=labels)
    _draw_robust_accuracies(out, measured, unit=unit, labels=labels)
    if points := strengths(nets):
        options = dict(strength_symbols=SYMBOLS, labels=labels)
        plots.robustness_over_accuracy(out, points, **options)
    histories = {net.label: epochs(net) for net in nets if net.stage == DEFENDED}
    if histories := {label: history for label, history in histories.items() if history}:
        plots.training_over_epochs(out, histories, labels=labels)
    if found is not None:
        image, examples, label = found
        plots.fooling_examples(out, image, examples, label=label, labels=labels)


def strengths(nets: Sequence[Net]) -> dict[str, list[tuple[float, float, float | None]]]:
    """(accuracy, rho_2, strength) of every method's nets; the strength where it is what differs
    between them, else None.
    """
    points: dict[str, list] = {}
    for net in nets:
        if "rho_l2" in net.measured:
            value = net.run.facts.strength if net.method in defenses.DEFENSES else None
            name = net.method if net.stage == DEFENDED else net.label
            figures = net.measured["accuracy"], net.measured["rho_l2"], value
            points.setdefault(name, []).append(figures)
    values = {name: {value for *_, value in several} for name, several in points.items()}
    distinct = {name: len(values[name]) == len(several) > 1 for name, several in points.items()}
    return {
        name: [(*figures, value if distinct[name] else None) for *figures, value in several]
        for name, several in points.items()
    }


def epochs(net: Net) -> list[tuple[float, float, float]]:
    """(epoch, accuracy, rho_2) of a run's fine-tuning; empty where it was not measured after its
    epochs.
    """
    return [
        (line["epoch"], line["test"]["accuracy"], line["test"]["rho_l2"])
        for line in log.read_lines(net.run.workdir)
        if line["stage"] == net.stage and "test" in line
    ]


def fooling_examples(nets: Sequence[Net]) -> Examples | None:
    """An image that every net classifies rightly, DeepFool's example against each, and its class;
    None where there is none, and for inputs that are no images.
    """
    to_images = data.make_to_images(nets[0].run.preprocessing)
    if to_images is None:
        return None
    found = [_attacked(net) for net in nets]
    index = _example_index(found)
    if index is None:
        return None
    image = lambda x: to_images(x[None])[0]
    original = found[0]["image"][index]
    examples = [
        _example(net.label, original, attacked, index, image)
        for net, attacked in zip(nets, found, strict=True)
    ]
    return image(original), examples, str(found[0]["label"][index])


def _attacked(net: Net) -> dict[str, np.ndarray]:
    variables = variables_of(restore_state(net.run, net.stage))
    return net.run.evaluator.deepfool_examples(variables, EXAMPLE_CANDIDATES)


def _example_index(found: Sequence[dict[str, np.ndarray]]) -> int | None:
    """The first image of class EXAMPLE_LABEL, else of any class, that all nets classify rightly and
    that DeepFool changes for all of them.
    """
    labels = found[0]["label"]
    usable = np.all(
        [(each["before"] == labels) & (each["after"] != labels) for each in found], axis=0
    )
    preferred = usable & (labels == EXAMPLE_LABEL)
    chosen = preferred if preferred.any() else usable
    return int(np.argmax(chosen)) if chosen.any() else None


def _example(
    label: str, original: np.ndarray, attacked: dict[str, np.ndarray], index: int, image: Any
) -> plots.Example:
    perturbation = attacked["perturbation"][index]
    rho = float(np.linalg.norm(perturbation) / np.linalg.norm(original))
    return plots.Example(label, image(original + perturbation), str(attacked["after"][index]), rho)
