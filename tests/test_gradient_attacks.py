"""FGSM, PGD and the search for epsilon: closed forms on affine nets, a plain loop, the ball, and
the edges.
"""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_deepfool import NORMS, affine, affine_net, assert_same, mlp, rows

from dd_jax.attacks import fgsm, fgsm_success_curve, minimal_fgsm, pgd
from dd_jax.norms import project, sample_in_ball, steepest_direction
from dd_jax.types import AttackResult

INPUTS = jax.random.normal(jax.random.key(1), (9, 6))
NET = mlp(jax.random.key(2))
PREDICTED = np.argmax(NET(INPUTS), axis=1)
KEY = jax.random.key(3)
STEPS = dict(epsilon=0.5, step_size=0.1, num_steps=8)
FGSM, PGD, MINIMAL = (
    partial(fgsm, epsilon=0.3),
    partial(pgd, **STEPS),
    partial(minimal_fgsm, max_epsilon=5.0),
)
ATTACKS = (FGSM, PGD, MINIMAL)


def dead(x):
    """Far below every threshold: class 1, and no gradient."""
    return jax.nn.relu(x[:, :3] - 100) + jnp.array([[0.0, 1.0, 0.0]])


@functools.cache
def compiled(attack, logits_fn, **options):
    return jax.jit(partial(attack, logits_fn, **options))


def call(attack, logits_fn, inputs, labels=None, **options):
    """The attack compiled as a whole, once for all tests that share it; NumPy arrays, which compile
    no more.
    """
    return jax.tree.map(np.asarray, compiled(attack, logits_fn, **options)(inputs, labels))


def length(perturbation, norm):
    """||D||_p per example, in float64."""
    flat = np.asarray(perturbation, np.float64).reshape(len(perturbation), -1)
    return np.abs(flat).max(axis=1) if norm == "linf" else np.linalg.norm(flat, axis=1)


def ascent(logits_fn, inputs, labels, norm):
    """d(x) by autodiff of the cross-entropy."""
    loss = lambda x: -jax.nn.log_softmax(logits_fn(x))[jnp.arange(len(labels)), labels].sum()
    gradient = np.asarray(jax.grad(loss)(inputs))
    if norm == "linf":
        return np.sign(gradient)
    return gradient / np.sqrt((gradient**2).sum(axis=tuple(range(1, gradient.ndim)), keepdims=True))


def plain_pgd(
    logits_fn, inputs, labels, *, epsilon, step_size, num_steps, norm, bounds=None, early_stop=True
):
    """PGD as it is written down, every example in every step."""
    inputs, perturbation, steps = (
        np.asarray(inputs),
        np.zeros(inputs.shape),
        np.zeros(len(labels), int),
    )
    for _ in range(num_steps):
        moves = (np.argmax(logits_fn(inputs + perturbation), axis=1) == labels) | (not early_stop)
        after = perturbation + step_size * ascent(logits_fn, inputs + perturbation, labels, norm)
        size = np.linalg.norm(after, axis=1, keepdims=True)
        after = (
            np.clip(after, -epsilon, epsilon)
            if norm == "linf"
            else after * np.minimum(1, epsilon / size)
        )
        if bounds is not None:
            after = np.clip(inputs + after, *bounds) - inputs
        perturbation, steps = np.where(moves[:, None], after, perturbation), steps + moves
    success = np.argmax(logits_fn(inputs + perturbation), axis=1) != labels
    return AttackResult(perturbation, success, steps)


