"""DeepFool: the closed form on affine nets, its edges, and that a batch is its rows."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference

from dd_jax import deepfool, regularizer, signed_margin
from dd_jax.attacks import _deepfool as module
from dd_jax.attacks import _queue

NORMS = ("l2", "linf")


def affine_net(shape, num_classes, seed=0):
    """Weights of very unequal sizes, so that l2 and linf, or two classes, cannot be mistaken for
    each other.
    """
    random = np.random.default_rng(seed)
    size = int(np.prod(shape[1:]))
    weights = random.normal(size=(size, num_classes)) * np.geomspace(0.2, 3, size)[:, None]
    return weights, random.normal(size=num_classes), random.normal(size=shape)


def affine(weights, biases):
    return lambda x: x.reshape(x.shape[0], -1) @ weights + biases[None]


def nearest_boundary(weights, biases, inputs, norm, offset=0.0, classes=None):
    """The closed form in NumPy: for each input the point of the nearest face of its class's region,
    less the input.
    """
    found = []
    for x in inputs.reshape(len(inputs), -1):
        logits = x @ weights + biases
        s, best = np.argmax(logits), None
        for j in range(len(biases)) if classes is None else np.argsort(-logits)[:classes]:
            if j != s:
                f, w = logits[j] - logits[s], weights[:, j] - weights[:, s]
                size = np.abs(w + offset).sum() if norm == "linf" else np.linalg.norm(w + offset)
                step = -f / size * (np.sign(w) if norm == "linf" else w / size)
                if best is None or -f / size < best[0]:
                    best = -f / size, step
        found.append(best[1])
    return np.stack(found).reshape(inputs.shape)


def mlp(key, num_inputs=6, hidden=8, num_classes=4, activation=jnp.tanh):
    first, second, shift = jax.random.split(key, 3)
    w1 = jax.random.normal(first, (num_inputs, hidden))
    w2 = jax.random.normal(second, (hidden, num_classes))
    b1 = jax.random.normal(shift, (hidden,))
    return lambda x: activation(x @ w1 + b1[None]) @ w2


INPUTS = jax.random.normal(jax.random.key(1), (9, 6))
NET = mlp(jax.random.key(2))


def attack(logits_fn, inputs, labels=None, **options):
    """`deepfool`, compiled as a whole: quicker than step by step."""
    return jax.jit(partial(deepfool, logits_fn, **options))(inputs, labels)


@functools.cache
def plain_result():
    """In float64, as whatever it is compared with: in float32 rounding grows over the steps."""
    return attack(NET, INPUTS.astype(float))


def rows(result, index):
    return jax.tree.map(lambda x: x[index], result)


def assert_same(actual, expected, rtol=1e-11):
    scale = np.abs(expected.perturbation).max()
    np.testing.assert_allclose(
        actual.perturbation, expected.perturbation, atol=rtol * scale, rtol=0
    )
    np.testing.assert_array_equal(actual.success, expected.success)
    np.testing.assert_array_equal(actual.num_steps, expected.num_steps)


@pytest.mark.parametrize("shape, num_classes", [((5, 7), 2), ((4, 3, 4), 3), ((1, 2, 3, 2), 7)])
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("bits", [32, 64])
def test_closed_form_on_affine_nets(shape, num_classes, norm, bits, request):
    if bits == 64:
        request.getfixturevalue("x64")
    weights, biases, inputs = affine_net(shape, num_classes)
    expected = 1.02 * nearest_boundary(weights, biases, inputs, norm)
    logits_fn = affine(jnp.array(weights), jnp.array(biases))
    inputs = jnp.array(inputs)
    predicted = jnp.argmax(logits_fn(inputs), axis=1)
    found = attack(logits_fn, inputs, None if bits == 32 else predicted, norm=norm)
    assert found.perturbation.dtype == f"float{bits}"
    tolerance = 1e-12 if bits == 64 else 1e-5
    np.testing.assert_allclose(
        found.perturbation, expected, rtol=0, atol=tolerance * np.abs(expected).max()
    )
    assert found.success.all() and (found.num_steps == 1).all()
    assert (jnp.argmax(logits_fn(inputs + found.perturbation), axis=1) != predicted).all()


@pytest.mark.parametrize("norm", NORMS)
def test_overshoot_scales_the_result_and_the_offset_is_the_authors(norm, x64):
    weights, biases, inputs = affine_net((6, 5), 4)
    logits_fn = affine(jnp.array(weights), jnp.array(biases))
    found = attack(
        logits_fn, jnp.array(inputs), norm=norm, num_steps=1, overshoot=0.5, gradient_offset=0.1
    )
    expected = nearest_boundary(weights, biases, inputs, norm, offset=0.1)
    assert np.abs(expected - nearest_boundary(weights, biases, inputs, norm)).max() > 1e-3
    np.testing.assert_allclose(found.perturbation, 1.5 * expected, rtol=1e-10)


@pytest.mark.parametrize("norm, num_candidates", [("l2", 2), ("l2", 100), ("linf", 3), ("linf", 6)])
def test_candidates_are_the_likeliest_classes(norm, num_candidates, x64):
    weights, biases, inputs = affine_net((12, 5), 6, seed=3)
    logits_fn = affine(jnp.array(weights), jnp.array(biases))
    found = attack(
        logits_fn, jnp.array(inputs), norm=norm, num_steps=1, num_candidates=num_candidates
    )
    expected = nearest_boundary(weights, biases, inputs, norm, classes=num_candidates)
    np.testing.assert_allclose(found.perturbation, 1.02 * expected, rtol=1e-10)
    all_classes = nearest_boundary(weights, biases, inputs, norm)
    assert np.array_equal(expected, all_classes) == (num_candidates >= 6)


@pytest.mark.parametrize("norm", NORMS)
def test_curved_nets_agree_with_the_plain_loop(norm, short_turns, x64):
    inputs = INPUTS.astype(float)
    logits_fn = mlp(jax.random.key(2))
    found = jax.jit(lambda x: deepfool(logits_fn, x, norm=norm, num_steps=5, num_candidates=3))(
        inputs
    )
    labels = jnp.argmax(logits_fn(inputs), axis=1)
    total, num_steps, success = reference.steps(
        logits_fn, inputs, labels, norm=norm, num_steps=5, num_candidates=3
    )
    assert_same(found, module.AttackResult(1.02 * total, success, num_steps), rtol=1e-12)
    assert len(set(num_steps.tolist())) > 1


@pytest.mark.parametrize("norm, class_chunk_size", [("l2", 3), ("linf", 1), ("l2", 100)])
def test_classes_taken_in_parts_give_the_same(norm, class_chunk_size, short_turns, x64):
    """Seven candidates: in threes the last part is not full."""
    net, inputs = mlp(jax.random.key(2), num_classes=8), INPUTS.astype(float)
    assert_same(
        attack(net, inputs, norm=norm, class_chunk_size=class_chunk_size),
        attack(net, inputs, norm=norm),
        1e-12,
    )


def test_classes_taken_in_parts_take_less_memory(short_turns):
    """Of 40 candidates' gradients in a net with 500 activations, those of 4 are held at a time."""
    net = mlp(jax.random.key(2), hidden=500, num_classes=41)
    for function in (
        deepfool,
        lambda net, x, **options: signed_margin(net, x, jnp.zeros(9, int), **options),
    ):
        sizes = [
            jax.jit(partial(function, net, class_chunk_size=at_once))
            .lower(INPUTS)
            .compile()
            .memory_analysis()
            for at_once in (None, 4)
        ]
        at_once, in_parts = (size.temp_size_in_bytes for size in sizes)
        assert at_once > 3 * 40 * 500 * 4 > 3 * in_parts


