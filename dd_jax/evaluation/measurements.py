"""The measurements by name, each in two parts: an attack, and a judge of its perturbations.

The judge verifies the perturbations by a plain forward pass (`dd_jax.evaluation.verification`) and
uses nothing else of the attack's result. `dd_jax.evaluation.metrics` runs both parts.

Sizes (rho and ||D||) belong to attacks that leave the *predicted* class, as in the authors' test
routine: every example counts, also a misclassified one. Shares of misclassified examples
(accuracies, the FGSM curve) refer to the labels.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, Shaped

from dd_jax.attacks._carlini_wagner import carlini_wagner_l2
from dd_jax.attacks._ddn import ddn
from dd_jax.attacks._deepfool import deepfool
from dd_jax.attacks._fmn import fmn
from dd_jax.attacks._gradient_sign import fgsm, minimal_fgsm, pgd
from dd_jax.evaluation.verification import is_fooled
from dd_jax.norms import Bounds, LpNorm, Norm, lp_norm, relative_norm, stay_within
from dd_jax.types import AttackResult, LogitsFn


class Settings(NamedTuple):
    """The options of the measurements. Sizes are in the units of the inputs.

    Hashable, so it can be a static argument of `jax.jit`.
    """

    norm: Norm = "l2"  # This and the next four belong to DeepFool.
    num_steps: int = 50
    overshoot: float = 0.02
    num_candidates: int | None = None
    class_chunk_size: int | None = None
    fgsm_max_epsilon: float = 1.0  # The largest epsilon that the search tries.
    curve_max_epsilon: float = 0.3  # The points of the curve are evenly spaced from 0 to this.
    curve_num_points: int = 31
    pgd_epsilon: float = 0.1  # In linf.
    pgd_step_size: float = 0.01
    pgd_num_steps: int = 40
    pgd_seed: int | None = None  # For random starts. None: start at the inputs.
    carlini_wagner_num_steps: int = 200
    carlini_wagner_num_binary_search_steps: int = 5
    carlini_wagner_learning_rate: float = 0.05
    minimum_norm_num_steps: int = 1000  # Of DDN and FMN.


class Problem(NamedTuple):
    """The net and the examples to measure.

    bounds: FGSM, PGD, C&W, DDN and FMN stay within them; DeepFool has no bounds, as in the paper.
    key: for PGD's random starts.
    """

    logits_fn: LogitsFn
    inputs: Float[Array, "batch ..."]
    labels: Int[Array, " batch"]
    bounds: Bounds | None
    key: PRNGKeyArray | None


class FgsmAttack(NamedTuple):
    """FGSM with each example's smallest epsilon, and FGSM's direction: the perturbation with
    epsilon 1 away from the label.
    """

    minimal: AttackResult
    direction: Float[Array, "batch ..."]


Found = dict[str, Any]
"""The results of the attacks, by the name of the measurement."""


class Case(NamedTuple):
    """What a judge gets: the problem, the predicted classes of the inputs, and the results of the
    attacks.
    """

    problem: Problem
    predicted: Int[Array, " batch"]
    found: Found

    def is_fooled(self, attack: AttackResult, **limits: Any) -> Bool[Array, " batch"]:
        """Whether each perturbation changes the predicted class, within the limits of
        `verification.is_fooled`.
        """
        problem = self.problem
        return is_fooled(
            problem.logits_fn, problem.inputs, attack.perturbation, self.predicted, **limits
        )


class Judged(NamedTuple):
    """What a judge returns.

    figures: by name, arrays with one row per example.
    disagreements: by measurement, whether the attack's own success differs from the judge's.
    sizes: by measurement, the smallest perturbation of each example that makes the net's prediction
      wrong, as far as the attack found one: 0 where it is wrong without, inf where none was found.
    """

    figures: dict[str, Shaped[Array, "batch ..."]]
    disagreements: dict[str, Bool[Array, " batch"]]
    sizes: dict[str, Float[Array, " batch"]]


def curve_epsilons(settings: Settings) -> list[float]:
    """The epsilons of the FGSM curve, evenly spaced from 0 to `curve_max_epsilon`.

    In the units of the inputs. ValueError for fewer than 2 points, or no range.
    """
    last = settings.curve_num_points - 1
    if last < 1 or not settings.curve_max_epsilon > 0:
        raise ValueError(
            f"curve_num_points is {last + 1} and curve_max_epsilon {settings.curve_max_epsilon}; "
            "the curve needs at least 2 points and a largest epsilon of more than 0."
        )
    exact = (settings.curve_max_epsilon * i / last for i in range(last + 1))
    # Rounded to float32's precision: 0.03, not 0.0299999999999999.
    return [float(f"{epsilon:.7g}") for epsilon in exact]


class Measurement(NamedTuple):
    """A measurement: the name of its attack for messages, and its two parts."""

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
    """The relative and the absolute size of DeepFool's perturbations, overshoot included; its
    success and its steps.

    If DeepFool does not succeed within `num_steps`, the perturbation it reached counts too, so read
    sizes together with the success rate.
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
    return Judged(figures, {"deepfool": fooled != attack.success}, {})


def attack_by_fgsm(problem: Problem, settings: Settings) -> FgsmAttack:
    """FGSM with each example's smallest epsilon, away from the predicted class; and its direction
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
    """FGSM's perturbation (linf) with epsilon 1 away from the labels, without bounds."""
    return fgsm(logits_fn, inputs, labels, epsilon=1.0, norm="linf", early_stop=False).perturbation


