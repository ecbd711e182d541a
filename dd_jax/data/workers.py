"""Batches of images that are read, decoded and augmented while the net trains, in worker processes.

    images = data.open_images("image_folder", data_dir="/data/imagenet")
    preprocessing = data.Preprocessing("torchvision")
    options = dict(crop_size=224, batch_size=256, preprocessing=preprocessing, num_workers=16)
    with data.training_stream(images.train, num_steps=50_000, seed=0, **options) as stream:
        batch = stream(step)                  # {"image", "label", "mask"}; prepares the next ones
        pace = stream.pace()                  # images per second, and the time spent waiting
    with data.evaluation_stream(images.test, **options) as stream:
        for batch in stream: ...

A batch is a pure function of the seed and its number and does not depend on the workers: as in
`batches`, the step is the position in the data. Each of several processes makes its own rows of the
same global batch.

Where an image cannot be decoded, its row of the batch is empty (zeros, label 0, mask 0), and
`stream.failures` has its name.

Grain runs the workers. They are new processes ("spawn") that import what the program's main module
imports, JAX included (guard that module with `if __name__ == "__main__"`). They start no XLA
backend and hold no accelerator.
"""

import dataclasses
import gc
import multiprocessing
import os
import shutil
import signal
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

from dd_jax import extras
from dd_jax.data import decoding
from dd_jax.data.batches import Batch, steps_per_epoch
from dd_jax.data.catalog import DataError
from dd_jax.data.image_batches import BatchSource
from dd_jax.data.image_files import EncodedImages
from dd_jax.data.preprocessing import Preprocessing

# If none of the first so many images can be decoded, the data are taken not to be images.
IMAGES_BEFORE_GIVING_UP = 100
# Finished batches that wait in each worker, and again in the main process, besides the one that is
# being made.
BATCHES_WAITING = 1
# Batches of one worker that may exist at once: one that is being made, those that wait in both
# places, and one that is being transferred.
MOST_BATCHES_PER_WORKER = 2 * BATCHES_WAITING + 2
# Arrays of at least this many bytes, the pixels, are transferred through shared memory, the others
# through pipes. If a worker died while it wrote a whole batch to a pipe, the main process would
# wait for the rest forever.
SMALLEST_SHARED = 2**14
SHARED_MEMORY = "/dev/shm"


class Pace(NamedTuple):
    """The speed of the input, over the batches since the last call of `pace`.

    Attributes:
      images_per_second: decoded images that this process received, per second of elapsed time.
      pipeline_images_per_second: the most that the workers could deliver: images per second of
        work, times the number of workers. It is close to `images_per_second` where the input is the
        bottleneck.
      waiting: the share of the time, 0..1, that the consumer waited for a batch.
    """

    images_per_second: float
    pipeline_images_per_second: float
    waiting: float


def training_stream(
    images: EncodedImages,
    *,
    crop_size: int,
    batch_size: int,
    num_steps: int,
    seed: int,
    preprocessing: Preprocessing | None = None,
    flip: bool = True,
    short_side: int = 256,
    interpolation: str = "bilinear",
    num_workers: int = 0,
    shard_index: int = 0,
    num_shards: int = 1,
) -> "BatchStream":
    """Returns the batches of the steps 0 to `num_steps` - 1, shuffled, with a random crop of each
    image.

    The order is that of `batches.training_batch`: a new permutation in each epoch, without the
    incomplete last batch. The crop and its mirroring depend only on the seed, the epoch and the
    image's row.

    Args:
      images: n image files.
      crop_size: the side of the net's input, at most `short_side`.
      batch_size: b, the number of images over all processes, at most n.
      num_steps: number of batches.
      seed: not negative.
      preprocessing: applied in this process, in a thread beside the training; None leaves the
        pixels uint8.
      flip: mirror an image with probability 1/2.
      short_side, interpolation: as in `decoding.resized`.
      num_workers: number of processes that prepare batches; each prepares whole batches. With 0,
        this process prepares a batch when it is asked for.
      shard_index, num_shards: number of this process, and of all processes. Process i gets the rows
        from `i * b / num_shards` on.

    Raises:
      ValueError: a negative seed or number of steps, a batch size that is greater than n or not a
        multiple of the number of processes, a crop size that is greater than `short_side`, or an
        unknown interpolation.
    """
    if seed < 0 or num_steps < 0:
        raise ValueError(
            f"seed and num_steps must not be negative, got seed {seed} and num_steps {num_steps}"
        )
    steps_per_epoch(len(images), batch_size)  # raises where there is no full batch
    pixels = (crop_size, short_side, interpolation)
    source = BatchSource(
        images,
        preprocessing,
        *pixels,
        batch_size,
        shard_index,
        num_shards,
        num_steps,
        seed=seed,
        flip=flip,
    )
    return BatchStream(source, num_workers)


