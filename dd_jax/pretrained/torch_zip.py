"""PyTorch's .pth files, read without PyTorch and without running anything that is in them.

Such a file is a zip archive: ROOT/data.pkl, a pickle in which tensors are calls of `torch._utils._rebuild_tensor_v2` upon
storages, and ROOT/data/KEY, the raw numbers of each storage. A pickle is a program that may call whatever it can name. This
reader lets it name what rebuilds tensors and nothing else, and those names lead to functions of this file.
"""

import io
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from dd_jax.pretrained.errors import WeightsError

_DTYPES = {
    "FloatStorage": np.dtype(np.float32),
    "DoubleStorage": np.dtype(np.float64),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(jnp.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
NESTED_UNDER = ("state_dict", "model")  # Where training scripts put the weights among other things.
PREFIXES = ("module.", "net.")  # What DataParallel, and the authors' DeepFool, put before every name.


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays of a state dict, under their names; read-only, of the dtypes of the file.

    The state dict may lie under "state_dict" or "model" in a larger checkpoint. A prefix that all its names share ("module.")
    is dropped. Raises WeightsError where the file is damaged, or holds anything but tensors and plain containers.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            contents = _Unpickler(archive).load()
    except WeightsError as error:
        raise WeightsError(f"{os.fspath(path)} is refused: {error}") from error
    except Exception as error:  # A damaged pickle can fail in any way.
        reason = f"{type(error).__name__}: {error}".rstrip(". :")
        raise WeightsError(
            f"{os.fspath(path)} is damaged, or not a file that torch.save wrote ({reason}); fetch it anew."
        ) from error
    return {name: tensor.array for name, tensor in state_dict(path, contents, _Tensor).items()}


def state_dict(path: str | os.PathLike, contents: Any, tensor_type: type) -> dict[str, Any]:
    """The tensors by name among what a PyTorch file held; WeightsError where there are none, or other things among them."""
    for key in NESTED_UNDER:
        if isinstance(contents, Mapping) and isinstance(contents.get(key), Mapping):
            contents = contents[key]
    if not isinstance(contents, Mapping) or not contents:
        raise WeightsError(f"{os.fspath(path)} holds no state dict; write one with torch.save(net.state_dict(), path).")
    tensors = dict(contents)
    others = [
        str(name) for name, value in tensors.items() if not (type(name) is str and isinstance(value, tensor_type))
    ]
    if others:
        raise WeightsError(
            f"{os.fspath(path)} has {', '.join(others)} among its tensors; write it with torch.save(net.state_dict(), path)."
        )
    while prefix := next((p for p in PREFIXES if all(name.startswith(p) for name in tensors)), ""):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


class _Tensor(NamedTuple):
    """An array out of the file. Not a bare one, because pickles can change what they hold through `__setstate__`."""

    array: np.ndarray


class _Storage(NamedTuple):
    """A one-dimensional array that tensors are cut from."""

    array: np.ndarray


class _StorageType(NamedTuple):
    """What stands for torch.FloatStorage and its like."""

    dtype: np.dtype


class _Allowed(NamedTuple):
    """What stands for a function that the pickle may call. A tuple, so that the pickle cannot change it."""

    function: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


class _Dictionary(dict):
    """What stands for an OrderedDict, without the attributes that PyTorch hangs on it."""

    def __setstate__(self, state: Any) -> None:
        pass


def _rebuild_tensor(
    storage: Any, offset: Any, shape: Any, strides: Any, requires_grad: Any, hooks: Any, metadata: Any = None
) -> _Tensor:
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, _Storage) or any(type(number) is not int or number < 0 for number in numbers):
        raise WeightsError("a tensor in it has a storage, an offset, a shape or strides that are none.")
    flat = storage.array
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if 0 in shape:
        return _Tensor(np.zeros(shape, flat.dtype))
    if last >= len(flat):
        raise WeightsError(f"a tensor of shape {shape} in it reaches beyond its storage of {len(flat)} numbers.")
    in_bytes = tuple(stride * flat.itemsize for stride in strides)
    return _Tensor(np.lib.stride_tricks.as_strided(flat[offset:], shape, in_bytes, writeable=False))


def _rebuild_parameter(tensor: Any, requires_grad: Any, hooks: Any) -> Any:
    return tensor


_ALLOWED: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _Allowed(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Allowed(_rebuild_parameter),
    ("collections", "OrderedDict"): _Allowed(_Dictionary),
    **{("torch", name): _StorageType(dtype) for name, dtype in _DTYPES.items()},
}


class _Unpickler(pickle._Unpickler):
    """Loads ROOT/data.pkl of an archive.

    Python's own implementation and not the one in C, which reserves as much memory as the number of a memo entry asks for.
    """

    def __init__(self, archive: zipfile.ZipFile):
        pickles = [name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise WeightsError("it is a zip archive without PyTorch's data.pkl.")
        self._archive = archive
        self._root = pickles[0].removesuffix("data.pkl")
        self._storages: dict[str, _Storage] = {}
        order = f"{self._root}byteorder"
        self._byte_order = ">" if order in archive.namelist() and self._entry("byteorder") == b"big" else "<"
        super().__init__(io.BytesIO(self._entry("data.pkl")))

    def find_class(self, module: str, name: str) -> Any:
        """What the pickle may name; WeightsError for everything else, before anything of it is imported."""
        if (module, name) not in _ALLOWED:
            raise WeightsError(
                f"it asks for {module}.{name}, and only tensors and plain containers are read, because anything else could run"
                " code; only if you trust its source, load it with PyTorch and write its state_dict() anew."
            )
        return _ALLOWED[module, name]

    def get_extension(self, code: int) -> Any:
        """Nothing: PyTorch's files have no numbered globals."""
        raise WeightsError(
            f"it asks for the registered extension {code}, and only tensors and plain containers are read."
        )

    def persistent_load(self, pid: Any) -> _Storage:
        """A storage, ("storage", type, key, device, number of elements)."""
        kind, storage_type, key, _, count = pid
        if kind != "storage" or not isinstance(storage_type, _StorageType) or type(key) is not str:
            raise WeightsError(f"it refers to {kind!r}, and only storages of tensors are read.")
        if key not in self._storages:
            array = np.frombuffer(self._entry(f"data/{key}"), storage_type.dtype.newbyteorder(self._byte_order))
            if len(array) != count:
                raise WeightsError(f"its storage {key} has {len(array)} numbers instead of {count}.")
            self._storages[key] = _Storage(array.astype(storage_type.dtype, copy=False))
        return self._storages[key]

    def _entry(self, name: str) -> bytes:
        info = self._archive.getinfo(self._root + name)
        if info.compress_type != zipfile.ZIP_STORED:  # Bounds what is read by the size of the file.
            raise WeightsError(f"its entry {name} is compressed, which PyTorch's never are.")
        return self._archive.read(info)
