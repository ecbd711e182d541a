"""Reads weight files by their suffix, and writes safetensors."""

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
# Bytes of a tensor that is larger than its storage, which Tensor.expand creates.
_MOST_EXPANDED = 2**12


def load(path: str | os.PathLike, name: str) -> dict[str, Any]:
    """Reads the weights of the net `name`, one of `models.NAMES`.

    Returns {"params": ...}, and "batch_stats" for nets with batch normalization: the variables of
    `models.create(name).apply`, as float32 NumPy arrays whatever the file's dtypes. The file
    determines the number of classes.

    Corrupt or malicious files are rejected: no code in them runs, and memory is not reserved for
    sizes that they only claim. Raises WeightsError for a file that is missing, of an unknown kind,
    damaged or rejected. If arrays do not fit the net, the error lists all that are missing, unknown
    or of another shape.
    """
    variables = checked_variables(path, name, read_arrays(path, name))
    return jax.tree.map(lambda array: np.asarray(array, np.float32, order="C"), variables)


def checked_variables(
    path: str | os.PathLike, name: str, arrays: dict[str, np.ndarray]
) -> dict[str, Any]:
    """`variables_from_torch` with the file's name in its errors."""
    try:
        return variables_from_torch(name, arrays)
    except WeightsError as error:
        raise WeightsError(f"{os.fspath(path)}: {error}") from error


def read_arrays(path: str | os.PathLike, name: str) -> dict[str, np.ndarray]:
    """The arrays of a file with PyTorch's names and layout and the file's dtypes.

    They are not yet compared with the net's. Compressed files (.npz and .mat) may have 1 GiB of
    contents. Raises WeightsError as `load` does, also if the system cannot read the file.
    """
    path = pathlib.Path(path)
    if path.suffix not in SUFFIXES:
        kinds = ", ".join(f"{suffix} ({kind})" for suffix, kind in SUFFIXES.items())
        raise WeightsError(f"{path} has an unknown suffix; name a file of {kinds}.")
    try:
        if not path.is_file():
            raise WeightsError(f"There is no file {path}; name one that holds the weights.")
        path.open("rb").close()  # Not all readers say why they cannot open a file.
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
        return caffe.read_caffemodel(path)
    if path.suffix == ".mat":
        return matconvnet.read_mat(path, layer_names(name), reverse_channels=name == "alexnet")
    if path.suffix == ".npz":
        return _read_npz(path, name)
    return torch_zip.read_torch_zip(path) if _may_be_zip(path) else _read_with_torch(path)


def save_safetensors(path: str | os.PathLike, arrays: dict[str, np.ndarray]) -> None:
    """Writes arrays with their names and dtypes. A failed write leaves no file of this name."""
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
            f"{path} is damaged or not a safetensors file ({error}); download it again."
        ) from error


def _read_npz(path: pathlib.Path, name: str) -> dict[str, np.ndarray]:
    """The arrays of a net. Only their headers are decompressed before they are known to fit."""
    try:
        with zipfile.ZipFile(path) as archive:
            shapes = {
                info.filename.removesuffix(".npy"): _npy_shape(archive, info)
                for info in archive.infolist()
            }
            size = sum(info.file_size for info in archive.infolist())
            if size > errors.MOST_UNCOMPRESSED:
                raise ValueError(
                    f"its arrays have {size} bytes, and {errors.MOST_UNCOMPRESSED} are allowed"
                )
            check_shapes(name, shapes)
            return {entry: _npy_array(archive, f"{entry}.npy") for entry in shapes}
    except WeightsError as error:
        raise WeightsError(f"{path}: {error}") from error
    except Exception as error:  # A damaged file can fail in any way.
        reason = str(error)[:200]
        raise WeightsError(
            f"{path} is damaged or not an .npz file of plain arrays ({reason}); write it again."
        ) from error


def _npy_shape(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> tuple[int, ...]:
    """The shape of an entry. Raises ValueError if its header does not match its length."""
    if not info.filename.endswith(".npy") or info.compress_type not in (
        zipfile.ZIP_STORED,
        zipfile.ZIP_DEFLATED,
    ):
        raise ValueError(f"{info.filename[:60]} is not an array written by numpy.savez")
    with archive.open(info) as entry:
        version = np.lib.format.read_magic(entry)
        # Later versions are for structured arrays, and their headers may have 4 GB.
        if version != (1, 0):
            raise ValueError(
                f"{info.filename[:60]} has version {version} of the format, and (1, 0) is allowed"
            )
        shape, _, dtype = np.lib.format.read_array_header_1_0(entry)
        if dtype.kind not in "biuf":
            raise ValueError(
                f"{info.filename[:60]} has dtype {str(dtype)[:60]}, and real numbers are allowed"
            )
        if (
            any(size < 0 for size in shape)
            or math.prod(shape) * dtype.itemsize != info.file_size - entry.tell()
        ):
            raise ValueError(
                f"{info.filename[:60]} has not the length of an array of shape {shape}"
            )
    return shape


def _npy_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(name) as entry:
        array = np.lib.format.read_array(entry, allow_pickle=False)
        entry.read(1)  # Reading to the end compares the checksum.
        return array


def _may_be_zip(path: pathlib.Path) -> bool:
    """Whether a file is a zip archive, perhaps a truncated one."""
    with path.open("rb") as file:
        return file.read(2) == b"PK" or zipfile.is_zipfile(path)


def _read_with_torch(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads PyTorch's format before 1.6 with PyTorch's own restricted loader."""
    try:
        import torch
    except ImportError as error:
        raise WeightsError(
            f"{path} is not a zip archive: it is damaged, or has PyTorch's format before 1.6, "
            f"which only PyTorch reads; `pip install 'dd_jax[torch]'` or download it again."
        ) from error
    try:
        contents = torch.load(path, map_location="cpu", weights_only=True)
        tensors = torch_zip.state_dict(path, contents, torch.Tensor)
        if any(
            tensor.nbytes > max(tensor.untyped_storage().nbytes(), _MOST_EXPANDED)
            for tensor in tensors.values()
        ):
            raise WeightsError(
                f"{path} has a tensor with more numbers than its storage; call contiguous() on it "
                f"and save it again."
            )
        return {name: tensor.detach().float().numpy() for name, tensor in tensors.items()}
    except WeightsError:
        raise
    except Exception as error:  # A damaged file can fail in any way.
        raise WeightsError(
            f"{path} is damaged, or PyTorch rejects it ({type(error).__name__}); download it again."
        ) from error
