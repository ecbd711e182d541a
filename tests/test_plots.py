"""Figures: they carry the data, name everything, cut nothing off, and are the same bytes each time."""

import ast
import itertools
import json
import pathlib

import matplotlib
import numpy as np
import PIL.Image
import pytest
import skimage.color
from matplotlib.text import Text

from dd_jax.results import curves as robustness
from dd_jax.results import plots
from dd_jax.results._styles import LABELS, LOOKS, STYLE, legend_names

ROOT = pathlib.Path(__file__).parent.parent
LONG = (
    "deep_defense with penalty_weight=30, correct_scale=12.5 and a learning rate of $0.0005$ for $5"
)
IMAGE = np.linspace(-0.5, 1.5, 28 * 28).reshape(28, 28, 1)
METHODS = list(LOOKS)
SUCCESS = {
    name: ([0.2, 0.0, 0.1, 0.3], [0.4, 0.01, 0.1 + 0.02 * i, 0.9]) for i, name in enumerate(METHODS)
}
TRADE = {"reference": [(0.983, 0.11, None)], "parseval": [(0.982, 0.12, None)]} | {
    "deep_defense": [(0.981, 0.20, 5), (0.984, 0.13, 25.0), (0.983, 0.16, 10)],
    "adversarial_fgsm": [(0.985, 0.12, 0.05), (0.984, 0.14, 0.1)],
}
HISTORIES = {
    name: [(e, 0.95 + 0.001 * e + 0.001 * i, 0.1 + 0.01 * e) for e in range(40)]
    for i, name in enumerate(METHODS)
}
EXAMPLES = [plots.Example(name, IMAGE[:, :, 0], i, 0.1 + i / 100) for i, name in enumerate(METHODS)]
LINES = [
    {
        "stage": "reference",
        "step": 10,
        "epoch": 1.0,
        "loss": 2.0,
        "correct": 0.5,
        "cross_entropy": 2.0,
    },
    {
        "stage": "reference",
        "step": 20,
        "epoch": 2.0,
        "loss": 1.0,
        "correct": 0.75,
        "cross_entropy": 1.0,
    },
    {
        "stage": "reference",
        "step": 20,
        "epoch": 2.0,
        "test": {"accuracy": 0.625, "rho_l2": 0.1, "l2": 1.0},
    },
    {"stage": "reference", "step": 20, "measured": {"accuracy": 0.5, "rho_l2": 0.3}},
    {
        "stage": "defended",
        "step": 8,
        "epoch": 1.0,
        "loss": 4.0,
        "correct": 0.875,
        "cross_entropy": 0.5,
        "penalty": 0.2,
    },
    {
        "stage": "defended",
        "step": 4,
        "epoch": 0.5,
        "loss": 6.0,
        "correct": 0.5,
        "cross_entropy": 0.7,
        "penalty": 0.3,
    },
    {
        "stage": "defended",
        "step": 8,
        "epoch": 1.0,
        "test": {"accuracy": 0.75, "rho_l2": 0.2, "l2": 2.0},
    },
]
SIZES = np.geomspace(0.2, 3, 60)
ROBUST = {
    norm: {
        name: robustness.line(
            robustness.Curve("DDN", norm, 100, 2 + i, SIZES * scale * (1 + i / 9))
        )
        for i, name in enumerate(METHODS)
    }
    for norm, scale in (("l1", 9), ("l2", 1), ("linf", 0.1))
}
BY_AUTOATTACK = {
    "linf": {name: [(0.1, 0.7), (0.05, 0.9)] for name in METHODS},
    "l2": {"clean": [(1.0, 0.5)]},
}
CASES = {
    "success_over_epsilon": ((SUCCESS,), {}),
    "robust_accuracy_over_epsilon": ((ROBUST,), {"points": BY_AUTOATTACK}),
    "robustness_over_accuracy": ((TRADE,), {}),
    "fooling_examples": ((IMAGE, EXAMPLES), {"label": 0}),
    "training_over_epochs": ((HISTORIES,), {}),
    "single_run": ((LINES,), {}),
}
HARD_CASES = {
    "success_over_epsilon": (
        ({LONG: ([0, 1], [0, 1]), **{f"{LONG} {i}": ([0, 1], [0, 0.5]) for i in range(12)}},),
        {},
    ),
    "robust_accuracy_over_epsilon": (
        ({"l2": {LONG: ([0, 0.5], [1, None]), "clean": ([], []), "mma": ([0, 9], [1, 1])}},),
        {"points": {"l2": {"mma": [(0.5, 0.0)]}}, "unit": "of whitened inputs"},
    ),
    "robustness_over_accuracy": (
        ({"deep_defense": [(1.0, 0.1, 1e-7)], "clean": [], LONG: [(0.9, 0.2, 1)]},),
        {},
    ),
    "fooling_examples": (
        (IMAGE, [plots.Example(LONG, IMAGE, LONG, None)] + 13 * [EXAMPLES[1]]),
        {"label": LONG},
    ),
    "training_over_epochs": (({LONG: [(3, 0.9, float("nan"))], "clean": []},), {}),
    "single_run": (([{"stage": "reference", "step": 5, "loss": 0.0, "correct": 1.0}],), {}),
}
each_figure = pytest.mark.parametrize("name", CASES)


