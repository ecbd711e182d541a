"""The command `dd-jax`, also `python -m dd_jax`; train.py and evaluate.py run the same code.

    dd-jax train --config digits_mlp
    dd-jax evaluate --workdir runs/digits_mlp
    dd-jax compare runs/ten/*
    dd-jax convert in.pth --model resnet18 out.safetensors
    dd-jax data mnist

A command is an entry of `COMMANDS`. What it needs is imported when it is run.
"""

import argparse
import importlib
import sys
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import dd_jax
from dd_jax.extras import MissingPackageError

Calls = Mapping[str, str]
"""How each command is called, for help and hints: {"train": "dd-jax train", ...}."""


class Command(NamedTuple):
    """A command: what it does, and where `main(arguments, calls)` is, or one of another name."""

    summary: str
    module: str
    function: str = "main"


COMMANDS = {
    "train": Command(
        "train a reference net, defend it, and print what it gained", "dd_jax.commands.train"
    ),
    "evaluate": Command("measure a run, and draw its figures", "dd_jax.commands.evaluate"),
    "compare": Command("compare runs", "dd_jax.commands.evaluate", "compare"),
    "convert": Command("convert a file of weights to safetensors", "dd_jax.commands.files"),
    "data": Command("download a data set", "dd_jax.commands.files", "data"),
}
SCRIPTS = {
    "train": "python train.py",
    "evaluate": "python evaluate.py",
    "compare": "python evaluate.py --compare",
}
"""How the commands are called in a checkout."""


def main(arguments: Sequence[str] | None = None, program: str = "dd-jax") -> None:
    """Runs the command line `program NAME ...`; None: sys.argv's arguments. Exit codes are those of
    `dd_jax.experiment.command_line.run`.
    """
    listed = "\n".join(f"    {name:10}{entry.summary}" for name, entry in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog=program,
        description=f"Deep Defense in JAX.\n\ncommands:\n{listed}",
        epilog=f"{program} COMMAND --help describes a command.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"dd_jax {dd_jax.__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    chosen = parser.parse_args(arguments)
    run(chosen.command, chosen.arguments, {name: f"{program} {name}" for name in COMMANDS})


def run(name: str, arguments: Sequence[str], calls: Calls) -> None:
    """Runs one of `COMMANDS`. Where a package that it needs is missing: a sentence, exit code 1."""
    _, module, function = COMMANDS[name]
    try:
        getattr(importlib.import_module(module), function)(arguments, calls)
    except MissingPackageError as error:
        sys.exit(f"error: {error}")
