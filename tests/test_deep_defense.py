"""Deep Defense: its gradient against plain autodiff, its closed form, its edges, and where it may
be called.
"""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads
from test_deepfool import NORMS, affine, affine_net

import dd_jax
from dd_jax.xla.closure_convert import Traces, rows_are_interchangeable

pytestmark = pytest.mark.usefixtures("short_turns")

NUM_CLASSES = 4
# Scales at which no random net's penalty is tiny.
OPTIONS = dict(num_steps=4, correct_scale=2.0, wrong_scale=1.0)
ACTIVATIONS = {"relu": jax.nn.relu, "tanh": jnp.tanh, "gelu": jax.nn.gelu}
NETS = ("relu", "tanh", "gelu", "conv")


# Up to four steps; nobody close to a flat region or to a boundary.
SEEDS = dict(relu=20, tanh=258, gelu=20, conv=7)


def make_params(name):
    random = np.random.default_rng(SEEDS[name])
    shapes = dict(w1=(6, 8), b1=(8,), w2=(8, NUM_CLASSES), b2=(NUM_CLASSES,))
    if name == "conv":
        shapes = dict(w1=(3, 3, 2, 3), b1=(3,), w2=(48, NUM_CLASSES), b2=(NUM_CLASSES,))
    return {
        key: 1.5 * random.normal(size=shape) / np.prod(shape[:-1]) ** 0.5
        for key, shape in shapes.items()
    }


