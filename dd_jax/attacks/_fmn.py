"""The fast minimum-norm attack, FMN (Pintor, Roli, Brendel, Biggio, "Fast Minimum-norm Adversarial
Attacks through Adaptive Norm Constraints", NeurIPS 2021), l1, l2 and linf, untargeted.

With phi(x) = max_j z_j - z_y over the classes j other than the label y, and D_0 = 0, each of K
steps is

    g      = d phi(x + D_k) / dx, without the components that bounds let go no further
    e_k+1  = (1 + c_K) (||D_k||_p + |phi(x + D_k)| / ||g||_q)   as long as nothing fools
             min((1 - c_k) e_k, size of the smallest D so far)  if x + D_k fools
             (1 + c_k) e_k                                      if not
    D_k+1  = B(P(D_k + a_k g / ||g||_2))

q is dual to p. P leads to the nearest point (in l2) of the ball ||D||_p <= e_k+1, and B into the
bounds. a_k and c_k fall along half a cosine. The smallest D_k that fools is the result.

What differs from the paper: D_0 is always 0, and never an input of another class. The factor
1 + c_K in the first line of e is ours: without it, rounding keeps D just short of flat boundaries.
The paper's g has all components. With l1 and bounds it then spends its steps on a few pixels that
are at their bounds already, and finds nothing for some images.
"""

from functools import partial
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dd_jax.attacks._arguments import check_arguments, labels_to_leave, trace
from dd_jax.attacks._minimum_norm import (
    Path,
    Problem,
    View,
    ascended,
    check_fractions,
    check_positive,
    half_cosine,
    make_problem,
    rival_difference,
    take_steps,
)
from dd_jax.norms import (
    LP_NORMS,
    Bounds,
    LpNorm,
    check_bounds,
    check_norm,
    dual_norm,
    lp_norm,
    project,
    stay_within,
)
from dd_jax.types import AttackResult, LogitsFn


class Settings(NamedTuple):
    """What is fixed when the attack is compiled, but for the bounds."""

    norm: LpNorm
    num_steps: int
    radius_changes: tuple[float, float]  # the first and the last
    step_sizes: tuple[float, float]
    bounds: Bounds | None


def fmn(
    logits_fn: LogitsFn,
    inputs: Float[Array, "batch ..."],
    labels: Int[Array, " batch"] | None = None,
    *,
    norm: LpNorm = "l2",
    num_steps: int = 10,
    step_size: float = 1.0,
    final_step_size: float = 0.01,
    radius_change: float = 0.05,
    final_radius_change: float = 0.001,
    bounds: Bounds | None = None,
) -> AttackResult:
    """Finds a perturbation of small l1, l2 or linf norm that changes each example's class:
    equations above.

    Args:
      logits_fn: maps (batch, ...) inputs to (batch, classes) logits, row by row.
      inputs: any rank, floating; within the bounds, if there are any.
      labels: the classes to leave. None: the predicted ones.
      norm: "l1", "l2" or "linf", the size that is kept small.
      num_steps: K, the same for every example. The default is that of the authors' code; 100 give
        smaller perturbations, and find them for more examples.
      step_size, final_step_size: a_0 and a_K, in the units of the inputs, more than 0. The
        defaults are for images in [0, 1].
      radius_change, final_radius_change: c_0 and c_K, more than 0 and less than 1: the share by
        which the radius changes in a step.
      bounds: (lower, upper), numbers or arrays that broadcast to one example, with or without a
        leading axis of size 1: inputs + perturbation stays within. None: no bounds.

    Returns:
      AttackResult(perturbation, success, num_steps). perturbation: the smallest that fools, of all
      iterates; where none does, the last iterate. success: whether the net does not classify
      inputs + perturbation as the label says. num_steps: steps until the perturbation was found;
      the limit where there was no success.

    Edges: what is misclassified already is done: zero perturbation, success, zero steps. Where all
    gradients vanish (dead net) or are not finite, nothing moves. An input at which two classes tie
    exactly may stay where it is, without success. A batch may be empty. Results do
    not depend on the rest of the batch. Gradients do not flow through the result.

    Raises:
      ValueError: at trace time, for shapes, types or options that make no sense.

    >>> import jax.numpy as jnp
    >>> import dd_jax
    >>> weights = jnp.array([[1.0, -1.0], [3.0, 0.5]])
    >>> net = lambda x: x @ weights
    >>> found = dd_jax.attacks.fmn(net, jnp.array([[2.0, -1.0]]), num_steps=100)
    >>> bool(found.success[0]), round(float(jnp.linalg.norm(found.perturbation)), 2)
    (True, 0.47)
    """
    check_norm(norm, LP_NORMS)
    check_arguments(inputs, labels, num_steps=num_steps)
    check_bounds(bounds, inputs)
    check_positive(step_size=step_size, final_step_size=final_step_size)
    check_fractions(radius_change=radius_change, final_radius_change=final_radius_change)
    inputs = lax.stop_gradient(jnp.asarray(inputs))
    traces = trace(logits_fn, inputs)
    _, labels, right = labels_to_leave(traces, inputs, labels)
    problem = make_problem(inputs, labels, bounds, norm)
    radius_changes = (radius_change, final_radius_change)
    step_sizes = (step_size, final_step_size)
    settings = Settings(norm, num_steps, radius_changes, step_sizes, bounds)
    step = partial(next_perturbation, settings)
    radius = jnp.zeros(len(inputs), inputs.dtype)
    return take_steps(
        traces, problem, right, radius, rival_difference, step, num_steps=num_steps, norm=norm
    )


