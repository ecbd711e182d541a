"""AutoAttack and its parts: closed forms on affine nets, schedules, invariances, and what the data
set's measurement adds.
"""

import itertools
import sys
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dd_jax import attacks
from dd_jax.attacks import apgd, attack_names, autoattack, fab, square
from dd_jax.attacks._auto_pgd_schedule import make_schedule
from dd_jax.attacks._hyperplane import largest_threshold, step_to_hyperplane
from dd_jax.attacks._losses import cross_entropy_margin, dlr, dlr_targeted, loss_fn_for
from dd_jax.attacks._square_windows import image_layout, make_windows, two_pyramids
from dd_jax.data import in_memory
from dd_jax.evaluation.autoattack import AutoAttack, robust_accuracy
from dd_jax.evaluation.autoattack_programs import Setting
from dd_jax.norms import DUALS, lp_norm, project_within

NORMS = ("linf", "l2", "l1")
WEIGHTS = jnp.asarray(np.random.default_rng(3).normal(size=(12, 5)), jnp.float32)
BIAS = jnp.linspace(-0.2, 0.3, 5)
INPUTS = jnp.asarray(np.random.default_rng(4).uniform(0.2, 0.8, (9, 12)), jnp.float32)


def affine(x):
    return x.reshape(len(x), 12) @ WEIGHTS + BIAS[None]


def curved(x):
    return jnp.tanh(x.reshape(len(x), 12) @ (3 * WEIGHTS)) @ WEIGHTS[:5, :4]


LABELS = affine(INPUTS).argmax(-1).astype(jnp.int32)


def distances(norm, net=affine, inputs=INPUTS, weights=WEIGHTS):
    """The distance of each input to the nearest boundary of an affine net, without bounds."""
    logits, weights, norms = np.asarray(net(inputs)), np.asarray(weights), []
    for row, label in zip(logits, logits.argmax(-1), strict=True):
        slopes = weights - weights[:, [label]]
        order = {"l1": 1, "l2": 2, "linf": np.inf}[DUALS[norm]]
        size = np.linalg.norm(slopes, ord=order, axis=0) if order == 2 else None
        size = {1: np.abs(slopes).sum(0), np.inf: np.abs(slopes).max(0)}.get(order, size)
        others = np.arange(len(row)) != label
        norms.append(np.min((row[label] - row[others]) / size[others]))
    return jnp.array(norms, jnp.float32)


@pytest.mark.parametrize("norm", NORMS)
def test_fab_finds_the_closed_form_distance_of_an_affine_net(norm):
    for is_targeted in (True, False):
        found = jax.jit(partial(fab, affine, norm=norm, num_steps=30, is_targeted=is_targeted))(
            INPUTS
        )
        assert np.all(found.success)
        size = np.asarray(lp_norm(found.perturbation, norm))
        np.testing.assert_allclose(size, distances(norm), rtol=0.02)
        assert np.all(size >= distances(norm) * (1 - 1e-4))


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("loss", ["ce", "dlr", "dlr_targeted"])
def test_apgd_fools_an_affine_net_beyond_its_distance_and_not_within(norm, loss):
    attack = jax.jit(
        lambda epsilon: apgd(affine, INPUTS, epsilon=epsilon, norm=norm, loss=loss, num_steps=100)
    )
    size = distances(norm)
    # Untargeted, the loss may grow towards another class; in l1 few components change, and slowly.
    factor = 1.8 if norm == "l1" else 1.05 if loss == "dlr_targeted" else 1.6
    beyond, within = attack(factor * size), attack(0.99 * size)
    assert np.mean(beyond.success) >= (1 if loss == "dlr_targeted" else 7 / 9)
    assert not np.any(within.success)
    assert np.all(lp_norm(beyond.perturbation, norm) <= factor * size)
    assert np.all((beyond.num_steps < within.num_steps) | ~beyond.success)
    outside = np.asarray(affine(INPUTS + beyond.perturbation).argmax(-1))
    np.testing.assert_array_equal(outside != LABELS, beyond.success)


def test_apgd_checks_its_step_size_where_the_paper_does():
    schedule = make_schedule(100, "linf")
    assert np.flatnonzero(schedule.interval).tolist() == [22, 41, 57, 70, 80, 87, 93, 99]
    assert schedule.interval[schedule.interval > 0].tolist() == [22, 19, 16, 13, 10, 7, 6, 6]
    in_l1 = make_schedule(100, "l1")
    assert [sum(in_l1.radius == radius) for radius in (3, 2, 1)] == [31, 31, 41]
    assert not np.any(in_l1.counts & (in_l1.radius > 1))


