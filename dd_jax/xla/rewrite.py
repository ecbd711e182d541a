"""Replaces operations of a traced net by equal ones whose derivatives are fast on this backend.

A convolution of any library becomes the same JAX primitive, so the replacements here work for nets
of every library. JAX itself evaluates each equation whose form is unknown
(`dd_jax.xla.equation_forms`) or that no replacement covers. `dd_jax.xla` says how to switch the
replacements off.
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

MOST_GROUPS = 8  # With more groups, one convolution per group is not faster.
MOST_TAPS = 49  # Entries of a depthwise kernel; each becomes an elementwise product.
BACKENDS = ("cpu",)  # XLA's own derivatives are slow on these.
VARIABLE = "DD_JAX_REWRITE"
# Parameters of a convolution that have one entry per spatial axis.
PER_AXIS = ("window_strides", "padding", "lhs_dilation", "rhs_dilation")


def evaluate(
    jaxpr: jex_core.ClosedJaxpr, *inputs: Array, rewrite: bool | None = None
) -> list[Array]:
    """Evaluates a traced function with this backend's replacements.

    Args:
      jaxpr: the traced function.
      *inputs: its arguments.
      rewrite: True replaces operations, False leaves all of them to JAX. None replaces them unless
        the environment has DD_JAX_REWRITE=0. Only CPUs have replacements.

    Returns:
      The function's outputs, equal to JAX's own up to rounding.

    Raises:
      ValueError: `rewrite` is None and DD_JAX_REWRITE is neither 0 nor 1.
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
            f"{VARIABLE} is {said!r}; it must be 0, which leaves every operation to JAX, or 1, "
            f"which replaces slow ones. Set it to one of these, or unset it."
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
    """The outputs of an equation of a known form, by its replacement.

    None if the replacement does not cover the equation.
    """
    name, params = equation.primitive.name, equation.params
    if name in CONTROL_FLOW:
        return CONTROL_FLOW[name](params, *arguments)
    if _shaped(equation.outvars[0]).size == 0:
        return None
    result = REPLACEMENTS[name](params, *arguments)
    return None if result is None else [result]


def _left_to_jax(equation: jex_core.JaxprEqn, arguments: list[Any]) -> Sequence[Any]:
    results = equation.primitive.bind(
        *arguments, **equation.primitive.get_bind_params(equation.params)
    )
    return results if equation.primitive.multiple_results else [results]


