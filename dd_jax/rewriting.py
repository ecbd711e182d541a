"""Replaces operations of a traced net by equal ones whose derivatives are fast on this backend.

Any library's convolution ends up as the same JAX primitive, so doing it here serves nets of every library alike.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from dd_jax.linear import depthwise_convolution, grouped_convolution, matrix_product
from dd_jax.pooling import max_of_windows

MOST_GROUPS = 8  # More groups than this are not worth a convolution each.
MOST_TAPS = 49  # Of a depthwise kernel: each is an elementwise product of its own.
INLINED = ("jit", "pjit", "closed_call", "core_call")
BACKENDS = ("cpu",)  # Where XLA's own derivatives are slow.


def evaluate(jaxpr: jex_core.ClosedJaxpr, *inputs: Array) -> list[Array]:
    """Evaluates a traced function, with this backend's replacements."""
    if jax.default_backend() not in BACKENDS:
        return jex_core.jaxpr_as_fun(jaxpr)(*inputs)
    return _evaluate(jaxpr.jaxpr, jaxpr.consts, inputs)


def _evaluate(jaxpr: jex_core.Jaxpr, constants: Sequence[Any], inputs: Sequence[Any]) -> list[Any]:
    values: dict[jex_core.Var, Any] = dict(zip(jaxpr.constvars, constants, strict=True))
    values.update(zip(jaxpr.invars, inputs, strict=True))
    read = lambda atom: atom.val if isinstance(atom, jex_core.Literal) else values[atom]
    for equation in jaxpr.eqns:
        arguments = [read(atom) for atom in equation.invars]
        values.update(zip(equation.outvars, _apply(equation, arguments), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _apply(equation: jex_core.JaxprEqn, arguments: list[Any]) -> Sequence[Any]:
    name, params = equation.primitive.name, equation.params
    if name in INLINED:
        inner = params.get("jaxpr") or params["call_jaxpr"]
        return _evaluate(inner.jaxpr, inner.consts, arguments)
    if name in CONTROL_FLOW:
        return CONTROL_FLOW[name](params, *arguments)
    replacement = REPLACEMENTS.get(name)
    if replacement is not None and (result := replacement(params, *arguments)) is not None:
        return [result]
    bound = equation.primitive.get_bind_params(params)
    functions, parameters = bound if isinstance(bound, tuple) else ((), bound)  # A pair before jax 0.10.
    with equation.ctx.manager:
        results = equation.primitive.bind(*functions, *arguments, **parameters)
    return results if equation.primitive.multiple_results else [results]


def operations(jaxpr: jex_core.Jaxpr) -> float:
    """Floating-point operations of the convolutions and matrix products in a traced function, those of inner ones included."""
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        inner = sum(operations(getattr(part, "jaxpr", part)) for part in jex_core.jaxprs_in_params(params))
        total += inner * (params["length"] if name == "scan" else 1)
        if name == "conv_general_dilated":
            kernel = equation.invars[1].aval
            num_outputs = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
            total += 2 * equation.outvars[0].aval.size * kernel.size / num_outputs
        elif name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            total += (
                2
                * equation.outvars[0].aval.size
                * math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            )
    return total


def _convolution(params: dict[str, Any], x: Array, kernel: Array) -> Array | None:
    """The convolution in the plain form, over one or two axes; None for three, and for groups of a few channels each."""
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    (n, c, *space), (o, i, *window) = numbers.lhs_spec, numbers.rhs_spec
    depthwise = groups == x.shape[c] and math.prod(kernel.shape[axis] for axis in window) <= MOST_TAPS
    if (
        not _is_plain(params, x, kernel)
        or len(space) not in (1, 2)
        or params["batch_group_count"] != 1
        or (groups > MOST_GROUPS and not depthwise)
    ):
        return None
    x, kernel = x.transpose(n, *space, c), kernel.transpose(*window, i, o)
    added = 2 - len(space)  # One axis becomes two, the first of them one pixel long.
    x, kernel = jnp.expand_dims(x, range(1, 1 + added)), jnp.expand_dims(kernel, range(added))
    strides, padding = (1,) * added + params["window_strides"], ((0, 0),) * added + tuple(params["padding"])
    x = _spread(x, (1, *(1,) * added, *params["lhs_dilation"], 1))
    kernel = _spread(kernel, (*(1,) * added, *params["rhs_dilation"], 1, 1))
    if groups > MOST_GROUPS:
        y = depthwise_convolution(x, kernel, strides, padding)
    else:
        y = grouped_convolution(x, kernel, strides, padding, groups)
    y = y.reshape(y.shape[0], *y.shape[1 + added :])
    out_n, out_c, *out_space = numbers.out_spec
    order = {out_n: 0, out_c: y.ndim - 1} | {axis: 1 + place for place, axis in enumerate(out_space)}
    return y.transpose(*(order[axis] for axis in range(y.ndim)))


def _is_plain(params: dict[str, Any], x: Array, y: Array) -> bool:
    """Whether a product's operands and its result are all of one floating type."""
    same = x.dtype == y.dtype and params["preferred_element_type"] in (None, x.dtype)
    return same and jnp.issubdtype(x.dtype, jnp.floating)


def _spread(x: Array, dilation: Sequence[int]) -> Array:
    """x with `dilation - 1` zeros between its elements, along each axis."""
    if set(dilation) == {1}:
        return x
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, gap - 1) for gap in dilation])


