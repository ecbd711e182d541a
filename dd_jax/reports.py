"""The report of a run: what was measured, with what, and the paper's figures beside it."""

import importlib.metadata
import json
import pathlib
import platform
from typing import Any

import jax

from dd_jax import published
from dd_jax.configuration import flatten
from dd_jax.experiment import DEFENDED, REFERENCE, Experiment
from dd_jax.metrics import Summary

PACKAGES = ("dd_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
FILE_NAME = "report.json"


def make_report(experiment: Experiment, measured: dict[str, Summary]) -> dict[str, Any]:
    """Everything one needs to quote the run's figures."""
    config = experiment.config
    device = jax.devices()[0]
    published_rows = {
        name: row._asdict()
        for name in (REFERENCE, config.defense.name)
        if (row := published.lookup(config.data.name, config.model.name, name))
    }
    return {
        "data": experiment.data.description,
        "model": config.model.name,
        "defense": config.defense.name,
        "seed": config.seed,
        "input_space": experiment.preprocessing.description,
        "measured": measured,
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


def table(report: dict[str, Any]) -> str:
    """The before/after table, for a terminal."""
    defense = report["defense"]
    lines = [f"{'':22}{'accuracy':>10}{'rho_2':>9}{'l_2':>8}{'DeepFool success':>19}"]
    for name, stage in ((REFERENCE, REFERENCE), (defense, DEFENDED)):
        row = report["measured"][stage]
        lines.append(
            f"{name:22}{row['accuracy']:>10.2%}{row['rho_l2']:>9.4f}{row['l2']:>8.3f}{row['deepfool_success']:>19.2%}"
        )
    for name, row in report["published"].items():
        lines.append(f"{'paper: ' + name:22}{'':>10}{'':>9}{row['l2_deepfool']:>8.2f}")
    count = report["measured"][REFERENCE]["num_examples"]
    lines.append(f"{count} test images of {report['data']}; inputs: {report['input_space']}; seed {report['seed']}")
    return "\n".join(lines)
