"""The nets of the paper's experiments, as Flax Linen modules, by name.

    model = models.create("lenet")
    variables = model.init(key, jnp.zeros((1, *models.input_shape("lenet"))))
    logits = model.apply(variables, images)

Every net is called as `model.apply(variables, images, train=False)`: images (batch, height, width,
channels) to logits (batch, num_classes), row by row. Variables are {"params": ...}, and for nets
with batch normalization "batch_stats" beside: the statistics they were trained with, which are used
as they stand, also with `train`.
"""

import flax.linen as nn

from dd_jax.models.cifar import NIN, ConvNet
from dd_jax.models.imagenet import AlexNet, AlexNetTorchvision, ResNet18
from dd_jax.models.mnist import MLP, LeNet

_NETS: dict[str, type[nn.Module]] = {
    "mlp": MLP,
    "lenet": LeNet,
    "convnet": ConvNet,
    "nin": NIN,
    "alexnet": AlexNet,
    "alexnet_torchvision": AlexNetTorchvision,
    "resnet18": ResNet18,
}

NAMES: tuple[str, ...] = tuple(_NETS)


def create(name: str, num_classes: int | None = None) -> nn.Module:
    """The net of that name, one of `NAMES`, without weights. ValueError for another name or fewer
    than two classes.

    None stands for the net's own number of classes: 10, or 1000 for the nets for ImageNet.
    """
    if num_classes is None:
        return _net(name)()
    if num_classes < 2:
        raise ValueError(f"num_classes is {num_classes}; a classifier needs at least 2.")
    return _net(name)(num_classes=num_classes)


def input_shape(name: str) -> tuple[int, int, int]:
    """(height, width, channels) of the images that the net of that name is made for. ValueError for
    another name.
    """
    return _net(name).input_shape


def _net(name: str) -> type[nn.Module]:
    if name not in _NETS:
        raise ValueError(f"There is no net {name!r}; the nets are {', '.join(NAMES)}.")
    return _NETS[name]
