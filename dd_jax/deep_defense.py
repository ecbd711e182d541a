"""Deep Defense (Yan, Guo, Zhang, "Deep Defense: Training DNNs with Improved Adversarial
Robustness", NeurIPS 2018).

    signed margin   m = +||D||_p / ||x||_p   if argmax f(x) == y   (D: DeepFool, away from y)
                    m = -||D||_p / ||x||_p   if not                (D: from the prediction to y)
    penalty         exp(-c m) if right, exp(-d m) if wrong         (others: dd_jax.penalties)
    loss            cross_entropy + lambda * penalty               lambda = penalty_weight

with c = correct_scale and d = wrong_scale. All three are one number per example, and differentiable
in the inputs and in whatever `logits_fn` closes over. With parameters of any JAX library:

    def loss(params):
        logits_fn = functools.partial(apply_fn, params)
        per_example, metrics = dd_jax.deep_defense_loss(logits_fn, images, labels)
        return per_example.mean()

`dd_jax._margin` describes the gradient of the margin.
"""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dd_jax._margin import Gradient, Method, checked_trace, margin_and_steps
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
    """The signed size of the perturbation that changes the prediction, relative to the input.

        m = +||D||_p / ||x||_p   where argmax f(x) == y, with D the perturbation away from y
        m = -||D||_p / ||x||_p   elsewhere, with D the perturbation from the prediction to y

    Args:
      logits_fn: maps (batch, ...) inputs to (batch, classes) logits, row by row.
      inputs: any rank, floating.
      labels: the true classes, integers below the number of classes.
      norm: "l2" or "linf". With a solver of your own, give the norm that it minimizes.
      solver: the attack that finds D, a function `solver(logits_fn, inputs, labels) ->
        AttackResult`; see `dd_jax.types.Solver`. None: DeepFool. The solver is called twice: once
        for the right examples, and once for the wrong ones with two logits, (the largest of the
        other classes, that of y), from which it must leave class 0. Its perturbations must be
        finite. It gets a net without gradients.
      gradient: "through_iterates", the exact derivative of DeepFool's steps, or "at_boundary", the
        implicit derivative at the point that the solver found; equations in `dd_jax._margin`. A
        solver of your own needs "at_boundary".
      num_steps, overshoot, num_candidates, class_chunk_size, gradient_offset, rewrite: for
        DeepFool, as in `dd_jax.deepfool`. The authors train with 5 steps, an overshoot of 0.02 and
        all classes (10 of 1000 on ImageNet). A solver of your own has its own options.

    Returns:
      One number per example, dimensionless. Differentiable once, in reverse mode, in the inputs and
      in whatever `logits_fn` closes over.

    Edges, all finite in value and gradient: an example that is not fooled within `num_steps` has
    the margin of the sum of its steps; with "at_boundary", its gradient is taken at the point
    reached. If all class gradients vanish (dead net) or the classes tie exactly, the step is zero,
    and so is its gradient. An all-zero input has margin 0 and gradient 0. Towards the true class
    there is one candidate, and with two classes there is one candidate too. A batch of one example
    is a batch.

    One difference from the authors' code: for a misclassified example whose prediction changes
    during the search, they take the logit difference against the class predicted one step earlier,
    and the gradient against the current one. Here both belong to the current one.

    Raises:
      ValueError: at trace time, for wrong shapes, types or options; for a solver of your own with
        gradient "through_iterates".

    Example: x = (2, -1) has the logits -1 and -2.5. The boundary is 1.5 / sqrt(10.25) = 0.469 away,
    and ||x|| is sqrt(5).

    >>> import jax.numpy as jnp
    >>> import dd_jax
    >>> weights = jnp.array([[1.0, -1.0], [3.0, 0.5]])
    >>> logits_fn = lambda x: x @ weights
    >>> inputs = jnp.array([[2.0, -1.0], [2.0, -1.0]])
    >>> margin = dd_jax.signed_margin(logits_fn, inputs, jnp.array([0, 1]), overshoot=0.0)
    >>> [round(float(m), 4) for m in margin]
    [0.2095, -0.2095]
    """
    options = Options(
        norm,
        num_steps,
        overshoot,
        gradient_offset,
        num_candidates,
        class_chunk_size,
        rewrite=rewrite,
    )
    method = Method(options, solver, gradient)
    traces = checked_trace(logits_fn, inputs, labels, method)
    logits = traces.logits(lax.stop_gradient(inputs))
    return margin_and_steps(traces, inputs, labels, logits, method)[0]


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
    """Deep Defense's penalty: large where a small perturbation changes a right prediction, or where
    it takes a large one to correct a wrong prediction.

        penalty = penalty_fn(m, correct),    m = signed_margin(...)

    Args:
      penalty_fn: the penalty of a margin: one of `dd_jax.penalties`, or a function of your own
        `(margin, correct) -> penalty`. The default is exp(-c m) where right and exp(-d m) where
        wrong.
      correct_scale, wrong_scale: c and d, 0 or more, passed on to `penalty_fn` if given. None: its
        own defaults, for the exponential the authors' 25 and 5. Choose c so that exp(-c m) is not
        close to 0 for the examples that matter.

    Other arguments, edges and errors as in `signed_margin`. ValueError also for a scale that
    `penalty_fn` does not take, and for a penalty that is not one number per example.

    Example: a margin of 0.2095 where right, and a penalty function of your own.

    >>> import jax.numpy as jnp
    >>> import dd_jax
    >>> weights = jnp.array([[1.0, -1.0], [3.0, 0.5]])
    >>> logits_fn = lambda x: x @ weights
    >>> inputs, labels = jnp.array([[2.0, -1.0]]), jnp.array([0])
    >>> penalty = dd_jax.regularizer(logits_fn, inputs, labels, correct_scale=2.0, overshoot=0.0)
    >>> round(float(penalty[0]), 4)  # exp(-2 * 0.2095)
    0.6577
    >>> def squared_hinge(margin, correct):
    ...     return jnp.maximum(0, 0.5 - margin) ** 2
    >>> penalty = dd_jax.regularizer(
    ...     logits_fn, inputs, labels, penalty_fn=squared_hinge, overshoot=0.0
    ... )
    >>> round(float(penalty[0]), 4)
    0.0844
    """
    penalty_fn = _with_scales(penalty_fn, correct_scale=correct_scale, wrong_scale=wrong_scale)
    options = Options(
        norm,
        num_steps,
        overshoot,
        gradient_offset,
        num_candidates,
        class_chunk_size,
        rewrite=rewrite,
    )
    method = Method(options, solver, gradient)
    traces = checked_trace(logits_fn, inputs, labels, method)
    logits = traces.logits(lax.stop_gradient(inputs))
    margin, _ = margin_and_steps(traces, inputs, labels, logits, method)
    return _penalty(penalty_fn, margin, jnp.argmax(logits, axis=-1) == labels)


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
      (loss, metrics): loss (batch,), which the caller averages; metrics, one number per example
      each: "cross_entropy", "penalty" (not weighted), "margin", "correct" (1 where the prediction
      is right) and "num_steps" (of the solver).

    The clean logits are computed once and shared. With penalty_weight 0 this is the plain
    cross-entropy. Arguments, edges and errors as in `regularizer`; penalty_weight must be 0 or
    more. The defaults are the authors'.

    Example: one step of gradient descent.

    >>> import functools, jax
    >>> import jax.numpy as jnp
    >>> import dd_jax
    >>> apply_fn = lambda weights, x: x @ weights
    >>> inputs, labels = jnp.array([[2.0, -1.0]]), jnp.array([0])
    >>> @jax.jit
    ... def loss(weights):
    ...     logits_fn = functools.partial(apply_fn, weights)
    ...     per_example, metrics = dd_jax.deep_defense_loss(logits_fn, inputs, labels)
    ...     return per_example.mean()
    >>> weights = jnp.array([[1.0, -1.0], [3.0, 0.5]])
    >>> bool(loss(weights - 0.1 * jax.grad(loss)(weights)) < loss(weights))
    True
    """
    _check_scales(penalty_weight=penalty_weight)
    penalty_fn = _with_scales(penalty_fn, correct_scale=correct_scale, wrong_scale=wrong_scale)
    options = Options(
        norm,
        num_steps,
        overshoot,
        gradient_offset,
        num_candidates,
        class_chunk_size,
        rewrite=rewrite,
    )
    method = Method(options, solver, gradient)
    traces = checked_trace(logits_fn, inputs, labels, method)
    logits = traces.logits(inputs)
    log_probabilities = jax.nn.log_softmax(logits)
    cross_entropy = -jnp.take_along_axis(log_probabilities, labels[:, None], axis=-1)[:, 0]
    margin, steps = margin_and_steps(traces, inputs, labels, logits, method)
    correct = jnp.argmax(logits, axis=-1) == labels
    penalty = _penalty(penalty_fn, margin, correct)
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
    """The penalty function with the scales that are given; ValueError for one that it does not
    take.
    """
    given = {name: value for name, value in scales.items() if value is not None}
    _check_scales(**given)
    if not given:
        return penalty_fn
    parameters = inspect.signature(penalty_fn).parameters.values()
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
    refused = sorted(given.keys() - {parameter.name for parameter in parameters})
    if refused and not takes_all:
        raise ValueError(
            f"penalty_fn does not take {' or '.join(refused)}; leave it out, or give a function "
            "that takes it, such as dd_jax.penalties.exponential."
        )
    return partial(penalty_fn, **given)


def _penalty(
    penalty_fn: PenaltyFn, margin: Float[Array, " batch"], correct: Bool[Array, " batch"]
) -> Float[Array, " batch"]:
    """penalty_fn(margin, correct); ValueError unless it is one number per example."""
    penalty = penalty_fn(margin, correct)
    if jnp.shape(penalty) != margin.shape:
        raise ValueError(
            f"penalty_fn must return one number per example, of shape {margin.shape}; it returned "
            f"shape {jnp.shape(penalty)}. Leave the mean over the batch to the caller."
        )
    return penalty
