"""Weights trained elsewhere, as Flax variables.

    variables = pretrained.load("resnet18-f37072fd.pth", "resnet18")
    logits = models.create("resnet18").apply(variables, images)

Reads PyTorch's files (without PyTorch, and without running anything that is in them), safetensors,
Caffe's and MatConvNet's; `files.SUFFIXES` lists them. In a shell, `python -m dd_jax.pretrained
in.pth --model resnet18 out.safetensors` converts one.
"""

from dd_jax.pretrained.errors import WeightsError
from dd_jax.pretrained.files import SUFFIXES, load
from dd_jax.pretrained.layouts import from_torch, variables_from_torch

__all__ = ["SUFFIXES", "WeightsError", "from_torch", "load", "variables_from_torch"]
