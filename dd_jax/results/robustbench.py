"""The fields that RobustBench's form for a new model asks for, as far as a report knows them.

RobustBench (Croce et al., NeurIPS 2021 Datasets and Benchmarks) keeps a JSON file per model, with
percentages as text. What only the authors know is left empty: link, name, authors and venue of the
paper.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from dd_jax.results.curves import AUTOATTACK, STANDARD
from dd_jax.results.report import Report


def model_info(report: Report, stage: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """The fields for one result of AutoAttack on the net of that stage.

    found: an entry of the figures "autoattack". The accuracies are of the images that were
    attacked; the footnote says how many these are, and in which space of inputs epsilon is.
    """
    accuracy, robust = (f"{100 * found[name]:.2f}" for name in ("accuracy", "robust_accuracy"))
    return {
        "link": "",
        "name": "",
        "authors": "",
        "venue": "",
        "additional_data": False,
        "number_forward_passes": 1,
        "dataset": report.config["data.name"],
        "threat_model": found["norm"].replace("l", "L", 1),
        "eps": f"{found['epsilon']:g}",
        "architecture": report.model,
        "defense": report.defense if stage != "reference" else "none",
        "clean_acc": accuracy,
        "reported": robust,
        "autoattack_acc": robust,
        "autoattack_version": found["version"],
        "seed": found["seed"],
        "unreliable": bool(found["remarks"]),
        "footnote": " ".join(
            [
                f"AutoAttack of dd_jax on {found['num_examples']} test images of {report.data}; "
                f"inputs: {report.input_space}.",
                *found["remarks"],
            ]
        ),
    }


def write_model_infos(report: Report, workdir: pathlib.Path) -> list[pathlib.Path]:
    """Writes robustbench_STAGE_NORM_EPSILON.json for every result of AutoAttack, and returns the
    paths.
    """
    paths = []
    for stage, measured in report.measured.items():
        for found in measured.get(AUTOATTACK) or ():
            version = "" if found["version"] == STANDARD else f"_{found['version']}"
            first = "" if report.limit is None else f"_first_{report.limit}"
            ball = f"{found['norm']}_{found['epsilon']:g}"
            name = f"robustbench_{stage}_{ball}{version}{first}.json"
            content = json.dumps(model_info(report, stage, found), indent=2) + "\n"
            (workdir / name).write_text(content)
            paths.append(workdir / name)
    return paths