def test_misclassified_examples_are_done(x64):
    predicted = jnp.argmax(NET(INPUTS), axis=1)
    labels = jnp.where(jnp.arange(9) % 2 == 0, predicted, (predicted + 1) % 4)
    found, from_predicted = attack(NET, INPUTS.astype(float), labels), plain_result()
    assert (
        not found.perturbation[1::2].any()
        and found.success[1::2].all()
        and not found.num_steps[1::2].any()
    )
    assert_same(rows(found, slice(None, None, 2)), rows(from_predicted, slice(None, None, 2)))


def test_number_of_steps_is_a_limit(x64):
    unlimited = plain_result()
    assert (
        unlimited.success.all() and unlimited.num_steps.max() > 2 and unlimited.num_steps.min() == 1
    )
    for limit in (1, 2):
        found = attack(NET, INPUTS.astype(float), num_steps=limit)
        np.testing.assert_array_equal(found.success, unlimited.num_steps <= limit)
        np.testing.assert_array_equal(found.num_steps, jnp.minimum(unlimited.num_steps, limit))
        assert found.perturbation.any(axis=1).all()


def test_results_change_the_class_and_only_just(x64):
    found = plain_result()
    clean = jnp.argmax(NET(INPUTS), axis=1)
    assert (jnp.argmax(NET(INPUTS + found.perturbation), axis=1) != clean).all()
    assert (jnp.argmax(NET(INPUTS + 0.5 * found.perturbation), axis=1) == clean).all()


