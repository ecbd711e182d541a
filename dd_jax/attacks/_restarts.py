"""What the parts of AutoAttack share: the net on some rows, targets, random keys per example, and
the loop over restarts and targets.

Each part attacks an example in several runs, one after another: one per restart, or one per target
class. An example leaves at the first success, whatever its run, and costs nothing more. All
examples share one work queue, each at its own run and its own step.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key, PRNGKeyArray, Shaped, UInt32

from dd_jax.attacks._arguments import (
    SizeOrSizes,
    check_arguments,
    labels_to_leave,
    one_per_example,
    trace,
)
from dd_jax.attacks._queue import Turns, plan_turns
from dd_jax.norms import (
    LP_NORMS,
    Bounds,
    LpNorm,
    check_bounds,
    check_norm,
    lp_norm,
    per_example,
    project,
    project_within,
    stay_within,
    steepest_direction,
)
from dd_jax.types import AttackResult, LogitsFn, RandomKeys
from dd_jax.xla.closure_convert import Traces

RandomLogitsFn = Callable[[Float[Array, "batch ..."], PRNGKeyArray], Float[Array, "batch classes"]]
"""(inputs, key) -> logits, of a net that draws random numbers."""
RowsFn = Callable[[Array, UInt32[Array, "rows words"], Int[Array, " rows"]], Array]
NET_DRAWS = 2**16
"""The first number of a random net's keys; smaller ones are for starting points."""


class Problem(NamedTuple):
    """What to attack, example by example."""

    inputs: Float[Array, "batch ..."]
    labels: Int[Array, " batch"]
    epsilon: Float[Array, " batch"]
    targets: Int[Array, "batch runs"]  # the classes other than the label, the likeliest first
    keys: UInt32[Array, "batch words"]  # the data of one random key per example


class Found(NamedTuple):
    """What a part of AutoAttack returns, example by example.

    num_queries: how often the net was asked about the example, with or without its gradient.
    """

    perturbation: Float[Array, "batch ..."]
    success: Bool[Array, " batch"]
    num_queries: Int[Array, " batch"]


class Net(NamedTuple):
    """The net that is attacked.

    on_rows: (inputs, data of the random keys, number of the draw) -> logits, on as many rows as a
      turn has; only a random net uses the last two.
    traces: of the net on the whole batch, as it stands, for the first and the last word.
    num_classes: of its logits.
    """

    on_rows: RowsFn
    traces: Traces
    turns: Turns
    num_classes: int
    is_random: bool


def prepare(
    logits_fn: LogitsFn | RandomLogitsFn,
    inputs: Array,
    labels: Array | None,
    *,
    norm: LpNorm,
    epsilon: SizeOrSizes,
    bounds: Bounds | None,
    key: RandomKeys | None,
    is_random: bool = False,
) -> tuple[Net, Problem, Bool[Array, " batch"]]:
    """Checks the arguments; returns the net, the problem, and which examples are right at first.

    Raises:
      ValueError: at trace time, for shapes, types or options that make no sense.
    """
    check_norm(norm, LP_NORMS)
    check_arguments(inputs, labels)
    check_bounds(bounds, inputs)
    inputs = lax.stop_gradient(jnp.asarray(inputs))
    epsilon = one_per_example("epsilon", epsilon, inputs)
    keys = key_data(key, inputs)
    make: Any = partial(random_net, keys=keys) if is_random else fixed_net
    net = make(logits_fn, inputs)
    logits, labels, right = labels_to_leave(net.traces, inputs, labels)
    right &= ~jnp.any(jnp.isnan(logits), axis=-1)
    return net, Problem(inputs, labels, epsilon, targets_of(logits, labels), keys), right


def fixed_net(logits_fn: LogitsFn, inputs: Float[Array, "batch ..."]) -> Net:
    """A net that is a function of its inputs; its weights have no gradient."""
    traces = trace(logits_fn, inputs)
    apply_fn, closure, turns = plan_turns(traces, len(inputs))
    closure = jax.tree.map(lax.stop_gradient, closure)
    on_rows = lambda x, keys, number: apply_fn(closure, x)
    return Net(on_rows, traces, turns, traces.output(len(inputs)).shape[-1], is_random=False)


def random_net(
    logits_fn: RandomLogitsFn, inputs: Float[Array, "batch ..."], keys: UInt32[Array, "batch words"]
) -> Net:
    """A net that draws random numbers: each row by itself, with a key of its own.

    Draw 0 is for the first and the last word.
    """
    one = lambda x, key: logits_fn(x[None], key)[0]
    on_rows = lambda x, keys, number: jax.vmap(one)(x, folded(keys, NET_DRAWS + number))
    first = jnp.zeros(len(inputs), jnp.int32)
    traces = trace(lambda x: on_rows(x, keys, first), inputs)
    num_classes = traces.output(len(inputs)).shape[-1]
    turns = Turns(len(inputs), len(inputs))
    return Net(on_rows, traces, turns, num_classes, is_random=True)


