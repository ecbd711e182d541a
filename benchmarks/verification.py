"""What asking the net again costs: the judge's share of an evaluation.

    python benchmarks/verification.py --weights DIR [--nets mlp lenet convnet] [--num_images 1000]

DIR holds NAME.npz as benchmarks/nets.py writes them. Every measurement is two programs, an attack and
a judge (`dd_jax.evaluation.programs`). Both are compiled first and then timed on the same batch, one
after the other, several times in turn; the medians count. "confirmation" is what the judge adds for a
perturbation that an attack has judged itself: one forward pass at the perturbed inputs. The judge's
other passes (the accuracy, the FGSM curve) are measurements that some program must make.
"""

import argparse
import pathlib
import statistics
import sys
import time
from functools import partial
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from dd_jax import xla  # noqa: E402

xla.set_flags()

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import nets  # noqa: E402
import numpy as np  # noqa: E402

from dd_jax.evaluation import Settings  # noqa: E402
from dd_jax.evaluation.programs import measurement_programs  # noqa: E402
from dd_jax.evaluation.verification import is_fooled  # noqa: E402

NAMES = ("deepfool", "fgsm", "pgd", "carlini_wagner")


def seconds(calls: dict[str, Any], repetitions: int = 5) -> dict[str, float]:
    """The median time of each call, all in turn."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        jax.block_until_ready(call())
    for _ in range(repetitions):
        for name, call in calls.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(several) for name, several in times.items()}


def measure(name: str, arguments: argparse.Namespace) -> dict[str, float]:
    """The times of one net's evaluation: attack, judge, and one confirming forward pass."""
    apply_fn, params, inputs, labels = nets.load(name, "", pathlib.Path(), arguments.weights)
    inputs, labels = inputs[: arguments.num_images], labels[: arguments.num_images]
    settings = Settings(carlini_wagner_num_steps=100, carlini_wagner_num_binary_search_steps=3)
    attack, judge = map(jax.jit, measurement_programs(apply_fn, arguments.names, settings))
    bounds = tuple(
        np.full(inputs.shape[1:], edge, np.float32) for edge in (inputs.min(), inputs.max())
    )
    shared = {"variables": params, "bounds": bounds, "key": None}
    batch = {"image": inputs, "label": labels, "mask": jnp.ones(len(labels))}
    found = attack(shared, batch)
    confirm = jax.jit(lambda params, x: is_fooled(partial(apply_fn, params), x, 0 * x, labels))
    return seconds(
        {
            "attack": lambda: attack(shared, batch),
            "judge": lambda: judge(shared, batch, found),
            "confirmation": lambda: confirm(params, inputs),
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=pathlib.Path, required=True)
    parser.add_argument("--nets", nargs="+", default=["mlp", "lenet", "convnet"])
    parser.add_argument("--names", nargs="+", choices=NAMES, default=NAMES)
    parser.add_argument("--num_images", type=int, default=500)
    arguments = parser.parse_args()
    arguments.names = tuple(arguments.names)
    print("net       attack s   judge s   judge's share   confirmations' share")
    for name in arguments.nets:
        times = measure(name, arguments)
        whole = times["attack"] + times["judge"]
        confirmations = len(arguments.names) * times["confirmation"]
        print(
            f"{name:8} {times['attack']:9.3f} {times['judge']:9.3f} {times['judge'] / whole:15.1%}"
            f" {confirmations / whole:22.1%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
