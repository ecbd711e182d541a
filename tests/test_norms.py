"""Norms: values, duality, and gradients where they are delicate."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dd_jax import deepfool, signed_margin
from dd_jax.attacks import fgsm, pgd
from dd_jax.norms import (
    check_bounds,
    check_norm,
    dual_norm,
    lp_norm,
    move_within,
    per_example,
    project,
    relative_norm,
    sample_in_ball,
    stay_within,
    steepest_direction,
)

X = jnp.array([[[3.0, -4.0], [0.0, 12.0]], [[1.0, -2.0], [2.0, -4.0]]])


def test_norms_of_unequal_entries():
    np.testing.assert_allclose(lp_norm(X, "l1"), [19.0, 9.0])
    np.testing.assert_allclose(dual_norm(X, "l1"), [12.0, 4.0])
    np.testing.assert_allclose(lp_norm(X, "l2"), [13.0, 5.0], rtol=1e-6)
    np.testing.assert_allclose(lp_norm(X, "linf"), [12.0, 4.0])
    np.testing.assert_allclose(dual_norm(X, "l2"), [13.0, 5.0], rtol=1e-6)
    np.testing.assert_allclose(dual_norm(X, "linf"), [19.0, 9.0])


def test_two_leading_axes_stay():
    np.testing.assert_allclose(
        lp_norm(X, "l2", num_leading=2), [[5.0, 12.0], [5**0.5, 20**0.5]], rtol=1e-6
    )
    np.testing.assert_allclose(dual_norm(X, "linf", num_leading=2), [[7.0, 12.0], [3.0, 6.0]])


@pytest.mark.parametrize(
    "norm, largest",
    [
        ("l1", lambda w: jnp.sign(w) * (jnp.abs(w) == jnp.abs(w).max())),
        ("l2", lambda w: w / jnp.sqrt((w**2).sum())),
        ("linf", jnp.sign),
    ],
)
def test_dual_norm_is_the_most_that_a_unit_ball_gives(norm, largest):
    w = X[1:]
    r = largest(w)
    assert lp_norm(r, norm) == pytest.approx(1)
    assert (w * r).sum() == pytest.approx(float(dual_norm(w, norm)[0]), rel=1e-6)


def test_gradients():
    gradient = jax.grad(lambda x: lp_norm(x, "l2").sum())
    np.testing.assert_allclose(gradient(X)[0], X[0] / 13, rtol=1e-6)
    np.testing.assert_array_equal(gradient(jnp.zeros((2, 3))), np.zeros((2, 3)))
    gradient = jax.grad(lambda x: lp_norm(x, "linf").sum())
    np.testing.assert_array_equal(gradient(jnp.array([[1.0, -3.0]])), [[0.0, -1.0]])
    np.testing.assert_array_equal(gradient(jnp.array([[2.0, -2.0]])), [[0.5, -0.5]])


@pytest.mark.parametrize("norm, rho", [("l2", [0.5, 2.0, 0.0]), ("linf", [0.8, 2.0, 0.0])])
def test_relative_norm(norm, rho):
    inputs = jnp.array([[6.0, 8.0], [0.0, -1.0], [0.0, 0.0]])
    perturbation = jnp.array([[-3.0, 4.0], [2.0, 0.0], [1.0, 1.0]])
    if norm == "linf":
        inputs, perturbation = (
            inputs.at[0].set(jnp.array([5.0, -3.0])),
            perturbation.at[0].set(jnp.array([-4.0, 1.0])),
        )
    np.testing.assert_allclose(relative_norm(perturbation, inputs, norm), rho, rtol=1e-6)
    gradients = jax.grad(lambda d, x: relative_norm(d, x, norm).sum(), argnums=(0, 1))(
        perturbation, inputs
    )
    for gradient in gradients:
        assert np.isfinite(gradient).all() and np.any(gradient[0]) and not np.any(gradient[2])


def test_per_example_broadcasts_over_the_rest():
    assert per_example(jnp.ones(2), X).shape == (2, 1, 1)


def test_an_unknown_norm_is_named_with_the_known_ones():
    with pytest.raises(ValueError, match=r"norm is 'l1'; it must be one of 'l2', 'linf'"):
        check_norm("l1")
    check_norm("l1", allowed=("l1", "l2"))
    with pytest.raises(ValueError, match=r"norm is 'linf'; it must be one of 'l1', 'l2'\."):
        check_norm("linf", allowed=("l1", "l2"))


def test_l1_is_refused_where_it_is_not_implemented(unchecked):
    ones = jnp.ones((1, 2))
    net = lambda x: x @ jnp.array([[1.0, 0.0], [0.0, 2.0]])
    label = jnp.array([1])
    for call in (
        lambda: deepfool(net, ones, norm="l1"),
        lambda: signed_margin(net, ones, label, norm="l1"),
        lambda: pgd(net, ones, epsilon=0.1, step_size=0.1, num_steps=1, norm="l1"),
        lambda: fgsm(net, ones, epsilon=0.1, norm="l1"),
        lambda: steepest_direction(ones, "l1"),
        lambda: sample_in_ball(jax.random.key(0), ones, jnp.ones(1), "l1"),
    ):
        with pytest.raises(ValueError, match=r"norm is 'l1'; it must be one of 'l2', 'linf'"):
            call()


def test_the_projection_onto_the_l1_ball_is_the_nearest_point(x64):
    """The optimality condition: x - P(x) is what the ball's normal cone at P(x) allows."""
    points = jax.random.normal(jax.random.key(0), (50, 3, 4), float)
    points = points * jnp.geomspace(0.1, 3.0, 12).reshape(1, 3, 4)
    radius = jnp.geomspace(0.01, 50.0, 50)
    found = jax.jit(project, static_argnames="norm")(points, radius, norm="l1")
    size = lp_norm(found, "l1")
    inside = lp_norm(points, "l1") <= radius
    assert inside.any() and not inside.all()
    np.testing.assert_array_equal(found[inside], points[inside])
    assert (size <= radius).all()
    np.testing.assert_allclose(size[~inside], radius[~inside], rtol=1e-13)
    rest = (points - found)[~inside]
    # Within a linear function's maximum over the ball: <rest, found> = radius * ||rest||_inf.
    gain = jnp.sum(rest * found[~inside], axis=(1, 2))
    np.testing.assert_allclose(gain, radius[~inside] * lp_norm(rest, "linf"), rtol=1e-12)
    assert (found == 0).any(axis=(1, 2)).any()


