"""The smallest step within a box that changes an affine function by a given amount, in l1, l2 or
linf; FAB's projections.

For weights w, an amount c and room r >= 0 in the direction of the step, the step has the signs of
c * w, and its absolute values a minimize ||a||_p subject to

    sum_i |w_i| a_i = |c|,    0 <= a_i <= r_i

    linf    a_i = min(t, r_i)
    l2      a_i = min(t |w_i|, r_i)
    l1      a_i = r_i where |w_i| > t, 0 where |w_i| < t, and a common share of r_i where |w_i| = t

For l2 and linf the left side is concave and piecewise linear in t. Newton's method from t = 0 finds
t exactly, and never from above. For l1, t is one of the |w_i|: a bisection over the floats finds
it. If even a = r does not suffice, a = r.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from dd_jax.norms import Bounds, LpNorm, lp_norm, per_example, stay_within

MOST_NEWTON_STEPS = 64
"""Newton's method on d breakpoints needs a few steps; this ends it where rounding does not."""
BITS = {16: jnp.int16, 32: jnp.int32, 64: jnp.int64}


def step_to_hyperplane(
    weights: Float[Array, "rows ..."],
    amount: Float[Array, " rows"],
    position: Float[Array, "rows ..."],
    bounds: Bounds | None,
    norm: LpNorm,
) -> Float[Array, "rows ..."]:
    """The smallest d with <weights, d> = amount and position + d within the bounds.

    Where no such d exists, the corner of the box that comes nearest to it. Zero where the weights
    are zero or the amount is.
    """
    direction = per_example(jnp.sign(amount), weights) * jnp.sign(weights)
    furthest = stay_within(jnp.where(direction > 0, jnp.inf, -jnp.inf), position, bounds)
    room = jnp.where(direction == 0, 0, jnp.abs(furthest))
    steepest = lp_norm(weights, "linf")  # Squares of what is divided by it are floats.
    steepest = jnp.where(steepest > 0, steepest, 1)
    slope, amount = jnp.abs(weights) / per_example(steepest, weights), jnp.abs(amount) / steepest
    if norm == "l1":
        return direction * _fill_steepest(slope, amount, room)
    return direction * _fill_evenly(slope, amount, room, norm)


def _total(x: Float[Array, "rows ..."]) -> Float[Array, " rows"]:
    return jnp.sum(x, axis=tuple(range(1, x.ndim)))


def _fill_evenly(slope: Array, amount: Array, room: Array, norm: LpNorm) -> Array:
    """a for l2 and linf."""
    speed = jnp.where(room > 0, slope if norm == "l2" else 1, 0)
    filled_to = lambda level: jnp.minimum(per_example(level, room) * speed, room)

    def missing(level: Array) -> tuple[Array, Array]:
        """How much of the amount is missing, and how fast it grows."""
        filled = filled_to(level)
        grows = _total(jnp.where(filled < room, slope * speed, 0))
        return amount - _total(slope * filled), grows

    level, suffices = _root(missing, amount)
    return jnp.where(per_example(suffices, room), filled_to(level), _finite(room))


def _root(
    missing: Callable[[Array], tuple[Array, Array]], amount: Array
) -> tuple[Float[Array, " rows"], Bool[Array, " rows"]]:
    """Newton's method for the level at which nothing is missing; and whether there is one."""

    def step(state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        level, _, count = state
        lacks, grows = missing(level)
        further = level + lacks / jnp.where(grows > 0, grows, 1)
        moves = (grows > 0) & (lacks > 0) & (further > level) & jnp.isfinite(further)
        return jnp.where(moves, further, level), moves, count + 1

    goes_on = lambda state: jnp.any(state[1]) & (state[2] < MOST_NEWTON_STEPS)
    start = jnp.zeros_like(amount), jnp.ones(amount.shape, bool), jnp.zeros((), int)
    level, _, _ = lax.while_loop(goes_on, step, start)
    lacks, grows = missing(level)
    return level, (grows > 0) | (lacks <= 0)


def _fill_steepest(slope: Array, amount: Array, room: Array) -> Array:
    """a for l1."""
    room = _finite(room)
    gain = slope * room
    suffices = lambda chosen: _total(jnp.where(chosen, gain, 0)) >= amount
    threshold = per_example(largest_threshold(slope, suffices), slope)
    above, at = slope > threshold, slope == threshold
    lacks, there = amount - _total(jnp.where(above, gain, 0)), _total(jnp.where(at, gain, 0))
    share = jnp.clip(lacks / jnp.where(there > 0, there, 1), 0, 1)
    return jnp.where(above, room, jnp.where(at, per_example(share, room) * room, 0))


def largest_threshold(
    sizes: Float[Array, "rows ..."],
    suffices: Callable[[Bool[Array, "rows ..."]], Bool[Array, " rows"]],
) -> Float[Array, " rows"]:
    """The largest t, row by row, such that `suffices(sizes >= t)`; 0 where none does.

    sizes: 0 or more. suffices: what holds for some components holds for more of them. Exact: as
    integers, floats keep their order, and a bisection over all of them is short.
    """
    dtype = BITS[jnp.finfo(sizes.dtype).bits]
    bits = lax.bitcast_convert_type(sizes, dtype)

    def halve(_: Array | int, between: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = between
        middle = low + (high - low) // 2
        enough = suffices(bits >= per_example(middle, bits))
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    one = jnp.zeros(sizes.shape[:1], dtype)
    start = one, jnp.full_like(one, jnp.iinfo(dtype).max)
    low, _ = lax.fori_loop(0, jnp.iinfo(dtype).bits, halve, start)
    return lax.bitcast_convert_type(low, sizes.dtype)


def _finite(room: Array) -> Array:
    """Room without bounds, small enough that its sums are floats."""
    return jnp.minimum(room, float(jnp.finfo(room.dtype).max) ** 0.25)
