"""The paper's Figure 7: an image, and what fools each net."""

import math
import pathlib
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.figure import Figure

from dd_jax.results import _drawing as drawing
from dd_jax.results._drawing import Number, Paths
from dd_jax.results._styles import TEXT_WIDTH, legend_names, style

PANELS_PER_ROW, LONGEST_PANEL_LABEL, LINE_HEIGHT = 8, 13, 0.16


class Example(NamedTuple):
    """An image that fools a method's net.

    `image`: (h, w), (h, w, 1) or (h, w, 3), 0 to 1. `label`: the class that the net predicts.
    `ratio`: ||perturbation||_2 / ||original||_2.
    """

    method: str
    image: np.ndarray
    label: str | int
    ratio: Number


def fooling_examples(
    folder: pathlib.Path | str, image: np.ndarray, examples: Sequence[Example], **options: Any
) -> Paths:
    """Writes the paper's Figure 7, `fooling_examples_figure(image, examples, **options)`."""
    return drawing.save(
        fooling_examples_figure(image, examples, **options), folder, "fooling_examples"
    )


@style()
def fooling_examples_figure(
    image: np.ndarray,
    examples: Sequence[Example],
    *,
    label: str | int | None = None,
    labels: Mapping[str, str] | None = None,
) -> Figure:
    """An image, and for each method an image that fools its net.

    The predicted class and the ratio of norms are written below. Pixels are clipped to 0..1; NaN is
    black.

    Args:
      image: the original: (h, w), (h, w, 1) or (h, w, 3), 0 to 1.
      examples: one or more.
      label: the original's class.
      labels: from methods to their names above the images.

    Raises:
      ValueError: there are no examples, or images have another shape.
    """
    if not examples:
        raise ValueError("There is no example to draw; give one or more.")
    images = [drawing.pixels(each) for each in (image, *(example.image for example in examples))]
    above, below = _names_above(examples, labels), _texts_below(examples, label)
    rows = math.ceil(len(images) / PANELS_PER_ROW)
    columns = math.ceil(len(images) / rows)
    width = TEXT_WIDTH / PANELS_PER_ROW
    num_lines = sum(max(text.count("\n") for text in texts) + 1 for texts in (above, below))
    aspect = max(each.shape[0] / each.shape[1] for each in images)
    height = width * aspect + LINE_HEIGHT * num_lines
    figure, all_axes = drawing.new_figure((width * columns, height * rows), columns, rows)
    for axes, *panel in zip(all_axes, images, above, below, strict=False):
        drawing.draw_image(axes, *panel)
    for axes in all_axes[len(images) :]:
        axes.remove()
    return figure


def _names_above(examples: Sequence[Example], labels: Mapping[str, str] | None) -> list[str]:
    """The names of the original and of the examples' methods."""
    methods = [example.method for example in examples]
    known = legend_names(methods, labels)
    names = ["Original", *(known[method] for method in methods)]
    return [_wrap(name.replace(" (", "\n(").replace(" + ", "\n+ ")) for name in names]


def _texts_below(examples: Sequence[Example], label: str | int | None) -> list[str]:
    """The classes of the original and of the examples, of equally many lines, and the ratios."""
    classes = ["" if label is None else _wrap(f"class {label}")]
    classes += [_wrap(f"taken for {example.label}") for example in examples]
    most_lines = max(text.count("\n") for text in classes)
    classes = [
        text.replace("$", r"\$") + "\n" * (most_lines - text.count("\n")) for text in classes
    ]
    ratios = drawing.table([[example.ratio] for example in examples], 1)[:, 0]
    shown = ["no data" if np.isnan(ratio) else f"{ratio:.3f}" for ratio in ratios]
    sizes = ["", *(rf"$\rho_2$ = {ratio}" for ratio in shown)]
    return [f"{text}\n{size}" for text, size in zip(classes, sizes, strict=True)]


def _wrap(text: str) -> str:
    """The text in lines that fit a panel; each given line becomes at most three."""
    fill = lambda line: textwrap.fill(line, LONGEST_PANEL_LABEL, max_lines=3, placeholder=" ...")
    return "\n".join(map(fill, text.split("\n")))
