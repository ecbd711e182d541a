"""Measuring a data set: batches and subsets do not show in the figures, and the epsilon of 50 % is
the closed form's.
"""

import json
from functools import partial

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.datasets import load_digits

from dd_jax import evaluation, parallel
from dd_jax.data import in_memory
from dd_jax.evaluation import measurements, metrics
from dd_jax.evaluation.evaluate import Evaluator, Settings, random_key
from dd_jax.evaluation.pass_score import pass_scores
from dd_jax.types import AttackResult

NUM_EXAMPLES, SHAPE, NUM_VALUES = 45, (16, 16, 1), 256
random = np.random.default_rng(1)
DIGITS = load_digits().images[:NUM_EXAMPLES].astype(np.float32) / 16  # Noise could not be aligned.
INPUTS = np.stack([cv2.resize(image, SHAPE[:2]) for image in DIGITS])[..., None]
LABELS = random.integers(0, 2, NUM_EXAMPLES).astype(np.int32)
WEIGHTS = (random.normal(size=(NUM_VALUES, 2)) * np.geomspace(0.2, 2, NUM_VALUES)[:, None]).astype(
    np.float32
)


def measure(net, variables, examples, *, names=("deepfool",), limit=None, **options):
    said = {name: options.pop(name) for name in ("description",) if name in options}
    evaluator = Evaluator(net, examples, **options)
    return evaluator.measure(variables, names=names, limit=limit, **said)


def fgsm_accuracy(net, variables, examples, epsilons, *, limit=None, **options):
    return Evaluator(net, examples, **options).fgsm_accuracy(variables, epsilons, limit=limit)


def half_epsilon(net, variables, examples, *, max_epsilon=None, **options):
    return Evaluator(net, examples, **options).half_epsilon(variables, max_epsilon=max_epsilon)


VARIABLES = {"weights": WEIGHTS, "bias": np.float32(0.0)}
SETTINGS = Settings(
    num_steps=5,
    curve_max_epsilon=0.1,
    curve_num_points=5,
    pgd_epsilon=0.02,
    pgd_step_size=0.01,
    pgd_num_steps=3,
    carlini_wagner_num_steps=40,
    minimum_norm_num_steps=100,
)
MINIMUM_NORM = ("ddn", "fmn_linf", "fmn_l1")
ALL = ("deepfool", "fgsm", "pgd", "carlini_wagner", *MINIMUM_NORM, "pass")
BOUNDS = (0.0, 1.0)
traced = []


def net(variables, x):
    """Two classes, divided by a plane."""
    traced.append(x.shape)
    return (
        x.reshape(x.shape[0], -1) @ variables["weights"]
        + jnp.stack([variables["bias"], -variables["bias"]])[None]
    )


def distances(variables=VARIABLES, inputs=INPUTS):
    """Predicted classes, and the linf distances from the plane, in float64."""
    difference = np.float64(variables["weights"])[:, 0] - variables["weights"][:, 1]
    gap = np.float64(inputs).reshape(len(inputs), -1) @ difference + 2 * variables["bias"]
    return (gap < 0).astype(np.int32), np.abs(gap) / np.abs(difference).sum()


RIGHT = distances()[0]  # As labels they make the net's accuracy 1.
run = partial(measure, net, VARIABLES, show_progress=False, settings=SETTINGS)
run_all = partial(
    run,
    names=ALL,
    bounds=BOUNDS,
    to_images=lambda inputs: inputs,
    carlini_wagner_examples=20,
    minimum_norm_examples=30,
)
quiet = dict(show_progress=False, batch_size=20)


def assert_same(first, second):
    """Equal up to rounding, curves and all; of PASS, where rounding may decide whether an image is
    aligned, up to one.
    """
    assert first.keys() == second.keys()
    for name, value in first.items():
        tolerance = dict(atol=1.01 / NUM_EXAMPLES) if name.startswith("pass") else dict(rtol=2e-5)
        value, other = without_norm(value), without_norm(second[name])
        jax.tree.map(partial(np.testing.assert_allclose, **tolerance), value, other)


def without_norm(value):
    return {k: v for k, v in value.items() if k != "norm"} if isinstance(value, dict) else value


@pytest.fixture(scope="module")
def everything():
    return run_all(in_memory(INPUTS, LABELS), batch_size=45)


