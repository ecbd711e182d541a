"""Unpickles what PyTorch writes, without PyTorch and without running code in it.

A pickle is a program that may call any function by its name. PyTorch's are calls of
`torch._utils._rebuild_tensor_v2` with storages, in plain containers. This reader accepts only the
names that rebuild tensors, and maps them to functions of this file.
"""

import contextlib
import io
import math
import os
import pickle
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from dd_jax.pretrained.errors import WeightsError
from dd_jax.pretrained.state_dicts import shown

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
_MOST_AXES = 8
# Numbers in a tensor that has more numbers than its storage, which Tensor.expand creates.
_MOST_EXPANDED = 2**10
_MOST_KEY = 2**31  # Larger integers can be chosen so that all have the same hash.


@contextlib.contextmanager
def rejecting(path: str | os.PathLike) -> Iterator[None]:
    """Turns whatever reading a file raises into a WeightsError with the file's name."""
    try:
        yield
    except WeightsError as error:
        raise WeightsError(f"{os.fspath(path)} is rejected: {error}") from error
    except Exception as error:  # A damaged pickle can fail in any way.
        reason = f"{type(error).__name__}: {str(error)[:200]}".rstrip(". :")
        raise WeightsError(
            f"{os.fspath(path)} is damaged or not a file of torch.save ({reason}); download it "
            f"again."
        ) from error


class Tensor(NamedTuple):
    """An array of the file. It is wrapped because pickles can change bare arrays through
    `__setstate__`.
    """

    array: np.ndarray


class Storage(NamedTuple):
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
) -> Tensor:
    """A view of a storage, which may overlap others.

    A large view must not have more numbers than its storage.
    """
    if any(type(sizes) is not tuple or len(sizes) > _MOST_AXES for sizes in (shape, strides)):
        raise WeightsError(
            f"a tensor in it must have a shape and strides of at most {_MOST_AXES} axes."
        )
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, Storage) or any(
        type(number) is not int or number < 0 for number in numbers
    ):
        raise WeightsError(
            "a tensor in it has an invalid storage, offset, shape or strides; download it again."
        )
    flat = storage.array
    last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if 0 in shape:
        return Tensor(np.zeros(shape, flat.dtype))
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
    return Tensor(np.lib.stride_tricks.as_strided(flat[offset:], shape, in_bytes, writeable=False))


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


class Unpickler(pickle._Unpickler):
    """Loads the next pickle of a stream; `storage_of` gives the storage of a key, a dtype and a
    number of elements.

    This is Python's implementation, because the one in C reserves memory for any memo index.
    """

    dispatch = _Instructions(
        {code[0]: pickle._Unpickler.dispatch[code[0]] for code in _INSTRUCTIONS}
    )

    def __init__(
        self, stream: io.BufferedIOBase, storage_of: Callable[[str, np.dtype, int], Storage]
    ):
        super().__init__(stream)
        self._storage_of = storage_of

    def find_class(self, module: str, name: str) -> Any:
        """The replacement of an allowed name.

        Raises WeightsError for any other name, before anything is imported.
        """
        if (module, name) not in _ALLOWED:
            raise WeightsError(
                f"it asks for {shown(module)}.{shown(name)}, and only tensors and plain "
                "containers are read, because anything else could run code; only if you trust its "
                "source, load it with PyTorch and save its state_dict() again."
            )
        return _ALLOWED[module, name]

    # What follows uses the pickle module's reader in Python, of which mypy knows the outside alone.
    def load_setitem(self) -> None:
        """Sets items as Python does, after a check of the keys."""
        _check_keys(self.stack[-2:-1])  # type: ignore[attr-defined]
        super().load_setitem()  # type: ignore[misc]

    def load_setitems(self) -> None:
        """Sets items as Python does, after a check of the keys."""
        _check_keys(self.stack[::2])  # type: ignore[attr-defined]
        super().load_setitems()  # type: ignore[misc]

    dispatch[pickle.SETITEM[0]], dispatch[pickle.SETITEMS[0]] = load_setitem, load_setitems

    def persistent_load(self, pid: Any) -> Storage:
        """The storage of a tuple ("storage", type, key, device, number of elements), which the old
        format extends by the description of a view.
        """
        kind, storage_type, key, _, count, *view = pid
        if (
            kind != "storage"
            or not isinstance(storage_type, _StorageType)
            or (type(key), type(count)) != (str, int)
            or view not in ([], [None])
        ):
            raise WeightsError(
                f"it refers to {shown(kind)}, and only storages of tensors are read."
            )
        return self._storage_of(key, storage_type.dtype, count)
