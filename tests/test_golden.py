"""The library's nets and penalty against figures that the authors' PyTorch code computed
(tests/golden).

All in float64. In one thing the library differs on purpose: for a misclassified example whose
prediction changes on the way, the authors' code mixes two source classes. `fixed_source/*` are the
authors' figures without that slip, and for gradients `reference.py` closes the chain: with the slip
it gives the authors' gradients, without it the library's.
"""

import functools
import pathlib
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

import dd_jax
from dd_jax import models
from dd_jax.attacks import _deepfool as module
from dd_jax.pretrained import from_torch
from dd_jax.xla.closure_convert import Traces

pytestmark = pytest.mark.usefixtures("x64", "short_turns")

GOLDEN = pathlib.Path(__file__).parent / "golden"
FILES = ("mlp", "mlp_degenerate", "lenet", "convnet", "nin")


def is_param(key):
    return key.startswith("param/")


@functools.cache
def load(file):
    """The authors' figures, images and parameters in the library's layout and in float64."""
    name = file.removesuffix("_degenerate")
    with np.load(GOLDEN / f"{file}.npz") as arrays:
        figures = dict(arrays)
    weights = figures if name == file else load(name)[2]
    params = from_torch(
        name,
        {key.removeprefix("param/"): np.float64(weights[key]) for key in weights if is_param(key)},
    )
    for key in figures:
        if figures[key].ndim == 4 and not key.startswith(("param/", "grad/")):
            figures[key] = np.float64(figures[key]).transpose(0, 2, 3, 1)
    figures |= {key: weights[key] for key in weights if is_param(key)}
    return partial(apply, models.create(name)), params, figures


def apply(model, params, inputs):
    return model.apply({"params": params}, jnp.asarray(inputs))


def in_flax_order(file, figures, kind):
    """The authors' gradients as a tree of parameters, and which of its entries are known (large
    arrays are not).
    """
    gradients, present = {}, {}
    for key in (key.removeprefix("param/") for key in figures if is_param(key)):
        known = figures.get(f"grad/{kind}/{key}")
        gradients[key] = (
            np.zeros(figures[f"param/{key}"].shape) if known is None else np.float64(known)
        )
        present[key] = np.full(gradients[key].shape, known is not None)
    name = file.removesuffix("_degenerate")
    return from_torch(name, gradients), from_torch(name, present)


def assert_gradients_close(actual, wanted, present, tolerance=1e-5):
    compared = 0
    for a, b, known in zip(*map(jax.tree.leaves, (actual, wanted, present)), strict=True):
        if known.all():
            assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)
            compared += 1
    assert compared >= 5


def distance(a, b):
    """The relative difference, example by example."""
    size = lambda x: np.linalg.norm(np.reshape(x, (len(x), -1)), axis=1)
    return size(np.asarray(a) - b) / np.maximum(size(b), 1e-30)


@pytest.mark.parametrize("file", FILES)
def test_the_search_takes_the_authors_steps(file):
    apply_fn, params, figures = load(file)
    offset = float(figures["hyper/eps"])
    # NIN is slow: two in three of its images stay out.
    chosen = slice(None, None, 3 if file == "nin" else 1)
    figures = {
        key: value[chosen] for key, value in figures.items() if not is_param(key) and value.ndim
    }
    inputs, labels = jnp.asarray(figures["input/images"]), jnp.asarray(figures["input/labels"])

    @jax.jit
    def run(params):
        logits = apply_fn(params, inputs)
        traces = Traces(partial(apply_fn, params), inputs)
        net, closure, turns = module.plan_turns(traces, len(inputs))
        options = module.Options(num_steps=5, gradient_offset=offset, turns=turns)
        problem = module.Problem(
            inputs,
            labels.astype("int32"),
            jnp.argmax(logits, axis=1) == labels,
            module.likely_classes(logits, None),
        )
        found = module.search(net, closure, problem, options, active=jnp.ones(len(labels), bool))
        overshot = 1.02 * found.perturbation
        return logits, overshot, found, jnp.argmax(apply_fn(params, inputs + overshot), axis=1)

    logits, perturbation, found, label_after = run(params)
    np.testing.assert_allclose(logits, figures["clean/logits"], atol=1e-10)
    num_steps = np.where(found.success, found.num_replayable, 5)
    same = ~figures["deepfool/source_changed"]
    assert same.sum() >= 3
    for part, chosen in (("fixed_source", np.ones_like(same)), ("deepfool", same)):
        np.testing.assert_array_equal(num_steps[chosen], figures[f"{part}/iterations"][chosen])
        np.testing.assert_array_equal(found.success[chosen], figures[f"{part}/fooled"][chosen])
        assert distance(perturbation, figures[f"{part}/perturbation"])[chosen].max() < 1e-6
    np.testing.assert_array_equal(label_after[same], figures["deepfool/label_after"][same])


