"""Reads the weights in MatConvNet's .mat files.

They hold SimpleNN nets: the authors' reference nets, and MatConvNet's models. A file holds `net`,
or the fields of one. `net.layers{i}.weights` is {filters, biases}; older files have `filters` and
`biases`. Filters are (height, width, in, out), also those of linear layers.

The authors' loader transposes height and width of filters and images; for upright images, filters
are used as stored.

Not by SciPy: its MATLAB reader crashes or hangs on some files with one changed byte, and reserves
memory for whatever dimensions a file claims.
"""

import itertools
import math
import os
import pathlib
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np

from dd_jax.pretrained import errors
from dd_jax.pretrained.errors import WeightsError

_VARIABLES = ("net", "layers")
_HEADER, _NAME_WITHIN = 128, 1024  # Bytes at the start of a file and of a variable.
_ORDERS = {b"IM": "<", b"MI": ">"}
_MATRIX, _COMPRESSED = 14, 15  # Types of elements that are not numbers.
_NUMBERS = {
    1: "i1",
    2: "u1",
    3: "i2",
    4: "u2",
    5: "i4",
    6: "u4",
    7: "f4",
    9: "f8",
    12: "i8",
    13: "u8",
}
# Classes of arrays.
_CELL, _STRUCT = 1, 2
_FLOATS: dict[int, np.dtype] = {6: np.dtype(np.float64), 7: np.dtype(np.float32)}
_MOST_AXES = 8
_COMPLEX = 0x800  # A flag of arrays.
# A net has some hundred arrays, nested at most six levels deep.
_MOST_ARRAYS, _MOST_FIELDS, _MOST_LEVELS = 100_000, 1000, 20


def read_mat(
    path: str | os.PathLike, layers: list[str], *, reverse_channels: bool = False
) -> dict[str, np.ndarray]:
    """The weights with PyTorch's names and layout; those of linear layers are (out, channels,
    height, width).

    Args:
      path: a file in MATLAB's format 5 to 7. Format 7.3 (HDF5) is rejected.
      layers: names for the layers with weights in the net's order, because SimpleNN does not
        require names. Further layers are called "extra1", "extra2", ...
      reverse_channels: reverses the first layer's input channels. MatConvNet converted the filters
        of Caffe's nets from BGR to RGB (import-caffe.py); this converts them back.

    Raises WeightsError if the file is damaged or holds something else.
    """
    name, content = os.fspath(path), pathlib.Path(path).read_bytes()
    try:
        contents = _variables(content)
    except NotImplementedError as error:
        raise WeightsError(
            f"{name} is a MATLAB 7.3 file, and formats 5 to 7 are read; save it again with "
            f"save(..., '-v7')."
        ) from error
    except Exception as error:  # A damaged file can fail in any way.
        raise WeightsError(
            f"{name} is damaged or not a MATLAB file ({str(error)[:200]}); download it again."
        ) from error
    try:
        pairs = list(_weights(contents["net"][0] if "net" in contents else contents))
    except (KeyError, IndexError, ValueError, TypeError, AttributeError) as error:
        raise WeightsError(
            f"{name} does not hold a SimpleNN net of MatConvNet ({str(error)[:200]}); name a file "
            f"that does."
        ) from error
    names = [*layers, *(f"extra{i + 1}" for i in range(len(pairs) - len(layers)))]
    arrays: dict[str, np.ndarray] = {}
    for i, (layer, (filters, biases)) in enumerate(zip(names, pairs, strict=False)):
        filters = filters[:, :, ::-1] if reverse_channels and i == 0 else filters
        arrays |= {
            f"{layer}.weight": filters.transpose(3, 2, 0, 1),
            f"{layer}.bias": biases.reshape(-1),
        }
    return arrays