def test_the_summary_says_everything_and_can_be_written(everything):
    assert list(everything)[:2] == ["num_examples", "accuracy"]
    assert set(everything) == {
        *("num_examples", "accuracy", "rho_l2", "l2", "deepfool_success", "deepfool_steps"),
        *("rho_linf", "fgsm_success", "fgsm_curve", "accuracy_pgd"),
        *(
            "l2_carlini_wagner",
            "carlini_wagner_success",
            "carlini_wagner_examples",
            "pass",
            "pass_unaligned",
        ),
        *("rho_l2_ddn", "l2_ddn", "rho_linf_fmn", "linf_fmn", "rho_l1_fmn", "l1_fmn"),
        *(f"{name}_{what}" for name in MINIMUM_NORM for what in ("success", "examples", "curve")),
        *(f"{name}_disagreements" for name in ALL if name != "pass"),
    }
    assert json.loads(json.dumps(everything)) == everything
    predicted, linf = distances()
    assert everything["num_examples"] == NUM_EXAMPLES and everything["accuracy"] == np.mean(
        predicted == LABELS
    )
    assert (
        everything["accuracy_pgd"]
        == np.mean((predicted == LABELS) & (linf > 0.02))
        < everything["accuracy"]
    )
    curve = everything["fgsm_curve"]
    np.testing.assert_allclose(curve["epsilons"], np.linspace(0, 0.1, 5))
    assert len(curve["success"]) == 5 and curve["success"][0] == pytest.approx(
        1 - everything["accuracy"]
    )
    assert everything["carlini_wagner_examples"] == 20
    assert [everything[f"{name}_examples"] for name in MINIMUM_NORM] == [30, 30, 30]


def test_a_ragged_last_batch_does_not_show(everything):
    assert_same(run_all(in_memory(INPUTS, LABELS), batch_size=20), everything)


def test_two_devices_give_what_one_gives(everything):
    """21 does not divide by two, nor 45 by 21: batches are filled up."""
    assert jax.device_count() == 2
    spread = dict(compile_fn=parallel.sums_and_rows, batch_size=21)
    assert_same(run_all(in_memory(INPUTS, LABELS), **spread), everything)
    options = dict(show_progress=False, **spread)
    assert half_epsilon(net, VARIABLES, in_memory(INPUTS, RIGHT), **options) == half_epsilon(
        net, VARIABLES, in_memory(INPUTS, RIGHT), **quiet
    )
    settings = SETTINGS._replace(pgd_seed=0)
    assert (
        0
        < run(in_memory(INPUTS, RIGHT), names=("pgd",), **spread | {"settings": settings})[
            "accuracy_pgd"
        ]
        < 1
    )


@pytest.mark.parametrize(
    "names", [(), ("deepfool",), ("pass",), ("carlini_wagner", "ddn"), ("pgd", "fgsm")]
)
def test_any_subset_gives_what_all_give(everything, names):
    some = run_all(in_memory(INPUTS, LABELS), names=names, batch_size=20)
    assert len(some) > 2 or not names
    assert_same(some, {name: everything[name] for name in some})


def test_a_limit_takes_the_first_examples():
    assert_same(run(in_memory(INPUTS, LABELS), limit=13), run(in_memory(INPUTS[:13], LABELS[:13])))
    wanted = run(in_memory(INPUTS[:7], LABELS[:7]), names=("carlini_wagner",), bounds=BOUNDS)
    found = run(
        in_memory(INPUTS, LABELS),
        names=("carlini_wagner",),
        bounds=BOUNDS,
        carlini_wagner_examples=7,
    )
    assert found["carlini_wagner_examples"] == 7 and found["num_examples"] == NUM_EXAMPLES
    assert found["accuracy"] != wanted["accuracy"]
    assert found["l2_carlini_wagner"] == pytest.approx(wanted["l2_carlini_wagner"], rel=1e-4)


# Robustness curves


def sizes_in(norm):
    """How far the plane is from the first 30 inputs in that norm, in float64."""
    difference = np.float64(WEIGHTS)[:, 0] - WEIGHTS[:, 1]
    gap = np.abs(np.float64(INPUTS[:30]).reshape(30, -1) @ difference)
    return gap / np.linalg.norm(difference, {"l2": 2, "linf": 1, "l1": np.inf}[norm])


