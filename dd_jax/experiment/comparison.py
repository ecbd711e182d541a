"""Whole measurements of runs, and many runs side by side: the paper's table."""

import hashlib
import itertools
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from dd_jax import data, defenses, evaluation, parallel
from dd_jax.evaluation import remarks
from dd_jax.experiment.build import Run, check_finished, open_run, open_run_like, restore_state
from dd_jax.experiment.configuration import ConfigurationError
from dd_jax.experiment.figures import PLOTS, Net, fooling_examples
from dd_jax.experiment.measuring import measure_state, variables_of
from dd_jax.experiment.pages import write_comparison_page, write_run_page
from dd_jax.experiment.plans import how_measured
from dd_jax.experiment.reporting import add_to_report, make_report
from dd_jax.results.curves import AUTOATTACK, points
from dd_jax.results.report import (
    DEFENDED,
    REFERENCE,
    Report,
    as_json,
    conditions,
    has_figures,
    read_report,
    table,
)
from dd_jax.results.tables import (
    FGSM_FRACTIONS,
    PAPERS,
    Row,
    fgsm_name,
    has_published,
    markdown_table,
    text_table,
)

LEADING = "deep_defense"  # Its epsilon of 50 % is the table's epsilon_ref.
Names = Sequence[str]
Paths = Sequence[pathlib.Path]


def measure_run(run: Run, *, names: Names | None = None, limit: int | None = None) -> str:
    """Measures both nets of a run, writes report.json, report.html and plots/ into its directory,
    and returns what to print.
    """
    report, path = add_to_report(run, measured_report(run, names=names, limit=limit))
    page = write_run_page(run, report)
    written = f"{path}, {page.name} and {PLOTS}/"
    return f"\n{table(report)}\nwritten to {written}" if parallel.is_primary() else ""


def all_names(run: Run) -> tuple[str, ...]:
    """Every measurement that the run's inputs allow: PASS compares images, and whitened inputs are
    none.
    """
    are_images = data.make_to_images(run.preprocessing) is not None
    return tuple(name for name in evaluation.NAMES if name != "pass" or are_images)


def default_names(run: Run) -> tuple[str, ...]:
    """The same without AutoAttack, which takes far longer than all others."""
    return tuple(name for name in all_names(run) if name != AUTOATTACK)


def checked_names(run: Run, names: Names | None) -> tuple[str, ...]:
    """The measurements asked for, all but AutoAttack if None; ConfigurationError for one that the
    run's inputs do not allow.
    """
    allowed = all_names(run)
    refused = set(names or ()) - set(allowed)
    if refused:
        raise ConfigurationError(
            f"{', '.join(refused)} cannot be measured of {run.workdir}, whose inputs are no images."
        )
    return tuple(names or default_names(run))


def measured_report(run: Run, *, names: Names | None, limit: int | None) -> Report:
    """The report of a run whose two nets are measured now; the figures of a reference that runs
    share are taken from where they are.
    """
    names = checked_names(run, names)
    known = _reference_measured_elsewhere(run, names, limit)
    stages = (REFERENCE, DEFENDED) if known is None else (DEFENDED,)
    measured = {} if known is None else {REFERENCE: known}
    # Before hours of measuring: are they there?
    states = {stage: restore_state(run, stage) for stage in stages}
    for stage, state in states.items():
        options: dict[str, Any] = dict(names=names, limit=limit, name=stage)
        options["save_in"] = run.workdir
        measured[stage] = measure_state(run.evaluator, state, **options)
    return make_report(run, measured, names=names, limit=limit)


def _is_complete(run: Run, report: Report | None, names: Names) -> bool:
    """Whether a report holds at least these measurements of both nets; AutoAttack's in the run's
    ball.
    """
    if report is None:
        return False
    asked, ball = [name for name in names if name != AUTOATTACK], run.evaluator.autoattack[:3]

    def holds(stage: str) -> bool:
        found = [point[:3] for point in points(report.measured.get(stage, {}))]
        return has_figures(report, stage, asked) and (AUTOATTACK not in names or ball in found)

    return holds(REFERENCE) and holds(DEFENDED)


def _reference_measured_elsewhere(
    run: Run, names: Names, limit: int | None
) -> dict[str, Any] | None:
    """The reference's figures, where the run that it comes from has measured it in the same way."""
    if run.reference_source is None:
        return None
    report = read_report(run.reference_source, limit)
    if report is None or not _is_complete(run, report, names):
        return None
    same = how_measured(report.config) == how_measured(run.facts.config)
    return report.measured[REFERENCE] if same else None


