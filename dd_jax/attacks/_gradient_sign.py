"""Attacks along the gradient of the cross-entropy: FGSM, PGD, and the search for the smallest
epsilon at which FGSM succeeds.

With d(x) the direction of steepest ascent of the cross-entropy L(f(x), y) in the lp norm,

    d(x)    g / ||g||_2 for l2, sign(g) for linf, with g = dL / dx
    FGSM    D = B(epsilon * d(x))                         (Goodfellow, Shlens, Szegedy, ICLR 2015)
    PGD     D_k+1 = B(P(D_k + step_size * d(x + D_k)))        (Madry et al., ICLR 2018)

P projects to the ball ||D||_p <= epsilon; B clips to the bounds without leaving that ball.

The gradient of L in the logits is (1 - p_y) (q - e_y), with p the softmax, q the softmax over all
classes but y, and e_y one-hot. The first factor does not change d and is left out. So d is correct,
and not zero, even if a net is so confident that 1 - p_y rounds to 0.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dd_jax.attacks._arguments import (
    SizeOrSizes,
    check_arguments,
    labels_to_leave,
    one_per_example,
    trace,
)
from dd_jax.attacks._ascent import Problem, Rules, ascend, start_ascent, steepest_ascent
from dd_jax.norms import Bounds, Norm, check_bounds, is_known, per_example, project, stay_within
from dd_jax.types import AttackResult, LogitsFn, RandomKeys
from dd_jax.xla.closure_convert import closure_convert

EpsilonFn = Callable[[Float[Array, " batch"]], Array]

GRID_SPAN = 1000.0
"""The ratio of the largest epsilon of the grid to the smallest."""


class Bracket(NamedTuple):
    """The state of the search for epsilon: FGSM fails at `low` and fools at `high`."""

    low: Float[Array, " batch"]
    high: Float[Array, " batch"]  # inf until FGSM fools
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
    """The fast gradient sign method, one step of steepest ascent: D = B(epsilon * d(x)).

    Args:
      logits_fn: maps (batch, ...) inputs to (batch, classes) logits, row by row.
      inputs: any rank, floating; within the bounds, if given.
      labels: the classes to leave. None: the predicted ones.
      epsilon: ||D||_p, in the units of the inputs, 0 or more; one number, or one per example.
      norm: "linf", as published, or "l2", along the normalized gradient.
      bounds: (lower, upper), numbers or arrays that broadcast to one example, with or without a
        leading axis of size 1. inputs + D stays within. None: no bounds.
      early_stop: an input that is misclassified already gets a zero perturbation, success and zero
        steps. False: all inputs are attacked, as in adversarial training.

    Returns:
      AttackResult(perturbation, success, num_steps). success: whether inputs + D is misclassified.
      num_steps: 1, or 0 for an input that is misclassified already. ||D||_p does not exceed
      epsilon, not even by rounding.

    Edges: if the gradient vanishes (dead net) or is not finite, nothing moves. Gradients do not
    flow through the result. FGSM is `pgd` with one step of size epsilon.

    Raises:
      ValueError: at trace time, for wrong shapes, types or options.

    Example:

    >>> import jax.numpy as jnp
    >>> from dd_jax.attacks import fgsm
    >>> weights = jnp.array([[1.0, -1.0], [3.0, 0.5]])
    >>> found = fgsm(lambda x: x @ weights, jnp.array([[2.0, -1.0]]), epsilon=0.5)
    >>> found.perturbation.tolist(), bool(found.success[0])
    ([[-0.5, -0.5]], True)
    """
    one_step: dict[str, Any] = dict(step_size=epsilon, num_steps=1)
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
    key: RandomKeys | None = None,
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
      key: for a random start, D_0 uniform in the ball; one random key, or one per example,
        (batch,). With one for all, the draw of an example depends on its place in the batch. None:
        D_0 = 0.
      early_stop: stop an example at the first iterate that is misclassified, so that success is
        judged at *every* iterate. False: all examples take all steps, also those that are
        misclassified already, and success is judged at the *last* iterate.

    Returns:
      AttackResult(perturbation, success, num_steps). success: whether inputs + perturbation is
      misclassified. num_steps: the steps until then; without success the limit. ||perturbation||_p
      does not exceed epsilon, not even by rounding.

    Edges: with `early_stop`, an input that is misclassified already gets a zero perturbation,
    success and zero steps, also with a key. If the gradient vanishes or is not finite, no step is
    taken. Results do not depend on the rest of the batch, and an example that has stopped costs
    nothing more. Gradients do not flow through the result.

    Raises:
      ValueError: at trace time, for wrong shapes, types or options.

    Example: a random start, then steps of 0.25 within the ball of radius 0.5.

    >>> import jax
    >>> import jax.numpy as jnp
    >>> from dd_jax.attacks import pgd
    >>> weights = jnp.array([[1.0, -1.0], [3.0, 0.5]])
    >>> logits_fn, inputs = lambda x: x @ weights, jnp.array([[2.0, -1.0]])
    >>> found = pgd(logits_fn, inputs, epsilon=0.5, step_size=0.25, key=jax.random.key(0))
    >>> bool(found.success[0]), bool(jnp.abs(found.perturbation).max() <= 0.5)
    (True, True)
    """
    check_arguments(inputs, labels, norm, num_steps)
    check_bounds(bounds, inputs)
    inputs = lax.stop_gradient(jnp.asarray(inputs))
    epsilon = one_per_example("epsilon", epsilon, inputs)
    step_size = one_per_example("step_size", step_size, inputs)
    traces = trace(logits_fn, inputs)
    _, labels, right = labels_to_leave(traces, inputs, labels)
    problem = Problem(inputs, labels, epsilon, step_size)
    rules = Rules(norm, bounds, num_steps, early_stop)
    found = ascend(traces, problem, rules, start_ascent(problem, rules, right, key))
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
    """FGSM with the smallest epsilon that changes each example's class, for Deep Defense's rho_inf.

    FGSM may fool at one epsilon and not at a larger one. So the search tries a geometric grid from
    max_epsilon / 1000 to max_epsilon upwards until the first success, and bisects the interval
    below it. d(x) is computed once.

    Args:
      logits_fn, inputs, labels, norm, bounds: as in `fgsm`.
      max_epsilon: the largest epsilon to try, in the units of the inputs, more than 0.
      num_grid_points: at least 2. The search misses successes that lie between two grid points.
      num_bisections: 0 or more. With the defaults the error of epsilon is 0.03 %, or below the grid
        max_epsilon / 10^6.

    Returns:
      AttackResult(perturbation, success, num_steps). perturbation: B(epsilon * d(x)); if no epsilon
      fools, that of max_epsilon, without success. num_steps: 1. An input that is misclassified
      already gets a zero perturbation, success and zero steps. Gradients do not flow through the
      result.

    Raises:
      ValueError: at trace time, for wrong shapes, types or options.

    Example: a step of epsilon in each component changes the difference of the logits, 1.5, by
    4.5 epsilon.

    >>> import jax.numpy as jnp
    >>> from dd_jax.attacks import minimal_fgsm
    >>> weights = jnp.array([[1.0, -1.0], [3.0, 0.5]])
    >>> found = minimal_fgsm(lambda x: x @ weights, jnp.array([[2.0, -1.0]]), max_epsilon=1.0)
    >>> round(float(jnp.abs(found.perturbation).max()), 3)
    0.333
    """
    _check_search(max_epsilon, num_grid_points, num_bisections)
    right, perturbation_at, fooled_at = fgsm_line(logits_fn, inputs, labels, norm, bounds)
    grid = jnp.geomspace(max_epsilon / GRID_SPAN, max_epsilon, num_grid_points, dtype=inputs.dtype)
    grid = grid.at[-1].set(max_epsilon)
    smallest = _smallest_epsilon(right, fooled_at, grid, num_bisections)
    found = jnp.isfinite(smallest)
    epsilon = jnp.where(found, smallest, max_epsilon)
    perturbation = perturbation_at(jnp.where(right, epsilon, 0))
    return AttackResult(perturbation, found | ~right, right.astype(jnp.int32))


