"""What Carlini and Wagner's attack minimizes: the input's place in the box, and the net linearized
there; equations in `dd_jax.attacks._carlini_wagner`.
"""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from dd_jax.norms import Bounds, check_bounds, in_words, is_known, lp_norm, per_example, stay_within
from dd_jax.xla.closure_convert import Traces, closure_convert

REACH = 2.0
"""w at a bound. A pixel at its bound moves at 7 % of the speed of one in the middle of the box.
Values of 1 and 3 gave larger perturbations.
"""
DOUBLINGS, HALVINGS = 24.0, 16
"""The bisection along a path through the box: its range, in powers of 2, and its steps."""
ROUNDING = 16
"""Units of precision by which another class must lead. With less, rounding in a net that is
compiled differently may undo the lead.
"""
SHORTEST = 1e-4
"""The least d, relative to the box. With less, rounding would swallow the first steps."""
FLATTEST = 1e-6
"""The least s_j, relative to the largest."""


class Problem(NamedTuple):
    """What is minimized, example by example."""

    inputs: Float[Array, "batch ..."]
    labels: Int[Array, " batch"]
    half_width: Float[Array, "batch ..."]  # h
    origin: Float[Array, "batch ..."]  # w_0
    distance: Float[Array, " batch"]  # d
    slopes: Float[Array, "batch classes"]  # s_j
    rate: Float[Array, " batch"]  # the initial learning rate of a run


def check_box(bounds: Bounds | None, inputs: Float[Array, "batch ..."]) -> None:
    """Raises ValueError unless the bounds are given, fit the inputs and are finite."""
    if bounds is None:
        raise ValueError(
            "bounds is None; this attack needs the range of valid inputs, for example (0.0, 1.0)."
        )
    check_bounds(bounds, inputs)
    if any(is_known(partial(_is_infinite, bound)) for bound in bounds):
        raise ValueError(
            f"bounds are {in_words(bounds)}; this attack needs a finite range, for example (0.0, "
            "1.0)."
        )


def _is_infinite(bound: ArrayLike) -> Bool[Array, ""]:
    return jnp.any(jnp.isinf(jnp.asarray(bound)))


def make_problem(
    traces: Traces,
    inputs: Float[Array, "batch ..."],
    labels: Int[Array, " batch"],
    bounds: Bounds,
    *,
    confidence: float,
    learning_rate: float,
) -> Problem:
    """Computes the inputs' place in the box, and d, s_j and the learning rate from the net
    linearized there.
    """
    lower, upper = (
        jnp.broadcast_to(jnp.asarray(bound, inputs.dtype), inputs.shape) for bound in bounds
    )
    half_width = (upper - lower) / 2
    place = (inputs - (lower + upper) / 2) / jnp.where(half_width > 0, half_width, 1)
    origin = jnp.arctanh(math.tanh(REACH) * jnp.clip(place, -1, 1))
    leads, slopes = _leads_and_slopes(traces, inputs, labels, bounds, confidence)
    diagonal = lp_norm(2 * half_width, "l2")
    distance = jnp.clip(jnp.min(leads / slopes, axis=-1), SHORTEST * diagonal, diagonal)
    # dD / dw
    speed = lp_norm(half_width * (1 - jnp.square(jnp.tanh(origin))) / math.tanh(REACH), "l2")
    rate = jnp.minimum(learning_rate, distance / jnp.where(speed > 0, speed, 1))
    return Problem(inputs, labels, half_width, origin, distance, slopes, rate)


def _leads_and_slopes(
    traces: Traces, inputs: Array, labels: Array, bounds: Bounds, confidence: float
) -> tuple[Float[Array, "batch classes"], Float[Array, "batch classes"]]:
    """z_y - z_j + confidence and s_j at the inputs, for every class j."""
    room = tuple(
        stay_within(jnp.full_like(inputs, far), inputs, bounds) for far in (-jnp.inf, jnp.inf)
    )
    apply_fn, closure = closure_convert(traces, len(inputs))
    closure = jax.tree.map(lax.stop_gradient, closure)
    logits, pull_back = jax.vjp(lambda x: apply_fn(closure, x).astype(x.dtype), inputs)
    leads = leads_of(logits, labels) + confidence
    one_hot = jnp.eye(logits.shape[-1], dtype=logits.dtype)

    def slope_towards(target: tuple[Array, Array]) -> Float[Array, " batch"]:
        (gradient,) = pull_back(target[0][None] - one_hot[labels])
        return mean_slope(gradient, target[1], room)

    # One class at a time: all gradients at once would need memory for every class.
    slopes = lax.map(slope_towards, (one_hot, leads.T)).T
    steepest = jnp.max(slopes, axis=-1, keepdims=True)
    return leads, jnp.where(steepest > 0, jnp.maximum(slopes, FLATTEST * steepest), 1)


def leads_of(
    logits: Float[Array, "rows classes"], labels: Int[Array, " rows"]
) -> Float[Array, "rows classes"]:
    """z_y - z_j for every class j, increased by ROUNDING units of precision; inf for j = y."""
    is_label = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    of_label = jnp.sum(jnp.where(is_label, logits, 0), axis=-1, keepdims=True)
    finite = jnp.where(jnp.isfinite(logits), lax.stop_gradient(logits), 0)
    largest = jnp.max(jnp.abs(finite), axis=-1, keepdims=True)
    return jnp.where(
        is_label, jnp.inf, of_label - logits + ROUNDING * jnp.finfo(logits.dtype).eps * largest
    )


def mean_slope(
    gradient: Float[Array, "batch ..."], lead: Float[Array, " batch"], room: tuple[Array, ...]
) -> Float[Array, " batch"]:
    """<gradient, D> / ||D||_2 for the shortest D in the box that gains the lead.

    That D is t * gradient, clipped to the box; bisection finds the logarithm of t. If no D in the
    box gains the lead, D is the corner in the direction of the gradient. Zero where the gradient is
    zero.
    """
    square = jnp.square(lp_norm(gradient, "l2"))
    without_box = lead / jnp.where(square > 0, square, 1)
    way = lambda doublings: jnp.clip(
        per_example(without_box * 2**doublings, gradient) * gradient, *room
    )
    gain = lambda part: jnp.sum(gradient * part, axis=tuple(range(1, gradient.ndim)))

    def halve(_: Array | int, interval: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = interval
        middle = (low + high) / 2
        is_enough = gain(way(middle)) >= lead
        return jnp.where(is_enough, low, middle), jnp.where(is_enough, middle, high)

    zeros = jnp.zeros_like(lead)
    shortest = way(lax.fori_loop(0, HALVINGS, halve, (zeros, zeros + DOUBLINGS))[1])
    slope = gain(shortest) / lp_norm(shortest, "l2")
    return jnp.where(slope > 0, slope, 0)
