"""Auto-PGD, APGD (Croce and Hein, "Reliable Evaluation of Adversarial Robustness with an Ensemble
of Diverse Parameter-free Attacks", ICML 2020): projected gradient ascent with momentum that chooses
its step sizes by itself.

From a random D_0 with ||D_0||_p = epsilon, and with g_k the gradient of the loss at x + D_k,

    E_k+1 = P(D_k + s d(g_k))
    D_k+1 = P(D_k + a (E_k+1 - D_k) + (1 - a) (D_k - D_k-1)),    a = 0.75, but 1 in the first step

d is the direction of steepest ascent. P leads into the ball and the bounds. The step size s starts
at 2 epsilon. At the checkpoints, 22, 41, 57, 70, 80, 87, 93 and 99 of 100 steps, s is halved, and
the ascent goes on from the D of the largest loss so far, if

- at most 0.75 of the steps since the last checkpoint have increased the loss, or
- s was not halved at the last checkpoint and the largest loss has not grown since.

For l1 (Croce and Hein, "Mind the box: l1-APGD", ICML 2021), d is the sign of the largest components
of g, divided by their number. P is the projection to ball and box together. After every 4 % of the
steps the number of components is set to that of the best D, divided by 1.5. If that number has
fallen by 5 % or more, s is epsilon again and the ascent goes on from the best D; otherwise s is
divided by 1.5, down to epsilon / 10. The ascent takes 30 % of its steps in the ball of radius
3 epsilon, 30 % in that of 2 epsilon, and the rest in the ball of epsilon.

What differs from the authors' code: an example leaves at the first iterate that is misclassified,
by more than rounding. A random net's takes all steps, and the iterate of the largest loss counts.
The first step counts as an increase if the loss grows from D_0 to D_1, as in the paper.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dd_jax.attacks._arguments import SizeOrSizes
from dd_jax.attacks._auto_pgd_schedule import Schedule, make_schedule
from dd_jax.attacks._hyperplane import largest_threshold
from dd_jax.attacks._losses import Loss, LossFn, loss_fn_for
from dd_jax.attacks._minimum_norm import fools_at
from dd_jax.attacks._queue import work_off
from dd_jax.attacks._restarts import (
    Found,
    Net,
    Problem,
    RandomLogitsFn,
    asked_again,
    checked_count,
    prepare,
    random_point,
    target_now,
    where_rows,
)
from dd_jax.norms import (
    Bounds,
    LpNorm,
    lp_norm,
    per_example,
    project,
    project_within,
    stay_within,
    steepest_direction,
)
from dd_jax.types import AttackResult, LogitsFn, RandomKeys

MOMENTUM = 0.75
RISES = 0.75
"""rho: the share of steps that must increase the loss for the step size to stay."""
L1_SHRINK, L1_LEAST = 1.5, 10.0
L1_SHARE, L1_FALLS = 1.5, 0.95


class Rules(NamedTuple):
    """What is the same for all examples."""

    norm: LpNorm
    bounds: Bounds | None
    loss_fn: LossFn
    schedule: Schedule
    num_targets: int
    num_restarts: int  # of each target
    num_gradient_samples: int
    stops: bool  # at the first success


class Path(NamedTuple):
    """How far the ascent is with each example."""

    perturbation: Float[Array, "batch ..."]
    previous: Float[Array, "batch ..."]
    best: Float[Array, "batch ..."]  # of the largest loss, and its gradient
    best_gradient: Float[Array, "batch ..."]
    best_loss: Float[Array, " batch"]
    loss: Float[Array, " batch"]
    step_size: Float[Array, " batch"]
    num_rises: Int[Array, " batch"]  # since the last checkpoint
    was_reduced: Bool[Array, " batch"]  # at the last checkpoint
    loss_at_checkpoint: Float[Array, " batch"]  # the largest
    support: Float[Array, " batch"]  # of l1: the share of components that is not 0, of the best
    evaluation: Int[Array, " batch"]  # of the run
    run: Int[Array, " batch"]
    num_queries: Int[Array, " batch"]
    success: Bool[Array, " batch"]


class View(NamedTuple):
    """What the ascent sees of the net at the current perturbations."""

    fools: Bool[Array, " rows"]
    loss: Float[Array, " rows"]
    gradient: Float[Array, "rows ..."]


def apgd(
    logits_fn: LogitsFn | RandomLogitsFn,
    inputs: Float[Array, "batch ..."],
    labels: Int[Array, " batch"] | None = None,
    *,
    epsilon: SizeOrSizes,
    norm: LpNorm = "linf",
    loss: Loss = "ce",
    num_steps: int = 100,
    num_restarts: int = 1,
    num_targets: int = 9,
    bounds: Bounds | None = None,
    key: RandomKeys | None = None,
    is_random: bool = False,
    num_gradient_samples: int = 1,
) -> AttackResult:
    """Auto-PGD in the lp ball of radius epsilon: equations above.

    Args:
      logits_fn: maps (batch, ...) inputs to (batch, classes) logits, row by row.
      inputs: any rank, floating; within the bounds, if there are any.
      labels: the classes to leave. None: the predicted ones.
      epsilon: the radius, in the units of the inputs, 0 or more; one number, or one per example.
      norm: "linf", "l2" or "l1".
      loss: "ce", cross-entropy; "dlr", the difference of logits ratio; "dlr_targeted", which is
        increased towards one class after the other. See `dd_jax.attacks._losses`.
      num_steps: of each run, at most.
      num_restarts: runs from different starting points; of "dlr_targeted", per target.
      num_targets: of "dlr_targeted": the classes with the largest logits, at most classes - 1.
      bounds: (lower, upper), numbers or arrays that broadcast to one example, with or without a
        leading axis of size 1: inputs + perturbation stays within. None: no bounds.
      key: of the starting points: one random key, or one per example, (batch,). With one for all,
        the draw of an example depends on its place in the batch. None: key 0.
      is_random: the net draws random numbers; `logits_fn(inputs, key)` then gets a fresh key for
        each row and each evaluation, and sees one row at a time.
      num_gradient_samples: the gradient is the mean of so many, each with its own key; for random
        nets.

    Returns:
      AttackResult(perturbation, success, num_steps). perturbation: the first that fools; where none
      does, the one of the largest loss in the last run. success: whether the net does not classify
      inputs + perturbation as the label says. num_steps: evaluations of the net, those at starting
      points included. ||perturbation||_p does not exceed epsilon, not even by rounding.

    Edges: what is misclassified already is done: zero perturbation, success, zero steps. Where all
    gradients vanish or are not finite, nothing moves. With fewer than 3 classes "ce" takes the
    place of "dlr"; with fewer than 4, the difference of two logits that of "dlr_targeted"; a
    warning says so. Results do not depend on the rest of the batch. Gradients do not flow through
    the result.

    Raises:
      ValueError: at trace time, for shapes, types or options that make no sense.

    >>> import jax.numpy as jnp
    >>> import dd_jax
    >>> weights = jnp.array([[1.0, -1.0, 0.0], [3.0, 0.5, -1.0]])
    >>> found = dd_jax.attacks.apgd(
    ...     lambda x: x @ weights, jnp.array([[2.0, -1.0]]), epsilon=0.6, loss="dlr"
    ... )
    >>> bool(found.success[0]), bool(jnp.abs(found.perturbation).max() <= 0.6)
    (True, True)
    """
    options: dict[str, Any] = dict(
        norm=norm, epsilon=epsilon, bounds=bounds, key=key, is_random=is_random
    )
    net, problem, right = prepare(logits_fn, inputs, labels, **options)
    counts = (num_steps, num_targets, num_restarts, num_gradient_samples)
    rules = make_rules(net, norm, bounds, loss, *counts)
    return asked_again(net, problem, ascend(net, problem, rules, right), right)


def make_rules(
    net: Net,
    norm: LpNorm,
    bounds: Bounds | None,
    loss: Loss,
    num_steps: int,
    num_targets: int,
    num_restarts: int,
    num_gradient_samples: int = 1,
) -> Rules:
    """Checks the options of `apgd` and puts them together."""
    schedule = make_schedule(checked_count("num_steps", num_steps), norm)
    targets = min(checked_count("num_targets", num_targets), net.num_classes - 1)
    targets = targets if loss == "dlr_targeted" else 1
    num_restarts = checked_count("num_restarts", num_restarts)
    samples = checked_count("num_gradient_samples", num_gradient_samples)
    loss_fn = loss_fn_for(loss, net.num_classes, is_random=net.is_random)
    counts = (targets, num_restarts, samples)
    return Rules(norm, bounds, loss_fn, schedule, *counts, stops=not net.is_random)


def ascend(net: Net, problem: Problem, rules: Rules, active: Bool[Array, " batch"]) -> Found:
    """Runs the ascent for the examples that are active."""
    zeros, none = jnp.zeros_like(problem.epsilon), jnp.zeros_like(problem.labels)
    no, still = jnp.zeros_like(active), jnp.zeros_like(problem.inputs)
    losses = (zeros - jnp.inf, zeros, zeros)
    checks = (none, no, zeros, zeros)
    path = Path(still, still, still, still, *losses, *checks, none, none, none, no)
    started = begin(problem, path, rules, path.run, rules.schedule.radius[0])
    path = jax.tree.map(partial(where_rows, active), started, path)
    length, num_runs = len(rules.schedule.radius), rules.num_targets * rules.num_restarts

    def left(path: Path) -> Int[Array, " batch"]:
        count = (num_runs - path.run) * length - path.evaluation
        return jnp.where(active & ~path.success, count, 0)

    path = work_off(partial(take_turn, net, rules), problem, path, net.turns, left)
    perturbation = where_rows(path.success, path.perturbation, path.best)
    return Found(perturbation, path.success, path.num_queries)


def begin(
    problem: Problem, path: Path, rules: Rules, run: Int[Array, " rows"], scale: float | Array
) -> Path:
    """A run at a random point of the ball of radius scale * epsilon."""
    radius = jnp.asarray(scale, problem.epsilon.dtype) * problem.epsilon
    start = random_point(problem, run, radius, rules.norm, rules.bounds)
    return at_point(path._replace(run=run, evaluation=jnp.zeros_like(run)), start, radius, rules)


def at_point(path: Path, start: Array, radius: Float[Array, " rows"], rules: Rules) -> Path:
    """The ascent in a ball of that radius, from that point on."""
    step_size = radius if rules.norm == "l1" else 2 * radius
    return path._replace(
        perturbation=start, previous=start, step_size=step_size, support=share_moved(start)
    )


def share_moved(perturbation: Float[Array, "rows ..."]) -> Float[Array, " rows"]:
    """The share of the components that is not 0."""
    return jnp.mean(perturbation != 0, tuple(range(1, perturbation.ndim)), perturbation.dtype)


def take_turn(net: Net, rules: Rules, problem: Problem, before: Path) -> Path:
    """One evaluation of the net for each row, and the step that follows."""
    now = happens_at(rules.schedule, before.evaluation, problem.epsilon.dtype)
    view = look(net, rules, problem, before)
    path = note(before, view, now.is_first)
    path, gradient = adapt(path, view, now, problem, rules)
    moved = step(path, gradient, now, problem, rules)
    path = path._replace(
        perturbation=moved,
        previous=path.perturbation,
        evaluation=before.evaluation + 1,
        num_queries=before.num_queries + rules.num_gradient_samples,
    )
    path = next_radius_or_run(path, now, problem, rules)
    success = view.fools & now.counts & rules.stops
    path = path._replace(perturbation=where_rows(success, before.perturbation, path.perturbation))
    return path._replace(success=success)


def happens_at(schedule: Schedule, evaluation: Int[Array, " rows"], dtype: jnp.dtype) -> Schedule:
    """The schedule's entries for each row."""
    rows = jax.tree.map(lambda table: jnp.asarray(table)[evaluation], schedule)
    radii = (rows.radius.astype(dtype), rows.next_radius.astype(dtype))
    return rows._replace(radius=radii[0], next_radius=radii[1])