def next_perturbation(
    settings: Settings, part: Problem, path: Path, view: View
) -> tuple[Float[Array, "rows ..."], Float[Array, " rows"]]:
    """D_k+1 and e_k+1."""
    bounds, norm = settings.bounds, settings.norm
    gradient = free_part(view.gradient, path.perturbation, part.inputs, bounds)
    view = view._replace(gradient=gradient)
    cosine = partial(
        half_cosine, step=path.num_steps, num_steps=settings.num_steps, dtype=part.inputs.dtype
    )
    change = cosine(*settings.radius_changes)
    unfound = (1 + settings.radius_changes[1]) * radius_to_boundary(path, view, norm)
    radius = jnp.minimum(next_radius(path, view, change, unfound), part.largest)
    length = cosine(*settings.step_sizes)
    moved = project(ascended(path, view, length), radius, norm)
    return stay_within(moved, part.inputs, bounds), radius


def free_part(
    gradient: Float[Array, "rows ..."],
    perturbation: Float[Array, "rows ..."],
    inputs: Float[Array, "rows ..."],
    bounds: Bounds | None,
) -> Float[Array, "rows ..."]:
    """The gradient without the components along which the bounds let the input go no further."""
    furthest = stay_within(jnp.where(gradient > 0, jnp.inf, -jnp.inf), inputs, bounds)
    return jnp.where(perturbation == furthest, 0, gradient)


def radius_to_boundary(path: Path, view: View, norm: LpNorm) -> Float[Array, " rows"]:
    """||D||_p + |phi| / ||g||_q; inf where the gradient vanishes or is not finite."""
    slope = dual_norm(view.gradient, norm)
    way = jnp.where(slope > 0, jnp.abs(view.loss) / jnp.where(slope > 0, slope, 1), jnp.inf)
    return lp_norm(path.perturbation, norm) + jnp.where(jnp.isnan(way), jnp.inf, way)


def next_radius(
    path: Path, view: View, change: Float[Array, " rows"], unfound: Float[Array, " rows"]
) -> Float[Array, " rows"]:
    """e_k+1, which is `unfound` as long as nothing fools."""
    found = jnp.isfinite(path.smallest.size)
    smaller = jnp.minimum((1 - change) * path.radius, path.smallest.size)
    larger = jnp.where(found, (1 + change) * path.radius, unfound)
    return jnp.where(view.fools, smaller, larger)
