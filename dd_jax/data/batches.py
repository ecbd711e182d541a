"""Batches of examples in memory, all of one shape: `{"image": (b, h, w, c), "label": (b,), "mask":
(b,)}`.

A training batch is a pure function of (seed, step). The step number is therefore the position in
the data: nothing else has to be saved, and a resumed run gets bitwise the batches of a run without
an interruption.

The order of the examples is NumPy's and not that of Grain's `MapDataset.shuffle`, because the
published figures depend bitwise on it.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int32, Shaped

Images = Shaped[np.ndarray, "n h w c"]
Inputs = Shaped[np.ndarray, "n ..."]
Labels = Int32[np.ndarray, " n"]
Batch = Mapping[str, Any]
"""Arrays "image", "label" and "mask" with the same number of rows: of NumPy outside `jit`, of JAX
within it.
"""

# The first words of the seeds. Each use of random numbers has its own stream, so that switching one
# off leaves the others bitwise the same. STREAMED_CROP_STREAM is that of `image_batches`.
ORDER_STREAM, FLIP_STREAM, STREAMED_CROP_STREAM, PADDED_CROP_STREAM = 1, 2, 3, 4


def steps_per_epoch(num_examples: int, batch_size: int) -> int:
    """Returns the number of full batches in an epoch.

    The examples that are left over, fewer than a batch, are not used in that epoch.

    Raises:
      ValueError: a batch size that is not positive, or greater than the number of examples.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be positive, got {batch_size}")
    if num_examples < batch_size:
        raise ValueError(
            f"batch_size is {batch_size}, but there are only {num_examples} training examples: "
            f"choose a batch_size of at most {num_examples}, or more data"
        )
    return num_examples // batch_size


def training_batch(
    images: Images,
    labels: Labels,
    *,
    batch_size: int,
    seed: int,
    step: int,
    flip: bool = False,
    crop_padding: int = 0,
    padding_value: float | np.ndarray = 0.0,
) -> Batch:
    """Returns the batch of a training step, a pure function of `(seed, step)` and the data.

    Step s belongs to epoch `s // steps_per_epoch`. Each epoch is a new permutation of all examples,
    divided into batches. The last, incomplete batch is dropped, and no example occurs twice in an
    epoch. (NumPy may change its random streams with a major version; a run is reproduced exactly
    with the version of NumPy that it was made with.)

    Args:
      images: `(n, h, w, c)` of any dtype: uint8 images, or inputs that are already preprocessed.
      labels: int32 `(n,)`.
      batch_size: b, at most n.
      seed, step: not negative.
      flip: mirror each image left to right with probability 1/2, independently. (MatConvNet's
        `cnn_cifar.m` flips a whole batch or none of it.)
      crop_padding: p pixels. Each image gets a margin of p pixels on every side, and a random part
        of the original size is cut from it, each of the (2p + 1)^2 offsets with the same
        probability, independently for each image (He et al. 2016: p = 4 for CIFAR). 0 leaves the
        images as they are.
      padding_value: the value of the margin, which broadcasts against the images. For preprocessed
        inputs `preprocessing.value_of_black` returns it.

    Returns:
      `image` `(b, h, w, c)` of the dtype of `images`, a copy; `label` int32 `(b,)`; `mask` float32
      `(b,)`, all ones.

    Raises:
      ValueError: a negative seed, step or crop_padding, other than n labels, or a batch size that
        `steps_per_epoch` refuses.
    """
    _check_lengths(images, labels)
    if seed < 0 or step < 0:
        raise ValueError(f"seed and step must not be negative, got seed {seed} and step {step}")
    if crop_padding < 0:
        raise ValueError(f"crop_padding must be a number of pixels, 0 or more, got {crop_padding}")
    epoch, position = divmod(step, steps_per_epoch(len(labels), batch_size))
    rows = epoch_order(len(labels), seed, epoch)[
        position * batch_size : (position + 1) * batch_size
    ]
    image = images[rows]
    if crop_padding:
        random = np.random.default_rng((PADDED_CROP_STREAM, seed, step))
        image = _padded_crops(image, crop_padding, padding_value, random)
    if flip:
        flipped = np.random.default_rng((FLIP_STREAM, seed, step)).random(batch_size) < 0.5
        image[flipped] = image[flipped, :, ::-1]
    return {"image": image, "label": labels[rows], "mask": np.ones(batch_size, np.float32)}


def evaluation_batches(images: Inputs, labels: Labels, batch_size: int) -> Iterator[Batch]:
    """Yields all examples in order, in batches of one shape.

    The last batch is filled with zero images of label 0, whose `mask` is 0; weight sums over a
    batch with the mask. Without examples there are no batches.

    Args:
      images: `(n, h, w, c)` of any dtype.
      labels: int32 `(n,)`.
      batch_size: b; it may be greater than n.

    Yields:
      `image` `(b, h, w, c)`, `label` int32 `(b,)`, `mask` float32 `(b,)` of ones and zeros.

    Raises:
      ValueError: a batch size that is not positive, or other than n labels; at the call, not at the
        first batch.
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


# Two epochs, so that the steps before and after the end of an epoch may be asked for in turn.
@functools.lru_cache(maxsize=2)
def epoch_order(num_examples: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the order of the examples in an epoch: a permutation, int64 `(num_examples,)`, which
    is read-only.
    """
    order = np.random.default_rng((ORDER_STREAM, seed, epoch)).permutation(num_examples)
    order.flags.writeable = False  # the cache returns the same array to all callers
    return order


def _padded_crops(
    images: np.ndarray, padding: int, value: float | np.ndarray, random: np.random.Generator
) -> np.ndarray:
    """Returns a random part of each image with a margin, of the image's own size."""
    count, height, width, channels = images.shape
    padded_shape = (count, height + 2 * padding, width + 2 * padding, channels)
    padded = np.empty(padded_shape, images.dtype)
    padded[:] = value
    padded[:, padding : padding + height, padding : padding + width] = images
    top, left = random.integers(0, 2 * padding + 1, (2, count, 1))
    rows, columns = top + np.arange(height), left + np.arange(width)
    return padded[np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]


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
            "labels"
        )


class Examples(NamedTuple):
    """The examples that a net is measured on.

    Attributes:
      count: number of examples.
      shape: of one example.
      batches: (number of examples, batch size) -> batches of one shape with the first so many
        examples; `mask` is 0 where a row is empty. A batch is what the feed's `compile_fn` takes:
        the whole batch, or the share of this process.
      limits: the least and the greatest value of an input.
      is_share: whether a batch holds this process's examples alone, a contiguous part of all.
    """

    count: int  # type: ignore[assignment]  # in place of a tuple's method
    shape: tuple[int, ...]
    batches: Callable[[int, int], Iterable[Batch]]
    limits: tuple[float, float]
    is_share: bool = False


def in_memory(inputs: Float[np.ndarray, "n ..."], labels: Labels) -> Examples:
    """Returns the examples of arrays in memory: inputs of the net, float32 `(n, ...)`, and labels,
    int32 `(n,)`.
    """
    limits = (float(inputs.min()), float(inputs.max())) if len(inputs) else (0.0, 1.0)
    first = lambda count, batch_size: evaluation_batches(inputs[:count], labels[:count], batch_size)
    return Examples(len(labels), inputs.shape[1:], first, limits)
