"""The signed margin and its two gradients.

"through_iterates" differentiates DeepFool's steps, each of which is a function of the weights.
Automatic differentiation of the loop would keep the activations of every step and all classes, so
the derivative is a rule of its own. The forward pass keeps, for each step, only its starting point
and the two classes between which it went. With r_k(x, weights) the k-th step and g the cotangent of
the sum of the steps, the backward pass computes

    for k = last, ..., first:    weights_bar += (d r_k / d weights)^T g,    g += (d r_k / d x)^T g

where each r_k is evaluated again at its starting point, for the chosen class alone. Beyond the
starting points, memory does not grow with the number of steps. The rule is exact, also for smooth
activations; the choice of the nearest class and of the last step is treated as constant.

"at_boundary" takes the derivative at the boundary point x_b = x + D, whatever solver found it. With
y the label, j the strongest other class at x_b, phi = z_y - z_j and q the dual exponent of p, the
implicit function theorem gives

    d m / d weights = (d phi / d weights)(x_b) / (||grad_x phi(x_b)||_q ||x||_p)

for right and wrong examples alike (Xu et al., "Exploring and Exploiting Decision Boundary Dynamics
for Adversarial Robustness", ICLR 2023). It needs one backward pass and no memory for steps. It is
exact if x_b is the nearest point of the boundary.
"""

from functools import partial
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dd_jax.attacks._arguments import check_arguments, trace
from dd_jax.attacks._deepfool import Search, Trace, likely_classes, search
from dd_jax.attacks._deepfool_step import Options, Problem, check_options, chosen_step
from dd_jax.attacks._minimum_norm import label_and_others
from dd_jax.attacks._queue import next_rows, plan_turns
from dd_jax.norms import dual_norm, lp_norm, per_example, relative_norm
from dd_jax.types import AttackResult, LogitsFn, Solver
from dd_jax.xla.closure_convert import ApplyFn, Closure, Traces, closure_convert

Gradient = Literal["through_iterates", "at_boundary"]


class Method(NamedTuple):
    """How to compute the margin and its gradient; see `dd_jax.signed_margin`."""

    options: Options
    solver: Solver | None
    gradient: Gradient


def checked_trace(logits_fn: LogitsFn, inputs: Array, labels: Array, method: Method) -> Traces:
    """The net, traced for the whole batch; ValueError for wrong shapes, types or options."""
    options, solver, gradient = method
    check_arguments(inputs, labels, options.norm, options.num_steps)
    check_options(options)
    if gradient not in get_args(Gradient):
        allowed = " or ".join(map(repr, get_args(Gradient)))
        raise ValueError(f"gradient is {gradient!r}; it must be {allowed}.")
    if solver is not None and gradient == "through_iterates":
        raise ValueError(
            "gradient='through_iterates' is the derivative of DeepFool's steps; with a solver of "
            "your own, give gradient='at_boundary'."
        )
    return trace(logits_fn, inputs)


def margin_and_steps(
    traces: Traces,
    inputs: Float[Array, "batch ..."],
    labels: Int[Array, " batch"],
    logits: Float[Array, "batch classes"],
    method: Method,
) -> tuple[Float[Array, " batch"], Int[Array, " batch"]]:
    """The signed margin, and the number of steps of the solver, given the clean logits."""
    inputs, labels = jnp.asarray(inputs), jnp.asarray(labels, jnp.int32)
    logits = lax.stop_gradient(logits)
    correct = jnp.argmax(logits, axis=-1) == labels
    candidates = likely_classes(logits, method.options.num_candidates)
    problem = Problem(inputs, labels, correct, candidates)
    if method.gradient == "through_iterates":
        size, steps = _size_through_iterates(traces, problem, method.options)
    else:
        size, steps = _size_at_boundary(traces, problem, method)
    return jnp.where(correct, size, -size), steps


def _size_through_iterates(
    traces: Traces, problem: Problem, options: Options
) -> tuple[Float[Array, " batch"], Int[Array, " batch"]]:
    """||D||_p / ||x||_p with D from DeepFool, differentiable step by step; and its steps."""
    apply_fn, closure, turns = plan_turns(traces, len(problem.inputs), options.rewrite)
    options = options._replace(turns=turns)
    perturbation, steps = _replayable_search(apply_fn, options, closure, problem)
    overshot = (1 + options.overshoot) * perturbation
    return relative_norm(overshot, problem.inputs, options.norm), steps


