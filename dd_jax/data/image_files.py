"""Data sets that are too large for memory: the bytes of their image files, read one at a time, and
their labels.

    images = open_images("image_folder", data_dir="/data/imagenet")
    name, encoded, label = images.train[0]

Nothing is decoded here. An opened data set holds no images and is therefore small enough to be sent
to worker processes.
"""

import dataclasses
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from dd_jax import extras
from dd_jax.data.catalog import DataError
from dd_jax.data.prepared import data_directory, has_splits, prepared_versions

STREAMED_SOURCES = ("imagenet2012", "image_folder")
# Other files of a class directory (lists, boxes, READMEs) are ignored. The suffix need not tell the
# true format.
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm")
TRAINING_FOLDER, TEST_FOLDERS = "train", ("val", "validation")
# In a folder without these two, every tenth image in the order of class and name, from the first
# on, is a test image.
FOLDER_TEST_STRIDE = 10
IMAGENET_VERSION = "5.1.0"


class EncodedImage(NamedTuple):
    """The contents of an image file, its name within the data set, and its class."""

    name: str
    encoded: bytes
    label: int


@runtime_checkable
class EncodedImages(Protocol):
    """One split of a data set, in a fixed order. It can be pickled; the copy opens its files
    itself.
    """

    def __len__(self) -> int:
        """Number of images."""
        ...

    def __getitem__(self, row: int) -> EncodedImage:
        """Reads an image; raises `UnreadableError` where its file cannot be read."""
        ...


class UnreadableError(ValueError):
    """An image of the data set that cannot be read; `name` is the image's name."""

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)
        self.name, self.reason = name, reason


class EncodedDataSet(NamedTuple):
    """A data set of image files.

    Attributes:
      name: one of `STREAMED_SOURCES`.
      description: one line to print, with the numbers of images.
      train, test: the splits; "test" is ImageNet's validation split, whose labels are public.
      num_classes: labels are in `[0, num_classes)`.
    """

    name: str
    description: str
    train: EncodedImages
    test: EncodedImages
    num_classes: int


def open_images(
    name: str,
    *,
    data_dir: str | os.PathLike | None = None,
    train_limit: int | None = None,
    test_limit: int | None = None,
) -> EncodedDataSet:
    """Opens a data set of image files; reads no image.

    - "imagenet2012": as TFDS prepared it, `DATA_DIR/imagenet2012/5.1.0/*.array_record*`, in TFDS's
      (shuffled) order. It is never downloaded, because image-net.org gives ImageNet only on
      request.
    - "image_folder": `DATA_DIR/train/CLASS/*` and `DATA_DIR/val/CLASS/*`, or only
      `DATA_DIR/CLASS/*`. In the second case every tenth image, in the order of class and name and
      from the first on, is a test image. The class directories in the order of their names have the
      labels 0, 1, ...; for ImageNet's synsets this is the usual numbering. Directories within those
      of the classes are searched too; a file is an image if its name ends in one of `SUFFIXES`.
      Each split is ordered by a checksum of the names, which mixes the classes and is the same on
      every machine.

    Args:
      name: one of `STREAMED_SOURCES`.
      data_dir: TFDS's directory (None: `$TFDS_DATA_DIR`, or else `~/tensorflow_datasets`), or the
        folder itself.
      train_limit, test_limit: keep only the first so many images, a random sample since both orders
        are shuffled; None, or more than there are, keeps all.

    Raises:
      ValueError: unknown name, or a limit that is not positive.
      DataError: the data are missing or not in this layout.
      MissingPackageError: a package to read them is missing.
    """
    if name not in STREAMED_SOURCES:
        raise ValueError(f"unknown data set {name!r}: choose one of {', '.join(STREAMED_SOURCES)}")
    for limit_name, limit in (("train_limit", train_limit), ("test_limit", test_limit)):
        if limit is not None and limit < 1:
            raise ValueError(
                f"{limit_name} must be a positive number of images, or None for all of them, got "
                f"{limit}"
            )
    if name == "imagenet2012":
        directory = _imagenet_directory(data_directory(data_dir))
        train: FolderImages | TfdsImages
        test: FolderImages | TfdsImages
        train, test = (TfdsImages(str(directory), split) for split in ("train", "validation"))
        num_classes, origin = train.num_classes, f"TFDS {directory.name}"
    else:
        if data_dir is None:
            raise DataError(
                "image_folder needs --data_dir, a folder with a directory of images for each class"
            )
        train, test, num_classes = _folder_splits(Path(data_dir).expanduser())
        origin = f"{num_classes} classes in {Path(data_dir).expanduser()}"
    sizes = (len(train), len(test))
    train, test = (
        dataclasses.replace(train, limit=train_limit),
        dataclasses.replace(test, limit=test_limit),
    )
    counts = [
        f"{len(part)} {title} images"
        if len(part) == size
        else f"first {len(part)} of {size} {title} images"
        for part, size, title in zip((train, test), sizes, ("train", "test"), strict=True)
    ]
    return EncodedDataSet(name, f"{name} ({origin}; {', '.join(counts)})", train, test, num_classes)


