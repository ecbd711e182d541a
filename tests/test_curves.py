"""Robust accuracy over epsilon from the sizes of perturbations, and AutoAttack's results beside it."""

import json

import numpy as np
import pytest

from dd_jax.evaluation import metrics
from dd_jax.results import curves
from dd_jax.results.report import as_json
from dd_jax.results.tables import Row, markdown_table, measured_columns, text_table

random = np.random.default_rng(0)
SIZES = np.concatenate([random.gamma(3, 1, 37), [0, 0, np.inf]]).astype(np.float32)
MEASURED = {
    "num_examples": 40,
    "accuracy": 0.95,
    "fmn_l1_curve": metrics.robustness_curve("fmn_l1", 9 * SIZES),
    "ddn_curve": metrics.robustness_curve("ddn", SIZES),
}
CURVE = curves.curves(MEASURED)["l2"]
LINF = {"norm": "linf", "epsilon": 0.1, "version": "standard", "robust_accuracy": 0.83}
LINF |= {"num_examples": 1000, "seconds": 12.5}
PLUS = LINF | {"version": "plus", "robust_accuracy": 0.82}
LARGE = LINF | {"epsilon": 0.3, "robust_accuracy": 0.125}
L2 = LINF | {"norm": "l2", "epsilon": 1.5, "robust_accuracy": 0.5}


def test_curves_are_read_back_by_norm_in_the_order_of_figures():
    read = curves.curves(json.loads(as_json(MEASURED)))
    assert list(read) == ["l2", "l1"] and curves.curves({}) == {}
    assert [(curve.attack, curve.norm) for curve in read.values()] == [("DDN", "l2"), ("FMN", "l1")]
    assert (CURVE.num_examples, CURVE.num_misclassified, len(CURVE.sizes)) == (40, 2, 37)


def test_robust_accuracy_counts_the_examples_of_larger_size():
    epsilons = [0.0, 1.0, float(CURVE.sizes[5]), 2.5, 100.0]
    wanted = [np.mean(epsilon < SIZES) for epsilon in epsilons]
    found = curves.robust_accuracy(CURVE, epsilons)
    # Sizes have 6 digits in a report; that of an example itself has fallen.
    np.testing.assert_allclose(found, [*wanted[:2], 1 - (2 + 6) / 40, *wanted[3:]])
    assert found[0] == 0.95 and found[-1] == pytest.approx(1 / 40)  # One is fooled by nothing.


def test_the_line_has_its_corners_where_examples_fall():
    epsilons, accuracies = curves.line(CURVE)
    assert len(epsilons) == 2 * 38 and epsilons[0] == 0 and accuracies[0] == 0.95
    assert (np.diff(epsilons) >= 0).all() and (np.diff(accuracies) <= 0).all()
    between = (epsilons[1::2][:-1] + epsilons[2::2]) / 2
    np.testing.assert_allclose(accuracies[1::2][:-1], curves.robust_accuracy(CURVE, between))
    fewer = curves.line(CURVE, most_steps=10)
    assert len(fewer[0]) == 2 * 11 and fewer[0][-1] == epsilons[-1]
    np.testing.assert_allclose(fewer[1][1::2], curves.robust_accuracy(CURVE, fewer[0][1::2]))
    nothing = CURVE._replace(sizes=np.array([]))
    assert [values.tolist() for values in curves.line(nothing)] == [[0, 0], [0.95, 0.95]]


def test_the_median_is_where_half_have_fallen():
    assert curves.median_size(CURVE) == pytest.approx(np.sort(SIZES)[19], rel=1e-5)
    at = curves.robust_accuracy(CURVE, [curves.median_size(CURVE) * (1 - 1e-6)])
    assert at[0] > 0.5 >= curves.robust_accuracy(CURVE, [curves.median_size(CURVE)])[0]
    assert curves.median_size(CURVE._replace(num_misclassified=20)) == 0.0
    assert curves.median_size(CURVE._replace(sizes=CURVE.sizes[:17])) is None
    assert curves.median_size(CURVE._replace(sizes=CURVE.sizes[:18])) == CURVE.sizes[17]


@pytest.mark.parametrize(
    "largest, count, wanted",
    [
        (3.1, 6, [1.0, 2.0, 3.0]),
        (0.31, 6, [0.1, 0.2, 0.3]),
        (0.3, 6, [0.05, 0.1, 0.15, 0.2, 0.25, 0.3]),
        (47.0, 5, [10.0, 20.0, 30.0, 40.0]),
        (0.0, 5, []),
        (float("inf"), 5, []),
    ],
)
def test_round_epsilons(largest, count, wanted):
    assert curves.round_epsilons(largest, count) == wanted


def test_a_report_holds_a_curve_in_a_line():
    lines = as_json({"ddn_curve": MEASURED["ddn_curve"], "text": "[ 1  2 ]", "empty": []})
    assert json.loads(lines)["ddn_curve"] == MEASURED["ddn_curve"]
    assert json.loads(lines)["text"] == "[ 1  2 ]" and json.loads(lines)["empty"] == []
    assert len(lines.splitlines()) == 10 and '    "sizes": [0.' in lines


def test_autoattack_has_a_column_for_each_norm_epsilon_and_version():
    first = Row("reference", {"accuracy": 0.99, "pass": 0.9, "autoattack": [LARGE, PLUS, LINF, L2]})
    second = Row("deep_defense", {"accuracy": 0.98, "accuracy_pgd": 0.9, "autoattack": [L2]})
    assert text_table([first, second]).splitlines() == [
        "              accuracy  acc. PGD  acc. AA l2 1.5  acc. AA linf 0.1  acc. AA plus linf 0.1"
        "  acc. AA linf 0.3    PASS",
        "reference       99.00%         -          50.00%            83.00%                 82.00%"
        "            12.50%  0.9000",
        "deep_defense    98.00%    90.00%          50.00%                 -                      -"
        "                 -       -",
    ]
    assert markdown_table([first, second]).splitlines()[2].count("%") == 5
    assert [column.name for column in measured_columns([second])][-1] == (
        "accuracy_autoattack_l2_1.5_standard"
    )


def test_a_success_rate_of_all_images_is_no_column():
    full = Row("a", {"accuracy": 1.0, "l2_ddn": 1.25, "ddn_success": 1.0, "deepfool_success": 1.0})
    columns = [column.name for column in measured_columns([full])]
    assert columns == ["accuracy", "deepfool_success", "l2_ddn"]
    some = Row("b", full.measured | {"ddn_success": 0.5})
    assert "DDN success" in text_table([full, some]) and "50.00%" in text_table([some])


def test_results_of_autoattack_add_up():
    before = {"accuracy": 0.5, "l2": 1.0, "autoattack": [LINF, L2]}
    now = {"accuracy": 0.75, "autoattack": [LARGE, LINF | {"robust_accuracy": 0.25}]}
    both = curves.with_points(before, now)
    assert (both["accuracy"], both["l2"]) == (0.75, 1.0)
    assert [(p.norm, p.epsilon, p.robust_accuracy) for p in curves.points(both)] == [
        ("l2", 1.5, 0.5),
        ("linf", 0.1, 0.25),
        ("linf", 0.3, 0.125),
    ]
    assert curves.with_points({"a": 1}, {"b": 2}) == {"a": 1, "b": 2}
    assert curves.with_points(before, {"l2": 3.0})["autoattack"] == before["autoattack"]
