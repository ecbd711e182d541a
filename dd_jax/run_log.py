"""metrics.jsonl of a run directory: a line of JSON for every logged interval, epoch and measurement, each with its stage."""

import json
import pathlib
from collections.abc import Iterator
from typing import Any

FILE_NAME = "metrics.jsonl"


def append(workdir: pathlib.Path, line: dict[str, Any]) -> None:
    """Adds a line; it has at least "stage" and "step"."""
    with (workdir / FILE_NAME).open("a") as file:
        file.write(json.dumps(line) + "\n")


def read(workdir: pathlib.Path) -> Iterator[dict[str, Any]]:
    """The lines; a last one that a killed run left unfinished is passed over."""
    path = workdir / FILE_NAME
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            yield json.loads(text)
        except json.JSONDecodeError:
            continue


def forget_after(workdir: pathlib.Path, stage: str, step: int) -> None:
    """Drops what a stage logged after `step`: those steps were not saved and are about to be taken again."""
    path = workdir / FILE_NAME
    if path.exists():
        kept = [line for line in read(workdir) if line["stage"] != stage or line["step"] <= step]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(line) + "\n" for line in kept))
        partial.replace(path)
