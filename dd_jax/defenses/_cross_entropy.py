"""The cross-entropy per example, at the inputs and at perturbed inputs: every defense starts from
it.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dd_jax.attacks._arguments import trace
from dd_jax.types import LogitsFn, RandomKeys
from dd_jax.xla.closure_convert import closure_convert

Losses = tuple[Float[Array, " batch"], dict[str, Float[Array, " batch"]]]
"""The loss per example, and what to log, by name: one number per example."""


def plain_loss(
    logits_fn: LogitsFn,
    inputs: Float[Array, "batch ..."],
    labels: Int[Array, " batch"],
    key: RandomKeys | None = None,
) -> Losses:
    """Cross-entropy per example, -log softmax(logits)[label].

    Metrics: "cross_entropy", and "correct" (1 where the prediction is right). The key is not used.
    """
    logits = logits_fn(inputs)
    cross_entropy = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=-1)[:, 0]
    correct = (jnp.argmax(logits, axis=-1) == labels).astype(logits.dtype)
    return cross_entropy, {"cross_entropy": cross_entropy, "correct": correct}


def adversarial_loss(
    logits_fn: LogitsFn,
    inputs: Float[Array, "batch ..."],
    perturbation: Float[Array, "batch ..."],
    labels: Int[Array, " batch"],
) -> Losses:
    """Cross-entropy per example at inputs + perturbation; the perturbation is a constant.

    Metrics: those of `plain_loss`, as "adversarial_cross_entropy" and "adversarial_correct".
    """
    loss, metrics = plain_loss(logits_fn, inputs + lax.stop_gradient(perturbation), labels)
    return loss, {f"adversarial_{name}": values for name, values in metrics.items()}


def without_gradient(logits_fn: LogitsFn, inputs: Float[Array, "batch ..."]) -> LogitsFn:
    """The same net for inputs of this batch size, as a constant: no gradient flows into what it
    closes over. An attack within a loss uses it, so that nothing is kept for a backward pass.
    """
    apply_fn, closure = closure_convert(trace(logits_fn, inputs), len(inputs))
    return partial(apply_fn, jax.tree.map(lax.stop_gradient, closure))


def check_shares(**weights: float) -> None:
    """Raises ValueError unless each is within 0..1."""
    for name, value in weights.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} is {value}; it must be within 0..1.")


def check_not_negative(**values: float | int) -> None:
    """Raises ValueError unless each is 0 or more."""
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"{name} is {value}; it must be 0 or more.")


def check_counts(**counts: int) -> None:
    """Raises ValueError unless each is at least 1."""
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1.")
