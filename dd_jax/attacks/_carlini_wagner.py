"""Carlini and Wagner's l2 attack ("Towards Evaluating the Robustness of Neural Networks", IEEE S&P
2017), untargeted.

With z the logits at x + D, y the label and a constant c, Adam minimizes over w

    ||D||_2^2 / d^2 + c * max(0, min_j (z_y - z_j + confidence) / s_j) / d    j: all classes but y
    D = h * (tanh(w) - tanh(w_0)) / tanh(REACH),     -REACH <= w <= REACH

w_0 represents the input; tanh keeps x + D in the box, whose half width is h. If c is large enough,
the minimum lies on the class boundary. The attack searches for the smallest such c: it multiplies c
by 10 until an example is fooled, then bisects. Every run starts at w_0. The result is the smallest
D of all iterates that fool.

Differences from the paper, with reasons:
- tanh reaches the bounds at REACH, not at infinity. With infinity, Adam needs hundreds of steps to
  move a black or white pixel at all, and arctanh is not finite. D is exactly zero at w_0.
- s_j and d come from the net linearized at the input: d is the distance to the nearest boundary
  within the box, and s_j the rate at which class j is approached. Without s_j the attack moves
  towards the most likely class instead of the nearest. c then has no unit, and affine nets need
  c = 2 unless the box is in the way. (In the paper s_j = d = 1.)
- The learning rate falls to zero along half a cosine in every run, and starts so low that the first
  step is no longer than d. Adam's steps have a fixed length whatever the size of the perturbation;
  they would step over small ones.
"""

import math
from functools import partial
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dd_jax.attacks._arguments import check_arguments, labels_to_leave, trace
from dd_jax.attacks._carlini_wagner_problem import (
    REACH,
    Problem,
    check_box,
    leads_of,
    make_problem,
)
from dd_jax.attacks._queue import plan_turns, work_off
from dd_jax.norms import Bounds, lp_norm, per_example, stay_within
from dd_jax.types import AttackResult, LogitsFn
from dd_jax.xla.closure_convert import ApplyFn, Closure, Traces

FIRST_DECAY, SECOND_DECAY, OFFSET = 0.9, 0.999, 1e-8  # Adam's, as published.
State = TypeVar("State", bound=tuple)
GROWTH = 10.0
"""What the constant is multiplied by after a run that did not fool."""
CHECKS_PER_RUN, LEAST_PROGRESS = 10, 1e-3
"""How often a run is checked for progress, as in the authors' code, and the share by which the
objective must have fallen since the last check.
"""


class Settings(NamedTuple):
    """What is fixed when the attack is compiled."""

    num_steps: int
    learning_rate: float
    confidence: float
    initial_constant: float
    num_binary_search_steps: int
    abort_early: bool


class Run(NamedTuple):
    """The state of one minimization, with one constant."""

    position: Float[Array, "batch ..."]  # w
    first_moment: Float[Array, "batch ..."]
    second_moment: Float[Array, "batch ..."]
    num_steps: Int[Array, " batch"]
    fooled: Bool[Array, " batch"]
    lowest: Float[Array, " batch"]  # value of the objective
    lowest_at_check: Float[Array, " batch"]


class Best(NamedTuple):
    """The smallest perturbation that fools. Until one does, the one with the smallest lead of the
    label.
    """

    perturbation: Float[Array, "batch ..."]
    size: Float[Array, " batch"]  # in units of d; inf until one fools
    lead: Float[Array, " batch"]
    num_steps: Int[Array, " batch"]  # until it was found


