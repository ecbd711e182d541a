"""Attacks along the gradient of the cross-entropy: FGSM, PGD, and the smallest epsilon at which FGSM succeeds.

With d(x) the direction in which the cross-entropy L(f(x), y) rises steepest in the lp norm,

    d(x)    g / ||g||_2 for l2, sign(g) for linf,   g = d L(f(x), y) / d x
    FGSM    D = B(epsilon * d(x))                                       (Goodfellow, Shlens, Szegedy, ICLR 2015)
    PGD     D_k+1 = B(P(D_k + step_size * d(x + D_k)))                  (Madry et al., ICLR 2018)

P leads to the nearest point of the ball ||D||_p <= epsilon and B into the bounds, which never leads out of the ball.

The gradient of L in the logits is (1 - p_y) (q - e_y): p the softmax, q the softmax over all classes but y, e_y one-hot.
Its positive factor does not matter to d and is left out. So d is right, and not zero, also where a net is so confident that
1 - p_y rounds to 0.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from dd_jax.attacks.deepfool import Options, check_arguments, checked_logits, hoist_for_search, next_rows
from dd_jax.closures import ApplyFn, Closure, hoist
from dd_jax.norms import Norm, per_example, project, sample_in_ball, steepest_direction
from dd_jax.types import AttackResult, LogitsFn

Bounds = Sequence[Array | float]

GRID_SPAN = 1000.0  # From the largest epsilon tried down to the smallest: three digits, finer than a pixel's 1/255.


class Ascent(NamedTuple):
    """The state of PGD: how far each example is."""

    perturbation: Float[Array, "batch ..."]
    num_steps: Int[Array, " batch"]
    active: Bool[Array, " batch"]


class Bracket(NamedTuple):
    """The state of the search for epsilon: FGSM fails at `low` and succeeds at `high` (inf: at none that was tried)."""

    low: Float[Array, " batch"]
    high: Float[Array, " batch"]
    num_tried: Int[Array, " batch"]  # of the grid
    num_bisections: Int[Array, " batch"]


def fgsm(
    logits_fn: LogitsFn,
    inputs: Float[Array, "batch ..."],
    labels: Int[Array, " batch"] | None = None,
    *,
    epsilon: float | Float[Array, "..."],
    norm: Norm = "linf",
    bounds: Bounds | None = None,
    freeze: bool = True,
) -> AttackResult:
    """The fast gradient sign method: one step of length epsilon up the cross-entropy, D = epsilon * d(x).

    Args:
      logits_fn: maps (batch, ...) inputs to (batch, classes) logits, row by row.
      inputs: any rank, floating; where there are bounds, within them.
      labels: the classes to leave. None: the predicted ones.
      epsilon: ||D||_p, in the units of the inputs; one number, or one per example. 0 or more.
      norm: "linf" (the method as published) or "l2" (its step along the normalised gradient).
      bounds: (lower, upper), floats or arrays that broadcast to one example: inputs + D stays within. None: no clipping.
      freeze: leave what is misclassified already as it is: zero perturbation, success, zero steps. False: attack every
        example, as adversarial training does.

    Returns:
      AttackResult(perturbation, success, num_steps): success is whether inputs + D is classified differently from its label;
      num_steps is 1, or 0 where frozen. ||D||_p never exceeds epsilon, also not by rounding.

    Edges: where the gradient vanishes (dead net, all logits tied everywhere) or is not finite, the example stays where it is.
    Gradients do not flow through the result. The same as `pgd` with one step of size epsilon.

    Raises:
      ValueError: at trace time, for shapes, types or options that make no sense.
    """
    return pgd(
        logits_fn, inputs, labels, epsilon=epsilon, step_size=epsilon, num_steps=1, norm=norm, bounds=bounds, freeze=freeze
    )


def pgd(
    logits_fn: LogitsFn,
    inputs: Float[Array, "batch ..."],
    labels: Int[Array, " batch"] | None = None,
    *,
    epsilon: float | Float[Array, "..."],
    step_size: float | Float[Array, "..."],
    num_steps: int = 40,
    norm: Norm = "linf",
    bounds: Bounds | None = None,
    key: PRNGKeyArray | None = None,
    freeze: bool = True,
) -> AttackResult:
    """Projected gradient ascent of the cross-entropy within the lp ball of radius epsilon around each input.

        D_k+1 = B(P(D_k + step_size * d(x + D_k)))                 (see the module's docstring)

    Args:
      logits_fn, inputs, labels, norm, bounds: as in `fgsm`.
      epsilon: the radius of the ball, in the units of the inputs; one number, or one per example. 0 or more.
      step_size: the length of a step before the projection, in the same units (not relative to epsilon); one number, or one
        per example. 0 or more.
      num_steps: the largest number of steps.
      key: draws the start D_0 uniformly from the ball, per example by its place in the batch. None: starts at the input.
      freeze: stop each example at the first iterate that is misclassified, so success is judged at *every* iterate. False:
        every example takes all steps, misclassified ones included, and success is judged at the *last* iterate alone.

    Returns:
      AttackResult(perturbation, success, num_steps): success is whether inputs + perturbation is classified differently from
      its label, num_steps how many steps that took; `num_steps` where it did not succeed. ||perturbation||_p never exceeds
      epsilon, also not by rounding.

    Edges: an input that is misclassified already is done (freeze): zero perturbation, success, zero steps, random start or
    not. Where the gradient vanishes or is not finite, no step is taken. Results do not depend on the rest of the batch, and
    an example that has stopped costs nothing more. Gradients do not flow through the result.

    Raises:
      ValueError: at trace time, for shapes, types or options that make no sense.
    """
    options = Options(norm, num_steps)
    check_arguments(inputs, labels, options)
    check_bounds(bounds, inputs)
    inputs = lax.stop_gradient(jnp.asarray(inputs))
    epsilon, step_size = (size_per_example(s, inputs, n) for s, n in ((epsilon, "epsilon"), (step_size, "step_size")))
    labels, right = labels_to_leave(logits_fn, inputs, labels)
    active = right if freeze else jnp.ones_like(right)
    start = jnp.zeros_like(inputs)
    if key is not None:
        drawn = stay_within(sample_in_ball(key, inputs, epsilon, norm), inputs, bounds)
        start = jnp.where(per_example(active, inputs), drawn, start)
    apply_fn, closure, options = hoist_for_search(logits_fn, inputs, options)
    closure = jax.tree.map(lax.stop_gradient, closure)

    def turn(state: Ascent) -> Ascent:
        rows, to = next_rows(jnp.where(state.active, num_steps - state.num_steps, 0), options.rows_per_turn)
        part, before = inputs[rows], state.perturbation[rows]
        predicted, direction = steepest_ascent(apply_fn, closure, part + before, labels[rows], norm)
        after = project(before + per_example(step_size[rows], part) * direction, epsilon[rows], norm)
        moves = (predicted == labels[rows]) | (not freeze)
        after = jnp.where(per_example(moves, part), stay_within(after, part, bounds), before)
        steps = state.num_steps[rows] + moves
        return Ascent(
            state.perturbation.at[to].set(after, mode="drop"),
            state.num_steps.at[to].set(steps, mode="drop"),
            state.active.at[to].set(moves & (steps < num_steps), mode="drop"),
        )

    start = Ascent(start, jnp.zeros_like(labels), active)
    found = lax.while_loop(lambda state: jnp.any(state.active), turn, start)
    success = jnp.argmax(logits_fn(inputs + found.perturbation), axis=-1) != labels
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
    """FGSM with the smallest epsilon that changes each example's class: the perturbations of the paper's rho_inf.

    Success need not be monotonic in epsilon. Per example, a geometric grid from max_epsilon / 1000 to max_epsilon is tried
    upwards to its first success, and the interval below that is bisected. The direction is computed once.

    Args:
      logits_fn, inputs, labels, norm, bounds: as in `fgsm`.
      max_epsilon: the largest epsilon that is tried, in the units of the inputs. More than 0.
      num_grid_points: of the grid, at least 2. A success between two points is seen only if it lasts until the upper one.
      num_bisections: 0 or more; each halves what is left of the interval. With the defaults the result is within 0.03 % of
        the smallest epsilon, and within a millionth of max_epsilon below the grid.

    Returns:
      AttackResult(perturbation, success, num_steps): D = B(epsilon * d(x)) at the epsilon found; num_steps is 1. Where no
      epsilon succeeds: the perturbation of max_epsilon, without success. What is misclassified already is done: zero
      perturbation, success, zero steps. Gradients do not flow through the result.

    Raises:
      ValueError: at trace time, for shapes, types or options that make no sense.
    """
    if not max_epsilon > 0:
        raise ValueError(f"max_epsilon is {max_epsilon}; it must be more than 0.")
    if num_grid_points < 2 or num_bisections < 0:
        raise ValueError(
            f"num_grid_points is {num_grid_points} and num_bisections {num_bisections}; they must be at least 2 and 0."
        )
    line = fgsm_line(logits_fn, inputs, labels, norm, bounds)
    dtype = line.inputs.dtype
    grid = jnp.geomspace(max_epsilon / GRID_SPAN, max_epsilon, num_grid_points, dtype=dtype).at[-1].set(max_epsilon)
    found = lambda state: jnp.isfinite(state.high)
    active = lambda state: line.right & jnp.where(
        found(state), state.num_bisections < num_bisections, state.num_tried < num_grid_points
    )

    def turn(state: Bracket) -> Bracket:
        middle = (state.low + state.high) / 2
        epsilon = jnp.where(found(state), middle, grid[jnp.minimum(state.num_tried, num_grid_points - 1)])
        fooled, going = line.fooled_at(epsilon), active(state)
        return Bracket(
            jnp.where(going & ~fooled, epsilon, state.low),
            jnp.where(going & fooled, epsilon, state.high),
            state.num_tried + (going & ~found(state)),
            state.num_bisections + (going & found(state)),
        )

    nothing, none = jnp.zeros(line.right.shape, dtype), jnp.zeros(line.right.shape, jnp.int32)
    start = Bracket(nothing, nothing + jnp.inf, none, none)
    state = lax.while_loop(lambda state: jnp.any(active(state)), turn, start)
    epsilon = jnp.where(line.right, jnp.where(found(state), state.high, max_epsilon), 0)
    return AttackResult(line.perturbation_at(epsilon), found(state) | ~line.right, line.right.astype(jnp.int32))