@pytest.mark.parametrize(
    "bounds",
    [
        (-0.5, 0.6),
        (-jnp.full(6, 0.5), jnp.linspace(0.6, 0.9, 6)),
        (
            -np.full((1, 6), 0.5, np.float32),
            np.linspace([0.6], [0.9], 6, axis=1),
        ),  # As `dd_jax.data.bounds` gives them.
    ],
)
def test_iterates_and_results_stay_within_bounds(bounds, x64):
    inputs = jnp.clip(INPUTS.astype(float), -0.5, 0.6)
    lower, upper = (jnp.broadcast_to(jnp.asarray(bound, float), inputs.shape) for bound in bounds)

    def net_of_the_inside(x):
        inside = (x >= lower[: len(x)] - 1e-12) & (x <= upper[: len(x)] + 1e-12)
        return jnp.where(inside.all(axis=1, keepdims=True), NET(x), jnp.nan)

    found = attack(NET, inputs, bounds=bounds)
    assert_same(attack(net_of_the_inside, inputs, bounds=bounds), found)
    result = inputs + found.perturbation
    assert (result >= lower - 1e-12).all() and (result <= upper + 1e-12).all()
    assert (result > upper - 1e-12).any(), "these bounds bind nothing"
    changed = jnp.argmax(NET(result), axis=1) != jnp.argmax(NET(inputs), axis=1)
    np.testing.assert_array_equal(changed, found.success)
    assert found.success.any()


@pytest.mark.parametrize("norm", NORMS)
def test_steps_start_from_where_bounds_have_stopped_the_last_one(norm, x64):
    weights, biases, inputs = affine_net((12, 5), 3)
    inputs, lower, upper = np.clip(inputs, -0.4, 0.5), -0.5, 0.6
    logits_of = lambda x: x @ weights + biases
    classes = np.argmax(logits_of(inputs), axis=1)
    found = attack(
        affine(jnp.array(weights), jnp.array(biases)),
        jnp.array(inputs),
        norm=norm,
        bounds=(lower, upper),
    )
    counts = set()
    for i in np.flatnonzero(found.success):
        x, num_steps, overshot = inputs[i : i + 1], 0, inputs[i : i + 1]
        while np.argmax(logits_of(overshot)) == classes[i]:
            x, num_steps = (
                np.clip(x + nearest_boundary(weights, biases, x, norm), lower, upper),
                num_steps + 1,
            )
            overshot = np.clip(inputs[i] + 1.02 * (x - inputs[i]), lower, upper)
        np.testing.assert_allclose(inputs[i] + found.perturbation[i], overshot[0], atol=1e-12)
        assert found.num_steps[i] == num_steps
        counts.add(num_steps)
    assert max(counts) > 1


