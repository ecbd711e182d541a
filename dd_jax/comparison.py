"""Whole measurements of runs, their plots, and many runs side by side: the paper's table and its Figures 5 to 8."""

import json
import pathlib
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dd_jax import baselines, data, evaluation, experiment, measuring, parallel, plots, published, reports, run_log
from dd_jax.attacks.deepfool import deepfool
from dd_jax.configuration import ConfigurationError, flatten
from dd_jax.experiment import DEFENDED, REFERENCE, Experiment
from dd_jax.tables import FGS_FRACTIONS, PAPERS, Row, fgs_name, has_published, markdown_table, text_table

SWEPT = {"deep_defense": "correct_scale", "adversarial_fgsm": "epsilon", "deep_defense_fgsm": "epsilon"}
"""What Figure 6 varies, per defense."""
EXAMPLE_CANDIDATES, EXAMPLE_LABEL = 200, 0  # Figure 7 shows a 0, the first that all nets know, among so many images.
LEADING = "deep_defense"  # Its epsilon of 50 % is the table's epsilon_ref.


class Net(NamedTuple):
    """A row of the comparison: a run's defended net, or the reference that runs share."""

    label: str
    method: str
    run: Experiment
    stage: str
    report: dict[str, Any]

    @property
    def measured(self) -> dict[str, Any]:
        """The figures of this net."""
        return self.report["measured"][self.stage]


def measure_run(run: Experiment, *, names: Sequence[str] | None = None, limit: int | None = None) -> str:
    """Measures both nets of a run, writes report.json and plots/ into its directory, and returns what to print."""
    report = measured_report(run, names=names, limit=limit)
    if not parallel.is_primary():
        return ""
    path = reports.write(report, run.workdir)
    drawn = draw_run(run, report)
    return f"\n{reports.table(report)}\nwritten to {path}" + (f" and {drawn}" if drawn else "")


def all_names(run: Experiment) -> tuple[str, ...]:
    """Every measurement that the run's inputs allow: PASS compares images, and whitened inputs are none."""
    are_images = data.make_to_images(run.preprocessing) is not None
    return tuple(name for name in evaluation.NAMES if name != "pass" or are_images)


def measured_report(run: Experiment, *, names: Sequence[str] | None, limit: int | None) -> dict[str, Any]:
    """The report of a run whose two nets are measured now; a shared reference's figures are taken over."""
    names = tuple(names or all_names(run))
    known = _reference_measured_elsewhere(run, names, limit)
    stages = (REFERENCE, DEFENDED) if known is None else (DEFENDED,)
    measured = {} if known is None else {REFERENCE: known}
    states = {stage: experiment.restore(run, stage) for stage in stages}  # Before hours of measuring: are they there?
    for stage, state in states.items():
        measured[stage] = measuring.measure(run, state, names=names, limit=limit, name=stage)
    return reports.make_report(run, measured, names=names, limit=limit)


def _is_complete(report: dict[str, Any] | None, names: Sequence[str], limit: int | None) -> bool:
    """Whether a report holds at least these measurements, of the same images."""
    return report is not None and set(names) <= set(report.get("names", ())) and report.get("limit") == limit


def _reference_measured_elsewhere(run: Experiment, names: Sequence[str], limit: int | None) -> dict[str, Any] | None:
    """The reference's figures, where the run that it comes from has measured it in the same way."""
    source = pathlib.Path(run.config.reference.source or "/nonexistent")
    report = reports.read(source) if source.is_dir() else None
    if not _is_complete(report, names, limit):
        return None
    relevant = lambda fields: {
        name: value
        for name, value in fields.items()
        if name.startswith(("data.", "model.", "evaluation.")) and name != "data.dir"
    }
    same = relevant(report["config"]) == relevant(flatten(run.config))
    return report["measured"][REFERENCE] if same else None


def draw_run(run: Experiment, report: dict[str, Any]) -> pathlib.Path | None:
    """Draws one run's curves into its plots/; None where there is nothing to draw."""
    folder, lines = run.workdir / "plots", list(run_log.read(run.workdir))
    curves = {row.label: row.measured["fgs_curve"] for row in reports.rows(report) if "fgs_curve" in row.measured}
    trained = any("loss" in line or "test" in line for line in lines)
    if trained:
        plots.single_run(folder, lines)
    if curves:
        plots.success_over_epsilon(folder, {name: _as_pair(curve) for name, curve in curves.items()})
    return folder if trained or curves else None


