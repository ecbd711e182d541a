"""What the figures share: numbers made ready, lines, legends, notes beside points, files."""

import math
import pathlib
import textwrap
from collections.abc import Mapping, Sequence

import matplotlib.colors
import matplotlib.patheffects
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.transforms import Bbox

from dd_jax.results._styles import Look, style

Number = float | int | np.number | None
Numbers = Sequence[Number] | np.ndarray
Points = Sequence[Numbers] | np.ndarray
Paths = tuple[pathlib.Path, pathlib.Path]

DOTS_PER_INCH = 150
MOST_MARKERS = 8  # Of a line with more points than half as many again.
LONGEST_LABEL = 44  # Characters in a line of the legend.
MOST_LEGEND_COLUMNS = 4
# Where a note may stand from its point.
DIRECTIONS = [(x, y) for x in (1, 0, -1) for y in (1, 0, -1) if x or y]


def table(rows: Points, width: int) -> np.ndarray:
    """Points as float64 (points, width), NaN for what is no finite number. ValueError if one has
    another width.
    """
    rows = list(rows)
    wrong = next((row for row in rows if np.shape(row) != (width,)), None)
    if wrong is not None:
        raise ValueError(
            f"a point must be {width} numbers (or None for what is not known); got {wrong!r}."
        )
    values = np.array(rows, dtype=float).reshape(-1, width)
    return np.where(np.isfinite(values), values, np.nan)


def sort(rows: np.ndarray, column: int) -> np.ndarray:
    """Rows in the order of a column, NaN last."""
    return rows[np.argsort(rows[:, column], kind="stable")]


def in_percent(what: str, series: Mapping[str, np.ndarray], column: int) -> dict[str, np.ndarray]:
    """The series with a column of fractions in percent. ValueError unless they are within 0..1 (or
    NaN).
    """
    for name, rows in series.items():
        wrong = rows[(rows[:, column] < 0) | (rows[:, column] > 1 + 1e-6), column]
        if len(wrong):
            raise ValueError(
                f"{what} are fractions, 0 to 1; got {wrong[0]:g} for {name}: divide percent by 100."
            )
    factors = lambda rows: np.where(np.arange(rows.shape[1]) == column, 100.0, 1.0)[None]
    return {name: rows * factors(rows) for name, rows in series.items()}


def new_figure(
    size: tuple[float, float], columns: int, rows: int = 1, **options: bool
) -> tuple[Figure, list[Axes]]:
    """A figure of that size in inches and its axes, row by row."""
    figure = Figure(size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).flat)