class Attack(NamedTuple):
    """The state of the attack. Each example has its own run and step."""

    run: Run
    best: Best
    constant: Float[Array, " batch"]  # c
    lower: Float[Array, " batch"]  # the largest constant that did not fool
    upper: Float[Array, " batch"]  # the smallest constant that did
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
    """Finds a perturbation of small l2 norm, within bounds, that changes each example's class.

    The equations are in the module's docstring.

    Args:
      logits_fn: maps (batch, ...) inputs to (batch, classes) logits, row by row.
      inputs: any rank, floating, within the bounds.
      labels: the classes to leave. None: the predicted ones.
      bounds: (lower, upper), numbers or arrays that broadcast to one example, with or without a
        leading axis of size 1. inputs + perturbation stays within them, up to rounding. Components
        whose bounds are equal never change.
      num_steps: iterates per run, with one constant. The first iterate is the input.
      learning_rate: the largest step of a component of w; the box spans 4. More than 0.
      confidence: the margin by which another logit must exceed the label's. 0 or more.
      initial_constant: the first c. More than 0.
      num_binary_search_steps: the number of runs.
      abort_early: end the run of an example that is not fooled yet and makes no progress, because
        its constant is too small.

    Returns:
      AttackResult(perturbation, success, num_steps). perturbation: the smallest that fools, of all
      iterates; if none does, the one with the smallest lead of the label, without success.
      num_steps: the iterates until it was found, over all runs; without success the limit,
      num_binary_search_steps * num_steps.

    Edges: an input that is misclassified already gets a zero perturbation, success and zero steps,
    whatever the confidence. If all gradients vanish or are not finite, nothing moves. On affine
    nets the result is the shortest perturbation to a few per mille, with two exceptions: the box
    blocks so much of the way to the nearest class that another class looks nearer midway, or the
    boundary is nearer than 1e-5 of the box's width (one case was 13 % too long). A batch may be
    empty. Results do not depend on the rest of the batch, and an example that has stopped costs
    nothing more. Gradients do not flow through the result. The preparation takes one backward pass
    per class.

    Raises:
      ValueError: at trace time, for wrong shapes, types or options.

    Example: the boundary between the two classes is 1 / sqrt(5) = 0.447 away.

    >>> import jax.numpy as jnp
    >>> from dd_jax.attacks import carlini_wagner_l2
    >>> weights = jnp.array([[1.0, -1.0], [2.0, -2.0]])
    >>> logits_fn = lambda x: (x - 0.5) @ weights
    >>> found = carlini_wagner_l2(logits_fn, jnp.array([[0.9, 0.8]]), bounds=(0.0, 1.0))
    >>> bool(found.success[0]), round(float(jnp.linalg.norm(found.perturbation)), 3)
    (True, 0.447)
    """
    settings = Settings(
        num_steps, learning_rate, confidence, initial_constant, num_binary_search_steps, abort_early
    )
    check_settings(settings)
    check_arguments(inputs, labels, "l2", num_steps)
    check_box(bounds, inputs)
    inputs = lax.stop_gradient(jnp.asarray(inputs))
    traces = trace(logits_fn, inputs)
    _, labels, right = labels_to_leave(traces, inputs, labels)
    problem = make_problem(
        traces, inputs, labels, bounds, confidence=confidence, learning_rate=learning_rate
    )
    best = _smallest_found(traces, problem, right, settings)
    fooled = jnp.isfinite(best.size)
    steps = jnp.where(fooled, best.num_steps, num_binary_search_steps * num_steps)
    perturbation = stay_within(best.perturbation, inputs, bounds)
    return AttackResult(perturbation, fooled | ~right, jnp.where(right, steps, 0))


def check_settings(settings: Settings) -> None:
    """Raises ValueError for settings that are out of range."""
    for name in ("learning_rate", "initial_constant"):
        if not getattr(settings, name) > 0:
            raise ValueError(f"{name} is {getattr(settings, name)}; it must be more than 0.")
    if not settings.confidence >= 0:
        raise ValueError(f"confidence is {settings.confidence}; it must be 0 or more.")
    if settings.num_binary_search_steps < 1:
        raise ValueError(
            f"num_binary_search_steps is {settings.num_binary_search_steps}; it must be at least 1."
        )


