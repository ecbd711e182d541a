"""Reads a configuration file, applies overrides from the command line, checks it, and keeps it with
the run.

Everything that can be wrong with a configuration becomes a ConfigurationError of one sentence: what
was wrong, what is allowed, what to do. (ml_collections' config_flags is not used, because it holds
one configuration per process in absl's flags, and a sweep reads many.)
"""

import ast
import difflib
import inspect
import json
import math
import pathlib
from collections.abc import Sequence
from typing import Any, get_args

from ml_collections import ConfigDict

from dd_jax import defenses, models, parallel, training
from dd_jax._margin import Gradient
from dd_jax.data import PREPROCESSINGS, SOURCES, STREAMED_SOURCES
from dd_jax.defenses._deep_defense import SOLVERS, named_solver
from dd_jax.experiment import configuration_files
from dd_jax.experiment.configuration_files import ConfigurationError
from dd_jax.norms import LP_NORMS
from dd_jax.penalties import PENALTIES

FILE_NAME, PARTIAL_NAME = "config.json", "config.partial"
# May differ from one machine to the next.
NOT_PART_OF_THE_RUN = ("data.dir", "data.num_workers", "parallel", "evaluation.batch_size")


CHOICES = {
    "parallel": parallel.MODES,
    "model.name": models.NAMES,
    "model.compute_dtype": ("float32", "bfloat16"),
    "data.name": (*SOURCES, *STREAMED_SOURCES),
    "data.preprocessing": ("paper", *PREPROCESSINGS),
    "defense.name": defenses.NAMES,
    "defense.norm": ("l2", "linf"),
    "defense.attack_norm": ("l2", "linf"),
    "evaluation.autoattack_norm": LP_NORMS,
    "evaluation.autoattack_version": ("standard", "plus"),
    "defense.penalty": tuple(PENALTIES),
    "defense.solver": SOLVERS,
    "defense.gradient": get_args(Gradient),
    "defense.aggregation": ("min", "mean"),
    "reference.schedule": tuple(training.SCHEDULES),
    "fine_tuning.schedule": tuple(training.SCHEDULES),
}
RENAMED = {
    "reference.num_parts": "reference.accumulation_steps",
    "reference.centre_on": "reference.center_on",
    "fine_tuning.num_parts": "fine_tuning.accumulation_steps",
    "defense.classes_at_once": "defense.class_chunk_size",
    "evaluation.fgs_max_epsilon": "evaluation.fgsm_max_epsilon",
}
"""Fields by the names that they had before."""
ADDED = {
    "parallel": "auto",
    "data.crop_padding": 0,
    "data.validation_images": 0,
    "reference.average_decay": 0.0,
    "fine_tuning.average_decay": 0.0,
    "defense.penalty": "exponential",
    "defense.solver": "deepfool",
    "defense.gradient": "through_iterates",
    "defense.attack_norm": "linf",
    "defense.num_attack_steps": 10,
    "defense.relative_step_size": 0.25,
    "defense.kl_weight": 6.0,
    "defense.max_margin": 0.2,
    "defense.clean_weight": 1 / 3,
    "defense.num_bisections": 10,
    "defense.absolute_correct_scale": 2.0,
    "defense.absolute_wrong_scale": 1.0,
    "defense.aggregation": "min",
    "defense.worst_fraction": 0.2,
    "evaluation.minimum_norm_examples": 500,
    "evaluation.minimum_norm_num_steps": 1000,
    "evaluation.autoattack_norm": "linf",
    "evaluation.epsilon": 0.1,
    "evaluation.autoattack_version": "standard",
    "evaluation.autoattack_examples": 1000,
}
"""Fields that older run directories lack, with the values that change nothing."""
SHARES = tuple(
    f"defense.{name}" for name in ("mixing_weight", "fgsm_weight", "clean_weight", "worst_fraction")
)
NUM_SEEDS = 2**32  # JAX's keys keep no more of a seed.
# Of the evaluation's DeepFool too, whatever the defense. 0: none.
CLASS_LIMITS = ("num_candidates", "class_chunk_size")
AT_LEAST_ONE = (
    "batch_size",
    "num_steps",
    "accumulation_steps",
    "num_binary_search_steps",
    "num_attack_steps",
    "carlini_wagner_examples",
    "minimum_norm_examples",
    "autoattack_examples",
)
MUST_BE_POSITIVE = ("learning_rate", "max_epsilon", "evaluation.epsilon")


def read(path: str, overrides: Sequence[str] = ()) -> ConfigDict:
    """The configuration in a Python file (`get_config()`), or of a name ("digits_mlp"), with
    overrides like `--config.defense.correct_scale=30`.

    ConfigurationError for whatever makes no sense, and for an override of an option that the chosen
    defense does not take. A file may set the options of all defenses. An override of the penalty
    brings that penalty's own scales: the file's are another's.
    """
    config = configuration_files.load(path)
    before = config.get("defense", {}).get("penalty")
    for override in overrides:
        _apply(config, override)
    check(config)
    if config.defense.penalty != before:
        _take_scales(config, overrides)
    _check_taken(config.defense.name, overrides)
    return config


