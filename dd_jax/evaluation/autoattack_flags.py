"""Which examples have fallen to AutoAttack, on the host and in a file; see
`dd_jax.evaluation.autoattack`.
"""

import pathlib
import zipfile
import zlib
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from dd_jax import parallel
from dd_jax.evaluation.autoattack_programs import SAME
from dd_jax.evaluation.programs import Rows

NOT_FALLEN, WRONG, UNKNOWN = -1, -2, -3
"""In `fallen_to`: no attack has fooled the net, or none is needed, or nothing is known yet."""


class Flags(NamedTuple):
    """What is known of each example, as arrays on the host.

    fallen_to: the number of the attack that fooled the net, NOT_FALLEN, WRONG or UNKNOWN.
    num_tried: attacks that it has been through. num_queries: how often the net was asked.
    odd: whether the outputs are probabilities, the gradient is zero, two programs differ, the
    input is out of bounds. fingerprint: of the logits without an attack.
    """

    fallen_to: Int[np.ndarray, " n"]
    num_tried: Int[np.ndarray, " n"]
    num_queries: Int[np.ndarray, " n"]
    odd: Bool[np.ndarray, "n 4"]
    label: Int[np.ndarray, " n"]
    fingerprint: Float[np.ndarray, "n 3"]


def note(flags: Flags, rows: Rows, number: int) -> None:
    """Writes into the flags what a batch gave."""
    done = np.asarray(rows["todo"]) > 0
    at, falls = rows["number"][done], rows["falls"][done]
    flags.num_tried[at] = number + 1
    flags.num_queries[at] += rows["num_queries"][done]
    if number == 0:
        flags.fallen_to[at], flags.odd[at] = np.where(falls, WRONG, NOT_FALLEN), rows["odd"][done]
        flags.label[at] = rows["label"][done]
        flags.fingerprint[at] = fingerprint(np.asarray(rows["logits"])[done])
    else:
        flags.fallen_to[at] = np.where(falls, number - 1, flags.fallen_to[at])


def fingerprint(logits: Float[np.ndarray, "n classes"]) -> Float[np.ndarray, "n 3"]:
    """Two sums of the logits with different weights, and their l2 norm."""
    logits = np.nan_to_num(np.asarray(logits, np.float64))
    angles = np.arange(logits.shape[1]) + 1.0
    sums = logits @ np.stack([np.cos(angles), np.sin(angles)], axis=1)
    return np.concatenate([sums, np.linalg.norm(logits, axis=1, keepdims=True)], axis=1)


class Store:
    """The file with the flags, if there is one."""

    def __init__(self, path: pathlib.Path | str | None, identity: str, count: int) -> None:
        self._path = None if path is None else pathlib.Path(path)
        self._identity, self._count = identity, count

    def read(self) -> Flags | None:
        """The flags of a measurement with the same options; None where there are none, they are
        damaged, or the processes do not see the same.
        """
        found = self._read()
        numbers = [0] if found is None else [zlib.crc32(array.tobytes()) >> 8 for array in found]
        of_all = parallel.of_all([float(sum(numbers) % 2**20)])
        return found if np.all(of_all == of_all[0]) else None

    def _read(self) -> Flags | None:
        if self._path is None or not self._path.exists():
            return None
        try:
            with np.load(self._path) as arrays:
                if str(arrays["identity"]) != self._identity:
                    return None
                return Flags(*(arrays[name] for name in Flags._fields))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None  # Damaged: measured again.

    def write(self, flags: Flags) -> None:
        """Saves the flags; a reader sees the old file or the new one."""
        if self._path is None or not parallel.is_primary():
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        partial_path = self._path.with_suffix(".partial")
        with partial_path.open("wb") as file:
            np.savez(file, identity=self._identity, **flags._asdict())
        partial_path.replace(self._path)


def no_flags(count: int) -> Flags:
    """Nothing is known of any example."""
    none = lambda dtype, *more: np.zeros((count, *more), dtype)
    known = np.full(count, UNKNOWN, np.int16), none(np.int16), none(np.int64), none(bool, 4)
    return Flags(*known, none(np.int32), none(np.float64, 3))


def take_over(flags: Flags, before: Flags | None) -> None:
    """Takes over what is known of the examples with the same label and the same clean logits."""
    if before is None or len(before.label) != len(flags.label):
        return
    size = np.maximum(np.abs(flags.fingerprint[:, 2:]), np.finfo(np.float64).tiny)
    change = np.max(np.abs(flags.fingerprint - before.fingerprint) / size, axis=1)
    same = (change <= SAME) & (flags.label == before.label) & (before.num_tried > 1)
    same &= flags.fallen_to == NOT_FALLEN
    for name in ("fallen_to", "num_tried", "num_queries"):
        getattr(flags, name)[same] = getattr(before, name)[same]
