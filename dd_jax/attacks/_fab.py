"""The fast adaptive boundary attack, FAB (Croce and Hein, "Minimally distorted Adversarial Examples
with a Fast Adaptive Boundary Attack", ICML 2020), l1, l2 and linf.

At x_k = x + D_k the boundary towards a class t is linearized: with f = z_t - z_y and its gradient
w, it is the hyperplane <w, v - x_k> = -f. Let d and e be the smallest steps within the bounds that
lead onto it from x_k and from x. Then

    alpha  = min(||d||_p / (||d||_p + ||e||_p), 0.1)
    D_k+1  = B((1 - alpha) (D_k + 1.05 d) + alpha * 1.05 e)

and B shortens D until x + D is within the bounds. Where D_k+1 fools, it is kept if it is the
smallest that does, and the search goes on from 0.9 D_k+1.

Targeted, t is one class after the other, from D_0 = 0, as many steps for each. Untargeted, t is in
every step the class whose boundary is the nearest, |f| / ||w||_q, and later restarts begin at a
random D_0 of half the size of the smallest so far (and of at most epsilon / 2).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dd_jax.attacks._arguments import SizeOrSizes
from dd_jax.attacks._hyperplane import step_to_hyperplane
from dd_jax.attacks._losses import difference_to_target
from dd_jax.attacks._minimum_norm import Smallest, fools_at, nothing_yet, smaller_of
from dd_jax.attacks._queue import work_off
from dd_jax.attacks._restarts import (
    Found,
    Net,
    Problem,
    asked_again,
    checked_count,
    prepare,
    random_point,
    target_now,
    where_rows,
)
from dd_jax.norms import Bounds, LpNorm, dual_norm, lp_norm, per_example, stay_within
from dd_jax.types import AttackResult, LogitsFn, RandomKeys

ALPHA_MAX, OVERSHOOT, BACKWARD = 0.1, 1.05, 0.9
"""The authors' alpha_max, eta and beta."""
SHORTEST = 1e-8
"""The least size of d and e in alpha, as in the authors' code."""
FLATTEST = 1e-12
"""Added to a slope before a distance is divided by it, as in the authors' code."""
QUERIES_PER_STEP = 2


class Rules(NamedTuple):
    """What is the same for all examples."""

    norm: LpNorm
    bounds: Bounds | None
    num_steps: int
    num_targets: int
    num_restarts: int  # of each target
    is_targeted: bool


class Path(NamedTuple):
    """How far the search is with each example."""

    perturbation: Float[Array, "batch ..."]
    smallest: Smallest  # its num_steps are queries
    step: Int[Array, " batch"]  # of the run
    run: Int[Array, " batch"]
    num_queries: Int[Array, " batch"]


class Boundary(NamedTuple):
    """f and w at the current perturbations."""

    difference: Float[Array, " rows"]
    gradient: Float[Array, "rows ..."]