@pytest.mark.parametrize("name, norm", [("ddn", "l2"), ("fmn_linf", "linf"), ("fmn_l1", "l1")])
def test_robustness_curves_are_the_closed_form(name, norm):
    """Without bounds; what is misclassified counts in the mean, and as nothing in the curve."""
    settings = SETTINGS._replace(minimum_norm_num_steps=1000)
    found = run(
        in_memory(INPUTS, LABELS),
        names=(name,),
        box=(-1e3, 1e3),
        minimum_norm_examples=30,
        settings=settings,
        batch_size=20,
    )
    right, wanted = RIGHT[:30] == LABELS[:30], sizes_in(norm)
    assert 5 < right.sum() < 25
    assert found[f"{norm}_{name[:3]}"] == pytest.approx(wanted.mean(), rel=5e-3)
    lengths = np.linalg.norm(
        INPUTS[:30].reshape(30, -1), {"l2": 2, "linf": np.inf, "l1": 1}[norm], axis=1
    )
    assert found[f"rho_{norm}_{name[:3]}"] == pytest.approx(np.mean(wanted / lengths), rel=5e-3)
    curve = found[f"{name}_curve"]
    assert (curve["norm"], curve["num_examples"]) == (norm, 30)
    assert curve["num_misclassified"] == 30 - right.sum() == 30 - len(curve["sizes"])
    np.testing.assert_allclose(curve["sizes"], np.sort(wanted[right]), rtol=2e-2)
    assert found[f"{name}_success"] == 1 and found[f"{name}_disagreements"] == 0


def test_a_curve_tells_misclassified_fooled_and_never_fooled_apart():
    sizes = np.array([np.inf, 0.3, 0, 0.123456789, np.inf, 0, 0.2], np.float32)
    assert metrics.robustness_curve("fmn_l1", sizes) == {
        "norm": "l1",
        "num_examples": 7,
        "num_misclassified": 2,
        "sizes": [0.123457, 0.2, 0.3],
    }


def test_pass_is_that_of_deepfools_examples():
    to_images = lambda inputs: 0.5 + 0.25 * inputs  # noqa: E731
    difference = WEIGHTS[:, 0] - WEIGHTS[:, 1]
    gaps = INPUTS.reshape(NUM_EXAMPLES, -1) @ difference
    perturbations = (-1.02 * gaps[:, None] * difference / np.sum(difference**2)).reshape(
        INPUTS.shape
    )
    scores, aligned = pass_scores(to_images(INPUTS), to_images(INPUTS + perturbations))
    found = run(in_memory(INPUTS, LABELS), names=("pass",), to_images=to_images, batch_size=20)
    assert found["pass"] == pytest.approx(scores.mean(), abs=1e-3) and scores.mean() < 0.999
    assert found["pass_unaligned"] == pytest.approx(np.mean(~aligned))
    flat = run(
        in_memory(np.zeros_like(INPUTS), LABELS),
        names=("pass",),
        to_images=to_images,
        batch_size=20,
    )
    assert flat["pass_unaligned"] == 1.0


# What does not trust the attack: the net is asked again, apart


def lying(attack, judge):
    """A compiler that has the attack find a hundredth of what it should, and say that it succeeded
    everywhere.
    """

    def wrong(shared, batch):
        is_result = lambda x: isinstance(x, AttackResult)
        lie = lambda result: AttackResult(
            0.01 * result.perturbation, result.success | True, result.num_steps
        )
        return jax.tree.map(
            lambda x: lie(x) if is_result(x) else x, attack(shared, batch), is_leaf=is_result
        )

    return evaluation.in_two_programs(wrong, judge)


