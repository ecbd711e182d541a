"""Residual nets with pre-activations for 32 x 32 images of three channels: WideResNets and
PreActResNets, the usual nets of adversarial training on CIFAR.

One module computes all of them. They differ in their stages, their activation, their shortcuts and
in where strided convolutions pad; `families` has the published combinations and their PyTorch
names.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from dd_jax.models.layers import KERNEL_INIT, batch_norm, conv, dense
from dd_jax.models.normalization import NONE, Normalization, Normalize, standardized
from dd_jax.norms import lp_norm
from dd_jax.xla.pooling import Maps

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {"relu": nn.relu, "silu": nn.silu}
"""By name; SiLU is also called Swish. "pssilu" is the third: its two numbers are parameters."""
SHORTCUTS = ("activated", "input", "padded_input")
_SYMMETRIC, _AFTER = 1, ((0, 1), (0, 1))  # What a 3x3 convolution pads with zeros.
_MIN_ROOT = 1e-12  # The smallest length that the cosine layer divides by, as PyTorch's normalize.


class PreActivationNet(nn.Module):
    """A residual net with pre-activations (He et al., "Identity mappings in deep residual
    networks", ECCV 2016; Zagoruyko and Komodakis, BMVC 2016).

    (x - mu) / sigma; Conv-3-`stem_features`; the stages of `PreActivationBlock`s, each stage after
    the first halves the size; BN, activation; the mean over pixels; FC-`num_classes`. Convolutions
    have no bias, and there is no dropout.

    Takes (batch, 32, 32, 3), or images of any other size, usually with entries in [0, 1]: mu and
    sigma are part of the net, in its "batch_stats", and stay as they are in training (`Normalize`).
    Batch normalization uses its stored statistics, with and without `train`; with
    `update_batch_stats` it uses the batch's and updates the stored ones (`layers.batch_norm`).
    Computes in the widest of the dtypes of inputs, parameters and statistics.

    Attributes:
      stages: (channels, number of blocks) of each stage.
      stem_features: channels of the first convolution.
      activation: a name of `ACTIVATIONS`, or "pssilu" (Dai et al. 2021): one pair of parameters
        for all activations of the net.
      shortcut: where a block changes the shape, the source of its shortcut. "activated": Conv-1 of
        the activated input; "input": Conv-1 of the input; "padded_input": Conv-3 of the input.
      pads_after: convolutions of stride 2 pad below and on the right only, as TensorFlow does,
        instead of on every side.
      final_norm: whether BN and the activation precede the mean over pixels.
      mean_sparse: sets values close to their mean to this mean, after BN and blocks (`MeanSparse`).
      cosine: the logits are the cosines between the features and the columns of the last layer
        (Pang et al. 2020), which has no bias.
      standardizing: standardizes each image instead of (x - mu) / sigma (`standardized`).
      normalization: the first mu and sigma.
    """

    stages: tuple[tuple[int, int], ...]
    stem_features: int = 16
    activation: str = "relu"
    shortcut: str = "activated"
    pads_after: bool = False
    final_norm: bool = True
    mean_sparse: bool = False
    cosine: bool = False
    standardizing: bool = False
    normalization: Normalization = NONE
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
        norm = {"update_batch_stats": update_batch_stats}
        activation_fn = self._activation()
        x = standardized(x) if self.standardizing else self._normalize()(x)
        x = conv(self.stem_features, 3, padding=1, use_bias=False, name="stem")(x)
        for stage, (features, num_blocks) in enumerate(self.stages, start=1):
            for block in range(num_blocks):
                x = PreActivationBlock(
                    features,
                    activation_fn,
                    stride=2 if stage > 1 and block == 0 else 1,
                    shortcut=self.shortcut,
                    pads_after=self.pads_after,
                    mean_sparse=self.mean_sparse,
                    name=f"stage{stage}_block{block}",
                )(x, **norm)
        if self.final_norm:
            x = batch_norm(**norm, name="norm")(x)
            if self.mean_sparse:
                x = MeanSparse(name="sparse")(x)
            x = activation_fn(x)
        head = CosineLayer if self.cosine else dense
        return head(self.num_classes, name="head")(x.mean(axis=(1, 2)))

    def _activation(self) -> Callable[[Array], Array]:
        if self.activation == "pssilu":
            return PSSiLU(name="activation")
        return ACTIVATIONS[self.activation]

    def _normalize(self) -> Normalize:
        return Normalize(self.normalization, name="normalize")


class PreActivationBlock(nn.Module):
    """BN, activation, Conv-3, BN, activation, Conv-3, plus the shortcut.

        a = act(BN(x)),    y = Conv(act(BN(Conv(a)))) + shortcut

    The shortcut is x where the shape stays the same. Attributes are those of `PreActivationNet`.
    """

    features: int
    activation_fn: Callable[[Array], Array] = nn.relu
    stride: int = 1
    shortcut: str = "activated"
    pads_after: bool = False
    mean_sparse: bool = False

    @nn.compact
    def __call__(
        self, x: Maps, update_batch_stats: bool = False
    ) -> Float[Array, "batch down across features"]:
        """Maps (batch, height, width, channels) to (batch, height / stride, width / stride,
        features), sizes rounded up (rounded down where the convolution `pads_after`).
        """
        norm = {"update_batch_stats": update_batch_stats}
        plain: dict[str, Any] = {"use_bias": False}
        padding = _AFTER if self.pads_after and self.stride == 2 else _SYMMETRIC
        strided = {"stride": self.stride, "padding": padding, **plain}
        active = self.activation_fn(self._sparse(0, batch_norm(**norm, name="norm1")(x)))
        y = conv(self.features, 3, **strided, name="conv1")(active)
        y = self.activation_fn(self._sparse(1, batch_norm(**norm, name="norm2")(y)))
        y = conv(self.features, 3, padding=1, **plain, name="conv2")(y)
        if x.shape != y.shape:
            source = active if self.shortcut == "activated" else x
            if self.shortcut == "padded_input":
                x = conv(self.features, 3, **strided, name="shortcut")(source)
            else:
                x = conv(self.features, 1, stride=self.stride, **plain, name="shortcut")(source)
        return self._sparse(2, x + y)

    def _sparse(self, place: int, x: Maps) -> Maps:
        return MeanSparse(name=f"sparse{place}")(x) if self.mean_sparse else x


class MeanSparse(nn.Module):
    """Sets values that are close to their channel's mean to this mean (Amini et al. 2024).

        y = mean    where |x - mean| < threshold * sqrt(var),    y = x    elsewhere

    mean, var (channels,) and threshold () are stored in "batch_stats" and never change; a new
    layer, with threshold 0, is the identity. The derivative is 0 where y is the mean.
    """

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        """Maps to maps of the same shape."""
        shape = (x.shape[-1],)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape).value
        var = self.variable("batch_stats", "var", jnp.ones, shape).value
        threshold = self.variable("batch_stats", "threshold", jnp.zeros, ()).value
        mean, crop = (each[None, None, None] for each in (mean, threshold * jnp.sqrt(var)))
        return jnp.where(jnp.abs(x - mean) < crop, mean, x).astype(x.dtype)


class PSSiLU(nn.Module):
    """Parametric shifted SiLU (Dai, Mahloujifar, Mittal 2021), of |alpha| and |beta|.

    y = x (sigmoid(alpha x) - beta) / (1 - beta)
    """

    @nn.compact
    def __call__(self, x: Maps) -> Maps:
        """Maps to maps of the same shape."""
        alpha, beta = (
            jnp.abs(self.param(name, nn.initializers.constant(value), (1,)))[0]
            for name, value in (("alpha", 1.0), ("beta", 1e-8))
        )
        return x * (nn.sigmoid(alpha * x) - beta) / (1 - beta)


class CosineLayer(nn.Module):
    """Cosines between features and the columns of the kernel, (batch, inputs) to (batch,
    features).
    """

    features: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch inputs"]) -> Float[Array, "batch features"]:
        """A cosine per column; 0 for features that are all zero."""
        kernel = self.param("kernel", KERNEL_INIT, (x.shape[-1], self.features))
        lengths = (jnp.maximum(lp_norm(rows, "l2"), _MIN_ROOT) for rows in (x, kernel.T))
        of_features, of_columns = lengths
        return (x @ kernel) / (of_features[:, None] * of_columns[None])
