"""PreActResNet-18 and WideResNet-28-10 compute what PyTorch computes, and batch normalization
updates its statistics when it is asked to.

The figures are in `golden/cifar_resnet_logits.json`; `golden/make_cifar_resnet_logits.py` made
them, and draws the same weights here.
"""

import json
import math
import pathlib

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from golden import make_cifar_resnet_logits as made
from golden.make_imagenet_logits import state_dict

from dd_jax import models
from dd_jax.models.layers import batch_norm
from dd_jax.pretrained import layouts

FIGURES = json.loads(
    (pathlib.Path(__file__).parent / "golden" / "cifar_resnet_logits.json").read_text()
)
NUM_PARAMETERS = {"preactresnet18": 11_172_170, "wideresnet28_10": 36_479_194}
# The means and variances, and the net's own mu and sigma.
NUM_STATISTICS = {"preactresnet18": 2 * 17 + 2, "wideresnet28_10": 2 * 25 + 2}
each_net = pytest.mark.parametrize("name", NUM_PARAMETERS)


def drawn_variables(name, dtype):
    """The weights that PyTorch had, as our variables."""
    entries = {
        layouts._entry(name, path): layouts._torch_shape(shape)
        for path, shape in layouts._expected_shapes(name, None).items()
        if path[:2] != ("batch_stats", "normalize")
    }
    arrays = state_dict(entries, *made.NETS[name])
    total = sum(array.sum(dtype=np.float64) for array in arrays.values())
    assert total == pytest.approx(FIGURES["nets"][name]["sum_of_weights"], rel=1e-9), (
        "NumPy draws other numbers than it did."
    )
    variables = layouts.variables_from_torch(name, arrays)
    return jax.tree.map(lambda array: jnp.asarray(np.ascontiguousarray(array), dtype), variables)


@each_net
def test_the_number_of_parameters_is_the_published_one(name):
    images = jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    model = models.create(name)
    init = lambda x: (v := model.init(jax.random.key(0), x), model.apply(v, x))
    variables, logits = jax.eval_shape(init, images)
    sizes = [math.prod(leaf.shape) for leaf in jax.tree.leaves(variables["params"])]
    assert sum(sizes) == NUM_PARAMETERS[name] == FIGURES["nets"][name]["num_parameters"]
    assert len(jax.tree.leaves(variables["batch_stats"])) == NUM_STATISTICS[name]
    assert logits.shape == (2, 10) and models.input_shape(name) == (32, 32, 3)


@pytest.mark.parametrize(
    ("name", "entries"),
    [
        (
            "preactresnet18",
            ("layer1.0.bn1.weight", "layer2.0.shortcut.0.weight", "bn.running_var", "linear.bias"),
        ),
        (
            "wideresnet28_10",
            ("block1.layer.0.bn1.weight", "block1.layer.0.convShortcut.weight", "bn1.running_mean"),
        ),
    ],
)
def test_weights_have_the_names_of_the_published_checkpoints(name, entries):
    paths = layouts._expected_shapes(name, None)
    assert set(entries) < {layouts._entry(name, path) for path in paths}


def test_the_other_variant_of_preactresnet18_is_refused():
    shapes = layouts._expected_shapes("preactresnet18", None)
    given = {
        layouts._entry("preactresnet18", p): layouts._torch_shape(s) for p, s in shapes.items()
    }
    without = {entry: shape for entry, shape in given.items() if not entry.startswith("bn.")}
    with pytest.raises(ValueError, match=r"missing: bn\.running_mean \(512,\), .*bn\.bias"):
        layouts.check_shapes("preactresnet18", without)


def test_logits_of_wideresnet_are_pytorchs():
    model, variables = (
        models.create("wideresnet28_10"),
        drawn_variables("wideresnet28_10", jnp.float32),
    )
    (logits,) = jax.jit(model.apply)(variables, jnp.asarray(made.batch()[:1], jnp.float32))
    np.testing.assert_allclose(logits, FIGURES["nets"]["wideresnet28_10"]["logits"], atol=1e-4)


def test_logits_and_gradients_of_preactresnet_are_pytorchs(x64):
    model, figures = models.create("preactresnet18"), FIGURES["nets"]["preactresnet18"]
    variables = drawn_variables("preactresnet18", jnp.float64)
    difference = lambda x: (z := model.apply(variables, x)[0], (z[0] - z[1], z))[1]
    (_, logits), gradient = jax.jit(jax.value_and_grad(difference, has_aux=True))(
        jnp.asarray(made.batch()[:1])
    )
    close = lambda ours, theirs: np.testing.assert_allclose(
        ours, theirs, rtol=1e-7, atol=1e-9 * np.abs(theirs).max()
    )
    close(logits, figures["logits"])
    pixels = np.array(made.PIXELS)
    close(gradient[0, pixels, pixels, 0], figures["input_gradient"])
    close(jnp.linalg.norm(gradient), figures["input_gradient_norm"])


