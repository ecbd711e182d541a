"""The parts that figures share: arrays of points, lines, legends, files."""

import math
import pathlib
import textwrap
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.legend import Legend
from matplotlib.lines import Line2D

from dd_jax.results._styles import Look, style

Number = float | int | np.number | None
Numbers = Sequence[Number] | np.ndarray
Points = Sequence[Numbers] | np.ndarray
Paths = tuple[pathlib.Path, pathlib.Path]

DOTS_PER_INCH = 150
MOST_MARKERS = 8  # A line with more than 1.5 times as many points has markers at some only.
LONGEST_LABEL = 44  # Characters in a line of the legend.
MOST_LEGEND_COLUMNS = 4
FILLED_MARKERS = ".xXP*"  # Others are white inside.


def table(rows: Points, width: int) -> np.ndarray:
    """Points as a float64 array (points, width), with NaN for None and infinite numbers.

    Raises ValueError if a point has another width.
    """
    rows = list(rows)
    wrong = next((row for row in rows if np.shape(row) != (width,)), None)
    if wrong is not None:
        raise ValueError(
            f"a point must be {width} numbers (None if unknown); got {wrong!r}. Give one tuple of "
            f"{width} per point."
        )
    values = np.array(rows, dtype=float).reshape(-1, width)
    return np.where(np.isfinite(values), values, np.nan)


def pairs(name: str, curve: Sequence[Numbers], what: str) -> np.ndarray:
    """Two lists of equal length as points (points, 2); see `table`.

    `what`: the two lists in words, for the ValueError if their lengths differ.
    """
    if len(curve) != 2 or len(curve[0]) != len(curve[1]):
        raise ValueError(f"{name}'s curve must be two lists of equal length: {what}.")
    return table(list(zip(*curve, strict=True)), 2)


def sort(rows: np.ndarray, column: int) -> np.ndarray:
    """The rows sorted by a column, with NaN last."""
    return rows[np.argsort(rows[:, column], kind="stable")]


def in_percent(what: str, series: Mapping[str, np.ndarray], column: int) -> dict[str, np.ndarray]:
    """The series with a column of fractions converted to percent.

    Raises ValueError unless the fractions are within 0..1 or NaN.
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
    """A figure of this size in inches, and its axes row by row."""
    figure = Figure(size, layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False, **options).flat)


def draw_lines(
    axes: Axes,
    series: Mapping[str, np.ndarray],
    looks: Mapping[str, Look],
    names: Mapping[str, str],
    most_markers: int | float = MOST_MARKERS,
) -> None:
    """Draws a line through the points (points, 2) of each method in `looks`.

    `names`: the methods' names in the legend. Long lines have markers at some points only, which
    differ from line to line.
    """
    for index, (name, look) in enumerate(looks.items()):
        every = (
            1
            if len(series[name]) <= 1.5 * most_markers
            else math.ceil(len(series[name]) / most_markers)
        )
        dashes = (0, look.dashes) if look.dashes else "solid"
        # A single point without a marker would be invisible.
        marker = look.marker or ("." if every == 1 else "")
        face = look.color if marker in FILLED_MARKERS else "white"
        (line,) = axes.plot(
            *series[name].T, color=look.color, linestyle=dashes, marker=marker, label=names[name]
        )
        line.set(markerfacecolor=face, markevery=(index * every // len(looks), every))


def check_has_data(lines: Iterable[Line2D]) -> None:
    """Raises ValueError if none of the lines has a point to show."""
    if not any(map(_has_data, lines)):
        raise ValueError(
            "There is nothing to draw: no series has a point of finite numbers; give at least one."
        )


def _has_data(line: Line2D) -> bool:
    return bool(np.isfinite(line.get_xydata()).all(1).any())


def draw_legend(figure: Figure, more: Sequence[Line2D] = ()) -> None:
    """Draws a legend below the axes in as many columns as fit. The figure grows by its height.

    A line whose group (`gid`) is another line's label belongs to that one. `more`: lines to explain
    that are not drawn. Raises ValueError if no line has a point to show.
    """
    lines: dict[str, list[Line2D]] = {}
    for line in (line for axes in figure.axes for line in axes.lines):
        label = str(line.get_gid() or line.get_label())
        if not label.startswith("_"):
            lines.setdefault(label, []).append(line)
    check_has_data(line for same in lines.values() for line in same)
    shown = {label for label, same in lines.items() if any(map(_has_data, same))}
    texts = [label if label in shown else f"{label} (no data)" for label in lines]
    texts = [
        textwrap.fill(text, LONGEST_LABEL) for text in (*texts, *(str(x.get_label()) for x in more))
    ]
    legend = _widest_legend(figure, [*(same[0] for same in lines.values()), *more], texts)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width, height + legend.get_window_extent().height / figure.dpi)


def _widest_legend(figure: Figure, handles: Sequence[Line2D], texts: Sequence[str]) -> Legend:
    """The legend with the most columns that fit into the figure's width, or with one."""
    for columns in range(min(MOST_LEGEND_COLUMNS, len(texts)), 1, -1):
        legend = _legend(figure, handles, texts, columns)
        if legend.get_window_extent().width <= figure.bbox.width:
            return legend
        legend.remove()
    return _legend(figure, handles, texts, 1)


def _legend(
    figure: Figure, handles: Sequence[Line2D], texts: Sequence[str], columns: int
) -> Legend:
    legend = figure.legend(
        handles, texts, loc="outside lower center", ncols=columns, columnspacing=1.2
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    return legend


def pixels(image: np.ndarray) -> np.ndarray:
    """The pixels of an image, (h, w) or (h, w, 3), clipped to 0..1 and with 0 for NaN.

    Raises ValueError unless the image is (h, w), (h, w, 1) or (h, w, 3).
    """
    if image.ndim not in (2, 3) or image.shape[2:] not in ((), (1,), (3,)) or not image.size:
        raise ValueError(
            f"an image must be (height, width), (height, width, 1) or (height, width, 3); got "
            f"{image.shape}. Reshape it."
        )
    clipped = np.clip(np.nan_to_num(image.astype(float), nan=0.0), 0, 1)
    return clipped[:, :, 0] if image.shape[2:] == (1,) else clipped


def draw_image(axes: Axes, image: np.ndarray, above: str, below: str) -> None:
    """Draws the result of `pixels` without axes, with plain text above and text below.

    The text below may contain mathematics between dollars.
    """
    axes.imshow(image, cmap="gray", vmin=0, vmax=1, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    axes.set_title(above, fontsize=7.5, pad=3, parse_math=False)
    axes.set_xlabel(below, fontsize=7.5, labelpad=3)


def save(figure: Figure, folder: pathlib.Path | str, name: str) -> Paths:
    """Writes NAME.png and NAME.pdf and returns their paths.

    The files contain no date and no versions, so that the same figure gives the same bytes.
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
