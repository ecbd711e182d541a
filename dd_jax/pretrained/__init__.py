"""Loads weights of other libraries as Flax variables, and published robust classifiers whole.

    net = pretrained.robust_classifier("Carmon2019Unlabeled.pt")  # recognizes the architecture
    logits = net(images)  # images in [0, 1]

    variables = pretrained.load("resnet18-f37072fd.pth", "resnet18")
    logits = models.create("resnet18").apply(variables, images)

    pretrained.save("net.safetensors", "resnet18", variables)  # with PyTorch's names

Reads files of PyTorch (without PyTorch), safetensors, NumPy, Caffe and MatConvNet; `SUFFIXES` lists
their suffixes. Corrupt or malicious weight files are rejected; no code in them runs. In a shell,
`python -m dd_jax.pretrained in.pth --model resnet18 out.safetensors` converts a file.
"""

from dd_jax import extras
from dd_jax.pretrained.errors import WeightsError

with extras.needed("pretrained"):
    from dd_jax.pretrained.classifiers import Classifier, robust_classifier
    from dd_jax.pretrained.files import SUFFIXES, load, save
    from dd_jax.pretrained.layouts import from_torch, to_torch, variables_from_torch

__all__ = [
    "SUFFIXES",
    "Classifier",
    "WeightsError",
    "from_torch",
    "load",
    "robust_classifier",
    "save",
    "to_torch",
    "variables_from_torch",
]
