"""The margin's solver and gradient: closed forms, converged distances, edges, and errors."""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_deep_defense import (
    apply_net,
    arrays,
    assert_close,
    assert_finite,
    assert_no_margin_and_no_gradient,
    make_params,
    problem,
)
from test_deepfool import INPUTS, NET, NORMS, affine_net

import dd_jax
from dd_jax.attacks import fgsm

pytestmark = pytest.mark.usefixtures("short_turns")

AT_BOUNDARY = dict(gradient="at_boundary")
# The own solver does not overshoot; the other margins are 1 + overshoot times as large.
METHODS = {
    "through_iterates": dict(gradient="through_iterates", overshoot=0.0),
    "at_boundary": AT_BOUNDARY | dict(overshoot=0.0),
    "at_boundary, overshot": AT_BOUNDARY | dict(overshoot=0.3),
    "own solver": AT_BOUNDARY,
}


def options_of(method, norm):
    solver = partial(dd_jax.deepfool, norm=norm, overshoot=0.0, bounds=None)
    options = METHODS[method] | (dict(solver=solver) if method == "own solver" else {})
    return options | dict(norm=norm), 1 + options.get("overshoot", 0.0)


@functools.cache
def affine_case(num_classes):
    """(weights, biases), inputs and labels; every other example wrong, and one step from right."""
    matrix, biases, inputs = affine_net((24, 5), num_classes, seed=4)
    logits = inputs @ matrix + biases
    order = np.argsort(-logits, axis=1)
    # Towards the second class no third one can take over on the way, at least with two classes.
    labels = np.where(np.arange(24) % 2 == 0, order[:, 0], order[:, 1])
    return (matrix, biases), inputs, labels


def apply_affine(params, x):
    return x @ params[0] + params[1][None]


def closed_form(params, inputs, source, target, norm):
    """+|f| / (||w||_q ||x||_p), differentiable by plain autodiff."""
    matrix, biases = params
    w = (matrix[:, source] - matrix[:, target]).T
    f = (inputs * w).sum(axis=1) + biases[source] - biases[target]
    if norm == "linf":
        return f / jnp.abs(w).sum(axis=1) / jnp.abs(inputs).max(axis=1)
    return f / jnp.sqrt((w**2).sum(axis=1)) / jnp.sqrt((inputs**2).sum(axis=1))


def nearest_classes(params, inputs, labels, norm):
    """The class that each example leaves and the one it reaches; True where one step does."""
    matrix, biases = map(np.asarray, params)
    logits = inputs @ matrix + biases
    predicted, row = logits.argmax(axis=1), np.arange(len(inputs))
    with np.errstate(invalid="ignore"):
        w = np.moveaxis(matrix[:, :, None] - matrix[:, predicted][:, None], 0, -1)
        size = np.abs(w).sum(-1) if norm == "linf" else np.sqrt((w**2).sum(-1))
        distance = np.abs(logits.T - logits[row, predicted][None]) / size
    nearest = np.nanargmin(distance, axis=0)
    right = predicted == labels
    target = np.where(right, nearest, labels)
    direction = w[target, row]
    unit = np.sign(direction) if norm == "linf" else direction / size[target, row][:, None]
    end = inputs + 1.001 * distance[target, row][:, None] * unit
    reached = (end @ matrix + biases).argmax(axis=1)
    return predicted, target, right, reached == target


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("num_classes", [2, 4])
def test_both_gradients_are_the_closed_form_on_affine_nets(method, norm, num_classes, x64):
    (matrix, biases), inputs, labels = affine_case(num_classes)
    predicted, target, right, one_step = nearest_classes((matrix, biases), inputs, labels, norm)
    inputs, labels = inputs[one_step], labels[one_step]
    source, target, right = predicted[one_step], target[one_step], right[one_step]
    assert right.sum() >= 5 and (~right).sum() >= 5
    params, inputs = (jnp.array(matrix), jnp.array(biases)), jnp.array(inputs)
    options, scale = options_of(method, norm)
    weights = jnp.linspace(0.5, 2.0, len(labels))

    def total(params, inputs):
        net = partial(apply_affine, params)
        margin = dd_jax.signed_margin(net, inputs, jnp.array(labels), **options)
        return (weights * margin).sum(), margin

    def expected(params, inputs):
        margin = jnp.where(right, scale, -scale) * closed_form(params, inputs, source, target, norm)
        return (weights * margin).sum(), margin

    found, wanted = (
        jax.jit(jax.value_and_grad(function, argnums=(0, 1), has_aux=True))(params, inputs)
        for function in (total, expected)
    )
    assert_close(found, wanted, 1e-9)
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(found[1]))


