"""Replaces operations of a traced net by equal ones whose derivatives are fast on this backend.

Any library's convolution ends up as the same JAX primitive, so doing it here serves nets of every
library alike. An equation that is not of a known form (`dd_jax.xla.equation_forms`), or that no
replacement here serves, is left to JAX, whole.

DD_JAX_REWRITE=0 in the environment, or `rewrite=False` where a function takes it, leaves every
equation to JAX.
"""

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from dd_jax.xla.convolution import depthwise_convolution, grouped_convolution, matrix_product
from dd_jax.xla.equation_forms import has_known_form
from dd_jax.xla.pooling import max_of_windows

MOST_GROUPS = 8  # More groups than this are not worth a convolution each.
MOST_TAPS = 49  # Of a depthwise kernel: each is an elementwise product of its own.
BACKENDS = ("cpu",)  # Where XLA's own derivatives are slow.
VARIABLE = "DD_JAX_REWRITE"
PER_AXIS = ("window_strides", "padding", "lhs_dilation", "rhs_dilation")  # of a convolution


def evaluate(
    jaxpr: jex_core.ClosedJaxpr, *inputs: Array, rewrite: bool | None = None
) -> list[Array]:
    """Evaluates a traced function, with this backend's replacements.

    rewrite: whether to replace anything. None: unless the environment says DD_JAX_REWRITE=0.

    Raises ValueError where DD_JAX_REWRITE is neither 0 nor 1.
    """
    if jax.default_backend() in BACKENDS and (
        _environment_allows() if rewrite is None else rewrite
    ):
        return _evaluate(jaxpr, inputs)
    return jex_core.jaxpr_as_fun(jaxpr)(*inputs)


def _environment_allows() -> bool:
    said = os.environ.get(VARIABLE, "1")
    if said not in ("0", "1"):
        raise ValueError(
            f"{VARIABLE} is {said!r}; it must be 0, which leaves every operation to JAX, or 1."
        )
    return said == "1"


