"""report.json: what was measured of a run's two nets, and with what.

The file is report_first_N.json where only the first N test images were measured. A later
measurement of the same images adds to it. No final figure is kept anywhere else.
"""

import json
import pathlib
import re
import sys
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dd_jax import log
from dd_jax.results.curves import AUTOATTACK, points, with_points
from dd_jax.results.tables import PAPERS, Row, has_published, text_table

# A figure that each measurement gives.
FIGURE_OF = {
    "deepfool": "deepfool_success",
    "fgsm": "fgsm_success",
    "pgd": "accuracy_pgd",
    "carlini_wagner": "carlini_wagner_success",
    "ddn": "ddn_success",
    "fmn_linf": "fmn_linf_success",
    "fmn_l1": "fmn_l1_success",
    "pass": "pass",
    AUTOATTACK: AUTOATTACK,
}
NUMBERS = re.compile(r"\[\n\s*([-+.\deE,\s]+?)\n\s*\]")
"""A list of numbers in JSON, one per line."""
REFERENCE, DEFENDED = "reference", "defended"
"""The two stages of a run, and their nets."""
MACHINE = ("device", "python", "xla_flags")
"""The fields that say, beside the packages, what the figures were taken with."""
# Of figures and settings in reports from before they were called FGSM throughout.
OLD_PREFIX, NEW_PREFIX = "fgs_", "fgsm_"


class Report(NamedTuple):
    """Everything that is needed to quote a run's figures.

    measured: by stage, then by name of the figure. names: the measurements asked for. limit: how
    many test images were measured, None for all. published: the paper's figures by net. config: the
    resolved configuration, {"section.field": value}. xla_flags, device, python, packages: of
    figures that were measured at different times, all that differ, "; " between them. remarks: what
    to know of the figures.
    """

    data: str
    model: str
    defense: str
    seed: int
    input_space: str
    measured: dict[str, dict[str, Any]]
    names: list[str]
    limit: int | None
    published: dict[str, dict[str, Any]]
    config: dict[str, Any]
    xla_flags: str
    device: str
    python: str
    packages: dict[str, str]
    remarks: list[str]


def file_name(limit: int | None) -> str:
    """The report's name, by how many of the test images were measured (None: all)."""
    return "report.json" if limit is None else f"report_first_{limit}.json"


def write_report(report: Report, workdir: pathlib.Path) -> pathlib.Path:
    """Writes the report, whole or not at all, and returns its path.

    A damaged report in its place is kept beside it, under a name that stderr tells.
    """
    path = workdir / file_name(report.limit)
    if path.exists() and read_report(workdir, report.limit) is None:
        aside = log.unused(path.with_name(f"{path.name}.damaged"))
        path.replace(aside)
        print(
            f"{path} was damaged and is now {aside}; it is written anew with what is measured now.",
            file=sys.stderr,
        )
    partial = path.with_suffix(".partial")
    partial.write_text(as_json(report._asdict()))
    partial.replace(path)
    return path


def as_json(content: Mapping[str, Any]) -> str:
    """The text of a JSON file, indented, with each list of numbers in one line."""
    in_one_line = lambda match: f"[{' '.join(match[1].split())}]"
    return NUMBERS.sub(in_one_line, json.dumps(content, indent=2)) + "\n"


