"""DDN, FMN and SuperDeepFool: closed forms on affine nets, a plain loop, their edges, and as
solvers of the margin.
"""

import functools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from test_deepfool import affine, affine_net, assert_same, mlp, nearest_boundary, rows

from dd_jax import signed_margin
from dd_jax.attacks import ddn, deepfool, fmn, superdeepfool
from dd_jax.norms import project

INPUTS = jax.random.normal(jax.random.key(1), (9, 6))
NET = mlp(jax.random.key(2))
PREDICTED = np.argmax(NET(INPUTS), axis=1)
ORDERS = {"l1": 1, "l2": 2, "linf": np.inf}
DDN, SUPERDEEPFOOL = partial(ddn, num_steps=100), superdeepfool
FMN = {norm: partial(fmn, norm=norm, num_steps=100) for norm in ORDERS}
ATTACKS = {"ddn": DDN, "superdeepfool": SUPERDEEPFOOL} | {f"fmn {p}": FMN[p] for p in FMN}
each_attack = pytest.mark.parametrize("name", ATTACKS)


def norm_of(name):
    return name.split()[1] if " " in name else "l2"


@functools.cache
def compiled(attack, logits_fn, **options):
    return jax.jit(partial(attack, logits_fn, **options))


def call(attack, logits_fn, inputs, labels=None, **options):
    """The attack compiled as a whole, once for all tests that share it."""
    return jax.tree.map(np.asarray, compiled(attack, logits_fn, **options)(inputs, labels))


def length(perturbation, norm):
    flat = np.asarray(perturbation, np.float64).reshape(len(perturbation), -1)
    return np.linalg.norm(flat, ord=ORDERS[norm], axis=1)


def distances(weights, biases, inputs, norm):
    """How far the nearest boundary of an affine net is, in closed form."""
    if norm != "l1":
        return length(nearest_boundary(weights, biases, inputs, norm), norm)
    logits = inputs.reshape(len(inputs), -1) @ weights + biases
    source = logits.argmax(axis=1)
    slopes = np.abs(weights.T[None] - weights.T[source][:, None]).max(axis=2)
    leads = logits[np.arange(len(inputs)), source][:, None] - logits
    return np.where(slopes > 0, leads / np.where(slopes > 0, slopes, 1), np.inf).min(axis=1)


# How far above the closed form the worst example may be, with two classes and with five. DDN is
# drawn between classes; FMN in l1 may go for another one than the nearest.
TOLERANCES = {
    "ddn": (2e-3, 0.07),
    "superdeepfool": (1.1e-3, 1.1e-3),
    "fmn l1": (2e-3, 0.03),
    "fmn l2": (2e-3, 2e-3),
    "fmn linf": (2e-3, 2e-3),
}


@pytest.mark.parametrize("shape, num_classes", [((12, 7), 2), ((9, 3, 4), 5)])
@each_attack
def test_the_distance_is_the_closed_form_on_affine_nets(name, shape, num_classes, x64):
    weights, biases, inputs = affine_net(shape, num_classes, seed=4)
    steps = {} if name == "superdeepfool" else dict(num_steps=300)
    net = affine(jnp.array(weights), jnp.array(biases))
    found = call(ATTACKS[name], net, jnp.array(inputs), **steps)
    assert found.perturbation.dtype == "float64" and found.success.all()
    ratio = length(found.perturbation, norm_of(name)) / distances(
        weights, biases, inputs, norm_of(name)
    )
    assert ratio.min() >= 1 - 1e-9
    assert ratio.max() <= 1 + TOLERANCES[name][num_classes > 2]


@pytest.mark.parametrize("name", ["ddn", "fmn l2", "superdeepfool"])
def test_the_perturbation_is_normal_to_the_boundary(name, x64):
    """In l2 its direction too is known, on a net of two classes."""
    weights, biases, inputs = affine_net((12, 7), 2, seed=4)
    steps = {} if name == "superdeepfool" else dict(num_steps=300)
    net = affine(jnp.array(weights), jnp.array(biases))
    found = call(ATTACKS[name], net, jnp.array(inputs), **steps)
    wanted = nearest_boundary(weights, biases, inputs, "l2")
    cosine = (found.perturbation * wanted).sum(axis=1) / (
        length(found.perturbation, "l2") * length(wanted, "l2")
    )
    assert cosine.min() > 1 - 1e-6


def ascent(loss, x):
    gradient = np.asarray(jax.grad(lambda x: loss(NET(x)).sum())(x))
    return gradient, gradient / length(gradient, "l2")[:, None]


