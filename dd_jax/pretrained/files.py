"""Reads weight files by their suffix, and writes safetensors."""

import math
import os
import pathlib
import warnings
import zipfile
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from dd_jax import models
from dd_jax.pretrained import caffe, errors, matconvnet, robustbench, torch_legacy, torch_zip
from dd_jax.pretrained.errors import WeightsError
from dd_jax.pretrained.layouts import (
    check_shapes,
    layer_names,
    said_of_unused,
    to_torch,
    variables_from_torch,
)
from dd_jax.pretrained.state_dicts import plain_names

SUFFIXES = {
    ".pth": "PyTorch",
    ".pt": "PyTorch",
    ".tar": "PyTorch's .pth.tar",
    ".ckpt": "PyTorch",
    ".model": "PyTorch, the authors' own runs",
    ".safetensors": "safetensors with PyTorch's names",
    ".caffemodel": "Caffe",
    ".mat": "MatConvNet",
    ".npz": "NumPy with PyTorch's names",
}
_HTML_STARTS = (b"<!doctype html", b"<html", b"<?xml")
_NAMES_SHOWN, _NAME_LENGTH = 5, 60  # Of names from files in errors.
_LONGEST_START = 512  # Bytes of a file that are searched for its kind.


def load(path: str | os.PathLike, name: str) -> dict[str, Any]:
    """Reads the weights of the net `name`, one of `models.NAMES` or of `models.FAMILIES`.

    Returns {"params": ...}, and "batch_stats" for nets with batch normalization: the variables of
    `models.create(name).apply`, as float32 NumPy arrays whatever the file's dtypes. The file
    determines the number of classes. A net that normalizes its inputs itself takes mu and sigma
    from the file; where the file has none, from RobustBench's code if the file has the name of one
    of its models (`robustbench.UNSTORED`), and otherwise its own defaults.

    The state dict may be nested and its names may have prefixes (`state_dicts`). Weights that the
    published files of a net have and the net does not use are left out with a warning.

    Corrupt or malicious files are rejected: no code in them runs, and memory is not reserved for
    sizes that they only claim. Raises WeightsError for a file that is missing, of an unknown kind,
    damaged or rejected, and for a web page that was saved in place of a file. If arrays do not fit
    the net, the error lists all that are missing, unknown or of another shape.
    """
    arrays = read_arrays(path, name)
    if unused := said_of_unused(name, arrays):
        warnings.warn(f"{os.fspath(path)}: {unused}", stacklevel=2)
    return checked_variables(path, name, arrays)


def save(path: str | os.PathLike, name: str, variables: Mapping[str, Any]) -> None:
    """Writes the variables of the net `name` to a .safetensors file with PyTorch's names and layout
    (`to_torch`), for `load` and `robust_classifier`, and for PyTorch.

    A failed write leaves no file of this name. Raises WeightsError for another suffix, an unknown
    name and variables of another net.
    """
    if pathlib.Path(path).suffix != ".safetensors":
        raise WeightsError(
            f"{os.fspath(path)} would be a safetensors file; give it a name that ends in "
            ".safetensors."
        )
    save_safetensors(path, to_torch(name, variables))


def checked_variables(
    path: str | os.PathLike, name: str, arrays: dict[str, np.ndarray]
) -> dict[str, Any]:
    """`variables_from_torch` in float32, with the file's name in its errors, and with RobustBench's
    normalization where the file has the name of a net and lacks it.
    """
    try:
        variables = variables_from_torch(name, arrays)
        variables = robustbench.completed(path, name, variables, arrays)
        return jax.tree.map(lambda array: np.asarray(array, np.float32, order="C"), variables)
    except WeightsError as error:
        raise WeightsError(f"{os.fspath(path)}: {error}") from error


def read_arrays(path: str | os.PathLike, name: str | None) -> dict[str, np.ndarray]:
    """The arrays of a file with PyTorch's names and layout and the file's dtypes, without prefixes
    (`state_dicts.plain_names`).

    They are not yet compared with the net's. `name` None stands for the net that the file's names
    and shapes belong to. Compressed files (.npz and .mat) may have 1 GiB of contents. Raises
    WeightsError as `load` does, also if the system cannot read the file.
    """
    path = pathlib.Path(path)
    if path.suffix not in SUFFIXES:
        kinds = ", ".join(f"{suffix} ({kind})" for suffix, kind in SUFFIXES.items())
        raise WeightsError(f"{path} has an unknown suffix; name a file of {kinds}.")
    try:
        if not path.is_file():
            raise WeightsError(f"There is no file {path}; name one that holds the weights.")
        with path.open("rb") as file:  # Not all readers say why they cannot open a file.
            start = file.read(_LONGEST_START)
        if start.lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(_HTML_STARTS):
            raise WeightsError(
                f"{path} is a web page and no file of weights, such as the page on which Google "
                "Drive asks whether to download a large file; download it again in a browser or "
                "with gdown, and confirm the download."
            )
        arrays = _read_kind(path, name, start)
        return {plain: arrays[entry] for plain, entry in plain_names(arrays).items()}
    except OSError as error:
        raise WeightsError(
            f"{path} cannot be read ({error.strerror or error}); check its permissions and its "
            f"disk."
        ) from error


def detected(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The name of the net whose weights have these names and shapes; WeightsError where there is
    none.
    """
    name = models.detect(shapes)
    if name is None:
        some = ", ".join(entry[:_NAME_LENGTH] for entry in list(shapes)[:_NAMES_SHOWN])
        families = ", ".join(family.names for family in models.FAMILIES)
        raise WeightsError(
            f"these are the weights of no net that is recognized (the first are {some}); those of "
            f"{families} are, and other nets must be named."
        )
    return name


def _read_kind(path: pathlib.Path, name: str | None, start: bytes) -> dict[str, np.ndarray]:
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix == ".npz":
        return _read_npz(path, name)
    if path.suffix in (".caffemodel", ".mat"):
        if name is None:
            raise WeightsError(
                f"{path} does not say which net it is; name the net, or convert the file with "
                "python -m dd_jax.pretrained."
            )
        if path.suffix == ".caffemodel":
            return caffe.read_caffemodel(path)
        return matconvnet.read_mat(path, layer_names(name), reverse_channels=name == "alexnet")
    if start.startswith(torch_legacy.MAGIC):
        return torch_legacy.read_torch_legacy(path)
    return torch_zip.read_torch_zip(path)


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


def _read_npz(path: pathlib.Path, name: str | None) -> dict[str, np.ndarray]:
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
            plain = {new: shapes[entry] for new, entry in plain_names(shapes).items()}
            check_shapes(name or detected(plain), plain)
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