def test_bounds_that_bind_nothing_change_nothing(x64):
    assert_same(attack(NET, INPUTS.astype(float), bounds=(-100.0, 100.0)), plain_result())


def test_dead_nets_tied_logits_and_zero_inputs_end_at_once():
    weights = jnp.array([[1.0, 1.0, -1.0], [2.0, -2.0, 0.5]])
    dead = attack(
        lambda x: jax.nn.relu(x @ weights - 100) + jnp.array([[0.0, 1.0, 0.0]]), jnp.ones((3, 2))
    )
    assert not dead.perturbation.any() and not dead.success.any() and (dead.num_steps == 50).all()
    tied = attack(lambda x: x @ weights, jnp.array([[1.0, 0.0]]), num_steps=7)
    assert not tied.perturbation.any() and not tied.success.any() and tied.num_steps == 7
    zero = attack(lambda x: x @ weights + jnp.array([[0.0, 1.0, -1.0]]), jnp.zeros((1, 2)))
    np.testing.assert_allclose(zero.perturbation, [[0.0, 1.02 / 4]], rtol=1e-6)
    assert zero.success.all() and zero.num_steps == 1


def test_a_class_that_cannot_be_told_from_the_source_is_passed_over():
    weights = jnp.array([[3.0, 3.0, -1.0], [1.0, 1.0, 2.0]])  # classes 0 and 1 tie everywhere
    found = attack(lambda x: x @ weights, jnp.array([[1.0, 0.0]]))
    np.testing.assert_allclose(
        found.perturbation, 1.02 * 4 / 17 * np.array([[-4.0, 1.0]]), rtol=1e-5
    )
    assert found.success.all()


def test_what_is_not_finite_stays_where_it_is(x64):
    strange, others = jnp.array([3, 5]), jnp.array([0, 1, 2, 4, 6, 7, 8])
    found = attack(NET, INPUTS.astype(float).at[3].set(jnp.inf).at[5].set(jnp.nan))
    assert not found.perturbation[strange].any() and not found.success[strange].any()
    assert_same(rows(found, others), rows(plain_result(), others))


def test_a_batch_is_its_rows(short_turns, x64):
    inputs = INPUTS.astype(float)
    one = jax.jit(partial(deepfool, NET))
    alone = [one(inputs[i : i + 1]) for i in range(len(inputs))]
    assert_same(attack(NET, inputs), jax.tree.map(lambda *rows: jnp.concatenate(rows), *alone))


def test_order_and_company_do_not_matter(short_turns, x64):
    inputs, order = INPUTS.astype(float), jax.random.permutation(jax.random.key(5), 9)
    company = jnp.concatenate([inputs[order], jnp.zeros((4, 6)), 50 * inputs[:3]])
    assert_same(rows(attack(NET, company), slice(9)), rows(plain_result(), order))


