"""Whole data sets as arrays in memory: the bundled digits, and MNIST and CIFAR-10 as TFDS prepared
them.

Every set is delivered in the image shape that the network asks for, so that any set runs with any
network; the `description` of a set says what was done to its images. Data that is not there costs
one sentence, at once: TFDS is asked only after the files were seen.
"""

import io
import os
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int32, UInt8

Images = UInt8[np.ndarray, "_ _ _ _"]
Labels = Int32[np.ndarray, " n"]
ImageShape = tuple[int, int, int]

# Number of records read and decoded between two progress messages.
RECORDS_PER_CHUNK = 10_000
# A digit on black may gain a black margin this wide (28 -> 32 pixels needs 2); beyond that it is
# enlarged.
WIDEST_PADDING = 4
# Every DIGITS_TEST_STRIDE-th digit is a test image, which gives 1437 + 360.
DIGITS_TEST_STRIDE = 5
# ITU-R BT.601 luma, the weights that PIL's mode "L" uses.
LUMA = np.array([0.299, 0.587, 0.114])


class DataError(ValueError):
    """A data set cannot be had here. The message is one sentence for the user: what was looked for,
    and what to do.
    """


class DataSet(NamedTuple):
    """A data set in memory.

    Attributes:
      name: one of `SOURCES`.
      description: one line to print, with whatever was done to the images.
      train_images, test_images: uint8 `(n, h, w, c)`, 0..255.
      train_labels, test_labels: int32 `(n,)`, in `[0, num_classes)`.
      num_classes: number of classes of the whole set, whichever occur under a limit.
    """

    name: str
    description: str
    train_images: Images
    train_labels: Labels
    test_images: Images
    test_labels: Labels
    num_classes: int


class _TfdsSet(NamedTuple):
    version: str  # the version that the errors name; any other prepared version is read as well
    image_shape: ImageShape
    on_black: bool  # a black margin then adds nothing to the picture


TFDS_SETS = {
    "mnist": _TfdsSet("3.0.1", (28, 28, 1), on_black=True),
    "cifar10": _TfdsSet("3.0.2", (32, 32, 3), on_black=False),
}
SOURCES = ("digits", *TFDS_SETS)


def load(
    name: str,
    image_shape: ImageShape,
    *,
    data_dir: str | os.PathLike | None = None,
    train_limit: int | None = None,
    test_limit: int | None = None,
    download: bool = False,
    progress: Callable[[str], None] | None = None,
) -> DataSet:
    """Loads a data set into memory, its images in the shape asked for.

    - "digits": scikit-learn's 1797 hand-written digits of 8x8 pixels (0..16 becomes 0..255), which
      need no download. The split is fixed: in the list sorted stably by class, every fifth image,
      the first included, is a test image (360; the other 1437 train), so that classes are
      represented evenly. Both parts keep the set's own order.
    - "mnist", "cifar10": read from `DATA_DIR/NAME/VERSION/*.array_record*`, the layout of TFDS, in
      TFDS's order (fixed, but not the official one).

    A gray image is repeated over three channels; a color image becomes gray by its BT.601 luma.
    Sizes are changed by antialiased bicubic interpolation, except that MNIST gets a black margin if
    one of at most 4 pixels a side is enough (28x28 to 32x32).

    Args:
      name: one of `SOURCES`.
      image_shape: `(height, width, channels)` wanted, with 1 or 3 channels.
      data_dir: TFDS's directory; None means `$TFDS_DATA_DIR`, or else `~/tensorflow_datasets`.
      train_limit, test_limit: keep only the first so many images; None, or more than there are,
        keeps all.
      download: download a TFDS set that is not there.
      progress: called with a short message now and then while records are read (MNIST takes about 5
        s).

    Raises:
      ValueError: unknown name, impossible image shape, or a limit that is not positive.
      DataError: the set is not there, cannot be read or downloaded, or a package to read it is
        missing.
    """
    if name not in SOURCES:
        raise ValueError(f"unknown data set {name!r}: choose one of {', '.join(SOURCES)}")
    if len(image_shape) != 3 or min(image_shape) < 1 or image_shape[2] not in (1, 3):
        raise ValueError(
            f"image_shape must be (height, width, 1 or 3) with positive sizes, got "
            f"{tuple(image_shape)}"
        )
    for limit_name, limit in (("train_limit", train_limit), ("test_limit", test_limit)):
        if limit is not None and limit < 1:
            raise ValueError(
                f"{limit_name} must be a positive number of images, or None for all of them, got "
                f"{limit}"
            )
    limits = {"train": train_limit, "test": test_limit}
    if name == "digits":
        arrays, sizes = _read_digits(limits)
        source, num_classes, on_black = "scikit-learn", 10, False
    else:
        directory = _find_or_download(name, data_directory(data_dir), download)
        arrays, sizes, num_classes = _read_tfds(name, directory, limits, progress)
        source, on_black = f"TFDS {directory.name}", TFDS_SETS[name].on_black

    images, labels = {}, {}
    for split, (split_images, split_labels) in arrays.items():
        images[split], change = _fit_images(split_images, tuple(image_shape), pad=on_black)
        labels[split] = split_labels
    notes = [f"{source}, {change}"]
    notes += [
        f"first {len(labels[s])} of {n} {s} images" for s, n in sizes.items() if len(labels[s]) < n
    ]
    description = f"{name} ({'; '.join(notes)})"
    return DataSet(
        name,
        description,
        images["train"],
        labels["train"],
        images["test"],
        labels["test"],
        num_classes,
    )