def draw(name, cases=CASES):
    arguments, options = cases[name]
    return getattr(plots, f"{name}_figure")(*arguments, **options)


def data_of(axes):
    return {
        line.get_label(): line.get_xydata()
        for line in axes.lines
        if not line.get_label().startswith("_")
    }


def legend_texts(figure):
    return [" ".join(text.get_text().split()) for text in figure.legends[0].get_texts()]


@each_figure
def test_files_are_whole_small_and_the_same_each_time(name, tmp_path):
    arguments, options = CASES[name]
    first = getattr(plots, name)(tmp_path / "new" / "folder", *arguments, **options)
    settings = {
        "font.size": 20,
        "axes.facecolor": "red",
        "savefig.dpi": 30,
        "text.usetex": True,
        "pdf.fonttype": 3,
    }
    with matplotlib.rc_context(settings):
        before = dict(matplotlib.rcParams)
        again = getattr(plots, name)(str(tmp_path), *arguments, **options)
        assert dict(matplotlib.rcParams) == before
    assert [path.name for path in first] == [f"{name}.png", f"{name}.pdf"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    png, pdf = first
    with PIL.Image.open(png) as image:
        image.load()
        assert image.format == "PNG"
        np.testing.assert_allclose(image.size, 150 * draw(name).get_size_inches(), atol=1)
        assert "Software" not in image.info
    text = pdf.read_bytes()
    assert (
        text.startswith(b"%PDF-")
        and text.rstrip().endswith(b"%%EOF")
        and b"CreationDate" not in text
    )
    # Fonts are in the file, as TrueType: text can be searched, and publishers take it.
    assert b"/FontFile2" in text and b"/Type3" not in text
    assert png.stat().st_size < 150_000 and len(text) < 150_000


@each_figure
@pytest.mark.parametrize("cases", [CASES, HARD_CASES], ids=["usual", "hard"])
@pytest.mark.filterwarnings("error")
def test_nothing_is_cut_off_and_legends_cover_no_data(name, cases):
    figure = draw(name, cases)
    figure.draw_without_rendering()
    width, height = figure.bbox.size
    boxes = [axes.get_tightbbox() for axes in figure.axes]
    for box in boxes + [legend.get_window_extent() for legend in figure.legends]:
        assert box.x0 > -1 and box.y0 > -1 and box.x1 < width + 1 and box.y1 < height + 1
    for legend in figure.legends:
        assert not legend.get_window_extent().count_overlaps(boxes)
    assert all(axes.bbox.width > 40 and axes.bbox.height > 40 for axes in figure.axes)
    # Panels of robust accuracy share their axis.
    named = figure.axes[:1] if name == "robust_accuracy_over_epsilon" else figure.axes
    assert name == "fooling_examples" or all(axes.get_ylabel() for axes in named)


def test_methods_have_readable_names_and_are_told_apart_without_color():
    names = legend_names(METHODS, None)
    assert names["adversarial_fgsm"] == "Adv. Train II (FGSM)"
    assert names["deep_defense_fgsm"] == "Deep Defense + FGSM" and names["trades"] == "trades"
    assert {"adversarial_pgd", "trades", "mma", "amm"} < set(METHODS)
    known = list(LOOKS.values())
    assert len({look.marker for look in known}) == len({look.color for look in known}) == len(known)
    assert (
        sum(look.dashes == () for look in known) == 2
        and len({look.dashes for look in known}) == len(known) - 1
    )
    unknown = plots.looks(["deep_defense", *(f"mine {i}" for i in range(12)), "clean"])
    assert (
        legend_names(list(unknown), None)["mine 3"] == "mine 3"
        and unknown["clean"] == LOOKS["clean"]
    )
    assert len(set(unknown.values())) == 14


def linear(hexadecimal):
    """Linear RGB of a color."""
    encoded = np.array([int(hexadecimal[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    return np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)


# What is seen without one kind of cone, in linear RGB (Machado, Oliveira, Fernandes, 2009).
VISION = {
    "normal": np.eye(3),
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritanopia": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}


@pytest.mark.parametrize("vision", VISION)
def test_colors_are_told_apart_by_the_color_blind(vision):
    """CIEDE2000 distances; 2.3 is just noticeable in CIELAB."""
    seen = np.clip([np.array(VISION[vision]) @ linear(x.color) for x in LOOKS.values()], 0, 1)
    encoded = np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055)
    colors = skimage.color.rgb2lab(encoded)
    for first, second in itertools.combinations(range(len(colors)), 2):
        distance = skimage.color.deltaE_ciede2000(colors[first], colors[second])
        assert distance > 9, (METHODS[first], METHODS[second])


def test_the_caller_names_methods_and_strengths():
    labels = {"clean": "Plain $x$", "mine": "_Mine"}
    histories = {name: HISTORIES["clean"] for name in ("clean", "mine", "parseval")}
    expected = ["Plain $x$", "_Mine", "parseval"]
    curves = {name: SUCCESS["clean"] for name in histories}
    points = {name: [(0.9, 0.1, 2)] for name in histories}
    symbols = {"clean": "beta"}
    figures = (
        plots.training_over_epochs_figure(histories, labels=labels),
        plots.success_over_epsilon_figure(curves, labels=labels),
        plots.robustness_over_accuracy_figure(points, labels=labels, strength_symbols=symbols),
    )
    assert [legend_texts(figure) for figure in figures[:2]] == [expected] * 2
    texts = [note.get_text().strip() for note in figures[2].axes[0].texts]
    assert sorted(texts) == sorted([*expected, "beta = 2", "2", "2"])
    examples = [plots.Example(name, IMAGE, 1, 0.1) for name in histories]
    panels = plots.fooling_examples_figure(IMAGE, examples, labels=labels)
    assert [axes.get_title().strip() for axes in panels.axes] == ["Original", *expected]


def test_the_style_file_is_read_and_used():
    assert STYLE["font.family"] == ["STIXGeneral", "DejaVu Sans"] and STYLE["pdf.fonttype"] == 42
    figure = draw("success_over_epsilon")
    assert figure.axes[0].xaxis.label.get_fontsize() == STYLE["axes.labelsize"] == 9
    assert figure.axes[0].lines[0].get_linewidth() != STYLE["lines.linewidth"]  # The 50 % line.
    assert figure.axes[0].lines[1].get_linewidth() == STYLE["lines.linewidth"] == 1.3


def test_success_over_epsilon_carries_the_rates_in_order():
    figure = plots.success_over_epsilon_figure(SUCCESS, unit="1/255")
    (axes,) = figure.axes
    np.testing.assert_allclose(
        data_of(axes)["Parseval"],
        [(0, 1), (0.1, 10 + 2 * METHODS.index("parseval")), (0.2, 40), (0.3, 90)],
    )
    names = list(legend_names(METHODS, None).values())
    assert list(data_of(axes)) == legend_texts(figure) == names and set(LABELS.values()) < set(
        names
    )
    assert (
        axes.get_ylabel() == "FGSM success rate (%)"
        and "1/255" in axes.get_xlabel()
        and "epsilon" in axes.get_xlabel()
    )


def test_what_json_holds_is_drawn_and_what_is_missing_leaves_a_gap():
    curves = json.loads(
        json.dumps(
            {
                "clean": ([0, 0.1, 0.2], [0, None, 1]),
                "parseval": ([], []),
                "_mine $x$": ([1], [0.5]),
            }
        )
    )
    curves["deep_defense"] = (np.array([0.0, 0.1], np.float32), np.array([float("inf"), 0.5]))
    figure = plots.success_over_epsilon_figure(curves)
    np.testing.assert_allclose(
        data_of(figure.axes[0])["Clean"], [(0, 0), (0.1, np.nan), (0.2, 100)]
    )
    np.testing.assert_allclose(data_of(figure.axes[0])["Deep Defense"], [(0, np.nan), (0.1, 50)])
    assert legend_texts(figure) == ["Clean", "Parseval (no data)", "_mine $x$", "Deep Defense"]


def test_robustness_over_accuracy_connects_what_was_swept_in_order():
    figure = draw("robustness_over_accuracy")
    (axes,) = figure.axes
    np.testing.assert_allclose(
        data_of(axes)["Deep Defense"], [(98.1, 0.2), (98.3, 0.16), (98.4, 0.13)]
    )
    notes = {note.get_text(): note.xy for note in axes.texts}
    strengths = {"$c$ = 5", "$c$ = 25", r"$\epsilon$ = 0.05", r"$\epsilon$ = 0.1"}
    names = {"Reference", "Parseval", "Deep Defense", "Adv. Train II (FGSM)"}
    assert set(notes) == strengths | names
    np.testing.assert_allclose(notes["$c$ = 25"], (98.4, 0.13))
    (star,) = [line for line in axes.lines if line.get_marker() == "*"]
    np.testing.assert_allclose(star.get_xydata(), [(98.3, 0.11)])
    assert axes.get_xlabel() == "Benign accuracy (%)" and r"\rho_2" in axes.get_ylabel()
    unknown = plots.robustness_over_accuracy_figure(
        {"a": [(0.9, 0.2, 7), (0.8, 0.1, None)]}, strength_symbols={"a": "beta"}
    )
    np.testing.assert_allclose(data_of(unknown.axes[0])["a"], [(90, 0.2), (80, 0.1)])
    assert [note.get_text() for note in unknown.axes[0].texts] == ["a", "beta = 7"]


def boxes_of(figure):
    """The boxes of the texts in a figure's axes, without their leaders."""
    figure.draw_without_rendering()
    return [Text.get_window_extent(note) for note in figure.axes[0].texts]


def assert_texts_stand_apart(figure, number):
    """No text covers a marker or another text, or leaves the axes."""
    (axes,), boxes = figure.axes, boxes_of(figure)
    assert len(boxes) == number
    points = np.concatenate([axes.transData.transform(line.get_xydata()) for line in axes.lines])
    for index, box in enumerate(boxes):
        text = axes.texts[index].get_text()
        assert not box.count_contains(points), text
        assert not box.count_overlaps(boxes[:index]), text
        assert all(axes.bbox.contains(*corner) for corner in box.get_points()), text


# README's table: accuracy in percent, rho_2. Five of the ten defenses stand close together.
TEN = {
    "reference": (98.89, 0.1122),
    "clean": (98.61, 0.1127),
    "parseval": (98.61, 0.1289),
    "adversarial_deepfool": (98.06, 0.1823),
    "adversarial_fgsm": (98.61, 0.1748),
    "deep_defense": (98.33, 0.1884),
    "deep_defense_fgsm": (98.61, 0.1933),
    "adversarial_pgd": (98.06, 0.1696),
    "trades": (94.17, 0.1700),
    "mma": (97.78, 0.1788),
    "amm": (98.33, 0.1573),
}
LONG_NAMES = LABELS | {"adversarial_pgd": "Adv. Train (PGD)", "trades": "TRADES", "mma": "MMA"}


def test_ten_defenses_are_named_beside_their_points():
    points = {name: [(accuracy / 100, rho, None)] for name, (accuracy, rho) in TEN.items()}
    figure = plots.robustness_over_accuracy_figure(points, labels=LONG_NAMES)
    assert_texts_stand_apart(figure, 11)
    texts = [" ".join(note.get_text().split()) for note in figure.axes[0].texts]
    assert texts == [LONG_NAMES.get(name, name) for name in TEN] and not figure.legends
    for note, (accuracy, rho) in zip(figure.axes[0].texts, TEN.values(), strict=True):
        np.testing.assert_allclose(note.xy, (accuracy, rho), rtol=1e-6)


@pytest.mark.parametrize("seed", range(3))
def test_texts_of_a_crowd_stand_apart(seed):
    """Four methods are swept, so that strengths are beside their points, too."""
    random = np.random.default_rng(seed)
    points = {name: [(*random.uniform((0.97, 0.1), (0.99, 0.2)), None)] for name in METHODS}
    for i, name in enumerate(("deep_defense", "adversarial_fgsm")):
        points[name] = [(0.99 - 0.004 * x, 0.12 + 0.02 * x + 0.01 * i, x) for x in range(1, 5)]
    figure = plots.robustness_over_accuracy_figure(points, labels=LONG_NAMES)
    assert_texts_stand_apart(figure, 11 + 4)


def test_texts_of_methods_at_the_same_point_stand_apart():
    together = {name: [(0.98, 0.1, 5)] for name in METHODS[:4]}
    assert_texts_stand_apart(plots.robustness_over_accuracy_figure(together), 8)


def test_far_texts_have_a_line_to_their_point_and_near_ones_have_none():
    crowd = {name: [(0.98, 0.1, None)] for name in METHODS}
    figure = plots.robustness_over_accuracy_figure(crowd)
    assert_texts_stand_apart(figure, 11)
    far = [note.arrow_patch is not None for note in figure.axes[0].texts]
    assert any(far) and not all(far)
    center = figure.axes[0].transData.transform((98, 0.1))
    for box, has_line in zip(boxes_of(figure), far, strict=True):
        nearest = np.clip(center, box.min, box.max)
        distance = np.hypot(*(nearest - center)) * 72 / figure.dpi
        assert has_line or distance < 16


def test_robust_accuracy_has_a_panel_per_norm_and_autoattack_s_points_on_the_curves():
    curves = {
        "linf": {"clean": ([0.2, 0.0, 0.1], [0.0, 0.98, 0.5])},
        "l2": {"clean": ([0.0, 1.0], [0.98, 0.01]), "deep_defense": ([0.0, 3.0], [0.97, 0.02])},
    }
    points = {"l2": {"clean": [(0.5, 0.4), (1.0, 0.0)]}, "l1": {"mma": [(8.0, 0.3)]}}
    figure = plots.robust_accuracy_over_epsilon_figure(curves, points=points, unit="a unit")
    assert [axes.get_xlabel() for axes in figure.axes] == [
        rf"$\ell_{norm}$ size $\epsilon$" + "\n(a unit)" for norm in ("2", r"\infty", "1")
    ]
    l2, linf, l1 = figure.axes
    np.testing.assert_allclose(data_of(linf)["Clean"], [(0, 98), (0.1, 50), (0.2, 0)])
    np.testing.assert_allclose(data_of(l2)["Deep Defense"], [(0, 97), (3, 2)])
    of_autoattack = [line for line in l2.lines if line.get_gid()]
    assert [line.get_gid() for line in of_autoattack] == ["Clean"]
    np.testing.assert_allclose(of_autoattack[0].get_xydata(), [(0.5, 40), (1, 0)])
    assert of_autoattack[0].get_linestyle() == "None" and of_autoattack[0].get_marker() != ""
    assert legend_texts(figure) == ["Clean", "Deep Defense", "mma", "AutoAttack"]
    assert "AutoAttack" not in legend_texts(plots.robust_accuracy_over_epsilon_figure(curves))
    # The axes end where all curves have fallen, or at the last point.
    ends = [axes.get_xlim()[1] for axes in figure.axes]
    np.testing.assert_allclose(ends, [3 * 1.03, 0.2 * 1.03, 8 * 1.03])


@pytest.mark.parametrize("shape", [(28, 28), (28, 28, 1), (12, 20, 3)])
def test_fooling_examples_stand_beside_the_original(shape):
    image = np.linspace(-0.5, 1.5, np.prod(shape)).reshape(shape).astype(np.float32)
    image[0, 0] = np.nan
    examples = [
        plots.Example("adversarial_fgsm", 1 - image, "cat", 0.12345),
        plots.Example("mine", image, 8, np.nan),
    ]
    figure = plots.fooling_examples_figure(image, examples, label="dog")
    assert [axes.get_title() for axes in figure.axes] == [
        "Original",
        "Adv. Train II\n(FGSM)",
        "mine",
    ]
    below = [axes.get_xlabel().split("\n") for axes in figure.axes]
    assert below == [
        ["class dog", ""],
        ["taken for cat", r"$\rho_2$ = 0.123"],
        ["taken for 8", r"$\rho_2$ = no data"],
    ]
    drawn = [np.asarray(axes.images[0].get_array()) for axes in figure.axes]
    expected = np.clip(image, 0, 1)
    expected[0, 0] = 0
    np.testing.assert_allclose(drawn[0], expected.reshape(drawn[0].shape), rtol=1e-6)
    assert drawn[0].shape == (shape if shape[2:] == (3,) else shape[:2])
    assert (
        np.nanmax(np.abs(drawn[1][1:] + drawn[0][1:] - 1)) < 1e-6
        and axes_limits(figure) == [(0, 1)] * 3
    )


def axes_limits(figure):
    return [axes.images[0].get_clim() for axes in figure.axes]


def test_training_over_epochs_has_accuracy_left_and_robustness_right():
    figure = plots.training_over_epochs_figure(
        {"clean": [(2, 0.96, 0.12), (1, 0.95, 0.1)], "deep_defense": [(1, None, 0.3)]}
    )
    left, right = figure.axes
    np.testing.assert_allclose(data_of(left)["Clean"], [(1, 95), (2, 96)])
    np.testing.assert_allclose(data_of(right)["Clean"], [(1, 0.1), (2, 0.12)])
    np.testing.assert_allclose(data_of(right)["Deep Defense"], [(1, 0.3)])
    assert legend_texts(figure) == ["Clean", "Deep Defense"]
    assert (
        left.get_ylabel() == "Test accuracy (%)"
        and left.get_xlabel() == right.get_xlabel() == "Epoch"
    )
    assert all(float(tick).is_integer() for tick in right.get_xticks())


def test_single_run_shows_one_stage_after_the_other():
    figure = draw("single_run")
    loss, accuracy, robustness = figure.axes
    gap = (20, np.nan), (28, np.nan)
    losses = [(10, 2), (20, 1), gap[0], (24, 6), (28, 4), gap[1]]
    np.testing.assert_allclose(data_of(loss)["Training loss"], losses)
    np.testing.assert_allclose(data_of(loss)["Its cross-entropy"][3:5], [(24, 0.7), (28, 0.5)])
    np.testing.assert_allclose(data_of(accuracy)["Training batches"][:2], [(10, 50), (20, 75)])
    np.testing.assert_allclose(
        data_of(accuracy)["Test images"], [(20, 62.5), gap[0], (28, 75), gap[1]]
    )
    np.testing.assert_allclose(
        data_of(robustness)["Test images"], [(20, 0.1), gap[0], (28, 0.2), gap[1]]
    )
    assert [text.get_text() for text in loss.texts] == [
        "reference",
        "fine-tuning",
    ] and loss.get_yscale() == "log"
    assert legend_texts(figure) == [
        "Training loss",
        "Its cross-entropy",
        "Training batches",
        "Test images",
    ]
    short = draw("single_run", HARD_CASES)
    assert [text.get_text() for text in short.axes[0].texts] == ["reference"]
    assert [axes.get_ylabel() for axes in short.axes] == ["Loss", "Accuracy (%)"] and short.axes[
        0
    ].get_yscale() == "linear"


@pytest.mark.parametrize(
    "name, arguments, message",
    [
        ("success_over_epsilon", [{}], "nothing to draw"),
        (
            "success_over_epsilon",
            [{"clean": ([0.1], [None]), "parseval": ([], [])}],
            "nothing to draw",
        ),
        (
            "success_over_epsilon",
            [{"clean": ([0.1, 0.2], [0.5])}],
            "clean's curve must be two lists of equal length",
        ),
        (
            "success_over_epsilon",
            [{"clean": ([0.1], [50.0])}],
            "success rates are fractions, 0 to 1; got 50 for clean",
        ),
        ("robust_accuracy_over_epsilon", [{}], "nothing to draw"),
        ("robust_accuracy_over_epsilon", [{"l3": {}}], "no norm 'l3'; choose any of l2, linf, l1"),
        (
            "robust_accuracy_over_epsilon",
            [{"l2": {"clean": ([0.1], [98.0])}}],
            "accuracies are fractions, 0 to 1; got 98 for clean",
        ),
        (
            "robust_accuracy_over_epsilon",
            [{"l2": {"clean": ([0.1, 0.2], [0.5])}}],
            "clean's curve must be two lists of equal length: epsilons and accuracies",
        ),
        ("robustness_over_accuracy", [{}], "nothing to draw"),
        ("robustness_over_accuracy", [{"clean": [(0.9, 0.1)]}], "a point must be 3 numbers"),
        ("robustness_over_accuracy", [{"clean": [(98.3, 0.1, None)]}], "divide percent by 100"),
        ("training_over_epochs", [{"clean": []}], "nothing to draw"),
        ("training_over_epochs", [{"clean": [(1, 0.9, 0.1, 0.2)]}], "a point must be 3 numbers"),
        ("fooling_examples", [IMAGE, []], "no example to draw"),
        ("fooling_examples", [IMAGE[0, 0], EXAMPLES], r"an image must be .* got \(1,\)"),
        (
            "fooling_examples",
            [IMAGE, [plots.Example("clean", np.zeros((4, 4, 2)), 1, 0.1)]],
            r"got \(4, 4, 2\)",
        ),
        ("single_run", [[]], "nothing to draw"),
        (
            "single_run",
            [[{"stage": "reference", "step": 1, "measured": {"accuracy": 0.5}}]],
            "nothing to draw",
        ),
    ],
)
def test_errors_say_what_is_wrong_and_no_file_is_left(name, arguments, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        getattr(plots, name)(tmp_path / "folder", *arguments)
    assert not (tmp_path / "folder").exists()


def test_plots_need_neither_jax_nor_pyplot():
    for path in (ROOT / "dd_jax" / "results").glob("*.py"):
        nodes = list(ast.walk(ast.parse(path.read_text())))
        imported = [
            alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names
        ]
        imported += [
            f"{node.module}.{alias.name}"
            for node in nodes
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        ]
        for module in imported:
            assert "pyplot" not in module and module.split(".")[0] != "jax"
            ours = module.startswith("dd_jax.results") or module in ("dd_jax.extras", "dd_jax.log")
            assert module.split(".")[0] != "dd_jax" or ours