def apply_net(name, params, x, mask=1.0):
    if name == "conv":
        x = jax.lax.conv_general_dilated(
            x, params["w1"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        hidden = jax.nn.relu(x + params["b1"].reshape(1, 1, 1, -1)).reshape(x.shape[0], -1)
    else:
        hidden = ACTIVATIONS[name](x @ params["w1"] + params["b1"][None])
    return (hidden * mask) @ params["w2"] + params["b2"][None]


@functools.cache
def make_batch(name, batch=8):
    """Inputs and labels, every other example misclassified."""
    random = np.random.default_rng(SEEDS[name] + 100)
    inputs = random.normal(size=(batch, 4, 4, 2) if name == "conv" else (batch, 6))
    predicted = np.argmax(apply_net(name, make_params(name), inputs), axis=1)
    return inputs, np.where(np.arange(batch) % 2 == 0, predicted, (predicted + 1) % NUM_CLASSES)


def arrays(tree):
    """NumPy's float64 as JAX's default float, whichever it is."""
    return jax.tree.map(
        lambda x: jnp.asarray(x, int if np.issubdtype(x.dtype, np.integer) else float), tree
    )


def problem(name):
    return arrays((make_params(name), *make_batch(name)))


def weighted(name, norm, params, inputs, labels, weights):
    _, metrics = dd_jax.deep_defense_loss(
        partial(apply_net, name, params), inputs, labels, norm=norm, **OPTIONS
    )
    return (metrics["penalty"] * weights).sum(), metrics


def weighted_reference(name, norm, params, inputs, labels, weights):
    logits_fn = partial(apply_net, name, params)
    return (reference.regularizer(logits_fn, inputs, labels, norm=norm, **OPTIONS) * weights).sum()


@functools.cache
def compiled(name, norm):
    """(params, inputs, labels, weights) -> ((sum of weighted penalties, metrics), gradients)."""
    return jax.jit(jax.value_and_grad(partial(weighted, name, norm), argnums=(0, 1), has_aux=True))


@functools.cache
def expected(name, norm):
    """The same by autodiff through the plain loop, always in float64."""
    with jax.enable_x64(True):
        plain = jax.jit(jax.value_and_grad(partial(weighted_reference, name, norm), argnums=(0, 1)))
        return jax.tree.map(np.asarray, plain(*problem(name), weights()))


def weights():
    return jnp.linspace(0.5, 2.0, 8)


def assert_close(actual, wanted, tolerance):
    """Every array to within `tolerance` of its own largest entry."""
    for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(b).max())


def assert_finite(tree):
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


CASES = [(net, norm, 64) for net in NETS for norm in NORMS] + [
    (net, norm, 32) for net, norm in zip(NETS, 2 * NORMS, strict=True)
]


@pytest.mark.parametrize("name, norm, bits", CASES)
def test_gradient_is_that_of_plain_autodiff(name, norm, bits, request):
    if bits == 64:
        request.getfixturevalue("x64")
    (value, metrics), gradients = compiled(name, norm)(*problem(name), weights())
    expected_value, expected_gradients = expected(name, norm)
    tolerance = 1e-12 if bits == 64 else 1e-5
    assert value.dtype == f"float{bits}"
    assert_close(value, expected_value, tolerance)
    assert_close(gradients, expected_gradients, tolerance)
    assert metrics["num_steps"].max() > 1 and set(metrics["correct"].tolist()) == {0, 1}
    assert all(np.abs(g).max() > 1e-3 for g in jax.tree.leaves(gradients))
    assert gradients[1].reshape(8, -1).any(axis=1).all(), "an example has no gradient at its input"


@pytest.mark.parametrize("norm", NORMS)
def test_gradient_is_that_of_finite_differences(norm, x64):
    params, inputs, labels = problem("tanh")
    penalty = jax.jit(
        lambda params, inputs: weighted("tanh", norm, params, inputs, labels, weights())[0]
    )
    check_grads(penalty, (params, inputs), order=1, modes=["rev"], eps=1e-6, rtol=1e-6)


def test_penalty_falls_as_margins_grow(x64):
    params, inputs, labels = problem("tanh")
    for chosen, sign in ((jnp.arange(8) % 2 == 0, 1), (jnp.arange(8) % 2 == 1, -1)):
        (penalty, before), (gradient, _) = compiled("tanh", "l2")(
            params, inputs, labels, chosen.astype(float)
        )
        assert (sign * before["margin"][chosen] > 0).all() and (
            before["correct"][chosen] == (sign + 1) / 2
        ).all()
        assert (sign * (1 - before["penalty"][chosen]) > 0).all()
        rate = 1e-3 / sum((g**2).sum() for g in gradient.values()) ** 0.5
        downhill = {key: params[key] - rate * gradient[key] for key in params}
        (penalty_after, after), _ = compiled("tanh", "l2")(
            downhill, inputs, labels, chosen.astype(float)
        )
        assert (
            penalty_after < penalty
            and after["margin"][chosen].sum() > before["margin"][chosen].sum()
        )


@pytest.mark.parametrize("norm", NORMS)
def test_closed_form_on_affine_nets(norm, x64):
    matrix, biases, inputs = affine_net((12, 5), 3, seed=4)
    logits = inputs @ matrix + biases
    row, predicted = np.arange(12), np.argmax(logits, axis=1)
    right = row % 2 == 0
    labels = np.where(right, predicted, (predicted + 1) % 3)

    def distance(source, target):
        f, w = logits[row, target] - logits[row, source], (matrix[:, target] - matrix[:, source]).T
        return np.abs(f) / (np.abs(w).sum(axis=1) if norm == "linf" else np.linalg.norm(w, axis=1))

    others = [distance(predicted, (predicted + k) % 3) for k in (1, 2)]
    size = np.abs(inputs).max(axis=1) if norm == "linf" else np.linalg.norm(inputs, axis=1)
    margin = 1.02 * np.where(right, np.minimum(*others), -others[0]) / size
    cross_entropy = np.log(np.exp(logits).sum(axis=1)) - logits[row, labels]

    logits_fn = affine(jnp.array(matrix), jnp.array(biases))
    call = partial(
        dd_jax.deep_defense_loss, logits_fn, norm=norm, correct_scale=3.0, wrong_scale=2.0
    )
    loss, metrics = jax.jit(partial(call, penalty_weight=7.0))(jnp.array(inputs), jnp.array(labels))
    # Wrong examples may meet a third class on the way: no closed form there.
    one_step = metrics["num_steps"] == 1
    assert one_step[right].all() and one_step[~right].sum() >= 3
    penalty = np.exp(np.where(right, -3.0, -2.0) * margin)
    for actual, wanted in (
        (metrics["margin"], margin),
        (metrics["penalty"], penalty),
        (metrics["cross_entropy"], cross_entropy),
        (loss, cross_entropy + 7 * penalty),
    ):
        np.testing.assert_allclose(actual[one_step], wanted[one_step], rtol=1e-11)
    np.testing.assert_array_equal(metrics["correct"], right)


def test_margin_regularizer_and_loss_agree(x64):
    params, inputs, labels = problem("tanh")
    logits_fn = partial(apply_net, "tanh", params)
    margin = jax.jit(lambda x: dd_jax.signed_margin(logits_fn, x, labels, num_steps=4))(inputs)
    penalty = jax.jit(lambda x: dd_jax.regularizer(logits_fn, x, labels, **OPTIONS))(inputs)
    (_, metrics), _ = compiled("tanh", "l2")(params, inputs, labels, weights())
    assert_close(margin, metrics["margin"], 1e-14)
    assert_close(penalty, metrics["penalty"], 1e-14)


def test_options_reach_the_search(x64):
    params, inputs, labels = problem("tanh")
    logits_fn = partial(apply_net, "tanh", params)
    options = dict(num_steps=2, overshoot=0.3, num_candidates=2, gradient_offset=0.01)
    margin = jax.jit(lambda x: dd_jax.signed_margin(logits_fn, x, labels, **options))(inputs)
    plain = jax.jit(lambda x: reference.signed_margin(logits_fn, x, labels, **options))(inputs)
    assert_close(margin, plain, 1e-12)


@pytest.mark.parametrize("class_chunk_size", [1, 2])
def test_classes_taken_in_parts_change_nothing(class_chunk_size, x64):
    params, inputs, labels = problem("conv")

    def total(params, inputs):
        logits_fn = partial(apply_net, "conv", params)
        _, metrics = dd_jax.deep_defense_loss(
            logits_fn, inputs, labels, class_chunk_size=class_chunk_size, **OPTIONS
        )
        return (metrics["penalty"] * weights()).sum(), metrics

    in_parts = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(params, inputs)
    assert_close(in_parts, compiled("conv", "l2")(params, inputs, labels, weights()), 1e-12)


def test_never_fooled_examples_count_with_what_their_steps_add_up_to(x64):
    params, inputs, labels = problem("tanh")
    logits_fn = partial(apply_net, "tanh", params)
    step, _, success = jax.jit(lambda x: reference.steps(logits_fn, x, labels, num_steps=1))(inputs)
    assert 0 < (~success).sum() < 8
    margin = jax.jit(lambda x: dd_jax.signed_margin(logits_fn, x, labels, num_steps=1))(inputs)
    size = 1.02 * jnp.linalg.norm(step, axis=1) / jnp.linalg.norm(inputs, axis=1)
    assert_close(jnp.abs(margin), size, 1e-12)
    assert (size > 0).all()


def value_and_gradients(logits_fn, params, inputs, labels, **options):
    """Penalty per example, and the gradients of their sum in params and inputs."""

    def total(params, inputs):
        penalty = dd_jax.regularizer(partial(logits_fn, params), inputs, labels, **options)
        return penalty.sum(), penalty

    (_, penalty), gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(
        params, inputs
    )
    assert_finite((penalty, gradients))
    return penalty, gradients


def linear(params, x):
    return x @ params


@pytest.mark.parametrize("name, norm", [("relu", "l2"), ("conv", "linf")])
def test_dead_nets_have_no_margin_and_no_gradient(name, norm):
    params, inputs, labels = problem(name)
    dead = params | {"b1": jnp.full_like(params["b1"], -100)}
    (_, metrics), gradients = compiled(name, norm)(dead, inputs, labels, weights())
    right = jnp.argmax(params["b2"])
    assert (labels == right).any() and not (labels == right).all()
    assert_no_margin_and_no_gradient(metrics, gradients)


@pytest.mark.parametrize("name, norm", [("gelu", "l2"), ("tanh", "linf")])
def test_zero_inputs_have_no_margin_and_no_gradient(name, norm):
    params, inputs, labels = problem(name)
    (_, metrics), gradients = compiled(name, norm)(
        params, jnp.zeros_like(inputs), labels, weights()
    )
    assert_no_margin_and_no_gradient(metrics, gradients)


def assert_no_margin_and_no_gradient(metrics, gradients):
    np.testing.assert_array_equal(metrics["margin"], 0)
    np.testing.assert_array_equal(metrics["penalty"], 1)
    assert not any(gradient.any() for gradient in jax.tree.leaves(gradients))


def test_ties_and_zero_inputs_have_no_margin_and_no_gradient():
    params = jnp.array([[1.0, 1.0, -1.0], [2.0, -2.0, 0.5]])
    # tied, right and wrong; zero; an ordinary one
    inputs = jnp.array([[1.0, 0.0], [1.0, 0.0], [0.0, 0.0], [0.3, 0.1]])
    labels = jnp.array([0, 1, 0, 0])
    penalty, (gradient, inputs_gradient) = value_and_gradients(linear, params, inputs, labels)
    np.testing.assert_array_equal(penalty[:3], 1)
    assert not inputs_gradient[:3].any() and inputs_gradient[3].any()
    alone, (gradient_alone, _) = value_and_gradients(linear, params, inputs[3:], labels[3:])
    assert_close((penalty[3:], gradient), (alone, gradient_alone), 1e-6)


def test_two_classes_and_one_example():
    # logits -1 and -2.5
    params, inputs = jnp.array([[1.0, -1.0], [3.0, 0.5]]), jnp.array([[2.0, -1.0]])
    penalty, (gradient, _) = value_and_gradients(linear, params, inputs, jnp.array([0]))
    np.testing.assert_allclose(penalty, np.exp(-25 * 1.02 * 1.5 / (10.25 * 5) ** 0.5), rtol=1e-5)
    # only the logits' difference matters
    np.testing.assert_allclose(gradient[:, 0], -gradient[:, 1], rtol=1e-6)
    penalty, _ = value_and_gradients(linear, params, inputs, jnp.array([1]))
    np.testing.assert_allclose(penalty, np.exp(5 * 1.02 * 1.5 / (10.25 * 5) ** 0.5), rtol=1e-5)


def test_huge_wrong_margins_do_not_overflow():
    params, inputs, labels = problem("tanh")
    tiny = 1e-9 * jnp.sign(inputs)
    wrong = (jnp.argmax(apply_net("tanh", params, tiny), axis=1) + 1) % NUM_CLASSES
    (_, metrics), gradients = compiled("tanh", "linf")(params, tiny, wrong, weights())
    assert (metrics["margin"] < -1e6).all()
    np.testing.assert_allclose(metrics["penalty"], np.finfo(np.float32).max ** 0.5, rtol=1e-5)
    assert not any(gradient.any() for gradient in jax.tree.leaves(gradients))


def test_no_penalty_weight_is_cross_entropy():
    params, inputs, labels = problem("relu")

    def cross_entropy(params):
        log_probabilities = jax.nn.log_softmax(apply_net("relu", params, inputs))
        return -log_probabilities[jnp.arange(8), labels].mean()

    def loss(params):
        logits_fn = partial(apply_net, "relu", params)
        return dd_jax.deep_defense_loss(logits_fn, inputs, labels, penalty_weight=0.0)[0].mean()

    value, gradient = jax.value_and_grad(loss)(params)
    expected_value, expected_gradient = jax.value_and_grad(cross_entropy)(params)
    assert value == expected_value
    jax.tree.map(np.testing.assert_array_equal, gradient, expected_gradient)


@pytest.mark.parametrize("name", ["penalty_weight", "correct_scale", "wrong_scale"])
def test_negative_weights_are_refused_by_name(name):
    params, inputs, labels = problem("relu")
    with pytest.raises(ValueError, match=f"{name} is -1.0; it must be 0 or more"):
        dd_jax.deep_defense_loss(partial(apply_net, "relu", params), inputs, labels, **{name: -1.0})


@pytest.mark.parametrize(
    "function", [dd_jax.signed_margin, dd_jax.regularizer, dd_jax.deep_defense_loss]
)
def test_wrong_calls_are_refused_as_by_deepfool(function, unchecked):
    params, inputs, labels = problem("relu")
    call = partial(function, partial(apply_net, "relu", params))
    with pytest.raises(ValueError, match="norm is 'l1'"):
        call(inputs, labels, norm="l1")
    with pytest.raises(ValueError, match="not one-hot"):
        call(inputs, jax.nn.one_hot(labels, 4))
    with pytest.raises(ValueError, match="num_steps is 0"):
        call(inputs, labels, num_steps=0)
    with pytest.raises(ValueError, match="class_chunk_size is -1"):
        call(inputs, labels, class_chunk_size=-1)
    with pytest.raises(ValueError, match="at least 2 classes"):
        function(lambda x: x[:, :1], inputs, labels)


def test_scales_may_be_traced():
    params, inputs, labels = problem("relu")
    scaled = jax.jit(
        lambda scale: dd_jax.regularizer(
            partial(apply_net, "relu", params),
            inputs,
            labels,
            num_steps=4,
            correct_scale=scale,
            wrong_scale=scale / 2,
        )
    )
    (_, metrics), _ = compiled("relu", "l2")(params, inputs, labels, weights())
    assert_close(scaled(2.0), metrics["penalty"], 1e-6)


def test_numpy_arrays_are_as_good_as_jax_arrays(unchecked):
    params, inputs, labels = problem("relu")
    plain = dd_jax.regularizer(
        partial(apply_net, "relu", params), np.asarray(inputs), np.asarray(labels), **OPTIONS
    )
    (_, metrics), _ = compiled("relu", "l2")(params, inputs, labels, weights())
    assert_close(plain, metrics["penalty"], 1e-6)


@pytest.mark.filterwarnings("error")
def test_half_precision_inputs_of_a_float32_net():
    params, inputs, labels = problem("relu")
    coarse = inputs.astype(jnp.bfloat16)
    (value, _), (gradient, inputs_gradient) = compiled("relu", "l2")(
        params, coarse, labels, weights()
    )
    fine = compiled("relu", "l2")(params, coarse.astype(jnp.float32), labels, weights())
    assert inputs_gradient.dtype == jnp.bfloat16
    assert_close((value, gradient), (fine[0][0], fine[1][0]), 0.05)


def test_a_batch_is_its_rows(x64):
    params, inputs, labels = problem("gelu")
    (_, metrics), (gradient, inputs_gradient) = compiled("gelu", "l2")(
        params, inputs, labels, weights()
    )
    rows = [slice(i, i + 1) for i in range(8)]
    alone = [compiled("gelu", "l2")(params, inputs[i], labels[i], weights()[i]) for i in rows]
    concatenate = lambda *parts: jnp.concatenate(parts)
    assert_close(jax.tree.map(concatenate, *[one[0][1] for one in alone]), metrics, 1e-12)
    assert_close(concatenate(*[one[1][1] for one in alone]), inputs_gradient, 1e-12)
    assert_close(
        jax.tree.map(lambda *parts: sum(parts), *[one[1][0] for one in alone]), gradient, 1e-12
    )


def residual_bytes(function, width, num_steps):
    """What is kept between the forward and the backward pass, by a net with `width` activations per
    weight.
    """
    params, inputs, labels = problem("tanh")

    def logits_fn(params, x):
        hidden = jnp.tanh(jnp.tile(x @ params["w1"], (1, width)))
        return hidden.reshape(-1, width, 8).mean(axis=1) @ params["w2"]

    penalty = lambda params: function(
        partial(logits_fn, params), inputs, labels, num_steps=num_steps
    )
    pull_back = jax.eval_shape(lambda params: jax.vjp(penalty, params)[1], params)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(pull_back))


