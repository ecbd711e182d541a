"""Accuracy and robustness, as sums over examples that are divided once at the end.

    attack         the perturbations of each measurement
    judge          one number per example and figure, from a plain forward pass at these points
    sum_up         the sums over the examples whose mask is 1; `add` adds those of two batches
    summarize      divides once, so means over a ragged last batch, or over devices, are exact

Compile `attack` and `judge` as two separate programs, as `dd_jax.evaluation.evaluate` does. Then no
figure depends on the attack's own success, or on how the attack was compiled. If the two disagree,
the judge counts, and the summary reports the number of disagreements.
"""

import operator
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dd_jax.evaluation.measurements import (
    MEASUREMENTS,
    MINIMUM_NORM,
    Case,
    Found,
    Judged,
    Problem,
    Settings,
)
from dd_jax.evaluation.verification import predicted_classes
from dd_jax.norms import Bounds, per_example
from dd_jax.types import LogitsFn

Summary = dict[str, Any]
"""Figures by name, as in reports: an int, a float, or a list of floats for a curve."""


class Sums(NamedTuple):
    """Sums over examples, scalars or vectors; `examples` is their number."""

    examples: Any
    correct: Any
    figures: dict[str, Any]
    disagreements: dict[str, Any]


def check_names(names: Sequence[str], known: Sequence[str] = tuple(MEASUREMENTS)) -> None:
    """Raises ValueError unless all names are names of measurements."""
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"there is no measurement {unknown[0]!r}; choose any of {', '.join(known)}."
        )


