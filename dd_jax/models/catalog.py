"""The nets by name. A new net is one entry of `NETS`.

An entry names the Flax module and says what PyTorch's weights of that net do not show in their
shapes; `dd_jax.pretrained` reads the second part.
"""

from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn

from dd_jax.models.cifar import NIN, ConvNet
from dd_jax.models.cifar_resnets import PreActResNet18, WideResNet28x10
from dd_jax.models.imagenet import AlexNet, AlexNetTorchvision, ResNet18
from dd_jax.models.mnist import MLP, LeNet


class TorchLayout(NamedTuple):
    """The differences between the names and axes of PyTorch's weights and of ours.

    Attributes:
      head: our name of the last layer, which has one output per class.
      flattened: from our name of a linear layer that reads flattened maps to the shape of these
        maps, (channels, height, width). PyTorch flattens them channels first, Flax channels last.
      renamed: from our name of a layer, or of one part of its path, to PyTorch's name. Names that
        are not listed are equal.
    """

    head: str
    flattened: Mapping[str, tuple[int, int, int]] = {}
    renamed: Mapping[str, str] = {}


class Net(NamedTuple):
    """One net: the Flax module, with its `input_shape` and default `num_classes`, and the layout of
    its PyTorch weights.
    """

    module: type[nn.Module]
    torch_layout: TorchLayout


_TORCHVISION_ALEXNET = {
    **{f"conv{i}": f"features.{place}" for i, place in enumerate((0, 3, 6, 8, 10), start=1)},
    **{f"fc{i}": f"classifier.{place}" for i, place in enumerate((1, 4, 6), start=6)},
}
_STAGES_OF_TWO_BLOCKS = {
    f"layer{stage}_{block}": f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)
}
_TORCHVISION_RESNET = {
    **_STAGES_OF_TWO_BLOCKS,
    "downsample_conv": "downsample.0",
    "downsample_bn": "downsample.1",
}
_TRADES_WIDE_RESNET = {
    **{
        f"block{stage}_{block}": f"block{stage}.layer.{block}"
        for stage in (1, 2, 3)
        for block in range(4)
    },
    "shortcut": "convShortcut",
}

NETS: dict[str, Net] = {
    "mlp": Net(MLP, TorchLayout("fc3", flattened={"fc1": (1, 28, 28)})),
    "lenet": Net(LeNet, TorchLayout("fc2", flattened={"fc1": (50, 4, 4)})),
    "convnet": Net(ConvNet, TorchLayout("conv5")),
    "nin": Net(NIN, TorchLayout("cccp6")),
    "alexnet": Net(AlexNet, TorchLayout("fc8", flattened={"fc6": (256, 6, 6)})),
    "alexnet_torchvision": Net(
        AlexNetTorchvision,
        TorchLayout("fc8", flattened={"fc6": (256, 6, 6)}, renamed=_TORCHVISION_ALEXNET),
    ),
    "resnet18": Net(ResNet18, TorchLayout("fc", renamed=_TORCHVISION_RESNET)),
    "preactresnet18": Net(
        PreActResNet18,
        TorchLayout("linear", renamed={**_STAGES_OF_TWO_BLOCKS, "shortcut": "shortcut.0"}),
    ),
    "wideresnet28_10": Net(WideResNet28x10, TorchLayout("fc", renamed=_TRADES_WIDE_RESNET)),
}
