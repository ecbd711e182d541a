"""One process at a time trains in a run directory.

Two would overwrite each other's checkpoints and lines. The lock is the operating system's and goes
with its process, however that ends: nothing is left to clear away.
"""

import contextlib
import errno
import pathlib
from collections.abc import Iterator

try:
    import fcntl
except ImportError:  # Not on Windows: there nobody is kept out.
    fcntl = None  # type: ignore[assignment]

FILE_NAME = "lock"
TAKEN = (errno.EACCES, errno.EAGAIN)


class OccupiedError(ValueError):
    """Another process is training in the run directory."""


@contextlib.contextmanager
def alone_in(workdir: pathlib.Path) -> Iterator[None]:
    """Keeps other processes from training in a run directory, which must exist. OccupiedError where
    one is training there. File systems without locks keep nobody out.
    """
    if fcntl is None:
        yield
        return
    with (workdir / FILE_NAME).open("a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in TAKEN:
                raise OccupiedError(
                    f"Another process is training in {workdir}: wait for it, or give another "
                    "directory with --workdir."
                ) from None
        yield