def data_directory(data_dir: str | os.PathLike | None = None) -> Path:
    """Returns TFDS's directory: `data_dir`, or `$TFDS_DATA_DIR`, or `~/tensorflow_datasets` (as
    TFDS itself does).
    """
    return Path(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets").expanduser()


def download_command(name: str, directory: str | os.PathLike) -> str:
    """Returns the shell command that downloads a TFDS set."""
    return f"python -m dd_jax.data {name} --data_dir {shlex.quote(str(directory))}"


def prepared_directory(name: str, root: Path) -> Path:
    """Finds the newest version of a TFDS set that is prepared as array_record under `root`, without
    importing TFDS.

    Raises:
      DataError: there is none, or only files of another format.
    """
    versions = prepared_versions(name, root)
    for folder in versions:
        if has_splits(folder, name, ("train", "test")):
            return folder
    if versions:
        raise DataError(
            f"{name} in {versions[0]} has no {name}-train.array_record* and "
            f"{name}-test.array_record* files (it was"
            " prepared in another file format, or copied in part), and no other format can be read "
            "without TensorFlow:"
            f" prepare it in another directory with `{download_command(name, 'OTHER_DIR')}`, or use"
            " --config.data.name=digits, which needs no download"
        )
    raise DataError(
        f"{name} is not in {root} (expected "
        f"{root / name / TFDS_SETS[name].version}/*.array_record*): download it with"
        f" `{download_command(name, root)}`, or use --config.data.name=digits, which needs no "
        f"download"
    )


def prepared_versions(name: str, root: Path) -> list[Path]:
    """Returns the directories of a TFDS set's versions under `root`, in whatever file format, the
    newest first.
    """
    versions = [
        folder
        for folder in (root / name).glob("*")
        if re.fullmatch(r"\d+\.\d+\.\d+", folder.name) and (folder / "dataset_info.json").is_file()
    ]
    return sorted(
        versions, key=lambda folder: [int(part) for part in folder.name.split(".")], reverse=True
    )


def has_splits(folder: Path, name: str, splits: tuple[str, ...]) -> bool:
    """Whether a version's directory holds array_record files of all these splits."""
    return all(any(folder.glob(f"{name}-{split}.array_record*")) for split in splits)


def _find_or_download(name: str, root: Path, download: bool) -> Path:
    try:
        return prepared_directory(name, root)
    except DataError:
        if not download:
            raise
    from dd_jax.data import download as downloads

    return downloads.download(name, root)


def _read_digits(
    limits: dict[str, int | None],
) -> tuple[dict[str, tuple[Images, Labels]], dict[str, int]]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            "the digits come with scikit-learn: install it with `pip install scikit-learn`"
        ) from error
    pixels, labels = load_digits(return_X_y=True)
    images = np.rint(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 8, 8, 1)
    labels = labels.astype(np.int32)
    is_test = np.zeros(len(labels), bool)
    is_test[np.argsort(labels, kind="stable")[::DIGITS_TEST_STRIDE]] = True
    chosen = {"train": np.flatnonzero(~is_test), "test": np.flatnonzero(is_test)}
    arrays = {
        split: (images[rows[: limits[split]]], labels[rows[: limits[split]]])
        for split, rows in chosen.items()
    }
    return arrays, {split: len(rows) for split, rows in chosen.items()}


def _read_tfds(
    name: str,
    directory: Path,
    limits: dict[str, int | None],
    progress: Callable[[str], None] | None,
) -> tuple[dict[str, tuple[Images, Labels]], dict[str, int], int]:
    try:
        import array_record.python  # noqa: F401  (TFDS would fail only at the first record)
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise DataError(
            f"reading {name} needs `pip install tensorflow-datasets array-record "
            f"importlib_resources` ({error})"
        ) from error
    arrays, sizes = {}, {}
    try:
        # The read-only builder never looks at the network. The compressed bytes are decoded here
        # because that is three times as fast as TFDS, and the same whether or not OpenCV is
        # installed.
        builder = tfds.builder_from_directory(directory)
        for split, limit in limits.items():
            records = builder.as_data_source(
                split=split, decoders={"image": tfds.decode.SkipDecoding()}
            )
            sizes[split] = len(records)
            count = min(len(records), limit or len(records))
            arrays[split] = _decode(
                records, count, TFDS_SETS[name].image_shape, f"{name} {split}", progress
            )
        return arrays, sizes, builder.info.features["label"].num_classes
    except (OSError, RuntimeError, ValueError, LookupError) as error:
        raise DataError(
            f"{name} in {directory} cannot be read ({type(error).__name__}: {error}): delete that "
            f"directory and"
            f" download it again with `{download_command(name, directory.parent.parent)}`"
        ) from error


def _decode(
    records, count: int, image_shape: ImageShape, title: str, progress: Callable[[str], None] | None
) -> tuple[Images, Labels]:
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
    """Brings images to a shape; returns them with a phrase that says how, for the description."""
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
    import PIL.Image

    resized = np.empty((len(images), height, width, images.shape[-1]), np.uint8)
    for source, target in zip(images, resized, strict=True):
        # PIL has no mode for (h, w, 1), hence the squeeze.
        picture = PIL.Image.fromarray(source.squeeze(-1) if source.shape[-1] == 1 else source)
        target[:] = np.asarray(
            picture.resize((width, height), PIL.Image.Resampling.BICUBIC)
        ).reshape(target.shape)
    return resized