def _size_at_boundary(
    traces: Traces, problem: Problem, method: Method
) -> tuple[Float[Array, " batch"], Int[Array, " batch"]]:
    """||D||_p / ||x||_p with the derivative of the distance to the boundary; and the steps.

    DeepFool's perturbation is taken before the overshoot, and the size is scaled instead.
    """
    options, solver, _ = method
    frozen = jax.tree.map(lax.stop_gradient, problem)
    if solver is None:
        perturbation, steps = _deepfool(traces, frozen, options)
        scale = 1 + options.overshoot
    else:
        perturbation, steps = _solve(solver, traces, frozen)
        scale = 1
    distance = _boundary_distance(traces, problem, perturbation, options)
    size = lp_norm(problem.inputs, options.norm)
    return scale * jnp.where(size == 0, 0, distance / jnp.where(size == 0, 1, size)), steps


def _deepfool(traces: Traces, problem: Problem, options: Options) -> tuple[Array, Array]:
    """The sum of DeepFool's steps, not overshot, and their number; without a gradient."""
    apply_fn, closure, turns = plan_turns(traces, len(problem.inputs), options.rewrite)
    closure = jax.tree.map(lax.stop_gradient, closure)
    options = options._replace(turns=turns)
    return _sum_and_number(_search_all(apply_fn, options, closure, problem), options)


def _solve(solver: Solver, traces: Traces, problem: Problem) -> tuple[Array, Array]:
    """The solver's perturbations and steps: away from the label where the net is right, elsewhere
    towards it.

    Each of the two calls is given all examples, and counts for its own.
    """
    inputs, labels, correct, _ = problem
    net = partial(_frozen_logits, traces, inputs)

    def against(x: Float[Array, "batch ..."]) -> Float[Array, "batch two"]:
        if x.shape[0] != labels.shape[0]:
            raise ValueError(
                f"The solver calls the net with {x.shape[0]} rows; towards the labels it must call "
                f"it with the whole batch, {labels.shape[0]} rows in their order."
            )
        of_label, of_others = label_and_others(net(x), labels)
        return jnp.stack([of_others, of_label], axis=-1)

    away = _checked_result(solver(net, inputs, labels), inputs)
    towards = _checked_result(solver(against, inputs, jnp.zeros_like(labels)), inputs)
    away, towards = jax.tree.map(lax.stop_gradient, (away, towards))
    pick = lambda a, b: jnp.where(per_example(correct, a), a, b)
    perturbation = pick(away.perturbation, towards.perturbation)
    return perturbation.astype(inputs.dtype), pick(away.num_steps, towards.num_steps)


def _frozen_logits(traces: Traces, inputs: Array, x: Float[Array, "rows ..."]) -> Array:
    """The net for a solver: traced once per number of rows, without gradients for what it closes
    over.
    """
    if x.shape[1:] != inputs.shape[1:] or x.dtype != inputs.dtype:
        traces = Traces(traces.logits_fn, x)
    apply_fn, closure = closure_convert(traces, x.shape[0], rewrite=False)
    return apply_fn(jax.tree.map(lax.stop_gradient, closure), x)


def _checked_result(found: Any, inputs: Float[Array, "batch ..."]) -> AttackResult:
    """What a solver returned; ValueError unless it is an AttackResult for these inputs."""
    if not isinstance(found, AttackResult):
        raise ValueError(
            f"solver must return a dd_jax.AttackResult; it returned a {type(found).__name__}."
        )
    expected = inputs.shape, inputs.shape[:1], inputs.shape[:1]
    shapes = tuple(map(jnp.shape, found))
    if shapes != expected:
        raise ValueError(
            "solver must return perturbation, success and num_steps of shapes "
            f"{', '.join(map(str, expected))}; it returned {', '.join(map(str, shapes))}."
        )
    return found


