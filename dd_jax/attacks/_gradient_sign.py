"""Attacks along the gradient of the cross-entropy: FGSM, PGD, and the smallest epsilon at which
FGSM succeeds.

With d(x) the direction in which the cross-entropy L(f(x), y) rises steepest in the lp norm,

    d(x)    g / ||g||_2 for l2, sign(g) for linf, with g = dL / dx
    FGSM    D = B(epsilon * d(x))                         (Goodfellow, Shlens, Szegedy, ICLR 2015)
    PGD     D_k+1 = B(P(D_k + step_size * d(x + D_k)))        (Madry et al., ICLR 2018)

P leads to the nearest point of the ball ||D||_p <= epsilon, and B into the bounds without leaving
that ball.

The gradient of L in the logits is (1 - p_y) (q - e_y), with p the softmax, q the softmax over all
classes but y, e_y one-hot. Its first factor changes nothing about d and is left out, so d is right,
and not zero, also where a net is so confident that 1 - p_y rounds to 0.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from dd_jax.attacks._arguments import (
    SizeOrSizes,
    check_arguments,
    labels_to_leave,
    one_per_example,
    trace,
)
from dd_jax.attacks._queue import next_rows, plan_turns
from dd_jax.norms import (
    Bounds,
    Norm,
    check_bounds,
    is_known,
    per_example,
    project,
    sample_in_ball,
    stay_within,
)
from dd_jax.norms import steepest_direction as steepest
from dd_jax.types import AttackResult, LogitsFn
from dd_jax.xla.closure_convert import ApplyFn, Closure, closure_convert

EpsilonFn = Callable[[Float[Array, " batch"]], Array]

GRID_SPAN = 1000.0  # From the largest epsilon of the grid down to the smallest.


class Ascent(NamedTuple):
    """How far PGD is with each example."""

    perturbation: Float[Array, "batch ..."]
    num_steps: Int[Array, " batch"]
    active: Bool[Array, " batch"]


class Bracket(NamedTuple):
    """How far the search for epsilon is with each example: FGSM fails at `low`, fools at `high`
    (inf: nowhere yet).
    """

    low: Float[Array, " batch"]
    high: Float[Array, " batch"]
    num_tried: Int[Array, " batch"]  # of the grid
    num_halved: Int[Array, " batch"]


def fgsm(
    logits_fn: LogitsFn,
    inputs: Float[Array, "batch ..."],
    labels: Int[Array, " batch"] | None = None,
    *,
    epsilon: SizeOrSizes,
    norm: Norm = "linf",
    bounds: Bounds | None = None,
    early_stop: bool = True,
) -> AttackResult:
    """The fast gradient sign method, one step up the cross-entropy: D = B(epsilon * d(x)).

    Args:
      logits_fn: maps (batch, ...) inputs to (batch, classes) logits, row by row.
      inputs: any rank, floating; within the bounds, if there are any.
      labels: the classes to leave. None: the predicted ones.
      epsilon: ||D||_p, in the units of the inputs, 0 or more; one number, or one per example.
      norm: "linf", as published, or "l2", along the normalized gradient.
      bounds: (lower, upper), numbers or arrays that broadcast to one example, with or without a
        leading axis of size 1: inputs + D stays within. None: no bounds.
      early_stop: leave alone what is misclassified already: zero perturbation, success, zero steps.
        False: attack all, as adversarial training does.

    Returns:
      AttackResult(perturbation, success, num_steps). success: whether inputs + D is not classified
      as its label says. num_steps: 1, or 0 where frozen. ||D||_p does not exceed epsilon, not even
      by rounding.

    Edges: where the gradient vanishes (dead net) or is not finite, nothing moves. Gradients do not
    flow through the result. It is `pgd` with one step of size epsilon.

    Raises:
      ValueError: at trace time, for shapes, types or options that make no sense.
    """
    one_step = dict(step_size=epsilon, num_steps=1)
    return pgd(
        logits_fn,
        inputs,
        labels,
        epsilon=epsilon,
        **one_step,
        norm=norm,
        bounds=bounds,
        early_stop=early_stop,
    )


def pgd(
    logits_fn: LogitsFn,
    inputs: Float[Array, "batch ..."],
    labels: Int[Array, " batch"] | None = None,
    *,
    epsilon: SizeOrSizes,
    step_size: SizeOrSizes,
    num_steps: int = 40,
    norm: Norm = "linf",
    bounds: Bounds | None = None,
    key: PRNGKeyArray | None = None,
    early_stop: bool = True,
) -> AttackResult:
    """Projected gradient ascent of the cross-entropy: D_k+1 = B(P(D_k + step_size * d(x + D_k))).

    Args:
      logits_fn, inputs, labels, norm, bounds: as in `fgsm`.
      epsilon: the radius of the ball, in the units of the inputs, 0 or more; one number, or one per
        example.
      step_size: the length of a step, before P, in the same units (not relative to epsilon); one
        number, or one per example.
      num_steps: the largest number of steps.
      key: draws D_0 uniformly from the ball, for each example by its place in the batch. None: D_0
        = 0.
      early_stop: stop an example at the first iterate that is misclassified: success is judged at
        *every* iterate. False: all examples take all steps, those misclassified already included;
        success is judged at the *last* iterate.

    Returns:
      AttackResult(perturbation, success, num_steps). success: whether inputs + perturbation is not
      classified as its label says. num_steps: steps until then; the limit where there was no
      success. ||perturbation||_p does not exceed epsilon, not even by rounding.

    Edges: with `early_stop`, what is misclassified already is done: zero perturbation, success,
    zero steps, with a key too. Where the gradient vanishes or is not finite, no step is taken.
    Results do not depend on the rest of the batch, and an example that has stopped costs nothing
    more. Gradients do not flow through the result.

    Raises:
      ValueError: at trace time, for shapes, types or options that make no sense.
    """
    check_arguments(inputs, labels, norm, num_steps)
    check_bounds(bounds, inputs)
    inputs = lax.stop_gradient(jnp.asarray(inputs))
    epsilon = one_per_example("epsilon", epsilon, inputs)
    step_size = one_per_example("step_size", step_size, inputs)
    traces = trace(logits_fn, inputs)
    _, labels, right = labels_to_leave(traces, inputs, labels)
    active = right if early_stop else jnp.ones_like(right)
    start = jnp.zeros_like(inputs)
    if key is not None:
        drawn = stay_within(sample_in_ball(key, inputs, epsilon, norm), inputs, bounds)
        start = jnp.where(per_example(active, inputs), drawn, start)
    apply_fn, closure, turns = plan_turns(traces, len(inputs))
    closure = jax.tree.map(lax.stop_gradient, closure)

    def turn(state: Ascent) -> Ascent:
        num_left = jnp.where(state.active, num_steps - state.num_steps, 0)
        rows, to = next_rows(num_left, turns.num_rows)
        part, before = inputs[rows], state.perturbation[rows]
        predicted, direction = steepest_ascent(apply_fn, closure, part + before, labels[rows], norm)
        after = project(
            before + per_example(step_size[rows], part) * direction, epsilon[rows], norm
        )
        moves = (predicted == labels[rows]) | (not early_stop)
        after = jnp.where(per_example(moves, part), stay_within(after, part, bounds), before)
        steps = state.num_steps[rows] + moves
        return Ascent(
            state.perturbation.at[to].set(after, mode="drop"),
            state.num_steps.at[to].set(steps, mode="drop"),
            state.active.at[to].set(moves & (steps < num_steps), mode="drop"),
        )

    start = Ascent(start, jnp.zeros_like(labels), active)
    found = lax.while_loop(lambda state: jnp.any(state.active), turn, start)
    success = jnp.argmax(traces.logits(inputs + found.perturbation), axis=-1) != labels
    return AttackResult(found.perturbation, success, found.num_steps)


def minimal_fgsm(
    logits_fn: LogitsFn,
    inputs: Float[Array, "batch ..."],
    labels: Int[Array, " batch"] | None = None,
    *,
    max_epsilon: float,
    norm: Norm = "linf",
    bounds: Bounds | None = None,
    num_grid_points: int = 30,
    num_bisections: int = 10,
) -> AttackResult:
    """FGSM with the smallest epsilon that changes each example's class, as in Deep Defense's
    rho_inf.

    FGSM may fool at one epsilon and not at a larger one. So a geometric grid from max_epsilon /
    1000 to max_epsilon is tried upwards until the first success, and the interval below that is
    bisected; d(x) is computed once.

    Args:
      logits_fn, inputs, labels, norm, bounds: as in `fgsm`.
      max_epsilon: the largest epsilon to try, in the units of the inputs, more than 0.
      num_grid_points: at least 2. What fools between two points but at neither is missed.
      num_bisections: 0 or more. With the defaults epsilon is found to 0.03 %, below the grid to
        max_epsilon / 10^6.

    Returns:
      AttackResult(perturbation, success, num_steps). perturbation: B(epsilon * d(x)), where none
      fools that of max_epsilon, without success. num_steps: 1. What is misclassified already is
      done: zero perturbation, success, zero steps. Gradients do not flow through the result.

    Raises:
      ValueError: at trace time, for shapes, types or options that make no sense.
    """
    for name, value, least in (
        ("num_grid_points", num_grid_points, 2),
        ("num_bisections", num_bisections, 0),
    ):
        if value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}.")
    if not max_epsilon > 0:
        raise ValueError(f"max_epsilon is {max_epsilon}; it must be more than 0.")
    right, perturbation_at, fooled_at = fgsm_line(logits_fn, inputs, labels, norm, bounds)
    grid = jnp.geomspace(max_epsilon / GRID_SPAN, max_epsilon, num_grid_points, dtype=inputs.dtype)
    grid = grid.at[-1].set(max_epsilon)
    found = lambda state: jnp.isfinite(state.high)
    is_active = lambda state: (
        right
        & jnp.where(
            found(state), state.num_halved < num_bisections, state.num_tried < num_grid_points
        )
    )

    def turn(state: Bracket) -> Bracket:
        epsilon = jnp.where(found(state), (state.low + state.high) / 2, grid[state.num_tried])
        fooled, active = fooled_at(epsilon), is_active(state)
        return Bracket(
            jnp.where(active & ~fooled, epsilon, state.low),
            jnp.where(active & fooled, epsilon, state.high),
            state.num_tried + (active & ~found(state)),
            state.num_halved + (active & found(state)),
        )

    zeros, none = jnp.zeros(right.shape, inputs.dtype), jnp.zeros(right.shape, jnp.int32)
    start = Bracket(zeros, zeros + jnp.inf, none, none)
    state = lax.while_loop(lambda state: jnp.any(is_active(state)), turn, start)
    epsilon = jnp.where(found(state), state.high, max_epsilon)
    perturbation = perturbation_at(jnp.where(right, epsilon, 0))
    return AttackResult(perturbation, found(state) | ~right, right.astype(jnp.int32))


def fgsm_success_curve(
    logits_fn: LogitsFn,
    inputs: Float[Array, "batch ..."],
    labels: Int[Array, " batch"] | None = None,
    *,
    epsilons: Float[Array, " epsilons"] | Sequence[float],
    norm: Norm = "linf",
    bounds: Bounds | None = None,
) -> Bool[Array, "epsilons batch"]:
    """Whether FGSM fools, for each epsilon and each example; d(x) is computed once.

    The mean over a data set (sums of batches add up) is the success rate over epsilon, Figure 5 of
    Deep Defense's supplement. The epsilon at which half of the images fall lies between the
    neighbors whose rates enclose 0.5; call again with epsilons between these to have it as
    precisely as the number of images allows.

    Args:
      logits_fn, inputs, labels, norm, bounds: as in `fgsm`.
      epsilons: in the units of the inputs, 0 or more, in any order.

    Returns:
      success[i, j]: whether inputs[j] + B(epsilons[i] * d(inputs[j])) is not classified as
      labels[j] says. True for all epsilons where inputs[j] is misclassified already.

    Raises:
      ValueError: at trace time, for shapes, types or options that make no sense.
    """
    if jnp.asarray(epsilons).ndim != 1 or is_known(lambda: jnp.any(~(jnp.asarray(epsilons) >= 0))):
        raise ValueError(f"epsilons must be a vector of numbers, each 0 or more; got {epsilons}.")
    right, _, fooled_at = fgsm_line(logits_fn, inputs, labels, norm, bounds)
    every = lambda epsilon: fooled_at(jnp.broadcast_to(epsilon, right.shape))
    return ~right[None] | lax.map(every, jnp.asarray(epsilons, inputs.dtype))


def fgsm_line(
    logits_fn: LogitsFn, inputs: Array, labels: Array | None, norm: Norm, bounds: Bounds | None
) -> tuple[Bool[Array, " batch"], EpsilonFn, EpsilonFn]:
    """What is classified rightly, and FGSM as two functions of one epsilon per example:
    perturbation, and success.
    """
    check_arguments(inputs, labels, norm)
    check_bounds(bounds, inputs)
    inputs = lax.stop_gradient(jnp.asarray(inputs))
    traces = trace(logits_fn, inputs)
    _, labels, right = labels_to_leave(traces, inputs, labels)
    apply_fn, closure = closure_convert(traces, len(inputs))
    closure = jax.tree.map(lax.stop_gradient, closure)
    _, direction = steepest_ascent(apply_fn, closure, inputs, labels, norm)

    def perturbation_at(epsilon: Float[Array, " batch"]) -> Float[Array, "batch ..."]:
        return stay_within(
            project(per_example(epsilon, inputs) * direction, epsilon, norm), inputs, bounds
        )

    def fooled_at(epsilon: Float[Array, " batch"]) -> Bool[Array, " batch"]:
        return jnp.argmax(apply_fn(closure, inputs + perturbation_at(epsilon)), axis=-1) != labels

    return right, perturbation_at, fooled_at


def steepest_ascent(
    apply_fn: ApplyFn,
    closure: Closure,
    x: Float[Array, "rows ..."],
    labels: Int[Array, " rows"],
    norm: Norm,
) -> tuple[Int[Array, " rows"], Float[Array, "rows ..."]]:
    """The predicted classes at x, and d(x); zero where it is not finite."""
    logits, pull_back = jax.vjp(lambda x: apply_fn(closure, x), x)
    is_label = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    others = jax.nn.softmax(jnp.where(is_label, -jnp.inf, logits))
    direction = steepest(pull_back(others - is_label)[0], norm)
    return jnp.argmax(logits, axis=-1), jnp.where(jnp.isfinite(direction), direction, 0)