def test_memory_holds_starting_points_and_no_activations():
    assert residual_bytes(dd_jax.regularizer, 100, 5) == residual_bytes(dd_jax.regularizer, 1, 5)
    per_step = 8 * (6 * 4 + 2 * 4)  # per example: where the step started, and two classes
    assert (
        residual_bytes(dd_jax.regularizer, 1, 6) - residual_bytes(dd_jax.regularizer, 1, 5)
        == per_step
    )
    assert (
        residual_bytes(reference.regularizer, 100, 1)
        > residual_bytes(reference.regularizer, 1, 1) + 8 * 8 * 4 * 99
    )


@pytest.mark.parametrize("shape", [(8, 8), (1, 8)])
def test_dropout_with_one_mask_for_all_passes(shape, x64):
    """A mask per row keeps the search at its batch size; either way every pass sees the same mask."""
    params, inputs, labels = problem("tanh")
    key = jax.random.key(4)

    def dropped(params, x):
        rows = x.shape[0] if shape[0] > 1 else 1
        return apply_net("tanh", params, x, mask=1.25 * jax.random.bernoulli(key, 0.8, (rows, 8)))

    def total(penalty_fn, params, inputs):
        penalty = penalty_fn(partial(dropped, params), inputs, labels, **OPTIONS | {"num_steps": 2})
        return (penalty * weights()).sum()

    assert rows_are_interchangeable(Traces(partial(dropped, params), inputs), len(inputs), 3) == (
        shape[0] == 1
    )
    gradients = [
        jax.jit(jax.value_and_grad(partial(total, penalty_fn), argnums=(0, 1)))(params, inputs)
        for penalty_fn in (dd_jax.regularizer, reference.regularizer)
    ]
    assert_close(*gradients, 1e-12)


