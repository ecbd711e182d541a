"""The paper's nets: their parameters, the authors' logits and gradients, and dropout with one mask
for the whole batch.
"""

import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from dd_jax import models
from dd_jax.pretrained import from_torch

GOLDEN = pathlib.Path(__file__).parent / "golden"

KERNELS = {
    "mlp": {"fc1": (784, 500), "fc2": (500, 150), "fc3": (150, 10)},
    "lenet": {"conv1": (5, 5, 1, 20), "conv2": (5, 5, 20, 50), "fc1": (800, 500), "fc2": (500, 10)},
    "convnet": {
        "conv1": (5, 5, 3, 32), "conv2": (5, 5, 32, 32), "conv3": (5, 5, 32, 64), "conv4": (4, 4, 64, 64),
        "conv5": (1, 1, 64, 10),
    },
    "nin": {
        "conv1": (5, 5, 3, 192), "cccp1": (1, 1, 192, 160), "cccp2": (1, 1, 160, 96),
        "conv2": (5, 5, 96, 192), "cccp3": (1, 1, 192, 192), "cccp4": (1, 1, 192, 192),
        "conv3": (3, 3, 192, 192), "cccp5": (1, 1, 192, 192), "cccp6": (1, 1, 192, 10),
    },
}  # fmt: skip
NUM_PARAMETERS = {"mlp": 469_160, "lenet": 431_080, "convnet": 145_578, "nin": 966_986}
NAMES = tuple(KERNELS)  # The others are in test_imagenet_models.py and test_cifar_resnets.py.
each_net = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def golden():
    return {name: dict(np.load(GOLDEN / f"{name}.npz")) for name in NAMES}


def golden_params(arrays, name, dtype):
    weights = {
        key.removeprefix("param/"): value
        for key, value in arrays.items()
        if key.startswith("param/")
    }
    return jax.tree.map(lambda array: jnp.asarray(array, dtype), from_torch(name, weights))


def golden_images(arrays, dtype):
    return jnp.asarray(arrays["input/images"].transpose(0, 2, 3, 1), dtype)


def shapes(name, num_classes=10):
    images = jax.ShapeDtypeStruct((2, *models.input_shape(name)), jnp.float32)
    model = models.create(name, num_classes)
    variables, logits = jax.eval_shape(
        lambda x: (v := model.init(jax.random.key(0), x), model.apply(v, x)), images
    )
    return variables, logits


@each_net
def test_parameters_have_the_authors_names_and_the_papers_number(name):
    variables, logits = shapes(name)
    expected = {(layer, "kernel"): shape for layer, shape in KERNELS[name].items()}
    expected |= {(layer, "bias"): shape[-1:] for layer, shape in KERNELS[name].items()}
    assert set(variables) == {"params"}
    assert {
        path: leaf.shape for path, leaf in flatten_dict(variables["params"]).items()
    } == expected
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(variables)) == NUM_PARAMETERS[name]
    assert logits.shape == (2, 10)


@each_net
def test_number_of_classes_changes_the_last_layer_alone(name):
    (ten, _), (three, logits) = shapes(name), shapes(name, num_classes=3)
    ten, three = flatten_dict(ten["params"]), flatten_dict(three["params"])
    last = list(KERNELS[name])[-1]
    assert {path[0] for path in ten if ten[path].shape != three[path].shape} == {last}
    assert logits.shape == (2, 3)


@each_net
def test_logits_are_the_authors(x64, golden, name):
    arrays = golden[name]
    params = golden_params(arrays, name, jnp.float64)
    logits = jax.jit(models.create(name).apply)(
        {"params": params}, golden_images(arrays, jnp.float64)
    )
    assert logits.dtype == jnp.float64
    np.testing.assert_allclose(logits, arrays["clean/logits"], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["mlp", "lenet", "convnet"])
def test_float32_stays_float32_and_nets_without_dropout_need_no_key_to_train(golden, name):
    arrays, model = golden[name], models.create(name)
    variables = {"params": golden_params(arrays, name, jnp.float32)}
    modes = jax.jit(
        lambda images: [model.apply(variables, images, train=train) for train in (False, True)]
    )
    expected = arrays["clean/logits"][:3]
    for logits in modes(golden_images(arrays, jnp.float32)[:3]):
        assert logits.dtype == jnp.float32
        np.testing.assert_allclose(logits, expected, atol=2e-5 * np.abs(expected).max())


