"""Deep Defense (Yan, Guo, Zhang, "Deep Defense: Training DNNs with Improved Adversarial
Robustness", NeurIPS 2018).

    signed margin   m = +||D||_p / ||x||_p   if argmax f(x) == y   (D: DeepFool, away from y)
                    m = -||D||_p / ||x||_p   if not                (D: from prediction to y)
    penalty         exp(-c m) if right, exp(-d m) if wrong         (others: dd_jax.penalties)
    loss            cross_entropy + lambda * penalty               lambda = penalty_weight

with c = correct_scale, d = wrong_scale. All three are one number per example and differentiable in
whatever `logits_fn` closes over and in the inputs. With params of any JAX library:

    def loss(params):
        logits_fn = functools.partial(apply_fn, params)
        per_example, metrics = dd_jax.deep_defense_loss(logits_fn, images, labels)
        return per_example.mean()

How the gradient of the margin is taken stands in `dd_jax._margin`.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dd_jax._margin import Gradient, check_choices, margin_and_steps
from dd_jax.attacks._arguments import check_arguments, trace
from dd_jax.attacks._deepfool_step import Options
from dd_jax.norms import Norm
from dd_jax.penalties import PenaltyFn, exponential
from dd_jax.types import LogitsFn, Scalar, Solver


def signed_margin(
    logits_fn: LogitsFn,
    inputs: Float[Array, "batch ..."],
    labels: Int[Array, " batch"],
    *,
    norm: Norm = "l2",
    solver: Solver | None = None,
    gradient: Gradient = "through_iterates",
    num_steps: int = 5,
    overshoot: float = 0.02,
    num_candidates: int | None = None,
    class_chunk_size: int | None = None,
    gradient_offset: float = 0.0,
    rewrite: bool | None = None,
) -> Float[Array, " batch"]:
    """How far each example is from being classified differently (right) or rightly (wrong),
    relative to its size.

        m = +||D||_p / ||x||_p   where argmax f(x) == y, D being the perturbation away from y
        m = -||D||_p / ||x||_p   elsewhere, D leading from the current prediction towards y

    Args:
      logits_fn: maps (batch, ...) inputs to (batch, classes) logits, row by row.
      inputs: any rank, floating.
      labels: the true classes, integers below the number of classes.
      norm: "l2" or "linf"; give that of the solver.
      solver: what finds D: any function `solver(logits_fn, inputs, labels) -> AttackResult`. None:
        DeepFool. For wrong examples it is called once more, with the two logits (the largest of the
        other classes, y's) in place of all, to leave the first.
      gradient: "through_iterates", the exact derivative of DeepFool's steps, or "at_boundary", the
        implicit derivative at the point that the solver found; equations in `dd_jax._margin`.
      num_steps, overshoot, num_candidates, class_chunk_size, gradient_offset, rewrite: of DeepFool,
        as in `dd_jax.deepfool`. The authors train with 5 steps, an overshoot of 0.02 and all
        classes (10 of 1000 on ImageNet). A solver of your own has its own options.

    Returns:
      One number per example, dimensionless. Differentiable once, in reverse mode, in the inputs and
      in whatever `logits_fn` closes over.

    Edges, each finite in value and gradient: an example that is never fooled within `num_steps`
    counts with what its steps add up to; its gradient at the boundary is that at the point reached.
    Where all class gradients vanish (dead net) or the classes tie exactly, the step is zero, and so
    is its gradient. An all-zero input has margin 0 and gradient 0. Towards the true class there is
    one candidate only, two classes leave one candidate too, and a batch of one example is a batch.

    Differs from the authors' code in one thing: for a misclassified example whose prediction
    changes on the way, it takes the logit difference against the class predicted a step earlier and
    the gradient against the current one. Here both belong to the current one.

    Raises:
      ValueError: at trace time, for shapes, types or options that make no sense; for a solver of
        your own with gradient "through_iterates".
    """
    options = Options(norm, num_steps, overshoot, gradient_offset, num_candidates, class_chunk_size)
    options = options._replace(rewrite=rewrite)
    check_arguments(inputs, labels, norm, num_steps)
    check_choices(options, solver, gradient)
    traces = trace(logits_fn, inputs)
    logits = traces.logits(lax.stop_gradient(inputs))
    return margin_and_steps(traces, inputs, labels, logits, options, solver, gradient)[0]


def regularizer(
    logits_fn: LogitsFn,
    inputs: Float[Array, "batch ..."],
    labels: Int[Array, " batch"],
    *,
    penalty_fn: PenaltyFn = exponential,
    correct_scale: Scalar | None = None,
    wrong_scale: Scalar | None = None,
    norm: Norm = "l2",
    solver: Solver | None = None,
    gradient: Gradient = "through_iterates",
    num_steps: int = 5,
    overshoot: float = 0.02,
    num_candidates: int | None = None,
    class_chunk_size: int | None = None,
    gradient_offset: float = 0.0,
    rewrite: bool | None = None,
) -> Float[Array, " batch"]:
    """Deep Defense's penalty: large where a small perturbation changes the prediction, or a large
    one is needed to correct it.

        penalty = penalty_fn(m, correct),    m = signed_margin(...)

    Args:
      penalty_fn: what a margin costs; one of `dd_jax.penalties`, or your own. The default is
        exp(-c m) where right and exp(-d m) where wrong.
      correct_scale, wrong_scale: c and d, handed to `penalty_fn` if given, 0 or more. None: its own
        defaults, 25 and 5 for the exponential, as the authors'. Choose c so that exp(-c m) is not
        yet tiny for the examples to be moved.

    Other arguments, edges and errors as in `signed_margin`.
    """
    penalty_fn = _with_scales(penalty_fn, correct_scale=correct_scale, wrong_scale=wrong_scale)
    options = Options(norm, num_steps, overshoot, gradient_offset, num_candidates, class_chunk_size)
    options = options._replace(rewrite=rewrite)
    check_arguments(inputs, labels, norm, num_steps)
    check_choices(options, solver, gradient)
    traces = trace(logits_fn, inputs)
    logits = traces.logits(lax.stop_gradient(inputs))
    margin, _ = margin_and_steps(traces, inputs, labels, logits, options, solver, gradient)
    return penalty_fn(margin, jnp.argmax(logits, axis=-1) == labels)


def deep_defense_loss(
    logits_fn: LogitsFn,
    inputs: Float[Array, "batch ..."],
    labels: Int[Array, " batch"],
    *,
    penalty_weight: Scalar = 15.0,
    penalty_fn: PenaltyFn = exponential,
    correct_scale: Scalar | None = None,
    wrong_scale: Scalar | None = None,
    norm: Norm = "l2",
    solver: Solver | None = None,
    gradient: Gradient = "through_iterates",
    num_steps: int = 5,
    overshoot: float = 0.02,
    num_candidates: int | None = None,
    class_chunk_size: int | None = None,
    gradient_offset: float = 0.0,
    rewrite: bool | None = None,
) -> tuple[Float[Array, " batch"], dict[str, Float[Array, " batch"]]]:
    """The training loss of Deep Defense, per example: cross_entropy + penalty_weight * penalty.

    Returns:
      (loss, metrics): loss (batch,), to be averaged by the caller; metrics, one number per example
      each: "cross_entropy", "penalty" (not weighted), "margin", "correct" (1 where the prediction
      is right) and "num_steps" (the solver's).

    The clean logits are computed once and shared. With penalty_weight 0 this is the plain
    cross-entropy. Arguments, edges and errors as in `regularizer`; penalty_weight must not be
    negative. Defaults are the authors'.
    """
    _check_scales(penalty_weight=penalty_weight)
    penalty_fn = _with_scales(penalty_fn, correct_scale=correct_scale, wrong_scale=wrong_scale)
    options = Options(norm, num_steps, overshoot, gradient_offset, num_candidates, class_chunk_size)
    options = options._replace(rewrite=rewrite)
    check_arguments(inputs, labels, norm, num_steps)
    check_choices(options, solver, gradient)
    traces = trace(logits_fn, inputs)
    logits = traces.logits(inputs)
    log_probabilities = jax.nn.log_softmax(logits)
    cross_entropy = -jnp.take_along_axis(log_probabilities, labels[:, None], axis=-1)[:, 0]
    margin, steps = margin_and_steps(traces, inputs, labels, logits, options, solver, gradient)
    correct = jnp.argmax(logits, axis=-1) == labels
    penalty = penalty_fn(margin, correct)
    metrics = {
        "cross_entropy": cross_entropy,
        "penalty": penalty,
        "margin": margin,
        "correct": correct.astype(logits.dtype),
        "num_steps": steps.astype(logits.dtype),
    }
    return cross_entropy + penalty_weight * penalty, metrics


def _check_scales(**scales: Scalar) -> None:
    for name, value in scales.items():
        if not isinstance(value, jax.core.Tracer) and not value >= 0:
            raise ValueError(f"{name} is {value}; it must be 0 or more.")


def _with_scales(penalty_fn: PenaltyFn, **scales: Scalar | None) -> PenaltyFn:
    given = {name: value for name, value in scales.items() if value is not None}
    _check_scales(**given)
    return partial(penalty_fn, **given) if given else penalty_fn