@pytest.mark.parametrize(
    "order, key",
    [("gradient inside scan", jax.random.PRNGKey(1)), ("gradient of scan", jax.random.key(1))],
)
def test_inside_scan(order, key, x64):
    """Inside a scan's body, with old-style (integer) and typed keys among what the net closes over."""
    params, inputs, labels = problem("relu")
    batches = inputs.reshape(2, 4, 6), labels.reshape(2, 4), jnp.arange(2)

    def penalty(params, batch):
        inputs, labels, step = batch
        mask = jax.random.bernoulli(jax.random.fold_in(key, step), 0.8, (1, 8))
        logits_fn = lambda x: apply_net("relu", params, x, mask * jax.random.uniform(key, (1, 8)))
        return dd_jax.regularizer(logits_fn, inputs, labels, **OPTIONS).sum()

    def descend(params, batch):
        return jax.tree.map(
            lambda p, g: p - 0.01 * g, params, jax.grad(penalty)(params, batch)
        ), None

    parts = list(zip(*batches, strict=True))
    if order == "gradient inside scan":
        actual = jax.jit(lambda params: jax.lax.scan(descend, params, batches)[0])(params)
        one = jax.jit(descend)
        wanted = one(one(params, parts[0])[0], parts[1])[0]
    else:
        total = lambda params: jax.lax.scan(
            lambda sum, b: (sum + penalty(params, b), None), 0.0, batches
        )[0]
        actual = jax.jit(jax.grad(total))(params)
        one = jax.jit(jax.grad(penalty))
        wanted = jax.tree.map(jnp.add, one(params, parts[0]), one(params, parts[1]))
    assert_close(actual, wanted, 1e-12)


