"""Whole data sets as arrays in memory: the bundled digits, and sets that TFDS prepared.

Images are returned in the shape that the net takes, so that any set can be used with any net; the
`description` of a set says how its images were changed. A set that is missing is reported at once,
in one sentence: the files are looked for before TFDS is imported.
"""

import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8

from dd_jax import extras
from dd_jax.data.catalog import DATA_SETS, DataError, ImageShape, entry_of
from dd_jax.data.download import download as download_set
from dd_jax.data.prepared import data_directory, download_command, prepared_directory

Images = UInt8[np.ndarray, "_ _ _ _"]
Labels = Int32[np.ndarray, " n"]
Progress = Callable[[str], None]

# Number of records read and decoded between two progress messages.
RECORDS_PER_CHUNK = 10_000
# An image on black gets a black margin of at most this many pixels on a side (28 -> 32 pixels needs
# 2). For larger changes it is resized.
WIDEST_PADDING = 4
# Every DIGITS_TEST_STRIDE-th digit is a test image, which gives 1437 + 360.
DIGITS_TEST_STRIDE = 5
# ITU-R BT.601 luma, the weights that PIL's mode "L" uses.
LUMA = np.array([0.299, 0.587, 0.114])


class DataSet(NamedTuple):
    """A data set in memory.

    Attributes:
      name: one of `SOURCES`.
      description: one line to print, which says how the images were changed.
      train_images, test_images: uint8 `(n, h, w, c)`, 0..255.
      train_labels, test_labels: int32 `(n,)`, in `[0, num_classes)`.
      num_classes: number of classes of the whole set, also where a limit leaves fewer.
    """

    name: str
    description: str
    train_images: Images
    train_labels: Labels
    test_images: Images
    test_labels: Labels
    num_classes: int


class _Split(NamedTuple):
    images: Images
    labels: Labels
    size: int  # of the whole split, without a limit


def load(
    name: str,
    image_shape: ImageShape,
    *,
    data_dir: str | os.PathLike | None = None,
    train_limit: int | None = None,
    test_limit: int | None = None,
    download: bool = False,
    progress: Progress | None = None,
) -> DataSet:
    """Loads a data set into memory, its images in the shape asked for.

    - "digits": scikit-learn's 1797 hand-written digits of 8x8 pixels (0..16 becomes 0..255), which
      need no download. The split is fixed: in the list sorted stably by class, every fifth image,
      from the first on, is a test image (360; the other 1437 are for training), so that all classes
      are represented evenly. Both parts keep the set's own order.
    - The other names: read from `DATA_DIR/NAME/VERSION/*.array_record*`, the layout of TFDS, in
      TFDS's order (fixed, but not the official one).

    A gray image is repeated over three channels; a color image becomes gray by its BT.601 luma.
    Sizes are changed by antialiased bicubic interpolation. MNIST instead gets a black margin where
    at most 4 pixels on a side are enough (28x28 to 32x32).

    Args:
      name: one of `SOURCES`.
      image_shape: `(height, width, channels)` wanted, with 1 or 3 channels.
      data_dir: TFDS's directory; None means `$TFDS_DATA_DIR`, or else `~/tensorflow_datasets`.
      train_limit, test_limit: keep only the first so many images; None, or more than there are,
        keeps all.
      download: download a TFDS set that is not there.
      progress: called with a short message from time to time while records are read (MNIST takes
        about 5 s).

    Raises:
      ValueError: unknown name, impossible image shape, or a limit that is not positive.
      DataError: the set is missing, or cannot be read or downloaded.
      MissingPackageError: a package to read it is missing.
    """
    entry = entry_of(name)
    _check_shape(image_shape)
    limits = {"train": train_limit, "test": test_limit}
    _check_limits(limits)
    if entry.version is None:
        splits, source = _read_digits(limits), "scikit-learn"
    else:
        directory = _find_or_download(name, data_directory(data_dir), download)
        splits, source = _read_tfds(name, directory, limits, progress), f"TFDS {directory.name}"
    fitted = {
        split: _fit_images(part.images, image_shape, pad=entry.on_black)
        for split, part in splits.items()
    }
    _, change = fitted["test"]
    return DataSet(
        name,
        f"{name} ({'; '.join([f'{source}, {change}', *_limits_said(splits)])})",
        fitted["train"][0],
        splits["train"].labels,
        fitted["test"][0],
        splits["test"].labels,
        entry.num_classes,
    )


def hold_out(data_set: DataSet, count: int) -> DataSet:
    """The set with its last `count` training images in place of the test images, to choose options
    on: they are trained on no more, and the test images are not in it.

    ValueError unless 0 < count < number of training images.
    """
    num_train = len(data_set.train_labels)
    if not 0 < count < num_train:
        raise ValueError(
            f"count must be at least 1 and leave training images; got {count} of {num_train}"
        )
    first = num_train - count
    said = f"the last {count} of {num_train} training images in place of the test images"
    return data_set._replace(
        description=f"{data_set.description.removesuffix(')')}; {said})",
        train_images=data_set.train_images[:first],
        train_labels=data_set.train_labels[:first],
        test_images=data_set.train_images[first:],
        test_labels=data_set.train_labels[first:],
    )


def _check_shape(image_shape: ImageShape) -> None:
    if len(image_shape) != 3 or min(image_shape) < 1 or image_shape[2] not in (1, 3):
        raise ValueError(
            f"image_shape must be (height, width, 1 or 3) with positive sizes, got "
            f"{tuple(image_shape)}"
        )


