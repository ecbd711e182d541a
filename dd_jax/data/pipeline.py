"""Where a run's examples come from: a data set in memory, or image files that are decoded while the
net trains.

Both offer the same: `description`, `num_classes`, `num_train`, `training`, `test_examples` and
`compile_fn`.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np

from dd_jax import data, parallel
from dd_jax.data import DataSet, EncodedDataSet, Preprocessing
from dd_jax.data.batches import Examples, in_memory

Batch = Mapping[str, np.ndarray]
BatchOfStep = Callable[[int], Batch]
COLOR_RANGE = (0, 255)
MOST_NAMED = 5  # Of the images that cannot be decoded.


def left_out(failures: Mapping[str, str]) -> str:
    """The sentence for test images that could not be decoded (name to reason): how many, and the
    first of them.
    """
    first = "; ".join(f"{name} ({reason})" for name, reason in list(failures.items())[:MOST_NAMED])
    more = f" and {len(failures) - MOST_NAMED} more" if len(failures) > MOST_NAMED else ""
    number = len(failures)
    return f"{number} test images cannot be decoded and are left out of the figures: {first}{more}"


class InMemory(NamedTuple):
    """A small data set, preprocessed once. Inputs are float32, in units of 1/255 of a pixel's
    range.
    """

    data: DataSet
    train_inputs: np.ndarray
    test_inputs: np.ndarray
    flip: bool

    @property
    def description(self) -> str:
        """One line for reports."""
        return self.data.description

    @property
    def num_classes(self) -> int:
        """Labels are below it."""
        return self.data.num_classes

    @property
    def num_train(self) -> int:
        """Number of training examples."""
        return len(self.data.train_labels)

    def training(
        self, *, batch_size: int, num_steps: int, seed: int
    ) -> AbstractContextManager[BatchOfStep]:
        """The batch of any step, this process's share of it."""

        def batch_of_step(step: int) -> Batch:
            return parallel.share_of(
                data.training_batch(
                    self.train_inputs,
                    self.data.train_labels,
                    batch_size=batch_size,
                    seed=seed,
                    step=step,
                    flip=self.flip,
                )
            )

        return contextlib.nullcontext(batch_of_step)

    def test_examples(self) -> Examples:
        """What to measure on."""
        return in_memory(self.test_inputs, self.data.test_labels)

    def compile_fn(self) -> Callable:
        """How measurements are shared among devices: every process has the whole batch."""
        return parallel.sums_and_rows


class Streamed(NamedTuple):
    """Image files. `crop_size`: the side of the net's input; `num_workers`: processes that
    decode.
    """

    data: EncodedDataSet
    preprocessing: Preprocessing
    crop_size: int
    flip: bool
    num_workers: int

    @property
    def description(self) -> str:
        """One line for reports."""
        return self.data.description

    @property
    def num_classes(self) -> int:
        """Labels are below it."""
        return self.data.num_classes

    @property
    def num_train(self) -> int:
        """Number of training images."""
        return len(self.data.train)

    def training(
        self, *, batch_size: int, num_steps: int, seed: int
    ) -> AbstractContextManager[BatchOfStep]:
        """The batch of any step, this process's share of it; asked for in order they are prepared
        ahead.
        """
        options = dict(batch_size=batch_size, num_steps=num_steps, seed=seed, flip=self.flip)
        return data.training_stream(self.data.train, **options, **self._options())

    def test_examples(self) -> Examples:
        """What to measure on: the images' centers. Every process reads its own share of a batch."""

        def batches(count: int, batch_size: int) -> Iterator[Batch]:
            images = dataclasses.replace(self.data.test, limit=count)
            _, num_processes = parallel.my_share()
            batch_size += -batch_size % num_processes
            with data.evaluation_stream(images, batch_size=batch_size, **self._options()) as stream:
                yield from stream
                if stream.failures:
                    print(f"\n{left_out(stream.failures)}", file=sys.stderr, flush=True)

        corners = self.preprocessing(
            np.array(COLOR_RANGE, np.uint8).reshape(2, 1, 1, 1).repeat(3, axis=3)
        )
        limits = float(corners.min()), float(corners.max())
        return Examples(len(self.data.test), (self.crop_size, self.crop_size, 3), batches, limits)

    def compile_fn(self) -> Callable:
        """How measurements are shared among devices: every process has its share of the batch."""
        return parallel.sums_over_shares

    def _options(self) -> dict[str, Any]:
        index, count = parallel.my_share()
        return {
            "crop_size": self.crop_size,
            "preprocessing": self.preprocessing,
            "num_workers": self.num_workers,
            "shard_index": index,
            "num_shards": count,
        }
