"""Reads PyTorch's format before 1.6 without PyTorch and without running code in it
(`torch_pickle`).

Such a file is five pickles, one after the other: a magic number, the version 1001 of the protocol,
facts about the machine, the contents, and the list of the storages' keys. Then follow the storages
in the order of that list, each as its number of elements (8 bytes) and the raw numbers.
"""

import io
import os
from typing import Any, Literal, NamedTuple

import numpy as np

from dd_jax.pretrained.errors import WeightsError
from dd_jax.pretrained.state_dicts import find_state_dict, shown
from dd_jax.pretrained.torch_pickle import Storage, Tensor, Unpickler, rejecting

_MAGIC_NUMBER, _VERSION = 0x1950A86A20F9469CFC6C, 1001
MAGIC = b"\x80\x02\x8a\x0a" + _MAGIC_NUMBER.to_bytes(10, "little") + b"."
"""The first bytes of such a file."""
_COUNT = np.dtype("<i8")
Order = Literal["<", ">"]


def read_torch_legacy(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays of a state dict by their names in the file, as `torch_zip.read_torch_zip` gives
    them.
    """
    with rejecting(path), open(path, "rb") as file:
        contents = _contents(file)
    return {name: tensor.array for name, tensor in find_state_dict(path, contents, Tensor).items()}


def _contents(file: io.BufferedIOBase) -> Any:
    """The contents are unpickled twice: first to learn of the storages, whose numbers come later in
    the file, then with them.
    """
    magic, version, machine = (Unpickler(file, _no_storage).load() for _ in range(3))
    if magic != _MAGIC_NUMBER or version != _VERSION or not isinstance(machine, dict):
        raise WeightsError("it has not the format of torch.save; download it again.")
    order: Order = "<" if machine.get("little_endian", True) else ">"
    start = file.tell()
    announced = _Announced(os.fstat(file.fileno()).st_size, {})
    Unpickler(file, announced.storage).load()
    storages = {}
    for key in _keys(file):
        if key not in announced.sizes or key in storages:
            raise WeightsError(f"its storage {shown(key)} belongs to no tensor; download it again.")
        storages[key] = _storage(file, key, *announced.sizes[key], order)
    file.seek(start)
    return Unpickler(file, lambda key, dtype, count: storages[key]).load()


class _Announced(NamedTuple):
    """The dtypes and sizes of the storages that the contents refer to. A size is at most that of
    the file.
    """

    file_size: int
    sizes: dict[str, tuple[np.dtype, int]]

    def storage(self, key: str, dtype: np.dtype, count: int) -> Storage:
        """Zeros in place of the storage, which take no memory."""
        if not 0 <= count * dtype.itemsize <= self.file_size:
            raise WeightsError(
                f"its storage {shown(key)} claims {count} numbers; download it again."
            )
        if self.sizes.setdefault(key, (dtype, count)) != (dtype, count):
            raise WeightsError(f"its storage {shown(key)} has two sizes; download it again.")
        return Storage(np.broadcast_to(np.zeros((), dtype), (count,)))


def _keys(file: io.BufferedIOBase) -> list[str]:
    keys = Unpickler(file, _no_storage).load()
    if type(keys) is not list or any(type(key) is not str for key in keys):
        raise WeightsError("its list of storages is not one of names; download it again.")
    return keys


def _storage(
    file: io.BufferedIOBase, key: str, dtype: np.dtype, count: int, order: Order
) -> Storage:
    stored = np.frombuffer(file.read(_COUNT.itemsize), _COUNT.newbyteorder(order))
    content = file.read(count * dtype.itemsize)
    if stored.tolist() != [count] or len(content) != count * dtype.itemsize:
        raise WeightsError(
            f"its storage {shown(key)} has not the {count} numbers that its tensors need; download "
            "it again."
        )
    array = np.frombuffer(content, dtype.newbyteorder(order))
    return Storage(array.astype(dtype, copy=False))


def _no_storage(key: str, dtype: np.dtype, count: int) -> Storage:
    raise WeightsError("it has tensors where the format has none; download it again.")
