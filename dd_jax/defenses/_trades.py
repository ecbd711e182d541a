"""TRADES (Zhang, Yu, Jiao, Xing, El Ghaoui, Jordan, "Theoretically Principled Trade-off between
Robustness and Accuracy", ICML 2019).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dd_jax.defenses._cross_entropy import (
    Losses,
    check_counts,
    check_not_negative,
    plain_loss,
    without_gradient,
)
from dd_jax.norms import Norm, check_norm, has_key_per_example, project, steepest_direction
from dd_jax.types import LogitsFn, RandomKeys

START_DEVIATION = 1e-3  # The authors'. At the inputs themselves the divergence has no gradient.


def trades_loss(
    logits_fn: LogitsFn,
    inputs: Float[Array, "batch ..."],
    labels: Int[Array, " batch"],
    key: RandomKeys,
    *,
    kl_weight: float = 6.0,
    epsilon: float = 0.1,
    attack_norm: Norm = "linf",
    num_attack_steps: int = 10,
    relative_step_size: float = 0.25,
) -> Losses:
    """Cross-entropy, plus the divergence of the predictions at adversarial examples.

        L(x) + kl_weight KL(f(x) || f(x + D)),    D near argmax KL(f(x) || f(x + D))

    over ||D||_p <= epsilon, with f the softmax of the logits. D starts at Gaussian noise of
    deviation 0.001 that the key draws. It takes `num_attack_steps` steps of length
    relative_step_size * epsilon along the steepest direction of the norm, each followed by a
    projection into the ball. (For l2 the authors' code has another attack, with an optimizer.) The
    labels have no influence on D. Gradients flow through f(x) and f(x + D), not through D. With
    kl_weight 0 or epsilon 0 this is the plain cross-entropy. The authors' weights are 1 and 6.

    Metrics: those of `plain_loss`, "divergence" and "adversarial_correct". ValueError for a
    negative weight or size, an unknown attack_norm, or no steps.
    """
    check_norm(attack_norm)
    check_not_negative(kl_weight=kl_weight, epsilon=epsilon, relative_step_size=relative_step_size)
    check_counts(num_attack_steps=num_attack_steps)
    logits, net = logits_fn(inputs), without_gradient(logits_fn, inputs)
    noise = START_DEVIATION * _normal(key, inputs)
    probabilities = jax.nn.softmax(lax.stop_gradient(logits))
    take_step = ascent_step(net, inputs, probabilities, epsilon, relative_step_size, attack_norm)
    start = project(noise, jnp.full(len(inputs), epsilon, inputs.dtype), attack_norm)
    perturbation = lax.fori_loop(0, num_attack_steps, lambda _, before: take_step(before), start)
    attacked = logits_fn(inputs + lax.stop_gradient(perturbation))
    divergence = kl_divergence(logits, attacked)
    cross_entropy, metrics = plain_loss(lambda _: logits, inputs, labels)
    right = (jnp.argmax(attacked, axis=-1) == labels).astype(logits.dtype)
    metrics |= {"divergence": divergence, "adversarial_correct": right}
    return cross_entropy + kl_weight * divergence, metrics


def _normal(key: RandomKeys, like: Float[Array, "batch ..."]) -> Float[Array, "batch ..."]:
    draw = lambda key, x: jax.random.normal(key, x.shape, x.dtype)
    return (jax.vmap(draw) if has_key_per_example(key) else draw)(key, like)


def ascent_step(
    net: LogitsFn,
    inputs: Float[Array, "batch ..."],
    probabilities: Float[Array, "batch classes"],
    epsilon: float,
    relative_step_size: float,
    norm: Norm,
) -> Callable[[Float[Array, "batch ..."]], Float[Array, "batch ..."]]:
    """One step of projected gradient ascent of KL(probabilities || f(x + D)), as a function of D.

    The gradient of the divergence in the logits is f(x + D) - probabilities.
    """
    radius = jnp.full(len(inputs), epsilon, inputs.dtype)

    def take_step(perturbation: Float[Array, "batch ..."]) -> Float[Array, "batch ..."]:
        attacked, pull_back = jax.vjp(net, inputs + perturbation)
        gradient = pull_back(jax.nn.softmax(attacked) - probabilities)[0]
        step = relative_step_size * epsilon * steepest_direction(gradient, norm)
        return project(perturbation + jnp.where(jnp.isfinite(step), step, 0), radius, norm)

    return take_step


def kl_divergence(
    logits: Float[Array, "batch classes"], other_logits: Float[Array, "batch classes"]
) -> Float[Array, " batch"]:
    """KL(p || q) = sum p (log p - log q), with p and q the softmax of the logits; 0 or more."""
    log_p, log_q = jax.nn.log_softmax(logits), jax.nn.log_softmax(other_logits)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
