"""Turns a `logits_fn` into a pure function of the arrays that it closes over.

A loop with its own derivative rule must not close over arrays that are being differentiated, and it
runs the net on fewer rows than the caller's batch. So the function is traced once for each number
of rows that the loop uses, and the arrays that it closes over (parameters, batch statistics, random
keys) become an explicit argument.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
from jaxtyping import Array

from dd_jax.types import LogitsFn
from dd_jax.xla.rewrite import evaluate

RANDOM_PRIMITIVES = (
    "random_bits",
    "threefry2x32",
    "rng_bit_generator",
    "rng_uniform",
    "random_gamma",
)


class Closure(NamedTuple):
    """The arrays that a function closes over.

    `parameters` are the floating arrays, which have gradients; `constants` are all others.
    """

    parameters: tuple[Array, ...]
    constants: tuple[Array, ...]


ApplyFn = Callable[[Closure, Array], Array]
"""(closure, inputs) -> logits."""


class Traces:
    """A `logits_fn`, traced at most once for each number of rows.

    Tracing a large net takes seconds, and an attack needs up to three sizes: the whole batch, one
    turn of its work queue, and a last, smaller turn.
    """

    def __init__(self, logits_fn: LogitsFn, inputs: Array) -> None:
        self.logits_fn = logits_fn
        self._row_shape, self._dtype = inputs.shape[1:], inputs.dtype
        self._of: dict[int, tuple[jex_core.ClosedJaxpr, Any]] = {}

    def of(self, num_rows: int) -> jex_core.ClosedJaxpr:
        """The trace for this number of rows. Raises whatever `logits_fn` raises."""
        return self._traced(num_rows)[0]

    def output(self, num_rows: int) -> Any:
        """The shapes and dtypes that `logits_fn` returns for this number of rows."""
        return self._traced(num_rows)[1]

    def logits(self, inputs: Array) -> Array:
        """`logits_fn(inputs)`, if that is one array. No operation is replaced."""
        (logits,) = jex_core.jaxpr_as_fun(self.of(inputs.shape[0]))(inputs)
        return logits

    def _traced(self, num_rows: int) -> tuple[jex_core.ClosedJaxpr, Any]:
        if num_rows not in self._of:
            shape = jax.ShapeDtypeStruct((num_rows, *self._row_shape), self._dtype)
            # A function of its own each time: JAX keeps traces by the function's identity, and the
            # weights of a callable object may have changed since.
            trace = jax.make_jaxpr(lambda x: self.logits_fn(x), return_shape=True)
            self._of[num_rows] = trace(shape)
        return self._of[num_rows]


def closure_convert(
    traces: Traces, *sizes: int, rewrite: bool | None = None
) -> tuple[ApplyFn, Closure]:
    """Returns `(apply_fn, closure)` with `apply_fn(closure, inputs) == logits_fn(inputs)`.

    Args:
      traces: of the `logits_fn`.
      *sizes: the numbers of rows that `apply_fn` accepts; it raises KeyError for others.
      rewrite: see `dd_jax.xla.rewrite.evaluate`.
    """
    of = {num_rows: traces.of(num_rows) for num_rows in sizes}
    values: dict[int, Array] = {id(value): value for trace in of.values() for value in trace.consts}
    is_parameter = {key: jnp.issubdtype(value.dtype, jnp.inexact) for key, value in values.items()}
    parameters = [key for key in values if is_parameter[key]]
    constants = [key for key in values if not is_parameter[key]]

    def apply_fn(closure: Closure, inputs: Array) -> Array:
        trace = of[inputs.shape[0]]
        known = closure.parameters + closure.constants
        given = dict(zip(parameters + constants, known, strict=True))
        here = jex_core.ClosedJaxpr(trace.jaxpr, [given[id(value)] for value in trace.consts])
        (logits,) = evaluate(here, inputs, rewrite=rewrite)
        return logits

    pick = lambda keys: tuple(values[key] for key in keys)
    return apply_fn, Closure(pick(parameters), pick(constants))


def rows_are_interchangeable(traces: Traces, batch: int, num_rows: int) -> bool:
    """Whether the net gives a row the same logits among any `num_rows` rows of the batch, in any
    order.

    False if it draws a random number per row (dropout with one mask per example) or closes over an
    array with one entry per row. True if one mask serves the whole batch.
    """
    try:
        few = traces.of(num_rows)
    # The whole batch worked, so the function depends on its batch size. It may raise anything.
    except Exception:
        return False
    everyone = traces.of(batch)
    shape_few, shape_all = few.out_avals[0].shape, everyone.out_avals[0].shape
    same_shape = shape_few == (num_rows,) + shape_all[1:]
    return same_shape and _random_shapes(few) == _random_shapes(everyone)


def _random_shapes(traced: Any) -> list[tuple[int, ...]]:
    """The shapes of all random draws in a traced function, including nested functions."""
    shapes = []
    jaxpr = getattr(traced, "jaxpr", traced)
    for equation in jaxpr.eqns:
        if equation.primitive.name in RANDOM_PRIMITIVES:
            shapes += [out.aval.shape for out in equation.outvars]
        for inner in jex_core.jaxprs_in_params(equation.params):
            shapes += _random_shapes(inner)
    return shapes
