"""Files of weights, by the suffix of their names."""

import os
import pathlib
import zipfile
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from dd_jax.pretrained import caffe, matconvnet, torch_zip
from dd_jax.pretrained.errors import WeightsError
from dd_jax.pretrained.layouts import layer_names, variables_from_torch

SUFFIXES = {
    ".pth": "PyTorch",
    ".pt": "PyTorch",
    ".model": "PyTorch, the authors' own runs",
    ".safetensors": "safetensors with PyTorch's names",
    ".caffemodel": "Caffe",
    ".mat": "MatConvNet",
    ".npz": "NumPy with PyTorch's names",
}


def load(path: str | os.PathLike, name: str) -> dict[str, Any]:
    """Reads weights for the net of that name, one of `models.NAMES`.

    Returns {"params": ...}, and "batch_stats" for nets with batch normalisation: what `models.create(name).apply` takes, in
    float32 NumPy arrays whatever the file has. The number of classes is that of the file.

    Nothing in a file is run, and what it claims of its size is not believed. Raises WeightsError, one sentence, for a file that
    is missing, of an unknown kind, damaged or refused, and one that lists all entries that are missing, unknown or misshaped.
    """
    variables = checked_variables(path, name, read(path, name))
    return jax.tree.map(lambda array: np.asarray(array, np.float32, order="C"), variables)


def checked_variables(path: str | os.PathLike, name: str, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """`variables_from_torch`, with the file named in what it raises."""
    try:
        return variables_from_torch(name, arrays)
    except WeightsError as error:
        raise WeightsError(f"{os.fspath(path)}: {error}") from error


def read(path: str | os.PathLike, name: str) -> dict[str, np.ndarray]:
    """The arrays of a file, under PyTorch's names and in its layout, of the file's dtypes; not yet compared with the net."""
    path = pathlib.Path(path)
    if path.suffix not in SUFFIXES:
        kinds = ", ".join(f"{suffix} ({kind})" for suffix, kind in SUFFIXES.items())
        raise WeightsError(f"{path} is of no known kind: weights are read from {kinds}.")
    if not path.is_file():
        raise WeightsError(f"There is no file {path}; name one that holds the weights.")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix == ".caffemodel":
        return caffe.read(path)
    if path.suffix == ".mat":
        return matconvnet.read(path, layer_names(name), reverse_channels=name == "alexnet")
    if path.suffix == ".npz":
        return _read_npz(path)
    return torch_zip.read(path) if _may_be_zip(path) else _read_with_torch(path)


def save_safetensors(path: str | os.PathLike, arrays: dict[str, np.ndarray]) -> None:
    """Writes arrays under their names, of their dtypes, whole or not at all."""
    path = pathlib.Path(path)
    partial = path.with_name(path.name + ".partial")
    safetensors.numpy.save_file({name: np.asarray(array, order="C") for name, array in arrays.items()}, partial)
    partial.replace(path)


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        return safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, ValueError, TypeError, KeyError) as error:
        raise WeightsError(f"{path} is damaged, or no safetensors file ({error}); fetch it anew.") from error


def _read_npz(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except Exception as error:  # A damaged file can fail in any way.
        raise WeightsError(f"{path} is damaged, or no .npz file of plain arrays ({error}); write it anew.") from error


def _may_be_zip(path: pathlib.Path) -> bool:
    """Whether it is a zip archive, or was one before it was cut short."""
    with path.open("rb") as file:
        return file.read(2) == b"PK" or zipfile.is_zipfile(path)


def _read_with_torch(path: pathlib.Path) -> dict[str, np.ndarray]:
    """PyTorch's format from before 1.6, by PyTorch's own restricted loader."""
    try:
        import torch
    except ImportError as error:
        raise WeightsError(
            f"{path} is no zip archive; if it is in PyTorch's format from before 1.6, `pip install 'dd_jax[torch]'` lets it be"
            " read, and otherwise it is damaged."
        ) from error
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # A damaged file can fail in any way.
        raise WeightsError(
            f"{path} is damaged, or refused by PyTorch ({type(error).__name__}); fetch it anew."
        ) from error
    tensors = torch_zip.state_dict(path, contents, torch.Tensor)
    return {name: tensor.detach().float().numpy() for name, tensor in tensors.items()}
