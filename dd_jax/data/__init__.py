"""Data sets in memory, the paper's input spaces, and batches whose position is the step number.

    data = dd_jax.data.load("mnist", (28, 28, 1))                     # uint8 images, int32 labels
    preprocess = dd_jax.data.fit("mean_image", data.train_images)     # fitted on training images only
    inputs = preprocess(data.train_images)                            # float32, the network's input space
    batch = dd_jax.data.training_batch(inputs, data.train_labels, batch_size=100, seed=0, step=0)

Nothing here needs TensorFlow, and TFDS is imported only when one of its sets is asked for.
"""

from dd_jax.data.batches import evaluation_batches, steps_per_epoch, training_batch
from dd_jax.data.preprocessing import PREPROCESSINGS, Preprocessing, bounds, fit
from dd_jax.data.sources import SOURCES, DataError, DataSet, load

__all__ = [
    "SOURCES",
    "PREPROCESSINGS",
    "DataError",
    "DataSet",
    "Preprocessing",
    "bounds",
    "evaluation_batches",
    "fit",
    "load",
    "steps_per_epoch",
    "training_batch",
]