@pytest.mark.parametrize("shape, num_classes", [((6, 7), 2), ((4, 2, 3, 2), 7)])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bounds", [None, (-0.9, 0.8)])
def test_fgsm_on_affine_nets(shape, num_classes, norm, bounds, x64):
    weights, biases, inputs = affine_net(shape, num_classes)
    inputs = inputs if bounds is None else np.clip(inputs, *bounds)
    flat = inputs.reshape(shape[0], -1)
    probabilities = np.exp(flat @ weights + biases)
    labels = probabilities.argmax(axis=1)
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    gradient = (probabilities - np.eye(num_classes)[labels]) @ weights.T  # of the cross-entropy
    direction = (
        np.sign(gradient)
        if norm == "linf"
        else gradient / np.linalg.norm(gradient, axis=1, keepdims=True)
    )
    expected = 0.3 * direction.reshape(shape)
    if bounds is not None:
        expected = np.clip(inputs + expected, *bounds) - inputs
    found = call(
        fgsm, affine(weights, biases), jnp.array(inputs), epsilon=0.3, norm=norm, bounds=bounds
    )
    np.testing.assert_allclose(found.perturbation, expected, rtol=1e-11, atol=1e-14)
    assert (found.num_steps == 1).all()
    after = ((flat + expected.reshape(flat.shape)) @ weights + biases).argmax(axis=1)
    np.testing.assert_array_equal(found.success, after != labels)


@pytest.mark.parametrize(
    "norm, early_stop, bounds",
    [
        ("linf", True, None),
        ("l2", True, (-0.7, 0.7)),
        ("linf", False, (-0.7, 0.7)),
        ("l2", False, None),
    ],
)
def test_pgd_is_the_plain_loop(norm, early_stop, bounds, short_turns, x64):
    inputs, options = (
        INPUTS.astype(float),
        STEPS | dict(norm=norm, early_stop=early_stop, bounds=bounds),
    )
    inputs = inputs if bounds is None else jnp.clip(inputs, *bounds)
    predicted = jnp.argmax(NET(inputs), axis=1)
    # one is misclassified already
    labels = jnp.where(jnp.arange(9) == 4, (predicted + 1) % 4, predicted)
    found = call(pgd, NET, inputs, labels, **options)
    expected = plain_pgd(NET, inputs, labels, **options)
    assert_same(found, expected, rtol=1e-10)
    assert (len(set(found.num_steps.tolist())) > 2) == early_stop and found.success.any()
    if early_stop:
        assert found.success[4] and found.num_steps[4] == 0 and not found.perturbation[4].any()


@pytest.mark.parametrize("norm, bounds", [("linf", None), ("l2", (-1.0, 1.1))])
def test_pgd_with_one_step_is_fgsm(norm, bounds):
    one = call(pgd, NET, INPUTS, epsilon=0.3, step_size=0.3, num_steps=1, norm=norm, bounds=bounds)
    jax.tree.map(
        np.testing.assert_array_equal,
        one,
        call(fgsm, NET, INPUTS, epsilon=0.3, norm=norm, bounds=bounds),
    )
    assert one.success.any() and not one.success.all()


@pytest.mark.parametrize("size, norm", [(1, "l2"), (3072, "l2"), (7, "linf")])
def test_pgd_never_leaves_its_ball(size, norm):
    weights = jax.random.normal(jax.random.key(4), (size, 3))
    net = lambda x: jnp.sin(x @ weights)
    options = dict(num_steps=7, norm=norm, early_stop=False)

    @jax.jit
    def attack(inputs, epsilons, upper):
        """Steps that are shorter than the ball, from its inside, and steps that are longer."""
        small = pgd(net, inputs, epsilon=epsilons, step_size=epsilons / 3, key=KEY, **options)
        large = pgd(
            net, inputs, epsilon=epsilons, step_size=2 * epsilons, bounds=(0.0, upper), **options
        )
        return small.perturbation, large.perturbation

    for scale in (1.0, 1000.0):
        inputs = scale * jax.random.uniform(jax.random.key(size), (16, size), minval=0.1)
        epsilons = scale * jnp.geomspace(1e-4, 1.0, 16)
        for perturbation in attack(inputs, epsilons, jnp.array(scale)):
            lengths = length(perturbation, norm)
            assert (lengths <= np.asarray(epsilons, np.float64)).all()
            assert np.isclose(lengths, epsilons, rtol=1e-4).any(), "no step was cut"
        assert (inputs + perturbation >= -1e-6 * scale).all() and (
            inputs + perturbation <= scale * (1 + 1e-6)
        ).all()


