"""MatConvNet's .mat files: SimpleNN nets, in which the authors' reference nets and MatConvNet's own models are stored.

`net.layers{i}.weights` is {filters, biases}, or there are `filters` and `biases` in older files; filters are (height, width, in,
out), those of linear layers too. A file is `net`, or the fields of one.

The authors' own loader turns filters over, height for width, together with their images; upright images want them as stored.
"""

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import scipy.io

from dd_jax.pretrained.errors import WeightsError


def read(path: str | os.PathLike, layers: list[str], *, reverse_channels: bool = False) -> dict[str, np.ndarray]:
    """The weights under PyTorch's names and in its layout; those of linear layers as (out, channels, height, width).

    Args:
      path: of a file in MATLAB's format 5 to 7; those of 7.3 are HDF5 and refused.
      layers: names for the layers with weights, in the order in which the net runs through them, because SimpleNN does not
        need names of its own. Layers beyond them are called "extra1", "extra2", ...
      reverse_channels: reverses the channels that the first layer reads. MatConvNet turned the filters of Caffe's nets from BGR
        to RGB when it imported them (import-caffe.py); this turns them back.

    Raises WeightsError where the file is damaged or holds something else.
    """
    try:
        contents = scipy.io.loadmat(os.fspath(path))
    except NotImplementedError as error:
        raise WeightsError(f"{os.fspath(path)} is a MATLAB 7.3 file; write it anew with save(..., '-v7').") from error
    except Exception as error:  # A damaged file can fail in any way.
        raise WeightsError(f"{os.fspath(path)} is damaged, or no MATLAB file ({error}); fetch it anew.") from error
    try:
        pairs = list(_weights(contents["net"][0, 0] if "net" in contents else contents))
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise WeightsError(f"{os.fspath(path)} does not hold a SimpleNN net of MatConvNet ({error}).") from error
    names = [*layers, *(f"extra{i + 1}" for i in range(len(pairs) - len(layers)))]
    arrays = {}
    for i, (name, (filters, biases)) in enumerate(zip(names, pairs, strict=False)):
        filters = filters[:, :, ::-1] if reverse_channels and i == 0 else filters
        arrays |= {f"{name}.weight": filters.transpose(3, 2, 0, 1), f"{name}.bias": biases.reshape(-1)}
    return arrays


def _weights(net: Any) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Filters, always of rank 4, and biases of every layer that has them."""
    for layer in net["layers"].reshape(-1):
        fields = layer.reshape(-1)[0]
        if "weights" in fields.dtype.names:
            arrays = list(fields["weights"].reshape(-1))
        elif "filters" in fields.dtype.names:
            arrays = [fields["filters"], fields["biases"]]
        else:
            continue
        if not arrays:
            continue
        if len(arrays) != 2 or any(array.dtype.kind != "f" for array in arrays):
            raise ValueError("a layer has other weights than filters and biases")
        filters, biases = arrays
        yield filters.reshape(filters.shape + (1,) * (4 - filters.ndim)), biases  # MATLAB drops axes of one at the end.
