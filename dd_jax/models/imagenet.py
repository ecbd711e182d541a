"""The paper's nets for ImageNet: AlexNet as in Caffe, AlexNet as in torchvision, and ResNet-18 as
in torchvision.

All take (batch, height, width, 3) and give 1000 logits. Padding is PyTorch's and Caffe's, the same
on every side, never "SAME": with a stride of 2 that shifts the windows by a pixel, and the
published weights would read the wrong ones. Each net has its own input space, and channel order:

    alexnet              BGR, (gray levels 0..255 minus Caffe's mean image) / 255
    alexnet_torchvision  RGB, (gray levels / 255 - mean) / std per channel
    resnet18             RGB, likewise
"""

from typing import Any, ClassVar

import flax.linen as nn
from jaxtyping import Array, Float

from dd_jax.models.layers import (
    batch_dropout,
    conv,
    dense,
    fixed_batch_norm,
    flatten,
    local_response_norm,
)
from dd_jax.xla.pooling import Maps, max_pool

GRAY_LEVELS = 255.0


class AlexNet(nn.Module):
    """Caffe's bvlc_alexnet (Krizhevsky et al. 2012 on two GPUs' worth of groups): 60,965,224
    parameters at 1000 classes.

    Conv-11-96 (stride 4, valid), ReLU, LRN, MaxPool-3/2; Conv-5-256 (2 groups), ReLU, LRN,
    MaxPool-3/2; Conv-3-384, ReLU; Conv-3-384 (2 groups), ReLU; Conv-3-256 (2 groups), ReLU,
    MaxPool-3/2; FC-4096, ReLU, dropout; FC-4096, ReLU, dropout; FC-`num_classes`. 5x5 and 3x3
    convolutions keep the size. Pooling windows overlap, and run over the end (ceil mode).

    Takes (batch, 227, 227, 3) in units of 1/255 of a pixel's range, and multiplies by 255 itself:
    Caffe's weights serve as they are, and a perturbation is measured in the paper's unit. Images of
    another size of at least 39 pixels will do, which `init` fixes. Fresh weights are drawn as in
    Caffe's `train_val.prototxt`.

    With `train`, the key "dropout" thins it by one mask for the whole batch
    (`layers.batch_dropout`). Computes in the wider of the dtypes of inputs and parameters.
    """

    num_classes: int = 1000
    input_shape: ClassVar[tuple[int, int, int]] = (227, 227, 3)

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch classes"]:
        """Logits of a batch."""
        x = nn.relu(conv(96, 11, stride=4, **_drawn(0.01), name="conv1")(GRAY_LEVELS * x))
        x = max_pool(local_response_norm(x), 3, 2, ceil_mode=True)
        x = nn.relu(conv(256, 5, padding=2, groups=2, **_drawn(0.01, bias=0.1), name="conv2")(x))
        x = max_pool(local_response_norm(x), 3, 2, ceil_mode=True)
        x = nn.relu(conv(384, 3, padding=1, **_drawn(0.01), name="conv3")(x))
        x = nn.relu(conv(384, 3, padding=1, groups=2, **_drawn(0.01, bias=0.1), name="conv4")(x))
        x = nn.relu(conv(256, 3, padding=1, groups=2, **_drawn(0.01, bias=0.1), name="conv5")(x))
        x = flatten(max_pool(x, 3, 2, ceil_mode=True))
        x = nn.relu(dense(4096, **_drawn(0.005, bias=0.1), name="fc6")(x))
        x = batch_dropout(train=train, name="drop6")(x)
        x = nn.relu(dense(4096, **_drawn(0.005, bias=0.1), name="fc7")(x))
        x = batch_dropout(train=train, name="drop7")(x)
        return dense(self.num_classes, **_drawn(0.01), name="fc8")(x)


def _drawn(std: float, bias: float = 0.0) -> dict[str, Any]:
    """Caffe's fillers: normal weights, constant biases."""
    return {"kernel_init": nn.initializers.normal(std), "bias_init": nn.initializers.constant(bias)}


class AlexNetTorchvision(nn.Module):
    """torchvision's `alexnet` (Krizhevsky 2014, "one weird trick"): 61,100,840 parameters at 1000
    classes.

    Conv-11-64 (stride 4, padding 2), ReLU, MaxPool-3/2; Conv-5-192, ReLU, MaxPool-3/2; Conv-3-384,
    ReLU; Conv-3-256, ReLU; Conv-3-256, ReLU, MaxPool-3/2; dropout, FC-4096, ReLU; dropout, FC-4096,
    ReLU; FC-`num_classes`. 5x5 and 3x3 convolutions keep the size. torchvision's adaptive pooling
    to 6 x 6 does nothing at 224 x 224, and is left out.

    Takes (batch, 224, 224, 3), or images of another size of at least 63 pixels, which `init` fixes.
    `train` and dtypes as in `AlexNet`.
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


class ResNet18(nn.Module):
    """torchvision's `resnet18` (He et al. 2016): 11,689,512 parameters at 1000 classes.

    Conv-7-64 (stride 2, padding 3), BN, ReLU, MaxPool-3/2 (padding 1); four stages of two residual
    blocks with 64, 128, 256 and 512 channels, all but the first halving the size; the mean over
    pixels; FC-`num_classes`. Convolutions have no bias.

    Takes (batch, 224, 224, 3), or images of any other size. Batch normalization runs on stored
    statistics in any case (`layers.fixed_batch_norm`), so `train` makes no difference. Computes in
    the wider of the dtypes of inputs and parameters; what batch normalization does with its
    statistics, in the wider of theirs too.
    """

    num_classes: int = 1000
    input_shape: ClassVar[tuple[int, int, int]] = (224, 224, 3)

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch classes"]:
        """Logits of a batch."""
        x = fixed_batch_norm(name="bn1")(
            conv(64, 7, stride=2, padding=3, use_bias=False, name="conv1")(x)
        )
        x = max_pool(nn.relu(x), 3, 2, padding=1)
        for stage, features in enumerate((64, 128, 256, 512), start=1):
            x = ResidualBlock(features, stride=1 if stage == 1 else 2, name=f"layer{stage}_0")(x)
            x = ResidualBlock(features, name=f"layer{stage}_1")(x)
        return dense(self.num_classes, name="fc")(x.mean(axis=(1, 2)))


class ResidualBlock(nn.Module):
    """Conv-3, BN, ReLU, Conv-3, BN, plus the input, ReLU; where the shape changes the input passes
    Conv-1, BN.
    """

    features: int
    stride: int = 1

    @nn.compact
    def __call__(self, x: Maps) -> Float[Array, "batch down across features"]:
        """(batch, height, width, channels) to (batch, height / stride, width / stride, features),
        rounded up.
        """
        plain = {"use_bias": False}
        y = conv(self.features, 3, stride=self.stride, padding=1, **plain, name="conv1")(x)
        y = nn.relu(fixed_batch_norm(name="bn1")(y))
        y = fixed_batch_norm(name="bn2")(
            conv(self.features, 3, padding=1, **plain, name="conv2")(y)
        )
        if x.shape != y.shape:
            x = conv(self.features, 1, stride=self.stride, **plain, name="downsample_conv")(x)
            x = fixed_batch_norm(name="downsample_bn")(x)
        return nn.relu(x + y)
