"""Sweeps: one configuration with every value of a field, each in a run directory of its own.

    --sweep defense.name=clean,deep_defense --sweep defense.correct_scale=5,10

makes the runs "clean", which takes no correct_scale, "deep_defense,correct_scale=5" and
"deep_defense,correct_scale=10". Where the values leave the reference net alone, the first run
trains it and the others start from it.
"""

import itertools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

from dd_jax.defenses import NAMES
from dd_jax.experiment.configuration import ConfigurationError, defense_option, is_taken

AFTER_THE_REFERENCE = ("defense.", "fine_tuning.", "evaluation.")
SOURCE, DEFENSE = "reference.source", "defense.name"
Pairs = tuple[tuple[str, str], ...]  # fields and their values


class Run(NamedTuple):
    """A run of a sweep: its directory's name, and the overrides that make it."""

    name: str
    overrides: tuple[str, ...]


def expand(sweeps: Sequence[str], overrides: Sequence[str], workdir: pathlib.Path) -> list[Run]:
    """The runs of all combinations, in order; the overrides of the command line come before a
    sweep's own.

    Where the defense is swept, a defense's run goes without the options that only others of the
    sweep take, and is made once. Options that none of them takes stay, for `configuration.read` to
    refuse.

    ConfigurationError where a sweep is not FIELD=VALUE,VALUE,... or names a value twice.
    """
    choices = [_parse(sweep) for sweep in sweeps]
    fields = [field for field, _ in choices]
    if len(set(fields)) < len(fields):
        raise ConfigurationError(
            f"--sweep names {', '.join(fields)}; it must name each field once."
        )
    given = any(override.startswith(f"--config.{SOURCE}=") for override in overrides)
    shared = not given and all(field.startswith(AFTER_THE_REFERENCE) for field in fields)
    runs: list[Run] = []
    for pairs, taken in _combinations(choices):
        name = ",".join(
            value if field == DEFENSE else f"{field.split('.')[-1]}={value}"
            for field, value in pairs
        ).replace("/", "_")  # One directory, also where the values are paths.
        own = [f"--config.{field}={value}" for field, value in pairs]
        own += [f"--config.{SOURCE}={workdir / runs[0].name}"] if shared and runs else []
        runs.append(Run(name, (*filter(taken, overrides), *own)))
    return runs


def _combinations(
    choices: Sequence[tuple[str, list[str]]],
) -> Iterator[tuple[Pairs, Callable[[str], bool]]]:
    """Every combination of fields and values that makes a run of its own, and which overrides that
    run is to have.
    """
    defenses, seen = dict(choices).get(DEFENSE, []), set()
    fields = [field for field, _ in choices]
    for values in itertools.product(*(values for _, values in choices)):
        pairs = tuple(zip(fields, values, strict=True))
        taken = partial(_is_for, dict(pairs).get(DEFENSE), defenses)
        pairs = tuple(pair for pair in pairs if taken(pair[0]))
        if pairs not in seen:
            seen.add(pairs)
            yield pairs, taken


def _is_for(defense: str | None, defenses: Sequence[str], override: str) -> bool:
    """Whether a run with this defense is to have an override (or swept field), where the sweep goes
    through `defenses`.
    """
    option = defense_option(override)
    # An unknown defense is for `configuration.read` to refuse.
    if option is None or defense not in NAMES:
        return True
    return is_taken(option, defense) or not any(
        is_taken(option, name) for name in defenses if name in NAMES
    )


def _parse(sweep: str) -> tuple[str, list[str]]:
    field, separator, text = sweep.removeprefix("--config.").partition("=")
    values = text.split(",")
    if not (field and separator and all(values)) or len(set(values)) < len(values):
        raise ConfigurationError(
            f"--sweep {sweep!r} is not understood; it looks like --sweep "
            f"defense.correct_scale=5,10,20, each value once."
        )
    return field, values
