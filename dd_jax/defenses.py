"""The defenses that are compared, by name: each is a training loss, and Parseval training also a
step after every update.

A loss is `loss_fn(logits_fn, inputs, labels) -> (loss per example, metrics per example)`. Training
differs in nothing else.

    clean                  L(x)                                      L: cross-entropy
    parseval               L(x), and W <- (1 + beta) W - beta W W^T W after every update
    adversarial_deepfool   (1 - a) L(x) + a L(x + D)         D: DeepFool's; Adv. Train I
    adversarial_fgsm       (1 - a) L(x) + a L(x + D)         D: FGSM's; Adv. Train II
    deep_defense           L(x) + lambda * penalty(x)
    deep_defense_fgsm      L(x) + lambda * penalty(x) + a L(x + D)   D: FGSM's; supplement, sec. 2

with a the mixing weight (for FGSM's examples, fgsm_weight). Gradients do not flow through D there:
it is an example like any other.
"""

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from dd_jax.attacks import fgsm
from dd_jax.attacks._deepfool import deepfool
from dd_jax.deep_defense import deep_defense_loss
from dd_jax.norms import Norm
from dd_jax.types import LogitsFn

Losses = tuple[Float[Array, " batch"], dict[str, Float[Array, " batch"]]]
LossFn = Callable[..., Losses]


class Defense(NamedTuple):
    """A training loss, and what becomes of the parameters after every update."""

    loss_fn: LossFn
    retract: Callable[[Any], Any]


def plain_loss(
    logits_fn: LogitsFn, inputs: Float[Array, "batch ..."], labels: Int[Array, " batch"]
) -> Losses:
    """Cross-entropy per example, -log softmax(logits)[label], and the metrics "cross_entropy" and
    "correct".
    """
    logits = logits_fn(inputs)
    cross_entropy = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=-1)[:, 0]
    correct = (jnp.argmax(logits, axis=-1) == labels).astype(logits.dtype)
    return cross_entropy, {"cross_entropy": cross_entropy, "correct": correct}