def _matrix_product(params: dict[str, Any], x: Array, weights: Array) -> Array | None:
    """The product of a batch of rows with a matrix of weights; None for any other contraction."""
    is_product = x.ndim == 2 and weights.ndim == 2 and params["dimension_numbers"] == (((1,), (0,)), ((), ()))
    return matrix_product(x, weights) if is_product and _is_plain(params, x, weights) else None


def _max_pool(params: dict[str, Any], x: Array) -> Array | None:
    """The maximum over square windows of two axes; None for other windows and for dilations."""
    windowed = [axis for axis, size in enumerate(params["window_dimensions"]) if size > 1]
    shapes = {(params["window_dimensions"][axis], params["window_strides"][axis]) for axis in windowed}
    dilations = set(params["base_dilation"]) | set(params["window_dilation"])
    if (
        x.ndim != 4
        or len(windowed) != 2
        or len(shapes) != 1
        or dilations != {1}
        or not jnp.issubdtype(x.dtype, jnp.floating)
    ):
        return None
    others = [axis for axis in range(4) if axis not in windowed]
    if any(params["window_strides"][axis] != 1 or params["padding"][axis] != (0, 0) for axis in others):
        return None
    (window, stride), order = shapes.pop(), (others[0], *windowed, others[1])
    edges = [params["padding"][axis] for axis in windowed]
    counts = [(x.shape[axis] + sum(edge) - window) // stride + 1 for axis, edge in zip(windowed, edges, strict=True)]
    pooled = max_of_windows(x.transpose(order), window, stride, tuple(start for start, _ in edges), tuple(counts))
    return pooled.transpose(*(order.index(axis) for axis in range(4)))


def _checkpoint(params: dict[str, Any], *arguments: Array) -> Sequence[Array]:
    inner = lambda *inputs: _evaluate(params["jaxpr"], (), inputs)
    return jax.checkpoint(inner, prevent_cse=params["prevent_cse"], policy=params["policy"])(*arguments)


def _scan(params: dict[str, Any], *arguments: Array) -> Sequence[Array]:
    inner, num_carry, first = params["jaxpr"], params["num_carry"], params["num_consts"]
    constants, carry, slices = arguments[:first], arguments[first : first + num_carry], arguments[first + num_carry :]

    def body(carry: Sequence[Array], slices: Sequence[Array]) -> tuple[Sequence[Array], Sequence[Array]]:
        results = _evaluate(inner.jaxpr, inner.consts, [*constants, *carry, *slices])
        return results[:num_carry], results[num_carry:]

    options = {name: params[name] for name in ("length", "reverse", "unroll")}
    carry, stacked = lax.scan(body, list(carry), list(slices), **options)
    return [*carry, *stacked]


def _cond(params: dict[str, Any], index: Array, *arguments: Array) -> Sequence[Array]:
    branches = [lambda *inputs, b=branch: _evaluate(b.jaxpr, b.consts, inputs) for branch in params["branches"]]
    return lax.switch(index, branches, *arguments)


CONTROL_FLOW: dict[str, Callable[..., Sequence[Array]]] = {
    "checkpoint": _checkpoint,
    "remat2": _checkpoint,  # its name up to jax 0.10
    "scan": _scan,
    "cond": _cond,
}
REPLACEMENTS: dict[str, Callable[..., Array | None]] = {
    "conv_general_dilated": _convolution,
    "dot_general": _matrix_product,
    "reduce_window_max": _max_pool,
}
