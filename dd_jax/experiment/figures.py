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

PLOTS = "plots"
"""The folder of a run directory with its figures."""
LABELS = {name: defense.label for name, defense in defenses.DEFENSES.items()}
SYMBOLS = {name: defense.swept_symbol for name, defense in defenses.DEFENSES.items()}
# Examples are the first that all nets classify rightly, among so many images, one per class.
EXAMPLE_CANDIDATES, NUM_EXAMPLES = 200, 4
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


def draw_run(
    workdir: pathlib.Path, report: Report, unit: str, examples: Sequence[Examples]
) -> list[pathlib.Path]:
    """Draws one run's curves, and its first example, into its plots/; returns what was drawn, PNG
    files. `unit`: of epsilon.
    """
    folder, lines = workdir / PLOTS, list(log.read_lines(workdir))
    measured = {row.label: row.measured for row in rows(report)}
    labels = legend_labels(list(measured))
    drawn = [*_draw_measured(folder, measured, unit=unit, labels=labels)]
    if any("loss" in line or "test" in line for line in lines):
        drawn += plots.single_run(folder, lines)
    drawn += _draw_examples(folder, examples, labels)
    return [path for path in drawn if path.suffix == ".png"]


def legend_labels(names: Sequence[str]) -> dict[str, str]:
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


def _draw_measured(folder: pathlib.Path, measured: Measured, **options: Any) -> list[pathlib.Path]:
    """Draws Figure 5 and robust accuracy over epsilon, as far as they were measured."""
    drawn: list[pathlib.Path] = []
    if success := _curves(measured):
        drawn += plots.success_over_epsilon(folder, success, **options)
    curves: dict[str, dict[str, Any]] = {}
    points: dict[str, dict[str, list]] = {}
    for label, figures in measured.items():
        for norm, curve in robustness.curves(figures).items():
            curves.setdefault(norm, {})[label] = robustness.line(curve)
        for norm, epsilon, _, accuracy, _ in robustness.points(figures):
            points.setdefault(norm, {}).setdefault(label, []).append((epsilon, accuracy))
    if curves or points:
        drawn += plots.robust_accuracy_over_epsilon(folder, curves, points=points, **options)
    return drawn


def _draw_examples(
    folder: pathlib.Path, examples: Sequence[Examples], labels: dict[str, str]
) -> Sequence[pathlib.Path]:
    """Draws Figure 7, of the first image."""
    if not examples:
        return ()
    image, fooling, label = examples[0]
    return plots.fooling_examples(folder, image, fooling, label=label, labels=labels)


def draw_comparison(
    nets: Sequence[Net], out: pathlib.Path, examples: Sequence[Examples]
) -> list[pathlib.Path]:
    """Figures 5 to 8 and robust accuracy over epsilon, as far as the runs hold what they show;
    returns what was drawn, PNG files. `examples`: `fooling_examples(nets)`.
    """
    labels = legend_labels([net.label for net in nets])
    measured = {net.label: net.measured for net in nets}
    unit = nets[0].run.facts.input_unit
    drawn = _draw_measured(out, measured, unit=unit, labels=labels)
    if points := strengths(nets):
        options = dict(strength_symbols=SYMBOLS, labels=labels)
        drawn += plots.robustness_over_accuracy(out, points, **options)
    histories = {net.label: epochs(net) for net in nets if net.stage == DEFENDED}
    if histories := {label: history for label, history in histories.items() if history}:
        drawn += plots.training_over_epochs(out, histories, labels=labels)
    drawn += _draw_examples(out, examples, labels)
    return [path for path in drawn if path.suffix == ".png"]


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


def fooling_examples(nets: Sequence[Net]) -> list[Examples]:
    """Images of different classes that every net classifies rightly, each with DeepFool's example
    against every net and its class; none for inputs that are no images.
    """
    to_images = data.make_to_images(nets[0].run.preprocessing)
    if to_images is None:
        return []
    found = [_attacked(net) for net in nets]
    image = lambda x: to_images(x[None])[0]
    shown: list[Examples] = []
    for index in _example_indices(found):
        original = found[0]["image"][index]
        examples = [
            _example(net.label, original, attacked, index, image)
            for net, attacked in zip(nets, found, strict=True)
        ]
        shown.append((image(original), examples, str(found[0]["label"][index])))
    return shown


def _attacked(net: Net) -> dict[str, np.ndarray]:
    variables = variables_of(restore_state(net.run, net.stage))
    return net.run.evaluator.deepfool_examples(variables, EXAMPLE_CANDIDATES)


def _example_indices(found: Sequence[dict[str, np.ndarray]]) -> list[int]:
    """The first image of each of NUM_EXAMPLES classes, in the order of classes, that all nets
    classify rightly and that DeepFool changes for all of them.
    """
    labels = found[0]["label"]
    usable = np.all(
        [(each["before"] == labels) & (each["after"] != labels) for each in found], axis=0
    )
    _, first = np.unique(labels[usable], return_index=True)
    return np.flatnonzero(usable)[first][:NUM_EXAMPLES].tolist()


def _example(
    label: str, original: np.ndarray, attacked: dict[str, np.ndarray], index: int, image: Any
) -> plots.Example:
    perturbation = attacked["perturbation"][index]
    rho = float(np.linalg.norm(perturbation) / np.linalg.norm(original))
    return plots.Example(label, image(original + perturbation), str(attacked["after"][index]), rho)
