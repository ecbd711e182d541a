"""The measurements by name, each in two parts: an attack, and a judge of what it found.

The judge takes nothing from the attack but its perturbations: the net is asked again, in a plain
forward pass (`dd_jax.evaluation.verification`). `dd_jax.evaluation.metrics` runs them.

Sizes (rho and ||D||) are of attacks that leave the *predicted* class, as in the authors' test
routine: every example counts, those misclassified included. Shares of misclassified examples
(accuracies, the FGSM curve) go by the labels.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped

from dd_jax.attacks._carlini_wagner import carlini_wagner_l2
from dd_jax.attacks._deepfool import deepfool
from dd_jax.attacks._gradient_sign import fgsm, minimal_fgsm, pgd
from dd_jax.evaluation.verification import is_fooled
from dd_jax.norms import Bounds, Norm, lp_norm, relative_norm, stay_within
from dd_jax.types import AttackResult, LogitsFn


class Settings(NamedTuple):
    """How to measure. Sizes are in the units of the inputs; hashable, so that it may be fixed when
    compiling.
    """

    norm: Norm = "l2"  # DeepFool's, as are the next four.
    num_steps: int = 50
    overshoot: float = 0.02
    num_candidates: int | None = None
    class_chunk_size: int | None = None
    fgsm_max_epsilon: float = 1.0  # Where the search for an example's smallest epsilon gives up.
    curve_max_epsilon: float = 0.3  # The curve has evenly spaced points, from 0 to this.
    curve_num_points: int = 31
    pgd_epsilon: float = 0.1  # In linf.
    pgd_step_size: float = 0.01
    pgd_num_steps: int = 40
    pgd_seed: int | None = None  # Of random starts. None: from the inputs themselves.
    carlini_wagner_num_steps: int = 200
    carlini_wagner_num_binary_search_steps: int = 5
    carlini_wagner_learning_rate: float = 0.05


class Problem(NamedTuple):
    """What every measurement is of. `bounds`: what FGSM, PGD and C&W stay within; DeepFool does
    not, as in the paper.
    """

    logits_fn: LogitsFn
    inputs: Float[Array, "batch ..."]
    labels: Int[Array, " batch"]
    bounds: Bounds | None
    key: PRNGKeyArray | None


class FgsmAttack(NamedTuple):
    """FGSM with each example's smallest epsilon, and its direction: the perturbation of epsilon 1
    that leaves the label.
    """

    minimal: AttackResult
    direction: Float[Array, "batch ..."]


Found = dict[str, AttackResult | FgsmAttack]
"""What the attacks found, by the name of the measurement."""


class Case(NamedTuple):
    """What the judge has: the problem, the predicted classes of the inputs, and what the attacks
    found.
    """

    problem: Problem
    predicted: Int[Array, " batch"]
    found: Found

    def is_fooled(self, attack: AttackResult, **limits: Any) -> Bool[Array, " batch"]:
        """Whether each of the attack's perturbations leaves the predicted class."""
        problem = self.problem
        return is_fooled(
            problem.logits_fn, problem.inputs, attack.perturbation, self.predicted, **limits
        )


class Judged(NamedTuple):
    """Figures by name, an array with one row per example; and by attack where its own success
    differs from the judge's.
    """

    figures: dict[str, Shaped[Array, "batch ..."]]
    disagreements: dict[str, Bool[Array, " batch"]]


def curve_epsilons(settings: Settings) -> list[float]:
    """The epsilons of the FGSM curve, evenly spaced from 0 to `curve_max_epsilon`, in the units of
    the inputs.
    """
    last = settings.curve_num_points - 1
    if last < 1 or not settings.curve_max_epsilon > 0:
        raise ValueError(
            f"curve_num_points is {last + 1} and curve_max_epsilon {settings.curve_max_epsilon}; "
            "there must be at least 2 points, up to an epsilon of more than 0."
        )
    exact = (settings.curve_max_epsilon * i / last for i in range(last + 1))
    # As precise as float32: 0.03, not 0.0299999999999999.
    return [float(f"{epsilon:.7g}") for epsilon in exact]


class Measurement(NamedTuple):
    """A measurement in its two parts, and what the attack is called in sentences."""

    title: str
    attack: Callable[[Problem, Settings], AttackResult | FgsmAttack]
    judge: Callable[[Case, Settings], Judged]


def attack_by_deepfool(problem: Problem, settings: Settings) -> AttackResult:
    """DeepFool away from the predicted class."""
    names = ("norm", "num_steps", "overshoot", "num_candidates", "class_chunk_size")
    return deepfool(
        problem.logits_fn, problem.inputs, **{name: getattr(settings, name) for name in names}
    )


def judge_deepfool(case: Case, settings: Settings) -> Judged:
    """The relative and the plain size of DeepFool's perturbations, overshoot included, its success
    and its steps.

    Where DeepFool does not succeed within `num_steps` what it reached counts all the same: read the
    success rate beside.
    """
    attack, norm = case.found["deepfool"], settings.norm
    fooled = case.is_fooled(attack)
    suffix = "" if norm == "l2" else "_deepfool"  # "rho_linf" is FGSM's.
    figures = {
        f"rho_{norm}{suffix}": relative_norm(attack.perturbation, case.problem.inputs, norm),
        f"{norm}{suffix}": lp_norm(attack.perturbation, norm),
        "deepfool_success": fooled,
        "deepfool_steps": attack.num_steps,
    }
    return Judged(figures, {"deepfool": fooled != attack.success})


