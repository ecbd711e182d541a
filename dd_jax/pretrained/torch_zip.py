"""Reads PyTorch's .pth files without PyTorch and without running code in them.

Such a file is a zip archive. ROOT/data.pkl is a pickle in which tensors are calls of
`torch._utils._rebuild_tensor_v2` with storages, and ROOT/data/KEY has the raw numbers of each
storage. A pickle is a program that may call any function by its name. This reader accepts only the
names that rebuild tensors, and maps them to functions of this file.
"""

import io
import math
import os
import pickle
import zipfile
from collections.abc import Callable, Iterable, Mapping
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
NESTED_UNDER = ("state_dict", "model")  # Keys of the weights in checkpoints of training scripts.
# DataParallel and the authors' DeepFool add these prefixes to every name.
PREFIXES = ("module.", "net.")
_MOST_PREFIXES = 4  # DataParallel of DataParallel of DeepFool has three.
_MOST_AXES = 8
# Numbers in a tensor that has more numbers than its storage, which Tensor.expand creates.
_MOST_EXPANDED = 2**10
_MOST_KEY = 2**31  # Larger integers can be chosen so that all have the same hash.
_NAMES_SHOWN, _NAME_LENGTH = 5, 60  # Of names from files in errors.


def read_torch_zip(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays of a state dict by name, read-only and with the file's dtypes.

    The state dict may be under "state_dict" or "model" in a larger checkpoint. A prefix that all
    names share ("module.") is dropped. Raises WeightsError if the file is damaged or holds anything
    but tensors and plain containers.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            contents = _Unpickler(archive).load()
    except WeightsError as error:
        raise WeightsError(f"{os.fspath(path)} is rejected: {error}") from error
    except Exception as error:  # A damaged pickle can fail in any way.
        reason = f"{type(error).__name__}: {str(error)[:200]}".rstrip(". :")
        raise WeightsError(
            f"{os.fspath(path)} is damaged or not a file of torch.save ({reason}); download it "
            f"again."
        ) from error
    return {name: tensor.array for name, tensor in state_dict(path, contents, _Tensor).items()}


def state_dict(path: str | os.PathLike, contents: Any, tensor_type: type) -> dict[str, Any]:
    """The tensors by name in the contents of a PyTorch file.

    Raises WeightsError if there are none, or other values among them.
    """
    for key in NESTED_UNDER:
        if isinstance(contents, Mapping) and isinstance(contents.get(key), Mapping):
            contents = contents[key]
    if not isinstance(contents, Mapping) or not contents:
        raise WeightsError(
            f"{os.fspath(path)} holds no state dict; write one with torch.save(net.state_dict(), "
            f"path)."
        )
    tensors = dict(contents)
    others = [
        name
        for name, value in tensors.items()
        if not (type(name) is str and isinstance(value, tensor_type))
    ]
    if others:
        shown = ", ".join(_shown(name) for name in others[:_NAMES_SHOWN])
        more = f" and {len(others) - _NAMES_SHOWN} more" if len(others) > _NAMES_SHOWN else ""
        raise WeightsError(
            f"{os.fspath(path)} has {shown}{more} among its tensors; write it with "
            f"torch.save(net.state_dict(), path)."
        )
    for _ in range(_MOST_PREFIXES):
        prefix = next((p for p in PREFIXES if all(name.startswith(p) for name in tensors)), "")
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _shown(value: Any) -> str:
    """The first characters of a text from a file, or the type of another value.

    Nested shared tuples would take too long to print.
    """
    return str(value)[:_NAME_LENGTH] if type(value) in (str, int) else type(value).__name__


class _Tensor(NamedTuple):
    """An array of the file. It is wrapped because pickles can change bare arrays through
    `__setstate__`.
    """

    array: np.ndarray


class _Storage(NamedTuple):
    """A one-dimensional array; tensors are views of it."""

    array: np.ndarray


class _StorageType(NamedTuple):
    """Replaces torch.FloatStorage and similar types."""

    dtype: np.dtype


class _Allowed(NamedTuple):
    """A function that the pickle may call. It is a tuple so that the pickle cannot change it."""

    function: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


class _Dictionary(dict):
    """Replaces an OrderedDict, without the attributes that PyTorch adds."""

    def __setstate__(self, state: Any) -> None:
        pass


def _rebuild_tensor(
    storage: Any,
    offset: Any,
    shape: Any,
    strides: Any,
    requires_grad: Any,
    hooks: Any,
    metadata: Any = None,
) -> _Tensor:
    """A view of a storage, which may overlap others.

    A large view must not have more numbers than its storage.
    """
    if any(type(sizes) is not tuple or len(sizes) > _MOST_AXES for sizes in (shape, strides)):
        raise WeightsError(
            f"a tensor in it must have a shape and strides of at most {_MOST_AXES} axes."
        )
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, _Storage) or any(
        type(number) is not int or number < 0 for number in numbers
    ):
        raise WeightsError(
            "a tensor in it has an invalid storage, offset, shape or strides; download it again."
        )
    flat = storage.array
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if 0 in shape:
        return _Tensor(np.zeros(shape, flat.dtype))
    if last >= len(flat):
        raise WeightsError(
            f"a tensor of shape {shape} in it exceeds its storage of {len(flat)} numbers; download "
            f"it again."
        )
    if math.prod(shape) > max(len(flat), _MOST_EXPANDED):
        raise WeightsError(
            f"a tensor in it claims {math.prod(shape)} numbers of a storage of {len(flat)}; call "
            f"contiguous() on it and save it again."
        )
    in_bytes = tuple(stride * flat.itemsize for stride in strides)
    return _Tensor(np.lib.stride_tricks.as_strided(flat[offset:], shape, in_bytes, writeable=False))


