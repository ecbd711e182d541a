"""Published robust classifiers, ready to be attacked: images with entries in [0, 1] to logits."""

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from dd_jax import models
from dd_jax.pretrained import files, layouts, robustbench
from dd_jax.pretrained.errors import WeightsError
from dd_jax.pretrained.state_dicts import MU


@dataclasses.dataclass(frozen=True, eq=False)
class Classifier:
    """A net with its weights. `classifier(images)` gives logits, so it is a `logits_fn`.

    Attributes:
      name: of the net, for `models.create` and for `model.name` in configurations.
      model: the Flax module.
      variables: {"params": ..., "batch_stats": ...} in float32.
      num_classes: the number of logits.
      notes: sentences on what was taken from where: the normalization of the images, and what the
        file has besides the net's weights.
    """

    name: str
    model: nn.Module
    variables: Mapping[str, Any]
    num_classes: int
    notes: tuple[str, ...]

    @property
    def apply_fn(self) -> Callable[..., Array]:
        """`apply_fn(variables, images)` gives logits, for those who change the weights."""
        return self.model.apply  # type: ignore[return-value]

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of the images that the net is meant for."""
        return self.model.input_shape

    def __call__(
        self, images: Float[Array | np.ndarray, "batch height width channels"]
    ) -> Float[Array, "batch classes"]:
        """Logits of images in RGB, channels last, entries in [0, 1]."""
        return self.apply_fn(self.variables, jnp.asarray(images))

    def __str__(self) -> str:
        shape = ", ".join(map(str, self.input_shape))
        notes = " ".join(self.notes)
        return f"{self.name}: images (batch, {shape}) to {self.num_classes} logits. {notes}"


def robust_classifier(
    path: str | os.PathLike,
    name: str | None = None,
    *,
    normalization: models.Normalization | None = None,
) -> Classifier:
    """Reads a published robust classifier from a file of PyTorch weights, without PyTorch.

        net = pretrained.robust_classifier("Carmon2019Unlabeled.pt")
        print(net)  # which net it is, and how it normalizes images
        logits = net(images)  # (batch, 32, 32, 3) in [0, 1]

    Recognizes the architecture from the names and shapes of the weights: the nets of
    `models.FAMILIES` with their published names, among them TRADES' WideResNets, PreActResNets,
    DeepMind's WideResNets and PreActResNets, and ResNets for small images and for ImageNet. The
    image sizes are those of the data set; all nets take others.

    The net normalizes images itself: by the file's mean and standard deviation; where the file has
    none, by RobustBench's if the file has RobustBench's name of a model (Rice2020Overfitting.pt);
    otherwise by what the net's own code fixes (DeepMind's: CIFAR's colors; torchvision's: those of
    ImageNet), and if there is nothing of the kind, not at all. `notes` says which it was. A wrong
    normalization shows in the accuracy on clean images, so look at that first.

    Args:
      path: a file of a suffix in `SUFFIXES`; Caffe's and MatConvNet's need `name`.
      name: the net, one of `models.NAMES` or of `models.FAMILIES`, in place of the recognized one.
        It is needed for what weights do not show: "wideresnet34_10_silu" for another activation,
        "wideresnet28_4_standardizing" for images that are standardized one by one.
      normalization: in place of the file's and of any default, such as
        `models.NORMALIZATIONS["cifar10"]`.

    Raises:
      WeightsError: as `load`; also if no net has such weights, and for a normalization of a net
        that has none.
    """
    arrays = files.read_arrays(path, name)
    name = name or recognized(path, arrays)
    variables = files.checked_variables(path, name, arrays)
    num_classes = layouts.num_classes(name, variables)
    if normalization is not None:
        variables = layouts.with_normalization(variables, normalization)
        source = "as was asked for"
    else:
        source = _source(path, arrays, num_classes)
    notes = (_sentence(name, variables, source), layouts.said_of_unused(name, arrays))
    return Classifier(
        name=name,
        model=models.create(name, num_classes),
        variables=jax.tree.map(jnp.asarray, variables),
        num_classes=num_classes,
        notes=tuple(note for note in notes if note),
    )


def recognized(path: str | os.PathLike, arrays: Mapping[str, np.ndarray]) -> str:
    """The name of the net that arrays of a file belong to; WeightsError where there is none.

    The file's name tells which of RobustBench's models standardize every image.
    """
    try:
        name = files.detected({entry: array.shape for entry, array in arrays.items()})
    except WeightsError as error:
        raise WeightsError(f"{os.fspath(path)}: {error}") from error
    standardizing = f"{name}_standardizing"
    if robustbench.is_standardizing(path) and _is_a_net(standardizing):
        return standardizing
    return name


def _is_a_net(name: str) -> bool:
    try:
        models.find(name)
    except ValueError:
        return False
    return True


def _source(path: str | os.PathLike, arrays: Mapping[str, np.ndarray], num_classes: int) -> str:
    if MU in arrays:
        return "from the file"
    if robustbench.unstored(path, num_classes):
        return "from RobustBench's code for a model of this file's name"
    return "the net's default, as the file has none"


def _sentence(name: str, variables: Mapping[str, Any], source: str) -> str:
    own = layouts.own_normalization(variables)
    if own is None:
        how = "standardized one by one" if "standardizing" in name else "taken as they are"
        return f"Images are {how}."
    mean, std = (", ".join(f"{value:.4g}" for value in values) for values in own)
    return f"Images are normalized by mean ({mean}) and std ({std}), {source}."