def adversarial_deepfool_loss(
    logits_fn: LogitsFn,
    inputs: Float[Array, "batch ..."],
    labels: Int[Array, " batch"],
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

    (1 - mixing_weight) L(x) + mixing_weight L(x + D), with D away from the label; a misclassified
    example has D = 0. Options of DeepFool as in `dd_jax.deepfool`. Metrics: those of `plain_loss`,
    "adversarial_cross_entropy" and "adversarial_correct". ValueError unless mixing_weight is within
    0..1.
    """
    options = dict(norm=norm, num_steps=num_steps, overshoot=overshoot)
    options |= dict(num_candidates=num_candidates, class_chunk_size=class_chunk_size)
    _check_share(mixing_weight=mixing_weight)
    clean, metrics = plain_loss(logits_fn, inputs, labels)
    adversarial, more = _loss_at(
        logits_fn, inputs, deepfool(logits_fn, inputs, labels, **options).perturbation, labels
    )
    return (1 - mixing_weight) * clean + mixing_weight * adversarial, metrics | more


def adversarial_fgsm_loss(
    logits_fn: LogitsFn,
    inputs: Float[Array, "batch ..."],
    labels: Int[Array, " batch"],
    *,
    fgsm_weight: float = 0.5,
    epsilon: float = 0.1,
) -> Losses:
    """Adversarial training with FGSM's examples, Adv. Train II (Goodfellow, Shlens, Szegedy, ICLR
    2015, equation 6).

    (1 - fgsm_weight) L(x) + fgsm_weight L(x + D), D = epsilon * sign(dL / dx), for misclassified
    examples too. Metrics as in `adversarial_deepfool_loss`. ValueError unless fgsm_weight is within
    0..1.
    """
    _check_share(fgsm_weight=fgsm_weight)
    clean, metrics = plain_loss(logits_fn, inputs, labels)
    adversarial, more = _fgsm_loss(logits_fn, inputs, labels, epsilon)
    return (1 - fgsm_weight) * clean + fgsm_weight * adversarial, metrics | more


def deep_defense_fgsm_loss(
    logits_fn: LogitsFn,
    inputs: Float[Array, "batch ..."],
    labels: Int[Array, " batch"],
    *,
    fgsm_weight: float = 0.5,
    epsilon: float = 0.1,
    **options: Any,
) -> Losses:
    """Deep Defense's loss plus fgsm_weight * L(x + D), D being FGSM's perturbation (supplement,
    section 2).

    Other options as in `dd_jax.deep_defense_loss`. Metrics: those of both. ValueError for a
    negative fgsm_weight.
    """
    if not fgsm_weight >= 0:
        raise ValueError(f"fgsm_weight is {fgsm_weight}; it must be 0 or more.")
    defended, metrics = deep_defense_loss(logits_fn, inputs, labels, **options)
    adversarial, more = _fgsm_loss(logits_fn, inputs, labels, epsilon)
    return defended + fgsm_weight * adversarial, metrics | more


def _fgsm_loss(logits_fn: LogitsFn, inputs: Array, labels: Array, epsilon: float) -> Losses:
    perturbation = fgsm(logits_fn, inputs, labels, epsilon=epsilon, early_stop=False).perturbation
    return _loss_at(logits_fn, inputs, perturbation, labels)


def _loss_at(logits_fn: LogitsFn, inputs: Array, perturbation: Array, labels: Array) -> Losses:
    loss, metrics = plain_loss(logits_fn, inputs + jax.lax.stop_gradient(perturbation), labels)
    return loss, {f"adversarial_{name}": values for name, values in metrics.items()}


def _check_share(**weights: float) -> None:
    for name, value in weights.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}; it must be within 0..1.")


def parseval_retraction(params: Any, *, beta: float = 1e-4) -> Any:
    """One step of every weight matrix towards orthonormality, W <- (1 + beta) W - beta W W^T W
    (Cisse et al., ICML 2017).

    Leaves of two axes or more are weights, kernels of (..., inputs, outputs), and become matrices
    of (all but the last axis, outputs); others (biases, scales) stay as they are. A kernel of k
    positions touches every input up to k times: its matrix is retracted in units of 1 / sqrt(k), so
    that singular values approach 1 / sqrt(k) and the layer's Lipschitz constant stays at 1.
    Singular values s (in these units) become s + beta (s - s^3): they approach 1 while beta * s^2
    is well below 1, and diverge where it is above 2.
    """

    def retract(weights: Array) -> Array:
        if weights.ndim < 2:
            return weights
        scale = (weights.size // (weights.shape[-1] * weights.shape[-2])) ** 0.5
        matrix = scale * weights.reshape(-1, weights.shape[-1])
        inner = matrix.T @ matrix if matrix.shape[0] >= matrix.shape[1] else matrix @ matrix.T
        cubed = matrix @ inner if matrix.shape[0] >= matrix.shape[1] else inner @ matrix
        return (((1 + beta) * matrix - beta * cubed) / scale).reshape(weights.shape)

    return jax.tree.map(retract, params)


LOSSES: dict[str, LossFn] = {
    "clean": plain_loss,
    "parseval": plain_loss,
    "adversarial_deepfool": adversarial_deepfool_loss,
    "adversarial_fgsm": adversarial_fgsm_loss,
    "deep_defense": deep_defense_loss,
    "deep_defense_fgsm": deep_defense_fgsm_loss,
}
NAMES: tuple[str, ...] = tuple(LOSSES)


def option_names(name: str) -> frozenset[str]:
    """The options that a defense takes. ValueError for an unknown name."""
    if name not in LOSSES:
        raise ValueError(f"There is no defense {name!r}; choose one of {', '.join(NAMES)}.")
    functions = [LOSSES[name]]
    functions += [deep_defense_loss] if name == "deep_defense_fgsm" else []
    functions += [parseval_retraction] if name == "parseval" else []
    parameters = [inspect.signature(function).parameters.values() for function in functions]
    return frozenset(
        one.name for several in parameters for one in several if one.kind == one.KEYWORD_ONLY
    )


def make_defense(name: str, **options: Any) -> Defense:
    """A defense with its options fixed. ValueError for an unknown name or an option that it does
    not take.
    """
    unknown = sorted(options.keys() - option_names(name))
    if unknown:
        raise ValueError(
            f"The defense {name!r} takes no {', '.join(unknown)}; it takes "
            f"{sorted(option_names(name))}."
        )
    if name == "parseval":
        return Defense(plain_loss, partial(parseval_retraction, **options))
    return Defense(partial(LOSSES[name], **options), lambda params: params)