def test_two_devices_are_one(x64):
    params, inputs, labels = problem("relu")
    split = lambda x: x.reshape((2, 4) + x.shape[1:])
    per_device = jax.pmap(
        jax.value_and_grad(partial(weighted, "relu", "l2"), argnums=(0, 1), has_aux=True),
        in_axes=(None, 0, 0, 0),
    )
    (value, metrics), (gradient, inputs_gradient) = per_device(
        params, split(inputs), split(labels), split(weights())
    )
    merged = jax.tree.map(lambda x: x.reshape((8,) + x.shape[2:]), (metrics, inputs_gradient))
    (one_value, one_metrics), (one_gradient, one_inputs_gradient) = compiled("relu", "l2")(
        params, inputs, labels, weights()
    )
    assert_close(merged, (one_metrics, one_inputs_gradient), 1e-12)
    assert_close(
        (value.sum(), jax.tree.map(lambda g: g.sum(axis=0), gradient)),
        (one_value, one_gradient),
        1e-12,
    )


@pytest.mark.parametrize("inside", [True, False])
def test_shard_map_is_one_device_with_the_gradient_inside_or_outside(inside, x64):
    params, inputs, labels = problem("conv")
    mesh = jax.make_mesh((2,), ("device",), axis_types=(AxisType.Auto,))
    total = lambda params, *batch: dd_jax.regularizer(
        partial(apply_net, "conv", params), *batch, correct_scale=2.0
    ).sum()
    here = lambda *arguments: jax.lax.psum(
        (jax.grad(total) if inside else total)(*arguments), "device"
    )
    options = dict(mesh=mesh, in_specs=(P(), P("device"), P("device")), out_specs=P())
    divided = jax.shard_map(here, **options, check_vma=False)
    actual = jax.jit(divided if inside else jax.grad(divided))(params, inputs, labels)
    assert_close(actual, jax.jit(jax.grad(total))(params, inputs, labels), 1e-12)
    with pytest.raises(ValueError, match="give it check_vma=False"):
        jax.jit(jax.shard_map(here, **options))(params, inputs, labels)


