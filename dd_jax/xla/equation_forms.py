"""The forms of the equations that `dd_jax.xla.rewrite` can replace.

JAX changes the names and parameters of its primitives between releases. An equation has a known
form if it has exactly the parameters listed here, each with a value whose meaning is known. jax
0.10 to 0.12 are supported.
"""

import enum
import numbers
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core as jex_core
import jax.numpy as jnp
from jax import lax

# From the name of each parameter to a check whether a value of it is understood.
Form = dict[str, Callable[[Any], bool]]


def _all(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda values: isinstance(values, tuple) and all(map(check, values))


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_none(value: Any) -> bool:
    return value is None


def _is_whole(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _is_contraction(value: Any) -> bool:
    return _all(_all(_all(_is_whole)))(value) and [len(pair) for pair in value] == [2, 2]


def _is_full_precision(value: Any) -> bool:
    """Whether this precision changes nothing on a CPU, which computes products in the operands'
    type anyway.
    """
    return (
        value is None
        or isinstance(value, lax.Precision)
        or _all(lambda v: isinstance(v, lax.Precision))(value)
    )


def _is_type(value: Any) -> bool:
    return value is None or isinstance(value, jnp.dtype)


def _is_closed(value: Any) -> bool:
    return isinstance(value, jex_core.ClosedJaxpr)


def _is_jaxpr(value: Any) -> bool:
    return isinstance(value, (jex_core.Jaxpr, jex_core.ClosedJaxpr))


def _is_mesh(value: Any) -> bool:
    return isinstance(value, (jax.sharding.Mesh, jax.sharding.AbstractMesh))


def _is_unspecified(value: Any) -> bool:
    return type(value).__name__ == "UnspecifiedValue"  # This type has no public name.


def _is_packed(value: Any) -> bool:
    return type(value).__name__ == "FTTuple"  # Nor has this one: a scan's arguments in parts.


SCAN: Form = {"reverse": _is_bool, "length": _is_whole, "jaxpr": _is_closed, "unroll": _is_whole}
FORMS: dict[str, tuple[Form, ...]] = {
    "conv_general_dilated": (
        {
            "window_strides": _all(_is_whole),
            "padding": _all(_all(_is_whole)),
            "lhs_dilation": _all(_is_whole),
            "rhs_dilation": _all(_is_whole),
            "dimension_numbers": lambda value: isinstance(value, lax.ConvDimensionNumbers),
            "feature_group_count": _is_whole,
            "batch_group_count": _is_whole,
            "precision": _is_full_precision,
            "preferred_element_type": _is_type,
            "out_sharding": _is_none,
        },
    ),
    "dot_general": (
        {
            "dimension_numbers": _is_contraction,
            "precision": _is_full_precision,
            "preferred_element_type": _is_type,
            "out_sharding": _is_none,
        },
    ),
    "reduce_window_max": (
        {
            "window_dimensions": _all(_is_whole),
            "window_strides": _all(_is_whole),
            "padding": _all(_all(_is_whole)),
            "base_dilation": _all(_is_whole),
            "window_dilation": _all(_is_whole),
        },
    ),
    "jit": (
        {
            "jaxpr": _is_closed,
            "in_shardings": _all(_is_unspecified),
            "out_shardings": _all(_is_unspecified),
            "in_layouts": _all(_is_none),
            "out_layouts": _all(_is_none),
            "donated_invars": _all(_is_bool),
            "ctx_mesh": _is_mesh,
            "name": lambda value: isinstance(value, str),
            "keep_unused": _is_bool,
            # An Enum since jax 0.11.
            "inline": lambda value: isinstance(value, (bool, enum.Enum)),
            "compiler_options_kvs": lambda value: isinstance(value, tuple) and not value,
        },
    ),
    "closed_call": ({"call_jaxpr": _is_closed},),
    "eval_jaxpr": ({"call_jaxpr": _is_closed},),  # The name of closed_call since jax 0.11.
    "remat2": (
        {
            "jaxpr": _is_jaxpr,
            "prevent_cse": _is_bool,
            "differentiated": lambda value: value is False,
            "policy": lambda value: value is None or callable(value),
        },
    ),
    "scan": (
        SCAN | {"num_consts": _is_whole, "num_carry": _is_whole},
        SCAN | {"ft_in": _is_packed, "ft_out": _is_packed},  # Since jax 0.11.
    ),
    "cond": ({"branches": _all(_is_closed)},),
}


def has_known_form(equation: jex_core.JaxprEqn) -> bool:
    """Whether the names of an equation and of its parameters, and the parameters' values, are all
    known.

    Never raises.
    """
    params = equation.params
    return any(
        form.keys() == params.keys()
        and all(is_known(params[name]) for name, is_known in form.items())
        for form in FORMS.get(equation.primitive.name, ())
    )
