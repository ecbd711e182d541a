"""lp norms of batches of inputs: safe to differentiate at zero, with their duals."""

from typing import Literal, get_args

import jax.numpy as jnp
from jaxtyping import Array, Float

Norm = Literal["l2", "linf"]
NORMS: tuple[str, ...] = get_args(Norm)


def check_norm(norm: str) -> None:
    """Raises ValueError unless `norm` is one that the attacks know."""
    if norm not in NORMS:
        raise ValueError(f"norm is {norm!r}; it must be one of {', '.join(map(repr, NORMS))}.")


def _trailing(x: Array, num_leading: int) -> tuple[int, ...]:
    return tuple(range(num_leading, x.ndim))


def lp_norm(x: Float[Array, "batch ..."], norm: Norm, *, num_leading: int = 1) -> Float[Array, "..."]:
    """||x||_p over all axes but the first `num_leading`.

    "l2" is the square root of the sum of squares; its gradient at zero is zero, not NaN. "linf" is the largest absolute
    value; its gradient is shared evenly among ties, as `jnp.max` does.
    """
    check_norm(norm)
    if norm == "linf":
        return jnp.max(jnp.abs(x), axis=_trailing(x, num_leading))
    squares = jnp.sum(jnp.square(x), axis=_trailing(x, num_leading))
    is_zero = squares == 0
    return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, squares)))


def dual_norm(x: Float[Array, "batch ..."], norm: Norm, *, num_leading: int = 1) -> Float[Array, "..."]:
    """||x||_q with 1/p + 1/q = 1, the norm of a gradient where perturbations are measured in lp: l2 -> l2, linf -> l1."""
    check_norm(norm)
    if norm == "linf":
        return jnp.sum(jnp.abs(x), axis=_trailing(x, num_leading))
    return lp_norm(x, norm, num_leading=num_leading)


def relative_norm(
    perturbation: Float[Array, "batch ..."], inputs: Float[Array, "batch ..."], norm: Norm = "l2"
) -> Float[Array, " batch"]:
    """rho = ||perturbation||_p / ||inputs||_p, one number per example; the loss and the metrics both use it.

    An all-zero input has no size to compare with: its rho is 0, and so is the gradient.
    """
    size = lp_norm(inputs, norm)
    is_zero = size == 0
    return jnp.where(is_zero, 0, lp_norm(perturbation, norm) / jnp.where(is_zero, 1, size))


def per_example(values: Array, like: Array) -> Array:
    """Gives `values` (batch,) trailing axes of size one, so that it broadcasts against `like` (batch, ...)."""
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))