def test_training_batch_normalization_is_pytorchs(x64):
    """The logits, the running means, and the running variances but for PyTorch's n / (n - 1)."""
    variables, figures = drawn_variables("preactresnet18", jnp.float64), FIGURES["training"]
    training = {"train": True, "update_batch_stats": True, "mutable": ["batch_stats"]}
    apply = jax.jit(lambda v, x: models.create("preactresnet18").apply(v, x, **training))
    logits, updated = apply(variables, jnp.asarray(made.batch()))
    np.testing.assert_allclose(logits, figures["logits"], rtol=1e-7, atol=1e-9)
    channels = np.array(made.CHANNELS)
    before, after = (flatten_dict(v["batch_stats"], sep=".") for v in (variables, updated))
    sides = {"layer1.0.bn1": 32, "layer2.0.bn2": 16, "layer4.1.bn1": 4, "bn": 4}
    names = ("stage1_block0.norm1", "stage2_block0.norm2", "stage4_block1.norm1", "norm")
    for layer, ours in zip(made.UPDATED, names, strict=True):
        mean, var = (np.asarray(after[f"{ours}.{leaf}"])[channels] for leaf in ("mean", "var"))
        np.testing.assert_allclose(mean, figures["running_mean"][layer], rtol=1e-7, atol=1e-9)
        old = 0.9 * np.asarray(before[f"{ours}.var"])[channels]
        n = made.BATCH_SIZE * sides[layer] ** 2
        expected = old + (np.array(figures["running_var"][layer]) - old) * (n - 1) / n
        np.testing.assert_allclose(var, expected, rtol=1e-7)
        assert np.abs(var - np.asarray(before[f"{ours}.var"])[channels]).min() > 1e-4


def test_batch_normalization_is_its_definition():
    layer_of = lambda update: batch_norm(update_batch_stats=update, name="norm")
    x = np.random.default_rng(0).normal(2, 3, (4, 3, 2, 5)).astype(np.float32)
    variables = {
        "params": {"scale": jnp.arange(1.0, 6.0), "bias": jnp.arange(5.0)},
        "batch_stats": {"mean": jnp.full(5, 0.5), "var": jnp.full(5, 4.0)},
    }
    y, updated = layer_of(True).apply(variables, x, mutable=["batch_stats"])
    mean, var = (moment(x, axis=(0, 1, 2)) for moment in (np.mean, np.var))
    np.testing.assert_allclose(
        y, (x - mean) / np.sqrt(var + 1e-5) * np.arange(1, 6) + np.arange(5), rtol=2e-5, atol=2e-5
    )
    stats = updated["batch_stats"]
    np.testing.assert_allclose(stats["mean"], 0.9 * 0.5 + 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(stats["var"], 0.9 * 4.0 + 0.1 * var, rtol=1e-5)
    stored = (x - 0.5) / np.sqrt(4.0 + 1e-5) * np.arange(1, 6) + np.arange(5)
    np.testing.assert_allclose(layer_of(False).apply(variables, x), stored, rtol=1e-5, atol=1e-5)
    with pytest.raises(flax.errors.ModifyScopeVariableError, match="batch_stats"):
        layer_of(True).apply(variables, x)


@pytest.mark.parametrize("name", ["resnet18", "preactresnet18", "wideresnet28_10"])
def test_every_statistic_is_updated_only_when_it_is_asked_for(name):
    """Shapes alone: which nets write "batch_stats", and that they keep its structure."""
    model, images = models.create(name, 3), jax.ShapeDtypeStruct((2, 32, 32, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.key(0), images)
    written = {}

    def run(update):
        def apply(variables, images):
            _, state = model.apply(
                variables, images, True, update_batch_stats=update, mutable=["batch_stats"]
            )
            before, after = (flatten_dict(v["batch_stats"]) for v in (variables, state))
            written[update] = [path for path in before if after[path] is not before[path]]
            return state

        return jax.eval_shape(apply, variables, images)

    assert jax.tree.map(lambda x: x.shape, run(True)["batch_stats"]) == jax.tree.map(
        lambda x: x.shape, variables["batch_stats"]
    )
    run(False)
    # Not the net's own mu and sigma.
    trained = {path for path in flatten_dict(variables["batch_stats"]) if path[0] != "normalize"}
    assert set(written[True]) == trained
    assert written[False] == []
