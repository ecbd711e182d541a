"""MMA training (Ding, Sharma, Lui, Huang, "MMA Training: Direct Input Space Margin Maximization
through Adversarial Training", ICLR 2020).

The margin of a right example is the size of its shortest adversarial perturbation, and it grows
when the loss at that perturbed example falls (the paper's section 2). So the training loss is

    w L(x) + (1 - w) L_margin(x),    L_margin = L(x + D)  where right and ||D||_p < max_margin
                                                0         where right and nothing shorter fools
                                                L(x)      where wrong

with L the cross-entropy, w = clean_weight, and D the shortest adversarial perturbation that the
attack finds: PGD in the ball of radius max_margin, then bisection on the line from x to what PGD
found. The hinge on the margin is the second case: beyond max_margin nothing is asked for.

The authors' PGD starts in each example's ball of the epoch before. A loss has no memory of single
examples, so PGD always searches the whole ball here. Their search calls an example fooled by a soft
margin of the logits; here the prediction decides.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dd_jax.attacks import pgd
from dd_jax.defenses._cross_entropy import (
    Losses,
    adversarial_loss,
    check_not_negative,
    check_shares,
    plain_loss,
    without_gradient,
)
from dd_jax.norms import Norm, lp_norm, per_example
from dd_jax.types import LogitsFn, RandomKeys


def mma_loss(
    logits_fn: LogitsFn,
    inputs: Float[Array, "batch ..."],
    labels: Int[Array, " batch"],
    key: RandomKeys,
    *,
    max_margin: float = 0.2,
    clean_weight: float = 1 / 3,
    attack_norm: Norm = "linf",
    num_attack_steps: int = 10,
    relative_step_size: float = 0.25,
    num_bisections: int = 10,
) -> Losses:
    """Max-margin adversarial training; equations in the module's docstring.

    The attack is PGD from a random start that the key draws in the ball, with `num_attack_steps`
    steps of length relative_step_size * max_margin, and then `num_bisections` halvings: the size
    is found to max_margin / 2^num_bisections. With clean_weight 1, or max_margin 0 and no wrong
    example, only the clean part is left.

    Metrics: those of `plain_loss`, "adversarial_cross_entropy" and "adversarial_correct" at x + D
    (the longest perturbation where none fools, x itself where wrong), and "absolute_margin":
    ||D||_p, max_margin where nothing fools, 0 where wrong. ValueError for a clean_weight outside
    0..1, a negative size or number of bisections, an unknown attack_norm, or no steps.
    """
    check_shares(clean_weight=clean_weight)
    check_not_negative(max_margin=max_margin, relative_step_size=relative_step_size)
    check_not_negative(num_bisections=num_bisections)
    clean, metrics = plain_loss(logits_fn, inputs, labels)
    right = metrics["correct"] > 0
    options: dict[str, Any] = dict(norm=attack_norm, num_steps=num_attack_steps)
    options |= dict(key=key, early_stop=False)
    options |= dict(epsilon=max_margin, step_size=relative_step_size * max_margin)
    attacked = pgd(logits_fn, inputs, labels, **options)
    fooled, longest = right & attacked.success, attacked.perturbation
    net = without_gradient(logits_fn, inputs)
    shortest = shortened(net, inputs, longest, labels, fooled, num_bisections)
    perturbation = jnp.where(per_example(right, inputs), shortest, 0)
    adversarial, more = adversarial_loss(logits_fn, inputs, perturbation, labels)
    margin_loss = jnp.where(right, jnp.where(fooled, adversarial, 0), clean)
    size = jnp.where(fooled, lp_norm(perturbation, attack_norm), jnp.where(right, max_margin, 0))
    metrics |= more | {"absolute_margin": size}
    return clean_weight * clean + (1 - clean_weight) * margin_loss, metrics


def shortened(
    net: LogitsFn,
    inputs: Float[Array, "batch ..."],
    perturbation: Float[Array, "batch ..."],
    labels: Int[Array, " batch"],
    fooled: Bool[Array, " batch"],
    num_bisections: int,
) -> Float[Array, "batch ..."]:
    """The shortest perturbation in the same direction that bisection finds to fool, where
    `fooled` says that the whole one does and that none does not; elsewhere the whole one.
    """

    def bisect(ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) / 2
        logits = net(inputs + per_example(middle, inputs) * perturbation)
        is_wrong = jnp.argmax(logits, axis=-1) != labels
        return jnp.where(is_wrong, low, middle), jnp.where(is_wrong, middle, high)

    ends = jnp.zeros(len(inputs), inputs.dtype), jnp.ones(len(inputs), inputs.dtype)
    _, high = lax.fori_loop(0, num_bisections, lambda _, ends: bisect(ends), ends)
    return per_example(jnp.where(fooled, high, 1), inputs) * perturbation
