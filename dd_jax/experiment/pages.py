"""Writes report.html of a run and comparison.html: what was measured, pictures and examples, in one
file each.
"""

import hashlib
import json
import pathlib
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from dd_jax import parallel
from dd_jax.experiment import configuration_files
from dd_jax.experiment.build import Run
from dd_jax.experiment.configuration import flatten, is_taken
from dd_jax.experiment.figures import (
    PLOTS,
    Examples,
    Net,
    draw_comparison,
    draw_run,
    fooling_examples,
    legend_labels,
)
from dd_jax.results import page
from dd_jax.results.pictures import example_images, pictures
from dd_jax.results.report import DEFENDED, REFERENCE, Report, file_name, rows
from dd_jax.results.tables import Row

__all__ = [
    "PLOTS",
    "comparison_commands",
    "run_commands",
    "write_comparison_page",
    "write_run_page",
]

COMMAND = "python -m dd_jax"
MEASURED_BY_TRAINING = ["deepfool"]


def write_run_page(run: Run, report: Report, *, again: bool = True) -> pathlib.Path:
    """Draws a run's plots/ and writes report.html beside report.json; returns its path.

    Every process must call it; one writes. again: even where the page is there already, and shows
    this report.
    """
    path = run.workdir / pathlib.Path(file_name(report.limit)).with_suffix(".html")
    provenance = _digest(report)
    if not again and path.exists() and provenance in path.read_text():
        return path
    labels = {REFERENCE: REFERENCE, DEFENDED: report.defense}
    nets = [Net(labels[stage], labels[stage], run, stage, report) for stage in report.measured]
    examples = fooling_examples(nets)
    if parallel.is_primary():
        drawn = draw_run(run.workdir, report, run.facts.input_unit, examples)
        measured = {row.label: row.measured for row in rows(report)}
        contents = _contents(drawn, measured, examples, run_commands(run, report))
        _write(path, page.run_page(report, contents._replace(provenance=provenance)))
    return path


def write_comparison_page(
    nets: Sequence[Net],
    rows: Sequence[Row],
    notes: Sequence[str],
    examples: Sequence[Examples],
    out: pathlib.Path,
) -> None:
    """Draws a comparison's figures, and writes comparison.html beside them."""
    drawn = draw_comparison(nets, out, examples)
    defended = [net for net in nets if net.stage == DEFENDED]
    measured = {net.label: net.measured for net in nets}
    commands = comparison_commands(defended, out)
    text = page.comparison_page(
        rows,
        notes,
        {net.label: net.report for net in defended},
        _contents(drawn, measured, examples, commands),
    )
    _write(out / "comparison.html", text)


def run_commands(run: Run, report: Report) -> list[str]:
    """The commands that make a run and its report again."""
    workdir = shlex.quote(str(run.workdir))
    names = "" if report.names == MEASURED_BY_TRAINING else f" --measure {' '.join(report.names)}"
    limit = "" if report.limit is None else f" --limit {report.limit}"
    measured_by_training = not names and not limit
    evaluate = f"{COMMAND} evaluate --workdir {workdir}{names}{limit}"
    return [
        _training_command(report.config, workdir),
        *([] if measured_by_training else [evaluate]),
    ]


def comparison_commands(nets: Sequence[Net], out: pathlib.Path) -> list[str]:
    """The commands that make a comparison's runs, and the comparison, again."""
    workdirs = [shlex.quote(str(net.run.workdir)) for net in nets]
    training = [
        _training_command(net.report.config, workdir)
        for net, workdir in zip(nets, workdirs, strict=True)
    ]
    compare = f"{COMMAND} compare {' '.join(workdirs)} --out {shlex.quote(str(out))}"
    return [*training, compare]


def _training_command(config: Mapping[str, Any], workdir: str) -> str:
    """The command of a run with this flat configuration: the configuration of dd_jax that is
    nearest to it, and what differs.
    """
    named = {name: flatten(configuration_files.load(name)) for name in configuration_files.names()}
    different = {
        name: {field: x for field, x in config.items() if field in fields and x != fields[field]}
        for name, fields in named.items()
    }
    nearest = min(different, key=lambda name: len(different[name]))
    method, option = config["defense.name"], "defense."
    overrides = [
        shlex.quote(f"--config.{field}={value}")
        for field, value in different[nearest].items()
        # Options that the defense does not take change nothing, and are refused.
        if not field.startswith(option)
        or field == f"{option}name"
        or is_taken(field.removeprefix(option), method)
    ]
    parts = [f"{COMMAND} train --config {nearest} --workdir {workdir}", *overrides]
    return " \\\n    ".join(parts)


def _contents(
    drawn: Sequence[pathlib.Path],
    measured: Mapping[str, Mapping[str, Any]],
    examples: Sequence[Examples],
    commands: Sequence[str],
) -> page.Contents:
    names = legend_labels(list(measured))
    return page.Contents(
        pictures(drawn, measured),
        [example_images(*each, names) for each in examples],
        commands,
    )


def _digest(report: Report) -> str:
    """Equal for equal reports."""
    return hashlib.sha256(json.dumps(report._asdict()).encode()).hexdigest()[:16]


def _write(path: pathlib.Path, text: str) -> None:
    """Writes a page, whole or not at all."""
    partial = path.with_suffix(".partial_html")
    partial.write_text(text)
    partial.replace(path)