def fab(
    logits_fn: LogitsFn,
    inputs: Float[Array, "batch ..."],
    labels: Int[Array, " batch"] | None = None,
    *,
    norm: LpNorm = "linf",
    is_targeted: bool = True,
    num_steps: int = 100,
    num_targets: int = 9,
    num_restarts: int = 1,
    epsilon: SizeOrSizes | None = None,
    bounds: Bounds | None = None,
    key: RandomKeys | None = None,
) -> AttackResult:
    """Finds a perturbation of small l1, l2 or linf norm that changes each example's class:
    equations above.

    Args:
      logits_fn: maps (batch, ...) inputs to (batch, classes) logits, row by row.
      inputs: any rank, floating; within the bounds, if there are any.
      labels: the classes to leave. None: the predicted ones.
      norm: "linf", "l2" or "l1", the size that is kept small.
      is_targeted: towards the boundaries of `num_targets` classes, one after another. False:
        towards the nearest boundary, which needs a gradient for every class in every step.
      num_steps: of each run.
      num_targets: the classes with the largest logits, at most classes - 1.
      num_restarts: runs; targeted: of each target.
      epsilon: an example leaves at the first perturbation that fools and is no larger. In the units
        of the inputs; one number, or one per example. None: all steps are taken.
      bounds: (lower, upper), numbers or arrays that broadcast to one example, with or without a
        leading axis of size 1: inputs + perturbation stays within. None: no bounds.
      key: of the random starts; one random key, or one per example, (batch,). None: key 0.

    Returns:
      AttackResult(perturbation, success, num_steps). perturbation: the smallest that fools; where
      none does, the last one. success: whether the net does not classify inputs + perturbation as
      the label says, whatever the size. num_steps: how often the net was asked, twice per step.

    Edges: what is misclassified already is done: zero perturbation, success, zero steps. Where all
    gradients vanish or are not finite, nothing moves. Results do not depend on the rest of the
    batch. Gradients do not flow through the result.

    Raises:
      ValueError: at trace time, for shapes, types or options that make no sense.

    >>> import jax.numpy as jnp
    >>> import dd_jax
    >>> weights = jnp.array([[1.0, -1.0], [3.0, 0.5]])
    >>> found = dd_jax.attacks.fab(lambda x: x @ weights, jnp.array([[2.0, -1.0]]), norm="l2")
    >>> bool(found.success[0]), round(float(jnp.linalg.norm(found.perturbation)), 2)
    (True, 0.47)
    """
    radius = 0.0 if epsilon is None else epsilon
    options: dict[str, Any] = dict(norm=norm, epsilon=radius, bounds=bounds, key=key)
    net, problem, right = prepare(logits_fn, inputs, labels, **options)
    counts = (num_steps, num_targets, num_restarts)
    rules = make_rules(net, norm, bounds, *counts, is_targeted=is_targeted)
    return asked_again(net, problem, search(net, problem, rules, right), right)


def make_rules(
    net: Net,
    norm: LpNorm,
    bounds: Bounds | None,
    num_steps: int,
    num_targets: int,
    num_restarts: int,
    *,
    is_targeted: bool,
) -> Rules:
    """Checks the options of `fab` and puts them together."""
    targets = min(checked_count("num_targets", num_targets), net.num_classes - 1)
    num_steps = checked_count("num_steps", num_steps)
    num_restarts = checked_count("num_restarts", num_restarts)
    return Rules(norm, bounds, num_steps, targets if is_targeted else 1, num_restarts, is_targeted)


def search(net: Net, problem: Problem, rules: Rules, active: Bool[Array, " batch"]) -> Found:
    """Runs the search for the examples that are active."""
    none = jnp.zeros_like(problem.labels)
    still, num_runs = jnp.zeros_like(problem.inputs), rules.num_targets * rules.num_restarts
    path = Path(still, nothing_yet(problem.inputs), none, none, none)

    def left(path: Path) -> Int[Array, " batch"]:
        count = (num_runs - path.run) * rules.num_steps - path.step
        return jnp.where(active & (path.smallest.size > problem.epsilon), count, 0)

    path = work_off(partial(take_turn, net, rules), problem, path, net.turns, left)
    found = jnp.isfinite(path.smallest.size)
    perturbation = where_rows(found, path.smallest.perturbation, path.perturbation)
    return Found(perturbation, found, path.num_queries)


def take_turn(net: Net, rules: Rules, problem: Problem, before: Path) -> Path:
    """One step of some examples."""
    number = before.num_queries
    logits_at = lambda x: net.on_rows(x, problem.keys, number)
    find = towards_target if rules.is_targeted else towards_nearest
    boundary = find(logits_at, problem, before, rules)
    moved = move(boundary, before.perturbation, problem.inputs, rules)
    fools = fools_at(logits_at(problem.inputs + moved), problem.labels)
    size = lp_norm(moved, rules.norm)
    num_queries = before.num_queries + QUERIES_PER_STEP
    smallest = smaller_of(before.smallest, Smallest(moved, size, num_queries), fools)
    moved = where_rows(fools, BACKWARD * moved, moved)
    return next_run(Path(moved, smallest, before.step + 1, before.run, num_queries), problem, rules)