def compare(
    workdirs: Paths,
    out: pathlib.Path,
    *,
    names: Names | None = None,
    limit: int | None = None,
    data_dir: str | None = None,
    overrides: Sequence[str] = (),
) -> str:
    """Compares runs on the same data and net: the paper's table, and Figures 5 to 8 in `out`.
    Returns what to print.

    A run without a report of these measurements is measured first. ConfigurationError, before that,
    for directories that are no finished runs, or whose data, nets or settings of the measurements
    differ.
    """
    first = open_run(workdirs[0], data_dir, overrides)
    runs = [first, *(open_run_like(first, workdir, overrides) for workdir in workdirs[1:])]
    names = checked_names(first, names)
    for run, stage in itertools.product(runs, (REFERENCE, DEFENDED)):
        check_finished(run, stage)
    _make_directory(out)
    reports = [_complete_report(run, names, limit) for run in runs]
    nets = list_nets(runs, reports)
    rows, notes = table_of(nets, names, limit)
    notes.append(conditions(*reports))
    examples = fooling_examples(nets)  # All processes measure; one writes.
    if not parallel.is_primary():
        return ""
    _write_tables(rows, notes, out)
    write_comparison_page(nets, rows, notes, examples, out)
    written = f"written to {out}: table.txt, table.md, comparison.json, comparison.html, figures"
    return "\n" + "\n".join([text_table(rows), *notes, written])


def _make_directory(out: pathlib.Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"--out {out} cannot be made ({error.strerror}); it must be a directory."
        ) from error


def _complete_report(run: Run, names: Names, limit: int | None) -> Report:
    """The run's report, after measuring what it lacks."""
    report = read_report(run.workdir, limit)
    if report is not None and _is_complete(run, report, names):
        return report
    if parallel.is_primary():
        print(f"measuring {run.workdir}", flush=True)
    measure_run(run, names=names, limit=limit)
    parallel.wait_for_all(f"measured {run.workdir}")
    report = read_report(run.workdir, limit)
    assert report is not None  # Just written.
    return report


def table_of(nets: Sequence[Net], names: Names, limit: int | None) -> tuple[list[Row], list[str]]:
    """The rows of the comparison's table, and the sentences below it."""
    more: list[dict[str, float]] = [{} for _ in nets]
    text = ""
    if "fgsm" in names:
        more, text = fgsm_accuracies(nets, limit)
    published = nets[0].run.facts.published
    rows = [
        Row(net.label, net.measured | figures, published.get(net.method))
        for net, figures in zip(nets, more, strict=True)
    ]
    notes = [PAPERS] * has_published(rows) + [text] * bool(text)
    notes += [sentence for row in rows for sentence in remarks(row.measured, row.label)]
    return rows, notes


def _write_tables(rows: Sequence[Row], notes: Sequence[str], out: pathlib.Path) -> None:
    (out / "table.md").write_text("\n\n".join([markdown_table(rows), *notes]) + "\n")
    (out / "table.txt").write_text("\n".join([text_table(rows), *notes]) + "\n")
    figures = {row.label: dict(row.measured) for row in rows}
    content = as_json({"figures": figures, "notes": list(notes)})
    (out / "comparison.json").write_text(content)


def list_nets(runs: Sequence[Run], reports: Sequence[Report]) -> list[Net]:
    """The reference (each, where the runs do not share one), then every run's defended net, under
    distinct labels.
    """
    references: dict[bytes, Net] = {}
    for run, report in zip(runs, reports, strict=True):
        label = REFERENCE if not references else f"{REFERENCE} ({run.workdir.name})"
        references.setdefault(_fingerprint(run), Net(label, REFERENCE, run, REFERENCE, report))
    nets = list(references.values())
    methods, order = [run.facts.method for run in runs], list(defenses.DEFENSES)
    pairs = sorted(
        zip(runs, reports, strict=True), key=lambda pair: order.index(pair[0].facts.method)
    )
    for run, report in pairs:
        method = run.facts.method
        plain = methods.count(method) == 1 or run.workdir.name == method
        label = method if plain else f"{method} ({run.workdir.name})"
        nets.append(Net(label, method, run, DEFENDED, report))
    labels = [net.label for net in nets]
    if len(set(labels)) < len(labels):
        raise ConfigurationError(
            f"The runs' directories must have different names; these are {', '.join(labels)}."
        )
    return nets


def _fingerprint(run: Run) -> bytes:
    """Equal for runs with the same reference net, to the last bit."""
    variables, digest = variables_of(restore_state(run, REFERENCE)), hashlib.sha256()
    both = variables["params"], variables["batch_stats"]
    for leaf in jax.tree.leaves(jax.device_get(both)):
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
        is_low = "is at 50 % or below without an attack"
        is_high = "does not fall to 50 % within fgsm_max_epsilon"
        why = is_low if epsilon == 0 else is_high
        return [{} for _ in nets], f"no FGSM accuracies: {leading.label} {why}"
    epsilons, found = [epsilon * fraction for fraction in FGSM_FRACTIONS], []
    for net in nets:
        variables = variables_of(restore_state(net.run, net.stage))
        options: dict[str, Any] = dict(limit=limit, description=f"{net.label:9} under FGSM")
        options["show_progress"] = parallel.is_primary()
        values = net.run.evaluator.fgsm_accuracy(variables, epsilons, **options)
        found.append({fgsm_name(x): value for x, value in zip(FGSM_FRACTIONS, values, strict=True)})
    who = f"where half of the images fall for {leading.label} under FGSM"
    return found, f"epsilon_ref = {epsilon:.4g}, {who}"