def cosine_schedule(first, last, step, num_steps):
    return last + (first - last) * (1 + np.cos(np.pi * step / num_steps)) / 2


def plain_ddn(inputs, labels, num_steps, bounds):
    """DDN as it is written down, every example in every step."""
    perturbation, radius = np.zeros(inputs.shape), np.ones(len(inputs))
    best, best_size = np.zeros(inputs.shape), np.full(len(inputs), np.inf)
    cross_entropy = lambda z: -jax.nn.log_softmax(z)[jnp.arange(len(labels)), labels]
    for k in range(num_steps):
        fools = np.argmax(NET(inputs + perturbation), axis=1) != labels
        better = fools & (length(perturbation, "l2") < best_size)
        best[better] = perturbation[better]
        best_size[better] = length(perturbation, "l2")[better]
        _, direction = ascent(cross_entropy, inputs + perturbation)
        moved = perturbation + cosine_schedule(1.0, 0.01, k, num_steps) * direction
        radius = radius * np.where(fools, 0.95, 1.05)
        farthest = np.maximum(inputs - bounds[0], bounds[1] - inputs)
        radius = np.minimum(radius, length(farthest, "l2"))
        moved = moved * (radius / length(moved, "l2"))[:, None]
        perturbation = np.clip(inputs + moved, *bounds) - inputs
    return best, best_size


def plain_fmn(inputs, labels, num_steps, norm):
    """FMN as it is written down, without bounds."""
    perturbation, radius = np.zeros(inputs.shape), np.zeros(len(inputs))
    best, best_size = np.zeros(inputs.shape), np.full(len(inputs), np.inf)
    dual = {"l1": "linf", "l2": "l2", "linf": "l1"}[norm]

    def phi(z):
        of_label = z[jnp.arange(len(labels)), labels]
        return jnp.where(jax.nn.one_hot(labels, 4, dtype=bool), -jnp.inf, z).max(axis=1) - of_label

    for k in range(num_steps):
        size, value = length(perturbation, norm), np.asarray(phi(NET(inputs + perturbation)))
        better = (value > 0) & (size < best_size)
        best[better], best_size[better] = perturbation[better], size[better]
        gradient, direction = ascent(phi, inputs + perturbation)
        change = cosine_schedule(0.05, 0.001, k, num_steps)
        estimate = 1.001 * (size + np.abs(value) / length(gradient, dual))
        unfound = np.where(np.isfinite(best_size), (1 + change) * radius, estimate)
        radius = np.where(value > 0, np.minimum((1 - change) * radius, best_size), unfound)
        moved = perturbation + cosine_schedule(1.0, 0.01, k, num_steps) * direction
        perturbation = np.asarray(project(jnp.array(moved), jnp.array(radius), norm))
    return best, best_size


def test_ddn_agrees_with_the_plain_loop(short_turns, x64):
    inputs, bounds = np.clip(np.asarray(INPUTS, float), -1.0, 1.2), (-1.0, 1.2)
    labels = np.argmax(NET(inputs), axis=1)
    found = call(ddn, NET, jnp.array(inputs), labels, num_steps=12, bounds=bounds)
    best, best_size = plain_ddn(inputs, labels, 12, bounds)
    fooled = np.isfinite(best_size)
    at_bounds = (inputs + best <= bounds[0]) | (inputs + best >= bounds[1])
    assert fooled.sum() >= 5 and (at_bounds & (best != 0))[fooled].any()
    np.testing.assert_allclose(found.perturbation[fooled], best[fooled], atol=1e-10)


@pytest.mark.parametrize("norm", ORDERS)
def test_fmn_agrees_with_the_plain_loop(norm, short_turns, x64):
    inputs = np.asarray(INPUTS, float)
    found = call(fmn, NET, jnp.array(inputs), PREDICTED, num_steps=12, norm=norm)
    best, best_size = plain_fmn(inputs, PREDICTED, 12, norm)
    fooled = np.isfinite(best_size)
    assert fooled.sum() >= 5
    np.testing.assert_allclose(found.perturbation[fooled], best[fooled], atol=1e-10)


@pytest.mark.parametrize("name", ["ddn", "fmn l2", "superdeepfool"])
def test_shorter_than_deepfool_on_curved_nets(name):
    found = call(ATTACKS[name], NET, INPUTS)
    longer = call(deepfool, NET, INPUTS)
    assert found.success.all() and longer.success.all()
    ratio = length(found.perturbation, "l2") / length(longer.perturbation, "l2")
    assert np.median(ratio) < 0.97 and ratio.min() < 0.7
    assert ratio.max() < (1.001 if name == "superdeepfool" else 1.3)  # Another class, one example.


