"""Texts beside the points of a figure, placed so that they cover no point and no other text.

Every text has many candidate places around its points. Each text in turn takes the place of the
lowest cost, and this is repeated until no text moves. A text that has to stand far from its point
is connected with it by a thin line.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import matplotlib.colors
import matplotlib.patheffects
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Annotation

FONT_SIZE, GAP = 7, 1.0  # Points; the gap is kept around every text.
DISTANCES = (5, 8, 12, 17, 24, 32, 42, 54, 68)  # Of a text from its point, in points.
DIRECTIONS = np.stack([np.cos(angles := np.arange(16) * np.pi / 8), np.sin(angles)], axis=1)
FARTHEST_WITHOUT_LEADER = 12  # Points.
MOST_ROUNDS = 8
# What it costs: to leave the axes, to cover a text, a marker, a point of a line; to have a leader
# that crosses a text or a marker; each point of distance.
OUTSIDE, ON_TEXT, ON_MARKER, ON_LINE, CROSSING, FAR = 1000.0, 1000.0, 400.0, 2.0, 60.0, 0.3
Boxes = np.ndarray
"""(n, 4): left, bottom, right, top, in pixels."""


class Label(NamedTuple):
    """A text, and the points (n, 2), in the units of the axes, beside one of which it may stand.

    is_plain: a dollar in it is a dollar, and not the beginning of mathematics.
    """

    points: np.ndarray
    text: str
    color: str
    is_plain: bool = False


class _Places(NamedTuple):
    """The candidates of a text: its boxes, the points that it belongs to (pixels), distances."""

    boxes: Boxes
    anchors: np.ndarray
    distances: np.ndarray


class _Drawn(NamedTuple):
    """What texts should not cover, in pixels: the frame, markers, points along lines."""

    frame: np.ndarray
    markers: np.ndarray
    lines: np.ndarray


def place_labels(figure: Figure, axes: Axes, labels: Sequence[Label]) -> list[Annotation]:
    """Writes each label beside one of its points. Call it when nothing else will change."""
    figure.draw_without_rendering()  # Fixes the position of the axes.
    dots = figure.dpi / 72  # Pixels in a point.
    drawn = _what_is_drawn(axes)
    candidates = [
        _places(axes.transData.transform(label.points), _size(axes, label), dots)
        for label in labels
    ]
    chosen = _choose(candidates, drawn, dots)
    return [
        _write(axes, label, _Places(*(values[i] for values in places)), dots)
        for label, places, i in zip(labels, candidates, chosen, strict=True)
    ]


def _choose(candidates: Sequence[_Places], drawn: _Drawn, dots: float) -> list[int]:
    """The place that each text takes."""
    fixed = [_fixed_costs(places, drawn, dots) for places in candidates]
    chosen = [int(np.argmin(costs)) for costs in fixed]
    for _ in range(MOST_ROUNDS):
        before = list(chosen)
        for i, places in enumerate(candidates):
            others = [
                p.boxes[c]
                for j, (p, c) in enumerate(zip(candidates, chosen, strict=True))
                if j != i
            ]
            costs = fixed[i] + _costs_of_texts(places, np.array(others).reshape(-1, 4), dots)
            chosen[i] = int(np.argmin(costs))
        if chosen == before:
            break
    return chosen


def _fixed_costs(places: _Places, drawn: _Drawn, dots: float) -> np.ndarray:
    """The costs that do not depend on the other texts."""
    boxes, frame = _padded(places.boxes, dots), drawn.frame
    outside = (boxes[:, :2] < frame[:2]).any(1) | (boxes[:, 2:] > frame[2:]).any(1)
    costs = OUTSIDE * outside + FAR * places.distances
    costs += ON_MARKER * _num_inside(_padded(places.boxes, 3 * dots), drawn.markers)
    costs += ON_LINE * _num_inside(boxes, drawn.lines)
    leaders = _leaders(places, dots)
    near = 4 * dots
    for marker in drawn.markers:
        is_own = np.hypot(*(places.anchors - marker).T) < near
        crosses = (np.hypot(*np.moveaxis(leaders - marker, -1, 0)) < near).any(1)
        costs += CROSSING * (crosses & ~is_own)
    return costs


def _costs_of_texts(places: _Places, texts: Boxes, dots: float) -> np.ndarray:
    """The cost of covering other texts, or of crossing them with a leader."""
    boxes, leaders = _padded(places.boxes, GAP * dots), _leaders(places, dots)
    costs = np.zeros(len(boxes))
    for text in texts:
        overlaps = (boxes[:, :2] < text[2:]).all(1) & (boxes[:, 2:] > text[:2]).all(1)
        crosses = ((leaders > text[:2]) & (leaders < text[2:])).all(-1).any(1)
        costs += ON_TEXT * overlaps + CROSSING * crosses
    return costs


def _leaders(places: _Places, dots: float) -> np.ndarray:
    """Points (n, 12, 2) along the line from each anchor to its box; the anchor, twelve times, where
    the box is so near that there is no line.
    """
    ends = np.clip(places.anchors, places.boxes[:, :2], places.boxes[:, 2:])
    has_leader = places.distances > FARTHEST_WITHOUT_LEADER
    steps = np.linspace(0, 1, 12)[None, :, None] * has_leader[:, None, None]
    return places.anchors[:, None] + steps * (ends - places.anchors)[:, None]


def _num_inside(boxes: Boxes, points: np.ndarray) -> np.ndarray:
    """How many of the points (m, 2) are in each box."""
    inside = (points[None] > boxes[:, None, :2]) & (points[None] < boxes[:, None, 2:])
    return inside.all(-1).sum(1)


def _padded(boxes: Boxes, pixels: float) -> Boxes:
    return boxes + pixels * np.array([[-1, -1, 1, 1]])


def _what_is_drawn(axes: Axes) -> _Drawn:
    lines = [axes.transData.transform(line.get_xydata()) for line in axes.lines]
    markers = np.concatenate([np.zeros((0, 2)), *lines])
    along = np.concatenate([markers, *(part for line in lines for part in _segments(line))])
    finite = lambda points: points[np.isfinite(points).all(1)]
    return _Drawn(axes.bbox.get_points().reshape(4), finite(markers), finite(along))


def _segments(line: np.ndarray) -> Iterator[np.ndarray]:
    """Points along each segment of a line."""
    steps = np.linspace(0, 1, 30)[:, None]
    for start, end in zip(line[:-1], line[1:], strict=True):
        yield start + steps * (end - start)


def _size(axes: Axes, label: Label) -> np.ndarray:
    """The width and height of a text, in pixels."""
    note = axes.text(0, 0, label.text, fontsize=FONT_SIZE, parse_math=not label.is_plain)
    note.set_linespacing(1.0)
    size = np.array(note.get_window_extent().size)
    note.remove()
    return size


def _places(points: np.ndarray, size: np.ndarray, dots: float) -> _Places:
    """The places for a text of this size around its points, all in pixels."""
    distances = np.repeat(DISTANCES, len(DIRECTIONS)).astype(float)
    offsets = np.tile(DIRECTIONS, (len(DISTANCES), 1))
    # So that the box, not its center, is that far away.
    centers = offsets * (size / 2 + distances[:, None] * dots)
    half = np.tile(size / 2, 2) * np.array([-1, -1, 1, 1])
    boxes = np.concatenate([np.tile(point + centers, 2) + half for point in points])
    return _Places(boxes, np.repeat(points, len(centers), axis=0), np.tile(distances, len(points)))


def _write(axes: Axes, label: Label, place: _Places, dots: float) -> Annotation:
    """Writes a text in its place, and connects it with its point where it is far."""
    center = (place.boxes[:2] + place.boxes[2:]) / 2
    # Small type needs more contrast than lines.
    color = tuple(0.7 * np.array(matplotlib.colors.to_rgb(label.color)))
    leader = dict(arrowstyle="-", linewidth=0.5, color=color, shrinkA=0, shrinkB=2)
    note = axes.annotate(
        label.text,
        tuple(axes.transData.inverted().transform(place.anchors)),
        tuple((center - place.anchors) / dots),
        textcoords="offset points",
        ha="center",
        va="center",
        ma="left",
        linespacing=1.0,
        fontsize=FONT_SIZE,
        parse_math=not label.is_plain,
        color=color,
        arrowprops=leader if place.distances > FARTHEST_WITHOUT_LEADER else None,
        path_effects=[matplotlib.patheffects.withStroke(linewidth=2, foreground="white")],
        zorder=4,
    )
    note.set_in_layout(False)
    return note
