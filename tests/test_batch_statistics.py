"""What the training step does beside the loss: batch normalization that is trained, the average of
the weights, and the defenses' random keys.
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dd_jax import defenses, training
from dd_jax.training import Checkpoints

random = np.random.default_rng(4)
KEY = jax.random.key(3)
BATCH = {
    "image": random.normal(size=(8, 3)).astype(np.float32),
    "label": random.integers(0, 4, 8).astype(np.int32),
    "mask": np.ones(8, np.float32),
}
CLEAN = defenses.make_defense("clean")


class Normalized(nn.Module):
    @nn.compact
    def __call__(self, x, train=False, update_batch_stats=False):
        x = nn.Dense(5, name="first")(x)
        x = nn.BatchNorm(use_running_average=not update_batch_stats, momentum=0.9, name="norm")(x)
        return nn.Dense(4, name="last")(nn.tanh(x))


class Plain(nn.Module):
    @nn.compact
    def __call__(self, x, train=False, update_batch_stats=False):
        return nn.Dense(4)(x)


def optimizer_of(**options):
    schedule = optax.constant_schedule(0.1)
    return training.make_optimizer(schedule, momentum=0.9, weight_decay=1e-3, **options)


def start(model, optimizer):
    return training.initial_state(model, optimizer, (3,), 0)


def take_steps(model, optimizer, num_steps=1, batch=BATCH, defense=CLEAN, **options):
    step = training.make_train_step(model, optimizer, defense, **options)
    state, states = start(model, optimizer), []
    for _ in range(num_steps):
        state, measured = step(state, batch, KEY)
        states.append(jax.device_get(state))
    return states, jax.device_get(measured)


def assert_close(first, second, rtol=1e-5):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=rtol, atol=1e-6), first, second)


# Batch normalization


def parts_of(batch, num_parts):
    """The rows of every part, of batches that were filled up with copies of the first row."""
    missing = -len(batch["mask"]) % num_parts
    rows = np.concatenate([np.arange(len(batch["mask"])), np.zeros(missing, int)])
    mask = np.concatenate([batch["mask"], np.zeros(missing)])
    return list(zip(np.split(rows, num_parts), np.split(mask, num_parts), strict=True))


@pytest.mark.parametrize("accumulation_steps, size", [(1, 8), (2, 8), (1, 7)])
def test_batch_normalization_is_trained(accumulation_steps, size):
    """Two devices: each of their parts has its own statistics, of which the mean is kept."""
    batch = {name: values[:size] for name, values in BATCH.items()}
    model, optimizer = Normalized(), optimizer_of()
    options = dict(accumulation_steps=accumulation_steps, update_batch_stats=True)
    (state,), measured = take_steps(model, optimizer, batch=batch, **options)

    before, parts = start(model, optimizer), parts_of(batch, 2 * accumulation_steps)
    first = before.params["first"]
    hidden = BATCH["image"] @ np.asarray(first["kernel"]) + np.asarray(first["bias"])
    for name, of in (("mean", np.mean), ("var", np.var)):
        values = [of(hidden[rows], axis=0) for rows, _ in parts]
        mean = np.average(values, axis=0, weights=[mask.sum() for _, mask in parts])
        old = np.asarray(before.batch_stats["norm"][name])
        wanted = 0.9 * old + 0.1 * mean
        np.testing.assert_allclose(state.batch_stats["norm"][name], wanted, rtol=1e-4, atol=1e-6)

    def loss(params):
        total = 0
        for rows, mask in parts:
            variables = {"params": params, "batch_stats": before.batch_stats}
            logits, _ = model.apply(
                variables, BATCH["image"][rows], update_batch_stats=True, mutable=["batch_stats"]
            )
            log_probabilities = jax.nn.log_softmax(logits)[jnp.arange(len(rows))]
            picked = log_probabilities[jnp.arange(len(rows)), BATCH["label"][rows]]
            total -= jnp.sum(picked * mask)
        return total / size

    value, gradient = jax.jit(jax.value_and_grad(loss))(before.params)
    updates, _ = optimizer.update(gradient, before.opt_state, before.params)
    np.testing.assert_allclose(measured["loss"], value, rtol=1e-5)
    assert_close(state.params, jax.device_get(optax.apply_updates(before.params, updates)), 1e-4)


def test_statistics_stay_where_no_example_counts_or_nobody_asks():
    model, optimizer = Normalized(), optimizer_of()
    nothing = BATCH | {"mask": np.zeros(8, np.float32)}
    before = jax.device_get(start(model, optimizer).batch_stats)
    (empty,), _ = take_steps(model, optimizer, batch=nothing, update_batch_stats=True)
    (stored,), _ = take_steps(model, optimizer)
    (trained,), _ = take_steps(model, optimizer, update_batch_stats=True)
    for state in (empty, stored):
        jax.tree.map(np.testing.assert_array_equal, state.batch_stats, before)
    assert np.abs(trained.batch_stats["norm"]["mean"] - before["norm"]["mean"]).max() > 1e-3
    assert np.abs(trained.params["last"]["bias"] - stored.params["last"]["bias"]).max() > 1e-4


def test_statistics_stay_float32_where_the_net_is_bfloat16():
    wide, narrow = (
        take_steps(
            Normalized(), optimizer_of(), update_batch_stats=True, compute_dtype=compute_dtype
        )[0][0]
        for compute_dtype in (jnp.float32, jnp.bfloat16)
    )
    for name in ("mean", "var"):
        first, second = (state.batch_stats["norm"][name] for state in (wide, narrow))
        assert second.dtype == np.float32
        np.testing.assert_allclose(first, second, atol=5e-3)


def test_statistics_are_trained_with_the_plain_loss_alone_and_where_there_are_some():
    defense = defenses.make_defense("trades")
    with pytest.raises(ValueError, match="for the defenses clean and parseval alone"):
        training.make_train_step(Normalized(), optimizer_of(), defense, update_batch_stats=True)
    with pytest.raises(ValueError, match="has no batch normalization: leave it False"):
        take_steps(Plain(), optimizer_of(), update_batch_stats=True)
    parseval = defenses.make_defense("parseval", beta=0.1)
    (state,), _ = take_steps(
        Normalized(), optimizer_of(), defense=parseval, update_batch_stats=True
    )
    (plain,), _ = take_steps(Normalized(), optimizer_of(), update_batch_stats=True)
    retracted = jax.tree.map(np.asarray, parseval.retract(jax.tree.map(jnp.asarray, plain.params)))
    assert_close(state.params, retracted)


# The average of the weights


@pytest.mark.parametrize("name", ["clean", "parseval"])
def test_the_average_is_that_of_the_weights_after_every_update(name):
    """Parseval's retraction comes after the optimizer: the average is of the weights before it."""
    defense, decay, num_steps = defenses.make_defense(name), 0.8, 5
    states, _ = take_steps(Plain(), optimizer_of(average_decay=decay), num_steps, defense=defense)
    without, _ = take_steps(Plain(), optimizer_of(), num_steps, defense=defense)
    jax.tree.map(np.testing.assert_array_equal, states[-1].params, without[-1].params)

    weights = decay ** np.arange(num_steps)[::-1]
    mean_of = lambda *values: np.average(values, axis=0, weights=weights)
    wanted = jax.tree.map(mean_of, *(state.params for state in states))
    found = training.averaged(states[-1])
    tolerance = 1e-5 if name == "clean" else 2e-3
    jax.tree.map(
        partial(np.testing.assert_allclose, rtol=tolerance, atol=1e-6), found.params, wanted
    )
    kernel = states[-1].params["Dense_0"]["kernel"]
    assert np.abs(found.params["Dense_0"]["kernel"] - kernel).max() > 1e-2
    assert found._replace(params=None) == states[-1]._replace(params=None)


