"""The layers that the nets share, with one initialization for all of them."""

import flax.linen as nn
import jax.numpy as jnp
from flax.typing import Initializer
from jaxtyping import Array, Float

from dd_jax.xla.pooling import Maps

KERNEL_INIT = nn.initializers.he_normal()
"""Keeps the scale of activations through ReLUs, so that plain SGD trains these nets from random
weights.
"""
# The weight of the old running average; PyTorch's `momentum`, 0.1, is the weight of the new value.
RUNNING_MOMENTUM = 0.9


def conv(
    features: int,
    size: int,
    *,
    stride: int = 1,
    padding: int | tuple[tuple[int, int], tuple[int, int]] = 0,
    groups: int = 1,
    use_bias: bool = True,
    kernel_init: Initializer = KERNEL_INIT,
    bias_init: Initializer = nn.initializers.zeros,
    name: str,
) -> nn.Conv:
    """Returns a convolution with square kernels of `size` x `size` pixels.

    `padding` is the number of zeros added on every side, or ((above, below), (left, right)).
    Channels of inputs and outputs are divided into `groups` equal groups, and each group of outputs
    reads its own group of inputs only.
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
    """Returns a fully connected layer, from (batch, inputs) to (batch, features)."""
    return nn.Dense(features, kernel_init=kernel_init, bias_init=bias_init, name=name)


def batch_norm(*, update_batch_stats: bool = False, name: str) -> nn.BatchNorm:
    """Returns a batch normalization with PyTorch's constants.

        y = (x - mean) / sqrt(var + 1e-5) * scale + bias            per channel

    Scale and bias are parameters. Without `update_batch_stats`, mean and var are the running
    averages stored in "batch_stats"; rows are then independent of one another, as attacks need it.
    With it, mean and var are those of the batch, over rows and pixels, and the call updates the
    stored ones (the collection "batch_stats" must be mutable):

        stored = 0.9 stored + 0.1 of the batch

    The stored variance is the biased one (division by n). PyTorch normalizes by the same but stores
    the unbiased one (n - 1).
    """
    return nn.BatchNorm(
        use_running_average=not update_batch_stats,
        momentum=RUNNING_MOMENTUM,
        epsilon=1e-5,
        name=name,
    )


def batch_dropout(*, rate: float = 0.5, train: bool, name: str) -> nn.Dropout:
    """Returns a dropout layer that drops the same units for the whole batch.

    The mask is drawn from the random key "dropout". A key therefore selects one fixed thinned net,
    independent of the batch size and of an example's position in the batch. Attacks need that: they
    call the net repeatedly, each time on the examples that are still active. Without `train`
    nothing is dropped and no key is needed.
    """
    return nn.Dropout(rate, broadcast_dims=(0,), deterministic=not train, name=name)


def local_response_norm(
    x: Maps, *, size: int = 5, alpha: float = 1e-4, beta: float = 0.75, k: float = 1.0
) -> Maps:
    """Local response normalization across channels (Krizhevsky et al. 2012).

        y_c = x_c (k + alpha / size * sum_{|i - c| <= size // 2} x_i^2)^(-beta)

    The sum is over the channels of the same pixel; channels that do not exist count as zero. `size`
    is odd, and alpha is divided by it, as in Caffe (LRN, ACROSS_CHANNELS) and PyTorch. The function
    is smooth for k > 0.
    """
    num_channels, reach = x.shape[-1], size // 2
    squares = jnp.pad(jnp.square(x), ((0, 0), (0, 0), (0, 0), (reach, reach)))
    energy = sum(squares[..., i : i + num_channels] for i in range(size))
    return x * (k + alpha / size * energy) ** -beta


def flatten(x: Float[Array, "batch ..."]) -> Float[Array, "batch entries"]:
    """Flattens each example to one axis in row-major order.

    Maps are read in the order height, width, channels; PyTorch reads channels first.
    """
    return x.reshape(x.shape[0], -1)


def only_pixel(x: Maps) -> Float[Array, "batch channels"]:
    """Removes the axes of height and width, for nets whose last maps are their logits.

    Raises:
      ValueError: the maps are not of 1 x 1 pixel, because the images do not have the size that the
        net takes.
    """
    if x.shape[1:3] != (1, 1):
        raise ValueError(
            f"The net's last maps are {x.shape[1]} x {x.shape[2]} pixels where it needs 1 x 1: "
            "use images of the size that dd_jax.models.input_shape returns."
        )
    return jnp.squeeze(x, axis=(1, 2))
