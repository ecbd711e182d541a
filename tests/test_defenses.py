"""The defenses' losses against closed forms and against one another at the ends of their mixing
weights; Parseval.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dd_jax
from dd_jax import attacks, defenses

random = np.random.default_rng(5)
INPUTS = random.normal(size=(7, 6))
PARAMS = {"w": random.normal(size=(6, 5)), "v": random.normal(size=(5, 4))}
LABELS = np.argmax(np.tanh(INPUTS @ PARAMS["w"]) @ PARAMS["v"], axis=1).astype(np.int32)
LABELS[-2:] = (LABELS[-2:] + 1) % 4  # Misclassified.
MIXED = {"adversarial_deepfool": "mixing_weight", "adversarial_fgsm": "fgsm_weight"}


def net(params, inputs):
    return jnp.tanh(inputs @ params["w"]) @ params["v"]


@pytest.fixture(autouse=True)
def in_float64(x64):
    pass


def loss_and_gradient(name, **options):
    """Losses per example, and the gradient of their mean in the parameters."""
    loss_fn = defenses.make_defense(name, **options).loss_fn

    def objective(params):
        loss, metrics = loss_fn(partial(net, params), jnp.asarray(INPUTS), jnp.asarray(LABELS))
        return loss.mean(), (loss, metrics)

    gradient, (loss, metrics) = jax.jit(jax.grad(objective, has_aux=True))(
        jax.tree.map(jnp.asarray, PARAMS)
    )
    return loss, gradient, metrics


def assert_same(first, second):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-13), first[:2], second[:2])


def cross_entropy_at(inputs):
    logits = np.asarray(net(PARAMS, inputs))
    return np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(inputs)), LABELS]


@pytest.mark.parametrize("name, weight", MIXED.items())
def test_a_mixing_weight_of_0_is_clean_training_and_of_1_the_adversarial_half(name, weight):
    clean = loss_and_gradient("clean")
    assert_same(loss_and_gradient(name, **{weight: 0.0}), clean)
    ends = [loss_and_gradient(name, **{weight: value})[:2] for value in (0.0, 1.0)]
    middle = loss_and_gradient(name, **{weight: 0.25})
    assert_same(middle, jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, *ends))
    assert np.abs(ends[1][0] - ends[0][0]).max() > 0.1
    np.testing.assert_allclose(ends[1][0], middle[2]["adversarial_cross_entropy"])


def test_the_adversarial_half_is_the_loss_at_the_attacked_inputs():
    found = dd_jax.deepfool(
        partial(net, jax.tree.map(jnp.asarray, PARAMS)),
        jnp.asarray(INPUTS),
        jnp.asarray(LABELS),
        num_steps=5,
    )
    loss, _, metrics = loss_and_gradient("adversarial_deepfool", mixing_weight=1.0)
    np.testing.assert_allclose(loss, cross_entropy_at(INPUTS + found.perturbation), rtol=1e-12)
    np.testing.assert_array_equal(metrics["correct"], [1, 1, 1, 1, 1, 0, 0])
    assert found.success.all() and not metrics["adversarial_correct"].any()

    in_parts, _, _ = loss_and_gradient(
        "adversarial_deepfool", mixing_weight=1.0, class_chunk_size=1
    )
    np.testing.assert_allclose(in_parts, loss, rtol=1e-12)
    # So it arrives where it makes a difference.
    with pytest.raises(ValueError, match="class_chunk_size is 0"):
        loss_and_gradient("adversarial_deepfool", class_chunk_size=0)
    two = dd_jax.deepfool(
        partial(net, jax.tree.map(jnp.asarray, PARAMS)),
        jnp.asarray(INPUTS),
        jnp.asarray(LABELS),
        num_steps=5,
        num_candidates=2,
    ).perturbation
    assert np.abs(two - found.perturbation).max() > 1e-3
    loss, _, _ = loss_and_gradient(
        "adversarial_deepfool", mixing_weight=1.0, num_candidates=2, class_chunk_size=1
    )
    np.testing.assert_allclose(loss, cross_entropy_at(INPUTS + two), rtol=1e-12)

    loss, _, _ = loss_and_gradient("adversarial_fgsm", fgsm_weight=1.0, epsilon=0.2)
    slope = jax.grad(lambda x: jnp.sum(-jax.nn.log_softmax(net(PARAMS, x))[jnp.arange(7), LABELS]))(
        jnp.asarray(INPUTS)
    )
    np.testing.assert_allclose(loss, cross_entropy_at(INPUTS + 0.2 * np.sign(slope)), rtol=1e-12)
    assert (loss > cross_entropy_at(INPUTS)).all()  # Misclassified ones are attacked too.


def test_gradients_do_not_flow_through_the_adversarial_examples():
    """So the gradient is that of the cross-entropy at fixed points."""
    perturbation = attacks.fgsm(
        partial(net, jax.tree.map(jnp.asarray, PARAMS)),
        jnp.asarray(INPUTS),
        jnp.asarray(LABELS),
        epsilon=0.3,
        early_stop=False,
    ).perturbation
    at_points = lambda params: (
        -jax.nn.log_softmax(net(params, INPUTS + perturbation))[jnp.arange(7), LABELS].mean()
    )
    wanted = jax.grad(at_points)(jax.tree.map(jnp.asarray, PARAMS))
    _, gradient, _ = loss_and_gradient("adversarial_fgsm", fgsm_weight=1.0, epsilon=0.3)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-10), gradient, wanted)


def test_the_combination_is_the_sum_of_its_parts():
    options = dict(penalty_weight=3.0, correct_scale=2.0, num_steps=2)
    defended = loss_and_gradient("deep_defense", **options)
    assert_same(loss_and_gradient("deep_defense_fgsm", fgsm_weight=0.0, **options), defended)
    adversarial = loss_and_gradient("adversarial_fgsm", fgsm_weight=1.0, epsilon=0.2)
    both = loss_and_gradient("deep_defense_fgsm", fgsm_weight=0.7, epsilon=0.2, **options)
    assert_same(both, jax.tree.map(lambda a, b: a + 0.7 * b, defended[:2], adversarial[:2]))
    assert {"penalty", "margin", "adversarial_correct"} <= both[2].keys()
    without = loss_and_gradient(
        "deep_defense_fgsm", fgsm_weight=0.0, penalty_weight=0.0, num_steps=2
    )
    assert_same(without, loss_and_gradient("clean"))


def test_parseval_trains_as_clean_does_but_for_the_retraction():
    assert defenses.make_defense("parseval", beta=0.1).loss_fn is defenses.plain_loss
    clean = defenses.make_defense("clean")
    assert clean.retract(PARAMS) is PARAMS


@pytest.mark.parametrize("shape", [(9, 4), (4, 9), (3, 3, 2, 5)])
def test_retraction_moves_every_singular_value_as_its_equation_says(shape):
    weights = random.normal(size=shape) / 3
    scale = 3.0 if len(shape) == 4 else 1.0
    singular = lambda w: scale * np.linalg.svd(np.reshape(w, (-1, shape[-1])), compute_uv=False)
    before = singular(weights)
    retracted = defenses.parseval_retraction(
        {"kernel": jnp.asarray(weights), "bias": jnp.ones(3)}, beta=0.02
    )
    np.testing.assert_allclose(
        np.sort(singular(retracted["kernel"])), np.sort(before + 0.02 * (before - before**3))
    )
    np.testing.assert_array_equal(retracted["bias"], np.ones(3))
    distances = [np.abs(before**2 - 1).max()]
    for _ in range(400):
        retracted = defenses.parseval_retraction(retracted, beta=0.02)
        distances.append(np.abs(singular(retracted["kernel"]) ** 2 - 1).max())
    assert distances[-1] < 0.01 < distances[0] and (np.diff(distances) < 1e-12).all()


WRONG = {
    "no defense 'nope'; choose one of clean, parseval, .*deep_defense_fgsm": ("nope", {}),
    r"'clean' takes no beta; it takes \[\]": ("clean", dict(beta=0.1)),
    r"'adversarial_fgsm' takes no norm; it takes \['epsilon', 'fgsm_weight'\]": (
        "adversarial_fgsm",
        dict(norm="l2"),
    ),
}


@pytest.mark.parametrize("message", WRONG)
def test_unknown_defenses_and_options_are_refused(message):
    name, options = WRONG[message]
    with pytest.raises(ValueError, match=message):
        defenses.make_defense(name, **options)


OUT_OF_RANGE = {
    "adversarial_deepfool": ("mixing_weight", 1.5, "within 0..1"),
    "adversarial_fgsm": ("fgsm_weight", -0.1, "within 0..1"),
    "deep_defense_fgsm": ("fgsm_weight", -1.0, "0 or more"),
}


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_mixing_weights_out_of_range_are_refused(name):
    weight, value, allowed = OUT_OF_RANGE[name]
    with pytest.raises(ValueError, match=f"{weight} is {value}; it must be {allowed}"):
        loss_and_gradient(name, **{weight: value})
    assert "penalty_weight" in defenses.option_names("deep_defense_fgsm")
