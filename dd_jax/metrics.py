"""Measures of accuracy and robustness, as sums over examples until the very end.

    figures        one number per example, for every measurement asked for
    sum_up         their sums over the examples whose mask is 1; sums of batches `add` up
    summarise      divides once, so that the means over a ragged last batch, or over devices, are exact

Sizes (rho and ||D||) are of attacks that leave the *predicted* class, as in the authors' test routine: every example
counts, those misclassified included. Shares of misclassified examples (accuracies, the FGS curve) go by the labels.
"""

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray, Shaped

from dd_jax.attacks.carlini_wagner import carlini_wagner_l2
from dd_jax.attacks.deepfool import deepfool
from dd_jax.attacks.gradient import fgsm_success_curve, minimal_fgsm, pgd
from dd_jax.norms import Bounds, Norm, lp_norm, per_example, relative_norm
from dd_jax.types import LogitsFn

Summary = dict[str, Any]
"""By name of the figure, as in reports: an int, a float, or lists of floats for a curve."""


class Settings(NamedTuple):
    """How to measure. Sizes are in the units of the inputs; hashable, so that it may be fixed when compiling."""

    norm: Norm = "l2"  # DeepFool's, as are the next four.
    num_steps: int = 50
    overshoot: float = 0.02
    num_candidates: int | None = None
    classes_at_once: int | None = None
    fgs_max_epsilon: float = 1.0  # Where the search for an example's smallest epsilon gives up.
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
    """What every measurement is of. `bounds`: what FGS, PGD and C&W stay within; DeepFool does not, as in the paper."""

    logits_fn: LogitsFn
    inputs: Float[Array, "batch ..."]
    labels: Int[Array, " batch"]
    bounds: Bounds | None
    key: PRNGKeyArray | None


class Measured(NamedTuple):
    """What came of a batch: by name, an array with one row per example.

    perturbation: DeepFool's, None where it was not asked for.
    """

    figures: dict[str, Shaped[Array, "batch ..."]]
    perturbation: Float[Array, "batch ..."] | None


class Sums(NamedTuple):
    """Sums over the examples seen, scalars or vectors; `examples` is how many there were."""

    examples: Any
    correct: Any
    figures: dict[str, Any]


def measure_deepfool(problem: Problem, settings: Settings) -> Measured:
    """The relative and the plain size of DeepFool's perturbations, overshoot included, its success and its steps.

    Where DeepFool does not succeed within `num_steps` what it reached counts all the same: read the success rate beside.
    """
    norm = settings.norm
    attack = deepfool(
        problem.logits_fn,
        problem.inputs,
        norm=norm,
        num_steps=settings.num_steps,
        overshoot=settings.overshoot,
        num_candidates=settings.num_candidates,
        classes_at_once=settings.classes_at_once,
    )
    suffix = "" if norm == "l2" else "_deepfool"  # "rho_linf" is FGS's.
    figures = {
        f"rho_{norm}{suffix}": relative_norm(attack.perturbation, problem.inputs, norm),
        f"{norm}{suffix}": lp_norm(attack.perturbation, norm),
        "deepfool_success": attack.success,
        "deepfool_steps": attack.num_steps,
    }
    return Measured(figures, attack.perturbation)


def measure_fgs(problem: Problem, settings: Settings) -> Measured:
    """rho_linf by each example's smallest epsilon, with its success, and whether FGS fools at each epsilon of the curve.

    Where nothing up to `fgs_max_epsilon` fools, that epsilon counts, without success.
    """
    options = dict(norm="linf", bounds=problem.bounds)
    attack = minimal_fgsm(problem.logits_fn, problem.inputs, max_epsilon=settings.fgs_max_epsilon, **options)
    epsilons = curve_epsilons(settings)
    fooled = fgsm_success_curve(problem.logits_fn, problem.inputs, problem.labels, epsilons=epsilons, **options)
    figures = {
        "rho_linf": relative_norm(attack.perturbation, problem.inputs, "linf"),
        "fgs_success": attack.success,
        "fgs_curve": fooled.T,
    }
    return Measured(figures, None)


def measure_pgd(problem: Problem, settings: Settings) -> Measured:
    """Which examples are still classified rightly under PGD (linf); those misclassified already are not."""
    options = dict(
        epsilon=settings.pgd_epsilon, step_size=settings.pgd_step_size, num_steps=settings.pgd_num_steps, norm="linf"
    )
    if settings.pgd_seed is not None and problem.key is None:
        raise ValueError(f"pgd_seed is {settings.pgd_seed}, but there is no key to draw random starts with; give one.")
    key = None if settings.pgd_seed is None else problem.key
    attack = pgd(problem.logits_fn, problem.inputs, problem.labels, bounds=problem.bounds, key=key, **options)
    return Measured({"accuracy_pgd": ~attack.success}, None)


def measure_carlini_wagner(problem: Problem, settings: Settings) -> Measured:
    """The l2 size of C&W's perturbations; where it does not succeed, of what came nearest, without success."""
    attack = carlini_wagner_l2(
        problem.logits_fn,
        problem.inputs,
        bounds=problem.bounds,
        num_steps=settings.carlini_wagner_num_steps,
        learning_rate=settings.carlini_wagner_learning_rate,
        num_binary_search_steps=settings.carlini_wagner_num_binary_search_steps,
    )
    size = lp_norm(attack.perturbation, "l2")
    return Measured({"l2_carlini_wagner": size, "carlini_wagner_success": attack.success}, None)


