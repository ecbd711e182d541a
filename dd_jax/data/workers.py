"""Batches of images that are read, decoded and augmented while the net trains, in worker processes.

    images = data.open_images("image_folder", data_dir="/data/imagenet")
    preprocessing = data.Preprocessing("torchvision")
    options = dict(crop_size=224, batch_size=256, preprocessing=preprocessing, num_workers=16)
    with data.training_stream(images.train, num_steps=50_000, seed=0, **options) as stream:
        batch = stream(step)                  # {"image", "label", "mask"}; the next is prepared
        pace = stream.pace()                  # how long the last steps waited for their images
    with data.evaluation_stream(images.test, **options) as stream:
        for batch in stream: ...

A batch is a pure function of the seed and its number, whatever the workers: the position in the
data IS the step, as in `batches`. Of several processes each makes its own rows of the same global
batch.

An image that cannot be decoded leaves its place in the batch empty (zeros, label 0, mask 0) and its
name in `stream.failures`.

Grain runs the workers. They are started afresh ("spawn"), import what the program's main module
imports (guard it with `if __name__ == "__main__"`), JAX included, but start no XLA backend and hold
no accelerator.
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

from dd_jax.data import decoding as decoding
from dd_jax.data.batches import Batch, steps_per_epoch
from dd_jax.data.datasets import DataError
from dd_jax.data.image_batches import BatchSource
from dd_jax.data.image_files import EncodedImages
from dd_jax.data.preprocessing import Preprocessing

# Without a single one that can be decoded among the first so many images, the data are taken to be
# something else.
IMAGES_BEFORE_GIVING_UP = 100
# Finished batches that wait in each worker, and again in the main process, beside the one in the
# making.
BATCHES_WAITING = 1
# Batches that a worker may have made and nobody has taken yet: in the making, waiting twice, and
# about to be handed on.
MOST_BATCHES_PER_WORKER = 2 * BATCHES_WAITING + 2
# Pixels come through shared memory, what is smaller than this many bytes through pipes. A worker
# that died while it wrote a whole batch to a pipe would leave the main process waiting for the
# rest.
SMALLEST_SHARED = 2**14
SHARED_MEMORY = "/dev/shm"


class Pace(NamedTuple):
    """How fast images came and were used, over the batches since the last call of `pace`.

    Attributes:
      images_per_second: used, by this process: decoded images over the time that passed.
      pipeline_images_per_second: what the workers could deliver if nobody paused: images over the
        seconds they worked for them, times the number of workers. Close to `images_per_second`
        where the input is what holds a run up.
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
    """Returns the batches of the steps 0 to `num_steps` - 1, shuffled, each image cropped at
    random.

    The order is that of `batches.training_batch`: a fresh permutation in each epoch, without the
    incomplete last batch. The crop and its mirroring depend on the seed, the epoch and the image's
    row alone.

    Args:
      images: n of them.
      crop_size: the side of the net's input, at most `short_side`.
      batch_size: b, the global one: over all processes, at most n.
      num_steps: nothing is prepared beyond it.
      seed: not negative.
      preprocessing: applied in this process, in a thread beside the training; None leaves the
        pixels uint8.
      flip: mirror an image with probability 1/2.
      short_side, interpolation: as in `images.resized`.
      num_workers: processes that prepare batches, a whole one each; 0 prepares each when it is
        asked for.
      shard_index, num_shards: this process, of how many. Process i gets the rows from `i * b /
        num_shards` on.

    Raises:
      ValueError: sizes or numbers that do not fit together.
    """
    if seed < 0 or num_steps < 0:
        raise ValueError(
            f"seed and num_steps must not be negative, got seed {seed} and num_steps {num_steps}"
        )
    steps_per_epoch(len(images), batch_size)  # refuses what makes no batch
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
    """Returns all images in order, their centers, in batches of one shape; no image is left out or
    comes twice.

    The last batch is filled up with empty places. Every process gets as many batches as every
    other, if need be with nothing in them. Arguments as for `training_stream`; `batch_size` may
    exceed the number of images.

    Raises:
      ValueError: sizes or numbers that do not fit together.
    """
    num_batches = -(-len(images) // max(batch_size, 1))
    pixels = (crop_size, short_side, interpolation)
    source = BatchSource(
        images, preprocessing, *pixels, batch_size, shard_index, num_shards, num_batches
    )
    return BatchStream(source, num_workers)


class BatchStream:
    """Batches by their number. Use as a context manager, or call `close`; it opens again where a
    batch is asked for.

    Asked for in order, batches are prepared ahead by the workers. Any other number starts the
    workers anew, which takes seconds; a run that goes on at step s simply asks for batch s first.

    Attributes:
      failures: the images that could not be decoded so far, in this process's part: name to reason.
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
        """Returns a batch: image `(b, h, w, 3)`, label int32 `(b,)`, mask float32 `(b,)`; b is this
        process's share.

        Raises:
          IndexError: no such batch.
          DataError: not one of the first images could be decoded, or a worker died.
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
                f"the data must be"
                f" files of the formats {', '.join(decoding.FORMATS)}"
            )
        return made

    def pace(self) -> Pace:
        """Returns how fast images came and were used since the last call, or since the
        beginning.
        """
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
            # Grain's frames keep the last batches, and with them shared memory, in circles
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
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():
        # Grain reads settings of its own, which fails in programs that use argparse
        flags.FLAGS.mark_as_parsed()
    _check_shared_memory(source, num_workers)
    # The workers hold the source only: the preprocessing may be large, and works here.
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
    """A worker that finds no room there would be killed without a word."""
    if not os.path.isdir(SHARED_MEMORY):
        return
    free = shutil.disk_usage(SHARED_MEMORY).free
    needed = (
        num_workers * MOST_BATCHES_PER_WORKER * source.local_batch_size * source.crop_size**2 * 3
    )
    if needed > free:
        raise DataError(
            f"{num_workers} input workers need {needed / 1e6:.0f} MB of {SHARED_MEMORY}, where "
            f"{free / 1e6:.0f} MB are free:"
            " choose a smaller num_workers or batch_size, or give the container more (docker run "
            "--shm-size)"
        )


def _prepare_worker(worker: int, num_workers: int) -> None:
    """What a worker does first. Signals to end are the main process's to heed; the worker ends with
    it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    warnings.simplefilter("ignore")  # Pillow's, of damaged EXIF data
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()  # returns even where the parent was killed with kill -9
    os._exit(1)
