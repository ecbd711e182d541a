"""What a measurement runs on the device.

Every measurement is two programs: `attack(shared, batch)` finds perturbations, `judge(shared,
batch, found)` asks the net again about each of them and gives `(sums, rows)`. `compile_fn` compiles
the two apart from one another into what is run: `in_two_programs`, or a function that gives every
device a share of the batch, adds up the sums and puts the rows back together. `shared` holds the
weights and all else that is the same for every example. Both run in full float32, also where JAX's
default is lower, unless jax_default_matmul_precision asks for something else.
"""

import contextlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Shaped

from dd_jax.data import Batch
from dd_jax.evaluation import metrics
from dd_jax.evaluation.measurements import Found, Problem, Settings, fgsm_direction, fooled_along
from dd_jax.evaluation.metrics import Sums
from dd_jax.evaluation.verification import predicted_classes

ApplyFn = Callable[..., Array]
"""(variables, inputs) -> logits, row by row; of a random net, with a key after them."""
Rows = dict[str, Shaped[Array | np.ndarray, "batch ..."]]
Shared = Mapping[str, Any]
BatchFn = Callable[[Shared, Batch], tuple[Any, Rows | None]]
"""(what all examples share, a batch) -> (sums over the examples, what is needed of each example if
anything).
"""
AttackFn = Callable[[Shared, Batch], Any]
JudgeFn = Callable[[Shared, Batch, Any], tuple[Any, Rows | None]]
CompileFn = Callable[[AttackFn, JudgeFn], BatchFn]
SIZE = "size "
"""What the names of rows with sizes of perturbations begin with."""


def in_two_programs(attack: AttackFn, judge: JudgeFn) -> BatchFn:
    """Compiles both, each by itself: the judge does not depend on how the attack was compiled."""
    compiled_attack, compiled_judge = jax.jit(attack), jax.jit(judge)
    return lambda shared, batch: compiled_judge(shared, batch, compiled_attack(shared, batch))


def in_full_precision(compile_fn: CompileFn) -> CompileFn:
    """The same, with products and convolutions in full float32, also on accelerators, which by
    JAX's default round their factors to 10 bits or fewer. What jax_default_matmul_precision asks
    for goes before.
    """

    def compiled(attack: AttackFn, judge: JudgeFn) -> BatchFn:
        run = compile_fn(attack, judge)

        def run_in_full_precision(shared: Shared, batch: Batch) -> tuple[Any, Rows | None]:
            with full_precision():
                return run(shared, batch)

        return run_in_full_precision

    return compiled


def full_precision() -> AbstractContextManager[Any]:
    """Of what is traced within. CPUs have it anyway: nothing changes there."""
    asked_for = jax.config.jax_default_matmul_precision  # type: ignore[attr-defined]
    if jax.default_backend() == "cpu" or asked_for is not None:
        return contextlib.nullcontext()
    return jax.default_matmul_precision("highest")


def measurement_programs(
    apply_fn: ApplyFn, names: tuple[str, ...], settings: Settings
) -> tuple[AttackFn, JudgeFn]:
    """The two programs from a batch to its `metrics.Sums`.

    Where a measurement needs more, the rows are "mask"; SIZE and the measurement's name, for
    robustness curves; and for PASS "image" and DeepFool's "perturbation".
    """
    on_device = tuple(dict.fromkeys("deepfool" if name == "pass" else name for name in names))

    def problem(shared: Shared, batch: Batch) -> Problem:
        logits_fn = partial(apply_fn, shared["variables"])
        return Problem(logits_fn, batch["image"], batch["label"], shared["bounds"], shared["key"])

    def attack(shared: Shared, batch: Batch) -> Found:
        return metrics.attack(problem(shared, batch), names=on_device, settings=settings)

    def judge(shared: Shared, batch: Batch, found: Found) -> tuple[Sums, Rows | None]:
        judged = metrics.judge(problem(shared, batch), found, settings=settings)
        rows: Rows = {f"{SIZE}{name}": sizes for name, sizes in judged.sizes.items()}
        if "pass" in names:
            rows |= {"image": batch["image"], "perturbation": found["deepfool"].perturbation}
        sums = metrics.sum_up(judged, batch["mask"])
        return sums, {"mask": batch["mask"]} | rows if rows else None

    return attack, judge


def curve_programs(apply_fn: ApplyFn) -> tuple[AttackFn, JudgeFn]:
    """The two programs from a batch to how many are classified rightly under FGSM, for each
    epsilon.
    """

    def attack(shared: Shared, batch: Batch) -> Array:
        logits_fn = partial(apply_fn, shared["variables"])
        return fgsm_direction(logits_fn, batch["image"], batch["label"])

    def judge(shared: Shared, batch: Batch, direction: Array) -> tuple[tuple[Array, Array], None]:
        logits_fn = partial(apply_fn, shared["variables"])
        problem = Problem(logits_fn, batch["image"], batch["label"], shared["bounds"], None)
        predicted = predicted_classes(logits_fn, batch["image"])
        fooled = fooled_along(problem, predicted, direction, shared["epsilons"])
        counts = batch["mask"] > 0
        return (jnp.sum(~fooled & counts[None], axis=1), jnp.sum(counts)), None

    return attack, judge


def example_programs(apply_fn: ApplyFn, settings: Settings) -> tuple[AttackFn, JudgeFn]:
    """The two programs from a batch to DeepFool's perturbations and the classes they lead to."""

    def attack(shared: Shared, batch: Batch) -> Array:
        logits_fn = partial(apply_fn, shared["variables"])
        problem = Problem(logits_fn, batch["image"], batch["label"], None, None)
        found = metrics.attack(problem, names=("deepfool",), settings=settings)
        return found["deepfool"].perturbation

    def judge(shared: Shared, batch: Batch, perturbation: Array) -> tuple[Array, Rows]:
        logits_fn = partial(apply_fn, shared["variables"])
        before, after = (
            predicted_classes(logits_fn, x) for x in (batch["image"], batch["image"] + perturbation)
        )
        found = {"perturbation": perturbation, "before": before, "after": after}
        return jnp.sum(batch["mask"]), dict(batch) | found

    return attack, judge
