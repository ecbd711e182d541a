"""The search of `python -m benchmarks.reproduce --search`: options of every defense, chosen on held-out
training images.

A trial is a fine-tuning from one reference net (seed 0), both without the last VALIDATION_IMAGES training
images; these are what it is measured on. No test image is used. Every defense gets the same number of
trials: beginnings, which were set by hand (reproduce_beginnings.py: four, and on CIFAR-10 seven more), then
moves, each of which changes two options of one of the best trials so far. LeNet's search has one beginning:
what was chosen for the MLP, on the same data (chosen_mlp.json); a defense without trials keeps that.
What the moves look for, the "promise", is the geometric mean of the gains of l_2 (DeepFool) and of rho_inf
(FGSM) over the reference, less SHORTFALL for every point of accuracy below the reference's. What is chosen
in the end has an accuracy that is not below the reference's, and of those the greatest gain.

Trials are lines of search_NET.jsonl; a trial that is there is not run again, so the search goes on where it
was stopped, and further than before where more trials are asked for. A trial depends on those before it,
and on nothing else.
"""

import hashlib
import json
import math
import os
import pathlib
import platform
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks import reproduce_beginnings
from benchmarks.reproduce_beginnings import EPOCHS, RATE, SCHEDULE, Settings, scaled
from configs import default
from dd_jax.experiment import build, configuration, runs
from dd_jax.experiment.build import Run
from dd_jax.experiment.measuring import measure_state
from dd_jax.experiment.reporting import add_to_report, make_report
from dd_jax.results.report import REFERENCE
from dd_jax.training import TrainState
from dd_jax.training.train_step import DivergenceError

ROOT = pathlib.Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks/reproduction"
BEGINS_AS = {"lenet": "mlp"}  # Nets whose search begins with what was chosen for another.
CONFIGS = {
    "mlp": "mnist_mlp",
    "lenet": "mnist_lenet",
    "convnet": "cifar_convnet",
    "nin": "cifar_nin",
}
DEFENSES = (
    "clean",
    "parseval",
    "adversarial_deepfool",
    "adversarial_fgsm",
    "deep_defense",
    "deep_defense_fgsm",
)
VALIDATION_IMAGES = 10_000
# The accuracy is that on all of them, robustness that on the first so many.
ROBUSTNESS_IMAGES = 2_000
MEASURED = ("deepfool", "fgsm", "pgd")
NUM_TRIALS = 12
NUM_CHANGES, NUM_PARENTS = 2, 2  # Options that a move changes, trials that it may begin from.
FACTORS = (0.5, 0.7, 1.4, 2.0)  # Of the numbers that a move changes.
# Of a gain, per point (1 %) of accuracy below the reference's.
SHORTFALL = 1.0
BOUND = "fine_tuning.max_gradient_norm=10.0"  # The penalty of a wrong image is exponential.

Line = dict[str, Any]
Figures = Mapping[str, Any]


class Option(NamedTuple):
    """A number within limits that moves multiply, or one of several values.

    values: the values to choose from, in order; empty for a number within `limits`.
    """

    values: tuple[Any, ...] = ()
    limits: tuple[float, float] = (0.0, math.inf)


EVERYONES = {
    RATE: Option(limits=(1e-4, 5e-2)),
    EPOCHS: Option((5, 10, 20)),
    SCHEDULE: Option(("halved_at_four_fifths", "cosine")),
    "fine_tuning.weight_decay": Option((0.0, 1e-4, 5e-4)),
    "fine_tuning.average_decay": Option((0.0, 0.999)),
}
_SHARE = Option((0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9))
_EPSILON = Option(limits=(0.001, 0.4))
_FGSM = {"defense.fgsm_weight": _SHARE, "defense.epsilon": _EPSILON}
_DEEP_DEFENSE = {
    "defense.penalty_weight": Option(limits=(1.0, 200.0)),
    "defense.correct_scale": Option(limits=(2.0, 60.0)),
    "defense.wrong_scale": Option(limits=(0.5, 20.0)),
    "defense.norm": Option(("l2", "linf")),
}
SPACES: dict[str, dict[str, Option]] = {
    "clean": EVERYONES,
    "parseval": EVERYONES | {"defense.beta": Option(limits=(1e-7, 3e-2))},
    "adversarial_deepfool": EVERYONES
    | {"defense.mixing_weight": _SHARE, "defense.norm": Option(("l2", "linf"))},
    "adversarial_fgsm": EVERYONES | _FGSM,
    "deep_defense": EVERYONES | _DEEP_DEFENSE,
    "deep_defense_fgsm": EVERYONES | _DEEP_DEFENSE | _FGSM,
}
"""What is searched, by defense, on MNIST."""


def space_of(net: str, defense: str) -> dict[str, Option]:
    """What is searched of a defense, in the units of a net's inputs."""
    limits = lambda name, option: tuple(scaled(net, {name: x})[name] for x in option.limits)
    return {name: x._replace(limits=limits(name, x)) for name, x in SPACES[defense].items()}


