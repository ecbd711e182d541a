"""Batches of images that are made from image files, each from its number alone. The workers of
`workers` run this code.
"""

import dataclasses
import time
from typing import Any

import numpy as np

from dd_jax.data import decoding
from dd_jax.data.batches import STREAMED_CROP_STREAM, epoch_order, steps_per_epoch
from dd_jax.data.image_files import EncodedImages, UnreadableError
from dd_jax.data.preprocessing import Preprocessing


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class BatchSource:
    """Makes a batch from its number alone, in any process.

    Attributes:
      seed: None for evaluation, which means the images in order and their centers.

    The other attributes are the arguments of `workers.training_stream`.
    """

    images: EncodedImages
    preprocessing: Preprocessing | None
    crop_size: int
    short_side: int
    interpolation: str
    batch_size: int
    shard_index: int
    num_shards: int
    num_batches: int
    seed: int | None = None
    flip: bool = False

    def __post_init__(self):
        if self.batch_size < 1 or self.num_shards < 1 or self.batch_size % self.num_shards:
            raise ValueError(
                f"batch_size must be a positive multiple of the number of processes, got "
                f"{self.batch_size} for {self.num_shards}"
            )
        if not 0 <= self.shard_index < self.num_shards:
            raise ValueError(
                f"shard_index must be between 0 and {self.num_shards - 1}, got {self.shard_index}"
            )
        if not 1 <= self.crop_size <= self.short_side:
            raise ValueError(
                f"crop_size must be between 1 and short_side, got {self.crop_size} of "
                f"{self.short_side}"
            )
        if self.interpolation not in decoding.INTERPOLATIONS:
            choices = ", ".join(decoding.INTERPOLATIONS)
            raise ValueError(
                f"unknown interpolation {self.interpolation!r}: choose one of {choices}"
            )

    def __len__(self) -> int:
        """Number of batches."""
        return self.num_batches

    @property
    def local_batch_size(self) -> int:
        """Number of rows of every batch that this process makes."""
        return self.batch_size // self.num_shards

    @property
    def num_rows(self) -> int:
        """Number of images that this process reads in an epoch, or in an evaluation."""
        full, rest = divmod(len(self.images), self.batch_size)
        ragged = 0 if self.seed is not None else rest - self.shard_index * self.local_batch_size
        return full * self.local_batch_size + min(max(ragged, 0), self.local_batch_size)

    def __getitem__(self, number: int) -> dict[str, Any]:
        """Returns the batch, its images uint8, with `failures`, a (name, reason) each, and the
        `seconds` that it took.
        """
        start = time.perf_counter()
        epoch, rows = self.rows(number)
        pixels = np.zeros((self.local_batch_size, self.crop_size, self.crop_size, 3), np.uint8)
        label, mask = np.zeros(len(pixels), np.int32), np.zeros(len(pixels), np.float32)
        failures = []
        for place, row in enumerate(rows.tolist()):
            try:
                name, encoded, label_of_row = self.images[row]
                pixels[place] = self._crop(encoded, epoch, row, name)
            except UnreadableError as error:
                failures.append((error.name, error.reason))
            else:
                label[place], mask[place] = label_of_row, 1
        seconds = time.perf_counter() - start
        return {
            "image": pixels,
            "label": label,
            "mask": mask,
            "failures": tuple(failures),
            "seconds": seconds,
        }

    def received(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Returns a batch from a worker with its images in the net's input space; empty rows stay
        zero.

        Images are always copied, so that shared memory is freed at once.
        """
        image = (
            np.array(batch["image"])
            if self.preprocessing is None
            else self.preprocessing(batch["image"])
        )
        image[batch["mask"] == 0] = 0
        return {**batch, "image": image}

    def rows(self, number: int) -> tuple[int, np.ndarray]:
        """Returns the epoch of a batch and the images that are this process's part of it; fewer
        than `local_batch_size` at the end of an evaluation.
        """
        epoch = 0
        order = np.arange(len(self.images))
        if self.seed is not None:
            epoch, number = divmod(number, steps_per_epoch(len(self.images), self.batch_size))
            order = epoch_order(len(self.images), self.seed, epoch)
        first = number * self.batch_size + self.shard_index * self.local_batch_size
        return epoch, order[first : first + self.local_batch_size]

    def _crop(self, encoded: bytes, epoch: int, row: int, name: str) -> decoding.Pixels:
        try:
            pixels = decoding.resized(encoded, self.short_side, self.interpolation)
        except decoding.DecodeError as error:
            raise UnreadableError(name, str(error)) from error
        if self.seed is None:
            return decoding.centre_crop(pixels, self.crop_size)
        random = np.random.default_rng((STREAMED_CROP_STREAM, self.seed, epoch, row))
        return decoding.random_crop(pixels, self.crop_size, random, self.flip)
