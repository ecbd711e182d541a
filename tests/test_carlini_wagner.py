"""Carlini and Wagner's attack: never far from the closed form on affine nets, its parts, and its
edges.
"""

import functools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_deepfool import affine, assert_same, mlp, rows

from dd_jax import deepfool
from dd_jax.attacks import _carlini_wagner as module
from dd_jax.attacks import carlini_wagner_l2

INPUTS = jax.random.uniform(jax.random.key(1), (9, 6))
NET = mlp(jax.random.key(2))
PREDICTED = np.argmax(NET(INPUTS), axis=1)
BOUNDS = (0.0, 1.0)
QUICK = dict(bounds=BOUNDS, num_steps=60, num_binary_search_steps=3)


@functools.cache
def compiled(logits_fn, **options):
    return jax.jit(partial(carlini_wagner_l2, logits_fn, **options))


def attack(logits_fn, inputs, labels=None, **options):
    return jax.tree.map(np.asarray, compiled(logits_fn, **(QUICK | options))(inputs, labels))


def random_problem(seed, batch, size, num_classes):
    """Weights of very unequal sizes, and inputs in [0, 1], many of them at one end or the other."""
    random = np.random.default_rng(seed)
    weights = random.normal(size=(size, num_classes)) * np.geomspace(0.2, 3, size)[:, None]
    inputs = np.clip(random.uniform(-0.3, 1.3, size=(batch, size)), 0, 1)
    return weights, 0.3 * random.normal(size=num_classes), inputs


def shortest(weights, biases, x, bounds, confidence=0.0):
    """||D||_2 of the shortest D with which another logit leads by `confidence`: clip(t * w) for
    some t and class.
    """
    logits = x @ weights + biases
    source, found = logits.argmax(), np.inf
    for j in set(range(len(biases))) - {source}:
        w, lead = weights[:, j] - weights[:, source], logits[source] - logits[j] + confidence
        way = lambda t: np.clip(t * w, bounds[0] - x, bounds[1] - x)  # noqa: B023
        low, high = 0.0, 1e6
        if w @ way(high) < lead:
            continue
        for _ in range(100):
            middle = (low + high) / 2
            low, high = (middle, high) if w @ way(middle) < lead else (low, middle)
        found = min(found, np.linalg.norm(way(high)))
    return found


def length(perturbation):
    return np.linalg.norm(np.asarray(perturbation, np.float64), axis=1)


def lengths_and_optima(found, weights, biases, inputs, bounds, **options):
    optima = np.array([shortest(weights, biases, x, bounds, **options) for x in inputs])
    return length(found.perturbation), optima


@functools.cache
def compiled_affine(**options):
    """One compilation for all weights and bounds of the same shape."""
    return jax.jit(
        lambda w, b, x, bounds: carlini_wagner_l2(affine(w, b), x, bounds=bounds, **options)
    )


def attack_affine(weights, biases, inputs, bounds, axis=0, **options):
    bounds = [np.broadcast_to(bound, (1,) * axis + inputs.shape[1:]) for bound in bounds]
    arrays = jax.tree.map(np.float32, (weights, biases, inputs, bounds))
    return jax.tree.map(np.asarray, compiled_affine(**options)(*arrays))


@pytest.mark.parametrize("size, num_classes", [(20, 7), (200, 10)])
@pytest.mark.parametrize("bounds", [(-3.0, 4.0), (0.0, 1.0)])
def test_never_far_from_the_optimum_on_affine_nets(size, num_classes, bounds):
    ratios = []
    for seed in range(3):
        weights, biases, inputs = random_problem(seed, 32, size, num_classes)
        found = attack_affine(weights, biases, inputs, bounds)
        assert (
            found.success.all() and (found.num_steps > 0).all() and (found.num_steps <= 1000).all()
        )
        result = np.asarray(inputs + found.perturbation, np.float64)
        assert (result >= bounds[0] - 1e-6).all() and (result <= bounds[1] + 1e-6).all()
        changed = (result @ weights + biases).argmax(axis=1) != (inputs @ weights + biases).argmax(
            axis=1
        )
        assert changed.all()
        lengths, optima = lengths_and_optima(found, weights, biases, inputs, bounds)
        ratios.append(lengths / optima)
    assert np.max(ratios) <= 1.05 and np.min(ratios) >= 1 - 1e-4 and np.median(ratios) < 1.002


