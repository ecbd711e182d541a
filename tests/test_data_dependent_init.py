"""Weights centered on images: the moments of every layer's outputs, and what is left alone."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from dd_jax.models.data_dependent_init import centered

IMAGES = 3 + 0.1 * jax.random.normal(jax.random.key(0), (7, 6, 5, 2))


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), name="first")(x))
        x = nn.Conv(3, (1, 1), use_bias=False, name="without_bias")(x)
        x = nn.Dense(5, name="second")(nn.relu(x).reshape(x.shape[0], -1))
        return nn.Dense(3, name="head")(nn.relu(x))


def outputs(params):
    _, state = Net().apply({"params": params}, IMAGES, capture_intermediates=True)
    return {
        name: value["__call__"][0]
        for name, value in state["intermediates"].items()
        if name != "__call__"
    }


def moments(x):
    axes = tuple(range(x.ndim - 1))
    return x.mean(axes), x.std(axes)


def test_every_channel_has_mean_0_and_deviation_1():
    params = Net().init(jax.random.key(1), IMAGES)["params"]
    before, after = outputs(params), outputs(centered(Net(), params, IMAGES))
    for name in ("first", "second", "head"):
        assert not np.allclose(moments(before[name]), moments(after[name]), atol=0.1)
        mean, deviation = moments(after[name])
        np.testing.assert_allclose(mean, np.zeros_like(mean), atol=1e-5)
        np.testing.assert_allclose(deviation, np.ones_like(deviation), rtol=1e-5)


def test_layers_without_a_bias_and_constant_channels_stay_as_they_are():
    params = Net().init(jax.random.key(1), IMAGES)["params"]
    head = params["head"] | {
        "kernel": params["head"]["kernel"].at[:, 1].set(0),
        "bias": jnp.arange(3.0),
    }
    after = centered(Net(), params | {"head": head}, IMAGES)
    np.testing.assert_array_equal(after["without_bias"]["kernel"], params["without_bias"]["kernel"])
    np.testing.assert_array_equal(after["head"]["kernel"][:, 1], 0)
    assert after["head"]["bias"][1] == 1
    assert not np.array_equal(after["head"]["kernel"][:, 0], head["kernel"][:, 0])
