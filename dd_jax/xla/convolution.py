"""Convolutions and matrix products whose derivatives of every order are plain ones again.

XLA runs a plain convolution (NHWC images, HWIO kernel, stride 1) at full speed on a CPU. The
derivatives that autodiff creates are not plain, and run up to 100 times slower inside a loop (jax
issue 12868). But the derivatives are convolutions themselves,
    y = x * w   =>   x_bar = y_bar * flipped w^T,   w_bar = x^T * y_bar^T   (batch <-> channels),
and this module computes them as plain ones. All three are derivatives of the scalar
sum(y_bar . (x * w)), which is linear in each of its arguments. So the derivatives of each of the
three are the other two, to any order.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

Padding = tuple[tuple[int, int], tuple[int, int]]
LAYOUT = ("NHWC", "HWIO", "NHWC")
# The largest ratio of an input gradient's pixels to its cotangent's for which one convolution is
# the fastest form, measured on a CPU.
MOST_ZEROS = 1.5
# Up to so many input channels, other forms are faster on a CPU before jax 0.11, measured by
# benchmarks/convolutions.py and in whole steps: an input gradient by pixels, and a convolution to
# not many channels in blocks of a row.
FEW_INPUTS = 4 if jax.__version_info__ < (0, 11) else 0
MOST_OUTPUTS_IN_BLOCKS = 64


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolution(
    x: Float[Array, "batch height width inputs"],
    kernel: Float[Array, "down across inputs outputs"],
    padding: Padding,
) -> Float[Array, "batch rows columns outputs"]:
    """Cross-correlation with stride 1 and zero padding ((top, bottom), (left, right)).

    Differentiable in reverse mode, to any order.
    """
    return _correlation(x, kernel, padding)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def input_gradient(
    cotangent: Float[Array, "batch rows columns outputs"],
    kernel: Float[Array, "down across inputs outputs"],
    padding: Padding,
) -> Float[Array, "batch height width inputs"]:
    """The gradient of `convolution` in its input, for this kernel and padding (a transposed
    convolution).
    """
    (rows, columns), ends = cotangent.shape[1:3], _ends_of_gradient(kernel.shape[:2], padding)
    down, across, inputs = kernel.shape[:3]
    if inputs <= FEW_INPUTS and (down, across) != (1, 1):
        return _input_gradient_by_pixels(cotangent, kernel, padding)
    height = rows + sum(ends[0]) - down + 1
    width = columns + sum(ends[1]) - across + 1
    if height * width >= MOST_ZEROS * rows * columns:
        return _input_gradient_by_rows(cotangent, kernel, padding)
    # The barrier keeps XLA from folding the transposition back into the slow form.
    flipped = lax.optimization_barrier(jnp.flip(kernel, (0, 1)).transpose(0, 1, 3, 2))
    return _correlation(cotangent, flipped, ends)


def _input_gradient_by_rows(cotangent: Array, kernel: Array, padding: Padding) -> Array:
    """The sum of the contributions of the kernel's rows.

    Faster than one convolution if that one would mostly read zeros.
    """
    down, across, inputs, outputs = kernel.shape
    (top, bottom), _ = padding
    by_rows = jnp.flip(kernel, 1).transpose(1, 3, 0, 2).reshape(1, across, outputs, down * inputs)
    ends = ((0, 0), _ends_of_gradient((down, across), padding)[1])
    parts = _correlation(cotangent, lax.optimization_barrier(by_rows), ends)
    parts, zero = parts.reshape(*parts.shape[:3], down, inputs), jnp.zeros((), parts.dtype)
    edges = [
        ((0, 0, 0), (row - top, down - 1 - row - bottom, 0), (0, 0, 0), (0, 0, 0))
        for row in range(down)
    ]
    rows = (lax.pad(parts[:, :, :, row], zero, edges[row]) for row in range(down))
    return sum(rows)  # type: ignore[return-value]  # There is a row or more.


def _input_gradient_by_pixels(cotangent: Array, kernel: Array, padding: Padding) -> Array:
    """The sum of the contributions of the kernel's pixels, which are one matrix product.

    Faster than a convolution with so few outputs that they leave most of a vector register empty.
    """
    down, across, inputs, _ = kernel.shape
    (top, bottom), (left, right) = padding
    parts = lax.dot_general(cotangent, kernel, (((3,), (3,)), ((), ())))
    zero = jnp.zeros((), parts.dtype)
    pixels = (
        lax.pad(
            parts[:, :, :, row, column],
            zero,
            (
                (0, 0, 0),
                (row - top, down - 1 - row - bottom, 0),
                (column - left, across - 1 - column - right, 0),
                (0, 0, 0),
            ),
        )
        for row in range(down)
        for column in range(across)
    )
    return sum(pixels)  # type: ignore[return-value]  # There is a pixel or more.


def _ends_of_gradient(sizes: Sequence[int], padding: Padding) -> Padding:
    """The padding of the convolution that is the gradient of one with a kernel of these sizes."""
    first, second = (
        (size - 1 - start, size - 1 - end)
        for size, (start, end) in zip(sizes, padding, strict=True)
    )
    return first, second


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def kernel_gradient(
    x: Float[Array, "batch height width inputs"],
    cotangent: Float[Array, "batch rows columns outputs"],
    padding: Padding,
) -> Float[Array, "down across inputs outputs"]:
    """The gradient of `convolution` in its kernel, for this input and padding."""
    sizes = [
        n + sum(edges) - m + 1
        for n, m, edges in zip(x.shape[1:3], cotangent.shape[1:3], padding, strict=True)
    ]
    if sizes == [1, 1] and padding == ((0, 0), (0, 0)):
        return jnp.einsum("nhwi,nhwo->io", x, cotangent)[None, None]
    # The operand with fewer channels goes first, because that gives fewer and longer patches. The
    # exception: XLA has no fast form for a kernel larger than its images (1 instead of 50 GFLOP/s
    # for ResNet's strided convolutions).
    is_larger = any(n > m for n, m in zip(x.shape[1:3], cotangent.shape[1:3], strict=True))
    if x.shape[3] <= cotangent.shape[3] or is_larger:
        return _channels_over_batch(x, cotangent, padding).transpose(1, 2, 0, 3)
    flipped = _channels_over_batch(cotangent, x, _ends_of_gradient(sizes, padding))
    return jnp.flip(flipped, (1, 2)).transpose(1, 2, 3, 0)


def _channels_over_batch(x: Array, cotangent: Array, padding: Padding) -> Array:
    """The correlation of x and the cotangent with channels and batch exchanged.

    (inputs, down, across, outputs).
    """
    images = lax.optimization_barrier(x.transpose(3, 1, 2, 0))
    kernels = lax.optimization_barrier(cotangent.transpose(1, 2, 0, 3))
    return _correlation(images, kernels, padding)


def _saved(a: Array, b: Array, padding: Padding, of: Callable) -> tuple[Array, tuple[Array, Array]]:
    return of(a, b, padding), (a, b)


def _convolution_backward(
    padding: Padding, saved: tuple[Array, Array], y_bar: Array
) -> tuple[Array, Array]:
    x, kernel = saved
    return input_gradient(y_bar, kernel, padding), kernel_gradient(x, y_bar, padding)


def _input_gradient_backward(
    padding: Padding, saved: tuple[Array, Array], x_bar: Array
) -> tuple[Array, Array]:
    cotangent, kernel = saved
    return convolution(x_bar, kernel, padding), kernel_gradient(x_bar, cotangent, padding)


def _kernel_gradient_backward(
    padding: Padding, saved: tuple[Array, Array], kernel_bar: Array
) -> tuple[Array, Array]:
    x, cotangent = saved
    return input_gradient(cotangent, kernel_bar, padding), convolution(x, kernel_bar, padding)


convolution.defvjp(partial(_saved, of=convolution), _convolution_backward)
input_gradient.defvjp(partial(_saved, of=input_gradient), _input_gradient_backward)
kernel_gradient.defvjp(partial(_saved, of=kernel_gradient), _kernel_gradient_backward)


def _correlation(x: Array, kernel: Array, padding: Padding) -> Array:
    down, across, inputs, outputs = kernel.shape
    if (down, across) == (1, 1):
        return _plain(x, kernel, (1, 1), padding)
    if outputs == 1:
        return _in_blocks(x, kernel, padding, (2, 2))
    if inputs <= FEW_INPUTS and outputs <= MOST_OUTPUTS_IN_BLOCKS:
        return _in_blocks(x, kernel, padding, (1, 4))
    return _plain(x, kernel, (1, 1), padding)


def _plain(x: Array, kernel: Array, strides: tuple[int, int], padding: Padding) -> Array:
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=LAYOUT)


def _in_blocks(x: Array, kernel: Array, padding: Padding, block: tuple[int, int]) -> Array:
    """The same numbers, with every block of outputs computed as the channels of one output of a
    convolution with the block's size as its strides.

    A convolution with few channels leaves most of a vector register empty, or makes short patches.
    """
    down, across = block
    sizes = [
        n + lo + hi - k + 1
        for n, (lo, hi), k in zip(x.shape[1:3], padding, kernel.shape[:2], strict=True)
    ]
    zero = jnp.zeros((), kernel.dtype)  # jnp.pad fails in the second derivative of a scan (0.10.2).
    shifted = [
        lax.pad(kernel, zero, ((i, down - 1 - i, 0), (j, across - 1 - j, 0), (0, 0, 0), (0, 0, 0)))
        for i in range(down)
        for j in range(across)
    ]
    blocks = lax.optimization_barrier(jnp.concatenate(shifted, axis=3))
    (top, bottom), (left, right) = padding
    whole = (top, bottom + -sizes[0] % down), (left, right + -sizes[1] % across)
    y = _plain(x, blocks, block, whole)
    return _depth_to_space(y, down, across)[:, : sizes[0], : sizes[1]]


def _depth_to_space(x: Array, down: int, across: int) -> Array:
    """Turns the channels of every pixel into a block of down x across pixels."""
    batch, height, width, channels = x.shape
    outputs = channels // (down * across)
    x = x.reshape(batch, height, width, down, across, outputs).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, down * height, across * width, outputs)


def strided_convolution(
    x: Array, kernel: Array, strides: tuple[int, int], padding: Padding
) -> Array:
    """`convolution` with strides.

    Every block of stride x stride pixels becomes the channels of one pixel. Each window then starts
    at a whole pixel, and the kernel, padded with zeros to whole blocks, moves by one pixel.
    """
    if strides == (1, 1):
        return convolution(x, kernel, padding)
    axes = zip(x.shape[1:3], kernel.shape[:2], strides, padding, strict=True)
    edges, filled_by = zip(*(_whole_blocks(*axis) for axis in axes), strict=True)
    x = _space_to_depth(_padded(x, edges), *strides)
    filled = jnp.pad(kernel, (*filled_by, (0, 0), (0, 0))).transpose(3, 0, 1, 2)
    kernel = _space_to_depth(filled, *strides).transpose(1, 2, 3, 0)
    return convolution(x, kernel, ((0, 0), (0, 0)))


def _whole_blocks(
    size: int, kernel_size: int, stride: int, edges: tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The padding of one axis of the images and of the kernel to whole blocks of `stride` pixels.

    The end of the images is negative, a crop, if no window reaches their last pixels.
    """
    count = (size + sum(edges) - kernel_size) // stride + 1
    blocks = -(-kernel_size // stride)
    end = (count + blocks - 1) * stride - size - edges[0]
    return (edges[0], end), (0, blocks * stride - kernel_size)


def _padded(x: Array, edges: Padding) -> Array:
    """Images with zeros at their edges, cropped where an edge is negative."""
    rows, columns = edges
    zero = jnp.zeros((), x.dtype)
    return lax.pad(x, zero, [(0, 0, 0), (*rows, 0), (*columns, 0), (0, 0, 0)])


def _space_to_depth(x: Array, down: int, across: int) -> Array:
    """Turns every block of down x across pixels into the channels of one pixel."""
    batch, height, width, channels = x.shape
    blocks = x.reshape(batch, height // down, down, width // across, across, channels)
    blocks = blocks.transpose(0, 1, 3, 2, 4, 5)
    return blocks.reshape(batch, height // down, width // across, down * across * channels)


def grouped_convolution(
    x: Array, kernel: Array, strides: tuple[int, int], padding: Padding, num_groups: int
) -> Array:
    """`strided_convolution` with inputs and outputs in `num_groups` separate groups.

    Computes one convolution per group.
    """
    if num_groups == 1:
        return strided_convolution(x, kernel, strides, padding)
    parts = zip(
        jnp.split(x, num_groups, axis=3), jnp.split(kernel, num_groups, axis=3), strict=True
    )
    return jnp.concatenate(
        [strided_convolution(part, k, strides, padding) for part, k in parts], axis=3
    )


def depthwise_convolution(
    x: Array, kernel: Array, strides: tuple[int, int], padding: Padding
) -> Array:
    """The convolution of every input channel with its own kernels, (down, across, 1, outputs), as a
    sum of elementwise products.
    """
    (rows, columns), outputs = kernel.shape[:2], kernel.shape[3]
    x = jnp.repeat(_padded(x, padding), outputs // x.shape[3], axis=3)
    height, width = (
        (n - k) // stride * stride + 1
        for n, k, stride in zip(x.shape[1:3], kernel.shape[:2], strides, strict=True)
    )

    def product(i: int, j: int) -> Array:
        end = (x.shape[0], i + height, j + width, outputs)
        part = lax.slice(x, (0, i, j, 0), end, (1, *strides, 1))
        return part * kernel[i, j, 0].reshape(1, 1, 1, -1)

    products = (product(i, j) for i in range(rows) for j in range(columns))
    return sum(products)  # type: ignore[return-value]  # There is a product or more.


@jax.custom_vjp
def matrix_product(
    x: Float[Array, "batch inputs"], weights: Float[Array, "inputs outputs"]
) -> Float[Array, "batch outputs"]:
    """x @ weights, differentiable in reverse mode, to any order."""
    # On a CPU the barrier keeps XLA from recomputing x inside the product.
    return lax.optimization_barrier(x) @ weights


def _product_forward(x: Array, weights: Array) -> tuple[Array, tuple[Array, Array]]:
    return matrix_product(x, weights), (x, weights)


def _product_backward(saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    x, weights = saved
    return matrix_product(cotangent, weights.T), matrix_product(x.T, cotangent)


matrix_product.defvjp(_product_forward, _product_backward)
