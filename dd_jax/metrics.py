"""Measures of accuracy and robustness, as sums over examples until the very end.

A batch gives `Sums`; sums of batches add up (`jax.tree.map(jnp.add, ...)`), over devices and over a ragged last batch
alike, since examples with mask 0 count for nothing. `summarise` divides once.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dd_jax.attacks.deepfool import deepfool
from dd_jax.norms import Norm, lp_norm, relative_norm
from dd_jax.types import LogitsFn

Summary = dict[str, int | float]  # By name of the figure, as in reports.


class Sums(NamedTuple):
    """Sums over the examples seen, each a scalar; `examples` is how many there were."""

    examples: Float[Array, ""]
    correct: Float[Array, ""]
    rho: Float[Array, ""]
    size: Float[Array, ""]
    success: Float[Array, ""]
    steps: Float[Array, ""]


def measure_batch(
    logits_fn: LogitsFn,
    inputs: Float[Array, "batch ..."],
    labels: Int[Array, " batch"],
    mask: Float[Array, " batch"],
    *,
    norm: Norm = "l2",
    num_steps: int = 50,
    overshoot: float = 0.02,
    num_candidates: int | None = None,
) -> Sums:
    """Accuracy and DeepFool's perturbations on one batch.

    As in the authors' test routine every example is attacked from its *predicted* label, misclassified ones included.
    Where DeepFool does not succeed within `num_steps` the perturbation reached counts all the same: read the success
    rate beside. `mask` is 1 for examples that count and 0 for padding. Options as in `dd_jax.deepfool`.
    """
    attack = deepfool(
        logits_fn, inputs, norm=norm, num_steps=num_steps, overshoot=overshoot, num_candidates=num_candidates
    )
    correct = jnp.argmax(logits_fn(inputs), axis=-1) == labels
    return Sums(
        examples=jnp.sum(mask),
        correct=jnp.sum(mask * correct),
        rho=jnp.sum(mask * relative_norm(attack.perturbation, inputs, norm)),
        size=jnp.sum(mask * lp_norm(attack.perturbation, norm)),
        success=jnp.sum(mask * attack.success),
        steps=jnp.sum(mask * attack.num_steps),
    )


def add(first: Sums, second: Sums) -> Sums:
    """The sums over both sets of examples."""
    return jax.tree.map(jnp.add, first, second)


def summarise(sums: Sums, norm: Norm = "l2") -> Summary:
    """Means over all examples.

    "accuracy" and "deepfool_success" are shares in 0..1; "rho_NORM" = mean ||D||_p / ||x||_p; "NORM" = mean ||D||_p, in
    the units of the inputs; "deepfool_steps" is the mean number of steps. No examples at all: ValueError.
    """
    examples = float(sums.examples)
    if examples == 0:
        raise ValueError("There is no example to measure: the data set is empty or its limit is 0.")
    return {
        "num_examples": int(examples),
        "accuracy": float(sums.correct) / examples,
        f"rho_{norm}": float(sums.rho) / examples,
        norm: float(sums.size) / examples,
        "deepfool_success": float(sums.success) / examples,
        "deepfool_steps": float(sums.steps) / examples,
    }
