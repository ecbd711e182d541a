"""AlexNet for ImageNet, as in Caffe and as in torchvision. The paper's ResNet-18 is in `residual`.

All take (batch, height, width, 3) and return 1000 logits. Padding is the same on every side, as in
PyTorch and Caffe. "SAME" would shift the windows of a stride of 2 by one pixel, and the published
weights would read the wrong pixels. Each net has its own input space and order of channels:

    alexnet              BGR, (gray levels 0..255 minus Caffe's mean image) / 255
    alexnet_torchvision  RGB, (gray levels / 255 - mean) / std per channel
"""

from typing import Any, ClassVar

import flax.linen as nn
from jaxtyping import Array, Float

from dd_jax.models.layers import (
    batch_dropout,
    conv,
    dense,
    flatten,
    local_response_norm,
)
from dd_jax.xla.pooling import Maps, max_pool

GRAY_LEVELS = 255.0


class AlexNet(nn.Module):
    """Caffe's bvlc_alexnet (Krizhevsky et al. 2012, with its groups for two GPUs): 60,965,224
    parameters at 1000 classes.

    Conv-11-96 (stride 4, valid), ReLU, LRN, MaxPool-3/2; Conv-5-256 (2 groups), ReLU, LRN,
    MaxPool-3/2; Conv-3-384, ReLU; Conv-3-384 (2 groups), ReLU; Conv-3-256 (2 groups), ReLU,
    MaxPool-3/2; FC-4096, ReLU, dropout; FC-4096, ReLU, dropout; FC-`num_classes`. 5x5 and 3x3
    convolutions keep the size. Pooling windows overlap, and the last one may exceed the maps (ceil
    mode).

    Takes (batch, 227, 227, 3), where 1 is a pixel's range of 255 gray levels, and multiplies by 255
    itself. Caffe's weights therefore apply unchanged, and a perturbation is measured in the paper's
    unit. Images of another size of at least 39 pixels are allowed; the size given to `init` is
    fixed. Initial weights are drawn as in Caffe's `train_val.prototxt`.

    With `train`, the random key "dropout" draws one mask per dropout layer for the whole batch
    (`layers.batch_dropout`). Computes in the wider of the dtypes of inputs and parameters.
    """

    num_classes: int = 1000
    input_shape: ClassVar[tuple[int, int, int]] = (227, 227, 3)

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch classes"]:
        """Logits of a batch."""
        x = flatten(_caffe_maps(GRAY_LEVELS * x))
        x = nn.relu(dense(4096, **_drawn(0.005, bias=0.1), name="fc6")(x))
        x = batch_dropout(train=train, name="drop6")(x)
        x = nn.relu(dense(4096, **_drawn(0.005, bias=0.1), name="fc7")(x))
        x = batch_dropout(train=train, name="drop7")(x)
        return dense(self.num_classes, **_drawn(0.01), name="fc8")(x)


def _caffe_maps(x: Maps) -> Float[Array, "batch down across features"]:
    """The convolutional part, from gray levels to maps of 256 channels; call it within the net."""
    x = nn.relu(conv(96, 11, stride=4, **_drawn(0.01), name="conv1")(x))
    x = max_pool(local_response_norm(x), 3, 2, ceil_mode=True)
    x = nn.relu(conv(256, 5, padding=2, groups=2, **_drawn(0.01, bias=0.1), name="conv2")(x))
    x = max_pool(local_response_norm(x), 3, 2, ceil_mode=True)
    x = nn.relu(conv(384, 3, padding=1, **_drawn(0.01), name="conv3")(x))
    x = nn.relu(conv(384, 3, padding=1, groups=2, **_drawn(0.01, bias=0.1), name="conv4")(x))
    x = nn.relu(conv(256, 3, padding=1, groups=2, **_drawn(0.01, bias=0.1), name="conv5")(x))
    return max_pool(x, 3, 2, ceil_mode=True)


def _drawn(std: float, bias: float = 0.0) -> dict[str, Any]:
    """Returns Caffe's initialization of a layer: normal weights, constant biases."""
    return {"kernel_init": nn.initializers.normal(std), "bias_init": nn.initializers.constant(bias)}


class AlexNetTorchvision(nn.Module):
    """torchvision's `alexnet` (Krizhevsky 2014, "one weird trick"): 61,100,840 parameters at 1000
    classes.

    Conv-11-64 (stride 4, padding 2), ReLU, MaxPool-3/2; Conv-5-192, ReLU, MaxPool-3/2; Conv-3-384,
    ReLU; Conv-3-256, ReLU; Conv-3-256, ReLU, MaxPool-3/2; dropout, FC-4096, ReLU; dropout, FC-4096,
    ReLU; FC-`num_classes`. 5x5 and 3x3 convolutions keep the size. torchvision's adaptive pooling
    to 6 x 6 has no effect at 224 x 224 and is left out.

    Takes (batch, 224, 224, 3), or images of another size of at least 63 pixels; the size given to
    `init` is fixed. `train` and dtypes are as in `AlexNet`.
    """

    num_classes: int = 1000
    input_shape: ClassVar[tuple[int, int, int]] = (224, 224, 3)

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch classes"]:
        """Logits of a batch."""
        x = max_pool(nn.relu(conv(64, 11, stride=4, padding=2, name="conv1")(x)), 3, 2)
        x = max_pool(nn.relu(conv(192, 5, padding=2, name="conv2")(x)), 3, 2)
        x = nn.relu(conv(384, 3, padding=1, name="conv3")(x))
        x = nn.relu(conv(256, 3, padding=1, name="conv4")(x))
        x = nn.relu(conv(256, 3, padding=1, name="conv5")(x))
        x = batch_dropout(train=train, name="drop6")(flatten(max_pool(x, 3, 2)))
        x = nn.relu(dense(4096, name="fc6")(x))
        x = batch_dropout(train=train, name="drop7")(x)
        x = nn.relu(dense(4096, name="fc7")(x))
        return dense(self.num_classes, name="fc8")(x)
