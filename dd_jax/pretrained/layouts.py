"""Arrays under PyTorch's names, as Flax variables.

    with np.load("lenet.npz") as arrays:
        params = from_torch("lenet", arrays)
    logits = models.create("lenet").apply({"params": params}, images)

A weight needs no more than its name changed and its axes put in our order:

    convolution  PyTorch (out, in, height, width)   Flax (height, width, in, out)
    linear       PyTorch (out, in)                  Flax (in, out)

What shapes do not tell is the order in which a linear layer reads maps: PyTorch flattens them
channels first, Flax channels last. Such layers are listed in `_TORCH_NETS`, which has one entry per
net, with the names that differ.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from dd_jax import models
from dd_jax.pretrained.errors import WeightsError

Shape = tuple[int, ...]
Path = tuple[str, ...]  # (collection, layer, ..., leaf)


class _TorchNet(NamedTuple):
    """What PyTorch's weights of one net do not show in their shapes."""

    head: str  # the last layer, which has one output per class
    # linear layers that read maps, (channels, height, width)
    flattened: Mapping[str, tuple[int, int, int]] = {}
    # from our name of a layer, or of a part of its path, to PyTorch's
    renamed: Mapping[str, str] = {}


_TORCHVISION_ALEXNET = {
    **{f"conv{i}": f"features.{place}" for i, place in enumerate((0, 3, 6, 8, 10), start=1)},
    **{f"fc{i}": f"classifier.{place}" for i, place in enumerate((1, 4, 6), start=6)},
}
_TORCHVISION_RESNET = {
    **{
        f"layer{stage}_{block}": f"layer{stage}.{block}"
        for stage in (1, 2, 3, 4)
        for block in (0, 1)
    },
    "downsample_conv": "downsample.0",
    "downsample_bn": "downsample.1",
}
_TORCH_NETS: dict[str, _TorchNet] = {
    "mlp": _TorchNet(head="fc3", flattened={"fc1": (1, 28, 28)}),
    "lenet": _TorchNet(head="fc2", flattened={"fc1": (50, 4, 4)}),
    "convnet": _TorchNet(head="conv5"),
    "nin": _TorchNet(head="cccp6"),
    "alexnet": _TorchNet(head="fc8", flattened={"fc6": (256, 6, 6)}),
    "alexnet_torchvision": _TorchNet(
        head="fc8", flattened={"fc6": (256, 6, 6)}, renamed=_TORCHVISION_ALEXNET
    ),
    "resnet18": _TorchNet(head="fc", renamed=_TORCHVISION_RESNET),
}
_TORCH_LEAF = {
    "kernel": "weight",
    "bias": "bias",
    "scale": "weight",
    "mean": "running_mean",
    "var": "running_var",
}
# Batch normalization counts its updates, for a use that nobody here has.
_NO_WEIGHT = "num_batches_tracked"


def from_torch(name: str, state_dict: Mapping[str, ArrayLike]) -> dict[str, Any]:
    """Turns the weights of a PyTorch net into the parameters of ours; `variables_from_torch`
    without the statistics.
    """
    return variables_from_torch(name, state_dict)["params"]


def variables_from_torch(name: str, state_dict: Mapping[str, ArrayLike]) -> dict[str, Any]:
    """Turns the weights of a PyTorch net into the variables of ours.

    Args:
      name: one of `models.NAMES`.
      state_dict: from PyTorch's names ("conv1.weight", "layer1.0.bn1.running_mean") to arrays, or
        anything that NumPy makes one of; for `alexnet` Caffe's names and shapes. The number of
        classes is read off the last layer. Weights of linear layers may come as those of
        convolutions over whole maps, (out, channels, height, width).

    Returns:
      {"params": ...}, and "batch_stats" for nets with batch normalization, as `model.init` lays
      them out, in NumPy arrays of the given dtypes.

    Raises WeightsError for another name, and one that lists all entries that are missing, unknown
    or of another shape.
    """
    arrays = {
        entry: np.asarray(value)
        for entry, value in state_dict.items()
        if not entry.endswith(_NO_WEIGHT)
    }
    entries = check_shapes(name, {entry: array.shape for entry, array in arrays.items()})
    flattened = _TORCH_NETS[name].flattened
    flat = {
        path: _flax_array(arrays[entry].reshape(shape), flattened.get(path[-2]))
        for path, (entry, shape) in entries.items()
    }
    return flax.traverse_util.unflatten_dict(flat)