def _check_search(max_epsilon: float, num_grid_points: int, num_bisections: int) -> None:
    for name, value, least in (
        ("num_grid_points", num_grid_points, 2),
        ("num_bisections", num_bisections, 0),
    ):
        if value < least:
            raise ValueError(f"{name} is {value}; it must be at least {least}.")
    if not max_epsilon > 0:
        raise ValueError(f"max_epsilon is {max_epsilon}; it must be more than 0.")


def _smallest_epsilon(
    right: Bool[Array, " batch"],
    fooled_at: EpsilonFn,
    grid: Float[Array, " points"],
    num_bisections: int,
) -> Float[Array, " batch"]:
    """The smallest epsilon that fools: the first success on the grid, refined by bisection.

    inf if no point of the grid fools.
    """
    found = lambda state: jnp.isfinite(state.high)

    def is_active(state: Bracket) -> Bool[Array, " batch"]:
        on_grid, halving = state.num_tried < len(grid), state.num_halved < num_bisections
        return right & jnp.where(found(state), halving, on_grid)

    def turn(state: Bracket) -> Bracket:
        epsilon = jnp.where(found(state), (state.low + state.high) / 2, grid[state.num_tried])
        fooled, active = fooled_at(epsilon), is_active(state)
        return Bracket(
            jnp.where(active & ~fooled, epsilon, state.low),
            jnp.where(active & fooled, epsilon, state.high),
            state.num_tried + (active & ~found(state)),
            state.num_halved + (active & found(state)),
        )

    zeros, none = jnp.zeros(right.shape, grid.dtype), jnp.zeros(right.shape, jnp.int32)
    start = Bracket(zeros, zeros + jnp.inf, none, none)
    return lax.while_loop(lambda state: jnp.any(is_active(state)), turn, start).high


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

    The mean over a data set is the success rate as a function of epsilon, Figure 5 of Deep
    Defense's supplement; the sums of batches add up. The epsilon at which half of the images are
    fooled lies between the two neighbors whose rates enclose 0.5. Call again with epsilons between
    these for a more precise value.

    Args:
      logits_fn, inputs, labels, norm, bounds: as in `fgsm`.
      epsilons: in the units of the inputs, 0 or more, in any order.

    Returns:
      success[i, j]: whether inputs[j] + B(epsilons[i] * d(inputs[j])) is misclassified. True for
      all epsilons if inputs[j] is misclassified already.

    Raises:
      ValueError: at trace time, for wrong shapes, types or options.

    Example:

    >>> import jax.numpy as jnp
    >>> from dd_jax.attacks import fgsm_success_curve
    >>> weights = jnp.array([[1.0, -1.0], [3.0, 0.5]])
    >>> logits_fn, inputs = lambda x: x @ weights, jnp.array([[2.0, -1.0], [1.0, -1.0]])
    >>> fgsm_success_curve(logits_fn, inputs, epsilons=[0.1, 0.3, 0.5]).tolist()
    [[False, False], [False, True], [True, True]]
    """
    if jnp.asarray(epsilons).ndim != 1 or is_known(lambda: jnp.any(~(jnp.asarray(epsilons) >= 0))):
        raise ValueError(f"epsilons must be a vector of numbers, each 0 or more; got {epsilons}.")
    right, _, fooled_at = fgsm_line(logits_fn, inputs, labels, norm, bounds)
    every = lambda epsilon: fooled_at(jnp.broadcast_to(epsilon, right.shape))
    return ~right[None] | lax.map(every, jnp.asarray(epsilons, inputs.dtype))


def fgsm_line(
    logits_fn: LogitsFn, inputs: Array, labels: Array | None, norm: Norm, bounds: Bounds | None
) -> tuple[Bool[Array, " batch"], EpsilonFn, EpsilonFn]:
    """Returns which examples are classified rightly, and two functions of one epsilon per example:
    FGSM's perturbation, and whether it fools.
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
