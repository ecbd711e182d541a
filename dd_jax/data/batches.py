"""Batches of examples in memory, all of one shape: `{"image": (b, h, w, c), "label": (b,), "mask":
(b,)}`.

A training batch is a pure function of (seed, step). The position in the data therefore IS the step
number: nothing else has to be saved, and a run that is resumed sees bit for bit what it would have
seen without the interruption.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int32, Shaped

Images = Shaped[np.ndarray, "n h w c"]
Labels = Int32[np.ndarray, " n"]
Batch = dict[str, np.ndarray]

# First words of the seeds, so that order and flips never share a random stream.
ORDER_STREAM, FLIP_STREAM = 1, 2


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Returns the number of full batches in an epoch; the examples left over (fewer than a batch)
    sit this one out.

    Raises:
      ValueError: a batch size that is not positive, or greater than the number of examples.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive, got {batch_size}")
    if num_examples < batch_size:
        raise ValueError(
            f"batch_size is {batch_size}, but there are only {num_examples} training examples: "
            f"choose a batch_size of"
            f" at most {num_examples}, or more data"
        )
    return num_examples // batch_size


def training_batch(
    images: Images, labels: Labels, *, batch_size: int, seed: int, step: int, flip: bool = False
) -> Batch:
    """Returns the batch of a training step, a pure function of `(seed, step)` and the data.

    Step s belongs to epoch `s // steps_per_epoch`. Each epoch is a fresh permutation of all
    examples, cut into batches; the last, incomplete one is dropped, so that within an epoch no
    example comes twice. (NumPy may change its random streams with a major version; a run is
    reproduced exactly with the version it was made with.)

    Args:
      images: `(n, h, w, c)` of any dtype: uint8 images, or inputs that are already preprocessed.
      labels: int32 `(n,)`.
      batch_size: b, at most n.
      seed, step: not negative.
      flip: mirror each image left to right with probability 1/2, independently. (MatConvNet's
        `cnn_cifar.m` flips a whole batch or none of it.)

    Returns:
      `image` `(b, h, w, c)` of the dtype of `images`, a copy; `label` int32 `(b,)`; `mask` float32
      `(b,)`, all ones.

    Raises:
      ValueError: a negative seed or step, other than n labels, or a batch size that
        `steps_per_epoch` refuses.
    """
    _check_lengths(images, labels)
    if seed < 0 or step < 0:
        raise ValueError(f"seed and step must not be negative, got seed {seed} and step {step}")
    epoch, position = divmod(step, steps_per_epoch(len(labels), batch_size))
    rows = epoch_order(len(labels), seed, epoch)[
        position * batch_size : (position + 1) * batch_size
    ]
    image = images[rows]
    if flip:
        flipped = np.random.default_rng((FLIP_STREAM, seed, step)).random(batch_size) < 0.5
        image[flipped] = image[flipped, :, ::-1]
    return {"image": image, "label": labels[rows], "mask": np.ones(batch_size, np.float32)}


def evaluation_batches(images: Images, labels: Labels, batch_size: int) -> Iterator[Batch]:
    """Yields all examples in order, in batches of one shape.

    The last batch is filled up with zero images of label 0, whose `mask` is 0; weight sums over a
    batch with the mask. No examples give no batches.

    Args:
      images: `(n, h, w, c)` of any dtype.
      labels: int32 `(n,)`.
      batch_size: b; it may be greater than n.

    Yields:
      `image` `(b, h, w, c)`, `label` int32 `(b,)`, `mask` float32 `(b,)` of ones and zeros.

    Raises:
      ValueError: (at the call, not at the first batch) a batch size that is not positive, or other
        than n labels.
    """
    _check_lengths(images, labels)
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive, got {batch_size}")

    def batches() -> Iterator[Batch]:
        for start in range(0, len(labels), batch_size):
            label = labels[start : start + batch_size]
            missing = batch_size - len(label)
            yield {
                "image": _pad(images[start : start + batch_size], missing),
                "label": _pad(label, missing),
                "mask": _pad(np.ones(len(label), np.float32), missing),
            }

    return batches()


# Two epochs, so that the steps on either side of an epoch's end may be asked for in turn.
@functools.lru_cache(maxsize=2)
def epoch_order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the order of the examples in an epoch: a permutation, int64 `(num_examples,)`, not to
    be written to.
    """
    order = np.random.default_rng((ORDER_STREAM, seed, epoch)).permutation(num_examples)
    order.flags.writeable = False  # the cache hands the same array to everyone
    return order


def _pad(array: np.ndarray, missing: int) -> np.ndarray:
    return (
        np.concatenate([array, np.zeros((missing, *array.shape[1:]), array.dtype)])
        if missing
        else array
    )


def _check_lengths(images: np.ndarray, labels: np.ndarray) -> None:
    if len(images) != len(labels):
        raise ValueError(
            f"there must be a label for each image, got {len(images)} images and {len(labels)} "
            f"labels"
        )


class Examples(NamedTuple):
    """What to measure on.

    count: how many examples there are. shape: of one. limits: the least and the greatest value that
      an input has.
    batches: (the first so many, batch size) -> batches of one shape, {"image", "label", "mask"},
    mask 0 where a place is empty. A batch comes as `compile_fn` takes it: the whole one, or a
    process's share.
    """

    count: int
    shape: tuple[int, ...]
    batches: Callable[[int, int], Iterable[Mapping[str, np.ndarray]]]
    limits: tuple[float, float]


def in_memory(inputs: Float[np.ndarray, "n h w c"], labels: Labels) -> Examples:
    """Examples that are at hand: inputs as the net takes them, float32 `(n, h, w, c)`, and int32
    labels `(n,)`.
    """
    limits = (float(inputs.min()), float(inputs.max())) if len(inputs) else (0.0, 1.0)
    first = lambda count, batch_size: evaluation_batches(inputs[:count], labels[:count], batch_size)
    return Examples(len(labels), inputs.shape[1:], first, limits)