def look(net: Net, rules: Rules, problem: Problem, path: Path) -> View:
    """The loss and its gradient at the current perturbations, and whether they fool."""
    targets = target_now(problem, path.run // rules.num_restarts)

    def total(x: Array, number: Array | int) -> tuple[Array, tuple[Array, Array]]:
        logits = net.on_rows(x, problem.keys, path.num_queries + number)
        loss = rules.loss_fn(logits, problem.labels, targets).astype(x.dtype)
        return jnp.sum(loss), (fools_at(logits, problem.labels), loss)

    at, num_samples = problem.inputs + path.perturbation, rules.num_gradient_samples
    gradient, (fools, loss) = jax.grad(total, has_aux=True)(at, 1)
    if num_samples > 1:
        more = lambda number, sum: sum + jax.grad(lambda x: total(x, number + 1)[0])(at)
        gradient = lax.fori_loop(1, num_samples, more, gradient) / num_samples
    return View(fools, loss, jnp.where(jnp.isfinite(gradient), gradient, 0))


def note(path: Path, view: View, is_first: Bool[Array, " rows"]) -> Path:
    """Keeps the perturbation of the largest loss, and counts the increases."""
    best = is_first | (view.loss > path.best_loss)
    rises = jnp.where(is_first, 0, path.num_rises + (view.loss > path.loss))
    best_loss = jnp.where(best, view.loss, path.best_loss)
    return path._replace(
        best=where_rows(best, path.perturbation, path.best),
        best_gradient=where_rows(best, view.gradient, path.best_gradient),
        best_loss=best_loss,
        loss=view.loss,
        num_rises=rises,
        was_reduced=path.was_reduced | is_first,
        loss_at_checkpoint=jnp.where(is_first, best_loss, path.loss_at_checkpoint),
    )


def adapt(
    path: Path, view: View, now: Schedule, problem: Problem, rules: Rules
) -> tuple[Path, Float[Array, "rows ..."]]:
    """At a checkpoint: another step size, and back to the best point where that is called for.

    Returns the path and the gradient to follow.
    """
    at_checkpoint = now.interval > 0
    if rules.norm == "l1":
        goes_back, size, support = adapted_in_l1(path, now.radius * problem.epsilon)
    else:
        few = path.num_rises <= RISES * now.interval
        stuck = ~path.was_reduced & (path.loss_at_checkpoint >= path.best_loss)
        goes_back, support = few | stuck, path.support
        size = jnp.where(goes_back, path.step_size / 2, path.step_size)
    back = at_checkpoint & goes_back
    pick = lambda new, old: jnp.where(at_checkpoint, new, old)
    path = path._replace(
        perturbation=where_rows(back, path.best, path.perturbation),
        step_size=pick(size, path.step_size),
        support=pick(support, path.support),
        num_rises=pick(0, path.num_rises),
        was_reduced=pick(goes_back, path.was_reduced),
        loss_at_checkpoint=pick(path.best_loss, path.loss_at_checkpoint),
    )
    return path, where_rows(back, path.best_gradient, view.gradient)


def adapted_in_l1(
    path: Path, radius: Float[Array, " rows"]
) -> tuple[Bool[Array, " rows"], Float[Array, " rows"], Float[Array, " rows"]]:
    """Whether to go back to the best point, the step size, and the best point's support."""
    support = share_moved(path.best)
    fallen = support < L1_FALLS * path.support
    smaller = jnp.clip(path.step_size / L1_SHRINK, radius / L1_LEAST, radius)
    return fallen, jnp.where(fallen, radius, smaller), support


def step(
    path: Path, gradient: Float[Array, "rows ..."], now: Schedule, problem: Problem, rules: Rules
) -> Float[Array, "rows ..."]:
    """D_k+1."""
    inputs, radius = problem.inputs, now.radius * problem.epsilon
    length, here = per_example(path.step_size, gradient), path.perturbation
    if rules.norm == "l1":
        further = here + length * sparse_direction(gradient, path.support / L1_SHARE)
        return project_within(further, radius, inputs, rules.bounds)
    into = lambda x: stay_within(project(x, radius, rules.norm), inputs, rules.bounds)
    there = into(here + length * steepest_direction(gradient, rules.norm))
    share = per_example(jnp.where(now.is_first, 1, MOMENTUM), here).astype(here.dtype)
    return into(here + share * (there - here) + (1 - share) * (here - path.previous))


def sparse_direction(
    gradient: Float[Array, "rows ..."], share: Float[Array, " rows"]
) -> Float[Array, "rows ..."]:
    """The sign of that share of the components, those largest in absolute value, divided by their
    number; of at least one.
    """
    size, num_components = jnp.abs(gradient), math.prod(gradient.shape[1:])
    num_others = jnp.clip((1 - share) * num_components, 0, num_components - 1).astype(jnp.int32)
    axes = tuple(range(1, gradient.ndim))
    enough = lambda chosen: jnp.sum(chosen, axis=axes) >= num_components - num_others
    threshold = largest_threshold(size, enough)
    sign = jnp.where(size >= per_example(threshold, size), jnp.sign(gradient), 0)
    return sign / jnp.maximum(per_example(lp_norm(sign, "l1"), sign), 1)


def next_radius_or_run(path: Path, now: Schedule, problem: Problem, rules: Rules) -> Path:
    """At the end of a radius, the best point goes on in the next one; at the end of a run, the next
    run begins.
    """
    ends_run, unchanged = path.evaluation >= len(rules.schedule.radius), lambda path: path

    def narrow(path: Path) -> Path:
        radius = now.next_radius * problem.epsilon
        start = project_within(path.best, radius, problem.inputs, rules.bounds)
        smaller = at_point(path, start, radius, rules)
        return jax.tree.map(partial(where_rows, now.is_last), smaller, path)

    def start_again(path: Path) -> Path:
        fresh = begin(problem, path, rules, path.run + 1, rules.schedule.radius[0])
        return jax.tree.map(partial(where_rows, ends_run), fresh, path)

    if rules.norm == "l1":
        path = lax.cond(jnp.any(now.is_last), narrow, unchanged, path)
    return lax.cond(jnp.any(ends_run), start_again, unchanged, path)
