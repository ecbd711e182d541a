"""The registry, and the paper's defenses: their losses against closed forms and against one another
at the ends of their mixing weights; Parseval; penalties and solvers by name.
"""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dd_jax
from dd_jax import attacks, defenses, penalties
from dd_jax.defenses import _deep_defense

random = np.random.default_rng(5)
INPUTS = random.normal(size=(7, 6))
PARAMS = {"w": random.normal(size=(6, 5)), "v": random.normal(size=(5, 4))}
LABELS = np.argmax(np.tanh(INPUTS @ PARAMS["w"]) @ PARAMS["v"], axis=1).astype(np.int32)
LABELS[-2:] = (LABELS[-2:] + 1) % 4  # Misclassified.
KEY = jax.random.key(2)
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
        logits_fn = partial(net, params)
        loss, metrics = loss_fn(logits_fn, jnp.asarray(INPUTS), jnp.asarray(LABELS), KEY)
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
    parseval = defenses.make_defense("parseval", beta=0.1)
    assert parseval.loss_fn.func is defenses.plain_loss and not parseval.loss_fn.keywords
    assert parseval.retract.func is defenses.parseval_retraction
    assert parseval.retract.keywords == {"beta": 0.1}
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


# The registry


def keywords(function):
    """The keyword options of a loss or retraction, with their defaults."""
    parameters = inspect.signature(function).parameters.values()
    own = {one.name: one.default for one in parameters if one.kind == one.KEYWORD_ONLY}
    passed_on = any(one.kind == one.VAR_KEYWORD for one in parameters)
    return (keywords(_deep_defense.deep_defense_loss) if passed_on else {}) | own


@pytest.mark.parametrize("name", defenses.NAMES)
def test_an_entry_lists_the_options_that_its_functions_take(name):
    entry = defenses.DEFENSES[name]
    taken = keywords(entry.loss) | (keywords(entry.retract) if entry.retract else {})
    assert sorted(entry.options) == sorted(taken) and defenses.option_names(name) == taken.keys()
    assert list(inspect.signature(entry.loss).parameters)[:4] == [
        "logits_fn",
        "inputs",
        "labels",
        "key",
    ]
    assert (entry.swept in entry.options) if entry.swept else entry.swept is None
    assert bool(entry.swept_symbol) == bool(entry.swept) and entry.label


def test_names_are_in_the_papers_order_and_labels_differ():
    assert defenses.NAMES == (
        "clean",
        "parseval",
        "adversarial_deepfool",
        "adversarial_fgsm",
        "deep_defense",
        "deep_defense_fgsm",
        "adversarial_pgd",
        "trades",
        "mma",
        "amm",
    )
    labels = [entry.label for entry in defenses.DEFENSES.values()]
    assert len(set(labels)) == len(labels) and labels[4] == "Deep Defense"


def test_an_option_has_one_default_whichever_defense_takes_it():
    """Configurations hold the options of all defenses in one section."""
    defaults = {}
    for entry in defenses.DEFENSES.values():
        for option, value in keywords(entry.loss).items():
            assert defaults.setdefault(option, value) == value, option
    assert defaults["epsilon"] == 0.1 and defaults["penalty_weight"] == 15.0


def test_a_defense_of_ones_own_is_one_entry(monkeypatch):
    def scaled(logits_fn, inputs, labels, key, *, strength=1.0):
        loss, metrics = defenses.plain_loss(logits_fn, inputs, labels)
        return strength * loss, metrics

    monkeypatch.setitem(defenses.DEFENSES, "mine", defenses.Defense(scaled, options=("strength",)))
    clean, mine = loss_and_gradient("clean"), loss_and_gradient("mine", strength=3.0)
    assert_same(mine, jax.tree.map(lambda x: 3 * x, clean[:2]))
    with pytest.raises(ValueError, match=r"'mine' takes no beta; it takes \['strength'\]"):
        defenses.make_defense("mine", beta=1.0)
    with pytest.raises(ValueError, match="choose one of clean, .*, mine"):
        defenses.make_defense("nope")


