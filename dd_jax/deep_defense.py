"""Deep Defense (Yan, Guo, Zhang, "Deep Defense: Training DNNs with Improved Adversarial Robustness", NeurIPS 2018).

    signed margin   m = +||D||_p / ||x||_p   if argmax f(x) == y   (D: DeepFool away from y)
                    m = -||D||_p / ||x||_p   if not                (D: DeepFool towards y, from the current prediction)
    penalty         exp(-c m) if right, exp(-d m) if wrong         c = correct_scale, d = wrong_scale
    loss            cross_entropy + lambda * penalty               lambda = penalty_weight

All three are one number per example and differentiable in whatever `logits_fn` closes over and in the inputs. With params
of any JAX library:

    def loss(params):
        per_example, metrics = dd_jax.deep_defense_loss(functools.partial(apply_fn, params), images, labels)
        return per_example.mean()

The gradient goes *through* DeepFool: every step is a function of the weights. It is a rule of its own, since autodiff through
the loop would keep the activations of every step and all classes. Forward, each step leaves only its starting point and the
two classes between which it went. Backward, with r_k(x, weights) the k-th step and g the cotangent of their sum,

    for k = last, ..., first:    weights_bar += (d r_k / d weights)^T g,    g += (d r_k / d x)^T g

each r_k taken again at its starting point for the chosen class alone. Memory does not grow with the steps but for the
starting points. The rule is exact, also for smooth activations; which class is nearest and when to stop are constants.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dd_jax.attacks.deepfool import (
    Options,
    Problem,
    Search,
    check_arguments,
    checked_logits,
    hoist_for_search,
    likely_classes,
    next_rows,
    search,
)
from dd_jax.attacks.linear_step import chosen_step
from dd_jax.closures import ApplyFn, Closure
from dd_jax.norms import Norm, per_example, relative_norm
from dd_jax.types import LogitsFn, Scalar


def signed_margin(
    logits_fn: LogitsFn,
    inputs: Float[Array, "batch ..."],
    labels: Int[Array, " batch"],
    *,
    norm: Norm = "l2",
    num_steps: int = 5,
    overshoot: float = 0.02,
    num_candidates: int | None = None,
    classes_at_once: int | None = None,
    gradient_offset: float = 0.0,
    rewrite: bool | None = None,
) -> Float[Array, " batch"]:
    """How far each example is from being classified differently (right) or rightly (wrong), relative to its size.

        m = +||D||_p / ||x||_p   where argmax f(x) == y, D being DeepFool's perturbation away from y
        m = -||D||_p / ||x||_p   elsewhere, D leading from the current prediction towards y

    Args:
      logits_fn: maps (batch, ...) inputs to (batch, classes) logits, row by row.
      inputs: any rank, floating.
      labels: the true classes, integers below the number of classes.
      norm: "l2" or "linf".
      num_steps, overshoot, num_candidates, classes_at_once, gradient_offset, rewrite: as in `dd_jax.deepfool`. The
        authors train with 5 steps, an overshoot of 0.02 and all classes (10 of 1000 on ImageNet).

    Returns:
      One number per example, dimensionless. Differentiable once, in reverse mode, in the inputs and in whatever `logits_fn`
      closes over.

    Edges, each finite in value and gradient: an example that is never fooled within `num_steps` counts with what its steps
    add up to. Where all class gradients vanish (dead net) or the classes tie exactly, the step is zero, and so is its
    gradient. An all-zero input has margin 0 and gradient 0. Towards the true class there is one candidate only, two classes
    leave one candidate too, and a batch of one example is a batch.

    Differs from the authors' code in one thing: for a misclassified example whose prediction changes on the way, it takes the
    logit difference against the class predicted a step earlier and the gradient against the current one. Here both belong
    to the current one.

    Raises:
      ValueError: at trace time, for shapes, types or options that make no sense.
    """
    options = Options(norm, num_steps, overshoot, gradient_offset, num_candidates, classes_at_once, rewrite=rewrite)
    check_arguments(inputs, labels, options)
    logits = checked_logits(logits_fn, lax.stop_gradient(inputs), labels)
    return _margin(logits_fn, inputs, labels, lax.stop_gradient(logits), options)[0]


def regularizer(
    logits_fn: LogitsFn,
    inputs: Float[Array, "batch ..."],
    labels: Int[Array, " batch"],
    *,
    correct_scale: Scalar = 25.0,
    wrong_scale: Scalar = 5.0,
    norm: Norm = "l2",
    num_steps: int = 5,
    overshoot: float = 0.02,
    num_candidates: int | None = None,
    classes_at_once: int | None = None,
    gradient_offset: float = 0.0,
    rewrite: bool | None = None,
) -> Float[Array, " batch"]:
    """Deep Defense's penalty: large where a small perturbation changes the prediction, or a large one is needed to mend it.

        penalty = exp(-c m) where right, exp(-d m) where wrong       (m: signed_margin, c: correct_scale, d: wrong_scale)

    Right examples lie in (0, 1], wrong ones in [1, inf), capped at the square root of the largest float, beyond which
    the gradient is 0. Choose c so that exp(-c m) is not yet tiny for the examples to be moved. Arguments, edges and errors as in
    `signed_margin`; correct_scale and wrong_scale must not be negative.
    """
    _check_scales(correct_scale=correct_scale, wrong_scale=wrong_scale)
    options = Options(norm, num_steps, overshoot, gradient_offset, num_candidates, classes_at_once, rewrite=rewrite)
    check_arguments(inputs, labels, options)
    logits = lax.stop_gradient(checked_logits(logits_fn, lax.stop_gradient(inputs), labels))
    margin = _margin(logits_fn, inputs, labels, logits, options)[0]
    return _penalty(margin, jnp.argmax(logits, axis=-1) == labels, correct_scale, wrong_scale)


def deep_defense_loss(
    logits_fn: LogitsFn,
    inputs: Float[Array, "batch ..."],
    labels: Int[Array, " batch"],
    *,
    penalty_weight: Scalar = 15.0,
    correct_scale: Scalar = 25.0,
    wrong_scale: Scalar = 5.0,
    norm: Norm = "l2",
    num_steps: int = 5,
    overshoot: float = 0.02,
    num_candidates: int | None = None,
    classes_at_once: int | None = None,
    gradient_offset: float = 0.0,
    rewrite: bool | None = None,
) -> tuple[Float[Array, " batch"], dict[str, Float[Array, " batch"]]]:
    """The training loss of Deep Defense, per example: cross_entropy + penalty_weight * penalty.

    Returns:
      (loss, metrics): loss (batch,), to be averaged by the caller; metrics, one number per example each: "cross_entropy",
      "penalty" (not weighted), "margin", "correct" (1 where the prediction is right) and "num_steps" (DeepFool's).

    The clean logits are computed once and shared. With penalty_weight 0 this is the plain cross-entropy. Arguments, edges and
    errors as in `regularizer`; penalty_weight must not be negative. Defaults are the authors'.
    """
    _check_scales(penalty_weight=penalty_weight, correct_scale=correct_scale, wrong_scale=wrong_scale)
    options = Options(norm, num_steps, overshoot, gradient_offset, num_candidates, classes_at_once, rewrite=rewrite)
    check_arguments(inputs, labels, options)
    logits = checked_logits(logits_fn, inputs, labels)
    cross_entropy = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=-1)[:, 0]
    margin, steps = _margin(logits_fn, inputs, labels, lax.stop_gradient(logits), options)
    correct = jnp.argmax(logits, axis=-1) == labels
    penalty = _penalty(margin, correct, correct_scale, wrong_scale)
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


def _margin(
    logits_fn: LogitsFn, inputs: Array, labels: Array, logits: Array, options: Options
) -> tuple[Float[Array, " batch"], Int[Array, " batch"]]:
    """The signed margin, and the number of steps it took, given the clean logits."""
    inputs, labels = jnp.asarray(inputs), jnp.asarray(labels, jnp.int32)
    correct = jnp.argmax(logits, axis=-1) == labels
    apply_fn, closure, options = hoist_for_search(logits_fn, lax.stop_gradient(inputs), options)
    problem = Problem(inputs, labels, correct, likely_classes(logits, options.num_candidates))
    perturbation, steps = _replayable_search(apply_fn, options, closure, problem)
    size = relative_norm((1 + options.overshoot) * perturbation, inputs, options.norm)
    return jnp.where(correct, size, -size), steps


def _penalty(margin: Array, correct: Array, correct_scale: Scalar, wrong_scale: Scalar) -> Array:
    exponent = -jnp.where(correct, correct_scale, wrong_scale) * margin
    largest = jnp.log(jnp.finfo(margin.dtype).max) / 2
    return jnp.exp(jnp.minimum(exponent, largest.astype(margin.dtype)))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _replayable_search(
    apply_fn: ApplyFn, options: Options, closure: Closure, problem: Problem
) -> tuple[Float[Array, "batch ..."], Int[Array, " batch"]]:
    """The sum of DeepFool's steps and their number, differentiable in the closure and the inputs."""
    everyone = jnp.ones(problem.labels.shape, bool)
    return _sum_and_number_of_steps(search(apply_fn, closure, problem, options, active=everyone), options)


def _sum_and_number_of_steps(found: Search, options: Options) -> tuple[Array, Array]:
    return found.perturbation, jnp.where(found.success, found.num_replayable, options.num_steps)


def _search_and_record(apply_fn: ApplyFn, options: Options, closure: Closure, problem: Problem) -> tuple:
    everyone = jnp.ones(problem.labels.shape, bool)
    found = search(apply_fn, closure, problem, options, active=everyone, record=True)
    return _sum_and_number_of_steps(found, options), (closure, problem.inputs, found.num_replayable, found.trace)


def _replay(apply_fn: ApplyFn, options: Options, residuals: tuple, cotangents: tuple) -> tuple:
    """Pulls the cotangent of the sum of steps back through every step, last step first."""
    closure, inputs, num_replayable, trace = residuals
    start = (num_replayable, cotangents[0], jnp.zeros_like(inputs), jax.tree.map(jnp.zeros_like, closure.parameters))

    def turn(state: tuple) -> tuple:
        remaining, cotangent, inputs_bar, parameters_bar = state
        rows, to = next_rows(remaining, options.rows_per_turn)
        step, valid = remaining[rows] - 1, to < remaining.shape[0]
        iterates = inputs[rows] + trace.iterates[step, rows]
        source, target = trace.sources[step, rows], trace.targets[step, rows]

        def step_of(parameters: tuple, x: Array) -> Array:
            return chosen_step(apply_fn, closure._replace(parameters=parameters), x, source, target, options)

        _, pull_back = jax.vjp(step_of, closure.parameters, iterates)
        parameters_part, x_part = pull_back(jnp.where(per_example(valid, iterates), cotangent[rows], 0))
        return (
            remaining.at[to].add(-1, mode="drop"),
            cotangent.at[to].add(x_part, mode="drop"),
            inputs_bar.at[to].add(x_part, mode="drop"),
            jax.tree.map(jnp.add, parameters_bar, parameters_part),
        )

    _, _, inputs_bar, parameters_bar = lax.while_loop(lambda state: jnp.any(state[0] > 0), turn, start)
    return Closure(parameters_bar, None), Problem(inputs_bar, None, None, None)


_replayable_search.defvjp(_search_and_record, _replay)