def test_inputs_on_their_bounds_move_and_equal_bounds_hold():
    weights, biases, _ = random_problem(8, 32, 20, 7)
    lower, upper = np.linspace(0, 0.5, 20), np.linspace(1, 0.5, 20)
    inputs = np.where(np.random.default_rng(9).random((32, 20)) < 0.5, lower, upper)
    found = attack_affine(weights, biases, inputs, (lower, upper))
    lengths, optima = lengths_and_optima(found, weights, biases, inputs, (lower, upper))
    np.testing.assert_array_equal(found.success, np.isfinite(optima))
    assert (
        lengths[found.success] <= 1.05 * optima[found.success]
    ).all() and not found.perturbation[:, -1].any()
    result = inputs + found.perturbation
    assert (result >= lower - 1e-6).all() and (result <= upper + 1e-6).all()
    of_one_row = attack_affine(weights, biases, inputs, (lower[None], upper[None]), axis=1)
    assert_same(of_one_row, found)


def test_neither_units_nor_the_scale_of_logits_matter():
    weights, biases, inputs = random_problem(5, 32, 20, 7)
    plain = attack_affine(weights, biases, inputs, BOUNDS)
    pixels = attack_affine(weights / 255, biases, 255 * inputs, (0.0, 255.0))
    loud = attack_affine(100 * weights, 100 * biases, inputs, BOUNDS)
    for other in (pixels.perturbation / 255, loud.perturbation):
        np.testing.assert_allclose(length(other), length(plain.perturbation), rtol=2e-3)


@pytest.mark.parametrize("initial_constant", [1e-3, 1e3])
def test_the_search_for_the_constant_forgives_where_it_starts(initial_constant):
    weights, biases, inputs = random_problem(6, 32, 20, 7)
    options = dict(initial_constant=initial_constant, num_binary_search_steps=12)
    found = attack_affine(weights, biases, inputs, BOUNDS, **options)
    lengths, optima = lengths_and_optima(found, weights, biases, inputs, BOUNDS)
    assert found.success.all() and (lengths / optima).max() <= 1.05
    if initial_constant < 1:
        patient = attack_affine(weights, biases, inputs, BOUNDS, abort_early=False, **options)
        assert (found.num_steps < patient.num_steps).all() and (patient.num_steps > 3 * 200).all()


def test_confidence_is_a_lead_in_logits():
    weights, biases, inputs = random_problem(7, 32, 20, 7)
    found = attack_affine(weights, biases, inputs, (-3.0, 4.0), confidence=1.5)
    lengths, optima = lengths_and_optima(
        found, weights, biases, inputs, (-3.0, 4.0), confidence=1.5
    )
    assert (
        found.success.all()
        and (lengths / optima).max() <= 1.05
        and (lengths / optima).min() >= 1 - 1e-4
    )
    logits = (inputs + np.asarray(found.perturbation, np.float64)) @ weights + biases
    row, labels = np.arange(32), (inputs @ weights + biases).argmax(axis=1)
    lead = logits.max(axis=1) - logits[row, labels]
    assert (lead >= 1.5 - 1e-5).all() and (lead < 1.6).all()


def test_shorter_than_deepfool_on_curved_nets():
    found = attack(NET, INPUTS, PREDICTED)
    longer = jax.jit(partial(deepfool, NET, bounds=BOUNDS))(INPUTS)
    both = found.success & longer.success
    assert both.sum() >= 5 and (found.success >= longer.success).all()
    ratio = (length(found.perturbation) / length(longer.perturbation))[both]
    assert (ratio < 1.015).all() and ratio.min() < 0.9
    assert (
        (np.argmax(NET(INPUTS + found.perturbation), axis=1) != PREDICTED) == found.success
    ).all()
    assert (np.argmax(NET(INPUTS + 0.9 * found.perturbation), axis=1) == PREDICTED)[both].all()


def test_boxes_without_a_way_out_dead_nets_and_ties():
    inputs = np.array([[0.5, 0.5], [1.0, 0.0]])
    barred = attack_affine(
        np.array([[1.0, -1.0], [0.5, 0.0]]), np.array([5.0, 0.0]), inputs, BOUNDS
    )
    assert not barred.success.any() and (barred.num_steps == 1000).all()
    # where the lead is least
    np.testing.assert_allclose(inputs + barred.perturbation, np.zeros((2, 2)), atol=0.01)
    dead = attack_affine(np.zeros((2, 2)), np.array([1.0, 0.0]), inputs, BOUNDS)
    assert not dead.success.any() and (dead.num_steps == 1000).all() and not dead.perturbation.any()
    tied = attack_affine(
        np.array([[1.0, 1.0], [-2.0, 2.0]]), np.zeros(2), np.array([[1.0, 0.0], [0.5, 0.0]]), BOUNDS
    )
    assert tied.success.all() and (length(tied.perturbation) < 1e-3).all()