WORK = 9 * 2 * (6 * 8 + 8 * 4)  # Operations of NET's forward pass for all INPUTS.
QUEUES = [
    (2, 1, 1, WORK, {9, 5, 1}),
    (9, 1, 1, WORK, {9, 1}),
    (9, 7, 1, WORK, {9, 7, 2}),
    (1, 100, 1, WORK, {9}),
    (9, 1, WORK // 3, WORK, {9, 3, 1}),
    (2, 1, 1, WORK // 3, {9, 3, 1}),
]


@pytest.mark.parametrize("turns, smallest, least_work, most_work, expected", QUEUES)
def test_the_work_queue_does_not_show(
    turns, smallest, least_work, most_work, expected, monkeypatch, x64
):
    whole = plain_result()
    monkeypatch.setitem(_queue.LEAST_WORK, "cpu", least_work)
    monkeypatch.setitem(_queue.MOST_WORK, "cpu", most_work)
    monkeypatch.setitem(_queue.TURNS_PER_BATCH, "cpu", turns)
    monkeypatch.setitem(_queue.SMALLEST_TURN, "cpu", smallest)
    sizes = []
    logits_fn = lambda x: sizes.append(x.shape[0]) or NET(x)
    assert_same(attack(logits_fn, INPUTS.astype(float)), whole)
    assert set(sizes) == expected


def test_eager_vmap_and_pmap_agree_with_jit(x64):
    inputs = INPUTS[:8].astype(float)
    expected = rows(plain_result(), slice(8))
    assert_same(deepfool(NET, inputs), expected)
    assert jax.local_device_count() >= 2
    for transform in (jax.vmap, jax.pmap):
        halves = transform(partial(deepfool, NET))(inputs.reshape(2, 4, 6))
        assert_same(jax.tree.map(lambda x: x.reshape((8,) + x.shape[2:]), halves), expected)


def test_no_gradient_flows_through_the_result():
    total = lambda scale: deepfool(lambda x: NET(scale * x), scale * INPUTS).perturbation.sum()
    assert jax.jit(jax.grad(total))(1.0) == 0


WRONG_CALLS = {
    "norm is 'l1'; it must be one of 'l2', 'linf'": dict(norm="l1"),
    r"inputs must be a floating batch.* got int32\[9, 6\]": dict(inputs=jnp.ones((9, 6), int)),
    r"inputs must be a floating batch.* got float32\[6\]": dict(inputs=jnp.ones(6)),
    r"labels must be integers of shape \(9,\).* got float32\[9, 4\].* not one-hot": dict(
        labels=jnp.ones((9, 4))
    ),
    r"labels must be integers of shape \(9,\).* got int32\[8\]": dict(labels=jnp.ones(8, int)),
    r"labels must be integers .* got float32\[9\]": dict(labels=jnp.ones(9)),
    "num_steps is 0; it must be at least 1": dict(num_steps=0),
    r"overshoot is -0\.1; it must be 0 or more": dict(overshoot=-0.1),
    "num_candidates is 1; it must be at least 2": dict(num_candidates=1),
    "class_chunk_size is 0; it must be at least 1, or None": dict(class_chunk_size=0),
    r"bounds must be a pair \(lower, upper\); got 1 of them": dict(bounds=(0.0,)),
    r"bounds are 1\.0 and 0\.0; the first must nowhere exceed the second": dict(bounds=(1.0, 0.0)),
    r"a bound must .* one example, \(6,\) or \(1, 6\); got \(9, 6\)": dict(
        bounds=(0.0, jnp.ones((9, 6)))
    ),
    r"at least 2 classes .* returned \(9, 1\)": dict(logits_fn=lambda x: x[:, :1]),
    r"must return logits of shape \(9, classes\).* returned \(9, 2, 3\)": dict(
        logits_fn=lambda x: x.reshape(9, 2, 3)
    ),
    r"must return logits .* returned \(6, 9\)": dict(logits_fn=lambda x: x.T),
    "floating": dict(logits_fn=lambda x: x.astype(int)),
}


@pytest.mark.parametrize("message", WRONG_CALLS)
def test_errors_say_what_was_expected_and_what_came(message, unchecked):
    arguments = dict(logits_fn=NET, inputs=INPUTS, labels=None) | WRONG_CALLS[message]
    with pytest.raises(ValueError, match=message):
        deepfool(
            arguments.pop("logits_fn"),
            arguments.pop("inputs"),
            arguments.pop("labels"),
            **arguments,
        )


def test_numpy_arrays_are_as_good_as_jax_arrays(unchecked, short_turns, x64):
    inputs = np.float64(INPUTS)
    labels = np.asarray(jnp.argmax(NET(inputs), axis=1))
    assert_same(deepfool(NET, inputs, labels), plain_result())


def test_an_empty_batch_has_an_empty_result_and_a_gradient_of_zero():
    found = jax.jit(lambda x: deepfool(NET, x))(INPUTS[:0])
    assert (found.perturbation.shape, found.success.shape, found.num_steps.shape) == (
        (0, 6),
        (0,),
        (0,),
    )
    labels = jnp.zeros(0, jnp.int32)
    total = lambda scale: regularizer(lambda x: NET(scale * x), INPUTS[:0], labels).sum()
    assert jax.jit(jax.grad(total))(1.0) == 0