def beginnings(net: str, defense: str, results: pathlib.Path = RESULTS) -> list[Settings]:
    """The settings of the first trials; FileNotFoundError where another net's choice is missing."""
    if net in BEGINS_AS:
        chosen = read_choice(BEGINS_AS[net], results)["defenses"]
        return [chosen[defense]["settings"]]
    return reproduce_beginnings.beginnings(net, defense)


def next_settings(
    first: Sequence[Settings],
    defense: str,
    lines: Sequence[Line],
    reference: Figures,
    space: Mapping[str, Option] | None = None,
) -> Settings:
    """The settings of the trial that follows those of `lines`: a beginning of `first`, or a move
    from one of the best that repeats no earlier trial. `space`: MNIST's where it is not given.
    """
    number, tried = len(lines), [line["settings"] for line in lines]
    if number < len(first):
        return first[number]
    ranked = sorted(lines, key=lambda line: promise(line, reference), reverse=True)
    random = np.random.default_rng((list(SPACES).index(defense), number))
    while True:
        parent = ranked[random.integers(min(NUM_PARENTS, len(ranked)))]["settings"]
        moved = move(parent, space or SPACES[defense], random)
        if moved not in tried:
            return moved


def move(settings: Settings, space: Mapping[str, Option], random: np.random.Generator) -> Settings:
    """The settings with NUM_CHANGES options changed: a number by a factor, a choice to another."""
    moved = dict(settings)
    for name in random.choice(sorted(space), NUM_CHANGES, replace=False).tolist():
        values, (low, high) = space[name]
        if values:
            others = [value for value in values if value != settings[name]]
            moved[name] = others[random.integers(len(others))]
        else:
            value = settings[name] * FACTORS[random.integers(len(FACTORS))]
            moved[name] = float(f"{min(max(value, low), high):.3g}")
    return moved


def gain(figures: Figures, reference: Figures) -> float:
    """The geometric mean of the factors by which l_2 and rho_inf are above the reference's."""
    return math.sqrt(
        figures["l2"] / reference["l2"] * (figures["rho_linf"] / reference["rho_linf"])
    )


def promise(line: Line, reference: Figures) -> float:
    """What the moves look for; -infinity for a trial that diverged."""
    if line.get("figures") is None:
        return -math.inf
    short = max(0.0, reference["accuracy"] - line["figures"]["accuracy"])
    return gain(line["figures"], reference) - SHORTFALL * 100 * short


def choose(lines: Sequence[Line], reference: Figures) -> Line:
    """Of the trials whose accuracy is not below the reference's, the one of the greatest gain; of
    all, the one of the greatest promise, where there is none.
    """
    done = [line for line in lines if line.get("figures") is not None]
    allowed = [line for line in done if line["figures"]["accuracy"] >= reference["accuracy"]]
    if allowed:
        return max(allowed, key=lambda line: gain(line["figures"], reference))
    return max(done, key=lambda line: promise(line, reference))


def digest(settings: Settings) -> str:
    """Eight letters that stand for settings, in the names of directories."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]


def read_choice(net: str, results: pathlib.Path = RESULTS) -> dict[str, Any]:
    """What chosen_NET.json holds; FileNotFoundError, with what to do, where it is not there."""
    path = results / f"chosen_{net}.json"
    if not path.exists():
        raise FileNotFoundError(
            f"There is no {path}; run python -m benchmarks.reproduce --search, then --choose."
        )
    return json.loads(path.read_text())


def read_lines(path: pathlib.Path) -> list[Line]:
    """The lines of a file of results; none where it is not there. A last line that was cut off by a
    kill is left out.
    """
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            continue
    return lines


def append_line(path: pathlib.Path, line: Line) -> None:
    """Adds a line, on a line of its own also where the last one was cut off."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cut_off = path.exists() and not path.read_text().endswith("\n") and path.stat().st_size > 0
    with path.open("a") as file:
        file.write("\n" * cut_off + json.dumps(line) + "\n")


def read_config(
    net: str, defense: str, settings: Settings, data_dir: str | None, *others: str
) -> Any:
    """The configuration of a net with these settings, and the directory of its data. Options of the
    search that are not among the settings are configs/default.py's: a run does not depend on what the
    net's file has chosen for its own defense.
    """
    given = [f"{name}={value}" for name, value in settings.items()]
    overrides = [f"defense.name={defense}", BOUND, *given, *others]
    path = ROOT / "configs" / f"{CONFIGS[net]}.py"
    config = configuration.read(str(path), [f"--config.{override}" for override in overrides])
    defaults = default.get_config()
    for name in {name for space in SPACES.values() for name in space} - settings.keys():
        section, _, option = name.partition(".")
        config[section][option] = defaults[section][option]
    if data_dir:
        config.data.dir = data_dir
    return config