MOST_STEPS = 400


def nearest_point(logits_fn, inputs, labels, *, norm):
    """The nearest point of the boundary, found from DeepFool's by a fixed point.

    D <- (<w, D> - phi) / ||w||_q d with w = grad phi and d the steepest direction along w. At its
    fixed points phi = 0 and D is parallel to d: the conditions of the nearest point. num_steps is
    the last step that changed D by more than 1e-12.
    """
    start = dd_jax.deepfool(logits_fn, inputs, labels, norm=norm, overshoot=0.0)
    attacked = (jnp.argmax(logits_fn(inputs), axis=1) == labels)[:, None]

    def lead(x):
        logits = logits_fn(x)
        is_label = jax.nn.one_hot(labels, logits.shape[1], dtype=bool)
        others = jnp.max(jnp.where(is_label, -jnp.inf, logits), axis=1)
        phi = jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0] - others
        return phi.sum(), phi

    def improve(step, state):
        perturbation, num_steps = state
        w, phi = jax.grad(lead, has_aux=True)(inputs + perturbation)
        gain = ((w * perturbation).sum(axis=1) - phi)[:, None]
        if norm == "linf":
            better = gain / jnp.abs(w).sum(axis=1, keepdims=True) * jnp.sign(w)
        else:
            better = gain / (w * w).sum(axis=1, keepdims=True) * w
        # Half a step: whole steps circle around the nearest point where the boundary is curved.
        better = jnp.where(attacked, (perturbation + better) / 2, 0)
        is_still = jnp.abs(better - perturbation).max(axis=1) <= 1e-12
        better = jnp.where(jnp.isfinite(better), better, perturbation)
        return better, jnp.where(is_still, num_steps, step + 1)

    state = jnp.where(attacked, start.perturbation, 0), jnp.zeros_like(start.num_steps)
    end, num_steps = jax.lax.fori_loop(0, MOST_STEPS, improve, state)
    return dd_jax.AttackResult(end, start.success, num_steps)


def curved_case():
    """A tanh net, inputs, and labels: the first class for every other example, else the second."""
    params = arrays(make_params("tanh"))
    params = params | {key: 0.4 * params[key] for key in ("w1", "b1")}
    inputs = jnp.asarray(np.random.default_rng(7).normal(size=(48, 6)))
    order = jnp.argsort(-apply_net("tanh", params, inputs), axis=1)
    return params, inputs, jnp.where(jnp.arange(48) % 2 == 0, order[:, 0], order[:, 1])