def test_a_batch_on_explicit_axes_is_refused_with_a_way_out():
    params, inputs, labels = problem("relu")
    mesh = jax.make_mesh((2,), ("device",), axis_types=(AxisType.Explicit,))
    inputs = jax.device_put(inputs, NamedSharding(mesh, P("device")))
    with pytest.raises(
        ValueError,
        match="explicit axes of a mesh.* make the mesh with axis_types=jax.sharding.AxisType.Auto",
    ):
        jax.jit(lambda x: dd_jax.regularizer(partial(apply_net, "relu", params), x, labels))(inputs)


def test_strict_promotion_of_types_is_no_hindrance():
    params, inputs, labels = problem("tanh")
    with jax.numpy_dtype_promotion("strict"):
        loss, _ = dd_jax.deep_defense_loss(partial(apply_net, "tanh", params), inputs, labels)
        found = dd_jax.deepfool(
            partial(apply_net, "tanh", params), inputs, labels, norm="linf", bounds=(-5.0, 5.0)
        )
    assert np.isfinite(loss).all() and found.success.all()


def test_a_net_that_gives_more_than_logits_is_told_so():
    params, inputs, labels = problem("relu")
    with pytest.raises(
        ValueError,
        match="logits_fn must return one array, the logits; it returned a tuple. Leave out",
    ):
        dd_jax.regularizer(lambda x: (apply_net("relu", params, x), {}), inputs, labels)


def test_a_net_that_checks_its_batch_gets_no_other(x64):
    """By an exception of its own, also where only the last, shorter turns do not fit."""
    params, inputs, labels = problem("relu")

    def only(*sizes):
        def logits_fn(x):
            assert x.shape[0] in sizes, "this net takes batches of its own size"
            return apply_net("relu", params, x)

        return dd_jax.signed_margin(logits_fn, inputs, labels)

    assert_close(
        only(8), dd_jax.signed_margin(partial(apply_net, "relu", params), inputs, labels), 1e-12
    )
    # A third of a batch makes a turn here, and one row a last turn.
    assert_close(only(8, 3), only(8), 1e-12)