def draw_lines(
    axes: Axes,
    series: Mapping[str, np.ndarray],
    looks: Mapping[str, Look],
    most_markers: int | float = MOST_MARKERS,
) -> None:
    """A line through each method's points (points, 2). Long lines have markers at some points, not
    where others have.
    """
    for index, (name, look) in enumerate(looks.items()):
        every = (
            1
            if len(series[name]) <= 1.5 * most_markers
            else math.ceil(len(series[name]) / most_markers)
        )
        dashes = (0, look.dashes) if look.dashes else "solid"
        # A point without a neighbor is no line.
        marker = look.marker or ("." if every == 1 else "")
        face = look.color if marker in ".xP*" else "white"
        (line,) = axes.plot(
            *series[name].T, color=look.color, linestyle=dashes, marker=marker, label=look.label
        )
        line.set(markerfacecolor=face, markevery=(index * every // len(looks), every))


def draw_legend(figure: Figure) -> None:
    """A legend below the axes, in as many columns as fit; the figure grows by its height.

    ValueError if no line of the figure has a point to show.
    """
    lines: dict[str, list[Line2D]] = {}
    for line in (
        line for axes in figure.axes for line in axes.lines if not line.get_label().startswith("_")
    ):
        lines.setdefault(line.get_label(), []).append(line)
    shown = {
        label
        for label, same in lines.items()
        if any(np.isfinite(line.get_xydata()).all(1).any() for line in same)
    }
    if not shown:
        raise ValueError(
            "There is nothing to draw: no series has a point of finite numbers; give at least one."
        )
    texts = [label if label in shown else f"{label} (no data)" for label in lines]
    texts = [textwrap.fill(text, LONGEST_LABEL) for text in texts]
    handles = [same[0] for same in lines.values()]
    for columns in range(min(MOST_LEGEND_COLUMNS, len(texts)), 0, -1):
        legend = figure.legend(
            handles, texts, loc="outside lower center", ncols=columns, columnspacing=1.2
        )
        for text in legend.get_texts():
            text.set_parse_math(False)
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            break
        legend.remove()
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + legend.get_window_extent().height / figure.dpi)


def annotate(figure: Figure, axes: Axes, notes: Sequence[tuple[np.ndarray, str, str]]) -> None:
    """Writes each note (point, text, color) beside its point, where it covers the least of lines
    and other notes.
    """
    figure.draw_without_rendering()  # Settles where the axes are.
    lines = [axes.transData.transform(line.get_xydata()) for line in axes.lines]
    steps = np.linspace(0, 1, 30)[:, None]
    segments = [
        ends[0] + steps * (ends[1] - ends[0])
        for line in lines
        for ends in zip(line[:-1], line[1:], strict=True)
    ]
    markers = np.concatenate(lines)
    drawn = np.concatenate([markers, *segments])
    dots = figure.dpi / 72  # In a point.
    taken: list[Bbox] = []
    for point, text, color in notes:
        note = axes.annotate(
            text, point, (0, 0), textcoords="offset points", ha="center", va="center", fontsize=7
        )
        # Small type needs more contrast than lines.
        darker = 0.7 * np.array(matplotlib.colors.to_rgb(color))
        note.set(
            color=tuple(darker),
            path_effects=[matplotlib.patheffects.withStroke(linewidth=2, foreground="white")],
        )
        note.set_in_layout(False)
        size = np.array(note.get_window_extent().size)
        choices = []
        for distance in (5, 9, 14):
            for direction in DIRECTIONS:
                offset = np.array(direction) * (
                    size / 2 + distance * dots * (0.7 if all(direction) else 1)
                )
                center = axes.transData.transform(point) + offset
                box = Bbox([center - size / 2, center + size / 2])
                covered = box.padded(dots).count_contains(drawn) + 20 * box.padded(
                    3 * dots
                ).count_contains(markers)
                covered += 50 * box.padded(dots).count_overlaps(taken)
                covered += 200 * (
                    not all(axes.bbox.contains(*corner) for corner in box.get_points())
                )
                choices.append((covered + distance / 10, len(choices), offset / dots, box))
        *_, offset, box = min(choices)
        note.set_position(tuple(offset))
        taken.append(box)


def pixels(image: np.ndarray) -> np.ndarray:
    """What to draw of an image: (h, w) or (h, w, 3), clipped to 0..1, 0 for NaN.

    ValueError unless the image is (h, w), (h, w, 1) or (h, w, 3).
    """
    if image.ndim not in (2, 3) or image.shape[2:] not in ((), (1,), (3,)) or not image.size:
        raise ValueError(
            f"an image must be (height, width), with 1 or 3 channels behind or none; got "
            f"{image.shape}."
        )
    clipped = np.clip(np.nan_to_num(image.astype(float), nan=0.0), 0, 1)
    return clipped[:, :, 0] if image.shape[2:] == (1,) else clipped


def draw_image(axes: Axes, image: np.ndarray, above: str, below: str) -> None:
    """An image of `pixels` without axes, with plain text above and text that may hold mathematics
    below.
    """
    axes.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    axes.set_title(above, fontsize=7.5, pad=3, parse_math=False)
    axes.set_xlabel(below, fontsize=7.5, labelpad=3)


def save(figure: Figure, folder: pathlib.Path | str, name: str) -> Paths:
    """Writes NAME.png and NAME.pdf, without the date and versions that Matplotlib would put in, and
    returns their paths.
    """
    folder = pathlib.Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    png, pdf = folder / f"{name}.png", folder / f"{name}.pdf"
    with style():
        figure.savefig(
            png, dpi=DOTS_PER_INCH, metadata={"Software": None}, pil_kwargs={"optimize": True}
        )
        without = {"Producer": None, "CreationDate": None}
        figure.savefig(pdf, dpi=2 * DOTS_PER_INCH, metadata={"Creator": "dd_jax"} | without)
    return png, pdf