@pytest.mark.parametrize("norm", NORMS)
def test_at_boundary_is_the_derivative_of_a_converged_distance_on_curved_nets(norm, x64):
    """Held against central differences of the distance, which is searched for anew at both ends.

    Steps of 1e-5 leave an error of about 1e-10 by the third derivative, and of 1e-10 by rounding:
    1e-15 in distances of order 1, over 2e-5. The bound of 1e-7 of the largest slope is far above,
    and far below what another point than the nearest gives. Examples count whose fixed point has
    converged; it does not where the nearest point is a corner between three classes, or where (in
    linf) a component of w is zero, and there the distance has no derivative of this form.
    """
    params, inputs, labels = curved_case()
    random = np.random.default_rng(8)
    directions = jax.tree.map(lambda x: jnp.asarray(random.normal(size=x.shape)), (params, inputs))

    def margin(params, inputs):
        net, solver = partial(apply_net, "tanh", params), partial(nearest_point, norm=norm)
        options = dict(norm=norm, solver=solver, penalty_fn=dd_jax.penalties.linear)
        _, metrics = dd_jax.deep_defense_loss(net, inputs, labels, **options, **AT_BOUNDARY)
        return metrics["margin"], metrics["num_steps"]

    @jax.jit
    def slopes(params, inputs):
        value, pull_back, num_steps = jax.vjp(margin, params, inputs, has_aux=True)
        gradients = jax.vmap(pull_back)(jnp.eye(48))
        along = lambda gradient, direction: (gradient * direction[None]).reshape(48, -1).sum(axis=1)
        slopes = jax.tree.map(along, gradients, directions)
        return value, num_steps < MOST_STEPS - 10, jax.tree.leaves(slopes)

    value, converged, actual = slopes(params, inputs)
    assert (converged & (value > 0)).sum() >= 3 and (converged & (value < 0)).sum() >= 3
    here, structure = jax.tree.flatten((params, inputs))
    compiled, step = jax.jit(margin), 1e-5
    for i, direction in enumerate(jax.tree.leaves(directions)):
        moved = [here[i] + sign * step * direction for sign in (1, -1)]
        ends = [compiled(*structure.unflatten([*here[:i], x, *here[i + 1 :]]))[0] for x in moved]
        difference = (ends[0] - ends[1]) / (2 * step)
        assert_close(actual[i][converged], difference[converged], 1e-7)
        assert np.abs(actual[i][converged]).max() > 1e-2


def value_and_gradients(params, inputs, labels, **options):
    """In the shape of `deep_defense_loss`'s metrics, and the gradients of the margins' sum."""

    def total(params, inputs):
        net = partial(apply_net, "relu", params)
        _, metrics = dd_jax.deep_defense_loss(net, inputs, labels, **options)
        return metrics["margin"].sum(), metrics

    (_, metrics), gradients = jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(
        params, inputs
    )
    assert_finite((metrics, gradients))
    return metrics, gradients


@pytest.mark.parametrize("solver", [None, partial(dd_jax.deepfool, norm="linf")])
def test_dead_nets_and_zero_inputs_have_no_margin_and_no_gradient(solver):
    params, inputs, labels = problem("relu")
    options = AT_BOUNDARY | dict(norm="linf", solver=solver)
    dead = params | {"b1": jnp.full_like(params["b1"], -100)}
    assert_no_margin_and_no_gradient(*value_and_gradients(dead, inputs, labels, **options))
    zero = jnp.zeros_like(inputs)
    assert_no_margin_and_no_gradient(*value_and_gradients(params, zero, labels, **options))


def test_a_net_flat_at_the_point_reached_has_a_margin_without_a_gradient():
    """One step leads from the slope onto the plateau, where phi has no gradient."""
    net = lambda scale, x: jnp.concatenate([jax.nn.relu(scale * x - 1), 0 * x - 0.5], axis=1)
    x, labels = jnp.array([[2.0]]), jnp.array([0])
    margin = lambda scale: dd_jax.signed_margin(
        partial(net, scale), x, labels, num_steps=1, **AT_BOUNDARY
    )[0]
    value, gradient = jax.value_and_grad(margin)(1.0)
    np.testing.assert_allclose(value, 1.02 * 1.5 / 2, rtol=1e-6)
    assert gradient == 0


@pytest.mark.parametrize("solver", [None, dd_jax.deepfool])
def test_inside_jit_and_scan(solver, x64):
    params, inputs, labels = problem("tanh")
    batches = inputs.reshape(2, 4, 6), labels.reshape(2, 4)

    def total(params, batch):
        net = partial(apply_net, "tanh", params)
        penalty = dd_jax.regularizer(net, *batch, solver=solver, correct_scale=2.0, **AT_BOUNDARY)
        return penalty.sum()

    def descend(params, batch):
        gradient = jax.grad(total)(params, batch)
        return jax.tree.map(lambda p, g: p - 0.01 * g, params, gradient), None

    one = jax.jit(descend)
    wanted = one(one(params, (batches[0][0], batches[1][0]))[0], (batches[0][1], batches[1][1]))[0]
    actual = jax.jit(lambda params: jax.lax.scan(descend, params, batches)[0])(params)
    assert_close(actual, wanted, 1e-12)
    assert max(np.abs(actual[key] - params[key]).max() for key in params) > 1e-4