def _rebuild_parameter(tensor: Any, requires_grad: Any, hooks: Any) -> Any:
    return tensor


def _check_keys(keys: Iterable[Any]) -> None:
    """Rejects keys with slow look-ups, such as nested tuples, whose hashes are not cached."""
    for key in keys:
        if not (type(key) is str or (type(key) is int and abs(key) < _MOST_KEY)):
            raise WeightsError(
                f"a dictionary in it has a key of type {type(key).__name__}, and only names and "
                f"small numbers are allowed."
            )


def _dictionary(pairs: Any = ()) -> _Dictionary:
    if type(pairs) not in (tuple, list) or any(
        type(pair) not in (tuple, list) or len(pair) != 2 for pair in pairs
    ):
        raise WeightsError("an OrderedDict in it does not consist of pairs; download it again.")
    _check_keys(key for key, _ in pairs)
    return _Dictionary(pairs)


_ALLOWED: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _Allowed(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Allowed(_rebuild_parameter),
    ("collections", "OrderedDict"): _Allowed(_dictionary),
    **{("torch", name): _StorageType(dtype) for name, dtype in _DTYPES.items()},
}


class _Instructions(dict[int, Callable[[Any], None]]):
    """The unpickler's action for each instruction.

    Raises WeightsError for instructions that torch.save does not write.
    """

    def __missing__(self, code: int) -> Callable[[Any], None]:
        raise WeightsError(
            f"its pickle has the instruction 0x{code:02x}, which torch.save does not write by "
            f"default; download it again, or save it again with torch.save(net.state_dict(), path)."
        )