def test_frozen_examples_do_not_change():
    found, longer = (
        call(pgd, NET, INPUTS, PREDICTED, **(STEPS | dict(num_steps=3))),
        call(PGD, NET, INPUTS, PREDICTED),
    )
    done = longer.success & (longer.num_steps <= 3)
    assert done.any() and not done.all()
    np.testing.assert_array_equal(found.success, done)
    np.testing.assert_array_equal(found.perturbation[done], longer.perturbation[done])
    assert (found.num_steps[~done] == 3).all()


def test_misclassified_examples_are_done_unless_all_are_to_be_attacked():
    labels = np.where(np.arange(9) % 2 == 0, PREDICTED, (PREDICTED + 1) % 4)
    for attack in ATTACKS:
        found, from_predicted = (
            call(attack, NET, INPUTS, labels),
            call(attack, NET, INPUTS, PREDICTED),
        )
        assert (
            not found.perturbation[1::2].any()
            and found.success[1::2].all()
            and not found.num_steps[1::2].any()
        )
        assert_same(rows(found, slice(None, None, 2)), rows(from_predicted, slice(None, None, 2)))
    loss = lambda x: -jax.nn.log_softmax(NET(x))[jnp.arange(9), labels]
    for attack in (FGSM, PGD):
        found = call(attack, NET, INPUTS, labels, early_stop=False)
        assert (
            loss(INPUTS + found.perturbation)[1::2] > loss(INPUTS)[1::2]
        ).all() and found.num_steps.all()


@pytest.mark.parametrize("norm", NORMS)
def test_a_random_start_fills_the_ball_and_is_an_examples_own(norm):
    radius = np.linspace(1, 3, 400)
    drawn = jax.jit(partial(sample_in_ball, norm=norm))(
        KEY, jnp.zeros((400, 6)), jnp.array(radius, jnp.float32)
    )
    shares = length(drawn, norm) / radius
    assert shares.max() <= 1
    for share in (0.8, 0.9, 0.95):  # A smaller ball has share**6 of the volume.
        assert (shares < share).mean() == pytest.approx(share**6, abs=0.07)
    assert np.abs(np.mean(drawn / radius[:, None], axis=0)).max() < 0.1

    # of length 0: it shows the start
    one_step = dict(epsilon=0.5, step_size=0.0, num_steps=1, norm=norm)
    start = jax.jit(lambda key, labels: pgd(NET, INPUTS, labels, key=key, **one_step))
    labels = np.where(np.arange(9) == 0, PREDICTED + 1, PREDICTED) % 4
    found, other = (np.asarray(start(key, labels).perturbation) for key in (KEY, jax.random.key(4)))
    np.testing.assert_allclose(found[1:], 0.5 * (drawn / radius[:, None])[1:9], rtol=1e-4)
    assert (other != found)[1:].any(axis=1).all()
    assert not found[0].any(), "what is misclassified already needs no start"


@pytest.mark.parametrize("norm", NORMS)
def test_the_steepest_direction_gains_most_and_a_projection_is_nearest(norm):
    gradient = jnp.array(
        [[3.0, -4.0, 0.0], [1e-30, 0.0, -1e-30], [3e30, 4e30, 0.0], [0.0, 0.0, 0.0]]
    )
    direction = steepest_direction(gradient, norm)
    half = 0.5**0.5
    expected = {
        "l2": [[0.6, -0.8, 0], [half, 0, -half], [0.6, 0.8, 0], [0, 0, 0]],
        "linf": np.sign(gradient),
    }[norm]
    np.testing.assert_allclose(direction, expected, rtol=1e-6)
    points = jnp.array([[3.0, -4.0], [0.3, 0.4], [0.0, 0.0], [-5.0, 0.0]])
    expected = {
        "l2": [[1.2, -1.6], [0.3, 0.4], [0, 0], [0, 0]],
        "linf": [[2, -2], [0.3, 0.4], [0, 0], [0, 0]],
    }[norm]
    np.testing.assert_allclose(
        project(points, jnp.array([2.0, 1.0, 1.0, 0.0]), norm), expected, rtol=1e-6
    )