def test_a_lying_compiler_is_caught(everything):
    names = ALL[:-1]
    options = dict(names=names, bounds=BOUNDS, compile_fn=lying)
    options |= dict(carlini_wagner_examples=20, minimum_norm_examples=20)
    found = run(in_memory(INPUTS, RIGHT), **options)
    assert {found[f"{name}_success"] for name in names if name != "pgd"} == {0}
    for name in MINIMUM_NORM:  # As if nothing could fool any.
        curve = found[f"{name}_curve"]
        assert (curve["sizes"], curve["num_misclassified"]) == ([], 0)
    assert found["accuracy_pgd"] == found["accuracy"] == 1.0
    numbers = [found[f"{name}_disagreements"] for name in names]
    assert numbers == [NUM_EXAMPLES, NUM_EXAMPLES, NUM_EXAMPLES, 20, 20, 20, 20]
    # The size is that of what was seen.
    assert found["l2"] == pytest.approx(0.01 * everything["l2"], rel=1e-3)
    # The judge's own.
    assert found["fgsm_curve"]["success"][0] == 0 < found["fgsm_curve"]["success"][-1]


def test_a_lying_attack_is_caught(monkeypatch):
    def lie(logits_fn, inputs, *_, **__):
        everyone = jnp.ones(len(inputs), bool)
        return AttackResult(jnp.zeros_like(inputs), everyone, everyone.astype(jnp.int32))

    monkeypatch.setattr(measurements, "deepfool", lie)
    truthful = dict(names=("pgd",), bounds=BOUNDS)
    found = run(in_memory(INPUTS, RIGHT), names=("deepfool", "pgd"), bounds=BOUNDS, batch_size=17)
    assert (
        found["deepfool_success"] == 0
        and found["deepfool_disagreements"] == NUM_EXAMPLES
        and found["l2"] == 0
    )
    assert found["pgd_disagreements"] == 0
    assert found["accuracy_pgd"] == run(in_memory(INPUTS, RIGHT), **truthful)["accuracy_pgd"] < 1
    assert metrics.remarks(found, "deep_defense") == [
        f"DeepFool on deep_defense: its own success and a plain forward pass disagree on "
        f"{NUM_EXAMPLES} of {NUM_EXAMPLES} "
        "images; the figures count the forward pass."
    ]


@pytest.mark.parametrize("too_far", ["bounds", "epsilon"])
def test_what_leaves_the_bounds_or_the_ball_does_not_count(monkeypatch, too_far):
    """The attack says what it likes of perturbations that would fool, if they were allowed."""
    weights = WEIGHTS[:, 0] - WEIGHTS[:, 1]

    def lie(logits_fn, inputs, labels, *, epsilon, **_):
        away = jnp.where(labels == 0, -1.0, 1.0)[:, None] * jnp.sign(weights)[None]
        size = 0.9 * epsilon if too_far == "bounds" else 1000 * epsilon
        return AttackResult(size * away.reshape(inputs.shape), labels >= 0, labels)

    monkeypatch.setattr(measurements, "pgd", lie)
    settings = SETTINGS._replace(pgd_epsilon=0.021 if too_far == "epsilon" else 20.0)
    bounds = (-100.0, 100.0) if too_far == "epsilon" else BOUNDS
    found = run(in_memory(INPUTS, RIGHT), names=("pgd",), bounds=bounds, settings=settings)
    assert found["accuracy_pgd"] == 1 and found["pgd_disagreements"] == NUM_EXAMPLES
    if too_far == "bounds":  # Without them it would be true.
        free = run(in_memory(INPUTS, RIGHT), names=("pgd",), settings=settings)
        assert free["accuracy_pgd"] == 0 and free["pgd_disagreements"] == 0


def test_the_attack_and_the_judge_are_two_programs():
    programs = []

    def counting(attack, judge):
        programs.extend((attack, judge))
        return evaluation.in_two_programs(attack, judge)

    run(
        in_memory(INPUTS, LABELS), names=("deepfool",), compile_fn=counting, batch_size=NUM_EXAMPLES
    )
    shared = {"variables": VARIABLES, "bounds": None, "key": None}
    batch = {"image": INPUTS, "label": LABELS, "mask": np.ones(NUM_EXAMPLES, np.float32)}
    attack, judge = programs
    loops = [" while[" in str(jax.make_jaxpr(f)(*arguments)) for f, arguments in (
        (attack, (shared, batch)), (judge, (shared, batch, jax.jit(attack)(shared, batch)))
    )]  # fmt: skip
    assert loops == [True, False]  # Nothing of DeepFool is in the second.


