"""Layers with the initialization chosen for all the nets."""

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Initializer
from jaxtyping import Array, Float

from dd_jax.xla.pooling import Maps

KERNEL_INIT = nn.initializers.he_normal()
"""Keeps the scale of activations through ReLUs, so that plain SGD trains these nets from scratch.
"""


def conv(
    features: int,
    size: int,
    *,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
    use_bias: bool = True,
    kernel_init: Initializer = KERNEL_INIT,
    bias_init: Initializer = nn.initializers.zeros,
    name: str,
) -> nn.Conv:
    """A convolution with square kernels of `size` pixels; `padding` zeros on every side, 0 is
    "valid".

    With `groups`, inputs and outputs fall into that many equal groups of channels that do not mix.
    """
    return nn.Conv(
        features,
        (size, size),
        strides=stride,
        padding=padding,
        feature_group_count=groups,
        use_bias=use_bias,
        kernel_init=kernel_init,
        bias_init=bias_init,
        name=name,
    )


def dense(
    features: int,
    *,
    kernel_init: Initializer = KERNEL_INIT,
    bias_init: Initializer = nn.initializers.zeros,
    name: str,
) -> nn.Dense:
    """A fully connected layer: (batch, inputs) to (batch, features)."""
    return nn.Dense(features, kernel_init=kernel_init, bias_init=bias_init, name=name)


def fixed_batch_norm(*, name: str) -> nn.BatchNorm:
    """Batch normalization on its stored statistics, always: rows stay independent of one another,
    as attacks need it.

        y = (x - mean) / sqrt(var + 1e-5) * scale + bias          per channel; the 1e-5 is PyTorch's

    Scale and bias are parameters; mean and var are the collection "batch_stats", which nothing here
    updates.
    """
    return nn.BatchNorm(use_running_average=True, epsilon=1e-5, name=name)


def batch_dropout(*, rate: float = 0.5, train: bool, name: str) -> nn.Dropout:
    """Dropout with ONE mask for the whole batch, drawn from the key "dropout"; without `train`
    nothing is dropped.

    A key is then one fixed thinned net, whatever the batch's size and an example's place in it:
    attacks call the net again and again, each time on the examples that are still active.
    """
    return nn.Dropout(rate, broadcast_dims=(0,), deterministic=not train, name=name)


def local_response_norm(
    x: Maps, *, size: int = 5, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Maps:
    """Divides every element by a power of the energy of its neighbors across channels, at the same
    pixel.

        y_c = x_c (k + alpha / size * sum_{|i - c| <= size // 2} x_i^2)^(-beta)  outside: zero

    `size` is odd; alpha is divided by it, as in Caffe (LRN, ACROSS_CHANNELS) and PyTorch. Smooth
    for k > 0.
    """
    num_channels, reach = x.shape[-1], size // 2
    squares = jnp.pad(jnp.square(x), ((0, 0), (0, 0), (0, 0), (reach, reach)))
    energy = sum(squares[..., i : i + num_channels] for i in range(size))
    return x * (k + alpha / size * energy) ** -beta


def flatten(x: Float[Array, "batch ..."]) -> Float[Array, "batch entries"]:
    """Gives every example one axis, row-major: maps become height, width, channels (PyTorch's:
    channels first).
    """
    return x.reshape(x.shape[0], -1)


def only_pixel(x: Maps) -> Float[Array, "batch channels"]:
    """(batch, 1, 1, channels) to (batch, channels), for nets whose last maps are their logits.

    ValueError where maps have more pixels: the images do not have the size that the net is made
    for.
    """
    if x.shape[1:3] != (1, 1):
        raise ValueError(
            f"The net's last maps are {x.shape[1]} x {x.shape[2]} pixels where it needs 1 x 1: "
            "give it images of the size that dd_jax.models.input_shape names."
        )
    return jnp.squeeze(x, axis=(1, 2))
