"""Initial weights that are fitted to images.

NIN needs them: with He's initialization, the outputs behind its nine ReLUs differ little between
whitened CIFAR-10 images, and SGD stays on the first plateau for long. One pass over a few images
corrects that. Layer by layer, it scales and shifts kernel and bias so that every channel of the
layer's outputs has mean 0 and standard deviation 1 over these images (Salimans and Kingma, "Weight
normalization", NeurIPS 2016, section 3).
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float

# Mean and deviation of each channel, by the layer's path.
Moments = dict[tuple[str, ...], tuple[Array, Array]]


def centered(model: nn.Module, params: Any, images: Float[Array | np.ndarray, "batch ..."]) -> Any:
    """Returns `params` with every convolution and dense layer scaled and shifted to channels of
    mean 0 and deviation 1.

        y = x W + b,    W' = W / deviation(y),    b' = (b - mean(y)) / deviation(y)

    `images` are some dozens of inputs of the net; mean and deviation are over these images and over
    the pixels. Each layer reads the outputs of the layers before it after they were centered.
    Channels that are constant, and layers without a bias, stay as they are.
    """
    moments = jax.jit(lambda params, images: _moments(model, params, images))(params, images)
    flat = flatten_dict(params)
    for path, (mean, deviation) in moments.items():
        kernel, bias = (*path, "kernel"), (*path, "bias")
        flat[kernel] = flat[kernel] / deviation.reshape((1,) * (flat[kernel].ndim - 1) + (-1,))
        flat[bias] = (flat[bias] - mean) / deviation
    return unflatten_dict(flat)


def _moments(model: nn.Module, params: Any, images: Array) -> Moments:
    """Returns the moments of each layer's outputs, where the layers before it are centered."""
    found: Moments = {}

    def center(next_fn: Any, args: Any, kwargs: Any, context: Any) -> Any:
        y, layer = next_fn(*args, **kwargs), context.module
        if not _is_centered(layer) or context.method_name != "__call__":
            return y
        mean, deviation = _channel_moments(y)
        found[layer.path] = mean.ravel(), deviation.ravel()
        return (y - mean) / deviation

    with nn.intercept_methods(center):
        model.apply({"params": params}, images)
    return found


def _is_centered(layer: nn.Module) -> bool:
    return isinstance(layer, (nn.Conv, nn.Dense)) and layer.use_bias


def _channel_moments(y: Array) -> tuple[Array, Array]:
    """Returns mean and deviation over all axes but the last; 0 and 1 for constant channels."""
    axes = tuple(range(y.ndim - 1))
    mean, deviation = y.mean(axes, keepdims=True), y.std(axes, keepdims=True)
    return jnp.where(deviation > 0, mean, 0), jnp.where(deviation > 0, deviation, 1)
