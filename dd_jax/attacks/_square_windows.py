"""The squares of Square Attack: sizes, places and the pattern of two pyramids; see
`dd_jax.attacks._square`.

All that depends on the shape of the inputs alone is computed once, with NumPy.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, UInt32

TILES = 5
"""The tiles of the starting point: so many along the shorter side."""


class Layout(NamedTuple):
    """How inputs become images (rows, height, width, channels): an interval of a vector is a
    square of an image of width 1.
    """

    shape: tuple[int, ...]  # of one input
    channel_axis: int
    height: int
    width: int
    channels: int

    def to_image(self, inputs: Array) -> Float[Array, "rows height width channels"]:
        """The images of some inputs."""
        rows = inputs.shape[0]
        if len(self.shape) == 3:
            inputs = jnp.moveaxis(inputs, self.channel_axis, -1)
        return inputs.reshape(rows, self.height, self.width, self.channels)

    def from_image(self, images: Array) -> Float[Array, "rows ..."]:
        """The inputs of some images."""
        if len(self.shape) == 3:
            return jnp.moveaxis(images, -1, self.channel_axis)
        return images.reshape(images.shape[0], *self.shape)


class Windows(NamedTuple):
    """Of each size: heights and widths, and the patterns in two orientations, each in the middle of
    zeros, so that a part of it is the pattern at any place. The tiles of the starting point, in two
    orientations. linf needs no patterns.
    """

    heights: Int[np.ndarray, " sizes"]
    widths: Int[np.ndarray, " sizes"]
    patterns: Float[np.ndarray, "sizes 2 twice_height twice_width"]
    tiles: Float[np.ndarray, "tiles 2 height width"]


class Place(NamedTuple):
    """A square per row: which size, its upper left corner, its orientation."""

    size: Int[Array, " rows"]
    top: Int[Array, " rows"]
    left: Int[Array, " rows"]
    orientation: Int[Array, " rows"]


def image_layout(shape: Sequence[int], channel_axis: int) -> Layout:
    """The layout of inputs of that shape, the batch first. ValueError where it is none of ours."""
    one = tuple(shape[1:])
    if len(one) == 1:
        return Layout(one, -1, one[0], 1, 1)
    if len(one) == 2:
        return Layout(one, -1, *one, 1)
    if len(one) != 3 or channel_axis not in (-3, -2, -1, 1, 2, 3):
        raise ValueError(
            f"Square Attack changes squares of images: inputs must have shape (batch, height, "
            f"width, channels), (batch, height, width) or (batch, components), and channel_axis be "
            f"1, 2, 3 or -1; got {tuple(shape)} and {channel_axis}."
        )
    axis = channel_axis % 4
    height, width = (size for number, size in enumerate(one, start=1) if number != axis)
    return Layout(one, axis, height, width, one[axis - 1])


def make_windows(layout: Layout, shares: Sequence[float], least: int) -> Windows:
    """The squares with those shares of the pixels, not shorter than `least`; odd from 3 on."""
    height, width = layout.height, layout.width
    sides = [side_of(share, height, width, least) for share in shares]
    shapes = [(min(side, height), min(side, width)) for side in sides]
    heights, widths = np.array(shapes, np.int32).T
    if least == 1:
        return Windows(heights, widths, np.zeros((1, 2, 1, 1)), np.zeros((1, 2, 1, 1)))
    patterns = [
        [np.pad(one, ((height, height - h), (width, width - w))) for one in orientations(h, w)]
        for h, w in shapes
    ]
    return Windows(heights, widths, np.array(patterns), tiles_of(height, width))


def side_of(share: float, height: int, width: int, least: int) -> int:
    """The side of a square with that share of the pixels; the length of an interval where the
    width is 1.
    """
    area = share * height * width
    side = max(round(area if width == 1 else math.sqrt(area)), least)
    return side + 1 if least > 1 and side % 2 == 0 else side


def tiles_of(height: int, width: int) -> Float[np.ndarray, "tiles 2 height width"]:
    """An image with one tile each, for all tiles."""
    side = max((height if width == 1 else min(height, width)) // TILES, 1)
    tall, wide = min(side, height), min(side, width)
    tops = range(height % tall // 2, height - tall + 1, tall)
    lefts = range(width % wide // 2, width - wide + 1, wide)
    tiles = np.zeros((len(tops), len(lefts), 2, height, width))
    for i, top in enumerate(tops):
        for j, left in enumerate(lefts):
            tiles[i, j, :, top : top + tall, left : left + wide] = orientations(tall, wide)
    return tiles.reshape(-1, 2, height, width)


def orientations(height: int, width: int) -> list[Float[np.ndarray, "height width"]]:
    """The pattern and its transpose; twice the same where it is no square."""
    pattern = two_pyramids(height, width)
    return [pattern, pattern.T if height == width else pattern]


def two_pyramids(height: int, width: int) -> Float[np.ndarray, "height width"]:
    """A pyramid in the upper half and one of opposite sign in the lower; ||.||_2 = 1."""
    upper, lower = pyramid(height // 2, width), pyramid(height - height // 2, width)
    both = np.concatenate([upper, -lower])
    return both / np.sqrt(np.sum(both**2))


def pyramid(height: int, width: int) -> Float[np.ndarray, "height width"]:
    """sum_k 1 / k^2 over the centered squares of side 2 k - 1 that hold the pixel; ||.||_2 = 1."""
    rows, columns = np.arange(height) - height // 2, np.arange(width) - width // 2
    distance = np.maximum(np.abs(rows)[:, None], np.abs(columns)[None])
    num_squares = max(height, width) // 2 + 1
    sums = np.concatenate([[0.0], np.cumsum(1 / np.arange(1.0, num_squares + 1) ** 2)])
    heap = sums[num_squares] - sums[distance]
    return heap / np.sqrt(np.sum(heap**2)) if heap.size else heap


def random_place(
    windows: Windows, layout: Layout, size: Int[Array, " rows"], bits: UInt32[Array, "rows 3"]
) -> Place:
    """A square of that size per row, anywhere in the image with equal probability."""
    room = (
        layout.height - jnp.asarray(windows.heights)[size],
        (layout.width - jnp.asarray(windows.widths)[size]),
    )
    top, left = (up_to(most, bits[:, i]) for i, most in enumerate(room))
    return Place(size, top, left, (bits[:, 2] & 1).astype(jnp.int32))


def up_to(most: Int[Array, " rows"], bits: UInt32[Array, " rows"]) -> Int[Array, " rows"]:
    """0..most, with equal probabilities."""
    fraction = (bits >> 8).astype(jnp.float32) * 2.0**-24
    return jnp.minimum((fraction * (most + 1)).astype(jnp.int32), most)


def mask_of(windows: Windows, layout: Layout, place: Place) -> Bool[Array, "rows height width 1"]:
    """Where the square is."""
    inside = lambda first, length, count: (
        (jnp.arange(count)[None] >= first[:, None])
        & (jnp.arange(count)[None] < (first + length)[:, None])
    )
    rows = inside(place.top, jnp.asarray(windows.heights)[place.size], layout.height)
    columns = inside(place.left, jnp.asarray(windows.widths)[place.size], layout.width)
    return rows[:, :, None, None] & columns[:, None, :, None]


def pattern_at(
    windows: Windows, layout: Layout, place: Place, dtype: jnp.dtype
) -> Float[Array, "rows height width 1"]:
    """The pattern of each row, in its square; zero elsewhere."""
    table = jnp.asarray(windows.patterns, dtype)

    def of_one(size: Array, top: Array, left: Array, orientation: Array) -> Array:
        corner = (size, orientation, layout.height - top, layout.width - left)
        return lax.dynamic_slice(table, corner, (1, 1, layout.height, layout.width))[0, 0]

    return jax.vmap(of_one)(*place)[..., None]
