"""Convolutions and the two forms of their derivatives, against JAX's own, and the derivatives of
each.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.test_util import check_grads

from dd_jax.xla import convolution as forms
from dd_jax.xla.convolution import LAYOUT, convolution, input_gradient, kernel_gradient

CASES = {  # image, kernel, inputs, outputs, padding
    "same size": ((6, 5), (3, 3), 2, 3, ((1, 1), (1, 1))),
    "mostly zeros": ((5, 6), (4, 3), 2, 3, ((0, 0), (0, 0))),
    "mostly zeros, uneven edges": ((4, 5), (4, 3), 3, 2, ((1, 0), (0, 1))),
    "one pixel left": ((3, 3), (3, 3), 2, 4, ((0, 0), (0, 0))),
    "pointwise": ((3, 4), (1, 1), 3, 2, ((0, 0), (0, 0))),
    "one input channel": ((5, 5), (2, 2), 1, 3, ((0, 0), (0, 0))),
    "one input channel, uneven edges": ((5, 4), (3, 2), 1, 3, ((2, 0), (0, 1))),
    "cropped": ((6, 6), (2, 3), 2, 3, ((-1, 0), (0, -2))),
}


@pytest.fixture(params=[0, 4], ids=["any channels", "few channels"])
def few_inputs(request, monkeypatch):
    """The forms that another JAX may choose are right, too."""
    monkeypatch.setattr(forms, "FEW_INPUTS", request.param)


@pytest.fixture(params=CASES)
def case(request, few_inputs, x64):
    image, size, inputs, outputs, padding = CASES[request.param]
    random = np.random.default_rng(0)
    x, kernel = (
        random.standard_normal((2, *image, inputs)),
        random.standard_normal((*size, inputs, outputs)),
    )
    plain = lambda x, kernel: lax.conv_general_dilated(
        x, kernel, (1, 1), padding, dimension_numbers=LAYOUT
    )
    y, pull_back = jax.vjp(plain, x, kernel)
    y_bar = jnp.asarray(random.standard_normal(y.shape))
    return jnp.asarray(x), jnp.asarray(kernel), y, y_bar, pull_back(y_bar), padding


def assert_close(actual, wanted):
    np.testing.assert_allclose(actual, wanted, rtol=0, atol=1e-12 * np.abs(wanted).max())


def test_each_form_is_what_jax_computes(case):
    x, kernel, y, y_bar, (x_bar, kernel_bar), padding = case
    assert_close(convolution(x, kernel, padding), y)
    assert_close(input_gradient(y_bar, kernel, padding), x_bar)
    assert_close(kernel_gradient(x, y_bar, padding), kernel_bar)


def test_each_form_has_the_right_derivatives(case):
    x, kernel, _, y_bar, _, padding = case
    for form, arguments in (
        (convolution, (x, kernel)),
        (input_gradient, (y_bar, kernel)),
        (kernel_gradient, (x, y_bar)),
    ):
        squares = jax.jit(lambda *a, form=form: jnp.sum(form(*a, padding) ** 2))
        check_grads(squares, arguments, order=1, modes=("rev",), rtol=1e-6)
