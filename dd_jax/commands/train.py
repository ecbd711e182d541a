"""`dd-jax train` and train.py: a run, or a sweep of runs."""

import pathlib
from argparse import Namespace
from collections.abc import Sequence
from functools import partial

from dd_jax import extras, parallel, xla
from dd_jax.commands import Calls
from dd_jax.results.report import REFERENCE, Report, file_name, table

with extras.needed("train"):
    from ml_collections import ConfigDict

    from dd_jax.experiment import (
        build,
        command_line,
        configuration,
        configuration_files,
        runs,
        sweeps,
    )
    from dd_jax.training.loop import latest_step

DESCRIPTION = """Trains a reference net, defends it, and prints what it gained.

    {train} --config digits_mlp [--workdir DIR] [--data_dir DIR] [--config.FIELD=VALUE ...]
    {train} --config digits_mlp --sweep defense.correct_scale=5,10,20

The run directory (default: runs/CONFIG_NAME) keeps everything; rerun the command to resume. A sweep
makes a run for every value, in directories within it, from one reference net; `{compare} DIR/*`
puts them side by side.
"""


def main(arguments: Sequence[str], calls: Calls) -> None:
    """Runs the command line, with exit codes as in `command_line.run`."""
    command_line.run(partial(_main, arguments, calls), xla.set_flags().sentence)


def _main(arguments: Sequence[str], calls: Calls) -> None:
    chosen, overrides = _parser(calls).parse_known_args(arguments)
    command_line.join_processes(chosen)
    workdir = chosen.workdir or pathlib.Path("runs") / pathlib.Path(chosen.config).stem
    if not chosen.sweep:
        train(chosen, overrides, workdir)
        return
    swept = sweeps.expand(chosen.sweep, overrides, workdir)
    for run in swept:  # All are checked before the first begins.
        check = partial(checked, chosen, run.overrides, workdir / run.name)
        command_line.prepared_by_all(check)
    for number, run in enumerate(swept, 1):
        command_line.say(f"run {number} of {len(swept)}: {run.name}")
        train(chosen, run.overrides, workdir / run.name)
    command_line.say(f"\nCompare them: {calls['compare']} {workdir}/*")


def _parser(calls: Calls) -> command_line.ArgumentParser:
    parser = command_line.make_parser(DESCRIPTION.format(**calls), calls["train"])
    names = ", ".join(configuration_files.names())
    parser.add_argument(
        "--config", required=True, help=f"a configuration file, or one of dd_jax's: {names}"
    )
    parser.add_argument(
        "--workdir", type=pathlib.Path, help="the run directory; default: runs/CONFIG_NAME"
    )
    parser.add_argument("--data_dir", help="where TFDS keeps its data sets")
    parser.add_argument(
        "--sweep",
        action="append",
        default=[],
        metavar="FIELD=A,B,...",
        help="a run for each value; may be repeated",
    )
    command_line.add_process_arguments(parser)
    return parser


def checked(arguments: Namespace, overrides: Sequence[str], workdir: pathlib.Path) -> ConfigDict:
    """The configuration of a run; ConfigurationError where it cannot be one in that directory."""
    config = configuration.read(arguments.config, overrides)
    if arguments.data_dir:
        config.data.dir = arguments.data_dir
    configuration.check_directory(config, workdir)
    return config


def prepared(
    arguments: Namespace, overrides: Sequence[str], workdir: pathlib.Path
) -> tuple[ConfigDict, build.Run]:
    """The configuration and the run, its data loaded; changes nothing on disk."""
    config = checked(arguments, overrides, workdir)
    return config, build.build_run(config, workdir)


def train(arguments: Namespace, overrides: Sequence[str], workdir: pathlib.Path) -> None:
    """One run, to its end: trains, measures, and prints the table."""
    prepare = partial(prepared, arguments, overrides, workdir)
    config, run = command_line.prepared_by_all(prepare)
    if run.load_reference is not None and latest_step(workdir, REFERENCE) is None:
        # Whether it is of use is said before the run begins. Only now: all processes load together.
        command_line.prepared_by_all(run.load_reference)
    if parallel.is_primary():
        # Only now: a run that cannot begin leaves nothing behind.
        configuration.claim_directory(config, workdir)
    parallel.wait_for_all("claimed")
    facts = run.facts
    command_line.say(f"{facts.data}\n{facts.model}, {facts.method}; run directory {workdir}")
    if facts.has_random_reference:
        command_line.say(
            "The reference net has random weights: reference.source is empty and "
            "reference.num_epochs is 0."
        )
    report = runs.run_stages(run)
    written = f"{workdir / file_name(report.limit)}{write_page(run, report)}"
    command_line.say(f"\n{table(report)}\nwritten to {written}")


def write_page(run: build.Run, report: Report) -> str:
    """Writes report.html and plots/, which need the extra `plots`; returns what to print of it."""
    try:
        from dd_jax.experiment import pages
    except extras.MissingPackageError as error:
        return f"; no report.html: {error}"
    return f", {pages.write_run_page(run, report, again=False).name} and {pages.PLOTS}/"