@pytest.mark.parametrize(
    ("backend", "asked_for", "wanted"),
    [("gpu", None, "highest"), ("cpu", None, None), ("gpu", "bfloat16", "bfloat16")],
)
def test_figures_are_of_full_float32_unless_something_else_is_asked_for(
    backend, asked_for, wanted, monkeypatch
):
    seen = set()

    def spying_net(variables, x):
        seen.add(jax.config.jax_default_matmul_precision)
        return net(variables, x)

    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    evaluator = Evaluator(spying_net, in_memory(INPUTS, LABELS), settings=SETTINGS, **quiet)
    with jax.default_matmul_precision(asked_for):
        evaluator.measure(VARIABLES, names=("deepfool", "pgd"))
        evaluator.half_epsilon(VARIABLES)
        evaluator.deepfool_examples(VARIABLES, 2)
    assert seen == {wanted}


def test_new_weights_compile_nothing():
    evaluator = Evaluator(net, in_memory(INPUTS, LABELS), settings=SETTINGS, **quiet)
    first = evaluator.measure(VARIABLES)
    traced.clear()
    other = evaluator.measure(VARIABLES | {"bias": np.float32(3)})
    assert traced == [] and other["l2"] != first["l2"]


def test_bounds_may_be_those_of_a_batch_or_of_each_pixel():
    lower = np.full((1, *SHAPE), -0.1, np.float32)
    each = run(in_memory(INPUTS, LABELS), names=("fgsm",), bounds=(lower, 1 + lower[0]))
    assert_same(run(in_memory(INPUTS, LABELS), names=("fgsm",), bounds=(-0.1, 0.9)), each)
    assert run(in_memory(INPUTS, LABELS), names=("fgsm",))["rho_linf"] < each["rho_linf"]


def test_without_bounds_carlini_wagners_box_is_the_inputs_range():
    found = run(
        in_memory(2 * INPUTS, LABELS), names=("carlini_wagner",), carlini_wagner_examples=10
    )
    bounds = (float(2 * INPUTS.min()), float(2 * INPUTS.max()))
    wanted = run(
        in_memory(2 * INPUTS, LABELS),
        names=("carlini_wagner",),
        carlini_wagner_examples=10,
        bounds=bounds,
    )
    assert found["l2_carlini_wagner"] == pytest.approx(wanted["l2_carlini_wagner"], rel=1e-6)


def test_random_starts_are_repeated_by_their_seed():
    """One step of epsilon from a random start goes half as far on average as one from the input."""
    epsilon = float(np.median(distances()[1]))
    settings = SETTINGS._replace(pgd_num_steps=1, pgd_epsilon=epsilon, pgd_step_size=epsilon)
    accuracy = lambda seed: run(  # noqa: E731
        in_memory(INPUTS, RIGHT),
        names=("pgd",),
        settings=settings._replace(pgd_seed=seed),
        batch_size=20,
    )["accuracy_pgd"]
    assert accuracy(0) == accuracy(0) > accuracy(None) > 0
    keys = [
        random_key(settings._replace(pgd_seed=seed), batch)
        for seed, batch in ((0, 0), (0, 1), (1, 0))
    ]
    assert len({tuple(jax.random.key_data(key).tolist()) for key in keys}) == 3


def test_progress_is_shown_with_the_time_left_if_wanted(capsys):
    measure(
        net,
        VARIABLES,
        in_memory(INPUTS, LABELS),
        settings=SETTINGS,
        batch_size=20,
        description="reference",
    )
    shown = capsys.readouterr().err
    assert "reference: 100%" in shown and "45/45" in shown and "image/s" in shown
    run(in_memory(INPUTS, LABELS), batch_size=20)
    assert capsys.readouterr().err == ""


# FGSM at given epsilons, and the epsilon at which half of the images fall


@pytest.mark.parametrize("batch_size", [20, 45, 100])
def test_accuracy_under_fgsm(batch_size):
    predicted, linf = distances()
    epsilons = [0.03, 0.0, 0.01, 0.3]
    found = fgsm_accuracy(
        net,
        VARIABLES,
        in_memory(INPUTS, LABELS),
        epsilons,
        batch_size=batch_size,
        show_progress=False,
    )
    assert found == [np.mean((predicted == LABELS) & (linf > epsilon)) for epsilon in epsilons]
    assert len(set(found)) == 4


