"""Downloads a data set and prepares it for `dd_jax.data.load`, without TensorFlow.

python -m dd_jax.data mnist [--data_dir DIR]
"""

import argparse
import gzip
import io
import os
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dd_jax.data import datasets

# Seconds to wait for a first answer; without it TFDS retries for minutes where there is no network.
CONNECTION_TIMEOUT = 10
NAMES = ("mnist", "cifar10")
MNIST_PARTS = ("images-idx3", "labels-idx1")
CIFAR10_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz"
CIFAR10_CLASSES = [
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
]


def download(name: str, data_dir: str | os.PathLike | None = None) -> Path:
    """Downloads a TFDS set, prepares it as array_record and returns its directory; one that is
    there is left alone.

    Args:
      name: "mnist" or "cifar10".
      data_dir: TFDS's directory; None means `$TFDS_DATA_DIR`, or else `~/tensorflow_datasets`.

    Raises:
      sources.DataError: another name, no network, a failed download, or a missing package.
    """
    _check_name(name)
    root = datasets.data_directory(data_dir)
    try:
        return datasets.prepared_directory(name, root)
    except datasets.DataError:
        pass  # what this function is for
    try:
        import array_record.python  # noqa: F401  (needed only after the download, when it would be late to say so)
        import requests
        from tensorflow_datasets.core.download import DownloadError
        from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

        builder_class, url = _builder_class(name)
    except ImportError as error:
        raise datasets.DataError(
            f"downloading needs `pip install tensorflow-datasets array-record importlib_resources` "
            f"({error})"
        ) from error
    try:
        requests.head(url, timeout=CONNECTION_TIMEOUT)
        builder = builder_class(data_dir=root, file_format="array_record")
        builder.download_and_prepare(file_format="array_record")
    # requests' errors are OSErrors
    except (OSError, DownloadError, NonMatchingChecksumError) as error:
        raise datasets.DataError(
            f"{name} could not be downloaded from {url} ({type(error).__name__}): where there is "
            f"no network, copy"
            f" {root / name} from a machine that has prepared it, or use "
            f"--config.data.name=digits, which needs no"
            " download"
        ) from error
    return datasets.prepared_directory(name, root)


def _check_name(name: str) -> None:
    if name not in NAMES:
        raise datasets.DataError(
            f"{name!r} cannot be downloaded: choose one of {', '.join(NAMES)} (digits needs no "
            f"download, and other sets"
            " are prepared by TFDS itself)"
        )


def _builder_class(name: str) -> tuple[type, str]:
    """Returns a builder that is TFDS's own but for unpacking and PNG, where TFDS needs TensorFlow;
    its URL.
    """
    _check_name(name)
    import tensorflow_datasets as tfds

    with tfds.core.registered.skip_registration():

        class MNIST(tfds.image_classification.MNIST):
            def _split_generators(self, dl_manager):
                files = {"train": "train", "test": "t10k"}
                paths = {
                    split: dl_manager.download(
                        [f"{self.URL}{file}-{part}-ubyte.gz" for part in MNIST_PARTS]
                    )
                    for split, file in files.items()
                }
                return {split: mnist_examples(*paths[split]) for split in files}

        class Cifar10(tfds.image_classification.Cifar10):
            def _split_generators(self, dl_manager):
                self.info.features["label"].names = CIFAR10_CLASSES
                archive = dl_manager.download(CIFAR10_URL)
                return {split: cifar10_examples(archive, split) for split in ("train", "test")}

    return {"mnist": (MNIST, MNIST.URL), "cifar10": (Cifar10, CIFAR10_URL)}[name]


def mnist_examples(image_path: os.PathLike, label_path: os.PathLike) -> Iterator[tuple[int, dict]]:
    """Yields TFDS's `(key, example)` pairs from MNIST's two gzipped IDX files, whose headers take
    16 and 8 bytes.
    """
    with gzip.open(image_path) as image_file, gzip.open(label_path) as label_file:
        images = np.frombuffer(image_file.read(), np.uint8, offset=16).reshape(-1, 28, 28)
        labels = np.frombuffer(label_file.read(), np.uint8, offset=8)
    for key, (image, label) in enumerate(zip(images, labels, strict=True)):
        yield key, {"image": _png(image), "label": int(label)}


def cifar10_examples(archive: os.PathLike, split: str) -> Iterator[tuple[int, dict]]:
    """Yields TFDS's `(key, example)` pairs from CIFAR-10's binary archive: a label, then 3 planes
    of 32x32 each.
    """
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
    with tarfile.open(archive) as files:
        contents = b"".join(
            files.extractfile(f"cifar-10-batches-bin/{name}").read() for name in names
        )
    for key, record in enumerate(np.frombuffer(contents, np.uint8).reshape(-1, 1 + 3 * 32 * 32)):
        image = record[1:].reshape(3, 32, 32).transpose(1, 2, 0)
        yield key, {"id": f"{split}_{key:05d}", "image": _png(image), "label": int(record[0])}


def _png(pixels: np.ndarray) -> bytes:
    import PIL.Image

    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def main() -> None:
    """Runs the command line; an error that the user can mend is one sentence and exit status 1."""
    parser = argparse.ArgumentParser(
        prog="python -m dd_jax.data", description="Downloads a data set, once."
    )
    parser.add_argument("name", help=f"one of {', '.join(NAMES)}; digits needs no download")
    parser.add_argument("--data_dir", help="default: $TFDS_DATA_DIR, or else ~/tensorflow_datasets")
    arguments = parser.parse_args()
    try:
        print(f"{arguments.name} is ready in {download(arguments.name, arguments.data_dir)}")
    except datasets.DataError as error:
        sys.exit(f"error: {error}")
