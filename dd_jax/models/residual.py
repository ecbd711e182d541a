"""ResNets (He et al. 2016): torchvision's for ImageNet, the paper's ResNet-18 among them, and the
usual variant for 32 x 32 images.
"""

from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from dd_jax.models.layers import batch_norm, conv, dense
from dd_jax.models.normalization import Normalization, Normalize
from dd_jax.xla.pooling import Maps, max_pool

EXPANSION = 4  # of a bottleneck's outputs, relative to the stage's features


class ResNet(nn.Module):
    """torchvision's `resnet18` with the defaults: 11,689,512 parameters at 1000 classes.

    Conv-7-64 (stride 2, padding 3), BN, ReLU, MaxPool-3/2 (padding 1); four stages of residual
    blocks with 64, 128, 256 and 512 channels, all but the first halving the size; the mean over
    pixels; FC-`num_classes`. Convolutions have no bias.

    Takes (batch, 224, 224, 3), or images of any other size. Batch normalization uses its stored
    statistics, with and without `train`; with `update_batch_stats` it uses the batch's and updates
    the stored ones (`layers.batch_norm`). Computes in the widest of the dtypes of inputs,
    parameters and statistics.

    Attributes:
      num_blocks: of each stage.
      features: channels of the first stage, and of the first convolution.
      bottleneck_width: None for `ResidualBlock`s; otherwise the blocks are `BottleneckBlock`s, and
        this is the width of their 3x3 convolutions relative to the stage's channels (2 in
        torchvision's `wide_resnet50_2`).
      small_images: the variant for 32 x 32 images: it begins with Conv-3-64, BN, ReLU, and no
        pooling.
      normalization: None for a net that takes normalized inputs. Otherwise the net normalizes them
        itself (`Normalize`), and this is the first value of mu and sigma.
    """

    num_blocks: tuple[int, ...] = (2, 2, 2, 2)
    features: int = 64
    bottleneck_width: int | None = None
    small_images: bool = False
    normalization: Normalization | None = None
    num_classes: int = 1000

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of the images that the net is meant for."""
        return (32, 32, 3) if self.small_images else (224, 224, 3)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        train: bool = False,
        update_batch_stats: bool = False,
    ) -> Float[Array, "batch classes"]:
        """Logits of a batch."""
        norm = {"update_batch_stats": update_batch_stats}
        if self.normalization is not None:
            x = Normalize(self.normalization, name="normalize")(x)
        size, stride = (3, 1) if self.small_images else (7, 2)
        padding = size // 2
        first = conv(
            self.features, size, stride=stride, padding=padding, use_bias=False, name="conv1"
        )
        x = first(x)
        x = nn.relu(batch_norm(**norm, name="bn1")(x))
        if not self.small_images:
            x = max_pool(x, 3, 2, padding=1)
        for stage, blocks in enumerate(self.num_blocks, start=1):
            for block in range(blocks):
                x = self._block(stage, block)(x, **norm)
        return dense(self.num_classes, name="fc")(x.mean(axis=(1, 2)))

    def _block(self, stage: int, block: int) -> nn.Module:
        """A block, its stage counted from 1."""
        features = self.features * 2 ** (stage - 1)
        stride, name = 2 if stage > 1 and block == 0 else 1, f"layer{stage}_{block}"
        if self.bottleneck_width is None:
            return ResidualBlock(features, stride, name=name)
        inner_features = self.bottleneck_width * features
        return BottleneckBlock(EXPANSION * features, inner_features, stride, name=name)


class ResidualBlock(nn.Module):
    """Conv-3, BN, ReLU, Conv-3, BN, plus the shortcut, ReLU.

    The shortcut is the input, or Conv-1, BN of it where the shape changes.
    """

    features: int
    stride: int = 1

    @nn.compact
    def __call__(
        self, x: Maps, update_batch_stats: bool = False
    ) -> Float[Array, "batch down across features"]:
        """Maps (batch, height, width, channels) to (batch, height / stride, width / stride,
        features), sizes rounded up.
        """
        norm = {"update_batch_stats": update_batch_stats}
        plain: dict[str, Any] = {"use_bias": False}
        y = conv(self.features, 3, stride=self.stride, padding=1, **plain, name="conv1")(x)
        y = nn.relu(batch_norm(**norm, name="bn1")(y))
        y = conv(self.features, 3, padding=1, **plain, name="conv2")(y)
        y = batch_norm(**norm, name="bn2")(y)
        return nn.relu(_shortcut(x, y.shape, self.stride, update_batch_stats) + y)


class BottleneckBlock(nn.Module):
    """Conv-1, BN, ReLU, Conv-3, BN, ReLU, Conv-1, BN, plus the shortcut, ReLU.

    The first two convolutions have `inner_features` channels, the last `features`; the 3x3
    convolution has the stride. The shortcut is as in `ResidualBlock`.
    """

    features: int
    inner_features: int
    stride: int = 1

    @nn.compact
    def __call__(
        self, x: Maps, update_batch_stats: bool = False
    ) -> Float[Array, "batch down across features"]:
        """Maps of the same sizes as in `ResidualBlock`."""
        norm = {"update_batch_stats": update_batch_stats}
        inner = self.inner_features
        plain: dict[str, Any] = {"use_bias": False}
        y = conv(inner, 1, **plain, name="conv1")(x)
        y = nn.relu(batch_norm(**norm, name="bn1")(y))
        y = conv(inner, 3, stride=self.stride, padding=1, **plain, name="conv2")(y)
        y = nn.relu(batch_norm(**norm, name="bn2")(y))
        y = batch_norm(**norm, name="bn3")(conv(self.features, 1, **plain, name="conv3")(y))
        return nn.relu(_shortcut(x, y.shape, self.stride, update_batch_stats) + y)


def _shortcut(
    x: Maps, shape: tuple[int, ...], stride: int, update_batch_stats: bool
) -> Float[Array, "batch down across features"]:
    """x, or Conv-1, BN of it where it has not the shape; call it within a block."""
    if x.shape == shape:
        return x
    x = conv(shape[-1], 1, stride=stride, use_bias=False, name="downsample_conv")(x)
    return batch_norm(update_batch_stats=update_batch_stats, name="downsample_bn")(x)
