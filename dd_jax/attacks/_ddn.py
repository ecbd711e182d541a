"""Decoupled direction and norm, DDN (Rony, Hafemann, Oliveira, Ben Ayed, Granger, Sabourin,
"Decoupling Direction and Norm for Efficient Gradient-Based L2 Adversarial Attacks and Defenses",
CVPR 2019).

With L the cross-entropy, y the label and D_0 = 0, each of K steps is

    g        = dL(f(x + D_k), y) / dx
    D'       = D_k + a_k g / ||g||_2                         a_k: along half a cosine
    e_k+1    = (1 - c) e_k if x + D_k fools, else (1 + c) e_k
    D_k+1    = B(e_k+1 D' / ||D'||_2)                        B: into the bounds

so the gradient chooses the direction alone, and the radius e follows the boundary. The smallest D_k
that fools is the result.

What differs from the paper: the iterates are not rounded to 256 levels of gray, as inputs need not
be pixels; where the gradient vanishes, no random direction is taken.
"""

import jax
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
    take_steps,
)
from dd_jax.norms import Bounds, check_bounds, per_example, stay_within, steepest_direction
from dd_jax.types import AttackResult, LogitsFn


def ddn(
    logits_fn: LogitsFn,
    inputs: Float[Array, "batch ..."],
    labels: Int[Array, " batch"] | None = None,
    *,
    num_steps: int = 100,
    initial_radius: float = 1.0,
    radius_change: float = 0.05,
    step_size: float = 1.0,
    final_step_size: float = 0.01,
    bounds: Bounds | None = None,
) -> AttackResult:
    """Finds a perturbation of small l2 norm that changes each example's class: equations above.

    Args:
      logits_fn: maps (batch, ...) inputs to (batch, classes) logits, row by row.
      inputs: any rank, floating; within the bounds, if there are any.
      labels: the classes to leave. None: the predicted ones.
      num_steps: K, the same for every example.
      initial_radius: e_0, in the units of the inputs, more than 0. The default is the paper's, for
        images in [0, 1].
      radius_change: c, more than 0 and less than 1: the share by which the radius changes in a
        step.
      step_size, final_step_size: a_0 and a_K, in the units of the inputs, more than 0.
      bounds: (lower, upper), numbers or arrays that broadcast to one example, with or without a
        leading axis of size 1: inputs + perturbation stays within. None: no bounds.

    Returns:
      AttackResult(perturbation, success, num_steps). perturbation: the smallest that fools, of all
      iterates; where none does, the last iterate. success: whether the net does not classify
      inputs + perturbation as the label says. num_steps: steps until the perturbation was found;
      the limit where there was no success.

    Edges: what is misclassified already is done: zero perturbation, success, zero steps. Where all
    gradients vanish (dead net) or are not finite, nothing moves. On affine nets of two classes this
    is the shortest perturbation to 0.2 %; where more classes are near, the cross-entropy leads
    between them, and the result is a few percent longer. A boundary much nearer than the initial
    radius needs more steps: 100 reach radii down to 0.6 % of it. A batch may be empty. Results do
    not depend on the rest of the batch. Gradients do not flow through the result.

    Raises:
      ValueError: at trace time, for shapes, types or options that make no sense.

    >>> import jax.numpy as jnp
    >>> import dd_jax
    >>> weights = jnp.array([[1.0, -1.0], [3.0, 0.5]])
    >>> net = lambda x: x @ weights
    >>> found = dd_jax.attacks.ddn(net, jnp.array([[2.0, -1.0]]))
    >>> bool(found.success[0]), round(float(jnp.linalg.norm(found.perturbation)), 2)
    (True, 0.47)
    """
    check_arguments(inputs, labels, "l2", num_steps)
    check_bounds(bounds, inputs)
    check_positive(
        initial_radius=initial_radius, step_size=step_size, final_step_size=final_step_size
    )
    check_fractions(radius_change=radius_change)
    inputs = lax.stop_gradient(jnp.asarray(inputs))
    traces = trace(logits_fn, inputs)
    _, labels, right = labels_to_leave(traces, inputs, labels)
    problem = make_problem(inputs, labels, bounds, "l2")

    def step(part: Problem, path: Path, view: View) -> tuple[Array, Array]:
        length = half_cosine(step_size, final_step_size, path.num_steps, num_steps, inputs.dtype)
        moved = ascended(path, view, length)
        factor = jnp.where(view.fools, 1 - radius_change, 1 + radius_change)
        radius = jnp.minimum(factor * path.radius, part.largest)
        on_sphere = per_example(radius, moved) * steepest_direction(moved, "l2")
        return stay_within(on_sphere, part.inputs, bounds), radius

    radius = jnp.full(len(inputs), initial_radius, inputs.dtype)
    return take_steps(
        traces, problem, right, radius, unsaturated_loss, step, num_steps=num_steps, norm="l2"
    )


def unsaturated_loss(
    logits: Float[Array, "rows classes"], labels: Int[Array, " rows"]
) -> Float[Array, " rows"]:
    """log sum_j exp(z_j) - z_y over the classes j other than y.

    Its gradient has the direction of the cross-entropy's, and does not vanish where the net is so
    confident that the softmax of y rounds to 1.
    """
    is_label = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    of_label = jnp.sum(jnp.where(is_label, logits, 0), axis=-1)
    return jax.nn.logsumexp(jnp.where(is_label, -jnp.inf, logits), axis=-1) - of_label
