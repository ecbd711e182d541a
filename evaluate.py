"""Measures a finished run, from its checkpoints, draws its figures, and compares runs.

    python evaluate.py --workdir runs/digits_mlp [--measure deepfool fgsm ...] [--limit N]
        [--data_dir DIR]
    python evaluate.py --compare runs/ten/* [--out runs/comparison]

The first writes report.json and plots/ into the run directory. The second prints the paper's table,
measured beside published, and draws the paper's Figures 5 to 8; runs that are not fully measured
yet are measured first.
"""

import pathlib

from dd_jax import evaluation, xla
from dd_jax.experiment import build, command_line, comparison


def main() -> None:
    parser = command_line.make_parser(__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--workdir", type=pathlib.Path, help="a run directory that train.py made")
    what.add_argument(
        "--compare", type=pathlib.Path, nargs="+", metavar="DIR", help="run directories"
    )
    parser.add_argument(
        "--measure",
        nargs="+",
        choices=evaluation.NAMES,
        help="what to measure beside the accuracy; default: all that the run's inputs allow",
    )
    parser.add_argument(
        "--limit", type=command_line.positive, help="measure the first so many test images only"
    )
    parser.add_argument(
        "--out", type=pathlib.Path, default=pathlib.Path("runs/comparison"), help="of --compare"
    )
    parser.add_argument(
        "--data_dir", help="where TFDS keeps its data sets; default: where the run found them"
    )
    command_line.add_process_arguments(parser)
    arguments = parser.parse_args()
    command_line.join_processes(arguments)
    options = dict(names=arguments.measure, limit=arguments.limit, data_dir=arguments.data_dir)
    if arguments.compare:
        command_line.say(comparison.compare(arguments.compare, arguments.out, **options))
        return
    run = build.open_run(arguments.workdir, arguments.data_dir)
    command_line.say(comparison.measure_run(run, names=arguments.measure, limit=arguments.limit))


if __name__ == "__main__":
    command_line.run(main, xla.set_flags().sentence)
