"""One step of DeepFool, to the nearest of the linearized class boundaries.

The gradients of the candidate classes are the largest arrays of the search: rows x classes x
activations. With `class_chunk_size` they are computed in parts, and only the nearest class so far
is kept.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from dd_jax.attacks._queue import Turns
from dd_jax.norms import Norm, dual_norm, per_example
from dd_jax.xla.closure_convert import ApplyFn, Closure


class Options(NamedTuple):
    """What is fixed when the search is compiled."""

    norm: Norm = "l2"
    num_steps: int = 50
    overshoot: float = 0.02
    gradient_offset: float = 0.0
    num_candidates: int | None = None
    class_chunk_size: int | None = None
    turns: Turns = Turns(0, 0)
    rewrite: bool | None = None  # as in `dd_jax.xla.rewrite.evaluate`


def check_options(options: Options) -> None:
    """Raises ValueError for options of DeepFool that are out of range."""
    if options.overshoot < 0:
        raise ValueError(f"overshoot is {options.overshoot}; it must be 0 or more.")
    if options.num_candidates is not None and options.num_candidates < 2:
        raise ValueError(
            f"num_candidates is {options.num_candidates}; it must be at least 2, or None for all "
            "classes."
        )
    if options.class_chunk_size is not None and options.class_chunk_size < 1:
        raise ValueError(
            f"class_chunk_size is {options.class_chunk_size}; it must be at least 1, or None for "
            "all candidates at once."
        )


class Problem(NamedTuple):
    """The goal of the search, example by example.

    Where `away` is true: leave class `labels` for any of `candidates`. Elsewhere: reach class
    `labels` from the class that is predicted at the iterate.
    """

    inputs: Float[Array, "batch ..."]
    labels: Int[Array, " batch"]
    away: Bool[Array, " batch"]
    candidates: Int[Array, "batch others"]


class Nearest(NamedTuple):
    """The nearest of some linearized boundaries."""

    distance: Float[Array, " rows"]  # in the norm of the search; inf if there is no boundary
    difference: Float[Array, " rows"]  # of the logits
    gradient: Float[Array, "rows ..."]  # of that difference
    target: Int[Array, " rows"]


def nearest_step(
    apply_fn: ApplyFn,
    closure: Closure,
    iterates: Float[Array, "rows ..."],
    part: Problem,
    options: Options,
) -> tuple[Float[Array, "rows ..."], Int[Array, " rows"], Int[Array, " rows"]]:
    """Returns the step to the nearest linearized boundary, the class it leaves and the class it
    aims at, for each row.
    """
    logits, pull_back = jax.vjp(lambda x: apply_fn(closure, x), iterates)
    source = jnp.where(part.away, part.labels, jnp.argmax(logits, axis=-1).astype(jnp.int32))
    targets = jnp.where(part.away, part.candidates.T, part.labels)  # (others, rows)
    among = partial(_nearest_among, logits, pull_back, source, options)
    nearest = _nearest_of_parts(among, targets, options.class_chunk_size)
    step = linearized_step(nearest.difference, nearest.gradient, options)
    return jnp.where(jnp.isfinite(step), step, 0), source, nearest.target


def _nearest_among(
    logits: Float[Array, "rows classes"],
    pull_back: Callable[[Array], tuple[Array]],
    source: Int[Array, " rows"],
    options: Options,
    targets: Int[Array, "some rows"],
) -> Nearest:
    """The nearest of the linearized boundaries between the source class and the targets.

    pull_back: maps a cotangent of the logits to a tuple of one, the cotangent of the iterates.
    """
    one_hot = lambda classes: jax.nn.one_hot(classes, logits.shape[-1], dtype=logits.dtype)
    pick = lambda classes: jnp.take_along_axis(logits, classes[..., None], axis=-1)[..., 0]
    (gradients,) = jax.vmap(pull_back)(one_hot(targets) - one_hot(source)[None])
    differences = jax.vmap(pick)(targets) - pick(source)[None]
    sizes = dual_norm(gradients + options.gradient_offset, options.norm, num_leading=2)
    distances = jnp.abs(differences) / sizes
    distances = jnp.where(jnp.isfinite(distances), distances, jnp.inf)
    nearest, row = jnp.argmin(distances, axis=0), jnp.arange(logits.shape[0])
    take = lambda values: values[nearest, row]
    return Nearest(take(distances), take(differences), take(gradients), take(targets))


def _nearest_of_parts(
    among: Callable[[Array], Nearest],
    targets: Int[Array, "others rows"],
    class_chunk_size: int | None,
) -> Nearest:
    """`among(targets)`, with the targets split into equal parts of at most `class_chunk_size`,
    which are computed one after another.
    """
    num_targets = targets.shape[0]
    num_parts = -(-num_targets // (class_chunk_size or num_targets))
    if num_parts == 1:
        return among(targets)
    size = -(-num_targets // num_parts)
    # A target given again fills the last part. It is never nearer than its first occurrence.
    repeated = targets[:1].repeat(num_parts * size - num_targets, axis=0)
    parts = jnp.concatenate([targets, repeated]).reshape(num_parts, size, -1)
    empty = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(among, parts[0])
    )
    start = empty._replace(distance=jnp.full_like(empty.distance, jnp.inf), target=targets[0])

    def nearer(best: Nearest, targets: Array) -> tuple[Nearest, None]:
        here = among(targets)
        wins = here.distance < best.distance
        return jax.tree.map(lambda a, b: jnp.where(per_example(wins, a), a, b), here, best), None

    return lax.scan(nearer, start, parts)[0]


def linearized_step(
    difference: Float[Array, " rows"], gradient: Float[Array, "rows ..."], options: Options
) -> Float[Array, "rows ..."]:
    """r = |f| / ||w||_q * d, the smallest step in the lp norm to where f + w . r = 0.

    Zero where w is zero. Differentiable in both arguments; at f = 0 the derivative of |f| is taken
    as 0.
    """
    size = dual_norm(gradient + options.gradient_offset, options.norm)
    is_zero = size == 0
    safe_size = jnp.where(is_zero, 1, size)
    length = per_example(jnp.where(is_zero, 0, jnp.abs(difference) / safe_size), gradient)
    direction = (
        jnp.sign(gradient)
        if options.norm == "linf"
        else gradient / per_example(safe_size, gradient)
    )
    # The inputs may have a coarser dtype than the logits.
    return (length * direction).astype(gradient.dtype)


def chosen_step(
    apply_fn: ApplyFn,
    closure: Closure,
    iterates: Float[Array, "rows ..."],
    source: Int[Array, " rows"],
    target: Int[Array, " rows"],
    options: Options,
) -> Float[Array, "rows ..."]:
    """The step from class `source` to class `target`, differentiable in the iterates and the
    closure.
    """

    def total_difference(x: Array) -> tuple[Array, Array]:
        logits = apply_fn(closure, x)
        row = jnp.arange(x.shape[0])
        difference = logits[row, target] - logits[row, source]
        return jnp.sum(difference), difference

    gradient, difference = jax.grad(total_difference, has_aux=True)(iterates)
    return linearized_step(difference, gradient, options)
