"""Converts arrays under PyTorch's names to Flax variables.

    with np.load("lenet.npz") as arrays:
        params = from_torch("lenet", arrays)
    logits = models.create("lenet").apply({"params": params}, images)

The name of each weight changes, and so does the order of its axes:

    convolution  PyTorch (out, in, height, width)   Flax (height, width, in, out)
    linear       PyTorch (out, in)                  Flax (in, out)

PyTorch flattens maps channels first, Flax channels last. Shapes do not show which linear layers
read flattened maps; `models.find(name).torch_layout` lists them for each net, together with the
names that differ.
"""

import functools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from dd_jax import models
from dd_jax.pretrained.errors import WeightsError
from dd_jax.pretrained.state_dicts import MU, SIGMA

Shape = tuple[int, ...]
Path = tuple[str, ...]  # (collection, layer, ..., leaf)

_TORCH_LEAF = {
    "kernel": "weight",
    "scale": "weight",
    "mean": "running_mean",
    "var": "running_var",
}
"""Names of leaves that differ."""
_NORMALIZATION = ("batch_stats", "normalize")  # The path of a net's own mu and sigma.
# PyTorch's batch normalization counts its updates; Flax's needs no count.
_NO_WEIGHT = "num_batches_tracked"
_CHANNELS = 3  # of images that nets normalize themselves
_KINDS_SHOWN = 3  # first parts of the names of unused arrays in a sentence


def from_torch(name: str, state_dict: Mapping[str, ArrayLike]) -> dict[str, Any]:
    """Converts the weights of a PyTorch net to our parameters: the "params" of
    `variables_from_torch`.
    """
    return variables_from_torch(name, state_dict)["params"]


def variables_from_torch(name: str, state_dict: Mapping[str, ArrayLike]) -> dict[str, Any]:
    """Converts the weights of a PyTorch net to our variables.

    Args:
      name: one of `models.NAMES` or of `models.FAMILIES`.
      state_dict: from PyTorch's names ("conv1.weight", "layer1.0.bn1.running_mean") to arrays, or
        anything that NumPy converts to an array; for `alexnet` Caffe's names and shapes. The last
        layer determines the number of classes. Weights of linear layers may have the shape of a
        convolution over whole maps, (out, channels, height, width). The entries "mu" and "sigma",
        of any shape with one number per channel or one for all, are the net's own normalization;
        without them it is the net's default. Weights that the net does not use
        (`unused_entries`) are left out.

    Returns:
      {"params": ...}, and "batch_stats" for nets with batch normalization, with the structure that
      `model.init` returns, in NumPy arrays of the given dtypes, mu and sigma in float32.

    Raises:
      WeightsError: unknown name, or entries that are missing, unknown or of another shape; the
        message lists all of them. Also for mu or sigma that no image can be normalized by.
    """
    arrays = {entry: np.asarray(value) for entry, value in state_dict.items()}
    shapes = {entry: array.shape for entry, array in arrays.items()}
    entries = check_shapes(name, shapes)
    flattened = _net(name).torch_layout.flattened
    flat = {
        path: _flax_array(arrays[entry].reshape(shape), flattened.get(path[-2]))
        for path, (entry, shape) in entries.items()
        if path[:2] != _NORMALIZATION
    }
    variables = flax.traverse_util.unflatten_dict(flat)
    if len(flat) == len(entries):
        return variables
    if MU in arrays:
        return _with_own(variables, (arrays[MU], arrays[SIGMA]))
    return _with_own(variables, models.create(name, _num_classes(name, shapes)).normalization)