@each_attack
def test_a_separate_forward_pass_finds_the_success(name):
    found = call(ATTACKS[name], NET, INPUTS)
    predicted = np.argmax(NET(INPUTS + found.perturbation), axis=1)
    np.testing.assert_array_equal(found.success, predicted != PREDICTED)
    assert found.success.all() and (found.num_steps > 0).all()
    nearer = np.argmax(NET(INPUTS + 0.9 * found.perturbation), axis=1)
    assert (nearer == PREDICTED).mean() > 0.8


@each_attack
def test_a_batch_is_its_rows_in_any_order(name, short_turns, x64):
    inputs, order = INPUTS.astype(float), jax.random.permutation(jax.random.key(5), 9)
    whole = call(ATTACKS[name], NET, inputs)
    company = jnp.concatenate([inputs[order], jnp.zeros((4, 6)), 50 * inputs[:3]])
    assert_same(
        rows(call(ATTACKS[name], NET, company), slice(9)), rows(whole, np.asarray(order)), 1e-8
    )
    one = compiled(ATTACKS[name], NET)
    alone = [one(inputs[i : i + 1]) for i in range(9)]
    assert_same(jax.tree.map(lambda *rows: np.concatenate(rows), *alone), whole, 1e-8)


@pytest.mark.parametrize(
    "bounds", [(-0.5, 0.62), (-np.full(6, 0.52), np.linspace(0.61, 0.63, 6)[None])]
)
@each_attack
def test_results_stay_within_bounds(name, bounds):
    inputs = jnp.clip(INPUTS, -0.5, 0.6)
    labels = np.argmax(NET(inputs), axis=1)
    of_one = tuple(jnp.broadcast_to(jnp.asarray(bound), (1, 6)) for bound in bounds)
    attack = lambda lower, upper: ATTACKS[name](NET, inputs, labels, bounds=(lower, upper))
    found = jax.jit(attack)(*of_one)
    result = np.asarray(inputs + found.perturbation)
    lower, upper = (np.broadcast_to(bound, (9, 6)) for bound in bounds)
    assert (result >= lower - 1e-6).all() and (result <= upper + 1e-6).all()
    above, below = inputs < upper - 1e-3, inputs > lower + 1e-3
    stopped = (np.isclose(result, upper) & above) | (np.isclose(result, lower) & below)
    if name != "fmn l1":  # Few components move in l1; a test of its own follows.
        assert stopped.any(), "these bounds bind nothing"
    np.testing.assert_array_equal(np.argmax(NET(result), axis=1) != labels, found.success)
    assert found.success.sum() >= 4


def test_fmn_in_l1_leaves_components_at_their_bounds_for_others():
    """The steepest component is at its bound; its gradient alone would lead nowhere."""
    net = lambda x: jnp.stack([0 * x[:, 0] + 4, x @ jnp.array([10.0, 1.0, 0.5])], axis=1)
    found = call(
        fmn, net, jnp.array([[0.2, 0.2, 0.2]]), norm="l1", num_steps=200, bounds=(0.0, 0.3)
    )
    assert not found.success.any()  # The corner does not fool.
    net = lambda x: jnp.stack([0 * x[:, 0] + 4, x @ jnp.array([10.0, 1.0, 0.5])], axis=1)
    found = call(
        fmn, net, jnp.array([[0.2, 0.2, 0.2]]), norm="l1", num_steps=200, bounds=(0.0, 1.0)
    )
    assert found.success.all()
    np.testing.assert_allclose(found.perturbation, [[0.17, 0.0, 0.0]], atol=2e-3)
    inputs = jnp.array([[1.0, 0.2, 0.2]])
    net = lambda x: jnp.stack([0 * x[:, 0] + 10.6, x @ jnp.array([10.0, 1.0, 0.5])], axis=1)
    found = call(fmn, net, inputs, norm="l1", num_steps=200, bounds=(0.0, 1.0))
    assert found.success.all()
    np.testing.assert_allclose(found.perturbation, [[0.0, 0.3, 0.0]], atol=3e-3)


