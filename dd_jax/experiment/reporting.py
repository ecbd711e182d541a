"""Writes report.json of a run: what was measured, and the facts to quote it with."""

import importlib.metadata
import os
import pathlib
import platform
from collections.abc import Sequence

import jax

from dd_jax import parallel
from dd_jax.evaluation import Summary, remarks
from dd_jax.experiment.build import Run
from dd_jax.experiment.plans import how_measured
from dd_jax.results.report import (
    REFERENCE,
    Report,
    file_name,
    merged,
    read_report,
    rows,
    write_report,
)
from dd_jax.results.robustbench import write_model_infos

PACKAGES = ("dd_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def make_report(
    run: Run,
    measured: dict[str, Summary],
    *,
    names: Sequence[str] = ("deepfool",),
    limit: int | None = None,
) -> Report:
    """Everything that is needed to quote the run's figures.

    measured: by stage. names, limit: what was measured, and on how many images (None: all).
    """
    facts = run.facts
    labels = (REFERENCE, facts.method)
    report = Report(
        data=facts.data,
        model=facts.model,
        defense=facts.method,
        seed=facts.seed,
        input_space=facts.input_space,
        measured=measured,
        names=list(names),
        limit=limit,
        published={name: facts.published[name] for name in labels if name in facts.published},
        config=facts.config,
        xla_flags=os.environ.get("XLA_FLAGS", ""),
        device=device_name(),
        python=platform.python_version(),
        packages={name: _version(name) for name in PACKAGES},
        remarks=[],
    )
    return _with_remarks(report)


def device_name() -> str:
    """The devices of this process, as reports name them."""
    device = jax.devices()[0]
    return f"{device.device_kind} ({device.platform}, {jax.device_count()} device(s))"


def add_to_report(run: Run, report: Report) -> tuple[Report, pathlib.Path]:
    """Adds a report to what the run directory holds of the same images; returns the whole, and its
    path. Of several processes, one writes.
    """
    before = read_report(run.workdir, report.limit)
    if before is not None and how_measured(before.config) != how_measured(report.config):
        before = None
    whole = _with_remarks(merged(before, report))
    if parallel.is_primary():
        write_report(whole, run.workdir)
        write_model_infos(whole, run.workdir)
    return whole, run.workdir / file_name(report.limit)


def _with_remarks(report: Report) -> Report:
    """The report with a sentence for every attack whose own success was not confirmed throughout;
    mostly there is none.
    """
    sentences = [sentence for row in rows(report) for sentence in remarks(row.measured, row.label)]
    return report._replace(remarks=sentences)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"  # dd_jax itself, run from a checkout.
