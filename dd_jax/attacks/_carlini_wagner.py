"""Carlini and Wagner's l2 attack ("Towards Evaluating the Robustness of Neural Networks", IEEE S&P
2017), untargeted.

With z the logits at x + D, y the class to leave and a constant c, Adam minimizes over w

    ||D||_2^2 / d^2 + c * max(0, min_j (z_y - z_j + confidence) / s_j) / d    j: all classes but y
    D = h * (tanh(w) - tanh(w_0)) / tanh(REACH),     -REACH <= w <= REACH

w_0 stands for the input; tanh keeps x + D in the box, h wide to both sides. If c is large enough,
the minimum lies on the boundary of the class. The smallest such c is searched for, from w_0 each
time: ten times as large until something fools, then by bisection. The smallest D of all iterates
that fool is the result.

What differs from the paper, and why:
- tanh reaches the bounds at REACH, not at infinity. From there Adam needs hundreds of steps to move
  a black or white pixel at all, and arctanh is not finite. D is exactly zero at w_0.
- s_j and d come from the net linearized at the input: d is how far the nearest boundary is within
  the box, and s_j how fast class j is approached. Without s_j the attack goes for the likeliest
  class, not the nearest. c then has no unit, and affine nets need c = 2 unless the box is in the
  way. (In the paper s_j = d = 1.)
- The learning rate falls to zero along half a cosine in every run, and starts so low that a first
  step is not longer than d. Adam's steps have the same length however small the perturbation is to
  be; they would step over small ones.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dd_jax.attacks._arguments import check_arguments, labels_to_leave, trace
from dd_jax.attacks._queue import next_rows, plan_turns
from dd_jax.norms import Bounds, check_bounds, in_words, is_known, lp_norm, per_example, stay_within
from dd_jax.types import AttackResult, LogitsFn
from dd_jax.xla.closure_convert import ApplyFn, Closure, Traces, closure_convert

# A pixel at its bound starts at 7 % of the speed of one in the middle. 1 and 3 were measured to be
# worse.
REACH = 2.0
FIRST_DECAY, SECOND_DECAY, OFFSET = 0.9, 0.999, 1e-8  # Adam's, as published.
GROWTH = 10.0  # Of the constant, from run to run until an example is fooled.
CHECKS_PER_RUN = 10  # How often a run is checked for progress, as in the authors' code,
LEAST_PROGRESS = 1e-3  # and by which share the objective must have fallen in between.
# Units of precision by which another class must win, lest it lose where the net is compiled
# otherwise.
ROUNDING = 16
DOUBLINGS, HALVINGS = 24.0, 16  # How far, and how finely, the way through the box is searched.
SHORTEST = 1e-4  # Of d, relative to the box: with less the first steps would be lost in rounding.
FLATTEST = 1e-6  # Of s_j, relative to the steepest.


class Settings(NamedTuple):
    """What is fixed when the attack is compiled."""

    num_steps: int
    learning_rate: float
    confidence: float
    initial_constant: float
    num_binary_search_steps: int
    abort_early: bool


class Problem(NamedTuple):
    """What is to be minimized, example by example; see the module's docstring."""

    inputs: Float[Array, "batch ..."]
    labels: Int[Array, " batch"]
    half_width: Float[Array, "batch ..."]  # h
    origin: Float[Array, "batch ..."]  # w_0
    distance: Float[Array, " batch"]  # d
    slopes: Float[Array, "batch classes"]  # s_j
    rate: Float[Array, " batch"]  # the learning rate that a run starts with


class Run(NamedTuple):
    """One minimization, with one constant: Adam's state, and what has come of it."""

    position: Float[Array, "batch ..."]  # w
    first_moment: Float[Array, "batch ..."]
    second_moment: Float[Array, "batch ..."]
    num_steps: Int[Array, " batch"]
    fooled: Bool[Array, " batch"]
    lowest: Float[Array, " batch"]
    lowest_at_check: Float[Array, " batch"]


class Best(NamedTuple):
    """The smallest perturbation that fools; as long as there is none, the one that leaves the label
    the least lead.
    """

    perturbation: Float[Array, "batch ..."]
    size: Float[Array, " batch"]  # in units of d; inf as long as none fools
    lead: Float[Array, " batch"]
    num_steps: Int[Array, " batch"]  # until it was found