def read_report(workdir: pathlib.Path, limit: int | None = None) -> Report | None:
    """The report of a run directory on the first `limit` test images; None if there is none yet, or
    it is damaged.
    """
    try:
        fields = json.loads((workdir / file_name(limit)).read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    if not isinstance(fields, dict) or not {"measured", "names", "config"} <= fields.keys():
        return None
    fields = {"remarks": [], "xla_flags": "", "limit": limit} | _with_new_names(fields)
    known = {name: fields.get(name) for name in Report._fields}
    return Report(**known) if _is_whole(known) else None


def _is_whole(fields: Mapping[str, Any]) -> bool:
    """Whether what is read of a report has the types that the rest relies on."""
    measured = fields["measured"]
    return (
        isinstance(measured, dict)
        and all(isinstance(figures, dict) for figures in measured.values())
        and isinstance(fields["config"], dict)
        and isinstance(fields["names"], list)
    )


def _with_new_names(value: Any) -> Any:
    """The same with "fgsm" for "fgs" in the names of figures, of measurements and of settings."""
    if isinstance(value, Mapping):
        return {_new_name(name): _with_new_names(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_new_name(inner) if isinstance(inner, str) else inner for inner in value]
    return value


def _new_name(name: str) -> str:
    section, dot, field = name.rpartition(".")
    if field == OLD_PREFIX[:-1]:
        return NEW_PREFIX[:-1]
    if field.startswith(OLD_PREFIX):
        return f"{section}{dot}{NEW_PREFIX}{field.removeprefix(OLD_PREFIX)}"
    return name


def merged(before: Report | None, report: Report) -> Report:
    """The report, with the other figures of an earlier one of the same images and settings. Where
    such figures are kept, it names the machines and the packages of both.
    """
    if before is None:
        return report
    stages = {**before.measured, **report.measured}
    measured = {
        stage: with_points(before.measured.get(stage, {}), report.measured.get(stage, {}))
        for stage in stages
    }
    names = list(dict.fromkeys([*before.names, *report.names]))
    whole = report._replace(measured=measured, names=names)
    if measured == report.measured:  # Nothing earlier is kept.
        return whole
    packages = {
        name: _either((before.packages or {}).get(name), version)
        for name, version in report.packages.items()
    }
    machine = {x: _either(getattr(before, x), getattr(report, x)) for x in MACHINE}
    return whole._replace(packages=packages, **machine)


def _either(before: str | None, now: str) -> str:
    """Both texts, "; " between them, or the one that they are; "-" for an empty one beside another.
    An old report may lack its own.
    """
    if before is None or before == now:
        return now
    return "; ".join(dict.fromkeys([*(before or "-").split("; "), now or "-"]))


def has_figures(report: Report, stage: str, names: Sequence[str]) -> bool:
    """Whether a report holds these measurements of that stage's net."""
    return {FIGURE_OF.get(name, name) for name in names} <= report.measured.get(stage, {}).keys()


def forget_stage(workdir: pathlib.Path, stage: str) -> None:
    """Removes what the reports of a run directory hold of a stage, whose net is trained again,
    their pages, and that net's forms for RobustBench.
    """
    for path in workdir.glob(f"robustbench_{stage}_*.json"):
        path.unlink()
    for path in workdir.glob("report*.json"):
        limit = path.stem.removeprefix("report").removeprefix("_first_")
        report = read_report(workdir, int(limit) if limit.isdecimal() else None)
        path.with_suffix(".html").unlink(missing_ok=True)
        if report is not None and stage in report.measured:
            del report.measured[stage]
            if report.measured:
                write_report(report, workdir)
            else:
                path.unlink()


def rows(report: Report) -> list[Row]:
    """The reference and the defended net, as far as they are measured, as rows of a table."""
    labels = {REFERENCE: REFERENCE, DEFENDED: report.defense}
    return [
        Row(label, report.measured[stage], report.published.get(label))
        for stage, label in labels.items()
        if stage in report.measured
    ]


def table(report: Report) -> str:
    """The before/after table, for a terminal."""
    both = rows(report)
    notes = [f"({PAPERS})"] if has_published(both) else []
    return "\n".join([text_table(both), *notes, *report.remarks, conditions(report)])


def conditions(report: Report, *others: Report) -> str:
    """What the figures of reports (on the same images) were measured on, in a line."""
    measured = next(iter(report.measured.values()))
    attacks = ""
    if "accuracy_pgd" in measured:
        epsilon, steps = (
            report.config[f"evaluation.pgd_{name}"] for name in ("epsilon", "num_steps")
        )
        attacks = f"; PGD: linf, epsilon {epsilon}, {steps} steps"
    if {"ddn_success", "fmn_linf_success", "fmn_l1_success"} & measured.keys():
        attacks += f"; DDN, FMN: {report.config['evaluation.minimum_norm_num_steps']} steps"
    seeds = sorted({each.seed for each in (report, *others)})
    seed = f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    space = f"inputs: {report.input_space}{attacks}; {seed}"
    number, few = measured["num_examples"], _fewer(measured)
    return f"{number} test images{few} of {report.data}; {space}"


def _fewer(measured: Mapping[str, Any]) -> str:
    """Which attacks were given the first images only, and how many; empty where none was."""
    of_autoattack = {point.num_examples for point in points(measured)}
    numbers = {
        "C&W": measured.get("carlini_wagner_examples"),
        "DDN": measured.get("ddn_examples"),
        "FMN": measured.get("fmn_linf_examples", measured.get("fmn_l1_examples")),
        "AutoAttack": min(of_autoattack, default=None),
    }
    attacks: dict[int, list[str]] = {}
    for attack, number in numbers.items():
        if number is not None and number < measured["num_examples"]:
            attacks.setdefault(number, []).append(attack)
    listed = [f"{', '.join(names)}: the first {number}" for number, names in attacks.items()]
    return f" ({'; '.join(listed)})" if listed else ""