def test_l1_projections_with_a_zero_radius_equal_entries_and_float32():
    points = jnp.array([[2.0, -1.0, 0.5], [1.0, 1.0, -1.0], [0.0, 0.0, 0.0], [3.0, -1.0, 0.0]])
    found = project(points, jnp.array([0.0, 1.5, 0.0, 2.0]), "l1")
    wanted = [[0.0, 0.0, 0.0], [0.5, 0.5, -0.5], [0.0, 0.0, 0.0], [2.0, 0.0, 0.0]]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    many = jax.random.normal(jax.random.key(0), (20, 3072))
    radius = jnp.geomspace(1e-3, 1e3, 20)
    found = np.asarray(project(many, radius, "l1"), np.float64)
    assert (np.abs(found).sum(axis=1) <= np.asarray(radius, np.float64)).all()
    np.testing.assert_allclose(np.abs(found).sum(axis=1), radius, rtol=1e-4)


@pytest.mark.parametrize("norm", ["l1", "l2", "linf"])
def test_an_empty_batch_is_projected_and_sampled(norm):
    none = jnp.zeros((0, 2, 3))
    assert project(none, jnp.zeros(0), norm).shape == (0, 2, 3)
    if norm != "l1":
        assert sample_in_ball(jax.random.key(0), none, jnp.zeros(0), norm).shape == (0, 2, 3)


# The bounds of an example's last axis, which broadcast to the examples of X.
ROW = np.float64([[-1.0, 2.0]])


@pytest.mark.parametrize(
    "lower", [-1.0, ROW[0], ROW, ROW[None], np.broadcast_to(ROW, (2, 2)), jnp.zeros((1, 2, 1))]
)
def test_bounds_are_numbers_or_of_one_example_with_or_without_its_axis(lower):
    upper = lower + 1.5
    check_bounds((lower, upper), X)
    wanted = np.clip(X, *np.broadcast_arrays(lower, upper))
    found = move_within(X, (lower, upper))
    np.testing.assert_array_equal(found, wanted)
    assert found.dtype == X.dtype and (wanted != X).any() and (wanted == X).any()
    inside = jnp.asarray(wanted)
    np.testing.assert_allclose(
        inside + stay_within(100 * (X - inside), inside, (lower, upper)), wanted, atol=1e-6
    )


@pytest.mark.parametrize(
    "bounds, said",
    [
        ((0.0,), r"bounds must be a pair \(lower, upper\); got 1 of them"),
        (
            (0.0, np.ones((3, 2, 2))),
            r"broadcast to .* one example, \(2, 2\) or \(1, 2, 2\); got \(3, 2, 2\)",
        ),
        ((np.zeros((2, 2, 2)), 1.0), r"got \(2, 2, 2\)"),  # As many as there are examples.
        ((np.zeros((1, 1, 2, 2)), 1.0), r"got \(1, 1, 2, 2\)"),
        ((0.0, np.ones(3)), r"got \(3,\)"),
        ((2.0, 1.0), r"bounds are 2\.0 and 1\.0; the first must nowhere exceed the second"),
        (
            (ROW, 1.0),
            r"bounds are an array of shape \(1, 2\) and 1\.0; the first must nowhere exceed the "
            r"second",
        ),
        ((float("nan"), 1.0), "the first must nowhere exceed the second"),
    ],
)
def test_bounds_that_make_no_sense_cost_one_sentence(bounds, said):
    with pytest.raises(ValueError, match=said) as caught:
        check_bounds(bounds, X)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_projections_in_half_precision_keep_their_direction_and_stay_inside(norm):
    x = jax.random.normal(jax.random.key(0), (2, 3 * 224 * 224)).astype(jnp.bfloat16)
    radius = jnp.array([5.0, 50.0], jnp.bfloat16)
    found = project(x, radius, norm)
    assert found.dtype == jnp.bfloat16
    size = lp_norm(found.astype(jnp.float32), norm)
    limit = radius.astype(jnp.float32)
    assert (size <= limit).all() and (size >= 0.95 * limit).all()
    assert (jnp.sign(found) * jnp.sign(x) >= 0).all()