def move(
    boundary: Boundary,
    perturbation: Float[Array, "rows ..."],
    inputs: Float[Array, "rows ..."],
    rules: Rules,
) -> Float[Array, "rows ..."]:
    """D_k+1."""
    norm, bounds = rules.norm, rules.bounds
    difference, gradient = boundary
    along = jnp.sum(gradient * perturbation, axis=tuple(range(1, gradient.ndim)))
    here = step_to_hyperplane(gradient, -difference, inputs + perturbation, bounds, norm)
    there = step_to_hyperplane(gradient, along - difference, inputs, bounds, norm)
    length, direct = (jnp.maximum(lp_norm(x, norm), SHORTEST) for x in (here, there))
    alpha = per_example(jnp.minimum(length / (length + direct), ALPHA_MAX), inputs)
    moved = (1 - alpha) * (perturbation + OVERSHOOT * here) + alpha * OVERSHOOT * there
    return stay_within(moved, inputs, bounds)


def next_run(path: Path, problem: Problem, rules: Rules) -> Path:
    """At the end of a run, the next one begins."""
    ends = path.step >= rules.num_steps
    run = path.run + ends
    again = ends & (run < rules.num_targets * rules.num_restarts)
    path = path._replace(step=jnp.where(ends, 0, path.step), run=run)
    if rules.num_restarts == 1:
        return path._replace(perturbation=where_rows(again, 0.0, path.perturbation))

    def start(path: Path) -> Path:
        limit = jnp.where(problem.epsilon > 0, problem.epsilon, jnp.inf)
        size = jnp.minimum(path.smallest.size, limit)
        radius = jnp.where(jnp.isfinite(size), size / 2, 0)
        drawn = random_point(problem, run, radius, rules.norm, rules.bounds)
        drawn = where_rows(run % rules.num_restarts > 0, drawn, 0.0)
        return path._replace(perturbation=where_rows(again, drawn, path.perturbation))

    return lax.cond(jnp.any(again), start, lambda path: path, path)


def towards_target(logits_at: LogitsFn, problem: Problem, path: Path, rules: Rules) -> Boundary:
    """The boundary between the label and the target of the run."""
    targets = target_now(problem, path.run // rules.num_restarts)

    def total(x: Array) -> tuple[Array, Array]:
        difference = difference_to_target(logits_at(x), problem.labels, targets).astype(x.dtype)
        return jnp.sum(difference), difference

    gradient, difference = jax.grad(total, has_aux=True)(problem.inputs + path.perturbation)
    return finite(Boundary(difference, gradient))


def finite(boundary: Boundary) -> Boundary:
    """With zeros where it is not finite, so that nothing moves."""
    return jax.tree.map(lambda x: jnp.where(jnp.isfinite(x), x, 0), boundary)


def towards_nearest(logits_at: LogitsFn, problem: Problem, path: Path, rules: Rules) -> Boundary:
    """The boundary between the label and the class whose linearized boundary is the nearest."""
    inputs, labels = problem.inputs, problem.labels
    logits, pull_back = jax.vjp(lambda x: logits_at(x).astype(x.dtype), inputs + path.perturbation)
    one_hot = jnp.eye(logits.shape[-1], dtype=logits.dtype)

    def nearer(number: Array | int, state: tuple[Boundary, Array]) -> tuple[Boundary, Array]:
        """Classes are tried one at a time: all gradients at once would need much memory."""
        nearest, distance = state
        towards = one_hot[number][None] - one_hot[labels]
        here = Boundary(jnp.sum(towards * logits, axis=-1), pull_back(towards)[0])
        to_it = jnp.where(number == labels, jnp.inf, distance_to(here, rules.norm))
        better = partial(where_rows, to_it < distance)
        return jax.tree.map(better, here, nearest), jnp.minimum(to_it, distance)

    zeros = jnp.zeros_like(problem.epsilon)
    start = Boundary(zeros, jnp.zeros_like(inputs)), zeros + jnp.inf
    nearest, _ = lax.fori_loop(0, logits.shape[-1], nearer, start)
    return finite(nearest)


def distance_to(boundary: Boundary, norm: LpNorm) -> Float[Array, " rows"]:
    """The distance to a linearized boundary, |f| / ||w||_q."""
    return jnp.abs(boundary.difference) / (dual_norm(boundary.gradient, norm) + FLATTEST)
