"""First weights fitted to data, for nets in which He's initialization leaves little of the images.

Behind NIN's nine ReLUs, whitened CIFAR-10 images look alike, and SGD stays on the first plateau for
long. One pass over a few images mends that: layer by layer, kernel and bias are scaled and shifted
so that every channel of the layer's outputs has mean 0 and standard deviation 1 over these images,
as in Salimans and Kingma, "Weight normalization" (NeurIPS 2016), section 3.
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
    """`params`, with every convolution and dense layer of the net scaled and shifted to channels of
    mean 0 and deviation 1.

        y = x W + b,    W' = W / deviation(y),    b' = (b - mean(y)) / deviation(y)

    `images` are inputs of the net, some dozens; mean and deviation are over them and over the
    pixels. Every layer sees what the layers before it give once they are centered. Channels that
    are constant, and layers without a bias, stay as they are.
    """

    def moments(params: Any, images: Array) -> Moments:
        found: Moments = {}

        def center(next_fn: Any, args: Any, kwargs: Any, context: Any) -> Any:
            y, layer = next_fn(*args, **kwargs), context.module
            if (
                not isinstance(layer, (nn.Conv, nn.Dense))
                or not layer.use_bias
                or context.method_name != "__call__"
            ):
                return y
            axes = tuple(range(y.ndim - 1))
            mean, deviation = y.mean(axes, keepdims=True), y.std(axes, keepdims=True)
            mean, deviation = (
                jnp.where(deviation > 0, mean, 0),
                jnp.where(deviation > 0, deviation, 1),
            )
            found[layer.path] = mean.ravel(), deviation.ravel()
            return (y - mean) / deviation

        with nn.intercept_methods(center):
            model.apply({"params": params}, images)
        return found

    flat = flatten_dict(params)
    for path, (mean, deviation) in jax.jit(moments)(params, images).items():
        kernel, bias = (*path, "kernel"), (*path, "bias")
        flat[kernel] = flat[kernel] / deviation.reshape((1,) * (flat[kernel].ndim - 1) + (-1,))
        flat[bias] = (flat[bias] - mean) / deviation
    return unflatten_dict(flat)
