"""Loads weights of other libraries as Flax variables.

    variables = pretrained.load("resnet18-f37072fd.pth", "resnet18")
    logits = models.create("resnet18").apply(variables, images)

Reads files of PyTorch (without PyTorch), safetensors, NumPy, Caffe and MatConvNet; `SUFFIXES` lists
their suffixes. Corrupt or malicious weight files are rejected; no code in them runs. In a shell,
`python -m dd_jax.pretrained in.pth --model resnet18 out.safetensors` converts a file.
"""

from dd_jax import extras
from dd_jax.pretrained.errors import WeightsError

with extras.needed("pretrained"):
    from dd_jax.pretrained.files import SUFFIXES, load
    from dd_jax.pretrained.layouts import from_torch, variables_from_torch

__all__ = ["SUFFIXES", "WeightsError", "from_torch", "load", "variables_from_torch"]
