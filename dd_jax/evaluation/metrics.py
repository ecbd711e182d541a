"""Measures of accuracy and robustness, as sums over examples until the very end.

    attack         the perturbations, for every measurement asked for
    judge          one number per example and figure, from a plain forward pass at these points
    sum_up         their sums over the examples whose mask is 1; sums of batches `add` up
    summarize      divides once: means over a ragged last batch, or over devices, are exact

The first two belong into two programs, compiled apart, as `dd_jax.evaluation.evaluate` does: then a
figure does not depend on what the attack, or the compiler of the attack, says of its success. Where
the two disagree the judge counts, and the number of disagreements is part of the summary.
"""

import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from dd_jax.evaluation.measurements import MEASUREMENTS, Case, Found, Judged, Problem, Settings
from dd_jax.evaluation.verification import predicted_classes
from dd_jax.norms import Bounds, per_example
from dd_jax.types import LogitsFn

Summary = dict[str, Any]
"""By name of the figure, as in reports: an int, a float, or lists of floats for a curve."""


class Sums(NamedTuple):
    """Sums over the examples seen, scalars or vectors; `examples` is how many there were."""

    examples: Any
    correct: Any
    figures: dict[str, Any]
    disagreements: dict[str, Any]


def check_names(names: Sequence[str], known: Sequence[str] = tuple(MEASUREMENTS)) -> None:
    """Raises ValueError unless all names are of measurements."""
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(
            f"there is no measurement {unknown[0]!r}; choose any of {', '.join(known)}."
        )


def attack(problem: Problem, *, names: Sequence[str] = ("deepfool",), settings: Settings) -> Found:
    """What the attacks of the named measurements find; none of them changes what another one finds.

    ValueError, at trace time, for an unknown name, or options that make no sense.
    """
    check_names(names)
    return {name: MEASUREMENTS[name].attack(problem, settings) for name in names}


def judge(problem: Problem, found: Found, *, settings: Settings) -> Judged:
    """Everything that the measurements of `found` say of each example, by a plain forward pass; to
    be compiled apart.

    Returns:
      Judged. Figures: always "accuracy"; "deepfool": "rho_l2", "l2" (in the other norm
      "rho_linf_deepfool", "linf_deepfool"), "deepfool_success", "deepfool_steps"; "fgsm":
      "rho_linf", "fgsm_success", "fgsm_curve" (batch, epsilons); "pgd": "accuracy_pgd";
      "carlini_wagner": "l2_carlini_wagner", "carlini_wagner_success".
    """
    predicted = predicted_classes(problem.logits_fn, problem.inputs)
    judged = Judged({"accuracy": predicted == problem.labels}, {})
    for name in found:
        figures, disagreements = MEASUREMENTS[name].judge(Case(problem, predicted, found), settings)
        judged = Judged(judged.figures | figures, judged.disagreements | disagreements)
    return judged


def sum_up(judged: Judged, mask: Float[Array | np.ndarray, " batch"]) -> Sums:
    """Sums over the examples whose mask is 1. Those whose mask is 0 count for nothing, whatever
    they hold.
    """
    counts = lambda values: per_example(mask > 0, values)
    figures, disagreements = jax.tree.map(
        lambda x: jnp.sum(jnp.where(counts(x), x, 0), axis=0), tuple(judged)
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
    """The sums over one batch: `attack`, `judge` and `sum_up`, one after the other, for those who
    compile nothing apart.

    Args:
      logits_fn: maps (batch, ...) inputs to (batch, classes) logits, row by row.
      inputs: any rank, floating.
      labels: the true classes.
      mask: 1 for examples that count and 0 for padding.
      names: of MEASUREMENTS, in any order.
      bounds: (lower, upper), numbers or arrays that broadcast to one example, for FGSM, PGD and
        C&W, which needs them.
      key: for PGD's random starts, where `pgd_seed` asks for them.
      settings: fields of Settings, for example num_steps=50.
    """
    problem, chosen = Problem(logits_fn, inputs, labels, bounds, key), Settings(**settings)
    found = attack(problem, names=names, settings=chosen)
    return sum_up(judge(problem, found, settings=chosen), mask)


def add(first: Sums, second: Sums) -> Sums:
    """The sums over both sets of examples."""
    return jax.tree.map(operator.add, first, second)


def summarize(sums: Sums) -> Summary:
    """Means over all examples, by the names of `judge`'s figures, and "num_examples" first.

    Accuracies, successes and the points of "fgsm_curve", a list, are shares in 0..1; "rho_l2" =
    mean ||D||_2 / ||x||_2; "l2" = mean ||D||_2, in the units of the inputs; "deepfool_steps" is the
    mean number of steps. "deepfool_disagreements" and so on: how many times an attack's own success
    was not what a plain forward pass said. No examples at all: ValueError.
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


def disagreements_name(name: str) -> str:
    """How a summary calls the number of disagreements of a measurement."""
    return f"{name}_disagreements"


def remarks(summary: Summary, label: str) -> list[str]:
    """A sentence for every attack whose own success was not always what a plain forward pass said;
    `label`: of the net.
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
    return sentences