def test_any_attack_can_be_the_solver_and_sees_no_gradients():
    """A solver in NumPy, which JAX cannot differentiate."""
    params, inputs, labels = problem("tanh")
    called = []

    def solver(logits_fn, inputs, labels):
        called.append(logits_fn(inputs).shape)
        found = fgsm(logits_fn, inputs, labels, epsilon=0.25)
        shape = jax.ShapeDtypeStruct(inputs.shape, inputs.dtype)
        same = lambda x, logits: np.asarray(x) + 0 * np.asarray(logits).sum(dtype=np.float32)
        moved = jax.pure_callback(same, shape, found.perturbation, logits_fn(inputs))
        return found._replace(perturbation=moved)

    def total(params):
        net = partial(apply_net, "tanh", params)
        margin = dd_jax.signed_margin(
            net, inputs, labels, norm="linf", solver=solver, **AT_BOUNDARY
        )
        return margin.sum(), margin

    (_, margin), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    assert called == [(8, 4), (8, 2)]
    size = 0.25 / jnp.abs(inputs).max(axis=1)
    np.testing.assert_allclose(margin, jnp.where(jnp.arange(8) % 2 == 0, size, -size), rtol=1e-5)
    assert_finite(gradient)
    assert all(leaf.any() for key, leaf in gradient.items())


WRONG_CALLS = [
    (dict(gradient="implicit"), "gradient is 'implicit'; it must be 'through_iterates' or 'at_bou"),
    (dict(solver=dd_jax.deepfool), "'through_iterates' is .* give gradient='at_boundary'"),
    (
        AT_BOUNDARY | dict(solver=lambda net, x, y: x),
        r"solver must return a dd_jax\.AttackResult; it returned a .*(Tracer|Array)",
    ),
    (
        AT_BOUNDARY | dict(solver=lambda net, x, y: dd_jax.AttackResult(x[:3], y[:3] > 0, y[:3])),
        r"of shapes \(9, 6\), \(9,\), \(9,\); it returned \(3, 6\), \(3,\), \(3,\)",
    ),
]


@pytest.mark.parametrize(
    "function", [dd_jax.signed_margin, dd_jax.regularizer, dd_jax.deep_defense_loss]
)
@pytest.mark.parametrize("options, message", WRONG_CALLS)
def test_wrong_solvers_and_gradients_are_refused(function, options, message, unchecked):
    with pytest.raises(ValueError, match=message):
        function(NET, INPUTS, jnp.zeros(9, int), **options)


def test_a_solver_that_calls_the_net_with_other_rows_is_told_so():
    def row_by_row(logits_fn, inputs, labels):
        logits_fn(inputs[:1])
        return dd_jax.deepfool(logits_fn, inputs, labels)

    with pytest.raises(ValueError, match="calls the net with 1 rows; .* whole batch, 3 rows"):
        net, x = (lambda x: x @ jnp.eye(2)), jnp.array([[2.0, 1.0], [1.0, 2.0], [3.0, 1.0]])
        options = dict(solver=row_by_row, gradient="at_boundary")
        dd_jax.signed_margin(net, x, jnp.array([0, 0, 1]), **options)


def test_each_example_counts_in_one_of_the_solver_s_calls():
    """A solver that moves everything, also what is classified as it wants already."""

    def restless(logits_fn, inputs, labels):
        ones = jnp.ones(len(inputs), bool)
        return dd_jax.AttackResult(jnp.ones_like(inputs), ones, ones.astype(jnp.int32))

    net, x = (lambda x: x @ jnp.eye(2)), jnp.array([[2.0, 1.0], [1.0, 2.0]])
    options = dict(solver=restless, gradient="at_boundary")
    margin = dd_jax.signed_margin(net, x, jnp.array([0, 0]), **options)
    size = (2 / 5) ** 0.5
    np.testing.assert_allclose(margin, [size, -size], rtol=1e-6)