def checked_count(name: str, count: int) -> int:
    """The count. ValueError unless it is 1 or more."""
    if count < 1:
        raise ValueError(f"{name} is {count}; it must be at least 1.")
    return count


def key_data(
    key: RandomKeys | None, inputs: Float[Array, "batch ..."]
) -> UInt32[Array, "batch words"]:
    """One random key per example: those given, or keys of the example's place in the batch."""
    key = jax.random.key(0) if key is None else jnp.asarray(key)
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    if key.shape not in ((), inputs.shape[:1]):
        raise ValueError(
            f"key must be one random key, or one per example: {inputs.shape[:1]}; got shape "
            f"{key.shape}."
        )
    if not key.shape:
        key = jax.vmap(partial(jax.random.fold_in, key))(jnp.arange(inputs.shape[0]))
    return jax.random.key_data(key)


def folded(keys: UInt32[Array, "rows words"], number: Int[Array, " rows"]) -> Key[Array, " rows"]:
    """A fresh key per row for each number."""
    return jax.vmap(lambda data, n: jax.random.fold_in(jax.random.wrap_key_data(data), n))(
        keys, number
    )


def targets_of(
    logits: Float[Array, "batch classes"], labels: Int[Array, " batch"]
) -> Int[Array, "batch others"]:
    """The classes other than the label, those with the largest clean logits first."""
    is_label = jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    order = jnp.argsort(jnp.where(is_label, -jnp.inf, logits), axis=-1, descending=True)
    return order[:, :-1].astype(jnp.int32)


def target_now(problem: Problem, run: Int[Array, " rows"]) -> Int[Array, " rows"]:
    """The target of each row in its run."""
    place = jnp.minimum(run, problem.targets.shape[1] - 1)
    return jnp.take_along_axis(problem.targets, place[:, None], axis=1)[:, 0]


def random_point(
    problem: Problem,
    run: Int[Array, " rows"],
    radius: Float[Array, " rows"],
    norm: LpNorm,
    bounds: Bounds | None,
) -> Float[Array, "rows ..."]:
    """A random perturbation of that lp norm, before bounds: from a uniform draw for linf, and from
    a normal one for l2 and l1, as in the authors' code.

    It depends on the example's key and the run alone.
    """
    inputs = problem.inputs
    shape, dtype = inputs.shape[1:], inputs.dtype
    keys = folded(problem.keys, run)
    if norm == "linf":
        drawn = jax.vmap(lambda key: jax.random.uniform(key, shape, dtype, -1, 1))(keys)
        largest = per_example(lp_norm(drawn, "linf"), drawn)
        drawn = drawn / jnp.where(largest == 0, 1, largest)
        return stay_within(per_example(radius, drawn) * drawn, inputs, bounds)
    drawn = jax.vmap(lambda key: jax.random.normal(key, shape, dtype))(keys)
    if norm == "l1":
        return project_within(drawn, radius, inputs, bounds)
    return on_sphere(drawn, radius, inputs, bounds)


def on_sphere(
    direction: Float[Array, "rows ..."],
    radius: Float[Array, " rows"],
    inputs: Float[Array, "rows ..."],
    bounds: Bounds | None,
) -> Float[Array, "rows ..."]:
    """The perturbation of that l2 norm in that direction, not longer by rounding; then shortened to
    the bounds.
    """
    scaled = per_example(radius, direction) * steepest_direction(direction, "l2")
    return stay_within(project(scaled, radius, "l2"), inputs, bounds)


def asked_again(
    net: Net, problem: Problem, found: Found, right: Bool[Array, " batch"]
) -> AttackResult:
    """The result, whose success is what the net says of it after the attack."""
    logits = net.traces.logits(problem.inputs + found.perturbation)
    fooled = (jnp.argmax(logits, axis=-1) != problem.labels) & ~jnp.any(jnp.isnan(logits), axis=-1)
    return AttackResult(found.perturbation, fooled | ~right, found.num_queries)


def where_rows(
    condition: Bool[Array, " rows"],
    new: Shaped[Array, "rows ..."] | float,
    old: Shaped[Array, "rows ..."] | float,
) -> Shaped[Array, "rows ..."]:
    """new where the condition holds for the row, old elsewhere."""
    num_axes = max(jnp.ndim(new), jnp.ndim(old))
    return jnp.where(condition.reshape(condition.shape + (1,) * (num_axes - 1)), new, old)