@dataclasses.dataclass(frozen=True, eq=False)
class FolderImages:
    """Image files under a folder.

    Attributes:
      folder: what the paths are relative to.
      paths: `(n,)` of NumPy's bytes, in the encoding of the file system; a million names take 40
        MB, a third of what strings take.
      labels: int32 `(n,)`.
      limit: keep only the first so many.
    """

    folder: str
    paths: np.ndarray = dataclasses.field(repr=False)
    labels: np.ndarray = dataclasses.field(repr=False)
    limit: int | None = None

    def __len__(self) -> int:
        """Number of images."""
        return min(len(self.paths), self.limit or len(self.paths))

    def __getitem__(self, row: int) -> EncodedImage:
        """Reads a file; raises UnreadableError where that fails."""
        name = os.fsdecode(bytes(self.paths[row]))
        try:
            return EncodedImage(name, Path(self.folder, name).read_bytes(), int(self.labels[row]))
        except OSError as error:
            raise UnreadableError(name, error.strerror or str(error)) from error


@dataclasses.dataclass(frozen=True)
class TfdsImages:
    """A split that TFDS prepared as array_record. Its images stay encoded.

    Attributes:
      directory: the directory of the version, which holds the files.
      split: TFDS's name of the split.
      limit: keep only the first so many.
    """

    directory: str
    split: str
    limit: int | None = None

    def __len__(self) -> int:
        """Number of images."""
        return min(len(self._records), self.limit or len(self._records))

    def __getitem__(self, row: int) -> EncodedImage:
        """Reads a record; raises UnreadableError where that fails."""
        try:
            record = self._records[row]
        except (OSError, RuntimeError, ValueError, LookupError) as error:
            raise UnreadableError(
                f"{self.split} record {row}", f"{type(error).__name__}: {error}"
            ) from error
        name = record.get("file_name", b"")
        name = name.decode(errors="replace") if isinstance(name, bytes) else str(name)
        return EncodedImage(
            name or f"{self.split} record {row}", record["image"], int(record["label"])
        )

    @property
    def num_classes(self) -> int:
        """Number of classes of the whole set."""
        return self._opened(lambda builder: builder.info.features["label"].num_classes)

    @property
    def _records(self) -> Any:
        # Not an attribute, so that it is not pickled: each process has its own open files.
        key = (self.directory, self.split)
        if key not in _open_records:
            with extras.needed("train"):
                import tensorflow_datasets as tfds

            decoders = {"image": tfds.decode.SkipDecoding()}
            _open_records[key] = self._opened(
                lambda builder: builder.as_data_source(self.split, decoders=decoders)
            )
        return _open_records[key]

    def _opened(self, take: Callable[[Any], Any]) -> Any:
        with extras.needed("train"):
            import array_record.python  # noqa: F401  (TFDS would fail only at the first record)
            import tensorflow_datasets as tfds
        try:
            return take(tfds.builder_from_directory(self.directory))  # never uses the network
        except (OSError, RuntimeError, ValueError, LookupError) as error:
            raise DataError(
                f"imagenet2012 in {self.directory} cannot be read ({type(error).__name__}: "
                f"{error}): prepare it again, or use --config.data.name=image_folder"
            ) from error