class Attack(NamedTuple):
    """The state of the attack. Every example is in a run and at a step of its own."""

    run: Run
    best: Best
    constant: Float[Array, " batch"]  # c
    lower: Float[Array, " batch"]  # the largest constant that did not fool
    upper: Float[Array, " batch"]  # the smallest that did
    num_runs: Int[Array, " batch"]
    num_steps: Int[Array, " batch"]


def carlini_wagner_l2(
    logits_fn: LogitsFn,
    inputs: Float[Array, "batch ..."],
    labels: Int[Array, " batch"] | None = None,
    *,
    bounds: Bounds,
    num_steps: int = 200,
    learning_rate: float = 0.05,
    confidence: float = 0.0,
    initial_constant: float = 4.0,
    num_binary_search_steps: int = 5,
    abort_early: bool = True,
) -> AttackResult:
    """Finds a perturbation of small l2 norm, within bounds, that changes each example's class:
    equations above.

    Args:
      logits_fn: maps (batch, ...) inputs to (batch, classes) logits, row by row.
      inputs: any rank, floating, within the bounds.
      labels: the classes to leave. None: the predicted ones.
      bounds: (lower, upper), numbers or arrays that broadcast to one example, with or without a
        leading axis of size 1: inputs + perturbation stays within, up to rounding. Components whose
        bounds are equal never change.
      num_steps: iterates in one run, with one constant; the first is the input.
      learning_rate: the largest step of a component of w, of which the box spans 4. More than 0.
      confidence: by how much another logit must exceed the label's. 0 or more.
      initial_constant: the first c. More than 0.
      num_binary_search_steps: the number of runs.
      abort_early: end the run of an example that fools nothing yet and makes no progress: its
        constant is too small.

    Returns:
      AttackResult(perturbation, success, num_steps). perturbation: the smallest that fools, of all
      iterates; where none does, the one that leaves the label the least lead, without success.
      num_steps: all iterates until it was found, over all runs; the limit, num_binary_search_steps
      * num_steps, where there was no success.

    Edges: what is misclassified already is done, whatever the confidence: zero perturbation,
    success, zero steps. Where all gradients vanish or are not finite, nothing moves. On affine nets
    this is the shortest perturbation to a few per mille, unless the box bars so much of the way to
    the nearest class that another one looks nearer midway, or the boundary is nearer than 1e-5 of
    the box's width (a case with 13 % too much was seen). A batch may be empty. Results do not
    depend on the rest of the batch, and an example that has stopped costs nothing more. Gradients
    do not flow through the result. Preparing takes one backward pass per class.

    Raises:
      ValueError: at trace time, for shapes, types or options that make no sense.
    """
    settings = Settings(
        num_steps, learning_rate, confidence, initial_constant, num_binary_search_steps, abort_early
    )
    check_settings(settings)
    check_arguments(inputs, labels, "l2", num_steps)
    if bounds is None:
        raise ValueError(
            "bounds is None; this attack needs the range of valid inputs, for example (0.0, 1.0)."
        )
    check_bounds(bounds, inputs)
    if any(
        is_known(lambda bound=bound: jnp.any(jnp.isinf(jnp.asarray(bound)))) for bound in bounds
    ):
        raise ValueError(
            f"bounds are {in_words(bounds)}; this attack needs a finite range, for example (0.0, "
            f"1.0)."
        )
    inputs = lax.stop_gradient(jnp.asarray(inputs))
    traces = trace(logits_fn, inputs)
    _, labels, right = labels_to_leave(traces, inputs, labels)
    problem = make_problem(traces, inputs, labels, bounds, settings)
    apply_fn, closure, turns = plan_turns(traces, len(inputs))
    closure = jax.tree.map(lax.stop_gradient, closure)

    def turn(state: Attack) -> Attack:
        num_left = (num_binary_search_steps - state.num_runs) * num_steps - state.run.num_steps
        rows, to = next_rows(jnp.where(right, num_left, 0), turns.num_rows)
        part, before = jax.tree.map(lambda x: x[rows], (problem, state))
        after = end_run(take_step(apply_fn, closure, part, before, settings), part, settings)
        return jax.tree.map(lambda x, new: x.at[to].set(new, mode="drop"), state, after)

    goes_on = lambda state: jnp.any(right & (state.num_runs < num_binary_search_steps))
    best = lax.while_loop(goes_on, turn, first_state(problem, settings)).best
    fooled = jnp.isfinite(best.size)
    steps = jnp.where(fooled, best.num_steps, num_binary_search_steps * num_steps)
    perturbation = stay_within(best.perturbation, inputs, bounds)
    return AttackResult(perturbation, fooled | ~right, jnp.where(right, steps, 0))


