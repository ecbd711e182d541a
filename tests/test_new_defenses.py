"""The defenses beside the paper's own: PGD training, TRADES, MMA and AMM, against closed forms on
affine nets, their reductions to the cross-entropy, finite differences, and small real trainings.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

import dd_jax
from dd_jax import attacks, defenses, norms, training

random = np.random.default_rng(11)
KEYS = jax.random.key(0), jax.random.key(1)
INPUTS = random.normal(size=(12, 6))
PARAMS = {"w": random.normal(size=(6, 5)), "v": random.normal(size=(5, 4))}
LABELS = np.argmax(np.tanh(INPUTS @ PARAMS["w"]) @ PARAMS["v"], axis=1).astype(np.int32)
LABELS[-4:] = (LABELS[-4:] + 1) % 4  # Misclassified.
# An affine net of two classes, some examples of which are misclassified.
WEIGHTS = random.normal(size=(6, 2))
TWO_LABELS = np.argmax(INPUTS @ WEIGHTS, axis=1).astype(np.int32)
TWO_LABELS[-3:] = 1 - TWO_LABELS[-3:]
NEW = ("adversarial_pgd", "trades", "mma", "amm")


def net(params, inputs):
    return jnp.tanh(inputs @ params["w"]) @ params["v"]


def losses(name, key=KEYS[0], params=PARAMS, **options):
    """Losses and metrics per example, compiled."""
    loss_fn = defenses.make_defense(name, **options).loss_fn
    arrays = jnp.asarray(INPUTS), jnp.asarray(LABELS), key
    return jax.jit(lambda p: loss_fn(partial(net, p), *arrays))(jax.tree.map(jnp.asarray, params))


def gradient(name, key=KEYS[0], **options):
    """Of the mean loss in the parameters."""
    objective = lambda params: losses(name, key, params, **options)[0].mean()
    return jax.grad(objective)(jax.tree.map(jnp.asarray, PARAMS))


def affine_losses(name, key=KEYS[0], **options):
    loss_fn = defenses.make_defense(name, **options).loss_fn
    arrays = jnp.asarray(INPUTS), jnp.asarray(TWO_LABELS), key
    return jax.jit(lambda w: loss_fn(lambda x: x @ w, *arrays))(jnp.asarray(WEIGHTS))


def affine_lead():
    """How far the label's logit leads, z_y - z_other, and the weights of that difference."""
    signs = np.where(TWO_LABELS == 0, 1, -1)
    normal = WEIGHTS[:, 0] - WEIGHTS[:, 1]
    return signs * (INPUTS @ normal), normal


def assert_close(first, second, rtol=1e-12):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=rtol, atol=1e-13), first, second)


def two_class_cross_entropy(lead):
    return np.log1p(np.exp(-lead))


# Reductions


REDUCTIONS = {
    "adversarial_pgd": dict(epsilon=0.0),
    "trades": dict(kl_weight=0.0),
    "mma": dict(clean_weight=1.0),
    "amm": dict(penalty_weight=0.0),
}


@pytest.mark.parametrize("name", NEW)
def test_at_the_end_of_their_options_they_are_clean_training(name, x64):
    assert_close(losses(name, **REDUCTIONS[name])[0], losses("clean")[0])
    assert_close(gradient(name, **REDUCTIONS[name]), gradient("clean"), rtol=1e-9)
    assert np.abs(losses(name)[0] - losses("clean")[0]).max() > 1e-2


def test_without_a_ball_the_divergence_is_zero(x64):
    loss, metrics = losses("trades", epsilon=0.0)
    assert_close(loss, losses("clean")[0])
    np.testing.assert_allclose(metrics["divergence"], 0, atol=1e-15)


# Gradients


SMOOTH = {
    "adversarial_pgd": dict(epsilon=0.2),
    "trades": dict(epsilon=0.2, kl_weight=2.0),
    "mma": dict(max_margin=0.3),
    # One wrong example is far from its class: exp(margin) would round all others away.
    "amm": dict(absolute_correct_scale=1.0, absolute_wrong_scale=0.002, num_steps=3),
}