def is_taken(option: str, defense: str) -> bool:
    """Whether `defense.OPTION` makes a difference to a run with that defense, or to its
    evaluation.
    """
    return option in CLASS_LIMITS or option in defenses.option_names(defense)


def defense_option(override: str) -> str | None:
    """The option of a defense that an override sets; None where it sets another field, or the
    defense itself.
    """
    section, _, option = override.partition("=")[0].removeprefix("--config.").partition(".")
    return option if section == "defense" and option != "name" else None


def _check_taken(defense: str, overrides: Sequence[str]) -> None:
    given = dict.fromkeys(option for override in overrides if (option := defense_option(override)))
    others = {
        f"defense.{option}": ", ".join(name for name in defenses.NAMES if is_taken(option, name))
        or "none"
        for option in given
        if not is_taken(option, defense)
    }
    if others:
        listed = ", ".join(f"{field} (which is for {names})" for field, names in others.items())
        raise ConfigurationError(
            f"The defense {defense!r} does not take {listed}; leave it out, or choose another "
            f"defense.name."
        )


def _apply(config: ConfigDict, override: str) -> None:
    name, separator, text = override.removeprefix("--config.").partition("=")
    if not override.startswith("--config.") or not separator:
        raise ConfigurationError(
            f"The argument {override!r} is not understood; overrides look like --config.seed=1, "
            f"--help lists the rest."
        )
    fields = flatten(config)
    if name in RENAMED:
        raise ConfigurationError(f"{name} is now called {RENAMED[name]}; use that name.")
    if name not in fields:
        close = difflib.get_close_matches(name, fields, n=3, cutoff=0.4)
        hint = (
            f"did you mean {' or '.join(close)}?"
            if close
            else f"there are {', '.join(sorted(fields))}."
        )
        raise ConfigurationError(f"There is no field {name!r} in the configuration; {hint}")
    config.update_from_flattened_dict({name: _convert(name, text, fields[name])})


def _take_scales(config: ConfigDict, overrides: Sequence[str]) -> None:
    """Gives a penalty its own scales, but those that an override sets."""
    given = [defense_option(override) for override in overrides]
    parameters = inspect.signature(PENALTIES[config.defense.penalty]).parameters
    for option in ({"correct_scale", "wrong_scale"} - set(given)) & parameters.keys():
        config.defense[option] = parameters[option].default