def _evaluate(traced: Any, inputs: Sequence[Any]) -> list[Any]:
    jaxpr, constants = getattr(traced, "jaxpr", traced), getattr(traced, "consts", ())
    values: dict[jex_core.Var, Any] = dict(zip(jaxpr.constvars, constants, strict=True))
    values.update(zip(jaxpr.invars, inputs, strict=True))
    read = lambda atom: atom.val if isinstance(atom, jex_core.Literal) else values[atom]
    for equation in jaxpr.eqns:
        arguments = [read(atom) for atom in equation.invars]
        with equation.ctx.manager:
            results = _replaced(equation, arguments) if has_known_form(equation) else None
            if results is None:
                results = _left_to_jax(equation, arguments)
        values.update(zip(equation.outvars, results, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _replaced(equation: jex_core.JaxprEqn, arguments: list[Any]) -> Sequence[Any] | None:
    """What an equation of a known form computes, in our way; None where its replacement does not
    serve it.
    """
    name, params = equation.primitive.name, equation.params
    if name in CONTROL_FLOW:
        return CONTROL_FLOW[name](params, *arguments)
    if equation.outvars[0].aval.size == 0:
        return None
    result = REPLACEMENTS[name](params, *arguments)
    return None if result is None else [result]


def _left_to_jax(equation: jex_core.JaxprEqn, arguments: list[Any]) -> Sequence[Any]:
    results = equation.primitive.bind(
        *arguments, **equation.primitive.get_bind_params(equation.params)
    )
    return results if equation.primitive.multiple_results else [results]


def operations(jaxpr: jex_core.Jaxpr) -> float:
    """Floating-point operations of the convolutions and products in a traced function and in those
    within it, of known forms.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        inner = sum(
            operations(getattr(part, "jaxpr", part)) for part in jex_core.jaxprs_in_params(params)
        )
        is_known = has_known_form(equation)
        total += inner * (params["length"] if name == "scan" and is_known else 1)
        if not is_known:
            continue
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
    """The convolution in the plain form, over one or two axes; None for three, and for groups of a
    few channels each.
    """
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    (n, c, *space), (o, i, *window) = numbers.lhs_spec, numbers.rhs_spec
    depthwise = (
        groups == x.shape[c] and math.prod(kernel.shape[axis] for axis in window) <= MOST_TAPS
    )
    if (
        not _is_plain(params, x, kernel)
        or len(space) not in (1, 2)
        or {len(params[name]) for name in PER_AXIS} != {len(space)}
        or params["batch_group_count"] != 1
        or (groups > MOST_GROUPS and not depthwise)
    ):
        return None
    x, kernel = x.transpose(n, *space, c), kernel.transpose(*window, i, o)
    added = 2 - len(space)  # One axis becomes two, the first of them one pixel long.
    x, kernel = jnp.expand_dims(x, range(1, 1 + added)), jnp.expand_dims(kernel, range(added))
    strides, padding = (
        (1,) * added + params["window_strides"],
        ((0, 0),) * added + tuple(params["padding"]),
    )
    x = _spread(x, (1, *(1,) * added, *params["lhs_dilation"], 1))
    kernel = _spread(kernel, (*(1,) * added, *params["rhs_dilation"], 1, 1))
    if groups > MOST_GROUPS:
        y = depthwise_convolution(x, kernel, strides, padding)
    else:
        y = grouped_convolution(x, kernel, strides, padding, groups)
    y = y.reshape(y.shape[0], *y.shape[1 + added :])
    out_n, out_c, *out_space = numbers.out_spec
    order = {out_n: 0, out_c: y.ndim - 1} | {
        axis: 1 + place for place, axis in enumerate(out_space)
    }
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
    is_product = (
        x.ndim == 2
        and weights.ndim == 2
        and params["dimension_numbers"] == (((1,), (0,)), ((), ()))
    )
    return matrix_product(x, weights) if is_product and _is_plain(params, x, weights) else None


def _max_pool(params: dict[str, Any], x: Array) -> Array | None:
    """The maximum over square windows of two axes; None for other windows and for dilations."""
    windowed = [axis for axis, size in enumerate(params["window_dimensions"]) if size > 1]
    shapes = {
        (params["window_dimensions"][axis], params["window_strides"][axis]) for axis in windowed
    }
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
    if any(
        params["window_strides"][axis] != 1 or params["padding"][axis] != (0, 0) for axis in others
    ):
        return None
    (window, stride), order = shapes.pop(), (others[0], *windowed, others[1])
    edges = [params["padding"][axis] for axis in windowed]
    counts = [
        (x.shape[axis] + sum(edge) - window) // stride + 1
        for axis, edge in zip(windowed, edges, strict=True)
    ]
    pooled = max_of_windows(
        x.transpose(order), window, stride, tuple(start for start, _ in edges), tuple(counts)
    )
    return pooled.transpose(*(order.index(axis) for axis in range(4)))


def _call(params: dict[str, Any], *arguments: Any) -> Sequence[Any]:
    return _evaluate(params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"], arguments)


def _checkpoint(params: dict[str, Any], *arguments: Any) -> Sequence[Any] | None:
    if params["jaxpr"].effects:
        return None
    inner = lambda *inputs: _evaluate(params["jaxpr"], inputs)
    return jax.checkpoint(inner, prevent_cse=params["prevent_cse"], policy=params["policy"])(
        *arguments
    )


def _scan(params: dict[str, Any], *arguments: Any) -> Sequence[Any] | None:
    if "ft_in" in params:
        sizes, kept = (
            [len(part) for part in params[name].unpack()] for name in ("ft_in", "ft_out")
        )
    else:
        first, num_carry = params["num_consts"], params["num_carry"]
        sizes, kept = [first, num_carry, len(arguments) - first - num_carry], [num_carry]
    if (
        params["jaxpr"].effects
        or len(sizes) != 3
        or sum(sizes) != len(arguments)
        or kept[:1] != sizes[1:2]
    ):
        return None
    first, num_carry, _ = sizes
    constants, carry, slices = (
        arguments[:first],
        arguments[first : first + num_carry],
        arguments[first + num_carry :],
    )

    def body(carry: Sequence[Any], slices: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
        results = _evaluate(params["jaxpr"], [*constants, *carry, *slices])
        return results[:num_carry], results[num_carry:]

    options = {name: params[name] for name in ("length", "reverse", "unroll")}
    carry, stacked = lax.scan(body, list(carry), list(slices), **options)
    return [*carry, *stacked]


def _cond(params: dict[str, Any], index: Any, *arguments: Any) -> Sequence[Any] | None:
    if any(branch.effects for branch in params["branches"]):
        return None
    branches = [lambda *inputs, b=branch: _evaluate(b, inputs) for branch in params["branches"]]
    return lax.switch(index, branches, *arguments)


CONTROL_FLOW: dict[str, Callable[..., Sequence[Any] | None]] = {
    "jit": _call,
    "closed_call": _call,
    "eval_jaxpr": _call,
    "remat2": _checkpoint,
    "scan": _scan,
    "cond": _cond,
}
REPLACEMENTS: dict[str, Callable[..., Array | None]] = {
    "conv_general_dilated": _convolution,
    "dot_general": _matrix_product,
    "reduce_window_max": _max_pool,
}