def _as_pair(curve: dict[str, list[float]]) -> tuple[list[float], list[float]]:
    return curve["epsilons"], curve["success"]


def compare(
    workdirs: Sequence[pathlib.Path],
    out: pathlib.Path,
    *,
    names: Sequence[str] | None = None,
    limit: int | None = None,
    data_dir: str | None = None,
) -> str:
    """Compares runs on the same data and net: the paper's table, and Figures 5 to 8 in `out`. Returns what to print.

    A run without a report of these measurements is measured first. ConfigurationError for directories that are no finished
    runs, or whose data or nets differ.
    """
    first = experiment.open_run(workdirs[0], data_dir)
    runs = [first, *(experiment.open_like(first, workdir) for workdir in workdirs[1:])]
    names = tuple(names or all_names(first))
    runs_reports = []
    for run in runs:
        report = reports.read(run.workdir)
        if not _is_complete(report, names, limit):
            if parallel.is_primary():
                print(f"measuring {run.workdir}", flush=True)
            measure_run(run, names=names, limit=limit)
            report = reports.read(run.workdir)
        runs_reports.append(report)
    nets = list_nets(runs, runs_reports)
    fgs, reference_text = fgs_accuracies(nets, limit) if "fgs" in names else ([{} for _ in nets], "")
    rows = [
        Row(
            net.label,
            net.measured | more,
            published.lookup(first.config.data.name, first.config.model.name, net.method),
        )
        for net, more in zip(nets, fgs, strict=True)
    ]
    notes = [PAPERS] * has_published(rows) + [reference_text] * bool(reference_text)
    notes.append(reports.conditions(nets[0].report))
    if not parallel.is_primary():
        return ""
    out.mkdir(parents=True, exist_ok=True)
    (out / "table.md").write_text("\n\n".join([markdown_table(rows), *notes]) + "\n")
    (out / "table.txt").write_text("\n".join([text_table(rows), *notes]) + "\n")
    figures = {row.label: dict(row.measured) for row in rows}
    (out / "comparison.json").write_text(json.dumps({"figures": figures, "notes": notes}, indent=2) + "\n")
    draw(nets, out)
    return "\n" + "\n".join(
        [text_table(rows), *notes, f"written to {out}: table.txt, table.md, comparison.json, figures"]
    )


def list_nets(runs: Sequence[Experiment], runs_reports: Sequence[dict[str, Any]]) -> list[Net]:
    """The reference (each, where the runs do not share one), then every run's defended net, under distinct labels."""
    nets: list[Net] = []
    for run, report in zip(runs, runs_reports, strict=True):
        if not any(_agree(net.measured, report["measured"][REFERENCE]) for net in nets):
            label = REFERENCE if not nets else f"{REFERENCE} ({run.workdir.name})"
            nets.append(Net(label, REFERENCE, run, REFERENCE, report))
    methods = [run.config.defense.name for run in runs]
    in_order = sorted(zip(runs, runs_reports, methods, strict=True), key=lambda one: baselines.NAMES.index(one[2]))
    for run, report, method in in_order:
        plain = methods.count(method) == 1 or run.workdir.name == method
        label = method if plain else f"{method} ({run.workdir.name})"
        nets.append(Net(label, method, run, DEFENDED, report))
    labels = [net.label for net in nets]
    if len(set(labels)) < len(labels):
        raise ConfigurationError(f"The runs' directories must have different names; these are {', '.join(labels)}.")
    return nets


