"""PyTorch's .pth files, read without PyTorch and without running anything that is in them.

Such a file is a zip archive: ROOT/data.pkl, a pickle in which tensors are calls of
`torch._utils._rebuild_tensor_v2` upon storages, and ROOT/data/KEY, the raw numbers of each storage.
A pickle is a program that may call whatever it can name. This reader lets it name what rebuilds
tensors and nothing else, and those names lead to functions of this file.
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
NESTED_UNDER = ("state_dict", "model")  # Where training scripts put the weights among other things.
# What DataParallel, and the authors' DeepFool, put before every name.
PREFIXES = ("module.", "net.")
_MOST_PREFIXES = 4  # DataParallel of DataParallel of DeepFool has three.
_MOST_AXES = 8
# numbers in a tensor that has more of them than its storage, as Tensor.expand makes them
_MOST_EXPANDED = 2**10
_MOST_KEY = 2**31  # Larger integers could be chosen such that they all have one hash.
_NAMES_SHOWN, _NAME_LENGTH = 5, 60  # of names out of files, in what is raised


def read(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays of a state dict, under their names; read-only, of the dtypes of the file.

    The state dict may lie under "state_dict" or "model" in a larger checkpoint. A prefix that all
    its names share ("module.") is dropped. Raises WeightsError where the file is damaged, or holds
    anything but tensors and plain containers.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            contents = _Unpickler(archive).load()
    except WeightsError as error:
        raise WeightsError(f"{os.fspath(path)} is refused: {error}") from error
    except Exception as error:  # A damaged pickle can fail in any way.
        reason = f"{type(error).__name__}: {str(error)[:200]}".rstrip(". :")
        raise WeightsError(
            f"{os.fspath(path)} is damaged, or not a file that torch.save wrote ({reason}); fetch "
            f"it anew."
        ) from error
    return {name: tensor.array for name, tensor in state_dict(path, contents, _Tensor).items()}


def state_dict(path: str | os.PathLike, contents: Any, tensor_type: type) -> dict[str, Any]:
    """The tensors by name among what a PyTorch file held; WeightsError where there are none, or
    other things among them.
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
    """A text out of a file, cut; of anything else the type, because shared tuples take for ever to
    be written out.
    """
    return str(value)[:_NAME_LENGTH] if type(value) in (str, int) else type(value).__name__


class _Tensor(NamedTuple):
    """An array out of the file. Not a bare one, because pickles can change what they hold through
    `__setstate__`.
    """

    array: np.ndarray


class _Storage(NamedTuple):
    """A one-dimensional array that tensors are cut from."""

    array: np.ndarray


class _StorageType(NamedTuple):
    """What stands for torch.FloatStorage and its like."""

    dtype: np.dtype


class _Allowed(NamedTuple):
    """What stands for a function that the pickle may call. A tuple, so that the pickle cannot
    change it.
    """

    function: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)


class _Dictionary(dict):
    """What stands for an OrderedDict, without the attributes that PyTorch hangs on it."""

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
    """A view of a storage, which may overlap others; of many numbers only as far as the storage has
    them.
    """
    if any(type(sizes) is not tuple or len(sizes) > _MOST_AXES for sizes in (shape, strides)):
        raise WeightsError(f"a tensor in it has no shape and strides of at most {_MOST_AXES} axes.")
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, _Storage) or any(
        type(number) is not int or number < 0 for number in numbers
    ):
        raise WeightsError(
            "a tensor in it has a storage, an offset, a shape or strides that are none."
        )
    flat = storage.array
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if 0 in shape:
        return _Tensor(np.zeros(shape, flat.dtype))
    if last >= len(flat):
        raise WeightsError(
            f"a tensor of shape {shape} in it reaches beyond its storage of {len(flat)} numbers."
        )
    if math.prod(shape) > max(len(flat), _MOST_EXPANDED):
        raise WeightsError(
            f"a tensor in it claims {math.prod(shape)} numbers of a storage of {len(flat)}; call "
            f"contiguous() on it."
        )
    in_bytes = tuple(stride * flat.itemsize for stride in strides)
    return _Tensor(np.lib.stride_tricks.as_strided(flat[offset:], shape, in_bytes, writeable=False))


