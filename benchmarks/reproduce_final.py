"""The final runs of `python -m benchmarks.reproduce`: every defense with the options that the search chose.

    chosen_NET.json    what was chosen, with its held-out figures, and how many trials there were
    results_NET.jsonl  a line per net: (seed, defense, settings) -> figures on all test images

A run trains on all training images, from the reference net of its seed, and is measured on all test images:
DeepFool, FGSM, PGD, PASS, and C&W on the first CARLINI_WAGNER_IMAGES. A line that is there is not measured
again; a run that was stopped goes on from its latest checkpoint.
"""

import argparse
import json
import pathlib
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.reproduce_search import (
    BEGINS_AS,
    CONFIGS,
    DEFENSES,
    MEASURED,
    RESULTS,
    ROOT,
    Clock,
    Figures,
    Line,
    Settings,
    append_line,
    beginnings,
    choose,
    digest,
    machine,
    read_choice,
    read_config,
    read_lines,
)
from dd_jax.experiment import build, command_line, comparison, configuration, plans, runs
from dd_jax.experiment.build import Run
from dd_jax.experiment.configuration import ConfigurationError
from dd_jax.experiment.measuring import measure_state
from dd_jax.experiment.reporting import add_to_report, device_name, make_report
from dd_jax.results.report import DEFENDED, REFERENCE, Report, has_figures, read_report
from dd_jax.training import TrainState

SEEDS = (0, 1, 2)
CARLINI_WAGNER_IMAGES = 1_000
OVERRIDES = (
    f"evaluation.carlini_wagner_examples={CARLINI_WAGNER_IMAGES}",
    "evaluation.epoch_examples=1000",  # For Figure 8.
)
TABLE_2 = ("deepfool", "fgsm", "pgd", "carlini_wagner", "pass")  # What the paper's table has.
JPEG_COPY = "CIFAR-10 (JPEG copy)"


def write_choice(net: str, results: pathlib.Path = RESULTS) -> dict[str, Any]:
    """Chooses from the search's trials and writes chosen_NET.json; returns what it holds. A defense
    without trials has what another net chose, where the search would begin with that.

    A file of a net without a search is written by hand: "note" says how its options were found,
    "data" and "reference" are null.
    """
    lines = read_lines(results / f"search_{net}.jsonl")
    if not lines:
        raise ConfigurationError(
            f"There are no trials of {net} to choose from: run --search --nets {net}."
        )
    reference = next(line for line in lines if line["defense"] == REFERENCE)
    chosen = {}
    for defense in DEFENSES:
        trials = [line for line in lines if line["defense"] == defense]
        if trials:
            best = choose(trials, reference["figures"])
            names = ("settings", "trial", "figures")
            chosen[defense] = {name: best[name] for name in names} | {"num_trials": len(trials)}
        elif net in BEGINS_AS:
            (settings,) = beginnings(net, defense, results)
            untried = {"trial": None, "figures": None, "num_trials": 0}
            chosen[defense] = {"settings": settings} | untried
    content = {"net": net, "data": reference["data"], "reference": reference["figures"]}
    content["defenses"] = chosen
    (results / f"chosen_{net}.json").write_text(json.dumps(content, indent=1) + "\n")
    return content


def directory(workdir: pathlib.Path, net: str, seed: int, defense: str, settings: Settings):
    """The run directory of a final run, which other settings do not share."""
    name = defense if defense == REFERENCE else f"{defense}-{digest(settings)}"
    return workdir / "final" / net / f"seed_{seed}" / name


def final_nets(
    net: str, arguments: argparse.Namespace
) -> Iterator[tuple[dict[str, Any], pathlib.Path, str]]:
    """The nets that the arguments of `make_parser` name and that have a line of results and a run
    directory: what a line about one begins with, the directory, and the stage. References are
    always among them.
    """
    named = (REFERENCE, *arguments.defenses)
    for line in results_of(net, arguments.results):
        key = {name: line[name] for name in ("net", "seed", "defense", "settings")}
        seed, defense = line["seed"], line["defense"]
        where = directory(arguments.workdir, net, seed, defense, line["settings"])
        if seed in arguments.seeds and defense in named and where.is_dir():
            yield key, where, REFERENCE if defense == REFERENCE else DEFENDED


def opened(
    first: Run | None, where: pathlib.Path, data_dir: str | None, overrides: Sequence[str] = ()
) -> Run:
    """The run of a directory, on the data of the first one if there is one."""
    if first is None:
        return build.open_run(where, data_dir, overrides)
    return build.open_run_like(first, where, overrides)


def make_parser(doc: str, seeds: Sequence[int]) -> argparse.ArgumentParser:
    """The arguments that the scripts about final nets share, with the seeds that are the default."""
    parser = command_line.make_parser(doc)
    parser.add_argument("--nets", nargs="+", choices=CONFIGS, default=["mlp", "lenet"])
    parser.add_argument("--seeds", nargs="+", type=int, default=list(seeds))
    parser.add_argument("--defenses", nargs="*", choices=DEFENSES, default=DEFENSES)
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/reproduce"))
    parser.add_argument("--results", type=pathlib.Path, default=RESULTS)
    parser.add_argument("--data_dir", help="where TFDS keeps its data sets")
    return parser


