"""Reads the weights in Caffe's .caffemodel files.

A file is a NetParameter message (caffe.proto) in protobuf's wire format:

    NetParameter { layers = 2: V1LayerParameter { name = 4, blobs = 6 },
                   layer = 100: LayerParameter { name = 1, blobs = 7 } }
    BlobProto    { num = 1, channels = 2, height = 3, width = 4, data = 5, shape = 7: { dim = 1 },
                   double_data = 8 }

Not by protobuf's library: it needs a schema module, and expands a damaged shape 16-fold in memory
before its length can be checked.
"""

import itertools
import math
import os
import pathlib
from collections.abc import Iterator

import numpy as np

from dd_jax.pretrained.errors import WeightsError

_VARINT, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5  # Protobuf's wire types.
_MOST_VARINT_BITS = 70
_LAYER_FIELDS = {2: (4, 6), 100: (1, 7)}  # In NetParameter: (name, blobs).
_V0_LAYER = 1  # In V1LayerParameter: the whole layer, in Caffe before 2014.
_LEGACY_SHAPE = (1, 2, 3, 4)
_DATA: dict[int, np.dtype] = {5: np.dtype("<f4"), 8: np.dtype("<f8")}
_ENTRIES = ("weight", "bias")
_MOST_AXES = 8


def read_caffemodel(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The weights as read-only arrays "LAYER.weight" and "LAYER.bias".

    Their shapes are Caffe's, which are also PyTorch's. Reads Caffe's two current formats. Raises
    WeightsError if the file is damaged or has an older format.
    """
    content = pathlib.Path(path).read_bytes()
    try:
        return dict(_weights(memoryview(content)))
    except WeightsError as error:
        raise WeightsError(f"{os.fspath(path)} cannot be read as a .caffemodel: {error}") from error
    except Exception as error:  # A damaged file can fail in any way.
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise WeightsError(
            f"{os.fspath(path)} is damaged or not a .caffemodel ({reason}); download it again."
        ) from error


def _weights(net: memoryview) -> Iterator[tuple[str, np.ndarray]]:
    found = False
    for number, layer in _fields(net):
        if number not in _LAYER_FIELDS or not isinstance(layer, memoryview):
            continue
        found = True
        name_field, blobs_field = _LAYER_FIELDS[number]
        fields = list(_fields(layer))
        if number == 2 and any(field == _V0_LAYER for field, _ in fields):
            raise WeightsError(
                "it has Caffe's format of 2013; run Caffe's upgrade_net_proto_binary on it."
            )
        name = next((_text(value) for field, value in fields if field == name_field), "")
        blobs = [value for field, value in fields if field == blobs_field]
        for i, blob in enumerate(blobs):
            entry = _ENTRIES[i] if i < len(_ENTRIES) else f"blob{i}"
            yield f"{name}.{entry}", _array(blob, f"{name}.{entry}")
    if not found:
        raise WeightsError("it has no layers; name a .caffemodel with weights.")


def _array(blob: int | memoryview, entry: str) -> np.ndarray:
    shape: list[int] = []
    legacy: dict[int, int] = {}
    parts: dict[int, list[memoryview]] = {field: [] for field in _DATA}
    for field, value in _fields(_message(blob)):
        if field == 7:
            shape += _dimensions(_message(value), entry)
        elif field in _LEGACY_SHAPE:
            legacy[field] = _integer(value)
        elif field in _DATA:
            parts[field].append(_message(value))
    field = 5 if parts[5] else 8
    data = parts[field][0] if len(parts[field]) == 1 else b"".join(parts[field])
    sizes = (
        tuple(shape)
        if shape or not legacy
        else _without_leading_ones(tuple(legacy.get(i, 0) for i in _LEGACY_SHAPE))
    )
    count = len(data) / _DATA[field].itemsize
    # The sizes are multiplied only if they are few and small: the product of 100,000 large ones
    # takes minutes.
    if len(sizes) > _MOST_AXES or any(size > count for size in sizes) or math.prod(sizes) != count:
        raise WeightsError(
            f"{entry} has {count:g} numbers, which do not make an array of shape {sizes}; download "
            f"it again."
        )
    return np.frombuffer(data, _DATA[field]).reshape(sizes)


def _dimensions(message: memoryview, entry: str) -> list[int]:
    dims = (dim for key, dims in _fields(message) if key == 1 for dim in _integers(dims))
    first = list(itertools.islice(dims, _MOST_AXES + 1))
    if len(first) > _MOST_AXES:
        raise WeightsError(f"{entry} has more than {_MOST_AXES} axes; download it again.")
    return first


def _without_leading_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Removes the leading ones of older Caffe's biases, (1, 1, 1, out), and linear weights, (1, 1,
    out, in).
    """
    if shape[:3] == (1, 1, 1):
        return shape[3:]
    return shape[2:] if shape[:2] == (1, 1) else shape


def _fields(message: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of a message in order: the number, and an integer or the bytes."""
    position = 0
    while position < len(message):
        key, position = _varint(message, position)
        number, wire_type = key >> 3, key & 7
        if wire_type == _VARINT:
            value, position = _varint(message, position)
            yield number, value
            continue
        if wire_type == _BYTES:
            size, position = _varint(message, position)
        elif wire_type in (_EIGHT_BYTES, _FOUR_BYTES):
            size = 8 if wire_type == _EIGHT_BYTES else 4
        else:
            raise WeightsError(
                f"it is damaged or not a protobuf message (wire type {wire_type}); download it "
                f"again."
            )
        if size > len(message) - position:
            raise WeightsError(
                f"it is truncated ({size - len(message) + position} bytes are missing); download "
                f"it again."
            )
        yield number, message[position : position + size]
        position += size


def _varint(message: memoryview, position: int) -> tuple[int, int]:
    """An integer stored as seven bits per byte, the lowest first, and the position after it."""
    value = 0
    for shift in range(0, _MOST_VARINT_BITS, 7):
        if position >= len(message):
            raise WeightsError("it is truncated; download it again.")
        byte = message[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise WeightsError(
        "it is damaged or not a protobuf message (an endless integer); download it again."
    )


def _integers(value: int | memoryview) -> Iterator[int]:
    """The integers of a repeated field, which are stored one by one or packed."""
    if isinstance(value, int):
        yield value
        return
    position = 0
    while position < len(value):
        number, position = _varint(value, position)
        yield number


def _integer(value: int | memoryview) -> int:
    if not isinstance(value, int):
        raise WeightsError("it is damaged (bytes instead of an integer); download it again.")
    return value


def _message(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise WeightsError("it is damaged (an integer instead of a message); download it again.")
    return value


def _text(value: int | memoryview) -> str:
    return bytes(_message(value)).decode("utf-8", "replace")
