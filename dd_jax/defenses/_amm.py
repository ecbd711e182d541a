"""Adversarial margin maximization (Yan, Guo, Zhang, "Adversarial Margin Maximization Networks",
IEEE TPAMI 2019, arXiv:1911.05916; code: github.com/ZiangYan/amm.pytorch).

The successor of Deep Defense. Its margin is absolute, and only the worst examples of a batch are
penalized:

    margin    a = signed_margin(x) ||x||_2        (Deep Defense's is relative to ||x||_2)
    loss      L(x) + lambda * penalty(a)   for the examples that count,   L(x)   for the others

Aggregation "min": per class, two examples count, the right one of smallest margin and the wrong one
farthest from right. Moreover they must be among the worst of the batch, right and wrong examples
each by themselves: the `worst_fraction` of the batch with the smallest margin. Aggregation "mean":
all count. As in the authors' code, the sum over those that count is divided by the size of the
whole batch.

The authors leave out examples that DeepFool does not fool within its steps, unless told otherwise
(`--use-failed`); here they are in, with what the steps add up to.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dd_jax._margin import Gradient
from dd_jax.deep_defense import signed_margin
from dd_jax.defenses._cross_entropy import (
    Losses,
    check_not_negative,
    check_shares,
    plain_loss,
)
from dd_jax.defenses._deep_defense import named_penalty
from dd_jax.norms import lp_norm
from dd_jax.types import LogitsFn, RandomKeys

AGGREGATIONS = ("min", "mean")


def amm_loss(
    logits_fn: LogitsFn,
    inputs: Float[Array, "batch ..."],
    labels: Int[Array, " batch"],
    key: RandomKeys | None = None,
    *,
    penalty_weight: float = 15.0,
    penalty: str = "exponential",
    absolute_correct_scale: float = 2.0,
    absolute_wrong_scale: float = 1.0,
    aggregation: str = "min",
    worst_fraction: float = 0.2,
    gradient: Gradient = "through_iterates",
    num_steps: int = 5,
    overshoot: float = 0.02,
    num_candidates: int | None = None,
    class_chunk_size: int | None = None,
    gradient_offset: float = 0.0,
) -> Losses:
    """Cross-entropy, plus penalty_weight times the penalty of the absolute l2 margin, for the worst
    examples of the batch; equations in the module's docstring.

    The penalty is one of `dd_jax.penalties`, with the scales per unit of the inputs; the paper's
    MNIST nets have the exponential, lambda 32 and scales 2 and 1. Options of DeepFool as in
    `dd_jax.signed_margin`, which also says what happens at the edges; an all-zero input has margin
    0. "The batch" is what one call sees: a device's part of it. Examples with equal margins count
    together. Filled-up examples of a last batch are copies, so that they take no example's place
    on the same device.

    Metrics: those of `plain_loss`, "penalty" (not weighted, 0 where an example does not count) and
    "absolute_margin". The key is not used. ValueError for an unknown penalty, aggregation or
    gradient, a negative weight or scale, and a worst_fraction outside 0..1.
    """
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation is {aggregation!r}; it must be 'min' or 'mean'.")
    check_shares(worst_fraction=worst_fraction)
    check_not_negative(penalty_weight=penalty_weight)
    scales = dict(correct_scale=absolute_correct_scale, wrong_scale=absolute_wrong_scale)
    penalty_fn = named_penalty(penalty, **scales)
    options: dict[str, Any] = dict(num_steps=num_steps, overshoot=overshoot)
    options |= dict(gradient_offset=gradient_offset)
    options |= dict(num_candidates=num_candidates, class_chunk_size=class_chunk_size)
    cross_entropy, metrics = plain_loss(logits_fn, inputs, labels)
    relative = signed_margin(logits_fn, inputs, labels, gradient=gradient, **options)
    margin, right = relative * lp_norm(inputs, "l2"), metrics["correct"] > 0
    counts = (
        right | ~right if aggregation == "mean" else worst(margin, right, labels, worst_fraction)
    )
    counted = jnp.where(counts, penalty_fn(margin, right), 0)
    metrics |= {"penalty": counted, "absolute_margin": margin}
    return cross_entropy + penalty_weight * counted, metrics


def worst(
    margin: Float[Array, " batch"],
    right: Bool[Array, " batch"],
    labels: Int[Array, " batch"],
    fraction: float,
) -> Bool[Array, " batch"]:
    """Which examples count in aggregation "min", see the module's docstring; at least one right and
    one wrong one, if there are any.
    """
    margin = lax.stop_gradient(margin)
    alike = right[:, None] == right[None]
    is_smaller = alike & (margin[None] < margin[:, None])  # [i, j]: j has a smaller margin than i.
    same_class = labels[:, None] == labels[None]
    is_smallest = ~jnp.any(is_smaller & same_class, axis=1)
    return is_smallest & (jnp.sum(is_smaller, axis=1) < max(1, int(len(labels) * fraction)))
