"""Every measurement: closed form on an affine net, padding that does not count, batches that add up
to the whole.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dd_jax import data
from dd_jax.evaluation import metrics

NUM_EXAMPLES, SHAPE, NUM_CLASSES = 50, (3, 2), 4
OPTIONS = {"num_steps": 5, "overshoot": 0.02}
random = np.random.default_rng(0)
WEIGHTS = (random.normal(size=(6, NUM_CLASSES)) * np.geomspace(0.2, 3, 6)[:, None]).astype(
    np.float32
)
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
    return compiled(logits_fn, **options)(
        jnp.asarray(inputs), jnp.asarray(labels), jnp.asarray(mask)
    )


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
    suffix = "" if norm == "l2" else "_deepfool"
    summary = metrics.summarize(measure(affine, norm=norm))
    assert list(summary)[:2] == ["num_examples", "accuracy"]
    assert set(summary) == {
        *("num_examples", "accuracy", "deepfool_success", "deepfool_steps"),
        *(f"rho_{norm}{suffix}", f"{norm}{suffix}", "deepfool_disagreements"),
    }
    assert (
        summary["num_examples"] == NUM_EXAMPLES
        and summary["accuracy"] == np.mean(predicted == LABELS) < 0.5
    )
    # The overshoot counts.
    np.testing.assert_allclose(summary[f"{norm}{suffix}"], 1.02 * sizes.mean(), rtol=1e-5)
    np.testing.assert_allclose(
        summary[f"rho_{norm}{suffix}"], 1.02 * (sizes / input_sizes).mean(), rtol=1e-5
    )
    assert summary["deepfool_success"] == summary["deepfool_steps"] == 1.0


@pytest.mark.parametrize("batch_size", [7, 10, 50])
def test_the_summary_does_not_depend_on_the_batch_size(batch_size):
    total = None
    for batch in data.evaluation_batches(INPUTS[..., None], LABELS, batch_size):
        sums = measure(curved, batch["image"][..., 0], batch["label"], batch["mask"])
        total = sums if total is None else metrics.add(total, sums)
    assert total.examples == NUM_EXAMPLES
    assert_close(metrics.summarize(total), metrics.summarize(measure(curved)))


@pytest.mark.parametrize("padding", [0.0, 1e3, -7.0, np.nan])
def test_masked_examples_do_not_count_whatever_they_hold(padding):
    fill = np.full((10, *SHAPE), padding, np.float32)
    padded = measure(
        affine,
        np.concatenate([fill, INPUTS]),
        # Right, if it counted.
        np.concatenate([np.asarray(affine(fill)).argmax(axis=1).astype(np.int32), LABELS]),
        np.concatenate([np.zeros(10, np.float32), ALL]),
    )
    assert_close(padded, measure(affine))


def test_a_mask_takes_examples_out_one_by_one():
    mask = (np.arange(NUM_EXAMPLES) % 3 == 0).astype(np.float32)
    predicted, sizes, _ = sizes_of_perturbations("l2")
    sums = measure(affine, mask=mask)
    assert (sums.examples, sums.correct) == (17, np.sum(mask * (predicted == LABELS)))
    np.testing.assert_allclose(sums.figures["l2"], 1.02 * np.sum(mask * sizes), rtol=1e-5)
    assert_close(metrics.add(sums, measure(affine, mask=1 - mask)), measure(affine))


def test_what_deepfool_does_not_fool_lowers_the_success_rate():
    blind = lambda x: affine(x.at[:, 0, 0].set(0))  # noqa: E731
    half_dead = measure(lambda x: jnp.where((x[:, 0, 0] > 0)[:, None], blind(x), BIASES[None]))
    alive = (INPUTS[:, 0, 0] > 0).astype(np.float32)
    fooled = int(alive.sum())
    assert 0 < fooled < NUM_EXAMPLES
    np.testing.assert_allclose(
        half_dead.figures["l2"], measure(blind, mask=alive).figures["l2"], rtol=1e-5
    )  # The others did not move.
    assert half_dead.figures["deepfool_success"] == fooled and half_dead.examples == NUM_EXAMPLES
    assert (
        half_dead.figures["deepfool_steps"]
        == fooled + (NUM_EXAMPLES - fooled) * OPTIONS["num_steps"]
    )


def test_options_reach_deepfool():
    """With two candidates the boundary is that of the second most likely class, which is not always
    the nearest.
    """
    x = INPUTS.reshape(NUM_EXAMPLES, -1)
    logits = x @ WEIGHTS + BIASES
    second, first = np.argsort(logits, axis=1)[:, -2:].T
    rows = np.arange(NUM_EXAMPLES)
    sizes = (logits[rows, first] - logits[rows, second]) / np.linalg.norm(
        WEIGHTS.T[first] - WEIGHTS.T[second], axis=1
    )
    assert sizes.sum() > 1.01 * sizes_of_perturbations("l2")[1].sum()
    sums = measure(affine, num_candidates=2, overshoot=0.5)
    np.testing.assert_allclose(sums.figures["l2"], 1.5 * sizes.sum(), rtol=1e-5)


def test_nothing_to_measure_is_an_error():
    nothing = measure(affine, mask=0 * ALL)
    assert nothing.examples == nothing.correct == nothing.figures["rho_l2"] == 0
    with pytest.raises(ValueError, match="There is no example to measure"):
        metrics.summarize(nothing)


# FGSM, PGD, C&W on two classes, where FGSM goes straight to the boundary and every size has a closed
# form

# The norm of the weights' difference that the gap between two logits is divided by.
SIZES = {"l2": 2, "linf": 1}
TRUE = (np.arange(NUM_EXAMPLES) % 3 > 0).astype(np.int32)
BOUNDS = (-8.0, 8.0)
EVERYTHING = dict(
    names=("deepfool", "fgsm", "pgd", "carlini_wagner"),
    bounds=BOUNDS,
    fgsm_max_epsilon=4.0,
    curve_max_epsilon=0.5,
    curve_num_points=6,
    pgd_epsilon=0.25,
    pgd_step_size=0.1,
    pgd_num_steps=4,
    carlini_wagner_num_steps=60,
)


def two_classes(x):
    return affine(x)[:, :2]


def distances(norm):
    """Predicted classes, and how far the boundary is from each input, in float64."""
    x = INPUTS.reshape(NUM_EXAMPLES, -1).astype(np.float64)
    difference = (WEIGHTS[:, 0] - WEIGHTS[:, 1]).astype(np.float64)
    gap = x @ difference + BIASES[0] - BIASES[1]
    return (gap < 0).astype(int), np.abs(gap) / np.linalg.norm(difference, SIZES[norm])


def test_closed_forms_of_fgsm_pgd_and_carlini_wagner_on_two_classes():
    summary = metrics.summarize(measure(two_classes, labels=TRUE, **EVERYTHING))
    (predicted, l2), (_, linf) = distances("l2"), distances("linf")
    right = predicted == TRUE
    assert (
        0.1 < right.mean() < 0.9 and linf.max() < 4 and np.sum(linf < 0.25) not in (0, NUM_EXAMPLES)
    )
    sizes = np.abs(INPUTS).reshape(NUM_EXAMPLES, -1).max(axis=1)
    np.testing.assert_allclose(summary["rho_linf"], np.mean(linf / sizes), rtol=1e-3)
    np.testing.assert_allclose(summary["l2_carlini_wagner"], l2.mean(), rtol=0.03)
    assert summary["l2_carlini_wagner"] >= l2.mean()
    np.testing.assert_allclose(summary["l2"], 1.02 * l2.mean(), rtol=1e-5)
    assert (
        summary["fgsm_success"]
        == summary["carlini_wagner_success"]
        == summary["deepfool_success"]
        == 1.0
    )
    assert summary["accuracy"] == right.mean()
    assert summary["accuracy_pgd"] == np.mean(right & (linf > 0.25)) < summary["accuracy"]
    curve = [np.mean(~right | (linf < epsilon)) for epsilon in np.linspace(0, 0.5, 6)]
    assert summary["fgsm_curve"] == pytest.approx(curve) and curve[0] == np.mean(~right) < curve[-1]


def test_what_fgsm_cannot_fool_counts_with_the_largest_epsilon_and_lowers_the_success_rate():
    _, linf = distances("linf")
    limit = float(np.median(linf))
    summary = metrics.summarize(measure(two_classes, names=("fgsm",), fgsm_max_epsilon=limit))
    assert summary["fgsm_success"] == pytest.approx(np.mean(linf <= limit), abs=0.021) != 1.0
    sizes = np.abs(INPUTS).reshape(NUM_EXAMPLES, -1).max(axis=1)
    np.testing.assert_allclose(
        summary["rho_linf"], np.mean(np.minimum(linf, limit) / sizes), rtol=1e-3
    )


def test_bounds_hold_fgsm_back():
    tight = (float(INPUTS.min()), float(np.median(INPUTS)))
    free, held = (
        measure(two_classes, labels=TRUE, names=("fgsm",), bounds=bounds)
        for bounds in (None, tight)
    )
    assert (held.figures["fgsm_curve"] <= free.figures["fgsm_curve"]).all()
    assert held.figures["fgsm_curve"].sum() < free.figures["fgsm_curve"].sum()


def test_any_subset_gives_what_all_give_together():
    together = measure(two_classes, labels=TRUE, **EVERYTHING)
    names = list(together.figures)
    for name in EVERYTHING["names"]:
        alone = measure(two_classes, labels=TRUE, **EVERYTHING | {"names": (name,)})
        assert (alone.examples, alone.correct) == (together.examples, together.correct)
        assert_close(alone.figures, {name: together.figures[name] for name in alone.figures})
        names = [name for name in names if name not in alone.figures]
    assert names == []
    assert measure(two_classes, names=()).figures == {}


def test_random_starts_need_a_key_and_depend_on_it():
    inputs, labels = jnp.asarray(INPUTS), jnp.asarray(TRUE)
    settings = metrics.Settings(pgd_epsilon=0.5, pgd_step_size=0.05, pgd_num_steps=1, pgd_seed=0)
    options = dict(names=("pgd",), settings=settings)
    problem = lambda key: metrics.Problem(curved, inputs, labels, None, key)
    run = jax.jit(lambda key: metrics.attack(problem(key), **options)["pgd"].success)
    drawn = [run(jax.random.key(seed)).tolist() for seed in range(4)]
    assert len(set(map(tuple, drawn))) > 1 and drawn[0] == run(jax.random.key(0)).tolist()
    with pytest.raises(ValueError, match="pgd_seed is 0, but there is no key"):
        metrics.attack(problem(None), **options)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            dict(names=("deepfol",)),
            "no measurement 'deepfol'; choose any of deepfool, fgsm, pgd, carlini_wagner",
        ),
        (
            dict(names=("fgsm",), curve_num_points=1),
            "curve_num_points is 1 and curve_max_epsilon 0.3; .* at least 2",
        ),
        (dict(names=("fgsm",), fgsm_max_epsilon=0.0), "max_epsilon is 0.0; it must be more than 0"),
        (dict(names=("carlini_wagner",)), "bounds is None; this attack needs the range"),
    ],
)
def test_what_makes_no_sense_is_refused(unchecked, options, message):
    arguments = jnp.asarray(INPUTS), jnp.asarray(TRUE), jnp.asarray(ALL)
    with pytest.raises(ValueError, match=message):
        metrics.measure_batch(two_classes, *arguments, **options)