MEASUREMENTS: dict[str, Callable[[Problem, Settings], Measured]] = {
    "deepfool": measure_deepfool,
    "fgs": measure_fgs,
    "pgd": measure_pgd,
    "carlini_wagner": measure_carlini_wagner,
}


def check_names(names: Sequence[str], known: Sequence[str] = tuple(MEASUREMENTS)) -> None:
    """Raises ValueError unless all names are of measurements."""
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"there is no measurement {unknown[0]!r}; choose any of {', '.join(known)}.")


def curve_epsilons(settings: Settings) -> list[float]:
    """The epsilons of the FGS curve, evenly spaced from 0 to `curve_max_epsilon`, in the units of the inputs."""
    last = settings.curve_num_points - 1
    if last < 1 or not settings.curve_max_epsilon > 0:
        raise ValueError(
            f"curve_num_points is {last + 1} and curve_max_epsilon {settings.curve_max_epsilon}; "
            "there must be at least 2 points, up to an epsilon of more than 0."
        )
    exact = (settings.curve_max_epsilon * i / last for i in range(last + 1))
    return [float(f"{epsilon:.7g}") for epsilon in exact]  # As precise as float32: 0.03, not 0.0299999999999999.


def figures(
    logits_fn: LogitsFn,
    inputs: Float[Array, "batch ..."],
    labels: Int[Array, " batch"],
    *,
    names: Sequence[str] = ("deepfool",),
    settings: Settings = Settings(),  # noqa: B008  A tuple, which nobody changes.
    bounds: Bounds | None = None,
    key: PRNGKeyArray | None = None,
) -> Measured:
    """Everything that the named measurements say of each example.

    Args:
      logits_fn: maps (batch, ...) inputs to (batch, classes) logits, row by row.
      inputs: any rank, floating.
      labels: the true classes.
      names: of MEASUREMENTS, in any order; none of them changes what another one gives.
      settings: options of the attacks.
      bounds: (lower, upper), numbers or arrays that broadcast to one example, for FGS, PGD and C&W, which needs them.
      key: for PGD's random starts, where `settings.pgd_seed` asks for them.

    Returns:
      Measured. Always "accuracy"; "deepfool": "rho_l2", "l2" (in the other norm "rho_linf_deepfool", "linf_deepfool"),
      "deepfool_success", "deepfool_steps"; "fgs": "rho_linf", "fgs_success", "fgs_curve" (batch, epsilons); "pgd":
      "accuracy_pgd"; "carlini_wagner": "l2_carlini_wagner", "carlini_wagner_success".

    Raises:
      ValueError: at trace time, for an unknown name, or options that make no sense.
    """
    check_names(names)
    problem = Problem(logits_fn, inputs, labels, bounds, key)
    found, perturbation = {"accuracy": jnp.argmax(logits_fn(inputs), axis=-1) == labels}, None
    for name in names:
        measured = MEASUREMENTS[name](problem, settings)
        found |= measured.figures
        perturbation = perturbation if measured.perturbation is None else measured.perturbation
    return Measured(found, perturbation)


def sum_up(
    figures: dict[str, Shaped[Array | np.ndarray, "batch ..."]], mask: Float[Array | np.ndarray, " batch"]
) -> Sums:
    """Sums over the examples whose mask is 1. Those whose mask is 0 count for nothing, whatever they hold."""
    counts = lambda values: per_example(mask > 0, values)
    totals = {name: jnp.sum(jnp.where(counts(values), values, 0), axis=0) for name, values in figures.items()}
    return Sums(jnp.sum(mask), totals.pop("accuracy"), totals)


def measure_batch(
    logits_fn: LogitsFn,
    inputs: Float[Array, "batch ..."],
    labels: Int[Array, " batch"],
    mask: Float[Array, " batch"],
    *,
    names: Sequence[str] = ("deepfool",),
    bounds: Bounds | None = None,
    key: PRNGKeyArray | None = None,
    **settings: Any,
) -> Sums:
    """The sums over one batch of what `figures` gives; `mask` is 1 for examples that count and 0 for padding.

    settings: fields of Settings, for example num_steps=50.
    """
    options = dict(names=names, settings=Settings(**settings), bounds=bounds, key=key)
    return sum_up(figures(logits_fn, inputs, labels, **options).figures, mask)


def add(first: Sums, second: Sums) -> Sums:
    """The sums over both sets of examples."""
    return jax.tree.map(operator.add, first, second)


def summarise(sums: Sums) -> Summary:
    """Means over all examples, by the names of `figures`, and "num_examples" first.

    Accuracies, successes and the points of "fgs_curve", a list, are shares in 0..1; "rho_l2" = mean ||D||_2 / ||x||_2;
    "l2" = mean ||D||_2, in the units of the inputs; "deepfool_steps" is the mean number of steps. No examples at all:
    ValueError.
    """
    examples = float(sums.examples)
    if examples == 0:
        raise ValueError("There is no example to measure: the data set is empty or its limit is 0.")
    mean = lambda total: (np.asarray(total, np.float64) / examples).tolist()
    totals = {"accuracy": sums.correct} | sums.figures
    return {"num_examples": int(examples)} | {name: mean(total) for name, total in totals.items()}
