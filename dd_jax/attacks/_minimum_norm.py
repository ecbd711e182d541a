"""What the attacks that look for the smallest perturbation share: the smallest one so far, and the
loop of those that take a fixed number of steps.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dd_jax.attacks._carlini_wagner_problem import leads_of
from dd_jax.attacks._queue import plan_turns, work_off
from dd_jax.norms import Bounds, LpNorm, lp_norm, per_example, stay_within, steepest_direction
from dd_jax.types import AttackResult, LogitsFn, Scalar
from dd_jax.xla.closure_convert import Traces


class Smallest(NamedTuple):
    """The smallest perturbation so far that fools."""

    perturbation: Float[Array, "batch ..."]
    size: Float[Array, " batch"]  # inf as long as none fools
    num_steps: Int[Array, " batch"]  # until it was found


class Problem(NamedTuple):
    """What to attack, example by example."""

    inputs: Float[Array, "batch ..."]
    labels: Int[Array, " batch"]
    largest: Float[Array, " batch"]  # the largest radius to try


class Path(NamedTuple):
    """How far an attack is with each example."""

    perturbation: Float[Array, "batch ..."]
    radius: Float[Array, " batch"]
    smallest: Smallest
    num_steps: Int[Array, " batch"]


class View(NamedTuple):
    """What an attack sees of the net at the current perturbations."""

    fools: Bool[Array, " rows"]
    loss: Float[Array, " rows"]
    gradient: Float[Array, "rows ..."]  # of the loss; zero where it is not finite


LossFn = Callable[[Float[Array, "rows classes"], Int[Array, " rows"]], Float[Array, " rows"]]
StepFn = Callable[[Problem, Path, View], tuple[Float[Array, "rows ..."], Float[Array, " rows"]]]
"""(problem, path, view) -> the next perturbations and the next radii."""


def check_positive(**values: Scalar) -> None:
    """Raises ValueError unless each value is more than 0."""
    for name, value in values.items():
        if not isinstance(value, jax.core.Tracer) and not value > 0:
            raise ValueError(f"{name} is {value}; it must be more than 0.")


def check_fractions(**values: Scalar) -> None:
    """Raises ValueError unless each value is more than 0 and less than 1."""
    for name, value in values.items():
        if not isinstance(value, jax.core.Tracer) and not 0 < value < 1:
            raise ValueError(f"{name} is {value}; it must be more than 0 and less than 1.")


def half_cosine(
    first: Scalar, last: Scalar, step: Int[Array, " rows"], num_steps: int, dtype: jnp.dtype
) -> Float[Array, " rows"]:
    """A schedule that falls from `first`, at step 0, to `last`, at `num_steps`, along half a
    cosine.
    """
    share = (1 + jnp.cos(jnp.pi * step.astype(dtype) / num_steps)) / 2
    return last + (first - last) * share


def make_problem(
    inputs: Float[Array, "batch ..."],
    labels: Int[Array, " batch"],
    bounds: Bounds | None,
    norm: LpNorm,
) -> Problem:
    """The largest radius is that of the box around the input; without bounds, one so large that
    its square is still a float.
    """
    large = float(jnp.finfo(inputs.dtype).max) ** 0.5
    if bounds is None:
        return Problem(inputs, labels, jnp.full(len(inputs), large, inputs.dtype))
    ways = [stay_within(jnp.full_like(inputs, far), inputs, bounds) for far in (-jnp.inf, jnp.inf)]
    largest = lp_norm(jnp.maximum(-ways[0], ways[1]), norm)
    return Problem(inputs, labels, jnp.minimum(largest, large))


def nothing_yet(inputs: Float[Array, "batch ..."]) -> Smallest:
    """Before anything has fooled."""
    batch = inputs.shape[0]
    infinite = jnp.full(batch, jnp.inf, inputs.dtype)
    return Smallest(jnp.zeros_like(inputs), infinite, jnp.zeros(batch, jnp.int32))


def smaller_of(
    best: Smallest, other: Smallest, counts: Bool[Array, " batch"] | bool = True
) -> Smallest:
    """The smaller one, example by example; `best` where the other one does not count."""
    better = counts & (other.size < best.size)
    pick = lambda new, old: jnp.where(per_example(better, new), new, old)
    return jax.tree.map(pick, other, best)


def fools_at(
    logits: Float[Array, "rows classes"], labels: Int[Array, " rows"]
) -> Bool[Array, " rows"]:
    """Whether another class wins, by more than rounding may take back where the net is compiled
    otherwise.
    """
    return jnp.min(leads_of(logits, labels), axis=-1) < 0


def label_and_others(
    logits: Float[Array, "rows classes"], labels: Int[Array, " rows"]
) -> tuple[Float[Array, " rows"], Float[Array, " rows"]]:
    """The logit of the label, and the largest logit of the other classes."""
    is_label = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    of_others = jnp.max(jnp.where(is_label, -jnp.inf, logits), axis=-1)
    return jnp.sum(jnp.where(is_label, logits, 0), axis=-1), of_others


def rival_difference(
    logits: Float[Array, "rows classes"], labels: Int[Array, " rows"]
) -> Float[Array, " rows"]:
    """max_j z_j - z_y over the classes j other than y: positive where another one wins."""
    of_label, of_others = label_and_others(logits, labels)
    return of_others - of_label


def ascended(path: Path, view: View, length: Float[Array, " rows"]) -> Float[Array, "rows ..."]:
    """The perturbation after a step of that l2 length up the loss."""
    direction = steepest_direction(view.gradient, "l2")
    return path.perturbation + per_example(length, direction) * direction


def take_steps(
    traces: Traces,
    problem: Problem,
    right: Bool[Array, " batch"],
    start_radius: Float[Array, " batch"],
    loss_fn: LossFn,
    step_fn: StepFn,
    *,
    num_steps: int,
    norm: LpNorm,
) -> AttackResult:
    """Takes `num_steps` steps from a zero perturbation for each example that is classified rightly.

    Every step looks at the net where the example is, keeps the perturbation if it is the smallest
    that fools, and moves on. The perturbation after the last step counts where none has fooled.
    """
    apply_fn, closure, turns = plan_turns(traces, len(problem.inputs))
    closure = jax.tree.map(lax.stop_gradient, closure)

    step = partial(move_on, partial(apply_fn, closure), loss_fn, step_fn, norm)
    left = lambda path: jnp.where(right, num_steps - path.num_steps, 0)
    zeros, none = jnp.zeros_like(problem.inputs), jnp.zeros_like(problem.labels)
    start = Path(zeros, start_radius, nothing_yet(problem.inputs), none)
    path = work_off(step, problem, start, turns.of_one_size(), left)
    return as_result(traces, problem, right, path.smallest, path.perturbation, num_steps)


def move_on(
    net: LogitsFn, loss_fn: LossFn, step_fn: StepFn, norm: LpNorm, part: Problem, before: Path
) -> Path:
    """One step of some examples."""
    view = look(net, part.inputs + before.perturbation, part.labels, loss_fn)
    size = lp_norm(before.perturbation, norm)
    here = Smallest(before.perturbation, size, before.num_steps)
    smallest = smaller_of(before.smallest, here, view.fools)
    moved = step_fn(part, before._replace(smallest=smallest), view)
    return Path(*moved, smallest, before.num_steps + 1)


def look(
    net: LogitsFn, x: Float[Array, "rows ..."], labels: Int[Array, " rows"], loss_fn: LossFn
) -> View:
    """What an attack sees of the net at x."""

    def total(x: Array) -> tuple[Array, tuple[Array, Array]]:
        logits = net(x)
        loss = loss_fn(logits, labels).astype(x.dtype)
        return jnp.sum(loss), (fools_at(logits, labels), loss)

    gradient, (fools, loss) = jax.grad(total, has_aux=True)(x)
    return View(fools, loss, jnp.where(jnp.isfinite(gradient), gradient, 0))


def as_result(
    traces: Traces,
    problem: Problem,
    right: Bool[Array, " batch"],
    smallest: Smallest,
    last: Float[Array, "batch ..."],
    num_steps: int,
) -> AttackResult:
    """The smallest perturbation that fools, or `last` where none did; success is what the net says
    there.
    """
    found = jnp.isfinite(smallest.size)
    perturbation = jnp.where(per_example(found, last), smallest.perturbation, last)
    logits = traces.logits(problem.inputs + perturbation)
    success = (jnp.argmax(logits, axis=-1) != problem.labels) | ~right
    steps = jnp.where(found & success, smallest.num_steps, num_steps)
    return AttackResult(perturbation, success, jnp.where(right, steps, 0))