def _check_limits(limits: dict[str, int | None]) -> None:
    for split, limit in limits.items():
        if limit is not None and limit < 1:
            raise ValueError(
                f"{split}_limit must be a positive number of images, or None for all of them, got "
                f"{limit}"
            )


def _limits_said(splits: dict[str, _Split]) -> list[str]:
    """Returns a phrase for each split that a limit made smaller."""
    return [
        f"first {len(part.labels)} of {part.size} {split} images"
        for split, part in splits.items()
        if len(part.labels) < part.size
    ]


def _find_or_download(name: str, root: Path, download: bool) -> Path:
    try:
        return prepared_directory(name, root)
    except DataError:
        if not download:
            raise
    return download_set(name, root)


def _read_digits(limits: dict[str, int | None]) -> dict[str, _Split]:
    with extras.needed("train"):
        from sklearn.datasets import load_digits
    pixels, labels = load_digits(return_X_y=True)
    images = np.rint(pixels * (255 / 16)).astype(np.uint8)
    images = images.reshape(-1, *DATA_SETS["digits"].image_shape)
    labels = labels.astype(np.int32)
    is_test = np.zeros(len(labels), bool)
    is_test[np.argsort(labels, kind="stable")[::DIGITS_TEST_STRIDE]] = True
    chosen = {"train": np.flatnonzero(~is_test), "test": np.flatnonzero(is_test)}
    return {
        split: _Split(images[rows[: limits[split]]], labels[rows[: limits[split]]], len(rows))
        for split, rows in chosen.items()
    }


def _read_tfds(
    name: str, directory: Path, limits: dict[str, int | None], progress: Progress | None
) -> dict[str, _Split]:
    with extras.needed("train"):
        import array_record.python  # noqa: F401  (TFDS would fail only at the first record)
        import tensorflow_datasets as tfds
    splits = {}
    try:
        # This builder only reads and never uses the network. The compressed bytes are decoded here
        # because that is three times as fast as in TFDS, and the same with and without OpenCV.
        builder = tfds.builder_from_directory(directory)
        decoders = {"image": tfds.decode.SkipDecoding()}
        for split, limit in limits.items():
            records = builder.as_data_source(split=split, decoders=decoders)
            count = min(len(records), limit or len(records))
            shape = DATA_SETS[name].image_shape
            decoded = _decode(records, count, shape, f"{name} {split}", progress)
            splits[split] = _Split(*decoded, len(records))
        return splits
    except (OSError, RuntimeError, ValueError, LookupError) as error:
        raise DataError(
            f"{name} in {directory} cannot be read ({type(error).__name__}: {error}): delete that "
            "directory and download it again with "
            f"`{download_command(name, directory.parent.parent)}`"
        ) from error


def _decode(
    records, count: int, image_shape: ImageShape, title: str, progress: Progress | None
) -> tuple[Images, Labels]:
    with extras.needed("train"):
        import PIL.Image

    images, labels = np.empty((count, *image_shape), np.uint8), np.empty(count, np.int32)
    for start in range(0, count, RECORDS_PER_CHUNK):
        rows = range(start, min(start + RECORDS_PER_CHUNK, count))
        for row, record in zip(rows, records.__getitems__(rows), strict=True):
            picture = PIL.Image.open(io.BytesIO(record["image"]), formats=("PNG", "JPEG"))
            images[row] = np.asarray(picture).reshape(image_shape)
            labels[row] = record["label"]
        if progress:
            progress(f"{title}: {rows.stop} of {count} images read")
    return images, labels


def _fit_images(images: Images, image_shape: ImageShape, *, pad: bool) -> tuple[Images, str]:
    """Brings images to a shape. Returns them and a phrase for the description that says how."""
    height, width, channels = images.shape[1:]
    new_height, new_width, new_channels = image_shape
    change, color = f"{height}x{width}x{channels}", ""
    if channels == 3 and new_channels == 1:
        images = np.rint(images @ LUMA).astype(np.uint8)[..., None]
        color = ", colors to their luma"
    rows, columns = new_height - height, new_width - width
    if (rows, columns) != (0, 0):
        if pad and min(rows, columns) >= 0 and max(rows, columns) <= 2 * WIDEST_PADDING:
            margins = [
                (0, 0),
                (rows // 2, rows - rows // 2),
                (columns // 2, columns - columns // 2),
                (0, 0),
            ]
            images = np.pad(images, margins)
            verb = "padded with black"
        else:
            images = _resize(images, new_height, new_width)
            verb = "enlarged" if min(rows, columns) >= 0 else "resized"
        change += f" {verb} to {new_height}x{new_width}x{new_channels}"
    elif new_channels != channels:
        change += f" to {new_height}x{new_width}x{new_channels}"
    if channels == 1 and new_channels == 3:
        images = np.repeat(images, 3, axis=-1)
        color = ", gray in each channel"
    return images, change + color


def _resize(images: Images, height: int, width: int) -> Images:
    with extras.needed("train"):
        import PIL.Image

    resized = np.empty((len(images), height, width, images.shape[-1]), np.uint8)
    for source, target in zip(images, resized, strict=True):
        # PIL has no mode for (h, w, 1), hence the squeeze.
        picture = PIL.Image.fromarray(source.squeeze(-1) if source.shape[-1] == 1 else source)
        target[:] = np.asarray(
            picture.resize((width, height), PIL.Image.Resampling.BICUBIC)
        ).reshape(target.shape)
    return resized
