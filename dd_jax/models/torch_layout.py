"""What an entry of the catalog consists of: a net, and how PyTorch names and lays out its weights.

`dd_jax.pretrained` reads the second part.
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import flax.linen as nn

OWN_NORMALIZATION = {"normalize": ""}
"""For `TorchLayout.renamed`: a net's own mu and sigma are "mu" and "sigma", without a layer."""


class TorchLayout(NamedTuple):
    """The differences between the names and axes of PyTorch's weights and of ours.

    Attributes:
      head: our name of the last layer, which has one output per class.
      flattened: from our name of a linear layer that reads flattened maps to the shape of these
        maps, (channels, height, width). PyTorch flattens them channels first, Flax channels last.
      renamed: from our name of a layer, or of one part of its path, to PyTorch's name; "" for a
        part that PyTorch lacks. Names that are not listed are equal.
      unused: a regular expression for the whole names of weights that published files have and that
        the net does not use.
    """

    head: str
    flattened: Mapping[str, tuple[int, int, int]] = {}
    renamed: Mapping[str, str] = {}
    unused: str = ""


class Net(NamedTuple):
    """One net: `make(num_classes=...)` gives the Flax module, whose `input_shape` is that of the
    images and whose default `num_classes` is the net's own; and the layout of its PyTorch weights.
    """

    make: Callable[..., nn.Module]
    torch_layout: TorchLayout
