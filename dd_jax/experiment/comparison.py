"""Whole measurements of runs, their plots, and many runs side by side: the paper's table and its
Figures 5 to 8.
"""

import hashlib
import itertools
import json
import pathlib
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from dd_jax import data, defenses, evaluation, log, parallel
from dd_jax.attacks._deepfool import deepfool
from dd_jax.evaluation import metrics
from dd_jax.evaluation.verification import predicted_classes
from dd_jax.experiment import build, measuring
from dd_jax.experiment.build import DEFENDED, REFERENCE, Experiment
from dd_jax.experiment.configuration import ConfigurationError, flatten
from dd_jax.results import plots, reports
from dd_jax.results.tables import (
    FGSM_FRACTIONS,
    PAPERS,
    Row,
    fgsm_name,
    has_published,
    markdown_table,
    text_table,
)

SWEPT = {
    "deep_defense": "correct_scale",
    "adversarial_fgsm": "epsilon",
    "deep_defense_fgsm": "epsilon",
}
"""What Figure 6 varies, per defense."""
UNITS = {"contrast_whiten": "of whitened inputs", "torchvision": "of normalized inputs"}
# Figure 7 shows a 0, the first that all nets know, among so many images.
EXAMPLE_CANDIDATES, EXAMPLE_LABEL = 200, 0
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


def measure_run(
    run: Experiment, *, names: Sequence[str] | None = None, limit: int | None = None
) -> str:
    """Measures both nets of a run, writes report.json and plots/ into its directory, and returns
    what to print.
    """
    report = measured_report(run, names=names, limit=limit)
    if not parallel.is_primary():
        return ""
    path = reports.write(report, run.workdir)
    drawn = draw_run(run, report)
    return f"\n{reports.table(report)}\nwritten to {path}" + (f" and {drawn}" if drawn else "")


def all_names(run: Experiment) -> tuple[str, ...]:
    """Every measurement that the run's inputs allow: PASS compares images, and whitened inputs are
    none.
    """
    are_images = data.make_to_images(run.preprocessing) is not None
    return tuple(name for name in evaluation.NAMES if name != "pass" or are_images)


def checked_names(run: Experiment, names: Sequence[str] | None) -> tuple[str, ...]:
    """The measurements asked for, all if None; ConfigurationError for one that the run's inputs do
    not allow.
    """
    allowed = all_names(run)
    if refused := set(names or ()) - set(allowed):
        raise ConfigurationError(
            f"{', '.join(refused)} cannot be measured of {run.workdir}, whose inputs are no images."
        )
    return tuple(names or allowed)


def measured_report(
    run: Experiment, *, names: Sequence[str] | None, limit: int | None
) -> dict[str, Any]:
    """The report of a run whose two nets are measured now; a shared reference's figures are taken
    over.
    """
    names = checked_names(run, names)
    known = _reference_measured_elsewhere(run, names, limit)
    stages = (REFERENCE, DEFENDED) if known is None else (DEFENDED,)
    measured = {} if known is None else {REFERENCE: known}
    # Before hours of measuring: are they there?
    states = {stage: build.restore(run, stage) for stage in stages}
    for stage, state in states.items():
        measured[stage] = measuring.measure(run, state, names=names, limit=limit, name=stage)
    return reports.make_report(run, measured, names=names, limit=limit)


def _is_complete(report: dict[str, Any] | None, names: Sequence[str]) -> bool:
    """Whether a report holds at least these measurements."""
    return report is not None and set(names) <= set(report["names"])


def _reference_measured_elsewhere(
    run: Experiment, names: Sequence[str], limit: int | None
) -> dict[str, Any] | None:
    """The reference's figures, where the run that it comes from has measured it in the same way."""
    source = pathlib.Path(run.config.reference.source or "/nonexistent")
    report = reports.read(source, limit)
    if not _is_complete(report, names):
        return None
    same = build.how_measured(report["config"]) == build.how_measured(flatten(run.config))
    return report["measured"][REFERENCE] if same else None


