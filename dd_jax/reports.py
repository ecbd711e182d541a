"""The report of a run: what was measured, with what, and the paper's figures beside it."""

import importlib.metadata
import json
import pathlib
import platform
from collections.abc import Sequence
from typing import Any

import jax

from dd_jax import published
from dd_jax.configuration import flatten
from dd_jax.experiment import DEFENDED, REFERENCE, Experiment
from dd_jax.metrics import Summary
from dd_jax.tables import PAPERS, Row, has_published, text_table

PACKAGES = ("dd_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
FILE_NAME = "report.json"


def make_report(
    experiment: Experiment,
    measured: dict[str, Summary],
    *,
    names: Sequence[str] = ("deepfool",),
    limit: int | None = None,
) -> dict[str, Any]:
    """Everything one needs to quote the run's figures; `names` and `limit`: what was measured, on how many images."""
    config = experiment.config
    device = jax.devices()[0]
    published_rows = {
        name: row._asdict()
        for name in (REFERENCE, config.defense.name)
        if (row := published.lookup(config.data.name, config.model.name, name))
    }
    return {
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
        "device": f"{device.device_kind} ({device.platform}, {jax.device_count()} device(s))",
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
    }


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"  # dd_jax itself, run from a checkout.


def write(report: dict[str, Any], workdir: pathlib.Path) -> pathlib.Path:
    """Writes report.json, whole or not at all, and returns its path."""
    path = workdir / FILE_NAME
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(report, indent=2) + "\n")
    partial.replace(path)
    return path


def read(workdir: pathlib.Path) -> dict[str, Any] | None:
    """The report of a run directory; None if there is none yet, or it is damaged."""
    try:
        return json.loads((workdir / FILE_NAME).read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None


def rows(report: dict[str, Any]) -> list[Row]:
    """The reference and the defended net, as rows of a table."""
    names = {REFERENCE: REFERENCE, DEFENDED: report["defense"]}
    return [Row(name, report["measured"][stage], report["published"].get(name)) for stage, name in names.items()]


def table(report: dict[str, Any]) -> str:
    """The before/after table, for a terminal."""
    both = rows(report)
    notes = [f"({PAPERS})"] if has_published(both) else []
    return "\n".join([text_table(both), *notes, conditions(report)])


def conditions(report: dict[str, Any]) -> str:
    """What a report's figures were measured on, in a line."""
    measured = report["measured"][REFERENCE]
    fewer = measured.get("carlini_wagner_examples", measured["num_examples"])
    few = f" (C&W: the first {fewer})" if fewer < measured["num_examples"] else ""
    space = f"inputs: {report['input_space']}; seed {report['seed']}"
    return f"{measured['num_examples']} test images{few} of {report['data']}; {space}"
