"""The penalty of one net is the same, value and gradient, in whichever library the net is written."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dd_jax

PARAMS = {
    "hidden": {
        "w": 1.5 * jax.random.normal(jax.random.key(1), (6, 8)) / 6**0.5,
        "b": jnp.linspace(-1.0, 1.0, 8),
    },
    "out": {
        "w": 1.5 * jax.random.normal(jax.random.key(2), (8, 4)) / 8**0.5,
        "b": jnp.linspace(0.5, -0.5, 4),
    },
}
INPUTS = jax.random.normal(jax.random.key(3), (8, 6))
LABELS = jnp.arange(8) % 4


def bare_net(params, x):
    hidden = jnp.tanh(x @ params["hidden"]["w"] + params["hidden"]["b"][None])
    return hidden @ params["out"]["w"] + params["out"]["b"][None]


def penalty(logits_fn):
    values = dd_jax.regularizer(logits_fn, INPUTS, LABELS, correct_scale=2.0, wrong_scale=1.0)
    return values.sum(), values


@pytest.fixture(scope="module")
def expected():
    predicted = jnp.argmax(bare_net(PARAMS, INPUTS), axis=1) == LABELS
    assert predicted.any() and not predicted.all()
    gradient, values = jax.jit(
        jax.grad(lambda params: penalty(partial(bare_net, params)), has_aux=True)
    )(PARAMS)
    return values, gradient


def renamed(kernel, bias, transposed=False):
    """PARAMS under another library's names."""
    return {
        layer: {kernel: jnp.asarray(p["w"].T if transposed else p["w"]), bias: p["b"]}
        for layer, p in PARAMS.items()
    }


def assert_same(expected, values, gradient_of, transposed=False):
    """`gradient_of(layer)` is (gradient of the kernel, gradient of the bias)."""
    expected_values, gradient = expected
    np.testing.assert_allclose(values, expected_values, rtol=1e-5)
    for layer in ("hidden", "out"):
        kernel, bias = gradient_of(layer)
        kernel = kernel.T if transposed else kernel
        for actual, wanted in ((kernel, gradient[layer]["w"]), (bias, gradient[layer]["b"])):
            np.testing.assert_allclose(actual, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())


def test_flax_linen(expected):
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(4, name="out")(jnp.tanh(nn.Dense(8, name="hidden")(x)))

    objective = lambda params: penalty(partial(Net().apply, {"params": params}))
    gradient, values = jax.jit(jax.grad(objective, has_aux=True))(renamed("kernel", "bias"))
    assert_same(
        expected, values, lambda layer: (gradient[layer]["kernel"], gradient[layer]["bias"])
    )


def test_flax_nnx(expected):
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.hidden, self.out = nnx.Linear(6, 8, rngs=rngs), nnx.Linear(8, 4, rngs=rngs)

        def __call__(self, x):
            return self.out(jnp.tanh(self.hidden(x)))

    net = Net(nnx.Rngs(0))
    nnx.update(net, nnx.State(renamed("kernel", "bias")))
    gradient, values = nnx.jit(nnx.grad(penalty, has_aux=True))(net)
    assert_same(
        expected,
        values,
        lambda layer: (gradient[layer]["kernel"][...], gradient[layer]["bias"][...]),
    )


def test_equinox(expected):
    eqx = pytest.importorskip("equinox", reason="Equinox is not installed.")

    class Net(eqx.Module):
        hidden: eqx.nn.Linear
        out: eqx.nn.Linear

        def __call__(self, x):
            return self.out(jnp.tanh(self.hidden(x)))

    net = Net(
        eqx.nn.Linear(6, 8, key=jax.random.key(0)), eqx.nn.Linear(8, 4, key=jax.random.key(0))
    )
    params = renamed("weight", "bias", transposed=True)
    leaves = lambda net: [net.hidden.weight, net.hidden.bias, net.out.weight, net.out.bias]
    net = eqx.tree_at(
        leaves,
        net,
        [params[layer][name] for layer in ("hidden", "out") for name in ("weight", "bias")],
    )
    gradient, values = eqx.filter_jit(
        eqx.filter_grad(lambda net: penalty(jax.vmap(net)), has_aux=True)
    )(net)
    gradient_of = lambda layer: (getattr(gradient, layer).weight, getattr(gradient, layer).bias)
    assert_same(expected, values, gradient_of, transposed=True)


def test_haiku(expected):
    hk = pytest.importorskip("haiku", reason="Haiku is not installed.")
    net = hk.without_apply_rng(
        hk.transform(lambda x: hk.Linear(4, name="out")(jnp.tanh(hk.Linear(8, name="hidden")(x))))
    )
    objective = lambda params: penalty(partial(net.apply, params))
    gradient, values = jax.jit(jax.grad(objective, has_aux=True))(renamed("w", "b"))
    assert_same(expected, values, lambda layer: (gradient[layer]["w"], gradient[layer]["b"]))