# Deep Defense's penalty and solver by name


@pytest.mark.parametrize("name", penalties.PENALTIES)
def test_a_penalty_by_name_is_that_of_penalties(name):
    net_of = lambda params: partial(net, params)
    for scales in ({}, {"correct_scale": 3.0, "wrong_scale": 2.0}):
        found = loss_and_gradient("deep_defense", penalty=name, num_steps=2, **scales)
        wanted, _ = dd_jax.deep_defense_loss(
            net_of(jax.tree.map(jnp.asarray, PARAMS)),
            jnp.asarray(INPUTS),
            jnp.asarray(LABELS),
            penalty_fn=penalties.PENALTIES[name],
            num_steps=2,
            **scales,
        )
        np.testing.assert_allclose(found[0], wanted, rtol=1e-12)


def test_a_solver_by_name_is_the_attack_in_the_defenses_norm(monkeypatch):
    """Looked up when it is called: the double stands for the attack of that name."""
    norms = []

    def double(logits_fn, inputs, labels, *, norm):
        norms.append(norm)
        found = dd_jax.deepfool(logits_fn, inputs, labels, norm=norm, num_steps=5)
        return found._replace(perturbation=1.02 * found.perturbation)

    assert {"ddn", "fmn", "superdeepfool"} < set(attacks.__all__)
    monkeypatch.setattr(attacks, "fmn", double)
    options = dict(penalty_weight=1.0, correct_scale=2.0, wrong_scale=1.0, gradient="at_boundary")
    solved = loss_and_gradient("deep_defense", solver="fmn", norm="linf", **options)
    assert set(norms) == {"linf"}
    given = partial(double, norm="linf")
    wanted, _ = dd_jax.deep_defense_loss(
        partial(net, jax.tree.map(jnp.asarray, PARAMS)),
        jnp.asarray(INPUTS),
        jnp.asarray(LABELS),
        norm="linf",
        solver=given,
        **options,
    )
    np.testing.assert_allclose(solved[0], wanted, rtol=1e-12)
    assert np.abs(solved[0] - loss_and_gradient("clean")[0]).min() > 1e-3


def test_superdeepfool_as_the_solver_has_the_closed_form_on_an_affine_net():
    weights, inputs = jnp.asarray(PARAMS["v"][:, :3]), jnp.asarray(INPUTS[:, :5])
    labels = jnp.argmax(inputs @ weights, axis=1).astype(jnp.int32)
    defense = defenses.make_defense("deep_defense", solver="superdeepfool", gradient="at_boundary")
    _, metrics = defense.loss_fn(lambda x: x @ weights, inputs, labels, KEY)
    logits, size = inputs @ weights, np.linalg.norm(inputs, axis=1)
    for row, label in enumerate(labels):
        distances = [
            (logits[row, label] - logits[row, other])
            / np.linalg.norm(weights[:, label] - weights[:, other])
            for other in range(3)
            if other != label
        ]
        np.testing.assert_allclose(metrics["margin"][row], min(distances) / size[row], rtol=0.02)


REFUSED = {
    "no penalty 'nope'; choose one of exponential, hinge": dict(penalty="nope"),
    "no solver 'pgd'; choose one of deepfool, ddn, fmn, superdeepfool": dict(solver="pgd"),
    "solver 'ddn' is for norm 'l2', and norm is 'linf'": dict(solver="ddn", norm="linf"),
    "give gradient='at_boundary'": dict(solver="fmn"),
    "gradient is 'sideways'": dict(gradient="sideways"),
}


@pytest.mark.parametrize("message", REFUSED)
@pytest.mark.parametrize("name", ["deep_defense", "deep_defense_fgsm"])
def test_names_that_make_no_sense_are_refused(message, name, unchecked):
    with pytest.raises(ValueError, match=message):
        loss_and_gradient(name, **REFUSED[message])
