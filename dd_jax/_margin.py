"""The signed margin and its two gradients.

The gradient goes *through* DeepFool: every step is a function of the weights. It is a rule of its
own, since autodiff through the loop would keep the activations of every step and all classes.
Forward, each step leaves only its starting point and the two classes between which it went.
Backward, with r_k(x, weights) the k-th step and g the cotangent of their sum,

    for k = last, ..., first:    weights_bar += (d r_k / d weights)^T g,    g += (d r_k / d x)^T g

each r_k taken again at its starting point for the chosen class alone. Memory does not grow with the
steps but for the starting points. The rule is exact, also for smooth activations; which class is
nearest and when to stop are constants.

Any other attack can be the solver that finds D. The gradient is then taken at the boundary point
x_b = x + D that it found (gradient="at_boundary"). With y the label, j the strongest other class at
x_b, phi = z_y - z_j and q the dual exponent of p, the implicit function theorem gives

    d m / d weights = (d phi / d weights)(x_b) / (||grad_x phi(x_b)||_q ||x||_p)

for right and wrong examples alike (Xu et al., "Exploring and Exploiting Decision Boundary Dynamics
for Adversarial Robustness", ICLR 2023, uses it). It costs one backward pass, and
no memory for steps.
"""

from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dd_jax.attacks._deepfool import Search, likely_classes, search
from dd_jax.attacks._deepfool_step import Options, Problem, check_options, chosen_step
from dd_jax.attacks._queue import next_rows, plan_turns
from dd_jax.norms import Norm, dual_norm, lp_norm, per_example, relative_norm
from dd_jax.types import AttackResult, LogitsFn, Solver
from dd_jax.xla.closure_convert import ApplyFn, Closure, Traces, closure_convert

Gradient = Literal["through_iterates", "at_boundary"]


def check_choices(options: Options, solver: Solver | None, gradient: str) -> None:
    """Raises ValueError for options of DeepFool, or a solver and a gradient, that make no sense."""
    check_options(options)
    if gradient not in get_args(Gradient):
        allowed = " or ".join(map(repr, get_args(Gradient)))
        raise ValueError(f"gradient is {gradient!r}; it must be {allowed}.")
    if solver is not None and gradient == "through_iterates":
        raise ValueError(
            "gradient='through_iterates' is the derivative of DeepFool's steps; with a solver of "
            "your own, give gradient='at_boundary'."
        )


def margin_and_steps(
    traces: Traces,
    inputs: Array,
    labels: Array,
    logits: Array,
    options: Options,
    solver: Solver | None,
    gradient: Gradient,
) -> tuple[Float[Array, " batch"], Int[Array, " batch"]]:
    """The signed margin, and the number of steps it took, given the clean logits."""
    inputs, labels = jnp.asarray(inputs), jnp.asarray(labels, jnp.int32)
    logits = lax.stop_gradient(logits)
    correct = jnp.argmax(logits, axis=-1) == labels
    if solver is not None:
        found = _solved(solver, traces.logits_fn, lax.stop_gradient(inputs), labels)
        apply_fn, closure = closure_convert(traces, len(inputs), rewrite=options.rewrite)
        at = partial(apply_fn, closure)
        size = _size_at_boundary(at, inputs, found.perturbation, labels, correct, options.norm)
        return jnp.where(correct, size, -size), found.num_steps
    apply_fn, closure, turns = plan_turns(traces, len(inputs), options.rewrite)
    options = options._replace(turns=turns)
    problem = Problem(inputs, labels, correct, likely_classes(logits, options.num_candidates))
    if gradient == "through_iterates":
        perturbation, steps = _replayable_search(apply_fn, options, closure, problem)
        size = relative_norm((1 + options.overshoot) * perturbation, inputs, options.norm)
        return jnp.where(correct, size, -size), steps
    frozen = jax.tree.map(lax.stop_gradient, (closure, problem))
    everyone = jnp.ones(labels.shape, bool)
    found = search(apply_fn, *frozen, options, active=everyone)
    perturbation, steps = _sum_and_number_of_steps(found, options)
    everywhere, closure = closure_convert(traces, len(inputs), rewrite=options.rewrite)
    at = partial(everywhere, closure)
    size = _size_at_boundary(at, inputs, perturbation, labels, correct, options.norm)
    return jnp.where(correct, 1, -1) * (1 + options.overshoot) * size, steps