@pytest.mark.parametrize("name", NEW)
def test_gradients_agree_with_finite_differences(name, x64):
    """The perturbations of the sign attacks do not change when the weights change by little; AMM's
    margin is differentiated through DeepFool.
    """
    objective = lambda params: losses(name, params=params, **SMOOTH[name])[0].mean()
    params = jax.tree.map(jnp.asarray, PARAMS)
    check_grads(objective, (params,), order=1, modes=["rev"], eps=1e-6, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", NEW)
def test_saturated_and_dead_nets_have_finite_gradients(name):
    loss_fn, arrays = (
        defenses.make_defense(name).loss_fn,
        (jnp.asarray(INPUTS, jnp.float32), LABELS),
    )
    objective = lambda p: loss_fn(partial(net, p), *map(jnp.asarray, arrays), KEYS[0])[0].mean()
    value_and_slopes = jax.jit(jax.value_and_grad(objective))
    for scale in (0.0, 1e4):
        scaled = {name: jnp.asarray(scale * x, jnp.float32) for name, x in PARAMS.items()}
        value, slopes = value_and_slopes(scaled)
        assert np.isfinite(value) and all(np.isfinite(x).all() for x in jax.tree.leaves(slopes))


# PGD


@pytest.mark.parametrize("norm, dual", [("linf", 1), ("l2", 2)])
def test_pgd_training_is_the_worst_case_of_an_affine_net(norm, dual, x64):
    options = dict(attack_norm=norm, num_attack_steps=40, relative_step_size=1.0)
    loss, metrics = affine_losses("adversarial_pgd", epsilon=0.3, **options)
    lead, normal = affine_lead()
    worst = lead - 0.3 * np.linalg.norm(normal, dual)
    np.testing.assert_allclose(loss, two_class_cross_entropy(worst), rtol=1e-6)
    np.testing.assert_array_equal(metrics["adversarial_correct"], worst > 0)
    np.testing.assert_array_equal(metrics["correct"], lead > 0)
    assert ((lead > 0) & (worst < 0)).any() and (worst > 0).any()


@pytest.mark.parametrize("norm", norms.NORMS)
def test_pgd_starts_where_the_key_says(norm, x64):
    options = dict(epsilon=0.3, attack_norm=norm, num_attack_steps=1, relative_step_size=0.0)
    starts = [
        norms.sample_in_ball(key, jnp.asarray(INPUTS), jnp.full(12, 0.3), norm) for key in KEYS
    ]
    for key, start in zip(KEYS, starts, strict=True):
        logits = net(PARAMS, INPUTS + start)
        wanted = -jax.nn.log_softmax(logits)[jnp.arange(12), LABELS]
        np.testing.assert_allclose(losses("adversarial_pgd", key, **options)[0], wanted)
    assert np.abs(starts[0] - starts[1]).min() > 0


def test_no_gradient_flows_through_pgds_perturbation(x64):
    options = dict(norm="l2", num_steps=4, key=KEYS[0], early_stop=False)
    logits_fn = partial(net, jax.tree.map(jnp.asarray, PARAMS))
    found = attacks.pgd(
        logits_fn, jnp.asarray(INPUTS), jnp.asarray(LABELS), epsilon=0.5, step_size=0.25, **options
    )
    at_points = lambda params: (
        -jax.nn.log_softmax(net(params, INPUTS + found.perturbation))[jnp.arange(12), LABELS].mean()
    )
    own = dict(epsilon=0.5, attack_norm="l2", num_attack_steps=4, relative_step_size=0.5)
    wanted = jax.grad(at_points)(jax.tree.map(jnp.asarray, PARAMS))
    assert_close(gradient("adversarial_pgd", **own), wanted, rtol=1e-9)


# TRADES


@pytest.mark.parametrize("norm, dual", [("linf", 1), ("l2", 2)])
def test_trades_on_an_affine_net_is_one_of_two_closed_forms(norm, dual, x64):
    """The divergence grows both ways from the input; the start decides which way it goes."""
    options = dict(epsilon=0.3, attack_norm=norm, num_attack_steps=40, relative_step_size=1.0)
    lead, normal = affine_lead()
    of = lambda lead: np.array([1 / (1 + np.exp(-lead)), 1 / (1 + np.exp(lead))])
    ways = [lead + sign * 0.3 * np.linalg.norm(normal, dual) for sign in (-1, 1)]
    divergences = [np.sum(of(lead) * np.log(of(lead) / of(way)), axis=0) for way in ways]
    went = []
    for key in KEYS:
        loss, metrics = affine_losses("trades", key, kl_weight=2.0, **options)
        went.append(np.isclose(metrics["divergence"], divergences[0], rtol=1e-6))
        wanted = np.where(went[-1], *divergences)
        np.testing.assert_allclose(metrics["divergence"], wanted, rtol=1e-6)
        np.testing.assert_allclose(loss, two_class_cross_entropy(lead) + 2 * wanted, rtol=1e-6)
    assert (went[0] != went[1]).any() and 0 < np.mean(went) < 1


def test_trades_perturbations_do_not_depend_on_the_labels(x64):
    loss_fn = defenses.make_defense("trades").loss_fn
    logits_fn = partial(net, jax.tree.map(jnp.asarray, PARAMS))
    first, second = (
        loss_fn(logits_fn, jnp.asarray(INPUTS), jnp.asarray(labels), KEYS[0])[1]["divergence"]
        for labels in (LABELS, (LABELS + 1) % 4)
    )
    np.testing.assert_array_equal(first, second)
    assert (first > 0).all()


# MMA


def test_mma_on_an_affine_net_finds_the_margins_and_leaves_out_the_large(x64):
    lead, normal = affine_lead()
    margin = lead / np.abs(normal).sum()
    largest = np.quantile(margin[lead > 0], 0.4)
    options = dict(max_margin=float(largest), num_attack_steps=20, num_bisections=20)
    loss, metrics = affine_losses("mma", clean_weight=0.25, **options)
    near, wrong = (lead > 0) & (margin < largest), lead < 0
    far = ~near & ~wrong
    assert near.any() and far.any() and wrong.any()
    found = np.asarray(metrics["absolute_margin"])
    np.testing.assert_allclose(found[near], margin[near], atol=largest / 2**19)
    assert (found[near] >= margin[near]).all()
    np.testing.assert_array_equal(found[wrong], 0)
    np.testing.assert_array_equal(found[far], largest)
    clean = two_class_cross_entropy(lead)
    np.testing.assert_allclose(loss[wrong], clean[wrong])
    np.testing.assert_allclose(loss[far], 0.25 * clean[far])
    # On the boundary the cross-entropy of two classes is log 2.
    np.testing.assert_allclose(loss[near], 0.25 * clean[near] + 0.75 * np.log(2), rtol=1e-4)


def test_mma_examples_are_just_across_the_boundary(x64):
    _, metrics = losses("mma", max_margin=2.0, num_bisections=16)
    right, found = np.asarray(metrics["correct"]) > 0, np.asarray(metrics["absolute_margin"])
    assert not metrics["adversarial_correct"][right & (found < 2)].any()
    assert (found[right] > 0).all() and (found[right] < 2).sum() > 3
    _, coarse = losses("mma", max_margin=2.0, num_bisections=1)
    assert (coarse["absolute_margin"] >= found - 1e-9).all()


# AMM


def test_amm_on_an_affine_net_is_the_closed_form(x64):
    lead, normal = affine_lead()
    margin = 1.02 * lead / np.linalg.norm(normal)
    scales = dict(absolute_correct_scale=1.5, absolute_wrong_scale=0.5)
    penalty = np.exp(-np.where(lead > 0, 1.5, 0.5) * margin)
    for gradient_name in ("through_iterates", "at_boundary"):
        loss, metrics = affine_losses(
            "amm", penalty_weight=3.0, aggregation="mean", gradient=gradient_name, **scales
        )
        np.testing.assert_allclose(metrics["absolute_margin"], margin, rtol=1e-9)
        np.testing.assert_allclose(loss, two_class_cross_entropy(lead) + 3 * penalty, rtol=1e-9)
    hinge, _ = affine_losses(
        "amm", penalty_weight=3.0, aggregation="mean", penalty="hinge", **scales
    )
    slack = np.maximum(0, 1 - np.where(lead > 0, 1.5, 0.5) * margin)
    np.testing.assert_allclose(hinge, two_class_cross_entropy(lead) + 3 * slack, rtol=1e-9)


def authors_choice(margin, right, labels, fraction):
    """As the authors' code goes about it: per class the worst, and of these the batch's worst."""
    chosen, num_worst = np.zeros(len(labels), bool), max(1, int(len(labels) * fraction))
    for group in (np.flatnonzero(right), np.flatnonzero(~right)):
        if not len(group):
            continue
        size = np.abs(margin[group])
        order = np.argsort(size if right[group[0]] else -size)
        for label in set(labels[group]):
            worst = next(index for index in order if labels[group[index]] == label)
            chosen[group[worst]] = worst in order[:num_worst]
    return chosen


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.2, 1.0])
def test_amm_counts_the_worst_of_every_class(fraction, x64):
    inputs = jnp.asarray(random.normal(size=(40, 6)))
    labels = random.integers(0, 4, 40).astype(np.int32)
    labels[:20] = np.argmax(net(PARAMS, inputs[:20]), axis=1)
    loss_of = lambda aggregation: defenses.make_defense(
        "amm", aggregation=aggregation, worst_fraction=fraction, num_steps=2
    ).loss_fn(partial(net, jax.tree.map(jnp.asarray, PARAMS)), inputs, jnp.asarray(labels))
    (loss, metrics), (_, everyone) = loss_of("min"), loss_of("mean")
    right, margin = np.asarray(metrics["correct"]) > 0, np.asarray(metrics["absolute_margin"])
    assert (~right).sum() > 5 and (everyone["penalty"] > 0).all()
    chosen = authors_choice(margin, right, labels, fraction)
    np.testing.assert_array_equal(metrics["penalty"] > 0, chosen)
    np.testing.assert_allclose(metrics["penalty"][chosen], everyone["penalty"][chosen])
    np.testing.assert_allclose(loss, metrics["cross_entropy"] + 15 * metrics["penalty"])
    assert chosen.sum() == 2 if fraction == 0 else chosen.sum() > 2