def _boundary_distance(
    traces: Traces, problem: Problem, perturbation: Float[Array, "batch ..."], options: Options
) -> Float[Array, " batch"]:
    """||perturbation||_p, with the implicit derivative of the distance to the boundary."""
    inputs, labels, correct, _ = problem
    perturbation = lax.stop_gradient(perturbation)
    apply_fn, closure = closure_convert(traces, len(inputs), rewrite=options.rewrite)

    def lead(x: Array) -> Float[Array, " batch"]:
        """phi where the net was right, -phi where it was wrong: positive on the input's side."""
        of_label, of_others = label_and_others(apply_fn(closure, x), labels)
        phi = of_label - of_others
        return jnp.where(correct, phi, -phi).astype(x.dtype)

    phi, pull_back = jax.vjp(lead, inputs + perturbation)
    slope = lax.stop_gradient(dual_norm(pull_back(jnp.ones_like(phi))[0], options.norm))
    is_flat = ~(slope > 0) | ~jnp.isfinite(slope)
    change = jnp.where(is_flat, 0, phi - lax.stop_gradient(phi)) / jnp.where(is_flat, 1, slope)
    return lax.stop_gradient(lp_norm(perturbation, options.norm)) + change


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _replayable_search(
    apply_fn: ApplyFn, options: Options, closure: Closure, problem: Problem
) -> tuple[Float[Array, "batch ..."], Int[Array, " batch"]]:
    """The sum of DeepFool's steps and their number, differentiable in the closure and the
    inputs.
    """
    return _sum_and_number(_search_all(apply_fn, options, closure, problem), options)


def _search_all(
    apply_fn: ApplyFn, options: Options, closure: Closure, problem: Problem, record: bool = False
) -> Search:
    everyone = jnp.ones(problem.labels.shape, bool)
    return search(apply_fn, closure, problem, options, active=everyone, record=record)


def _sum_and_number(found: Search, options: Options) -> tuple[Array, Array]:
    return found.perturbation, jnp.where(found.success, found.num_replayable, options.num_steps)


def _search_and_record(
    apply_fn: ApplyFn, options: Options, closure: Closure, problem: Problem
) -> tuple:
    found = _search_all(apply_fn, options, closure, problem, record=True)
    residuals = closure, problem.inputs, found.num_replayable, found.trace
    return _sum_and_number(found, options), residuals


class Replay(NamedTuple):
    """The state of the backward pass."""

    remaining: Int[Array, " batch"]  # steps
    cotangent: Float[Array, "batch ..."]  # g
    inputs_bar: Float[Array, "batch ..."]
    parameters_bar: tuple[Array, ...]


def _replay(apply_fn: ApplyFn, options: Options, residuals: tuple, cotangents: tuple) -> tuple:
    """Pulls the cotangent of the sum of steps back through every step, last step first."""
    closure, inputs, num_replayable, trace = residuals
    parameters_bar = jax.tree.map(jnp.zeros_like, closure.parameters)
    start = Replay(num_replayable, cotangents[0], jnp.zeros_like(inputs), parameters_bar)
    step_back = partial(_step_back, apply_fn, options, closure, inputs, trace)
    end = lax.while_loop(lambda state: jnp.any(state.remaining > 0), step_back, start)
    nothing: Any = None  # The cotangent of what has no gradient.
    problem_bar = Problem(end.inputs_bar, nothing, nothing, nothing)
    return Closure(end.parameters_bar, nothing), problem_bar


def _step_back(
    apply_fn: ApplyFn,
    options: Options,
    closure: Closure,
    inputs: Float[Array, "batch ..."],
    trace: Trace,
    state: Replay,
) -> Replay:
    """Pulls the cotangent back through the last remaining step of some rows."""
    rows, to = next_rows(state.remaining, options.turns.num_rows)
    step, valid = state.remaining[rows] - 1, to < len(inputs)
    iterates = inputs[rows] + trace.iterates[step, rows]
    classes = trace.sources[step, rows], trace.targets[step, rows]

    def step_of(parameters: tuple, x: Array) -> Array:
        here = closure._replace(parameters=parameters)
        return chosen_step(apply_fn, here, x, *classes, options)

    _, pull_back = jax.vjp(step_of, closure.parameters, iterates)
    cotangent = jnp.where(per_example(valid, iterates), state.cotangent[rows], 0)
    parameters_part, x_part = pull_back(cotangent)
    return Replay(
        state.remaining.at[to].add(-1, mode="drop"),
        state.cotangent.at[to].add(x_part, mode="drop"),
        state.inputs_bar.at[to].add(x_part, mode="drop"),
        jax.tree.map(jnp.add, state.parameters_bar, parameters_part),
    )


_replayable_search.defvjp(_search_and_record, _replay)