def evaluation_stream(
    images: EncodedImages,
    *,
    crop_size: int,
    batch_size: int,
    preprocessing: Preprocessing | None = None,
    short_side: int = 256,
    interpolation: str = "bilinear",
    num_workers: int = 0,
    shard_index: int = 0,
    num_shards: int = 1,
) -> "BatchStream":
    """Returns the centers of all images in order, each exactly once, in batches of one shape.

    The last batch is filled with empty rows. All processes get the same number of batches; some of
    them may be empty. Arguments are as for `training_stream`; `batch_size` may exceed the number of
    images.

    Raises:
      ValueError: as `training_stream`.
    """
    num_batches = -(-len(images) // max(batch_size, 1))
    pixels = (crop_size, short_side, interpolation)
    source = BatchSource(
        images, preprocessing, *pixels, batch_size, shard_index, num_shards, num_batches
    )
    return BatchStream(source, num_workers)


class BatchStream:
    """Batches by their number. Use it as a context manager, or call `close`; after that, asking for
    a batch opens it again.

    Workers prepare batches ahead that are asked for in order. Any other number restarts the
    workers, which takes seconds; a run that resumes at step s asks for batch s first.

    Attributes:
      failures: the images of this process that could not be decoded so far, name to reason.
    """

    def __init__(self, source: BatchSource, num_workers: int):
        if num_workers < 0:
            raise ValueError(f"num_workers must not be negative, got {num_workers}")
        self.failures: dict[str, str] = {}
        self._source, self._num_workers = source, num_workers
        self._batches: Any = None
        self._next_number = 0
        self._num_decoded = self._num_failed = 0
        self._start_measuring()

    def __len__(self) -> int:
        """Number of batches."""
        return len(self._source)

    def __iter__(self) -> Iterator[Batch]:
        """All batches in order, from the first."""
        return map(self, range(len(self)))

    def __call__(self, number: int) -> Batch:
        """Returns a batch: image `(b, h, w, 3)`, label int32 `(b,)`, mask float32 `(b,)`; b is the
        number of rows of this process.

        Raises:
          IndexError: no such batch.
          DataError: none of the first images could be decoded, or a worker died.
        """
        if not 0 <= number < len(self):
            raise IndexError(f"there is no batch {number}: they are numbered 0 to {len(self) - 1}")
        start = time.perf_counter()
        made = (
            self._source.received(self._source[number])
            if self._num_workers == 0
            else self._made_by_workers(number)
        )
        self._seconds_waiting += time.perf_counter() - start
        self._seconds_working += made.pop("seconds")
        decoded, failures = int(made["mask"].sum()), made.pop("failures")
        self.failures.update(failures)
        self._num_images += decoded
        self._num_decoded += decoded
        self._num_failed += len(failures)
        enough = max(min(IMAGES_BEFORE_GIVING_UP, self._source.num_rows), 1)
        if not self._num_decoded and self._num_failed >= enough:
            name, reason = next(iter(self.failures.items()))
            raise DataError(
                f"none of the first {self._num_failed} images could be decoded ({name}: {reason}): "
                f"the data must be files of the formats {', '.join(decoding.FORMATS)}"
            )
        return made

    def pace(self) -> Pace:
        """Returns the speed of the input since the last call, or since the beginning."""
        passed = max(time.perf_counter() - self._since, 1e-9)
        per_second = self._num_images / max(self._seconds_working, 1e-9) * max(self._num_workers, 1)
        pace = Pace(self._num_images / passed, per_second, self._seconds_waiting / passed)
        self._start_measuring()
        return pace

    def close(self) -> None:
        """Ends the workers."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None
            # Reference cycles in Grain keep the last batches, and with them shared memory
            gc.collect()

    def __enter__(self) -> "BatchStream":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start_measuring(self) -> None:
        self._since = time.perf_counter()
        self._seconds_waiting = self._seconds_working = 0.0
        self._num_images = 0

    def _made_by_workers(self, number: int) -> dict[str, Any]:
        if self._batches is None or number != self._next_number:
            self.close()
            self._batches = _started(self._source, number, self._num_workers)
        self._next_number = number + 1
        try:
            return next(self._batches)
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):
                raise
            raise DataError(
                "an input worker died, most often for lack of memory: choose a smaller num_workers "
                "or batch_size"
            ) from error


def _started(source: BatchSource, first: int, num_workers: int) -> Iterator[dict[str, Any]]:
    """Starts workers that prepare the batches from `first` on, each every `num_workers`-th."""
    with extras.needed("train"):
        import grain
        from absl import flags

    if not flags.FLAGS.is_parsed():
        # Grain reads flags of its own, which fails in programs that use argparse
        flags.FLAGS.mark_as_parsed()
    _check_shared_memory(source, num_workers)
    # Workers get the source without the preprocessing, which may be large and runs here.
    batches = grain.MapDataset.source(dataclasses.replace(source, preprocessing=None)).slice(
        slice(first, None)
    )
    batches = batches.to_iter_dataset(grain.ReadOptions(num_threads=0, prefetch_buffer_size=0))
    transfer = grain.experimental.DatasetOptions(min_shm_size=SMALLEST_SHARED)
    batches = grain.experimental.WithOptionsIterDataset(batches, transfer)
    options = grain.MultiprocessingOptions(
        num_workers=num_workers, per_worker_buffer_size=BATCHES_WAITING
    )
    batches = batches.mp_prefetch(options, worker_init_fn=_prepare_worker).map(source.received)
    return iter(
        grain.experimental.ThreadPrefetchIterDataset(batches, prefetch_buffer_size=BATCHES_WAITING)
    )


def _check_shared_memory(source: BatchSource, num_workers: int) -> None:
    """Raises DataError where shared memory is too small; a worker would be killed without a
    message.
    """
    if not os.path.isdir(SHARED_MEMORY):
        return
    free = shutil.disk_usage(SHARED_MEMORY).free
    needed = (
        num_workers * MOST_BATCHES_PER_WORKER * source.local_batch_size * source.crop_size**2 * 3
    )
    if needed > free:
        raise DataError(
            f"{num_workers} input workers need {needed / 1e6:.0f} MB of {SHARED_MEMORY}, where "
            f"{free / 1e6:.0f} MB are free: choose a smaller num_workers or batch_size, or give "
            "the container more (docker run --shm-size)"
        )


def _prepare_worker(worker: int, num_workers: int) -> None:
    """Sets up a worker: it ignores SIGINT and SIGTERM, which the main process handles, and ends
    with the main process.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    warnings.simplefilter("ignore")  # Pillow's, of damaged EXIF data
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    if parent := multiprocessing.parent_process():
        parent.join()  # returns also after kill -9 of the parent
        os._exit(1)