@each_attack
def test_misclassified_examples_are_done(name):
    labels = np.where(np.arange(9) % 2 == 0, PREDICTED, (PREDICTED + 1) % 4)
    found = call(ATTACKS[name], NET, INPUTS, labels)
    assert not found.perturbation[1::2].any() and found.success[1::2].all()
    assert not found.num_steps[1::2].any()
    whole = call(ATTACKS[name], NET, INPUTS, PREDICTED)
    assert_same(rows(found, slice(None, None, 2)), rows(whole, slice(None, None, 2)), 1e-4)


@each_attack
def test_dead_nets_and_what_is_not_finite_stay_where_they_are(name):
    dead = lambda x: jax.nn.relu(x[:, :3] - 100) + jnp.array([[0.0, 1.0, 0.0]])
    found = call(ATTACKS[name], dead, INPUTS)
    assert not found.perturbation.any() and not found.success.any()
    assert (found.num_steps == 100).all()
    others = np.array([0, 1, 2, 4, 6, 7, 8])
    strange = INPUTS.at[3].set(jnp.inf).at[5].set(jnp.nan)
    found = call(ATTACKS[name], NET, strange, PREDICTED)
    assert np.isfinite(found.perturbation).all()
    assert_same(
        rows(found, others), rows(call(ATTACKS[name], NET, INPUTS, PREDICTED), others), 1e-5
    )


def test_a_net_that_nothing_fools_is_left_without_success():
    """Steps and radii grow to the end; everything stays finite."""
    net = lambda x: jnp.stack([jnp.sum(jnp.tanh(x), axis=1) + 20, 0 * x[:, 0]], axis=1)
    for attack in (DDN, FMN["l1"], FMN["l2"], FMN["linf"], SUPERDEEPFOOL):
        found = call(attack, net, INPUTS)
        assert not found.success.any() and np.isfinite(found.perturbation).all()
    found = call(ddn, net, INPUTS, num_steps=2000)  # 1.05**2000 is no float.
    assert not found.success.any() and np.isfinite(found.perturbation).all()


@each_attack
def test_an_empty_batch_has_an_empty_result(name):
    found = call(ATTACKS[name], NET, INPUTS[:0])
    shapes = found.perturbation.shape, found.success.shape, found.num_steps.shape
    assert shapes == ((0, 6), (0,), (0,))


@each_attack
def test_no_gradient_flows_through_the_result(name):
    attack = ATTACKS[name]
    total = lambda scale: attack(lambda x: NET(scale * x), scale * INPUTS).perturbation.sum()
    assert jax.jit(jax.grad(total))(1.0) == 0


def test_more_steps_do_not_find_less():
    for attack, norm in ((ddn, "l2"), (partial(fmn, norm="linf"), "linf")):
        few, many = (
            length(call(attack, NET, INPUTS, num_steps=steps).perturbation, norm)
            for steps in (20, 200)
        )
        assert many.mean() < few.mean()


def test_the_last_bisection_of_superdeepfool_shortens():
    long, short = (call(superdeepfool, NET, INPUTS, num_bisections=n) for n in (0, 10))
    ratio = length(short.perturbation, "l2") / length(long.perturbation, "l2")
    assert short.success.all() and long.success.all()
    assert (ratio <= 1 + 1e-6).all() and ratio.min() < 0.999
    few = call(superdeepfool, NET, INPUTS, num_candidates=2, class_chunk_size=1)
    assert few.success.all()


def exact_distance(net, x, labels, start):
    """The D near `start` that lies on the boundary of a net of two classes and is normal to it:
    ||D||_2, and how far from the boundary it is in logits.
    """

    def phi(x):
        logits = net(x)
        difference = jnp.where(labels == 0, 1, -1) * (logits[:, 1] - logits[:, 0])
        return difference.sum(), difference

    def improve(_, perturbation):
        """Half of the way to the nearest point of the linearized boundary."""
        w, value = jax.grad(phi, has_aux=True)(x + perturbation)
        gain = jnp.sum(w * perturbation, axis=1) - value
        return (perturbation + (gain / jnp.sum(w**2, axis=1))[:, None] * w) / 2

    perturbation = jax.lax.fori_loop(0, 300, improve, start)
    return jnp.linalg.norm(perturbation, axis=1), phi(x + perturbation)[1]


SOLVERS = {
    "ddn": partial(ddn, num_steps=300),
    "fmn": partial(fmn, num_steps=300),
    "superdeepfool": superdeepfool,
}
SLOPE, CURVED = jax.random.normal(jax.random.key(7), (6, 2)), mlp(jax.random.key(8), num_classes=2)


def gentle(x):
    """Two classes, and a boundary that is curved but nearly flat."""
    return x @ SLOPE + 0.3 * CURVED(x)