def _smallest_found(
    traces: Traces, problem: Problem, right: Bool[Array, " batch"], settings: Settings
) -> Best:
    """All runs of the examples that are classified rightly, and the best of their iterates."""
    apply_fn, closure, turns = plan_turns(traces, len(problem.inputs))
    closure = jax.tree.map(lax.stop_gradient, closure)
    num_runs, num_steps = settings.num_binary_search_steps, settings.num_steps

    def step(part: Problem, before: Attack) -> Attack:
        return end_run(take_step(apply_fn, closure, part, before, settings), part, settings)

    def left(state: Attack) -> Int[Array, " batch"]:
        count = (num_runs - state.num_runs) * num_steps - state.run.num_steps
        return jnp.where(right, count, 0)

    start = first_state(problem, settings)
    return work_off(step, problem, start, turns.of_one_size(), left).best


def first_state(problem: Problem, settings: Settings) -> Attack:
    """The state before the first step."""
    zeros, none = jnp.zeros_like(problem.distance), jnp.zeros_like(problem.labels)
    best = Best(jnp.zeros_like(problem.inputs), zeros + jnp.inf, zeros + jnp.inf, none)
    constant = zeros + settings.initial_constant
    return Attack(first_run(problem), best, constant, zeros, zeros + jnp.inf, none, none)


def first_run(problem: Problem) -> Run:
    """The start of a run: at the input, with Adam's moments at zero."""
    rest, none = jnp.zeros_like(problem.inputs), jnp.zeros_like(problem.labels)
    infinite = jnp.full_like(problem.distance, jnp.inf)
    return Run(problem.origin, rest, rest, none, none.astype(bool), infinite, infinite)


def take_step(
    apply_fn: ApplyFn, closure: Closure, problem: Problem, state: Attack, settings: Settings
) -> Attack:
    """Evaluates the iterate, keeps it if it is the best so far, and takes one step of Adam."""
    run, best = state.run, state.best
    net = partial(apply_fn, closure)
    objective = partial(_objective, net, problem, state.constant, settings.confidence)
    gradient, (value, perturbation, size, lead) = jax.grad(objective, has_aux=True)(run.position)
    fools, num_steps = lead <= 0, state.num_steps + 1
    better = jnp.where(fools, size < best.size, (lead < best.lead) & jnp.isinf(best.size))
    here = Best(perturbation, jnp.where(fools, size, jnp.inf), lead, num_steps)
    run = adam(run, gradient, problem.rate, settings.num_steps)
    run = run._replace(fooled=run.fooled | fools, lowest=jnp.minimum(run.lowest, value))
    return state._replace(run=run, best=choose(better, here, best), num_steps=num_steps)


def _objective(
    net: LogitsFn,
    problem: Problem,
    constant: Float[Array, " rows"],
    confidence: float,
    position: Float[Array, "rows ..."],
) -> tuple[Float[Array, ""], tuple[Array, Array, Array, Array]]:
    """What is minimized over w = position, see the module's docstring, summed over the rows.

    Beside it, for each row: its value, D, ||D||_2 / d, and the label's smallest lead.
    """
    moved = (jnp.tanh(position) - jnp.tanh(problem.origin)) / math.tanh(REACH)
    perturbation = problem.half_width * moved
    logits = net(problem.inputs + perturbation).astype(position.dtype)
    leads = leads_of(logits, problem.labels) + confidence
    size = lp_norm(perturbation, "l2") / problem.distance
    lacking = jnp.maximum(jnp.min(leads / problem.slopes, axis=-1), 0) / problem.distance
    value = jnp.square(size) + constant * lacking
    return jnp.sum(value), (value, perturbation, size, jnp.min(leads, axis=-1))


def adam(
    run: Run, gradient: Float[Array, "rows ..."], rate: Float[Array, " rows"], limit: int
) -> Run:
    """One step of Adam (Kingma and Ba, ICLR 2015). The rate follows half a cosine; |w| stays at
    most REACH.
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
    """Where a run has ended, chooses the next constant and starts the next run."""
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


def choose(condition: Bool[Array, " rows"], new: State, old: State) -> State:
    """For every array of a state, `new` where the condition holds and `old` elsewhere."""
    return jax.tree.map(lambda x, y: jnp.where(per_example(condition, x), x, y), new, old)
