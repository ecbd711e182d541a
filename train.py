"""Trains a reference net, defends it, and prints what it gained.

    python train.py --config configs/digits_mlp.py [--workdir DIR] [--data_dir DIR] [--config.FIELD=VALUE ...]

The run directory (default: runs/CONFIG_NAME) keeps everything; the same command on it goes on where it stopped.
"""

import pathlib

from dd_jax import command_line, configuration, experiment, reports, xla_settings


def main() -> None:
    parser = command_line.make_parser(__doc__)
    parser.add_argument("--config", required=True, help="a configuration file, such as configs/digits_mlp.py")
    parser.add_argument("--workdir", type=pathlib.Path, help="the run directory; default: runs/CONFIG_NAME")
    parser.add_argument("--data_dir", help="where TFDS keeps its data sets")
    arguments, overrides = parser.parse_known_args()
    config = configuration.read(arguments.config, overrides)
    if arguments.data_dir:
        config.data.dir = arguments.data_dir
    workdir = arguments.workdir or pathlib.Path("runs") / pathlib.Path(arguments.config).stem

    configuration.check_directory(config, workdir)
    parts = experiment.build(config, workdir)
    experiment.given_reference(parts)
    configuration.claim_directory(config, workdir)  # Only now: a run that cannot begin leaves nothing behind.
    print(f"{parts.data.description}\n{config.model.name}, {config.defense.name}; run directory {workdir}", flush=True)
    report = reports.make_report(parts, experiment.run(parts))
    path = reports.write(report, workdir)
    print(f"\n{reports.table(report)}\nwritten to {path}")


if __name__ == "__main__":
    xla_settings.apply()
    command_line.run(main)