@pytest.mark.parametrize("norm", NORMS)
def test_square_fools_an_affine_net_and_keeps_to_ball_and_bounds(norm):
    random = np.random.default_rng(4)
    weights = jnp.asarray(random.normal(size=(64, 3)), jnp.float32)
    images = jnp.asarray(random.uniform(0.2, 0.8, (6, 8, 8, 1)), jnp.float32)
    net = lambda x: x.reshape(len(x), -1) @ weights
    size = distances(norm, net, images, weights)
    attack = jax.jit(
        lambda epsilon, **options: square(
            net, images, epsilon=epsilon, norm=norm, num_queries=600, **options
        )
    )
    far, near = attack(4 * size), attack(0.99 * size)
    assert np.all(far.success) and not np.any(near.success)
    assert np.all(lp_norm(far.perturbation, norm) <= 4 * size)
    assert np.all(far.num_steps < 601) and np.all(near.num_steps == 601)
    found = square(net, images, epsilon=0.5, norm=norm, num_queries=9, bounds=(0.1, 0.9))
    inside = images + found.perturbation
    assert inside.min() >= 0.1 - 1e-6 and inside.max() <= 0.9 + 1e-6


def test_square_is_the_same_for_channels_first_and_channels_last():
    images = INPUTS.reshape(9, 2, 3, 2)
    first = jnp.moveaxis(images, -1, 1)
    of_first = lambda x: affine(jnp.moveaxis(x, 1, -1))
    for norm in ("linf", "l2"):
        options = dict(epsilon=0.3, norm=norm, num_queries=40, key=jax.random.key(5))
        last = square(affine, images, **options)
        other = square(of_first, first, channel_axis=1, **options)
        back = np.moveaxis(other.perturbation, 1, -1)
        np.testing.assert_allclose(back, last.perturbation, rtol=1e-5)


def test_the_pattern_of_square_attack_has_two_pyramids_of_norm_one():
    pattern = two_pyramids(3, 3)
    # The sums of 1 / k^2 over nested squares: one row above, two below around (1, 1) of them.
    upper, lower = np.array([[0.25, 1.25, 0.25]]), np.array([[0.25] * 3, [0.25, 1.25, 0.25]])
    parts = [part / np.linalg.norm(part) for part in (upper, -lower)]
    np.testing.assert_allclose(pattern, np.concatenate(parts) / 2**0.5)


def test_the_squares_shrink_as_the_paper_says():
    layout = image_layout((1, 28, 28, 1), -1)
    windows = make_windows(layout, [0.8 / 2**i for i in range(10)], 1)
    assert windows.heights.tolist() == [25, 18, 13, 9, 6, 4, 3, 2, 2, 1]
    odd = make_windows(layout, [0.8 / 2**i for i in range(10)], 3)
    assert odd.heights.tolist() == [25, 19, 13, 9, 7, 5, 3, 3, 3, 3]
    assert image_layout((1, 50), -1)[2:] == (50, 1, 1)


@pytest.mark.parametrize("attack", ["apgd", "apgd_restarts", "fab", "square"])
def test_results_do_not_depend_on_the_batch_nor_on_the_place_in_it(attack, request):
    if attack == "fab":  # Its projections carry rounding of float32 on: up to 1.4e-5 on jax 0.12.
        request.getfixturevalue("x64")
    inputs = INPUTS.astype(jnp.float64 if attack == "fab" else INPUTS.dtype)
    keys = jax.random.split(jax.random.key(1), 9)
    function = {
        "apgd": partial(apgd, epsilon=0.05, num_steps=8),
        "apgd_restarts": partial(apgd, epsilon=0.02, num_steps=4, num_restarts=3, norm="l2"),
        "fab": partial(
            fab, epsilon=0.01, num_steps=4, num_restarts=2, is_targeted=False, norm="l2"
        ),
        "square": partial(square, epsilon=0.05, num_queries=25),
    }[attack]
    run = lambda rows: function(curved, inputs[rows], key=keys[rows])
    order = np.array([7, 2, 0, 5])
    whole, part = run(np.arange(9)), run(order)
    np.testing.assert_array_equal(np.asarray(whole.num_steps)[order], part.num_steps)
    np.testing.assert_allclose(
        np.asarray(whole.perturbation)[order], part.perturbation, rtol=1e-5, atol=1e-7
    )