@each_net
def test_gradients_of_every_logit_are_the_authors(x64, golden, name):
    arrays, num_images = golden[name], 2
    params = golden_params(arrays, name, jnp.float64)
    model = models.create(name)

    @jax.jit
    def class_gradients(images):
        logits, pull_back = jax.vjp(lambda x: model.apply({"params": params}, x), images)
        one_hots = jnp.broadcast_to(jnp.eye(10)[:, None], (10, *logits.shape))
        return jax.vmap(lambda cotangent: pull_back(cotangent)[0])(one_hots)

    gradients = class_gradients(golden_images(arrays, jnp.float64)[:num_images]).transpose(
        1, 0, 4, 2, 3
    )
    expected = arrays["clean/class_gradients_first4"][:num_images]  # stored as float32
    np.testing.assert_allclose(gradients, expected, rtol=1e-6, atol=1e-7 * np.abs(expected).max())


def test_fresh_weights_keep_the_scale_of_activations():
    params = jax.jit(models.create("lenet").init)(jax.random.key(0), jnp.ones((1, 28, 28, 1)))[
        "params"
    ]
    for layer, arrays in params.items():
        fan_in = math.prod(arrays["kernel"].shape[:-1])
        assert not arrays["bias"].any(), layer
        np.testing.assert_allclose(
            jnp.std(arrays["kernel"]), math.sqrt(2 / fan_in), rtol=0.15, err_msg=layer
        )


@pytest.fixture(scope="module")
def nin(golden):
    """`apply(images, key)`, NIN with the authors' weights: its logits, and what dropout1 lets
    through. And images.
    """
    variables, model = (
        {"params": golden_params(golden["nin"], "nin", jnp.float32)},
        models.create("nin"),
    )
    capture = {
        "capture_intermediates": lambda module, _: module.name == "dropout1",
        "mutable": "intermediates",
    }

    @jax.jit
    def apply(images, key=None):
        rngs = {} if key is None else {"dropout": key}
        logits, state = model.apply(variables, images, train=key is not None, rngs=rngs, **capture)
        return logits, state["intermediates"]["dropout1"]["__call__"][0]

    return apply, golden_images(golden["nin"], jnp.float32)[:4]


def test_a_dropout_key_is_one_net_whatever_the_batch(nin):
    apply, images = nin
    key, order = jax.random.key(1), jnp.array([2, 0, 3, 1])
    logits, _ = apply(images, key)
    np.testing.assert_allclose(apply(images[order], key)[0], logits[order], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(apply(images[2:3], key)[0], logits[2:3], rtol=1e-5, atol=1e-5)


def test_another_key_is_another_net_and_without_training_there_is_no_dropout(nin, golden):
    apply, images = nin
    clean, one, other = (
        apply(images, key)[0] for key in (None, jax.random.key(1), jax.random.key(2))
    )
    expected = golden["nin"]["clean/logits"][:4]
    scale = np.abs(expected).max()
    assert clean.dtype == jnp.float32
    np.testing.assert_allclose(clean, expected, atol=2e-5 * scale)
    assert (
        min(float(jnp.abs(a - b).max()) for a, b in ((clean, one), (clean, other), (one, other)))
        > 0.05 * scale
    )


def test_dropout_keeps_half_and_doubles_it(nin):
    apply, images = nin
    (_, pooled), (_, thinned) = apply(images), apply(images, jax.random.key(3))
    assert pooled.shape == (4, 16, 16, 96)
    alive, kept = np.asarray(pooled > 0), np.asarray(thinned > 0)
    np.testing.assert_allclose(thinned[kept], 2 * pooled[kept], rtol=1e-5)
    assert 0.48 < kept.sum() / alive.sum() < 0.52
    both = alive[0] & alive[1]
    assert both.sum() > 100 and (kept[0] == kept[1])[both].all()  # one mask for the whole batch


def test_names_and_shapes():
    others = ["alexnet", "alexnet_torchvision", "resnet18", "preactresnet18", "wideresnet28_10"]
    assert list(models.NAMES) == [*NAMES, *others]
    assert [models.input_shape(name) for name in NAMES] == [(28, 28, 1)] * 2 + [(32, 32, 3)] * 2


@pytest.mark.parametrize("call", [models.create, models.input_shape])
def test_an_unknown_name_gets_the_list_of_names(call):
    with pytest.raises(ValueError, match="'letnet'.*mlp, lenet, convnet, nin"):
        call("letnet")


def test_one_class_is_too_few():
    with pytest.raises(ValueError, match="num_classes is 1"):
        models.create("mlp", num_classes=1)


@pytest.mark.parametrize("name", ["convnet", "nin"])
def test_images_of_another_size_are_refused(name):
    images = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    with pytest.raises(ValueError, match="pixels where it needs 1 x 1"):
        jax.eval_shape(models.create(name).init, jax.random.key(0), images)