# What is refused


REFUSED = {
    "epsilon is -1": ("adversarial_pgd", dict(epsilon=-1.0)),
    "relative_step_size is -1": ("adversarial_pgd", dict(relative_step_size=-1.0)),
    "num_steps is 0": ("adversarial_pgd", dict(num_attack_steps=0)),
    "norm is 'l7'": ("trades", dict(attack_norm="l7")),
    "kl_weight is -1": ("trades", dict(kl_weight=-1.0)),
    "num_attack_steps is 0; it must be at least 1": ("trades", dict(num_attack_steps=0)),
    "clean_weight is 2.0; it must be within 0..1": ("mma", dict(clean_weight=2.0)),
    "max_margin is -1": ("mma", dict(max_margin=-1.0)),
    "num_bisections is -1": ("mma", dict(num_bisections=-1)),
    "aggregation is 'max'; it must be 'min' or 'mean'": ("amm", dict(aggregation="max")),
    "no penalty 'nope'": ("amm", dict(penalty="nope")),
    "correct_scale is -1": ("amm", dict(absolute_correct_scale=-1.0)),
    "worst_fraction is 1.5": ("amm", dict(worst_fraction=1.5)),
    "penalty_weight is -1": ("amm", dict(penalty_weight=-1.0)),
}


@pytest.mark.parametrize("message", REFUSED)
def test_options_that_make_no_sense_are_refused(message, unchecked):
    name, options = REFUSED[message]
    with pytest.raises(ValueError, match=message):
        losses(name, **options)