def attack_by_fgsm(problem: Problem, settings: Settings) -> FgsmAttack:
    """FGSM with each example's smallest epsilon, away from the predicted class; and the direction
    away from the label.
    """
    minimal = minimal_fgsm(
        problem.logits_fn,
        problem.inputs,
        max_epsilon=settings.fgsm_max_epsilon,
        norm="linf",
        bounds=problem.bounds,
    )
    return FgsmAttack(minimal, fgsm_direction(problem.logits_fn, problem.inputs, problem.labels))


def fgsm_direction(logits_fn: LogitsFn, inputs: Array, labels: Array) -> Float[Array, "batch ..."]:
    """FGSM's perturbation (linf) of epsilon 1 away from the labels, without bounds."""
    return fgsm(logits_fn, inputs, labels, epsilon=1.0, norm="linf", early_stop=False).perturbation


def judge_fgsm(case: Case, settings: Settings) -> Judged:
    """rho_linf by each example's smallest epsilon, with its success, and whether FGSM fools at each
    epsilon of the curve.

    Where nothing up to `fgsm_max_epsilon` fools, that epsilon counts, without success.
    """
    problem, (minimal, direction) = case.problem, case.found["fgsm"]
    fooled = case.is_fooled(minimal, bounds=problem.bounds, epsilon=settings.fgsm_max_epsilon)
    curve = fooled_along(problem, case.predicted, direction, jnp.asarray(curve_epsilons(settings)))
    figures = {
        "rho_linf": relative_norm(minimal.perturbation, problem.inputs, "linf"),
        "fgsm_success": fooled,
        "fgsm_curve": curve.T,
    }
    return Judged(figures, {"fgsm": fooled != minimal.success})


def fooled_along(
    problem: Problem,
    predicted: Int[Array, " batch"],
    direction: Float[Array, "batch ..."],
    epsilons: Float[Array, " epsilons"],
) -> Bool[Array, "epsilons batch"]:
    """Whether the net misclassifies inputs + epsilon * direction, kept within the bounds; what it
    misclassifies anyway counts.
    """
    logits_fn, inputs, labels, bounds, _ = problem

    def at(epsilon: Float[Array, ""]) -> Bool[Array, " batch"]:
        perturbation = stay_within(epsilon.astype(inputs.dtype) * direction, inputs, bounds)
        return is_fooled(logits_fn, inputs, perturbation, labels)

    return (predicted != labels)[None] | lax.map(at, epsilons)


def attack_by_pgd(problem: Problem, settings: Settings) -> AttackResult:
    """PGD (linf) away from the label, until an iterate is misclassified."""
    if settings.pgd_seed is not None and problem.key is None:
        raise ValueError(
            f"pgd_seed is {settings.pgd_seed}, but there is no key to draw random starts with; "
            f"give one."
        )
    return pgd(
        problem.logits_fn,
        problem.inputs,
        problem.labels,
        epsilon=settings.pgd_epsilon,
        step_size=settings.pgd_step_size,
        num_steps=settings.pgd_num_steps,
        norm="linf",
        bounds=problem.bounds,
        key=None if settings.pgd_seed is None else problem.key,
    )


def judge_pgd(case: Case, settings: Settings) -> Judged:
    """Which examples are still classified rightly under PGD (linf); those misclassified already are
    not.
    """
    (logits_fn, inputs, labels, bounds, _), attack = case.problem, case.found["pgd"]
    limits = dict(bounds=bounds, epsilon=settings.pgd_epsilon, norm="linf")
    fooled = is_fooled(logits_fn, inputs, attack.perturbation, labels, **limits)
    return Judged(
        {"accuracy_pgd": ~fooled & (case.predicted == labels)}, {"pgd": fooled != attack.success}
    )


def attack_by_carlini_wagner(problem: Problem, settings: Settings) -> AttackResult:
    """C&W in l2, away from the predicted class."""
    return carlini_wagner_l2(
        problem.logits_fn,
        problem.inputs,
        bounds=problem.bounds,
        num_steps=settings.carlini_wagner_num_steps,
        learning_rate=settings.carlini_wagner_learning_rate,
        num_binary_search_steps=settings.carlini_wagner_num_binary_search_steps,
    )


def judge_carlini_wagner(case: Case, settings: Settings) -> Judged:
    """The l2 size of C&W's perturbations; where it does not succeed, of what came nearest, without
    success.
    """
    attack = case.found["carlini_wagner"]
    fooled = case.is_fooled(attack, bounds=case.problem.bounds)
    figures = {
        "l2_carlini_wagner": lp_norm(attack.perturbation, "l2"),
        "carlini_wagner_success": fooled,
    }
    return Judged(figures, {"carlini_wagner": fooled != attack.success})


MEASUREMENTS = {
    "deepfool": Measurement("DeepFool", attack_by_deepfool, judge_deepfool),
    "fgsm": Measurement("FGSM", attack_by_fgsm, judge_fgsm),
    "pgd": Measurement("PGD", attack_by_pgd, judge_pgd),
    "carlini_wagner": Measurement("C&W", attack_by_carlini_wagner, judge_carlini_wagner),
}
