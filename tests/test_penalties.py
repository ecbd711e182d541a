"""Penalties of the margin: their values and slopes, and how `regularizer` takes them."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_deepfool import INPUTS, NET

import dd_jax
from dd_jax import penalties

SCALES = dict(correct_scale=4.0, wrong_scale=2.0)
MARGINS = np.array([0.0, 0.125, 0.5, 0.0, -0.125, -1.5])
CORRECT = np.array([True, True, True, False, False, False])
EXPECTED = {
    "exponential": [1, np.exp(-0.5), np.exp(-2), 1, np.exp(0.25), np.exp(3)],
    "hinge": [1, 0.5, 0, 1, 1.25, 4],
    "linear": [0, -0.5, -2, 0, 0.25, 3],
    "reciprocal": [1, 1 / 1.5, 1 / 3, 1, 1.25, 4],
}
DEFAULTS = {"exponential": (25, 5), "hinge": (5, 5), "linear": (1, 1), "reciprocal": (25, 25)}
LABELS = jnp.argmax(NET(INPUTS), axis=1) * (jnp.arange(9) % 2)  # about half of them wrong
each_penalty = pytest.mark.parametrize("name", penalties.PENALTIES)


def slopes(name, margins, correct, **scales):
    """d penalty / d margin, example by example."""
    total = lambda margins: penalties.PENALTIES[name](margins, correct, **scales).sum()
    return np.asarray(jax.grad(total)(margins))


def test_the_registry_holds_every_penalty_under_its_own_name():
    assert set(penalties.PENALTIES) == set(EXPECTED)
    for name, function in penalties.PENALTIES.items():
        assert function.__name__ == name and getattr(penalties, name) is function


@each_penalty
def test_values(name, x64):
    penalty = penalties.PENALTIES[name](jnp.array(MARGINS), jnp.array(CORRECT), **SCALES)
    np.testing.assert_allclose(penalty, EXPECTED[name], rtol=1e-14)


@each_penalty
def test_default_scales(name, x64):
    margins, correct = jnp.array(MARGINS), jnp.array(CORRECT)
    given = dict(zip(("correct_scale", "wrong_scale"), DEFAULTS[name], strict=True))
    function = penalties.PENALTIES[name]
    given = {name: float(scale) for name, scale in given.items()}
    np.testing.assert_array_equal(function(margins, correct), function(margins, correct, **given))


@each_penalty
def test_every_penalty_falls_as_the_margin_grows(name, x64):
    margins = jnp.concatenate([jnp.linspace(1e-3, 0.24, 20), -jnp.linspace(1e-3, 3.0, 20)])
    correct = margins > 0
    assert (slopes(name, margins, correct, **SCALES) < 0).all()
    steps = jnp.diff(penalties.PENALTIES[name](margins[:20], correct[:20], **SCALES))
    assert (steps < 0).all()


def test_the_hinge_asks_nothing_beyond_its_margin(x64):
    margins, correct = jnp.array([0.2501, 7.0]), jnp.array([True, True])
    np.testing.assert_array_equal(penalties.hinge(margins, correct, **SCALES), 0)
    np.testing.assert_array_equal(slopes("hinge", margins, correct, **SCALES), 0)


@each_penalty
def test_right_and_wrong_meet_at_margin_zero_with_one_slope_if_the_scales_are_equal(name, x64):
    margins, correct = jnp.array([1e-12, -1e-12]), jnp.array([True, False])
    scales = dict(correct_scale=3.0, wrong_scale=3.0)
    right, wrong = penalties.PENALTIES[name](margins, correct, **scales)
    np.testing.assert_allclose(right, wrong, atol=1e-11)
    np.testing.assert_allclose(slopes(name, margins, correct, **scales), -3, rtol=1e-10)


@pytest.mark.parametrize("bits", [32, 64])
def test_the_exponential_is_capped_without_a_gradient(bits, request):
    if bits == 64:
        request.getfixturevalue("x64")
    margins, correct = jnp.array([-1.0, -1e4, -1e30]), jnp.zeros(3, bool)
    penalty = penalties.exponential(margins, correct)
    np.testing.assert_allclose(penalty[0], np.exp(5), rtol=1e-6)
    cap = np.finfo(penalty.dtype).max ** 0.5
    np.testing.assert_allclose(penalty[1:], cap, rtol=1e-4 if bits == 32 else 1e-12)
    slope = slopes("exponential", margins, correct)
    np.testing.assert_allclose(slope, [-5 * np.exp(5), 0, 0], rtol=1e-6)


@each_penalty
def test_huge_and_zero_margins_have_finite_values_and_slopes(name):
    margins = jnp.array([0.0, 0.0, 1e30, -1e30])
    correct = jnp.array([True, False, True, False])
    assert np.isfinite(penalties.PENALTIES[name](margins, correct)).all()
    assert np.isfinite(slopes(name, margins, correct)).all()


@each_penalty
def test_the_regularizer_and_the_loss_take_any_penalty_with_its_scales(name, x64):
    inputs, function = INPUTS.astype(float), penalties.PENALTIES[name]
    options = dict(penalty_fn=function, num_steps=3, **SCALES)

    @jax.jit
    def run(scale):
        net = lambda x: scale * NET(x)
        loss, metrics = dd_jax.deep_defense_loss(net, inputs, LABELS, **options, penalty_weight=0.5)
        return loss, metrics, dd_jax.regularizer(net, inputs, LABELS, **options)

    loss, metrics, penalty = run(1.0)
    correct = metrics["correct"] > 0
    assert correct.any() and not correct.all()
    expected = function(metrics["margin"], correct, **SCALES)
    np.testing.assert_allclose(penalty, expected, rtol=1e-12)
    np.testing.assert_allclose(metrics["penalty"], expected, rtol=1e-12)
    np.testing.assert_allclose(loss, metrics["cross_entropy"] + 0.5 * expected, rtol=1e-12)


def test_a_penalty_of_ones_own_gets_margins_and_correctness_and_sends_gradients_back(x64):
    inputs = INPUTS.astype(float)
    penalty_fn = lambda margin, correct: jnp.where(correct, (1 - margin) ** 2, 2 - margin)

    def total(function, shift):
        net = lambda x: NET(x) + shift[None]
        values = function(net, inputs, LABELS, num_steps=3)
        return values.sum(), values

    of = lambda function: jax.jit(jax.value_and_grad(partial(total, function), has_aux=True))(
        jnp.zeros(4)
    )
    (_, penalty), gradient = of(partial(dd_jax.regularizer, penalty_fn=penalty_fn))
    (_, margin), _ = of(dd_jax.signed_margin)
    correct = jnp.argmax(NET(inputs), axis=1) == LABELS
    np.testing.assert_allclose(penalty, penalty_fn(margin, correct), rtol=1e-12)
    weights = jnp.where(correct, -2 * (1 - margin), -1.0)
    weighted = lambda *arguments, **options: weights * dd_jax.signed_margin(*arguments, **options)
    _, expected = of(weighted)
    np.testing.assert_allclose(gradient, expected, rtol=1e-10)
    assert np.abs(gradient).max() > 1e-3


def only_margins(margin, correct):
    return jnp.exp(-margin)


def some_scale(margin, correct, correct_scale=1.0):
    return jnp.exp(-correct_scale * margin)


REFUSED = [
    (only_margins, dict(correct_scale=2.0), "penalty_fn does not take correct_scale; leave it out"),
    (only_margins, SCALES, "does not take correct_scale or wrong_scale; .* such as dd_jax.penal"),
    (some_scale, SCALES, "penalty_fn does not take wrong_scale; leave it out, or give a function"),
    (penalties.hinge, dict(wrong_scale=-1.0), "wrong_scale is -1.0; it must be 0 or more"),
]


@pytest.mark.parametrize("function", [dd_jax.regularizer, dd_jax.deep_defense_loss])
@pytest.mark.parametrize("penalty_fn, scales, message", REFUSED)
def test_scales_that_a_penalty_does_not_take_are_refused(function, penalty_fn, scales, message):
    with pytest.raises(ValueError, match=message):
        function(NET, INPUTS, LABELS, penalty_fn=penalty_fn, **scales)


def test_scales_that_a_penalty_of_ones_own_takes_are_given_to_it():
    call = jax.jit(lambda x, **scales: dd_jax.signed_margin(NET, x, LABELS, num_steps=2))
    margin = call(INPUTS)
    for penalty_fn in (
        some_scale,
        lambda margin, correct, **scales: jnp.exp(-scales["correct_scale"] * margin),
        partial(some_scale, correct_scale=9.0),
    ):
        penalty = dd_jax.regularizer(
            NET, INPUTS, LABELS, penalty_fn=penalty_fn, correct_scale=0.5, num_steps=2
        )
        np.testing.assert_allclose(penalty, jnp.exp(-0.5 * margin), rtol=1e-4)


def test_a_penalty_that_is_not_one_number_per_example_is_refused(unchecked):
    mean = lambda margin, correct: margin.mean()
    with pytest.raises(ValueError, match=r"one number per example, of shape \(9,\).* shape \(\)"):
        dd_jax.regularizer(NET, INPUTS, LABELS, penalty_fn=mean)


def test_the_hinge_has_no_gradient_at_its_corner():
    slope = jax.grad(lambda m: penalties.hinge(m, jnp.array([True]), correct_scale=4.0).sum())
    assert slope(jnp.array([0.25])).tolist() == [0.0]
