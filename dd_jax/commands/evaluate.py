"""`dd-jax evaluate`, `dd-jax compare` and evaluate.py: measurements of finished runs."""

import pathlib
from argparse import Namespace
from collections.abc import Sequence
from functools import partial

from dd_jax import evaluation, extras, xla
from dd_jax.commands import Calls

with extras.needed("all"):
    from dd_jax.experiment import build, command_line, comparison

DESCRIPTION = """Measures a finished run, from its checkpoints, draws its figures; compares runs.

    {evaluate} --workdir runs/digits_mlp [--measure deepfool fgsm ...] [--limit N]
        [--config.evaluation.FIELD=VALUE ...]
    {evaluate} --workdir runs/digits_mlp --measure autoattack --config.evaluation.epsilon=0.1
    {compare} runs/ten/* [--out runs/comparison]

The first writes report.json, plots/ and report.html into the run directory. The second prints the
paper's table, measured beside published, draws the paper's Figures 5 to 8, and writes
comparison.html; runs that are not fully measured yet are measured first.
"""
COMPARED = "finished run directories, of the same data and net"


def main(arguments: Sequence[str], calls: Calls) -> None:
    """Runs the command line, with exit codes as in `command_line.run`."""
    parser = command_line.make_parser(DESCRIPTION.format(**calls), calls["evaluate"])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--workdir", type=pathlib.Path, help="a run directory")
    what.add_argument("--compare", type=pathlib.Path, nargs="+", metavar="DIR", help=COMPARED)
    _add_options(parser)
    _run(parser, arguments)


def compare(arguments: Sequence[str], calls: Calls) -> None:
    """`dd-jax compare DIR ...`: the same as `main` with --compare."""
    parser = command_line.make_parser(DESCRIPTION.format(**calls), calls["compare"])
    parser.add_argument("compare", type=pathlib.Path, nargs="+", metavar="DIR", help=COMPARED)
    _add_options(parser)
    _run(parser, arguments)


def _add_options(parser: command_line.ArgumentParser) -> None:
    parser.add_argument(
        "--measure",
        nargs="+",
        choices=evaluation.NAMES,
        help="what to measure beside the accuracy; default: all that the run's inputs allow "
        "but autoattack, which takes far longer",
    )
    parser.add_argument(
        "--limit", type=command_line.positive, help="measure the first so many test images only"
    )
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("runs/comparison"), help="of a comparison"
    )
    parser.add_argument(
        "--data_dir", help="where TFDS keeps its data sets; default: where the run found them"
    )
    command_line.add_process_arguments(parser)


def _run(parser: command_line.ArgumentParser, arguments: Sequence[str]) -> None:
    def parsed() -> None:
        _main(*parser.parse_known_args(arguments))

    command_line.run(parsed, xla.set_flags().sentence)


def _main(chosen: Namespace, overrides: Sequence[str]) -> None:
    command_line.join_processes(chosen)
    options = dict(names=chosen.measure, limit=chosen.limit)
    if chosen.compare:
        compare_fn = partial(comparison.compare, chosen.compare, chosen.out, **options)
        command_line.say(compare_fn(data_dir=chosen.data_dir, overrides=overrides))
        return
    run = build.open_run(chosen.workdir, chosen.data_dir, overrides)
    command_line.say(comparison.measure_run(run, **options))
