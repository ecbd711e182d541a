"""The training step and the loop: PyTorch's SGD in NumPy, masks, schedules, dropout, lambda 0,
divergence.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dd_jax import defenses, training
from dd_jax.attacks._deepfool import deepfool

random = np.random.default_rng(0)
KEY = jax.random.key(3)
BATCH = {
    "image": random.normal(size=(6, 3, 2)).astype(np.float32),
    "label": random.integers(0, 4, 6).astype(np.int32),
    "mask": np.ones(6, np.float32),
}


class Net(nn.Module):
    """Two layers; thinned between them where `dropout` says so."""

    num_classes: int = 4
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, train=False):
        x = nn.tanh(nn.Dense(8, name="fc1")(x.reshape(x.shape[0], -1)))
        x = nn.Dropout(self.dropout, broadcast_dims=(0,), deterministic=not train)(x)
        return nn.Dense(self.num_classes, name="fc2")(x)


class Affine(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.Dense(1, name="fc")(x.reshape(x.shape[0], -1))


class Normalized(nn.Module):
    @nn.compact
    def __call__(self, x, train=False):
        return nn.BatchNorm(use_running_average=True, name="norm")(
            nn.Dense(4, name="fc")(x.reshape(x.shape[0], -1))
        )


def sgd(rate=0.1, momentum=0.9, weight_decay=0.0):
    return training.make_optimizer(
        optax.constant_schedule(rate), momentum=momentum, weight_decay=weight_decay
    )


def start(model, optimizer, seed=0):
    return training.initial_state(model, optimizer, (3, 2), seed)


def train(model, optimizer, loss_fn, num_steps, batch=BATCH, state=None):
    """Takes steps on one and the same batch; returns the state and what each step measured."""
    defense = (
        loss_fn
        if isinstance(loss_fn, defenses.BoundDefense)
        else defenses.BoundDefense(loss_fn, lambda params: params)
    )
    train_step = training.make_train_step(model, optimizer, defense)
    state, measured = start(model, optimizer) if state is None else state, []
    for _ in range(num_steps):
        state, values = train_step(state, batch, KEY)
        measured.append(jax.device_get(values))
    return state, measured


def assert_trees(check, first, second):
    assert jax.tree.structure(first) == jax.tree.structure(second)
    jax.tree.map(check, first, second)


assert_equal = partial(assert_trees, np.testing.assert_array_equal)
assert_close = partial(assert_trees, partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7))


# The optimizer


def half_square(logits_fn, inputs, labels, key):
    error = logits_fn(inputs)[:, 0] - labels
    return error**2 / 2, {"error": error}


@pytest.mark.parametrize(
    "momentum, weight_decay, longest", [(0.9, 0.1, 0.0), (0.0, 0.1, 0.0), (0.9, 0.0, 1.5)]
)
def test_sgd_is_pytorchs(momentum, weight_decay, longest):
    """g = gradient + wd p;  v = momentum v + g;  p = p - rate v, on a quadratic, through a change of the rate.

    With a longest norm (0: none) PyTorch's clip_grad_norm_ comes before.
    """
    num_steps, rate = 6, 0.05
    schedule = training.halved_at_four_fifths(rate, num_steps)
    optimizer = training.make_optimizer(
        schedule, momentum=momentum, weight_decay=weight_decay, max_gradient_norm=longest
    )
    kernel, bias = random.normal(size=(6, 1)).astype(np.float32), np.float32([0.7])
    state = training.fresh_state(
        optimizer, {"fc": {"kernel": jnp.array(kernel), "bias": jnp.array(bias)}}, {}
    )
    state, measured = train(Affine(), optimizer, half_square, num_steps, state=state)

    x = np.concatenate([BATCH["image"].reshape(6, -1), np.ones((6, 1))], axis=1).astype(np.float64)
    p, v, losses, norms = np.concatenate([kernel[:, 0], bias]).astype(np.float64), 0, [], []
    for step in range(num_steps):
        error = x @ p - BATCH["label"]
        losses.append(np.mean(error**2) / 2)
        gradient = x.T @ error / len(error)
        norms.append(np.linalg.norm(gradient))
        gradient *= min(1, longest / norms[-1]) if longest else 1
        v = momentum * v + gradient + weight_decay * p
        p = p - (rate if step < 4 else rate / 2) * v
    np.testing.assert_allclose(state.params["fc"]["kernel"][:, 0], p[:-1], rtol=1e-5)
    np.testing.assert_allclose(state.params["fc"]["bias"], p[-1:], rtol=1e-5)  # Decays as well.
    np.testing.assert_allclose([values["loss"] for values in measured], losses, rtol=1e-5)
    assert int(state.step) == num_steps
    assert not longest or min(norms) < longest < max(norms)  # Some of the gradients were shortened.


@pytest.mark.parametrize("num_steps", [5, 10, 12, 35, 70, 300, 3000])
def test_the_rate_is_halved_once_at_exactly_four_fifths(num_steps):
    rates = np.array(
        [training.halved_at_four_fifths(0.25, num_steps)(step) for step in range(num_steps)]
    )
    boundary = num_steps * 4 // 5
    assert (
        (rates[:boundary] == 0.25).all()
        and (rates[boundary:] == 0.125).all()
        and boundary < num_steps
    )


def test_cosine_goes_from_the_rate_to_zero():
    schedule = training.cosine(0.5, 40)
    rates = np.array([schedule(step) for step in range(41)])
    np.testing.assert_allclose(rates, 0.25 * (1 + np.cos(np.pi * np.arange(41) / 40)), atol=1e-7)
    assert rates[0] == 0.5 and rates[40] == 0 and (np.diff(rates) < 0).all()
    assert np.isfinite(training.cosine(0.5, 0)(0)) and np.isfinite(
        training.halved_at_four_fifths(0.5, 0)(0)
    )


# The step


def test_the_loss_is_the_mean_over_what_the_mask_keeps():
    mask = np.float32([1, 0, 1, 1, 0, 1])
    masked = BATCH | {
        "mask": mask,
        "image": np.where(mask[:, None, None] > 0, BATCH["image"], 1e3).astype(np.float32),
    }
    kept = {name: values[mask > 0] for name, values in BATCH.items()}
    loss_fn, optimizer = defenses.make_defense("clean"), sgd()
    (state, measured), (wanted, wanted_measured) = (
        train(Net(), optimizer, loss_fn, 2, batch) for batch in (masked, kept)
    )
    assert_close(state.params, wanted.params)
    assert_close(measured, wanted_measured)
    assert_equal(
        train(Net(), optimizer, loss_fn, 1, BATCH | {"mask": 0 * mask})[0].params,
        start(Net(), optimizer).params,
    )


def test_lambda_zero_is_clean_training():
    clean, measured = train(Net(), sgd(), defenses.make_defense("clean"), 4)
    zero, zero_measured = train(
        Net(), sgd(), defenses.make_defense("deep_defense", penalty_weight=0.0, num_steps=2), 4
    )
    assert_close(zero, clean)
    for values, zero_values in zip(measured, zero_measured, strict=True):
        assert_close(values, {name: zero_values[name] for name in values})


def test_another_lambda_is_not_and_the_step_reports_the_parts_of_the_loss():
    clean, _ = train(Net(), sgd(), defenses.make_defense("clean"), 1)
    loss_fn = defenses.make_defense("deep_defense", penalty_weight=3.0, num_steps=2)
    defended, (values,) = train(Net(), sgd(), loss_fn, 1)
    assert np.abs(defended.params["fc2"]["kernel"] - clean.params["fc2"]["kernel"]).max() > 1e-3
    assert set(values) == {"loss", "cross_entropy", "penalty", "margin", "correct", "num_steps"}
    np.testing.assert_allclose(
        values["loss"], values["cross_entropy"] + 3 * values["penalty"], rtol=1e-6
    )


def test_a_state_is_consumed_by_its_step():
    state = start(Net(), sgd())
    training.make_train_step(Net(), sgd(), defenses.make_defense("clean"))(state, BATCH, KEY)
    assert state.params["fc1"]["kernel"].is_deleted()


def test_batch_statistics_are_used_as_they_are_stored():
    model, optimizer = Normalized(), sgd()
    state = start(model, optimizer)
    statistics = {"norm": {"mean": jnp.arange(4.0), "var": jnp.arange(1.0, 5.0)}}
    copy = lambda tree: jax.tree.map(jnp.copy, tree)  # noqa: E731
    logits = training.make_logits_fn(model, state.params, copy(statistics))(BATCH["image"])
    np.testing.assert_allclose(
        logits, model.apply({"params": state.params, "batch_stats": statistics}, BATCH["image"])
    )
    after, _ = train(
        model, optimizer, defenses.plain_loss, 1, state=state._replace(batch_stats=copy(statistics))
    )
    assert_equal(after.batch_stats, statistics)


def test_bfloat16_is_within_the_net_alone():
    """Logits and perturbations are float32, the weights stay so, and what training does is nearly
    the same.
    """
    model, params = Net(), start(Net(), sgd()).params
    narrow = training.make_logits_fn(model, params, {}, compute_dtype="bfloat16")
    logits, wide = (
        narrow(BATCH["image"]),
        training.make_logits_fn(model, params, {})(BATCH["image"]),
    )
    assert logits.dtype == jnp.float32 and 1e-4 < np.abs(logits - wide).max() < 3e-2
    inside = jax.make_jaxpr(narrow)(jnp.asarray(BATCH["image"]))
    products = [
        equation for equation in inside.jaxpr.eqns if equation.primitive.name == "dot_general"
    ]
    assert len(products) == 2 and all(
        equation.outvars[0].aval.dtype == jnp.bfloat16 for equation in products
    )
    found = deepfool(narrow, jnp.asarray(BATCH["image"]))
    assert found.perturbation.dtype == jnp.float32 and found.perturbation.any()

    defense = defenses.make_defense(
        "deep_defense", penalty_weight=1.0, correct_scale=2.0, num_steps=2
    )
    states = [
        training.make_train_step(model, sgd(0.01), defense, compute_dtype=dtype)(
            start(model, sgd()), BATCH, KEY
        )[0]
        for dtype in ("bfloat16", "float32")
    ]
    before = start(model, sgd()).params
    moved = [jax.tree.map(lambda a, b: np.asarray(a - b), state.params, before) for state in states]
    for first, second in zip(*map(jax.tree.leaves, moved), strict=True):
        assert first.dtype == np.float32 and np.linalg.norm(first - second) < 0.2 * np.linalg.norm(
            second
        )


# Dropout


def test_a_dropout_key_is_one_thinned_net():
    model = Net(dropout=0.5)
    params = start(model, sgd()).params
    thinned = training.make_logits_fn(model, params, {}, jax.random.key(0))
    logits = thinned(BATCH["image"])
    np.testing.assert_array_equal(thinned(BATCH["image"]), logits)
    # The same net for any batch.
    np.testing.assert_allclose(thinned(BATCH["image"][2:3]), logits[2:3], rtol=1e-5)
    whole = training.make_logits_fn(model, params, {})(BATCH["image"])
    other = training.make_logits_fn(model, params, {}, jax.random.key(1))(BATCH["image"])
    assert np.abs(logits - whole).max() > 1e-2 < np.abs(logits - other).max()
    np.testing.assert_array_equal(whole, Net().apply({"params": params}, BATCH["image"]))


def test_the_mask_depends_on_the_step_and_on_nothing_else():
    model, optimizer = Net(dropout=0.5), sgd()
    train_step = training.make_train_step(model, optimizer, defenses.make_defense("clean"))

    def loss_at(step, key=KEY):
        state = start(model, optimizer)._replace(step=jnp.asarray(step, jnp.int32))
        return float(train_step(state, BATCH, key)[1]["loss"])

    assert loss_at(5) == loss_at(5)
    assert len({loss_at(4), loss_at(5), loss_at(6), loss_at(5, jax.random.key(4))}) == 4
    logits_fn = training.make_logits_fn(
        model, start(model, optimizer).params, {}, jax.random.fold_in(KEY, 5)
    )
    wanted = defenses.plain_loss(
        logits_fn, jnp.asarray(BATCH["image"]), jnp.asarray(BATCH["label"])
    )[0].mean()
    np.testing.assert_allclose(loss_at(5), wanted, rtol=1e-6)


# States, losses, measurements


def test_initial_weights_depend_on_the_seed_alone():
    first, again, other = (start(Net(), sgd(), seed) for seed in (0, 0, 1))
    assert_equal(first, again)
    assert not np.array_equal(first.params["fc1"]["kernel"], other.params["fc1"]["kernel"])
    assert first.step.dtype == jnp.int32 and first.step == 0 and first.batch_stats == {}
    assert {leaf.dtype for leaf in jax.tree.leaves(first.params)} == {np.dtype("float32")}


def test_plain_loss_is_the_cross_entropy():
    logits = random.normal(size=(6, 4)).astype(np.float32)
    loss, details = defenses.plain_loss(
        lambda _: jnp.asarray(logits), jnp.zeros((6, 1)), jnp.asarray(BATCH["label"])
    )
    wanted = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(6), BATCH["label"]]
    np.testing.assert_allclose(loss, wanted, rtol=1e-5)
    np.testing.assert_array_equal(details["cross_entropy"], loss)
    np.testing.assert_array_equal(details["correct"], logits.argmax(axis=1) == BATCH["label"])


def test_an_unknown_defense_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="no defense 'nope'; choose one of clean, .*deep_defense"):
        defenses.make_defense("nope")


# The loop


def counting_step(bad_step=None, bad_value=np.nan):
    """A step whose loss is the number of the batch it was given, which is the number of the step."""

    def train_step(state, batch, key):
        loss = bad_value if batch == bad_step else float(batch)
        assert int(state.step) == batch
        return state._replace(step=state.step + 1), {
            "loss": np.float32(loss),
            "correct": np.float32(1),
        }

    return train_step


def fit(first_step=0, num_steps=12, **options):
    state = training.TrainState(np.int32(first_step), {}, {}, ())
    step = counting_step(**options)
    return training.fit(state, step, lambda step: step, num_steps=num_steps, seed=0, log_every=5)


def test_fit_logs_means_over_the_steps_since_the_last():
    yielded = list(fit())
    assert [step for _, step, _ in yielded] == list(range(1, 13))
    assert all(int(state.step) == step for state, step, _ in yielded)
    means = {step: means for _, step, means in yielded if means}
    assert means == {
        5: {"loss": 2.0, "correct": 1.0},
        10: {"loss": 7.0, "correct": 1.0},
        12: {"loss": 10.5, "correct": 1.0},
    }


def test_fit_goes_on_from_the_state():
    assert list(fit(first_step=5)) == list(fit())[5:]
    assert list(fit(first_step=12)) == []


@pytest.mark.parametrize(
    "bad_step, steps", [(0, "0 and 5"), (6, "5 and 10"), (9, "5 and 10"), (11, "10 and 12")]
)
@pytest.mark.parametrize("bad_value", [np.nan, np.inf, -np.inf])
def test_a_loss_that_is_no_number_ends_the_training_and_names_the_steps(bad_step, steps, bad_value):
    yielded = []
    with pytest.raises(
        training.DivergenceError, match=f"not finite between steps {steps}: lower the learning rate"
    ):
        yielded.extend(fit(bad_step=bad_step, bad_value=bad_value))
    # What diverged is not handed out to be saved.
    assert not yielded or yielded[-1][1] < int(steps.split()[-1])
