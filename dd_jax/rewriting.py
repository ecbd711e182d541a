"""Replaces operations of a traced net by equal ones whose derivatives are fast on this backend.

Any library's convolution ends up as the same JAX primitive, so doing it here serves nets of every library alike.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex_core
from jaxtyping import Array

from dd_jax.convolutions import grouped_convolution

MOST_GROUPS = 8  # More groups than this (depthwise convolutions) are not worth a convolution each.
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
    replacement = REPLACEMENTS.get(name)
    if replacement is not None and (result := replacement(params, *arguments)) is not None:
        return [result]
    bound = equation.primitive.get_bind_params(params)
    functions, parameters = bound if isinstance(bound, tuple) else ((), bound)  # A pair before jax 0.10.
    with equation.ctx.manager:
        results = equation.primitive.bind(*functions, *arguments, **parameters)
    return results if equation.primitive.multiple_results else [results]


def _convolution(params: dict[str, Any], x: Array, kernel: Array) -> Array | None:
    """The convolution in the plain form; None where it has dilations, other than two spatial axes or many groups."""
    numbers = params["dimension_numbers"]
    plain = (
        x.ndim == 4
        and x.dtype == kernel.dtype
        and set(params["lhs_dilation"]) | set(params["rhs_dilation"]) == {1}
        and params["batch_group_count"] == 1
        and params["feature_group_count"] <= MOST_GROUPS
        and params["preferred_element_type"] in (None, x.dtype)
    )
    if not plain:
        return None
    (n, c, *space), (o, i, *window) = numbers.lhs_spec, numbers.rhs_spec
    y = grouped_convolution(
        x.transpose(n, *space, c),
        kernel.transpose(*window, i, o),
        tuple(params["window_strides"]),
        tuple(params["padding"]),
        params["feature_group_count"],
    )
    out_n, out_c, *out_space = numbers.out_spec
    order = {out_n: 0, out_space[0]: 1, out_space[1]: 2, out_c: 3}
    return y.transpose(*(order[axis] for axis in range(4)))


REPLACEMENTS: dict[str, Callable[..., Array | None]] = {"conv_general_dilated": _convolution}