class Search:
    """The search of a net: its reference, trained once, and trials from it on the same data.

    overrides: for the configuration, such as "data.train_limit=500", for tests.
    """

    def __init__(
        self,
        net: str,
        workdir: pathlib.Path,
        results: pathlib.Path = RESULTS,
        data_dir: str | None = None,
        overrides: Sequence[str] = (f"data.validation_images={VALIDATION_IMAGES}",),
        robustness_images: int = ROBUSTNESS_IMAGES,
    ) -> None:
        self._net, self._workdir, self._data_dir = net, workdir / "search" / net, data_dir
        self._overrides, self._robustness_images = tuple(overrides), robustness_images
        self._path = results / f"search_{net}.jsonl"
        self._first: Run | None = None

    def lines(self, defense: str) -> list[Line]:
        """The trials of a defense, in order."""
        return [line for line in read_lines(self._path) if line["defense"] == defense]

    def run(
        self,
        num_trials: int = NUM_TRIALS,
        defenses: Sequence[str] = DEFENSES,
        say: Callable[[str], None] = print,
    ) -> None:
        """Runs what is missing of that many trials of each defense, the defenses in turn."""
        reference = self.reference()
        for number in range(num_trials):
            for defense in defenses:
                lines = self.lines(defense)
                if len(lines) <= number:
                    first = beginnings(self._net, defense, self._path.parent)
                    space = space_of(self._net, defense)
                    settings = next_settings(first, defense, lines, reference, space)
                    line = self.trial(defense, number, settings)
                    append_line(self._path, line)
                    say(f"{self._net} {_said(line, reference)}")

    def reference(self) -> Figures:
        """The reference's figures on the held-out images, trained and measured once."""
        known = self.lines(REFERENCE)
        if not known:
            run, started = self._run("clean", {}, self._workdir / REFERENCE), Clock()
            state = runs.reference_state(run)
            figures = self._measured(run, state)
            # Other runs take a reference from a directory that has its report.
            add_to_report(run, make_report(run, {REFERENCE: figures}, names=MEASURED))
            line = {"defense": REFERENCE, "figures": figures} | self._facts(run) | started.seconds()
            append_line(self._path, {"net": self._net, "trial": 0, "settings": {}} | line)
            known = [line]
        return known[0]["figures"]

    def trial(self, defense: str, number: int, settings: Settings) -> Line:
        """Trains and measures; the directory of the trial is gone after that."""
        workdir, started = self._workdir / f"{defense}-{digest(settings)}", Clock()
        source = f"reference.source={self._workdir / REFERENCE}"
        run = self._run(defense, settings, workdir, source)
        line = {"net": self._net, "defense": defense, "trial": number, "settings": settings}
        try:
            figures = self._measured(run, runs.defended_state(run, runs.reference_state(run)))
        except DivergenceError as error:
            figures, line = None, line | {"failure": str(error)}
        shutil.rmtree(workdir)
        return line | {"figures": figures} | self._facts(run) | started.seconds()

    def _run(self, defense: str, settings: Settings, workdir: pathlib.Path, *others: str) -> Run:
        config = read_config(
            self._net, defense, settings, self._data_dir, *self._overrides, *others
        )
        configuration.claim_directory(config, workdir)
        run = build.build_run(config, workdir, like=self._first)
        self._first = self._first or run
        return run

    def _measured(self, run: Run, state: TrainState) -> dict[str, Any]:
        """The accuracy on all held-out images, robustness on the first of them."""
        whole = measure_state(run.evaluator, state, names=(), quiet=True)
        few = measure_state(
            run.evaluator, state, names=MEASURED, limit=self._robustness_images, quiet=True
        )
        few["robustness_images"] = few.pop("num_examples")
        del few["fgsm_curve"]
        return few | whole

    def _facts(self, run: Run) -> dict[str, Any]:
        names = {"data": run.facts.data, "train_images": run.feed.num_train, "seed": run.facts.seed}
        return names | machine()


def machine() -> dict[str, str]:
    """The versions and the device that figures were taken with. precision: of the training's
    products; figures are measured in full float32.
    """
    device = jax.devices()[0]
    return {
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": f"{device.device_kind} ({os.cpu_count()} cores)",
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "precision": jax.config.jax_default_matmul_precision or "JAX's default",
    }


class Clock:
    """Seconds of wall time and of the processor since it was made."""

    def __init__(self) -> None:
        self._wall, self._processor = time.monotonic(), time.process_time()

    def seconds(self) -> dict[str, float]:
        """Both, since then."""
        return {
            "seconds": round(time.monotonic() - self._wall, 1),
            "processor_seconds": round(time.process_time() - self._processor, 1),
        }


def _said(line: Line, reference: Figures) -> str:
    """A trial in a line, for the terminal."""
    title = f"{line['defense']} {line['trial']}"
    settings = ", ".join(f"{k.partition('.')[2]}={v}" for k, v in line["settings"].items())
    if line["figures"] is None:
        return f"{title}: {line['failure']} ({settings})"
    names = ("accuracy", "l2", "rho_linf", "accuracy_pgd")
    figures = ", ".join(f"{name} {line['figures'][name]:.4f}" for name in names)
    worth = promise(line, reference)
    return f"{title}: {figures}, promise {worth:.3f}, {line['seconds']:.0f} s ({settings})"