def _convert(name: str, text: str, present: Any) -> Any:
    """The override's text as the type that the field has."""
    if isinstance(present, str):
        return text
    try:
        value = ast.literal_eval({"true": "True", "false": "False"}.get(text.lower(), text))
    except (ValueError, SyntaxError, TypeError):
        value = text
    if isinstance(present, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not type(present):
        kind = {bool: "true or false", int: "a whole number", float: "a number"}[type(present)]
        raise ConfigurationError(f"{name} is {text!r}; it must be {kind}, such as {present}.")
    return value


def flatten(config: ConfigDict | dict, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        inner = isinstance(value, (ConfigDict, dict))
        flat.update(flatten(value, f"{prefix}{name}.") if inner else {prefix + name: value})
    return flat


def check(config: ConfigDict) -> None:
    """Raises ConfigurationError for the first value that makes no sense."""
    fields = flatten(config)
    missing = sorted(CHOICES.keys() - fields.keys())
    if missing:
        raise ConfigurationError(
            f"The configuration has no {', '.join(missing)}; begin with configs/default.py."
        )
    for name, value in fields.items():
        if name in CHOICES:
            _check_choice(name, value)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if name.endswith(AT_LEAST_ONE) and value < 1:
            raise ConfigurationError(f"{name} is {value}; it must be at least 1.")
        if name.endswith(MUST_BE_POSITIVE) and not value > 0:
            raise ConfigurationError(f"{name} is {value}; it must be above 0.")
        if value < 0 or not math.isfinite(value):
            raise ConfigurationError(f"{name} is {value}; it must be a finite number, 0 or more.")
    if fields.get("seed", 0) >= NUM_SEEDS:
        raise ConfigurationError(f"seed is {config.seed}; it must be below {NUM_SEEDS}.")
    for name in SHARES:
        if fields.get(name, 0) > 1:
            raise ConfigurationError(f"{name} is {fields[name]}; it must be within 0..1.")
    for name in ("reference.average_decay", "fine_tuning.average_decay"):
        if fields.get(name, 0.0) >= 1:
            raise ConfigurationError(f"{name} is {fields[name]}; it must be below 1.")
    _check_solver(config)
    if fields.get("defense.num_candidates") == 1:
        raise ConfigurationError(
            "defense.num_candidates is 1; it must be at least 2, or 0 for all classes."
        )


def _check_choice(name: str, value: Any) -> None:
    """One of CHOICES, or a net of any depth and width (`models.FAMILIES`)."""
    if value in CHOICES[name]:
        return
    listed = CHOICES[name]
    if name == "model.name":
        try:
            models.find(str(value))
            return
        except ValueError:
            listed = (*listed, *(family.names for family in models.FAMILIES))
    raise ConfigurationError(f"{name} is {value!r}; it must be one of {', '.join(listed)}.")


def _check_solver(config: ConfigDict) -> None:
    """ConfigurationError for a solver that the chosen defense cannot use."""
    chosen = config.defense
    if "solver" not in defenses.option_names(chosen.name):
        return
    if chosen.solver != "deepfool" and chosen.gradient != "at_boundary":
        raise ConfigurationError(
            f"defense.solver is {chosen.solver!r}; it needs defense.gradient=at_boundary."
        )
    try:
        named_solver(chosen.solver, chosen.norm)
    except ValueError as error:
        raise ConfigurationError(f"defense.solver: {error}") from error


def check_directory(config: ConfigDict, workdir: pathlib.Path) -> None:
    """ConfigurationError unless the directory is this configuration's run, empty, or not there.
    Changes nothing.
    """
    path = workdir / FILE_NAME
    if path.exists():
        theirs, ours = _comparable(load(workdir)), _comparable(config)
        different = sorted(
            name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name)
        )
        if different:
            listed = ", ".join(
                f"{name} ({theirs.get(name)!r} there, {ours.get(name)!r} here)"
                for name in different[:5]
            )
            raise ConfigurationError(
                f"The run directory {workdir} belongs to another configuration: {listed}; "
                "give another one with --workdir, or remove it to start again."
            )
    elif workdir.exists() and (
        not workdir.is_dir() or any(file.name != PARTIAL_NAME for file in workdir.iterdir())
    ):
        raise ConfigurationError(
            f"{workdir} exists and is not a run directory (it has no {FILE_NAME}); "
            "give an empty or new one with --workdir."
        )


def claim_directory(config: ConfigDict, workdir: pathlib.Path) -> None:
    """Makes the run directory and writes the configuration into it; ConfigurationError as in
    `check_directory`.
    """
    check_directory(config, workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigurationError(
            f"The run directory {workdir} cannot be made ({error.strerror}); give another one with "
            f"--workdir."
        ) from error
    partial = workdir / PARTIAL_NAME
    partial.write_text(json.dumps(config.to_dict(), indent=2) + "\n")
    partial.replace(workdir / FILE_NAME)


def _comparable(config: ConfigDict) -> dict[str, Any]:
    return {
        name: value for name, value in flatten(config).items() if name not in NOT_PART_OF_THE_RUN
    }


def load(workdir: pathlib.Path, overrides: Sequence[str] = ()) -> ConfigDict:
    """The configuration of an existing run directory, measured otherwise where overrides like
    `--config.evaluation.epsilon=0.2` say so.
    """
    path = workdir / FILE_NAME
    try:
        config = ConfigDict(_up_to_date(json.loads(path.read_text())))
        check(config)
        for override in overrides:
            _check_is_measured(override)
            _apply(config, override)
        check(config)
    except (FileNotFoundError, NotADirectoryError):
        raise ConfigurationError(
            f"{workdir} is not a run directory: it has no {FILE_NAME}; give one that train.py made."
        ) from None
    except (ValueError, AttributeError) as error:  # Not JSON, no JSON object, not our fields.
        raise ConfigurationError(
            f"{path} is damaged, or no run's ({error}); restore it, or give another directory."
        ) from error
    return config


def _check_is_measured(override: str) -> None:
    """ConfigurationError for an override of anything but how a run is measured."""
    if override.startswith("--config.") and not override.startswith("--config.evaluation."):
        raise ConfigurationError(
            f"{override} cannot change a run that is trained; only fields of evaluation can, such "
            "as --config.evaluation.epsilon=0.2."
        )


def _up_to_date(fields: Any) -> dict[str, Any]:
    """The fields of a run directory, under the names and with the fields of this version.

    AttributeError where it is no dictionary.
    """
    known = flatten(dict(fields.items()))
    flat = {RENAMED.get(name, name): value for name, value in known.items()}
    sections = {name.partition(".")[0] for name in flat}
    is_known = lambda name: "." not in name or name.partition(".")[0] in sections
    missing = {name: value for name, value in ADDED.items() if is_known(name)}
    nested: dict[str, Any] = {}
    for name, value in (missing | flat).items():
        section, dot, field = name.rpartition(".")
        (nested.setdefault(section, {}) if dot else nested)[field] = value
    return nested