def draw_run(run: Experiment, report: dict[str, Any]) -> pathlib.Path | None:
    """Draws one run's curves into its plots/; None where there is nothing to draw."""
    folder, lines = run.workdir / "plots", list(log.read_lines(run.workdir))
    curves = {
        row.label: row.measured["fgsm_curve"]
        for row in reports.rows(report)
        if "fgsm_curve" in row.measured
    }
    trained = any("loss" in line or "test" in line for line in lines)
    if trained:
        plots.single_run(folder, lines)
    if curves:
        plots.success_over_epsilon(
            folder, {name: _as_pair(curve) for name, curve in curves.items()}
        )
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
    """Compares runs on the same data and net: the paper's table, and Figures 5 to 8 in `out`.
    Returns what to print.

    A run without a report of these measurements is measured first. ConfigurationError, before that,
    for directories that are no finished runs, or whose data, nets or settings of the measurements
    differ.
    """
    first = build.open_run(workdirs[0], data_dir)
    runs = [first, *(build.open_like(first, workdir) for workdir in workdirs[1:])]
    names = checked_names(first, names)
    for run, stage in itertools.product(runs, (REFERENCE, DEFENDED)):
        build.check_finished(run, stage)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"--out {out} cannot be made ({error.strerror}); it must be a directory."
        ) from error
    runs_reports = []
    for run in runs:
        report = reports.read(run.workdir, limit)
        if not _is_complete(report, names):
            if parallel.is_primary():
                print(f"measuring {run.workdir}", flush=True)
            measure_run(run, names=names, limit=limit)
            parallel.wait_for_all(f"measured {run.workdir}")
            report = reports.read(run.workdir, limit)
        runs_reports.append(report)
    nets = list_nets(runs, runs_reports)
    fgsm, reference_text = (
        fgsm_accuracies(nets, limit) if "fgsm" in names else ([{} for _ in nets], "")
    )
    rows = [
        Row(net.label, net.measured | more, build.paper_row(first.config, net.method))
        for net, more in zip(nets, fgsm, strict=True)
    ]
    notes = [PAPERS] * has_published(rows) + [reference_text] * bool(reference_text)
    notes += [sentence for row in rows for sentence in metrics.remarks(row.measured, row.label)]
    notes.append(reports.conditions(*(report for report in runs_reports)))
    if not parallel.is_primary():
        return ""
    (out / "table.md").write_text("\n\n".join([markdown_table(rows), *notes]) + "\n")
    (out / "table.txt").write_text("\n".join([text_table(rows), *notes]) + "\n")
    figures = {row.label: dict(row.measured) for row in rows}
    (out / "comparison.json").write_text(
        json.dumps({"figures": figures, "notes": notes}, indent=2) + "\n"
    )
    draw(nets, out)
    return "\n" + "\n".join(
        [
            text_table(rows),
            *notes,
            f"written to {out}: table.txt, table.md, comparison.json, figures",
        ]
    )


def list_nets(runs: Sequence[Experiment], runs_reports: Sequence[dict[str, Any]]) -> list[Net]:
    """The reference (each, where the runs do not share one), then every run's defended net, under
    distinct labels.
    """
    references: dict[bytes, Net] = {}
    for run, report in zip(runs, runs_reports, strict=True):
        label = REFERENCE if not references else f"{REFERENCE} ({run.workdir.name})"
        references.setdefault(_fingerprint(run), Net(label, REFERENCE, run, REFERENCE, report))
    nets = list(references.values())
    methods = [run.config.defense.name for run in runs]
    in_order = sorted(
        zip(runs, runs_reports, methods, strict=True), key=lambda one: defenses.NAMES.index(one[2])
    )
    for run, report, method in in_order:
        plain = methods.count(method) == 1 or run.workdir.name == method
        label = method if plain else f"{method} ({run.workdir.name})"
        nets.append(Net(label, method, run, DEFENDED, report))
    labels = [net.label for net in nets]
    if len(set(labels)) < len(labels):
        raise ConfigurationError(
            f"The runs' directories must have different names; these are {', '.join(labels)}."
        )
    return nets


def _fingerprint(run: Experiment) -> bytes:
    """Equal for runs with the same reference net, to the last bit."""
    state, digest = build.restore(run, REFERENCE), hashlib.sha256()
    for leaf in jax.tree.leaves(jax.device_get((state.params, state.batch_stats))):
        digest.update(leaf.tobytes())
    return digest.digest()


def fgsm_accuracies(nets: Sequence[Net], limit: int | None) -> tuple[list[dict[str, float]], str]:
    """Each net's accuracy under FGSM at fractions of epsilon_ref, and the sentence that says what
    epsilon_ref is.

    epsilon_ref is where half of the images fall for the Deep Defense net; without such a run, for
    the reference.
    """
    leading = next((net for net in nets if net.method == LEADING), nets[0])
    epsilon = leading.measured.get("epsilon_half")
    if not epsilon:
        is_low = (
            "is at 50 % or below without an attack"
            if epsilon == 0
            else "does not fall to 50 % within fgsm_max_epsilon"
        )
        return [{} for _ in nets], f"no FGSM accuracies: {leading.label} {is_low}"
    found = []
    for net in nets:
        state = build.restore(net.run, net.stage)
        values = measuring.accuracy_under_fgsm(
            net.run, state, [epsilon * x for x in FGSM_FRACTIONS], limit=limit, name=net.label
        )
        found.append({fgsm_name(x): value for x, value in zip(FGSM_FRACTIONS, values, strict=True)})
    return (
        found,
        f"epsilon_ref = {epsilon:.4g}, where half of the images fall for {leading.label} under "
        f"FGSM",
    )


