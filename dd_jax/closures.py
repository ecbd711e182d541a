"""Turns a `logits_fn` into a pure function of the arrays it closes over.

A loop with a derivative rule of its own may not close over arrays that are being differentiated, and it runs the net on
fewer rows than the caller's batch. So the function is traced once, at the number of rows that the loop will use, and what
it closes over (parameters, batch statistics, random keys) becomes an explicit argument.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
from jaxtyping import Array

from dd_jax.rewriting import evaluate
from dd_jax.types import LogitsFn

RANDOM_PRIMITIVES = ("random_bits", "threefry2x32", "rng_bit_generator", "rng_uniform", "random_gamma")


class Closure(NamedTuple):
    """What a function closes over: floating arrays, which have gradients, and all others, which have none."""

    parameters: tuple[Array, ...]
    constants: tuple[Array, ...]


ApplyFn = Callable[[Closure, Array], Array]


def hoist(logits_fn: LogitsFn, *shapes: jax.ShapeDtypeStruct, rewrite: bool | None = None) -> tuple[ApplyFn, Closure]:
    """Returns `(apply_fn, closure)` with `apply_fn(closure, inputs) == logits_fn(inputs)` for inputs of these shapes.

    The shapes differ in the number of rows alone. Inputs of another number of rows raise KeyError. `rewrite`: as
    in `dd_jax.rewriting.evaluate`.
    """
    traces = {shape.shape[0]: jax.make_jaxpr(logits_fn)(shape) for shape in shapes}
    values: dict[int, Array] = {id(value): value for trace in traces.values() for value in trace.consts}
    is_parameter = {key: jnp.issubdtype(value.dtype, jnp.inexact) for key, value in values.items()}
    parameters = [key for key in values if is_parameter[key]]
    constants = [key for key in values if not is_parameter[key]]

    def apply_fn(closure: Closure, inputs: Array) -> Array:
        trace = traces[inputs.shape[0]]
        given = dict(zip(parameters + constants, closure.parameters + closure.constants, strict=True))
        here = jex_core.ClosedJaxpr(trace.jaxpr, [given[id(value)] for value in trace.consts])
        (logits,) = evaluate(here, inputs, rewrite=rewrite)
        return logits

    return apply_fn, Closure(tuple(values[key] for key in parameters), tuple(values[key] for key in constants))


def rows_are_interchangeable(logits_fn: LogitsFn, inputs: Array, num_rows: int) -> bool:
    """Whether `logits_fn` can be given any `num_rows` of the inputs in any order and still be the same net.

    It cannot where it draws a random number per row (dropout with one mask per example) or closes over an array with one
    entry per row; it can where one mask serves the whole batch.
    """
    few = jax.ShapeDtypeStruct((num_rows,) + inputs.shape[1:], inputs.dtype)
    try:
        traced_few = jax.make_jaxpr(logits_fn)(few)
    except Exception:  # The whole batch was fine: the function knows its batch size, and may say so as it likes.
        return False
    traced_all = jax.make_jaxpr(logits_fn)(jax.ShapeDtypeStruct(inputs.shape, inputs.dtype))
    shape_few, shape_all = traced_few.out_avals[0].shape, traced_all.out_avals[0].shape
    return shape_few == (num_rows,) + shape_all[1:] and _random_shapes(traced_few) == _random_shapes(traced_all)


def _random_shapes(traced: Any) -> list[tuple[int, ...]]:
    """The shapes of all random draws in a traced function, nested ones included."""
    shapes = []
    jaxpr = getattr(traced, "jaxpr", traced)
    for equation in jaxpr.eqns:
        if equation.primitive.name in RANDOM_PRIMITIVES:
            shapes += [out.aval.shape for out in equation.outvars]
        for inner in jex_core.jaxprs_in_params(equation.params):
            shapes += _random_shapes(inner)
    return shapes
