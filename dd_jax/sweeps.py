"""Sweeps: one configuration with every value of a field, each in a run directory of its own.

    --sweep defense.name=clean,deep_defense --sweep defense.correct_scale=5,10

makes the runs "clean,correct_scale=5", "clean,correct_scale=10" and so on. Where the values leave the reference net alone, the
first run trains it and the others start from it.
"""

import itertools
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

from dd_jax.configuration import ConfigurationError

AFTER_THE_REFERENCE = ("defense.", "fine_tuning.", "evaluation.")
SOURCE = "reference.source"


class Run(NamedTuple):
    """A run of a sweep: its directory's name, and the overrides that make it."""

    name: str
    overrides: tuple[str, ...]


def expand(sweeps: Sequence[str], overrides: Sequence[str], workdir: pathlib.Path) -> list[Run]:
    """The runs of all combinations, in order; the overrides of the command line come before a sweep's own.

    ConfigurationError where a sweep is not FIELD=VALUE,VALUE,... or names a value twice.
    """
    choices = [_parse(sweep) for sweep in sweeps]
    fields = [field for field, _ in choices]
    if len(set(fields)) < len(fields):
        raise ConfigurationError(f"--sweep names {', '.join(fields)}; it must name each field once.")
    given = any(override.startswith(f"--config.{SOURCE}=") for override in overrides)
    shared = not given and all(field.startswith(AFTER_THE_REFERENCE) for field in fields)
    runs: list[Run] = []
    for values in itertools.product(*(values for _, values in choices)):
        pairs = list(zip(fields, values, strict=True))
        name = ",".join(
            value if field == "defense.name" else f"{field.split('.')[-1]}={value}" for field, value in pairs
        ).replace("/", "_")  # One directory, also where the values are paths.
        own = [f"--config.{field}={value}" for field, value in pairs]
        own += [f"--config.{SOURCE}={workdir / runs[0].name}"] if shared and runs else []
        runs.append(Run(name, (*overrides, *own)))
    return runs


def _parse(sweep: str) -> tuple[str, list[str]]:
    field, separator, text = sweep.removeprefix("--config.").partition("=")
    values = text.split(",")
    if not (field and separator and all(values)) or len(set(values)) < len(values):
        raise ConfigurationError(
            f"--sweep {sweep!r} is not understood; it looks like --sweep defense.correct_scale=5,10,20, each value once."
        )
    return field, values
