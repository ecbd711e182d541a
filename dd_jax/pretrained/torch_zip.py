"""Reads PyTorch's files without PyTorch and without running code in them (`torch_pickle`).

Such a file is a zip archive. ROOT/data.pkl is a pickle with the tensors, and ROOT/data/KEY has the
raw numbers of each storage. Files from before PyTorch 1.6 are in `torch_legacy`.
"""

import io
import os
import zipfile
from typing import Any, Literal

import numpy as np

from dd_jax.pretrained.errors import WeightsError
from dd_jax.pretrained.state_dicts import find_state_dict, shown
from dd_jax.pretrained.torch_pickle import Storage, Tensor, Unpickler, rejecting


def read_torch_zip(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """The arrays of a state dict by their names in the file, read-only and with the file's dtypes.

    The state dict may be in a larger checkpoint (`state_dicts.NESTED_UNDER`). Raises WeightsError
    if the file is damaged or holds anything but tensors and plain containers.
    """
    with rejecting(path), zipfile.ZipFile(path) as archive:
        contents = _Archive(archive).contents()
    return {name: tensor.array for name, tensor in find_state_dict(path, contents, Tensor).items()}


class _Archive:
    """The entries of an archive, which are together no larger than the file."""

    def __init__(self, archive: zipfile.ZipFile):
        pickles = [name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl"]
        if len(pickles) != 1:
            raise WeightsError(
                "it is a zip archive without PyTorch's data.pkl; name a file of torch.save."
            )
        self._archive = archive
        self._root = pickles[0].removesuffix("data.pkl")
        self._storages: dict[str, Storage] = {}
        # Bounds the total size of entries, which may overlap in a malicious archive.
        self._unread = os.stat(archive.filename or "").st_size
        order = f"{self._root}byteorder"
        self._byte_order: Literal[">", "<"] = (
            ">" if order in archive.namelist() and self._entry("byteorder") == b"big" else "<"
        )

    def contents(self) -> Any:
        """What the archive's pickle holds."""
        return Unpickler(io.BytesIO(self._entry("data.pkl")), self._storage).load()

    def _storage(self, key: str, dtype: np.dtype, count: int) -> Storage:
        if key not in self._storages:
            array = np.frombuffer(self._entry(f"data/{key}"), dtype.newbyteorder(self._byte_order))
            if len(array) != count:
                raise WeightsError(
                    f"its storage {shown(key)} has {len(array)} numbers instead of {count}."
                )
            self._storages[key] = Storage(array.astype(dtype, copy=False))
        return self._storages[key]

    def _entry(self, name: str) -> bytes:
        info = self._archive.getinfo(self._root + name)
        if info.compress_type != zipfile.ZIP_STORED:  # So the file's size bounds the contents.
            raise WeightsError(
                f"its entry {shown(name)} is compressed, which torch.save never does; save it "
                f"again."
            )
        self._unread -= info.file_size
        if self._unread < 0:
            raise WeightsError("its entries are together larger than the file; download it again.")
        return self._archive.read(info)
