"""What counts as fooled: another class by a plain forward pass, and a perturbation that was
allowed.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from dd_jax.evaluation.verification import is_fooled, predicted_classes

# The last is out of (0, 1).
INPUTS = jnp.asarray([[0.25, 0.5], [0.5, 0.25], [0.5, 0.5], [0.125, 2.0]])
CLASSES = jnp.asarray([0, 1, 0, 0])


def net(x):
    """Class 1 where the first component exceeds the second."""
    return jnp.stack([x[:, 1], x[:, 0]], axis=1)


def test_the_class_of_the_largest_logit_and_none_of_what_is_no_number():
    np.testing.assert_array_equal(predicted_classes(net, INPUTS), CLASSES)
    np.testing.assert_array_equal(
        predicted_classes(net, INPUTS.at[1, 1].set(jnp.nan)), [0, -1, 0, 0]
    )


def test_fooled_is_what_has_another_class():
    away = jnp.asarray([[0.5, 0.0], [-0.5, 0.0], [-0.1, 0.0], [0.0, 0.0]])
    np.testing.assert_array_equal(is_fooled(net, INPUTS, away, CLASSES), [True, True, False, False])
    # Misclassified already.
    np.testing.assert_array_equal(is_fooled(net, INPUTS, 0 * away, 1 - CLASSES), [True] * 4)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_fools_nothing(bad):
    assert not is_fooled(net, INPUTS[:1], jnp.asarray([[0.5, bad]]), CLASSES[:1]).any()


def test_a_net_that_breaks_down_is_not_fooled():
    broken = lambda x: jnp.where(x[:, :1] > 0.5, jnp.nan, net(x))
    assert not is_fooled(broken, INPUTS[:1], jnp.asarray([[0.5, 0.0]]), CLASSES[:1]).any()


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (jnp.zeros(2), jnp.ones(2))])
def test_bounds_are_kept_up_to_rounding(bounds):
    far = jnp.asarray([[0.75, 0.0], [0.75, 0.0], [0.6, 0.0], [0.875, -1.5]])
    np.testing.assert_array_equal(
        is_fooled(net, INPUTS, far, 0 * CLASSES, bounds=bounds), [True, False, False, True]
    )
    np.testing.assert_array_equal(is_fooled(net, INPUTS, far, 0 * CLASSES), [True] * 4)
    # Class 0 stays; the point goes from out of bounds further out.
    outwards = jnp.asarray([[0.5, 0.01]])
    assert not is_fooled(net, INPUTS[3:], outwards, jnp.asarray([1]), bounds=bounds).any()
    assert is_fooled(net, INPUTS[3:], 0 * outwards, jnp.asarray([1]), bounds=bounds).all()
    assert is_fooled(
        net, INPUTS[:1], jnp.asarray([[0.75 + 1e-7, 0.0]]), CLASSES[:1], bounds=bounds
    ).all()
    assert not is_fooled(
        net, INPUTS[:1], jnp.asarray([[0.75 + 1e-5, 0.0]]), CLASSES[:1], bounds=bounds
    ).any()


@pytest.mark.parametrize("norm, size", [("l2", 0.5), ("linf", 0.4)])
def test_the_ball_is_kept_up_to_rounding(norm, size):
    one, away = INPUTS[:1], jnp.asarray([[0.4, -0.3]])
    for epsilon, fooled in ((size, True), (size * (1 - 1e-5), False), (size * 1.1, True)):
        assert bool(is_fooled(net, one, away, CLASSES[:1], epsilon=epsilon, norm=norm)[0]) == fooled