def test_epsilon_may_differ_from_example_to_example():
    epsilons = jnp.linspace(0.0, 0.8, 9)
    one = jax.jit(lambda x, epsilon: fgsm(NET, x, epsilon=epsilon))
    found = one(INPUTS, epsilons)
    alone = [one(INPUTS[i : i + 1], epsilons[i]) for i in range(9)]
    assert_same(found, jax.tree.map(lambda *rows: np.concatenate(rows), *alone))
    np.testing.assert_allclose(length(found.perturbation, "linf"), epsilons, rtol=1e-6)


@pytest.mark.parametrize("scale", [1e3, 1e-30])
def test_the_direction_survives_saturated_and_tiny_logits(scale):
    logits_fn = lambda x: x @ jnp.array([[3.0, -1.0], [0.5, 2.0], [1.0, 1.5]])
    inputs = jnp.array([[4.0, 1.0, 0.0]])
    gradient = jax.grad(lambda x: -jax.nn.log_softmax(scale * logits_fn(x))[0, 0])(inputs)
    assert not gradient.any() or scale < 1, (
        "autodiff finds a gradient here; choose a more confident net"
    )
    found = call(fgsm, lambda x: scale * logits_fn(x), inputs, epsilon=0.1, norm="l2")
    wanted = np.array([[-4.0, 1.5, 0.5]])
    np.testing.assert_allclose(found.perturbation, 0.1 * wanted / np.linalg.norm(wanted), rtol=1e-5)


def test_dead_nets_and_what_is_not_finite_stay_where_they_are():
    others = np.array([0, 1, 2, 4, 5, 6, 7, 8])
    for attack in ATTACKS:
        found = call(attack, dead, INPUTS, jnp.ones(9, int))
        assert (
            not found.perturbation.any() and not found.success.any() and (found.num_steps > 0).all()
        )
        found, without = (
            call(attack, NET, x, PREDICTED) for x in (INPUTS.at[3].set(jnp.nan), INPUTS)
        )
        assert not found.perturbation[3].any()
        assert_same(rows(found, others), rows(without, others))


