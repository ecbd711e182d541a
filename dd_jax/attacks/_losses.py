"""The losses that AutoAttack's gradient attacks increase, from logits z, label y and target t.

    ce              log sum_{i != y} exp(z_i) - z_y
    dlr             -(z_y - max_{i != y} z_i) / (z_(1) - z_(3))
    dlr_targeted    -(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2)

z_(k) is the k-th largest logit. DLR is the difference of logits ratio of Croce and Hein (ICML
2020), which does not change when the logits are scaled or shifted.

The cross-entropy is log(1 + exp(ce)), a strictly increasing function of "ce". Gradient directions
and comparisons are the cross-entropy's; but "ce" does not saturate where the net is so confident
that the cross-entropy rounds to 0. For random nets, whose gradients are averaged, "ce" is the
cross-entropy itself.
"""

import warnings
from collections.abc import Callable
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dd_jax.attacks._minimum_norm import label_and_others, rival_difference

Loss = Literal["ce", "dlr", "dlr_targeted"]
LOSSES: tuple[str, ...] = get_args(Loss)
LossFn = Callable[
    [Float[Array, "rows classes"], Int[Array, " rows"], Int[Array, " rows"]], Float[Array, " rows"]
]
"""(logits, labels, targets) -> one loss per row; only targeted losses use the targets."""
SMALLEST = 1e-12
"""Added to DLR's denominators, as in the authors' code."""


def loss_fn_for(name: Loss, num_classes: int, *, is_random: bool = False) -> LossFn:
    """The loss of that name, or a simpler one where there are too few classes for it.

    A warning says so: DLR needs 3 classes and its targeted form 4, for the logits in their
    denominators.
    """
    if name not in LOSSES:
        raise ValueError(f"loss is {name!r}; it must be one of {', '.join(map(repr, LOSSES))}.")
    cross_entropy_like = cross_entropy if is_random else cross_entropy_margin
    needed = {"ce": 2, "dlr": 3, "dlr_targeted": 4}[name]
    if num_classes >= needed:
        return {"ce": cross_entropy_like, "dlr": dlr, "dlr_targeted": dlr_targeted}[name]
    substitute = "the plain difference of logits" if name == "dlr_targeted" else "'ce'"
    warnings.warn(
        f"The loss {name!r} needs at least {needed} classes and the net has {num_classes}: "
        f"{substitute} takes its place.",
        stacklevel=4,
    )
    return difference_to_target if name == "dlr_targeted" else cross_entropy_like


def cross_entropy(logits: Array, labels: Array, targets: Array) -> Float[Array, " rows"]:
    """log(1 + exp(ce))."""
    return jax.nn.softplus(cross_entropy_margin(logits, labels, targets))


def cross_entropy_margin(logits: Array, labels: Array, targets: Array) -> Float[Array, " rows"]:
    """log sum_{i != y} exp(z_i) - z_y."""
    del targets
    is_label = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    others = jax.nn.logsumexp(jnp.where(is_label, -jnp.inf, logits), axis=-1)
    return others - label_and_others(logits, labels)[0]


def dlr(logits: Array, labels: Array, targets: Array) -> Float[Array, " rows"]:
    """-(z_y - max_{i != y} z_i) / (z_(1) - z_(3))."""
    del targets
    largest, _ = lax.top_k(logits, 3)
    return rival_difference(logits, labels) / (largest[:, 0] - largest[:, 2] + SMALLEST)


def dlr_targeted(logits: Array, labels: Array, targets: Array) -> Float[Array, " rows"]:
    """-(z_y - z_t) / (z_(1) - (z_(3) + z_(4)) / 2)."""
    largest, _ = lax.top_k(logits, 4)
    scale = largest[:, 0] - (largest[:, 2] + largest[:, 3]) / 2
    return difference_to_target(logits, labels, targets) / (scale + SMALLEST)


def difference_to_target(logits: Array, labels: Array, targets: Array) -> Float[Array, " rows"]:
    """z_t - z_y."""
    towards = jax.nn.one_hot(targets, logits.shape[-1], dtype=logits.dtype)
    away = jax.nn.one_hot(labels, logits.shape[-1], dtype=logits.dtype)
    chosen = lambda which: jnp.sum(jnp.where(which > 0, logits, 0), axis=-1)
    return chosen(towards) - chosen(away)
