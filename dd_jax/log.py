"""The output of a running experiment: metrics.jsonl, TensorBoard curves and progress bars.

metrics.jsonl has a line of JSON with the stage for every logged interval and epoch.
The TensorBoard curves show the same numbers. They are written by tensorboardX (`pip install
'dd_jax[tensorboard]'`), which does not need TensorFlow. Without tqdm there are no progress bars.
"""

import importlib.util
import itertools
import json
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, runtime_checkable

from dd_jax import extras

FILE_NAME = "metrics.jsonl"
NOT_CURVES = ("stage", "step")


def append_line(workdir: pathlib.Path, line: dict[str, Any]) -> None:
    """Appends a line, which must have "stage" and "step"."""
    with (workdir / FILE_NAME).open("a") as file:
        file.write(json.dumps(line) + "\n")


def read_lines(workdir: pathlib.Path) -> Iterator[dict[str, Any]]:
    """The lines. An incomplete last line of a killed run is skipped, and so are damaged lines."""
    return (line for line in _all_lines(workdir / FILE_NAME) if line is not None)


def _all_lines(path: pathlib.Path) -> Iterator[dict[str, Any] | None]:
    """The complete lines of a file, None for each that is damaged."""
    content = path.read_bytes() if path.exists() else b""
    for text in content.split(b"\n")[:-1]:
        try:
            line = json.loads(text)
        except ValueError:  # No JSON, or not even text.
            yield None
            continue
        is_whole = isinstance(line, dict) and isinstance(line.get("step"), int)
        yield line if is_whole and isinstance(line.get("stage"), str) else None


def unused(path: pathlib.Path) -> pathlib.Path:
    """The path, or the first of PATH.1, PATH.2, ... that does not exist."""
    numbered = (path.with_name(f"{path.name}.{number}") for number in itertools.count(1))
    return next(each for each in itertools.chain([path], numbered) if not each.exists())


def forget_lines_after(
    workdir: pathlib.Path, stage: str, step: int, *, last_line: int | None = None
) -> None:
    """Removes a stage's lines after `step`: those steps were not saved and will be repeated.

    `last_line`: the step of a line that must be there, None for none. Where lines are damaged or
    missing, stderr says so, and a copy is kept as metrics.jsonl.damaged.
    """
    path = workdir / FILE_NAME
    if path.exists():
        if reason := _damage(path, stage, last_line):
            aside = _kept_beside(path)
            print(
                f"{path} is damaged ({reason}). The curves will have a gap; nets and figures do "
                f"not depend on it. The file as it was is kept as {aside}.",
                file=sys.stderr,
            )
        kept = [
            line for line in read_lines(workdir) if line["stage"] != stage or line["step"] <= step
        ]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        partial.replace(path)


def _kept_beside(path: pathlib.Path) -> pathlib.Path:
    """A copy beside the file, made unless there is one already."""
    content, kept = path.read_bytes(), path.parent.glob(f"{path.name}.damaged*")
    for copy in kept:
        if copy.read_bytes() == content:
            return copy
    copy = unused(path.with_name(f"{path.name}.damaged"))
    copy.write_bytes(content)
    return copy


def _damage(path: pathlib.Path, stage: str, last_line: int | None) -> str:
    """What is wrong with the lines; empty where nothing is."""
    lines = list(_all_lines(path))
    if num_damaged := sum(line is None for line in lines):
        return f"{num_damaged} lines cannot be read"
    steps = {line["step"] for line in lines if line is not None and line["stage"] == stage}
    return "" if last_line is None or last_line in steps else f"it lacks lines of the {stage} stage"


def is_tensorboard_installed() -> bool:
    """Whether tensorboardX is installed, so that curves can be written."""
    return importlib.util.find_spec("tensorboardX") is not None


@contextmanager
def open_curves(
    folder: pathlib.Path, first_step: int
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yields a function that adds the numbers of a line of metrics.jsonl to the curves.

    Nested numbers get names such as "test/accuracy". A run that resumes at `first_step` replaces
    the curves of later steps. Raises MissingPackageError if tensorboardX is not installed.
    """
    with extras.needed("tensorboard"):
        from tensorboardX import SummaryWriter

    with SummaryWriter(
        str(folder), purge_step=first_step, filename_suffix=f".{first_step}"
    ) as writer:

        def add(line: Mapping[str, Any]) -> None:
            for name, value in numbers(line):
                writer.add_scalar(name, value, line["step"])

        yield add


def numbers(line: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The names and values of all numbers in a line, except its step."""
    for name, value in line.items():
        if isinstance(value, Mapping):
            yield from numbers(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and name not in NOT_CURVES:
            yield prefix + name, value


@runtime_checkable
class Bar(Protocol):
    """The part of a progress bar of tqdm that is used here."""

    n: float
    total: float

    def update(self, n: float = 1) -> bool | None:
        """Moves the bar on by `n`."""

    def set_postfix_str(self, s: str = "") -> None:
        """Writes `s` behind the bar."""

    def __enter__(self) -> "Bar": ...

    def __exit__(self, *error: object) -> None: ...


class _NoBar:
    """Counts, and shows nothing."""

    def __init__(self, total: int) -> None:
        self.n: float = 0
        self.total: float = total

    def update(self, n: float = 1) -> None:
        self.n += n

    def set_postfix_str(self, s: str = "") -> None:
        pass

    def __enter__(self) -> "_NoBar":
        return self

    def __exit__(self, *error: object) -> None:
        pass


def progress(description: str, total: int, unit: str, **options: Any) -> Bar:
    """A progress bar with the remaining time; one that shows nothing where tqdm is not installed.
    `options` are tqdm's.

    It is redrawn every 10 seconds if the output is not a terminal.
    """
    try:
        from tqdm import tqdm
    except ModuleNotFoundError:
        return _NoBar(total)
    options |= {
        "mininterval": 0.2 if sys.stderr.isatty() else 10,
        "dynamic_ncols": True,
        "smoothing": 0.1,
    }
    return tqdm(total=total, desc=description, unit=unit, **options)
