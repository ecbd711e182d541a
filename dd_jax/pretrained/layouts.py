"""Converts arrays under PyTorch's names to Flax variables.

    with np.load("lenet.npz") as arrays:
        params = from_torch("lenet", arrays)
    logits = models.create("lenet").apply({"params": params}, images)

The name of each weight changes, and so does the order of its axes:

    convolution  PyTorch (out, in, height, width)   Flax (height, width, in, out)
    linear       PyTorch (out, in)                  Flax (in, out)

PyTorch flattens maps channels first, Flax channels last. Shapes do not show which linear layers
read flattened maps; `models.NETS` lists them for each net, together with the names that differ.
"""

import math
from collections.abc import Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from dd_jax import models
from dd_jax.pretrained.errors import WeightsError

Shape = tuple[int, ...]
Path = tuple[str, ...]  # (collection, layer, ..., leaf)

_TORCH_LEAF = {
    "kernel": "weight",
    "bias": "bias",
    "scale": "weight",
    "mean": "running_mean",
    "var": "running_var",
}
# PyTorch's batch normalization counts its updates; Flax's needs no count.
_NO_WEIGHT = "num_batches_tracked"


def from_torch(name: str, state_dict: Mapping[str, ArrayLike]) -> dict[str, Any]:
    """Converts the weights of a PyTorch net to our parameters: the "params" of
    `variables_from_torch`.
    """
    return variables_from_torch(name, state_dict)["params"]


def variables_from_torch(name: str, state_dict: Mapping[str, ArrayLike]) -> dict[str, Any]:
    """Converts the weights of a PyTorch net to our variables.

    Args:
      name: one of `models.NAMES`.
      state_dict: from PyTorch's names ("conv1.weight", "layer1.0.bn1.running_mean") to arrays, or
        anything that NumPy converts to an array; for `alexnet` Caffe's names and shapes. The last
        layer determines the number of classes. Weights of linear layers may have the shape of a
        convolution over whole maps, (out, channels, height, width).

    Returns:
      {"params": ...}, and "batch_stats" for nets with batch normalization, with the structure that
      `model.init` returns, in NumPy arrays of the given dtypes.

    Raises:
      WeightsError: unknown name, or entries that are missing, unknown or of another shape; the
        message lists all of them.
    """
    arrays = {
        entry: np.asarray(value)
        for entry, value in state_dict.items()
        if not entry.endswith(_NO_WEIGHT)
    }
    entries = check_shapes(name, {entry: array.shape for entry, array in arrays.items()})
    flattened = models.NETS[name].torch_layout.flattened
    flat = {
        path: _flax_array(arrays[entry].reshape(shape), flattened.get(path[-2]))
        for path, (entry, shape) in entries.items()
    }
    return flax.traverse_util.unflatten_dict(flat)


def check_shapes(name: str, given: Mapping[str, Shape]) -> dict[Path, tuple[str, Shape]]:
    """Checks the shapes of arrays under PyTorch's names, before any array is read.

    Returns, for the path of each of the net's variables, PyTorch's name of it and the shape to
    reshape the array of that name to. Raises what `variables_from_torch` raises.
    """
    if name not in models.NETS:
        raise WeightsError(f"There is no net {name!r}; choose one of {', '.join(models.NAMES)}.")
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
    """Returns PyTorch's names of the layers that have weights, in the order in which the net
    applies them.
    """
    return list(
        dict.fromkeys(_entry(name, path).rpartition(".")[0] for path in _expected_shapes(name, 10))
    )


def _entry(name: str, path: Path) -> str:
    """Returns PyTorch's name of the variable at a path."""
    renamed = models.NETS[name].torch_layout.renamed
    return ".".join((*(renamed.get(part, part) for part in path[1:-1]), _TORCH_LEAF[path[-1]]))


def _num_classes(name: str, given: Mapping[str, Shape]) -> int | None:
    """Returns the number of outputs of the last layer; None, which stands for the net's own number,
    where the layer is missing or has fewer than two outputs.
    """
    head = _entry(name, ("params", models.NETS[name].torch_layout.head, "kernel"))
    shape = given.get(head, ())
    # An empty array may claim any number.
    return shape[0] if shape and shape[0] >= 2 and 0 not in shape else None


def _expected_shapes(name: str, num_classes: int | None) -> dict[Path, Shape]:
    """Returns the shape of each of the net's variables by its path, in the order in which `init`
    makes them. Nothing is computed.
    """
    shapes: dict[Path, Shape] = {}

    def init(images: jax.Array) -> None:
        variables = models.create(name, num_classes).init(jax.random.key(0), images)
        shapes.update(
            {path: leaf.shape for path, leaf in flax.traverse_util.flatten_dict(variables).items()}
        )

    # Recorded within the function, because JAX sorts the dictionaries that `eval_shape` returns.
    jax.eval_shape(init, jax.ShapeDtypeStruct((1, *models.input_shape(name)), jnp.float32))
    return shapes


def _torch_shape(shape: Shape) -> Shape:
    """Returns PyTorch's shape for a shape of Flax: (..., in, out) becomes (out, in, ...)."""
    return (shape[-1], shape[-2], *shape[:-2]) if len(shape) > 1 else shape


def _as_linear(shape: Shape, expected: Shape) -> Shape:
    """Returns the expected shape where it is a linear layer's and the given one is that of the same
    layer as a convolution over whole maps; otherwise the given shape.
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
    """Brings the axes of a PyTorch array into Flax's order, and the inputs of a linear layer that
    reads flattened maps as well.
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
