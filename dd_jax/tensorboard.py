"""The training curves for TensorBoard, by tensorboardX (`pip install 'dd_jax[tensorboard]'`), which needs no TensorFlow."""

import importlib.util
import pathlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

NOT_CURVES = ("stage", "step")


def is_installed() -> bool:
    """Whether curves can be written."""
    return importlib.util.find_spec("tensorboardX") is not None


@contextmanager
def open_curves(folder: pathlib.Path, first_step: int) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Within it, a function that adds the numbers of a line of metrics.jsonl at its step; nested ones as "test/accuracy".

    A run that goes on at `first_step` replaces what was written of later steps. ImportError without tensorboardX.
    """
    from tensorboardX import SummaryWriter

    with SummaryWriter(str(folder), purge_step=first_step, filename_suffix=f".{first_step}") as writer:

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