class Finals:
    """The final runs of a net, of all seeds on the same data.

    overrides: for the configuration. exact_subset: an .npz file of "test_images" and "test_labels",
    on which a net is measured too.
    """

    def __init__(
        self,
        net: str,
        workdir: pathlib.Path,
        results: pathlib.Path = RESULTS,
        data_dir: str | None = None,
        overrides: Sequence[str] = OVERRIDES,
        exact_subset: pathlib.Path | None = None,
        say: Callable[[str], None] = print,
    ) -> None:
        self._net, self._workdir, self._data_dir = net, workdir, data_dir
        self._path, self._overrides, self._say = results / f"results_{net}.jsonl", overrides, say
        self._exact_subset, self._first = exact_subset, None
        self._choice = read_choice(net, results)["defenses"]

    def run(self, seeds: Sequence[int], defenses: Sequence[str] = DEFENSES) -> None:
        """Runs what is missing, seed by seed: the reference, then each defense that was chosen."""
        for seed in seeds:
            self._line(seed, REFERENCE, {})
            for defense in defenses:
                if defense in self._choice:
                    self._line(seed, defense, self._choice[defense]["settings"])

    def _line(self, seed: int, defense: str, settings: Settings) -> None:
        wanted = (seed, defense, settings)
        lines = read_lines(self._path)
        if wanted in [(line["seed"], line["defense"], line["settings"]) for line in lines]:
            return
        reference = {} if defense == REFERENCE else self._reference_figures(seed)
        started, run = Clock(), self._run(seed, defense, settings)
        state = runs.reference_state(run)
        if defense != REFERENCE:
            state = runs.defended_state(run, state)
        trained, stage = started.seconds(), REFERENCE if defense == REFERENCE else DEFENDED
        figures = self._figures(run, stage, state, reference)
        line = {"net": self._net, "seed": seed, "defense": defense, "settings": settings}
        line |= {"figures": figures, "num_train": run.feed.num_train} | facts(run)
        line |= kept_with(read_report(run.workdir))
        line |= {"training": trained, "all": started.seconds()}
        if self._exact_subset is not None:
            line["exact_subset"] = measured_on(run, state, self._exact_subset)
        append_line(self._path, line)
        self._say(f"{self._net}, seed {seed}, {defense}: {said(figures)}")

    def _reference_figures(self, seed: int) -> Figures:
        where = self._directory(seed, REFERENCE, {})
        report = read_report(where)
        if report is None:
            raise FileNotFoundError(
                f"{where} has no reference net, though {self._path} has its figures: give the "
                "--workdir that it was trained in, or remove that line to train it again."
            )
        return report.measured[REFERENCE]

    def _figures(
        self, run: Run, stage: str, state: TrainState, reference: Figures
    ) -> dict[str, Any]:
        """What is measured of a net, one measurement after the other: each is kept in its report."""
        names = [name for name in TABLE_2 if name in comparison.all_names(run)]
        for name in names:
            report = read_report(run.workdir)
            if report is None or not has_figures(report, stage, [name]):
                found = {stage: measure_state(run.evaluator, state, names=[name], quiet=True)}
                found |= {REFERENCE: reference} if stage == DEFENDED else {}
                add_to_report(run, make_report(run, found, names=[name]))
        figures = dict(read_report(run.workdir).measured[stage])
        figures.pop("fgsm_curve", None)
        return figures

    def _directory(self, seed: int, defense: str, settings: Settings) -> pathlib.Path:
        return directory(self._workdir, self._net, seed, defense, settings)

    def _run(self, seed: int, defense: str, settings: Settings) -> Run:
        others = [*self._overrides, f"seed={seed}"]
        if defense != REFERENCE:
            others.append(f"reference.source={self._directory(seed, REFERENCE, {})}")
        method = "clean" if defense == REFERENCE else defense
        config = read_config(self._net, method, settings, self._data_dir, *others)
        workdir = self._directory(seed, defense, settings)
        configuration.claim_directory(config, workdir)
        run = build.build_run(config, workdir, like=self._first)
        self._first = self._first or run
        return run


def measured_on(run: Run, state: TrainState, path: pathlib.Path) -> dict[str, Any]:
    """The figures of a net on the images of a file, in the run's own input space."""
    with np.load(path) as arrays:
        images, labels = arrays["test_images"], arrays["test_labels"].astype(np.int32)
    others = run.feed.data._replace(test_images=images, test_labels=labels)
    feed = run.feed._replace(data=others, test_inputs=run.preprocessing(images))
    config = configuration.load(run.workdir)
    evaluator = plans.make_evaluator(config, run.model, feed, run.preprocessing)
    figures = measure_state(evaluator, state, names=(*MEASURED, "carlini_wagner"), quiet=True)
    figures.pop("fgsm_curve")
    return figures


def facts(run: Run) -> dict[str, Any]:
    """What the figures of a run were taken with."""
    return {
        "data": run.facts.data,
        "input_space": run.facts.input_space,
        "published": run.facts.published,
        "commit": commit(),
        **machine(),
    }


def kept_with(report: Report) -> dict[str, Any]:
    """What figures were taken with that a report has kept from another machine; nothing where there
    are none.
    """
    if report.device == device_name():
        return {}
    device = f"{report.device}, since its last start {machine()['device']}"
    versions = {"jax": report.packages["jax"], "python": report.python}
    return {"device": device, "xla_flags": report.xla_flags} | versions


def commit() -> str:
    """The commit that the program is of; "" in a copy without git's directory."""
    stands = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(stands, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


def said(figures: Mapping[str, Any]) -> str:
    """A net's figures in a line, for the terminal."""
    names = ("accuracy", "l2", "rho_linf", "l2_carlini_wagner", "accuracy_pgd", "pass")
    return ", ".join(f"{name} {figures[name]:.4f}" for name in names if name in figures)


def results_of(net: str, results: pathlib.Path = RESULTS) -> list[Line]:
    """The lines of a net that belong to what is chosen now, the reference's included."""
    choice = read_choice(net, results)["defenses"]
    wanted = {REFERENCE: {}} | {name: chosen["settings"] for name, chosen in choice.items()}
    lines = read_lines(results / f"results_{net}.jsonl")
    return [line for line in lines if line["settings"] == wanted.get(line["defense"])]
