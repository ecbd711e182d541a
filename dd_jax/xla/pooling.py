"""Pooling of NHWC maps with fast derivatives.

DeepFool needs the gradient of every logit, and Deep Defense differentiates those gradients again. A
window's *first maximum* is its largest element, the earliest in row-major order among equal ones.
Max-pooling copies the first maximum. Its position is locally constant, so the derivative is the
linear map that reads tangents at the same positions. The transpose of that map adds up, for every
element, the cotangents of all windows that chose it (Deep Defense, supplement, section 7). All
higher derivatives consist of these two maps.
"""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, UInt

Maps = Float[Array, "batch height width channels"]
Pooled = Float[Array, "batch down across channels"]  # One entry per window.
Positions = UInt[Array, "batch down across channels"]


def max_pool(
    x: Maps, window: int, stride: int, padding: int = 0, *, ceil_mode: bool = False
) -> Pooled:
    """The largest element of every window x window patch; patches start every `stride` pixels.

        windows = floor((size + 2 padding - window) / stride) + 1, per axis

    Args:
      x: (batch, height, width, channels), floating.
      window, stride: in pixels, at least 1. Windows overlap where stride < window.
      padding: pixels of -inf on every side, at most half a window, so that each window contains at
        least one pixel of x.
      ceil_mode: round up instead of down, as in PyTorch and Caffe. The last window may then extend
        beyond the end (pixels outside count as -inf); a window that would start outside x and its
        left padding is dropped.

    Returns:
      (batch, windows down, windows across, channels), in the dtype of x.

    The first of several equal maxima, in row-major order, gets the whole gradient. Gradients of
    windows that chose the same element add up. NaN survives only as the first element of its
    window, because every comparison with NaN is false. Differentiable any number of times, in
    forward and reverse mode.

    The derivative rule records which element each window chose and spreads cotangents over blocks
    of stride x stride pixels. Under `vmap` and between ReLUs, on a CPU, this is three to four times
    as fast as differentiating the comparisons, with the same result; `reduce_window` takes minutes
    to compile there.

    Raises ValueError if x has another rank or is not floating, if a window, stride or padding is
    out of range, or if no window fits.
    """
    _check_maps(x)
    if window < 1 or stride < 1 or not 0 <= padding <= window // 2:
        raise ValueError(
            f"max_pool got window {window}, stride {stride}, padding {padding}; window and stride "
            "must be at least 1, and padding from 0 to half the window. Change these arguments."
        )
    down, across = (_num_windows(size, window, stride, padding, ceil_mode) for size in x.shape[1:3])
    return max_of_windows(x, window, stride, (padding, padding), (down, across))


def max_of_windows(
    x: Maps, window: int, stride: int, starts: tuple[int, int], counts: tuple[int, int]
) -> Pooled:
    """Max-pooling with a given number of windows.

    `counts` windows per axis, the first of which starts `starts` pixels before x. Pixels outside x
    count as -inf; pixels that no window covers are ignored.
    """
    reach = _blocks_per_window(window, stride)
    # Whole blocks: x is padded, or cropped where an edge is negative.
    sizes = [(count - 1 + reach) * stride for count in counts]
    edges = [
        (start, size - n - start, 0)
        for start, size, n in zip(starts, sizes, x.shape[1:3], strict=True)
    ]
    outside = jnp.array(-jnp.inf, x.dtype)
    return _max_of_blocks(lax.pad(x, outside, [(0, 0, 0), *edges, (0, 0, 0)]), window, stride)


def avg_pool(x: Maps, window: int) -> Pooled:
    """The mean of every window x window patch; patches are adjacent and do not overlap.

    (batch, height, width, channels) to (batch, height / window, width / window, channels), in the
    dtype of x.

    Raises ValueError if x has another rank or is not floating, or if window does not divide height
    and width.
    """
    _check_maps(x)
    batch, height, width, channels = x.shape
    if window < 1 or height % window or width % window:
        raise ValueError(
            f"avg_pool got window {window} and maps of {height} x {width}; the window must be at "
            f"least 1 and divide both sides. Choose another window or crop the maps."
        )
    return x.reshape(batch, height // window, window, width // window, window, channels).mean(
        axis=(2, 4)
    )


