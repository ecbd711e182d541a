"""Projected gradient ascent of the cross-entropy, which FGSM and PGD share; equations in
`dd_jax.attacks._gradient_sign`.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dd_jax.attacks._queue import plan_turns, work_off
from dd_jax.norms import Bounds, Norm, per_example, project, sample_in_ball, stay_within
from dd_jax.norms import steepest_direction as steepest
from dd_jax.types import RandomKeys
from dd_jax.xla.closure_convert import ApplyFn, Closure, Traces


class Problem(NamedTuple):
    """What is to be done, example by example."""

    inputs: Float[Array, "batch ..."]
    labels: Int[Array, " batch"]
    epsilon: Float[Array, " batch"]
    step_size: Float[Array, " batch"]


class Rules(NamedTuple):
    """What is the same for all examples; see `dd_jax.attacks.pgd`."""

    norm: Norm
    bounds: Bounds | None
    num_steps: int
    early_stop: bool


class Ascent(NamedTuple):
    """The state of the ascent, example by example."""

    perturbation: Float[Array, "batch ..."]
    num_steps: Int[Array, " batch"]
    active: Bool[Array, " batch"]


def start_ascent(
    problem: Problem, rules: Rules, right: Bool[Array, " batch"], key: RandomKeys | None
) -> Ascent:
    """The state before the first step: at the input, or with a key at a random point of the ball.

    With early_stop, only the examples that are classified rightly are active.
    """
    inputs, labels, epsilon, _ = problem
    active = right if rules.early_stop else jnp.ones_like(right)
    start = jnp.zeros_like(inputs)
    if key is not None:
        drawn = sample_in_ball(key, inputs, epsilon, rules.norm)
        drawn = stay_within(drawn, inputs, rules.bounds)
        start = jnp.where(per_example(active, inputs), drawn, start)
    return Ascent(start, jnp.zeros_like(labels), active)


def ascend(traces: Traces, problem: Problem, rules: Rules, start: Ascent) -> Ascent:
    """Takes steps until no example is active."""
    apply_fn, closure, turns = plan_turns(traces, len(problem.inputs))
    closure = jax.tree.map(lax.stop_gradient, closure)

    turns = turns if rules.early_stop else turns.of_one_size()
    step = partial(_take_step, apply_fn, closure, rules)
    left = lambda state: jnp.where(state.active, rules.num_steps - state.num_steps, 0)
    return work_off(step, problem, start, turns, left)


def _take_step(
    apply_fn: ApplyFn, closure: Closure, rules: Rules, part: Problem, before: Ascent
) -> Ascent:
    """One step for some rows; with early_stop, none where the iterate is misclassified."""
    inputs, labels, epsilon, step_size = part
    iterates = inputs + before.perturbation
    predicted, direction = steepest_ascent(apply_fn, closure, iterates, labels, rules.norm)
    step = per_example(step_size, inputs) * direction
    after = project(before.perturbation + step, epsilon, rules.norm)
    after = stay_within(after, inputs, rules.bounds)
    moves = (predicted == labels) | (not rules.early_stop)
    after = jnp.where(per_example(moves, inputs), after, before.perturbation)
    num_steps = before.num_steps + moves
    return Ascent(after, num_steps, moves & (num_steps < rules.num_steps))


def steepest_ascent(
    apply_fn: ApplyFn,
    closure: Closure,
    x: Float[Array, "rows ..."],
    labels: Int[Array, " rows"],
    norm: Norm,
) -> tuple[Int[Array, " rows"], Float[Array, "rows ..."]]:
    """The predicted classes at x, and the direction d(x), zero where it is not finite."""
    logits, pull_back = jax.vjp(lambda x: apply_fn(closure, x), x)
    is_label = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    others = jax.nn.softmax(jnp.where(is_label, -jnp.inf, logits))
    direction = steepest(pull_back(others - is_label)[0], norm)
    return jnp.argmax(logits, axis=-1), jnp.where(jnp.isfinite(direction), direction, 0)
