"""The figures of a page, each with its words and its numbers, for those who do not see it."""

import io
import pathlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from dd_jax import extras
from dd_jax.results import _html as html
from dd_jax.results._html import Html
from dd_jax.results.curves import curves, median_size, points, robust_accuracy, round_epsilons
from dd_jax.results.page import ExampleImage, Picture

with extras.needed("plots"):
    import matplotlib.image

    from dd_jax.results import _drawing as drawing
    from dd_jax.results._example_figure import Example

Measured = Mapping[str, Mapping[str, Any]]
"""The figures of each net, by its label."""
NUM_EPSILONS = 8
NORM_NAMES = {"l2": "l_2", "linf": "l_inf", "l1": "l_1"}


class _Words(NamedTuple):
    """What is said of a figure: its title, what it shows, and the tables of its numbers."""

    title: str
    shows: str
    tables: Callable[[Measured], list[Html]] = lambda measured: []


def pictures(drawn: Iterable[pathlib.Path], measured: Measured) -> list[Picture]:
    """The pictures of the PNG files that were drawn, in the order of WORDS; others are left out."""
    files = {path.stem: path for path in drawn}
    nets = ", ".join(measured)
    return [
        Picture(title, files[name].read_bytes(), f"{shows} Nets: {nets}.", tables(measured))
        for name, (title, shows, tables) in WORDS.items()
        if name in files
    ]


def example_images(
    image: np.ndarray, examples: Sequence[Example], label: str, names: Mapping[str, str]
) -> list[ExampleImage]:
    """An original, `label` its class, and what fools each net, with what the net takes it for."""
    captions = [f"Original: class {label}"]
    for method, _, taken_for, ratio in examples:
        captions.append(f"{names.get(method, method)}: taken for {taken_for}, rho_2 {ratio:.3f}")
    images = [image, *(example.image for example in examples)]
    return [
        ExampleImage(_png(each), caption) for each, caption in zip(images, captions, strict=True)
    ]


def _png(image: np.ndarray) -> bytes:
    """An image as `drawing.pixels` takes it, in the bytes of a PNG file."""
    buffer = io.BytesIO()
    options = dict(cmap="gray", vmin=0, vmax=1, format="png", metadata={"Software": None})
    matplotlib.image.imsave(buffer, drawing.pixels(image), **options)
    return buffer.getvalue()


def robust_accuracy_tables(measured: Measured) -> list[Html]:
    """For each norm, every net's robust accuracy at round epsilons, and AutoAttack's."""
    found = {label: curves(figures) for label, figures in measured.items()}
    norms = [norm for norm in NORM_NAMES if any(norm in of_net for of_net in found.values())]
    return [
        _robust_accuracies(
            norm, {label: each[norm] for label, each in found.items() if norm in each}
        )
        for norm in norms
    ] + _of_autoattack(measured)


def _robust_accuracies(norm: str, of_nets: Mapping[str, Any]) -> Html:
    largest = max((curve.sizes[-1] for curve in of_nets.values() if len(curve.sizes)), default=0)
    epsilons = [0.0, *round_epsilons(float(largest), NUM_EPSILONS)]
    values = np.stack([robust_accuracy(curve, epsilons) for curve in of_nets.values()])
    lines = [
        [f"{epsilon:g}", *(f"{value:.2%}" for value in column)]
        for epsilon, column in zip(epsilons, values.T, strict=True)
    ]
    medians = [median_size(curve) for curve in of_nets.values()]
    lines.append(["epsilon of 50 %", *("-" if x is None else f"{x:.4g}" for x in medians)])
    attack, number = next((curve.attack, curve.num_examples) for curve in of_nets.values())
    caption = f"Robust accuracy in {NORM_NAMES[norm]} by {attack}, {number} images"
    return html.table(caption, ["epsilon", *of_nets], lines)


def _of_autoattack(measured: Measured) -> list[Html]:
    lines = [
        [label, NORM_NAMES[norm], f"{epsilon:g}", version, f"{accuracy:.2%}", number]
        for label, figures in measured.items()
        for norm, epsilon, version, accuracy, number in points(figures)
    ]
    head = ["", "norm", "epsilon", "version", "robust accuracy", "images"]
    return [html.table("Robust accuracy by AutoAttack", head, lines)] if lines else []


def success_tables(measured: Measured) -> list[Html]:
    """Every net's success rates of FGSM."""
    found = {
        label: figures["fgsm_curve"]
        for label, figures in measured.items()
        if figures.get("fgsm_curve") is not None
    }
    epsilons: list[float] = next((curve["epsilons"] for curve in found.values()), [])
    lines = [
        [f"{epsilon:g}", *(f"{curve['success'][i]:.2%}" for curve in found.values())]
        for i, epsilon in enumerate(epsilons)
    ]
    return [html.table("FGSM's success rate", ["epsilon", *found], lines)] if lines else []


def scatter_tables(measured: Measured) -> list[Html]:
    """Accuracy and rho_2 of every net."""
    lines: Sequence[Sequence[str]] = [
        [label, f"{figures['accuracy']:.2%}", f"{figures['rho_l2']:.4f}"]
        for label, figures in measured.items()
        if "rho_l2" in figures
    ]
    return [html.table("Accuracy and rho_2", ["", "accuracy", "rho_2"], lines)]


WORDS = {
    "robust_accuracy_over_epsilon": _Words(
        "Robust accuracy over epsilon by minimum-norm attacks (lines) and AutoAttack (points)",
        "Falling curves: the share of images that no perturbation up to the size epsilon fools.",
        robust_accuracy_tables,
    ),
    "success_over_epsilon": _Words(
        "FGSM's success rate over epsilon (the paper's Figure 5)",
        "Rising curves: the share of images that are misclassified under FGSM of the size epsilon.",
        success_tables,
    ),
    "robustness_over_accuracy": _Words(
        "Robustness over accuracy (the paper's Figure 6)",
        "A point for each net, benign accuracy to the right, rho_2 upward.",
        scatter_tables,
    ),
    "training_over_epochs": _Words(
        "Accuracy and robustness over the epochs of fine-tuning (the paper's Figure 8)",
        "Two panels over epochs: test accuracy and rho_2.",
    ),
    "single_run": _Words(
        "Training: loss, accuracy and, where it was measured, rho_2",
        "Curves over training steps, the reference net's training first, then the fine-tuning.",
    ),
}
"""In the order of a page."""
