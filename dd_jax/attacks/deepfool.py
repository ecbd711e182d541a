"""DeepFool (Moosavi-Dezfooli, Fawzi, Frossard, CVPR 2016), l2 and linf, batched and jit-compiled.

DeepFool repeats one step. At the iterate x it replaces the net by its first-order expansion and goes to the nearest of the
hyperplanes at which another class takes over:

    f_j = logits_j(x) - logits_s(x),   w_j = d f_j / d x          (s: the source class, j: every other class)
    j*  = argmin_j |f_j| / ||w_j||_q                              (q: the dual exponent of p)
    r   = |f_j*| / ||w_j*||_q * d,     d = w_j* / ||w_j*||_2 for l2, sign(w_j*) for linf

and stops as soon as the overshot point x_0 + (1 + overshoot) * sum of steps is classified differently. Steps start from
points that are not overshot. (ZiangYan/deepdefense.pytorch does the same; `gradient_offset` is its `eps`.)

Examples stop after different numbers of steps. The loop therefore takes its work from a queue: each turn gathers a fixed
number of examples that are still active, whatever step each of them is at, takes one step for each, and puts them back. An
example that has stopped costs nothing more, and one compiled loop body serves all. Results do not depend on it.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dd_jax import canary
from dd_jax.attacks.linear_step import Options, Problem, nearest_step
from dd_jax.closures import ApplyFn, Closure, hoist, rows_are_interchangeable
from dd_jax.norms import Bounds, Norm, check_bounds, check_norm, move_within, per_example
from dd_jax.rewriting import operations
from dd_jax.types import AttackResult, LogitsFn

TURNS_PER_BATCH = {"cpu": 4}  # How many turns of the queue take one step of a whole batch, by backend; measured.
SMALLEST_TURN = {"cpu": 4}  # Fewer rows than this do not fill the device.
DEFAULT_SMALLEST_TURN = 64
LEAST_WORK = {"cpu": 4e7}  # Operations of a turn's forward pass: with fewer, small products run below their speed.
MOST_WORK = {"cpu": 4e9}  # With more, rows only wait for one another.
LAST_TURN_SHARE = 3  # The last, slowest examples share turns of a third of the rows.


class Trace(NamedTuple):
    """What is needed to take the same steps again: where each started and between which classes it went."""

    iterates: Float[Array, "steps batch ..."]  # relative to the inputs
    sources: Int[Array, "steps batch"]
    targets: Int[Array, "steps batch"]


class Search(NamedTuple):
    """The state of the search, and its result. `num_replayable` counts the steps that moved an example."""

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
    classes_at_once: int | None = None,
    bounds: Bounds | None = None,
    gradient_offset: float = 0.0,
    rewrite: bool | None = None,
) -> AttackResult:
    """Finds a small perturbation that changes each example's class, see the module's docstring for the equations.

    Args:
      logits_fn: maps (batch, ...) inputs to (batch, classes) logits, row by row.
      inputs: any rank, floating; the perturbation is in their space.
      labels: the classes to leave. None: the predicted ones, so that every example is attacked. An example already
        classified differently from its label is done: zero perturbation, success, zero steps.
      norm: "l2" or "linf", the size that is kept small.
      num_steps: the largest number of steps.
      overshoot: the perturbation returned is (1 + overshoot) times the sum of the steps.
      num_candidates: how many of the classes that are most likely at the clean input take part, the source class
        included (10 is customary for 1000 classes). None: all.
      classes_at_once: compute the gradients of at most so many classes at a time, one such part after another. Less memory,
        which holds these gradients and what leads to them, the same result. None: those of all candidates at once, which
        is fastest where there is room.
      bounds: (lower, upper), numbers or arrays that broadcast to one example, with or without a leading axis of size 1:
        iterates and results stay within. None: no clipping, as in the paper.
      gradient_offset: added to every component of w before its norm is taken; the authors' code uses 5e-6 on MNIST and 1e-5
        on CIFAR-10. 0 is the clean definition.
      rewrite: False leaves every operation of the net to JAX, slower on a CPU; True and None put faster ones in there,
        None unless the environment says DD_JAX_REWRITE=0.

    Returns:
      AttackResult(perturbation, success, num_steps).

    Edges: where all class gradients vanish (dead net) or two classes tie exactly at the iterate, the linear model asks for
    no step: the search stops there, without success, and counts as `num_steps` steps. Non-finite steps are not taken. A batch
    may be empty.

    Gradients do not flow through the result; `dd_jax.signed_margin` is the differentiable quantity.

    Raises:
      ValueError: at trace time, for shapes, types or options that make no sense.
    """
    options = Options(norm, num_steps, overshoot, gradient_offset, num_candidates, classes_at_once, rewrite=rewrite)
    check_arguments(inputs, labels, options)
    check_bounds(bounds, inputs)
    inputs = lax.stop_gradient(jnp.asarray(inputs))
    logits = lax.stop_gradient(checked_logits(logits_fn, inputs, labels))
    predicted = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    labels = predicted if labels is None else jnp.asarray(labels, jnp.int32)
    active = predicted == labels
    apply_fn, closure, options = hoist_for_search(logits_fn, inputs, options)
    problem = Problem(inputs, labels, active, likely_classes(logits, options.num_candidates))
    closure = jax.tree.map(lax.stop_gradient, closure)
    found = search(apply_fn, closure, problem, options, active=active, bounds=bounds)
    perturbation = (1 + overshoot) * found.perturbation
    if bounds is not None:
        perturbation = jnp.where(per_example(active, inputs), move_within(inputs + perturbation, bounds) - inputs, 0)
    success = found.success | ~active
    return AttackResult(perturbation, success, jnp.where(success, found.num_replayable, num_steps))


def check_arguments(inputs: Array, labels: Array | None, options: Options) -> None:
    """Raises ValueError, at trace time, for shapes, types and options that make no sense; every public function comes here."""
    canary.warn_once()
    check_norm(options.norm)
    if inputs.ndim < 2 or not jnp.issubdtype(inputs.dtype, jnp.floating):
        raise ValueError(
            f"inputs must be a floating batch of shape (batch, ...); got {inputs.dtype}{list(inputs.shape)}. "
            "Convert images to floats and keep a leading batch axis, also for one example."
        )
    _check_sharding(inputs)
    if labels is not None and (labels.shape != inputs.shape[:1] or not jnp.issubdtype(labels.dtype, jnp.integer)):
        raise ValueError(
            f"labels must be integers of shape {inputs.shape[:1]}, one class per example; got {labels.dtype}"
            f"{list(labels.shape)}. Pass class numbers, not one-hot rows."
        )
    if options.num_steps < 1:
        raise ValueError(f"num_steps is {options.num_steps}; it must be at least 1.")
    if options.overshoot < 0:
        raise ValueError(f"overshoot is {options.overshoot}; it must be 0 or more.")
    if options.num_candidates is not None and options.num_candidates < 2:
        raise ValueError(f"num_candidates is {options.num_candidates}; it must be at least 2, or None for all classes.")
    if options.classes_at_once is not None and options.classes_at_once < 1:
        raise ValueError(
            f"classes_at_once is {options.classes_at_once}; it must be at least 1, or None for all candidates at once."
        )


def _check_sharding(inputs: Array) -> None:
    kind = jax.typeof(inputs)
    if any(spec := kind.sharding.spec):
        raise ValueError(
            f"inputs are sharded over explicit axes of a mesh, {spec}; make the mesh with "
            "axis_types=jax.sharding.AxisType.Auto, or divide the batch with jax.shard_map."
        )
    if getattr(getattr(kind, "manual_axis_type", kind), "varying", None) or getattr(kind, "vma", None):
        raise ValueError("inputs are within a jax.shard_map that checks how values vary; give it check_vma=False.")


def checked_logits(logits_fn: LogitsFn, inputs: Float[Array, "batch ..."], labels: Array | None) -> Array:
    """The clean logits; ValueError unless they are floating, one row per example and at least two classes wide."""
    logits = logits_fn(inputs)
    if not hasattr(logits, "ndim"):
        raise ValueError(
            f"logits_fn must return one array, the logits; it returned a {type(logits).__name__}. "
            "Leave out whatever else the net gives, such as its updated state."
        )
    if logits.ndim != 2 or logits.shape[0] != inputs.shape[0] or logits.shape[1] < 2:
        raise ValueError(
            f"logits_fn must return logits of shape ({inputs.shape[0]}, classes) with at least 2 classes for inputs of shape "
            f"{inputs.shape}; it returned {logits.shape}. Flatten the output and keep the batch axis first."
        )
    if not jnp.issubdtype(logits.dtype, jnp.floating):
        raise ValueError(
            f"logits_fn must return floating logits; it returned {logits.dtype}. Class numbers have no gradient."
        )
    return logits


def likely_classes(logits: Float[Array, "batch classes"], num_candidates: int | None) -> Int[Array, "batch others"]:
    """The classes to try besides the predicted one, most likely first."""
    num_candidates = min(num_candidates or logits.shape[-1], logits.shape[-1])
    return lax.top_k(logits, num_candidates)[1][:, 1:].astype(jnp.int32)


def hoist_for_search(logits_fn: LogitsFn, inputs: Array, options: Options) -> tuple[ApplyFn, Closure, Options]:
    """Chooses how many examples share a turn of the queue, and traces the net for that many."""
    batch, backend = inputs.shape[0], jax.default_backend()
    work = operations(jax.make_jaxpr(logits_fn)(inputs).jaxpr)
    num_turns = max(TURNS_PER_BATCH.get(backend, 1), int(work // MOST_WORK.get(backend, math.inf)))
    num_turns = min(num_turns, max(1, int(work // LEAST_WORK.get(backend, 1))))
    num_rows = max(-(-batch // num_turns), SMALLEST_TURN.get(backend, DEFAULT_SMALLEST_TURN))
    if num_rows >= batch or not rows_are_interchangeable(logits_fn, inputs, num_rows):
        num_rows = batch
    last_rows = num_rows if num_rows == batch else max(1, num_rows // LAST_TURN_SHARE)
    if last_rows != num_rows and not rows_are_interchangeable(logits_fn, inputs, last_rows):
        last_rows = num_rows
    shapes = [jax.ShapeDtypeStruct((rows, *inputs.shape[1:]), inputs.dtype) for rows in {num_rows, last_rows}]
    apply_fn, closure = hoist(logits_fn, *shapes, rewrite=options.rewrite)
    return apply_fn, closure, options._replace(rows_per_turn=num_rows, rows_per_last_turn=last_rows)


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
    """Runs DeepFool on the active examples until all have stopped; with `record`, keeps what a replay needs."""
    batch = problem.inputs.shape[0]
    trace = None
    if record:
        classes = jnp.zeros((options.num_steps, batch), jnp.int32)
        trace = Trace(jnp.zeros((options.num_steps,) + problem.inputs.shape, problem.inputs.dtype), classes, classes)
    nobody = jnp.zeros(batch, bool)
    start = Search(jnp.zeros_like(problem.inputs), jnp.zeros(batch, jnp.int32), active, nobody, trace)

    def turn(state: Search, num_rows: int) -> Search:
        rows, to = next_rows(jnp.where(state.active, options.num_steps - state.num_replayable, 0), num_rows)
        part = jax.tree.map(lambda x: x[rows], problem)
        before, steps = state.perturbation[rows], state.num_replayable[rows]
        step, source, target = nearest_step(apply_fn, closure, move_within(part.inputs + before, bounds), part, options)
        after = move_within(part.inputs + before + step, bounds) - part.inputs if bounds is not None else before + step
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

    few = options.rows_per_last_turn if options.rows_per_last_turn < options.rows_per_turn else 0
    state = lax.while_loop(lambda s: jnp.sum(s.active) > few, lambda s: turn(s, options.rows_per_turn), start)
    if few:
        state = lax.while_loop(lambda s: jnp.any(s.active), lambda s: turn(s, few), state)
    return state


def record_step(trace: Trace, steps: Array, to: Array, before: Array, source: Array, target: Array) -> Trace:
    """Notes a step of some rows: where it started, from which class and to which."""
    return Trace(
        trace.iterates.at[steps, to].set(before, mode="drop"),
        trace.sources.at[steps, to].set(source, mode="drop"),
        trace.targets.at[steps, to].set(target, mode="drop"),
    )


def next_rows(priority: Int[Array, " batch"], num_rows: int) -> tuple[Int[Array, " rows"], Int[Array, " rows"]]:
    """Takes the `num_rows` examples of highest priority off the queue.

    Returns the rows to read and the rows to write to. Where fewer than `num_rows` have a positive priority, the rest are
    read but written nowhere (their index is out of range, and the writer drops it).
    """
    batch = priority.shape[0]
    if num_rows == batch:  # Nothing to choose: every row stays where it is.
        return jnp.arange(batch), jnp.where(priority > 0, jnp.arange(batch), batch)
    highest, rows = lax.top_k(priority, num_rows)
    return rows, jnp.where(highest > 0, rows, batch)
