"""Layers with the initialisation chosen for all the nets."""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from dd_jax.pooling import Maps

KERNEL_INIT = nn.initializers.he_normal()
"""Keeps the scale of activations through ReLUs, so that plain SGD trains these nets from scratch."""


def conv(features: int, size: int, *, padding: int = 0, name: str) -> nn.Conv:
    """A convolution with stride 1 and square kernels of `size` pixels; `padding` zeros on every side, 0 is "valid"."""
    return nn.Conv(features, (size, size), padding=padding, kernel_init=KERNEL_INIT, name=name)


def dense(features: int, *, name: str) -> nn.Dense:
    """A fully connected layer: (batch, inputs) to (batch, features)."""
    return nn.Dense(features, kernel_init=KERNEL_INIT, name=name)


def flatten(x: Float[Array, "batch ..."]) -> Float[Array, "batch entries"]:
    """Gives every example one axis, row-major: maps become height, width, channels (PyTorch's: channels first)."""
    return x.reshape(x.shape[0], -1)


def only_pixel(x: Maps) -> Float[Array, "batch channels"]:
    """(batch, 1, 1, channels) to (batch, channels), for nets whose last maps are their logits.

    ValueError where maps have more pixels: the images do not have the size that the net is made for.
    """
    if x.shape[1:3] != (1, 1):
        raise ValueError(
            f"The net's last maps are {x.shape[1]} x {x.shape[2]} pixels where it needs 1 x 1: "
            "give it images of the size that dd_jax.models.input_shape names."
        )
    return jnp.squeeze(x, axis=(1, 2))
