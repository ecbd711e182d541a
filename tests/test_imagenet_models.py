"""The nets for ImageNet: their parameters, PyTorch's figures for seeded weights, and Deep Defense
through their layers.

The figures are in `golden/imagenet_logits.json`; `golden/make_imagenet_logits.py` made them, and
draws the same weights here.
"""

import json
import math
import pathlib

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from flax.traverse_util import flatten_dict
from golden import make_imagenet_logits as made
from jax.test_util import check_grads

import dd_jax
from dd_jax import models, training
from dd_jax.models.imagenet import GRAY_LEVELS
from dd_jax.models.layers import (
    batch_dropout,
    batch_norm,
    conv,
    dense,
    flatten,
    local_response_norm,
)
from dd_jax.models.residual import ResidualBlock
from dd_jax.pretrained import layouts
from dd_jax.xla.pooling import max_pool

FIGURES = json.loads(
    (pathlib.Path(__file__).parent / "golden" / "imagenet_logits.json").read_text()
)["nets"]
NUM_PARAMETERS = {"alexnet": 60_965_224, "alexnet_torchvision": 61_100_840, "resnet18": 11_689_512}
each_net = pytest.mark.parametrize("name", NUM_PARAMETERS)


def drawn_variables(name):
    """The weights that PyTorch had, as our variables."""
    shapes = layouts._expected_shapes(name, None)
    shapes = {
        layouts._entry(name, path): layouts._torch_shape(shape) for path, shape in shapes.items()
    }
    _, _, head, head_scale = made.NETS[name]
    arrays = made.state_dict(shapes, head, head_scale)
    total = sum(array.sum(dtype=np.float64) for array in arrays.values())
    assert total == pytest.approx(FIGURES[name]["sum_of_weights"], rel=1e-9), (
        "NumPy draws other numbers than it did."
    )
    return jax.tree.map(
        lambda array: jnp.asarray(np.ascontiguousarray(array)),
        layouts.variables_from_torch(name, arrays),
    )


def drawn_input(name, dtype):
    """The image that PyTorch had, as our net takes it."""
    size, make_input, _, _ = made.NETS[name]
    unit = GRAY_LEVELS if name == "alexnet" else 1
    return jnp.asarray(make_input(made.image(size))[None] / unit, dtype)


def filled(model, images, dtype=np.float32):
    """Variables drawn by NumPy, which is quicker than compiling `init`: signs of all kinds,
    variances above 0.5.
    """
    generator = np.random.default_rng(7)

    def draw(path, leaf):
        values = generator.standard_normal(leaf.shape, np.float32)
        if len(leaf.shape) > 1:
            return jnp.asarray(values * math.sqrt(2 / math.prod(leaf.shape[:-1])), dtype)
        return jnp.asarray((1 if path[-1].key in ("var", "scale") else 0.2) + 0.1 * values, dtype)

    return jax.tree_util.tree_map_with_path(
        draw, jax.eval_shape(model.init, jax.random.key(0), images)
    )


@each_net
def test_the_number_of_parameters_is_the_published_one(name):
    model, images = (
        models.create(name),
        jax.ShapeDtypeStruct((2, *models.input_shape(name)), jnp.float32),
    )
    init = lambda x: (v := model.init(jax.random.key(0), x), model.apply(v, x))
    variables, logits = jax.eval_shape(init, images)
    num_parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"]))
    assert num_parameters == NUM_PARAMETERS[name] == FIGURES[name]["num_parameters"]
    assert set(variables) == ({"params", "batch_stats"} if name == "resnet18" else {"params"})
    assert logits.shape == (2, 1000)


@each_net
def test_logits_are_pytorchs(name):
    model, variables, images, figures = (
        models.create(name),
        drawn_variables(name),
        drawn_input(name, jnp.float32),
        FIGURES[name],
    )
    (logits,) = jax.jit(model.apply)(variables, images)
    np.testing.assert_allclose(logits[np.array(made.CLASSES)], figures["logits"], atol=1e-4)
    np.testing.assert_allclose(jnp.linalg.norm(logits), figures["logits_norm"], rtol=1e-5)


