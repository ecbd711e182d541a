"""SuperDeepFool (Abdolahpourrostam, Abroshan, Moosavi-Dezfooli, "SuperDeepFool: a new fast and
accurate minimal adversarial attack", NeurIPS 2024), l2.

At the smallest perturbation that reaches a boundary, the perturbation is normal to that boundary.
DeepFool's result is not. So the attack alternates, from D = S = 0:

    as long as x + D does not fool    D = B(D + (1 + overshoot) r)    r: DeepFool's step at x + D
    once it fools                     D = S = B(S + <D, w> w / ||w||_2^2)
                                      w: d (z_j - z_y) / dx at x + D

with y the label, j the strongest other class and B into the bounds. It stops as soon as a D that
the second line gave fools. That D, and the smallest that fooled before, are then shortened by
bisection as far as they fool, and the smaller one is the result. (The paper's code shortens the
last one alone.)
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dd_jax.attacks import _deepfool_step as deepfool_step
from dd_jax.attacks._arguments import check_arguments, labels_to_leave, trace
from dd_jax.attacks._deepfool import likely_classes
from dd_jax.attacks._deepfool_step import Options, check_options, nearest_step
from dd_jax.attacks._minimum_norm import (
    Problem,
    Smallest,
    as_result,
    fools_at,
    make_problem,
    nothing_yet,
    rival_difference,
    smaller_of,
)
from dd_jax.attacks._queue import plan_turns, work_off
from dd_jax.norms import Bounds, check_bounds, lp_norm, per_example, stay_within, steepest_direction
from dd_jax.types import AttackResult, LogitsFn
from dd_jax.xla.closure_convert import ApplyFn, Closure, Traces, closure_convert

# Of ||D||_2, added to every step of DeepFool. Without it the steps get shorter than rounding before
# another class wins; the authors' code adds 1e-4 to the distance.
LEAST_STEP = 1e-4


class Walk(NamedTuple):
    """How far the attack is with each example."""

    perturbation: Float[Array, "batch ..."]  # D
    start: Float[Array, "batch ..."]  # S
    is_projected: Bool[Array, " batch"]  # in the last step
    reached: Smallest  # by DeepFool's steps
    projected: Smallest
    num_steps: Int[Array, " batch"]
    active: Bool[Array, " batch"]


def superdeepfool(
    logits_fn: LogitsFn,
    inputs: Float[Array, "batch ..."],
    labels: Int[Array, " batch"] | None = None,
    *,
    num_steps: int = 100,
    overshoot: float = 0.02,
    num_bisections: int = 10,
    num_candidates: int | None = None,
    class_chunk_size: int | None = None,
    bounds: Bounds | None = None,
) -> AttackResult:
    """Finds a perturbation of small l2 norm that changes each example's class: equations above.

    Args:
      logits_fn: maps (batch, ...) inputs to (batch, classes) logits, row by row.
      inputs: any rank, floating; within the bounds, if there are any.
      labels: the classes to leave. None: the predicted ones.
      num_steps: the largest number of steps, DeepFool's and projections together.
      overshoot: DeepFool's steps are (1 + overshoot) times as long as the way to the linearized
        boundary. 0 or more.
      num_bisections: how often the interval of lengths is halved at the end, 0 or more. 10 find the
        boundary along D to 0.1 %.
      num_candidates, class_chunk_size: of DeepFool's steps, as in `dd_jax.deepfool`.
      bounds: (lower, upper), numbers or arrays that broadcast to one example, with or without a
        leading axis of size 1: inputs + perturbation stays within. None: no bounds.

    Returns:
      AttackResult(perturbation, success, num_steps). perturbation: the smallest that fools; where
      none does, the last one. success: whether the net does not classify inputs + perturbation as
      the label says. num_steps: steps until the perturbation was found; the limit where there was
      no success.

    Edges: what is misclassified already is done: zero perturbation, success, zero steps. Where all
    gradients vanish (dead net) or are not finite, or two classes tie, the search stops there,
    without success. A batch may be empty. Results do not depend on the rest of the batch, and an
    example that has stopped costs nothing more. Gradients do not flow through the result.

    Raises:
      ValueError: at trace time, for shapes, types or options that make no sense.

    >>> import jax.numpy as jnp
    >>> import dd_jax
    >>> weights = jnp.array([[1.0, -1.0], [3.0, 0.5]])
    >>> net = lambda x: x @ weights
    >>> found = dd_jax.attacks.superdeepfool(net, jnp.array([[2.0, -1.0]]))
    >>> bool(found.success[0]), round(float(jnp.linalg.norm(found.perturbation)), 2)
    (True, 0.47)
    """
    options = Options("l2", num_steps, overshoot, 0.0, num_candidates, class_chunk_size)
    check_arguments(inputs, labels, "l2", num_steps)
    check_options(options)
    check_bounds(bounds, inputs)
    if num_bisections < 0:
        raise ValueError(f"num_bisections is {num_bisections}; it must be 0 or more.")
    inputs = lax.stop_gradient(jnp.asarray(inputs))
    traces = trace(logits_fn, inputs)
    logits, labels, right = labels_to_leave(traces, inputs, labels)
    problem = make_problem(inputs, labels, bounds, "l2")
    candidates = likely_classes(logits, num_candidates)
    walk = search(traces, problem, candidates, right, options, bounds)
    reached, projected = (
        shorten(traces, problem, found, num_bisections) for found in (walk.reached, walk.projected)
    )
    smallest = smaller_of(reached, projected)
    return as_result(traces, problem, right, smallest, walk.perturbation, num_steps)


def search(
    traces: Traces,
    problem: Problem,
    candidates: Int[Array, "batch others"],
    right: Bool[Array, " batch"],
    options: Options,
    bounds: Bounds | None,
) -> Walk:
    """Alternates DeepFool's steps and projections until every example has stopped."""
    apply_fn, closure, turns = plan_turns(traces, len(problem.inputs))
    closure = jax.tree.map(lax.stop_gradient, closure)
    nobody = jnp.zeros_like(right)
    none = jnp.zeros_like(problem.labels)
    zeros, nothing = jnp.zeros_like(problem.inputs), nothing_yet(problem.inputs)
    start = Walk(zeros, zeros, nobody, nothing, nothing, none, right)

    def step(part: tuple[Problem, Array], before: Walk) -> Walk:
        return take_step(apply_fn, closure, *part, before, options=options, bounds=bounds)

    left = lambda walk: jnp.where(walk.active, options.num_steps - walk.num_steps, 0)
    return work_off(step, (problem, candidates), start, turns, left)


