"""Functions without free variables: what they close over, and whether their rows may be regrouped."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dd_jax.xla.closure_convert import Traces, closure_convert, rows_are_interchangeable

INPUTS = jnp.linspace(-1.0, 1.0, 24).reshape(8, 3)
W = jnp.array([[1.0, -2.0], [0.5, 3.0], [-1.5, 0.25]])
KEY = jax.random.key(3)


def converted(logits_fn):
    """For all of INPUTS, and for three of them."""
    return closure_convert(Traces(logits_fn, INPUTS), len(INPUTS), 3)


def test_converted_function_is_the_function_and_names_what_it_closes_over():
    column = jnp.array([1, 0])
    apply_fn, closure = converted(lambda x: jnp.tanh(x @ W)[:, column] + 2.0)
    np.testing.assert_array_equal(apply_fn(closure, INPUTS), jnp.tanh(INPUTS @ W)[:, ::-1] + 2.0)
    np.testing.assert_array_equal(
        apply_fn(closure, INPUTS[5:]), jnp.tanh(INPUTS[5:] @ W)[:, ::-1] + 2.0
    )
    assert [p.shape for p in closure.parameters] == [W.shape], "one for both numbers of rows"
    assert all(not jnp.issubdtype(c.dtype, jnp.inexact) for c in closure.constants)
    other = closure._replace(parameters=(2 * W,))
    np.testing.assert_array_equal(
        apply_fn(other, INPUTS), jnp.tanh(INPUTS @ (2 * W))[:, ::-1] + 2.0
    )


def in_scan(w):
    return lambda x: jax.lax.scan(lambda h, _: (jnp.tanh(h) + x @ w, None), x @ w, None, length=3)[
        0
    ]


def in_vmap(w):
    # relu: a function with a derivative rule of its own
    return jax.vmap(lambda x: jax.nn.relu(x @ w))


@jax.custom_vjp
def doubled(x):
    return 2 * x


doubled.defvjp(lambda x: (2 * x, None), lambda _, cotangent: (2 * cotangent,))


def convolution(w):
    """Images as PyTorch has them, two groups, strides: not the form that loops run fast."""
    kernel = jnp.stack([w, w[::-1]])[..., None].transpose(0, 3, 1, 2)
    images = lambda x: (
        jnp.concatenate([x, x * x], axis=1).reshape(-1, 2, 3, 1)
        + jnp.arange(4.0).reshape(1, 1, 1, 4)
    )
    call = lambda x: jax.lax.conv_general_dilated(
        images(x), kernel, (2, 1), ((1, 0), (0, 1)), feature_group_count=2
    )
    return lambda x: call(x).reshape(x.shape[0], -1)


NETS = (
    in_scan,
    in_vmap,
    convolution,
    lambda w: jax.jit(lambda x: jnp.sin(x @ w)),
    lambda w: lambda x: doubled(x @ w),
)


@pytest.mark.parametrize("make", NETS)
def test_gradients_reach_what_is_closed_over(make):
    def through_closure_convert(w):
        apply_fn, closure = converted(make(w))
        return (apply_fn(closure, INPUTS) ** 2).sum() + (apply_fn(closure, INPUTS[:3]) ** 3).sum()

    expected = jax.grad(lambda w: (make(w)(INPUTS) ** 2).sum() + (make(w)(INPUTS[:3]) ** 3).sum())(
        W
    )
    np.testing.assert_allclose(
        jax.jit(jax.grad(through_closure_convert))(W), expected, rtol=1e-6, atol=1e-6
    )


def mask(shape):
    return jax.random.bernoulli(KEY, 0.5, shape)


def masked_in_scan(x):
    step = lambda h, key: (h * jax.random.bernoulli(key, 0.5, h.shape), None)
    return jax.lax.scan(step, x @ W, jax.random.split(KEY, 2))[0]


REGROUPABLE = {
    "affine": lambda x: x @ W,
    "mask shared by the batch": lambda x: (x * mask(x.shape[1:])[None]) @ W,
    "old-style key, shared mask": lambda x: (
        (x * jax.random.normal(jax.random.PRNGKey(0), (1, 3))) @ W
    ),
    "same mask in every row": jax.vmap(lambda x: (x * mask(x.shape)) @ W),
}
ROW_BY_ROW = {
    "mask of the batch's shape": lambda x: (x * mask(x.shape)) @ W,
    "old-style key": lambda x: (x * jax.random.normal(jax.random.PRNGKey(0), x.shape)) @ W,
    "in jit": jax.jit(lambda x: (x * mask(x.shape)) @ W),
    "in scan": masked_in_scan,
    "in a branch": lambda x: (
        jax.lax.cond(x[0, 0] > 0, lambda x: x * mask(x.shape), lambda x: x, x) @ W
    ),
    "in remat": jax.checkpoint(lambda x: (x * mask(x.shape)) @ W),
    "one key per row": lambda x: (
        jax.vmap(lambda k, x: x * jax.random.uniform(k, (3,)))(jax.random.split(KEY, x.shape[0]), x)
        @ W
    ),
    "one closed-over entry per row": lambda x: (x * INPUTS) @ W,
    "one closed-over number per row": lambda x: (x * INPUTS[:, :1]) @ W,
    "knows its batch size": lambda x: x.reshape(8, 3) @ W,
}


@pytest.mark.parametrize("num_rows", [1, 2, 7])
@pytest.mark.parametrize("name", [*REGROUPABLE, *ROW_BY_ROW])
def test_rows_are_interchangeable_unless_a_row_has_something_of_its_own(name, num_rows):
    logits_fn = (REGROUPABLE | ROW_BY_ROW)[name]
    assert rows_are_interchangeable(Traces(logits_fn, INPUTS), len(INPUTS), num_rows) == (
        name in REGROUPABLE
    )
