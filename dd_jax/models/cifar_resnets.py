"""Residual nets with pre-activations for 32 x 32 images of three channels: PreActResNet-18 and
WideResNet-28-10, the usual nets of adversarial training on CIFAR-10.

Layers carry the names of the PyTorch code whose checkpoints are published, up to the parts that
`catalog` renames. Some of that code normalizes the colors inside the net; these nets do not, so the
input must be in the space that the weights were trained in.
"""

from typing import ClassVar

import flax.linen as nn
from jaxtyping import Array, Float

from dd_jax.models.layers import batch_norm, conv, dense
from dd_jax.xla.pooling import Maps


class PreActResNet18(nn.Module):
    """PreActResNet-18 (He et al., "Identity mappings in deep residual networks", ECCV 2016):
    11,172,170 parameters at 10 classes.

    Conv-3-64; four stages of two `PreActBlock`s with 64, 128, 256 and 512 channels, each stage
    after the first halves the size; BN, ReLU; the mean over pixels; FC-`num_classes`. Convolutions
    have no bias.

    This is the variant of Rice, Wong and Kolter (ICML 2020): RobustBench's `PreActResNet` with
    `PreActBlockV2` and `bn_before_fc=True`. RobustBench's plain `PreActResNet18` lacks the BN and
    ReLU before the last layer (11,171,146 parameters) and takes its shortcuts before the block's
    first BN; its weights are other functions and are refused for their missing `bn`.

    Takes (batch, 32, 32, channels), or images of any other size. Batch normalization uses its
    stored statistics, with and without `train`; with `update_batch_stats` it uses the batch's and
    updates the stored ones (`layers.batch_norm`). Computes in the widest of the dtypes of inputs,
    parameters and statistics.
    """

    num_classes: int = 10
    input_shape: ClassVar[tuple[int, int, int]] = (32, 32, 3)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        train: bool = False,
        update_batch_stats: bool = False,
    ) -> Float[Array, "batch classes"]:
        """Logits of a batch."""
        x = conv(64, 3, padding=1, use_bias=False, name="conv1")(x)
        for stage, features in enumerate((64, 128, 256, 512), start=1):
            for block in (0, 1):
                stride = 2 if stage > 1 and block == 0 else 1
                layer = PreActBlock(features, stride, name=f"layer{stage}_{block}")
                x = layer(x, update_batch_stats)
        x = nn.relu(batch_norm(update_batch_stats=update_batch_stats, name="bn")(x))
        return dense(self.num_classes, name="linear")(x.mean(axis=(1, 2)))


class WideResNet28x10(nn.Module):
    """WideResNet-28-10 (Zagoruyko and Komodakis, BMVC 2016): 36,479,194 parameters at 10 classes.

    Conv-3-16; three stages of four `PreActBlock`s with 160, 320 and 640 channels, each stage after
    the first halves the size; BN, ReLU; the mean over pixels; FC-`num_classes`. Convolutions have
    no bias, and there is no dropout. Names are those of TRADES' `wideresnet.py` (Zhang et al., ICML
    2019) without its unused `sub_block1`.

    Inputs, `train`, `update_batch_stats` and dtypes are as in `PreActResNet18`.
    """

    num_classes: int = 10
    input_shape: ClassVar[tuple[int, int, int]] = (32, 32, 3)

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        train: bool = False,
        update_batch_stats: bool = False,
    ) -> Float[Array, "batch classes"]:
        """Logits of a batch."""
        x = conv(16, 3, padding=1, use_bias=False, name="conv1")(x)
        for stage, features in enumerate((160, 320, 640), start=1):
            for block in range(4):
                stride = 2 if stage > 1 and block == 0 else 1
                layer = PreActBlock(features, stride, name=f"block{stage}_{block}")
                x = layer(x, update_batch_stats)
        x = nn.relu(batch_norm(update_batch_stats=update_batch_stats, name="bn1")(x))
        return dense(self.num_classes, name="fc")(x.mean(axis=(1, 2)))


class PreActBlock(nn.Module):
    """BN, ReLU, Conv-3, BN, ReLU, Conv-3, plus the shortcut.

        a = ReLU(BN(x)),    y = Conv(ReLU(BN(Conv(a)))) + shortcut

    The shortcut is x where the shape stays the same, otherwise Conv-1 of a.
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
        plain = {"use_bias": False}
        active = nn.relu(batch_norm(**norm, name="bn1")(x))
        y = conv(self.features, 3, stride=self.stride, padding=1, **plain, name="conv1")(active)
        y = nn.relu(batch_norm(**norm, name="bn2")(y))
        y = conv(self.features, 3, padding=1, **plain, name="conv2")(y)
        if x.shape != y.shape:
            x = conv(self.features, 1, stride=self.stride, **plain, name="shortcut")(active)
        return x + y