def test_losses_are_what_the_papers_say():
    logits = jnp.array([[3.0, 1.0, 2.0, -1.0, 0.5]])
    label, target = jnp.array([0]), jnp.array([2])
    assert float(dlr(logits, label, target)[0]) == pytest.approx(-(3 - 2) / (3 - 1))
    expected = -(3 - 2) / (3 - (1 + 0.5) / 2)
    assert float(dlr_targeted(logits, label, target)[0]) == pytest.approx(expected)
    margin = cross_entropy_margin(logits, label, target)
    cross_entropy = -jax.nn.log_softmax(logits)[0, 0]
    assert float(jax.nn.softplus(margin)[0]) == pytest.approx(float(cross_entropy), rel=1e-6)
    confident = jnp.array([[200.0, 0.0, 1.0, 2.0]])
    slope = jax.grad(lambda z: cross_entropy_margin(z, label, target)[0])(confident)
    assert float(slope[0, 0]) == -1.0  # The cross-entropy's own gradient is 0 here.


@pytest.mark.parametrize(("loss", "classes"), [("dlr", 2), ("dlr_targeted", 3)])
def test_too_few_classes_are_said_and_mended(loss, classes):
    with pytest.warns(UserWarning, match=f"needs at least .* and the net has {classes}"):
        loss_fn_for(loss, classes)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = apgd(lambda x: affine(x)[:, :classes], INPUTS, epsilon=5.0, loss=loss, num_steps=10)
    assert np.all(found.success)


@pytest.mark.parametrize("norm", NORMS)
def test_the_step_to_a_hyperplane_is_exact_and_the_smallest_within_bounds(norm):
    random = np.random.default_rng(8)
    weights, position = random.normal(size=(40, 6)), random.uniform(0, 1, (40, 6))
    amount = 1.5 * random.normal(size=40)
    step = np.asarray(
        step_to_hyperplane(*map(jnp.asarray, (weights, amount, position)), (0.0, 1.0), norm),
        np.float64,
    )
    assert np.all(position + step > -1e-6) and np.all(position + step < 1 + 1e-6)
    gain = np.sum(weights * step, axis=1)
    furthest = np.where(np.sign(amount)[:, None] * weights > 0, 1 - position, -position)
    possible = np.abs(np.sum(weights * furthest, axis=1)) >= np.abs(amount)
    np.testing.assert_allclose(gain[possible], amount[possible], atol=2e-6)
    np.testing.assert_allclose(step[~possible], furthest[~possible], atol=1e-6)
    assert 10 < possible.sum() < 40
    order = {"l1": 1, "l2": 2, "linf": np.inf}[norm]
    size = np.linalg.norm(step, ord=order, axis=1)
    for row in np.flatnonzero(possible)[:10]:  # No feasible step among many is smaller.
        others = step[row] + random.normal(size=(4000, 6)) * 0.1
        others -= np.outer(others @ weights[row] - amount[row], weights[row]) / np.sum(
            weights[row] ** 2
        )
        inside = np.all((position[row] + others >= 0) & (position[row] + others <= 1), axis=1)
        if inside.any():
            least = np.linalg.norm(others[inside], ord=order, axis=1).min()
            assert least >= size[row] * (1 - 1e-5)


def test_project_within_beats_projecting_twice():
    inputs, x = jnp.array([[0.9, 0.5, 0.1]]), jnp.array([[2.0, 0.4, -0.05]])
    found = project_within(x, jnp.array([0.4]), inputs, (0.0, 1.0))
    np.testing.assert_allclose(found, [[0.1, 0.3, 0.0]], atol=1e-5)  # Closed form: t = 0.1.
    assert float(jnp.abs(found).sum()) <= 0.4


def test_the_largest_threshold_is_an_order_statistic():
    sizes = jnp.abs(jax.random.normal(jax.random.key(0), (5, 31)))
    found = largest_threshold(sizes, lambda chosen: jnp.sum(chosen, axis=1) >= 7)
    np.testing.assert_array_equal(found, jnp.sort(sizes, axis=1)[:, -7])


def test_autoattack_of_an_affine_net_is_the_closed_form():
    size, epsilon = distances("linf"), float(np.median(distances("linf"))) * 1.02
    inputs = jnp.concatenate([INPUTS, INPUTS[:1]])
    labels = jnp.concatenate([LABELS, (LABELS[:1] + 1) % 5])  # The last one is wrong already.
    attack = jax.jit(partial(autoattack, affine, norm="linf", epsilon=epsilon, bounds=None))
    found = attack(inputs, labels)
    np.testing.assert_array_equal(found.is_robust, [*(size > epsilon), False])
    fallen_to = np.asarray(found.fallen_to)
    assert fallen_to[-1] == -2 and np.all(fallen_to[:9][size > epsilon] == -1)
    assert set(fallen_to[:9][size <= epsilon]) <= {0, 1}  # Auto-PGD suffices.
    after = affine(inputs + found.perturbation).argmax(-1)
    np.testing.assert_array_equal(after == labels, found.is_robust)
    queries = np.asarray(found.num_queries)
    robust = 101 + 4 * 101 + 4 * 200 + 5001
    assert set(queries[:9][size > epsilon]) == {robust} and queries[-1] == 0
    assert np.all(queries[:9][size <= epsilon] < 5 * 101)


