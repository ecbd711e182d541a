"""Downloads a data set and prepares it for `dd_jax.data.load`, without TensorFlow.

python -m dd_jax.data cifar100 [--data_dir DIR]
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dd_jax import extras
from dd_jax.data.catalog import DATA_SETS, DOWNLOADS, NO_DOWNLOAD, DataError, Download
from dd_jax.data.prepared import data_directory, prepared_directory

# Seconds to wait for a first answer. Without it TFDS retries for minutes where there is no network.
CONNECTION_TIMEOUT = 10


def download(name: str, data_dir: str | os.PathLike | None = None) -> Path:
    """Downloads a TFDS set, prepares it as array_record and returns its directory.

    A set that is prepared already is left alone. Of SVHN only "train" and "test" are prepared, not
    TFDS's third split "extra" (1.2 GB).

    Args:
      name: one of `DOWNLOADS`.
      data_dir: TFDS's directory; None means `$TFDS_DATA_DIR`, or else `~/tensorflow_datasets`.

    Raises:
      DataError: another name, no network, or a failed download.
      MissingPackageError: a package that it needs is missing.
    """
    files = _download_of(name)
    root = data_directory(data_dir)
    try:
        return prepared_directory(name, root)
    except DataError:
        pass  # the set is not prepared yet
    with extras.needed("train"):
        # Needed only after the download, when it would be late to report that it is missing.
        import array_record.python  # noqa: F401
        import requests
        from tensorflow_datasets.core.download import DownloadError
        from tensorflow_datasets.core.download.download_manager import NonMatchingChecksumError

        builder_class = _builder_class(name)
    try:
        requests.head(files.url, timeout=CONNECTION_TIMEOUT)
        builder = builder_class(data_dir=root, file_format="array_record")
        builder.download_and_prepare(file_format="array_record")
    # errors of requests are OSErrors
    except (OSError, DownloadError, NonMatchingChecksumError) as error:
        raise DataError(
            f"{name} could not be downloaded from {files.url} ({type(error).__name__}): where "
            f"there is no network, copy {root / name} from a machine that has prepared it, or use "
            f"{NO_DOWNLOAD}"
        ) from error
    return prepared_directory(name, root)


def _download_of(name: str) -> Download:
    files = DATA_SETS[name].download if name in DATA_SETS else None
    if files is None:
        raise DataError(
            f"{name!r} cannot be downloaded: choose one of {', '.join(DOWNLOADS)} (digits needs no "
            "download, and other sets are prepared by TFDS itself)"
        )
    return files


def _builder_class(name: str) -> type:
    """Returns a builder that differs from TFDS's own in its reading of the archives and its
    encoding as PNG, for which TFDS needs TensorFlow.
    """
    files = _download_of(name)
    import tensorflow_datasets as tfds

    def split_generators(self: Any, dl_manager: Any) -> dict[str, Any]:
        addresses = {file: files.url + file for names in files.files.values() for file in names}
        paths = dl_manager.download(addresses)
        chosen = {split: [paths[file] for file in names] for split, names in files.files.items()}
        if files.class_names_fn:
            for feature, class_names in files.class_names_fn(chosen["train"]).items():
                self.info.features[feature].names = class_names
        return {split: files.examples_fn(split, chosen[split]) for split in chosen}

    original = tfds.builder_cls(name)
    replaced = {
        "_split_generators": split_generators,
        "name": name,
        # TFDS finds the recorded checksums beside the module of the class.
        "__module__": original.__module__,
    }
    with tfds.core.registered.skip_registration():
        return type(original.__name__, (original,), replaced)


def main(arguments: Sequence[str] | None = None, program: str = "python -m dd_jax.data") -> None:
    """Runs the command line, sys.argv's if None; an error that the user can correct is one sentence
    and exit status 1.
    """
    parser = argparse.ArgumentParser(prog=program, description="Downloads a data set, once.")
    parser.add_argument("name", help=f"one of {', '.join(DOWNLOADS)}; digits needs no download")
    parser.add_argument("--data_dir", help="default: $TFDS_DATA_DIR, or else ~/tensorflow_datasets")
    chosen = parser.parse_args(arguments)
    try:
        print(f"{chosen.name} is ready in {download(chosen.name, chosen.data_dir)}")
    except (DataError, extras.MissingPackageError) as error:
        sys.exit(f"error: {error}")
