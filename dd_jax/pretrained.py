"""Weights trained elsewhere, as Flax parameters.

    with np.load("lenet.npz") as arrays:
        params = from_torch("lenet", arrays)
    logits = models.create("lenet").apply({"params": params}, images)

Our layers have the names of the authors' PyTorch code, so a weight needs no more than its axes put in our order:

    convolution  PyTorch (out, in, height, width)   Flax (height, width, in, out)
    linear       PyTorch (out, in)                  Flax (in, out)

What shapes do not tell is the order in which a linear layer reads maps: PyTorch flattens them channels first, Flax
channels last. Such layers are listed in `_TORCH_NETS`, which has one entry per net.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from dd_jax import models


class _TorchNet(NamedTuple):
    """What PyTorch's weights of one net do not show in their shapes."""

    head: str  # the last layer, which has one output per class
    flattened: Mapping[str, tuple[int, int, int]]  # linear layers that read maps, (channels, height, width)


_TORCH_NETS: dict[str, _TorchNet] = {
    "mlp": _TorchNet(head="fc3", flattened={"fc1": (1, 28, 28)}),
    "lenet": _TorchNet(head="fc2", flattened={"fc1": (50, 4, 4)}),
    "convnet": _TorchNet(head="conv5", flattened={}),
    "nin": _TorchNet(head="cccp6", flattened={}),
}
_TORCH_LEAF = {"kernel": "weight", "bias": "bias"}


def from_torch(name: str, state_dict: Mapping[str, ArrayLike]) -> dict[str, Any]:
    """Turns the weights of the authors' PyTorch net into the parameters of ours.

    Args:
      name: one of `models.NAMES`.
      state_dict: from PyTorch's names ("conv1.weight", "fc2.bias") to arrays, or anything that NumPy makes one of. The
        number of classes is read off the last layer.

    Returns:
      The parameters, as `model.init(...)["params"]` lays them out, in NumPy arrays of the given dtypes.

    Raises ValueError for another name, and one that lists all entries that are missing, unknown or of another shape.
    """
    if name not in _TORCH_NETS:
        raise ValueError(f"There is no PyTorch layout for {name!r}; there is one for {', '.join(_TORCH_NETS)}.")
    net = _TORCH_NETS[name]
    arrays = {entry: np.asarray(value) for entry, value in state_dict.items()}
    expected = _expected_shapes(name, _num_classes(arrays, net.head))
    entries = {path: ".".join((*path[:-1], _TORCH_LEAF[path[-1]])) for path in expected}
    shapes = {entry: _torch_shape(expected[path]) for path, entry in entries.items()}
    _check_entries(name, {entry: array.shape for entry, array in arrays.items()}, shapes)
    flat = {path: _flax_array(arrays[entry], net.flattened.get(".".join(path[:-1]))) for path, entry in entries.items()}
    return flax.traverse_util.unflatten_dict(flat)


def _num_classes(arrays: Mapping[str, np.ndarray], head: str, default: int = 10) -> int:
    """The number of outputs of the last layer; the default where that is missing or no classifier's."""
    shape = arrays[f"{head}.weight"].shape if f"{head}.weight" in arrays else ()
    return shape[0] if shape and shape[0] >= 2 else default


def _expected_shapes(name: str, num_classes: int) -> dict[tuple[str, ...], tuple[int, ...]]:
    """From the path of each of the net's parameters to its shape. Computes nothing."""
    images = jax.ShapeDtypeStruct((1, *models.input_shape(name)), jnp.float32)
    params = jax.eval_shape(models.create(name, num_classes).init, jax.random.key(0), images)["params"]
    return {path: leaf.shape for path, leaf in flax.traverse_util.flatten_dict(params).items()}


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape that PyTorch gives to what has this shape in Flax: (..., in, out) is (out, in, ...)."""
    return (shape[-1], shape[-2], *shape[:-2]) if len(shape) > 1 else shape


def _flax_array(array: np.ndarray, flattened: tuple[int, int, int] | None) -> np.ndarray:
    """Brings the axes of a PyTorch array, and the inputs of a linear layer that reads maps, into Flax's order."""
    if array.ndim == 1:
        return array
    if array.ndim == 4:
        return array.transpose(2, 3, 1, 0)
    if flattened is None:
        return array.T
    num_outputs = array.shape[0]
    return array.reshape(num_outputs, *flattened).transpose(2, 3, 1, 0).reshape(-1, num_outputs)


def _check_entries(name: str, given: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
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
        raise ValueError(f"These arrays are not the weights of {name!r}; {'; '.join(problems)}.")