@pytest.mark.parametrize("name", SOLVERS)
def test_they_solve_the_margin_and_its_gradient(name, x64):
    """Beside the converged distance and its finite differences; two examples are misclassified."""
    inputs = INPUTS.astype(float)
    predicted = jnp.argmax(gentle(inputs), axis=1)
    labels = jnp.where(jnp.arange(9) < 2, 1 - predicted, predicted)
    net_at = lambda t: lambda x: gentle((1 + t) * x + t * jnp.linspace(-1.0, 2.0, 6)[None])
    solver = dict(solver=SOLVERS[name], gradient="at_boundary")
    margin = jax.jit(lambda t: signed_margin(net_at(t), inputs, labels, **solver))
    found, slopes = margin(0.0), jax.jit(jax.jacrev(margin))(0.0)
    start = jnp.array(call(SOLVERS[name], gentle, inputs).perturbation)
    exact = jax.jit(lambda t: exact_distance(net_at(t), inputs, predicted, start))
    sign, step = jnp.where(jnp.arange(9) < 2, -1, 1) / jnp.linalg.norm(inputs, axis=1), 1e-5
    (distance, value), above, below = exact(0.0), exact(step)[0], exact(-step)[0]
    assert jnp.abs(value).max() < 1e-12 and (found[:2] < 0).all() and (found[2:] > 0).all()
    np.testing.assert_allclose(found, sign * distance, rtol=0.01)
    difference = sign * (above - below) / (2 * step)
    # The gradient is exact where D is normal; SuperDeepFool stops when it is nearly so.
    tolerance = (0.2 if name == "superdeepfool" else 0.02) * np.abs(difference).max()
    np.testing.assert_allclose(slopes, difference, rtol=0, atol=tolerance)
    assert np.abs(difference).min() > 0


WRONG_CALLS = {
    r"inputs must be a floating batch.* got int32\[9, 6\]": (
        ddn,
        dict(inputs=jnp.ones((9, 6), int)),
    ),
    r"labels must be integers of shape \(9,\).* not one-hot": (
        fmn,
        dict(labels=jnp.ones((9, 4))),
    ),
    "norm is 'l0'; it must be one of 'l1', 'l2', 'linf'": (fmn, dict(norm="l0")),
    "num_steps is 0; it must be at least 1": (ddn, dict(num_steps=0)),
    r"initial_radius is 0\.0; it must be more than 0": (ddn, dict(initial_radius=0.0)),
    r"step_size is -1\.0; it must be more than 0": (fmn, dict(step_size=-1.0)),
    r"final_step_size is 0\.0; it must be more than 0": (ddn, dict(final_step_size=0.0)),
    r"radius_change is 1\.0; it must be more than 0 and less than 1": (
        ddn,
        dict(radius_change=1.0),
    ),
    r"final_radius_change is 0\.0; it must be more than 0 and less than 1": (
        fmn,
        dict(final_radius_change=0.0),
    ),
    "num_bisections is -1; it must be 0 or more": (superdeepfool, dict(num_bisections=-1)),
    r"overshoot is -0\.1; it must be 0 or more": (superdeepfool, dict(overshoot=-0.1)),
    "num_candidates is 1; it must be at least 2": (superdeepfool, dict(num_candidates=1)),
    r"bounds are 1\.0 and 0\.0; the first must nowhere exceed the second": (
        superdeepfool,
        dict(bounds=(1.0, 0.0)),
    ),
    r"bounds must be a pair \(lower, upper\); got 1 of them": (fmn, dict(bounds=(0.0,))),
}


@pytest.mark.parametrize("message", WRONG_CALLS)
def test_errors_say_what_was_expected_and_what_came(message, unchecked):
    attack, options = WRONG_CALLS[message]
    arguments = dict(inputs=INPUTS, labels=None) | options
    inputs, labels = arguments.pop("inputs"), arguments.pop("labels")
    with pytest.raises(ValueError, match=message):
        jax.jit(partial(attack, NET, **arguments))(inputs, labels)


def test_logits_that_all_are_zero_are_not_fooled():
    """At x = 0 the classes tie and the first one is predicted; the second is a step away."""
    weights = jnp.array([[0.0, 1.0], [0.0, 2.0]])
    found = ddn(lambda x: x @ weights, jnp.zeros((1, 2)), jnp.zeros(1, jnp.int32))
    assert bool(found.success[0]) and float(jnp.abs(found.perturbation).max()) > 0