def judge_fgsm(case: Case, settings: Settings) -> Judged:
    """rho_linf for each example's smallest epsilon, its success, and whether FGSM fools at each
    epsilon of the curve.

    If nothing up to `fgsm_max_epsilon` fools, that epsilon counts, without success.
    """
    problem, (minimal, direction) = case.problem, case.found["fgsm"]
    fooled = case.is_fooled(minimal, bounds=problem.bounds, epsilon=settings.fgsm_max_epsilon)
    curve = fooled_along(problem, case.predicted, direction, jnp.asarray(curve_epsilons(settings)))
    figures = {
        "rho_linf": relative_norm(minimal.perturbation, problem.inputs, "linf"),
        "fgsm_success": fooled,
        "fgsm_curve": curve.T,
    }
    return Judged(figures, {"fgsm": fooled != minimal.success}, {})


def fooled_along(
    problem: Problem,
    predicted: Int[Array, " batch"],
    direction: Float[Array, "batch ..."],
    epsilons: Float[Array, " epsilons"],
) -> Bool[Array, "epsilons batch"]:
    """Whether the net misclassifies inputs + epsilon * direction, clipped to the bounds.

    True for all epsilons where it misclassifies the input itself.
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
            f"pgd_seed is {settings.pgd_seed}, but there is no key for the random starts; give one."
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
    """Which examples are still classified rightly under PGD (linf)."""
    (logits_fn, inputs, labels, bounds, _), attack = case.problem, case.found["pgd"]
    limits: dict[str, Any] = dict(bounds=bounds, epsilon=settings.pgd_epsilon, norm="linf")
    fooled = is_fooled(logits_fn, inputs, attack.perturbation, labels, **limits)
    figures = {"accuracy_pgd": ~fooled & (case.predicted == labels)}
    return Judged(figures, {"pgd": fooled != attack.success}, {})


def attack_by_carlini_wagner(problem: Problem, settings: Settings) -> AttackResult:
    """C&W in l2, away from the predicted class."""
    return carlini_wagner_l2(
        problem.logits_fn,
        problem.inputs,
        bounds=problem.bounds,  # type: ignore[arg-type]  # None is refused there.
        num_steps=settings.carlini_wagner_num_steps,
        learning_rate=settings.carlini_wagner_learning_rate,
        num_binary_search_steps=settings.carlini_wagner_num_binary_search_steps,
    )


def judge_carlini_wagner(case: Case, settings: Settings) -> Judged:
    """The l2 size of C&W's perturbations, and its success.

    If C&W does not succeed, the perturbation with the smallest lead of the label counts.
    """
    attack = case.found["carlini_wagner"]
    fooled = case.is_fooled(attack, bounds=case.problem.bounds)
    figures = {
        "l2_carlini_wagner": lp_norm(attack.perturbation, "l2"),
        "carlini_wagner_success": fooled,
    }
    return Judged(figures, {"carlini_wagner": fooled != attack.success}, {})


MINIMUM_NORM: dict[str, LpNorm] = {"ddn": "l2", "fmn_linf": "linf", "fmn_l1": "l1"}
"""The measurements that give robustness curves, and the norms that their attacks keep small."""


def attack_by_ddn(problem: Problem, settings: Settings) -> AttackResult:
    """DDN (l2) away from the predicted class."""
    options: dict[str, Any] = dict(bounds=problem.bounds)
    options["num_steps"] = settings.minimum_norm_num_steps
    return ddn(problem.logits_fn, problem.inputs, **options)


def attack_by_fmn(norm: LpNorm, problem: Problem, settings: Settings) -> AttackResult:
    """FMN away from the predicted class."""
    options: dict[str, Any] = dict(bounds=problem.bounds)
    options["num_steps"] = settings.minimum_norm_num_steps
    return fmn(problem.logits_fn, problem.inputs, norm=norm, **options)


def judge_minimum_norm(name: str, case: Case, settings: Settings) -> Judged:
    """The relative and the absolute size of the perturbations of DDN or FMN, their success, and the
    size that makes each prediction wrong.

    Where the attack does not succeed, its last perturbation counts in the two means.
    """
    attack, norm, method = case.found[name], MINIMUM_NORM[name], name.partition("_")[0]
    fooled, size = (
        case.is_fooled(attack, bounds=case.problem.bounds),
        lp_norm(attack.perturbation, norm),
    )
    figures = {
        f"rho_{norm}_{method}": relative_norm(attack.perturbation, case.problem.inputs, norm),
        f"{norm}_{method}": size,
        f"{name}_success": fooled,
    }
    is_right = case.predicted == case.problem.labels
    sizes = jnp.where(is_right, jnp.where(fooled, size, jnp.inf), 0)
    return Judged(figures, {name: fooled != attack.success}, {name: sizes})


MEASUREMENTS = {
    "deepfool": Measurement("DeepFool", attack_by_deepfool, judge_deepfool),
    "fgsm": Measurement("FGSM", attack_by_fgsm, judge_fgsm),
    "pgd": Measurement("PGD", attack_by_pgd, judge_pgd),
    "carlini_wagner": Measurement("C&W", attack_by_carlini_wagner, judge_carlini_wagner),
    "ddn": Measurement("DDN", attack_by_ddn, partial(judge_minimum_norm, "ddn")),
    "fmn_linf": Measurement(
        "FMN (linf)", partial(attack_by_fmn, "linf"), partial(judge_minimum_norm, "fmn_linf")
    ),
    "fmn_l1": Measurement(
        "FMN (l1)", partial(attack_by_fmn, "l1"), partial(judge_minimum_norm, "fmn_l1")
    ),
}
