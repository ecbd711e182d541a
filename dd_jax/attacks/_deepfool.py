"""DeepFool (Moosavi-Dezfooli, Fawzi, Frossard, CVPR 2016), l2 and linf, batched and jit-compiled.

DeepFool repeats one step. At the iterate x it replaces the net by its first-order expansion and
goes to the nearest of the hyperplanes at which another class takes over:

    f_j = logits_j(x) - logits_s(x),   w_j = d f_j / d x    (s: the source class, j: every other)
    j*  = argmin_j |f_j| / ||w_j||_q                              (q: the dual exponent of p)
    r   = |f_j*| / ||w_j*||_q * d,     d = w_j* / ||w_j*||_2 for l2, sign(w_j*) for linf

and stops as soon as the overshot point x_0 + (1 + overshoot) * sum of steps is classified
differently. Steps start from points that are not overshot. (ZiangYan/deepdefense.pytorch does the
same; `gradient_offset` is its `eps`.)

Examples stop after different numbers of steps, so the loop takes its work from a queue, see
`dd_jax.attacks._queue`.
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
    """What is needed to take the same steps again: where each started and between which classes it
    went.
    """

    iterates: Float[Array, "steps batch ..."]  # relative to the inputs
    sources: Int[Array, "steps batch"]
    targets: Int[Array, "steps batch"]


class Search(NamedTuple):
    """The state of the search, and its result. `num_replayable` counts the steps that moved an
    example.
    """

    perturbation: Float[Array, "batch ..."]  # sum of the steps, not overshot
    num_replayable: Int[Array, " batch"]
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
    """Finds a small perturbation that changes each example's class, see the module's docstring for
    the equations.

    Args:
      logits_fn: maps (batch, ...) inputs to (batch, classes) logits, row by row.
      inputs: any rank, floating; the perturbation is in their space.
      labels: the classes to leave. None: the predicted ones, so that every example is attacked. An
        example already classified differently from its label is done: zero perturbation, success,
        zero steps.
      norm: "l2" or "linf", the size that is kept small.
      num_steps: the largest number of steps.
      overshoot: the perturbation returned is (1 + overshoot) times the sum of the steps.
      num_candidates: how many of the classes that are most likely at the clean input take part, the
        source class included (10 is customary for 1000 classes). None: all.
      class_chunk_size: compute the gradients of at most so many classes at a time, one such part
        after another. Less memory, which holds these gradients and what leads to them, the same
        result. None: those of all candidates at once, which is fastest where there is room.
      bounds: (lower, upper), numbers or arrays that broadcast to one example, with or without a
        leading axis of size 1: iterates and results stay within. None: no clipping, as in the
        paper.
      gradient_offset: added to every component of w before its norm is taken; the authors' code
        uses 5e-6 on MNIST and 1e-5 on CIFAR-10. 0 is the clean definition.
      rewrite: False leaves every operation of the net to JAX, slower on a CPU; True and None put
        faster ones in there, None unless the environment says DD_JAX_REWRITE=0.

    Returns:
      AttackResult(perturbation, success, num_steps).

    Edges: where all class gradients vanish (dead net) or two classes tie exactly at the iterate,
      the linear model asks for
    no step: the search stops there, without success, and counts as `num_steps` steps. Non-finite
    steps are not taken. A batch may be empty.

    Gradients do not flow through the result; `dd_jax.signed_margin` is the differentiable quantity.

    Raises:
      ValueError: at trace time, for shapes, types or options that make no sense.
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
    """Runs DeepFool on the active examples until all have stopped; with `record`, keeps what a
    replay needs.
    """
    batch = problem.inputs.shape[0]
    trace = None
    if record:
        classes = jnp.zeros((options.num_steps, batch), jnp.int32)
        trace = Trace(
            jnp.zeros((options.num_steps,) + problem.inputs.shape, problem.inputs.dtype),
            classes,
            classes,
        )
    nobody = jnp.zeros(batch, bool)
    start = Search(
        jnp.zeros_like(problem.inputs), jnp.zeros(batch, jnp.int32), active, nobody, trace
    )

    def turn(state: Search, num_rows: int) -> Search:
        rows, to = next_rows(
            jnp.where(state.active, options.num_steps - state.num_replayable, 0), num_rows
        )
        part = jax.tree.map(lambda x: x[rows], problem)
        before, steps = state.perturbation[rows], state.num_replayable[rows]
        step, source, target = nearest_step(
            apply_fn, closure, move_within(part.inputs + before, bounds), part, options
        )
        after = (
            move_within(part.inputs + before + step, bounds) - part.inputs
            if bounds is not None
            else before + step
        )
        moved = jnp.any(after != before, axis=tuple(range(1, after.ndim)))
        overshot = move_within(part.inputs + (1 + options.overshoot) * after, bounds)
        success = (jnp.argmax(apply_fn(closure, overshot), axis=-1) == part.labels) != part.away
        active = ~success & moved & (steps + 1 < options.num_steps)
        return Search(
            state.perturbation.at[to].set(after, mode="drop"),
            state.num_replayable.at[to].set(steps + moved.astype(steps.dtype), mode="drop"),
            state.active.at[to].set(active, mode="drop"),
            state.success.at[to].set(success, mode="drop"),
            record_step(state.trace, steps, to, before, source, target) if record else None,
        )

    return run_turns(turn, lambda state: jnp.sum(state.active), start, options.turns)


def record_step(
    trace: Trace, steps: Array, to: Array, before: Array, source: Array, target: Array
) -> Trace:
    """Notes a step of some rows: where it started, from which class and to which."""
    return Trace(
        trace.iterates.at[steps, to].set(before, mode="drop"),
        trace.sources.at[steps, to].set(source, mode="drop"),
        trace.targets.at[steps, to].set(target, mode="drop"),
    )