def _check_maps(x: Array) -> None:
    if x.ndim != 4 or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"Pooling got {x.dtype} of shape {x.shape}; it needs floating maps (batch, height, "
            f"width, channels). Convert or reshape the input."
        )


def _num_windows(size: int, window: int, stride: int, padding: int, ceil_mode: bool) -> int:
    """How many windows fit along an axis."""
    room = size + 2 * padding - window
    num_windows = (-(-room // stride) if ceil_mode else room // stride) + 1
    if ceil_mode and (num_windows - 1) * stride >= size + padding:
        num_windows -= 1
    if num_windows < 1:
        raise ValueError(
            f"max_pool got maps with a side of {size} pixels: no window of {window} fits; use a "
            f"smaller window or larger maps."
        )
    return num_windows


def _blocks_per_window(window: int, stride: int) -> int:
    return -(-window // stride)


@partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _max_of_blocks(x: Maps, window: int, stride: int) -> Pooled:
    """Max-pooling of maps whose sides are multiples of `stride`; window i starts at block i."""
    return _first_maximum(x, window, stride)[0]


@_max_of_blocks.defjvp
def _max_of_blocks_jvp(
    window: int, stride: int, primals: tuple[Maps], tangents: tuple[Maps]
) -> tuple[Pooled, Pooled]:
    maximum, position = _first_maximum(primals[0], window, stride)
    return maximum, _read(tangents[0], position, window, stride)


def _first_maximum(x: Maps, window: int, stride: int) -> tuple[Pooled, Positions]:
    """Every window's first maximum and its position: row * window + column within the window."""
    # The type must also hold window^2, which means "in no window" in _read.
    dtype = np.min_scalar_type(window * window)
    down, across = (
        size // stride - _blocks_per_window(window, stride) + 1 for size in x.shape[1:3]
    )
    maximum, position = None, None
    for row, column in itertools.product(range(window), repeat=2):
        end = (
            x.shape[0],
            row + (down - 1) * stride + 1,
            column + (across - 1) * stride + 1,
            x.shape[3],
        )
        candidate = lax.slice(x, (0, row, column, 0), end, (1, stride, stride, 1))
        if maximum is None or position is None:
            maximum, position = candidate, jnp.zeros(candidate.shape, dtype)
        else:
            wins = candidate > maximum
            maximum = jnp.where(wins, candidate, maximum)
            position = jnp.where(wins, dtype.type(row * window + column), position)
    assert maximum is not None and position is not None  # A window has a pixel or more.
    return maximum, position


def _read(x: Maps, position: Positions, window: int, stride: int) -> Pooled:
    """The element of x at every window's `position`. Linear in x.

    Its transpose, which JAX derives, is the hot path. So positions are moved to the blocks instead
    of strided slices of x to the windows: slices transpose to interior padding, which is slow on a
    CPU, and blocks transpose to a broadcast.
    """
    (batch, height, width, channels), (_, down, across, _) = x.shape, position.shape
    blocks = x.reshape(batch, height // stride, stride, width // stride, stride, channels)
    reach = _blocks_per_window(window, stride)
    result = jnp.zeros(position.shape, x.dtype)
    for below, right in itertools.product(range(reach), repeat=2):
        # The windows' choices, at the blocks that are `below` and `right` of their first blocks.
        edges = ((0, 0, 0), (below, reach - 1 - below, 0), (right, reach - 1 - right, 0), (0, 0, 0))
        chosen = lax.pad(position, jnp.zeros((), position.dtype), edges)[:, :, None, :, None, :]
        is_chosen = chosen == _positions_in_block(below, right, window, stride, position.dtype)
        in_block = jnp.sum(jnp.where(is_chosen, blocks, 0), axis=(2, 4))
        result += in_block[:, below : below + down, right : right + across]
    return result


def _positions_in_block(
    below: int, right: int, window: int, stride: int, dtype: np.dtype
) -> UInt[np.ndarray, "..."]:
    """The position in the window of each pixel of a block, (1, 1, stride, 1, stride, 1).

    window^2 for pixels outside the window.
    """
    row, column = np.ix_(below * stride + np.arange(stride), right * stride + np.arange(stride))
    inside = (row < window) & (column < window)
    positions = np.where(inside, row * window + column, window * window)
    return positions.astype(dtype).reshape(1, 1, stride, 1, stride, 1)
