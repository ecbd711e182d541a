"""Where prepared data sets lie: `DATA_DIR/NAME/VERSION/*.array_record*`, the layout of TFDS.

Only the names of files are read here, so that a missing set is reported at once.
"""

import os
import re
import shlex
from pathlib import Path

from dd_jax.data.catalog import DATA_SETS, NO_DOWNLOAD, DataError


def data_directory(data_dir: str | os.PathLike | None = None) -> Path:
    """Returns TFDS's directory: `data_dir`, or `$TFDS_DATA_DIR`, or `~/tensorflow_datasets`, the
    order that TFDS uses.
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
            f"{name}-test.array_record* files (it was prepared in another file format, or copied "
            f"in part), and no other format can be read without TensorFlow: prepare it in another "
            f"directory with `{download_command(name, 'OTHER_DIR')}`, or use {NO_DOWNLOAD}"
        )
    raise DataError(
        f"{name} is not in {root} (expected "
        f"{root / name / str(DATA_SETS[name].version)}/*.array_record*): download it with "
        f"`{download_command(name, root)}`, or use {NO_DOWNLOAD}"
    )


def prepared_versions(name: str, root: Path) -> list[Path]:
    """Returns the directories of a TFDS set's versions under `root`, in any file format, the newest
    first.
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
    """Returns whether a version's directory holds array_record files of all these splits."""
    return all(any(folder.glob(f"{name}-{split}.array_record*")) for split in splits)