def test_misclassified_examples_are_done_and_cost_nothing():
    labels = np.where(np.arange(9) % 2 == 0, PREDICTED, (PREDICTED + 1) % 4)
    found, from_predicted = attack(NET, INPUTS, labels), attack(NET, INPUTS, PREDICTED)
    assert (
        not found.perturbation[1::2].any()
        and found.success[1::2].all()
        and not found.num_steps[1::2].any()
    )
    assert_same(rows(found, slice(None, None, 2)), rows(from_predicted, slice(None, None, 2)))
    never = attack(NET, INPUTS, (PREDICTED + 1) % 4, num_steps=10**8)  # would take days
    assert not never.perturbation.any() and never.success.all() and not never.num_steps.any()


def test_what_is_not_finite_does_not_spread():
    strange, others = np.array([3, 5]), np.array([0, 1, 2, 4, 6, 7, 8])
    inputs = INPUTS.at[3].set(jnp.inf).at[5].set(jnp.nan)
    found = attack(NET, inputs, np.argmax(NET(inputs), axis=1))
    assert not found.success[strange].any() and np.isfinite(found.perturbation).all()
    assert_same(rows(found, others), rows(attack(NET, INPUTS, PREDICTED), others))


def test_adam_is_optax_adam():
    gradients = jax.random.normal(jax.random.key(3), (5, 2, 3)) * jnp.array([[[1.0], [1e-3]]])
    optimizer = optax.adam(optax.cosine_decay_schedule(0.1, 20))
    expected, state = jnp.zeros((2, 3)), optimizer.init(jnp.zeros((2, 3)))
    zeros, none = jnp.zeros(2), jnp.zeros(2, int)
    run = module.Run(expected, expected, expected, none, none.astype(bool), zeros, zeros)
    for gradient in gradients:
        updates, state = optimizer.update(gradient, state)
        expected = optax.apply_updates(expected, updates)
        run = module.adam(run, gradient, jnp.full(2, 0.1), 20)
        np.testing.assert_allclose(run.position, expected, rtol=1e-5, atol=1e-7)


def test_order_and_company_do_not_matter(short_turns, x64):
    inputs, order = INPUTS.astype(float), jax.random.permutation(jax.random.key(5), 9)
    company = jnp.concatenate([inputs[order], jnp.zeros((4, 6)), jnp.ones((3, 6))])
    # the first constant is too small
    options = dict(num_steps=30, num_binary_search_steps=3, initial_constant=0.5)
    whole = attack(NET, inputs, **options)
    assert len(set(whole.num_steps.tolist())) > 3
    assert_same(rows(attack(NET, company, **options), slice(9)), rows(whole, order), rtol=1e-8)
    alone = [attack(NET, inputs[i : i + 1], **options) for i in (2, 7)]
    assert_same(
        jax.tree.map(lambda *rows: np.concatenate(rows), *alone),
        rows(whole, np.array([2, 7])),
        rtol=1e-8,
    )


def test_no_gradient_flows_through_the_result():
    total = lambda scale: carlini_wagner_l2(
        lambda x: NET(scale * x), scale * INPUTS, **QUICK
    ).perturbation.sum()
    assert jax.jit(jax.grad(total))(1.0) == 0


WRONG_CALLS = {
    "bounds is None; this attack needs the range of valid inputs": dict(bounds=None),
    r"bounds are 1\.0 and 0\.0; the first must nowhere exceed the second": dict(bounds=(1.0, 0.0)),
    r"bounds are 0\.0 and inf; this attack needs a finite range": dict(bounds=(0.0, math.inf)),
    "num_steps is 0; it must be at least 1": dict(num_steps=0),
    "num_binary_search_steps is 0; it must be at least 1": dict(num_binary_search_steps=0),
    r"learning_rate is 0\.0; it must be more than 0": dict(learning_rate=0.0),
    r"initial_constant is -1\.0; it must be more than 0": dict(initial_constant=-1.0),
    r"confidence is -1\.0; it must be 0 or more": dict(confidence=-1.0),
    r"inputs must be a floating batch.* got int32\[9, 6\]": dict(inputs=jnp.ones((9, 6), int)),
    r"labels must be integers of shape \(9,\).* not one-hot": dict(labels=jnp.ones((9, 4))),
}


@pytest.mark.parametrize("message", WRONG_CALLS)
def test_errors_say_what_was_expected_and_what_came(message, unchecked):
    arguments = dict(inputs=INPUTS, labels=None, bounds=BOUNDS) | WRONG_CALLS[message]
    inputs, labels = arguments.pop("inputs"), arguments.pop("labels")
    with pytest.raises(ValueError, match=message):
        jax.jit(partial(carlini_wagner_l2, NET, **arguments))(inputs, labels)


def test_an_empty_batch_has_an_empty_result():
    found = jax.jit(lambda x: carlini_wagner_l2(NET, x, **QUICK))(INPUTS[:0])
    assert (found.perturbation.shape, found.success.shape, found.num_steps.shape) == (
        (0, 6),
        (0,),
        (0,),
    )
