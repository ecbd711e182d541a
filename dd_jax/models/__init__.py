"""The nets of the paper's experiments, as Flax Linen modules, by name.

    model = models.create("lenet")
    params = model.init(key, jnp.zeros((1, *models.input_shape("lenet"))))["params"]
    logits = model.apply({"params": params}, images)

Every net is called as `model.apply(variables, images, train=False)`: images (batch, height, width, channels) to logits
(batch, num_classes), row by row.
"""

import flax.linen as nn

from dd_jax.models.cifar import NIN, ConvNet
from dd_jax.models.mnist import MLP, LeNet

_NETS: dict[str, type[nn.Module]] = {"mlp": MLP, "lenet": LeNet, "convnet": ConvNet, "nin": NIN}

NAMES: tuple[str, ...] = tuple(_NETS)


def create(name: str, num_classes: int = 10) -> nn.Module:
    """The net of that name, one of `NAMES`, without weights. ValueError for another name or fewer than two classes."""
    if num_classes < 2:
        raise ValueError(f"num_classes is {num_classes}; a classifier needs at least 2.")
    return _net(name)(num_classes=num_classes)


def input_shape(name: str) -> tuple[int, int, int]:
    """(height, width, channels) of the images that the net of that name is made for. ValueError for another name."""
    return _net(name).input_shape


def _net(name: str) -> type[nn.Module]:
    if name not in _NETS:
        raise ValueError(f"There is no net {name!r}; the nets are {', '.join(NAMES)}.")
    return _NETS[name]