@pytest.mark.parametrize("count", [45, 44, 3, 1])
@pytest.mark.parametrize("max_epsilon", [1.0, 100.0])
def test_half_epsilon_is_the_closed_forms(count, max_epsilon):
    """It is the distance of that image with which half of them, or one more, have fallen."""
    linf = np.sort(distances()[1][:count])
    wanted = linf[(count + 1) // 2 - 1]
    found = half_epsilon(
        net, VARIABLES, in_memory(INPUTS[:count], RIGHT[:count]), max_epsilon=max_epsilon, **quiet
    )
    assert wanted * (1 - 1e-4) <= found <= wanted * 1.0011
    accuracy = fgsm_accuracy(
        net, VARIABLES, in_memory(INPUTS[:count], RIGHT[:count]), [found, found / 1.0012], **quiet
    )
    assert accuracy[0] <= 0.5 < accuracy[1]


def test_what_is_misclassified_anyway_counts():
    wrong = np.arange(NUM_EXAMPLES) % 4 == 0  # 12 of 45.
    linf = np.sort(np.where(wrong, 0, distances()[1]))
    found = half_epsilon(
        net, VARIABLES, in_memory(INPUTS, np.where(wrong, 1 - RIGHT, RIGHT)), **quiet
    )
    assert (
        found == pytest.approx(linf[22], rel=1.1e-3) and found < np.median(distances()[1]) / 1.002
    )


def test_half_epsilon_at_its_ends():
    assert half_epsilon(net, VARIABLES, in_memory(INPUTS, 1 - RIGHT), **quiet) == 0.0
    median = np.median(distances()[1])
    assert (
        half_epsilon(
            net, VARIABLES, in_memory(INPUTS, RIGHT), max_epsilon=float(0.99 * median), **quiet
        )
        is None
    )
    found = half_epsilon(
        net, VARIABLES, in_memory(INPUTS, RIGHT), max_epsilon=float(1.0001 * median), **quiet
    )
    assert found == pytest.approx(median, rel=1.1e-3)


def test_half_epsilon_searches_with_few_compilations():
    evaluator = Evaluator(net, in_memory(INPUTS, RIGHT), **quiet)
    evaluator.half_epsilon(VARIABLES)
    traced.clear()
    evaluator.half_epsilon(VARIABLES | {"bias": np.float32(2)})
    assert traced == []


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: run(in_memory(INPUTS[:0], LABELS[:0])), "There is no example to measure"),
        (lambda: run(in_memory(INPUTS, LABELS), limit=0), "There is no example to measure"),
        (
            lambda: fgsm_accuracy(net, VARIABLES, in_memory(INPUTS[:0], LABELS[:0]), [0.1]),
            "There is no example to measure",
        ),
        (
            lambda: fgsm_accuracy(net, VARIABLES, in_memory(INPUTS, LABELS), []),
            "epsilons must be one number or more",
        ),
        (
            lambda: fgsm_accuracy(net, VARIABLES, in_memory(INPUTS, LABELS), [-0.1]),
            "epsilons must be one number or more",
        ),
        (
            lambda: half_epsilon(net, VARIABLES, in_memory(INPUTS, LABELS), max_epsilon=0.0),
            "max_epsilon is 0.0; it must be more",
        ),
        (
            lambda: run(in_memory(INPUTS, LABELS), names=("PASS",)),
            "no measurement 'PASS'; choose any of deepfool, .*, pass",
        ),
        (
            lambda: run(in_memory(INPUTS, LABELS), names=("pass",)),
            "give to_images, or leave 'pass' out",
        ),
        (
            lambda: run(in_memory(INPUTS, LABELS), batch_size=0),
            "batch_size must be positive, got 0",
        ),
        (
            lambda: run_all(in_memory(INPUTS, LABELS), carlini_wagner_examples=0),
            "carlini_wagner_examples is 0; it must be at",
        ),
        (
            lambda: run(in_memory(INPUTS, LABELS), minimum_norm_examples=0),
            "minimum_norm_examples is 0; it must be at",
        ),
        (
            lambda: run(in_memory(INPUTS, LABELS), names=("fgsm",), bounds=(np.zeros(5), 1.0)),
            r"shapes \(5,\) and \(\); they must",
        ),
    ],
)
def test_what_makes_no_sense_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
