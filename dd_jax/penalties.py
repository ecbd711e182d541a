"""Penalties: functions of an example's margin and of whether its prediction is right.

    exponential    exp(-s m)                                     Deep Defense's
    hinge          max(0, 1 - s m)
    linear         -s m
    reciprocal     1 / (1 + s m) where right, 1 - s m where wrong

m is the signed margin (`dd_jax.signed_margin`: 0 or more where right, 0 or less where wrong), and
s = correct_scale where right, wrong_scale where wrong. No penalty grows as m grows. A penalty of
your own is any function `penalty_fn(margin, correct) -> penalty` of two arrays (batch,), which is
differentiable in the margin:

    dd_jax.regularizer(logits_fn, images, labels, penalty_fn=lambda m, correct: jnp.exp(-9 * m))

The functions here check no values: `dd_jax.regularizer` refuses negative scales.
"""

from collections.abc import Callable

import jax
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

    Its values lie in (0, 1] for right examples, and in [1, inf) for wrong ones. It is capped at the
    square root of the largest float; beyond the cap the gradient is 0. The defaults are the
    authors'. Choose correct_scale so that exp(-correct_scale m) is not close to 0 for the examples
    that matter.

    >>> import jax.numpy as jnp
    >>> from dd_jax import penalties
    >>> margin, correct = jnp.array([0.1, -0.1]), jnp.array([True, False])
    >>> [round(float(penalty), 3) for penalty in penalties.exponential(margin, correct)]
    [0.082, 1.649]
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
    """max(0, 1 - s m): zero, without a gradient, for a margin of 1 / s or more.

    >>> import jax.numpy as jnp
    >>> from dd_jax import penalties
    >>> margin, correct = jnp.array([0.1, 0.3, -0.1]), jnp.array([True, True, False])
    >>> penalties.hinge(margin, correct).tolist()
    [0.5, 0.0, 1.5]
    """
    return jax.nn.relu(1 - _scaled(margin, correct, correct_scale, wrong_scale))


def linear(
    margin: Float[Array, " batch"],
    correct: Bool[Array, " batch"],
    *,
    correct_scale: Scalar = 1.0,
    wrong_scale: Scalar = 1.0,
) -> Float[Array, " batch"]:
    """-s m: the same gradient for every margin. It has no lower bound; use it with a small weight.

    >>> import jax.numpy as jnp
    >>> from dd_jax import penalties
    >>> penalties.linear(jnp.array([0.5, -0.25]), jnp.array([True, False])).tolist()
    [-0.5, 0.25]
    """
    return -_scaled(margin, correct, correct_scale, wrong_scale)


def reciprocal(
    margin: Float[Array, " batch"],
    correct: Bool[Array, " batch"],
    *,
    correct_scale: Scalar = 25.0,
    wrong_scale: Scalar = 25.0,
) -> Float[Array, " batch"]:
    """1 / (1 + s m) where right, 1 - s m where wrong.

    With equal scales, the second is the tangent of the first at m = 0. The reciprocal falls more
    slowly than the exponential, so examples with a large margin still count.

    >>> import jax.numpy as jnp
    >>> from dd_jax import penalties
    >>> penalties.reciprocal(jnp.array([0.04, -0.04]), jnp.array([True, False])).tolist()
    [0.5, 2.0]
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
"""The penalties by name, for configurations: `--config.defense.penalty=hinge`."""