def check_shapes(name: str, given: Mapping[str, Shape]) -> dict[Path, tuple[str, Shape]]:
    """What `variables_from_torch` raises, from the shapes of arrays under PyTorch's names alone,
    before any is read.

    Returns, for the path of each of the net's variables, PyTorch's name for it and the shape to
    bring the array of that name to.
    """
    if name not in _TORCH_NETS:
        raise WeightsError(
            f"There is no PyTorch layout for {name!r}; there is one for {', '.join(_TORCH_NETS)}."
        )
    given = {entry: shape for entry, shape in given.items() if not entry.endswith(_NO_WEIGHT)}
    expected = _expected_shapes(name, _num_classes(name, given))
    entries = {path: (_entry(name, path), _torch_shape(shape)) for path, shape in expected.items()}
    shapes = dict(entries.values())
    _check_entries(
        name,
        {entry: _as_linear(shape, shapes.get(entry, ())) for entry, shape in given.items()},
        shapes,
    )
    return entries


def layer_names(name: str) -> list[str]:
    """PyTorch's names of the layers of a net that have weights, in the order in which the net runs
    through them.
    """
    return list(
        dict.fromkeys(_entry(name, path).rpartition(".")[0] for path in _expected_shapes(name, 10))
    )


def _entry(name: str, path: Path) -> str:
    """PyTorch's name of what Flax has at a path."""
    renamed = _TORCH_NETS[name].renamed
    return ".".join((*(renamed.get(part, part) for part in path[1:-1]), _TORCH_LEAF[path[-1]]))


def _num_classes(name: str, given: Mapping[str, Shape]) -> int | None:
    """The number of outputs of the last layer; None, the net's own number, where that is missing or
    no classifier's.
    """
    head = _entry(name, ("params", _TORCH_NETS[name].head, "kernel"))
    shape = given.get(head, ())
    # An empty array may claim any number.
    return shape[0] if shape and shape[0] >= 2 and 0 not in shape else None


def _expected_shapes(name: str, num_classes: int | None) -> dict[Path, Shape]:
    """From the path of each of the net's variables to its shape, in the order in which they are
    made. Computes nothing.
    """
    shapes: dict[Path, Shape] = {}

    def init(images: jax.Array) -> None:
        variables = models.create(name, num_classes).init(jax.random.key(0), images)
        shapes.update(
            {path: leaf.shape for path, leaf in flax.traverse_util.flatten_dict(variables).items()}
        )

    # Noted down inside, because JAX sorts the dictionaries that it returns.
    jax.eval_shape(init, jax.ShapeDtypeStruct((1, *models.input_shape(name)), jnp.float32))
    return shapes


def _torch_shape(shape: Shape) -> Shape:
    """The shape that PyTorch gives to what has this shape in Flax: (..., in, out) is (out, in,
    ...).
    """
    return (shape[-1], shape[-2], *shape[:-2]) if len(shape) > 1 else shape


def _as_linear(shape: Shape, expected: Shape) -> Shape:
    """The shape of a convolution over whole maps as that of the linear layer that is expected;
    others as they are.
    """
    if (
        len(shape) == 4
        and len(expected) == 2
        and shape[0] == expected[0]
        and math.prod(shape) == math.prod(expected)
    ):
        return expected
    return shape


def _flax_array(array: np.ndarray, flattened: tuple[int, int, int] | None) -> np.ndarray:
    """Brings the axes of a PyTorch array, and the inputs of a linear layer that reads maps, into
    Flax's order.
    """
    if array.ndim == 1:
        return array
    if array.ndim == 4:
        return array.transpose(2, 3, 1, 0)
    if flattened is None:
        return array.T
    num_outputs = array.shape[0]
    return array.reshape(num_outputs, *flattened).transpose(2, 3, 1, 0).reshape(-1, num_outputs)


def _check_entries(name: str, given: Mapping[str, Shape], expected: Mapping[str, Shape]) -> None:
    missing = [f"{entry} {shape}" for entry, shape in expected.items() if entry not in given]
    unknown = [f"{entry} {shape}" for entry, shape in given.items() if entry not in expected]
    misshaped = [
        f"{entry} {given[entry]} instead of {shape}"
        for entry, shape in expected.items()
        if entry in given and given[entry] != shape
    ]
    lists = {"missing": missing, "unknown": unknown, "of another shape": misshaped}
    problems = [f"{problem}: {', '.join(entries)}" for problem, entries in lists.items() if entries]
    if problems:
        raise WeightsError(f"These arrays are not the weights of {name!r}; {'; '.join(problems)}.")