def _solved(solver: Solver, logits_fn: LogitsFn, inputs: Array, labels: Array) -> AttackResult:
    """What the solver finds away from the labels where the net is right, elsewhere towards them.

    Either attack leaves the other's examples alone, as they are classified so already.
    """

    def against(x: Float[Array, "batch ..."]) -> Float[Array, "batch two"]:
        logits = logits_fn(x)
        is_label = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
        of_label = jnp.sum(jnp.where(is_label, logits, 0), axis=-1)
        return jnp.stack([jnp.max(jnp.where(is_label, -jnp.inf, logits), axis=-1), of_label], -1)

    away = solver(logits_fn, inputs, labels)
    towards = solver(against, inputs, jnp.zeros_like(labels))
    both = jax.tree.map(lax.stop_gradient, (away, towards))
    perturbation = both[0].perturbation + both[1].perturbation
    success, steps = away.success & towards.success, jnp.maximum(away.num_steps, towards.num_steps)
    return AttackResult(perturbation, success, steps)


def _size_at_boundary(
    net: LogitsFn,
    inputs: Float[Array, "batch ..."],
    perturbation: Float[Array, "batch ..."],
    labels: Int[Array, " batch"],
    correct: Bool[Array, " batch"],
    norm: Norm,
) -> Float[Array, " batch"]:
    """||perturbation||_p / ||inputs||_p, with the implicit derivative of the distance."""
    perturbation = lax.stop_gradient(perturbation)

    def lead(x: Array) -> Float[Array, " batch"]:
        """phi where the net was right, -phi where it was wrong: positive on the input's side."""
        logits = net(x)
        is_label = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
        others = jnp.max(jnp.where(is_label, -jnp.inf, logits), axis=-1)
        phi = jnp.sum(jnp.where(is_label, logits, 0), axis=-1) - others
        return jnp.where(correct, phi, -phi).astype(x.dtype)

    phi, pull_back = jax.vjp(lead, inputs + perturbation)
    slope = lax.stop_gradient(dual_norm(pull_back(jnp.ones_like(phi))[0], norm))
    is_flat = ~(slope > 0) | ~jnp.isfinite(slope)
    change = jnp.where(is_flat, 0, phi - lax.stop_gradient(phi)) / jnp.where(is_flat, 1, slope)
    distance = lax.stop_gradient(lp_norm(perturbation, norm)) + change
    size = lp_norm(inputs, norm)
    return jnp.where(size == 0, 0, distance / jnp.where(size == 0, 1, size))


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _replayable_search(
    apply_fn: ApplyFn, options: Options, closure: Closure, problem: Problem
) -> tuple[Float[Array, "batch ..."], Int[Array, " batch"]]:
    """The sum of DeepFool's steps and their number, differentiable in the closure and the
    inputs.
    """
    everyone = jnp.ones(problem.labels.shape, bool)
    return _sum_and_number_of_steps(
        search(apply_fn, closure, problem, options, active=everyone), options
    )


def _sum_and_number_of_steps(found: Search, options: Options) -> tuple[Array, Array]:
    return found.perturbation, jnp.where(found.success, found.num_replayable, options.num_steps)


def _search_and_record(
    apply_fn: ApplyFn, options: Options, closure: Closure, problem: Problem
) -> tuple:
    everyone = jnp.ones(problem.labels.shape, bool)
    found = search(apply_fn, closure, problem, options, active=everyone, record=True)
    return _sum_and_number_of_steps(found, options), (
        closure,
        problem.inputs,
        found.num_replayable,
        found.trace,
    )


def _replay(apply_fn: ApplyFn, options: Options, residuals: tuple, cotangents: tuple) -> tuple:
    """Pulls the cotangent of the sum of steps back through every step, last step first."""
    closure, inputs, num_replayable, trace = residuals
    start = (
        num_replayable,
        cotangents[0],
        jnp.zeros_like(inputs),
        jax.tree.map(jnp.zeros_like, closure.parameters),
    )

    def turn(state: tuple) -> tuple:
        remaining, cotangent, inputs_bar, parameters_bar = state
        rows, to = next_rows(remaining, options.turns.num_rows)
        step, valid = remaining[rows] - 1, to < remaining.shape[0]
        iterates = inputs[rows] + trace.iterates[step, rows]
        source, target = trace.sources[step, rows], trace.targets[step, rows]

        def step_of(parameters: tuple, x: Array) -> Array:
            return chosen_step(
                apply_fn, closure._replace(parameters=parameters), x, source, target, options
            )

        _, pull_back = jax.vjp(step_of, closure.parameters, iterates)
        parameters_part, x_part = pull_back(
            jnp.where(per_example(valid, iterates), cotangent[rows], 0)
        )
        return (
            remaining.at[to].add(-1, mode="drop"),
            cotangent.at[to].add(x_part, mode="drop"),
            inputs_bar.at[to].add(x_part, mode="drop"),
            jax.tree.map(jnp.add, parameters_bar, parameters_part),
        )

    _, _, inputs_bar, parameters_bar = lax.while_loop(
        lambda state: jnp.any(state[0] > 0), turn, start
    )
    return Closure(parameters_bar, None), Problem(inputs_bar, None, None, None)


_replayable_search.defvjp(_search_and_record, _replay)