def to_torch(name: str, variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Converts our variables to the weights of a PyTorch net: the inverse of
    `variables_from_torch`.

    Args:
      name: one of `models.NAMES` or of `models.FAMILIES`.
      variables: of `models.create(name)`, with any number of classes.

    Returns:
      From PyTorch's names to arrays of the same dtypes in PyTorch's layout, for
      `net.load_state_dict` once they are tensors. A net's own normalization is "mu" and "sigma",
      (1, 3, 1, 1). PyTorch's counts of updates (`num_batches_tracked`) are not among them.

    Raises:
      WeightsError: unknown name, or variables of another net.
    """
    flattened = _net(name).torch_layout.flattened
    flat = flax.traverse_util.flatten_dict(dict(variables))
    arrays = {
        _entry(name, path): _torch_array(np.asarray(leaf), flattened.get(path[-2]))
        for path, leaf in flat.items()
    }
    check_shapes(name, {entry: array.shape for entry, array in arrays.items()})
    for entry in (MU, SIGMA):
        if entry in arrays:
            arrays[entry] = arrays[entry].reshape(1, -1, 1, 1)
    return arrays


def num_classes(name: str, variables: Mapping[str, Any]) -> int:
    """The number of classes of a net with these variables."""
    return variables["params"][_net(name).torch_layout.head]["kernel"].shape[-1]


def own_normalization(variables: Mapping[str, Any]) -> models.Normalization | None:
    """mu and sigma of a net that normalizes its inputs itself; None for other nets."""
    own = variables.get("batch_stats", {}).get("normalize")
    if own is None:
        return None
    return models.Normalization(*(tuple(np.asarray(own[each]).tolist()) for each in (MU, SIGMA)))


def with_normalization(
    variables: Mapping[str, Any], normalization: models.Normalization
) -> dict[str, Any]:
    """The variables of a net that normalizes its inputs itself, with other mu and sigma.

    One number each stands for all three channels. Raises WeightsError for another number of them,
    for numbers that are not finite, for a standard deviation that is not positive, and for a net
    that does not normalize its inputs.
    """
    if own_normalization(variables) is None:
        raise WeightsError(
            "This net does not normalize images itself, so it takes no normalization; leave it out "
            "and give the net inputs that are normalized."
        )
    return _with_own(variables, normalization)


def _with_own(variables: Mapping[str, Any], normalization: tuple[Any, Any]) -> dict[str, Any]:
    mu, sigma = (np.asarray(each, np.float32).reshape(-1) for each in normalization)
    sizes_fit = {mu.size, sigma.size} <= {1, _CHANNELS}
    if not (sizes_fit and np.isfinite(mu).all() and np.isfinite(sigma).all() and (sigma > 0).all()):
        raise WeightsError(
            f"The normalization is mean {tuple(mu.tolist())} and std {tuple(sigma.tolist())}; each "
            f"must have {_CHANNELS} finite numbers or one, and those of std must be positive."
        )
    own = {MU: np.resize(mu, _CHANNELS), SIGMA: np.resize(sigma, _CHANNELS)}
    return {**variables, "batch_stats": {**variables["batch_stats"], "normalize": own}}


def unused_entries(name: str, entries: Iterable[str]) -> list[str]:
    """Those of the entries that published weights of a net have and the net does not use."""
    return [entry for entry in entries if _is_unused(name, entry)]


def said_of_unused(name: str, entries: Iterable[str]) -> str:
    """A sentence on the `unused_entries`; empty if there are none."""
    unused = unused_entries(name, entries)
    if not unused:
        return ""
    kinds = list(dict.fromkeys(entry.partition(".")[0] for entry in unused))
    listed = ", ".join([*kinds[:_KINDS_SHOWN], *(["..."] if len(kinds) > _KINDS_SHOWN else [])])
    return f"{len(unused)} arrays ({listed}) are left out, because {name} does not use them."


def check_shapes(name: str, given: Mapping[str, Shape]) -> dict[Path, tuple[str, Shape]]:
    """Checks the shapes of arrays under PyTorch's names, before any array is read.

    Returns, for the path of each of the net's variables, PyTorch's name of it and the shape to
    reshape the array of that name to; mu and sigma may be missing among the arrays. Raises what
    `variables_from_torch` raises.
    """
    _net(name)
    given = {
        entry: shape
        for entry, shape in given.items()
        if not (entry.endswith(_NO_WEIGHT) or _is_unused(name, entry))
    }
    expected = _expected_shapes(name, _num_classes(name, given))
    entries = {path: (_entry(name, path), _torch_shape(shape)) for path, shape in expected.items()}
    shapes = dict(entries.values())
    needed = {
        entry: shape
        for entry, shape in shapes.items()
        if entry not in (MU, SIGMA) or MU in given or SIGMA in given
    }
    _check_entries(
        name,
        {
            entry: _as_expected(entry, shape, shapes.get(entry, ()))
            for entry, shape in given.items()
        },
        needed,
    )
    return entries


def layer_names(name: str) -> list[str]:
    """Returns PyTorch's names of the layers that have weights, in the order in which the net
    applies them.
    """
    return list(
        dict.fromkeys(_entry(name, path).rpartition(".")[0] for path in _expected_shapes(name, 10))
    )


@functools.lru_cache(maxsize=16)
def _net(name: str) -> models.Net:
    try:
        return models.find(name)
    except ValueError as error:
        raise WeightsError(str(error)) from error


def _is_unused(name: str, entry: str) -> bool:
    return re.fullmatch(_net(name).torch_layout.unused, entry) is not None


def _entry(name: str, path: Path) -> str:
    """Returns PyTorch's name of the variable at a path."""
    renamed = _net(name).torch_layout.renamed
    layers = (renamed.get(part, part) for part in path[1:-1])
    return ".".join((*(layer for layer in layers if layer), _TORCH_LEAF.get(path[-1], path[-1])))


def _num_classes(name: str, given: Mapping[str, Shape]) -> int | None:
    """Returns the number of outputs of the last layer; None, which stands for the net's own number,
    where the layer is missing or has fewer than two outputs.
    """
    head = _entry(name, ("params", _net(name).torch_layout.head, "kernel"))
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


def _as_expected(entry: str, shape: Shape, expected: Shape) -> Shape:
    """Returns the expected shape where the given one is another way to write it: of mu and sigma
    with any axes, and of a linear layer as a convolution over whole maps. Otherwise returns the
    given shape.
    """
    if entry in (MU, SIGMA) and math.prod(shape) in (1, math.prod(expected)):
        return expected
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
    if array.ndim < 2:
        return array
    if array.ndim == 4:
        return array.transpose(2, 3, 1, 0)
    if flattened is None:
        return array.T
    num_outputs = array.shape[0]
    return array.reshape(num_outputs, *flattened).transpose(2, 3, 1, 0).reshape(-1, num_outputs)


def _torch_array(array: np.ndarray, flattened: tuple[int, int, int] | None) -> np.ndarray:
    """The inverse of `_flax_array`."""
    if array.ndim < 2:
        return array
    if array.ndim == 4:
        return array.transpose(3, 2, 0, 1)
    if flattened is None or array.shape[0] != math.prod(flattened):
        return array.T
    channels, height, width = flattened
    num_outputs = array.shape[1]
    maps = array.reshape(height, width, channels, num_outputs).transpose(3, 2, 0, 1)
    return maps.reshape(num_outputs, -1)


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
        listed = "; ".join(problems)
        hint = " mu and sigma are for nets that normalize images themselves: "
        hint += ", ".join(family.names for family in models.FAMILIES) + "."
        raise WeightsError(
            f"These arrays are not the weights of {name!r}; {listed}."
            + (hint if MU in given and MU not in expected else "")
        )
