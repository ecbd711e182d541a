"""The paper's Table 2 from one command, and the search of the options that its runs have.

    python -m benchmarks.reproduce --search --nets mlp lenet --data_dir DIR [--trials 12]
    python -m benchmarks.reproduce --choose --nets mlp lenet
    python -m benchmarks.reproduce --nets mlp lenet --seeds 0 1 2 --data_dir DIR
    python -m benchmarks.reproduce --page

The first searches the options of every defense on held-out training images, see reproduce_search.py. The
second writes down what is the best so far. The third trains with these options, measures on the test
images, see reproduce_final.py, and writes the page, benchmarks/reproduction/README.md; the fourth writes
the page alone. All go on where they were stopped. Run directories lie in --workdir, results in --results.
For CIFAR-10, --exact_subset FILE.npz ("test_images", "test_labels") has every net measured on these images
too. --processes N does the runs in N processes at a time, see reproduce_processes.py; --defenses without a
name, the references alone.
"""

import pathlib
import sys
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dd_jax import xla  # noqa: E402

FLAGS_ADDED = xla.set_flags()  # Before JAX starts, as train.py does.

from benchmarks import reproduce_final as final  # noqa: E402
from benchmarks import reproduce_page as page  # noqa: E402
from benchmarks import reproduce_processes as processes  # noqa: E402
from benchmarks import reproduce_search as search  # noqa: E402
from dd_jax.experiment import command_line  # noqa: E402


def main() -> None:
    parser = final.make_parser(__doc__, final.SEEDS)
    parser.add_argument("--search", action="store_true", help="search options")
    parser.add_argument("--choose", action="store_true", help="write down the best options")
    parser.add_argument("--page", action="store_true", help="write the page alone")
    parser.add_argument("--trials", type=command_line.positive, default=search.NUM_TRIALS)
    parser.add_argument("--exact_subset", type=pathlib.Path)
    parser.add_argument("--processes", type=command_line.positive, default=1)
    arguments = parser.parse_args()
    arguments.results.mkdir(parents=True, exist_ok=True)
    if arguments.processes > 1 and not (arguments.page or arguments.choose):
        in_processes(arguments)
        return
    where = (arguments.workdir, arguments.results, arguments.data_dir)
    for net in arguments.nets if not arguments.page else ():
        if arguments.search:
            search.Search(net, *where).run(arguments.trials, arguments.defenses, command_line.say)
        elif arguments.choose:
            final.write_choice(net, arguments.results)
        else:
            options = dict(exact_subset=arguments.exact_subset, say=command_line.say)
            final.Finals(net, *where, **options).run(arguments.seeds, arguments.defenses)
    if not arguments.search:
        command_line.say(f"written to {page.write_page(arguments.results)}")


def in_processes(arguments: Any) -> None:
    """The same, shared out; JAX starts in the other processes alone."""
    shared = [f"--{name}={getattr(arguments, name).resolve()}" for name in ("workdir", "results")]
    shared += [f"--trials={arguments.trials}"] + ["--search"] * arguments.search
    for name in ("data_dir", "exact_subset"):
        if value := getattr(arguments, name):
            shared.append(f"--{name}={pathlib.Path(value).resolve()}")
    parts = arguments.nets, arguments.seeds, arguments.defenses
    waves = processes.shares(*parts, search=arguments.search)
    failed = processes.run_shares(arguments.processes, waves, shared, arguments.workdir)
    if not arguments.search:
        command_line.say(f"written to {page.write_page(arguments.results)}")
    if failed:
        raise SystemExit(
            f"{len(failed)} processes did not end well ({', '.join(failed)}); see "
            f"{arguments.workdir / 'logs'}, and rerun the command to go on."
        )


if __name__ == "__main__":
    command_line.run(main, FLAGS_ADDED.sentence)
