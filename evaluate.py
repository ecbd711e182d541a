"""Measures a finished run again, from its checkpoints.

python evaluate.py --workdir runs/digits_mlp [--data_dir DIR]
"""

import pathlib

from dd_jax import command_line, configuration, experiment, reports, xla_settings


def main() -> None:
    parser = command_line.make_parser(__doc__)
    parser.add_argument("--workdir", required=True, type=pathlib.Path, help="a run directory that train.py made")
    parser.add_argument("--data_dir", help="where TFDS keeps its data sets; default: where the run found them")
    arguments = parser.parse_args()
    config = configuration.load(arguments.workdir)
    if arguments.data_dir:
        config.data.dir = arguments.data_dir

    parts = experiment.build(config, arguments.workdir)
    measured = {
        stage: experiment.measure(parts, experiment.restore(parts, stage), name=stage)
        for stage in (experiment.REFERENCE, experiment.DEFENDED)
    }
    report = reports.make_report(parts, measured)
    path = reports.write(report, arguments.workdir)
    print(f"\n{reports.table(report)}\nwritten to {path}")


if __name__ == "__main__":
    xla_settings.apply()
    command_line.run(main)