@pytest.mark.parametrize("file", ["mlp", "lenet"])
def test_deepfool_finds_the_authors_perturbations(file):
    apply_fn, params, figures = load(file)
    right = ~figures["deepfool/is_wrong"]
    options = dict(num_steps=5, gradient_offset=float(figures["hyper/eps"]))
    found = jax.jit(lambda params, x: dd_jax.deepfool(partial(apply_fn, params), x, **options))(
        params, figures["input/images"][right]
    )
    assert distance(found.perturbation, figures["deepfool/perturbation"][right]).max() < 1e-6
    np.testing.assert_array_equal(found.num_steps, figures["deepfool/iterations"][right])
    np.testing.assert_array_equal(found.success, figures["deepfool/fooled"][right])


@functools.cache
def penalties_and_gradient(file):
    """(params, inputs, labels, weights) -> ((weighted sum of penalties, (losses, metrics)), its
    gradient in params).
    """
    apply_fn, _, figures = load(file)
    hyper = {
        key: float(figures[f"hyper/{key}"]) for key in ("lambda", "c", "d", "eps", "overshoot")
    }
    options = dict(penalty_weight=hyper["lambda"], correct_scale=hyper["c"], wrong_scale=hyper["d"])
    options |= dict(gradient_offset=hyper["eps"], overshoot=hyper["overshoot"])

    def total(params, inputs, labels, weights):
        losses, metrics = dd_jax.deep_defense_loss(
            partial(apply_fn, params), inputs, labels, **options
        )
        return hyper["lambda"] * (metrics["penalty"] * weights).mean(), (losses, metrics)

    return jax.jit(jax.value_and_grad(total, has_aux=True))


@pytest.mark.parametrize("file", FILES)
def test_penalties_and_the_gradient_of_right_examples_are_the_authors(file):
    _, params, figures = load(file)
    wrong, same = figures["deepfool/is_wrong"], ~figures["deepfool/source_changed"]
    right = np.float64(~wrong)
    inputs, labels = figures["input/images"], figures["input/labels"]
    (value, (losses, metrics)), gradient = penalties_and_gradient(file)(
        params, inputs, labels, right
    )
    np.testing.assert_array_equal(metrics["num_steps"], figures["fixed_source/iterations"])
    np.testing.assert_array_equal(metrics["correct"], right)
    np.testing.assert_allclose(
        metrics["cross_entropy"].mean(), figures["loss/cross_entropy"], rtol=1e-12
    )
    penalties = 15 * metrics["penalty"]
    np.testing.assert_allclose(
        penalties[same], figures["loss/penalty_per_image"][same], rtol=0, atol=1e-8
    )
    np.testing.assert_allclose(value, figures["loss/regularizer_correct"], rtol=0, atol=1e-8)
    of_wrong = penalties[wrong].sum() / len(wrong)
    np.testing.assert_allclose(
        of_wrong, figures["fixed_source/regularizer_wrong"], rtol=0, atol=1e-8
    )
    np.testing.assert_allclose(losses, metrics["cross_entropy"] + penalties, rtol=1e-12)
    margins = np.where(wrong, -1, 1) * figures["deepfool/ratio"]
    np.testing.assert_allclose(metrics["margin"][same], margins[same], rtol=1e-6, atol=1e-12)
    # The degenerate file has one gradient, that of right and wrong examples; its wrong ones have
    # none.
    kind = "regularizer" if file == "mlp_degenerate" else "regularizer_correct"
    assert_gradients_close(gradient, *in_flax_order(file, figures, kind))


@pytest.mark.parametrize("file", ["mlp", "lenet"])
def test_gradients_of_wrong_examples_are_the_authors_but_for_their_slip(file):
    apply_fn, params, figures = load(file)
    wrong = figures["deepfool/is_wrong"]
    assert (figures["deepfool/source_changed"] & wrong).any()
    inputs, labels = figures["input/images"][wrong], figures["input/labels"][wrong]

    @jax.jit
    @jax.grad
    def plain_gradient(params, stale_source):
        options = dict(gradient_offset=float(figures["hyper/eps"]), stale_source=stale_source)
        return (
            15
            * reference.regularizer(partial(apply_fn, params), inputs, labels, **options).sum()
            / len(wrong)
        )

    everything, present = in_flax_order(file, figures, "regularizer")
    right, _ = in_flax_order(file, figures, "regularizer_correct")
    with_slip, without = plain_gradient(params, True), plain_gradient(params, False)
    assert_gradients_close(with_slip, jax.tree.map(np.subtract, everything, right), present)
    weights = np.full(wrong.sum(), wrong.sum() / len(wrong))
    _, gradient = penalties_and_gradient(file)(params, inputs, labels, weights)
    assert_gradients_close(gradient, without, jax.tree.map(np.ones_like, present), 1e-10)
    with pytest.raises(AssertionError):
        assert_gradients_close(gradient, with_slip, present, 1e-2)
