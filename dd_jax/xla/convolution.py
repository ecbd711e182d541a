"""Convolutions and matrix products whose derivatives are of the same plain kind, to any order.

XLA runs a plain convolution (NHWC images, HWIO kernel, stride 1) at full speed on a CPU, but inside
a loop the forms that autodiff makes for its derivatives run up to 100 times slower (jax issue
12868). The derivatives are convolutions themselves,
    y = x * w   =>   x_bar = y_bar * flipped w^T,   w_bar = x^T * y_bar^T   (batch <-> channels),
so they are written out as such here. All three are derivatives of the one number sum(y_bar . (x *
w)), which is linear in each of its arguments: the derivatives of any of them are the other two, to
any order.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

Padding = tuple[tuple[int, int], tuple[int, int]]
LAYOUT = ("NHWC", "HWIO", "NHWC")
# Of an input gradient's pixels over its cotangent's, in one convolution; measured on CPU.
MOST_ZEROS = 1.5
FEWEST_OUTPUTS = 2  # Fewer output channels than this are computed in blocks; measured on CPU.


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolution(
    x: Float[Array, "batch height width inputs"],
    kernel: Float[Array, "down across inputs outputs"],
    padding: Padding,
) -> Float[Array, "batch rows columns outputs"]:
    """Cross-correlation with stride 1, `padding` zeros ((top, bottom), (left, right));
    differentiable in reverse mode.
    """
    return _correlation(x, kernel, padding)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def input_gradient(
    cotangent: Float[Array, "batch rows columns outputs"],
    kernel: Float[Array, "down across inputs outputs"],
    padding: Padding,
) -> Float[Array, "batch height width inputs"]:
    """What `convolution` with this kernel and padding hands back to its input (a transposed
    convolution).
    """
    down, across, inputs, outputs = kernel.shape
    (top, bottom), (left, right) = padding
    sizes = (
        cotangent.shape[1] + down - 1 - top - bottom,
        cotangent.shape[2] + across - 1 - left - right,
    )
    # The barriers keep XLA from folding the transposition back into the slow form.
    if sizes[0] * sizes[1] < MOST_ZEROS * cotangent.shape[1] * cotangent.shape[2]:
        flipped = lax.optimization_barrier(jnp.flip(kernel, (0, 1)).transpose(0, 1, 3, 2))
        return _correlation(
            cotangent,
            flipped,
            ((down - 1 - top, down - 1 - bottom), (across - 1 - left, across - 1 - right)),
        )
    # Most of what the kernel sees would be zeros: its rows are taken one by one, and what they give
    # is added up.
    by_rows = jnp.flip(kernel, 1).transpose(1, 3, 0, 2).reshape(1, across, outputs, down * inputs)
    parts = _correlation(
        cotangent,
        lax.optimization_barrier(by_rows),
        ((0, 0), (across - 1 - left, across - 1 - right)),
    )
    parts, zero = parts.reshape(*parts.shape[:3], down, inputs), jnp.zeros((), parts.dtype)
    edges = [
        ((0, 0, 0), (row - top, down - 1 - row - bottom, 0), (0, 0, 0), (0, 0, 0))
        for row in range(down)
    ]
    return sum(lax.pad(parts[:, :, :, row], zero, edges[row]) for row in range(down))


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def kernel_gradient(
    x: Float[Array, "batch height width inputs"],
    cotangent: Float[Array, "batch rows columns outputs"],
    padding: Padding,
) -> Float[Array, "down across inputs outputs"]:
    """What `convolution` of this input with this padding hands back to its kernel."""
    sizes = [
        n + sum(edges) - m + 1
        for n, m, edges in zip(x.shape[1:3], cotangent.shape[1:3], padding, strict=True)
    ]
    if sizes == [1, 1] and padding == ((0, 0), (0, 0)):
        return jnp.einsum("nhwi,nhwo->io", x, cotangent)[None, None]
    # The operand with fewer channels goes first (fewer, longer patches), but for a kernel larger
    # than its images XLA has no fast form: 1 instead of 50 GFLOP/s for ResNet's strided
    # convolutions.
    is_larger = any(n > m for n, m in zip(x.shape[1:3], cotangent.shape[1:3], strict=True))
    flipped = x.shape[3] > cotangent.shape[3] and not is_larger
    if flipped:
        x, cotangent = cotangent, x
        padding = tuple(
            (k - 1 - lo, k - 1 - hi) for k, (lo, hi) in zip(sizes, padding, strict=True)
        )
    images = lax.optimization_barrier(x.transpose(3, 1, 2, 0))
    kernels = lax.optimization_barrier(cotangent.transpose(1, 2, 0, 3))
    gradient = _correlation(images, kernels, padding)
    return (
        jnp.flip(gradient, (1, 2)).transpose(1, 2, 3, 0)
        if flipped
        else gradient.transpose(1, 2, 0, 3)
    )


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
    if kernel.shape[3] < FEWEST_OUTPUTS and kernel.shape[:2] != (1, 1):
        return _in_blocks(x, kernel, padding)
    return _plain(x, kernel, (1, 1), padding)


def _plain(x: Array, kernel: Array, strides: tuple[int, int], padding: Padding) -> Array:
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=LAYOUT)


def _in_blocks(x: Array, kernel: Array, padding: Padding) -> Array:
    """The same numbers, every 2 x 2 block of outputs computed as the channels of one output of a
    stride-2 convolution.

    A convolution with one output channel (the input gradient of a gray image) leaves most of a
    vector register empty.
    """
    rows, columns, inputs, outputs = kernel.shape
    sizes = [
        n + lo + hi - k + 1
        for n, (lo, hi), k in zip(x.shape[1:3], padding, (rows, columns), strict=True)
    ]
    shifted = [
        jnp.pad(kernel, ((i, 1 - i), (j, 1 - j), (0, 0), (0, 0))) for i in (0, 1) for j in (0, 1)
    ]
    blocks = lax.optimization_barrier(jnp.concatenate(shifted, axis=3))
    padding = tuple((lo, hi + size % 2) for (lo, hi), size in zip(padding, sizes, strict=True))
    y = _plain(x, blocks, (2, 2), padding)
    batch, half_rows, half_columns, _ = y.shape
    y = y.reshape(batch, half_rows, half_columns, 2, 2, outputs).transpose(0, 1, 3, 2, 4, 5)
    return y.reshape(batch, 2 * half_rows, 2 * half_columns, outputs)[:, : sizes[0], : sizes[1]]


def strided_convolution(
    x: Array, kernel: Array, strides: tuple[int, int], padding: Padding
) -> Array:
    """As `convolution`, with strides: every stride x stride block of pixels becomes the channels of
    one pixel.

    A window then starts at a whole pixel, and the kernel, filled up with zeros to whole blocks,
    moves by one.
    """
    if strides == (1, 1):
        return convolution(x, kernel, padding)
    (down, across), (rows, columns) = strides, kernel.shape[:2]
    counts = [
        (n + lo + hi - k) // s + 1
        for n, (lo, hi), k, s in zip(x.shape[1:3], padding, (rows, columns), strides, strict=True)
    ]
    blocks = -(-rows // down), -(-columns // across)
    sizes = [
        (count + block - 1) * s for count, block, s in zip(counts, blocks, strides, strict=True)
    ]
    ends = [size - n - lo for size, n, (lo, _) in zip(sizes, x.shape[1:3], padding, strict=True)]
    edges = [(0, 0, 0), (padding[0][0], ends[0], 0), (padding[1][0], ends[1], 0), (0, 0, 0)]
    x = _space_to_depth(lax.pad(x, jnp.zeros((), x.dtype), edges), down, across)
    filled = jnp.pad(
        kernel, ((0, blocks[0] * down - rows), (0, blocks[1] * across - columns), (0, 0), (0, 0))
    )
    return convolution(
        x,
        _space_to_depth(filled.transpose(3, 0, 1, 2), down, across).transpose(1, 2, 3, 0),
        ((0, 0), (0, 0)),
    )


def _space_to_depth(x: Array, down: int, across: int) -> Array:
    batch, height, width, channels = x.shape
    blocks = x.reshape(batch, height // down, down, width // across, across, channels).transpose(
        0, 1, 3, 2, 4, 5
    )
    return blocks.reshape(batch, height // down, width // across, down * across * channels)


def grouped_convolution(
    x: Array, kernel: Array, strides: tuple[int, int], padding: Padding, num_groups: int
) -> Array:
    """As `strided_convolution`, with inputs and outputs in `num_groups` groups that do not mix: one
    convolution each.
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
    """Every input channel with kernels of its own, (down, across, 1, outputs): a sum of elementwise
    products.
    """
    (down, across), (rows, columns), outputs = strides, kernel.shape[:2], kernel.shape[3]
    x = lax.pad(
        x, jnp.zeros((), x.dtype), [(0, 0, 0), (*padding[0], 0), (*padding[1], 0), (0, 0, 0)]
    )
    x = jnp.repeat(x, outputs // x.shape[3], axis=3)
    ends = ((x.shape[1] - rows) // down) * down + 1, ((x.shape[2] - columns) // across) * across + 1

    def product(i: int, j: int) -> Array:
        part = lax.slice(
            x, (0, i, j, 0), (x.shape[0], i + ends[0], j + ends[1], outputs), (1, down, across, 1)
        )
        return part * kernel[i, j, 0].reshape(1, 1, 1, -1)

    return sum(product(i, j) for i in range(rows) for j in range(columns))


@jax.custom_vjp
def matrix_product(
    x: Float[Array, "batch inputs"], weights: Float[Array, "inputs outputs"]
) -> Float[Array, "batch outputs"]:
    """x @ weights. The barrier keeps XLA on a CPU from recomputing what comes before the product
    inside of it.
    """
    return lax.optimization_barrier(x) @ weights


def _product_forward(x: Array, weights: Array) -> tuple[Array, tuple[Array, Array]]:
    return matrix_product(x, weights), (x, weights)


def _product_backward(saved: tuple[Array, Array], cotangent: Array) -> tuple[Array, Array]:
    x, weights = saved
    return matrix_product(cotangent, weights.T), matrix_product(x.T, cotangent)


matrix_product.defvjp(_product_forward, _product_backward)
