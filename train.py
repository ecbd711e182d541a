"""Trains a reference net, defends it, and prints what it gained.

    python train.py --config configs/digits_mlp.py [--workdir DIR] [--data_dir DIR]
        [--config.FIELD=VALUE ...]
    python train.py --config configs/digits_mlp.py --sweep defense.correct_scale=5,10,20

The run directory (default: runs/CONFIG_NAME) keeps everything; rerun the command to resume. A sweep
makes a run for every value, in directories within it, from one reference net; evaluate.py --compare
puts them side by side.
"""

import pathlib
from collections.abc import Sequence
from functools import partial

from dd_jax import parallel, xla
from dd_jax.experiment import build, command_line, configuration, runs, sweeps
from dd_jax.results.report import REFERENCE, file_name, table
from dd_jax.training.loop import latest_step


def main() -> None:
    parser = command_line.make_parser(__doc__)
    parser.add_argument(
        "--config", required=True, help="a configuration file, such as configs/digits_mlp.py"
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
    arguments, overrides = parser.parse_known_args()
    command_line.join_processes(arguments)
    workdir = arguments.workdir or pathlib.Path("runs") / pathlib.Path(arguments.config).stem
    if not arguments.sweep:
        train(arguments, overrides, workdir)
        return
    chosen = sweeps.expand(arguments.sweep, overrides, workdir)
    for run in chosen:  # All are checked before the first begins.
        check = partial(checked, arguments, run.overrides, workdir / run.name)
        command_line.prepared_by_all(check)
    for number, run in enumerate(chosen, 1):
        command_line.say(f"run {number} of {len(chosen)}: {run.name}")
        train(arguments, run.overrides, workdir / run.name)
    command_line.say(f"\nCompare them: python evaluate.py --compare {workdir}/*")


def checked(arguments, overrides: Sequence[str], workdir: pathlib.Path):
    config = configuration.read(arguments.config, overrides)
    if arguments.data_dir:
        config.data.dir = arguments.data_dir
    configuration.check_directory(config, workdir)
    return config


def prepared(arguments, overrides: Sequence[str], workdir: pathlib.Path):
    config = checked(arguments, overrides, workdir)
    run = build.build_run(config, workdir)
    if run.load_reference is not None and latest_step(workdir, REFERENCE) is None:
        run.load_reference()  # Whether it is of use is said before the run begins.
    return config, run


def train(arguments, overrides: Sequence[str], workdir: pathlib.Path) -> None:
    prepare = partial(prepared, arguments, overrides, workdir)
    config, run = command_line.prepared_by_all(prepare)
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
    command_line.say(f"\n{table(report)}\nwritten to {workdir / file_name(report.limit)}")


if __name__ == "__main__":
    command_line.run(main, xla.set_flags().sentence)
