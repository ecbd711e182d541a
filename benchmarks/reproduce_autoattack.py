"""AutoAttack on the final nets of `python -m benchmarks.reproduce`, in an l2 and an linf ball.

    python -m benchmarks.reproduce_autoattack --nets mlp --seeds 0 --data_dir DIR [--num_images 1000]

Each net of benchmarks/reproduction/results_NET.jsonl whose run directory is in --workdir is attacked on the
first --num_images test images, version "standard", within the range of pixels. Lines go to
autoattack_NET.jsonl, those that are there are not measured again, and a measurement that was stopped goes
on in its run directory; the page shows them. --defenses takes some alone, and the references.
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
from benchmarks import reproduce_search as search  # noqa: E402
from dd_jax.evaluation.evaluate import AUTOATTACK  # noqa: E402
from dd_jax.experiment import build, command_line  # noqa: E402
from dd_jax.experiment.measuring import measure_state  # noqa: E402

# The balls by net, in units of a pixel's range; CIFAR-10's are those that RobustBench uses.
MNIST, CIFAR_10 = (("l2", 1.5), ("linf", 0.1)), (("l2", 0.5), ("linf", 8 / 255))
BALLS = {"mlp": MNIST, "lenet": MNIST, "convnet": CIFAR_10, "nin": CIFAR_10}
NUM_IMAGES = 1000
SEEDS = (0,)  # It takes minutes for a net.


def main() -> None:
    parser = final.make_parser(__doc__, SEEDS)
    parser.add_argument("--num_images", type=command_line.positive, default=NUM_IMAGES)
    arguments = parser.parse_args()
    for net in arguments.nets:
        for norm, epsilon in BALLS[net]:
            attack_nets(net, norm, epsilon, arguments)
    command_line.say(f"written to {page.write_page(arguments.results)}")


def attack_nets(net: str, norm: str, epsilon: float, arguments: Any) -> None:
    """All final nets of that name in one ball; the attacks are compiled once."""
    path, first = arguments.results / f"autoattack_{net}.jsonl", None
    ball = {"norm": norm, "epsilon": epsilon}
    overrides = [
        f"--config.evaluation.autoattack_norm={norm}",
        f"--config.evaluation.epsilon={epsilon}",
        f"--config.evaluation.autoattack_examples={arguments.num_images}",
    ]
    for net_key, where, stage in final.final_nets(net, arguments):
        key = net_key | ball | {"num_examples": arguments.num_images}
        if any(key.items() <= each.items() for each in search.read_lines(path)):
            continue
        run = final.opened(first, where, arguments.data_dir, overrides)
        first = first or run
        state, started = build.restore_state(run, stage), search.Clock()
        options = dict(names=(AUTOATTACK,), name=stage, save_in=where)
        (found,) = measure_state(first.evaluator, state, **options)[AUTOATTACK]
        search.append_line(path, key | found | final.facts(run) | started.seconds())
        command_line.say(
            f"{net} {key['seed']} {key['defense']}, {norm} {epsilon:g}: {found['robust_accuracy']:.2%} of "
            f"{found['num_examples']} images withstand"
        )


if __name__ == "__main__":
    command_line.run(main, FLAGS_ADDED.sentence)
