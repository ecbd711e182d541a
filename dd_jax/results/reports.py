"""The report of a run: what was measured, with what, and the paper's figures beside it.

It is report.json, or report_first_N.json where only the first N test images were measured. A later
measurement of the same images adds to it.
"""

import importlib.metadata
import json
import os
import pathlib
import platform
from collections.abc import Sequence
from typing import Any

import jax

from dd_jax.evaluation.metrics import Summary, remarks
from dd_jax.experiment.build import DEFENDED, REFERENCE, Experiment, how_measured, paper_row
from dd_jax.experiment.configuration import flatten
from dd_jax.results.tables import PAPERS, Row, has_published, text_table

PACKAGES = ("dd_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def make_report(
    experiment: Experiment,
    measured: dict[str, Summary],
    *,
    names: Sequence[str] = ("deepfool",),
    limit: int | None = None,
) -> dict[str, Any]:
    """Everything one needs to quote the run's figures; `names` and `limit`: what was measured, on
    how many images.
    """
    config = experiment.config
    device = jax.devices()[0]
    published_rows = {
        name: row._asdict()
        for name in (REFERENCE, config.defense.name)
        if (row := paper_row(config, name))
    }
    report = {
        "data": experiment.feed.description,
        "model": config.model.name,
        "defense": config.defense.name,
        "seed": config.seed,
        "input_space": experiment.preprocessing.description,
        "measured": measured,
        "names": list(names),
        "limit": limit,
        "published": published_rows,
        "config": flatten(config),
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "device": f"{device.device_kind} ({device.platform}, {jax.device_count()} device(s))",
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
    }
    return _with_remarks(report)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"  # dd_jax itself, run from a checkout.


def file_name(limit: int | None) -> str:
    """The report's name, by how many of the test images were measured (None: all)."""
    return "report.json" if limit is None else f"report_first_{limit}.json"


def write(report: dict[str, Any], workdir: pathlib.Path) -> pathlib.Path:
    """Writes the report, whole or not at all, and returns its path; what an earlier one holds
    beside it is kept.
    """
    path = workdir / file_name(report["limit"])
    partial = path.with_suffix(".partial")
    partial.write_text(
        json.dumps(_added_to(read(workdir, report["limit"]), report), indent=2) + "\n"
    )
    partial.replace(path)
    return path


def _added_to(before: dict[str, Any] | None, report: dict[str, Any]) -> dict[str, Any]:
    if before is None or how_measured(before["config"]) != how_measured(report["config"]):
        return report
    measured = {
        stage: before["measured"].get(stage, {}) | new for stage, new in report["measured"].items()
    }
    names = list(dict.fromkeys([*before["names"], *report["names"]]))
    return _with_remarks(report | {"measured": measured, "names": names})


def _with_remarks(report: dict[str, Any]) -> dict[str, Any]:
    """The report with a sentence for every attack whose own success was not confirmed throughout;
    mostly there is none.
    """
    return report | {
        "remarks": [
            sentence for row in rows(report) for sentence in remarks(row.measured, row.label)
        ]
    }


def read(workdir: pathlib.Path, limit: int | None = None) -> dict[str, Any] | None:
    """The report of a run directory on the first `limit` test images; None if there is none yet, or
    it is damaged.
    """
    try:
        report = json.loads((workdir / file_name(limit)).read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None
    return (
        report
        if isinstance(report, dict) and {"measured", "names", "config"} <= report.keys()
        else None
    )


def rows(report: dict[str, Any]) -> list[Row]:
    """The reference and the defended net, as rows of a table."""
    names = {REFERENCE: REFERENCE, DEFENDED: report["defense"]}
    return [
        Row(name, report["measured"][stage], report["published"].get(name))
        for stage, name in names.items()
    ]


def table(report: dict[str, Any]) -> str:
    """The before/after table, for a terminal."""
    both = rows(report)
    notes = [f"({PAPERS})"] if has_published(both) else []
    return "\n".join([text_table(both), *notes, *report.get("remarks", []), conditions(report)])


def conditions(report: dict[str, Any], *others: dict[str, Any]) -> str:
    """What the figures of reports (on the same images) were measured on, in a line."""
    measured, config = report["measured"][REFERENCE], report["config"]
    fewer = measured.get("carlini_wagner_examples", measured["num_examples"])
    few = f" (C&W: the first {fewer})" if fewer < measured["num_examples"] else ""
    pgd = ""
    if "accuracy_pgd" in measured:
        epsilon, steps = (config[f"evaluation.pgd_{name}"] for name in ("epsilon", "num_steps"))
        pgd = f"; PGD: linf, epsilon {epsilon}, {steps} steps"
    seeds = sorted({each["seed"] for each in (report, *others)})
    seed = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    space = f"inputs: {report['input_space']}{pgd}; {seed}"
    return f"{measured['num_examples']} test images{few} of {report['data']}; {space}"
