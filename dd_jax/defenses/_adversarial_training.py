"""Adversarial training: the cross-entropy at adversarial examples.

    adversarial_deepfool   (1 - a) L(x) + a L(x + D)    D: DeepFool's      Adv. Train I
    adversarial_fgsm       (1 - b) L(x) + b L(x + D)    D: FGSM's          Adv. Train II
    adversarial_pgd        L(x + D)                     D: PGD's, from a random start

with L the cross-entropy, a = mixing_weight and b = fgsm_weight. No gradient flows through D: it is
an example like any other.
"""

from typing import Any

from jaxtyping import Array, Float, Int

from dd_jax.attacks import deepfool, fgsm, pgd
from dd_jax.defenses._cross_entropy import (
    Losses,
    adversarial_loss,
    check_not_negative,
    check_shares,
    plain_loss,
)
from dd_jax.norms import Norm
from dd_jax.types import LogitsFn, RandomKeys


def adversarial_deepfool_loss(
    logits_fn: LogitsFn,
    inputs: Float[Array, "batch ..."],
    labels: Int[Array, " batch"],
    key: RandomKeys | None = None,
    *,
    mixing_weight: float = 0.5,
    norm: Norm = "l2",
    num_steps: int = 5,
    overshoot: float = 0.02,
    num_candidates: int | None = None,
    class_chunk_size: int | None = None,
) -> Losses:
    """Adversarial training with DeepFool's examples, Adv. Train I of Deep Defense (Moosavi-Dezfooli
    et al., CVPR 2016).

        (1 - mixing_weight) L(x) + mixing_weight L(x + D)

    D leads away from the label; a misclassified example has D = 0. Options of DeepFool as in
    `dd_jax.deepfool`. Metrics: those of `plain_loss`, "adversarial_cross_entropy" and
    "adversarial_correct". The key is not used. ValueError unless mixing_weight is within 0..1.
    """
    options: dict[str, Any] = dict(norm=norm, num_steps=num_steps, overshoot=overshoot)
    options |= dict(num_candidates=num_candidates, class_chunk_size=class_chunk_size)
    check_shares(mixing_weight=mixing_weight)
    clean, metrics = plain_loss(logits_fn, inputs, labels)
    perturbation = deepfool(logits_fn, inputs, labels, **options).perturbation
    adversarial, more = adversarial_loss(logits_fn, inputs, perturbation, labels)
    return (1 - mixing_weight) * clean + mixing_weight * adversarial, metrics | more


def adversarial_fgsm_loss(
    logits_fn: LogitsFn,
    inputs: Float[Array, "batch ..."],
    labels: Int[Array, " batch"],
    key: RandomKeys | None = None,
    *,
    fgsm_weight: float = 0.5,
    epsilon: float = 0.1,
) -> Losses:
    """Adversarial training with FGSM's examples, Adv. Train II (Goodfellow, Shlens, Szegedy, ICLR
    2015, equation 6).

        (1 - fgsm_weight) L(x) + fgsm_weight L(x + D),    D = epsilon * sign(dL / dx)

    Misclassified examples are attacked too. Metrics as in `adversarial_deepfool_loss`. The key is
    not used. ValueError unless fgsm_weight is within 0..1.
    """
    check_shares(fgsm_weight=fgsm_weight)
    clean, metrics = plain_loss(logits_fn, inputs, labels)
    adversarial, more = fgsm_examples_loss(logits_fn, inputs, labels, epsilon)
    return (1 - fgsm_weight) * clean + fgsm_weight * adversarial, metrics | more


def fgsm_examples_loss(
    logits_fn: LogitsFn,
    inputs: Float[Array, "batch ..."],
    labels: Int[Array, " batch"],
    epsilon: float,
) -> Losses:
    """L(x + D) with FGSM's D; metrics as in `adversarial_loss`."""
    perturbation = fgsm(logits_fn, inputs, labels, epsilon=epsilon, early_stop=False).perturbation
    return adversarial_loss(logits_fn, inputs, perturbation, labels)


def adversarial_pgd_loss(
    logits_fn: LogitsFn,
    inputs: Float[Array, "batch ..."],
    labels: Int[Array, " batch"],
    key: RandomKeys,
    *,
    epsilon: float = 0.1,
    attack_norm: Norm = "linf",
    num_attack_steps: int = 10,
    relative_step_size: float = 0.25,
) -> Losses:
    """Adversarial training with PGD's examples (Madry, Makelov, Schmidt, Tsipras, Vladu, ICLR
    2018).

        L(x + D),    D near argmax L(x + D) over ||D||_p <= epsilon, by projected gradient ascent

    PGD starts at a point that the key draws uniformly from the ball, and takes all
    `num_attack_steps` steps, each of length relative_step_size * epsilon. Misclassified examples
    are attacked too. With epsilon 0 this is the plain cross-entropy. Metrics:
    "adversarial_cross_entropy", "adversarial_correct", and those of `plain_loss` at x, which cost
    one more forward pass. ValueError for a negative epsilon or relative_step_size, an unknown
    attack_norm, or no steps.
    """
    check_not_negative(epsilon=epsilon, relative_step_size=relative_step_size)
    options: dict[str, Any] = dict(norm=attack_norm, num_steps=num_attack_steps)
    options |= dict(key=key, early_stop=False)
    options |= dict(epsilon=epsilon, step_size=relative_step_size * epsilon)
    _, metrics = plain_loss(logits_fn, inputs, labels)
    perturbation = pgd(logits_fn, inputs, labels, **options).perturbation
    loss, more = adversarial_loss(logits_fn, inputs, perturbation, labels)
    return loss, metrics | more