@each_net
def test_gradients_are_pytorchs(name, x64):
    """Double gradients too: they pass through overlapping pooling windows, groups, LRN, strides and
    batch normalization.

    In float64: a preactivation near 0 may have another sign in float32, on one CPU and not on
    another, and its ReLU another gradient.
    """
    model, images, figures = models.create(name), drawn_input(name, jnp.float64), FIGURES[name]
    variables = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), drawn_variables(name))

    @jax.jit
    def compute(variables, images):
        params = dict(variables["params"])
        rest = {
            collection: value for collection, value in variables.items() if collection != "params"
        }

        def squared_gradient(kernel):
            first = params["conv1"] | {"kernel": kernel}
            logits_of = lambda x: model.apply({"params": params | {"conv1": first}, **rest}, x)[0]
            gradient = jax.grad(lambda x: logits_of(x)[0] - logits_of(x)[1])(images)
            return jnp.sum(jnp.square(gradient)), gradient

        return jax.grad(squared_gradient, has_aux=True)(params["conv1"]["kernel"])

    double, gradient = compute(variables, images)
    pixels = np.array(made.PIXELS)
    close = lambda ours, theirs: np.testing.assert_allclose(
        ours, theirs, rtol=1e-7, atol=1e-9 * np.abs(theirs).max()
    )
    close(gradient[0, pixels, pixels, 0], figures["input_gradient"])
    close(double[3, 2, 1, :8], figures["double_gradient"])
    close(jnp.linalg.norm(gradient), figures["input_gradient_norm"])
    close(jnp.linalg.norm(double), figures["double_gradient_norm"])


def test_local_response_norm_is_its_definition(x64):
    x = jnp.asarray(np.random.default_rng(0).normal(scale=3, size=(2, 3, 2, 7)))
    expected = np.empty(x.shape)
    for channel in range(7):
        energy = sum(np.square(x[..., i]) for i in range(max(channel - 2, 0), min(channel + 3, 7)))
        expected[..., channel] = x[..., channel] * (2 + 0.3 / 5 * energy) ** -0.6
    norm = lambda x: local_response_norm(x, size=5, alpha=0.3, beta=0.6, k=2.0)
    np.testing.assert_allclose(norm(x), expected, rtol=1e-12)
    check_grads(lambda x: norm(jnp.asarray(x)), (x,), order=2, modes=["rev"])


class Pieces(nn.Module):
    """The layers of all three nets, and few enough of them to be differentiated plainly."""

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.relu(conv(6, 5, stride=2, padding=2, name="conv1")(x))
        x = max_pool(local_response_norm(x, alpha=0.5), 3, 2, ceil_mode=True)
        x = nn.relu(batch_norm(name="bn")(conv(4, 3, padding=1, groups=2, name="conv2")(x)))
        x = ResidualBlock(4, stride=2, name="block")(max_pool(x, 3, 2, padding=1))
        x = batch_dropout(train=train, name="drop")(flatten(x))
        return dense(4, name="fc")(x)


PIECES, IMAGES = Pieces(), np.random.default_rng(0).standard_normal((3, 25, 25, 3))


def test_deep_defense_through_the_layers_is_plain_autodiff(x64):
    variables, images, key = (
        filled(PIECES, IMAGES, np.float64),
        jnp.asarray(IMAGES),
        jax.random.key(3),
    )

    @jax.jit
    def both(params):
        def penalty(regularizer, params):
            logits_fn = training.make_logits_fn(PIECES, params, variables["batch_stats"], key)
            labels = jnp.argmax(logits_fn(images), axis=1).at[0].add(1) % 4
            return regularizer(
                logits_fn, images, labels, num_steps=1, num_candidates=3, correct_scale=3.0
            ).sum()

        sides = (dd_jax.regularizer, reference.regularizer)
        return [jax.value_and_grad(lambda p, side=side: penalty(side, p))(params) for side in sides]

    (value, gradient), (plain_value, plain_gradient) = both(variables["params"])
    np.testing.assert_allclose(value, plain_value, rtol=1e-12)
    for path, plain in flatten_dict(plain_gradient).items():
        ours = flatten_dict(gradient)[path]
        np.testing.assert_allclose(
            ours, plain, rtol=1e-9, atol=1e-12 * jnp.abs(plain).max(), err_msg=str(path)
        )
        assert jnp.abs(plain).max() > 1e-8, f"nothing reaches {path}"


def test_batch_normalization_keeps_rows_apart_and_statistics_still():
    variables, images = filled(PIECES, IMAGES), jnp.asarray(IMAGES, jnp.float32)
    options = {"train": True, "rngs": {"dropout": jax.random.key(0)}, "mutable": ["batch_stats"]}
    apply = jax.jit(lambda v, x: PIECES.apply(v, x, **options))
    logits, updated = apply(variables, images)
    jax.tree.map(np.testing.assert_array_equal, updated["batch_stats"], variables["batch_stats"])
    changed = images.at[1:].multiply(7.0)
    np.testing.assert_allclose(apply(variables, changed)[0][0], logits[0], rtol=1e-5, atol=1e-6)
    other = variables | {"batch_stats": jax.tree.map(lambda x: 2 * x, variables["batch_stats"])}
    assert jnp.abs(apply(other, images)[0] - logits).max() > 1e-2