def operations(jaxpr: jex_core.Jaxpr) -> float:
    """The number of floating-point operations in the convolutions and products of a traced
    function.

    Counts equations of known forms, also inside nested functions. A loop's body counts once per
    iteration, and all branches of a condition count.
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
            kernel = _shaped(equation.invars[1])
            num_outputs = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
            total += 2 * _shaped(equation.outvars[0]).size * kernel.size / num_outputs
        elif name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = _shaped(equation.invars[0]).shape
            num_terms = math.prod(shape[axis] for axis in contracted)
            total += 2 * _shaped(equation.outvars[0]).size * num_terms
    return total


def _shaped(variable: Any) -> Any:
    """The shape and type of a variable of an equation whose operation is of arrays."""
    return variable.aval


def _convolution(params: dict[str, Any], x: Array, kernel: Array) -> Array | None:
    """The convolution over one or two axes in the plain form.

    None for three axes, and for many groups of a few channels each.
    """
    if not _is_covered(params, x, kernel):
        return None
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    (n, c, *space), (o, i, *window) = numbers.lhs_spec, numbers.rhs_spec
    x, kernel = x.transpose(n, *space, c), kernel.transpose(*window, i, o)
    added = 2 - len(space)  # One axis becomes two; the first has one pixel.
    ones = (1,) * added
    x, kernel = jnp.expand_dims(x, range(1, 1 + added)), jnp.expand_dims(kernel, range(added))
    strides = ones + params["window_strides"]
    padding = ((0, 0),) * added + params["padding"]
    x = _spread(x, (1, *ones, *params["lhs_dilation"], 1))
    kernel = _spread(kernel, (*ones, *params["rhs_dilation"], 1, 1))
    if groups > MOST_GROUPS:
        y = depthwise_convolution(x, kernel, strides, padding)
    else:
        y = grouped_convolution(x, kernel, strides, padding, groups)
    return _in_output_order(y, numbers.out_spec)


def _is_covered(params: dict[str, Any], x: Array, kernel: Array) -> bool:
    """Whether `_convolution` replaces this convolution."""
    numbers, groups = params["dimension_numbers"], params["feature_group_count"]
    (_, c, *space), (_, _, *window) = numbers.lhs_spec, numbers.rhs_spec
    num_taps = math.prod(kernel.shape[axis] for axis in window)
    is_depthwise = groups == x.shape[c] and num_taps <= MOST_TAPS
    return (
        _is_plain(params, x, kernel)
        and len(space) in (1, 2)
        and {len(params[name]) for name in PER_AXIS} == {len(space)}
        and params["batch_group_count"] == 1
        and (groups <= MOST_GROUPS or is_depthwise)
    )


def _in_output_order(y: Array, out_spec: Sequence[int]) -> Array:
    """An NHWC result, without the axis that was added, in the order of
    `ConvDimensionNumbers.out_spec`.
    """
    batch, channels, *space = out_spec
    y = y.reshape(y.shape[0], *y.shape[-1 - len(space) :])
    order = {batch: 0, channels: y.ndim - 1}
    order |= {axis: 1 + place for place, axis in enumerate(space)}
    return y.transpose(*(order[axis] for axis in range(y.ndim)))


def _is_plain(params: dict[str, Any], x: Array, y: Array) -> bool:
    """Whether the operands and the result of a product have the same floating type."""
    same = x.dtype == y.dtype and params["preferred_element_type"] in (None, x.dtype)
    return same and jnp.issubdtype(x.dtype, jnp.floating)


def _spread(x: Array, dilation: Sequence[int]) -> Array:
    """x with `dilation - 1` zeros between its elements, along each axis."""
    if set(dilation) == {1}:
        return x
    return lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, gap - 1) for gap in dilation])


def _matrix_product(params: dict[str, Any], x: Array, weights: Array) -> Array | None:
    """The product of a batch of rows with a matrix of weights; None for any other contraction."""
    has_rank_two = x.ndim == weights.ndim == 2
    is_product = has_rank_two and params["dimension_numbers"] == (((1,), (0,)), ((), ()))
    return matrix_product(x, weights) if is_product and _is_plain(params, x, weights) else None


def _max_pool(params: dict[str, Any], x: Array) -> Array | None:
    """The maximum over square windows of two axes; None for other windows and for dilations."""
    windows = list(zip(params["window_dimensions"], params["window_strides"], strict=True))
    windowed = [axis for axis, (size, _) in enumerate(windows) if size > 1]
    others = [axis for axis in range(x.ndim) if axis not in windowed]
    is_square = len({windows[axis] for axis in windowed}) == 1
    if x.ndim != 4 or len(windowed) != 2 or not is_square or not _pools_only(params, others, x):
        return None
    window, stride = windows[windowed[0]]
    edges = [params["padding"][axis] for axis in windowed]
    counts = tuple(
        (x.shape[axis] + sum(edge) - window) // stride + 1
        for axis, edge in zip(windowed, edges, strict=True)
    )
    order, starts = (others[0], *windowed, others[1]), tuple(start for start, _ in edges)
    pooled = max_of_windows(x.transpose(order), window, stride, starts, counts)
    return pooled.transpose(*(order.index(axis) for axis in range(4)))


def _pools_only(params: dict[str, Any], others: Sequence[int], x: Array) -> bool:
    """Whether floating maps are pooled without dilation, and all other axes stay as they are."""
    dilations = set(params["base_dilation"]) | set(params["window_dilation"])
    stays = [
        params["window_strides"][axis] == 1 and params["padding"][axis] == (0, 0) for axis in others
    ]
    return dilations == {1} and all(stays) and jnp.issubdtype(x.dtype, jnp.floating)


def _call(params: dict[str, Any], *arguments: Any) -> Sequence[Any]:
    return _evaluate(params["jaxpr"] if "jaxpr" in params else params["call_jaxpr"], arguments)


def _checkpoint(params: dict[str, Any], *arguments: Any) -> Sequence[Any] | None:
    if params["jaxpr"].effects:
        return None
    inner = lambda *inputs: _evaluate(params["jaxpr"], inputs)
    options = {name: params[name] for name in ("prevent_cse", "policy")}
    return jax.checkpoint(inner, **options)(*arguments)


def _scan(params: dict[str, Any], *arguments: Any) -> Sequence[Any] | None:
    sizes = None if params["jaxpr"].effects else _sizes_of_scan(params, len(arguments))
    if sizes is None:
        return None
    num_constants, num_carry = sizes
    constants, rest = arguments[:num_constants], arguments[num_constants:]
    carry, slices = rest[:num_carry], rest[num_carry:]

    def body(carry: Any, slices: Any) -> tuple[Any, Any]:
        results = _evaluate(params["jaxpr"], [*constants, *carry, *slices])
        return results[:num_carry], results[num_carry:]

    options = {name: params[name] for name in ("length", "reverse", "unroll")}
    start: Any = list(carry)
    carry, stacked = lax.scan(body, start, list(slices), **options)
    return [*carry, *stacked]


def _sizes_of_scan(params: dict[str, Any], num_arguments: int) -> tuple[int, int] | None:
    """The number of a scan's constants and of its carries; None if the parameters disagree."""
    if "ft_in" not in params:
        num_constants, num_carry = params["num_consts"], params["num_carry"]
        return (num_constants, num_carry) if num_constants + num_carry <= num_arguments else None
    taken, kept = ([len(part) for part in params[name].unpack()] for name in ("ft_in", "ft_out"))
    if len(taken) != 3 or sum(taken) != num_arguments or kept[:1] != taken[1:2]:
        return None
    return taken[0], taken[1]


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