# Real trainings


class Linear(nn.Module):
    """On it DeepFool's perturbation is the shortest."""

    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(2, kernel_init=nn.initializers.normal(0.5))(x)


def two_clusters():
    """One coordinate tells the classes apart by far, nineteen others by little each."""
    labels = np.repeat(np.int32([0, 1]), 40)
    means = np.where(labels[:, None] == 0, 1, -1) * np.float32([1.0] + 19 * [0.03])
    noise = 0.02 * np.random.default_rng(1).normal(size=means.shape)
    return (means + noise).astype(np.float32), labels


def margin_after_training(name, **options):
    inputs, labels = two_clusters()
    optimizer = training.make_optimizer(
        optax.constant_schedule(0.05), momentum=0.9, weight_decay=0.0, max_gradient_norm=5.0
    )
    defense = defenses.make_defense(name, **options)
    step = training.make_train_step(Linear(), optimizer, defense)
    state = training.initial_state(Linear(), optimizer, (20,), 0)
    batch = {"image": inputs, "label": labels, "mask": np.ones(80, np.float32)}
    for _ in range(60):
        state, measured = step(state, batch, KEYS[0])
    found = dd_jax.deepfool(
        lambda x: Linear().apply({"params": state.params}, x), jnp.asarray(inputs), num_steps=20
    )
    assert found.success.all() and np.isfinite(measured["loss"])
    return float(measured["correct"]), np.linalg.norm(found.perturbation, axis=1).mean()


TRAININGS = {
    "adversarial_pgd": dict(epsilon=0.5, attack_norm="l2"),
    "trades": dict(epsilon=0.5, attack_norm="l2"),
    "mma": dict(max_margin=1.0, attack_norm="l2"),
    "amm": dict(penalty_weight=32.0, num_steps=3),
}


def test_training_with_each_raises_the_deepfool_margin():
    accuracy, clean = margin_after_training("clean")
    found = {name: margin_after_training(name, **options) for name, options in TRAININGS.items()}
    assert accuracy == 1 and all(accurate == 1 for accurate, _ in found.values()), found
    assert min(margin for _, margin in found.values()) > 1.03 * clean, (clean, found)