def draw(nets: Sequence[Net], out: pathlib.Path) -> None:
    """Figures 5 to 8, as far as the runs hold what they show."""
    if curves := {
        net.label: _as_pair(net.measured["fgsm_curve"])
        for net in nets
        if "fgsm_curve" in net.measured
    }:
        plots.success_over_epsilon(
            out, curves, unit=UNITS.get(nets[0].run.preprocessing.name, "pixel range = 1")
        )
    if points := strengths(nets):
        plots.robustness_over_accuracy(out, points)
    if histories := {
        net.label: history for net in nets if net.stage == DEFENDED and (history := epochs(net))
    }:
        plots.training_over_epochs(out, histories)
    if (found := fooling_examples(nets)) is not None:
        image, examples, label = found
        plots.fooling_examples(out, image, examples, label=label)


def strengths(nets: Sequence[Net]) -> dict[str, list[tuple[float, float, float | None]]]:
    """(accuracy, rho_2, strength) of every method's nets; the strength where it is what differs
    between them, else None.
    """
    points: dict[str, list] = {}
    for net in nets:
        if "rho_l2" in net.measured:
            swept = SWEPT.get(net.method)
            value = float(net.run.config.defense[swept]) if swept else None
            name = net.method if net.stage == DEFENDED else net.label
            points.setdefault(name, []).append(
                (net.measured["accuracy"], net.measured["rho_l2"], value)
            )
    values = {name: {value for *_, value in rows} for name, rows in points.items()}
    distinct = {name: len(values[name]) == len(rows) > 1 for name, rows in points.items()}
    return {
        name: [(*figures, value if distinct[name] else None) for *figures, value in rows]
        for name, rows in points.items()
    }


def epochs(net: Net) -> list[tuple[float, float, float]]:
    """(epoch, accuracy, rho_2) of a run's fine-tuning; empty where it was not measured after its
    epochs.
    """
    lines = [
        line
        for line in log.read_lines(net.run.workdir)
        if line["stage"] == net.stage and "test" in line
    ]
    return [(line["epoch"], line["test"]["accuracy"], line["test"]["rho_l2"]) for line in lines]


def fooling_examples(nets: Sequence[Net]) -> tuple[np.ndarray, list[plots.Example], str] | None:
    """An image that every net knows, DeepFool's example against each, and its class; None for
    inputs that are no images.
    """
    run = nets[0].run
    to_images = data.make_to_images(run.preprocessing)
    if to_images is None:
        return None
    batch_size = min(run.config.evaluation.batch_size, EXAMPLE_CANDIDATES)
    batches = list(run.feed.test_examples().batches(EXAMPLE_CANDIDATES, batch_size))
    inputs, labels = (
        np.concatenate([batch[name][batch["mask"] > 0] for batch in batches])
        for name in ("image", "label")
    )
    settings = build.evaluation_settings(run.config)
    options = {
        name: getattr(settings, name)
        for name in ("num_steps", "overshoot", "num_candidates", "class_chunk_size")
    }

    net_of = partial(partial, measuring.apply_fn(run.model, run.config.model.compute_dtype))
    attack = jax.jit(lambda variables, x: deepfool(net_of(variables), x, **options).perturbation)
    # Compiled apart from the attack.
    classes = jax.jit(lambda variables, x: predicted_classes(net_of(variables), x))

    def attack_and_ask(variables: Any, x: np.ndarray) -> tuple[jax.Array, jax.Array, jax.Array]:
        perturbation = attack(variables, x)
        return perturbation, classes(variables, x), classes(variables, x + perturbation)

    attacked = []
    for net in nets:
        state = build.restore(net.run, net.stage)
        variables = {"params": state.params, "batch_stats": state.batch_stats}
        found = [jax.device_get(attack_and_ask(variables, batch["image"])) for batch in batches]
        kept = [
            [part[batch["mask"] > 0] for part in parts]
            for parts, batch in zip(found, batches, strict=True)
        ]
        attacked.append([np.concatenate(parts) for parts in zip(*kept, strict=True)])
    usable = np.all(
        [(before == labels) & (after != labels) for _, before, after in attacked], axis=0
    )
    if not usable.any():
        return None
    index = (
        int(np.argmax(usable & (labels == EXAMPLE_LABEL)))
        if (usable & (labels == EXAMPLE_LABEL)).any()
        else None
    )
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