# Of protocol 2. Other instructions may reserve any amount of memory (BYTEARRAY8) or create any
# instance (OBJ).
_INSTRUCTIONS = (
    *(
        pickle.PROTO,
        pickle.STOP,
        pickle.MARK,
        pickle.BINPUT,
        pickle.LONG_BINPUT,
        pickle.BINGET,
        pickle.LONG_BINGET,
    ),
    *(
        pickle.NONE,
        pickle.NEWTRUE,
        pickle.NEWFALSE,
        pickle.BININT,
        pickle.BININT1,
        pickle.BININT2,
        pickle.LONG1,
    ),
    *(
        pickle.BINFLOAT,
        pickle.BINUNICODE,
        pickle.EMPTY_TUPLE,
        pickle.TUPLE1,
        pickle.TUPLE2,
        pickle.TUPLE3,
        pickle.TUPLE,
    ),
    *(
        pickle.EMPTY_LIST,
        pickle.APPEND,
        pickle.APPENDS,
        pickle.EMPTY_DICT,
        pickle.SETITEM,
        pickle.SETITEMS,
    ),
    *(pickle.GLOBAL, pickle.REDUCE, pickle.BUILD, pickle.BINPERSID),
)


class _Unpickler(pickle._Unpickler):
    """Loads ROOT/data.pkl of an archive.

    This is Python's implementation, because the one in C reserves memory for any memo index.
    """

    dispatch = _Instructions(
        {code[0]: pickle._Unpickler.dispatch[code[0]] for code in _INSTRUCTIONS}
    )

    def __init__(self, archive: zipfile.ZipFile):
        pickles = [name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise WeightsError(
                "it is a zip archive without PyTorch's data.pkl; name a file of torch.save."
            )
        self._archive = archive
        self._root = pickles[0].removesuffix("data.pkl")
        self._storages: dict[str, _Storage] = {}
        # Bounds the total size of entries, which may overlap in a malicious archive.
        self._unread = os.stat(archive.filename).st_size
        order = f"{self._root}byteorder"
        self._byte_order = (
            ">" if order in archive.namelist() and self._entry("byteorder") == b"big" else "<"
        )
        super().__init__(io.BytesIO(self._entry("data.pkl")))

    def find_class(self, module: str, name: str) -> Any:
        """The replacement of an allowed name.

        Raises WeightsError for any other name, before anything is imported.
        """
        if (module, name) not in _ALLOWED:
            raise WeightsError(
                f"it asks for {_shown(module)}.{_shown(name)}, and only tensors and plain "
                "containers are read, because anything else could run code; only if you trust its "
                "source, load it with PyTorch and save its state_dict() again."
            )
        return _ALLOWED[module, name]

    def load_setitem(self) -> None:
        """Sets items as Python does, after a check of the keys."""
        _check_keys(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        """Sets items as Python does, after a check of the keys."""
        _check_keys(self.stack[::2])
        super().load_setitems()

    dispatch[pickle.SETITEM[0]], dispatch[pickle.SETITEMS[0]] = load_setitem, load_setitems

    def persistent_load(self, pid: Any) -> _Storage:
        """The storage of a tuple ("storage", type, key, device, number of elements)."""
        kind, storage_type, key, _, count = pid
        if (
            kind != "storage"
            or not isinstance(storage_type, _StorageType)
            or (type(key), type(count)) != (str, int)
        ):
            raise WeightsError(
                f"it refers to {_shown(kind)}, and only storages of tensors are read."
            )
        if key not in self._storages:
            array = np.frombuffer(
                self._entry(f"data/{key}"), storage_type.dtype.newbyteorder(self._byte_order)
            )
            if len(array) != count:
                raise WeightsError(
                    f"its storage {_shown(key)} has {len(array)} numbers instead of {count}."
                )
            self._storages[key] = _Storage(array.astype(storage_type.dtype, copy=False))
        return self._storages[key]

    def _entry(self, name: str) -> bytes:
        info = self._archive.getinfo(self._root + name)
        if info.compress_type != zipfile.ZIP_STORED:  # So the file's size bounds the contents.
            raise WeightsError(
                f"its entry {_shown(name)} is compressed, which torch.save never does; save it "
                f"again."
            )
        self._unread -= info.file_size
        if self._unread < 0:
            raise WeightsError("its entries are together larger than the file; download it again.")
        return self._archive.read(info)
