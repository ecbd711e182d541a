"""The nets by name. A new net is one entry of `NETS`; those of any depth and width are in
`families`.

An entry names the Flax module and says what PyTorch's weights of that net do not show in their
shapes.
"""

from dd_jax.models import families
from dd_jax.models.cifar import NIN, ConvNet
from dd_jax.models.imagenet import AlexNet, AlexNetTorchvision
from dd_jax.models.mnist import MLP, LeNet
from dd_jax.models.torch_layout import Net, TorchLayout

_TORCHVISION_ALEXNET = {
    **{f"conv{i}": f"features.{place}" for i, place in enumerate((0, 3, 6, 8, 10), start=1)},
    **{f"fc{i}": f"classifier.{place}" for i, place in enumerate((1, 4, 6), start=6)},
}

_TESTED_WHOLE = ("resnet18", "preactresnet18", "wideresnet28_10")

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
    # Of the families, the nets that are tested whole; `find` knows the others, too.
    **{name: families.find(name) for name in _TESTED_WHOLE},  # type: ignore[misc]
}


def find(name: str) -> Net:
    """The net of a name: an entry of `NETS`, or one of a family.

    Raises ValueError for other names; it lists all that there are.
    """
    net = NETS.get(name) or families.find(name)
    if net is None:
        listed = ", ".join((*NETS, *(family.names for family in families.FAMILIES)))
        raise ValueError(f"There is no net {name!r}; choose one of {listed}.")
    return net