def _weights(net: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The filters, always of rank 4, and biases of every layer that has them."""
    for layer in net["layers"]:
        fields = layer if isinstance(layer, dict) else layer[0]
        if not isinstance(fields, dict):
            raise ValueError("a layer is not a structure")
        if "weights" in fields:
            arrays = fields["weights"]
        elif "filters" in fields:
            arrays = [fields["filters"], fields["biases"]]
        else:
            continue
        if len(arrays) == 0:
            continue
        if len(arrays) != 2 or not all(isinstance(array, np.ndarray) for array in arrays):
            raise ValueError("a layer has other weights than filters and biases")
        filters, biases = arrays
        if filters.ndim > 4:
            raise ValueError(
                f"filters of a layer have shape {filters.shape}, and at most four axes are allowed"
            )
        # MATLAB drops trailing axes of size one.
        yield filters.reshape(filters.shape + (1,) * (4 - filters.ndim)), biases


def _variables(content: bytes) -> dict[str, Any]:
    """The variables of a file that may hold a net.

    Raises NotImplementedError for MATLAB 7.3, and any exception for a damaged file.
    """
    order = _ORDERS.get(content[126:128])
    if order is None:
        raise ValueError("it does not have the header of MATLAB 5")
    if struct.unpack(f"{order}H", content[124:126])[0] >> 8 == 2:
        raise NotImplementedError
    reader, variables, position = _Reader(order), {}, _HEADER
    while position < len(content):
        kind, size = struct.unpack_from(f"{order}II", content, position)
        variable = memoryview(content)[position : position + 8 + size]
        position += 8 + size
        if len(variable) < 8 + size or kind not in (_MATRIX, _COMPRESSED):
            raise ValueError("it is truncated, or a part of it is not a variable")
        if kind == _COMPRESSED:
            variable = _decompressed(variable[8:], order, errors.MOST_UNCOMPRESSED)
        name = _name(variable, order)
        if name in _VARIABLES and name not in variables:
            variables[name] = reader.array(variable[8:], level=1)
    return variables


class _Reader:
    """Parses arrays from the bytes after their tags.

    Raises ValueError or struct.error for damaged arrays and for more than nets have.
    """

    def __init__(self, order: Any):
        self._order, self._arrays, self._bytes = order, 0, 0

    def array(self, content: memoryview, level: int) -> Any:
        """Numbers as an array, a cell array as a list, a structure array as a list of dictionaries.

        None for other arrays.
        """
        self._arrays += 1
        if self._arrays > _MOST_ARRAYS or level > _MOST_LEVELS:
            raise ValueError(
                f"it has more than {_MOST_ARRAYS} arrays, or more than {_MOST_LEVELS} nested levels"
            )
        if not content:
            return np.zeros((0, 0))
        elements = _elements(content, self._order)
        (_, flags), (_, dimensions), _ = itertools.islice(elements, 3)
        flags = struct.unpack_from(f"{self._order}I", flags)[0]
        kind = flags & 0xFF
        if kind == _CELL:
            return self._inner(elements, level)
        if kind == _STRUCT:
            return self._structures(elements, level)
        if kind not in _FLOATS or flags & _COMPLEX:
            return None
        shape = struct.unpack(f"{self._order}{len(dimensions) // 4}i", dimensions)
        return self._numbers(*next(elements), _FLOATS[kind], shape)

    def _inner(self, elements: Iterator[tuple[int, memoryview]], level: int) -> list[Any]:
        arrays = []
        for kind, content in elements:
            if kind != _MATRIX:
                raise ValueError("an array in it contains something that is not an array")
            arrays.append(self.array(content, level + 1))
        return arrays

    def _structures(
        self, elements: Iterator[tuple[int, memoryview]], level: int
    ) -> list[dict[str, Any]]:
        (_, length), (_, names) = itertools.islice(elements, 2)
        length = struct.unpack(f"{self._order}i", length)[0]
        if length < 1 or len(names) // length > _MOST_FIELDS:
            raise ValueError(f"a structure in it has more than {_MOST_FIELDS} fields")
        fields = [
            bytes(names[i : i + length]).split(b"\0")[0].decode("latin1")
            for i in range(0, len(names), length)
        ]
        values = self._inner(elements, level)
        rows = (values[i : i + len(fields)] for i in range(0, len(values), max(len(fields), 1)))
        return [dict(zip(fields, row, strict=True)) for row in rows]

    def _numbers(
        self, kind: int, stored: memoryview, dtype: np.dtype, shape: tuple[int, ...]
    ) -> np.ndarray:
        """Floats. MATLAB stores them as integers if those are shorter."""
        numbers = np.frombuffer(stored, np.dtype(_NUMBERS[kind]).newbyteorder(self._order))
        self._bytes += numbers.size * dtype.itemsize
        if self._bytes > errors.MOST_UNCOMPRESSED:
            raise ValueError(
                f"its arrays have more than the {errors.MOST_UNCOMPRESSED} bytes that are allowed"
            )
        if len(shape) > _MOST_AXES or min(shape, default=0) < 0 or math.prod(shape) != numbers.size:
            raise ValueError(f"{numbers.size} numbers in it do not make an array of shape {shape}")
        return numbers.astype(dtype).reshape(shape, order="F")


def _decompressed(data: memoryview, order: str, most: int) -> memoryview:
    """A variable with its tag, or the first bytes of a variable that does not hold a net.

    Raises ValueError for a variable of more than `most` bytes.
    """
    first = memoryview(zlib.decompressobj().decompress(data, _NAME_WITHIN))
    kind, size = struct.unpack_from(f"{order}II", first)
    if kind != _MATRIX:
        raise ValueError("a part of it is not a variable")
    if _name(first, order) not in _VARIABLES:
        return first
    if 8 + size > most:
        raise ValueError(
            f"its variables have more than the {errors.MOST_UNCOMPRESSED} bytes that are allowed"
        )
    # One byte more makes zlib compare the checksum.
    whole = zlib.decompressobj().decompress(data, 8 + size + 1)
    if len(whole) < 8 + size:
        raise ValueError("it is truncated")
    return memoryview(whole)[: 8 + size]


def _name(variable: memoryview, order: str) -> str:
    """The name of a variable, from its first bytes."""
    _, _, (_, name) = itertools.islice(_elements(variable[8:], order), 3)
    return bytes(name).decode("latin1")


def _elements(data: memoryview, order: str) -> Iterator[tuple[int, memoryview]]:
    """The type and content of each element in `data`.

    Raises ValueError or struct.error if the elements do not fill `data`.
    """
    position = 0
    while position < len(data):
        kind, size = struct.unpack_from(f"{order}II", data, position)
        small = kind >> 16  # Bytes of content in the tag itself.
        start, kind, size = (
            (position + 4, kind & 0xFFFF, small) if small else (position + 8, kind, size)
        )
        position = start + (4 if small else size if kind == _MATRIX else -(-size // 8) * 8)
        if small > 4 or position > len(data):
            raise ValueError("it is truncated, or damaged")
        yield kind, data[start : start + size]