@pytest.mark.parametrize("norm", NORMS)
def test_minimal_fgsm_on_affine_nets(norm, x64):
    weights, biases, inputs = affine_net((8, 5), 4, seed=2)
    logits = inputs @ weights + biases
    labels, row = logits.argmax(axis=1), np.arange(8)
    direction = ascent(affine(weights, biases), inputs, labels, norm)
    lead, gain = logits[row, labels][:, None] - logits, direction @ weights
    gain = gain - gain[row, labels][:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        # where the first other class takes over
        epsilons = np.where(gain > 0, lead / gain, np.inf).min(axis=1)
    found = call(
        minimal_fgsm, affine(weights, biases), jnp.array(inputs), max_epsilon=20.0, norm=norm
    )
    assert found.success.all() and (found.num_steps == 1).all()
    np.testing.assert_allclose(
        found.perturbation, epsilons[:, None] * direction, rtol=4e-4, atol=1e-12
    )
    assert (
        jnp.argmax(affine(weights, biases)(inputs + found.perturbation), axis=1) != labels
    ).all()
    coarse = call(
        minimal_fgsm,
        affine(weights, biases),
        jnp.array(inputs),
        max_epsilon=20.0,
        norm=norm,
        num_bisections=0,
    )
    ratio = length(coarse.perturbation, norm) / epsilons
    assert (ratio >= 1).all() and (ratio <= 1000 ** (1 / 29)).all() and (ratio > 1.01).any()


def test_minimal_fgsm_where_success_comes_and_goes_or_never_comes():
    def logits_fn(x):
        """Class 1 for 0.1 < x < 0.2 and for 0.7 < x, class 0 elsewhere."""
        fools = jnp.maximum(jnp.minimum(x - 0.1, 0.2 - x), x - 0.7)
        return jnp.concatenate([jnp.zeros_like(x), fools], axis=1)

    inputs = jnp.array([[0.0], [0.3], [-8.0]])
    found = call(minimal_fgsm, logits_fn, inputs, jnp.zeros(3, int), max_epsilon=1.0)
    np.testing.assert_array_equal(found.success, [True, True, False])
    np.testing.assert_allclose(found.perturbation[0, 0], 0.1, rtol=2e-3)
    np.testing.assert_allclose(jnp.abs(found.perturbation[2, 0]), 1.0)


def test_minimal_fgsm_and_the_success_curve_agree_with_fgsm():
    bounds = (-2.0, 2.0)
    inputs = jnp.clip(INPUTS, *bounds)
    labels = jnp.argmax(NET(inputs), axis=1)
    labels = jnp.where(jnp.arange(9) == 0, labels + 1, labels) % 4
    found = call(minimal_fgsm, NET, inputs, labels, max_epsilon=2.0, bounds=bounds)
    epsilons = np.where(found.num_steps == 1, length(found.perturbation, "linf"), 0).astype(
        np.float32
    )
    at = jax.jit(lambda epsilon: fgsm(NET, inputs, labels, epsilon=epsilon, bounds=bounds).success)
    assert found.success[1:].any() and at(jnp.array(epsilons))[found.success].all()
    grid = (0.4, 0.0, 0.1, 0.9)
    curve = jax.jit(partial(fgsm_success_curve, NET, epsilons=grid, bounds=bounds))(inputs, labels)
    assert (
        curve.shape == (4, 9)
        and curve[:, 0].all()
        and not curve[1, 1:].any()
        and curve[3, 1:].any()
    )
    for epsilon, success in zip(grid, curve, strict=True):
        np.testing.assert_array_equal(success, at(jnp.full(9, epsilon)))


@pytest.mark.parametrize("attack", [PGD, partial(PGD, norm="l2"), MINIMAL])
def test_order_and_company_do_not_matter(attack, short_turns, x64):
    inputs, order = INPUTS.astype(float), jax.random.permutation(jax.random.key(5), 9)
    company = jnp.concatenate([inputs[order], jnp.zeros((4, 6)), 50 * inputs[:3]])
    whole = call(attack, NET, inputs)
    assert_same(rows(call(attack, NET, company), slice(9)), rows(whole, order), rtol=1e-10)
    if attack is not PGD:
        return  # The others share its loop, or have none; compiling takes a while.
    one = jax.jit(partial(attack, NET))
    alone = jax.tree.map(
        lambda *rows: np.concatenate(rows), *(one(inputs[i : i + 1]) for i in range(9))
    )
    assert_same(alone, whole, rtol=1e-10)


def test_vmap_and_pmap_agree_with_jit(x64):
    inputs = INPUTS[:8].astype(float)
    attack = partial(pgd, NET, **STEPS)
    expected = jax.jit(attack)(inputs)
    for transform in (jax.vmap, jax.pmap):
        halves = transform(attack)(inputs.reshape(2, 4, 6))
        assert_same(
            jax.tree.map(lambda x: x.reshape((8,) + x.shape[2:]), halves), expected, rtol=1e-10
        )


def test_no_gradient_flows_through_the_results():
    for attack in (PGD, MINIMAL):
        total = lambda scale: attack(lambda x: NET(scale * x), scale * INPUTS).perturbation.sum()  # noqa: B023
        assert jax.jit(jax.grad(total))(1.0) == 0


@pytest.mark.parametrize(
    "bounds", [(-jnp.full(6, 0.5), jnp.linspace(0.6, 0.9, 6)), (-0.5, jnp.ones((1,)))]
)
def test_bounds_may_be_arrays(bounds):
    inputs = jnp.clip(INPUTS, -0.5, 0.6)
    found = jax.jit(partial(fgsm, NET, epsilon=0.4, bounds=bounds))(inputs)
    lower, upper = (np.broadcast_to(bound, (9, 6)) for bound in bounds)
    result = np.asarray(inputs + found.perturbation)
    assert (
        (result >= lower - 1e-6).all()
        and (result <= upper + 1e-6).all()
        and np.isclose(result, upper).any()
    )
    for attack in (*ATTACKS, partial(fgsm_success_curve, epsilons=(0.1, 0.5))):
        of_one_row = [jnp.broadcast_to(bound, (1, 6)) for bound in bounds]
        jax.tree.map(
            np.testing.assert_array_equal,
            jax.jit(partial(attack, NET, bounds=of_one_row))(inputs),
            jax.jit(partial(attack, NET, bounds=bounds))(inputs),
        )


WRONG_CALLS = {
    "norm is 'l1'; it must be one of 'l2', 'linf'": dict(norm="l1"),
    r"epsilon is -0\.1; it must be 0 or more": dict(epsilon=-0.1),
    "epsilon is nan; it must be 0 or more": dict(epsilon=float("nan")),
    r"epsilon must be one number, or one per example: \(9,\); got shape \(3,\)": dict(
        epsilon=jnp.ones(3)
    ),
    r"step_size is -1\.0; it must be 0 or more": dict(step_size=-1.0),
    "num_steps is 0; it must be at least 1": dict(num_steps=0),
    r"bounds must be a pair \(lower, upper\); got 1 of them": dict(bounds=(0.0,)),
    r"bounds are 1\.0 and 0\.0; the first must nowhere exceed the second": dict(bounds=(1.0, 0.0)),
    r"a bound must .* one example, \(6,\) or \(1, 6\); got \(9, 6\)": dict(
        bounds=(0.0, jnp.ones((9, 6)))
    ),
    r"a bound must .* one example, \(6,\) or \(1, 6\); got \(5,\)": dict(
        bounds=(jnp.zeros(5), 1.0)
    ),
    r"inputs must be a floating batch.* got int32\[9, 6\]": dict(inputs=jnp.ones((9, 6), int)),
    r"labels must be integers of shape \(9,\).* not one-hot": dict(labels=jnp.ones((9, 4))),
    r"at least 2 classes .* returned \(9, 1\)": dict(logits_fn=lambda x: x[:, :1]),
}


@pytest.mark.parametrize("message", WRONG_CALLS)
@pytest.mark.parametrize("wrap", [lambda attack: attack, jax.jit])
def test_errors_say_what_was_expected_and_what_came(message, wrap, unchecked):
    arguments = (
        dict(logits_fn=NET, inputs=INPUTS, labels=None, epsilon=0.3, step_size=0.1)
        | WRONG_CALLS[message]
    )
    logits_fn, inputs, labels = (arguments.pop(name) for name in ("logits_fn", "inputs", "labels"))
    with pytest.raises(ValueError, match=message):
        wrap(partial(pgd, logits_fn, **arguments))(inputs, labels)


def test_errors_of_the_search_for_epsilon(unchecked):
    for message, options in {
        "max_epsilon is 0; it must be more than 0": dict(max_epsilon=0),
        "num_grid_points is 1; it must be at least 2": dict(max_epsilon=1.0, num_grid_points=1),
        "num_bisections is -1; it must be at least 0": dict(max_epsilon=1.0, num_bisections=-1),
    }.items():
        with pytest.raises(ValueError, match=message):
            minimal_fgsm(NET, INPUTS, **options)
    for epsilons in (0.1, [0.1, -0.1], [[0.1]]):
        with pytest.raises(
            ValueError, match="epsilons must be a vector of numbers, each 0 or more"
        ):
            fgsm_success_curve(NET, INPUTS, epsilons=epsilons)
