"""Files of weights, by the suffix of their names."""

import math
import os
import pathlib
import zipfile
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from dd_jax.pretrained import caffe, errors, matconvnet, torch_zip
from dd_jax.pretrained.errors import WeightsError
from dd_jax.pretrained.layouts import check_shapes, layer_names, variables_from_torch

SUFFIXES = {
    ".pth": "PyTorch",
    ".pt": "PyTorch",
    ".model": "PyTorch, the authors' own runs",
    ".safetensors": "safetensors with PyTorch's names",
    ".caffemodel": "Caffe",
    ".mat": "MatConvNet",
    ".npz": "NumPy with PyTorch's names",
}
# bytes of a tensor that is larger than its storage, as Tensor.expand makes them
_MOST_EXPANDED = 2**12


def load(path: str | os.PathLike, name: str) -> dict[str, Any]:
    """Reads weights for the net of that name, one of `models.NAMES`.

    Returns {"params": ...}, and "batch_stats" for nets with batch normalization: what
    `models.create(name).apply` takes, in float32 NumPy arrays whatever the file has. The number of
    classes is that of the file.

    Nothing in a file is run, and what it claims of its size is not believed. Raises WeightsError,
    one sentence, for a file that is missing, of an unknown kind, damaged or refused, and one that
    lists all entries that are missing, unknown or misshaped.
    """
    variables = checked_variables(path, name, read(path, name))
    return jax.tree.map(lambda array: np.asarray(array, np.float32, order="C"), variables)


def checked_variables(
    path: str | os.PathLike, name: str, arrays: dict[str, np.ndarray]
) -> dict[str, Any]:
    """`variables_from_torch`, with the file named in what it raises."""
    try:
        return variables_from_torch(name, arrays)
    except WeightsError as error:
        raise WeightsError(f"{os.fspath(path)}: {error}") from error


def read(path: str | os.PathLike, name: str) -> dict[str, np.ndarray]:
    """The arrays of a file, under PyTorch's names and in its layout, of the file's dtypes; not yet
    compared with the net.

    Compressed files (.npz and .mat) may come to 1 GiB. WeightsError as for `load`, also where the
    system refuses to read.
    """
    path = pathlib.Path(path)
    if path.suffix not in SUFFIXES:
        kinds = ", ".join(f"{suffix} ({kind})" for suffix, kind in SUFFIXES.items())
        raise WeightsError(f"{path} is of no known kind: weights are read from {kinds}.")
    try:
        if not path.is_file():
            raise WeightsError(f"There is no file {path}; name one that holds the weights.")
        path.open("rb").close()  # Not all readers say why they cannot open it.
        return _read_kind(path, name)
    except OSError as error:
        raise WeightsError(
            f"{path} cannot be read ({error.strerror or error}); check its permissions and its "
            f"disk."
        ) from error


def _read_kind(path: pathlib.Path, name: str) -> dict[str, np.ndarray]:
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix == ".caffemodel":
        return caffe.read(path)
    if path.suffix == ".mat":
        return matconvnet.read(path, layer_names(name), reverse_channels=name == "alexnet")
    if path.suffix == ".npz":
        return _read_npz(path, name)
    return torch_zip.read(path) if _may_be_zip(path) else _read_with_torch(path)


def save_safetensors(path: str | os.PathLike, arrays: dict[str, np.ndarray]) -> None:
    """Writes arrays under their names, of their dtypes, whole or not at all."""
    path = pathlib.Path(path)
    partial = path.with_name(path.name + ".partial")
    safetensors.numpy.save_file(
        {name: np.asarray(array, order="C") for name, array in arrays.items()}, partial
    )
    partial.replace(path)


def _read_safetensors(path: pathlib.Path) -> dict[str, np.ndarray]:
    try:
        return safetensors.numpy.load_file(path)
    except (safetensors.SafetensorError, ValueError, TypeError, KeyError) as error:
        raise WeightsError(
            f"{path} is damaged, or no safetensors file ({error}); fetch it anew."
        ) from error


def _read_npz(path: pathlib.Path, name: str) -> dict[str, np.ndarray]:
    """The net's arrays; nothing but their headers is decompressed before they are known to be that
    net's.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            shapes = {
                info.filename.removesuffix(".npy"): _npy_shape(archive, info)
                for info in archive.infolist()
            }
            size = sum(info.file_size for info in archive.infolist())
            if size > errors.MOST_UNCOMPRESSED:
                raise ValueError(
                    f"its arrays come to {size} bytes, and {errors.MOST_UNCOMPRESSED} are allowed"
                )
            check_shapes(name, shapes)
            return {entry: _npy_array(archive, f"{entry}.npy") for entry in shapes}
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    except Exception as error:  # A damaged file can fail in any way.
        reason = str(error)[:200]
        raise WeightsError(
            f"{path} is damaged, or no .npz file of plain arrays ({reason}); write it anew."
        ) from error


def _npy_shape(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> tuple[int, ...]:
    """The shape of an entry, which is as long as its header says."""
    if not info.filename.endswith(".npy") or info.compress_type not in (
        zipfile.ZIP_STORED,
        zipfile.ZIP_DEFLATED,
    ):
        raise ValueError(f"{info.filename[:60]} is no array that numpy.savez writes")
    with archive.open(info) as entry:
        version = np.lib.format.read_magic(entry)
        # Headers of later ones can be 4 GB long, and are for structured arrays.
        if version != (1, 0):
            raise ValueError(f"{info.filename[:60]} is of version {version} of the format")
        shape, _, dtype = np.lib.format.read_array_header_1_0(entry)
        if dtype.kind not in "biuf":
            raise ValueError(
                f"{info.filename[:60]} is of dtype {str(dtype)[:60]}, and real numbers are allowed"
            )
        if (
            any(size < 0 for size in shape)
            or math.prod(shape) * dtype.itemsize != info.file_size - entry.tell()
        ):
            raise ValueError(f"{info.filename[:60]} is not as long as an array of shape {shape}")
    return shape


def _npy_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(name) as entry:
        array = np.lib.format.read_array(entry, allow_pickle=False)
        entry.read(1)  # Only the end of an entry has its checksum compared.
        return array


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
            f"{path} is no zip archive; if it is in PyTorch's format from before 1.6, `pip install "
            f"'dd_jax[torch]'` lets it be"
            " read, and otherwise it is damaged."
        ) from error
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
        tensors = torch_zip.state_dict(path, contents, torch.Tensor)
        if any(
            tensor.nbytes > max(tensor.untyped_storage().nbytes(), _MOST_EXPANDED)
            for tensor in tensors.values()
        ):
            raise WeightsError(
                f"{path} has a tensor of more numbers than its storage; call contiguous() on it."
            )
        return {name: tensor.detach().float().numpy() for name, tensor in tensors.items()}
    except WeightsError:
        raise
    except Exception as error:  # A damaged file can fail in any way.
        raise WeightsError(
            f"{path} is damaged, or refused by PyTorch ({type(error).__name__}); fetch it anew."
        ) from error