def take_step(
    apply_fn: ApplyFn,
    closure: Closure,
    part: Problem,
    candidates: Int[Array, "rows others"],
    walk: Walk,
    options: Options,
    bounds: Bounds | None,
) -> Walk:
    """Looks at the perturbation, and goes to the boundary or onto its normal."""
    here, axes = walk.perturbation, tuple(range(1, walk.perturbation.ndim))
    step = deepfool_step_from(apply_fn, closure, part, candidates, here, options)
    fools, normal = look(apply_fn, closure, part.inputs + here, part.labels)
    found = Smallest(here, lp_norm(here, "l2"), walk.num_steps)
    done = fools & walk.is_projected
    least = per_example(LEAST_STEP * found.size, here) * normal
    onwards = here + (1 + options.overshoot) * step + least
    moved = jnp.where(per_example(fools, here), on_normal(walk, normal), onwards)
    moved = jnp.where(per_example(done, here), here, stay_within(moved, part.inputs, bounds))
    start = jnp.where(per_example(fools, here), moved, walk.start)
    best = smaller_of(walk.reached, found, fools & ~done), smaller_of(walk.projected, found, done)
    num_steps = walk.num_steps + 1
    goes_on = jnp.any(moved != here, axis=axes) & (num_steps < options.num_steps)
    return Walk(moved, start, fools, *best, num_steps, goes_on)


def on_normal(walk: Walk, normal: Float[Array, "rows ..."]) -> Float[Array, "rows ..."]:
    """S plus the projection of D on the unit normal."""
    here = walk.perturbation
    length = jnp.sum(here * normal, axis=tuple(range(1, here.ndim)))
    return walk.start + per_example(length, here) * normal


def deepfool_step_from(
    apply_fn: ApplyFn,
    closure: Closure,
    part: Problem,
    candidates: Int[Array, "rows others"],
    here: Float[Array, "rows ..."],
    options: Options,
) -> Float[Array, "rows ..."]:
    """DeepFool's step away from the labels, at the perturbed inputs."""
    away = jnp.ones(part.labels.shape, bool)
    searched = deepfool_step.Problem(part.inputs, part.labels, away, candidates)
    return nearest_step(apply_fn, closure, part.inputs + here, searched, options)[0]


def look(
    apply_fn: ApplyFn,
    closure: Closure,
    x: Float[Array, "rows ..."],
    labels: Int[Array, " rows"],
) -> tuple[Bool[Array, " rows"], Float[Array, "rows ..."]]:
    """Whether another class wins at x, and the unit normal w / ||w||_2; zero where it is not
    finite.
    """

    def total(x: Array) -> tuple[Array, Array]:
        logits = apply_fn(closure, x)
        return jnp.sum(rival_difference(logits, labels)), fools_at(logits, labels)

    gradient, fools = jax.grad(total, has_aux=True)(x)
    normal = steepest_direction(gradient, "l2")
    return fools, jnp.where(jnp.isfinite(normal), normal, 0)


def shorten(traces: Traces, problem: Problem, smallest: Smallest, num_bisections: int) -> Smallest:
    """The perturbations times the least factor between 0 and 1 at which they still fool, by
    bisection.
    """
    apply_fn, closure = closure_convert(traces, len(problem.inputs))
    closure = jax.tree.map(lax.stop_gradient, closure)
    times = lambda factor: per_example(factor, problem.inputs) * smallest.perturbation

    def halve(_: Array | int, interval: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = interval
        middle = (low + high) / 2
        logits = apply_fn(closure, problem.inputs + times(middle))
        fools = fools_at(logits, problem.labels)
        return jnp.where(fools, low, middle), jnp.where(fools, middle, high)

    zeros = jnp.zeros_like(smallest.size)
    _, factor = lax.fori_loop(0, num_bisections, halve, (zeros, zeros + 1))
    return smallest._replace(perturbation=times(factor), size=factor * smallest.size)