def _rebuild_parameter(tensor: Any, requires_grad: Any, hooks: Any) -> Any:
    return tensor


def _check_keys(keys: Iterable[Any]) -> None:
    """Refuses keys that take long to look up, such as tuples of tuples, whose hashes are not
    remembered.
    """
    for key in keys:
        if not (type(key) is str or (type(key) is int and abs(key) < _MOST_KEY)):
            raise WeightsError(
                f"a dictionary in it has a key of type {type(key).__name__} that is no name and no "
                f"small number."
            )


def _dictionary(pairs: Any = ()) -> _Dictionary:
    if type(pairs) not in (tuple, list) or any(
        type(pair) not in (tuple, list) or len(pair) != 2 for pair in pairs
    ):
        raise WeightsError("an OrderedDict in it is not made of pairs.")
    _check_keys(key for key, _ in pairs)
    return _Dictionary(pairs)


_ALLOWED: dict[tuple[str, str], Any] = {
    ("torch._utils", "_rebuild_tensor_v2"): _Allowed(_rebuild_tensor),
    ("torch._utils", "_rebuild_parameter"): _Allowed(_rebuild_parameter),
    ("collections", "OrderedDict"): _Allowed(_dictionary),
    **{("torch", name): _StorageType(dtype) for name, dtype in _DTYPES.items()},
}


class _Instructions(dict[int, Callable[[Any], None]]):
    """What the unpickler does for each byte of its program; raises WeightsError for those that
    torch.save does not write.
    """

    def __missing__(self, code: int) -> Callable[[Any], None]:
        raise WeightsError(
            f"its pickle has the instruction 0x{code:02x}, which torch.save writes at no default "
            f"setting; fetch it anew, or write"
            " it anew with torch.save(net.state_dict(), path)."
        )


# Of protocol 2. Of what is left out, some reserves the memory that it is told to (BYTEARRAY8), some
# makes any instance (OBJ).
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

    Python's own implementation and not the one in C, which reserves as much memory as the number of
    a memo entry asks for.
    """

    dispatch = _Instructions(
        {code[0]: pickle._Unpickler.dispatch[code[0]] for code in _INSTRUCTIONS}
    )

    def __init__(self, archive: zipfile.ZipFile):
        pickles = [name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise WeightsError("it is a zip archive without PyTorch's data.pkl.")
        self._archive = archive
        self._root = pickles[0].removesuffix("data.pkl")
        self._storages: dict[str, _Storage] = {}
        # Bounds what entries that lie inside each other come to.
        self._unread = os.stat(archive.filename).st_size
        order = f"{self._root}byteorder"
        self._byte_order = (
            ">" if order in archive.namelist() and self._entry("byteorder") == b"big" else "<"
        )
        super().__init__(io.BytesIO(self._entry("data.pkl")))

    def find_class(self, module: str, name: str) -> Any:
        """What the pickle may name; WeightsError for everything else, before anything of it is
        imported.
        """
        if (module, name) not in _ALLOWED:
            raise WeightsError(
                f"it asks for {_shown(module)}.{_shown(name)}, and only tensors and plain "
                f"containers are read, because anything"
                " else could run code; only if you trust its source, load it with PyTorch and "
                "write its state_dict() anew."
            )
        return _ALLOWED[module, name]

    def load_setitem(self) -> None:
        """As Python's own, for keys that are names or small numbers."""
        _check_keys(self.stack[-2:-1])
        super().load_setitem()

    def load_setitems(self) -> None:
        """As Python's own, for keys that are names or small numbers."""
        _check_keys(self.stack[::2])
        super().load_setitems()

    dispatch[pickle.SETITEM[0]], dispatch[pickle.SETITEMS[0]] = load_setitem, load_setitems

    def persistent_load(self, pid: Any) -> _Storage:
        """A storage, ("storage", type, key, device, number of elements)."""
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
        if info.compress_type != zipfile.ZIP_STORED:  # Bounds what is read by the size of the file.
            raise WeightsError(
                f"its entry {_shown(name)} is compressed, which PyTorch's never are."
            )
        self._unread -= info.file_size
        if self._unread < 0:
            raise WeightsError("its entries are together larger than the file; fetch it anew.")
        return self._archive.read(info)
