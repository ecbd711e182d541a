"""The paper's Table 2 from one command, and the search of the options that its runs have.

python -m benchmarks.reproduce --search --nets mlp lenet --data_dir DIR [--trials 12]
"""

import argparse
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dd_jax import xla  # noqa: E402

xla.set_flags()  # Before JAX starts, as train.py does.

from benchmarks import reproduce_search as search  # noqa: E402
from dd_jax.experiment import command_line  # noqa: E402


def main() -> None:
    parser = command_line.make_parser(__doc__)
    parser.add_argument("--search", action="store_true")
    parser.add_argument("--nets", nargs="+", choices=search.CONFIGS, default=["mlp", "lenet"])
    parser.add_argument("--defenses", nargs="+", choices=search.DEFENSES, default=search.DEFENSES)
    parser.add_argument("--trials", type=command_line.positive, default=search.NUM_TRIALS)
    parser.add_argument("--workdir", type=pathlib.Path, default=pathlib.Path("runs/reproduce"))
    parser.add_argument("--results", type=pathlib.Path, default=search.RESULTS)
    parser.add_argument("--data_dir", help="where TFDS keeps its data sets")
    arguments = parser.parse_args()
    for net in arguments.nets:
        trials = search.Search(net, arguments.workdir, arguments.results, arguments.data_dir)
        trials.run(arguments.trials, arguments.defenses, command_line.say)


if __name__ == "__main__":
    command_line.run(main)
