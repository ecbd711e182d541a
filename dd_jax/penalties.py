"""Penalties: what a margin costs, given the margin and whether the prediction is right.

    exponential    exp(-s m)                                     Deep Defense's
    hinge          max(0, 1 - s m)
    linear         -s m
    reciprocal     1 / (1 + s m) where right, 1 - s m where wrong

with m the signed margin (`dd_jax.signed_margin`: positive where right, negative where wrong) and
s = correct_scale where right, wrong_scale where wrong. All fall as m grows. A penalty of your own
is any function `penalty_fn(margin, correct) -> penalty` of two arrays (batch,), differentiable in
the margin:

    dd_jax.regularizer(logits_fn, images, labels, penalty_fn=lambda m, correct: jnp.exp(-9 * m))
"""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from dd_jax.types import Scalar

PenaltyFn = Callable[[Float[Array, " batch"], Bool[Array, " batch"]], Float[Array, " batch"]]
"""(margin, correct) -> penalty, one number per example each."""


def exponential(
    margin: Float[Array, " batch"],
    correct: Bool[Array, " batch"],
    *,
    correct_scale: Scalar = 25.0,
    wrong_scale: Scalar = 5.0,
) -> Float[Array, " batch"]:
    """exp(-correct_scale m) where right, exp(-wrong_scale m) where wrong: Deep Defense's penalty.

    Right examples lie in (0, 1], wrong ones in [1, inf), capped at the square root of the largest
    float, beyond which the gradient is 0. The defaults are the authors'. Choose correct_scale so
    that exp(-correct_scale m) is not yet tiny for the examples to be moved.
    """
    largest = jnp.log(jnp.finfo(margin.dtype).max) / 2
    exponent = -_scaled(margin, correct, correct_scale, wrong_scale)
    return jnp.exp(jnp.minimum(exponent, largest.astype(margin.dtype)))


def hinge(
    margin: Float[Array, " batch"],
    correct: Bool[Array, " batch"],
    *,
    correct_scale: Scalar = 5.0,
    wrong_scale: Scalar = 5.0,
) -> Float[Array, " batch"]:
    """max(0, 1 - s m): nothing is asked of an example whose margin is 1 / s or more."""
    return jnp.maximum(0, 1 - _scaled(margin, correct, correct_scale, wrong_scale))


def linear(
    margin: Float[Array, " batch"],
    correct: Bool[Array, " batch"],
    *,
    correct_scale: Scalar = 1.0,
    wrong_scale: Scalar = 1.0,
) -> Float[Array, " batch"]:
    """-s m: every example is pushed alike. It has no lower bound; use it with a small weight."""
    return -_scaled(margin, correct, correct_scale, wrong_scale)


def reciprocal(
    margin: Float[Array, " batch"],
    correct: Bool[Array, " batch"],
    *,
    correct_scale: Scalar = 25.0,
    wrong_scale: Scalar = 25.0,
) -> Float[Array, " batch"]:
    """1 / (1 + s m) where right; where wrong 1 - s m, the tangent at m = 0 if the scales are equal.

    It falls more slowly than the exponential, so that examples of large margin still count.
    """
    scaled = _scaled(margin, correct, correct_scale, wrong_scale)
    return jnp.where(correct, 1 / (1 + jnp.where(correct, scaled, 0)), 1 - scaled)


def _scaled(margin: Array, correct: Array, correct_scale: Scalar, wrong_scale: Scalar) -> Array:
    return jnp.where(correct, correct_scale, wrong_scale) * margin


PENALTIES: dict[str, PenaltyFn] = {
    "exponential": exponential,
    "hinge": hinge,
    "linear": linear,
    "reciprocal": reciprocal,
}
"""By name, for configurations: `--config.defense.penalty=hinge`."""