def _agree(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two measurements of the same images are of the same net: all that both have is the same, but for rounding."""
    shared = [name for name in first.keys() & second.keys() if isinstance(first[name], (int, float))]
    return all(np.isclose(first[name], second[name], rtol=1e-4) for name in shared if second[name] is not None)


def fgs_accuracies(nets: Sequence[Net], limit: int | None) -> tuple[list[dict[str, float]], str]:
    """Each net's accuracy under FGS at fractions of epsilon_ref, and the sentence that says what epsilon_ref is.

    epsilon_ref is where half of the images fall for the Deep Defense net; without such a run, for the reference.
    """
    leading = next((net for net in nets if net.method == LEADING), nets[0])
    epsilon = leading.measured.get("epsilon_half")
    if not epsilon:
        return [{} for _ in nets], f"no FGS accuracies: {leading.label} does not fall to 50 % within fgs_max_epsilon"
    found = []
    for net in nets:
        state = experiment.restore(net.run, net.stage)
        values = measuring.accuracy_under_fgs(
            net.run, state, [epsilon * x for x in FGS_FRACTIONS], limit=limit, name=net.label
        )
        found.append({fgs_name(x): value for x, value in zip(FGS_FRACTIONS, values, strict=True)})
    return found, f"epsilon_ref = {epsilon:.4g}, where half of the images fall for {leading.label} under FGS"


def draw(nets: Sequence[Net], out: pathlib.Path) -> None:
    """Figures 5 to 8, as far as the runs hold what they show."""
    if curves := {net.label: _as_pair(net.measured["fgs_curve"]) for net in nets if "fgs_curve" in net.measured}:
        plots.success_over_epsilon(out, curves)
    if "rho_l2" in nets[0].measured:
        points: dict[str, list] = {}
        for net in nets:
            swept = SWEPT.get(net.method) if net.stage == DEFENDED else None
            value = float(net.run.config.defense[swept]) if swept else None
            points.setdefault(net.method, []).append((net.measured["accuracy"], net.measured["rho_l2"], value))
        plots.robustness_over_accuracy(out, points)
    if histories := {net.label: history for net in nets if net.stage == DEFENDED and (history := epochs(net))}:
        plots.training_over_epochs(out, histories)
    if (found := fooling_examples(nets)) is not None:
        image, examples, label = found
        plots.fooling_examples(out, image, examples, label=label)


def epochs(net: Net) -> list[tuple[float, float, float]]:
    """(epoch, accuracy, rho_2) of a run's fine-tuning; empty where it was not measured after its epochs."""
    lines = [line for line in run_log.read(net.run.workdir) if line["stage"] == net.stage and "test" in line]
    return [(line["epoch"], line["test"]["accuracy"], line["test"]["rho_l2"]) for line in lines]


def fooling_examples(nets: Sequence[Net]) -> tuple[np.ndarray, list[plots.Example], str] | None:
    """An image that every net knows, DeepFool's example against each, and its class; None for inputs that are no images."""
    run = nets[0].run
    to_images = data.make_to_images(run.preprocessing)
    if to_images is None:
        return None
    batch = next(iter(run.feed.test_examples().batches(EXAMPLE_CANDIDATES, EXAMPLE_CANDIDATES)))
    inputs, labels = (batch[name][batch["mask"] > 0] for name in ("image", "label"))
    settings = experiment.evaluation_settings(run.config)
    options = dict(num_steps=settings.num_steps, overshoot=settings.overshoot, num_candidates=settings.num_candidates)

    @jax.jit
    def attack(variables: Any, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        logits_fn = partial(measuring.apply_fn(run.model, run.config.model.compute_dtype), variables)
        found = deepfool(logits_fn, x, **options)
        classes = [jnp.argmax(logits_fn(at), axis=-1) for at in (x, x + found.perturbation)]
        return found.perturbation, *classes

    attacked = []
    for net in nets:
        state = experiment.restore(net.run, net.stage)
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        attacked.append(jax.device_get(attack(variables, inputs)))
    usable = np.all([(before == labels) & (after != labels) for _, before, after in attacked], axis=0)
    if not usable.any():
        return None
    index = int(np.argmax(usable & (labels == EXAMPLE_LABEL))) if (usable & (labels == EXAMPLE_LABEL)).any() else None
    index = int(np.argmax(usable)) if index is None else index
    image = lambda x: to_images(x[None])[0]
    size = np.linalg.norm(inputs[index])
    examples = [
        plots.Example(
            net.label,
            image(inputs[index] + found[index]),
            str(after[index]),
            float(np.linalg.norm(found[index]) / size),
        )
        for net, (found, _, after) in zip(nets, attacked, strict=True)
    ]
    return image(inputs[index]), examples, str(labels[index])
