"""DeepFool (Moosavi-Dezfooli, Fawzi, Frossard, CVPR 2016), l2 and linf, batched and jit-compiled.

DeepFool repeats one step. At the iterate x it linearizes the net, and moves to the nearest of the
hyperplanes between the source class and another class:

    f_j = logits_j(x) - logits_s(x),   w_j = d f_j / d x    (s: the source class, j: every other)
    j*  = argmin_j |f_j| / ||w_j||_q                              (q: the dual exponent of p)
    r   = |f_j*| / ||w_j*||_q * d,     d = w_j* / ||w_j*||_2 for l2, sign(w_j*) for linf

It stops when the overshot point x_0 + (1 + overshoot) * sum of steps is classified differently.
Steps start from points that are not overshot, as in ZiangYan/deepdefense.pytorch, whose `eps` is
`gradient_offset` here.

Examples stop after different numbers of steps, so the loop takes its work from a queue
(`dd_jax.attacks._queue`).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dd_jax.attacks._arguments import check_arguments, labels_to_leave, trace
from dd_jax.attacks._deepfool_step import Options, Problem, check_options, nearest_step
from dd_jax.attacks._queue import next_rows, plan_turns, run_turns
from dd_jax.norms import Bounds, Norm, check_bounds, move_within, per_example
from dd_jax.types import AttackResult, LogitsFn
from dd_jax.xla.closure_convert import ApplyFn, Closure


class Trace(NamedTuple):
    """The record of a search, to take its steps again: starting points and classes."""

    iterates: Float[Array, "steps batch ..."]  # relative to the inputs
    sources: Int[Array, "steps batch"]
    targets: Int[Array, "steps batch"]


class Step(NamedTuple):
    """One step of some rows of the batch."""

    perturbation: Float[Array, "rows ..."]  # the sum of the steps up to here, not overshot
    moved: Bool[Array, " rows"]
    success: Bool[Array, " rows"]  # of the overshot point
    source: Int[Array, " rows"]
    target: Int[Array, " rows"]


class Search(NamedTuple):
    """The state of the search, and its result."""

    perturbation: Float[Array, "batch ..."]  # the sum of the steps, not overshot
    num_replayable: Int[Array, " batch"]  # the steps that moved the example
    active: Bool[Array, " batch"]
    success: Bool[Array, " batch"]
    trace: Trace | None


def deepfool(
    logits_fn: LogitsFn,
    inputs: Float[Array, "batch ..."],
    labels: Int[Array, " batch"] | None = None,
    *,
    norm: Norm = "l2",
    num_steps: int = 50,
    overshoot: float = 0.02,
    num_candidates: int | None = None,
    class_chunk_size: int | None = None,
    bounds: Bounds | None = None,
    gradient_offset: float = 0.0,
    rewrite: bool | None = None,
) -> AttackResult:
    """Finds a small perturbation that changes each example's class.

    The equations are in the module's docstring.

    Args:
      logits_fn: maps (batch, ...) inputs to (batch, classes) logits, row by row.
      inputs: any rank, floating; the perturbation is in their space.
      labels: the classes to leave. None: the predicted ones, so that every example is attacked. An
        example that is classified differently from its label already gets a zero perturbation,
        success and zero steps.
      norm: "l2" or "linf", the norm that is kept small.
      num_steps: the largest number of steps.
      overshoot: the result is (1 + overshoot) times the sum of the steps. 0 or more.
      num_candidates: how many of the most likely classes at the clean input are considered, the
        source class included (10 is customary for 1000 classes). None: all.
      class_chunk_size: compute the gradients of at most this many classes at a time. It needs less
        memory, for the gradients and the activations behind them, and gives the same result. None:
        all candidates at once, the fastest if the memory suffices.
      bounds: (lower, upper), numbers or arrays that broadcast to one example, with or without a
        leading axis of size 1. Iterates and results stay within. None: no clipping, as in the
        paper.
      gradient_offset: added to every component of w before its norm is taken; the authors' code
        uses 5e-6 on MNIST and 1e-5 on CIFAR-10. 0 is the definition.
      rewrite: True replaces some operations of the net by faster ones on a CPU, False does not.
        None: True, unless the environment has DD_JAX_REWRITE=0.

    Returns:
      AttackResult(perturbation, success, num_steps).

    Edges: if all class gradients vanish (dead net), or two classes tie exactly at the iterate, the
    linear model gives no step. The search then stops without success and counts as `num_steps`
    steps. Steps that are not finite are not taken. A batch may be empty.

    Gradients do not flow through the result; `dd_jax.signed_margin` is differentiable.

    Raises:
      ValueError: at trace time, for wrong shapes, types or options.

    Example: x = (2, -1) has the logits -1 and -2.5. The boundary is 1.5 / sqrt(10.25) = 0.469 away.

    >>> import jax.numpy as jnp
    >>> import dd_jax
    >>> weights = jnp.array([[1.0, -1.0], [3.0, 0.5]])
    >>> found = dd_jax.deepfool(lambda x: x @ weights, jnp.array([[2.0, -1.0]]), overshoot=0.02)
    >>> bool(found.success[0]), int(found.num_steps[0])
    (True, 1)
    >>> round(float(jnp.linalg.norm(found.perturbation) / 1.02), 3)
    0.469
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
    check_arguments(inputs, labels, norm, num_steps)
    check_options(options)
    check_bounds(bounds, inputs)
    inputs = lax.stop_gradient(jnp.asarray(inputs))
    traces = trace(logits_fn, inputs)
    logits, labels, active = labels_to_leave(traces, inputs, labels)
    apply_fn, closure, turns = plan_turns(traces, len(inputs), rewrite)
    options = options._replace(turns=turns)
    problem = Problem(inputs, labels, active, likely_classes(logits, options.num_candidates))
    closure = jax.tree.map(lax.stop_gradient, closure)
    found = search(apply_fn, closure, problem, options, active=active, bounds=bounds)
    perturbation = (1 + overshoot) * found.perturbation
    if bounds is not None:
        perturbation = jnp.where(
            per_example(active, inputs), move_within(inputs + perturbation, bounds) - inputs, 0
        )
    success = found.success | ~active
    return AttackResult(perturbation, success, jnp.where(success, found.num_replayable, num_steps))