def test_a_random_net_needs_the_version_rand_and_gets_a_key_per_example():
    noisy = lambda x, key: affine(x) + 0.05 * jax.random.normal(key, (1, 5))
    size = distances("linf")
    options = dict(norm="linf", bounds=None, version="rand", key=jax.random.key(2))
    run = jax.jit(lambda epsilon: autoattack(noisy, INPUTS, LABELS, epsilon=epsilon, **options))
    assert not np.any(run(2 * size).is_robust) and np.mean(run(0.2 * size).is_robust) > 0.6


def test_bad_arguments_get_a_sentence(unchecked):
    images = jnp.zeros((2, 4, 4, 1))
    calls = {
        "loss is 'mse'": lambda: apgd(affine, INPUTS, epsilon=0.1, loss="mse"),
        "norm is 'l7'": lambda: fab(affine, INPUTS, norm="l7"),
        "num_steps is 0": lambda: fab(affine, INPUTS, num_steps=0),
        "num_restarts is 0": lambda: apgd(affine, INPUTS, epsilon=0.1, num_restarts=0),
        "version is 'quick'": lambda: attack_names("quick"),
        "share is 0": lambda: square(affine, INPUTS, epsilon=0.1, share=0.0),
        "epsilon is -1": lambda: square(affine, INPUTS, epsilon=-1.0),
        "key must be": lambda: apgd(
            affine, INPUTS, epsilon=0.1, key=jax.random.split(jax.random.key(0), 4)
        ),
        "changes squares of images": lambda: square(
            lambda x: x.reshape(2, -1)[:, :3], images[..., None], epsilon=0.1
        ),
    }
    for sentence, call in calls.items():
        with pytest.raises(ValueError, match=sentence):
            call()


def small_evaluation(**options):
    examples = dict(norm="linf", epsilon=0.1, show_progress=False, bounds=None)
    return robust_accuracy(affine, np.asarray(INPUTS), np.asarray(LABELS), **examples | options)


def test_robust_accuracy_of_a_data_set_is_the_closed_form_and_independent_of_the_batch_size(
    tmp_path,
):
    size, epsilon = distances("linf"), float(np.median(distances("linf"))) * 1.02
    file = tmp_path / "flags.npz"
    found = small_evaluation(epsilon=epsilon, batch_size=4, save_to=file)
    assert found["robust_accuracy"] == pytest.approx(np.mean(size > epsilon))
    assert found["accuracy"] == 1.0 and found["num_examples"] == 9 and not found["remarks"]
    assert list(found["robust_after"]) == list(attack_names())
    with np.load(file) as saved:
        assert np.all(saved["num_tried"][size > epsilon] == 5)
        np.testing.assert_array_equal(saved["fallen_to"] == -1, size > epsilon)


class Interrupted(Exception):
    pass


def test_a_killed_measurement_goes_on_where_it_was(tmp_path, monkeypatch):
    file, evaluation = tmp_path / "flags.npz", sys.modules["dd_jax.evaluation.autoattack"]
    setting = Setting("linf", float(np.median(distances("linf"))) * 1.02)
    attack = AutoAttack(
        lambda _, x: affine(x),
        in_memory(np.asarray(INPUTS), np.asarray(LABELS)),
        bounds=None,
        batch_size=3,
    )
    expected = attack.measure(None, setting, show_progress=False)
    note, calls = evaluation.note, itertools.count()

    def interrupt(*arguments):
        if next(calls) == 5:
            raise Interrupted
        note(*arguments)

    monkeypatch.setattr(evaluation, "note", interrupt)
    with pytest.raises(Interrupted):
        attack.measure(None, setting, save_to=file, show_progress=False)
    done = []
    monkeypatch.setattr(
        evaluation, "note", lambda f, r, n: (done.append((n, r["todo"].sum())), note(f, r, n))
    )
    assert attack.measure(None, setting, save_to=file, show_progress=False) == expected
    again = sum(count for number, count in done if number == 1)
    assert again <= 9 - 2 * 3, "Examples that Auto-PGD was done with were attacked again."
    for damaged in (b"damaged", file.read_bytes()[:-50]):
        file.write_bytes(damaged)
        assert attack.measure(None, setting, save_to=file, show_progress=False) == expected


