"""Readers of the official files of MNIST, CIFAR-10, CIFAR-100 and SVHN, without TensorFlow.

Each yields the (key, example) pairs that TFDS's own builder yields, with the image encoded as PNG.

SVHN's files are MATLAB files, and `scipy.io.loadmat` parses them. That is acceptable here, although
it is not for weight files, because TFDS compares the file with a recorded SHA-256 before it is
read; weight files come from anywhere.
"""

import gzip
import io
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dd_jax import extras

Records = Iterator[tuple[int, dict[str, Any]]]

# Bytes of the headers of IDX files: a magic number and each dimension take 4.
IDX_IMAGE_HEADER, IDX_LABEL_HEADER = 16, 8
CIFAR_IMAGE_BYTES = 3 * 32 * 32
CIFAR10_FOLDER, CIFAR100_FOLDER = "cifar-10-batches-bin", "cifar-100-binary"
CIFAR10_FILES = {
    "train": [f"data_batch_{i}.bin" for i in range(1, 6)],
    "test": ["test_batch.bin"],
}


def mnist_examples(split: str, paths: Sequence[Path]) -> Records:
    """Yields the examples of MNIST's two gzipped IDX files: images, then labels."""
    image_path, label_path = paths
    with gzip.open(image_path) as image_file, gzip.open(label_path) as label_file:
        pixels = np.frombuffer(image_file.read(), np.uint8, offset=IDX_IMAGE_HEADER)
        labels = np.frombuffer(label_file.read(), np.uint8, offset=IDX_LABEL_HEADER)
    images = pixels.reshape(-1, 28, 28)
    for key, (image, label) in enumerate(zip(images, labels, strict=True)):
        yield key, {"image": _png(image), "label": int(label)}


def cifar10_examples(split: str, paths: Sequence[Path]) -> Records:
    """Yields the examples of a split of CIFAR-10's binary archive."""
    members = [f"{CIFAR10_FOLDER}/{file}" for file in CIFAR10_FILES[split]]
    return _cifar_examples(split, paths[0], members, ("label",))


def cifar10_class_names(paths: Sequence[Path]) -> dict[str, list[str]]:
    """Returns the names of CIFAR-10's classes, from the archive."""
    return {"label": _lines(paths[0], f"{CIFAR10_FOLDER}/batches.meta.txt")}


def cifar100_examples(split: str, paths: Sequence[Path]) -> Records:
    """Yields the examples of a split of CIFAR-100's binary archive.

    "label" is the fine label, one of 100 classes; "coarse_label" one of 20 superclasses.
    """
    members = [f"{CIFAR100_FOLDER}/{split}.bin"]
    return _cifar_examples(split, paths[0], members, ("coarse_label", "label"))


def cifar100_class_names(paths: Sequence[Path]) -> dict[str, list[str]]:
    """Returns the names of CIFAR-100's classes and superclasses, from the archive."""
    files = {"label": "fine_label_names.txt", "coarse_label": "coarse_label_names.txt"}
    return {
        feature: _lines(paths[0], f"{CIFAR100_FOLDER}/{file}") for feature, file in files.items()
    }


def svhn_examples(split: str, paths: Sequence[Path]) -> Records:
    """Yields the examples of a MATLAB file of SVHN's cropped digits.

    The file holds X, uint8 (32, 32, 3, n), and y (n, 1), where 10 stands for the digit 0.
    """
    import scipy.io  # JAX brings it.

    arrays = scipy.io.loadmat(paths[0], variable_names=("X", "y"))
    images, labels = np.moveaxis(arrays["X"], -1, 0), arrays["y"].ravel()
    for key, (image, label) in enumerate(zip(images, labels, strict=True)):
        example = {"id": f"{split}_{key:06d}", "image": _png(np.ascontiguousarray(image))}
        yield key, {**example, "label": int(label) % 10}


def _cifar_examples(
    split: str, archive: Path, members: Sequence[str], labels: Sequence[str]
) -> Records:
    """Yields the records of files in a binary archive: a byte for each label, then three planes of
    32 x 32 pixels.
    """
    with tarfile.open(archive) as files:
        contents = b"".join(_contents(files, member) for member in members)
    records = np.frombuffer(contents, np.uint8).reshape(-1, len(labels) + CIFAR_IMAGE_BYTES)
    for key, record in enumerate(records):
        image = record[len(labels) :].reshape(3, 32, 32).transpose(1, 2, 0)
        classes = {feature: int(record[place]) for place, feature in enumerate(labels)}
        yield key, {"id": f"{split}_{key:05d}", "image": _png(image), **classes}


def _lines(archive: Path, member: str) -> list[str]:
    with tarfile.open(archive) as files:
        return _contents(files, member).decode().split()


def _contents(files: tarfile.TarFile, member: str) -> bytes:
    file = files.extractfile(member)
    if file is None:
        raise OSError(f"{member} of the archive is not a file")
    return file.read()


def _png(pixels: np.ndarray) -> bytes:
    with extras.needed("train"):
        import PIL.Image

    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()