def check_settings(settings: Settings) -> None:
    """Raises ValueError for settings that make no sense."""
    for name in ("learning_rate", "initial_constant"):
        if not getattr(settings, name) > 0:
            raise ValueError(f"{name} is {getattr(settings, name)}; it must be more than 0.")
    if not settings.confidence >= 0:
        raise ValueError(f"confidence is {settings.confidence}; it must be 0 or more.")
    if settings.num_binary_search_steps < 1:
        raise ValueError(
            f"num_binary_search_steps is {settings.num_binary_search_steps}; it must be at least 1."
        )


def make_problem(
    traces: Traces, inputs: Array, labels: Array, bounds: Bounds, settings: Settings
) -> Problem:
    """Places the inputs in the box and measures the linearized net there."""
    lower, upper = (
        jnp.broadcast_to(jnp.asarray(bound, inputs.dtype), inputs.shape) for bound in bounds
    )
    half_width = (upper - lower) / 2
    place = (inputs - (lower + upper) / 2) / jnp.where(half_width > 0, half_width, 1)
    origin = jnp.arctanh(math.tanh(REACH) * jnp.clip(place, -1, 1))
    room = tuple(
        stay_within(jnp.full_like(inputs, far), inputs, bounds) for far in (-jnp.inf, jnp.inf)
    )

    apply_fn, closure = closure_convert(traces, len(inputs))
    closure = jax.tree.map(lax.stop_gradient, closure)
    logits, pull_back = jax.vjp(lambda x: apply_fn(closure, x).astype(x.dtype), inputs)
    leads = leads_of(logits, labels) + settings.confidence
    one_hot = jnp.eye(logits.shape[-1], dtype=logits.dtype)

    def slope_towards(target: tuple[Array, Array]) -> Float[Array, " batch"]:
        (gradient,) = pull_back(target[0][None] - one_hot[labels])
        return mean_slope(gradient, target[1], room)

    # One class at a time, as there may be many.
    slopes = lax.map(slope_towards, (one_hot, leads.T)).T
    steepest = jnp.max(slopes, axis=-1, keepdims=True)
    slopes = jnp.where(steepest > 0, jnp.maximum(slopes, FLATTEST * steepest), 1)
    diagonal = lp_norm(2 * half_width, "l2")
    distance = jnp.clip(jnp.min(leads / slopes, axis=-1), SHORTEST * diagonal, diagonal)
    # dD / dw
    speed = lp_norm(half_width * (1 - jnp.square(jnp.tanh(origin))) / math.tanh(REACH), "l2")
    rate = jnp.minimum(settings.learning_rate, distance / jnp.where(speed > 0, speed, 1))
    return Problem(inputs, labels, half_width, origin, distance, slopes, rate)


def leads_of(
    logits: Float[Array, "rows classes"], labels: Int[Array, " rows"]
) -> Float[Array, "rows classes"]:
    """z_y - z_j for every class j, and inf for y itself; increased by what rounding may hide."""
    is_label = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    of_label = jnp.sum(jnp.where(is_label, logits, 0), axis=-1, keepdims=True)
    largest = jnp.max(jnp.abs(lax.stop_gradient(logits)), axis=-1, keepdims=True)
    return jnp.where(
        is_label, jnp.inf, of_label - logits + ROUNDING * jnp.finfo(logits.dtype).eps * largest
    )


def mean_slope(
    gradient: Float[Array, "batch ..."], lead: Float[Array, " batch"], room: tuple[Array, ...]
) -> Float[Array, " batch"]:
    """<gradient, D> / ||D||_2 for the shortest D in the box that gains the lead, or for its corner
    if there is none.

    That D is t * gradient, cut off at the box; bisection finds the logarithm of t. Zero where the
    gradient is.
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


def first_state(problem: Problem, settings: Settings) -> Attack:
    """Before the first step."""
    zeros, none = jnp.zeros_like(problem.distance), jnp.zeros_like(problem.labels)
    best = Best(jnp.zeros_like(problem.inputs), zeros + jnp.inf, zeros + jnp.inf, none)
    constant = zeros + settings.initial_constant
    return Attack(first_run(problem), best, constant, zeros, zeros + jnp.inf, none, none)


def first_run(problem: Problem) -> Run:
    """At the input, with Adam's moments at rest."""
    rest, none = jnp.zeros_like(problem.inputs), jnp.zeros_like(problem.labels)
    infinite = jnp.full_like(problem.distance, jnp.inf)
    return Run(problem.origin, rest, rest, none, none.astype(bool), infinite, infinite)