def check_counts(**counts: int | None) -> None:
    """Raises ValueError for a number of examples below 1."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise ValueError(f"{name} is {count}; it must be at least 1, or None for all.")


def attack(problem: Problem, *, names: Sequence[str] = ("deepfool",), settings: Settings) -> Found:
    """Runs the attacks of the named measurements, independently of one another.

    Raises:
      ValueError: at trace time, for an unknown name or for wrong options.
    """
    check_names(names)
    return {name: MEASUREMENTS[name].attack(problem, settings) for name in names}


def judge(problem: Problem, found: Found, *, settings: Settings) -> Judged:
    """The figures of each example, by a plain forward pass. Compile it separately from `attack`.

    Returns:
      Judged. Figures: always "accuracy"; "deepfool": "rho_l2", "l2" (in the other norm
      "rho_linf_deepfool", "linf_deepfool"), "deepfool_success", "deepfool_steps"; "fgsm":
      "rho_linf", "fgsm_success", "fgsm_curve" (batch, epsilons); "pgd": "accuracy_pgd";
      "carlini_wagner": "l2_carlini_wagner", "carlini_wagner_success"; "ddn": "rho_l2_ddn",
      "l2_ddn", "ddn_success"; "fmn_linf": "rho_linf_fmn", "linf_fmn", "fmn_linf_success"; "fmn_l1":
      "rho_l1_fmn", "l1_fmn", "fmn_l1_success". Sizes: of the last three, for `robustness_curve`.
    """
    predicted = predicted_classes(problem.logits_fn, problem.inputs)
    judged = Judged({"accuracy": predicted == problem.labels}, {}, {})
    for name in found:
        more = MEASUREMENTS[name].judge(Case(problem, predicted, found), settings)
        judged = Judged(*(both | own for both, own in zip(judged, more, strict=True)))
    return judged


def sum_up(judged: Judged, mask: Float[Array | np.ndarray, " batch"]) -> Sums:
    """Sums over the examples whose mask is 1. Those with mask 0 are ignored, even if NaN."""
    counts = lambda values: per_example(jnp.asarray(mask) > 0, values)
    figures, disagreements = jax.tree.map(
        lambda x: jnp.sum(jnp.where(counts(x), x, 0), axis=0),
        (judged.figures, judged.disagreements),
    )
    return Sums(jnp.sum(mask), figures.pop("accuracy"), figures, disagreements)


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
    """The sums over one batch: `attack`, `judge` and `sum_up`, for callers that do not compile
    them separately, and need no robustness curves.

    Args:
      logits_fn: maps (batch, ...) inputs to (batch, classes) logits, row by row.
      inputs: any rank, floating.
      labels: the true classes.
      mask: 1 for examples that count and 0 for padding.
      names: keys of MEASUREMENTS, in any order.
      bounds: (lower, upper), numbers or arrays that broadcast to one example, for FGSM, PGD, DDN,
        FMN, and C&W, which needs them.
      key: for PGD's random starts, if `pgd_seed` is given.
      settings: fields of Settings, for example num_steps=50.
    """
    problem, chosen = Problem(logits_fn, inputs, labels, bounds, key), Settings(**settings)
    found = attack(problem, names=names, settings=chosen)
    return sum_up(judge(problem, found, settings=chosen), mask)


def add(first: Sums, second: Sums) -> Sums:
    """The sums over both sets of examples."""
    return jax.tree.map(operator.add, first, second)


def summarize(sums: Sums) -> Summary:
    """The number of examples, "num_examples", and the means over them, by `judge`'s names.

    Accuracies, successes and the points of "fgsm_curve" (a list) are shares in 0..1; "rho_l2" is
    the mean of ||D||_2 / ||x||_2; "l2" the mean of ||D||_2, in the units of the inputs;
    "deepfool_steps" the mean number of steps. "deepfool_disagreements" and so on are the numbers of
    examples for which the attack's own success differs from the forward pass.

    Raises:
      ValueError: there are no examples.
    """
    examples = float(sums.examples)
    if examples == 0:
        raise ValueError("There is no example to measure: the data set is empty or its limit is 0.")
    mean = lambda total: (np.asarray(total, np.float64) / examples).tolist()
    totals = {"accuracy": sums.correct} | sums.figures
    disagreements = {
        disagreements_name(name): int(total) for name, total in sums.disagreements.items()
    }
    return (
        {"num_examples": int(examples)}
        | {name: mean(total) for name, total in totals.items()}
        | disagreements
    )


def robustness_curve(name: str, sizes: Float[np.ndarray, " examples"]) -> dict[str, Any]:
    """The accuracy of a net under all perturbations up to epsilon, for all epsilons at once, as far
    as a minimum-norm attack found them.

        robust accuracy(epsilon) = share of examples whose size is more than epsilon

    Args:
      name: of MINIMUM_NORM.
      sizes: `Judged.sizes`; 0 for what is misclassified as it is, inf where no perturbation fooled.

    Returns:
      "norm"; "num_examples"; "num_misclassified", the number of zeros; "sizes", those that are
      neither 0 nor inf, in the units of the inputs, ascending, to 6 digits. `dd_jax.results.curves`
      reads it. It can be written as JSON.
    """
    found = np.sort(sizes[(sizes > 0) & np.isfinite(sizes)])
    return {
        "norm": MINIMUM_NORM[name],
        "num_examples": len(sizes),
        "num_misclassified": int(np.sum(sizes == 0)),
        "sizes": [float(f"{size:.6g}") for size in found],
    }


def curve_name(name: str) -> str:
    """The name, in a summary, of a measurement's robustness curve."""
    return f"{name}_curve"


def disagreements_name(name: str) -> str:
    """The name, in a summary, of a measurement's number of disagreements."""
    return f"{name}_disagreements"


def remarks(summary: Mapping[str, Any], label: str) -> list[str]:
    """A sentence for every attack whose own success differed from a plain forward pass, and for
    every net of which AutoAttack says little.

    label: the name of the net.
    """
    sentences = []
    for name, measurement in MEASUREMENTS.items():
        if number := summary.get(disagreements_name(name)):
            examples = summary.get(f"{name}_examples", summary["num_examples"])
            sentences.append(
                f"{measurement.title} on {label}: its own success and a plain forward pass "
                f"disagree on {number} of {examples} "
                "images; the figures count the forward pass."
            )
    for found in summary.get("autoattack") or ():
        sentences += [f"AutoAttack on {label}: {text}" for text in found.get("remarks", ())]
    return sentences
