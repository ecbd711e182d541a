"""Verification of an attack's perturbations by a plain forward pass.

An attack's own success can be wrong, and so can the compiled program: with jaxlib 0.10.2, one XLA
flag made C&W return perturbations that fool nothing, with success everywhere. Therefore every size,
success and accuracy that dd_jax reports comes from the perturbation itself, given to the user's net
in a program that is compiled separately from the attack. Under one `jax.jit` together with the
attack, these functions compute the same but verify less.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from dd_jax.norms import Bounds, LpNorm, lp_norm, stay_within
from dd_jax.types import LogitsFn, Scalar

ROUNDING = 8
"""Units of precision by which a perturbation may exceed a bound or a ball."""
NO_CLASS = -1
"""The class of logits that are NaN."""


def predicted_classes(
    logits_fn: LogitsFn, inputs: Float[Array, "batch ..."]
) -> Int[Array, " batch"]:
    """The class of the largest logit, the first one among ties; -1 where a logit is NaN."""
    logits = logits_fn(inputs)
    classes = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    return jnp.where(jnp.any(jnp.isnan(logits), axis=-1), NO_CLASS, classes)


def is_fooled(
    logits_fn: LogitsFn,
    inputs: Float[Array, "batch ..."],
    perturbation: Float[Array, "batch ..."],
    classes: Int[Array, " batch"],
    *,
    bounds: Bounds | None = None,
    epsilon: Scalar | None = None,
    norm: LpNorm = "linf",
) -> Bool[Array, " batch"]:
    """Whether inputs + perturbation is not classified as `classes`, and the perturbation is
    allowed.

    Args:
      logits_fn: maps (batch, ...) inputs to (batch, classes) logits, row by row. It is called once.
      inputs, perturbation: of the same shape, in the same space.
      classes: the classes to leave: the labels, or `predicted_classes(logits_fn, inputs)`.
      bounds: (lower, upper), numbers or arrays that broadcast to one example. A perturbation that
        exceeds them by more than rounding does not succeed; an input that is out of bounds may stay
        where it is. None: no bounds.
      epsilon, norm: the largest allowed ||perturbation||_p, in the units of the inputs. None: any.

    Returns:
      One truth value per example. False where the perturbation is not finite or exceeds the bounds
      or epsilon, and where a logit is NaN. A zero perturbation succeeds where the input is
      misclassified already.
    """
    after = predicted_classes(logits_fn, inputs + perturbation)
    return (
        (after != classes)
        & (after != NO_CLASS)
        & is_allowed(inputs, perturbation, bounds, epsilon, norm)
    )


def is_allowed(
    inputs: Float[Array, "batch ..."],
    perturbation: Float[Array, "batch ..."],
    bounds: Bounds | None,
    epsilon: Scalar | None,
    norm: LpNorm,
) -> Bool[Array, " batch"]:
    """Whether each perturbation is finite and, up to rounding, within the bounds and within the lp
    ball of radius epsilon.
    """
    precision = ROUNDING * float(jnp.finfo(perturbation.dtype).eps)
    axes = tuple(range(1, perturbation.ndim))
    allowed = jnp.all(jnp.isfinite(perturbation), axis=axes)
    if epsilon is not None:
        allowed &= lp_norm(perturbation, norm) <= epsilon * (1 + precision)
    if bounds is not None:
        slack = precision * jnp.maximum(jnp.abs(inputs), jnp.abs(inputs + perturbation))
        excess = jnp.abs(perturbation - stay_within(perturbation, inputs, bounds))
        allowed &= jnp.all(excess <= slack, axis=axes)
    return allowed