_open_records: dict[tuple[str, str], Any] = {}


def _imagenet_directory(root: Path) -> Path:
    versions = prepared_versions("imagenet2012", root)
    for folder in versions:
        if has_splits(folder, "imagenet2012", ("train", "validation")):
            return folder
    found = (
        f"{versions[0]} lacks" if versions else f"{root / 'imagenet2012' / IMAGENET_VERSION} has no"
    )
    raise DataError(
        f"{found} imagenet2012-train.array_record* and imagenet2012-validation.array_record* "
        "files: prepare them with TFDS from the archives of image-net.org "
        "(`file_format='array_record'`), or use unpacked images with "
        "--config.data.name=image_folder and a --data_dir that holds train/CLASS/* and val/CLASS/*"
    )


def _folder_splits(folder: Path) -> tuple[FolderImages, FolderImages, int]:
    if not folder.is_dir():
        raise DataError(
            f"the image folder {folder} is not there: --data_dir must hold a directory of images "
            "per class"
        )
    train_folder = folder / TRAINING_FOLDER
    if train_folder.is_dir():
        test_folder = next(
            (folder / name for name in TEST_FOLDERS if (folder / name).is_dir()), None
        )
        if test_folder is None:
            raise DataError(
                f"{folder} has a directory {TRAINING_FOLDER}, but none named "
                f"{' or '.join(TEST_FOLDERS)}"
            )
        classes = _class_names(train_folder)
        unknown = sorted(set(_class_names(test_folder)) - set(classes))
        if unknown:
            raise DataError(
                f"{test_folder} has classes that {train_folder} has not: {', '.join(unknown[:5])}"
            )
        train, test = _listed(train_folder, classes), _listed(test_folder, classes)
    else:
        train_folder = test_folder = folder
        classes = _class_names(folder)
        paths, labels = _listed(folder, classes)
        is_test = np.arange(len(paths)) % FOLDER_TEST_STRIDE == 0
        train, test = (paths[~is_test], labels[~is_test]), (paths[is_test], labels[is_test])
    for part, (paths, _) in ((train_folder, train), (test_folder, test)):
        if not len(paths):
            raise DataError(
                f"{part} has no images{' to spare for testing' * (part == folder)}: it must hold a "
                f"directory for each class, with files named *{', *'.join(SUFFIXES)}"
            )
    return _mixed(train_folder, *train), _mixed(test_folder, *test), len(classes)


def _class_names(folder: Path) -> list[str]:
    return sorted(
        entry.name
        for entry in os.scandir(folder)
        if entry.is_dir() and not entry.name.startswith(".")
    )


def _listed(folder: Path, classes: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Returns the paths of the images in a folder, sorted within each class, and their labels."""
    paths: list[bytes] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = [
            os.path.relpath(os.path.join(place, file), folder)
            for place, _, files in os.walk(folder / name)
            for file in files
            if file.lower().endswith(SUFFIXES) and not file.startswith(".")
        ]
        paths += map(os.fsencode, sorted(found))
        labels += [label] * len(found)
    return np.array(paths, dtype=np.bytes_), np.array(labels, np.int32)


def _mixed(folder: Path, paths: np.ndarray, labels: np.ndarray) -> FolderImages:
    # Not the order of a random generator, which may change with NumPy's version.
    order = np.argsort([zlib.crc32(path) for path in paths.tolist()], kind="stable")
    return FolderImages(str(folder.absolute()), paths[order], labels[order])
