"""The examples of a run: a data set in memory, or image files that are decoded during training.

Both classes have the same attributes: `description`, `num_classes`, `num_train`, `training`,
`test_examples` and `compile_fn`.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np

from dd_jax import data, parallel
from dd_jax.data import Batch, DataSet, EncodedDataSet, Examples, Preprocessing, in_memory

BatchOfStep = Callable[[int], Batch]
COLOR_RANGE = (0, 255)
MOST_NAMED = 5  # Of the images that cannot be decoded.


def left_out(failures: Mapping[str, str]) -> str:
    """Returns the sentence that reports test images that could not be decoded (name to reason):
    their number, and the first of them.
    """
    first = "; ".join(f"{name} ({reason})" for name, reason in list(failures.items())[:MOST_NAMED])
    more = f" and {len(failures) - MOST_NAMED} more" if len(failures) > MOST_NAMED else ""
    number = len(failures)
    return f"{number} test images cannot be decoded and are left out of the figures: {first}{more}"


class InMemory(NamedTuple):
    """A data set in memory that is preprocessed once.

    Attributes:
      data: the images before preprocessing, and their labels.
      train_inputs, test_inputs: inputs of the net, float32 `(n, h, w, c)`.
      flip, crop_padding, padding_value: augmentation of training batches, as in
        `data.training_batch`. `data.value_of_black` returns the padding value of a preprocessing.
    """

    data: DataSet
    train_inputs: np.ndarray
    test_inputs: np.ndarray
    flip: bool
    crop_padding: int = 0
    padding_value: float | np.ndarray = 0.0

    @property
    def description(self) -> str:
        """Name and size of the data set, one line for reports."""
        return self.data.description

    @property
    def num_classes(self) -> int:
        """Number of classes; labels are in `[0, num_classes)`."""
        return self.data.num_classes

    @property
    def num_train(self) -> int:
        """Number of training examples."""
        return len(self.data.train_labels)

    def training(
        self, *, batch_size: int, num_steps: int, seed: int
    ) -> AbstractContextManager[BatchOfStep]:
        """Returns a context that gives the batch of any step, this process's share of it."""

        def batch_of_step(step: int) -> Batch:
            whole = data.training_batch(
                self.train_inputs,
                self.data.train_labels,
                batch_size=batch_size,
                seed=seed,
                step=step,
                flip=self.flip,
                crop_padding=self.crop_padding,
                padding_value=self.padding_value,
            )
            places = np.arange(batch_size, dtype=np.int32)
            return parallel.share_of({**whole, "number": places})

        return contextlib.nullcontext(batch_of_step)

    def test_examples(self) -> Examples:
        """Returns the test examples."""
        return in_memory(self.test_inputs, self.data.test_labels)

    def compile_fn(self) -> Callable:
        """Returns how measurements are divided among devices: every process has the whole batch."""
        return parallel.sums_and_rows


class Streamed(NamedTuple):
    """A data set of image files that are decoded while the net trains.

    Attributes:
      data: the files and their labels.
      preprocessing: from pixels to the net's input space.
      crop_size: the side of the net's input, in pixels.
      flip: mirror training images with probability 1/2.
      num_workers: number of processes that decode.
    """

    data: EncodedDataSet
    preprocessing: Preprocessing
    crop_size: int
    flip: bool
    num_workers: int

    @property
    def description(self) -> str:
        """Name and size of the data set, one line for reports."""
        return self.data.description

    @property
    def num_classes(self) -> int:
        """Number of classes; labels are in `[0, num_classes)`."""
        return self.data.num_classes

    @property
    def num_train(self) -> int:
        """Number of training images."""
        return len(self.data.train)

    def training(
        self, *, batch_size: int, num_steps: int, seed: int
    ) -> AbstractContextManager[BatchOfStep]:
        """Returns a context that gives the batch of any step, this process's share of it. Batches
        that are asked for in order are prepared ahead.
        """
        options = self._options() | {"flip": self.flip, "seed": seed}
        options |= {"batch_size": batch_size, "num_steps": num_steps}
        return data.training_stream(self.data.train, **options)

    def test_examples(self) -> Examples:
        """Returns the test examples, the centers of the images. Every process reads its own share
        of a batch.
        """

        def batches(count: int, batch_size: int) -> Iterator[Batch]:
            images = dataclasses.replace(self.data.test, limit=count)  # type: ignore[type-var]
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
        shape, count = (self.crop_size, self.crop_size, 3), len(self.data.test)
        return Examples(count, shape, batches, limits, is_share=True)

    def compile_fn(self) -> Callable:
        """Returns how measurements are divided among devices: every process has its share of the
        batch.
        """
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
