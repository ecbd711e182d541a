"""Data sets in memory, the paper's input spaces, and batches whose position is the step number.

    data = dd_jax.data.load("mnist", (28, 28, 1))                     # uint8 images, int32 labels
    preprocess = dd_jax.data.fit("mean_image", data.train_images)   # on training images only
    inputs = preprocess(data.train_images)                          # float32, the net's input space
    batch = dd_jax.data.training_batch(inputs, data.train_labels, batch_size=100, seed=0, step=0)

Sets that are too large for memory are read while the net trains: `open_images`, `training_stream`,
`evaluation_stream`.

Nothing here needs TensorFlow, and TFDS is imported only for a set that TFDS prepared.
"""

from dd_jax.data.batches import (
    Batch,
    Examples,
    evaluation_batches,
    in_memory,
    steps_per_epoch,
    training_batch,
)
from dd_jax.data.catalog import DATA_SETS, SOURCES, DataError, Entry, paper_preprocessing
from dd_jax.data.datasets import DataSet, hold_out, load
from dd_jax.data.image_files import STREAMED_SOURCES, EncodedDataSet, EncodedImages, open_images
from dd_jax.data.preprocessing import (
    PREPROCESSINGS,
    UNFITTED,
    Preprocessing,
    bounds,
    fit,
    make_to_images,
    value_of_black,
)
from dd_jax.data.workers import BatchStream, Pace, evaluation_stream, training_stream

__all__ = [
    "DATA_SETS",
    "PREPROCESSINGS",
    "SOURCES",
    "STREAMED_SOURCES",
    "UNFITTED",
    "Batch",
    "BatchStream",
    "DataError",
    "DataSet",
    "EncodedDataSet",
    "EncodedImages",
    "Entry",
    "Examples",
    "Pace",
    "Preprocessing",
    "bounds",
    "evaluation_batches",
    "evaluation_stream",
    "fit",
    "hold_out",
    "in_memory",
    "load",
    "make_to_images",
    "open_images",
    "paper_preprocessing",
    "steps_per_epoch",
    "training_batch",
    "training_stream",
    "value_of_black",
]