def test_a_block_computes_batch_normalization_and_shortcut_as_written():
    """Against NumPy, at the block's last pixel: 8 x 8 maps become 4 x 4 by windows that start one
    pixel outside.
    """
    block = ResidualBlock(2, stride=2)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(1, 8, 8, 1)), jnp.float32)
    variables = filled(block, x)
    y = jax.jit(block.apply)(variables, x)
    p, s = (
        jax.tree.map(np.asarray, variables[collection]) for collection in ("params", "batch_stats")
    )
    padded = np.pad(np.asarray(x[0]), ((1, 1), (1, 1), (0, 0)))
    norm = lambda z, name: (
        (z - s[name]["mean"]) / np.sqrt(s[name]["var"] + 1e-5) * p[name]["scale"] + p[name]["bias"]
    )
    first = np.array(
        [[_window(padded, 2 * i, 2 * j, p["conv1"]) for j in range(4)] for i in range(4)]
    )
    hidden = np.pad(np.maximum(norm(first, "bn1"), 0), ((1, 1), (1, 1), (0, 0)))
    second = norm(_window(hidden, 3, 3, p["conv2"]), "bn2")
    shortcut = norm(np.asarray(x[0, 6, 6]) @ p["downsample_conv"]["kernel"][0, 0], "downsample_bn")
    assert y.shape == (1, 4, 4, 2)
    np.testing.assert_allclose(y[0, 3, 3], np.maximum(second + shortcut, 0), rtol=1e-4, atol=1e-5)


def _window(maps, row, column, layer):
    return np.einsum("ijc,ijco->o", maps[row : row + 3, column : column + 3], layer["kernel"])


@pytest.mark.parametrize(("name", "size"), [("alexnet", 67), ("alexnet_torchvision", 63)])
def test_alexnets_drop_one_half_of_the_net_for_the_whole_batch(name, size):
    """The mask belongs to the key: not to the batch, nor to the place in it. Without training there
    is none.
    """
    model = models.create(name, num_classes=3)
    images = jnp.asarray(
        np.random.default_rng(5).standard_normal((3, size, size, 3)) * 0.3, jnp.float32
    )
    variables = filled(model, images)
    watch = {
        "capture_intermediates": lambda module, _: module.name in ("drop6", "drop7"),
        "mutable": "intermediates",
    }
    apply = jax.jit(lambda v, x, key: model.apply(v, x, train=True, rngs={"dropout": key}, **watch))
    logits, state = apply(variables, images, jax.random.key(1))
    np.testing.assert_allclose(
        apply(variables, images[::-1], jax.random.key(1))[0][::-1],
        logits,
        rtol=1e-4,
        atol=1e-5 * jnp.abs(logits).max(),
    )
    for layer in ("drop6", "drop7"):
        kept = state["intermediates"][layer]["__call__"][0] != 0
        # About half, less those that ReLU had off in every row.
        assert 0.05 < kept.any(axis=0).mean() < 0.6, layer
    assert (
        jnp.abs(jax.jit(model.apply)(variables, images) - logits).max()
        > 1e-3 * jnp.abs(logits).max()
    )


def test_caffes_own_initial_weights():
    params = jax.jit(models.create("alexnet", num_classes=10).init)(
        jax.random.key(0), jnp.ones((1, 67, 67, 3))
    )["params"]
    for layer, std, bias in (
        ("conv1", 0.01, 0.0),
        ("conv4", 0.01, 0.1),
        ("fc7", 0.005, 0.1),
        ("fc8", 0.01, 0.0),
    ):
        np.testing.assert_allclose(jnp.std(params[layer]["kernel"]), std, rtol=0.02, err_msg=layer)
        np.testing.assert_array_equal(params[layer]["bias"], np.float32(bias))


@each_net
def test_the_number_of_classes_is_free_and_one_is_too_few(name):
    model, images = (
        models.create(name, num_classes=7),
        jax.ShapeDtypeStruct((1, *models.input_shape(name)), jnp.float32),
    )
    assert jax.eval_shape(
        lambda x: model.init_with_output(jax.random.key(0), x)[0], images
    ).shape == (1, 7)
    with pytest.raises(ValueError, match="num_classes is 1"):
        models.create(name, num_classes=1)
