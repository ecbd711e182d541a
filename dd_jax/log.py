"""What a run says while it works: metrics.jsonl, TensorBoard curves and progress bars.

metrics.jsonl holds a line of JSON for every logged interval, epoch and measurement, each with its
stage. The curves for TensorBoard are the same numbers, by tensorboardX (`pip install
'dd_jax[tensorboard]'`), which needs no TensorFlow.
"""

import importlib.util
import json
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

FILE_NAME = "metrics.jsonl"
NOT_CURVES = ("stage", "step")


def append_line(workdir: pathlib.Path, line: dict[str, Any]) -> None:
    """Adds a line; it has at least "stage" and "step"."""
    with (workdir / FILE_NAME).open("a") as file:
        file.write(json.dumps(line) + "\n")


def read_lines(workdir: pathlib.Path) -> Iterator[dict[str, Any]]:
    """The lines; a last one that a killed run left unfinished is passed over."""
    path = workdir / FILE_NAME
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            yield json.loads(text)
        except json.JSONDecodeError:
            continue


def forget_lines_after(workdir: pathlib.Path, stage: str, step: int) -> None:
    """Drops what a stage logged after `step`: those steps were not saved and are about to be taken
    again.
    """
    path = workdir / FILE_NAME
    if path.exists():
        kept = [
            line for line in read_lines(workdir) if line["stage"] != stage or line["step"] <= step
        ]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        partial.replace(path)


def is_tensorboard_installed() -> bool:
    """Whether curves can be written."""
    return importlib.util.find_spec("tensorboardX") is not None


@contextmanager
def open_curves(
    folder: pathlib.Path, first_step: int
) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Within it, a function that adds the numbers of a line of metrics.jsonl at its step; nested
    ones as "test/accuracy".

    A run that goes on at `first_step` replaces what was written of later steps. ImportError without
    tensorboardX.
    """
    from tensorboardX import SummaryWriter

    with SummaryWriter(
        str(folder), purge_step=first_step, filename_suffix=f".{first_step}"
    ) as writer:

        def add(line: Mapping[str, Any]) -> None:
            for name, value in numbers(line):
                writer.add_scalar(name, value, line["step"])

        yield add


def numbers(line: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """The names and values of all numbers in a line, but for its step."""
    for name, value in line.items():
        if isinstance(value, Mapping):
            yield from numbers(value, f"{prefix}{name}/")
        elif isinstance(value, (int, float)) and name not in NOT_CURVES:
            yield prefix + name, value


def progress(description: str, total: int, unit: str, **options: Any) -> tqdm:
    """A progress bar with the time left; seldom redrawn where the output is not a terminal. Options
    are tqdm's.
    """
    options |= {
        "mininterval": 0.2 if sys.stderr.isatty() else 10,
        "dynamic_ncols": True,
        "smoothing": 0.1,
    }
    return tqdm(total=total, desc=description, unit=unit, **options)