def test_after_one_step_the_average_is_the_weights_and_before_it_too():
    optimizer = optimizer_of(average_decay=0.999)
    before = start(Plain(), optimizer)
    jax.tree.map(np.testing.assert_array_equal, training.averaged(before).params, before.params)
    (state,), _ = take_steps(Plain(), optimizer)
    assert_close(training.averaged(state).params, state.params)


def test_without_an_average_the_state_is_as_it_was():
    plain, named = optimizer_of(), optimizer_of(average_decay=0.0)
    state = start(Plain(), plain)
    wanted = optax.chain(
        optax.identity(), optax.add_decayed_weights(1e-3), optax.sgd(lambda _: 0.1, momentum=0.9)
    ).init(state.params)
    for optimizer in (plain, named):
        assert jax.tree.structure(optimizer.init(state.params)) == jax.tree.structure(wanted)
    assert training.averaged(state) is not None and training.averaged(state).params is state.params


@pytest.mark.parametrize("decay", [-0.1, 1.0, 1.5])
def test_a_decay_out_of_range_is_refused(decay):
    with pytest.raises(
        ValueError, match=f"average_decay is {decay}; it must be 0 or more and less"
    ):
        optimizer_of(average_decay=decay)


def test_an_average_is_in_the_checkpoint(tmp_path):
    optimizer = optimizer_of(average_decay=0.9)
    states, _ = take_steps(Plain(), optimizer, 2)
    with Checkpoints(tmp_path) as saved:
        saved.save(2, jax.tree.map(jnp.asarray, states[-1]))
    with Checkpoints(tmp_path, read_only=True) as saved:
        restored = saved.restore(jax.eval_shape(lambda: start(Plain(), optimizer)))
    assert jax.tree.structure(restored) == jax.tree.structure(states[-1])
    jax.tree.map(np.testing.assert_array_equal, restored, states[-1])


# The defenses' keys


def drawing(logits_fn, inputs, labels, keys):
    """A loss that reports what each example's key draws, times its label."""
    drawn = jax.vmap(jax.random.uniform)(keys)
    return 0 * logits_fn(inputs)[:, 0], {"drawn": drawn * (1 + labels)}


@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_a_defense_has_a_key_per_example_that_is_not_dropouts(accumulation_steps):
    """However a batch is divided, an example keeps its key."""
    defense = defenses.BoundDefense(drawing, lambda params: params)
    step = training.make_train_step(
        Plain(), optimizer_of(), defense, accumulation_steps=accumulation_steps
    )

    def drawn_at(number, key=KEY):
        state = start(Plain(), optimizer_of())._replace(step=jnp.asarray(number, jnp.int32))
        return float(step(state, BATCH, key)[1]["drawn"])

    assert drawn_at(5) == drawn_at(5)
    assert len({drawn_at(4), drawn_at(5), drawn_at(5, jax.random.key(4))}) == 3
    step_key = jax.random.fold_in(KEY, 5)
    mean_of = lambda key: np.mean(
        [
            float(jax.random.uniform(jax.random.fold_in(key, number))) * (1 + label)
            for number, label in enumerate(BATCH["label"])
        ]
    )
    assert drawn_at(5) == pytest.approx(mean_of(jax.random.fold_in(step_key, 1)), rel=1e-6)
    assert drawn_at(5) != pytest.approx(mean_of(step_key), rel=1e-3)
