"""lp norms of batches of inputs, safe to differentiate at zero, their duals and balls, and the
bounds of inputs.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float

from dd_jax.types import RandomKeys

Norm = Literal["l2", "linf"]
NORMS: tuple[str, ...] = get_args(Norm)
"""What most attacks take."""
LpNorm = Literal["l1", "l2", "linf"]
LP_NORMS: tuple[str, ...] = get_args(LpNorm)
"""What the functions of this module take, unless they say otherwise, and the attacks that say
so.
"""
DUALS: dict[str, LpNorm] = {"l1": "linf", "l2": "l2", "linf": "l1"}
Bounds = Sequence[ArrayLike]
"""(lower, upper), each a number, or an array that broadcasts to one example, with or without a
leading axis of size 1.
"""


def check_norm(norm: str, allowed: Sequence[str] = NORMS) -> None:
    """Raises ValueError unless `norm` is one of those that the caller has implemented."""
    if norm not in allowed:
        raise ValueError(f"norm is {norm!r}; it must be one of {', '.join(map(repr, allowed))}.")


def _trailing(x: Array, num_leading: int) -> tuple[int, ...]:
    return tuple(range(num_leading, x.ndim))


def lp_norm(
    x: Float[Array, "batch ..."], norm: LpNorm, *, num_leading: int = 1
) -> Float[Array, "..."]:
    """||x||_p over all axes but the first `num_leading`.

    "l1" is the sum of the absolute values. "l2" is the square root of the sum of squares; its
    gradient at zero is zero, not NaN. "linf" is the largest absolute value; its gradient is shared
    evenly among ties, as `jnp.max` does.
    """
    check_norm(norm, LP_NORMS)
    if norm == "l1":
        return jnp.sum(jnp.abs(x), axis=_trailing(x, num_leading))
    if norm == "linf":
        return jnp.max(jnp.abs(x), axis=_trailing(x, num_leading))
    squares = jnp.sum(jnp.square(x), axis=_trailing(x, num_leading))
    is_zero = squares == 0
    return jnp.where(is_zero, 0, jnp.sqrt(jnp.where(is_zero, 1, squares)))


def dual_norm(
    x: Float[Array, "batch ..."], norm: LpNorm, *, num_leading: int = 1
) -> Float[Array, "..."]:
    """||x||_q with 1/p + 1/q = 1, a gradient's norm where perturbations are measured in lp: l2 for
    l2, l1 for linf, linf for l1.
    """
    check_norm(norm, LP_NORMS)
    return lp_norm(x, DUALS[norm], num_leading=num_leading)


def relative_norm(
    perturbation: Float[Array, "batch ..."],
    inputs: Float[Array, "batch ..."],
    norm: LpNorm = "l2",
) -> Float[Array, " batch"]:
    """rho = ||perturbation||_p / ||inputs||_p, one number per example; the loss and the metrics
    both use it.

    An all-zero input has no size to compare with: its rho is 0, and so is the gradient.
    """
    size = lp_norm(inputs, norm)
    is_zero = size == 0
    return jnp.where(is_zero, 0, lp_norm(perturbation, norm) / jnp.where(is_zero, 1, size))


def per_example(values: Array, like: Array) -> Array:
    """Gives `values` (batch,) trailing axes of size one, so that it broadcasts against `like`
    (batch, ...).
    """
    return values.reshape(values.shape + (1,) * (like.ndim - values.ndim))


def steepest_direction(
    gradient: Float[Array, "batch ..."], norm: Norm
) -> Float[Array, "batch ..."]:
    """argmax <gradient, r> over ||r||_p <= 1: gradient / ||gradient||_2 for l2, sign(gradient) for
    linf; l1 is not implemented.

    Zero where the gradient is. What it gains is the dual norm. Gradients may be so small or large
    that their squares are not floats.
    """
    check_norm(norm)
    if norm == "linf":
        return jnp.sign(gradient)
    largest = per_example(lp_norm(gradient, "linf"), gradient)
    scaled = gradient / jnp.where(largest == 0, 1, largest)
    size = per_example(lp_norm(scaled, "l2"), gradient)
    return scaled / jnp.where(size == 0, 1, size)


def project(
    x: Float[Array, "batch ..."], radius: Float[Array, " batch"], norm: LpNorm
) -> Float[Array, "batch ..."]:
    """The point of the lp ball of that radius around zero that is nearest in l2, example by
    example.

    Never outside by rounding: the l1 and l2 balls are taken smaller by sqrt(size of an example)
    units of the dtype's precision, which is more than summing in another order makes. Half
    precision is computed in float32, with balls smaller by one unit of the half precision.
    """
    check_norm(norm, LP_NORMS)
    if norm == "linf":
        return jnp.clip(x, -per_example(radius, x), per_example(radius, x))
    if jnp.finfo(x.dtype).bits < 32:
        shorter = (1 - float(jnp.finfo(x.dtype).eps)) * radius.astype(jnp.float32)
        return project(x.astype(jnp.float32), shorter, norm).astype(x.dtype)
    if norm == "l1":
        x = _lower_to_l1_ball(x, radius)
    radius = per_example(radius, x)
    radius = radius * (1 - math.prod(x.shape[1:]) ** 0.5 * jnp.finfo(x.dtype).eps)
    size = per_example(lp_norm(x, norm), x)
    return jnp.where(size > radius, x * (radius / jnp.where(size == 0, 1, size)), x)


def _lower_to_l1_ball(
    x: Float[Array, "batch ..."], radius: Float[Array, " batch"]
) -> Float[Array, "batch ..."]:
    """sign(x) * max(|x| - t, 0) with the smallest t >= 0 that leads into the l1 ball, up to
    rounding.

    t = max_k (sum of the k largest |x| - radius) / k, as only the right k gives the maximum (Duchi,
    Shalev-Shwartz, Singer, Chandra, ICML 2008).
    """
    flat = jnp.abs(x).reshape(x.shape[0], math.prod(x.shape[1:]))
    sums = jnp.cumsum(jnp.sort(flat, axis=1, descending=True), axis=1)
    counts = jnp.arange(1, flat.shape[1] + 1, dtype=x.dtype)
    threshold = jnp.max((sums - radius[:, None]) / counts[None], axis=1)
    return jnp.sign(x) * jnp.maximum(jnp.abs(x) - per_example(jnp.maximum(threshold, 0), x), 0)


def project_within(
    x: Float[Array, "batch ..."],
    radius: Float[Array, " batch"],
    inputs: Float[Array, "batch ..."],
    bounds: Bounds | None,
) -> Float[Array, "batch ..."]:
    """The point nearest to x in l2 with ||x||_1 <= radius and inputs + x within the bounds.

    That is sign(x) * clip(|x| - t, 0, r) with r the room that the bounds leave in the direction of
    x, and the smallest t >= 0 that leads into the ball; a bisection finds t up to rounding, from
    outside the ball never. Projecting to the ball and then to the bounds would leave a smaller
    perturbation than the ball allows (Croce and Hein, ICML 2021). Half precision is computed in
    float32, with a ball smaller by one unit of the half precision.
    """
    if jnp.finfo(x.dtype).bits < 32:
        shorter = (1 - float(jnp.finfo(x.dtype).eps)) * radius.astype(jnp.float32)
        wide = x.astype(jnp.float32), shorter, inputs.astype(jnp.float32)
        return project_within(*wide, bounds).astype(x.dtype)
    size = jnp.abs(x)
    room = jnp.abs(stay_within(jnp.where(x > 0, jnp.inf, -jnp.inf), inputs, bounds))
    room = jnp.minimum(room, jnp.where(x == 0, 0, size))
    radius = radius * (1 - math.prod(x.shape[1:]) ** 0.5 * jnp.finfo(x.dtype).eps)
    lowered = lambda t: jnp.minimum(jnp.maximum(size - per_example(t, x), 0), room)

    inside = lambda t: lp_norm(lowered(t), "l1") <= radius
    return jnp.sign(x) * lowered(_least(inside, lp_norm(x, "linf")))


def _least(
    holds: Callable[[Float[Array, " batch"]], Bool[Array, " batch"]],
    largest: Float[Array, " batch"],
) -> Float[Array, " batch"]:
    """The least t from 0 to the largest at which a condition holds that holds from there on; up to
    rounding, never less.
    """

    def halve(_: Array | int, between: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = between
        middle = (low + high) / 2
        return jnp.where(holds(middle), low, middle), jnp.where(holds(middle), middle, high)

    zeros, num_halvings = jnp.zeros_like(largest), jnp.finfo(largest.dtype).nmant + 8
    _, least = jax.lax.fori_loop(0, num_halvings, halve, (zeros, largest))
    return jnp.where(holds(zeros), 0, least)


def has_key_per_example(key: RandomKeys) -> bool:
    """Whether these are several random keys, and not one for all examples."""
    return jnp.ndim(key) > (0 if jnp.issubdtype(key.dtype, jax.dtypes.prng_key) else 1)


def sample_in_ball(
    key: RandomKeys, like: Float[Array, "batch ..."], radius: Float[Array, " batch"], norm: Norm
) -> Float[Array, "batch ..."]:
    """A point per example, uniform in the l2 or linf ball of that radius around zero, in the shape
    and dtype of `like`.

    With one key for all, and JAX's default generator, it depends on the key and the example's place
    in the batch, not on the batch's size. With a key per example it depends on that alone.
    """
    check_norm(norm)
    if has_key_per_example(key):
        one = lambda key, x, r: sample_in_ball(key, x[None], r[None], norm)[0]
        return jax.vmap(one)(key, like, radius)
    if norm == "linf":
        unit = jax.random.uniform(key, like.shape, like.dtype, -1, 1)
    else:
        for_direction, for_length = jax.random.split(key)
        direction = steepest_direction(
            jax.random.normal(for_direction, like.shape, like.dtype), norm
        )
        lengths = jax.random.uniform(for_length, radius.shape, like.dtype) ** (
            1 / math.prod(like.shape[1:])
        )
        unit = per_example(lengths, like) * direction
    return project(per_example(radius, like) * unit, radius, norm)


def check_bounds(bounds: Bounds | None, inputs: Float[Array, "batch ..."]) -> None:
    """Raises ValueError, at trace time, unless there are no bounds or they are (lower, upper) with
    lower <= upper.
    """
    if bounds is None:
        return
    if len(bounds) != 2:
        raise ValueError(f"bounds must be a pair (lower, upper); got {len(bounds)} of them.")
    one = (1, *inputs.shape[1:])
    for shape in map(jnp.shape, bounds):
        if len(shape) > len(one) or any(
            n not in (1, m) for n, m in zip(shape[::-1], one[::-1], strict=False)
        ):
            raise ValueError(
                f"a bound must be a number or broadcast to the shape of one example, {one[1:]} or "
                f"{one}; got {shape}."
            )
    if is_known(lambda: jnp.any(~(_like_one(bounds[0], inputs) <= _like_one(bounds[1], inputs)))):
        raise ValueError(
            f"bounds are {in_words(bounds)}; the first must nowhere exceed the second."
        )


def in_words(bounds: Bounds) -> str:
    """The bounds for a message of one line: numbers as they are, arrays as their shapes."""
    shapes = [jnp.shape(bound) for bound in bounds]
    parts = [
        f"an array of shape {shape}" if shape else str(bound)
        for bound, shape in zip(bounds, shapes, strict=True)
    ]
    return " and ".join(parts)


def stay_within(
    perturbation: Float[Array, "batch ..."],
    inputs: Float[Array, "batch ..."],
    bounds: Bounds | None,
) -> Float[Array, "batch ..."]:
    """Shortens components until inputs + perturbation is within the bounds, up to rounding.

    No component grows or changes its sign, so no ball is left. An input that is out of bounds goes
    no further out.
    """
    if bounds is None:
        return perturbation
    lower, upper = (_like_one(bound, inputs) for bound in bounds)
    lowest = jnp.where(inputs > lower, lower - inputs, 0)  # 0 also where the input is not a number
    return jnp.clip(perturbation, lowest, jnp.where(inputs < upper, upper - inputs, 0))


def move_within(x: Float[Array, "batch ..."], bounds: Bounds | None) -> Float[Array, "batch ..."]:
    """The nearest point to x within the bounds, example by example; x itself where there are
    none.
    """
    return x if bounds is None else jnp.clip(x, *(_like_one(bound, x) for bound in bounds))


def is_known(condition: Callable[[], Array]) -> bool:
    """Whether a condition on arrays holds, as far as that can be told at trace time."""
    with jax.ensure_compile_time_eval():
        value = condition()
    return not isinstance(value, jax.core.Tracer) and bool(value)


def _like_one(bound: ArrayLike, inputs: Float[Array, "batch ..."]) -> Float[Array, "one ..."]:
    """A bound with the axes of the inputs, for one example."""
    return jnp.broadcast_to(jnp.asarray(bound, inputs.dtype), (1, *inputs.shape[1:]))
