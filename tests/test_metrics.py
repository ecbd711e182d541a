"""Accuracy and rho: closed form on an affine net, padding that does not count, batches that add up to the whole."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dd_jax import data, metrics

NUM_EXAMPLES, SHAPE, NUM_CLASSES = 50, (3, 2), 4
OPTIONS = {"num_steps": 5, "overshoot": 0.02}
random = np.random.default_rng(0)
WEIGHTS = (random.normal(size=(6, NUM_CLASSES)) * np.geomspace(0.2, 3, 6)[:, None]).astype(np.float32)
BIASES = random.normal(size=NUM_CLASSES).astype(np.float32)
INPUTS = random.normal(size=(NUM_EXAMPLES, *SHAPE)).astype(np.float32)
LABELS = random.integers(0, NUM_CLASSES, NUM_EXAMPLES).astype(np.int32)  # Most of them wrong.
ALL = np.ones(NUM_EXAMPLES, np.float32)


def affine(x):
    return x.reshape(x.shape[0], -1) @ WEIGHTS + BIASES[None]


def curved(x):
    return jnp.tanh(affine(x) / 5)


@cache
def compiled(logits_fn, **options):
    return jax.jit(partial(metrics.measure_batch, logits_fn, **OPTIONS | options))


def measure(logits_fn, inputs=INPUTS, labels=LABELS, mask=ALL, **options):
    return compiled(logits_fn, **options)(jnp.asarray(inputs), jnp.asarray(labels), jnp.asarray(mask))


assert_close = partial(jax.tree.map, partial(np.testing.assert_allclose, rtol=1e-5))


def sizes_of_perturbations(norm):
    """The distance of each input from the nearest boundary of its predicted class, in NumPy."""
    x = INPUTS.reshape(NUM_EXAMPLES, -1).astype(np.float64)
    logits = x @ WEIGHTS.astype(np.float64) + BIASES
    predicted = logits.argmax(axis=1)
    gaps = logits.max(axis=1, keepdims=True) - logits
    directions = WEIGHTS.T[predicted][:, None] - WEIGHTS.T[None]
    lengths = np.abs(directions).sum(-1) if norm == "linf" else np.linalg.norm(directions, axis=-1)
    lengths[np.arange(NUM_EXAMPLES), predicted] = np.nan
    order = np.inf if norm == "linf" else 2
    return predicted, np.nanmin(gaps / lengths, axis=1), np.linalg.norm(x, order, axis=1)


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_closed_form_on_an_affine_net(norm):
    predicted, sizes, input_sizes = sizes_of_perturbations(norm)
    summary = metrics.summarise(measure(affine, norm=norm), norm)
    assert list(summary) == ["num_examples", "accuracy", f"rho_{norm}", norm, "deepfool_success", "deepfool_steps"]
    assert summary["num_examples"] == NUM_EXAMPLES and summary["accuracy"] == np.mean(predicted == LABELS) < 0.5
    np.testing.assert_allclose(summary[norm], 1.02 * sizes.mean(), rtol=1e-5)  # The overshoot counts.
    np.testing.assert_allclose(summary[f"rho_{norm}"], 1.02 * (sizes / input_sizes).mean(), rtol=1e-5)
    assert summary["deepfool_success"] == summary["deepfool_steps"] == 1.0


@pytest.mark.parametrize("batch_size", [7, 10, 50])
def test_the_summary_does_not_depend_on_the_batch_size(batch_size):
    total = None
    for batch in data.evaluation_batches(INPUTS[..., None], LABELS, batch_size):
        sums = measure(curved, batch["image"][..., 0], batch["label"], batch["mask"])
        total = sums if total is None else metrics.add(total, sums)
    assert total.examples == NUM_EXAMPLES
    assert_close(metrics.summarise(total), metrics.summarise(measure(curved)))


@pytest.mark.parametrize("padding", [0.0, 1e3, -7.0])
def test_masked_examples_do_not_count_whatever_they_hold(padding):
    fill = np.full((10, *SHAPE), padding, np.float32)
    padded = measure(
        affine,
        np.concatenate([fill, INPUTS]),
        np.concatenate([np.asarray(affine(fill)).argmax(axis=1).astype(np.int32), LABELS]),  # Right, if it counted.
        np.concatenate([np.zeros(10, np.float32), ALL]),
    )
    assert_close(padded, measure(affine))


def test_a_mask_takes_examples_out_one_by_one():
    mask = (np.arange(NUM_EXAMPLES) % 3 == 0).astype(np.float32)
    predicted, sizes, _ = sizes_of_perturbations("l2")
    sums = measure(affine, mask=mask)
    assert (sums.examples, sums.correct) == (17, np.sum(mask * (predicted == LABELS)))
    np.testing.assert_allclose(sums.size, 1.02 * np.sum(mask * sizes), rtol=1e-5)
    assert_close(metrics.add(sums, measure(affine, mask=1 - mask)), measure(affine))


def test_what_deepfool_does_not_fool_lowers_the_success_rate():
    blind = lambda x: affine(x.at[:, 0, 0].set(0))  # noqa: E731
    half_dead = measure(lambda x: jnp.where((x[:, 0, 0] > 0)[:, None], blind(x), BIASES[None]))
    alive = (INPUTS[:, 0, 0] > 0).astype(np.float32)
    fooled = int(alive.sum())
    assert 0 < fooled < NUM_EXAMPLES
    np.testing.assert_allclose(half_dead.size, measure(blind, mask=alive).size, rtol=1e-5)  # The others did not move.
    assert half_dead.success == fooled and half_dead.examples == NUM_EXAMPLES
    assert half_dead.steps == fooled + (NUM_EXAMPLES - fooled) * OPTIONS["num_steps"]


def test_options_reach_deepfool():
    """With two candidates the boundary is that of the second most likely class, which is not always the nearest."""
    x = INPUTS.reshape(NUM_EXAMPLES, -1)
    logits = x @ WEIGHTS + BIASES
    second, first = np.argsort(logits, axis=1)[:, -2:].T
    rows = np.arange(NUM_EXAMPLES)
    sizes = (logits[rows, first] - logits[rows, second]) / np.linalg.norm(WEIGHTS.T[first] - WEIGHTS.T[second], axis=1)
    assert sizes.sum() > 1.01 * sizes_of_perturbations("l2")[1].sum()
    np.testing.assert_allclose(measure(affine, num_candidates=2, overshoot=0.5).size, 1.5 * sizes.sum(), rtol=1e-5)


def test_nothing_to_measure_is_an_error():
    nothing = measure(affine, mask=0 * ALL)
    assert nothing.examples == nothing.correct == nothing.rho == 0
    with pytest.raises(ValueError, match="There is no example to measure"):
        metrics.summarise(nothing)
