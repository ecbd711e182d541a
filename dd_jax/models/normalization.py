"""Normalization of the inputs within a net, so that the net takes images with entries in [0, 1] and
perturbations are measured there.
"""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from dd_jax.norms import lp_norm

Images = Float[Array, "batch height width channels"]


class Normalization(NamedTuple):
    """(x - mean) / std per channel; one number each stands for all channels."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


NONE = Normalization((0.0,), (1.0,))
CIFAR10 = Normalization((0.4914, 0.4822, 0.4465), (0.2471, 0.2435, 0.2616))
CIFAR100 = Normalization((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762))
IMAGENET = Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CENTERED = Normalization((0.5,), (0.5,))
"""[0, 1] becomes [-1, 1]."""
NORMALIZATIONS: dict[str, Normalization] = {
    "none": NONE,
    "cifar10": CIFAR10,
    "cifar100": CIFAR100,
    "imagenet": IMAGENET,
    "centered": CENTERED,
}
"""By name, in RGB. Those of CIFAR have the digits of DeepMind's and RobustBench's code."""


class Normalize(nn.Module):
    """(x - mu) / sigma per channel.

    mu and sigma, (channels,), are in "batch_stats": they are stored with the net's statistics, no
    optimizer changes them, and training the statistics does not change them either. `normalization`
    is their first value; with `NONE` the layer returns its inputs bitwise.
    """

    normalization: Normalization = NONE

    @nn.compact
    def __call__(self, x: Images) -> Images:
        """Images to images of the same shape."""
        channels = (x.shape[-1],)
        mu, sigma = (
            self.variable(
                "batch_stats",
                name,
                lambda v=value: jnp.broadcast_to(jnp.array(v, jnp.float32), channels),
            ).value
            for name, value in zip(("mu", "sigma"), self.normalization, strict=True)
        )
        return (x - mu[None, None, None]) / sigma[None, None, None]


def standardized(x: Images) -> Images:
    """Each image minus its mean, divided by its standard deviation, over pixels and channels.

        (x - mean) / max(std, 1 / sqrt(n))    with n entries, std of n - 1 degrees of freedom

    As in TensorFlow's `per_image_standardization` and Ding et al. (MMA, 2020). An image of one
    value becomes 0, and the gradient at it is finite.
    """
    num_entries = x[0].size
    centered = x - x.mean(axis=(1, 2, 3), keepdims=True)
    std = lp_norm(centered, "l2") / (num_entries - 1) ** 0.5
    return centered / jnp.maximum(std, num_entries**-0.5)[:, None, None, None]
