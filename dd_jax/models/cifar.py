"""The paper's nets for CIFAR-10: ConvNet and NIN (Deep Defense, supplement), for 32 x 32 images of
three channels.

Layers have the same names as in the authors' PyTorch code.
"""

from typing import ClassVar

import flax.linen as nn
from jaxtyping import Array, Float

from dd_jax.models.layers import batch_dropout, conv, only_pixel
from dd_jax.xla.pooling import avg_pool, max_pool


class ConvNet(nn.Module):
    """ConvNet, without fully connected layers: 145,578 parameters at 10 classes.

    Conv-5-32, MaxPool-2, ReLU, Conv-5-32, ReLU, AvgPool-2, Conv-5-64, ReLU, AvgPool-2, Conv-4-64
    (valid), ReLU, Conv-1-`num_classes`. 5x5 convolutions keep the size. In the first stage the ReLU
    follows the pooling, in the others it precedes it.

    Takes (batch, 32, 32, channels); other sizes raise ValueError. Computes in the wider of the
    dtypes of inputs and parameters. `train` has no effect.
    """

    num_classes: int = 10
    input_shape: ClassVar[tuple[int, int, int]] = (32, 32, 3)

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch classes"]:
        """Logits of a batch."""
        x = nn.relu(max_pool(conv(32, 5, padding=2, name="conv1")(x), 2, 2))
        x = avg_pool(nn.relu(conv(32, 5, padding=2, name="conv2")(x)), 2)
        x = avg_pool(nn.relu(conv(64, 5, padding=2, name="conv3")(x)), 2)
        x = nn.relu(conv(64, 4, name="conv4")(x))
        return only_pixel(conv(self.num_classes, 1, name="conv5")(x))


class NIN(nn.Module):
    """Network in network (Lin, Chen, Yan 2014): 966,986 parameters at 10 classes.

    Conv-5-192, Conv-1-160, Conv-1-96, MaxPool-2, dropout, Conv-5-192, Conv-1-192, Conv-1-192,
    AvgPool-2, dropout, Conv-3-192, Conv-1-192, Conv-1-`num_classes`, AvgPool-8. A ReLU follows
    every convolution but the last; 5x5 and 3x3 convolutions keep the size.

    With `train`, the random key "dropout" (`rngs={"dropout": key}`) draws one mask per dropout
    layer, shared by the whole batch: 0 with probability 0.5, else 2 (`layers.batch_dropout`).
    Without `train` there is no dropout, and no key is needed.

    Takes (batch, 32, 32, channels); other sizes raise ValueError. Computes in the wider of the
    dtypes of inputs and parameters.
    """

    num_classes: int = 10
    input_shape: ClassVar[tuple[int, int, int]] = (32, 32, 3)

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch classes"]:
        """Logits of a batch."""
        x = nn.relu(conv(192, 5, padding=2, name="conv1")(x))
        x = nn.relu(conv(160, 1, name="cccp1")(x))
        x = nn.relu(conv(96, 1, name="cccp2")(x))
        x = batch_dropout(train=train, name="dropout1")(max_pool(x, 2, 2))
        x = nn.relu(conv(192, 5, padding=2, name="conv2")(x))
        x = nn.relu(conv(192, 1, name="cccp3")(x))
        x = nn.relu(conv(192, 1, name="cccp4")(x))
        x = batch_dropout(train=train, name="dropout2")(avg_pool(x, 2))
        x = nn.relu(conv(192, 3, padding=1, name="conv3")(x))
        x = nn.relu(conv(192, 1, name="cccp5")(x))
        x = conv(self.num_classes, 1, name="cccp6")(x)
        return only_pixel(avg_pool(x, 8))
