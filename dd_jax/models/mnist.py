"""The paper's nets for MNIST: MLP and LeNet (Deep Defense, supplement), for 28 x 28 images of one
channel.

Layers have the same names as in the authors' PyTorch code.
"""

from typing import ClassVar

import flax.linen as nn
from jaxtyping import Array, Float

from dd_jax.models.layers import conv, dense, flatten
from dd_jax.xla.pooling import max_pool


class MLP(nn.Module):
    """FC-500, ReLU, FC-150, ReLU, FC-`num_classes`: 469,160 parameters for 28 x 28 images and 10
    classes.

    Takes inputs of any shape (batch, ...) and flattens them; the size given to `init` is fixed.
    Computes in the wider of the dtypes of inputs and parameters. `train` has no effect.
    """

    num_classes: int = 10
    input_shape: ClassVar[tuple[int, int, int]] = (28, 28, 1)

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch ..."], train: bool = False
    ) -> Float[Array, "batch classes"]:
        """Logits of a batch."""
        x = flatten(x)
        x = nn.relu(dense(500, name="fc1")(x))
        x = nn.relu(dense(150, name="fc2")(x))
        return dense(self.num_classes, name="fc3")(x)


class LeNet(nn.Module):
    """Conv-5-20, MaxPool-2, Conv-5-50, MaxPool-2, FC-500, ReLU, FC-`num_classes`: 431,080
    parameters at 10 classes.

    Convolutions are valid (no padding), and no ReLU follows them. Takes (batch, 28, 28, 1), or
    images of another size of at least 16 pixels; the size given to `init` is fixed. Computes in the
    wider of the dtypes of inputs and parameters. `train` has no effect.
    """

    num_classes: int = 10
    input_shape: ClassVar[tuple[int, int, int]] = (28, 28, 1)

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], train: bool = False
    ) -> Float[Array, "batch classes"]:
        """Logits of a batch."""
        x = max_pool(conv(20, 5, name="conv1")(x), 2, 2)
        x = max_pool(conv(50, 5, name="conv2")(x), 2, 2)
        x = nn.relu(dense(500, name="fc1")(flatten(x)))
        return dense(self.num_classes, name="fc2")(x)