def test_a_file_of_another_net_or_other_labels_is_not_taken_for_this_one(tmp_path):
    file, epsilon = tmp_path / "flags.npz", 3.0
    fallen = small_evaluation(epsilon=epsilon, save_to=file)
    assert fallen["robust_accuracy"] == 0
    constant = lambda x: 100 * jax.nn.one_hot(LABELS, 5) + 0 * affine(x)
    options = dict(norm="linf", epsilon=epsilon, show_progress=False, bounds=None, save_to=file)
    found = robust_accuracy(constant, np.asarray(INPUTS), np.asarray(LABELS), **options)
    assert found["robust_accuracy"] == 1


def test_odd_nets_are_remarked_upon():
    softmax = lambda x: jax.nn.softmax(affine(x))
    flat = lambda x: affine(jnp.round(x))
    options = dict(norm="linf", epsilon=1e-3, show_progress=False, bounds=None)
    assert (
        "probabilities"
        in robust_accuracy(softmax, np.asarray(INPUTS), np.asarray(LABELS), **options)["remarks"][0]
    )
    labels = np.asarray(flat(INPUTS).argmax(-1))
    found = robust_accuracy(flat, np.asarray(INPUTS), labels, **options)["remarks"]
    assert any("gradient of the loss is exactly zero for 100.0%" in text for text in found)


def test_images_out_of_bounds_and_bad_options_are_said():
    options = dict(norm="linf", epsilon=1e-3, show_progress=False)
    wide = np.asarray(INPUTS) * 255
    found = robust_accuracy(affine, wide, np.asarray(affine(wide).argmax(-1)), **options)
    assert any("out of the bounds" in text for text in found["remarks"])
    with pytest.raises(ValueError, match="epsilon is -1"):
        small_evaluation(epsilon=-1.0)
    with pytest.raises(ValueError, match="bounds are"):
        small_evaluation(bounds=(1.0, 0.0))


def test_logits_that_are_no_numbers_are_never_robust():
    broken = lambda x: affine(x) * jnp.where(x[:, :1] > 2, 1, jnp.nan)
    found = robust_accuracy(
        broken, np.asarray(INPUTS), np.zeros(9, int), norm="linf", epsilon=0.1, show_progress=False
    )
    assert found["accuracy"] == 0 and found["robust_accuracy"] == 0
    options = dict(norm="linf", epsilon=0.1, version="rand")
    result = autoattack(lambda x, key: broken(x), INPUTS, jnp.zeros(9, int), **options)
    assert not np.any(result.is_robust) and np.all(result.fallen_to == -2)


@pytest.mark.parametrize("attack", ["apgd", "fab", "square"])
@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_half_precision_uses_the_whole_ball_and_keeps_its_dtype(attack, norm):
    inputs = INPUTS.astype(jnp.bfloat16)
    net = lambda x: (affine(x.astype(jnp.float32))).astype(jnp.bfloat16)
    function = {
        "apgd": partial(apgd, epsilon=0.1, num_steps=3),
        "fab": partial(fab, num_steps=3),
        "square": partial(square, epsilon=0.1, num_queries=3),
    }[attack]
    found = function(net, inputs, norm=norm)
    assert found.perturbation.dtype == jnp.bfloat16
    if attack != "fab":
        size = lp_norm(found.perturbation.astype(jnp.float32), norm)
        assert np.all(size <= 0.1 * 1.005) and np.median(size) > 0.09


def test_float64_is_float64(x64):
    inputs = jnp.asarray(np.asarray(INPUTS), jnp.float64)
    net = lambda x: x @ jnp.asarray(WEIGHTS, jnp.float64)
    for function in (partial(apgd, epsilon=0.1, num_steps=2), partial(square, epsilon=0.1)):
        options = dict(num_queries=2) if function.func is square else {}
        assert function(net, inputs, **options).perturbation.dtype == jnp.float64


def test_batches_of_none_and_of_one():
    for rows in (0, 1):
        for function in (
            partial(apgd, epsilon=0.1, num_steps=2),
            partial(fab, num_steps=2, num_restarts=2),
            partial(square, epsilon=0.1, num_queries=2),
        ):
            assert function(affine, INPUTS[:rows]).success.shape == (rows,)


def test_all_attacks_are_public():
    for name in ("apgd", "fab", "square", "autoattack", "attack_names", "AutoAttackResult"):
        assert name in attacks.__all__