def take_step(
    apply_fn: ApplyFn, closure: Closure, problem: Problem, state: Attack, settings: Settings
) -> Attack:
    """Looks at the iterate, notes it if it is the best so far, and takes one step of Adam."""
    run, best = state.run, state.best

    def objective(position: Array) -> tuple[Array, tuple[Array, ...]]:
        moved = (jnp.tanh(position) - jnp.tanh(problem.origin)) / math.tanh(REACH)
        perturbation = problem.half_width * moved
        logits = apply_fn(closure, problem.inputs + perturbation).astype(position.dtype)
        leads = leads_of(logits, problem.labels) + settings.confidence
        size = lp_norm(perturbation, "l2") / problem.distance
        lacking = jnp.maximum(jnp.min(leads / problem.slopes, axis=-1), 0) / problem.distance
        value = jnp.square(size) + state.constant * lacking
        return jnp.sum(value), (value, perturbation, size, jnp.min(leads, axis=-1))

    gradient, (value, perturbation, size, lead) = jax.grad(objective, has_aux=True)(run.position)
    fools, num_steps = lead <= 0, state.num_steps + 1
    better = jnp.where(fools, size < best.size, (lead < best.lead) & jnp.isinf(best.size))
    noted = Best(perturbation, jnp.where(fools, size, jnp.inf), lead, num_steps)
    run = adam(run, gradient, problem.rate, settings.num_steps)
    run = run._replace(fooled=run.fooled | fools, lowest=jnp.minimum(run.lowest, value))
    return state._replace(run=run, best=choose(better, noted, best), num_steps=num_steps)


def adam(
    run: Run, gradient: Float[Array, "rows ..."], rate: Float[Array, " rows"], limit: int
) -> Run:
    """One step of Adam (Kingma and Ba, ICLR 2015), with its rate on half a cosine; w stays within
    REACH.
    """
    first = FIRST_DECAY * run.first_moment + (1 - FIRST_DECAY) * gradient
    second = SECOND_DECAY * run.second_moment + (1 - SECOND_DECAY) * jnp.square(gradient)
    step = (run.num_steps + 1).astype(rate.dtype)
    mean = first / per_example(1 - FIRST_DECAY**step, first)
    deviation = jnp.sqrt(second / per_example(1 - SECOND_DECAY**step, second))
    rate = rate * (1 + jnp.cos(jnp.pi * (step - 1) / limit)) / 2
    position = jnp.clip(
        run.position - per_example(rate, mean) * mean / (deviation + OFFSET), -REACH, REACH
    )
    return run._replace(
        position=position, first_moment=first, second_moment=second, num_steps=run.num_steps + 1
    )


def end_run(state: Attack, problem: Problem, settings: Settings) -> Attack:
    """Where a run is over, chooses the next constant and starts anew."""
    run = state.run
    at_check = run.num_steps % max(settings.num_steps // CHECKS_PER_RUN, 1) == 0
    is_stuck = at_check & ~run.fooled & (run.lowest > (1 - LEAST_PROGRESS) * run.lowest_at_check)
    run = run._replace(lowest_at_check=jnp.where(at_check, run.lowest, run.lowest_at_check))
    over = (run.num_steps >= settings.num_steps) | (is_stuck & settings.abort_early)
    lower = jnp.where(over & ~run.fooled, state.constant, state.lower)
    upper = jnp.where(over & run.fooled, state.constant, state.upper)
    constant = jnp.where(jnp.isinf(upper), GROWTH * state.constant, (lower + upper) / 2)
    constant = jnp.where(over, constant, state.constant)
    run, num_runs = choose(over, first_run(problem), run), state.num_runs + over
    return Attack(run, state.best, constant, lower, upper, num_runs, state.num_steps)


def choose(condition: Bool[Array, " rows"], new: tuple, old: tuple) -> tuple:
    """`new` where the condition holds and `old` elsewhere, example by example, for every array of a
    state.
    """
    return jax.tree.map(lambda x, y: jnp.where(per_example(condition, x), x, y), new, old)