def likely_classes(
    logits: Float[Array, "batch classes"], num_candidates: int | None
) -> Int[Array, "batch others"]:
    """The classes to try besides the predicted one, most likely first."""
    num_candidates = min(num_candidates or logits.shape[-1], logits.shape[-1])
    return lax.top_k(logits, num_candidates)[1][:, 1:].astype(jnp.int32)


def search(
    apply_fn: ApplyFn,
    closure: Closure,
    problem: Problem,
    options: Options,
    *,
    active: Bool[Array, " batch"],
    bounds: Bounds | None = None,
    record: bool = False,
) -> Search:
    """Runs DeepFool on the active examples until all have stopped.

    With `record`, the result's trace holds what is needed to take the same steps again.
    """
    start = _first_state(problem, active, options.num_steps if record else None)

    def turn(state: Search, num_rows: int) -> Search:
        rows, to = next_rows(_num_left(state, options), num_rows)
        part = jax.tree.map(lambda x: x[rows], problem)
        before, steps = state.perturbation[rows], state.num_replayable[rows]
        step = _take_step(apply_fn, closure, part, before, options, bounds)
        active = ~step.success & step.moved & (steps + 1 < options.num_steps)
        num_replayable = steps + step.moved.astype(steps.dtype)
        after = Search(step.perturbation, num_replayable, active, step.success, None)
        trace = _record_step(state.trace, steps, to, before, step)
        state = state._replace(trace=None)
        written = jax.tree.map(lambda x, new: x.at[to].set(new, mode="drop"), state, after)
        return written._replace(trace=trace)

    return run_turns(turn, lambda state: jnp.sum(state.active), start, options.turns)


def _first_state(
    problem: Problem, active: Bool[Array, " batch"], num_recorded: int | None
) -> Search:
    """The state before the first step, with room to record that many steps (None: no record)."""
    inputs, none = problem.inputs, jnp.zeros(active.shape, jnp.int32)
    trace = None
    if num_recorded is not None:
        classes = jnp.zeros((num_recorded, *active.shape), jnp.int32)
        trace = Trace(jnp.zeros((num_recorded, *inputs.shape), inputs.dtype), classes, classes)
    return Search(jnp.zeros_like(inputs), none, active, jnp.zeros(active.shape, bool), trace)


def _num_left(state: Search, options: Options) -> Int[Array, " batch"]:
    """The steps that each example may still take."""
    return jnp.where(state.active, options.num_steps - state.num_replayable, 0)


def _take_step(
    apply_fn: ApplyFn,
    closure: Closure,
    part: Problem,
    before: Float[Array, "rows ..."],
    options: Options,
    bounds: Bounds | None,
) -> Step:
    """One step for some rows, from the sum of the steps `before`, and the test for success."""
    iterates = move_within(part.inputs + before, bounds)
    step, source, target = nearest_step(apply_fn, closure, iterates, part, options)
    after = before + step
    if bounds is not None:
        after = move_within(part.inputs + before + step, bounds) - part.inputs
    moved = jnp.any(after != before, axis=tuple(range(1, after.ndim)))
    overshot = move_within(part.inputs + (1 + options.overshoot) * after, bounds)
    is_label = jnp.argmax(apply_fn(closure, overshot), axis=-1) == part.labels
    return Step(after, moved, is_label != part.away, source, target)


def _record_step(
    trace: Trace | None, steps: Array, to: Array, before: Array, step: Step
) -> Trace | None:
    """Records a step of some rows: its starting point, the class it left and the one it aimed at.

    None where nothing is recorded.
    """
    if trace is None:
        return None
    return Trace(
        trace.iterates.at[steps, to].set(before, mode="drop"),
        trace.sources.at[steps, to].set(step.source, mode="drop"),
        trace.targets.at[steps, to].set(step.target, mode="drop"),
    )
