"""The data sets that are held in memory, by name. A new one is one entry of `DATA_SETS`.

An entry says what the images are, how the paper preprocesses them, and where the official files are
and which function of `archives` reads them.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dd_jax.data import archives

ImageShape = tuple[int, int, int]
NO_DOWNLOAD = "--config.data.name=digits, which needs no download"


class DataError(ValueError):
    """A data set is not available. The message is one sentence for the user: what was looked for,
    and what to do.
    """


class Download(NamedTuple):
    """Where the official files of a TFDS set are, and what reads them without TensorFlow.

    TFDS records the size and the SHA-256 of each of these files, and `download` refuses a file that
    differs.

    Attributes:
      url: the address that the names of the files are relative to.
      files: from "train" and "test" to the names of the files that hold the split.
      examples_fn: (split, paths of the files) -> TFDS's (key, example) pairs.
      class_names_fn: (paths of the files) -> the names of the classes, by the name of the feature;
        None for the names that TFDS sets itself.
    """

    url: str
    files: Mapping[str, tuple[str, ...]]
    examples_fn: Callable[[str, Sequence[Path]], Iterator[tuple[int, dict[str, Any]]]]
    class_names_fn: Callable[[Sequence[Path]], dict[str, list[str]]] | None = None


class Entry(NamedTuple):
    """What is known of a data set before it is read.

    Attributes:
      image_shape: (height, width, channels) of its images.
      num_classes: labels are in `[0, num_classes)`.
      version: TFDS's version of the set, for messages; any other prepared version is read as well.
        None for a set that TFDS does not prepare.
      download: None for a set that needs no download.
      on_black: the images have a black background, so that a black margin adds nothing.
      paper_preprocessing: the preprocessing in the experiments of the Deep Defense paper; "none"
        for sets that the paper does not use.
    """

    image_shape: ImageShape
    num_classes: int
    version: str | None = None
    download: Download | None = None
    on_black: bool = False
    paper_preprocessing: str = "none"


def _same_for_both_splits(file: str) -> dict[str, tuple[str, ...]]:
    return {"train": (file,), "test": (file,)}


DATA_SETS: dict[str, Entry] = {
    "digits": Entry((8, 8, 1), 10),
    "mnist": Entry(
        (28, 28, 1),
        10,
        "3.0.1",
        Download(
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
            {
                "train": ("train-images-idx3-ubyte.gz", "train-labels-idx1-ubyte.gz"),
                "test": ("t10k-images-idx3-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
            },
            archives.mnist_examples,
        ),
        on_black=True,
        paper_preprocessing="mean_image",
    ),
    "cifar10": Entry(
        (32, 32, 3),
        10,
        "3.0.2",
        Download(
            "https://www.cs.toronto.edu/~kriz/",
            _same_for_both_splits("cifar-10-binary.tar.gz"),
            archives.cifar10_examples,
            archives.cifar10_class_names,
        ),
        paper_preprocessing="contrast_whiten",
    ),
    "cifar100": Entry(
        (32, 32, 3),
        100,
        "3.0.2",
        Download(
            "https://www.cs.toronto.edu/~kriz/",
            _same_for_both_splits("cifar-100-binary.tar.gz"),
            archives.cifar100_examples,
            archives.cifar100_class_names,
        ),
    ),
    "svhn_cropped": Entry(
        (32, 32, 3),
        10,
        "3.1.0",
        Download(
            "http://ufldl.stanford.edu/housenumbers/",
            {"train": ("train_32x32.mat",), "test": ("test_32x32.mat",)},
            archives.svhn_examples,
        ),
    ),
}
SOURCES: tuple[str, ...] = tuple(DATA_SETS)
DOWNLOADS: tuple[str, ...] = tuple(name for name, entry in DATA_SETS.items() if entry.download)


def entry_of(name: str) -> Entry:
    """Returns the entry of a data set.

    Raises:
      ValueError: unknown name; the message lists `SOURCES`.
    """
    if name not in DATA_SETS:
        raise ValueError(f"unknown data set {name!r}: choose one of {', '.join(SOURCES)}")
    return DATA_SETS[name]


def paper_preprocessing(name: str) -> str:
    """Returns the preprocessing, one of `PREPROCESSINGS`, of the paper's experiments on a data set;
    "none" for sets that the paper does not use.

    Raises:
      ValueError: unknown name; the message lists `SOURCES`.
    """
    return entry_of(name).paper_preprocessing
